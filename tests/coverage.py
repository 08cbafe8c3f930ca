"""Writes docs/coverage.md: how much of torch's own samples is traced, and what is not, with the reason.

Run it as `python -m tests.coverage --write docs/coverage.md`; `--quick` takes the first samples only. With
`--keep FOLDER` the results of each entry are kept there: an interrupted run goes on, and several runs share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from tests.door_sweep import VARIANTS as DOOR_VARIANTS
from tests.door_sweep import sweep_door
from tests.llvm_sweep import Result as LlvmResult
from tests.llvm_sweep import judge as judge_llvm
from tests.llvm_sweep import run_entry as run_llvm
from tests.llvm_sweep import section as llvm_section
from tests.lowering_sweep import section as lowering_section
from tests.observe import RIGHT, Kind
from tests.sweep import (
    EXHAUSTIVE,
    MODULES,
    NOT_CAPTURED,
    OPS,
    QUICK,
    QUICK_MODULE_INPUTS,
    VALUES_UNDEFINED,
    Result,
    primexec_subject,
    sweep_module,
    sweep_op,
)
from tests.training_sweep import (
    DIFFERENTIABLE,
    INEXACT_GRADIENTS,
    OTHER_SECOND,
    SECOND,
    sweep_gradients,
    sweep_training,
)

PROCESSES = 2
DOOR_SAMPLES = 3
INTRODUCTION = """\
# Coverage

Written by `python -m tests.coverage{quick}` on {date}: torch {torch}, Python {python}, {machine}, {cpus} cores
({capability}), {minutes} minutes of processor time.

**{percentage:.1%} of the {samples} float32 samples run, and {trained:.1%} of {gradients} with their gradients; {wrong}
results are wrong.**

The samples are those that torch ships for its own tests: all of float32, the first few of each other dtype.
Each is called twice, the second time with other values and another seed, and then once more in another order;
all calls of one kind but the first must be cache hits. Compared with eager are values, dtypes, shapes,
strides, aliasing, the inputs and buffers afterwards, and the state of the random generator.
"""
GRADIENTS = f"""\
## Gradients: {len(DIFFERENTIABLE)} differentiable entries of `op_db`, and `module_db` in training

float32. Forward and backward twice: from all outputs with random gradients, accumulated; then, a cache hit with
other values, the last output by the last input alone. Compared are the outputs, the gradients with their strides,
which inputs get none, the buffers and the generator. Second derivatives are asked for at the first sample: they are
eager's, or an error says that there are none, but for those listed below.
"""
LISTED = {(SECOND, name) for name in OTHER_SECOND}
GRADIENT_VARIANTS = {"gradients", "gradients, in-place", SECOND, "training"}
TRAINING = {"train": True, "eval": False}
COLUMNS = {
    Kind.SAME: "equal bit for bit",
    Kind.CLOSE: "within tolerance",
    Kind.METADATA: "values undefined",
    Kind.RAISED: "same error as eager",
    Kind.CAPTURE: "CaptureError",
    Kind.WRONG: "wrong",
}


def run_operation(name: str, quick: bool) -> list[Result]:
    return list(sweep_op(name, QUICK if quick else EXHAUSTIVE, primexec_subject()))


def run_module(name: str, quick: bool) -> list[Result]:
    limit = QUICK_MODULE_INPUTS if quick else None
    return [
        result for training in TRAINING.values() for result in sweep_module(name, training, primexec_subject(), limit)
    ]


def run_door(name: str, quick: bool) -> list[Result]:
    return list(sweep_door(name, 1 if quick else DOOR_SAMPLES))


def run_gradients(name: str, quick: bool) -> list[Result]:
    return list(sweep_gradients(name, 1 if quick else None, primexec_subject()))


def run_training(name: str, quick: bool) -> list[Result]:
    return list(sweep_training(name, 1 if quick else None, primexec_subject()))


Sweep = Callable[[str, bool], Sequence[Result]]
SWEEPS: dict[str, tuple[Sweep, Iterable[str]]] = {
    "operations": (run_operation, OPS),
    "modules": (run_module, MODULES),
    "gradients": (run_gradients, DIFFERENTIABLE),
    "training": (run_training, MODULES),
    "door": (run_door, OPS),
    "llvm": (run_llvm, OPS),
}


def run(sweep: str, name: str, quick: bool, keep: Path | None) -> tuple[float, Sequence[Result]]:
    """The results of one entry, and the processor time in seconds; taken from `keep` where they are there."""
    kept = keep and keep / f"{sweep}-{name}.json"
    if kept and kept.exists():
        seconds, rows = json.loads(kept.read_text())
        kinds = [LlvmResult if "kernels" in row else Result for row in rows]
        return seconds, [k(**{**row, "kind": Kind(row["kind"])}) for k, row in zip(kinds, rows, strict=True)]
    started = time.process_time()
    results = SWEEPS[sweep][0](name, quick)
    seconds = time.process_time() - started
    if kept:
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps([seconds, [dataclasses.asdict(result) for result in results]]))
        written.replace(kept)
    return seconds, results


def run_all(quick: bool, keep: Path | None, processes: int) -> tuple[float, list[Result]]:
    """Everything, one entry a task: an entry that kills its process is named by the exception."""
    tasks = [(sweep, name) for sweep, (_, names) in SWEEPS.items() for name in names]
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        random.Random(os.getpid()).shuffle(tasks)  # several runs begin in different places
    total, results = 0.0, []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(run, *task, quick, keep): task for task in tasks}
        for done, future in enumerate(as_completed(running), 1):
            try:
                seconds, found = future.result()
            except Exception as error:
                raise RuntimeError(f"the sweep of {running[future]} failed") from error
            total += seconds
            results += found
            if sys.stderr.isatty():
                print(f"\r{done}/{len(running)} {running[future][1]:60.60}", end="", file=sys.stderr)
    return total, sorted(results, key=lambda result: (result.entry, result.variant, result.dtype, result.index))


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]


def kinds_table(first: str, groups: dict[str, list[Result]]) -> list[str]:
    rows = []
    for name, results in groups.items():
        counted = Counter(result.kind for result in results)
        right = sum(counted[kind] for kind in RIGHT)
        rows.append([name, len(results), f"{right / len(results):.1%}", *(counted[kind] for kind in COLUMNS)])
    return table([first, "samples", "run", *COLUMNS.values()], rows)


def grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def reason(result: Result) -> str:
    """The sentence that says what happened; the lines after it name the place and the way out."""
    return result.detail.splitlines()[0]


def not_captured(results: list[Result]) -> list[str]:
    raised = [result for result in results if result.kind is Kind.CAPTURE]
    samples = Counter(result.entry for result in results)
    lines = []
    for sentence, group in grouped(raised, reason).items():
        counted = Counter(result.entry for result in group)
        names = ", ".join(f"{name} ({counted[name]} of {samples[name]})" for name in sorted(counted))
        lines += [f"- {sentence} (samples: {len(group)}):", f"  {names}"]
    return [*lines, ""] if lines else ["None.", ""]


def door_section(results: list[Result]) -> list[str]:
    rows = []
    for variant, group in grouped(results, lambda result: result.variant).items():
        counted = Counter(result.kind for result in group)
        rows.append([variant, len(group), counted[Kind.SAME], counted[Kind.CAPTURE], counted[Kind.WRONG]])
    return [
        '## `torch.compile(backend="primexec")`: PyTorch\'s own test of AOTAutograd',
        "",
        "`torch.testing._internal.optests.aot_autograd_check` with our compiler in place of its own: at most "
        f"{DOOR_SAMPLES} float32 samples of each entry of `op_db`, results and gradients, each for two sets of values.",
        "",
        *table(["sizes", "samples", "pass", "fail with PyTorch's own compiler too", "wrong"], rows),
    ]


def in_training_alone(results: list[Result]) -> list[Result]:
    """The gradients of entries that are all captured without them."""
    refused = {r.entry for r in results if r.kind is Kind.CAPTURE and r.variant not in GRADIENT_VARIANTS}
    wanted = GRADIENT_VARIANTS - {SECOND}
    return [r for r in results if r.variant in wanted and r.entry not in refused]


def page(all_results: list[Result], llvm: list[LlvmResult], seconds: float, quick: bool) -> str:
    door = [result for result in all_results if result.variant in DOOR_VARIANTS]
    gradients = grouped((r for r in all_results if r.variant in GRADIENT_VARIANTS), lambda result: result.variant)
    results = [result for result in all_results if result.variant not in {*DOOR_VARIANTS, *GRADIENT_VARIANTS}]
    operations = [result for result in results if result.entry in OPS]
    by_dtype = grouped((r for r in operations if r.variant == "function"), lambda result: result.dtype)
    variants = grouped((r for r in operations if r.variant != "function"), lambda result: result.variant)
    modules = grouped((r for r in results if r.entry in MODULES), lambda result: result.variant)
    float32 = by_dtype["float32"]
    run, trained = (sum(r.kind in RIGHT for r in group) for group in (float32, gradients["gradients"]))
    wrong = [r for r in all_results if r.kind is Kind.WRONG and (r.variant, r.entry) not in LISTED]
    wrong += [result for result in llvm if not judge_llvm(result)]
    close = Counter(
        result.entry for result in all_results if result.kind is Kind.CLOSE and result.variant not in DOOR_VARIANTS
    )
    lines = [
        INTRODUCTION.format(
            date=datetime.date.today(),
            torch=torch.__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            cpus=os.cpu_count(),
            capability=torch.backends.cpu.get_cpu_capability(),
            minutes=round(seconds / 60),
            quick=" --quick" if quick else "",
            percentage=run / len(float32),
            samples=len(float32),
            trained=trained / len(gradients["gradients"]),
            gradients=len(gradients["gradients"]),
            wrong=len(wrong),
        ),
        f"## `op_db`: {len(OPS)} entries by dtype",
        "",
        *kinds_table("dtype", by_dtype),
        "## `op_db`: other ways to call an operation",
        "",
        "The first float32 sample of each entry; and all calls that torch expects to fail.",
        "",
        *kinds_table("variant", variants),
        f"## `module_db`: {len(MODULES)} entries",
        "",
        *kinds_table("mode", modules),
        GRADIENTS,
        *kinds_table("what", gradients),
        *door_section(door),
        *llvm_section(llvm),
        *lowering_section(),
        "## What raises CaptureError",
        "",
        *not_captured(results),
        "## What raises CaptureError in training alone",
        "",
        *not_captured(in_training_alone([r for r in all_results if r.variant not in DOOR_VARIANTS])),
    ]
    if close:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(close.items()))
        lines += ["## Equal within tolerance, but not bit for bit", "", names, ""]
        lines += [*(f"- {name}: {why}" for name, why in INEXACT_GRADIENTS.items()), ""]
    lines += ["## Values that cannot be compared", "", *table(["entry", "reason"], VALUES_UNDEFINED.items())]
    if wrong:
        rows = ([r.entry, r.variant, r.dtype, r.index, r.detail.splitlines()[0]] for r in wrong)
        lines += ["## Wrong", "", *table(["entry", "variant", "dtype", "sample", "what"], rows)]
    reasons = ([name, what, why] for name, (what, why) in OTHER_SECOND.items())
    lines += ["## Second derivatives that differ from eager's", "", *table(["entry", "what alone", "why"], reasons)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write the page; else print it")
    parser.add_argument("--quick", action="store_true", help="the first samples only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to keep the results of each entry")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    seconds, everything = run_all(options.quick, options.keep, options.processes)
    llvm = [result for result in everything if isinstance(result, LlvmResult)]
    results = [result for result in everything if not isinstance(result, LlvmResult)]
    text = page(results, llvm, seconds, options.quick)
    if options.write:
        options.write.write_text(text)
    else:
        print(text)
    raised = {r.entry for r in results if r.kind is Kind.CAPTURE and r.variant not in {*DOOR_VARIANTS, SECOND}}
    stale = {*NOT_CAPTURED} - raised
    if stale and not options.quick:
        print(f"these are captured now, remove them from NOT_CAPTURED: {sorted(stale)}", file=sys.stderr)
        return 1
    return 0 if all(result.kind is not Kind.WRONG for result in results) and all(map(judge_llvm, llvm)) else 1


if __name__ == "__main__":
    sys.exit(main())
