"""Intermediates that are not needed at the same time share their places, in the arena and in results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import primexec
from benchmarks.memory import peak
from primexec.executors.llvm import arena, pool
from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled, data, run  # noqa: F401
from tests.ways import compute_products_by

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


def repeated(x: Tensor) -> Tensor:
    return stages(x) * torch.arange(20.0, dtype=x.dtype)[:, None, None]


def repeated_twice(x: Tensor) -> Any:
    first = stages(x)
    return repeated(x), stages(first.t())[None] - repeated(first)


FUNCTIONS = [stages, held_to_the_end, written_at_places, repeated, repeated_twice]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_places(fn: Callable[[Tensor], Any], compiled: list[Compiled]) -> None:  # noqa: F811
    x = data(N, N)
    got, want = run(fn, x), fn(x.double())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, check_dtype=False)
    (made,) = compiled
    schedule = made.schedule
    offsets, size = arena.slots(schedule)
    numbers = [i for i, b in enumerate(schedule.buffers) if b.kind == "arena"]
    inside = {i: (schedule.places[i], start) for i, start in schedule.starts.items()}
    assert bool(inside) == fn.__name__.startswith("repeated")
    places = {**{i: (-1, o) for i, o in zip(numbers, offsets, strict=True)}, **inside}
    places |= {i: (i, 0) for i, b in enumerate(schedule.buffers) if b.kind == "output"}
    lives = {i: [k for k, kernel in enumerate(schedule.kernels) if i in arena.touched(kernel)] for i in places}
    for a, b in combinations(places, 2):
        apart = _end(made, a, places) <= places[b] or _end(made, b, places) <= places[a]
        assert apart or max(lives[a]) < min(lives[b]) or max(lives[b]) < min(lives[a])
    for i, (where, start) in places.items():
        assert start % pool.ALIGNMENT == 0
        assert _end(made, i, places)[1] <= (size if where < 0 else _nbytes(made, where))


def _end(made: Compiled, number: int, places: dict[int, tuple[int, int]]) -> tuple[int, int]:
    where, start = places[number]
    return where, start + _nbytes(made, number)


def _nbytes(made: Compiled, number: int) -> int:
    b = made.schedule.buffers[number]
    return b.dtype.itemsize * torch.Size(b.shape).numel()


def test_a_chain_needs_two_places(compiled: list[Compiled]) -> None:  # noqa: F811
    run(stages, data(N, N))
    (made,) = compiled
    images = [i for i, b in enumerate(made.schedule.buffers) if b.kind == "arena" and b.shape == (N, N)]
    assert len(images) > 3
    assert arena.slots(made.schedule)[1] < 3 * 4 * N * N


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_intermediates_that_are_written_over_are_found(
    fn: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena._Block, "gap", lambda *_: 0)
    with pytest.raises(primexec.errors.ExecutorError, match=r"b\d+ is written over before k\w+ reads it"):
        run(fn, data(N, N))


def test_loops_tell_where_intermediates_lie(compiled: list[Compiled]) -> None:  # noqa: F811
    run(repeated, data(N, N))
    (made,) = compiled
    shown = str(made.schedule).splitlines()
    (result,) = (i for i, b in enumerate(made.schedule.buffers) if b.kind == "output")
    assert shown[result].startswith(f"b{result}: output float32")
    for i, start in made.schedule.starts.items():
        assert shown[i].startswith(
            f"b{i}: in b{result} from byte {start} float32" if start else f"b{i}: in b{result} float32"
        )
    assert any(made.schedule.starts.values())


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


class Words(nn.Module):
    """Layers, and scores of many words at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(50, 256)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in "abcd")
        )
        self.words = nn.Linear(256, 4096)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(self.layers(self.first(x)))


def test_the_memory_of_layers_is_that_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("kernel", monkeypatch)
    torch.manual_seed(0)
    model, x = Words(), torch.randint(50, (64,))
    traced = primexec.make_traced(model)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
        traced(x)
        primexec.empty_cache()
        assert peak(lambda: traced(x)) < 4 * 64 * (4096 + 2 * 256) + 4096
