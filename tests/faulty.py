"""Executors that run ATen operators, and are wrong in one way each."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.base import PROTOCOL_VERSION, YES, Region, Support

aten = torch.ops.aten


class Honest:
    """Runs a region node by node, as one thing; counts what it compiles."""

    name = "honest"
    protocol_version = PROTOCOL_VERSION
    parameters: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.compiles = 0

    def supports(self, node: fx.Node) -> Support:
        return YES

    def fingerprint(self) -> str:
        return self.name

    def compile(self, region: Region, options: Mapping[str, Any]) -> Callable[..., Sequence[Tensor]]:
        self.compiles += 1
        graph = region.graph_module.graph

        def run(*inputs: Tensor) -> list[Tensor]:
            values = dict(zip([n for n in graph.nodes if n.op == "placeholder"], inputs, strict=True))
            for node in graph.nodes:
                if node.op == "call_function":
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                    call = node.target if node.target is operator.getitem else self.call
                    values[node] = call(*args) if call is operator.getitem else self.call(node.target, args, kwargs)
            return [values[n] for n in graph.output_node().args[0]]

        return run

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return op(*args, **kwargs)


class WrongPolynomial(Honest):
    """exp by a Taylor polynomial that is too short beyond 1."""

    name = "polynomial"

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        exact = op(*args, **kwargs)
        if op is not aten.exp.default:
            return exact
        x = args[0]
        short = sum(x**k / torch.lgamma(torch.tensor(k + 1.0)).exp() for k in range(8))
        return torch.where((x > 1) & (x < 2), short, exact)


class WrongOrder(Honest):
    """Sums one element after the other, in the dtype of the tensor."""

    name = "order"

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op is not aten.sum.dim_IntList:
            return op(*args, **kwargs)
        x, (dim,), keep = (*args, False)[:3]
        total = torch.zeros_like(x.select(dim, 0))
        for part in x.unbind(dim):
            total = total + part
        return total.unsqueeze(dim) if keep else total


class MissingMask(Honest):
    """Vectors of eight: a sum along rows takes what stands behind the last element too."""

    name = "mask"

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = op(*args, **kwargs)
        if op is aten.tanh.default and y.shape[-1] % 8:
            y = y.clone()
            y[..., -(y.shape[-1] % 8) :] = args[0][..., -(y.shape[-1] % 8) :]
        return y


class UninitialisedRead(Honest):
    """A concatenation that does not write its last row."""

    name = "uninitialised"

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = op(*args, **kwargs)
        if op is aten.cat.default:
            y = y.clone()
            y[-1] = torch.full_like(y[-1], 3.7e-3)  # what happened to stand there
        return y


def one_by_one(kind: type) -> type:
    """The same executor, saying that it does not fuse."""
    return type(kind.__name__, (kind,), {"fuses": False})
