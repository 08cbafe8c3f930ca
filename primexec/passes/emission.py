"""New nodes in the graph of a captured program, with the metadata that a capture would have given them."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_fake, numbers
from primexec.program import TensorSpec

_KEPT = ("source", "stack_trace", "inference", "in_backward")


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph of its own, and the node in it that stands for each."""
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = made.node_copy(node, copies.__getitem__)
    return made, copies


def emit(graph: fx.Graph, origin: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node on the line of another one."""
    node = graph.call_function(op, args, kwargs)
    node.meta = {k: origin.meta[k] for k in _KEPT if k in origin.meta}
    infer(node)
    return node


def infer(node: fx.Node) -> None:
    """Gives a node the metadata of its result, from that of its arguments; generators have none."""
    out = result(node.target, node.args, node.kwargs, node.graph)
    spec = TensorSpec.of(out) if isinstance(out, Tensor) else [TensorSpec.of(t) for t in out]
    node.meta.update(val=out, spec=spec)


def result(op: Any, args: Any, kwargs: Any, graph: fx.Graph | None = None) -> Any:
    """The metadata of what an operator gives for nodes and other values; of one without tensors, in a graph."""
    given: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta.get("val"))
    args, kwargs = numbers.on_metadata(op, *given)
    if op is operator.getitem:
        return args[0][args[1]]
    others = (n.meta.get("val") for n in (graph.nodes if graph else ()))
    like: Any = next(v for v in chain(_torch.pytree.tree_leaves((args, kwargs)), others) if isinstance(v, Tensor))
    with _torch.quiet_modes(), like.fake_mode, torch.no_grad():
        return _torch_fake.run(op, args, kwargs)
