"""Moves views behind pointwise operators, so that these are computed in the shape of what they are made of.

`silu(group_norm(x))` normalises groups of channels in a shape of its own, `pixel_shuffle(x, 2) * 0.5` copies what it
permutes before its dimensions are merged. A kernel has one domain, and no affine map leads from an index of merged
dimensions to those of their parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from primexec.executors.llvm.maps import identity, split
from primexec.executors.llvm.schedule import prim, value
from primexec.prims import lookup

_VIEW = torch.ops.aten.view.default


def move_views(graph: fx.Graph) -> None:
    """Changes a graph of prims, where all operands are such views or can be split as what one is a view of."""
    for node in graph.nodes:
        source = _source(node) if _is_pointwise(node) and value(node).is_contiguous() else None
        if source is None:
            continue
        made = torch.empty(value(source).shape, dtype=value(node).dtype, device="meta")
        with graph.inserting_before(node):
            args = [_reshaped(graph, a, value(node), made) if isinstance(a, fx.Node) else a for a in node.args]
            new = graph.call_function(node.target, tuple(args), node.kwargs)
            new.meta = node.meta | {"val": made}
            back = graph.call_function(_VIEW, (new, list(value(node).shape)))
            back.meta = dict(node.meta)
        node.replace_all_uses_with(back)
        graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node | None:
    """What is computed in the shape that the node could be computed in."""
    whole = [n for n in node.all_input_nodes if value(n).shape == value(node).shape]
    source = next((s for n in whole if prim(n) == "view" and _is_pointwise(s := _viewed(n))), None)
    if source is None or not value(source).is_contiguous() or not value(source).numel():
        return None
    few, many = value(node).shape, value(source).shape
    merges = split(many, few, identity(many), len(many)) is not None
    return source if merges or all(value(_viewed(n)).shape == many for n in whole) else None


def _viewed(node: fx.Node) -> fx.Node:
    """What views lead to the node from."""
    while prim(node) == "view":
        node = node.args[0]  # type: ignore[assignment]
    return node


def _reshaped(graph: fx.Graph, operand: fx.Node, result: Tensor, made: Tensor) -> fx.Node:
    """An operand of the result's shape, if it is of that, in the shape that is computed in."""
    t = value(operand)
    if t.shape != result.shape:
        return operand
    if value(_viewed(operand)).shape == made.shape:
        return _viewed(operand)
    new = graph.call_function(_VIEW, (operand, list(made.shape)))
    laid_out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    new.meta = operand.meta | {"val": laid_out.view(made.shape)}
    return new


def _is_pointwise(node: fx.Node) -> bool:
    row = lookup(node.target)
    return row is not None and (row.family == "pointwise" or prim(node) == "clone")
