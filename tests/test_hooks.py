"""Hooks of modules: the state behind them, their effects, and those that come and go."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from primexec import CaptureError, make_traced

X = torch.arange(1.0, 7.0).reshape(2, 3)


class Steer:
    def __init__(self) -> None:
        self.alpha = 2.0

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.alpha

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.alpha


def through_partial(steer: Steer, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * steer.alpha


STEERED: dict[str, Callable[[Steer], Any]] = {
    "method": lambda steer: steer.hook,
    "object": lambda steer: steer,
    "closure": lambda steer: lambda module, args, out: out * steer.alpha,
    "partial": lambda steer: functools.partial(through_partial, steer),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()))


def everywhere(module: nn.Module, hook: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("register", [nn.Module.register_forward_hook, everywhere])
@pytest.mark.parametrize("make", STEERED.values(), ids=STEERED)
@pytest.mark.parametrize("path", ["", "1.0"], ids=["root", "child"])
@torch.no_grad()
def test_state_of_a_hook_is_watched(make: Callable[[Steer], Any], path: str, register: Any) -> None:
    module, steer = net(), Steer()
    handle = register(module.get_submodule(path), make(steer))
    try:
        traced = make_traced(module, executor="aten")
        for alpha in (2.0, 2.0, 0.5, 2.0):
            steer.alpha = alpha
            assert torch.equal(traced(X), module(X))
        assert traced.cache_info()[:3] == (2, 2, 2)
    finally:
        handle.remove()


@pytest.mark.parametrize("path", ["", "1.0"], ids=["root", "child"])
@pytest.mark.parametrize("training", [False, True])
def test_features_are_filed_at_every_call(path: str, training: bool) -> None:
    module, features, last = net(), {}, Steer()

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        features["out"] = out.detach()
        last.out = args[0].detach() + 1  # type: ignore[attr-defined]

    module.get_submodule(path).register_forward_hook(keep)
    traced = make_traced(module, executor="aten")
    for k in range(3):
        found = []
        for run in (module, traced):
            with torch.set_grad_enabled(training):
                found += [run(X * k), features["out"], last.out]  # type: ignore[attr-defined]
        assert all(map(torch.equal, found[:3], found[3:]))
        assert not features["out"].requires_grad
    assert traced.cache_info().traces == 1


@torch.no_grad()
def test_features_have_the_order_of_the_run() -> None:
    module, features = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid()), dict[str, Tensor]()
    for name, layer in zip("cab", module, strict=True):
        layer.register_forward_hook(lambda module, args, out, name=name: features.__setitem__(name, out))
    traced = make_traced(module, executor="aten")
    for _ in range(2):
        traced(X)
        assert list(features) == ["c", "a", "b"]


def test_hooks_that_note_shapes() -> None:
    module, seen = net(), []
    module[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    traced = make_traced(module)
    for count in (1, 2, 3):
        traced(X)
        assert len(seen) == count
    assert set(seen) == {module[0](X).shape}
    assert traced.cache_info().traces == 1


def test_hooks_that_count_in_both_passes_are_refused() -> None:
    module, seen = net(), []
    module[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    module[0].register_full_backward_hook(lambda module, *gradients: seen.append(len(gradients)))
    with pytest.raises(CaptureError, match="changes seen") as error:
        make_traced(module)(X.clone().requires_grad_())
    assert "test_hooks.py" in str(error.value)
    assert seen == []


def gradients(module: nn.Module, run: Any) -> list[Tensor]:
    module.zero_grad()
    x = X.clone().requires_grad_()
    run(x).sum().backward()
    return [t.grad for t in (x, *module.parameters()) if t.grad is not None]


def double_later(module: nn.Module) -> Any:
    return module.register_full_backward_hook(lambda module, given, made: (given[0] * 2,))


def double_before(module: nn.Module) -> Any:
    return module.register_full_backward_pre_hook(lambda module, made: (made[0] * 2,))


def double_everywhere(module: nn.Module) -> Any:
    return nn.modules.module.register_module_full_backward_hook(
        lambda m, given, made: (given[0] * 2,) if isinstance(m, nn.Tanh) else None
    )


@pytest.mark.parametrize("register", [double_before, double_later, double_everywhere])
@pytest.mark.parametrize("first", [False, True], ids=["added", "removed"])
def test_backward_hooks_that_come_and_go(register: Any, first: bool) -> None:
    module = net()
    traced = make_traced(module, executor="aten")
    for hooked in (first, not first, first):
        handle = register(module[1][1]) if hooked else None
        try:
            for _ in range(2):
                expected = gradients(module, module)
                assert all(map(torch.equal, gradients(module, traced), expected))
        finally:
            if handle is not None:
                handle.remove()


def test_state_of_a_backward_hook_is_watched() -> None:
    module, steer = net(), Steer()
    module[1][1].register_full_backward_hook(lambda module, given, made: (given[0] * steer.alpha,))
    traced = make_traced(module, executor="aten")
    for alpha in (2.0, 3.0, 2.0):
        steer.alpha = alpha
        expected = gradients(module, module)
        assert all(map(torch.equal, gradients(module, traced), expected))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("path", ["", "1.0"], ids=["root", "child"])
def test_backward_hooks_that_count_are_refused(path: str, register: str) -> None:
    module, seen = net(), []
    getattr(module.get_submodule(path), register)(lambda module, *gradients: seen.append(len(gradients)))
    with pytest.raises(CaptureError, match="changes seen"):
        make_traced(module)(X.clone().requires_grad_())
    assert seen == []


def test_a_hook_that_stays_is_refused() -> None:
    module = net()

    def run(x: Tensor) -> Tensor:
        module[0].register_forward_hook(lambda module, args, out: out * 2)
        return module(x)

    with pytest.raises(CaptureError, match="_forward_hooks"):
        make_traced(run)(X)
    assert not module[0]._forward_hooks


def test_a_hook_that_is_removed_again() -> None:
    module = net()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        handle = module[0].register_forward_hook(lambda module, args, out: found.append(out.detach()))
        y = module(x)
        handle.remove()
        return y, found[0]

    traced = make_traced(run, executor="aten")
    for k in range(3):
        assert all(map(torch.equal, traced(X * k), run(X * k)))
    assert traced.cache_info().traces == 1


# Tables that are replaced rather than changed.


def forget_hooks(module: nn.Sequential) -> None:
    module[0]._forward_hooks = collections.OrderedDict()


def copy_hooks(module: nn.Sequential) -> None:
    module[1][0]._forward_hooks = module[0]._forward_hooks.copy()


def other_parameters(module: nn.Sequential) -> None:
    module[0]._parameters = {"weight": nn.Parameter(torch.eye(3)), "bias": None}


def other_children(module: nn.Sequential) -> None:
    module[1]._modules = {"0": nn.Sigmoid()}


def other_state(module: nn.Sequential) -> None:
    module[0].__setstate__(nn.Linear(3, 3).__dict__)


@pytest.mark.parametrize("replace", [forget_hooks, copy_hooks, other_parameters, other_children, other_state])
@torch.no_grad()
def test_tables_of_a_module_are_replaced(replace: Callable[[nn.Sequential], None]) -> None:
    module = net()
    module[0].register_forward_hook(lambda module, args, out: out * 2)
    traced = make_traced(module, executor="aten")
    before = traced(X)
    replace(module)
    assert torch.equal(traced(X), module(X))
    assert not torch.equal(module(X), before)
    traced(X)
    assert traced.cache_info()[:3] == (1, 2, 2)


class Keeps(nn.Module):
    """Leaves results with their history behind, as models do with attention weights and auxiliary losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.last: Tensor | None = None
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        self.row = self.last[0]
        self.loss = self.loss + self.last.square().mean()
        return self.last.tanh()


LOSSES: dict[str, Callable[[Keeps, Tensor], Tensor]] = {
    "result": lambda module, out: out.sum(),
    "kept": lambda module, out: module.last.sum(),  # type: ignore[union-attr]
    "view": lambda module, out: module.row.sum(),
    "all": lambda module, out: out.sum() + module.last.sum() + module.row.prod() + module.loss,  # type: ignore[union-attr]
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_is_kept_has_its_history(loss: Callable[[Keeps, Tensor], Tensor]) -> None:
    eager, kept = Keeps(), Keeps()
    traced = make_traced(kept, executor="aten")
    for i in range(3):
        for module, run in ((eager, eager), (kept, traced)):
            loss(module, run(X * i)).backward()
            module.loss = module.loss.detach()
        for a, b in zip(eager.parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
        assert kept.row._base is kept.last
    for run in (eager, eager, traced, traced):
        run(X)
    eager.loss.backward()
    kept.loss.backward()
    torch.testing.assert_close(kept.linear.weight.grad, eager.linear.weight.grad)


def written_into(module: nn.Module) -> dict[int, Any]:
    return module[1][0]._forward_hooks  # type: ignore[index, union-attr, return-value]


def written_into_that_of_all(module: nn.Module) -> dict[int, Any]:
    return nn.modules.module._global_forward_hooks  # type: ignore[return-value]


@pytest.mark.parametrize("table", [written_into, written_into_that_of_all])
@torch.no_grad()
def test_hooks_that_are_written_into_their_table(table: Callable[[nn.Module], dict[int, Any]]) -> None:
    module = net()
    traced = make_traced(module, executor="aten")
    before = traced(X)
    table(module)[0] = lambda module, args, out: out * 2
    try:
        assert torch.equal(traced(X), module(X))
        assert not torch.equal(traced(X), before)
    finally:
        table(module).clear()
    assert torch.equal(traced(X), before)
    assert traced.cache_info().traces == 2


def test_hooks_of_all_modules_for_one_that_the_function_makes() -> None:
    def function(x: Tensor) -> Any:
        return nn.ReLU()(x - 2)

    traced = make_traced(function)
    traced(X)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2)
    try:
        assert torch.equal(traced(X), function(X))
        assert traced.cache_info().traces == 2
    finally:
        handle.remove()


class Replaced(torch.autograd.Function):
    """Its gradient is a tensor that only the backward pass reaches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return MASK


MASK = torch.tensor([1.0, 0.0, 3.0])


def hooked(x: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    y = x * 3
    y.register_hook(hook)
    return y.sum()


@pytest.mark.parametrize(
    "fn",
    [lambda x: hooked(x, lambda g: MASK), lambda x: hooked(x, lambda g: g * MASK), lambda x: Replaced.apply(x).sum()],
    ids=["given", "masked", "function"],
)
def test_tensors_that_only_the_backward_pass_uses(fn: Callable[[Tensor], Tensor]) -> None:
    traced = make_traced(fn)
    for _ in range(3):
        x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
        fn(x).backward()
        traced(y).backward()
        assert torch.equal(x.grad, y.grad)
        MASK.add_(1)
    assert traced.cache_info().traces == 1


# Hooks of PyTorch that set attributes -------------------------------------------------------------------


def pruned(linear: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(linear, "weight", 0.5)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, pruned], ids=lambda f: f.__name__)
def test_weights_that_a_hook_makes_of_a_module_that_a_step_reaches(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    """The hook sets `weight` before any code has named it."""

    def built() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        torch.manual_seed(0)
        model = wrap(nn.Linear(3, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return model, step

    (mine, ours), (own, eager) = built(), built()
    traced = make_traced(ours)
    for factor in range(1, 4):
        torch.testing.assert_close(traced(X * factor), eager(X * factor))
        torch.testing.assert_close(mine.state_dict(), own.state_dict())
        torch.testing.assert_close(mine.weight, own.weight)
        assert type(mine.weight) is Tensor
    assert traced.cache_info().traces == 2  # without gradients, and with them
