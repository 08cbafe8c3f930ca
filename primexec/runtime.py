"""Plan → Executable: one function from the program's inputs to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects, progress
from primexec.errors import ExecutorError
from primexec.executors.base import Executor, Region, RegionFunction
from primexec.partition import Plan
from primexec.program import base_name


@dataclass(frozen=True, eq=False)
class Executable:
    """A compiled plan.

    Attributes:
        run: takes the program's inputs in order and returns its outputs; where boxed, takes them in one list,
            which it empties.
        compiles: how many regions were compiled.
        asks_grad_mode: whether kernels may do more under grad mode, as an LSTM does, which keeps its workspace.
        training: runs the program under autograd, where results require grad.
    """

    plan: Plan
    run: Callable[..., Sequence[Tensor]]
    compiles: int
    asks_grad_mode: bool = True
    training: Any = None


def compile_plan(
    plan: Plan, executors: Mapping[str, Executor], options: Mapping[str, Any], *, boxed: bool = False
) -> Executable:
    """Compile every region with its executor, and join them.

    Raises:
        ExecutorError: where an executor fails to compile a region that it claimed.
    """
    backward = plan.program.is_backward or any(n.meta.get("in_backward") for n in plan.program.nodes)
    training = backward or plan.program.backward is not None
    inputs = tuple(plan.program.graph_module.graph.find_nodes(op="placeholder"))
    is_whole = plan.inputs == (inputs,) and plan.outputs == (tuple(plan.program.outputs),)
    regions = [
        replace(
            region,
            freed=freed,
            training=training,
            donated=donated,
            kept=kept,
        )
        for region, freed, donated, kept in zip(
            plan.regions, _freed(plan, boxed), _donated(plan), _kept(plan), strict=True
        )
    ]
    regions = [replace(r, boxed=bool(r.freed) and _empties(executors[r.executor], r)) for r in regions]
    with closing(progress.shown(regions, f"compiling {plan.program.name}")) as shown:
        functions = [_compile(region, executors[region.executor], options) for region in shown]
    asks = any(getattr(executors[region.executor], "asks_grad_mode", True) for region in regions)
    run = functions[0] if is_whole and regions[0].boxed == boxed else _join(plan, regions, functions, boxed)
    return Executable(plan, run, len(functions), asks)


def _empties(executor: Executor, region: Region) -> bool:
    return getattr(executor, "empties", lambda _: False)(region)


def _freed(plan: Plan, boxed: bool) -> list[frozenset[int]]:
    """For each region the positions of inputs that only it still refers to while it runs."""
    last = {n: i for i, inputs in enumerate(plan.inputs) for n in inputs}
    held = {n for n in last if n.op == "placeholder" and not boxed} | set(plan.program.outputs)
    return [
        frozenset(k for k, n in enumerate(inputs) if last[n] == i and n not in held)
        for i, inputs in enumerate(plan.inputs)
    ]


# Operators whose result is always in memory of its own.
_FRESH = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm"})


def _donated(plan: Plan) -> list[frozenset[int]]:
    """For each region the positions of inputs that nobody needs after it, made by an operator of _FRESH."""
    last: dict[int | None, int] = {}
    names: dict[int | None, set[fx.Node]] = {}
    for i, (inputs, outputs) in enumerate(zip(plan.inputs, plan.outputs, strict=True)):
        for n in (*inputs, *outputs):
            last[effects.storage_of(n)] = i
            names.setdefault(effects.storage_of(n), set()).add(n)
    returned = {effects.storage_of(n) for n in plan.program.outputs}

    def given(n: fx.Node, i: int) -> bool:
        storage = effects.storage_of(n)
        fresh = n.op == "call_function" and base_name(n) in _FRESH and str(n.target).startswith("aten.")
        return fresh and last[storage] == i and names[storage] == {n} and storage not in returned

    return [frozenset(k for k, n in enumerate(inputs) if given(n, i)) for i, inputs in enumerate(plan.inputs)]


def _kept(plan: Plan) -> list[frozenset[int]]:
    """For each region the positions of results in memory that the program returns."""
    returned = {effects.storage_of(n) for n in plan.program.outputs}
    return [
        frozenset(k for k, n in enumerate(outputs) if effects.storage_of(n) in returned) for outputs in plan.outputs
    ]


def _compile(region: Region, executor: Executor, options: Mapping[str, Any]) -> RegionFunction:
    try:
        function = executor.compile(region, options)
    except Exception as error:
        raise ExecutorError(f"the executor {executor.name!r} failed to compile {region.name}: {error}") from error
    if not callable(function):
        kind = type(function).__name__
        raise ExecutorError(f"the executor {executor.name!r} compiled {region.name} to a {kind}, not a callable")
    return function if getattr(executor, "exact", False) else _checked(region, executor.name, function)


def _checked(region: Region, executor: str, function: RegionFunction) -> RegionFunction:
    """The function, its results checked against the region's metadata and laid out in memory as eager lays them out."""
    nodes = region.graph_module.graph.output_node().args[0]
    expected = [(n.name, n.meta["val"].dtype, n.meta["val"].shape) for n in nodes]  # type: ignore[union-attr]
    strides = [n.meta["val"].stride() for n in nodes]  # type: ignore[union-attr]

    def run(*inputs: Any) -> Sequence[Tensor]:
        try:
            outputs = function(*inputs)
        except Exception as error:
            error.add_note(f"raised by the executor {executor!r} while it ran {region.name}")
            raise
        if not isinstance(outputs, (list, tuple)):
            kind = type(outputs).__name__
            raise ExecutorError(f"{executor} returned {kind} for {region.name}, not a list or tuple of tensors")
        if len(outputs) != len(expected):
            raise ExecutorError(f"{executor} returned {len(outputs)} results for {region.name}, not {len(expected)}")
        for out, (name, dtype, shape) in zip(outputs, expected, strict=True):
            if not isinstance(out, torch.Tensor) or out.dtype != dtype or out.shape != shape:
                got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
                raise ExecutorError(
                    f"{executor} returned {got} for {name} in {region.name}, not {dtype} {tuple(shape)}"
                )
        if all(out.stride() == stride for out, stride in zip(outputs, strides, strict=True)):
            return outputs
        return [_laid_out(out, stride) for out, stride in zip(outputs, strides, strict=True)]

    return run


def _laid_out(t: Tensor, strides: tuple[Any, ...]) -> Tensor:
    """The tensor with these strides: itself where it has them, else a copy, for eager's strides show to the user."""
    if t.stride() == strides or not all(type(s) is int for s in strides):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def without_views(run: Callable[..., Sequence[Tensor]], places: Sequence[int]) -> Callable[..., Sequence[Tensor]]:
    """The function, where the results at these places are no views, though it makes them as such."""

    def run_alone(*inputs: Any) -> Sequence[Tensor]:
        results = list(run(*inputs))
        for i in places:
            results[i] = _torch.alone(results[i]) if results[i]._is_view() else results[i]
        return results

    return run_alone


def _join(
    plan: Plan, regions: Sequence[Region], functions: Sequence[RegionFunction], boxed: bool
) -> Callable[..., Sequence[Tensor]]:
    """A straight function that calls the regions in order and deletes what nobody uses any more."""
    graph = plan.program.graph_module.graph
    placeholders = ", ".join(n.name for n in graph.nodes if n.op == "placeholder")
    returned = dict.fromkeys(graph.output_node().args[0])  # type: ignore[arg-type]
    last_use: dict[fx.Node, int] = {}
    for i, inputs in enumerate(plan.inputs):
        last_use.update(dict.fromkeys((*plan.outputs[i], *inputs), i))
    dying: list[list[str]] = [[] for _ in plan.regions]
    for n, last in last_use.items():
        if n not in returned:
            dying[last].append(n.name)
    lines = ["def run(args):", f"  [{placeholders}] = args; args.clear()"] if boxed else [f"def run({placeholders}):"]
    for i, (inputs, outputs) in enumerate(zip(plan.inputs, plan.outputs, strict=True)):
        target = f"[{', '.join(n.name for n in outputs)}] = " if outputs else ""
        arguments = ", ".join(n.name for n in inputs)
        dead = dying[i]
        given = [n.name for n in inputs if n.name in dead] if regions[i].boxed else []
        if given:
            lines += [f"  args = [{arguments}]", f"  del {', '.join(given)}"]
            arguments = "args"
        elif regions[i].boxed:
            arguments = f"[{arguments}]"
        lines.append(f"  {target}region{i}({arguments})")
        dead = [name for name in dead if name not in given]
        if dead:
            lines.append(f"  del {', '.join(dead)}")
    lines.append(f"  return [{', '.join(n.name for n in plan.program.outputs)}]")
    namespace: dict[str, Any] = {f"region{i}": f for i, f in enumerate(functions)}
    exec(compile("\n".join(lines), "<primexec plan>", "exec"), namespace)
    run: Callable[..., Sequence[Tensor]] = namespace.pop("run")
    return run
