"""Whole training steps as one traced function: backward(), gradients as state, optimizers with their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

Step = Callable[[Tensor, Tensor], Tensor]
Make = Callable[[nn.Module, torch.optim.Optimizer], Step]

DATA = [(torch.randn(5, 8), torch.randn(5, 4)) for _ in range(6)]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def zero_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def zero_last(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def accumulating(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
            loss = loss_of(model, part, target) / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return step


def clipping(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return torch.stack([loss.detach(), norm])

    return step


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        parameters = list(model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g * 2
        optimizer.step()
        for p in parameters:
            del p.grad
        return loss.detach()

    return step


def with_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    from torch.utils.checkpoint import checkpoint

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(checkpoint(model, x, use_reentrant=False), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    "unfused adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "unfused adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "unfused adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "foreach sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    parameters = list(model.parameters())
    state = [{k: v for k, v in optimizer.state[p].items()} for p in parameters if p in optimizer.state]
    gradients = [p.grad for p in parameters]
    return [[p.detach() for p in parameters], list(model.buffers()), gradients, state]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b) and a.stride() == b.stride()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def train(make: Make, optimizer: Callable[[Any], torch.optim.Optimizer], trace: bool) -> tuple[list[Any], Any]:
    model = network()
    built = optimizer(model.parameters())
    step: Any = make(model, built)
    if trace:
        step = make_traced(step)
    seen: list[Any] = []
    for i, (x, y) in enumerate(DATA):
        torch.manual_seed(i)
        seen.append(step(x, y))
        seen.append(copy.deepcopy(state_of(model, built)))
    return seen, step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [zero_first, zero_last], ids=lambda m: m.__name__)
def test_optimizer(make: Make, name: str) -> None:
    expected, _ = train(make, OPTIMIZERS[name], trace=False)
    found, traced = train(make, OPTIMIZERS[name], trace=True)
    assert same(found, expected)
    # A first call finds no state, or no gradients; the second one finds what the first has made.
    assert traced.cache_info().traces == (1 if name in ("sgd", "unfused adagrad") and make is zero_last else 2)


@pytest.mark.parametrize("executor", ["llvm", "numpy"])
def test_step_on_other_executors(executor: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    twin = copy.deepcopy(model)
    steps = []
    for m in (model, twin):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)
        steps.append(zero_last(m, optimizer))
    traced = make_traced(steps[1], executor=(executor, "aten"))
    for x, y in DATA:
        torch.testing.assert_close(traced(x, y), steps[0](x, y))
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert traced.cache_info().traces == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("executor", ["aten", "llvm", "numpy"])
def test_one_parameter(executor: str, name: str) -> None:
    models = [nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)]
    models[1].load_state_dict(models[0].state_dict())
    eager, traced = (zero_last(m, OPTIMIZERS[name](m.parameters())) for m in models)
    traced = make_traced(traced, executor=(executor, "aten"))
    for x, y in DATA:
        torch.testing.assert_close(traced(x, y), eager(x, y))
    torch.testing.assert_close(models[1].weight, models[0].weight)


@pytest.mark.parametrize("make", [accumulating, clipping, by_hand, with_checkpoint], ids=lambda m: m.__name__)
def test_step(make: Make) -> None:
    expected, _ = train(make, OPTIMIZERS["adam"], trace=False)
    found, traced = train(make, OPTIMIZERS["adam"], trace=True)
    assert same(found, expected)
    assert traced.cache_info().traces == 2


def test_learning_rate_and_groups_are_guarded() -> None:
    runs = []
    for trace in (False, True):
        model = network()
        groups: list[Any] = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        step: Any = zero_last(model, optimizer)
        step = make_traced(step) if trace else step
        for i, (x, y) in enumerate(DATA):
            torch.manual_seed(i)
            step(x, y)
            scheduler.step()
        runs.append(state_of(model, optimizer))
        if trace:
            assert step.cache_info().traces == 4  # three learning rates, and the flag that a first step sets
    assert same(*runs)


def test_tensor_learning_rate_is_read_again() -> None:
    runs = []
    for trace in (False, True):
        model = network()
        rate = torch.tensor(0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=True)
        step: Any = zero_last(model, optimizer)
        step = make_traced(step) if trace else step
        for i, (x, y) in enumerate(DATA):
            torch.manual_seed(i)
            step(x, y)
            rate.mul_(0.5)
        runs.append(state_of(model, optimizer))
        if trace:
            assert step.cache_info().traces <= 2
    assert same(*runs)


def test_loaded_state_is_used() -> None:
    runs = []
    for trace in (False, True):
        model = network()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        step: Any = zero_last(model, optimizer)
        step = make_traced(step) if trace else step
        for i, (x, y) in enumerate(DATA):
            torch.manual_seed(i)
            if i == 2:
                saved = copy.deepcopy(optimizer.state_dict())
            if i == 4:
                optimizer.load_state_dict(saved)
            step(x, y)
        runs.append(state_of(model, optimizer))
    assert same(*runs)


def test_replaced_parameter() -> None:
    runs = []
    for trace in (False, True):
        model = nn.Linear(8, 4)
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.fill_(0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step: Any = zero_last(model, optimizer)
        step = make_traced(step) if trace else step
        for i, (x, y) in enumerate(DATA):
            if i == 3:  # the optimizer goes on with the old one
                model.weight = nn.Parameter(model.weight.detach() * 0.5)
            step(x, y)
        runs.append([model.weight.detach(), model.bias.detach(), optimizer.param_groups[0]["params"][0].detach()])
    assert same(*runs)


def test_gradients_as_arguments_and_results() -> None:
    w = torch.randn(4, requires_grad=True)

    def f(x: Tensor, g: Tensor | None) -> Any:
        (w * x).sum().backward()
        return w.grad, None if g is None else g + 1

    traced = make_traced(f)
    for _ in range(2):
        for given in (False, True):
            outs = []
            for run in (f, traced):
                w.grad = torch.ones(4)
                out, more = run(torch.arange(4.0), w.grad if given else None)
                assert out is w.grad
                outs.append([out.clone(), more])
            assert same(*outs)
    assert traced.cache_info().traces == 2
    w.grad = None
    out, _ = traced(torch.arange(4.0), None)
    assert out is w.grad
    assert torch.equal(out, torch.arange(4.0))


def test_result_of_a_freed_graph() -> None:
    model = network()

    def f(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    loss = make_traced(f)(*DATA[0])
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_attributes_of_objects_hold_results() -> None:
    class Average:
        def __init__(self) -> None:
            self.mean: Any = None
            self.all: dict[str, Any] = {}

        def __call__(self, x: Tensor) -> Tensor:
            self.mean = x.mean(0) if self.mean is None else self.mean * 0.9 + x.mean(0) * 0.1
            self.all["last"] = self.mean
            return x - self.mean

    eager, counted = Average(), Average()
    traced = make_traced(counted)
    for x, _ in DATA:
        assert torch.equal(traced(x), eager(x))
        assert torch.equal(counted.mean, eager.mean)
        assert counted.all["last"] is counted.mean
    assert traced.cache_info().traces == 2


def test_hook_on_a_parameter_is_refused() -> None:
    model, x = nn.Linear(8, 4), DATA[0][0]
    traced = make_traced(lambda x: torch.autograd.grad(model(x).sum(), model.weight)[0])
    assert torch.equal(traced(x), torch.autograd.grad(model(x).sum(), model.weight)[0])
    handle = model.weight.register_hook(lambda g: g * 2)
    with pytest.raises(CaptureError, match="hooks that would run"):
        traced(x)
    handle.remove()
    assert torch.equal(traced(x), torch.autograd.grad(model(x).sum(), model.weight)[0])
    assert traced.cache_info().traces == 1


def test_argument_with_a_history_is_refused() -> None:
    w = torch.ones(3, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        x.sum().backward()
        return x.detach()

    with pytest.raises(CaptureError, match="history of an argument"):
        make_traced(f)(w * 2)
    assert w.grad is None


def test_an_optimizer_that_asks_for_values_is_refused_and_leaves_no_trace() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())

    def step(x: Tensor, y: Tensor) -> Any:
        return optimizer.step(lambda: loss_of(model, x, y))

    step(*DATA[0])
    before = copy.deepcopy(state_of(model, optimizer)[2:])
    with pytest.raises(CaptureError, match="outside of the traced function"):
        make_traced(step)(*DATA[1])
    assert same(state_of(model, optimizer)[2:], before)


def test_the_state_that_an_optimizer_changes_between_calls_is_compared_only_where_it_is_asked_for() -> None:
    def steps(trace: Callable[[Any], Any]) -> tuple[list[Any], Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        optimizer = torch.optim.LBFGS(model.parameters())
        x, y = (t.double() for t in DATA[0])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        def evaluations(x: Tensor) -> Tensor:
            return x * optimizer.state_dict()["state"][0]["n_iter"]

        closure, evaluations = trace(closure), trace(evaluations)
        found = [(optimizer.step(closure), evaluations(torch.ones(2))) for _ in range(4)]
        return [*found, *(p.detach() for p in model.parameters())], closure, evaluations

    expected, _, _ = steps(lambda fn: fn)
    found, closure, evaluations = steps(make_traced)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    # The first one finds no gradients, and no count of the parameters' elements.
    assert closure.cache_info().traces == 2
    assert evaluations.cache_info().traces == 4


MODEL: Any = None
OPTIMIZER: Any = None


def global_step(x: Tensor, y: Tensor) -> Tensor:
    OPTIMIZER.zero_grad()
    loss = loss_of(MODEL, x, y)
    loss.backward()
    OPTIMIZER.step()
    return loss


def test_an_optimizer_in_a_global_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = make_traced(global_step)
    found = []
    for run in (global_step, traced):
        model = network()
        monkeypatch.setitem(globals(), "MODEL", model)
        monkeypatch.setitem(globals(), "OPTIMIZER", torch.optim.AdamW(model.parameters()))
        found.append([run(*data) for data in DATA] + [p.detach() for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0])
    assert traced.cache_info().traces == 2  # the first one sets the optimizer up


def adversarial(model: nn.Module) -> Callable[[Tensor], Any]:
    def attack(x: Tensor) -> tuple[Tensor, Tensor]:
        x.requires_grad = True
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        assert x.grad is not None
        return (x + 0.1 * x.grad.data.sign()).detach(), loss.detach()

    return attack


def residual(model: nn.Module) -> Callable[[Tensor], Any]:
    def of_an_equation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = x[:2]
        (slope,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)
        loss = slope.square().mean()
        loss.backward()
        return loss.detach(), half, x

    return of_an_equation


def frozen(model: nn.Module) -> Callable[[Tensor], Any]:
    def of_the_rest(x: Tensor) -> Tensor:
        for p in next(model.children()).parameters():
            p.requires_grad_(False)
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    return of_the_rest


@pytest.mark.parametrize(("make", "traces"), [(adversarial, 1), (residual, 1), (frozen, 2)])
def test_what_a_step_does_to_requires_grad(make: Callable[[nn.Module], Callable[[Tensor], Any]], traces: int) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    twin = copy.deepcopy(model)
    eager, traced = make(model), make_traced(make(twin))
    for x, _ in DATA[:4]:
        model.zero_grad()
        twin.zero_grad()
        mine = x.clone()
        expected, found = eager(x := x.clone()), traced(mine)
        for a, b in zip([found, mine, *twin.parameters()], [expected, x, *model.parameters()], strict=True):
            leaves = zip(*(torch.utils._pytree.tree_leaves(v) for v in (a, b)), strict=True)
            for p, q in leaves:
                torch.testing.assert_close(p, q)
                assert p.requires_grad == q.requires_grad
                assert (p.grad is None) == (q.grad is None)
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad)
    assert traced.cache_info().traces == traces


def test_hooks_of_what_a_step_makes_require_grad_are_refused() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.register_hook(lambda g: g * 2)
    weight.requires_grad_(False)

    def step(x: Tensor) -> None:
        (weight.requires_grad_() * x).sum().backward()

    with pytest.raises(CaptureError, match="hooks"):
        make_traced(step)(torch.ones(3))
    assert not weight.requires_grad
