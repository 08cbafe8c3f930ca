"""The executor `llvm`: small matrix products, as kernels among others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import primexec
from primexec.executors.llvm import products
from primexec.executors.llvm.executor import Compiled
from primexec.testing import check_executor
from tests.test_llvm import BOTH, compiled, data, kernels, run  # noqa: F401
from tests.ways import compute_products_by

DTYPES = [torch.float32, torch.float64]
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (1, 64, 64),
    (17, 19, 11),
    (64, 1, 33),
    (1, 700, 90),
    (1, 90, 700),
    (130, 70, 1),
    (1, 5000, 1),
    (0, 4, 5),
    (4, 0, 5),
    (4, 5, 0),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.mT.contiguous().mT,
    "every other": lambda a: torch.stack([a, a], -1).flatten(-2)[..., ::2],
    "repeated": lambda a: a[..., :1, :].expand(a.shape),
}


def close(got: Tensor, fn: Callable[..., Tensor], *args: Tensor) -> None:
    """Within the rounding of a sum of terms as large as these."""
    exact, terms = fn(*(a.double() for a in args)), fn(*(a.double().abs() for a in args))
    assert got.dtype == args[0].dtype
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= 8 * torch.finfo(got.dtype).eps * terms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, columns = shape
    a, b = data(rows, inner, dtype=dtype), data(inner, columns, dtype=dtype, seed=1)
    close(run(torch.mm, a, b), torch.mm, a, b)
    a, b = torch.stack([a, -a]), torch.stack([b, b * 2])
    close(run(torch.bmm, a, b), torch.bmm, a, b)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_layouts(left: str, right: str) -> None:
    a, b = LAYOUTS[left](data(2, 9, 21)), LAYOUTS[right](data(2, 21, 18, seed=1))
    close(run(torch.matmul, a, b), torch.matmul, a, b)
    assert run(torch.matmul, a, b).stride() == torch.matmul(a, b).stride()


def test_numbers_that_are_none() -> None:
    a, b = data(6, 8), data(8, 5, seed=1)
    a[0, 3], a[1, 2], a[2], b[7, 4] = math.nan, math.inf, 0.0, -math.inf
    torch.testing.assert_close(run(torch.mm, a, b), torch.mm(a, b), equal_nan=True)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 1), (0.5, -2)])
def test_added_to_another(beta: float, alpha: float) -> None:
    c, a, b = data(5), data(6, 8), data(8, 5, seed=1)
    c[2] = math.nan if not beta else 1.0
    got = primexec.make_traced(torch.addmm)(c, a, b, beta=beta, alpha=alpha, executor=BOTH)
    torch.testing.assert_close(got, torch.addmm(c, a, b, beta=beta, alpha=alpha))


def test_layers_are_one_program(compiled: list[Compiled]) -> None:  # noqa: F811
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).requires_grad_(
        False
    )
    x = data(4, 6)
    got = primexec.make_traced(net, executor="llvm", executor_parameters={"strict": True})(x)
    torch.testing.assert_close(got, net(x))
    assert kernels(compiled) == [3]


@torch.no_grad()
def test_attention_of_one_query_is_one_program(compiled: list[Compiled]) -> None:  # noqa: F811
    q, k, v = data(2, 3, 1, 16), data(2, 3, 50, 16, seed=1), data(2, 3, 50, 16, seed=2)
    mask = data(1, 50, seed=3) > -1
    got = run(lambda *a: F.scaled_dot_product_attention(*a[:3], attn_mask=a[3]), q, k, v, mask)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-6)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("queries", "keys", "whole"), [(64, 64, False), (255, 257, False), (256, 256, True), (64, 1024, True)]
)
def test_attention_of_many_scores_is_pytorchs(
    queries: int, keys: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_products_by("kernel", monkeypatch)
    given = tuple(torch.randn(1, 2, n, 8, requires_grad=True) for n in (queries, keys, keys))

    def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(q * 2, k, v).square().sum(), (q, k, v))

    traced = primexec.make_traced(gradients, executor=BOTH)
    torch.testing.assert_close(traced(*given), gradients(*given), rtol=1e-3, atol=1e-4)
    shown = str(traced.explain(*given))
    assert shown.count("1 aten._scaled_dot_product_flash_attention_for_cpu") == 2 * whole  # and its backward pass


@torch.no_grad()
def test_attention_among_large_scores_rounds_as_eager_does() -> None:
    """One draw tells nothing: exponentials of scores around 70 blow up what their products round."""
    traced, errors = primexec.make_traced(F.scaled_dot_product_attention, executor=BOTH), []
    for seed in range(60):
        q, k, v = (5 * data(4, n, 8, seed=3 * seed + i) for i, n in enumerate((3, 6, 6)))
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        found = (F.scaled_dot_product_attention(q, k, v), traced(q, k, v))
        errors.append([(t - exact).abs().max().item() for t in found])
    eager, ours = torch.tensor(errors).mean(0)
    assert ours < 1.5 * eager


def _jacobi(a: Tensor, b: Tensor) -> Tensor:
    d, x = a.diagonal(), torch.zeros_like(b)
    for _ in range(6):
        x = (b - (a - torch.diag(d)) @ x) / d
    return x


def _symmetric(a: Tensor, v: Tensor) -> Tensor:
    m = (a + a.T) / 40
    for _ in range(6):
        v = m @ v
    return v


def _markov(a: Tensor, v: Tensor) -> Tensor:
    a = a.abs()
    p = a / a.sum(1, keepdim=True)
    for _ in range(6):
        v = v @ p
    return v


@pytest.mark.parametrize("fn", [_jacobi, _symmetric, _markov])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_that_several_products_read_is_made_once(
    fn: Callable[[Tensor, Tensor], Tensor],
    layout: str,
    compiled: list[Compiled],  # noqa: F811
) -> None:
    a, b = LAYOUTS[layout](data(40, 40) + 40 * torch.eye(40)), data(40, seed=1)
    torch.testing.assert_close(run(fn, a, b), fn(a.double(), b.double()).float())
    copied = fn is _jacobi and layout in ("transposed", "repeated")  # to read its diagonal
    assert [b.shape for b in compiled[0].schedule.buffers if b.kind == "arena"].count((40, 40)) == 1 + copied


def test_what_products_read_a_part_of_each_is_not_made_for_them(compiled: list[Compiled]) -> None:  # noqa: F811
    def recurrent(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
        inputs = x * 2 - 1
        for i in range(8):
            h = torch.tanh(w @ h + w @ inputs[i])
        return h

    x, w, h = data(8, 60), data(60, 60, seed=1) / 8, data(60, seed=2)
    torch.testing.assert_close(run(recurrent, x, w, h), recurrent(x.double(), w.double(), h.double()).float())
    assert (8, 60) not in [b.shape for b in compiled[0].schedule.buffers if b.kind == "arena"]


def test_training() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    exact = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    exact.load_state_dict(net.state_dict())
    traced, x = primexec.make_traced(net, executor="llvm", executor_parameters={"strict": True}), data(4, 6)
    for model, given in ((traced, x), (exact, x.double())):
        F.cross_entropy(model(given), torch.tensor([0, 1, 2, 1])).backward()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "reason"),
    [(data(32, 32), "ATen was measured to be faster"), (data(8, 8, dtype=torch.bfloat16), "is the library's")],
    ids=["large", "bfloat16"],
)
def test_other_products_are_the_library_s(a: Tensor, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("ATen", monkeypatch)
    monkeypatch.setattr(products, "widened", frozenset)
    traced = primexec.make_traced(lambda a: a @ a + 1)
    assert torch.equal(traced(a, executor=BOTH), a @ a + 1)
    assert reason in str(traced.explain(a, executor=BOTH))


def test_operands_that_are_one_of_several_results() -> None:
    traced, a = primexec.make_traced(lambda a, b: a.sort(1)[0] @ b.chunk(2, 1)[1]), data(160, 160)
    torch.testing.assert_close(traced(a, a, executor=BOTH), a.sort(1)[0] @ a.chunk(2, 1)[1])


def test_conformance() -> None:
    assert not check_executor("llvm", names=["aten.mm.default", "aten.bmm.default"], random_programs=0).findings
