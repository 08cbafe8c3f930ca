"""Results that are views, apart from what the program computes with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from primexec import _torch, effects
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class ViewsApart:
    """A view that is returned is made once more for whoever reads it inside: only PyTorch may return one."""

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        written = {effects.storage_of(w) for n in program.nodes for w in effects.writes(n)}
        shared = {
            n
            for n in program.outputs
            if n.op == "call_function"
            and len(n.users) > 1
            and effects.is_view(n)
            and effects.storage_of(n) not in written
        }
        if not shared:
            return program
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inside: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            copies[node] = made.node_copy(
                node, copies.__getitem__ if node.op == "output" else lambda n: inside.get(n) or copies[n]
            )
            if node in shared:
                inside[node] = made.node_copy(node, lambda n: inside.get(n) or copies[n])
        calls = tuple(c.renamed(copies) for c in program.calls if shared.isdisjoint((*c.nodes, *c.inputs)))
        return replace(program, graph_module=_torch.graph_module(program.graph_module, made), calls=calls)
