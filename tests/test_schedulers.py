"""Schedulers of learning rates that step inside of a traced training step."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler

from primexec import CaptureError, make_traced

Step = Callable[[Tensor], Any]

MADE: dict[str, tuple[Callable[[Any], Any], int]] = {
    "step": (lambda o: lr_scheduler.StepLR(o, 2), 6),
    "exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.9), 5),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, 10), 6),
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch), 5),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20), 6),
    "milestones": (lambda o: lr_scheduler.MultiStepLR(o, [3, 8, 9]), 8),
    "linear": (lambda o: lr_scheduler.LinearLR(o), 6),
}


def steps(made: Callable[[Any], Any], trace: Callable[[Step], Step]) -> tuple[list[Any], Step]:
    """What twelve steps leave behind, with two groups of parameters."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}], 0.1, momentum=0.9)
    scheduler = made(optimizer)

    def step(x: Tensor) -> tuple[Tensor, list[float]]:
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.detach(), scheduler.get_last_lr()

    run, found = trace(step), []
    for _ in range(12):
        loss, rates = run(torch.randn(4, 3))
        assert rates is scheduler.get_last_lr()
        state = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (int, float))}
        found += [loss, model.weight.detach().clone(), [g["lr"] for g in optimizer.param_groups], list(rates), state]
    return found, run


@pytest.mark.parametrize("name", MADE)
def test_step(name: str) -> None:
    made, traces = MADE[name]
    expected, _ = steps(made, lambda fn: fn)
    found, run = steps(made, make_traced)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert run.cache_info().traces == traces  # type: ignore[attr-defined]


def test_pooling_beside() -> None:
    """`adaptive_avg_pool2d` asks whether its size is an int or a symbol."""

    def run(trace: Callable[[Step], Step]) -> tuple[list[Tensor], Step]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        optimizer = SGD(model.parameters(), 0.1)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            return loss.detach()

        traced = trace(step)
        return [traced(torch.randn(4, 3, 5, 5)) for _ in range(8)], traced

    (expected, _), (found, traced) = run(lambda fn: fn), run(make_traced)
    torch.testing.assert_close(found, expected)
    assert traced.cache_info().traces == 5  # type: ignore[attr-defined]


def test_plateau() -> None:
    """The rate is halved where the loss, a tensor, has not improved: the scheduler compares it."""

    def plateau(trace: Callable[[Step], Step]) -> tuple[list[Any], Step]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = SGD(model.parameters(), 0.1)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            scheduler.step(loss.detach())
            return loss.detach()

        run, found = trace(step), []
        for i in range(12):
            found += [run(torch.full((4, 3), float(i % 5))), optimizer.param_groups[0]["lr"]]
            found += [(type(scheduler.best), scheduler.best, scheduler.num_bad_epochs, scheduler.last_epoch)]
        return found, run

    expected, _ = plateau(lambda fn: fn)
    found, run = plateau(make_traced)
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, tuple):
            assert a == (*b[:1], pytest.approx(b[1], rel=1e-5), *b[2:])
        else:
            torch.testing.assert_close(a, b)
    assert len({r for r in expected if isinstance(r, float)}) > 2
    assert run.cache_info().traces == 8  # type: ignore[attr-defined]


LOSSES = (0.09, 0.17, 0.11, 0.86, 0.46, 0.083, 0.084, 0.19, 0.29, 0.06, 0.061, 0.05, 0.7, 0.051)


def test_what_the_scheduler_compares_is_what_it_found_last() -> None:
    """The best loss, for which the own methods of the scheduler ask alone, is another one now and then."""

    def plateau(trace: Callable[[Step], Step]) -> tuple[list[Any], Step]:
        optimizer = SGD([nn.Parameter(torch.ones(1))], 0.1)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        run = trace(lambda loss: scheduler.step(loss.sum()))
        found = []
        for loss in LOSSES:
            run(torch.tensor([loss]))
            found.append((scheduler.best, scheduler.num_bad_epochs, optimizer.param_groups[0]["lr"]))
        return found, run

    expected, _ = plateau(lambda fn: fn)
    found, run = plateau(make_traced)
    assert found == expected
    assert run.cache_info().traces == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["exponential", "sequential"])
def test_the_last_rate_is_used_before_the_next_one_is_set(name: str) -> None:
    def run(trace: Callable[[Step], Step]) -> tuple[list[Tensor], Step]:
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        optimizer = SGD(model.parameters(), 0.1)
        exponential = lr_scheduler.ExponentialLR(optimizer, 0.9)
        both = [lr_scheduler.ConstantLR(optimizer), exponential]
        scheduler = exponential if name == "exponential" else lr_scheduler.SequentialLR(optimizer, both, [3])

        def step(x: Tensor) -> Tensor:
            y = x * scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            return y

        traced = trace(step)
        return [traced(torch.ones(2)) for _ in range(12)], traced

    (expected, _), (found, traced) = run(lambda fn: fn), run(make_traced)
    torch.testing.assert_close(found, expected)
    assert traced.cache_info().traces == TRACES[name]  # type: ignore[attr-defined]


TRACES = {"exponential": 5, "sequential": 7}


def test_a_list_of_numbers_that_is_changed_in_place_is_refused() -> None:
    class Counts:
        def __init__(self) -> None:
            self.each = [1.0, 2.0]

    held = Counts()

    def count(x: Tensor) -> Tensor:
        held.each[0] += 1.0
        return x * held.each[0]

    traced = make_traced(count)
    for _ in range(2):
        with pytest.raises(CaptureError, match="each"):
            traced(torch.ones(2))
    assert held.each == [1.0, 2.0]


def test_a_rate_that_is_a_tensor() -> None:
    """The last rates are a list that `step` only sets: nothing needs what it held."""

    def run(trace: Callable[[Step], Step]) -> tuple[list[Any], Step]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = SGD(model.parameters(), torch.tensor(0.1), foreach=False)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)

        def step(x: Tensor) -> Tensor:
            loss: Tensor = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            return loss.detach()

        traced = trace(step)
        return [(traced(torch.randn(4, 3)), list(scheduler.get_last_lr())) for _ in range(12)], traced

    found, traced = run(make_traced)
    torch.testing.assert_close(found, run(lambda fn: fn)[0])
    assert traced.cache_info().traces == 5  # type: ignore[attr-defined]


def test_what_is_only_set_may_have_been_anything() -> None:
    state = types.SimpleNamespace(last=[0], best={"loss": 1.0}, asked=[0.0])

    def fn(x: Tensor) -> Tensor:
        state.last = [x.shape[0], x.sum().item()]
        state.best = {"loss": x[0]}
        return x * 2

    traced = make_traced(fn)
    before = state.last
    for i in range(4):
        x = torch.arange(3.0) + i
        traced(x)
        assert state.last == [3, 3.0 + 3 * i]
        assert torch.equal(state.best["loss"], x[0])
        state.last.append(None)
        state.best = {"another": i}
    assert before == [0]
    assert traced.cache_info().traces == 1

    def asks(x: Tensor) -> Tensor:
        shifted = x + state.asked[0]
        state.asked = [x.shape[0] / 2]
        return shifted

    traced = make_traced(asks)
    for n, found in ((2, 0.0), (2, 1.0), (4, 1.0)):
        torch.testing.assert_close(traced(torch.ones(n)), torch.ones(n) + found)
        assert state.asked == [n / 2]
