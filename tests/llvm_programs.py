"""Random programs for the executor `llvm`: pointwise operators, reductions, views, gathers; any strides and sizes.

In an *exact* program numbers are small integers, now and then NaN, infinite or -0.0: whatever the order in which a
sum is formed, its bits are eager's. A *smooth* one is held to eager's own error against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

LARGEST = 6000  # elements
SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 67, 131)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SPECIAL = (math.nan, math.inf, -math.inf, -0.0)


@dataclass(frozen=True)
class Source:
    """An input: `layout` is how it lies in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    special: bool

    def make(self, seed: int, exact: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = self.shape
        if self.layout == "spread":
            shape = tuple(2 * n + 1 for n in shape)
        elif self.layout == "permuted":
            shape = shape[::-1]
        elif self.layout == "expanded":
            shape = (1, *shape[1:]) if shape else ()
        if self.dtype is torch.bool:
            made = torch.randint(0, 2, shape, generator=generator, dtype=torch.bool)
        elif self.dtype in INTEGERS:
            info = torch.iinfo(self.dtype)
            low, high = (max(info.min, -(2**62)), min(info.max, 2**62)) if self.special else (max(info.min, -3), 4)
            made = torch.randint(low, high, shape, generator=generator, dtype=self.dtype)
        else:
            made = (
                torch.randint(-3, 4, shape, generator=generator) / 1.0
                if exact
                else torch.randn(shape, generator=generator)
            )
            if self.special and exact:
                place = torch.randint(0, 40, shape, generator=generator)
                for number, value in enumerate(SPECIAL):
                    made = torch.where(place == number, value, made)
            made = made.to(self.dtype)
        if self.layout == "spread":
            made = made[tuple(slice(1, None, 2) for _ in shape)]
        elif self.layout == "permuted":
            made = made.permute(tuple(reversed(range(len(shape)))))
        elif self.layout == "expanded":
            made = made.expand(self.shape)
        return made


@dataclass(frozen=True)
class Step:
    """An operator of the tables below: numbers of its tensors, and what else was chosen."""

    name: str
    operands: tuple[int, ...]
    chosen: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Program:
    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    exact: bool

    def inputs(self, seed: int) -> list[Tensor]:
        return [s.make(100 * seed + i, self.exact) for i, s in enumerate(self.sources)]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        known = list(tensors)
        for step in self.steps:
            known.append(run(step, known))
        return [known[i] for i in self.outputs]

    def __str__(self) -> str:
        lines = [f"t{i} = {s}" for i, s in enumerate(self.sources)]
        lines += [f"t{i} = {s.name}{s.operands} {s.chosen}" for i, s in enumerate(self.steps, len(self.sources))]
        return "\n".join([*lines, f"return {self.outputs}"])


def run(step: Step, known: list[Tensor]) -> Tensor:
    return ALL[step.name].fn(*(known[i] for i in step.operands), *step.chosen)


Choose = Callable[["st.DrawFn", Tensor], "tuple[Any, ...] | None"]


@dataclass(frozen=True)
class Row:
    """An operator: its function, how many tensors it takes, what else is drawn, and whose dtypes it takes."""

    fn: Callable[..., Tensor]
    tensors: int = 1
    choose: Choose | None = None
    takes: str = "fib"  # floats, integers, bool


def bounded(t: Tensor) -> Tensor:
    """Keeps numbers small enough for sums to be exact."""
    return t.clamp(-16, 16) if t.is_floating_point() else t


def indices_of(t: Tensor, size: int) -> Tensor:
    """A tensor's values as indices below the size."""
    wide = t.nan_to_num(1.0, 2.0, 0.0).clamp(-100, 100) if t.is_floating_point() else t
    return torch.remainder(wide.to(torch.int64), size)


def dim_of(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return (choose(st.integers(-t.dim(), t.dim() - 1)),) if t.dim() else None


def filled_dim(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return dim_of(choose, t) if t.numel() else None


def dims_of(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...]:
    dims = choose(st.lists(st.integers(0, t.dim() - 1), unique=True, min_size=1)) if t.dim() else []
    return dims, choose(st.booleans())


def filled_dims(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return dims_of(choose, t) if t.numel() else None


def two_dims(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    one, other = dim_of(choose, t), dim_of(choose, t)
    return None if one is None or other is None else (*one, *other)


def slice_of(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    if not t.dim():
        return None
    dim = choose(st.integers(0, t.dim() - 1))
    start = choose(st.integers(0, t.shape[dim]))
    return dim, start, choose(st.integers(start, t.shape[dim])), choose(st.sampled_from([1, 1, 2, 3]))


def narrowed(t: Tensor, dim: int, start: int, stop: int, step: int) -> Tensor:
    return t[(slice(None),) * dim + (slice(start, stop, step),)]


def permutation(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...]:
    return (tuple(choose(st.permutations(range(t.dim())))),)


def reshaped(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...]:
    n = t.numel()
    halves = [(k, n // k) for k in (2, 3, 5, 7, 8) if n and n % k == 0]
    return (choose(st.sampled_from([(n,), (n, 1), (1, n), *halves])),)


def pads(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    if not t.dim():
        return None
    return ([choose(st.integers(-1 if t.shape[-1] > 3 else 0, 2)) for _ in range(2)],)


def shift_and_dim(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    dim = dim_of(choose, t)
    return None if dim is None else (choose(st.integers(-3, 3)), *dim)


def one_more(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return (choose(st.integers(0, t.dim())),) if t.dim() < 4 else None


def another_dtype(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...]:
    return (choose(st.sampled_from((*FLOATS, *INTEGERS, torch.bool))),)


def converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Without what C leaves undefined: a float beyond the integers' range."""
    if t.is_floating_point() and not dtype.is_floating_point and dtype is not torch.bool:
        t = t.nan_to_num(1.0, 2.0, 0.0).clamp(0, 100)
    made = t.to(dtype)
    return bounded(made)


def number(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...]:
    return (choose(st.sampled_from([0, 1, 2, -1, 3])),)


def not_scalar(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return () if t.dim() else None


def filled(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return () if t.dim() and t.numel() else None


def positive_zeros(t: Tensor) -> Tensor:
    """Which of 0.0 and -0.0 is the larger depends, in eager, on whether its vector loop or its tail is asked."""
    return t + 0.0 if t.is_floating_point() else t


def with_ones(t: Tensor, i: Tensor, dim: int) -> Tensor:
    """Ones added at an index."""
    where = indices_of(i, t.shape[dim]).reshape(-1)[:1]
    return bounded(t.index_add(dim, where, torch.ones_like(t.narrow(dim, 0, 1))))


def diagonal_of(choose: st.DrawFn, t: Tensor) -> tuple[Any, ...] | None:
    return (choose(st.integers(-2, 2)),) if t.dim() >= 2 else None


POINTWISE: dict[str, Row] = {
    "neg": Row(torch.neg, takes="fi"),
    "abs": Row(torch.abs, takes="fi"),
    "sign": Row(torch.sign),
    "relu": Row(torch.relu, takes="fi"),
    "floor": Row(torch.floor, takes="f"),
    "clamp": Row(lambda t: t.clamp(-2, 3), takes="fi"),
    "nan_to_num": Row(lambda t: t.nan_to_num(1.0, 2.0, -2.0), takes="f"),
    "isnan": Row(torch.isnan),
    "isfinite": Row(torch.isfinite),
    "not": Row(torch.logical_not),
    "bitwise_not": Row(torch.bitwise_not, takes="ib"),
    "to": Row(converted, choose=another_dtype),
    "add number": Row(lambda t, n: bounded(t + n), choose=number),
    "mul number": Row(lambda t, n: bounded(t * n), choose=number),
    "fill": Row(lambda t, n: torch.full_like(t, n), choose=number, takes="fi"),
    "add": Row(lambda a, b: bounded(a + b), 2),
    "sub": Row(lambda a, b: bounded(a - b), 2, takes="fi"),
    "mul": Row(lambda a, b: bounded(a * b), 2),
    "maximum": Row(lambda a, b: positive_zeros(torch.maximum(a, b)), 2),
    "minimum": Row(lambda a, b: positive_zeros(torch.minimum(a, b)), 2),
    "fmax": Row(lambda a, b: positive_zeros(torch.fmax(a, b)), 2),
    "fmod": Row(torch.fmod, 2, takes="f"),
    "remainder": Row(torch.remainder, 2, takes="f"),
    "floor_divide": Row(lambda a, b: bounded(torch.floor_divide(a, b)), 2, takes="f"),
    "eq": Row(torch.eq, 2),
    "lt": Row(torch.lt, 2),
    "ge": Row(torch.ge, 2),
    "and": Row(torch.bitwise_and, 2, takes="ib"),
    "xor": Row(torch.bitwise_xor, 2, takes="ib"),
    "shift left": Row(torch.bitwise_left_shift, 2, takes="i"),
    "shift right": Row(torch.bitwise_right_shift, 2, takes="i"),
    "logical_or": Row(torch.logical_or, 2),
    "where": Row(lambda c, a, b: torch.where(c > 0, a, b), 3),
    "masked_fill": Row(lambda a, m, n: a.masked_fill(m > 0, n), 2, number, takes="fi"),
    "arange": Row(
        lambda t: t + torch.arange(t.shape[-1]).to(t.dtype).clamp(0, 3),
        choose=not_scalar,
        takes="fi",
    ),
}
REDUCTIONS: dict[str, Row] = {
    "sum": Row(lambda t, d, k: bounded(t.sum(d, keepdim=k)), choose=dims_of),
    "sum all": Row(lambda t: bounded(t.sum())),
    "amax": Row(lambda t, d, k: positive_zeros(t.amax(d, keepdim=k)), choose=filled_dims),
    "amin": Row(lambda t, d, k: positive_zeros(t.amin(d, keepdim=k)), choose=filled_dims),
    "prod": Row(lambda t, d: t.prod(d), choose=dim_of, takes="ib"),
    "any": Row(lambda t, d: t.any(d), choose=dim_of),
    "all": Row(lambda t, d: t.all(d), choose=dim_of),
    "argmax": Row(lambda t, d: t.argmax(d), choose=filled_dim, takes="fi"),
    "argmin": Row(lambda t, d: t.argmin(d), choose=filled_dim, takes="fi"),
    "max": Row(lambda t, d: positive_zeros(t.max(d).values), choose=filled_dim),
    "count_nonzero": Row(lambda t, d: t.count_nonzero(d), choose=dim_of),
    "cumsum": Row(lambda t, d: bounded(t.cumsum(d)), choose=dim_of),
}
VIEWS: dict[str, Row] = {
    "transpose": Row(lambda t, a, b: t.transpose(a, b), choose=two_dims),
    "permute": Row(lambda t, dims: t.permute(dims), choose=permutation),
    "flip": Row(lambda t, d: t.flip(d), choose=dim_of),
    "slice": Row(narrowed, choose=slice_of),
    "select": Row(lambda t, d: t.select(d, -1), choose=filled_dim),
    "unsqueeze": Row(lambda t, d: t.unsqueeze(d), choose=one_more),
    "squeeze": Row(lambda t: t.squeeze()),
    "expand": Row(lambda t: t.expand(3, *t.shape)),
    "reshape": Row(lambda t, shape: t.reshape(shape), choose=reshaped),
    "diagonal": Row(lambda t, o: t.diagonal(o), choose=diagonal_of),
    "contiguous": Row(lambda t: t.contiguous()),
    "clone": Row(lambda t: t.clone()),
    "chunk": Row(lambda t, d: t.chunk(2, d)[-1], choose=dim_of),
    "roll": Row(lambda t, s, d: t.roll(s, d), choose=shift_and_dim),
    "pad": Row(lambda t, p: F.pad(t, p), choose=pads),
    "tril": Row(lambda t, o: t.tril(o), choose=diagonal_of),
    "cat": Row(lambda a, b, d: torch.cat([a, b.to(a.dtype).expand(a.shape)], d), 2, dim_of),
    "stack": Row(lambda a, b, d: torch.stack([a, b.to(a.dtype).expand(a.shape)], d), 2, one_more),
    "index_select": Row(lambda a, i, d: a.index_select(d, indices_of(i, a.shape[d]).reshape(-1)[:20]), 2, filled_dim),
    "gather": Row(lambda a, i, d: a.gather(d, indices_of(i, a.shape[d]).expand(a.shape)), 2, filled_dim),
    "index": Row(lambda a, i: a[indices_of(i, a.shape[0]).reshape(-1)[:20]], 2, filled),
    "index_add": Row(with_ones, 2, filled_dim, takes="fi"),
}  # fmt: skip
SMOOTH: dict[str, Row] = {
    "exp": Row(lambda t: t.clamp(-4, 4).exp(), takes="f"),
    "tanh": Row(torch.tanh, takes="f"),
    "sigmoid": Row(torch.sigmoid, takes="f"),
    "sin": Row(torch.sin, takes="f"),
    "log1p": Row(lambda t: t.abs().log1p(), takes="f"),
    "rsqrt": Row(lambda t: (t * t + 0.5).rsqrt(), takes="f"),
    "gelu": Row(F.gelu, takes="f"),
    "silu": Row(F.silu, takes="f"),
    "softplus": Row(F.softplus, takes="f"),
    "erf": Row(torch.erf, takes="f"),
    "div": Row(lambda a, b: a / (b.abs() + 0.5), 2, takes="f"),
    "pow": Row(lambda a, b: (a.abs() + 0.5) ** b.clamp(-2, 2), 2, takes="f"),
    "add": Row(lambda a, b: bounded(a + b), 2, takes="f"),
    "mul": Row(lambda a, b: bounded(a * b), 2, takes="f"),
    "softmax": Row(lambda t, d: t.softmax(d), choose=filled_dim, takes="f"),
    "log_softmax": Row(lambda t, d: t.log_softmax(d), choose=filled_dim, takes="f"),
    "logsumexp": Row(lambda t, d: t.logsumexp(d), choose=filled_dim, takes="f"),
    "mean": Row(lambda t, d: t.mean(d), choose=filled_dim, takes="f"),
    "sum": Row(lambda t, d, k: t.sum(d, keepdim=k), choose=dims_of, takes="f"),
    "norm": Row(lambda t, d: t.norm(dim=d), choose=filled_dim, takes="f"),
    "layer_norm": Row(lambda t: F.layer_norm(t, t.shape[-1:], eps=0.1), choose=filled, takes="f"),
    "var": Row(lambda t, d: t.var(d, correction=0), choose=filled_dim, takes="f"),
}  # fmt: skip
ALL = {**SMOOTH, **{f"exact {n}": r for n, r in {**POINTWISE, **REDUCTIONS, **VIEWS}.items()}}
EXACT_KINDS = [[f"exact {n}" for n in table] for table in (POINTWISE, POINTWISE, REDUCTIONS, VIEWS)]
# What moves numbers only, or is as smooth as its arguments.
MOVES = [f"exact {n}" for n in VIEWS if n not in ("index_select", "gather", "index", "index_add")]
SMOOTH_KINDS = [list(SMOOTH), list(SMOOTH), MOVES]


def kind_of(dtype: torch.dtype) -> str:
    return "f" if dtype.is_floating_point else "b" if dtype is torch.bool else "i"


@st.composite
def programs(choose: st.DrawFn, exact: bool) -> Program:
    """Chosen step by step, while it runs eagerly, so that every step is one that eager takes."""
    base = choose(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= LARGEST))
    common = choose(st.sampled_from([torch.float32] * 3 + [*FLOATS, *(INTEGERS if exact else ())]))
    sources = []
    for _ in range(choose(st.integers(1, 4))):
        shape = tuple(choose(st.sampled_from([n, n, n, 1])) for n in base)[choose(st.sampled_from([0, 0, 0, 1, 3])) :]
        kinds = [common] * 4 + ([torch.bool, *FLOATS, torch.int64] if exact else list(FLOATS))
        layout = choose(st.sampled_from(["dense", "dense", "spread", "permuted", "expanded"]))
        sources.append(Source(shape, choose(st.sampled_from(kinds)), layout, choose(st.booleans())))
    draft = Program(tuple(sources), (), (), exact)
    known = draft.inputs(0)
    steps: list[Step] = []
    kinds_of_steps = EXACT_KINDS if exact else SMOOTH_KINDS
    for _ in range(choose(st.integers(1, 12))):
        name = choose(st.sampled_from(choose(st.sampled_from(kinds_of_steps))))
        row = ALL[name]
        fit = [i for i, t in enumerate(known) if kind_of(t.dtype) in row.takes]
        if not fit:
            continue
        operands = [choose(st.sampled_from(fit))]
        for _ in range(row.tensors - 1):
            others = [i for i in fit if broadcasts(known[i], *(known[j] for j in operands))]
            operands.append(choose(st.sampled_from(others)))
        chosen = row.choose(choose, known[operands[0]]) if row.choose else ()
        if chosen is None:
            continue
        step = Step(name, tuple(operands), chosen)
        try:
            made = run(step, known)
        except (RuntimeError, IndexError, ValueError):
            continue
        if made.numel() > LARGEST:
            continue
        known.append(made)
        steps.append(step)
    last = range(len(sources), len(known)) if steps else range(len(known))
    outputs = choose(st.lists(st.sampled_from(last), min_size=0, max_size=2))
    return Program(tuple(sources), tuple(steps), tuple(dict.fromkeys([*outputs, last[-1]])), exact)


def broadcasts(*tensors: Tensor) -> bool:
    try:
        torch.broadcast_shapes(*(t.shape for t in tensors))
    except RuntimeError:
        return False
    return True
