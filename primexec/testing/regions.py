"""Regions made by hand: operators on given tensors, with the metadata that a captured program would have."""

from __future__ import annotations

import operator
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_fake, _torch_rules
from primexec.errors import SourceLine
from primexec.executors.base import Executor, Region
from primexec.program import TensorSpec


class Builder:
    """Writes a region, operator by operator. Nodes carry fake tensors; no real value reaches an executor's eyes."""

    def __init__(self, executor: str) -> None:
        self.executor = executor
        self.graph = fx.Graph()
        self.mode = _torch_fake.fake_mode()
        self.inputs: list[Tensor] = []

    def input(self, tensor: Tensor) -> fx.Node:
        """A placeholder for this tensor."""
        node = self.graph.placeholder(f"arg{len(self.inputs)}")
        self.inputs.append(tensor)
        return self._described(node, self.mode.from_tensor(tensor))

    def arguments(self, tree: Any) -> Any:
        """The arguments of a call, with a placeholder for each tensor."""
        return _torch.pytree.tree_map(lambda x: self.input(x) if isinstance(x, Tensor) else x, tree)

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A call of an operator on nodes and static values."""
        fakes = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        if torch.Tag.dynamic_output_shape in op.tags:
            _torch_rules.allow_unknown_sizes(self.mode)
        with self.mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's metadata functions use what PyTorch deprecates
            value = op(*fakes[0], **fakes[1])
        return self._described(self.graph.call_function(op, args, kwargs), value)

    def results(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """A node for each tensor that a call returns."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return (node,)
        return tuple(
            self._described(self.graph.call_function(operator.getitem, (node, i)), item)
            for i, item in enumerate(value)
            if isinstance(item, Tensor)
        )

    def finish(self, outputs: tuple[fx.Node, ...]) -> Region:
        self.graph.output(outputs)
        return Region("region0", self.executor, _torch.graph_module(torch.nn.Module(), self.graph))

    def _described(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        node.meta["spec"] = (
            TensorSpec.of(value)
            if isinstance(value, Tensor)
            else tuple(TensorSpec.of(v) if isinstance(v, Tensor) else None for v in value)
        )
        frame = sys._getframe(1)
        node.meta["source"] = SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return node


def single(executor: Executor, op: Any, args: Any, kwargs: Any) -> tuple[Region, fx.Node, list[Tensor]]:
    """One call as a region, its node, and the region's inputs."""
    builder = Builder(executor.name)
    call_args, call_kwargs = builder.arguments((args, kwargs))
    node = builder.call(op, call_args, call_kwargs)
    return builder.finish(builder.results(node)), node, builder.inputs
