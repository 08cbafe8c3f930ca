"""What Python decides by numbers that keep changing: a program for each way, not for each number."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import RetraceWarning, make_traced
from tests.test_varying import FIRST, X, same
from tests.test_varying_state import scheduled


def branches(x: Tensor, a: float) -> Tensor:
    return x + a if a > 0.35 else x - a


def bounded(x: Tensor, a: float) -> Tensor:
    return x * max(0.25, min(a, 0.75))


def nested(x: Tensor, a: float) -> Tensor:
    if 0.2 <= a * 2 + 0.1 < 0.9 and a != 0.5:
        x = x / a
    return x if abs(a - 1) > 0.5 else -x


def phases(x: Tensor, a: float) -> Tensor:
    for i in range(4):
        if i / 4 <= a < (i + 1) / 4:
            return x + i
    raise AssertionError


def truth(x: Tensor, a: float) -> Tensor:
    return x * a if a else x


def among(x: Tensor, a: float) -> Tensor:
    return x if a in (0.25, 0.5) else x * a


def with_values(x: Tensor, a: float) -> Tensor:
    return x * a if x.sum().item() > a else x - a


STEPS = [i / 16 for i in range(16)]
WAYS = {branches: 2, bounded: 3, nested: 4, phases: 4, truth: 2, among: 3, with_values: 1}


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", WAYS, ids=lambda f: f.__name__)
def test_arguments(fn: Callable[..., Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for a in STEPS * 2:
        same(traced(X, a), fn(X, a), executor == "aten")
    assert traced.cache_info().traces <= FIRST - 1 + WAYS[fn]
    before = traced.cache_info().traces
    for a in STEPS:
        same(traced(X, a + 0.01), fn(X, a + 0.01), executor == "aten")
    assert traced.cache_info().traces <= before + 1


def test_integers() -> None:
    def fn(x: Tensor, step: int) -> Tensor:
        if step % 3 == 0:
            x = x * step
        return x + step // 2 if step > 10 else x

    traced = make_traced(fn)
    for step in range(40):
        same(traced(X, step), fn(X, step), False)
    assert traced.cache_info().traces <= 3 + 4


def periodic(x: Tensor, n: int) -> Tensor:
    for i in range(n % 3):
        x = x + i
    return [x, x * 2][n // 100] * n


def divided(x: Tensor, n: int) -> Tensor:
    quotient, remainder = divmod(n, 3)
    return x * quotient + remainder + divmod(7, n + 1)[1]


@pytest.mark.parametrize(("fn", "ways"), [(periodic, 3), (divided, 1)])
def test_remainders(fn: Callable[..., Any], ways: int) -> None:
    traced = make_traced(fn)
    for n in range(30):
        same(traced(X, n), fn(X, n), False)
    assert traced.cache_info().traces == FIRST - 1 + ways
    with pytest.raises(TypeError, match="divmod"):
        make_traced(lambda x: divmod(x.sum().item(), "a"))(X)


def test_a_division_that_fails() -> None:
    def fn(x: Tensor, a: float) -> Tensor:
        try:
            return x if 1 / a > 2 else x * a
        except ZeroDivisionError:
            return -x

    traced = make_traced(fn)
    for a in [0.1, 0.2, 0.3, 0.4, 0.7, 0.0, 0.8, 0.0]:
        same(traced(X, a), fn(X, a), False)
    assert traced.cache_info().traces == 6


class Warm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        self.calls += 1
        return (x * self.calls if self.calls > 2 else -x), self.calls


def test_a_counter_that_decides() -> None:
    model, eager = Warm(), Warm()
    traced = make_traced(model)
    for _ in range(6):
        same(traced(X), eager(X), False)
        assert model.calls == eager.calls
    assert traced.cache_info().traces == 2


def test_what_keeps_deciding_is_named() -> None:
    def fn(x: Tensor, a: float) -> Tensor:
        for i in range(100):
            if a < i:
                return x * i
        return x

    traced = make_traced(fn)
    for i in range(7):
        same(traced(X, i + 0.5), fn(X, i + 0.5), False)
    assert traced.cache_info().traces == 7
    traced(X, 7.5)
    with pytest.warns(RetraceWarning, match=r"what .*if a < i.* decides"):
        traced(X, 8.5)
    assert "decided at every call: True in test_conditions.py" in str(traced.explain(X, 3.5))


class Held:
    def __init__(self) -> None:
        self.betas: tuple[Any, ...] = (0.5, 2)

    def __call__(self, x: Tensor) -> Tensor:
        first, second = self.betas
        return x * first + second


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_tuples() -> None:
    held, eager = Held(), Held()
    traced = make_traced(held)
    values: list[tuple[Any, ...]] = [(i / 4, 2) for i in range(6)] + [(0.5, 7), (0.7, 9)]
    for i, value in enumerate(values):
        held.betas = eager.betas = value
        same(traced(X), eager(X), False)
        assert held.betas is value
        assert traced.cache_info().traces == min(i + 1, FIRST)
    others: list[tuple[Any, ...]] = [(1, 2), (0.5, 2.0), (float("inf"), 2), (True, 3)]
    for i, value in enumerate(others):
        held.betas = eager.betas = value
        same(traced(X), eager(X), False)
        assert traced.cache_info().traces == FIRST + i + 1
    for wrong in [(0.5,), (0.5, 2, 3)]:
        held.betas = wrong
        with pytest.raises(ValueError, match="unpack"):
            traced(X)


def test_tuples_in_dicts_that_change_together() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.betas, self.config = (0.5, 0.25), {"shift": (1, 2), "name": "a"}

        def forward(self, x: Tensor) -> Tensor:
            assert 0 < self.betas[0] < 10
            shift = self.config["shift"]
            assert isinstance(shift, tuple)
            return x * self.betas[0] - self.betas[1] + shift[0] * shift[1]

    model = Configured()
    traced = make_traced(model)
    for i in range(8):
        model.betas, model.config["shift"] = (0.5 + i, 0.25), (i, 2 + i)
        same(traced(X), model(X), False)
    assert traced.cache_info().traces == FIRST


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.window = (0, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        start, width = self.window
        self.window = start + 1, width / 2
        return x * width - start


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_tuples_that_every_call_changes(executor: str) -> None:
    model, eager = Moving(), Moving()
    traced = make_traced(model, executor=executor)
    for _ in range(6):
        same(traced(X), eager(X), executor == "aten")
        assert model.window == eager.window
        assert list(map(type, model.window)) == [int, float]
    assert traced.cache_info().traces == 1


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
}


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_that_changes_momentum(name: str, executor: str) -> None:
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    optimizers = scheduled(OPTIMIZERS[name], lambda o: one_cycle(o, max_lr=0.2, total_steps=20), executor)
    groups = [copy.copy(o.param_groups[0]) for o in optimizers]
    assert all(g.pop("params") for g in groups)
    assert groups[0] == groups[1]
