"""Equal kernels of whatever regions are compiled once; each runs on its own memory, and reports its own indices."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec
from primexec.executors.llvm import codes
from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm.executor import Compiled
from primexec.executors.llvm.layout import GRAIN

BOTH = ("llvm", "aten")
ROWS = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels are written for each region that is compiled during the test."""
    made: list[int] = []
    lower = llvm.lower

    def spy(*args: Any) -> Compiled:
        compiled = lower(*args)
        made.append(len(compiled.codes))
        return compiled

    monkeypatch.setattr(llvm, "lower", spy)
    return made


def filtered(z: Tensor) -> Tensor:
    """Steps cut by an operator of ATen, each of which reads its own part of `z`."""
    s = torch.eye(8)
    for t in range(len(z)):
        s = torch.linalg.inv(s + torch.sigmoid(z[t].t() @ z[t])) + torch.eye(8)
    return s


def recurrent(z: Tensor) -> Tensor:
    """Steps of one region, which reduce, and read what lies backwards."""
    s = z[0]
    for t in range(1, len(z)):
        s = torch.softmax(s + z[t].flip(0), -1).cumsum(-1)
    return s


@pytest.mark.parametrize("fn", [filtered, recurrent], ids=lambda fn: fn.__name__)
def test_steps_of_a_loop_share_their_code(fn: Callable[..., Tensor], written: list[int]) -> None:
    found = []
    for steps in (6, 12):
        codes._known.clear()
        written.clear()
        z = ROWS[:steps]
        torch.testing.assert_close(primexec.make_traced(fn)(z, executor=BOTH), fn(z))
        found.append(sum(written))
    assert found[0] == found[1]


def test_each_reads_and_writes_its_own_memory(written: list[int]) -> None:
    def fn(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(z[t].t().exp().sum(0) * z[t, 1:].flip(1).amax() for t in range(len(z)))

    for got, expected in zip(primexec.make_traced(fn)(ROWS, executor=BOTH), fn(ROWS), strict=True):
        torch.testing.assert_close(got, expected)


def test_equal_kernels_of_other_programs(written: list[int]) -> None:
    first = primexec.make_traced(lambda x: torch.softmax(x, -1))
    second = primexec.make_traced(lambda x: (torch.softmax(x[2], -1), x[0] + 1))
    x = ROWS[0]
    torch.testing.assert_close(first(x, executor=BOTH), torch.softmax(x, -1))
    torch.testing.assert_close(second(ROWS, executor=BOTH), (torch.softmax(ROWS[2], -1), ROWS[0] + 1))
    assert written == [1, 1]
    del first  # the code that it was first to need stays
    gc.collect()
    torch.testing.assert_close(second(ROWS, executor=BOTH), (torch.softmax(ROWS[2], -1), ROWS[0] + 1))


def test_code_goes_with_its_last_user(written: list[int]) -> None:
    traced = primexec.make_traced(lambda x: torch.softmax(x, -1) + 3)
    traced(ROWS[0], executor=BOTH)
    assert len(codes._known) == 1
    del traced
    gc.collect()
    assert not codes._known


def test_other_numbers_are_other_kernels(written: list[int]) -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return x[0].sum(0) + 1.0, x[1].sum(0) + 2.0, x[2].sum(0) + 0.0, x[3].sum(0) + -0.0

    for got, expected in zip(primexec.make_traced(fn)(ROWS, executor=BOTH), fn(ROWS), strict=True):
        torch.testing.assert_close(got, expected)


def test_each_reports_its_own_index(written: list[int]) -> None:
    def fn(x: Tensor, i: Tensor) -> Tensor:
        s = x[0].sum(0)
        for t in range(4):
            s = torch.softmax(s, 0) + x[t].gather(0, i[t][None])[0]
        return s

    traced = primexec.make_traced(fn)
    i = torch.arange(32).reshape(4, 8) % 5
    torch.testing.assert_close(traced(ROWS, i, executor=BOTH), fn(ROWS, i))
    for t in range(4):
        bad = i.clone()
        bad[t, 3] = 77 + t
        with pytest.raises(primexec.errors.IndexOutOfRangeError, match=f"index {77 + t} is out of bounds"):
            traced(ROWS, bad, executor=BOTH)
    assert written == [len(codes._known)]


def test_large_outputs_count_from_their_start(written: list[int]) -> None:
    """Code that writes around the caches relies on where buffers begin."""
    rows = llvm.STREAM_BYTES // 4 // GRAIN

    def fn(x: Tensor) -> Tensor:
        return torch.cat([x + 1, x * 2], 1)

    x = torch.randn(rows, GRAIN // 2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(primexec.make_traced(fn)(x, executor=BOTH), fn(x))
