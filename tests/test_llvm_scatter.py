"""The executor `llvm`: writes at places that data tells. Values against eager, kernels, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import primexec
from primexec.executors.llvm.executor import Compiled
from tests.observe import same_bits
from tests.test_llvm import BOTH, compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_indexing import DTYPES, TARGET, places

ONE, THREE = places(37, 1, high=53), places(37, 3, high=53, seed=5)

# Few places in each row or column: every element asks whether it is one of them.
FEW: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda a: a.scatter(1, ONE, 1),
    "of a tensor": lambda a: a.scatter(1, ONE, a),
    "added": lambda a: a.scatter_add(1, THREE, a),
    "in columns": lambda a: a.t().scatter_add(0, THREE.t(), a.t()),
    "into zeros": lambda a: torch.zeros_like(a).scatter(1, ONE, 1) * 3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_places(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    a = data(37, 53, dtype=dtype)
    for name, fn in FEW.items():
        if dtype is torch.float32 or name in ("a value", "added"):
            got, expected = run(fn, a), fn(a)
            assert torch.equal(got, expected), name
            assert got.stride() == expected.stride(), name


MANY, GRID, PIXELS = places(90), places(90, 53, seed=5), places(5, 7, seed=6)
# Of a matrix of 37 rows and 53 columns and one of 90 rows: a copy, and a walk in eager's order.
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scatter_add": lambda a, b: a.scatter_add(0, GRID, b),
    "scatter_add in columns": lambda a, b: a.t().scatter_add(1, GRID.t(), b.t()),
    "scatter_add, a part": lambda a, b: a.scatter_add(0, GRID[:, :5], b),
    "index_add": lambda a, b: a.index_add(0, MANY, b),
    "added at rows": lambda a, b: a.index_put((MANY - 37,), b, accumulate=True),
    "added at points": lambda a, b: a.index_put((MANY, GRID[:, 0]), b[:, 0], accumulate=True),
    "added at columns": lambda a, b: torch.ops.aten.index_put(a, [None, MANY[:7]], b[:37, :7], True),
    "one for all": lambda a, b: a.index_put((PIXELS,), b[0, 0], accumulate=True),
    "replaced rows": lambda a, b: a.index_put((torch.tensor([3, -1, 7]),), b[:3]),
    "scatter": lambda a, b: a.scatter(1, torch.arange(53).flip(0).expand(37, 53), b[:37]),
    "index_copy": lambda a, b: a.index_copy(0, torch.tensor([3, 36, 7]), b[:3]),
    "index_fill": lambda a, b: a.index_fill(1, torch.tensor([3, 36, 7]), 1),
    "histogram": lambda a, b: torch.zeros(37, dtype=b.dtype).index_add(0, MANY, b[:, 0]),
    "counts": lambda a, b: torch.zeros(37, dtype=torch.int64).scatter_add(0, MANY, torch.ones_like(MANY)),
    "fused source": lambda a, b: (a + a).index_add(0, MANY, b + b),
    "largest": lambda a, b: a.scatter_reduce(0, GRID, b, "amax"),
    "product": lambda a, b: a.scatter_reduce(0, GRID[:3], b, "prod"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    a, b = data(37, 53, dtype=dtype), data(90, 53, dtype=dtype, seed=6)
    for name, fn in WRITES.items():
        if dtype is torch.float32 or name in ("scatter_add", "added at rows", "replaced rows"):
            got, expected = run(fn, a, b), fn(a, b)
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride(), name
            rounding = dtype in (torch.bfloat16, torch.float16) and name == "scatter_add"
            assert kernels(compiled) == [3 if rounding else 2], name
            compiled.clear()


def test_sums_at_places_are_in_the_order_of_eager() -> None:
    a, b = torch.zeros(37, 53), data(90, 53)
    for fn in (WRITES["scatter_add"], WRITES["index_add"], WRITES["scatter_add in columns"]):
        assert torch.equal(run(fn, a, b), fn(a, b))


@pytest.mark.parametrize("size", [1, 15, 17, 100, 255, 256, 257, 300, 700])
def test_rows_are_added_part_by_part(size: int) -> None:
    a, rows = data(40, size), data(90, size, seed=1)
    places = torch.arange(90) * 7 % 31
    expected = a.index_add(0, places, rows)
    assert torch.equal(run(lambda a, i, rows: a.index_add(0, i, rows), a, places, rows), expected)
    assert torch.equal(run(lambda a, i, rows: a.index_put((i,), rows, accumulate=True), a, places, rows), expected)


def test_inputs_are_copied_before_they_are_added_to() -> None:
    """Also where nobody but this program sees the sum."""
    a, b, index = data(5, 3), data(5, 3), MANY[:15].reshape(5, 3) % 5
    fns: list[Callable[..., Tensor]] = [
        lambda a, b: a.scatter_add(0, index, b).gather(0, index.flip(0)).tanh(),
        lambda a, b: a.index_put((index[:, 0],), b, accumulate=True).t().sum(0),
        lambda a, b: a.scatter(0, index[:1], b[:1]) * a + a.scatter_reduce(0, index, b, "amax"),
    ]
    for fn in fns:
        torch.testing.assert_close(run(fn, a, b), fn(a, b))


def test_written_twice_and_read_between() -> None:
    def fn(a: Tensor) -> Tensor:
        b = a * 2
        b[MANY[:5]] = 1
        c = b.sum(0)
        b[PIXELS[0], PIXELS[1]] += 3
        return b + c

    a = data(37, 53)
    torch.testing.assert_close(run(fn, a), fn(a))


@pytest.mark.parametrize("padding", [-1, 3])
def test_gradient_of_embedding(padding: int) -> None:
    def fn(grad: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(grad, PIXELS, 37, padding, False)

    grad = data(5, 7, 53)
    torch.testing.assert_close(run(fn, grad), fn(grad))


def test_what_is_refused() -> None:
    a = data(37, 53)
    refused = {
        "a mean, or one that leaves out": lambda a: a.scatter_reduce(0, GRID[:37], a, "mean"),
        "neither int64 nor int32": lambda a: a.index_put((a > 0,), a.sum()),
    }
    for reason, fn in refused.items():
        with pytest.raises(primexec.ExecutorError, match=reason):
            run(fn, a)


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "beyond": lambda a: a.scatter(1, ONE + 40, 1),
    "negative": lambda a: a.scatter_add(1, ONE - 20, a),
    "many": lambda a: a.scatter_add(0, GRID[:37] + 5, a),
    "many, negative": lambda a: a.scatter_add(0, GRID[:37] - 5, a),
    "rows": lambda a: a.index_put((MANY[:37] + 5,), a, accumulate=True),
}


@pytest.mark.parametrize("name", WRONG)
def test_places_that_are_not_there(name: str) -> None:
    fn, a = WRONG[name], data(37, 53)
    with pytest.raises((IndexError, RuntimeError)) as eager:
        fn(a)
    with pytest.raises(eager.type, match="out of bounds"):
        run(fn, a)


def test_gradient_of_cross_entropy(compiled: list[Compiled]) -> None:  # noqa: F811
    def loss(a: Tensor) -> Tensor:
        return F.cross_entropy(a, TARGET)

    a = data(37, 53).requires_grad_()
    primexec.make_traced(loss)(a, executor=("llvm", "aten")).backward()
    got, a.grad = a.grad, None
    loss(a).backward()
    torch.testing.assert_close(got, a.grad)
    assert kernels(compiled)[1] == 1


def _mosaic(x: Tensor) -> Tensor:
    a = torch.zeros_like(x)
    a[::2, 1::2], a[1::2, ::2] = x[::2, 1::2], x[1::2, ::2] * 2
    return a


def _kept_between(x: Tensor) -> Any:
    a = x * 2
    a[::2] = 1
    between = a * 3
    a[:, 1::3] += x[:, 1::3]
    return a, between, a[1::2].sum()


def _turned(x: Tensor) -> Tensor:
    a = x.t().contiguous().t() + 0
    a[2::3, ::4] = x[2::3, ::4]
    return a.t()


def _inside(x: Tensor) -> Tensor:
    a = x + 1
    a[1:-1, 2:-1:2] = x[1:-1, 2:-1:2] * 3
    a[::2][::2, ::5] = 0
    return a * 2


def _crossed(x: Tensor) -> Tensor:
    a = x + 1
    a[::2] = a[::2].flip(1)
    a[:, ::2] = a.flip(0)[:, ::2]
    return a


WRITTEN = [_mosaic, _kept_between, _turned, _inside, _crossed]
SIZES = [(12, 14), (37, 53), (1, 9), (9, 1), (1, 1), (0, 4), (4, 0), (2, 3)]


@pytest.mark.parametrize("fn", WRITTEN)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_slices_with_steps(fn: Callable[[Tensor], Any], shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = data(*shape, dtype=dtype)
    for got, wanted in zip(*map(pytree.tree_leaves, (primexec.make_traced(fn)(x, executor=BOTH), fn(x))), strict=True):
        assert same_bits(wanted, got) if got.dim() else torch.allclose(got, wanted, equal_nan=True)
        assert got.stride() == wanted.stride()


def test_slices_with_steps_are_written_once(compiled: list[Compiled]) -> None:  # noqa: F811
    x = data(64, 64)
    primexec.make_traced(_mosaic)(x, executor=BOTH)
    assert kernels(compiled) == [3]  # the zeros, and two writes
    assert sum(b.kind == "arena" for b in compiled[0].schedule.buffers) == 0


@pytest.mark.parametrize("step", [1, 2, 3, 50])
@pytest.mark.parametrize("start", [None, 3, -2, 90])
def test_slice_scatter(start: int | None, step: int) -> None:
    x = data(4, 20)
    part = x[:, start::step] * 2
    got = primexec.make_traced(lambda x, p: torch.slice_scatter(x, p, 1, start, None, step))(x, part, executor=BOTH)
    assert torch.equal(got, torch.slice_scatter(x, part, 1, start, None, step))
    assert torch.equal(run(lambda x: torch.slice_scatter(x, x[:, :10], 1, 0, 20, 2), x)[:, ::2], x[:, :10])


@pytest.mark.parametrize(("strides", "offset"), [((20, 2), 1), ((19, 1), 0), ((40, 20), 3), ((1, 20), 0)])
def test_strided_writes(strides: tuple[int, int], offset: int) -> None:
    def fn(x: Tensor, part: Tensor) -> Tensor:
        return torch.as_strided_scatter(x * 2, part, (2, 3), strides, offset) + 1

    x, part = data(6, 20), data(2, 3, seed=1)
    assert torch.equal(primexec.make_traced(fn)(x, part, executor=BOTH), fn(x, part))


# Places that are numbers, of no dimension.
AT = torch.tensor(2)
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda x, s: (x * 2).index_select(0, AT),
    "elements": lambda x, s: (x[:, 0] * 2).index_select(0, AT),
    "added rows": lambda x, s: (x * 2).index_add(0, AT, s),
    "added elements": lambda x, s: (x[:, 0] * 2).index_add(0, AT, s[0, :1]),
    "copied rows": lambda x, s: (x * 2).index_copy(0, AT, s),
    "filled rows": lambda x, s: (x * 2).index_fill(0, AT, 3.0),
    "gathered": lambda x, s: (x[:, 0] * 2).gather(0, AT),
    "scattered": lambda x, s: (x[:, 0] * 2).scatter_add(0, AT, s[0, 0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_places_that_are_numbers(name: str) -> None:
    fn, found = NUMBERS[name], []
    for function in (primexec.make_traced(lambda x, s: fn(x, s).exp()), lambda x, s: fn(x, s).exp()):
        x, s = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_(), torch.ones(1, 3, requires_grad=True)
        out = function(x, s)
        out.sum().backward()
        found.append((out, x.grad, torch.zeros(1, 3) if s.grad is None else s.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
