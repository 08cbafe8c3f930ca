"""Gives attention with grouped queries the keys and values of each group once, where a program repeats them before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from primexec import _torch, effects
from primexec.program import Program

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default)


@dataclass(frozen=True, slots=True)
class ShareKeys:
    """ATen's kernel takes keys and values of fewer heads than queries have, and gives the same bits.

    Repeated ones that anything else uses, as a backward pass does, stay.
    """

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        place = {n: i for i, n in enumerate(graph.nodes)}
        written: dict[int | None, int] = {}  # memory → the place of the last write so far
        shared: dict[fx.Node, fx.Node] = {}  # what is repeated, for each repetition
        touched: set[fx.Node] = set()
        for node in program.nodes:
            written |= {effects.storage_of(n): place[node] for n in effects.writes(node)}
            if node.target is _ATTENTION:
                operands: Any = node.args[1:3]
                chains = [_repetition(n) for n in operands]
                fresh = all(c and written.get(effects.storage_of(c[-1]), -1) < place[c[1]] for c in chains)
                if fresh and len({c[-1].meta["val"].shape[1] for c in chains}) == 1:
                    shared |= {c[0]: c[-1] for c in chains}
                    touched |= {node, *(n for c in chains for n in c[:-1])}
        if not shared:
            return program
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node not in touched or node.target is _ATTENTION:
                copies[node] = made.node_copy(node, lambda n: copies[shared.get(n, n)])
        calls = tuple(c.renamed(copies) for c in program.calls if touched.isdisjoint((*c.nodes, *c.inputs, *c.results)))
        return replace(program, graph_module=_torch.graph_module(program.graph_module, made), calls=calls)


def _repetition(node: fx.Node) -> list[fx.Node]:
    """A node whose tensor is another's with each head repeated, the nodes that make it of that one, and that one."""
    chain = [node]
    for targets in (_RESHAPES, (_aten.clone.default,), (_aten.expand.default,), (_aten.unsqueeze.default,)):
        if chain[-1].target not in targets or len(chain[-1].users) > 1:
            return []
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    repeated, expanded, few = (chain[i].meta["val"] for i in (0, 2, -1))
    batch, heads, *rest = few.shape
    fits = few.dim() == 4 and few.stride(-1) == 1 and expanded.shape[:2] == (batch, heads)
    return chain if fits and repeated.shape == (batch, heads * expanded.shape[2], *rest) else []
