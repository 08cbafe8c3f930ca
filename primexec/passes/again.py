"""Whole training steps: a backward pass inside of a program computes cheap values again, so that less is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from primexec import _torch, effects
from primexec.cut import made_again
from primexec.passes.emission import emit
from primexec.program import Program

_CONVERT, _EMPTY = torch.ops.aten._to_copy.default, torch.ops.aten.empty_like.default


@dataclass(frozen=True, slots=True)
class DrawsAsBits:
    """Draws of 0 or 1, as dropout makes them, are bools, where a backward pass follows: it keeps these."""

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        found = graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli.p)
        draws = {n for n in found if n.meta["val"].dtype is not torch.float64}  # which GPUs draw other numbers for
        if not draws or not any(n.meta.get("in_backward") for n in program.nodes):
            return program
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node in draws:
                bits = emit(made, node, _EMPTY, copies[node.args[0]], dtype=torch.bool)
                drawn = emit(made, node, node.target, bits, *node.args[1:], **node.kwargs)
                copies[node] = emit(made, node, _CONVERT, drawn, dtype=node.meta["val"].dtype)
            else:
                copies[node] = made.node_copy(node, copies.__getitem__)
        module = _torch.graph_module(program.graph_module, made)
        return replace(program, graph_module=module, calls=tuple(c.renamed(copies) for c in program.calls))


@dataclass(frozen=True, slots=True)
class ComputeAgain:
    """What a recorded backward pass needs of nodes before it is made again where that keeps fewer bytes."""

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        position = {n: i for i, n in enumerate(graph.nodes)}
        needed = {n: min(position[u] for u in users) for n in program.nodes if (users := list(_users_in_backward(n)))}
        if not needed or program.is_backward:
            return program
        returned = set(program.outputs)
        again = made_again(needed, lambda n: 0 if n.op != "call_function" or n in returned else effects.nbytes(n))
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}  # of all nodes
        second: dict[fx.Node, fx.Node] = {}  # of those that are made again
        due: dict[float, list[fx.Node]] = {}
        for node, place in again.items():
            due.setdefault(place, []).append(node)

        def in_backward(node: fx.Node) -> fx.Node:
            return second.get(node) or copies[node]

        for i, node in enumerate(graph.nodes):
            for early in due.get(i, ()):
                second[early] = made.node_copy(early, in_backward)
            copies[node] = made.node_copy(node, in_backward if node.meta.get("in_backward") else copies.__getitem__)
        module = _torch.graph_module(program.graph_module, made)
        return replace(program, graph_module=module, calls=tuple(c.renamed(copies) for c in program.calls))


def _users_in_backward(node: fx.Node) -> Iterator[fx.Node]:
    if not node.meta.get("in_backward"):
        yield from (u for u in node.users if u.meta.get("in_backward"))
