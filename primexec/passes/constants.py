"""Lets a constant be used as it is where nobody can see or change it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from primexec import _torch, effects
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class ShareConstants:
    """`torch.tensor([1, 2])` makes a new tensor at every call. The copy is dropped where no operator writes to
    its memory and no output shares it."""

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        copies = [n for n in graph.nodes if n.target is torch.ops.aten.lift_fresh_copy.default]
        if not copies:
            return program
        kept = {_storage(n) for node in graph.nodes for n in effects.writes(node)}
        kept |= {_storage(n) for n in graph.output_node().all_input_nodes}
        kept |= {_storage(n) for node in graph.nodes if _is_opaque(node) for n in node.all_input_nodes}
        for node in copies:
            if _storage(node) not in kept:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        return program


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return _torch.storage_key(value) if isinstance(value, torch.Tensor) else None


def _is_opaque(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "aten") not in ("aten", "prims")
