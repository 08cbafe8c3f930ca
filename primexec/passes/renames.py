"""Removes what autograd leaves in backward programs.

Other names for one tensor, transposes of transposes, and dimensions that a sum keeps for a view to drop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from primexec.passes.emission import infer
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class RemoveRenames:
    """Works on backward programs only: nothing in them can be seen or told apart from outside but their outputs."""

    def __call__(self, program: Program) -> Program:
        if not program.is_backward:
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
    if node.target is torch.ops.aten.view.default and _drops_kept(node, source):
        source.args = (*source.args[:2], False)
        infer(source)
        return source
    return None


def _drops_kept(view: fx.Node, source: fx.Node) -> bool:
    """Whether a view drops the dimensions of size 1 that a sum of which nobody else knows has kept: all of them."""
    if source.target is not torch.ops.aten.sum.dim_IntList or source.args[2:] != (True,) or len(source.users) != 1:
        return False
    summed: Any = source.args[1]
    shape = source.meta["val"].shape
    dropped = {d % len(shape) for d in summed}
    return list(view.meta["val"].shape) == [n for d, n in enumerate(shape) if d not in dropped]
