"""Executors as third parties write them, and how they are installed."""

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from primexec.executors import registry
from primexec.executors.base import PROTOCOL_VERSION, YES, Region, Support, no

MODULE = "toy_executors"


class Toy:
    """Adds and multiplies in NumPy; records what it was given to compile."""

    name = "toy"
    protocol_version = PROTOCOL_VERSION
    parameters = frozenset({"fast"})
    claimed: ClassVar[dict[Any, Any]] = {
        torch.ops.aten.add.Tensor: lambda a, b: a + b,
        torch.ops.aten.mul.Tensor: lambda a, b: a * b,
    }

    def __init__(self) -> None:
        self.regions: list[tuple[str, list[str], dict[str, Any]]] = []

    def supports(self, node: fx.Node) -> Support:
        assert "val" in node.meta
        return YES if node.target in self.claimed else no("only adds and multiplies")

    def fingerprint(self) -> str:
        return self.name

    def compile(self, region: Region, options: Mapping[str, Any]) -> Callable[..., Sequence[Tensor]]:
        graph = region.graph_module.graph
        graph.lint()
        nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.regions.append((region.name, [str(n.target) for n in nodes], dict(options)))

        def run(*inputs: Tensor) -> list[Tensor]:
            placeholders = [n for n in graph.nodes if n.op == "placeholder"]
            values: dict[fx.Node, Any] = {n: t.numpy() for n, t in zip(placeholders, inputs, strict=True)}
            for node in nodes:
                args = fx.node.map_arg(node.args, values.__getitem__)
                values[node] = self.claimed[node.target](*args).astype(str(node.meta["val"].dtype)[6:])
            return [torch.from_numpy(values[n]) for n in graph.output_node().args[0]]

        return run


class Other(Toy):
    """Adds only."""

    name = "other"
    parameters = frozenset({"slow"})
    claimed: ClassVar[dict[Any, Any]] = {torch.ops.aten.add.Tensor: lambda a, b: a + b}


def broken(**members: Any) -> type:
    """A kind of Toy whose members are replaced; those that are None are missing."""
    kind = type("Broken", (Toy,), {k: v for k, v in members.items() if v is not None})
    gone = [k for k, v in members.items() if v is None]
    body = {k: getattr(kind, k) for k in dir(kind) if not k.startswith("__") and k not in gone}
    return type("Broken", (), {**body, "__init__": Toy.__init__}) if gone else kind


def install(monkeypatch: pytest.MonkeyPatch, *more: EntryPoint, **executors: type) -> None:
    """Install executors as other packages do, by entry points, until the test ends."""
    module = types.ModuleType(MODULE)
    vars(module).update(executors)
    monkeypatch.setitem(sys.modules, MODULE, module)
    points = [EntryPoint(name, f"{MODULE}:{name}", registry.GROUP) for name in executors]
    monkeypatch.setattr(registry, "entry_points", lambda group: [*points, *more] if group == registry.GROUP else [])
    for name in ("_entry_points", "load"):  # what is cached now comes back afterwards
        monkeypatch.setattr(registry, name, cache(getattr(registry, name).__wrapped__))
