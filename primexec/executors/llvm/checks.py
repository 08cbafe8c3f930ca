"""Checks of indices that no kernel makes: eager asks all of them, kernels those that they read by.

Where an operator's result is used in part or not at all, or holds the same number everywhere, an assertion asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.llvm import maps
from primexec.executors.llvm.indirect import INDIRECT
from primexec.executors.llvm.ir import Kernel
from primexec.executors.llvm.maps import Map, Read
from primexec.executors.llvm.schedule import prim, step, value
from primexec.executors.llvm.writes import SCATTERS, write_of
from primexec.lowering.expand import inline, record

_aten = torch.ops.aten
REPEATS = "broadcast_in_dim"  # the same elements, more often


def is_whole(read: Read, kernel: Kernel) -> bool:
    """Whether a kernel reads all elements of the tensor that holds the indices."""
    axes, node, index = kernel.axes, read.node, read.index
    while prim(node) == REPEATS:
        index, node = step(node, index, len(axes)) or (), node.args[0]  # type: ignore[assignment]
    used = [a for t in index for a, s in enumerate(t.strides) if s and axes[a] != 1]
    spans = all(_spans(t, n, axes) for t, n in zip(index, value(node).shape, strict=True))
    return spans and len(used) == len(set(used)) and 0 not in axes


def _spans(term: maps.Term, size: int, axes: tuple[int, ...]) -> bool:
    """Whether a term counts from 0 to a size as its axes do, in any order."""
    covered, least = 1, term.offset
    for stride, n in sorted((abs(s), n) for s, n in zip(term.strides, axes, strict=True) if s and n != 1):
        if stride != covered:
            return False
        covered *= n
    least += sum(s * (n - 1) for s, n in zip(term.strides, axes, strict=True) if s < 0)
    return not term.reads and covered == size and least == 0


def missing(nodes: Iterable[fx.Node], made: set[tuple[fx.Node, fx.Node]]) -> list[Read]:
    """The indices that operators read or write by and that are not all checked.

    Args:
        nodes: the operators.
        made: what is checked, each as the operator that indexes and the tensor of indices.
    """
    found: dict[tuple[fx.Node, fx.Node], Read] = {}
    for node in nodes:
        if (read := node.meta.get("read")) is not None:
            made.add((read.user, read.node))
    for node in nodes:
        for read in _reads(node):
            if read.user is node and (node, read.node) not in made and value(read.node).numel():
                found[node, read.node] = read
    return list(found.values())


def _reads(node: fx.Node) -> list[Read]:
    at: Map | None = None
    if prim(node) in INDIRECT and value(node).numel():
        at = step(node, maps.identity(value(node).shape), value(node).dim())
    elif prim(node) in SCATTERS:
        at = write_of(node, prim(node)).at
    return list(maps.reads_of(at or ()))


def with_assertions(graph: fx.Graph, reads: Iterable[Read]) -> fx.Graph:
    """A copy of a graph that asserts, too, that indices are inside of what they index."""
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.output_node()
    for node in graph.nodes:
        if node is not output:
            copies[node] = copy = made.node_copy(node, copies.__getitem__)
            if "read" in copy.meta:
                copy.meta["read"] = _moved(copy.meta["read"], copies)
    for read in reads:
        _assert(made, read, copies)
    made.node_copy(output, copies.__getitem__)
    return made


def _moved(read: Read, copies: dict[fx.Node, fx.Node]) -> Read:
    return replace(read, node=copies[read.node], user=copies[read.user])


def _assert(graph: fx.Graph, read: Read, copies: dict[fx.Node, fx.Node]) -> None:
    low = -read.size if read.wraps else 0

    def inside(index: Tensor) -> list[Any]:
        return [((index >= low) & (index < read.size)).all()]

    asked: Any = read.node
    while prim(asked) == REPEATS:
        asked = asked.args[0]
    expansion = record(inside, [value(asked)])
    assert not isinstance(expansion, str), expansion
    (holds,) = inline(expansion, read.user, graph, [copies[asked]])
    node = graph.call_function(_aten._assert_async.msg, (holds, ""))
    node.meta.update(read.user.meta, val=torch.empty((), dtype=torch.int64, device="meta"), read=_moved(read, copies))
