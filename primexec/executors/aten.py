"""The executor `aten`: total, and exactly eager.

A region becomes one straight Python function. Where the operators came from one call of torch's API, such as
`F.linear`, and nothing inside that call is used elsewhere, the call itself is replayed; other operators go
through torch's Python bindings. Variables are deleted at their last use.
"""

from __future__ import annotations

import itertools
import linecache
import math
import operator
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx

from primexec.executors.base import PROTOCOL_VERSION, YES, Region, RegionFunction, Support
from primexec.executors.bindings import callable_for
from primexec.program import ApiCall

_count = itertools.count()
# Operators cost 0.3 µs less than calls of the slots behind them.
_SYNTAX: dict[Any, str] = {
    torch.Tensor.__getitem__: "{0}[{1}]",
    torch.Tensor.__setitem__: "{0}[{1}] = {2}",
    torch.Tensor.__add__: "{0} + {1}",
    torch.Tensor.__sub__: "{0} - {1}",
    torch.Tensor.__mul__: "{0} * {1}",
    torch.Tensor.__truediv__: "{0} / {1}",
    torch.Tensor.__matmul__: "{0} @ {1}",
    torch.Tensor.__neg__: "-{0}",
}


class AtenExecutor:
    """Runs whatever PyTorch runs."""

    name = "aten"
    protocol_version = PROTOCOL_VERSION
    parameters: frozenset[str] = frozenset()
    fuses = False
    expected_failures = Path(__file__).with_suffix(".toml")
    exact = True

    def supports(self, node: fx.Node) -> Support:
        return YES

    def empties(self, region: Region) -> bool:
        return True

    def fingerprint(self) -> str:
        return f"torch {torch.__version__}"

    def compile(self, region: Region, options: Mapping[str, Any]) -> RegionFunction:
        return _Generator(region).function()


class _Generator:
    """Writes the Python function of one region."""

    def __init__(self, region: Region) -> None:
        self.graph = region.graph_module.graph
        self.module = region.graph_module
        self.ambient_inference = region.ambient_inference
        self.boxed = region.boxed
        self.calls = self._replayable(region.calls)
        self.namespace: dict[str, Any] = {"inference_mode": torch.inference_mode}
        self._names: dict[int, str] = {}
        self.alias: dict[fx.Node, fx.Node] = {}
        self.sources: list[fx.Node | None] = []  # of each line of the function
        self.lines: list[str] = []

    def _replayable(self, calls: tuple[ApiCall, ...]) -> dict[fx.Node, ApiCall]:
        """The calls to replay, by each of their nodes: those whose inner results nobody else uses."""
        found: dict[fx.Node, ApiCall] = {}
        for call in calls:
            # An argument of which only the shape or a constant's number was used feeds no node of the call.
            fed = {a for n in call.nodes for a in n.all_input_nodes}
            if not call.inputs <= fed:
                continue
            inside = set(call.nodes)
            hidden = inside.difference(call.results)
            if all(u in inside for n in hidden for u in n.users):
                found.update(dict.fromkeys(call.nodes, call))
        return found

    # Statements ----------------------------------------------------------------------------------------

    def function(self) -> RegionFunction:
        steps = list(self._steps())
        last_use: dict[str, int] = {}
        for i, (_, used, made, _) in enumerate(steps):
            for name in (*used, *made):
                last_use[name] = i
        placeholders = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        returned = {self._name(n) for n in self.graph.output_node().all_input_nodes}
        self._line(f"def run({'args' if self.boxed else ', '.join(placeholders)}):", None)
        if self.boxed:
            self._line(f"  [{', '.join(placeholders)}] = args; args.clear()", None)
        self._line("  try:", None)
        inside = self.ambient_inference
        for i, (text, used, made, node) in enumerate(steps):
            inference = bool(node.meta.get("inference", self.ambient_inference))
            if inference != inside and inference != self.ambient_inference:
                self._line(f"    with inference_mode({inference}):", None)
            inside = inference
            indent = "    " if inside == self.ambient_inference else "      "
            self._line(indent + text, node)
            dead = sorted(n for n in {*used, *made} if last_use[n] == i and n not in returned)
            if dead:
                self._line(f"{indent}del {', '.join(dead)}", node)
        self._line(f"    return {self._show(self.graph.output_node().args[0])}", None)
        self._line("  except Exception as error:", None)
        self._line("    locate(error)", None)
        self._line("    raise", None)
        return self._build()

    def _steps(self) -> Iterator[tuple[str, list[str], list[str], fx.Node]]:
        """(statement, variables used, variables made, node) in order."""
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            call = self.calls.get(node)
            if call is not None:
                if node is call.nodes[0]:
                    yield self._call(call, node)
            elif _is_renaming(node):
                self.alias[node] = node.args[0]
            else:
                yield self._operator(node)

    def _call(self, call: ApiCall, node: fx.Node) -> tuple[str, list[str], list[str], fx.Node]:
        inside = set(call.nodes)
        made = [self._name(n) if n in inside and n.users else "_" for n in call.results]
        arguments = [self._show(a) for a in call.args]
        if call.function in _SYNTAX:
            text = _SYNTAX[call.function].format(*arguments)
        else:
            arguments += [f"{k}={self._show(v)}" for k, v in call.kwargs.items()]
            text = f"{self._constant(call.function)}({', '.join(arguments)})"
        if any(m != "_" for m in made):
            target = f"[{', '.join(made)}]" if call.sequence else made[0]
            text = f"{target} = {text}"
            if "_" in made:
                text += "; del _"
        used = [self._name(n) for n in call.inputs]
        return text, used, [m for m in dict.fromkeys(made) if m != "_"], node

    def _operator(self, node: fx.Node) -> tuple[str, list[str], list[str], fx.Node]:
        used = [self._name(n) for n in node.all_input_nodes if n.op != "get_attr"]
        if node.target is operator.getitem:
            return f"{node.name} = {self._show(node.args[0])}[{node.args[1]}]", used, [node.name], node
        arguments = [self._show(a) for a in node.args]
        arguments += [f"{k}={self._show(v)}" for k, v in node.kwargs.items()]
        text = f"{self._constant(callable_for(node))}({', '.join(arguments)})"
        if node.users:
            return f"{node.name} = {text}", used, [node.name], node
        return text, used, [], node

    # Expressions ---------------------------------------------------------------------------------------

    def _name(self, node: fx.Node) -> str:
        while node in self.alias:
            node = self.alias[node]
        return node.name

    def _show(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self._constant(getattr(self.module, str(value.target)))
            return self._name(value)
        if isinstance(value, (list, tuple)) and _holds_nodes(value):
            inner = ", ".join(self._show(v) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self._show(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice) and _holds_nodes((value.start, value.stop, value.step)):
            return f"slice({self._show(value.start)}, {self._show(value.stop)}, {self._show(value.step)})"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return repr(tuple(value))  # torch reads tuples fastest, and FX's own lists slowest
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = self._names.setdefault(id(value), f"_{len(self._names)}")
        self.namespace[name] = value
        return name

    # The function --------------------------------------------------------------------------------------

    def _line(self, text: str, node: fx.Node | None) -> None:
        self.lines.append(text)
        self.sources.append(node)

    def _build(self) -> RegionFunction:
        file = f"<primexec aten {next(_count)}>"
        text = "\n".join(self.lines) + "\n"
        sources = [n and n.meta.get("source") for n in self.sources]
        names = [str(n and n.target) for n in self.sources]

        def locate(error: Exception) -> None:
            step: TracebackType | None = error.__traceback__
            while step is not None:
                if step.tb_frame.f_code.co_filename == file and (source := sources[step.tb_lineno - 1]):
                    error.add_note(f"raised by {names[step.tb_lineno - 1]}, traced from\n  {source}")
                    return
                step = step.tb_next

        self.namespace["locate"] = locate
        exec(compile(text, file, "exec"), self.namespace)
        run: RegionFunction = self.namespace.pop("run")  # else the function would keep itself alive
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
        weakref.finalize(run, linecache.cache.pop, file, None)
        return run


def _holds_nodes(values: Any) -> bool:
    return any(
        isinstance(v, fx.Node)
        or (isinstance(v, (list, tuple)) and _holds_nodes(v))
        or (isinstance(v, slice) and _holds_nodes((v.start, v.stop, v.step)))
        for v in values
    )


def _is_renaming(node: fx.Node) -> bool:
    """A detach that autograd put behind a view: the same tensor under another name."""
    return (
        node.target is torch.ops.aten.detach.default
        and isinstance(source := node.args[0], fx.Node)
        and source.op == "call_function"
        and len(source.users) == 1
    )
