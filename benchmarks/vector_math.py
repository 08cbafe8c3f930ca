"""The table of the vector math: python -m benchmarks.vector_math --write docs/vector-math.md."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import by_turns
from primexec.executors.llvm.target import host
from primexec.executors.llvm.vmath import FUNCTIONS
from tests.vector_kernels import BINARY, DTYPES, Kernels, ulps

COUNT = 1 << 14  # elements: in cache, so that arithmetic is what is timed
FEW = 16
INDUCTOR = bool(shutil.which("g++"))
STRIDE = 5003  # of the bit patterns whose error is measured
SECONDS = 0.12
DOMAINS = {"acos": (-1, 1), "asin": (-1, 1), "atanh": (-1, 1), "erf_inv": (-1, 1), "acosh": (1, 9)}
POSITIVE = {"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "lgamma", "digamma", "pow"}
PLAIN = {
    "abs", "ceil", "floor", "fmax", "fmin", "maximum", "minimum", "neg", "nextafter", "reciprocal", "round", "sign",
    "trunc", "sqrt",
}  # fmt: skip


def torch_function(name: str) -> Any:
    return {"erf_inv": torch.erfinv}.get(name) or getattr(torch, name, None) or getattr(torch.special, name, None)


def operands(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    low, high = DOMAINS.get(name, (0.01, 9) if name in POSITIVE else (-9, 9))
    generator = torch.Generator().manual_seed(1)
    made = torch.rand(2, COUNT, dtype=dtype, generator=generator) * (high - low) + low
    return [made[0].contiguous(), made[1].contiguous()][: 2 if name in BINARY else 1]


def nanoseconds(name: str, dtype: str, kernels: Kernels) -> list[float | None]:
    """(ours, ATen's, Inductor's) for one element on one thread; Inductor's less a call on a few elements."""
    inputs = operands(name, DTYPES[dtype])
    out, run = torch.empty_like(inputs[0]), kernels.raw(name, dtype)
    addresses = (inputs[0].data_ptr(), inputs[-1].data_ptr(), out.data_ptr(), COUNT)
    contenders: dict[str, Callable[[], Any]] = {"ours": partial(run, *addresses)}
    eager = torch_function(name)
    if eager is not None:
        contenders["aten"] = partial(eager, *inputs, out=out)
        if INDUCTOR:
            compiled, few = (torch.compile(eager, dynamic=False) for _ in range(2))
            contenders["inductor"] = partial(compiled, *inputs)
            contenders["few"] = partial(few, *(v[:FEW] for v in inputs))
    with torch.no_grad():
        turns = by_turns(contenders, lambda: ((), {}), SECONDS)
    torch._dynamo.reset()
    best = {k: min(v) for k, v in turns.seconds.items()}
    if "few" in best:
        best["inductor"] -= best["few"]
    return [best[k] / COUNT * 1e9 if k in best else None for k in ("ours", "aten", "inductor")]


def errors(name: str, kernels: Kernels) -> tuple[float, float] | None:
    """Largest errors (ours, ATen's) of a float32 function, judged by ATen's float64."""
    eager = torch_function(name)
    if eager is None or name in BINARY:
        return None
    bits = np.arange(1, 2**32, STRIDE, dtype=np.uint64).astype(np.uint32)
    x = torch.cat([torch.from_numpy(bits.view(np.float32).copy()), torch.linspace(-12, 12, 100_001)])
    if name == "digamma":
        x = x[x.abs() < 1e4]
    expected = eager(x.double()).numpy()
    return float(ulps(kernels(name, x).numpy(), expected).max()), float(ulps(eager(x).numpy(), expected).max())


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    path = parser.parse_args().write
    torch._dynamo.config.cache_size_limit = 1000
    torch.set_num_threads(1)
    kernels = Kernels()
    rows = []
    for name in sorted({name for name, _ in FUNCTIONS} - PLAIN):
        error, f32, f64 = errors(name, kernels), nanoseconds(name, "f32", kernels), nanoseconds(name, "f64", kernels)
        rows.append([name, *(error or (None, None)), *f32, *f64])
        print(name, *(shown(v) for v in rows[-1][1:]), flush=True)
    less = f"; Inductor's less its call on {FEW} elements" if INDUCTOR else ""
    head = f"""# Vector math

Written by `python -m benchmarks.vector_math --write docs/vector-math.md` on {host().cpu}
({host().vector_bytes * 8} bit vectors), torch {torch.__version__}, one thread, {COUNT} elements in cache; the best of
interleaved rounds{less}.
Errors are the largest in units of the last place over every {STRIDE}th float32 and 100,001 numbers
between -12 and 12, judged by ATen's float64; an infinite one is a wrong special value or an early overflow. The tests
hold float32 within 2 ulp and float64, judged by mpmath, within 4.

Operators that are an instruction or two (abs, floor, maximum, ...) are exact and not listed.

| function | ulp | ulp, ATen | float32 ns | ATen | Inductor | float64 ns | ATen | Inductor |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
    if not INDUCTOR:
        head = head.replace(" | Inductor", "").replace(" --- | --- | --- |\n", " --- |\n")
        rows = [[v for k, v in enumerate(row) if k not in (5, 8)] for row in rows]
    lines = ["| " + " | ".join([row[0], *(shown(v) for v in row[1:])]) + " |" for row in rows]
    if path is not None:
        path.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
