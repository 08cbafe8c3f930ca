"""Floats that Python's and NumPy's shared generators give: drawn anew at every call, as eager draws them."""

import contextlib
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced
from primexec.draws import recorded
from tests.test_varying import same

PLAIN = random.random


def seeded(fn: Callable[..., Any], seed: int, *args: Any) -> tuple[Any, ...]:
    """What two calls return, and the states of all generators afterwards."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    results = [fn(*args), fn(*args)]
    numpy_state: Any = np.random.get_state()
    return results, random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def scaled(x: Tensor) -> Any:
    p = random.random()
    return x * p, random.uniform(2, 5) + np.random.rand(), np.random.uniform(-1, 1.5) * x + np.random.random()


def unused(x: Tensor) -> Tensor:
    for _ in range(3):
        p = random.uniform(a=0, b=1)
        x = torch.tanh(x) if p >= 0 or x is None else x
        np.random.random_sample()
    return x


def with_torch(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5) * random.random() + torch.rand(3)


def distributed(x: Tensor) -> list[Any]:
    python = [random.gauss(0, 2), random.normalvariate(1.5, 2), random.betavariate(0.5, 0.5), random.expovariate(3)]
    lam, noise = np.random.beta(0.2, b=0.2), np.random.normal(1, 2) + np.random.standard_normal() + np.random.randn()
    rest = [random.triangular(0, 3), np.random.exponential(2.0), np.random.gamma(2.0, scale=0.5), np.random.normal()]
    return [*python, *rest, lam * x + (1 - lam) * x.flip(0), x + noise]


def ints(x: Tensor) -> list[Any]:
    i, j = random.randint(-3, 3), np.random.randint(5)
    kinds = [isinstance(v, int) for v in (i, j)]
    return [i, x * j, i // 2 * x, random.randrange(2, 11, 3) * x, np.random.randint(low=2, high=4), kinds]


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", [scaled, unused, with_torch, distributed, ints], ids=lambda f: f.__name__)
def test_draws(fn: Callable[..., Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for seed in range(4):
        (mine, *states), (eagers, *expected) = (seeded(run, seed, torch.ones(3)) for run in (traced, fn))
        assert states == expected
        same(mine, eagers, executor == "aten")
    assert traced.cache_info().traces == 1


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.dropped: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            p = random.uniform(0, 1)
            if self.training and p < 0.5:
                self.dropped = self.dropped + 1
                continue
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_are_dropped(training: bool, executor: str) -> None:
    model, eager = Dropping().train(training), Dropping().train(training)
    eager.load_state_dict(model.state_dict())
    traced = make_traced(model, executor=executor)
    for seed in range(8):
        found = [seeded(run, seed, torch.ones(2, 3)) for run in (traced, eager)]
        same(found[0][0], found[1][0], False)
        assert found[0][1:] == found[1][1:]
        assert torch.equal(model.dropped, eager.dropped)
    assert traced.cache_info().traces == (4 if training else 1)


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_choices_and_crops(executor: str) -> None:
    layers = [torch.tanh, torch.cos]

    def fn(x: Tensor) -> Tensor:
        i = random.randint(0, 6)
        return random.choice(layers)(x[i : i + 4]) + x[np.random.randint(0, 10)]

    traced, x = make_traced(fn, executor=executor), torch.linspace(0, 1, 10)
    for seed in range(12):
        found = [seeded(run, seed, x) for run in (traced, fn)]
        same(found[0][0], found[1][0], False)
        assert found[0][1:] == found[1][1:]
    traces = traced.cache_info().traces
    for seed in range(12, 24):
        same(seeded(traced, seed, x)[0], seeded(fn, seed, x)[0], False)
    assert traced.cache_info().traces == traces < 8


def test_wrong_bounds_raise_as_in_eager() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * random.randint(3, 1) + random.choice([])

    before = random.getstate()
    with pytest.raises(ValueError, match="empty range"):
        make_traced(fn)(torch.ones(3))
    assert random.getstate() == before


def test_decisions_behind_writes_and_draws() -> None:
    def fn(x: Tensor) -> Tensor:
        x.add_(1)
        if np.random.uniform() < 0.5:
            x.mul_(2)
        if torch.rand(()) < random.random():
            x.add_(torch.randn(3))
        return x

    traced = make_traced(fn)
    for seed in range(10):
        inputs = torch.ones(3), torch.ones(3)
        found = [seeded(run, seed, x) for run, x in zip((traced, fn), inputs, strict=True)]
        assert torch.equal(*inputs)
        assert found[0][1:] == found[1][1:]
    assert traced.cache_info().traces == 4


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda x: x * np.random.rand(3)[0],
    "size": lambda x: x * np.random.uniform(0, 1, 3)[0],
    "sample": lambda x: x * random.sample([1.0, 2.0], 1)[0],
    "large": lambda x: x * (random.randint(1, 2**70) > 5),
    "number": lambda x: x * random.gauss(x.sum().item(), 1),
    "dtype": lambda x: x * np.random.randint(0, 3, dtype=np.int64),
    "imported before": lambda x: x * PLAIN(),
    "value": lambda x: x * np.float64(random.random()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_draws_are_refused(name: str) -> None:
    before = random.getstate(), random.random, np.random.uniform
    with pytest.raises(CaptureError):
        make_traced(REFUSED[name])(torch.ones(3))
    assert (random.getstate(), random.random, np.random.uniform) == before


def test_functions_that_are_kept_draw_as_ever() -> None:
    kept: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        from random import gauss

        kept[:] = [gauss]
        return x * gauss(0, 1)

    with contextlib.suppress(CaptureError):
        make_traced(fn)(torch.ones(3))
    with recorded(lambda module, function, arguments, kind: 7.0):
        kept.append(random.gauss)
    random.seed(3)
    expected = random.gauss(0, 1)
    for function in kept:
        random.seed(3)
        assert function(0, 1) == expected


def test_other_threads_draw_by_themselves() -> None:
    drawn: list[float] = []
    random.seed(3)
    expected = random.random()
    random.seed(3)
    with recorded(lambda module, function, arguments, kind: 7.0):
        other = threading.Thread(target=lambda: drawn.append(random.random()))
        other.start()
        other.join()
        assert (random.random(), random.uniform(1, 2)) == (7.0, 8.0)
    assert drawn == [expected]
    assert random.random is PLAIN
