"""What users call: make_traced as a decorator and by hand, overrides, counts, switches, execute."""

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import primexec
from primexec import execute, make_traced
from tests.copies import COPIES
from tests.isolated import python

X = torch.arange(6.0).reshape(2, 3)
UNKNOWN_EXECUTOR = "Received unexpected value for 'executor': cuda_graphs. Allowed values are: aten, numpy, llvm."


def scale(x: Tensor, factor: float = 2.0, /, *, shift: int = 1) -> Tensor:
    """Scale and shift."""
    return x * factor + shift


@make_traced
def module_level(x: Tensor) -> Tensor:
    return x + 1


def counts(traced: Any) -> tuple[int, int, int]:
    """Hits, misses, traces."""
    return tuple(traced.cache_info())[:3]


# As a decorator -----------------------------------------------------------------------------------------

DECORATORS: dict[str, Callable[[Any], Any]] = {
    "bare": make_traced,
    "called": make_traced(),
    "options": make_traced(executor="aten", executor_parameters={"strict": True}, cache_size=3),
    "sequence": make_traced(executor=["aten", "auto"]),
}


@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
def test_decorator_keeps_the_function(decorate: Callable[[Any], Any]) -> None:
    traced = decorate(scale)
    for _ in range(2):
        assert torch.equal(traced(X, 3.0, shift=2), scale(X, 3.0, shift=2))
    assert counts(traced) == (1, 1, 1)
    assert inspect.signature(traced) == inspect.signature(scale)
    assert traced.__wrapped__ is scale
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        assert getattr(traced, name) == getattr(scale, name)
    assert repr(traced) == "<traced scale>"


def test_traced_again_is_traced_once() -> None:
    inner = make_traced(scale)
    outer = make_traced(inner, cache_size=2)
    assert torch.equal(outer(X), scale(X))
    assert outer.__wrapped__ is scale
    assert (counts(outer), counts(inner)) == ((0, 1, 1), (0, 0, 0))


class Layer:
    def __init__(self, weight: float) -> None:
        self.weight = torch.full((3,), weight)

    @make_traced
    def run(self, x: Tensor, twice: bool = False) -> Tensor:
        return x * self.weight * (2 if twice else 1)

    @staticmethod
    @make_traced
    def static(x: Tensor) -> Tensor:
        return x + 1


class Deeper(Layer):
    @make_traced
    def run(self, x: Tensor, twice: bool = False) -> Tensor:
        return super().run(x, twice) + 1


def test_method_has_a_cache_for_each_instance() -> None:
    one, two = Layer(2.0), Layer(3.0)
    assert torch.equal(one.run(X), X * 2)
    assert torch.equal(one.run(X + 1), (X + 1) * 2)
    assert torch.equal(two.run(X, twice=True), X * 6)
    assert (counts(one.run), counts(two.run)) == ((1, 1, 1), (0, 1, 1))
    assert Layer.run is inspect.getattr_static(Layer, "run")
    with pytest.raises(primexec.CaptureError, match=r"^self\._primexec_methods is of type"):
        Layer.run(one, X)


def test_static_method() -> None:
    assert torch.equal(Layer.static(X), X + 1)
    assert torch.equal(Layer(1.0).static(X), X + 1)
    assert counts(Layer.static) == (1, 1, 1)


def test_class_method() -> None:
    class Config:
        factor = 2.0

        @classmethod
        @make_traced
        def run(cls, x: Tensor) -> Tensor:
            return x * cls.factor

    assert torch.equal(Config.run(X), X * 2)
    assert torch.equal(Config().run(X), X * 2)


def test_method_calls_the_traced_method_that_it_overrides() -> None:
    layer = Deeper(2.0)
    for _ in range(2):
        assert torch.equal(layer.run(X), X * 2 + 1)
    assert counts(layer.run) == (1, 1, 1)


def test_method_of_an_object_that_can_keep_no_cache() -> None:
    class Slotted:
        __slots__ = ("factor",)

        @make_traced
        def run(self, x: Tensor) -> Tensor:
            return x * self.factor

    with pytest.raises(TypeError, match="Slotted"):
        Slotted().run(X)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_method_of_a_copied_object(copied: Callable[[Any], Any]) -> None:
    layer = Layer(2.0)
    layer.run(X)
    other = copied(layer)
    other.weight = torch.full((3,), 5.0)
    assert torch.equal(other.run(X), X * 5)
    assert torch.equal(layer.run(X), X * 2)


def test_method_in_the_body_of_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        @make_traced
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu()

    net = Net().eval()
    with torch.no_grad():
        expected = net.linear(X).relu()
        for _ in range(2):
            assert torch.equal(net(X), expected)
    assert counts(net.forward) == (1, 1, 1)
    assert set(net.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("odd", [3, "scale", X], ids=["int", "str", "tensor"])
def test_only_callables(odd: Any) -> None:
    with pytest.raises(TypeError, match="make_traced takes a callable"):
        make_traced(odd)


# Executors and their parameters -------------------------------------------------------------------------


def test_choice_at_the_call_has_a_cache_of_its_own() -> None:
    traced = make_traced(scale)
    for options in ({}, {"executor": "aten"}, {"executor": ("auto",)}, {"executor_parameters": {"strict": True}}) * 2:
        assert torch.equal(traced(X, 3.0, **options), scale(X, 3.0))
    # ("auto",) says the same as nothing; the two others are choices of their own
    assert traced.cache_info() == (5, 3, 3, 3, 0, 3)
    traced.cache_clear()
    assert traced.cache_info() == (0, 0, 0, 0, 0, 0)


def test_parameters_of_that_name_belong_to_the_function() -> None:
    @make_traced
    def owns_executor(x: Tensor, executor: str = "none") -> tuple[Tensor, str]:
        return x + 1, executor

    @make_traced
    def owns_parameters(x: Tensor, executor_parameters: Any = None) -> tuple[Tensor, Any]:
        return x + 1, executor_parameters

    assert owns_executor(X, executor="mine")[1] == "mine"
    assert owns_executor(X, executor="mine", executor_parameters={"strict": True})[1] == "mine"
    assert owns_parameters(X, executor_parameters="mine")[1] == "mine"
    assert owns_parameters(X, executor_parameters="mine", executor="aten")[1] == "mine"
    with pytest.raises(ValueError, match="executor parameters: nonsense"):
        owns_executor(X, executor_parameters={"nonsense": 1})
    with pytest.raises(ValueError, match="'executor': nonsense"):
        owns_parameters(X, executor="nonsense")


class OwnsExecutor(nn.Module):
    def forward(self, x: Tensor, executor: str = "none") -> tuple[Tensor, str]:
        return x + 1, executor


def test_parameters_of_forward_belong_to_the_module() -> None:
    traced = make_traced(OwnsExecutor())
    assert traced(X, executor="mine")[1] == "mine"
    with primexec.disable():
        assert traced(X, executor="mine", executor_parameters=None)[1] == "mine"


REFUSED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "make_traced": lambda options: make_traced(scale, **options),
    "decorator": lambda options: make_traced(**options)(scale),
    "module": lambda options: make_traced(nn.ReLU(), **options),
    "call": lambda options: make_traced(scale)(X, **options),
    "trace": lambda options: make_traced(scale).trace(X, **options),
    "explain": lambda options: make_traced(scale).explain(X, **options),
    "execute": lambda options: execute(fx.symbolic_trace(nn.ReLU()), X, **options),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_unknown_names(use: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ValueError, match="unexpected") as unknown:
        use({"executor": "cuda_graphs"})
    assert str(unknown.value) == UNKNOWN_EXECUTOR
    with pytest.raises(ValueError, match="unexpected executor parameters: fuse, tile") as unknown:
        use({"executor": "aten", "executor_parameters": {"tile": 3, "strict": True, "fuse": 1}})
    assert str(unknown.value).endswith("Allowed parameters of aten are: save, strict.")


@pytest.mark.parametrize("executor", [(), [1], None, 3], ids=str)
def test_malformed_executor(executor: Any) -> None:
    with pytest.raises(TypeError):
        make_traced(scale, executor=executor)


# Counts -------------------------------------------------------------------------------------------------


def test_least_recently_used_program_goes_first() -> None:
    traced = make_traced(lambda x: x * 2, cache_size=2)
    #         size, hit or not: 1 and 2 are kept; 1 is used, so 3 evicts 2, and then 2 evicts 1
    history = [(1, False), (2, False), (1, True), (3, False), (3, True), (1, True), (3, True), (2, False), (1, False)]
    hits = 0
    for size, hit in history:
        x = torch.randn(size)
        assert torch.equal(traced(x), x * 2)
        hits += hit
        assert traced.cache_info().hits == hits
    assert traced.cache_info() == (4, 5, 5, 5, 3, 2)


def test_no_cache_is_no_size() -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match="cache_size must be at least 1"):
            make_traced(scale, cache_size=size)
    traced = make_traced(lambda x: x + 1, cache_size=1)
    for size in (1, 2, 2):
        traced(torch.ones(size))
    assert traced.cache_info() == (1, 2, 2, 2, 1, 1)


def test_cache_clear_starts_anew() -> None:
    traced = make_traced(scale)
    traced(X), traced(X)
    traced.cache_clear()
    assert traced.cache_info() == (0, 0, 0, 0, 0, 0)
    traced(X)
    assert traced.cache_info() == (0, 1, 1, 1, 0, 1)


def test_trace_and_explain_leave_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    traced = make_traced(scale)
    program = traced.trace(X, 3.0, shift=4)
    assert [str(n.target) for n in program.nodes] == ["aten.mul.Tensor", "aten.add.Tensor"]
    explained = traced.explain(X)
    assert capsys.readouterr().out == f"{explained}\n"
    assert traced.cache_info() == (0, 0, 0, 0, 0, 0)
    assert program._repr_html_().startswith("<pre>def scale(")


def test_refused_call_counts_as_a_miss_without_a_trace() -> None:
    traced = make_traced(lambda x: complex(x))
    for _ in range(2):
        with pytest.raises(primexec.CaptureError):
            traced(torch.ones(()))
    assert traced.cache_info() == (0, 2, 0, 0, 0, 0)


def retraces(traced: Any, n: int) -> list[warnings.WarningMessage]:
    """Call with n values of `factor`, and give the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(n):
            traced(X, float(i))
    return caught


def scaled_up(x: Tensor, factor: float) -> Tensor:
    return x * factor if str(factor) > "1" else x


class Factor(nn.Module):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return scaled_up(x, factor)


@pytest.mark.parametrize("fn", [scaled_up, Factor()], ids=["function", "module"])
def test_retrace_warning_names_the_argument_once(fn: Any) -> None:
    assert retraces(make_traced(fn), 8) == []
    traced = make_traced(fn)
    caught = retraces(traced, 14)
    assert [w.category for w in caught] == [primexec.RetraceWarning]
    assert "factor (value)" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert issubclass(primexec.RetraceWarning, UserWarning)
    assert retraces(traced, 20) == []
    traced.cache_clear()
    assert len(retraces(traced, 9)) == 1


def test_retrace_warning_names_what_changes_most() -> None:
    traced = make_traced(lambda x, k, name: x[:k])
    for i in range(8):
        traced(X, i, "a" if i < 7 else "b")
    with pytest.warns(primexec.RetraceWarning, match=r"what kept changing is k \(value\) \(8 times\)"):
        traced(X, 8, "b")


# Switches -----------------------------------------------------------------------------------------------


def test_disable_runs_eagerly() -> None:
    ran: list[int] = []

    @make_traced
    def function(x: Tensor) -> Tensor:
        ran.append(len(ran))
        return x + 1

    with primexec.disable():
        with primexec.disable():
            assert torch.equal(function(X), X + 1)
        assert torch.equal(function(X, executor="aten"), X + 1)
        with pytest.raises(ValueError, match="'executor'"):
            function(X, executor="nonsense")
    assert len(ran) == 2
    assert function.cache_info() == (0, 0, 0, 0, 0, 0)
    with pytest.raises(primexec.CaptureError):
        function(X)


def test_disable_holds_for_its_thread_only() -> None:
    traced = make_traced(scale)
    with primexec.disable():
        other = threading.Thread(target=traced, args=(X,))
        other.start()
        other.join()
        traced(X)
    assert counts(traced) == (0, 1, 1)


SWITCHED = """
import torch, primexec, threading
traced = primexec.make_traced(lambda x, k=1: x + k)
for k in (1, 2):
    assert torch.equal(traced(torch.ones(2), k), torch.ones(2) + k)
other = threading.Thread(target=traced, args=(torch.ones(3),))
other.start(), other.join()
print(traced.cache_info().traces)
"""


def test_environment_disables_every_thread() -> None:
    done = python(SWITCHED, PRIMEXEC_DISABLE="1")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_environment_logs_topics() -> None:
    done = python(SWITCHED, PRIMEXEC_LOGS="trace, plan,guards", PRIMEXEC_DISABLE="0")
    assert done.stdout == "3\n"
    lines = done.stderr.splitlines()
    assert any(line.startswith("[primexec.trace] def traced(") for line in lines)
    assert any(line.startswith("[primexec.plan] region0 on aten: 1 operators (1 aten.add.Tensor)") for line in lines)
    reasons = [line for line in lines if line.startswith("[primexec.guards]")]
    assert reasons
    assert "k (value) is 2, was 1" in reasons[0]


def test_environment_with_unknown_topics() -> None:
    done = python("import primexec", PRIMEXEC_LOGS="trace,nonsense")
    assert done.returncode == 1
    assert "unknown topics ['nonsense']; known ones are ['trace', 'guards', 'plan', 'kernels']" in done.stderr


def test_executors_report() -> None:
    report = primexec.executors()
    assert report["aten"] == ""
    assert "aten   available" in str(report).splitlines()


# Copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("fn", [scale, functools.partial(scale, shift=5)], ids=["function", "partial"])
def test_copied_function(fn: Any, copied: Callable[[Any], Any]) -> None:
    traced = make_traced(fn, cache_size=1)
    traced(X)
    other = copied(traced)
    assert other.cache_info() == (0, 0, 0, 0, 0, 0)
    for size in (2, 3):
        assert torch.equal(other(torch.ones(size)), fn(torch.ones(size)))
    assert other.cache_info() == (0, 2, 2, 2, 1, 1)
    assert counts(traced) == (0, 1, 1)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copied_decorated_function(copied: Callable[[Any], Any]) -> None:
    assert torch.equal(copied(module_level)(X), X + 1)
