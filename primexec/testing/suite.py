"""The suite: every operator at every dtype that an executor declares, then whole programs."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.prims import TABLE
from primexec.testing import checks, oracle, programs, training, values
from primexec.testing.checks import BrokenRuleError, Call
from primexec.testing.families import DRAWS, NAMES, ROWS, Row, dtypes_of
from primexec.testing.regions import single
from primexec.testing.report import Expected, Finding, Report
from primexec.testing.report import Row as Tried
from primexec.testing.samples import Sample
from primexec.testing.tolerance import TOLERANCES, differ

_CAREFULLY = 6  # calls of an operator at a dtype that are held to every rule; the others are compared only
_MAX_ELEMENTS_CAREFULLY = 5000


def check_executor(
    executor: Executor | str,
    *,
    names: Collection[str] | None = None,
    dtypes: Collection[torch.dtype] | None = None,
    expected: Expected | str | Path | None = None,
    random_programs: int = 50,
    seed: int = 0,
) -> Report:
    """Hold an executor to what it declares.

    For each operator of the table and each dtype, the executor is asked through `supports` whether it takes a
    call; each call that it takes is compiled, run, and compared with the float64 reference.

    Args:
        executor: an executor, or the name of an installed one.
        names: operators such as `prims.exp.default`; None for all.
        dtypes: None for all.
        expected: failures that the executor owns up to, or the TOML file that holds them; None for the executor's
            own file, `expected_failures`, if it has one.
        random_programs: how many random programs to run; 0 for none.
        seed: of every value.

    Raises:
        ValueError: for a name that is not in the table.

    >>> from primexec.testing import check_executor
    >>> report = check_executor("aten", names=["prims.exp.default"], dtypes=[torch.float32], random_programs=0)
    >>> bool(report), report.declared
    (True, [('prims.exp.default', 'float32')])
    """
    if isinstance(executor, str):
        executor = registry.load(executor)
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise ValueError(f"no such operators in the table: {', '.join(unknown)}")
    if not isinstance(expected, Expected):
        expected = Expected.of(executor, expected)
    rows: dict[tuple[str, str], Tried] = {}
    findings: list[Finding] = []
    for name in NAMES if names is None else names:
        for dtype in dtypes_of(name):
            if dtypes is None or dtype in dtypes:
                examined = examine(executor, name, dtype, seed)
                rows[name, str(dtype).removeprefix("torch.")] = examined.tried
                findings += examined.findings.values()
    findings += refusals(executor)
    ran = 0
    for part in (programs, training):
        count, broken = part.check(executor, random_programs, seed)
        findings += broken
        ran += count
    if names is None and not any(row.cases for row in rows.values()):
        findings.append(Finding("supports", "", "claim", "the executor declares no operator of the table"))
    unexpected, unmet = expected.split(findings)
    tried = {*rows, *((name, "") for name, _ in rows)}
    stale = tuple(_stale(key, expected, rows) for key in sorted(unmet) if key in tried or not _left_out(key))
    return Report(executor.name, rows, tuple(findings), tuple(unexpected), stale, ran)


def _left_out(key: tuple[str, str]) -> bool:
    """Whether there is such an operator and dtype in the table: it was not asked for this time."""
    name, dtype = key
    return name in NAMES and dtype in ("", *(str(d).removeprefix("torch.") for d in dtypes_of(name)))


def _stale(key: tuple[str, str], expected: Expected, rows: dict[tuple[str, str], Tried]) -> str:
    name, dtype = key
    tried = any(row.cases for (n, d), row in rows.items() if n == name and dtype in ("", d))
    what = "passes: strike it out" if tried else "was not tried: no such operator and dtype is declared"
    return f"expected failure {name} {dtype or 'of every dtype'} ({expected.reasons[key]}) {what}"


@dataclass
class Examined:
    """One prim at one dtype: what was tried, and what is wrong, the first of each kind."""

    name: str
    dtype: torch.dtype
    tried: Tried = field(default_factory=Tried)
    findings: dict[str, Finding] = field(default_factory=dict)

    def found(self, rule: str, message: str, sample: Sample) -> None:
        text = f"{message}; {_show(sample)}"
        self.findings.setdefault(rule, Finding(self.name, str(self.dtype).removeprefix("torch."), rule, text))


def examine(executor: Executor, name: str, dtype: torch.dtype, seed: int = 0) -> Examined:
    """Try one prim at one dtype."""
    done = Examined(name, dtype)
    row, prim = ROWS.get(name), TABLE[name]
    threaded: list[Call] = []
    careful = 0
    draw = values.Draw(dtype, zlib.crc32(f"{seed} {name} {dtype}".encode()))
    for sample in _with_layouts((row.samples if row else DRAWS[name])(draw)):
        want = oracle.expected(name, row, sample.args, sample.kwargs) if row else ()
        region, node, inputs = single(executor, prim.operator, sample.args, sample.kwargs)
        try:
            said = checks.claim(executor, node)
            if not said:
                done.tried.declined[said.reason] += 1
                continue
            done.tried.cases += 1
            call = _compiled(executor, region, inputs, want, prim.view)
            if row is None:
                for kind, message in checks.drawn(call, prim.operator, sample.args, sample.kwargs):
                    done.found(kind, message, sample)
                continue
            got, changed = checks.watched(call)
            for kind, message in changed:
                done.found(kind, message, sample)
            problem, ulps = _compare(name, row, sample, got, want)
            done.tried.ulps = max(done.tried.ulps, ulps)
            if problem:
                done.found("values", problem, sample)
            if careful < _CAREFULLY and sum(t.numel() for t in inputs) <= _MAX_ELEMENTS_CAREFULLY:
                careful += any(t.numel() > 1 for t in inputs)
                for rule in checks.RULES if prim.deterministic else (checks.fresh,):
                    for kind, message in rule(call):
                        done.found(kind, message, sample)
                if prim.deterministic:
                    threaded[:] = [call, replace(call, inputs=[checks.reversed_values(t) for t in inputs])] * 4
        except BrokenRuleError as error:
            done.found(error.rule, str(error), sample)
        if threaded and careful == _CAREFULLY:
            _try_threads(threaded, done, sample)
            threaded.clear()
            careful += 1
    if threaded:
        _try_threads(threaded, done, sample)
    return done


def _try_threads(calls: list[Call], done: Examined, sample: Sample) -> None:
    try:
        for kind, message in checks.threaded(calls):
            done.found(kind, message, sample)
    except BrokenRuleError as error:
        done.found("threads", str(error), sample)


def _with_layouts(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Each sample, and the first few that can be laid out in other ways in each of these."""
    count = 0
    for sample in samples:
        yield sample
        leaves = [x for x in _torch.pytree.tree_leaves(sample.args) if isinstance(x, Tensor)]
        if not sample.layouts or count == 3 or not any(map(values.can_be_laid_out, leaves)):
            continue
        count += 1
        for layout, change in values.LAYOUTS.items():
            args = _torch.pytree.tree_map(
                lambda x, change=change: change(x) if isinstance(x, Tensor) and values.can_be_laid_out(x) else x,
                sample.args,
            )
            yield replace(sample, args=args, note=f"{sample.note} {layout}".strip())


def _compiled(executor: Executor, region: Any, inputs: list[Tensor], want: Sequence[Tensor], view: bool) -> Call:
    try:
        function = executor.compile(region, {})
    except Exception as error:
        raise BrokenRuleError("claim", f"declared, and compile raised {type(error).__name__}: {error}") from error
    fakes = [n.meta["val"] for n in region.graph_module.graph.output_node().args[0]]
    # A shape that depends on values is the reference's.
    known = [all(type(n) is int for n in f.shape) for f in fakes]
    specs = [(f.dtype, f.shape if k else want[i].shape) for i, (f, k) in enumerate(zip(fakes, known, strict=True))]
    return Call(function, inputs, specs, view)


def _compare(name: str, row: Row, sample: Sample, got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[str, float]:
    """What is wrong with the values of one call, and the largest error in units in the last place."""
    complex_ = any(isinstance(a, Tensor) and a.is_complex() for a in sample.args)
    tolerance = TOLERANCES[(complex_ and row.complex_tolerance) or row.tolerance]
    dtype = next((g.dtype for g in got if g.dtype.is_floating_point or g.dtype.is_complex), None)
    if row.determined is not None:
        got, want = (row.determined(sample.args, [oracle.widen(r) for r in results]) for results in (got, want))
    scales: Sequence[Tensor | None] = (None,) * len(want)
    if tolerance.growth is not None:
        scales = oracle.scales(name, row, sample.args, sample.kwargs, want)
    worst, ulps = "", 0.0
    for g, w, scale in zip(got, want, scales, strict=True):
        found = differ(g, w, tolerance, terms=sample.terms, scale=scale, dtype=dtype if row.determined else None)
        ulps = max(ulps, found.ulps)
        worst = worst or found.problem
    return worst, ulps


def _show(sample: Sample) -> str:
    def show(value: Any) -> str:
        if isinstance(value, Tensor):
            dense = "" if value.is_contiguous() else f" strides {value.stride()}"
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{dense}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(show, value))}]"
        return repr(value)

    arguments = [show(a) for a in sample.args] + [f"{k}={show(v)}" for k, v in sample.kwargs.items()]
    return f"arguments {', '.join(arguments)}" + (f" ({sample.note})" if sample.note else "")


def refusals(executor: Executor) -> Iterator[Finding]:
    """What nobody can know must be declined: an operator made up for this question."""
    if executor.name == "aten":
        return
    _, node, _ = single(executor, torch.ops.aten.add.Tensor, (torch.ones(2), torch.ones(2)), {})
    node.target = unheard_of
    try:
        if checks.claim(executor, node):
            yield Finding("supports", "", "claim", "the executor declares an operator that it cannot know")
    except BrokenRuleError as error:
        yield Finding("supports", "", error.rule, str(error))


def unheard_of(*args: fx.Node) -> None:
    """An operator that no executor knows."""
