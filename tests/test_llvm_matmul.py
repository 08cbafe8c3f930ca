"""The executor `llvm`: large matrix products as kernels, with what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import primexec
from primexec.executors.llvm import engine, matmul
from primexec.executors.llvm.contraction import contraction
from primexec.executors.llvm.executor import Compiled
from primexec.executors.llvm.target import NAMED
from tests.test_llvm import BOTH, compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_products import LAYOUTS, close
from tests.ways import compute_products_by


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("kernel", monkeypatch)


def products(compiled: list[Compiled]) -> int:  # noqa: F811
    return sum(contraction(k) is not None for c in compiled for k in c.schedule.kernels)


SIZES = st.integers(8, 24) | st.integers(25, 420)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.integers(0, 3))
def test_products(rows: int, inner: int, columns: int, left: bool, right: bool, batch: int) -> None:
    lead = (batch,) * bool(batch)
    a = data(*lead, inner, rows).mT if left else data(*lead, rows, inner)
    b = data(*lead, columns, inner, seed=1).mT if right else data(*lead, inner, columns, seed=1)
    close(run(torch.matmul, a, b), torch.matmul, a, b)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_layouts(left: str, right: str, compiled: list[Compiled]) -> None:  # noqa: F811
    a, b = LAYOUTS[left](data(2, 39, 221)), LAYOUTS[right](data(2, 221, 58, seed=1))
    repeated = "repeated" in (left, right)
    close(
        primexec.make_traced(torch.matmul)(a, b, executor=BOTH) if repeated else run(torch.matmul, a, b),
        torch.matmul,
        a,
        b,
    )
    assert products(compiled) == (not repeated)


def test_numbers_that_are_none() -> None:
    """What belongs to a row and a column stays there, in tiles at the edges too."""
    a, b = data(61, 70), data(70, 37, seed=1)
    a[0, 3], a[1, 2], a[60], b[7, 36] = math.nan, math.inf, 0.0, -math.inf
    torch.testing.assert_close(run(torch.mm, a, b), torch.mm(a, b), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_the_rounding_is_that_of_pieces() -> None:
    """A sum of 20,000 terms: of pieces, not one after another."""
    a, b = torch.rand(16, 20000), torch.rand(20000, 16)
    exact = a.double() @ b.double()
    assert float((run(torch.mm, a, b) - exact).abs().max() / exact.max()) < 1.5e-6


C = data(58, seed=2)
FOLLOWED: dict[str, tuple[Callable[..., Any], int]] = {
    "a bias": (lambda a, b: a @ b + C.to(a.dtype), 1),
    "an activation": (lambda a, b: F.gelu(F.linear(a, b.mT, C.to(a.dtype))), 1),
    "a residual": (lambda a, b: (a @ b).tanh() + a[:, :58] * 2, 1),
    "several results": (lambda a, b: (a @ b, torch.relu(a @ b)), 1),
    "what is made before": (lambda a, b: (a * 2 + 1) @ b.sigmoid(), 3),
    "one after another": (lambda a, b: torch.tanh(a @ b) @ b.mT + 1, 2),
    "two of the same factor": (lambda a, b: (a @ b, a @ (b * 2)), 3),
    "rows": (lambda a, b: torch.softmax(a @ b, -1), 2),
    "columns": (lambda a, b: (a @ b + C.to(a.dtype)).sum(0), 2),
    "turned": (lambda a, b: (a @ b).t().contiguous() + 1, 2),
    "a mask": (lambda a, b: torch.where(a[:, :58] > 0, a @ b, 0.0), 1),
    "a square": (lambda a, b: a.t() @ a, 1),
    "half precision": (lambda a, b: (a @ b).bfloat16(), 1),
    "a part": (lambda a, b: a[3:, 7:200] @ b[7:200, :40] * 3, 1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_is_the_same_kernel(name: str, compiled: list[Compiled]) -> None:  # noqa: F811
    fn, count = FOLLOWED[name]
    a, b = data(67, 221), data(221, 58, seed=1) / 8
    for mine, exact in zip(tree_leaves(run(fn, a, b)), tree_leaves(fn(a.double(), b.double())), strict=True):
        tolerance = 1e-2 if mine.dtype is torch.bfloat16 else 2e-5
        torch.testing.assert_close(mine.double(), exact.double(), rtol=tolerance, atol=tolerance * 10)
    assert kernels(compiled) == [count]


def test_over_a_donated_operand() -> None:
    """Sums of pieces are not kept where what is added to them still lies."""
    w, v = data(300, 300) / 16, data(300, 300, seed=1) / 16

    def residual(x: Tensor) -> Tensor:
        y = torch.conv1d(x.view(1, 300, 300), w.view(300, 300, 1)).view(300, 300)
        return torch.tanh(y) @ v + y

    x = data(300, 300, seed=2)
    torch.testing.assert_close(primexec.make_traced(residual)(x, executor=BOTH), residual(x), rtol=1e-4, atol=1e-4)


def test_training() -> None:
    net = nn.Sequential(nn.Linear(60, 96), nn.GELU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40))
    exact = nn.Sequential(nn.Linear(60, 96), nn.GELU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40)).double()
    exact.load_state_dict(net.state_dict())
    traced, x = primexec.make_traced(net, executor="llvm", executor_parameters={"strict": True}), data(48, 60)
    for model, given_ in ((traced, x), (exact, x.double())):
        model(given_).square().sum().backward()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-4, atol=1e-5)


def test_one_thread_and_many_agree() -> None:
    a, b = data(130, 500), data(500, 300, seed=1)
    many, count = run(torch.mm, a, b), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(run(torch.mm, a, b), many)
    finally:
        torch.set_num_threads(count)


def test_sums_of_products_are_products(compiled: list[Compiled]) -> None:  # noqa: F811
    a, b = data(40, 50), data(60, 50, seed=1)
    got = run(lambda a, b: (a[:, None] * b[None]).sum(-1), a, b)
    torch.testing.assert_close(got, (a.double() @ b.double().t()).float())
    assert products(compiled) == 1


@pytest.mark.parametrize("name", NAMED)
def test_what_products_share_compiles_for_every_target(name: str) -> None:
    assert engine.emit_object(matmul.shared(NAMED[name]), NAMED[name])


def test_it_is_measured_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    traced, a, b = primexec.make_traced(torch.mm), data(64, 128), data(128, 96, seed=1)
    close(traced(a, b, executor=BOTH), torch.mm, a, b)
    told = str(traced.explain(a, b, executor=BOTH))
    assert "kernel k0_mul_sum" in told or "was measured to be faster than a kernel" in told
