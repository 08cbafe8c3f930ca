"""Products that llvm hands to oneDNN, whatever measurements say, inside of regions with kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import primexec
from primexec.executors.llvm import measured, products
from tests.test_llvm_models import assert_as_near, floats, wide
from tests.ways import WAYS, compute_products_by


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("oneDNN", monkeypatch)


def mlp(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w, b)), v).tanh()


def returned_product(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x * 2, w, b), F.linear(x + 1, w)


def weights_by_rows(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The weight as GPT-2 keeps it, inputs by columns."""
    return torch.addmm(b, x.reshape(-1, x.shape[-1]).sigmoid(), w.t().contiguous()).view(*x.shape[:-1], -1).relu()


def slices(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Operands that start inside of their memory, or have gaps."""
    return F.linear(x[1:] + 1, w[1:], b[1:]).mul(2) + (x[:, :3] @ w.t()[:, 1:]).mean()


def heads(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    q, k = (F.linear(x, w, b).view(*x.shape[:-1], 2, -1).transpose(1, 2) for _ in range(2))
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2).exp()


def gated(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Halves of one product, read by kernels before and after another."""
    gate, up = F.linear(x, w, b).chunk(2, -1)
    y = F.silu(gate) * up
    return F.linear(y.contiguous(), v[:4, :4].contiguous()).sigmoid() * gate + torch.full((4,), 0.5)


def chain(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    for _ in range(4):
        x = F.linear(F.linear(x, w, b), v) + x
    return x


FUNCTIONS: list[Callable[..., Any]] = [mlp, returned_product, weights_by_rows, slices, heads, gated, chain]


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((3, 5, 6), (8, 6), (8,), (6, 8))]


DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype in measured.dtypes()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_functions(function: Callable[..., Any], dtype: torch.dtype) -> None:
    traced = primexec.make_traced(function, executor=("llvm", "aten"))
    args = [a.to(dtype) for a in operands()]
    for _ in range(2):
        assert_as_near(floats(traced(*args)), floats(function(*args)), floats(function(*wide(args))))
        args = [a * 0.5 for a in args]
    assert traced.cache_info().traces == 1
    assert "is a product through oneDNN" in str(traced.explain(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    found = []
    for run in (primexec.make_traced(model, executor=("llvm", "aten")), model):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    exact(x.double()).square().sum().backward()
    assert_as_near(*found, [p.grad for p in exact.parameters()])


def test_the_gradient_of_a_weight_reads_rows() -> None:
    """Kernels transpose what it is a product of, and nothing else happens in these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    traced = primexec.make_traced(model, executor=("llvm", "aten"))
    x = torch.randn(24, 16)
    traced(x).sum().backward()
    assert "backward: region0 on llvm: " in str(traced.explain(x))
    assert "backward: region1" not in str(traced.explain(x))
    backward = traced.trace(x).inspect_loops().partition("backward ")[2].split("kernel ")[1:]
    assert [kernel.split()[0] for kernel in backward if "clone" in kernel] == ["k1_clone", "k3_clone"]


@torch.no_grad()
def test_short_products_are_not_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs them, and only where PyTorch has code for them."""
    compute_products_by("ATen", monkeypatch)
    x, w, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((3, 4), (5, 4), (5,)))
    for dtypes, product in ((frozenset(), "1 aten.addmm"), (frozenset([torch.bfloat16]), "1 aten.mm")):
        monkeypatch.setattr(products, "widened", lambda dtypes=dtypes: dtypes)
        traced = primexec.make_traced(lambda x, w, b: F.linear(x.sin(), w, b).exp(), executor=("llvm", "aten"))
        traced(x, w, b)
        assert product in str(traced.explain(x, w, b))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_short_products_that_are_large_enough_to_be_measured(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Also where PyTorch has no code for them."""
    monkeypatch.undo()
    x, w = torch.randn(64, 512).bfloat16(), torch.randn(512, 320).bfloat16()
    w = w.t().contiguous().t() if layout == "columns" else w
    assert measured.Shape.of(x, w).size >= measured.SMALLEST
    made = primexec.make_traced(lambda x, w: (x.sin() @ w).relu(), executor=("llvm", "aten"))(x, w)
    exact = (x.sin().double() @ w.double()).relu()
    torch.testing.assert_close(made.double(), exact, rtol=1e-2, atol=1e-2)


def test_other_dtypes_stay_with_aten() -> None:
    traced = primexec.make_traced(F.linear, executor=("llvm", "aten"))
    x, w = torch.randn(30, 40, dtype=torch.float64), torch.randn(50, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(traced(x, w), F.linear(x, w), rtol=0, atol=0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_measurement_leaves_random_state_alone(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    monkeypatch.undo()
    state = torch.get_rng_state()
    left = torch.ones(256, 128).t() if turned else torch.ones(128, 256)
    assert measured.fastest(measured.Shape.of(left, torch.ones(256, 192))) in WAYS
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("batch", "rows", "inner", "columns", "measured_part"),
    [
        (1, 64, 768, 768, (1, 64, 768)),
        (1, 1500, 1536, 384, (1, 256, 341)),
        (1, 64, 768, 50257, (1, 64, 2730)),
        (1, 4096, 4096, 4096, (1, 256, 256)),
        (64, 512, 64, 512, (8, 512, 512)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_large_products_a_part_is_measured(
    batch: int, rows: int, inner: int, columns: int, measured_part: tuple[int, ...], turned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found: list[measured.Shape] = []
    monkeypatch.setattr(measured, "_fastest", lambda shape, with_library: found.append(shape))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    left = (1, rows) if turned else (inner, 1)
    measured.fastest(measured.Shape(batch, rows, inner, columns, left, (columns, 1), torch.float32))
    (shape,) = found
    assert (shape.batch, shape.rows, shape.columns) == measured_part
    assert shape.right == (shape.columns, 1)  # oneDNN would take 100 times as long for parts of longer rows
    assert shape.inner == inner
    assert shape.is_turned == turned
