"""Training procedures, run with a function and with its traced form: the same bits come out."""

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

import primexec
from tests.copies import COPIES
from tests.test_transformers import assert_same
from tests.training_corners import FEATURES
from tests.training_features import Feature, Trace, grads, leaf, mlp, rows


def run_feature(procedure: Feature, traced: bool, executor: Any = "auto") -> tuple[Any, int]:
    made: list[Any] = []

    def trace(fn: Any) -> Any:
        made.append(primexec.make_traced(fn, executor=executor) if traced else fn)
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


# They divide gradients by their size: where eager's are rounding alone (a bias before a norm), signs are chance.
ADAPTIVE = {f"ten steps of {name}" for name in ("AdamW", "Adam, fused", "AdamW, foreach", "RMSprop", "Adagrad")}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ADAPTIVE])
def test_feature_on_llvm(name: str) -> None:
    procedure, traces = FEATURES[name]
    expected, _ = run_feature(procedure, traced=False)
    actual, counted = run_feature(procedure, traced=True, executor=("llvm", "aten"))
    mine, others = (torch.utils._pytree.tree_leaves(plain(tree)) for tree in (actual, expected))
    for a, b in zip(mine, others, strict=True):
        if isinstance(a, (Tensor, float)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert a == b
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


def saved_product_changed(trace: Trace) -> None:
    out = trace(lambda x, w: (x @ w).sigmoid_())(rows(1, 2, 3, 4), leaf(2, 4, 5))
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
        saved_product_changed,
        backward_twice,
        wrong_shape_of_a_gradient,
        leaf_changed_in_place,
        unused_input,
    ],
    ids=lambda procedure: procedure.__name__,
)
@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=str)
def test_raises_what_eager_raises(procedure: Callable[[Trace], Any], executor: Any) -> None:
    expected = fails(procedure, lambda fn: fn)
    actual = fails(procedure, lambda fn: primexec.make_traced(fn, executor=executor))
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
        return y if complex(y.sum()) == 0 else y + 1

    with pytest.raises(primexec.CaptureError, match=r"test_training_features\.py(.|\n)*if complex\(y\.sum\(\)\) == 0"):
        primexec.make_traced(fn)(leaf())


def test_explain_shows_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    text = str(primexec.make_traced(model).explain(rows()))
    assert "backward" in text.lower()
    assert re.search(r"saved", text)
    assert capsys.readouterr().out


def test_saved_tensors_hooks_around_the_first_call() -> None:
    traced = primexec.make_traced(lambda x: (x * x).sum())
    for _ in range(2):
        x = torch.arange(1.0, 4.0, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
            traced(x).backward()
        assert x.grad is not None
        assert torch.equal(x.grad, 4 * x.detach())
