"""Intermediates that are not needed at the same time share their places in the arena."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec.executors.llvm import arena, pool
from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled, data, run  # noqa: F401

N = 96


def stages(x: Tensor) -> Tensor:
    for dim in (0, 1, 0, 1, 0, 1, 0):
        x = x.softmax(dim)
    return x


def held_to_the_end(x: Tensor) -> Any:
    first = x.exp().cumsum(0)
    second = first.softmax(1).cumsum(1)
    return second.softmax(0) + first / first.sum()


def written_at_places(x: Tensor) -> Any:
    places = torch.arange(N).flip(0)[:, None].expand(N, N)
    made = x.softmax(0).scatter(0, places, x.softmax(1))
    return made.cumsum(1).softmax(0)


@pytest.mark.parametrize("fn", [stages, held_to_the_end, written_at_places], ids=lambda f: f.__name__)
def test_places(fn: Callable[[Tensor], Tensor], compiled: list[Compiled]) -> None:  # noqa: F811
    x = data(N, N)
    torch.testing.assert_close(run(fn, x).double(), fn(x.double()), rtol=1e-5, atol=1e-7)
    (made,) = compiled
    schedule = made.schedule
    offsets, size = arena.slots(schedule)
    numbers = [i for i, b in enumerate(schedule.buffers) if b.kind == "arena"]
    kept = {i: (o, o + _nbytes(made, i)) for i, o in zip(numbers, offsets, strict=True)}
    lives = {i: [k for k, kernel in enumerate(schedule.kernels) if i in arena.touched(kernel)] for i in numbers}
    for a, b in combinations(numbers, 2):
        apart = kept[a][1] <= kept[b][0] or kept[b][1] <= kept[a][0]
        assert apart or max(lives[a]) < min(lives[b]) or max(lives[b]) < min(lives[a])
    assert all(o % pool.ALIGNMENT == 0 and end <= size for o, end in kept.values())


def _nbytes(made: Compiled, number: int) -> int:
    b = made.schedule.buffers[number]
    return b.dtype.itemsize * torch.Size(b.shape).numel()


def test_a_chain_needs_two_places(compiled: list[Compiled]) -> None:  # noqa: F811
    run(stages, data(N, N))
    (made,) = compiled
    images = [i for i, b in enumerate(made.schedule.buffers) if b.kind == "arena" and b.shape == (N, N)]
    assert len(images) > 3
    assert arena.slots(made.schedule)[1] < 3 * 4 * N * N


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 100_000, 6_422_528, (1 << 30) + 1])
def test_blocks_are_little_larger_than_what_is_asked_for(nbytes: int) -> None:
    assert nbytes <= pool.rounded(nbytes) <= max(4096, 1.25 * nbytes + 4096)
    assert pool.rounded(pool.rounded(nbytes)) == pool.rounded(nbytes)


def test_programs_that_run_one_after_another_share_a_block() -> None:
    own = pool.Arenas()
    for nbytes in (10_000, 100, 50_000, 20_000, 50_000):
        block = own.take(nbytes)
        assert block.numel() >= nbytes
        assert block.data_ptr() % pool.ALIGNMENT == 0
        own.give_back(block)
    assert [b.numel() for b in own._free] == [pool.rounded(50_000)]
    first, second = own.take(50_000), own.take(1)
    assert first.data_ptr() != second.data_ptr()
    own.give_back(second)
    own.give_back(first)
    assert own.take(50_000) is first
    own.clear()
    assert not own._free
