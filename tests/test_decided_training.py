"""Training that decides by the values of tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced
from primexec.decisions import decide
from tests.test_decisions import EXECUTORS


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients(executor: Any) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).tanh()
        if y.mean().item() > 0.5:
            y = y / y.mean()
        return y.square().sum()

    traced = make_traced(fn, executor=executor)
    for value in (0.1, 10.0, 0.2, 20.0):
        ours, theirs = (torch.full((3, 4), value, requires_grad=True) for _ in range(2))
        x = torch.ones(2, 3)
        loss, expected = traced(x, ours), fn(x, theirs)
        torch.testing.assert_close(loss, expected)
        loss.backward(), expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert traced.cache_info()[:3] == (2, 2, 2)


def step_of(model: nn.Module, optimizer: Any) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.parametrize(
    ("kind", "options", "traces"),
    [
        (torch.optim.RAdam, {}, 4),
        (torch.optim.ASGD, {"t0": 4}, 5),
        (torch.optim.Adafactor, {}, 7),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 3),
    ],
    ids=["radam", "asgd", "adafactor", "sgd"],
)
def test_steps_that_decide(kind: Any, options: dict[str, Any], traces: int) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    eager, fn = (step_of(m, kind(m.parameters(), **options)) for m in models)
    traced = make_traced(fn)
    for i in range(10):
        x = torch.randn(6, 4)
        if i == 5:
            x[0] = float("inf")
        torch.testing.assert_close(traced(x), eager(x), equal_nan=True)
        torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())
    assert traced.cache_info().traces == traces


def scaled_step(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], torch.amp.GradScaler]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu"):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step, scaler


def test_scaled_gradients() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    (eager, theirs), (fn, ours) = map(scaled_step, models)
    traced = make_traced(fn)
    for i in range(12):
        x = torch.randn(6, 4)
        if i in (5, 9):
            x[0] = float("inf")  # the step is left out, and the scale halved
        torch.testing.assert_close(traced(x), eager(x), equal_nan=True)
        torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())
        assert ours.state_dict() == theirs.state_dict()
    assert traced.cache_info().traces == 3  # the first step, those that follow, those left out


def steps_of(x: Tensor, counters: list[Tensor], weights: list[Tensor]) -> Tensor:
    for counter, weight in zip(counters, weights, strict=True):
        counter.add_(1)
        if counter.item() > 3:
            weight.mul_(0.5).add_(x)
        else:
            weight.sub_(x)
    return torch.stack(weights).sum()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_counters_decide_before_anything_large_is_written(executor: Any) -> None:
    ours, theirs = (([torch.tensor(0.0) for _ in "abc"], [torch.ones(20, 5) for _ in "abc"]) for _ in range(2))
    traced = make_traced(steps_of, executor=executor)
    for i in range(8):
        if i == 6:
            ours[0][1].zero_(), theirs[0][1].zero_()
        x = torch.full((20, 5), float(i))
        torch.testing.assert_close(traced(x, *ours), steps_of(x, *theirs))
        torch.testing.assert_close(ours, theirs)
    assert traced.cache_info().traces == 3
    nodes = [n for n in traced.trace(x, *ours).graph_module.graph.nodes if n.op == "call_function"]
    large = [isinstance(v := n.meta.get("val"), Tensor) and v.dim() > 0 for n in nodes]
    assert all(n.target is not decide for n in nodes[large.index(True) :])


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_counters_in_the_memory_of_a_weight(executor: Any) -> None:
    traced = make_traced(steps_of, executor=executor)
    runs: list[Any] = []
    for fn in (steps_of, traced):
        found = []
        for shared in (False, True, False, True):
            memory = torch.zeros(20, 5)
            held = [torch.tensor(0.0), (memory if shared else torch.zeros(20, 5))[2, 1]]
            weights = [memory, torch.ones(20, 5)]
            for i in range(5):
                found.append(fn(torch.full((20, 5), -1.0 - i), held, weights))
            found += [t.clone() for t in (*held, *weights)]
        runs.append(found)
    torch.testing.assert_close(runs[1], runs[0])
