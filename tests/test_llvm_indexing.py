"""The executor `llvm`: what indexes by data. Values against eager, the number of kernels, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from primexec.errors import IndexOutOfRangeError
from primexec.executors.llvm.executor import Compiled
from primexec.passes.constants import FoldConstants
from tests.test_llvm import BOTH, compiled, data, kernels, run  # noqa: F401

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def places(*shape: int, low: int = 0, high: int = 37, seed: int = 3) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


P, J, M = places(23), places(23, low=-53, high=53, seed=4), places(5, 7, seed=5)
ROWS = places(37, high=53, seed=6)
G, H, T, MANY, SIGNED = (
    places(30, 4, high=53), places(60, 4), places(3, 4, low=-1961, high=1961), places(99), places(37, 4, high=99),
)  # fmt: skip

# Of a matrix of 37 rows and 53 columns; each is one kernel.
READS: dict[str, Callable[[Tensor], Any]] = {
    "rows": lambda a: a[P],
    "columns": lambda a: a[:, J],
    "rows and columns": lambda a: a[P, J],
    "negative": lambda a: a[P - 37],
    "matrix of rows": lambda a: a[M],
    "outer": lambda a: a[P[:, None], J],
    "apart": lambda a: a.reshape(37, 53, 1)[P, :, torch.zeros(1, dtype=torch.int64)],
    "inside": lambda a: a.t().reshape(53, 1, 37)[:, torch.tensor([0, 0, -1])[:, None], P[:3]],
    "int32": lambda a: a[P.int()],
    "select rows": lambda a: a.index_select(0, P),
    "select columns": lambda a: a.index_select(1, J.abs().clamp(max=52)),
    "gather": lambda a: a.gather(1, G),
    "gather, dimension 0": lambda a: a.gather(0, H),
    "take": lambda a: torch.take(a, T),
    "take_along_dim": lambda a: torch.take_along_dim(a, ROWS[:, None], 1),
    "embedding": lambda a: F.embedding(M, a),
    "one": lambda a: F.embedding(P[3], a),
    "twice": lambda a: a[P][P % 23],
    "of a view": lambda a: a.t()[J].flip(0)[::2],
    "repeated": lambda a: a[:1].expand(37, 53)[P],
    "computed places": lambda a: a[(torch.arange(20) * 7 + 3) % 37],
    "none": lambda a: a[P[:0]],
    "one row of one": lambda a: a[:1, :1][torch.zeros(3, dtype=torch.int64)],
}

PARTLY = ("repeated", "twice")  # whose results do not need all places: these are checked by a kernel of their own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    a = data(37, 53, dtype=dtype)
    for name, fn in READS.items():
        if dtype is torch.float32 or name in ("rows", "columns", "gather"):
            got, expected = run(fn, a), fn(a)
            assert torch.equal(got, expected), name
            assert (got.dtype, got.stride()) == (expected.dtype, expected.stride()), name
            assert kernels(compiled) == [1 + (name in PARTLY)], name
            compiled.clear()


COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda a: a[torch.arange(37)],
    "some": lambda a: a[torch.arange(20) + 3],
    "steps": lambda a: a[:, torch.arange(17) * 3 + 1],
    "backwards": lambda a: a[36 - torch.arange(37)] + a[torch.arange(36, -1, -1)],
    "from the end": lambda a: a[torch.arange(37) - 37],
    "int32": lambda a: a[:, torch.arange(53, dtype=torch.int32)],
    "matrix": lambda a: a[:, torch.arange(52).reshape(4, 13).t()],
    "diagonal": lambda a: a[torch.arange(37), torch.arange(37) + 9],
    "outer": lambda a: a[torch.arange(37)[:, None], torch.arange(53)] * 2,
    "gather": lambda a: a.gather(1, torch.arange(40).expand(37, 40)),
    "one": lambda a: a[torch.arange(1)],
    "beside data": lambda a: a[torch.arange(23), J],
    "of a part": lambda a: torch.cat([a[:, :3], a], 1)[:, torch.arange(56)],
}


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on constants alone is computed at every call."""
    monkeypatch.setattr(FoldConstants, "__call__", lambda self, program: program)


@pytest.mark.usefixtures("unfolded")
def test_places_that_count(compiled: list[Compiled]) -> None:  # noqa: F811
    """Nothing is left to be checked when it is known from the sizes."""
    a = data(37, 53)
    for name, fn in COUNTED.items():
        assert torch.equal(run(fn, a), fn(a)), name
        assert ("place(" in str(compiled[-1].schedule)) == (name in ("backwards", "beside data")), name
    wraps: Callable[[Tensor], Tensor] = lambda a: a.view(-1)[(torch.arange(3, dtype=torch.int8) * 100).long()]  # noqa: E731
    assert torch.equal(run(wraps, a), wraps(a))  # -56, not 200


@pytest.mark.parametrize("bad", [lambda a: a[torch.arange(38)], lambda a: a[torch.arange(37) - 38],
                                 lambda a: a.gather(1, torch.arange(-1, 5).expand(37, 6))])  # fmt: skip
def test_places_that_count_beyond(bad: Callable[[Tensor], Any]) -> None:
    with pytest.raises(IndexOutOfRangeError):
        run(bad, data(37, 53))


@pytest.mark.usefixtures("unfolded")
def test_writes_at_places_that_count() -> None:
    a, b = data(37, 53), data(17, 53, seed=8)
    for start, step in ((0, 1), (3, 2), (16, -1), (-17, 1)):
        for accumulate in (False, True):

            def fn(a: Tensor, b: Tensor, start: int = start, step: int = step, add: bool = accumulate) -> Tensor:
                return torch.index_put(a, (torch.arange(17) * step + start,), b, add)

            torch.testing.assert_close(run(fn, a, b), fn(a, b))


def test_reads_of_strided_tensors() -> None:
    a = data(53, 74).t()[::2]
    for name in ("rows and columns", "inside", "select columns", "gather", "take", "embedding", "repeated"):
        assert torch.equal(run(READS[name], a), READS[name](a)), name


W, B = data(53, seed=1), data(53, seed=2)
TARGET = torch.where(torch.arange(37) % 5 == 0, -100, ROWS)
FUSED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "embedding and layer_norm": (lambda a: F.layer_norm(F.embedding(M, a), (53,), W.to(a.dtype), B.to(a.dtype)), 1),
    "chain before": (lambda a: (a * 2 + 1).exp()[P], 1),
    "chain after": (lambda a: a[P].exp() * 2, 1),
    "sum of rows": (lambda a: a[P].sum(1), 1),
    "sum of columns": (lambda a: a[:, J].sum(0), 1),
    "softmax of gathered": (lambda a: torch.softmax(a[P], -1), 1),
    "picked from log_softmax": (lambda a: torch.log_softmax(a, 1).gather(1, ROWS[:, None]).squeeze(1), 1),
    "nll_loss": (lambda a: F.nll_loss(a, TARGET, reduction="none"), 1),
    "kept, for it is read more often": (lambda a: (a * 2 + 1).exp()[MANY], 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    (fn, count), a = FUSED[name], data(37, 53, dtype=dtype)
    torch.testing.assert_close(run(fn, a), fn(a))
    assert kernels(compiled) == [count]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float) -> None:
    a = data(37, 53)
    for reduction in ("mean", "sum", "none"):
        for target in (ROWS, TARGET):

            def loss(a: Tensor, target: Tensor = target, reduction: str = reduction) -> Tensor:
                return F.cross_entropy(a, target, reduction=reduction, label_smoothing=smoothing)

            torch.testing.assert_close(run(loss, a), loss(a))


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "beyond": lambda a: a[P + 30],
    "far below": lambda a: a[P - 99],
    "gather": lambda a: a.gather(1, SIGNED),
    "gather, negative": lambda a: a.gather(1, SIGNED - 60),
    "embedding": lambda a: F.embedding(M - 37, a),
    "index_select": lambda a: a.index_select(0, P - 2),
    "huge": lambda a: a[P + 2**62],
    "loss": lambda a: F.nll_loss(a, ROWS + 10),
    "take": lambda a: torch.take(a, P * 1000),
}


@pytest.mark.parametrize("name", WRONG)
def test_places_that_are_not_there(name: str) -> None:
    fn, a = WRONG[name], data(37, 53)
    with pytest.raises((IndexError, RuntimeError)) as eager:
        fn(a)
    traced = primexec.make_traced(fn)
    for _ in range(2):
        with pytest.raises(eager.type, match=r"out of bounds for a dimension of size(.|\n)*test_llvm_indexing"):
            traced(a, executor="llvm", executor_parameters={"strict": True})


def test_an_error_leaves_nothing_behind() -> None:
    traced, a = primexec.make_traced(lambda a, i: a[i].exp().sum(0)), data(37, 53)
    for _ in range(3):
        with pytest.raises(IndexError, match="index 37 is out of bounds for a dimension of size 37"):
            traced(a, torch.tensor([0, 37]), executor=BOTH)
        torch.testing.assert_close(traced(a, torch.tensor([3, 36]), executor=BOTH), a[[3, 36]].exp().sum(0))


def test_what_is_refused() -> None:
    a = data(37, 53)
    refused = {
        "neither int64 nor int32": lambda a: a[a[:, 0] > 0].sum(),
        "indexes a dimension of size 0": lambda a: a[:, :0].gather(1, torch.zeros(3, 2, dtype=torch.int64)),
        "indexes a number": lambda a: a.sum().gather(0, torch.zeros((), dtype=torch.int64)),
        "by what may be 0": lambda a: torch.arange(37) // (a[:, 0] > 0).long(),
    }
    for reason, fn in refused.items():
        with pytest.raises(primexec.ExecutorError, match=reason):
            run(fn, a)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_divisions_of_integers(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    a = torch.tensor([limits.min, limits.min + 1, limits.max, 0, 1, 7, 100, *range(20)], dtype=dtype)
    divisors = (1, 2, 3, 7, 100) if dtype is torch.uint8 else (1, 2, -3, 7, -7, 100)
    for d in divisors:

        def divide(a: Tensor, d: int = d) -> tuple[Tensor, ...]:
            return a % d, torch.fmod(a, d), torch.div(a, d, rounding_mode="trunc")

        for got, expected in zip(run(divide, a), divide(a), strict=True):
            assert torch.equal(got, expected), d
