"""How the loops of `llvm` kernels are walked: columns, pieces, tiles; values against float64 at awkward sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from primexec.errors import IndexOutOfRangeError
from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm import layout
from primexec.executors.llvm.layout import Layout
from primexec.executors.llvm.target import host
from primexec.executors.registry import load
from primexec.testing.suite import examine


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype) if dtype.is_floating_point else (made * 20).to(dtype)


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """The layouts of the kernels that are compiled during the test."""
    made: list[Layout] = []

    def spy(*args: Any) -> Layout:
        made.append(layout.plan(*args))
        return made[-1]

    monkeypatch.setattr(llvm, "plan", spy)
    return made


@pytest.fixture
def eager_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small reductions are cut into pieces, too."""
    monkeypatch.setattr(layout, "SPLIT_POINTS", 1)
    monkeypatch.setattr(layout, "GRAIN", 16)
    monkeypatch.setattr(layout, "PROCESSORS", 64)


def run(fn: Callable[..., Any], *args: Tensor) -> Any:
    return primexec.make_traced(fn)(*args, executor="llvm", executor_parameters={"strict": True})


def check(fn: Callable[..., Any], *args: Tensor) -> None:
    """Within twice eager's largest error and 2 ulp of float64."""
    wide = [a.double() if a.is_floating_point() else a for a in args]
    results = [r if isinstance(r, tuple) else (r,) for r in (run(fn, *args), fn(*args), fn(*wide))]
    for got, eager, exact in zip(*results, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (eager.dtype, eager.shape, eager.stride())
        if not got.is_floating_point():
            assert torch.equal(got, eager)
            continue
        gap = (eager.double() - exact).abs().nan_to_num(0.0)
        eps = torch.finfo(got.dtype).eps
        allowed = 2 * gap.amax() + 2 * eps * exact.abs().nan_to_num(0.0) + (1e-12 if got.dtype is torch.float64 else 0)
        assert torch.equal(got.isnan(), eager.isnan())
        assert ((got.double() - exact).abs().nan_to_num(0.0) <= allowed).all()


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "all": lambda x: (x.sum(), x.amax()),
    "rows": lambda x: x.sum(-1),
    "columns": lambda x: x.sum(0),
    "columns, extremes": lambda x: (x.amax(0), x.amin(0)),
    "outer and inner": lambda x: x.sum((0, -1)),
    "middle": lambda x: x.mean(1),
    "variance of all": lambda x: x.var(),
    "variance of columns": lambda x: torch.var_mean(x, 0, correction=0),
    "softmax of columns": lambda x: torch.softmax(x, 0),
    "softmax of all": lambda x: torch.softmax(x.flatten(), 0),
    "normalised": lambda x: (x - x.mean((0, -1), keepdim=True)) * torch.rsqrt(x.var((0, -1), keepdim=True) + 1e-5),
    "mean of squares": lambda x: (x * x).mean(0) + x.sum(0),
    "product": lambda x: (x * 0.01 + 1).prod(0),
}
SHAPES = [(7, 5, 3), (2, 700, 33), (41, 3, 17), (129, 1, 70), (1, 9, 1025)]


@pytest.mark.usefixtures("eager_split")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_pieces(name: str, shape: tuple[int, ...]) -> None:
    check(REDUCTIONS[name], data(*shape))


@pytest.mark.usefixtures("eager_split")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool], ids=str)
def test_pieces_of_dtypes(dtype: torch.dtype) -> None:
    x = data(90, 45, dtype=dtype) if dtype is not torch.bool else data(90, 45) > 2.2
    if dtype is torch.bool:
        check(lambda x: (x.any(0), x.all(0), x.any(), x.any(1), x.sum(0)), x)
    else:
        check(lambda x: (x.sum(0), x.sum(), x.amax(0), x.amin(), x.amin(1)), x)


@pytest.mark.usefixtures("eager_split")
def test_pieces_of_special_values() -> None:
    x = data(200, 37)
    x[150, 3], x[20, 4], x[20, 5], x[30, 5] = math.nan, math.inf, math.inf, -math.inf
    check(lambda x: (x.sum(0), x.amax(0), x.amin(0), x.amax(), x.sum(), x.prod(0)), x)


@pytest.mark.usefixtures("eager_split")
def test_pieces_beside_other_results() -> None:
    x, w = data(333, 45), data(45)
    check(lambda x, w: ((x * w).sum(0) / w, (x.exp() * w), (x + 1).amax(0)), x, w)
    check(lambda x, w: F.layer_norm(x.t().contiguous().t(), (45,), w, w).sum(0), x, w)


def test_what_is_cut(layouts: list[Layout]) -> None:
    x = torch.ones(4096, 512)
    for fn, columns in ((lambda x: x.sum(), False), (lambda x: x.sum(0), True), (lambda x: torch.var(x), False)):
        del layouts[:]
        assert torch.equal(run(fn, x), fn(x))
        (made,) = layouts
        assert made.pieces > 1
        assert made.columns == columns
    del layouts[:]
    run(lambda x: torch.softmax(x, -1), x)
    assert [made.pieces for made in layouts] == [1]


def test_column_blocks(layouts: list[Layout]) -> None:
    x = data(9, 5000)
    check(lambda x: torch.softmax(x, 0), x)
    check(lambda x: (x.sum(0), x.std(0)), x)
    assert all(made.columns and made.blocks == 5 for made in layouts)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 2047, 2048, 2049, 4096, 5003])
def test_blocks_of_elements(n: int) -> None:
    x = data(n)
    assert torch.equal(run(lambda x: (x + 1) * x, x), (x + 1) * x)


TRANSPOSES: dict[str, Callable[..., Any]] = {
    "copied": lambda x, y: x.t().contiguous(),
    "added": lambda x, y: x.t() + y,
    "both": lambda x, y: (x.t() * y, x + y.t()),
    "computed": lambda x, y: torch.where(x.t() > y, x.t() * y, y),
    "reversed": lambda x, y: x.flip(1).t() * 2 + y,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (65, 127), (9, 200)], ids=str)
@pytest.mark.parametrize("name", TRANSPOSES)
def test_transposes(name: str, shape: tuple[int, int], dtype: torch.dtype, layouts: list[Layout]) -> None:
    x = data(*shape, dtype=dtype) if dtype is not torch.bool else data(*shape) > 0
    y = data(*shape[::-1], dtype=dtype) if dtype is not torch.bool else data(*shape[::-1]) > 0
    check(TRANSPOSES[name], x, y)
    assert any(made.across for made in layouts)


def test_permutations(layouts: list[Layout]) -> None:
    x = data(3, 20, 9, 70)
    for order in ((0, 2, 3, 1), (3, 1, 0, 2), (1, 3, 2, 0), (0, 3, 1, 2)):
        check(lambda x, order=order: x.permute(order).contiguous() + 1, x)
    assert sum(bool(made.across) for made in layouts) >= 3
    check(lambda x: (x.transpose(1, 3) * 2).transpose(1, 3).contiguous(), x)
    check(lambda x: x[:, ::2, :, 3:].transpose(1, 3) * 2, x)


def test_large_outputs_are_written_around_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    lower = llvm.lower
    monkeypatch.setattr(llvm, "lower", lambda *args: made.append(lower(*args)) or made[-1])
    monkeypatch.setattr(llvm, "host", lambda: replace(host(), last_cache_bytes=1 << 22))
    x = data(1024, 1056)
    check(lambda x: x * 2 + 1, x)
    check(lambda x: torch.softmax(x, -1), x)
    check(lambda x: x.t() * 2, x)
    check(lambda x: (x - 1).to(torch.float64), x)
    assert all("!nontemporal" in m.llvm for m in made)
    del made[:]
    check(lambda x: x * 2 + 1, x[:, :100].contiguous())  # small
    check(lambda x: x[:, 1:] * 2, data(20000, 60))  # 59 floats in a row: not aligned, and short
    check(lambda x: x.sum(0), x)
    check(lambda x: torch.tanh(x) + x.exp(), x)  # computing takes longer
    monkeypatch.setattr(llvm, "host", lambda: replace(host(), last_cache_bytes=1 << 25))
    check(lambda x: x * 3 + 1, x)  # whoever reads it next finds it in the last cache
    assert not any("!nontemporal" in m.llvm for m in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_vectors_of_long_rows_are_aligned(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows begin anywhere: two vectors cover the edges, and those between are written around the caches."""
    monkeypatch.setattr(llvm, "STREAM_BYTES", 1)
    monkeypatch.setattr(llvm, "host", lambda: replace(host(), last_cache_bytes=1))
    made = []
    lower = llvm.lower
    monkeypatch.setattr(llvm, "lower", lambda *args: made.append(lower(*args)) or made[-1])
    for size in (2051, 2065, 2080):
        check(lambda x: x[:, 1:] + x[:, :-1], data(37, size, dtype=dtype))
        check(lambda x: (x[:, 1:] + x[:, :-1], (x[:, 1:] - 1).double()), data(5, size, dtype=dtype))
    check(lambda x: torch.cat((x[:, :-1], x[:, 1:-2]), 1) + 1, data(7, 2100, dtype=dtype))
    enough = dtype is not torch.int8 or host().vector_bytes > 32  # as many elements as float32 has in two vectors
    assert not enough or all("!nontemporal" in m.llvm for m in made)


@pytest.mark.parametrize("size", [*range(1, 19), 31, 33, 63, 65, 100, 127, 2047, 2049, 2111])
def test_vectors_reach_back(size: int, layouts: list[Layout]) -> None:
    """Rows of any length, alone and many, with and without a dear function."""
    for fn in (lambda x, y: x * 2 + y, lambda x, y: (torch.tanh(x) + y, x.exp() > y)):
        check(fn, data(size), data(size, seed=4))
        check(fn, data(3, size), data(size, seed=4))
        check(lambda x, y, fn=fn: fn(torch.softmax(x, -1), y), data(3, size), data(size, seed=4))
    assert all(made.lanes <= made.lane.size for made in layouts if made.lane)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_nan(dtype: torch.dtype) -> None:
    """Whatever bits a NaN has, in float32 and in half precision."""
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7F80FFFF, 0x7FFF0000], dtype=torch.int32)
    wide = torch.cat([patterns, patterns | (-(2**31))]).view(torch.float32)
    low = torch.tensor([0x7F81, 0x7FFF, 0x7FC0, 0xFF81 - 0x10000, -1], dtype=torch.int16).view(torch.bfloat16).to(dtype)
    low = low.repeat(2)
    fns: list[Callable[..., Any]] = [
        lambda a, b: a.to(dtype),
        lambda a, b: (a.to(dtype) * b, b * 2 + b, b.tanh(), torch.sigmoid(b) * a, a.exp().to(dtype)),
        lambda a, b: (b.float() + a).to(dtype),
    ]
    for fn in fns:
        results = run(fn, wide, low)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.isnan().all()


def test_large_results_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that begin where a part begins are aligned or not."""
    monkeypatch.setattr(llvm, "host", lambda: replace(host(), last_cache_bytes=1 << 22))
    made = []
    lower = llvm.lower
    monkeypatch.setattr(llvm, "lower", lambda *args: made.append(lower(*args)) or made[-1])
    for first, streamed in ((96, True), (99, False)):
        check(lambda x, y: torch.cat((x, y), 1) + 1, data(4096, first), data(4096, 352 - first))
        assert ("!nontemporal" in made[-1].llvm) == streamed


@pytest.mark.parametrize("affine", [False, True])
def test_group_norm(affine: bool, layouts: list[Layout]) -> None:
    weights = (data(12), data(12, seed=4)) if affine else ()
    check(lambda x, *w: F.silu(F.group_norm(x, 4, *w)), data(3, 12, 5, 7), *weights)
    assert len(layouts) == 1


def test_as_strided() -> None:
    x = data(6, 8)
    check(lambda x: (x * 2).as_strided((12, 4), (4, 1)) + 1, x)
    refused = primexec.make_traced(lambda x: (x * 2).as_strided((5, 8), (7, 1)) + 1)
    assert torch.equal(refused(x, executor=("llvm", "aten")), (x * 2).as_strided((5, 8), (7, 1)) + 1)


@pytest.mark.parametrize("shape", [(2, 0, 8), (5, 0), (0, 5, 3)], ids=str)
def test_reductions_of_and_over_nothing(shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        x = torch.ones(shape, dtype=torch.float64)
        traced = primexec.make_traced(lambda x, dim=dim: x.exp().sum(dim) + 1)
        assert torch.equal(traced(x, executor=("llvm", "aten")), x.exp().sum(dim) + 1)


@pytest.mark.parametrize("size", [1, 31, 64, 1111])
def test_sums_of_numbers_without_sign(size: int) -> None:
    x = data(7, size)
    check(lambda x: ((x * x).sum(1), x.exp().sum(1), x.abs().sum(1), (x.abs() * 1e38).exp().sum(1)), x)
    check(lambda x: (x * x).sum(1), torch.where(x > 2, torch.nan, x))
    check(lambda x: (x * x).sum(1), x * 1e19)


@pytest.mark.parametrize("size", [511, 512, 1000, 3137])
def test_long_sums(size: int) -> None:
    """Not less exact than eager's where elements cancel, and exact where pairs of them are."""
    x = data(70, size)
    wide = x * (data(70, size, seed=5) * 3).exp()
    for y in (x, wide, x - x.mean(1, keepdim=True), x + 100, x.abs(), torch.cat((x, -x.flip(1)), 1)):
        check(lambda y: (y.sum(1), y.mean(1)), y)
        check(lambda y: (y * 2 - y.square()).sum((0, 1)), y)
    whole = (x * 1000).round()
    assert torch.equal(run(lambda y: y.sum(1), whole), whole.double().sum(1).float())
    for value in (math.nan, math.inf, -math.inf):
        check(lambda y: y.sum(1), torch.where(x > 2, value, x))
    for dtype in (torch.bfloat16, torch.float16):
        check(lambda y: (y.sum(1), y.mean(1)), x.to(dtype))


def test_view_that_memory_does_not_allow() -> None:
    """Fake tensors flatten some columns of one row that no view flattens."""
    x, index = data(1, 2, 1, 2), torch.arange(4).reshape(1, 2, 1, 2)
    x, index = (t.as_strided((1, 2, 1, 2), (4, 1, 4, 2)) for t in (x, index))

    def unpool(x: Tensor, index: Tensor) -> Tensor:
        return F.max_unpool2d(x, index, 2, output_size=(2, 4)) * 2

    assert torch.equal(run(unpool, x, index), unpool(x, index))
    assert torch.equal(run(lambda x, index: unpool(x.exp(), index), x, index), unpool(x.exp(), index))


def test_broadcasting_to_no_elements_writes_nothing() -> None:
    """A result without memory, whose only dimension repeats its operand no time."""
    found = examine(load("llvm"), "prims.broadcast_in_dim.default", torch.float16, 0)
    assert not found.findings


def odd_ends(x: Tensor) -> tuple[Tensor, ...]:
    """Rows and columns that end in less than a vector: what lies behind them must not count, nor be written to."""
    i = torch.arange(x.shape[1]) % 7
    cut = torch.cat((x[:, 2:], x[:, :1] * 2), 1)
    rows = (x.softmax(1), x.sum(1), x.amax(1), x.amin(1), x.argmax(1), (x > 2).any(1), (x < 2).all(1), cut.sum(1))
    columns = (x.sum(0), x.amin(0), (x > 2).any(0), cut.amax(0), (x * x).sum(0) + x[0])
    return (*rows, *columns, x[:, i].sum(1), x[:, 1:].t().sum(0), (x - x.mean(1, keepdim=True)).square().mean(1))


@pytest.mark.parametrize("size", [3, 5, 8, 13, 17, 31, 33, 63, 65, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ends_of_rows_and_columns(size: int, dtype: torch.dtype) -> None:
    check(odd_ends, data(9, size, dtype=dtype) + 3)
    check(odd_ends, -data(70, size, dtype=dtype) - 3)


def busy(y: Tensor) -> Tensor:
    """Many cheap operations."""
    y = ((y * 2 + 1).round() / 4).floor() * 2 - y.abs()
    return torch.where(y > 0, y * 3 - 1, 1 - y).clamp(-3, 5) + (y - 2).abs().maximum(y)


TABLE = data(70) * 3
SHARED: dict[str, Callable[..., Any]] = {  # of shapes (6, 20, 70) and (20, 70)
    "matrix": lambda x, y: x * busy(y),
    "vector": lambda x, y: (x - y) * busy(TABLE.to(x.dtype) * y[0]),
    "places": lambda x, y: x[:, :, (torch.arange(70) * y[0, 0].abs() * 0.1).long()] + 1,
    "places of data": lambda x, y: x[..., (y[0].float().abs() * 9).round().long()] * x,
    "parts": lambda x, y: torch.cat((x[:, 3:], x[:, :3] + 2), 1) * busy(torch.cat((y[:, 60:] * 3, y[:, :60]), 1)),
    "parts of rows": lambda x, y: F.pad(x, (0, 0, 2, 1), value=3.0) + busy(y[:1]),
    "truth": lambda x, y: torch.where((busy(y) > 1) & (y < 2), x, -x),
    "two results": lambda x, y: (x * busy(y), (x + 1) / (busy(y + 1) + 4), (x > y)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_what_rows_share_is_computed_once(name: str, dtype: torch.dtype, layouts: list[Layout]) -> None:
    x, y = data(6, 20, 70, dtype=dtype), data(20, 70, dtype=dtype)
    check(SHARED[name], x, y)
    check(SHARED[name], x.transpose(0, 1).contiguous().transpose(0, 1), y)
    assert any(made.columns for made in layouts)


@pytest.mark.parametrize("shape", [(1000, 64), (64, 3, 700), (40, 5, 2101), (4, 8), (3, 70), (1000, 7)], ids=str)
def test_blocks_of_shared_columns(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, layouts: list[Layout]
) -> None:
    """Rows are cut into parts for threads, columns into blocks that fit the first cache; few of either are not."""
    monkeypatch.setattr(layout, "GRAIN", 512)
    x, y = data(*shape), data(shape[-1])
    check(lambda x, y: x * busy(y), x, y)
    check(lambda x, y: (x.bfloat16() * busy(y).bfloat16(), x + 1), x, y)
    assert all(made.columns == (shape[-1] >= 8) for made in layouts if made.outer or made.columns)


def test_shared_places_out_of_range() -> None:
    x, i = data(3, 20, 70), torch.arange(70) % 20
    for bad in (20, -21):
        i[66] = bad
        with pytest.raises(IndexOutOfRangeError, match=str(bad)):
            run(lambda x, i: x[:, i] * 2, x.transpose(1, 2).contiguous().transpose(1, 2), i)
        with pytest.raises(IndexOutOfRangeError, match=str(bad)):
            run(lambda x, i: x[..., i] * 2, x[..., :20], i)


@pytest.mark.parametrize("channels", [1, 5, 16])
def test_sampling(channels: int, layouts: list[Layout]) -> None:
    """Places and weights are the same for all channels."""
    image, grid = data(2, channels, 13, 11), data(2, 9, 17, 2) * 1.3
    for mode, padding in itertools.product(("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")):
        if mode == "bilinear" or padding == "zeros":

            def fn(x: Tensor, g: Tensor, mode: str = mode, padding: str = padding) -> Tensor:
                return F.grid_sample(x, g, mode, padding, align_corners=False)

            torch.testing.assert_close(run(fn, image, grid), fn(image, grid))
            torch.testing.assert_close(run(fn, image.double(), grid.double()), fn(image.double(), grid.double()))
    assert any(made.columns for made in layouts) == (channels > 1)


def test_results_of_rows_do_not_tell_how_rows_are_walked(layouts: list[Layout]) -> None:
    check(lambda x: (x.sum(-1), x.mean(-1), x.square().sum(-1), x.amax(-1)), data(64, 4099))
    assert len(layouts) == 1
    assert not any(made.columns for made in layouts)
    check(lambda x: (x.sum(0), x.mean(0), x.square().sum(0)), data(4099, 64))
    assert layouts[-1].columns


LEFT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], bool, bool]] = {
    "pool": (lambda x: F.adaptive_avg_pool2d(x, 3), (2, 3, 8, 9), False, True),
    "mean": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 3, 8, 9), False, False),
    "smaller": (lambda x: F.interpolate(x, size=(5, 4), mode="bilinear", antialias=True), (2, 3, 8, 9), True, True),
    "larger": (lambda x: F.interpolate(x, size=(15, 14), mode="bicubic", antialias=True), (2, 3, 8, 9), True, False),
    "unfold": (lambda x: F.unfold(x, 3), (2, 3, 8, 9), False, True),
    "reflect": (lambda x: F.pad(x, (1, 2, 1, 2), mode="reflect"), (2, 3, 8, 9), False, True),
    "maximum": (lambda x: x.cummax(0)[0], (500,), True, False),
    "maxima": (lambda x: x.cummax(1)[0], (8, 50), False, False),
    "product": (lambda x: x.prod(), (200, 100), True, False),
}


@pytest.mark.parametrize("name", LEFT)
def test_operators_are_left_whole(name: str) -> None:
    """Where PyTorch's kernels are faster: forward, backward or both."""
    fn, shape, *expected = LEFT[name]
    x = data(*shape).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (fn(x) / 3).sin().sum()

    traced = primexec.make_traced(loss, executor=("llvm", "aten"))
    found = [torch.autograd.grad(f(x), x) for f in (traced, loss)]
    torch.testing.assert_close(*found)
    lines = [line for line in str(traced.explain(x)).splitlines() if "were measured to take" in line]
    both = [any("backward:" not in line for line in lines), any("backward:" in line for line in lines)]
    assert both == expected


def test_gradients_of_sampling_are_left_whole() -> None:
    image, grid = data(2, 3, 13, 11).requires_grad_(), (data(2, 9, 17, 2) * 1.3).requires_grad_()

    def fn(x: Tensor, g: Tensor) -> Tensor:
        return F.grid_sample(x, g, align_corners=False).sin().sum()

    traced = primexec.make_traced(fn, executor=("llvm", "aten"))
    found = [torch.autograd.grad(f(image, grid), (image, grid)) for f in (traced, fn)]
    torch.testing.assert_close(*found)
    assert "llvm declined 1 x aten.grid_sampler_2d_backward" in str(traced.explain(image, grid))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_resizing(mode: str) -> None:
    for shape in ((2, 5, 13, 11), (1, 1, 1, 40), (3, 9, 32, 1)):
        for scale in (2, 0.6) if shape[0] == 2 else (1.7,):
            x = data(*shape)
            if all(int(n * scale) for n in shape[2:]):

                def fn(x: Tensor, scale: float = scale) -> Tensor:
                    return F.interpolate(x, scale_factor=scale, mode=mode)

                torch.testing.assert_close(run(fn, x), fn(x))
                check(fn, x.bfloat16())


KEPT: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, y: F.layer_norm(x + y, x.shape[-1:]),
    "softmax": lambda x, y: torch.softmax(x * 2 - y, -1),
    "chain": lambda x, y: F.layer_norm(torch.where(x > 0, x * 2 + y, x.abs() - y).clamp(-2, 2) * x + 1, x.shape[-1:]),
    "parts": lambda x, y: torch.softmax(torch.cat((x[:, 1:] * 2 - y[:, 1:], y[:, :3] + x[:, :1]), 1), 1),
    "truth": lambda x, y: (x / y.abs().sum(1, keepdim=True), (x * 2 + y * 3 > 1) & (x - y < x.amax(1, keepdim=True))),
    "two": lambda x, y: ((x * y - 1).softmax(1) * (x * y - 1), (x + y).sum(1, keepdim=True) - (x + y)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_what_passes_keep_for_later_ones(name: str, dtype: torch.dtype) -> None:
    for size in (1, 7, 64, 515):
        check(KEPT[name], data(9, size, dtype=dtype), data(9, size, dtype=dtype, seed=4))
