"""Lets a constant be used as it is where nobody can see or change it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from primexec import effects
from primexec.program import ApiCall, Program


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
        kept = effects.seen_memory(graph)
        kept |= {effects.storage_of(n) for node in graph.nodes if _is_opaque(node) for n in node.all_input_nodes}
        shared = {n: n.args[0] for n in copies if effects.storage_of(n) not in kept}
        for node, constant in shared.items():
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
        return replace(program, calls=tuple(_renamed(c, shared) for c in program.calls))


def _renamed(call: ApiCall, shared: dict[fx.Node, fx.Node]) -> ApiCall:
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), lambda n: shared.get(n, n))
    inputs = frozenset(shared.get(n, n) for n in call.inputs)
    return replace(call, args=args, kwargs=kwargs, inputs=inputs)


def _is_opaque(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "aten") not in ("aten", "prims")
