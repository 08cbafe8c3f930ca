"""Runs a captured program operator by operator, eagerly and as prims, and compares each result."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from primexec import Program, effects
from primexec.lowering import Expansion, expand

# Results that are not determined by the arguments alone: uninitialised memory, signs of vectors.
UNDEFINED = ("empty", "new_empty", "resize", "svd", "pca_lowrank", "svd_lowrank")


def run_graph(graph: fx.Graph, inputs: list[Any]) -> Any:
    """The outputs of a graph on real tensors, through torch's own implementations."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
    raise AssertionError


def steps(program: Program, inputs: list[Tensor]) -> Iterator[tuple[fx.Node, Expansion, list[Any], list[Any]]]:
    """(node, expansion, eager results, results as prims) for each node that expands."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            expansion = None if node.target is operator.getitem or effects.has_effect(node) else expand(node)
            before = [values[n] for n in node.all_input_nodes]
            as_prims = None if expansion is None else run_graph(expansion.graph, before)
            values[node] = node.target(*args, **kwargs)
            if expansion is not None:
                eager = values[node] if isinstance(values[node], (tuple, list)) else [values[node]]
                yield node, expansion, list(eager), list(as_prims)


def check(program: Program, inputs: list[Tensor], rtol: float | None = None, atol: float | None = None) -> int:
    """Compare all steps; returns how many there were."""
    count = 0
    for node, expansion, eager, mine in steps(program, inputs):
        count += 1
        for i, (expected, got) in enumerate(zip(eager, mine, strict=False)):
            if not isinstance(expected, Tensor) or expansion.results[i] is None:
                continue
            message = f"{node.target} {node.args} result {i}\n{expansion.graph}"
            assert got.dtype == expected.dtype, message
            assert got.shape == expected.shape, message
            if not any(name in str(node.target) for name in UNDEFINED):
                torch.testing.assert_close(
                    got, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, t=message: f"{m}\n{t}"
                )
    return count


def leaves(call: Any) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
