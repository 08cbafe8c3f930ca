"""Random programs that decide by values between writes, draws and views: eager's results, arguments and states."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced

State = list[Tensor]


def larger(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    if s[i].sum() > s[j].sum():
        s[j] = s[j] + 1
    else:
        s[i].sub_(p)


def peak(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    if s[i].max().item() > 3 * p:
        s[j].add_(0.25)


def halved(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    rounds = 0
    while s[i].abs().max() > 2 + p and rounds < 6:
        s[i], rounds = s[i] / 2, rounds + 1


def masked(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    mask = s[i] < -p
    if mask.any():
        s[i][mask] = 0


def counted(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    s[i] = s[i] * int((s[j] > 1).sum(0).max()) + 1


def chosen_rows(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    rows = s[i][s[i][:, 0] > p]
    if rows.numel() > 3:
        s[j] = s[j] + rows.sum(0)


def added(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    s[i] = s[i] + s[j] * p


def written(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    s[i].mul_(0.5 + p)
    s[j][0].add_(p)


def dropped(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    s[i] = nn.functional.dropout(s[i], p / 2)


def drawn(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    s[i].add_(torch.rand(3) + torch.rand(4, 3, generator=generator))


def swapped(s: State, i: int, j: int, p: float, generator: torch.Generator) -> None:
    s[i], s[j] = s[j], s[i]


STEPS: list[Callable[..., None]] = [
    larger, peak, halved, masked, counted, chosen_rows, added, written, dropped, drawn, swapped,
]  # fmt: skip


def program(seed: int) -> Callable[..., State]:
    choose = random.Random(seed)
    steps = tuple(
        (choose.choice(STEPS), choose.randrange(3), choose.randrange(3), choose.random())
        for _ in range(choose.randint(3, 7))
    )

    def run(x: Tensor, y: Tensor, z: Tensor, generator: torch.Generator) -> State:
        state = [x, y, z]
        for step, i, j, p in steps:
            step(state, i, j, p, generator)
        return state

    return run


@pytest.mark.parametrize("seed", range(12))
def test_same_as_eager(seed: int) -> None:
    fn = program(seed)
    traced = make_traced(fn, executor="aten")
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for call in range(5):
        values = torch.Generator().manual_seed(10 * seed + call)
        given = torch.randn(3, 4, 3, generator=values) * (1 + call % 3)
        seen: list[Any] = []
        for run, generator in zip((fn, traced), generators, strict=True):
            arguments = list(given.clone())
            if seed % 4 == 0:
                arguments[1] = arguments[0][:]
            torch.manual_seed(call)
            results = run(*arguments, generator)
            seen.append([*results, *arguments, torch.get_rng_state(), generator.get_state()])
        assert all(map(torch.equal, *seen)), call
    assert traced.cache_info().hits + traced.cache_info().misses == 5
