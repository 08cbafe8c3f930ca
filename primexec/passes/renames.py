"""Removes what autograd leaves in backward programs: other names for one tensor, and transposes of transposes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from primexec.program import Program


@dataclass(frozen=True, slots=True)
class RemoveRenames:
    """Works on backward programs only: nothing in them can be seen or told apart from outside but their outputs."""

    def __call__(self, program: Program) -> Program:
        if not any(i.kind == "tangent" for i in program.inputs):
            return program
        graph = program.graph_module.graph
        for node in list(graph.nodes):
            same = _same_tensor(node)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
        return program


def _same_tensor(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is torch.ops.aten.detach.default:
        return source
    if node.target is torch.ops.aten.t.default and source.target is node.target:
        return source.args[0]  # type: ignore[return-value]
    return None
