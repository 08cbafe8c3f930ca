"""Parts of a program as programs of their own, and programs whose random draws are inputs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects, exact
from primexec.program import Input, Program, TensorSpec, op_name

_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})


@dataclass(frozen=True, eq=False)
class Step:
    """A node with the nodes that take its several results apart; `results` are pairs (which result, node)."""

    node: fx.Node
    items: tuple[fx.Node, ...]
    results: tuple[tuple[int, fx.Node], ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return self.node, *self.items


def steps_of(program: Program) -> list[Step]:
    """The nodes of a program in order, each with its `getitem` nodes."""
    steps = []
    for node in program.nodes:
        if node.target is operator.getitem:
            continue
        items = tuple(u for u in node.users if u.target is operator.getitem)
        results = [(i.args[1], i) for i in items] or [(0, node)]
        tensors = tuple((at, n) for at, n in results if isinstance(n.meta.get("val"), Tensor))
        steps.append(Step(node, items, tensors))  # type: ignore[arg-type]
    return steps


@dataclass(frozen=True, eq=False)
class Subject:
    """One program that is run in several ways, with the values of its inputs.

    Attributes:
        label: `forward` or `backward`.
        options: the executor parameters that pieces of it are compiled with.
    """

    label: str
    program: Program
    inputs: Sequence[Any]
    options: Mapping[str, Any]

    @cached_property
    def steps(self) -> list[Step]:
        return steps_of(self.program)

    @cached_property
    def given(self) -> Mapping[fx.Node, Any]:
        """What is there before the first step."""
        return environment(self.program, self.inputs)


def placeholders(program: Program) -> list[fx.Node]:
    """The program's inputs as nodes."""
    return [n for n in program.graph_module.graph.nodes if n.op == "placeholder"]


def outputs_of(program: Program) -> list[fx.Node]:
    """The nodes that the program returns."""
    return list(program.graph_module.graph.output_node().args[0])  # type: ignore[arg-type]


def environment(program: Program, values: Iterable[Any]) -> dict[fx.Node, Any]:
    """Values of the program's inputs and of the modules that it holds, by node."""
    module = program.graph_module
    held = {n: getattr(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    return held | dict(zip(placeholders(program), values, strict=True))


def run_step(step: Step, values: dict[fx.Node, Any]) -> None:
    """Run a node in the program's dtypes, and keep its results."""
    args, kwargs = exact.arguments(step.node, values.__getitem__)
    keep(step, values, step.node.target(*args, **kwargs))  # type: ignore[operator]


def keep(step: Step, values: dict[fx.Node, Any], result: Any) -> None:
    """Enter a node's result, and the items of it that are used."""
    values[step.node] = result
    for item in step.items:
        values[item] = result[item.args[1]]


# Random draws -------------------------------------------------------------------------------------------


def is_draw(node: fx.Node) -> bool:
    """Whether the result depends on more than the arguments: random numbers, memory that nobody has written."""
    op: Any = node.target
    if isinstance(op, _torch.OpOverload):
        return effects.is_random(node) or op._schema.name.partition("::")[2] in _EMPTY
    inner = [getattr(node.graph.owning_module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [m.graph for m in inner if isinstance(m, fx.GraphModule)]
    return any(
        is_draw(n) for b in bodies for n in b.nodes if n.op == "call_function" and n.target is not operator.getitem
    )


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What one node drew: into tensors that it writes to, and as new results."""

    written: dict[fx.Node, Tensor]
    made: dict[fx.Node, Tensor]


def with_draws_as_inputs(program: Program, inputs: Sequence[Any]) -> tuple[Program, list[Any], list[Any]]:
    """The program with what it draws as further inputs; values of all inputs; what the run returned.

    The draws are recorded in one run on copies of the inputs, which leaves the random state as it was.
    """
    values = environment(program, exact.copies(inputs))
    devices = {d.index or 0 for v in inputs if isinstance(v, Tensor) and (d := v.device).type == "cuda"}
    recorded: dict[fx.Node, _Drawn] = {}
    with torch.random.fork_rng(devices=sorted(devices)):
        for step in steps_of(program):
            run_step(step, values)
            if is_draw(step.node):
                written = effects.writes(step.node)
                storages = {effects.storage_of(n) for n in written}
                made = [n for _, n in step.results if effects.storage_of(n) not in storages]
                keep = [{n: values[n].detach().clone() for n in nodes} for nodes in (written, made)]
                recorded[step.node] = _Drawn(*keep)
    results = [values[n] for n in outputs_of(program)]
    if not recorded:
        return replace(program, calls=()), list(inputs), results
    changed, draws = _replace_draws(program, recorded)
    return changed, [*inputs, *draws], results


def _replace_draws(program: Program, recorded: dict[fx.Node, _Drawn]) -> tuple[Program, list[Tensor]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.node_copy(n) for n in placeholders(program)}
    more: list[Input] = []
    draws: list[Tensor] = []

    def draw(node: fx.Node, like: fx.Node, value: Tensor) -> fx.Node:
        made = graph.placeholder(f"{node.name}_drawn")
        made.meta = dict(like.meta)
        more.append(Input(made.name, "constant", f"drawn by {op_name(node.target)}"))
        draws.append(value)
        return made

    sources = {(node, n): draw(node, n, v) for node, d in recorded.items() for n, v in (d.written | d.made).items()}
    for node in program.graph_module.graph.nodes:
        if node.op in ("placeholder", "output") or node in copies:
            continue
        if node not in recorded:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        for n in recorded[node].written:
            copies[node] = graph.call_function(torch.ops.aten.copy_.default, (copies[n], sources[node, n]))
            copies[node].meta = dict(node.meta)
        copies.update({n: sources[node, n] for n in recorded[node].made})
    graph.output(tuple(copies[n] for n in outputs_of(program)))
    module = _torch.graph_module(program.graph_module, graph)
    return replace(program, graph_module=module, inputs=(*program.inputs, *more), calls=()), draws


# Parts --------------------------------------------------------------------------------------------------


def part(program: Program, steps: Sequence[Step], outputs: Sequence[fx.Node]) -> tuple[Program, list[fx.Node]]:
    """The program of some steps, and the nodes whose values it takes; outputs that are views are copied."""
    inside = {n for s in steps for n in s.nodes}
    used = dict.fromkeys(a for s in steps for n in s.nodes for a in n.all_input_nodes if a not in inside)
    used.update(dict.fromkeys(n for n in outputs if n not in inside))
    inputs = [n for n in used if n.op != "get_attr"]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in (*(n for n in used if n.op == "get_attr"), *(n for s in steps for n in s.nodes)):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(_own(graph, copies[n], n) for n in outputs))
    module = _torch.graph_module(program.graph_module, graph)
    signature = tuple(Input(copies[n].name, "argument", n.name) for n in inputs)
    return Program(f"{program.name}_part", module, signature, None, tuple(range(len(outputs)))), inputs


def _own(graph: fx.Graph, copy: fx.Node, node: fx.Node) -> fx.Node:
    """The node, or a clone of it where it shares memory with something else."""
    if node.op != "placeholder" and not effects.aliases_input(node):
        return copy
    clone = graph.call_function(torch.ops.aten.clone.default, (copy,))
    value = node.meta["val"].clone()
    clone.meta = {"val": value, "spec": TensorSpec.of(value), "source": node.meta.get("source")}
    return clone


def frontier(program: Program, steps: Sequence[Step], cut: int) -> list[fx.Node]:
    """The tensors made by the first `cut` steps that later steps use or the program returns."""
    before = {n for s in steps[:cut] for n in s.nodes}
    results = [n for s in steps[:cut] for _, n in s.results]
    returned = set(outputs_of(program))
    return [n for n in results if n in returned or any(u not in before for u in n.users)]
