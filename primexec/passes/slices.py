"""Parts of a tensor that are written to, as slices: each is a view by itself, and what is written can be followed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from primexec import _torch, effects
from primexec.passes.emission import emit
from primexec.program import Program

_aten = torch.ops.aten
_SPLITS = frozenset(
    {
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.unsafe_split.Tensor,
        _aten.unsafe_split_with_sizes.default,
    }
)


def parts_as_slices(program: Program) -> Program:
    """`unsafe_split` and its like as slices: the gates of PyTorch's recurrent cells are changed where they lie."""
    graph = program.graph_module.graph
    written = {effects.storage_of(w) for n in program.nodes for w in effects.writes(n)}
    written -= {effects.storage_of(n) for n in graph.find_nodes(op="placeholder")}
    returned = set(program.outputs)
    splits = {n for n in program.nodes if n.target in _SPLITS and returned.isdisjoint(n.users)}
    splits = {n for n in splits if effects.storage_of(n.all_input_nodes[0]) in written}
    if not splits:
        return program
    made = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in splits:
            copies[node] = list(_slices(made, node, copies[node.args[0]]))
        elif node.target is operator.getitem and node.args[0] in splits:
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
    touched = splits.union(*(n.users for n in splits))
    calls = tuple(c.renamed(copies) for c in program.calls if touched.isdisjoint((*c.nodes, *c.inputs, *c.results)))
    return replace(program, graph_module=_torch.graph_module(program.graph_module, made), calls=calls)


def _slices(graph: fx.Graph, node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    ends = itertools.accumulate((part.shape[dim] for part in node.meta["val"]), initial=0)
    for start, end in itertools.pairwise(ends):
        yield emit(graph, node, _aten.slice.Tensor, source, dim, start, end)
