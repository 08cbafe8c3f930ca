"""What a forward program saves for backward, and what backward computes again."""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects


def made_again(needed: Mapping[fx.Node, float], cost: Callable[[fx.Node], float]) -> dict[fx.Node, float]:
    """What backward computes again by cheap operators, so that the fewest bytes are saved; views are made anyhow.

    A minimum cut between what cannot be made again and what is needed (Chen and others, 2016, and the min-cut
    partitioner of functorch, for the idea); of equal ones the cut nearest to what is needed.

    Args:
        needed: nodes of one graph, and the position in it where each is needed first.
        cost: bytes that it takes to save the tensor of a node.

    Returns:
        Nodes in their order, and the position where each is needed first.
    """
    networkx = importlib.import_module("networkx")  # 0.1 s that few need
    nodes = [n for node in list(needed)[:1] for n in node.graph.nodes]
    writes: dict[int | None, list[int]] = {}
    for position, node in enumerate(nodes):
        for w in effects.writes(node):
            writes.setdefault(effects.storage_of(w), []).append(position)
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    due = dict(needed)
    again: dict[fx.Node, float] = {}
    for position, node in reversed(list(enumerate(nodes))):
        if node not in due:
            continue
        alone = node.op == "call_function" and effects.aliases_input(node) and effects.stands_alone(node)
        unsaved = _is_size(node) or (effects.is_view(node) and not alone)
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        flow.add_edge((node, "made"), (node, "kept"), capacity=cost(node) if is_tensor and not unsaved else math.inf)
        memory = [effects.storage_of(n) for n in (node, *node.all_input_nodes)]
        changed = any(position < w < due[node] for s in memory for w in writes.get(s, ()))
        if unsaved or (is_cheap(node) and not alone and not changed):
            again[node] = due[node]
            for source in node.all_input_nodes:
                flow.add_edge((source, "kept"), (node, "made"), capacity=math.inf)
                due[source] = min(due.get(source, math.inf), due[node])
        else:
            flow.add_edge("source", (node, "made"), capacity=math.inf)
    for node in needed:
        flow.add_edge((node, "kept"), "sink", capacity=math.inf)
    _, (before, _) = networkx.minimum_cut(flow, "source", "sink")
    return {n: again[n] for n in reversed(again) if (n, "made") not in before}


_DEAR = re.compile(r"\w+\.(special_|.*gamma|erf_?inv|i0|.*bessel|zeta|ndtri)")  # a load costs far less than a series
_NORMS = frozenset({torch.ops.aten.native_layer_norm.default})


def is_dear(op: Any) -> bool:
    """Whether a pointwise operator takes a series or iterations."""
    return _DEAR.match(str(op)) is not None


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result takes little to compute from one of each operand, in a kernel of ours."""
    pointwise = (
        torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target is torch.ops.aten._to_copy.default
    )
    ours = not any(map(effects.is_complex, (node, *node.all_input_nodes)))
    return pointwise and ours and not is_dear(node.target) and not effects.has_effect(node)


def is_cheap(node: fx.Node) -> bool:
    """Whether making the node's value again costs about as much as reading it."""
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "call_function" and (is_pointwise(node) or node.target in _NORMS or effects.is_view(node))


def _is_size(node: fx.Node) -> bool:
    """Whether it is a number read off a tensor, which is no tensor that could be saved."""
    return isinstance(node.meta.get("val"), _torch.SYMBOLS)
