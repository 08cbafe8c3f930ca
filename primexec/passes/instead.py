"""Operators with effects that executors know faster ones for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx

from primexec import _torch, effects
from primexec.program import Program


class Call(NamedTuple):
    """What gives the same result, with the same effects, as some nodes that follow each other.

    Attributes:
        last: of these nodes; nobody but they use the others' results.
    """

    last: fx.Node
    operator: Any
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instead:
    """Calls what `find` gives for the first of some nodes, where it gives something, in their place."""

    find: Callable[[fx.Node], Call | None]

    def __call__(self, program: Program) -> Program:
        found = {n: call for n in program.nodes if (call := self.find(n)) is not None}
        if not found:
            return program
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        gone = set(found)
        for node, call in found.items():
            while node is not call.last:
                gone.add(node := node.next)
        for node in program.graph_module.graph.nodes:
            if call := found.get(node):
                new = made.call_function(call.operator, fx.node.map_arg(call.args, copies.__getitem__))
                new.meta = dict(call.last.meta)
                copies[call.last] = new
            elif node not in gone:
                copies[node] = made.node_copy(node, copies.__getitem__)
        unused = {n for node in found for n in node.all_input_nodes if not (copies[n].users or effects.has_effect(n))}
        for node in unused:
            made.erase_node(copies.pop(node))
        gone |= unused
        calls = tuple(c.renamed(copies) for c in program.calls if gone.isdisjoint((*c.nodes, *c.inputs)))
        return replace(program, graph_module=_torch.graph_module(program.graph_module, made), calls=calls)
