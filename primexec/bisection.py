"""The first operator at which an executor that fuses leaves what rounding explains.

Inside a fused program an operator has no result of its own: prefixes of the program are compiled, each returning what
later operators use, and bisected. A prefix is judged against Monte Carlo runs, that is float64 runs in which every
result is moved at random within what rounding explains for its operator (Parker, Monte Carlo Arithmetic, 1997).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from primexec import effects, exact
from primexec.divergence import Divergence, OpError, against, judge, new_row
from primexec.executors.base import Executor
from primexec.program import op_name
from primexec.runs import Exact, Perturbed, Singly, compiled
from primexec.slices import Step, Subject, frontier, part
from primexec.ulp import difference, is_floating, spacing

_SAMPLES = 3  # Monte Carlo runs
_MARGIN = 4.0  # how far beyond their largest deviation an error may lie
_RESTARTS = 8


class Bisection:
    """The search among the prefixes of one program, for one executor that fuses."""

    def __init__(self, subject: Subject, reference: Callable[[], Exact | Singly], executor: Executor) -> None:
        self.subject, self.reference, self.executor = subject, reference, executor
        self.program, self.steps = subject.program, subject.steps
        self.compiles = 0
        self.notes: list[str] = []
        self.base, self.rebased = 0, dict[fx.Node, Any]()
        self.spread: dict[fx.Node, list[tuple[int, float]]] = {}

    def search(self) -> tuple[dict[str, OpError], Divergence | None]:
        """The error at every operator where all results are returned, and the first that diverges."""
        errors, suspect = self._observe()
        for _ in range(_RESTARTS):
            cut = self._first_bad(suspect)
            if cut is None:
                return errors, None
            divergence = self._explain(cut)
            if divergence is not None:
                return errors, divergence
            step = self.steps[cut - 1]
            if any(effects.writes(s.node) for s in self.steps):
                self.notes.append(
                    f"{self.executor.name}: not searched after {step.node.name}, whose discrete result differs"
                )
                return errors, None
            self._rebase(cut)
            suspect = None
        self.notes.append(f"{self.executor.name}: gave up after {_RESTARTS} discrete results that differ")
        return errors, None

    def _run(self, steps: Sequence[Step], outputs: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        self.compiles += 1
        run, taken = compiled(self.subject, steps, outputs, self.executor)
        results = run(*exact.copies([self.subject.given[n] for n in taken]))
        return dict(zip(outputs, results, strict=True))

    def _observe(self) -> tuple[dict[str, OpError], int | None]:
        """One compile that returns every result that nothing writes to; which step looks wrong first."""
        written = {effects.storage_of(w) for s in self.steps for w in effects.writes(s.node)}
        outputs = [n for s in self.steps for _, n in s.results if effects.storage_of(n) not in written]
        got = self._run(self.steps, outputs) if outputs else {}
        reference, samples = self._runs()
        errors: dict[str, OpError] = {}
        suspect = None
        for i, step in enumerate(self.steps):
            self._advance(reference, samples, i)
            shown = [(at, n) for at, n in step.results if n in got]
            if shown:
                errors[step.node.name] = OpError(against(shown, got, reference.values))
            if suspect is None and any(not self._explained(n, got[n], reference.values[n], i) for _, n in shown):
                suspect = i + 1
        return errors, suspect

    def _runs(self) -> tuple[Exact | Singly, list[Perturbed]]:
        samples = [Perturbed(self.subject, seed) for seed in range(_SAMPLES)]
        self.spread = {}
        return self._reference(samples), samples

    def _reference(self, others: Sequence[Perturbed] = ()) -> Exact | Singly:
        reference = self.reference()
        for run in (reference, *others):
            wide = isinstance(run, Exact)
            run.values.update({n: exact.widen(v) if wide else v for n, v in self.rebased.items()})
        return reference

    def _reference_at(self, cut: int) -> Exact | Singly:
        """The reference after the steps before the cut."""
        reference = self._reference()
        for step in self.steps[self.base : cut]:
            reference.step(step)
        return reference

    def _advance(self, reference: Exact | Singly, samples: Sequence[Perturbed], i: int) -> None:
        """Run step i on the reference and the samples, and note how far these are apart."""
        step = self.steps[i]
        for run in (reference, *samples):
            run.step(step)
        for n in {*(n for _, n in step.results), *effects.writes(step.node)}:
            if isinstance(n.meta.get("val"), Tensor):
                apart = [_farthest(s.values[n], reference.values[n], n.meta["val"].dtype) for s in samples]
                self.spread.setdefault(n, []).append((i, max(apart)))

    def _explained(self, n: fx.Node, got: Tensor, expected: Tensor, i: int) -> bool:
        """Whether the error of n after step i lies within what the samples show."""
        dtype = n.meta["val"].dtype
        spread = [s for at, s in self.spread[n] if at <= i][-1]
        if got.shape != expected.shape:
            return False
        if not is_floating(dtype):
            return spread > 0 or torch.equal(got, expected)
        allowed = _MARGIN * spread + spacing(expected, dtype)
        return bool((difference(got, expected, dtype) <= allowed).all())

    def _is_bad(self, cut: int) -> bool:
        outputs = [n for n in frontier(self.program, self.steps, cut) if n in self.spread]
        if not outputs:
            return False
        got = self._run(self.steps[:cut], outputs)
        reference = self._reference_at(cut)
        return any(not self._explained(n, got[n], reference.values[n], cut - 1) for n in outputs)

    def _first_bad(self, suspect: int | None) -> int | None:
        """The cut behind the first bad step, given that the cut before it is good."""
        low, high = self.base, len(self.steps)
        if not self._is_bad(high):
            # What is wrong inside may not show at the end.
            if suspect is None or not self._is_bad(suspect):
                return None
            high = suspect
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_bad(middle) else (middle, high)
        return high

    def _explain(self, cut: int) -> Divergence | None:
        """The divergence at the step before the cut; None where a discrete result flipped with its inputs."""
        step = self.steps[cut - 1]
        taken = [
            n for n in step.node.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and n.op == "call_function"
        ]
        results = [n for _, n in step.results]
        shown = list(dict.fromkeys((*taken, *results)))
        got = self._run(self.steps[:cut], shown)
        judged = judge(step, {**self.subject.given, **got}, got)
        discrete = not any(is_floating(n.meta["val"].dtype) for _, n in step.results)
        if judged.excess <= 1 and discrete:
            self.notes.append(
                f"{self.executor.name}: {step.node.name} = {op_name(step.node.target)} differs from the reference in "
                "some elements, as its inputs do within rounding"
            )
            return None
        accumulated = against(step.results, got, self._reference_at(cut).values)
        piece, needed = part(self.program, self.steps[:cut], frontier(self.program, self.steps, cut))
        row = new_row(step, self.subject.label)
        spread = max((self.spread[n][-1][1] for n in results), default=0.0)
        excess = max(judged.excess, accumulated.absolute / (_MARGIN * spread) if spread else math.inf)
        found = f"found among {len(self.steps)} operators by {self.compiles} compiles"
        inputs = tuple(exact.copies([self.subject.given[n] for n in needed]))
        return Divergence.at(row, self.executor.name, accumulated, judged.error, excess, found, piece, inputs)

    def _rebase(self, cut: int) -> None:
        """From here on the reference continues from what the executor has."""
        outputs = frontier(self.program, self.steps, cut)
        self.rebased = self._run(self.steps[:cut], outputs)
        self.base = cut
        reference, samples = self._runs()
        for n in outputs:
            self.spread[n] = [(cut - 1, 0.0)]
        for i in range(cut, len(self.steps)):
            self._advance(reference, samples, i)


def _farthest(sample: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    if sample.shape != reference.shape:
        return math.inf
    if sample.numel() == 0:
        return 0.0
    if not is_floating(dtype):
        return float((sample != reference).sum())
    apart = difference(sample, reference, exact.wide(dtype))
    return apart.max().item()
