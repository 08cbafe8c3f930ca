"""The capture of one call: what it refuses and how, whose exceptions pass, and what it leaves as it was."""

import copy
import gc
import pickle
import random
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import primexec
from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)


def counts(traced: Any) -> tuple[int, int, int]:
    """Hits, misses, traces."""
    return tuple(traced.cache_info())[:3]


# Refusals -----------------------------------------------------------------------------------------------


def refusal(fn: Callable[..., Any], *args: Any) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        make_traced(fn)(*args)
    return caught.value


def branch(x: Tensor) -> Tensor:
    y = x + 1
    if complex(y.sum()) == 0:  # the branch
        return y
    return x


def test_refusal_names_reason_line_and_way_out() -> None:
    error = refusal(branch, X)
    line = branch.__code__.co_firstlineno + 2
    assert error.source is not None
    assert (error.source.file, error.source.line, error.source.function) == (__file__, line, "branch")
    assert error.source.text == "if complex(y.sum()) == 0:  # the branch"
    assert "value of a tensor" in error.reason
    assert "torch.where" in error.hint
    assert str(error).splitlines() == [
        error.reason,
        f'  File "{__file__}", line {line}, in branch',
        "    if complex(y.sum()) == 0:  # the branch",
        f"What to do: {error.hint}",
    ]
    assert isinstance(error, primexec.PrimexecError)
    assert isinstance(error, RuntimeError)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_refusal_survives_a_copy(copied: Callable[[Any], Any]) -> None:
    error = refusal(branch, X)
    other = copied(error)
    assert type(other) is CaptureError
    assert str(other) == str(error)
    assert (other.reason, other.hint, other.source) == (error.reason, error.hint, error.source)


def test_refusal_names_the_innermost_line_of_the_user() -> None:
    def helper(x: Tensor) -> complex:
        return complex(torch.relu(x).sum())

    error = refusal(lambda x: x * helper(x), X)
    assert error.source is not None
    assert error.source.text == "return complex(torch.relu(x).sum())"


def test_refusal_inside_a_layer_of_torch() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def inner(self, x: Tensor) -> Tensor:
            return x * complex(x.sum())

    error = refusal(nn.Sequential(nn.ReLU(), Odd()), X)
    assert error.source is not None
    assert error.source.text == "return x * complex(x.sum())"


def test_refusal_without_a_line_names_the_function() -> None:
    error = refusal(lambda x, odd: x, X, object())
    assert error.source is not None
    assert (error.source.file, error.source.function) == (
        __file__,
        "test_refusal_without_a_line_names_the_function.<locals>.<lambda>",
    )


@pytest.mark.parametrize(
    "fn", [nn.Linear(4, 4), lambda x: [x, {"a": x + 1}], lambda x: x.relu_()], ids=["module", "containers", "in_place"]
)
def test_no_tensor_hangs_in_a_cycle_after_a_trace(fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle would be found by a collection of all objects, which takes longer than a small program takes to make."""
    collected = []
    monkeypatch.setattr(gc, "collect", lambda *_: collected.append(1))
    make_traced(fn)(torch.randn(4, 4))
    assert not collected


def swallow(x: Tensor) -> Tensor:
    try:
        return x * complex(x.sum())
    except Exception:
        return x


def swallow_all(x: Tensor) -> Tensor:
    try:
        scale = complex(x.sum())
    except:  # noqa: E722
        scale = 1.0
    return x * scale


def swallow_in_finally(x: Tensor) -> Tensor:
    for _ in range(1):
        try:
            complex(x.sum())
        finally:
            break  # noqa: B012
    return x


@pytest.mark.filterwarnings("ignore:'break' in a 'finally' block:SyntaxWarning")
@pytest.mark.parametrize("fn", [swallow, swallow_all, swallow_in_finally], ids=lambda f: f.__name__)
def test_refusal_that_the_function_catches_is_raised(fn: Callable[[Tensor], Tensor]) -> None:
    traced = make_traced(fn)
    for _ in range(2):
        with pytest.raises(CaptureError):
            traced(X)
    assert counts(traced) == (0, 2, 0)


LAZY = {
    "linear": lambda: nn.LazyLinear(2),
    "inside": lambda: nn.Sequential(nn.ReLU(), nn.LazyBatchNorm1d()),
}


@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
@torch.no_grad()
def test_lazy_module_is_refused_until_it_ran(make: Callable[[], nn.Module]) -> None:
    module = make()
    traced = make_traced(module)
    with pytest.raises(CaptureError, match="not initialised") as refused:
        traced(X)
    assert "run the lazy module once" in refused.value.hint
    assert any(torch.nn.parameter.is_lazy(p) for p in module.parameters())
    module(X)
    module.eval()
    assert torch.equal(traced(X), module(X))


# Exceptions of the user's code --------------------------------------------------------------------------


def test_the_exception_of_the_function_is_the_one_that_arrives() -> None:
    class OwnError(Exception):
        pass

    error = OwnError("three rows are too few")
    cause = KeyError("cause")

    def function(x: Tensor) -> Tensor:
        x.add_(1)
        raise error from cause

    traced = make_traced(function)
    x = X.clone()
    for calls in range(1, 3):
        with pytest.raises(OwnError) as caught:
            traced(x)
        assert caught.value is error
        assert error.__cause__ is cause
        assert not hasattr(error, "__notes__")
        assert torch.equal(x, X + calls)
    assert counts(traced) == (0, 2, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_exits_pass(kind: type[BaseException]) -> None:
    error = kind()

    def function(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(kind) as caught:
        make_traced(function)(X)
    assert caught.value is error
    assert not torch.compiler.is_compiling()


ERRORS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "matmul": (lambda a, b: a @ b, (X, X), "2x3 and 2x3"),
    "linear": (lambda a, w: torch.nn.functional.linear(a, w), (X, X.t()), "2x3"),
    "broadcast": (lambda a, b: a + b, (X, torch.ones(4)), "3"),
    "view": (lambda a: a.view(4, 4), (X,), "[4, 4]"),
    "reshape": (lambda a: a.reshape(5), (X,), "[5]"),
    "cat": (lambda a, b: torch.cat([a, b]), (X, torch.ones(2, 4)), "3"),
    "index": (lambda a: a[5], (X,), "5"),
    "dim": (lambda a: a.sum(7), (X,), "7"),
    "dtype": (lambda a: a << 1, (X,), ""),
    "conv": (lambda a, w: torch.conv2d(a, w), (torch.ones(1, 3, 4, 4), torch.ones(2, 4, 1, 1)), "[1, 3, 4, 4]"),
    "embedding": (lambda w, i: torch.nn.functional.embedding(i, w), (X, X), ""),
    "in place": (lambda a, b: a.add_(b), (torch.ones(3), torch.ones(2, 3)), "[2, 3]"),
    "argument": (lambda a: torch.softmax(a, dim="x"), (X,), ""),
    "keyword": (lambda a: a.sum(nonsense=1), (X,), "nonsense"),
    "attribute": (lambda a: a.nonsense, (X,), "nonsense"),
    "unpacking": (lambda a: [p for p, q, r in [a]], (X,), "3"),
}


def outcome(fn: Callable[..., Any], *args: Any) -> Any:
    """What fn returns, or the exception that it raises."""
    try:
        return fn(*args)
    except Exception as error:
        return error


@pytest.mark.parametrize(("fn", "args", "shapes"), ERRORS.values(), ids=ERRORS)
def test_error_is_eagers_and_names_the_line(
    fn: Callable[..., Any], args: tuple[Tensor, ...], shapes: str, capfd: pytest.CaptureFixture[str]
) -> None:
    eager, error = outcome(fn, *args), outcome(make_traced(fn), *args)
    assert type(error) is type(eager)
    assert shapes in str(eager)
    assert shapes in str(error)
    text = "".join(traceback.format_exception(error))
    if type(eager) is RuntimeError:
        assert f'File "{__file__}", line {fn.__code__.co_firstlineno}, in <lambda>' in text
    assert capfd.readouterr() == ("", "")


def test_error_that_only_real_values_show() -> None:
    @make_traced
    def lookup(table: Tensor, index: Tensor) -> Tensor:
        return table[index]

    assert torch.equal(lookup(X, torch.tensor([1])), X[1:])
    with pytest.raises(IndexError, match="index 9 is out of bounds") as caught:
        lookup(X, torch.tensor([9]))
    assert "return table[index]" in "".join(traceback.format_exception(caught.value))
    assert torch.equal(lookup(X, torch.tensor([0])), X[:1])
    assert counts(lookup)[1:] == (1, 1)


# What a capture leaves as it was ------------------------------------------------------------------------


def surroundings() -> list[Any]:
    numpy_state = np.random.get_state()
    return [
        torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:],
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.compiler.is_compiling(),
        torch.overrides.has_torch_function, gc.isenabled(), torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    ]  # fmt: skip


def raises(x: Tensor) -> Tensor:
    torch.rand(2)
    raise ValueError


DISTURBING: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x + 1,
    "torch numbers": lambda x: x + torch.rand(3),
    "random": lambda x: x * random.random(),
    "numpy numbers": lambda x: x * np.random.rand(),
    "value": lambda x: x * (x + torch.rand(3)).sum().item(),
    "exception": raises,
    "shape": lambda x: torch.rand(2) + x,
}


@pytest.mark.parametrize("fn", DISTURBING.values(), ids=DISTURBING)
def test_trace_leaves_the_surroundings(fn: Callable[[Tensor], Any]) -> None:
    before = surroundings()
    x = X.clone()
    traced = make_traced(fn)
    for _ in range(2):
        result = outcome(traced.trace, x)
        assert isinstance(result, primexec.Program | RuntimeError | ValueError)
        assert surroundings() == before
    assert torch.equal(x, X)
    assert x._version == 0


@pytest.mark.parametrize(
    "fn", [lambda x: (torch.set_grad_enabled(False), x + 1), lambda x: (torch.set_grad_enabled(False), x.sum().item())]
)
def test_grad_mode_that_the_function_leaves_changed_is_refused(fn: Callable[[Tensor], Any]) -> None:
    try:
        with pytest.raises(CaptureError):
            make_traced(fn)(X)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_random_numbers_are_eagers_from_the_first_call() -> None:
    generator = torch.Generator()

    def function(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        return x + torch.randn(3), torch.rand(2, generator=g)

    traced = make_traced(function)
    results = []
    for fn in (function, traced, traced):
        torch.manual_seed(3)
        generator.manual_seed(4)
        results.append([*fn(X, generator), torch.get_rng_state(), generator.get_state()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_cache_is_not_poisoned() -> None:
    linear = nn.Linear(3, 3)
    traced = make_traced(linear)
    with torch.no_grad(), torch.autocast("cpu"):
        for _ in range(2):
            for out in (traced(X), linear(X)):
                assert type(out) is Tensor
                assert out.dtype is torch.bfloat16
    with torch.autocast("cpu"):
        loss = linear(X).sum()
    loss.backward()
    assert type(linear.weight.grad) is Tensor


# Lifetimes ----------------------------------------------------------------------------------------------


def alive(references: list[weakref.ref[Any]]) -> int:
    return sum(r() is not None for r in references)


def traced_linear() -> tuple[Any, list[weakref.ref[Any]]]:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval().requires_grad_(False)
    references = [weakref.ref(module), *map(weakref.ref, module.modules()), *map(weakref.ref, module.parameters())]
    return make_traced(module), references


def traced_closure() -> tuple[Any, list[weakref.ref[Any]]]:
    weight = torch.ones(3)
    return make_traced(lambda x: x * weight), [weakref.ref(weight)]


@pytest.mark.parametrize("make", [traced_linear, traced_closure])
def test_dropping_the_traced_function_frees_what_it_used(
    make: Callable[[], tuple[Any, list[weakref.ref[Any]]]],
) -> None:
    traced, references = make()
    for size in (2, 2, 5):
        traced(torch.ones(size, 3))
    traced.trace(X), traced.explain(X)
    assert alive(references) == len(references)
    del traced
    gc.collect()
    assert alive(references) == 0


def test_clearing_the_cache_frees_its_programs() -> None:
    traced, _ = traced_closure()
    traced(X)
    entry = traced._cache.entries[0]
    references = [weakref.ref(entry.captured.program), weakref.ref(entry.executable)]
    del entry
    traced.cache_clear()
    gc.collect()
    assert alive(references) == 0


def test_inputs_and_outputs_are_not_kept() -> None:
    traced = make_traced(lambda x, y: (x + y, x.view(-1), x.add_(0), torch.tensor([1.0]) + 1))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            x, y = torch.ones(3), torch.ones(3)
            outs = traced(x, y)
            references = [weakref.ref(t) for t in (x, y, *outs)]
            del x, y, outs
            assert alive(references) == 0
    finally:
        gc.enable()


def test_state_that_was_replaced_is_not_kept() -> None:
    module = nn.Linear(3, 3).requires_grad_(False)
    traced = make_traced(module)
    traced(X)
    old = weakref.ref(module.weight)
    module.weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    traced(X)
    gc.collect()
    assert old() is None
    assert counts(traced) == (1, 1, 1)


def test_refused_calls_keep_nothing() -> None:
    def function(x: Tensor) -> complex:
        y = x + 1
        return complex(y.sum())

    traced = make_traced(function)
    x = torch.ones(3)
    with pytest.raises(CaptureError):
        traced(x)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("make", [lambda: torch.nn.ReLU(), lambda: lambda x: x])
def test_returned_object_that_the_function_makes_is_refused(make: Any) -> None:
    """Eager returns a new one at every call; a program would return the first one for ever."""
    with pytest.raises(CaptureError, match="cannot be rebuilt"):
        make_traced(lambda x: (x + 1, make()))(torch.ones(2))


@pytest.mark.parametrize("correction", [0, 1])
def test_a_value_that_comes_from_sizes_alone_may_be_asked_for(correction: int) -> None:
    """torch.cov compares the number of observations, a tensor made of a Python number, with zero."""
    traced = make_traced(lambda x: torch.cov(x, correction=correction))
    assert torch.equal(traced(X), torch.cov(X, correction=correction))
    assert counts(traced) == (0, 1, 1)


def test_such_a_value_is_forgotten_once_a_tensor_is_written_into_it() -> None:
    def function(x: Tensor) -> Tensor:
        number = torch.scalar_tensor(3.0)
        number.add_(x.sum())
        return x * 2 if number > 3 else x

    traced = make_traced(function)
    for x in (X, -X, X):
        assert torch.equal(traced(x), function(x))
    assert counts(traced) == (1, 2, 2)


class State:
    """Registered as a pytree without names for its parts."""

    def __init__(self, values: Tensor, count: Any) -> None:
        self.values, self.count = values, count


torch.utils._pytree.register_pytree_node(State, lambda s: ([s.values, s.count], None), lambda parts, _: State(*parts))


def test_parts_of_a_pytree_without_names_are_numbered() -> None:
    traced = make_traced(lambda x, state: State(state.values * x, state.count + 1))
    for i in range(2):
        out = traced(X, State(X + i, 2))
        assert torch.equal(out.values, (X + i) * X)
        assert out.count == 3
    assert counts(traced) == (1, 1, 1)
    assert [i.label for i in traced.trace(X, State(X + 1, 2)).inputs] == ["x", "state[0]"]
    with pytest.raises(CaptureError, match=r"state\[1\] is of type object"):
        traced(X, State(X, object()))


def test_true_that_pytorch_takes_for_one_is_refused() -> None:
    """Eager gives bools here, and the operator that a program would hold gives ints."""
    with pytest.raises(CaptureError, match="takes a bool for a number"):
        make_traced(lambda x: x**True)(torch.tensor([True, False]))
    assert torch.equal(make_traced(lambda x: x**True)(torch.tensor([2, 3])), torch.tensor([2, 3]))
