"""Optimizers, methods, partials and modules of Python as arguments; frozen objects and namespaces."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)


def parts_of_training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = mse_loss(model(x), x[:, :2])
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.detach()


def test_model_optimizer_and_scheduler_are_arguments_of_a_step() -> None:
    mine, expected, traced = parts_of_training(), parts_of_training(), make_traced(step)
    for i in range(9):
        assert torch.allclose(traced(*mine, X + i), step(*expected, X + i), rtol=1e-5)
        assert all(map(torch.allclose, mine[0].parameters(), expected[0].parameters()))
        assert math.isclose(mine[2].get_last_lr()[0], expected[2].get_last_lr()[0])
        if i == 6:
            for group in (*mine[1].param_groups, *expected[1].param_groups):
                group["weight_decay"] = 0.5
    assert traced.cache_info().traces == 7


def test_they_stand_in_an_object() -> None:
    def run(state: Any, x: Tensor) -> Tensor:
        state.steps += 1
        return step(state.model, state.optimizer, state.scheduler, x)

    traced, found = make_traced(run), []
    for function in (traced, run):
        model, optimizer, scheduler = parts_of_training()
        state = types.SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler, steps=0)
        losses = [function(state, X + i) for i in range(3)]
        found.append((torch.stack(losses), state.steps, *model.parameters()))
    assert all(a == b if isinstance(a, int) else torch.allclose(a, b, rtol=1e-5) for a, b in zip(*found, strict=True))


def test_another_optimizer_is_another_program() -> None:
    traced = make_traced(step)
    for _ in range(2):
        parts, expected = parts_of_training(), parts_of_training()
        assert torch.allclose(traced(*parts, X), step(*expected, X))
        assert all(map(torch.allclose, parts[0].parameters(), expected[0].parameters()))


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor, self.weight = factor, torch.ones(3)

    def times(self, x: Tensor) -> Tensor:
        return x * self.factor + self.weight

    @classmethod
    def made(cls, x: Tensor) -> Tensor:
        return cls(3.0).times(x)


def scaled(x: Tensor, factors: list[float]) -> Tensor:
    return x * factors[0]


SCALED, FACTORS = Scaled(2.0), [2.0]
LINEAR = torch.nn.Linear(3, 3)


PARTIAL = functools.partial(scaled, factors=FACTORS)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda: SCALED.times, 2),
        (lambda: PARTIAL, 2),
        (lambda: Scaled.made, 1),
        (lambda: LINEAR.forward, 1),
        (lambda: torch.Tensor.exp, 1),
        (lambda: torch.ops.aten.neg, 1),
        (lambda: torch.ops.aten.neg.default, 1),
    ],
)
def test_what_is_called(function: Callable[[], Any], count: int) -> None:
    traced = make_traced(lambda x, fn: fn(x) * 2)
    for factor in (2.0, 2.0, 5.0):
        SCALED.factor = FACTORS[0] = factor
        SCALED.weight = torch.full((3,), factor)
        assert torch.allclose(traced(X, function()), function()(X) * 2)
    assert traced.cache_info().traces == count


def test_methods_of_two_objects_are_two() -> None:
    one, two, traced = Scaled(1.0), Scaled(2.0), make_traced(lambda x, fn: fn(x))
    for owner in (one, two, one):
        assert torch.equal(traced(X, owner.times), owner.times(X))
    assert traced.cache_info().traces == 2


def test_modules_of_python() -> None:
    module = types.ModuleType("settings")
    module.factor = 2.0  # type: ignore[attr-defined]
    traced = make_traced(lambda x, settings: x * settings.factor)
    for factor in (2.0, 2.0, 3.0):
        module.factor = factor  # type: ignore[attr-defined]
        assert torch.equal(traced(X, module), X * factor)
    assert traced.cache_info().traces == 2


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    factor: float = 2.0

    def doubled(self) -> Frozen:
        return dataclasses.replace(self, x=self.x * self.factor)


@dataclasses.dataclass(frozen=True)
class Derived(Frozen):
    held: list[Tensor] = dataclasses.field(default_factory=list)


class Guarded(Frozen):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


def test_frozen_dataclasses_of_tensors() -> None:
    traced = make_traced(lambda value: value.doubled())
    for kind, factor, count in ((Frozen, 2.0, 1), (Frozen, 2.0, 1), (Frozen, 3.0, 2), (Derived, 2.0, 3)):
        x = X.clone().requires_grad_()
        out = traced(kind(x, factor))
        assert type(out) is kind
        assert torch.equal(out.x, x * factor)
        out.x.sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, factor))
        assert traced.cache_info().traces == count
    with pytest.raises(CaptureError, match="is of type Guarded"):
        traced(Guarded(X))


def test_what_frozen_dataclasses_refuse_is_refused_as_in_eager() -> None:
    def changes(value: Frozen) -> Tensor:
        value.factor = 3.0  # type: ignore[misc]
        return value.x

    with pytest.raises(dataclasses.FrozenInstanceError):
        make_traced(changes)(Frozen(X))


def test_namespaces() -> None:
    def run(options: types.SimpleNamespace) -> types.SimpleNamespace:
        options.last = options.x * options.factor
        return types.SimpleNamespace(y=options.last + 1, factor=options.factor)

    traced = make_traced(run)
    for factor in (2.0, 2.0, 3.0):
        options = types.SimpleNamespace(x=X, factor=factor)
        out = traced(options)
        assert type(out) is types.SimpleNamespace
        assert torch.equal(options.last, X * factor)
        assert torch.equal(out.y, X * factor + 1)
    assert traced.cache_info().traces == 2
