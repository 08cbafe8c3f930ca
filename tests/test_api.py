"""What users call: make_traced as a decorator and by hand, overrides, counts, switches, execute."""

import abc
import copy
import functools
import inspect
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import primexec
from primexec import execute, make_traced
from tests.isolated import python

X = torch.arange(6.0).reshape(2, 3)
UNKNOWN_EXECUTOR = "Received unexpected value for 'executor': cuda_graphs. Allowed values are: aten."


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
    assert torch.equal(Layer.run(one, X), X * 2)
    assert isinstance(inspect.getattr_static(Layer, "run"), type(Layer.run))


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


def test_method_of_an_object_without_a_dict() -> None:
    class Slotted:
        __slots__ = ("factor",)

        def __init__(self) -> None:
            self.factor = 2.0

        @make_traced
        def run(self, x: Tensor) -> Tensor:
            return x * self.factor

    slotted = Slotted()
    assert torch.equal(slotted.run(X), X * 2)
    slotted.factor = 3.0
    assert torch.equal(slotted.run(X), X * 3)


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


@pytest.mark.parametrize("odd", [None.__class__, 3, "scale"], ids=str)
def test_only_callables(odd: Any) -> None:
    if callable(odd):
        assert make_traced(odd)() is None
        return
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
    "execute": lambda options: execute(fx.symbolic_trace(torch.relu), X, **options),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_unknown_names(use: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ValueError, match="unexpected") as unknown:
        use({"executor": "cuda_graphs"})
    assert str(unknown.value) == UNKNOWN_EXECUTOR
    with pytest.raises(ValueError, match="unexpected executor parameters: fuse, tile") as unknown:
        use({"executor": "aten", "executor_parameters": {"tile": 3, "strict": True, "fuse": 1}})
    assert str(unknown.value).endswith("Allowed parameters of aten are: strict.")


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
    traced = make_traced(lambda x: x.item())
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


class Factor(nn.Module):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x * factor


@pytest.mark.parametrize("fn", [scale, Factor()], ids=["function", "module"])
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
    traced = make_traced(lambda x, k, name: x * k)
    with pytest.warns(primexec.RetraceWarning, match=r"k \(value\)") as caught:
        for i in range(10):
            traced(X, i, "a" if i < 8 else "b")
    assert len(caught) == 1


# Switches -----------------------------------------------------------------------------------------------


def test_disable_runs_eagerly() -> None:
    ran: list[int] = []

    @make_traced
    def function(x: Tensor) -> Tensor:
        ran.append(1)
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
    assert "unknown topics ['nonsense']; known ones are ['trace', 'guards', 'plan']" in done.stderr


def test_executors_report() -> None:
    report = primexec.executors()
    assert report["aten"] == ""
    assert "aten  available" in str(report).splitlines()


# Copies -------------------------------------------------------------------------------------------------


def with_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def with_torch_save(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": with_pickle, "torch.save": with_torch_save}


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


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_copied_module(copied: Callable[[Any], Any]) -> None:
    original = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    traced = make_traced(original, cache_size=7)
    expected = traced(X)
    other = copied(traced)
    assert isinstance(other, nn.Sequential)
    assert torch.equal(other(X), expected)
    other[0].weight.zero_()
    other.train()
    assert torch.equal(traced(X), expected)
    assert not original.training
    assert not torch.equal(other(X), expected)
    assert (counts(traced), counts(other)) == ((1, 1, 1), (0, 2, 2))


def test_shallow_copy_of_a_module_has_attributes_of_its_own() -> None:
    original = Factor()
    other = copy.copy(make_traced(original))
    other.note = 1
    assert not hasattr(original, "note")
    assert torch.equal(other(X, 2.0), X * 2)


# Modules share everything -------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.gain

    def describe(self) -> str:
        return f"gain {self.gain}"


def pair() -> tuple[Net, Any]:
    torch.manual_seed(0)
    original = Net()
    return original, make_traced(original)


def same(original: nn.Module, traced: Any, traces: int) -> None:
    """Assert that both give the same, and how often was traced by now; batch statistics are put back between."""
    held = {name: buffer.clone() for name, buffer in original.named_buffers()}
    with torch.no_grad():
        expected = original(X)
        for name, buffer in original.named_buffers():
            buffer.copy_(held[name])
        assert torch.equal(traced(X), expected)
    assert traced.cache_info().traces == traces


def test_module_is_the_original_in_all_but_the_call() -> None:
    original, traced = pair()
    assert isinstance(traced, Net)
    assert isinstance(traced, nn.Module)
    assert type(traced).__name__ == "TracedNet"
    assert traced.describe() == "gain 1.0"
    assert traced.linear is original.linear
    assert list(traced.parameters()) == list(original.parameters())
    assert all(a is b for a, b in zip(traced.buffers(), original.buffers(), strict=True))
    assert [name for name, _ in traced.named_modules()] == [name for name, _ in original.named_modules()]
    assert traced.state_dict().keys() == original.state_dict().keys()
    assert repr(traced).replace("TracedNet", "Net") == repr(original)
    assert inspect.signature(traced.forward) == inspect.signature(original.forward)


def test_module_attributes_are_shared_both_ways() -> None:
    original, traced = pair()
    same(original, traced, 1)
    traced.gain = 2.0
    assert original.gain == 2.0
    same(original, traced, 2)
    original.gain = 1.0
    assert traced.gain == 1.0
    same(original, traced, 2)
    traced.note = "new"
    assert original.note == "new"
    del original.note
    assert not hasattr(traced, "note")


def test_module_train_and_eval_are_shared() -> None:
    original, traced = pair()
    same(original, traced, 1)
    assert traced.eval() is traced
    assert not original.training
    assert not original.norm.training
    same(original, traced, 2)
    original.train()
    assert traced.training
    same(original, traced, 2)
    assert original.norm.num_batches_tracked == 2


def test_module_hooks_fire_on_both() -> None:
    original, traced = pair()
    traced.eval()
    same(original, traced, 1)
    handle = traced.register_forward_hook(lambda module, args, out: out * 3)
    inner = original.linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    same(original, traced, 2)
    handle.remove()
    inner.remove()
    same(original, traced, 2)


def test_hooks_of_a_module_see_the_original_class() -> None:
    original, traced = pair()
    seen: list[type] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        assert type(module) is Net

    original.register_forward_hook(hook)
    with torch.no_grad():
        traced(X)
    assert seen == []


def change_in_place(net: Any) -> None:
    with torch.no_grad():
        net.linear.weight.mul_(2)


def replace_parameter(net: Any) -> None:
    net.linear.weight = nn.Parameter(torch.randn(3, 3))


def replace_data(net: Any) -> None:
    net.linear.weight.data = torch.randn(3, 3)


def load(net: Any) -> None:
    net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()})


def load_assigned(net: Any) -> None:
    net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()}, assign=True)


def step(net: Any) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()


CHANGES = {c.__name__: c for c in (change_in_place, replace_parameter, replace_data, load, load_assigned, step)}


@pytest.mark.parametrize("through", ["original", "traced"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_change_without_a_retrace(change: Callable[[Any], None], through: str) -> None:
    original, traced = pair()
    traced.eval()
    same(original, traced, 1)
    before = original(X)
    change(original if through == "original" else traced)
    assert not torch.equal(original(X), before)
    same(original, traced, 1)


def test_module_to_another_dtype_retraces_once() -> None:
    original, traced = pair()
    same(original.eval(), traced, 1)
    assert traced.to(torch.float64) is traced
    assert original.linear.weight.dtype is torch.float64
    with torch.no_grad():
        assert torch.equal(traced(X.double()), original(X.double()))
        assert counts(traced) == (0, 2, 2)
        traced.float()
        same(original, traced, 2)


def test_module_inside_others() -> None:
    original, traced = pair()
    traced.eval()
    around = nn.Sequential(traced, nn.ReLU())
    with torch.no_grad():
        expected = original(X).relu()
        assert torch.equal(around(X), expected)
        assert counts(traced) == (0, 1, 1)
        outer = make_traced(around)
        for _ in range(2):
            assert torch.equal(outer(X), expected)
    assert (counts(outer), counts(traced)) == ((1, 1, 1), (0, 1, 1))


def test_forward_itself_is_the_original_forward() -> None:
    original, traced = pair()
    traced.eval()
    with torch.no_grad():
        assert torch.equal(traced.forward(X), original(X))
    assert counts(traced) == (0, 0, 0)


def test_class_that_registers_its_subclasses() -> None:
    known: list[str] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, name: str) -> None:
            known.append(name)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Leaf(Registered, name="leaf"):
        pass

    assert torch.equal(make_traced(Leaf())(X), X + 1)
    assert known == ["leaf"]


def test_class_with_a_metaclass() -> None:
    class Abstract(nn.Module, abc.ABC):
        @abc.abstractmethod
        def forward(self, x: Tensor) -> Tensor: ...

    class Concrete(Abstract):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    traced = make_traced(Concrete())
    assert torch.equal(traced(X), X + 1)
    assert isinstance(traced, Abstract)


def test_traced_module_is_not_made_by_its_class() -> None:
    with pytest.raises(TypeError, match="primexec.make_traced"):
        type(make_traced(nn.ReLU()))()


# execute ------------------------------------------------------------------------------------------------


def aten_graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = graph.call_function(torch.ops.aten.mm.default, (x, y))
    graph.call_function(torch.ops.aten.mul_.Tensor, (x, 2.0))
    split = graph.call_function(torch.ops.aten.split.Tensor, (product, 1), {"dim": 1})
    graph.output((graph.call_function(torch.ops.aten.relu.default, (product,)), split))
    return fx.GraphModule(nn.Module(), graph)


def prims_graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    wide = graph.call_function(torch.ops.prims.broadcast_in_dim.default, (y, [2, 3, 2], [1, 2]))
    tall = graph.call_function(torch.ops.prims.broadcast_in_dim.default, (x, [2, 3, 2], [0, 1]))
    added = graph.call_function(torch.ops.prims.add.default, (wide, tall))
    graph.output({"sum": graph.call_function(torch.ops.prims.sum.default, (added, [1]))})
    return fx.GraphModule(nn.Module(), graph)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.linear(x) + self.shift
        return out.relu().t().contiguous(), torch.nn.functional.softmax(x.matmul(y), dim=-1)


GRAPHS: dict[str, Callable[[], fx.GraphModule]] = {
    "aten": aten_graph,
    "prims": prims_graph,
    "plain_torch_modules_methods_attributes": lambda: fx.symbolic_trace(Parts()),
}


def graph_inputs() -> tuple[Tensor, Tensor]:
    return torch.arange(6.0).reshape(2, 3) - 2, torch.arange(6.0).reshape(3, 2) - 2


def prepared(gm: fx.GraphModule) -> list[Any]:
    return list(gm.__dict__["_primexec_prepared"].values())


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_execute_is_the_graph(make: Callable[[], fx.GraphModule]) -> None:
    gm = make()
    ops = {node.op for node in gm.graph.nodes}
    assert ops >= {"placeholder", "call_function", "output"}
    expected_inputs, inputs = graph_inputs(), graph_inputs()
    for _ in range(3):
        expected, out = gm(*expected_inputs), execute(gm, *inputs)
        flat = [torch.utils._pytree.tree_leaves(o) for o in (expected, out)]
        assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
        assert torch.utils._pytree.tree_structure(expected) == torch.utils._pytree.tree_structure(out)
        assert all(torch.equal(a, b) for a, b in zip(expected_inputs, inputs, strict=True))
    assert [t.cache_info() for t in prepared(gm)] == [(2, 1, 1, 1, 0, 1)]


def test_graph_covers_every_kind_of_node() -> None:
    ops = {node.op for node in fx.symbolic_trace(Parts()).graph.nodes}
    assert ops == {"placeholder", "call_function", "call_method", "call_module", "get_attr", "output"}


def test_execute_is_prepared_once_for_each_kind_of_inputs() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    for size in (2, 3, 2, 3):
        execute(gm, torch.ones(size))
        execute(gm, torch.ones(size), executor="aten")
    assert [t.cache_info() for t in prepared(gm)] == [(6, 2, 2, 2, 0, 2)]
    execute(gm, torch.ones(2), executor=["auto"])
    execute(gm, torch.ones(2), executor_parameters={"strict": True})
    assert len(prepared(gm)) == 3


def test_edited_graph_is_prepared_anew_after_recompile() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    x = torch.tensor([-1.0, 1.0])
    assert torch.equal(execute(gm, x), torch.tensor([1.0, 2.0]))
    next(n for n in gm.graph.nodes if n.target is torch.relu).target = torch.abs
    assert torch.equal(execute(gm, x), gm(x))
    gm.recompile()
    for _ in range(2):
        assert torch.equal(execute(gm, x), torch.tensor([2.0, 2.0]))
    assert [counts(t) for t in prepared(gm)] == [(1, 1, 1)]


def test_parameters_of_a_graph_are_read_at_every_call() -> None:
    gm = fx.symbolic_trace(Parts())
    x, y = graph_inputs()
    execute(gm, x, y)
    gm.shift = torch.full((2,), 7.0)
    with torch.no_grad():
        gm.linear.weight.mul_(3)
    assert all(torch.equal(a, b) for a, b in zip(execute(gm, x, y), gm(x, y), strict=True))
    assert [counts(t) for t in prepared(gm)] == [(1, 1, 1)]
    assert gm.state_dict().keys() == fx.symbolic_trace(Parts()).state_dict().keys()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copied_graph_is_prepared_on_its_own(copied: Callable[[Any], Any]) -> None:
    gm = aten_graph()
    execute(gm, *graph_inputs())
    other = copied(gm)
    expected = gm(*graph_inputs())
    assert torch.equal(execute(other, *graph_inputs())[0], expected[0])
    assert [counts(t) for t in prepared(gm)] == [(0, 1, 1)]
    assert [counts(t) for t in prepared(other)] == [(0, 1, 1)]


def test_prepared_programs_go_with_the_graph() -> None:
    import gc

    gm = aten_graph()
    execute(gm, *graph_inputs())
    dead = weakref.ref(gm)
    del gm
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("odd", [torch.relu, nn.ReLU(), fx.Graph()], ids=lambda o: type(o).__name__)
def test_execute_takes_graph_modules_only(odd: Any) -> None:
    with pytest.raises(TypeError, match=r"execute takes a torch\.fx\.GraphModule"):
        execute(odd, X)
