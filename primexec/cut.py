"""What a forward program saves for backward, and what backward computes again."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from primexec import _torch, effects


def made_again(needed: Iterable[fx.Node], results: Iterable[fx.Node]) -> set[fx.Node]:
    """What backward computes again by cheap operators, so that the fewest bytes are saved; views are made anyhow.

    Memory that the caller can see, of inputs and results, is saved only where eager saves it: a change of it before
    the backward pass is an error then, and only then. Parameters cost nothing: they live on. A minimum cut between
    what cannot be made again and what is needed (Chen and others, 2016, and the min-cut partitioner of functorch, for
    the idea); of equal ones the cut nearest to what is needed.
    """
    networkx = importlib.import_module("networkx")  # 0.1 s that few need
    needed = list(needed)
    nodes = [n for node in needed[:1] for n in node.graph.nodes]
    written = {effects.storage_of(w) for n in nodes for w in effects.writes(n)}
    seen = {effects.storage_of(n) for n in (*results, *(n for n in nodes if n.op == "placeholder"))}
    seen -= {effects.storage_of(n) for n in needed}
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    reached: set[fx.Node] = set()
    again: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        alone = node.op == "call_function" and effects.aliases_input(node) and effects.stands_alone(node)
        view = effects.is_view(node) and not alone
        kept = math.inf if view or _is_size(node) or effects.storage_of(node) in seen else _bytes(node)
        flow.add_edge((node, "made"), (node, "kept"), capacity=kept)
        memory = {effects.storage_of(n) for n in (node, *node.all_input_nodes)}
        if view or _is_size(node) or (is_cheap(node) and memory.isdisjoint(written) and not alone):
            again.add(node)
            for source in node.all_input_nodes:
                flow.add_edge((source, "kept"), (node, "made"), capacity=math.inf)
                stack.append(source)
        else:
            flow.add_edge("source", (node, "made"), capacity=math.inf)
    for node in needed:
        flow.add_edge((node, "kept"), "sink", capacity=math.inf)
    _, (before, _) = networkx.minimum_cut(flow, "source", "sink")
    return {n for n in again if (n, "made") not in before}


_DEAR = re.compile(r"aten\.(special_|.*gamma|erfinv|i0)")  # series and iterations: a load costs far less


def is_cheap(node: fx.Node) -> bool:
    """Whether making the node's value again costs about as much as reading it: views, casts, pointwise operators."""
    tags = getattr(node.target, "tags", ())
    if node.op != "call_function" or effects.has_effect(node) or _DEAR.match(str(node.target)):
        return False
    return torch.Tag.pointwise in tags or node.target is torch.ops.aten._to_copy.default or effects.is_view(node)


def _is_size(node: fx.Node) -> bool:
    """Whether it is a number read off a tensor, which is no tensor that could be saved."""
    return isinstance(node.meta.get("val"), _torch.SYMBOLS)


_UNKNOWN_SIZE = 1 << 10  # a guess at sizes that depend on data


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return 0
    return math.prod(n if type(n) is int else _UNKNOWN_SIZE for n in value.shape) * value.element_size()
