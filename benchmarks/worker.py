"""A process that holds one case of KERNELS, warm, and times what it is asked to: lines of JSON in and out.

`python -m benchmarks.worker CASE CONTENDER...` first answers with the bytes that the case must move, the time of every
contender's first call and its errors; then, for each line `[contender, count]`, with seconds a call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import primexec
from benchmarks.kernels import KERNELS
from benchmarks.process import answer
from benchmarks.steady import tensors, wide

SETS = 3  # of inputs, in rotation: so that large ones are not found in the cache
SEED = 7


def copying(nbytes: int) -> Callable[..., Any]:
    """Moves as many bytes as a case must, reading half of them and writing half."""
    size = max(1, nbytes // 2)
    buffers = [(torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)) for _ in range(SETS)]
    turns = count()

    def copy(*_: Any) -> None:
        target, source = buffers[next(turns) % SETS]
        target.copy_(source)

    return copy


def contender(name: str, function: Callable[..., Any], nbytes: int) -> Callable[..., Any]:
    made: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: function,
        "inductor": lambda: torch.compile(function, dynamic=False),
        "primexec": lambda: primexec.make_traced(function, executor=("llvm", "aten")),
        "copy": lambda: copying(nbytes),
    }
    return made[name]()


def moved(args: Sequence[Any], results: Any) -> int:
    """Bytes of arguments and results, each once."""
    return sum(t.numel() * t.element_size() for t in (*tensors(args), *tensors(results)))


def errors(results: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor]) -> tuple[float, bool]:
    """The largest absolute error, and whether each is within twice eager's largest and 2 ulp."""
    worst, fine = 0.0, True
    for got, expected, usual in zip(results, exact, eager, strict=True):
        gap = (got.double() - expected).abs().nan_to_num(0.0)
        allowed = 2 * (usual.double() - expected).abs().nan_to_num(0.0).max()
        ulp = torch.finfo(got.dtype).eps * expected.abs().clamp_min(torch.finfo(got.dtype).tiny)
        worst = max(worst, float(gap.max()))
        fine = fine and bool((gap <= allowed + 2 * ulp.nan_to_num(posinf=0.0)).all())
    return worst, fine


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=KERNELS)
    parser.add_argument("contenders", nargs="+")
    options = parser.parse_args()
    case = KERNELS[options.case]
    torch.manual_seed(SEED)
    sets = [case.inputs() for _ in range(SETS)]
    usual = case.function(*sets[0])
    nbytes = moved(sets[0], usual)
    exact = tensors(case.function(*tree_map_only(Tensor, wide, sets[0])))
    functions, first, error, fine = {}, {}, {}, {}
    for name in options.contenders:
        functions[name] = contender(name, case.function, nbytes)
        started = time.perf_counter()
        got = functions[name](*sets[0])
        first[name] = time.perf_counter() - started
        if name != "copy":
            error[name], fine[name] = errors(tensors(got), exact, tensors(usual))
    del exact, usual, got
    answer(bytes=nbytes, first=first, error=error, fine=fine)
    sys.stdout.flush()
    for line in sys.stdin:
        name, calls = json.loads(line)
        function = functions[name]
        function(*sets[-1])
        started = time.perf_counter()
        for number in range(calls):
            function(*sets[number % SETS])
        answer(seconds=(time.perf_counter() - started) / calls)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
