"""A program run step by step: in float64, moved at random, or on one executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from primexec import effects, exact, rounding
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.partition import Plan, partition
from primexec.program import Program, op_name
from primexec.runtime import compile_plan
from primexec.slices import Step, Subject, environment, keep, part, run_step
from primexec.ulp import is_floating, spacing


class Exact:
    """A float64 run."""

    def __init__(self, subject: Subject) -> None:
        self.values = environment(subject.program, exact.copies(subject.inputs, widened=True))

    def step(self, step: Step) -> None:
        keep(step, self.values, exact.evaluate(step.node, self.values.__getitem__))


class Perturbed(Exact):
    """A float64 run in which every rounded result is moved at random within its allowance."""

    def __init__(self, subject: Subject, seed: int) -> None:
        super().__init__(subject)
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, step: Step) -> None:
        node, values = step.node, self.values
        written = effects.writes(node)
        before = {n: values[n] for n in node.all_input_nodes}
        super().step(step)
        if rounding.kind_of(node) == "exact" and not any(_narrows(n) for _, n in step.results):
            return
        results = rounding.results_of(values[node])
        allowed = _simple_allowances(node, results) if written else None
        if allowed is None:
            allowed = rounding.allowances(node, before.__getitem__, values[node])
        for y, a in zip(results, allowed, strict=True):
            if a is not None and (written or not effects.aliases_input(node)):
                self._move(y, a)

    def _move(self, y: Tensor, allowed: Tensor) -> None:
        sign = torch.rand(y.shape, generator=self._generator, dtype=torch.float64).to(y.device) * 2 - 1
        y.copy_(torch.where(y.isfinite(), y + sign * allowed, y))


def _narrows(node: fx.Node) -> bool:
    """Whether the result has fewer digits than an argument: a cast, or a constant rounded to 16 bits."""
    unit = rounding.unit(node.meta["val"].dtype)
    return any(
        isinstance(v := n.meta.get("val"), Tensor) and rounding.unit(v.dtype) < unit for n in node.all_input_nodes
    )


def _simple_allowances(node: fx.Node, results: list[Any]) -> list[Tensor | None]:
    """For operators in place, whose arguments are gone: 4 ulp."""
    return [
        4 * spacing(y, d) if isinstance(y, Tensor) and d is not None and is_floating(d) else None
        for y, d in zip(results, exact.dtypes_of(node), strict=True)
    ]


class Singly:
    """A run of one executor, one operator at a time; what it declines runs on aten."""

    def __init__(self, subject: Subject, executor: Executor) -> None:
        self.subject, self.executor, self.is_aten = subject, executor, executor.name == "aten"
        claims = {} if self.is_aten else _plan(subject.program, executor).claims
        self.mine = {n for n, claim in claims.items() if claim.executor == executor.name}
        self.values = environment(subject.program, exact.copies(subject.inputs))

    def step(self, step: Step) -> None:
        outputs = [n for _, n in step.results]
        if step.node not in self.mine or not outputs:
            run_step(step, self.values)
            return
        try:
            run, inputs = compiled(self.subject, [step], outputs, self.executor)
            results = run(*(self.values[i] for i in inputs))
        except Exception as error:
            error.add_note(f"at {step.node.name} = {op_name(step.node.target)}\n  {step.node.meta.get('source')}")
            raise
        self.values[step.node] = None
        self.values.update(zip(outputs, results, strict=True))


def compiled(
    subject: Subject, steps: Sequence[Step], outputs: Sequence[fx.Node], executor: Executor
) -> tuple[Callable[..., Sequence[Any]], list[fx.Node]]:
    """Some steps compiled for an executor, and the nodes whose values the function takes."""
    piece, inputs = part(subject.program, steps, outputs)
    return compile_plan(_plan(piece, executor), _with_aten(executor), subject.options).run, inputs


def _plan(program: Program, executor: Executor) -> Plan:
    executors = tuple(_with_aten(executor).values())
    return partition(program, executors, allowed=None, inference=torch.is_inference_mode_enabled())


def _with_aten(executor: Executor) -> dict[str, Executor]:
    return {executor.name: executor, "aten": registry.load("aten")}
