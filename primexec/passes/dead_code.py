"""Removes what nobody uses and what cannot fail: views, constants and copies.

An operator that computes stays even if its result is unused: its kernel may raise, as it does in eager.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from primexec import effects
from primexec.program import Program

_aten = torch.ops.aten
_CANNOT_FAIL = frozenset({
    operator.getitem, _aten.empty.memory_format, _aten.lift_fresh_copy.default, _aten.cat.default, _aten.stack.default,
    _aten.clone.default,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RemoveDeadCode:
    """One sweep from the last node to the first; inputs stay, they are the program's signature."""

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and not node.users and _cannot_fail(node):
                graph.erase_node(node)
        live = set(graph.nodes)
        calls = (replace(c, nodes=tuple(n for n in c.nodes if n in live)) for c in program.calls)
        return replace(program, calls=tuple(c for c in calls if c.nodes))


def _cannot_fail(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.as_strided.default or effects.has_effect(node):
        return False
    return node.target in _CANNOT_FAIL or effects.aliases_input(node)
