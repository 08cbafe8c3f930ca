"""The first operator at which an executor leaves what rounding explains, where it runs operators one by one.

Each operator is judged alone: its result against float64 on the very inputs that the executor had, so that an error
handed down is never blamed on who received it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from primexec import effects, exact, rounding
from primexec.errors import SourceLine
from primexec.program import Program, op_name, spec_of
from primexec.runs import Exact, Singly
from primexec.slices import Step, Subject, outputs_of, part
from primexec.ulp import Error, is_floating, measure

_NO_ERROR = Error()


@dataclass(frozen=True, slots=True)
class OpError:
    """What one executor did at one operator.

    Attributes:
        accumulated: against the reference run.
        local: against float64 on the executor's own inputs; None where the operator was not run alone.
        excess: the largest ratio of a local error to what rounding explains; more than one is a fault.
        note: what else there is to know.
    """

    accumulated: Error
    local: Error | None = None
    excess: float = 0.0
    note: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """One operator of the program, and what each executor did there."""

    part: str
    node: str
    op: str
    spec: str
    source: SourceLine | None
    errors: dict[str, OpError] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What tells operators apart."""
        return self.part, self.node


@dataclass(frozen=True, eq=False)
class Divergence:
    """The first operator at which an executor's error grows past what rounding explains.

    Attributes:
        part: `forward` or `backward`.
        accumulated: the error of the operator's result against the reference run.
        local: the same against float64 on the executor's own inputs.
        allowed: by what factor the error exceeds what rounding explains; infinite for a NaN or a wrong integer.
        found: how it was found.
        program: a program that shows the fault, and `inputs` for it.
    """

    executor: str
    part: str
    node: str
    op: str
    source: SourceLine | None
    accumulated: Error
    local: Error
    excess: float
    found: str
    program: Program = field(repr=False)
    inputs: tuple[Any, ...] = field(repr=False)

    @classmethod
    def at(cls, row: Row, executor: str, *rest: Any) -> Divergence:
        """That of an executor at the operator of a row; the other fields as they stand."""
        return cls(executor, row.part, row.node, row.op, row.source, *rest)

    @property
    def key(self) -> tuple[str, str]:
        """The same as of its row."""
        return self.part, self.node

    def __str__(self) -> str:
        element = f" at {list(self.local.index)}" if self.local.index is not None else ""
        lines = [
            f"{self.executor} diverges at {self.node} = {self.op} ({self.part}), {self.found}",
            f"  error of this operator alone: {self.local}{element}; {self.excess:.3g} times what rounding explains",
            f"  error against the reference: {self.accumulated}",
        ]
        return "\n".join([*lines, *([f"  {self.source}"] if self.source else [])])


def largest(errors: Iterable[Error]) -> Error:
    """The error with the most ulps, with the largest absolute and relative errors of all."""
    errors = list(errors)
    if not errors:
        return _NO_ERROR
    worst = max(errors, key=lambda e: e.ulps)
    return Error(max(e.absolute for e in errors), max(e.relative for e in errors), worst.ulps, worst.index)


@dataclass(frozen=True, eq=False)
class Judged:
    """The local errors of one step: over all results, what rounding explains of them, and what there is to say."""

    error: Error
    excess: float
    note: str = ""


def judge(step: Step, inputs: Mapping[fx.Node, Any], results: Mapping[fx.Node, Any]) -> Judged:
    """Compare a step's results with float64 on the same inputs (in the program's dtypes, from before the step)."""
    nodes = [n for n in step.node.all_input_nodes if n.op != "get_attr"]

    def widened() -> dict[fx.Node, Any]:
        return dict(inputs) | dict(zip(nodes, exact.copies([inputs[n] for n in nodes], widened=True), strict=True))

    values = widened()
    expected = exact.evaluate(step.node, values.__getitem__)
    allowed = rounding.allowances(step.node, widened().__getitem__, expected)
    expected, dtypes = rounding.results_of(expected), exact.dtypes_of(step.node)
    errors, worst, note = [], 0.0, ""
    for at, n in step.results:
        dtype = dtypes[at]
        if dtype is None or not isinstance(results[n], Tensor):
            continue
        error = measure(results[n], expected[at], dtype)
        excess = rounding.excess(results[n], expected[at], allowed[at], dtype)
        if excess > 1 and not is_floating(dtype) and _are_ties(step.node, inputs, results[n], expected[at]):
            excess, note = 0.0, f"{error.ulps:.0f} ties chosen otherwise"
        errors.append(error)
        worst = max(worst, excess)
    return Judged(largest(errors), worst, note)


def _are_ties(node: fx.Node, inputs: Mapping[fx.Node, Any], got: Tensor, expected: Tensor) -> bool:
    """Whether indices differ only in which of several equal elements they choose."""
    source = node.args[0] if node.args else None
    values = inputs.get(source) if isinstance(source, fx.Node) else None
    if got.dtype != torch.int64 or not isinstance(values, Tensor) or got.shape != expected.shape:
        return False
    schema: Any = getattr(node.target, "_schema", None)
    at = next((i for i, a in enumerate(schema.arguments) if a.name == "dim"), None) if schema else None
    dim = node.kwargs.get("dim", node.args[at] if at is not None and at < len(node.args) else None)
    if dim is None:
        values, got, expected, dim = values.flatten(), got.flatten(), expected.flatten(), 0
    if got.dim() == values.dim() - 1:
        got, expected = got.unsqueeze(dim), expected.unsqueeze(dim)  # type: ignore[arg-type]
    if got.dim() != values.dim() or not bool(((got >= 0) & (got < values.shape[dim])).all()):  # type: ignore[index]
        return False
    return torch.equal(values.gather(dim, got), values.gather(dim, expected))  # type: ignore[arg-type]


def walk(
    subject: Subject, reference: Exact | Singly, runs: Mapping[str, Singly]
) -> tuple[list[Row], dict[str, Divergence]]:
    """Run the program on the reference and on executors side by side, one operator at a time."""
    rows: list[Row] = []
    first: dict[str, Divergence] = {}
    last = _last_uses(subject)
    for i, step in enumerate(subject.steps):
        before = {name: _before(step, run.values) for name, run in runs.items()}
        reference.step(step)
        row = new_row(step, subject.label)
        for name, run in runs.items():
            run.step(step)
            changed = [(0, n) for n in effects.writes(step.node) if not step.results]
            accumulated = against(step.results or changed, run.values, reference.values)
            if not step.results:
                row.errors[name] = OpError(accumulated, note="runs on aten")
                continue
            judged = judge(step, before[name], {n: run.values[n] for _, n in step.results})
            ours = run.is_aten or step.node in run.mine
            note = judged.note if ours else "runs on aten"
            row.errors[name] = OpError(accumulated, judged.error, judged.excess, note)
            if judged.excess > 1 and name not in first and ours:
                piece, taken = part(subject.program, [step], [n for _, n in step.results])
                values = tuple(exact.copies([before[name][n] for n in taken]))
                found = "run alone on the inputs it had"
                first[name] = Divergence.at(row, name, accumulated, judged.error, judged.excess, found, piece, values)
        if step.results or row.errors:
            rows.append(row)
        for each in (reference, *runs.values()):
            for n in last.get(i, ()):
                each.values.pop(n, None)
    return rows, first


def new_row(step: Step, label: str) -> Row:
    """The row of a step in the part of this name."""
    shown = step.items[0] if len(step.items) == 1 else step.node
    return Row(label, step.node.name, op_name(step.node.target), spec_of(shown), step.node.meta.get("source"))


def against(
    results: Iterable[tuple[int, fx.Node]], got: Mapping[fx.Node, Any], reference: Mapping[fx.Node, Any]
) -> Error:
    """The largest errors of a step's results against the reference."""
    pairs = [n for _, n in results if isinstance(got[n], Tensor) and got[n].shape == reference[n].shape]
    return largest(measure(got[n], reference[n], n.meta["val"].dtype) for n in pairs if "val" in n.meta)


def _before(step: Step, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """A step's inputs as they are before it runs: copies where it writes to them."""
    taken = {n: values[n] for n in step.node.all_input_nodes}
    return dict(zip(taken, exact.copies(taken.values()), strict=True)) if effects.writes(step.node) else taken


def _last_uses(subject: Subject) -> dict[int, list[fx.Node]]:
    returned = set(outputs_of(subject.program))
    last: dict[fx.Node, int] = {}
    for i, step in enumerate(subject.steps):
        for n in (*step.nodes, *step.node.all_input_nodes):
            last[n] = i
    found: dict[int, list[fx.Node]] = {}
    for n, i in last.items():
        if n not in returned:
            found.setdefault(i, []).append(n)
    return found
