"""Whole models: primexec on ("llvm", "aten") beside eager mode and Inductor, with errors and cold first calls.

`python -m benchmarks.models bert --seconds 20` measures one model; without names, all are measured, each in fresh
processes. Every contender runs the same model on the same inputs; errors are against the same model in float64.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import primexec
from benchmarks.cases import Case
from benchmarks.command import check_names
from benchmarks.model_cases import MODELS
from benchmarks.process import answer, fresh
from benchmarks.run import processor
from benchmarks.timing import Call, by_turns
from benchmarks.training import TRAINING, WHOLE_STEPS, contending, stepper

Function = Callable[..., Any]
ON_LLVM: dict[str, Any] = {"executor": ("llvm", "aten")}
DRAWS = 2
STEPS = TRAINING | WHOLE_STEPS

CONTENDERS: dict[str, Callable[[Any], Function]] = {
    "eager": lambda model: model,
    "primexec": lambda model: primexec.make_traced(model, **ON_LLVM),
    "primexec freezing": lambda model: primexec.make_traced(model, **ON_LLVM, executor_parameters={"freeze": True}),
    "inductor": torch.compile,
    "inductor freezing": lambda model: torch.compile(model, options={"freezing": True}),
}
COLD = ("primexec", "inductor")


def wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def results(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def distance(got: Any, exact: list[Tensor]) -> float:
    """The largest error, each tensor's relative to its largest element."""
    pairs = zip(results(got), exact, strict=True)
    return max((float((a.double() - b).abs().max()) / max(float(b.abs().max()), 1e-30) for a, b in pairs), default=0.0)


def errors(contenders: Mapping[str, Function], model: nn.Module, inputs: Callable[[], Call]) -> dict[str, float]:
    """The largest relative error of each contender against the model in float64."""
    exact = copy.deepcopy(model).double()
    worst = dict.fromkeys(contenders, 0.0)
    for _ in range(DRAWS):
        args, kwargs = inputs()
        wide_args, wide_kwargs = tree_map_only(Tensor, wide, (args, kwargs))
        expected = results(exact(*wide_args, **wide_kwargs))
        for name, contender in contenders.items():
            worst[name] = max(worst[name], distance(contender(*args, **kwargs), expected))
    return worst


@torch.no_grad()
def inference(case: Case, names: Sequence[str], seconds: float) -> dict[str, Any]:
    model = case.build().eval()
    contenders, first = {}, {}
    for name in names:
        args, kwargs = case.inputs()
        started = time.perf_counter()
        contenders[name] = CONTENDERS[name](model)
        contenders[name](*args, **kwargs)
        first[name] = time.perf_counter() - started
    return measured(contenders, errors(contenders, model, case.inputs), first, case.inputs, seconds)


def training(name: str, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Steps of forward, loss, backward and optimizer; the error is that of the gradients of a first step."""
    case = STEPS[name]
    original = case.build().train()
    steps, first, error = {}, {}, {}
    call = case.inputs()

    def gradients(model: nn.Module, step: Function, args: Any, kwargs: Any) -> list[Tensor]:
        torch.manual_seed(0)
        step(*args, **kwargs)
        return [p.grad for p in model.parameters() if p.grad is not None]

    exact = copy.deepcopy(original).double()
    wide_args, wide_kwargs = tree_map_only(Tensor, wide, call)
    for m in (exact, original):
        without_dropout(m)  # random numbers differ between dtypes
    expected = gradients(exact, stepper(case, exact, exact), wide_args, wide_kwargs)
    for contender in names:
        model = copy.deepcopy(original)
        started = time.perf_counter()
        steps[contender] = contending(case, model, CONTENDERS[contender])
        got = gradients(model, steps[contender], *call)
        first[contender] = time.perf_counter() - started
        error[contender] = distance(got, expected)
    return measured(steps, error, first, case.inputs, seconds)


def measured(
    contenders: Mapping[str, Function],
    error: dict[str, float],
    first: dict[str, float],
    inputs: Callable[[], Call],
    seconds: float,
) -> dict[str, Any]:
    turns = by_turns(contenders, inputs, seconds)
    return {
        "median": {name: turns.median(name) for name in contenders},
        "quartiles": {name: turns.quartiles(name, "eager") for name in contenders},
        "error": error,
        "first": first,
    }


def cold(name: str, contender: str, preload: Sequence[str]) -> dict[str, Any]:
    """Seconds of the first call above an eager one, in this fresh process, and the modules that it imported."""
    training_case = STEPS.get(name)
    case = training_case or MODELS[name]
    model: nn.Module = case.build().train(training_case is not None)
    whole = training_case is not None and training_case.whole
    subject: Function = stepper(training_case, model, model) if training_case and whole else model
    for module in preload:
        importlib.import_module(module)

    def call(run: Function) -> float:
        args, kwargs = case.inputs()
        started = time.perf_counter()
        with torch.set_grad_enabled(training_case is not None):
            out = run(*args, **kwargs)
            if training_case is not None and not whole:
                training_case.loss(out).backward()
        return time.perf_counter() - started

    eager = min(call(subject) for _ in range(2))
    before = set(sys.modules)
    seconds = call(CONTENDERS[contender](subject)) - eager
    imported = [m for m in sys.modules if m not in before and not m.startswith(("primexec", "llvmlite"))]
    return {"seconds": seconds, "imported": imported}


# The page ---------------------------------------------------------------------------------------------------


def compile_times(name: str, inductor: bool) -> dict[str, float]:
    """Cold first calls; `beyond` without torch's own imports."""
    found: dict[str, float] = {}
    for contender in COLD if inductor else COLD[:1]:
        result = fresh("benchmarks.models", name, "--cold", contender)
        found[contender] = result["seconds"]
        if contender == "primexec":
            preload = json.dumps(result["imported"])
            found["beyond"] = fresh("benchmarks.models", name, "--cold", contender, "--preload", preload)["seconds"]
    return found


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def gain_of(median: dict[str, float]) -> float:
    """How many times faster primexec is than the better of eager mode and Inductor."""
    return min(median[n] for n in ("eager", "inductor") if n in median) / median["primexec"]


def row(name: str, result: dict[str, Any], compiled: dict[str, float]) -> str:
    """A line of the table."""
    median, error = result["median"], result["error"]
    lower, upper = result["quartiles"]["primexec"]
    cells = [
        (STEPS.get(name) or MODELS[name]).title,
        *(milliseconds(median.get(n)) for n in CONTENDERS),
        f"{median['primexec'] / median['eager']:.3f} ({lower:.3f} to {upper:.3f})",
        f"{gain_of(median):.2f}",
        " / ".join(f"{error[n]:.1e}" for n in CONTENDERS if n in error),
        *(f"{compiled[n]:.1f} s" if n in compiled else "" for n in ("primexec", "beyond", "inductor")),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "model | eager | primexec | primexec freezing | Inductor | Inductor freezing | primexec to eager (quartiles) "
    "| gain on the better | errors, in the same order | cold: primexec | beyond imports | Inductor"
)


def page(names: Sequence[str], seconds: float, inductor: bool, compiling: bool) -> str:
    lines: list[str] = []
    gains: dict[str, list[float]] = defaultdict(list)
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        extra = ["--inductor"] if inductor else []
        result = fresh("benchmarks.models", name, f"--seconds={seconds}", *extra)
        lines.append(row(name, result, compile_times(name, inductor) if compiling else {}))
        print(lines[-1], file=sys.stderr, flush=True)
        median = result["median"]
        short = name.partition("-")[2] in ("bf16", "autocast")
        trained = "training, whole steps" if name in WHOLE_STEPS else "training" if name in TRAINING else ""
        kind = trained or ("inference in bfloat16" if short else "inference")
        gains[kind].append(gain_of(median))
        if "inductor freezing" in median and not short:
            frozen = median["inductor freezing"] / median["primexec freezing"]
            gains["inference, both with frozen weights"].append(frozen)
    told = "; ".join(f"{kind}: {statistics.geometric_mean(found):.2f}" for kind, found in gains.items())
    peers = "the better of eager mode and Inductor" if inductor else "eager mode"
    machine = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {platform.system()}"
    return (
        "# Whole models\n\n"
        f"Written by `python -m benchmarks.models` on {datetime.date.today()}. {machine}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads.\n\n"
        "Medians by turns in one fresh process a model, on fresh inputs each round. Errors: the largest one relative\n"
        "to the largest element of its tensor, against float64 (training: gradients without dropout). Cold: the first\n"
        "call in a fresh process with empty caches minus an eager one, with and without the imports of torch's own\n"
        f"modules.\n\nGeometric mean of the gain on {peers}: {told}.\n\n"
        f"| {HEAD} |\n|{' --- |' * (HEAD.count('|') + 1)}\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    names = (*MODELS, *STEPS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="of warm calls for each model")
    parser.add_argument("--inductor", action=argparse.BooleanOptionalAction, help="default: where there is a g++")
    parser.add_argument("--cold", choices=CONTENDERS, help="only the first call of this contender, in this process")
    parser.add_argument("--preload", type=json.loads, default=[], help=argparse.SUPPRESS)
    parser.add_argument("--no-cold", action="store_true", help="leave out compile times")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the page there, too")
    options: Any = parser.parse_args()
    check_names(parser, options.names, names, "model")
    torch.manual_seed(0)
    if options.cold:
        answer(**cold(options.names[0], options.cold, options.preload))
        return
    if len(options.names) == 1 and not options.write:
        (name,) = options.names
        peers = [n for n in CONTENDERS if options.inductor or "inductor" not in n]
        chosen = [n for n in peers if name not in STEPS or "freezing" not in n]
        seconds = options.seconds
        answer(**(training(name, chosen, seconds) if name in STEPS else inference(MODELS[name], chosen, seconds)))
        return
    inductor = bool(shutil.which("g++")) if options.inductor is None else options.inductor
    text = page(options.names or names, options.seconds, inductor, not options.no_cold)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
