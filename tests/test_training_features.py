"""What training loops do with a function, done with the function and with its traced form: the same bits come out.

Each feature is a procedure that takes `trace` (the identity, or `make_traced`), trains, and returns all that it
saw. How many programs it may trace is part of its row.
"""

from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import primexec
from tests.copies import COPIES
from tests.test_transformers import assert_same

Trace = Callable[..., Any]
Feature = Callable[[Trace], Any]
FEATURES: dict[str, tuple[Feature, int]] = {}


def feature(traces: int = 1) -> Callable[[Feature], Feature]:
    def enter(procedure: Feature) -> Feature:
        FEATURES[procedure.__name__] = procedure, traces
        return procedure

    return enter


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))


def rows(seed: int = 1, *shape: int) -> Tensor:
    return torch.randn(shape or (5, 6), generator=torch.Generator().manual_seed(seed))


def leaf(seed: int = 1, *shape: int) -> Tensor:
    return rows(seed, *shape).requires_grad_()


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@feature()
def backward(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    x = leaf()
    loss = run(x).square().sum()
    loss.backward()
    return loss, x.grad, grads(model)


@feature()
def autograd_grad(trace: Trace) -> Any:
    run = trace(lambda a, b: (a * b).sin() + b)
    a, b = leaf(1), leaf(2)
    both = torch.autograd.grad(run(a, b).sum(), (a, b))
    one = torch.autograd.grad(run(a, b).sum(), a)
    return both, one, a.grad


@feature()
def closed_over_tensor(trace: Trace) -> Any:
    weight = leaf(3, 6, 2)
    run = trace(lambda x: torch.tanh(x @ weight))
    for seed in range(3):
        run(rows(seed)).sum().backward()
    return weight.grad


@feature()
def gradient_accumulation(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    for seed in range(4):
        (run(rows(seed)).square().mean() / 4).backward()
    return grads(model)


@feature()
def retain_graph(trace: Trace) -> Any:
    model = mlp()
    loss = trace(model)(rows()).square().sum()
    loss.backward(retain_graph=True)
    first = [g.clone() for g in grads(model) if g is not None]
    loss.backward()
    return first, grads(model)


@feature()
def two_forwards_before_one_backward(trace: Trace) -> Any:
    model = mlp(0.3)
    run = trace(model)
    one, other = run(rows(1)), run(rows(2))
    (one * other).sum().backward()
    return grads(model)


@feature()
def backwards_in_the_other_order(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    losses = [run(rows(seed)).square().sum() for seed in range(3)]
    for loss in reversed(losses):
        loss.backward()
    return grads(model)


def tensor_hooks(trace: Trace) -> Any:
    run = trace(lambda x, w: torch.tanh(x @ w))
    x, w = leaf(1), leaf(2, 6, 3)
    seen: list[Tensor] = []
    w.register_hook(lambda g: seen.append(g.clone()))
    x.register_hook(lambda g: g * 2)
    w.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    for _ in range(2):
        out = run(x, w)
        out.register_hook(lambda g: g + 1)
        out.sum().backward()
    return seen, x.grad, w.grad


feature()(tensor_hooks)


@feature()
def hook_on_a_parameter(trace: Trace) -> Any:
    model = mlp()
    model[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
    run = trace(model)
    run(rows()).sum().backward()
    run(rows(2)).sum().backward()
    return grads(model)


@feature()
def full_backward_hook_of_a_module(trace: Trace) -> Any:
    model = mlp()
    model[1].register_full_backward_hook(lambda module, given, made: (given[0] * 3,))
    run = trace(model)
    for seed in range(2):
        run(rows(seed)).sum().backward()
    return grads(model)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def ten_steps(make: Callable[[Any], torch.optim.Optimizer], clip: float | None = None) -> Feature:
    def procedure(trace: Trace) -> Any:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        run, optimizer = trace(model), make(model.parameters())
        losses, norms = [], []
        for seed in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(run(rows(seed)), torch.arange(5) % 3)
            loss.backward()
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
            losses.append(loss.detach())
        return losses, norms, values(model)

    return procedure


FEATURES |= {f"ten steps of {name}": (ten_steps(make), 1) for name, make in OPTIMIZERS.items()}
FEATURES["gradient clipping"] = ten_steps(OPTIMIZERS["SGD"], clip=0.1), 1


def scaled(dtype: torch.dtype) -> Feature:
    def procedure(trace: Trace) -> Any:
        model = mlp(0.2)
        run = trace(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        seen = []
        for seed in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                out = run(rows(seed))
                loss = out.float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            seen.append((out.detach(), loss.detach(), scaler.get_scale()))
        return seen, values(model)

    return procedure


FEATURES["GradScaler, bfloat16"] = scaled(torch.bfloat16), 1
FEATURES["GradScaler, float16"] = scaled(torch.float16), 1


class Checkpointed(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = mlp(dropout), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def checkpointed(dropout: float) -> Feature:
    def procedure(trace: Trace) -> Any:
        model = Checkpointed(dropout)
        run = trace(model)
        x = leaf()
        for _ in range(2):
            run(x).square().sum().backward()
        return x.grad, grads(model)

    return procedure


FEATURES["checkpoint"] = checkpointed(0.0), 1
FEATURES["checkpoint with dropout"] = checkpointed(0.5), 1


class Straight(torch.autograd.Function):
    """Rounds; its gradient is made up, so that a derived one would be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.abs() + 7


@feature()
def custom_function(trace: Trace) -> Any:
    run = trace(lambda x: Straight.apply(x * 3).sum())
    x = leaf()
    for _ in range(2):
        run(x).backward()
    return x.grad


def partly_without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x @ w).abs().mean()
    return (x @ w) / scale + x.detach().sum() * w.sum()


@feature()
def no_grad_and_detach_inside(trace: Trace) -> Any:
    run = trace(partly_without_grad)
    x, w = leaf(1), leaf(2, 6, 3)
    for _ in range(2):
        out = run(x, w)
        out.sum().backward()
    return out, x.grad, w.grad


@feature()
def outputs_that_do_not_require_grad(trace: Trace) -> Any:
    run = trace(lambda x: (x.exp(), x.detach() * 2, x.argmax(1), x > 0, (x * 3).detach(), 5))
    x = leaf()
    out = run(x)
    out[0].sum().backward()
    return out, [t.requires_grad for t in out[:-1]], [t.is_leaf for t in out[:-1]], x.grad


@feature()
def frozen_parameters(trace: Trace) -> Any:
    model = mlp()
    model[0].requires_grad_(False)
    run = trace(model)
    for seed in range(2):
        run(rows(seed)).sum().backward()
    return grads(model)


@feature(traces=2)
def parameters_frozen_later(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    run(rows()).sum().backward()
    model[0].requires_grad_(False)
    run(rows(2)).sum().backward()
    return grads(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@feature()
def shared_parameters(trace: Trace) -> Any:
    model = Tied()
    run = trace(model)
    for seed in range(2):
        run(rows(seed)).square().sum().backward()
    return grads(model)


@feature()
def buffers_of_batch_norm(trace: Trace) -> Any:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    run = trace(model)
    for seed in range(3):
        run(rows(seed, 2, 2, 6, 6)).square().sum().backward()
    return grads(model), values(model)


@feature()
def dropout(trace: Trace) -> Any:
    run = trace(mlp(0.5))
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = leaf(seed)
        out = run(x)
        out.sum().backward()
        seen.append((out.detach(), x.grad, torch.get_rng_state()))
    return seen


@feature()
def dropout_of_attention(trace: Trace) -> Any:
    run = trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True))
    q, k, v = (leaf(seed, 2, 2, 5, 4) for seed in range(3))
    torch.manual_seed(3)
    for _ in range(2):
        run(q, k, v).square().sum().backward()
    return q.grad, k.grad, v.grad, torch.get_rng_state()


@feature()
def views_of_inputs(trace: Trace) -> Any:
    run = trace(lambda x: (x.t(), x[1:], x * 2))
    x = torch.arange(30.0).view(5, 6).requires_grad_()  # sums are exact: eager adds up in another order
    t, tail, double = run(x)
    (t.square().sum() + tail.sum() * 3 + double.square().sum()).backward()
    return t, tail, x.grad, [o.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for o in (t, tail)]


@feature()
def only_views_of_inputs(trace: Trace) -> Any:
    run = trace(lambda x: x.view(-1)[::2])
    x = leaf()
    run(x).square().sum().backward()
    return x.grad


@feature()
def outputs_that_alias_each_other(trace: Trace) -> Any:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.sin()
        return y, y.t(), y[0]

    x = leaf()
    y, t, first = trace(fn)(x)
    (y.sum() + t.square().sum() + first.exp().sum()).backward()
    return y, t, first, x.grad, [o.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for o in (t, first)]


@feature()
def output_that_is_an_input(trace: Trace) -> Any:
    run = trace(lambda x, w: (x, x * w))
    x, w = leaf(1), leaf(2)
    same, product = run(x, w)
    (same.sum() + product.sum()).backward()
    return same is x, x.grad, w.grad


@feature()
def the_same_output_twice(trace: Trace) -> Any:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y

    x = leaf()
    one, other = trace(fn)(x)
    (one * other).sum().backward()
    return one is other, x.grad


@feature()
def an_output_that_is_not_used(trace: Trace) -> Any:
    run = trace(lambda x: (x * 2, x.log()))
    x = torch.zeros(3, requires_grad=True)
    for _ in range(2):
        run(x)[0].sum().backward()
    assert not x.grad.isnan().any()
    return x.grad


@feature()
def gradients_of_zero_are_no_absent_gradients(trace: Trace) -> Any:
    run = trace(lambda x: (x * 2, x.log()))
    x = torch.zeros(3, requires_grad=True)
    double, log = run(x)
    (double.sum() + log.sum() * 0).backward()
    assert x.grad.isnan().all()
    return x.grad


@feature()
def unused_parameters_and_inputs(trace: Trace) -> Any:
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    run = trace(lambda x, y: model["used"](x))
    x, y = leaf(1), leaf(2)
    run(x, y).sum().backward()
    return grads(model), x.grad, y.grad


@feature()
def saved_twice(trace: Trace) -> Any:
    def fn(x: Tensor) -> Tensor:
        y = x.exp()
        return y * y + y.sin() * y

    x = leaf()
    trace(fn)(x).sum().backward()
    return x.grad


@feature()
def intermediate_changed_in_place(trace: Trace) -> Any:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y[1:].mul_(3).add_(x[1:])
        y[0] = x.sum()
        return y.sin_()

    run = trace(fn)
    x = leaf()
    for _ in range(2):
        run(x).square().sum().backward()
    return x.grad


@feature()
def input_that_is_not_a_leaf(trace: Trace) -> Any:
    run = trace(lambda x, w: torch.relu(x @ w))
    x, w = leaf(1), leaf(2, 6, 6)
    out = x
    for _ in range(3):
        out = run(out * 1.5, w)
    out.sum().backward()
    return x.grad, w.grad


@feature(traces=2)
def inference_after_training(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    run(rows()).sum().backward()
    with torch.no_grad():
        quiet = run(rows())
    run(rows(2)).sum().backward()
    return quiet, quiet.requires_grad, grads(model)


@feature()
def complex_numbers(trace: Trace) -> Any:
    run = trace(lambda x: torch.fft.rfft(x).abs().square().log1p())
    x = leaf()
    for _ in range(2):
        run(x).sum().backward()
    return x.grad


@feature()
def gradients_of_other_strides(trace: Trace) -> Any:
    run = trace(lambda x, w: x @ w)
    x, w = leaf(1), leaf(2, 6, 5)
    run(x, w).sum().backward()
    run(x, w).t().contiguous().square().sum().backward()
    run(x, w).backward(rows(4, 5, 5).t())
    return x.grad, w.grad


@feature()
def saved_tensors_hooks(trace: Trace) -> Any:
    run = trace(mlp())
    x = leaf()
    with torch.autograd.graph.save_on_cpu():
        out = run(x)
    out.square().sum().backward()
    return x.grad


@feature()
def anomaly_mode(trace: Trace) -> Any:
    run = trace(lambda x: x.sqrt().sum())
    x = rows().abs().requires_grad_()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        run(x).backward()
    return x.grad


def run_feature(procedure: Feature, traced: bool) -> tuple[Any, int]:
    made: list[Any] = []

    def trace(fn: Any) -> Any:
        made.append(primexec.make_traced(fn) if traced else fn)
        return made[-1]

    torch.manual_seed(0)
    return procedure(trace), sum(run.cache_info().traces for run in made) if traced else 0


def plain(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach(), tree)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str) -> None:
    procedure, traces = FEATURES[name]
    expected, _ = run_feature(procedure, traced=False)
    actual, counted = run_feature(procedure, traced=True)
    assert_same(plain(actual), plain(expected))
    assert counted == traces


def fails(procedure: Callable[[Trace], Any], trace: Trace) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011, whatever eager raises
        procedure(trace)
    return raised.value


def saved_input_changed(trace: Trace) -> None:
    x, w = leaf(1), leaf(2)
    out = trace(lambda x, w: x * w)(x, w)
    with torch.no_grad():
        w.mul_(2)
    out.sum().backward()


def saved_output_changed(trace: Trace) -> None:
    out = trace(lambda x: x.exp())(leaf())
    out.mul_(2)
    out.sum().backward()


def backward_twice(trace: Trace) -> None:
    loss = trace(lambda x: x.exp().sum())(leaf())
    loss.backward()
    loss.backward()


def wrong_shape_of_a_gradient(trace: Trace) -> None:
    trace(lambda x: x.exp())(leaf()).backward(torch.ones(2))


def leaf_changed_in_place(trace: Trace) -> None:
    trace(lambda x: x.mul_(2))(leaf())


def unused_input(trace: Trace) -> None:
    x, y = leaf(1), leaf(2)
    torch.autograd.grad(trace(lambda x, y: x * 2)(x, y).sum(), y)


@pytest.mark.parametrize(
    "procedure",
    [
        saved_input_changed,
        saved_output_changed,
        backward_twice,
        wrong_shape_of_a_gradient,
        leaf_changed_in_place,
        unused_input,
    ],
    ids=lambda procedure: procedure.__name__,
)
def test_raises_what_eager_raises(procedure: Callable[[Trace], Any]) -> None:
    expected, actual = fails(procedure, lambda fn: fn), fails(procedure, primexec.make_traced)
    assert type(actual) is type(expected)
    words = str(expected).split(":")[0][:60]
    assert words in str(actual)


def test_what_may_change_before_backward() -> None:
    """A parameter that backward does not need may be updated first, as in eager."""
    x, bias = leaf(1), leaf(2)
    out = primexec.make_traced(lambda x, b: x.exp() + b)(x, bias)
    with torch.no_grad():
        bias.zero_()
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp(), rtol=0, atol=0)


SECOND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "grad": lambda g, x: torch.autograd.grad(g.sum(), x),
    "grad, unused allowed": lambda g, x: torch.autograd.grad(g.sum(), x, allow_unused=True),
    "backward": lambda g, x: g.sum().backward(),
}


@pytest.mark.parametrize("ask", SECOND)
def test_second_derivatives_are_refused(ask: str) -> None:
    x = leaf()
    out = primexec.make_traced(lambda x: x.exp())(x)

    def differentiate() -> None:
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        SECOND[ask](first, x)

    with pytest.raises(primexec.PrimexecError, match=r"once more|second derivative|create_graph"):
        differentiate()


def test_backward_frees_what_was_saved() -> None:
    freed = []

    def saved_of(loss: Tensor) -> list[weakref.ref[Any]]:
        node = loss.grad_fn
        return [weakref.ref(node)]

    run = primexec.make_traced(lambda x, w: torch.tanh(x @ w).exp().sum())
    w = leaf(2, 6, 6)
    for seed in range(2):
        x = leaf(seed)
        where = weakref.ref(x)
        loss = run(x * 1, w)
        freed += saved_of(loss)
        loss.backward()
        del x, loss
        assert where() is None
    gc.collect()
    assert all(node() is None for node in freed)


def test_memory_of_a_training_loop_does_not_grow() -> None:
    """As many tensors live after ten steps as after three."""
    model = mlp(0.1)
    run, optimizer = primexec.make_traced(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    counted = []
    for seed in range(10):
        optimizer.zero_grad()
        run(rows(seed)).square().sum().backward()
        optimizer.step()
        gc.collect()
        counted.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counted[-1] == counted[2]


def test_no_backward_leaves_nothing_behind() -> None:
    run = primexec.make_traced(lambda x, w: torch.tanh(x @ w))
    x, w = leaf(1), leaf(2, 6, 6)
    run(x, w).sum().backward()
    out = run(x, w)
    node = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert node() is None


@pytest.mark.parametrize("how", COPIES)
def test_copies_train(how: str) -> None:
    torch.manual_seed(0)
    model = mlp()
    traced = primexec.make_traced(model)
    traced(rows()).sum().backward()
    twin = COPIES[how](traced)
    for module in (model, twin):
        module.zero_grad()
    twin(rows(2)).square().sum().backward()
    mine = [g.clone() for g in grads(twin) if g is not None]
    assert grads(model) == [None] * 4
    model(rows(2)).square().sum().backward()
    assert_same(mine, grads(model))


def test_threads_train_at_once() -> None:
    torch.manual_seed(0)
    models = [mlp() for _ in range(4)]
    twins = copy.deepcopy(models)
    shared = primexec.make_traced(lambda model, x: F.gelu(x @ model), cache_size=8)
    failures: list[BaseException] = []
    start = threading.Barrier(len(models))
    weights = [leaf(seed, 6, 6) for seed in range(len(models))]

    def train(model: nn.Module, weight: Tensor) -> None:
        try:
            run = primexec.make_traced(model)
            start.wait()
            for seed in range(10):
                run(rows(seed)).square().sum().backward()
                shared(weight, rows(seed)).sum().backward()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, weights, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for position, (model, twin) in enumerate(zip(models, twins, strict=True)):
        weight = leaf(position, 6, 6)
        for seed in range(10):
            twin(rows(seed)).square().sum().backward()
            F.gelu(rows(seed) @ weight).sum().backward()
        assert_same(grads(model), grads(twin))
        assert_same(weights[position].grad, weight.grad)


def test_errors_name_the_line() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        if y.sum() > 0:  # a branch on a value
            return y
        return y + 1

    with pytest.raises(primexec.CaptureError, match=r"test_training_features\.py(.|\n)*if y\.sum\(\) > 0"):
        primexec.make_traced(fn)(leaf())


def test_explain_shows_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    text = str(primexec.make_traced(model).explain(rows()))
    assert "backward" in text.lower()
    assert re.search(r"saved", text)
    assert capsys.readouterr().out
