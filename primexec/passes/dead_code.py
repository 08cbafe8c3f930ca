"""Removes operators without effects whose results nobody uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from primexec import effects
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class RemoveDeadCode:
    """One sweep from the last node to the first; inputs stay, they are the program's signature."""

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and not node.users and not effects.has_effect(node):
                graph.erase_node(node)
        live = set(graph.nodes)
        calls = (replace(c, nodes=tuple(n for n in c.nodes if n in live)) for c in program.calls)
        return replace(program, calls=tuple(c for c in calls if c.nodes))
