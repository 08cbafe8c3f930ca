"""Floats that Python's and NumPy's shared generators give: drawn anew at every call, as eager draws them."""

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


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", [scaled, unused, with_torch], ids=lambda f: f.__name__)
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
    "choice": lambda x: x * random.choice([1.0, 2.0]),
    "int": lambda x: x * random.randint(1, 3),
    "imported before": lambda x: x * PLAIN(),
    "value": lambda x: x * np.float64(random.random()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_draws_are_refused(name: str) -> None:
    before = random.getstate(), random.random, np.random.uniform
    with pytest.raises(CaptureError):
        make_traced(REFUSED[name])(torch.ones(3))
    assert (random.getstate(), random.random, np.random.uniform) == before


def test_other_threads_draw_by_themselves() -> None:
    drawn: list[float] = []
    random.seed(3)
    expected = random.random()
    random.seed(3)
    with recorded(lambda module: 7.0):
        other = threading.Thread(target=lambda: drawn.append(random.random()))
        other.start()
        other.join()
        assert (random.random(), random.uniform(1, 2)) == (7.0, 8.0)
    assert drawn == [expected]
    assert random.random is PLAIN
