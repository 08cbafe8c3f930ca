"""Draws of 0 or 1 in vectors: PyTorch's numbers, and PyTorch's state behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import primexec
from primexec.executors.llvm import engine, twister
from tests.test_llvm_targets import TARGETS

LLVM = "llvm", "aten"
ROWS = twister.SMALLEST // 64


@given(
    count=st.integers(1, 2000),
    p=st.sampled_from([0.0, 1.0, 0.5, 1 / 3, 1e-12, 1 - 2.0**-53]) | st.floats(0, 1),
    words=st.integers(0, 1300),
    dtype=st.sampled_from(twister.DTYPES),
    one=st.sampled_from([1.0, 1 / 0.9, 2.0]),
)
def test_numbers_and_state(count: int, p: float, words: int, dtype: torch.dtype, one: float) -> None:
    """One that draws numbers of 53 bits, as the oracle does on all processors, and compares them."""
    ours, theirs = (torch.Generator().manual_seed(count) for _ in range(2))
    for generator in (ours, theirs):
        torch.rand(words, generator=generator)
    made = torch.full((count,), 7, dtype=dtype)
    twister.fill(made, p, ours, one)
    assert torch.equal(
        made, (torch.rand(count, dtype=torch.float64, generator=theirs) < p).to(dtype) * torch.tensor(one, dtype=dtype)
    )
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("itemsize", twister.INTEGERS)
@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str, itemsize: int) -> None:
    engine.verify(twister.text(TARGETS[name], itemsize))


class Net(nn.Module):
    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.first, self.p, self.last = nn.Linear(width, width), p, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), self.p)
        return self.last(F.dropout(F.gelu(x).t(), 0.25).t())


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return [x, *(p.grad for p in net.parameters() if p.grad is not None), torch.rand(3)]


@pytest.mark.parametrize("whole", [False, True], ids=["module", "step"])
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("rows", [3, ROWS, ROWS + 1])
@pytest.mark.parametrize("is_pytorchs", [False, True])
def test_dropout(rows: int, p: float, whole: bool, is_pytorchs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_pytorchs and not twister.is_pytorchs():
        pytest.skip("PyTorch draws with MKL on this processor")
    monkeypatch.setattr(twister, "is_pytorchs", lambda: is_pytorchs)
    torch.manual_seed(0)
    net, x = Net(64, p), torch.randn(rows, 64)
    traced = primexec.make_traced((lambda x: step(net, x)) if whole else net, executor=LLVM)
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = step(net, x)
        torch.manual_seed(seed)
        torch.testing.assert_close(traced(x) if whole else step(traced, x), wanted, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    drawn = str(traced.explain(x)).count(" primexec.bernoulli")
    assert bool(drawn) == (is_pytorchs and rows >= ROWS)
    assert traced.cache_info().misses == 1


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits(dtype: torch.dtype, p: float) -> None:
    x = torch.randn(ROWS, 64).to(dtype)
    traced = primexec.make_traced(lambda x: F.dropout(x, p), executor=LLVM)
    torch.manual_seed(1)
    wanted = F.dropout(x, p)
    torch.manual_seed(1)
    assert torch.equal(traced(x), wanted)


def test_numbers_of_several_draws_differ() -> None:
    traced = primexec.make_traced(lambda x: (F.dropout(x), F.dropout(x)), executor=LLVM)
    x = torch.ones(ROWS, 64)
    assert len({tuple(t.flatten().tolist()) for _ in range(2) for t in traced(x)}) == 4
