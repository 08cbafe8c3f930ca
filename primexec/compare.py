"""Where the numbers of executors part: each operator of a program against a reference run."""

from __future__ import annotations

import html
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from primexec import _torch, passes, repro
from primexec._torch_dynamo import capture_lock
from primexec.api import Traced, TracedModule
from primexec.bisection import Bisection
from primexec.cache import runs_inline
from primexec.capture import capture
from primexec.captured import Captured, Signature
from primexec.config import Options
from primexec.decisions import take_for_granted
from primexec.divergence import Divergence, Row, new_row, walk
from primexec.errors import PrimexecError
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.gradients import read_place
from primexec.program import Program
from primexec.runs import Exact, Singly
from primexec.slices import Subject, outputs_of, placeholders, with_draws_as_inputs
from primexec.ulp import is_floating
from primexec.verify import verify_captured

_SHOWN = 24


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        name: the function's name.
        reference: what the errors are measured against.
        rows: one for each operator, in order, with the errors of each executor.
        first: for each executor the first operator at which it diverges, or None.
        compiles: how many programs were compiled for each executor that fuses.
        notes: what else there is to know, such as discrete results that differ with inputs that are right.
        parameters: the executor parameters that the programs were compiled with.
    """

    name: str
    reference: str
    rows: tuple[Row, ...]
    first: dict[str, Divergence | None]
    compiles: dict[str, int]
    notes: tuple[str, ...] = field(default=())
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.rows)} operators against {self.reference}"]
        for executor, divergence in self.first.items():
            lines.append(str(divergence) if divergence else f"{executor}: rounding explains every difference")
        lines += self.notes
        console = importlib.import_module("rich.console").Console(file=io.StringIO(), width=_WIDTH)
        console.print(self._table())
        return "\n".join([*lines, console.file.getvalue().rstrip()])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _table(self) -> Any:
        table = importlib.import_module("rich.table").Table(box=None, pad_edge=False)
        for title in ("operator", "result", "line"):
            table.add_column(title, overflow="fold")
        for executor in self.first:
            for title in ("absolute", "relative", "ulp", "share"):
                table.add_column(f"{executor}\n{title}", justify="right", no_wrap=True)
        text = importlib.import_module("rich.text").Text
        rows = self._shown()
        for row in rows:
            source = f"{Path(row.source.file).name}:{row.source.line}" if row.source else ""
            cells = [f"{row.node} = {row.op}", row.spec, source]
            cells += [cell for executor in self.first for cell in self._cells(row, executor)]
            table.add_row(*map(text, cells))
        share = "share: the error of the operator alone, 1 being the most that rounding explains"
        more = f"the {len(rows)} operators with the largest errors of {len(self.rows)}; .rows has all\n"
        table.caption = more + share if len(rows) < len(self.rows) else share
        return table

    def _cells(self, row: Row, executor: str) -> list[str]:
        error = row.errors.get(executor)
        if error is None:
            return [""] * 4
        e = error.accumulated
        alone = f"{error.excess:.2g}" if error.local is not None else ""
        first = self.first[executor]
        mark = " <" if first is not None and first.key == row.key else ""
        return [f"{e.absolute:.2g}", f"{e.relative:.2g}", f"{e.ulps:.2g}", alone + mark]

    def _shown(self) -> list[Row]:
        """The rows of the divergences and those with the largest errors, in order."""
        firsts = {d.key for d in self.first.values() if d is not None}

        def weight(row: Row) -> tuple[bool, float]:
            return row.key in firsts, max((e.accumulated.ulps for e in row.errors.values()), default=0.0)

        largest = set(sorted(self.rows, key=weight, reverse=True)[:_SHOWN])
        return [row for row in self.rows if row in largest]

    def plot(self) -> Any:
        """The relative error along the program, a curve for each executor, on a logarithmic scale.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            PrimexecError: where matplotlib is not installed.
        """
        try:
            figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
        except ImportError as error:
            raise PrimexecError("plot() needs matplotlib: pip install 'primexec[plot]'") from error
        axes = figure.subplots()
        for executor, divergence in self.first.items():
            points = [(i, r.errors[executor].accumulated) for i, r in enumerate(self.rows) if executor in r.errors]
            # An error of zero, and an infinite one, have no place on a logarithmic scale.
            drawn = [(i, e.relative) for i, e in points if 0 < e.relative < float("inf")]
            (line,) = axes.plot([i for i, _ in drawn], [e for _, e in drawn], ".-", label=executor)
            for i in [i for i, r in enumerate(self.rows) if divergence and r.key == divergence.key]:
                axes.axvline(i, color=line.get_color(), linestyle="--", label=f"{executor} diverges")
        axes.set_yscale("log")
        axes.set_xlabel("operator of the program")
        axes.set_ylabel(f"largest relative error against {self.reference}")
        axes.set_title(self.name)
        axes.legend()
        return figure

    def repro(self, path: str | Path, executor: str | None = None) -> Path:
        """Write a script that shows the first divergence by itself, and its inputs beside it (`.pt`).

        Args:
            path: the script's file; its ending becomes `.py`.
            executor: whose divergence; by default of the first executor that has one.

        Returns:
            The script's path. It exits with 1 as long as the executor is wrong, and with 0 when it is right.

        Raises:
            PrimexecError: where nothing diverges, or the program cannot be written as a script.
        """
        found = [d for name, d in self.first.items() if d is not None and executor in (None, name)]
        if not found:
            raise PrimexecError(f"there is nothing to write: no divergence of {executor or ', '.join(self.first)}")
        return repro.write(found[0], path, self.parameters)


_WIDTH = 200


def compare(
    fn: Callable[..., Any],
    /,
    *args: Any,
    executors: Sequence[str] = ("aten", "numpy"),
    reference: str = "float64",
    executor_parameters: Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Run the program of one call on executors and on a reference, and find where they part.

    Random numbers are drawn once, and are the same in every run. Arguments and the state of modules are not changed.

    Args:
        fn: what `make_traced` takes, or what it returns; args and kwargs are the call's.
        executors: names of executors. Those with `fuses = False` (`aten`, `numpy`) run one operator at a time;
            the others are compiled about log2 n times for n operators.
        reference: "float64" evaluates the program in float64 (complex128) throughout; "eager" as PyTorch runs it; or
            the name of an executor, run one operator at a time. Verdicts are made against float64 wherever an operator
            runs alone.
        executor_parameters: what `make_traced` takes, without `strict`: rows tell what an executor declines.

    Raises:
        CaptureError: where the call cannot be captured soundly.
        ValueError: for an unknown executor, parameter or reference, and where the program computes nothing in floating
            point.

    >>> import torch, primexec
    >>> comparison = primexec.compare(lambda x: (x.exp() + 1).log(), torch.ones(3), executors=["aten"])
    >>> comparison.first
    {'aten': None}
    >>> [row.op for row in comparison.rows]
    ['aten.exp', 'aten.add.Tensor', 'aten.log']
    """
    if not callable(fn):
        raise TypeError(f"compare takes a callable, got {type(fn).__qualname__}")
    if isinstance(fn, TracedModule):
        fn = fn._primexec_traced._fn
    elif isinstance(fn, Traced):
        fn = fn._fn
    names = (executors,) if isinstance(executors, str) else tuple(executors)
    if not names:
        raise ValueError("compare needs the name of at least one executor")
    options = Options.of(names, executor_parameters)
    registry.resolve(options, torch.get_default_device())  # raises for what is not known
    if "strict" in dict(options.parameters):
        raise ValueError("compare() takes no 'strict': what an executor declines runs on aten, and its row says so")
    chosen = {name: registry.load(name) for name in names}
    if reference not in ("float64", "eager"):
        _check_reference(reference)
    if runs_inline(args, kwargs):
        raise PrimexecError("compare() was called inside another trace or transform")
    with capture_lock():
        captured = capture(fn, args, kwargs, Signature.of(fn), options.save)
    program = passes.run(captured.program)
    take_for_granted(program.graph_module.graph)
    verify_captured(program)
    with _plain():
        return _compare(program, _inputs(captured, program, args, kwargs), chosen, reference, options.for_executors())


def _check_reference(name: str) -> None:
    known = registry.executors()
    if name not in known:
        allowed = ", ".join(("float64", "eager", *known))
        raise ValueError(f"Received unexpected value for 'reference': {name}. Allowed values are: {allowed}.")


@contextmanager
def _plain() -> Iterator[None]:
    """No grad, and no autocast: the casts stand in the program."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _inputs(captured: Captured, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The values of the program's inputs."""
    leaves, _ = _torch.flatten((args, kwargs))
    values: dict[str, Any] = {}
    arguments, places, constants = iter(captured.arguments), iter(captured.states), iter(program.constants)
    for i in program.inputs:
        if i.kind == "argument":
            values[i.name] = leaves[next(arguments)]
        elif i.kind == "constant":
            values[i.name] = next(constants)
        else:
            values[i.name] = read_place(next(places)[0], values)
    return list(values.values())


def _compare(
    program: Program,
    inputs: list[Any],
    executors: dict[str, Executor],
    reference: str,
    parameters: Mapping[str, object],
) -> Comparison:
    results: list[Row] = []
    first: dict[str, Divergence | None] = dict.fromkeys(executors)
    compiles: dict[str, int] = {}
    notes: list[str] = []
    floating = False
    for label, whole, values in _parts(program, inputs):
        changed, given, _ = with_draws_as_inputs(whole, values)
        subject = Subject(label, changed, given, parameters)
        floating = floating or any(is_floating(n.meta["val"].dtype) for s in subject.steps for _, n in s.results)
        rows, found = _one_by_one(subject, reference, executors)
        for name in (n for n, e in executors.items() if getattr(e, "fuses", True)):
            search = Bisection(subject, partial(_reference, subject, reference), executors[name])
            errors, divergence = search.search()
            for row in rows:
                if row.node in errors:
                    row.errors[name] = errors[row.node]
            found |= {name: replace(divergence, executor=name)} if divergence else {}
            compiles[name] = compiles.get(name, 0) + search.compiles
            notes += search.notes
        first = {name: d or found.get(name) for name, d in first.items()}
        results += rows
        notes += [
            f"{name}: {row.node} = {row.op}: {e.note}"
            for row in rows
            for name, e in row.errors.items()
            if e.note and not e.note.startswith("runs on")
        ]
    if not floating:
        raise ValueError(f"{program.name} computes nothing in floating point: there is no rounding to compare")
    return Comparison(program.name, reference, tuple(results), first, compiles, tuple(notes), parameters)


def _one_by_one(
    subject: Subject, reference: str, executors: dict[str, Executor]
) -> tuple[list[Row], dict[str, Divergence]]:
    runs = {name: Singly(subject, e) for name, e in executors.items() if not getattr(e, "fuses", True)}
    if not runs:
        return [new_row(s, subject.label) for s in subject.steps], {}
    return walk(subject, _reference(subject, reference), runs)


def _reference(subject: Subject, name: str) -> Exact | Singly:
    if name == "float64":
        return Exact(subject)
    return Singly(subject, registry.load("aten" if name == "eager" else name))


def _parts(program: Program, inputs: list[Any]) -> Iterator[tuple[str, Program, list[Any]]]:
    """The forward program, and the backward one with what a forward run on aten saves for it."""
    yield "forward", program, inputs
    backward: Program | None = program.backward
    if backward is None:
        return
    _, _, results = with_draws_as_inputs(program, inputs)
    made = dict(zip((n.name for n in outputs_of(program)), results, strict=True))
    made.update(zip((i.name for i in program.inputs), inputs, strict=True))
    generator = torch.Generator().manual_seed(0)
    values: list[Any] = []
    for given, node in zip(backward.inputs, placeholders(backward), strict=True):
        if given.label in made:
            values.append(made[given.label])
        else:
            like: Tensor = node.meta["val"]
            values.append(torch.randn(tuple(like.shape), generator=generator).to(like.device, like.dtype))
    yield "backward", backward, values
