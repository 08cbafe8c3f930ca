"""Peak memory of a call of whole models: eager mode, primexec and Inductor.

`python -m benchmarks.memory gpt2` measures one model; without names, all are measured, each in a fresh process.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import gc
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import primexec
from benchmarks.command import check_names, report
from benchmarks.model_cases import MODELS
from benchmarks.models import CONTENDERS, STEPS
from benchmarks.process import answer, fresh
from benchmarks.timing import Call
from benchmarks.training import contending

MEASURED = ("eager", "primexec", "inductor")
WARM = 3


def allocations(event: Any) -> list[tuple[int, int]]:
    """(time, bytes) of what was allocated or freed inside of a profiler's event."""
    found = [(event.start_time_ns, event.extra_fields.alloc_size)] if event.name == "[memory]" else []
    return found + [a for child in event.children for a in allocations(child)]


def peak(function: Callable[[], object]) -> int:
    """The most bytes of tensors that a call held at once, beyond what was there before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    tree = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    held = most = 0
    for _, size in sorted(a for event in tree for a in allocations(event)):
        held += size
        most = max(most, held)
    return most


def peaks(name: str, contenders: Sequence[str]) -> dict[str, int]:
    """The peaks of a later call; what primexec keeps from call to call is freed before, and so counts."""
    step = STEPS.get(name)
    case = step or MODELS[name]
    model = case.build().train(step is not None)
    found = {}
    for contender in contenders:
        make = CONTENDERS[contender]
        run = contending(step, copy.deepcopy(model), make) if step else make(model)

        def call(given: Call, run: Callable[..., Any] = run) -> Any:
            args, kwargs = given
            with torch.set_grad_enabled(step is not None):
                return run(*args, **kwargs)

        for _ in range(WARM):
            call(case.inputs())
        primexec.empty_cache()
        found[contender] = peak(functools.partial(call, case.inputs()))
    return found


def section(names: Sequence[str], contenders: Sequence[str]) -> str:
    lines = []
    for name in names:
        found = fresh("benchmarks.memory", name, "--only", *contenders)
        cells = [(STEPS.get(name) or MODELS[name]).title, *(f"{found[n] / 1e6:.1f}" for n in contenders)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    head = " | ".join(["model", *contenders])
    return (
        "## Memory\n\n"
        f"Written by `python -m benchmarks.memory` on {datetime.date.today()}.\n\n"
        "The most MB of tensors that a call holds at once beyond parameters and inputs, as torch's allocator counts\n"
        "them; training: forward, backward and optimizer.\n\n"
        f"| {head} |\n|{' --- |' * (len(contenders) + 1)}\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    names = [n for n in (*MODELS, *STEPS) if not n.endswith("-autocast")]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--only", nargs="+", choices=MEASURED, help="measure the one model in this process")
    parser.add_argument("--append", type=Path, metavar="PATH", help="add the table to a page")
    options: Any = parser.parse_args()
    check_names(parser, options.names, names, "model")
    torch.manual_seed(0)
    if options.only:
        answer(**peaks(options.names[0], options.only))
        return
    contenders = [n for n in MEASURED if n != "inductor" or shutil.which("g++")]
    report(section(options.names or names, contenders), options.append)


if __name__ == "__main__":
    main()
