"""Lets a constant be used as it is where nobody can see or change it, and computes once what depends on constants."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec.higher_order import add_placeholder
from primexec.passes.emission import copied
from primexec.program import MADE_WHILE_TRACING, Input, Program, base_name


@dataclass(frozen=True, slots=True)
class ShareConstants:
    """Drops the copy that `torch.tensor([1, 2])` makes at every call.

    It stays where an operator writes to its memory, or an output shares it.
    """

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        copies = [n for n in graph.nodes if n.target is torch.ops.aten.lift_fresh_copy.default]
        if not copies:
            return program
        kept = _seen_memory(graph)
        shared = {n: n.args[0] for n in copies if effects.storage_of(n) not in kept}
        for node, constant in shared.items():
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
        return replace(program, calls=tuple(c.renamed(shared) for c in program.calls))


@dataclass(frozen=True, slots=True)
class FoldConstants:
    """Computes once, when the program is compiled, what depends on constants alone: positions, masks, tables.

    Never random draws, memory that is written or returned, or uninitialised memory; tensors of one number throughout
    stay, for making them costs less than reading them.

    Attributes:
        largest: how many bytes one result may have.
        most: how many bytes all of them may have.
    """

    largest: int = 1 << 20
    most: int = 1 << 24

    def __call__(self, program: Program) -> Program:
        if program.inputs and not any(i.kind in ("argument", "state") for i in program.inputs):
            return program  # a backward program, or one of constants alone
        values = self._values(program)
        whole = _of_whole_calls(program, values)
        ends = [n for n in whole if not whole.issuperset(n.users) and isinstance(values[n], Tensor)]
        ends = [n for n in ends if not _is_splat(n)]
        if not ends or sum(values[n].untyped_storage().nbytes() for n in ends) > self.most:
            return program
        graph, copies = copied(program.graph_module.graph)  # it may be planned once more, for other executors
        made: dict[fx.Node, fx.Node] = {}
        for node in ends:
            made[node] = new = add_placeholder(graph, f"constant_{node.name}")
            new.meta.update(node.meta)
            copies[node].replace_all_uses_with(new)
        for node in reversed(list(copies)):
            if node in whole and not copies[node].users:
                graph.erase_node(copies.pop(node))
        calls = [c for c in program.calls if copies.keys() >= {*c.nodes}]
        copies |= made
        return replace(
            program,
            graph_module=_torch.graph_module(program.graph_module, graph),
            calls=tuple(c.renamed(copies) for c in calls if copies.keys() >= {*c.inputs, *c.results}),
            inputs=(*program.inputs, *(Input(n.name, "constant", MADE_WHILE_TRACING) for n in made.values())),
            constants=(*program.constants, *(values[n] for n in made)),
        )

    def _values(self, program: Program) -> dict[fx.Node, Any]:
        """What can be computed now, with its value."""
        graph = program.graph_module.graph
        seen = _seen_memory(graph)
        inputs = zip(program.inputs, graph.find_nodes(op="placeholder"), strict=True)
        constants = [(i, n) for i, n in inputs if i.kind == "constant"]
        values: dict[fx.Node, Any] = {
            n: v
            for (i, n), v in zip(constants, program.constants, strict=True)
            if i.label == MADE_WHILE_TRACING and effects.storage_of(n) not in seen
        }
        for node in program.nodes:
            fits = all(n in values for n in node.all_input_nodes) and seen.isdisjoint(_storages(node))
            if fits and _is_constant(node) and max(map(_bytes, _results(node)), default=0) <= self.largest:
                value = _compute(node, values)
                if value is not None:
                    values[node] = value
        return {n: v for n, v in values.items() if n.op == "call_function"}


_SPLATS = frozenset(["full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "scalar_tensor", "new_full",
                     "new_zeros", "new_ones", "fill"])  # fmt: skip


def _is_splat(node: fx.Node) -> bool:
    """Whether all elements of the result are one number, by the look of the node."""
    while effects.is_view(node) and node.args[0].op == "call_function":  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return base_name(node) in _SPLATS


def _is_constant(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    computes = isinstance(node.target, _torch.OpOverload) and not effects.has_effect(node)
    return computes and "empty" not in base_name(node)


def _results(node: fx.Node) -> list[Tensor]:
    return [t for t in _torch.pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def _storages(node: fx.Node) -> list[int | None]:
    return [_torch.storage_key(t) for t in _results(node)]


def _bytes(t: Tensor) -> int:
    known = all(type(n) is int for n in t.shape)
    return t.numel() * t.element_size() if known else 1 << 62


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The node's value; None where computing it fails or warns, which it must do at every call."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        with _torch.quiet_modes(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            value: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:
        return None
    given = [t for t in _torch.pytree.tree_leaves(value) if isinstance(t, Tensor)]
    expected = [(t.dtype, t.shape, t.stride(), t.device) for t in _results(node)]
    return value if [(t.dtype, t.shape, t.stride(), t.device) for t in given] == expected else None


def _of_whole_calls(program: Program, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """The nodes among them that leave every call of the API whole: it is replayed with all its nodes or not at all."""
    found = set(values)
    before = -1
    while len(found) != before:
        before = len(found)
        for call in program.calls:
            if not found.issuperset(call.nodes):
                found.difference_update(call.nodes)
        for node in program.nodes:
            if node in found and any(n.op == "call_function" and n not in found for n in node.all_input_nodes):
                found.discard(node)
    return found


def _seen_memory(graph: fx.Graph) -> set[int | None]:
    opaque = (n for node in graph.nodes if _is_opaque(node) for n in node.all_input_nodes)
    return effects.seen_memory(graph).union(map(effects.storage_of, opaque))


def _is_opaque(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "aten") not in ("aten", "prims")
