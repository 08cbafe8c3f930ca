"""Operators with effects that executors know faster ones for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from primexec import _torch
from primexec.passes.emission import copied
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class Instead:
    """Calls what `find` gives for an operator, where it gives something, with the same arguments."""

    find: Callable[[fx.Node], Any]

    def __call__(self, program: Program) -> Program:
        found = {n: op for n in program.nodes if (op := self.find(n)) is not None}
        if not found:
            return program
        made, copies = copied(program.graph_module.graph)
        for node, op in found.items():
            copies[node].target = op
        calls = tuple(c.renamed(copies) for c in program.calls if found.keys().isdisjoint(c.nodes))
        return replace(program, graph_module=_torch.graph_module(program.graph_module, made), calls=calls)
