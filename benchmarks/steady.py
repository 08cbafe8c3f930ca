"""One case: first calls, then warm calls by turns, and the error of each contender against float64."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import primexec
from benchmarks.cases import CASES
from benchmarks.process import answer
from benchmarks.timing import Call, by_turns

Function = Callable[..., Any]

DRAWS = 3

CONTENDERS: dict[str, Callable[[Any], Function]] = {
    "eager": lambda function: function,
    "primexec": lambda function: primexec.make_traced(function, executor="aten"),
    "inductor": torch.compile,
}


def wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def errors(contenders: dict[str, Function], function: Function, inputs: Callable[[], Call]) -> dict[str, float]:
    """The largest absolute error of each contender against the same function in float64."""
    exact = copy.deepcopy(function).double() if isinstance(function, nn.Module) else function
    worst = dict.fromkeys(contenders, 0.0)
    for _ in range(DRAWS):
        args, kwargs = inputs()
        wide_args, wide_kwargs = tree_map_only(Tensor, wide, (args, kwargs))
        expected = tensors(exact(*wide_args, **wide_kwargs))
        for name, contender in contenders.items():
            got = tensors(contender(*args, **kwargs))
            gaps = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
            worst[name] = max(worst[name], *gaps)
    return worst


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--inductor", action="store_true")
    options = parser.parse_args()

    case = CASES[options.name]
    torch.manual_seed(0)
    function = case.build()
    if isinstance(function, nn.Module):
        function.eval()

    args, kwargs = case.inputs()
    function(*args, **kwargs)
    contenders: dict[str, Function] = {}
    first = {}
    for name, make in CONTENDERS.items():
        if name == "inductor" and not options.inductor:
            continue
        args, kwargs = case.inputs()
        started = time.perf_counter()
        contenders[name] = make(function)
        contenders[name](*args, **kwargs)
        first[name] = time.perf_counter() - started

    error = errors(contenders, function, case.inputs)
    turns = by_turns(contenders, case.inputs, options.seconds)
    answer(
        first=first,
        error=error,
        median={name: turns.median(name) for name in contenders},
        ratio={name: turns.ratio(name, "eager") for name in contenders},
        quartiles={name: turns.quartiles(name, "eager") for name in contenders},
    )


if __name__ == "__main__":
    main()
