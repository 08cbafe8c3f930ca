"""Passes for programs in prims: equal operators become one, and what does nothing goes.

Neither touches what shows outside: effects and random draws, memory that is written to, results of the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from primexec import effects
from primexec.prims import Prim, lookup
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class MergeEqual:
    """Of prims with equal arguments the first one stays (common subexpression elimination)."""

    def __call__(self, program: Program) -> Program:
        merge_equal(program.graph_module.graph)
        return program


@dataclass(frozen=True, slots=True)
class RemoveNoOps:
    """Views and copies of the very same metadata give way to their argument, and views of views to one view.

    Unused prims that cannot fail go.
    """

    def __call__(self, program: Program) -> Program:
        remove_no_ops(program.graph_module.graph)
        return program


def merge_equal(graph: fx.Graph) -> None:
    """What MergeEqual does, to any graph in prims."""
    seen = effects.seen_memory(graph)
    first: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if _is_plain(node, seen):
            kept = first.setdefault((node.target, _freeze(node.args), _freeze(node.kwargs)), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def remove_no_ops(graph: fx.Graph) -> None:
    """What RemoveNoOps does, to any graph in prims."""
    seen = effects.seen_memory(graph)
    for node in graph.nodes:
        while _is_view_of_view(node):
            node.replace_input_with(node.args[0], node.args[0].args[0])
        if str(node.target) in _IDENTITIES and _is_plain(node, seen) and effects.same_layout(node.args[0], node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        row = lookup(node.target)
        if not node.users and row is not None and row.effects == "none" and _cannot_fail(row):
            graph.erase_node(node)


def _cannot_fail(row: Prim) -> bool:
    """Whether a prim raises for no values; what indexes by data does."""
    return row.recompute != "dear" or row.family == "reduction"


# Prims that return their argument's own elements in order, where shape and strides come out as they went in.
_IDENTITIES = frozenset(
    {
        "prims.view_of.default",
        "prims.broadcast_in_dim.default",
        "prims.squeeze.default",
        "aten.view.default",
        "prims.clone.default",
        "prims.convert_element_type.default",
    }
)


def _is_view_of_view(node: fx.Node) -> bool:
    """Whether a view reads another view's elements in their order; of contiguous memory, every shape is one."""
    view = torch.ops.aten.view.default
    if node.target is not view or node.args[0].target is not view:  # type: ignore[union-attr]
        return False
    base: torch.Tensor = node.args[0].args[0].meta["val"]  # type: ignore[union-attr]
    return base.is_contiguous()


def _is_plain(node: fx.Node, seen: set[int | None]) -> bool:
    """A prim with one result, whose memory and arguments nobody writes to or gets."""
    row = lookup(node.target)
    if row is None or row.effects != "none" or row.name == "empty_strided":
        return False
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return seen.isdisjoint(effects.storage_of(n) for n in (node, *node.all_input_nodes))


def _freeze(value: Any) -> Any:
    """The arguments of a node as a key: NaN equals itself, and 1, 1.0, True and -0.0 are told apart."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_freeze, value))
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in value.items())
    return (type(value), repr(value)) if isinstance(value, (int, float, complex)) else value
