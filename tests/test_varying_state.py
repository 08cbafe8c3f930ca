"""Numbers that keep changing in attributes and in dicts, whether the caller changes them or the function itself."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, RetraceWarning, make_traced
from tests.test_varying import FIRST, VALUES, X, same


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.temperature = 1.0
        self.options = {"scale": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.inner(x) / self.temperature, -1) * self.options["scale"]


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_attributes() -> None:
    model = Tempered()
    traced = make_traced(model)
    for i, a in enumerate(VALUES[:4] + VALUES[6:]):
        model.temperature = a
        same(traced(X), model(X), False)
        assert model.temperature is a
        assert traced.cache_info().traces == min(i + 1, FIRST)
    for i, a in enumerate(VALUES):
        model.options["scale"] = a
        same(traced(X), model(X), False)
        assert model.options["scale"] is a
        assert traced.cache_info().traces == FIRST + min(i + 1, 3)
    model.temperature = 2  # type: ignore[assignment]  # an int
    same(traced(X), model(X), False)
    del model.options["scale"]
    with pytest.raises(KeyError):
        traced(X)


class Kept(dict[str, Any]):
    """Keeps half of what it is given, and tells the whole."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value / 2)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key) * 2


def test_dicts_with_methods_of_their_own() -> None:
    kept = Kept()
    kept["scale"], kept["x"] = 1.0, X

    def fn(x: Tensor) -> Tensor:
        kept["scale"] = kept["scale"] + 1
        kept["last"] = x
        return x * kept["scale"] + kept["x"]

    eager = [(fn(X * i), dict(kept)) for i in range(4)]
    kept["scale"] = 1.0
    del kept["last"]
    traced = make_traced(fn)
    for i in range(4):
        same((traced(X * i), dict(kept)), eager[i], False)
    assert traced.cache_info().traces == 2  # without "last", and with it


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_an_equal_dict_in_the_place_of_another() -> None:
    model = Tempered()
    model.options["more"] = {"shift": 1.0}

    def fn(x: Tensor) -> Tensor:
        return model(x) + model.options["more"]["shift"]

    traced = make_traced(fn)
    for i in range(5):
        model.options["scale"] = float(i)
        same(traced(X), fn(X), False)
    for i in range(5):
        model.options["more"]["shift"] = float(i)
        same(traced(X), fn(X), False)
    assert traced.cache_info().traces == FIRST + 3
    model.options["more"]["shift"] = 3.0  # as when it became an input
    for fresh in (dict(model.options), copy.deepcopy(model.options)):
        model.options = fresh
        for value in (3.0, 7.0):
            model.options["scale"] = model.options["more"]["shift"] = value
            same(traced(X), fn(X), False)


class Counting(Tempered):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.options = 0, {"scale": 2.0}

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        self.calls += 1
        self.temperature *= 0.5
        self.options["scale"] = 1 - self.options["scale"] / 4
        return super().forward(x) / self.calls, self.calls


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_numbers_that_every_call_changes(executor: str) -> None:
    model, eager = Counting(), Counting()
    eager.load_state_dict(model.state_dict())
    traced = make_traced(model, executor=executor)
    for i in range(6):
        if i == 4:
            model.calls = eager.calls = 10
        same(traced(X), eager(X), executor == "aten")
        state = [(m.calls, type(m.calls), m.temperature, m.options) for m in (model, eager)]
        assert state[0] == state[1]
    assert traced.cache_info().traces == 1


def test_a_changed_number_whose_value_is_needed_is_refused() -> None:
    class Telling(Counting):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            self.calls += 1
            return x, f"call {self.calls}"

    model = Telling()
    with pytest.raises(CaptureError, match=r"the function changes Telling\.calls"):
        make_traced(model)(X)
    assert model.calls == 0


class Attention(nn.Module):
    """Keeps keys and values in memory that it was given at first, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 24)
        self.register_buffer("kept", torch.zeros(2, 2, 2, 12, 4))
        self.position = 0

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        count = x.shape[1]
        q, *new = self.inner(x).view(2, count, 3, 2, 4).permute(2, 0, 3, 1, 4)
        self.kept[..., self.position : self.position + count, :] = torch.stack(new)
        self.position += count
        k, v = self.kept[..., : self.position, :]
        return nn.functional.scaled_dot_product_attention(q, k, v), self.position


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_counters_as_bounds(executor: str) -> None:
    model, eager = Attention(), Attention()
    eager.load_state_dict(model.state_dict())
    traced = make_traced(model, executor=executor)
    with torch.no_grad():
        for i, traces in enumerate([1, *[2] * 10, 3]):  # one row, some, and all are programs of their own
            x = torch.randn(2, 1, 4)
            same(traced(x), eager(x), executor == "aten")
            same(model.kept, eager.kept, executor == "aten")
            assert model.position == eager.position == i + 1
            assert traced.cache_info().traces == traces
        model.position = eager.position = 0
        for count in (4, 3, 1, 1, 1):
            x = torch.randn(2, count, 4)
            same(traced(x), eager(x), executor == "aten")
            assert model.position == eager.position
        assert traced.cache_info().traces == 5


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_counters_as_sizes_are_a_program_each(executor: str) -> None:
    class Growing(Counting):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            self.calls += 1
            self.temperature /= 2
            return x.expand(self.calls, -1) * torch.arange(self.calls)[:, None] / self.temperature, self.calls

    model, eager = Growing(), Growing()
    traced = make_traced(model, executor=executor)
    for i in range(12):
        if i == 6:
            model.calls = eager.calls = 0
        same(traced(X), eager(X), executor == "aten")
        assert (model.calls, model.temperature) == (eager.calls, eager.temperature)
        assert traced.cache_info().traces == min(i + 1, 6)


COUNT = 0


def test_globals() -> None:
    def fn(x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return x * COUNT

    traced = make_traced(fn)
    for i in range(1, 5):
        assert torch.equal(traced(X), X * i)
        assert i == COUNT
        assert type(COUNT) is int
    assert traced.cache_info().traces == 1


def test_a_global_as_a_bound() -> None:
    def fn(x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return x[:COUNT]

    before, traced = COUNT, make_traced(fn)
    for i in range(before + 1, before + 5):
        assert torch.equal(traced(X), X[:i])
        assert i == COUNT


def test_a_global_whose_value_is_needed_is_refused() -> None:
    def fn(x: Tensor) -> tuple[Tensor, str]:
        global COUNT
        COUNT += 1
        return x, str(COUNT)

    before = COUNT
    with pytest.raises(CaptureError, match="COUNT"):
        make_traced(fn)(X)
    assert before == COUNT


class Decaying(torch.optim.Optimizer):
    """As those of other libraries, which count in a group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                state["average"].mul_(0.9).add_(p.grad, alpha=0.1)
                p.addcdiv_(state["average"], p.abs() + 1, value=-group["lr"] / (1 - 0.9 ** group["step"]))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "decaying": lambda p: Decaying(p, 0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


Scheduler = torch.optim.lr_scheduler.LRScheduler


def scheduled(
    optimizer: Callable[..., torch.optim.Optimizer], schedule: Callable[..., Scheduler], executor: str
) -> list[torch.optim.Optimizer]:
    """Steps in eager mode and traced ones, alike and of one program while the schedule goes on; both optimizers."""
    torch.manual_seed(0)
    models = [nn.Linear(4, 2), nn.Linear(4, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optimizer(m.parameters()) for m in models]
    schedules = [schedule(o) for o in optimizers]

    def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        return step

    eager = step_of(models[0], optimizers[0])
    traced = make_traced(step_of(models[1], optimizers[1]), executor=executor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetraceWarning)
        for _ in range(12):
            x = torch.randn(3, 4)
            same(traced(x), eager(x), executor == "aten")
            for s in schedules:
                s.step()
    assert traced.cache_info().traces == FIRST + 1  # the first one sets the optimizer up
    same(list(models[1].parameters()), list(models[0].parameters()), executor == "aten")
    return optimizers


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates(name: str, executor: str) -> None:
    _, traced = scheduled(OPTIMIZERS[name], lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), executor)
    assert type(traced.param_groups[0]["lr"]) is float
