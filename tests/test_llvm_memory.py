"""Memory over many calls, counted to the byte: torch's allocator, the pool and the arenas."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import primexec
from primexec.executors.llvm import pool

CALLS = 200
WIDTH = 1 << 10  # so that intermediates of WIDTH rows come from the pool


class Net(nn.Module):
    """Products, kernels, and intermediates in the arena."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(self.up(x).sin(), -1)
        return self.down(y * (y.cumsum(0) - y.mean(0))).exp()


def infer(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        run(x)


def train(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x).square().mean().backward()


def fail(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward pass whose results are dropped, and a call that raises."""
    run(x)
    with pytest.raises(TypeError):
        run(x, x)  # type: ignore[call-arg]


def allocated(function: Callable[[], None]) -> int:
    """Bytes that torch's allocator gave out and did not get back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events: Any = found.key_averages()
    return sum(e.self_cpu_memory_usage for e in events)


def arenas() -> Counter[int]:
    return Counter(block.numel() for block in pool.arenas._free)


def test_what_is_kept_is_counted() -> None:
    kept: list[Tensor] = []
    assert allocated(lambda: kept.append(torch.empty(100))) == 400
    assert allocated(kept.clear) == -400


@pytest.mark.parametrize("rows", [8, WIDTH], ids=["small", "pooled"])
@pytest.mark.parametrize("use", [infer, train, fail], ids=lambda f: f.__name__)
def test_calls_leave_memory_where_it_was(use: Callable[..., None], rows: int) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(rows, 16)
    traced = primexec.make_traced(net, executor=("llvm", "aten"))

    def calls() -> None:
        for _ in range(CALLS):
            net.zero_grad()
            use(traced, x)
        net.zero_grad()
        gc.collect()

    primexec.empty_cache()
    use(traced, x)
    use(traced, x)
    net.zero_grad()
    before = pool.outputs.nbytes, arenas()
    assert allocated(calls) == 0
    assert (pool.outputs.nbytes, arenas()) == before
    large = before[0] + sum(nbytes for nbytes in before[1] if nbytes >= pool.SMALLEST)
    assert (rows == WIDTH and use is infer) == (large > 0)  # steps of training keep nothing
