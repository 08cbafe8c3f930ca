"""Products of 16-bit floats where PyTorch has no code for them: kernels widen them as they read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import primexec
from primexec.executors.llvm import engine, left, matmul, measured, products
from primexec.executors.llvm.contraction import HALVES, contraction
from primexec.executors.llvm.executor import Compiled
from primexec.executors.llvm.target import NAMED, X86_64
from tests.test_llvm import BOTH, compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_models import assert_as_near
from tests.test_llvm_products import LAYOUTS

SHORT = sorted(HALVES, key=str)  # in the same order in each process that runs tests
DTYPES = pytest.mark.parametrize("dtype", SHORT, ids=str)


@pytest.fixture(autouse=True)
def _without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, left):
        monkeypatch.setattr(module, "widened", lambda: HALVES)


def factors(compiled: list[Compiled]) -> list[tuple[torch.dtype, torch.dtype]]:  # noqa: F811
    """The dtypes that each product of matrices reads."""
    found = [contraction(k) for c in compiled for k in c.schedule.kernels]
    return [(f.left.dtype, f.right.dtype) for f in found if f]


def is_rounded_once(got: Tensor, exact: Tensor, terms: Tensor) -> bool:
    """Whether a result is as near as float32 and one rounding allow, for a sum of terms as large as these."""
    info = torch.finfo(got.dtype)
    allowed = exact.abs() * info.eps / 2 + info.tiny * info.eps + terms * 1e-6
    return bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 300, 40), (8, 130, 8), (210, 421, 58)])
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left_", LAYOUTS)
@DTYPES
def test_products(dtype: torch.dtype, left_: str, right: str, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = LAYOUTS[left_](data(2, rows, inner).to(dtype)), LAYOUTS[right](data(2, inner, columns, seed=1).to(dtype))
    for x, y, op in ((a, b, torch.bmm), (a[0], b[1], torch.mm)):
        got = run(op, x, y)
        assert got.stride() == op(x, y).stride()
        assert is_rounded_once(got, op(x.double(), y.double()), op(x.double().abs(), y.double().abs()))


C = data(58, seed=2)
FOLLOWED: dict[str, tuple[Callable[..., Any], int]] = {
    "a bias": (lambda a, b: F.linear(a, b.mT.contiguous(), C.to(a.dtype)), 2),
    "an activation": (lambda a, b: F.silu(a @ b), 1),
    "what is made before": (lambda a, b: (a * 2 + 1) @ b.sigmoid(), 3),
    "one after another": (lambda a, b: torch.tanh(a @ b) @ b.mT + 1, 2),
    "rows": (lambda a, b: torch.softmax(a @ b, -1), 2),
    "turned": (lambda a, b: (a @ b).t().contiguous() + 1, 2),
    "a part": (lambda a, b: a[3:, 7:200] @ b[7:200, :40] * 3, 1),
    "one factor alone": (lambda a, b: (a.float() * 3) @ b.to(torch.float32), 2),
}


@pytest.mark.parametrize("name", FOLLOWED)
@DTYPES
def test_what_follows_is_the_same_kernel(dtype: torch.dtype, name: str, compiled: list[Compiled]) -> None:  # noqa: F811
    fn, count = FOLLOWED[name]
    a, b = data(67, 221).to(dtype), (data(221, 58, seed=1) / 8).to(dtype)
    got, eager, exact = run(fn, a, b), fn(a, b), fn(a.double(), b.double()).double()
    assert (got.double() - exact).abs().max() <= 1.1 * (eager.double() - exact).abs().max() + 1e-5
    assert kernels(compiled) == [count]
    assert dtype in {d for pair in factors(compiled) for d in pair}


@DTYPES
def test_numbers_that_are_none(dtype: torch.dtype) -> None:
    a, b = data(61, 70).to(dtype), data(70, 37, seed=1).to(dtype)
    a[0, 3], a[1, 2], a[60], b[7, 36] = torch.nan, torch.inf, 0.0, -torch.inf
    exact = (a.double() @ b.double()).to(dtype)
    torch.testing.assert_close(run(torch.mm, a, b), exact, equal_nan=True, rtol=1e-2, atol=1e-2)
    big = torch.full((9, 40), 2.0**15, dtype=dtype)
    assert torch.equal(run(torch.mm, big, big.t()).isinf(), (big.double() @ big.double().t()).to(dtype).isinf())


@DTYPES
def test_training(dtype: torch.dtype) -> None:
    """Gradients of weights are products of what lies across; all of it is kernels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 96, bias=False), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 40, bias=False))
    net.to(dtype)
    exact, x, found = copy.deepcopy(net).double(), data(48, 60).to(dtype), []
    traced = primexec.make_traced(net, executor="llvm", executor_parameters={"strict": True})
    for model, parameters, given in ((traced, net, x), (net, net, x), (exact, exact, x.double())):
        parameters.zero_grad()
        model(given).square().mean().backward()
        found.append([p.grad.clone() for p in parameters.parameters()])
    assert_as_near(*found)


@DTYPES
def test_attention_in_training(dtype: torch.dtype) -> None:
    def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(q * 2, k, v).square().sum(), (q, k, v))

    given = [data(1, 2, 300, 16, seed=i) for i in range(3)]
    short, wide = ([t.to(d).requires_grad_() for t in given] for d in (dtype, torch.float64))
    traced = primexec.make_traced(gradients, executor=BOTH)
    assert_as_near(list(traced(*short)), list(gradients(*short)), list(gradients(*wide)))
    assert "_backward" not in str(traced.explain(*short))


@torch.no_grad()
def test_autocast() -> None:
    net, x = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 32)), data(30, 64)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    traced = primexec.make_traced(step, executor=BOTH)
    assert_as_near([traced(x)], [step(x)], [copy.deepcopy(net).double()(x.double())])
    assert "on aten" not in str(traced.explain(x))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("first", [torch.float32, *SHORT], ids=str)
@pytest.mark.parametrize("second", [torch.float32, *SHORT], ids=str)
def test_what_products_share_compiles_for_every_target(name: str, first: torch.dtype, second: torch.dtype) -> None:
    if NAMED[name] is X86_64 and torch.float16 in (first, second):
        pytest.skip("no conversions of float16")
    assert engine.emit_object(matmul.shared(NAMED[name], (first, second)), NAMED[name])


def test_what_pytorch_has_code_for_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured.widened() <= HALVES
    monkeypatch.setattr(products, "widened", frozenset)
    a = data(40, 40).bfloat16()
    traced = primexec.make_traced(lambda a: a @ a + 1)
    assert torch.equal(traced(a, executor=BOTH), a @ a + 1)
    assert "a product of 16-bit numbers is the library's" in str(traced.explain(a, executor=BOTH))
