"""One case: first calls, then warm calls by turns, and the error of each against float64."""

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

DRAWS = 3


def wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def errors(
    makers: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "eager": lambda fn: fn,
        "primexec": primexec.make_traced,
        "inductor": torch.compile,
    }
    if not options.inductor:
        del makers["inductor"]

    contenders: dict[str, Callable[..., Any]] = {}
    first = {}
    args, kwargs = case.inputs()
    function(*args, **kwargs)
    for name, make in makers.items():
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
        rounds=len(turns.seconds["eager"]),
        median={name: turns.median(name) for name in contenders},
        ratio={name: turns.ratio(name, "eager") for name in contenders},
        quartiles={name: turns.quartiles(name, "eager") for name in contenders},
    )


if __name__ == "__main__":
    main()
