"""Schedulers of learning rates that step inside of a traced training step."""

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
