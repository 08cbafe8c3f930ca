"""Measure, and print a page: `python -m benchmarks.run [names...] [--write docs/benchmarks.md]`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BUDGETS, CASES
from benchmarks.command import check_names
from benchmarks.process import fresh
from benchmarks.training import TRAINING

Table = list[tuple[str, ...]]

LAYERS = (3, 6, 12)


@dataclass(frozen=True)
class Effort:
    """How long to look."""

    seconds: float
    processes: int


FULL = Effort(seconds=20.0, processes=5)
QUICK = Effort(seconds=1.5, processes=2)


@dataclass
class Page:
    """The tables, as they fill."""

    warm: Table = field(default_factory=list)
    training: Table = field(default_factory=list)
    saved: dict[str, float] = field(default_factory=dict)  # of each training case, primexec's bytes over eager's
    first: Table = field(default_factory=list)
    errors: Table = field(default_factory=list)
    capture: Table = field(default_factory=list)
    imports: Table = field(default_factory=list)
    verdicts: Table = field(default_factory=list)

    def judge(self, name: str, value: float) -> str:
        """Whether a budget is met, where there is one."""
        if (budget := BUDGETS.get(name)) is None:
            return ""
        said = "met" if budget.met(value) else "**not met**"
        self.verdicts.append((name, f"{budget.limit:g} {budget.unit}", f"{value:.3g} {budget.unit}", said))
        return said


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def steady(name: str, page: Page, effort: Effort, inductor: bool) -> None:
    case = CASES[name]
    result = fresh("benchmarks.steady", name, f"--seconds={effort.seconds}", *(["--inductor"] if inductor else []))
    median, ratio = result["median"], result["ratio"]
    above = median["primexec"] - median["eager"]
    values = {"x": ratio["primexec"], "µs": above * 1e6}
    lower, upper = result["quartiles"]["primexec"]
    page.warm.append(
        (
            case.title,
            duration(median["eager"]),
            duration(median["primexec"]),
            f"{ratio['primexec']:.3f} ({lower:.3f} to {upper:.3f})",
            f"{above * 1e6:+.1f} µs",
            duration(median["inductor"]) if inductor else "",
            f"{ratio['inductor']:.2f}" if inductor else "",
            page.judge(name, values[BUDGETS[name].unit]) if name in BUDGETS else "",
        )
    )
    first = result["first"]
    seconds = f"{first['inductor']:.2f} s" if inductor else ""
    page.first.append((case.title, f"{first['primexec']:.2f} s", seconds))
    error = result["error"]
    page.errors.append(
        (
            case.title,
            *(f"{error[who]:.3g}" if who in error else "" for who in ("eager", "primexec", "inductor")),
            "yes" if error["primexec"] <= error["eager"] else "**no**",
        )
    )


def training(name: str, page: Page, effort: Effort, inductor: bool) -> None:
    extra = ["--inductor"] if inductor else []
    result = fresh("benchmarks.training", name, f"--seconds={effort.seconds}", *extra)
    median, ratio, saved = result["median"], result["ratio"], result["saved"]
    page.saved[name] = saved["primexec"] / saved["eager"]
    lower, upper = result["quartiles"]["primexec"]
    page.training.append(
        (
            TRAINING[name].title,
            duration(median["eager"]),
            duration(median["primexec"]),
            f"{ratio['primexec']:.3f} ({lower:.3f} to {upper:.3f})",
            duration(median["inductor"]) if inductor else "",
            f"{ratio['inductor']:.2f}" if inductor else "",
            f"{saved['eager'] / 2**20:.2f} MiB",
            f"{saved['primexec'] / 2**20:.2f} MiB",
            page.judge(name, ratio["primexec"]),
        )
    )


def capture(page: Page, effort: Effort) -> None:
    work = {}
    for layers in LAYERS:
        cold = fresh("benchmarks.capture", str(layers))
        preload = f"--preload={json.dumps(cold['imported'])}"
        runs = [fresh("benchmarks.capture", str(layers), preload) for _ in range(effort.processes)]
        cost = statistics.median(run["seconds"] for run in runs)
        work[layers] = min(run["processor"] for run in runs)  # what disturbs it only adds to it
        said = page.judge("capture", cost) if layers == LAYERS[-1] else ""
        times = (cost, work[layers], cold["seconds"])
        page.capture.append((str(layers), *(f"{seconds:.2f} s" for seconds in times), said))
    *_, some, many = LAYERS
    page.judge("capture, growth", work[many] / work[some] * some / many)
    layers = [str(many), "--train"]
    cold = fresh("benchmarks.capture", *layers)
    preload = f"--preload={json.dumps(cold['imported'])}"
    runs = [fresh("benchmarks.capture", *layers, preload) for _ in range(effort.processes)]
    cost, least = (
        pick(run[what] for run in runs) for pick, what in ((statistics.median, "seconds"), (min, "processor"))
    )
    said = page.judge("capture, training", cost)
    page.capture.append((f"{many}, training", *(f"{s:.2f} s" for s in (cost, least, cold["seconds"])), said))


def imports(page: Page, effort: Effort) -> None:
    runs = [fresh("benchmarks.imports") for _ in range(2 * effort.processes)]
    cost = statistics.median(run["primexec"] for run in runs)
    optional = sorted({name for run in runs for name in run["optional"]})
    said = page.judge("import", cost)
    base = statistics.median(run["torch"] for run in runs)
    page.judge("import, optional modules", len(optional))
    page.imports.append((f"{base:.2f} s", f"{cost:.3f} s", ", ".join(optional) or "none", said))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


HEADS = {
    "warm": "case | eager | primexec | ratio (quartiles) | above eager | Inductor | its ratio | budget",
    "training": "case | eager | primexec | ratio (quartiles) | Inductor | its ratio | saved by eager | by primexec "
    "| budget",
    "first": "case | primexec | Inductor",
    "errors": "case | eager | primexec | Inductor | primexec no worse than eager",
    "capture": "layers | beyond torch's own imports | least processor time | with them | budget",
    "imports": "`import torch` | `import primexec` after it | optional modules imported | budget",
    "verdicts": "budget | limit | measured | ",
}

TEXTS = {
    "verdicts": "## Budgets",
    "warm": """## Warm calls

Medians by turns: in one fresh process a case, eager mode, primexec on `aten` and, for some, `torch.compile`
take turns on fresh random inputs, in changing order. The ratio to eager is that of the medians; in brackets,
the quartiles of the ratio within a round.""",
    "training": """## Training steps

Forward, loss, backward and optimizer, by turns as above; each contender trains its own copy of the model. Saved is
what autograd keeps between forward and backward, besides inputs, parameters and buffers.""",
    "first": """## First calls

The first call in a fresh process with empty caches, after one eager call, all imports included.""",
    "errors": """## Errors

The largest absolute difference from the same function run in float64, over three inputs.""",
    "capture": """## Capturing GPT-2

The first call minus an eager call, random weights and 8 tokens, in fresh processes; medians.
The budget `capture, growth` is on the least processor time of 12 layers over twice that of 6: whether it is linear.""",
    "imports": "## Importing",
}


def render(page: Page, command: str, load: float) -> str:
    parts = [
        "# Benchmarks",
        f"Written by `{command}` on {datetime.date.today()}.\n\n"
        f"{processor()}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads. Load average at the start: {load:.1f}.",
    ]
    for name, text in TEXTS.items():
        if rows := getattr(page, name):
            head = HEADS[name]
            lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
            lines += [f"| {' | '.join(row)} |" for row in rows]
            parts += [text, "\n".join(lines)]
    parts.append(
        "## Again\n\n"
        "`make bench` measures everything. `python -m benchmarks.run --quick` is rough, "
        "`python -m benchmarks.run chain gpt2` measures those cases, "
        "`--no-inductor` leaves out `torch.compile`, which needs a C++ compiler."
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    others: dict[str, Callable[[Page, Effort], None]] = {"capture": capture, "import": imports}
    names: Iterable[str] = [*CASES, *TRAINING, *others]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the page there, too")
    parser.add_argument("--quick", action="store_true", help="rough figures soon, without Inductor")
    parser.add_argument(
        "--inductor",
        action=argparse.BooleanOptionalAction,
        help="compare with torch.compile; default: for some cases, where there is a C++ compiler; "
        "with --inductor and names: for those",
    )
    options: Any = parser.parse_args()
    check_names(parser, options.names, names, "measurement")
    effort = QUICK if options.quick else FULL
    wanted = options.inductor if options.inductor is not None else bool(shutil.which("g++")) and not options.quick

    page, load = Page(), os.getloadavg()[0]
    for name in options.names or names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        if name in others:
            others[name](page, effort)
            continue
        everything = options.inductor and options.names
        if name in TRAINING:
            training(name, page, effort, bool(wanted and everything))
        else:
            steady(name, page, effort, bool(wanted and (everything or CASES[name].inductor)))
    if page.saved:
        page.judge("saved for backward", max(page.saved.values()))
    text = render(page, " ".join(["python -m benchmarks.run", *sys.argv[1:]]), load)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
