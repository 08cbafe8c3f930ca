"""Gives ATen's maximum pools channels-last images, which it pools with vector instructions, and others without.

Pools with few elements a window are left as they are: executors that take any layout make them of simpler prims.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch
from primexec.passes.emission import emit
from primexec.program import Program

_POOL = torch.ops.aten.max_pool2d_with_indices.default
FEW_ELEMENTS = 16  # of a window: comparing each by itself costs less than copies
_VECTOR_BYTES = 32  # of the channels at one point; with fewer, the copies cost more than they save


@dataclass(frozen=True, slots=True)
class PoolsChannelsLast:
    """A pool of a contiguous image takes a copy of it, and its results are copied back: eager's strides show.

    Values and places are the same in both layouts.
    """

    def __call__(self, program: Program) -> Program:
        graph = program.graph_module.graph
        pools = {n for n in graph.find_nodes(op="call_function", target=_POOL) if _gains(n)}
        if not pools:
            return program
        made = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node in pools:
                copies[node] = _pool(made, node, copies)
            elif node.target is operator.getitem and node.args[0] in pools:
                copies[node] = _part(made, node, copies)
            else:
                copies[node] = made.node_copy(node, copies.__getitem__)
        module = _torch.graph_module(program.graph_module, made)
        calls = tuple(c.renamed(copies) for c in program.calls if pools.isdisjoint(c.nodes))
        return replace(program, graph_module=module, calls=calls)


def _gains(node: fx.Node) -> bool:
    image: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    return (
        math.prod(spread(node.args[1], 2)) > FEW_ELEMENTS
        and image.dim() == 4
        and image.dtype.is_floating_point
        and image.device.type == "cpu"
        and all(type(n) is int for n in image.shape)
        and image.numel() > 0
        and image.is_contiguous()
        and not image.is_contiguous(memory_format=torch.channels_last)
        and image.shape[1] * image.element_size() >= _VECTOR_BYTES
    )


def spread(given: Any, rank: int) -> list[int]:
    """A number for each dimension that windows move along; one stands for all."""
    values = [given] if isinstance(given, int) else list(given)
    return values * rank if len(values) == 1 else values


def _pool(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    image = copies[node.args[0]]  # type: ignore[index]
    laid = emit(graph, node, torch.ops.aten.clone.default, image, memory_format=torch.channels_last)
    return emit(graph, node, _POOL, laid, *node.args[1:], **node.kwargs)


def _part(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    """A result as it was laid out, under its name: what autograd saves is found by it."""
    source = copies[node.args[0]]  # type: ignore[index]
    laid = emit(graph, node, operator.getitem, source, node.args[1])
    kept: dict[str, Any] = {"memory_format": torch.contiguous_format}
    back = graph.create_node("call_function", torch.ops.aten.clone.default, (laid,), kept, name=node.name)
    back.meta = dict(node.meta)
    return back
