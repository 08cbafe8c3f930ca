"""Everyday functions beside eager mode and Inductor: `python -m benchmarks.everyday [names...]`.

Forward without gradients, then forward and backward, each in a fresh process; `--write docs/everyday.md` keeps it.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import primexec
from benchmarks.command import check_names
from benchmarks.everyday_cases import EVERYDAY
from benchmarks.models import distance, results, wide
from benchmarks.process import answer, fresh
from benchmarks.run import processor
from benchmarks.timing import by_turns

CONTENDERS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "eager": lambda function: function,
    "inductor": torch.compile,
    "primexec": primexec.make_traced,
}
SETS = 3  # of inputs, in rotation


def backward(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The gradients of the sum of squares of its results."""

    def step(*args: Tensor) -> list[Tensor]:
        given = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
        loss = sum(t.square().sum() for t in results(function(*given)))
        return list(torch.autograd.grad(loss, [t for t in given if t.requires_grad]))  # type: ignore[arg-type]

    return step


def measure(name: str, trains: bool, seconds: float) -> dict[str, Any]:
    """Medians in seconds and errors against float64, by contender."""
    case = EVERYDAY[name]
    torch.manual_seed(0)
    sets = [case.inputs() for _ in range(SETS)]
    kind = backward if trains else torch.no_grad()
    exact = results(kind(case.function)(*tree_map_only(Tensor, wide, sets[0])))
    run = {c: kind(make(case.function)) for c, make in CONTENDERS.items()}
    errors = {c: distance(f(*sets[0]), exact) for c, f in run.items()}
    turns = by_turns(run, lambda: (sets[torch.randint(SETS, ()).item()], {}), seconds)  # type: ignore[index]
    return {c: [turns.median(c), errors[c]] for c in run}


def gain(found: dict[str, Any]) -> float:
    """How many times as fast as the better of the others primexec is."""
    return float(min(found["eager"][0], found["inductor"][0]) / found["primexec"][0])


def page(found: dict[str, dict[bool, dict[str, Any]]], seconds: float) -> str:
    rows, gains = [], {trains: [gain(r[trains]) for r in found.values() if trains in r] for trains in (False, True)}
    for name, kinds in found.items():
        for trains, one in kinds.items():
            times = (f"{one[c][0] * 1e3:.3g}" for c in CONTENDERS)
            errors = " / ".join(f"{one[c][1]:.0e}" for c in CONTENDERS)
            rows.append([name, "training" if trains else "", *times, f"{gain(one):.2f}", errors])
    means = ", ".join(
        f"{'training' if trains else 'inference'} {statistics.geometric_mean(many):.2f} (lowest {min(many):.2f})"
        for trains, many in gains.items()
        if many
    )
    return "\n".join(
        [
            "# Everyday functions",
            "",
            f"Written by `python -m benchmarks.everyday --seconds {seconds:g} --write docs/everyday.md` on",
            f"{datetime.date.today()}. {processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}.",
            "",
            "Functions as people write them (`benchmarks/everyday_cases.py`), on three sets of inputs by turns:",
            "medians in milliseconds; the gain on the better of eager mode and Inductor; errors against float64,",
            "relative to the largest number of each tensor, in the same order. Training: forward, and gradients of",
            "all floats.",
            "",
            f"Geometric mean of the gains: {means}.",
            "",
            "| function | | eager | Inductor | primexec | gain | errors |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(r)} |" for r in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(EVERYDAY))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, each kind of a case")
    parser.add_argument("--write", type=Path, metavar="PATH")
    parser.add_argument("--one", choices=("inference", "training"), help="measure in this process")
    options = parser.parse_args()
    check_names(parser, options.names, EVERYDAY, "function")
    if options.one:
        answer(**measure(options.names[0], options.one == "training", options.seconds))
        return
    found: dict[str, dict[bool, dict[str, Any]]] = {}
    for name in options.names:
        kinds = (False, True) if EVERYDAY[name].trains else (False,)
        arguments = ("benchmarks.everyday", name, f"--seconds={options.seconds}")
        found[name] = {trains: fresh(*arguments, f"--one={'training' if trains else 'inference'}") for trains in kinds}
        print(name, *(f"{gain(one):.2f}" for one in found[name].values()), flush=True)
        if options.write is not None:  # at once: a run takes a quarter of an hour
            options.write.write_text(page(found, options.seconds))


if __name__ == "__main__":
    main()
