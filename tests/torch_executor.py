"""An executor that is right, for it runs every prim through eager PyTorch; and what goes wrong when it is bent."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch
from primexec.executors import PROTOCOL_VERSION, YES, Region, Support, no

HALVES_MISSING = ("prims.erfcx.default", "prims.ndtri.default")
Compute = Callable[..., Any]
Fault = Callable[..., Any]  # (compute, node, *args, **kwargs) -> result


def eager(op: Any) -> Compute:
    return _torch.prim_as_aten(op) or op


class TorchExecutor:
    """Runs a region node by node; `fault` takes the place of each computation."""

    name = "torch"
    protocol_version = PROTOCOL_VERSION
    parameters: frozenset[str] = frozenset()

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault

    def supports(self, node: fx.Node) -> Support:
        if not isinstance(node.target, torch._ops.OpOverload):
            return no("not an operator")
        value = node.meta["val"]
        if str(node.target) in HALVES_MISSING and value.dtype.itemsize == 2:
            return no("PyTorch has no kernel for half precision")
        return YES

    def fingerprint(self) -> str:
        return torch.__version__

    def compile(self, region: Region, options: Mapping[str, Any]) -> Callable[..., Sequence[Tensor]]:
        graph = region.graph_module.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]

        def run(*inputs: Tensor) -> list[Tensor]:
            known: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
            for node in graph.nodes:
                if node.op == "call_function":
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                    if node.target is operator.getitem:
                        known[node] = args[0][args[1]]
                    elif self.fault is not None:
                        known[node] = self.fault(eager(node.target), node, *args, **kwargs)
                    else:
                        known[node] = eager(node.target)(*args, **kwargs)
            return [known[n] for n in graph.output_node().args[0]]

        return run
