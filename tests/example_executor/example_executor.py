"""An executor of primexec that computes with NumPy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from primexec.executors import PROTOCOL_VERSION, YES, Region, Support, no

prims = torch.ops.prims

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    prims.neg.default: np.negative,
    prims.exp.default: np.exp,
    prims.sqrt.default: np.sqrt,
    prims.add.default: np.add,
    prims.sub.default: np.subtract,
    prims.mul.default: np.multiply,
    prims.div.default: np.divide,
    prims.amax.default: lambda x, dims: np.max(x, axis=tuple(dims)),
    prims.sum.default: lambda x, dims: np.sum(x, axis=tuple(dims)),
}
DTYPES = (torch.float32, torch.float64)


class ExampleExecutor:
    name = "example"
    protocol_version = PROTOCOL_VERSION
    parameters: frozenset[str] = frozenset()

    def supports(self, node: fx.Node) -> Support:
        if node.target not in FUNCTIONS:
            return no("it is not in my table")
        tensors = [n.meta["val"] for n in (node, *node.all_input_nodes)]
        if any(t.dtype not in DTYPES for t in tensors):
            return no("only float32 and float64")
        if any(t.device.type != "cpu" for t in tensors):
            return no("only on the CPU")
        return YES

    def fingerprint(self) -> str:
        return f"numpy {np.__version__}"

    def compile(self, region: Region, options: Mapping[str, Any]) -> Callable[..., Sequence[Tensor]]:
        graph = region.graph_module.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        steps = [n for n in graph.nodes if n.op == "call_function"]
        returned = graph.output_node().args[0]

        def run(*inputs: Tensor) -> list[Tensor]:
            values: dict[fx.Node, Any] = {}
            for node, tensor in zip(placeholders, inputs, strict=True):
                values[node] = tensor.detach().numpy()
            for node in steps:
                arguments = fx.node.map_arg(node.args, values.__getitem__)
                with np.errstate(all="ignore"):
                    values[node] = np.asarray(FUNCTIONS[node.target](*arguments))
            return [torch.from_numpy(values[node]) for node in returned]

        return run
