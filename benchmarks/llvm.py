"""Fused kernels against eager mode, Inductor and the machine: `python -m benchmarks.llvm [names...]`.

Compiling comes first and may take minutes; with `--pause` the program then waits for a line on its input, so that the
machine can be made quiet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import check_names, report
from benchmarks.kernels import KERNELS
from benchmarks.process import ROOT
from benchmarks.timing import Timed, Turns, take_turns

# A heap that keeps what is freed, for Inductor's outputs: neither trimmed nor mapped.
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=17179869184"}
REST = 0.01  # seconds: OpenMP's threads spin as long after their last work, on the cores that the next process needs
SMALLEST = 1 << 20  # bytes from which on the time of copying them is a limit
GOALS = {"geometric mean to Inductor": 2.0, "to Inductor, tuned malloc": 1.4, "lowest to the better": 0.95}
LIMIT = 1.3

CONTENDERS = {
    "eager": ("plain", "eager"),
    "inductor": ("plain", "inductor"),
    "tuned": ("tuned", "inductor"),
    "primexec": ("plain", "primexec"),
    "copy": ("plain", "copy"),
}


class Worker:
    """A process of `benchmarks.worker`; `last` is the one that ran most recently."""

    last: Worker | None = None

    def __init__(self, case: str, contenders: Sequence[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", case, *contenders]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended early")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(line)
        return found

    def timed(self, name: str) -> Timed:
        def one(_: int, calls: int) -> float:
            if Worker.last is not self:
                time.sleep(REST)
                Worker.last = self
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps([name, calls]) + "\n")
            self.process.stdin.flush()
            return float(self._answer()["seconds"])

        return one

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Measured:
    """One case: its workers' facts, and the times."""

    name: str
    nbytes: int
    error: dict[str, float]
    fine: bool
    first: dict[str, float]
    turns: Turns

    def over(self, name: str) -> float:
        """How many times as fast as a contender primexec is."""
        return self.turns.ratio(name, "primexec")

    @property
    def better(self) -> float:
        return min((self.over(n) for n in ("inductor", "tuned") if n in self.turns.seconds), default=math.nan)


def prepare(name: str, contenders: Iterable[str]) -> dict[str, Worker]:
    """Warm workers of a case, by environment."""
    chosen = [CONTENDERS[c] for c in contenders]
    workers = {}
    for kind, environment in (("plain", {}), ("tuned", TUNED)):
        if mine := [who for where, who in chosen if where == kind]:
            workers[kind] = Worker(name, mine, environment)
    return workers


def measure(name: str, workers: dict[str, Worker], contenders: Sequence[str], seconds: float) -> Measured:
    timed = {c: workers[CONTENDERS[c][0]].timed(CONTENDERS[c][1]) for c in contenders}
    turns = take_turns(timed, seconds)
    facts = workers["plain"].facts
    return Measured(name, facts["bytes"], facts["error"], facts["fine"]["primexec"], facts["first"], turns)


HEAD = (
    "case | eager ms | Inductor | tuned malloc | primexec | times Inductor | times tuned | copy | times copy "
    "| error: eager | Inductor | primexec | within"
)


def row(m: Measured) -> list[str]:
    def shown(name: str) -> str:
        return f"{m.turns.median(name) * 1e3:.3g}" if name in m.turns.seconds else ""

    def factor(name: str) -> str:
        return f"{m.over(name):.2f}" if name in m.turns.seconds else ""

    large = m.nbytes >= SMALLEST and "copy" in m.turns.seconds
    limit = 1 / m.over("copy") if large else math.nan
    missed = KERNELS[m.name].limited and limit > LIMIT
    return [
        KERNELS[m.name].title,
        *(shown(n) for n in ("eager", "inductor", "tuned", "primexec")),
        *(factor(n) for n in ("inductor", "tuned")),
        shown("copy") if large else "",
        (f"**{limit:.2f}**" if missed else f"{limit:.2f}") if large else "",
        *(f"{m.error[n]:.2g}" if n in m.error else "" for n in ("eager", "inductor", "primexec")),
        "yes" if m.fine else "**no**",
    ]


def summary(found: Sequence[Measured]) -> list[str]:
    def mean(name: str) -> float:
        logs = [math.log(m.over(name)) for m in found if name in m.turns.seconds]
        return math.exp(sum(logs) / len(logs)) if logs else math.nan

    values = (mean("inductor"), mean("tuned"), min((m.better for m in found), default=math.nan))
    return [
        f"| {name} | {goal:g} | {value:.2f} | {'met' if value >= goal else '**not met**'} |"
        for (name, goal), value in zip(GOALS.items(), values, strict=True)
    ]


TEXT = f"""Medians by turns on three rotating sets of inputs: eager mode, Inductor, Inductor in a process whose malloc
neither trims nor maps (`GLIBC_TUNABLES`), and primexec on `("llvm", "aten")`. `copy` is the time that `Tensor.copy_`
takes to move as many bytes as arguments and results have; those with at most two transcendental functions an element
are held to {LIMIT} times as much. Errors are the largest absolute ones against float64; within: at most twice eager's
largest and 2 ulp."""


def render(found: Sequence[Measured]) -> str:
    rows = "\n".join(f"| {' | '.join(row(m))} |" for m in found)
    goals = "\n".join(["| goal | at least | measured |  |", "| --- | --- | --- | --- |", *summary(found)])
    return f"## Fused kernels\n\n{TEXT}\n\n{goals}\n\n| {HEAD} |\n|{' --- |' * (HEAD.count('|') + 1)}\n{rows}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(KERNELS)}; default: all")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, a case")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--pause", action="store_true", help="wait for a line before measuring")
    parser.add_argument("--cache", help="where Inductor keeps what it compiled; default: nowhere")
    parser.add_argument("--append", type=Path, metavar="PATH", help="add the tables to a page")
    options: Any = parser.parse_args()
    names = options.names or list(KERNELS)
    check_names(parser, names, KERNELS, "case")
    contenders = options.contenders.split(",")
    found = []
    with tempfile.TemporaryDirectory() as own:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = options.cache or own
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes beside what is timed
        together = [names] if options.pause else [[n] for n in names]
        for batch in together:
            workers = {n: prepare(n, contenders) for n in batch}
            if options.pause:
                print("ready", flush=True)
                sys.stdin.readline()
            for name in batch:
                found.append(measure(name, workers[name], contenders, options.seconds))
                print(" | ".join(row(found[-1])), file=sys.stderr, flush=True)
                for worker in workers[name].values():
                    worker.close()
    report(render(found), options.append)


if __name__ == "__main__":
    main()
