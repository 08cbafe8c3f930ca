"""What a forward program saves for backward, and what backward computes again."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from primexec import effects


def smallest_to_save(needed: Iterable[fx.Node]) -> set[fx.Node]:
    """The values to save so that the needed ones can be made again from them by cheap operators, with fewest bytes.

    Parameters and other state cost nothing: they live on anyhow. A minimum cut between what cannot be made again
    and what is needed (Chen and others, 2016, and the min-cut partitioner of functorch, for the idea).
    """
    networkx = importlib.import_module("networkx")  # 0.1 s that few need
    needed = list(needed)
    written = {effects.storage_of(w) for n in needed[:1] for node in n.graph.nodes for w in effects.writes(node)}
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    reached: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        flow.add_edge((node, "made"), (node, "kept"), capacity=_bytes(node))
        if is_cheap(node) and effects.storage_of(node) not in written:
            for source in node.all_input_nodes:
                flow.add_edge((source, "kept"), (node, "made"), capacity=math.inf)
                stack.append(source)
        else:
            flow.add_edge("source", (node, "made"), capacity=math.inf)
    for node in needed:
        flow.add_edge((node, "kept"), "sink", capacity=math.inf)
    _, (before, after) = networkx.minimum_cut(flow, "source", "sink")
    return {n for n in reached if (n, "made") in before and (n, "kept") in after}


def is_cheap(node: fx.Node) -> bool:
    """Whether making the node's value again costs about as much as reading it: views, casts, pointwise operators."""
    tags = getattr(node.target, "tags", ())
    if node.op != "call_function" or effects.has_effect(node):
        return False
    return torch.Tag.pointwise in tags or node.target is torch.ops.aten._to_copy.default or effects.is_view(node)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return 0 if isinstance(value, torch.nn.Parameter) else value.numel() * value.element_size()
