"""Attributes that are asked for by names that stand nowhere in the code, and what is exchanged in place, are seen."""

import builtins
import dataclasses
import enum
import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced
from primexec.reads import Reads

EXECUTORS: list[Any] = ["aten", ("llvm", "aten")]
X = torch.arange(1.0, 4.0)
Place = tuple[Callable[[Tensor], Any], Callable[[], object]]


class Plain:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)

    def twice(self, by: float = 2.0) -> Any:
        return self.gain * by  # type: ignore[attr-defined]


@dataclasses.dataclass
class Options:
    scale: float = 2.0
    bias: float = 1.0


def lookups() -> dict[str, Callable[[Plain, str], Callable[[Tensor], Any]]]:
    """A function that asks an object for `gain`, by a name in a variable."""
    gain = operator.attrgetter("gain")
    own = getattr
    return {
        "getter": lambda o, name: lambda x: x * gain(o),
        "getter_of_many": lambda o, name: lambda x: x * sum(map(gain, [o, o])),
        "getter_in_a_list": lambda o, name: lambda x, getters=[gain]: x * getters[0](o),
        "getter_of_two": lambda o, name: lambda x, get=operator.attrgetter(name, "twice"): x * get(o)[0],
        "getter_made_inside": lambda o, name: lambda x: x * operator.attrgetter(name)(o),
        "caller": lambda o, name: lambda x, call=operator.methodcaller("twice", by=3.0): x * call(o),
        "getattr": lambda o, name: lambda x: x * getattr(o, name),
        "own_getattr": lambda o, name: lambda x: x * own(o, name),
        "partial": lambda o, name: functools.partial(lambda get, x: x * get(), functools.partial(getattr, o, name)),
        "reduced": lambda o, name: lambda x: x * functools.reduce(getattr, [name], o),
        "static": lambda o, name: lambda x: x * inspect.getattr_static(o, name),
        "members": lambda o, name: lambda x: x * dict(inspect.getmembers(o))[name],
        "vars": lambda o, name: lambda x: x * vars(o)[name],
        "format": lambda o, name, text="{0.gain}": lambda x: x * float(text.format(o)),  # type: ignore[misc]
        "format_map": lambda o, name, text="{o.gain}": lambda x: x * float(text.format_map({"o": o})),  # type: ignore[misc]
        "format_made_before": lambda o, name: lambda x, write="{0.gain}".format: x * float(write(o)),
    }


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", lookups())
def test_names_that_stand_nowhere(name: str, executor: Any) -> None:
    held = Plain(gain=2.0)
    function = lookups()[name](held, "".join(["ga", "in"]))
    traced = make_traced(function, executor=executor)
    for gain in (2.0, 3.0, 3.0):
        held.gain = gain
        assert torch.equal(traced(X), function(X))
    assert traced.cache_info().traces == 2


def test_objects_and_functions_under_computed_names() -> None:
    held = Plain(inner=Plain(gain=2.0), op_0=lambda x: x + 1)

    def function(x: Tensor, of: str = "inn", number: int = 0) -> Any:
        return getattr(held, f"op_{number}")(x) * sum(v.gain for v in vars(held).values() if isinstance(v, Plain))

    traced = make_traced(function)
    for change in (None, Plain(gain=3.0)):
        held.inner = change or held.inner
        assert torch.equal(traced(X), function(X))
    held.op_0 = lambda x: x - 1
    assert torch.equal(traced(X), function(X))
    assert traced.cache_info().traces == 3


@pytest.mark.parametrize("read", [dataclasses.asdict, lambda o: {"scale": dataclasses.astuple(o)[0]}])
def test_all_fields_of_a_dataclass(read: Callable[[Any], Any]) -> None:
    options = Options()
    traced = make_traced(lambda x: x * read(options)["scale"])
    for scale in (2.0, 5.0):
        options.scale = scale
        assert torch.equal(traced(X), X * scale)


def test_attributes_that_are_set_by_computed_names() -> None:
    held, names = Plain(calls=0), ["calls"]

    def count(x: Tensor) -> Tensor:
        setattr(held, names[0], getattr(held, names[0]) + 1)
        return x + 1

    traced = make_traced(count)
    for n in range(3):
        traced(X)
        assert held.calls == n + 1


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Triple(Double):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3


class Two:
    gain = 2.0


class Three:
    gain = 3.0


def exchanges() -> dict[str, Callable[[], Place]]:
    def attributes() -> Place:
        held = Plain(gain=2.0)
        return lambda x: x * held.gain, lambda: setattr(held, "__dict__", {"gain": 3.0})

    def absent() -> Place:
        held = Plain(gain=2.0)
        return lambda x: x * getattr(held, "other", 1.0), lambda: setattr(held, "__dict__", {"other": 3.0})

    def attributes_of_a_module() -> Place:
        module = nn.Linear(3, 3, bias=False)
        weight = nn.Parameter(torch.ones(3, 3))
        changed = {**module.__dict__, "_parameters": {"weight": weight, "bias": None}}
        return module, lambda: setattr(module, "__dict__", changed)

    def attributes_of_a_function() -> Place:
        def function(x: Tensor) -> Any:
            return x * function.gain  # type: ignore[attr-defined]

        function.gain = 2.0  # type: ignore[attr-defined]
        return function, lambda: setattr(function, "__dict__", {"gain": 3.0})

    def class_() -> Place:
        held: Any = Two()
        return lambda x: x * held.gain, lambda: setattr(held, "__class__", Three)

    def class_in_a_list() -> Place:
        held: list[Any] = [Two()]
        return lambda x: x * held[0].gain, lambda: setattr(held[0], "__class__", Three)

    def class_of_a_module() -> Place:
        module = Double()
        return module, lambda: setattr(module, "__class__", Triple)

    def class_of_a_child() -> Place:
        module = nn.Sequential(nn.ReLU())
        return module, lambda: setattr(module[0], "__class__", nn.Sigmoid)

    def bases() -> Place:
        kind: Any = type("Kind", (Two,), {})
        return lambda x: x * kind.gain, lambda: setattr(kind, "__bases__", (Three,))

    def code() -> Place:
        def inner(x: Tensor) -> Tensor:
            return x * 2

        return lambda x: inner(x), lambda: setattr(inner, "__code__", (lambda x: x * 3).__code__)

    def code_of_the_function() -> Place:
        def function(x: Tensor) -> Tensor:
            return x * 2

        return function, lambda: setattr(function, "__code__", (lambda x: x * 3).__code__)

    def code_of_a_method() -> Place:
        def double(self: Any, x: Tensor) -> Tensor:
            return x * 2

        held = type("Kind", (), {"call": double})()
        return lambda x: held.call(x), lambda: setattr(double, "__code__", (lambda self, x: x * 3).__code__)

    return {name: place for name, place in locals().items() if isinstance(place, types.FunctionType)}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", exchanges())
def test_exchanged_in_place(name: str, executor: Any) -> None:
    function, exchange = exchanges()[name]()
    traced = make_traced(function, executor=executor)
    before = traced(X)
    exchange()
    for _ in range(2):
        assert torch.equal(traced(X), function(X))
    assert traced.cache_info().traces == 2
    assert name == "absent" or not torch.equal(traced(X), before)


def test_an_exchange_inside_is_made_at_the_first_call() -> None:
    held: Any = Two()

    def function(x: Tensor) -> Any:
        held.__class__ = Three
        return x * held.gain

    traced = make_traced(function)
    for traces in (0, 1, 1):
        assert torch.equal(traced(X), X * Three().gain)
        assert type(held) is Three
        assert traced.cache_info().traces == traces


def test_builtins(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = make_traced(lambda x: x * abs(-2))
    traced(X)
    monkeypatch.setattr(builtins, "abs", lambda value: 5)
    assert torch.equal(traced(X), X * 5)
    monkeypatch.undo()
    assert torch.equal(traced(X), X * 2)
    assert traced.cache_info().traces == 2


def test_attributes_of_modules_that_come_later() -> None:
    settings, state = types.ModuleType("settings"), {"gain": 2.0}

    def function(x: Tensor) -> Any:
        return x * settings.gain * (3 if hasattr(settings, "flag") else 1)

    def lookup(name: str) -> float:
        try:
            return state[name]
        except KeyError:
            raise AttributeError(name) from None

    settings.__getattr__ = lookup  # type: ignore[method-assign]
    traced = make_traced(function)
    for name in ("gain", "gain", "flag"):
        state[name] = state.get(name, 0.0) + 1
        assert torch.equal(traced(X), function(X))
    settings.flag = True  # type: ignore[attr-defined]
    assert torch.equal(traced(X), function(X))


def test_what_weak_references_lead_to() -> None:
    held = [Plain(gain=2.0)]
    weak = weakref.ref(held[0])

    def function(x: Tensor) -> Any:
        found = weak()
        return x if found is None else x * found.gain

    traced = make_traced(function)
    for _ in range(2):
        assert torch.equal(traced(X), function(X))
        held[0].gain = 3.0
    held.clear()
    assert torch.equal(traced(X), X)


class Level(enum.Enum):
    LOW = [2.0]  # noqa: RUF012


def test_what_members_of_an_enumeration_hold() -> None:
    traced = make_traced(lambda x: x * Level.LOW.value[0])
    traced(X)
    Level.LOW.value[0] = 3.0
    assert torch.equal(traced(X), X * 3)


def test_attributes_of_tensors_that_are_handled_where_they_are_absent() -> None:
    def function(x: Any) -> Any:
        try:
            return x * x.gain
        except AttributeError:
            return x

    traced = make_traced(function)
    assert torch.equal(traced(X), X)
    tagged = X.clone()
    tagged.gain = 2.0  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match="gain"):
        traced(tagged)


def test_builtins_are_there_again_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Reads.enter

    def enter(self: Reads, frame: types.FrameType, event: str, arg: Any) -> Any:
        if frame.f_code is Reads.stop.__code__:
            raise RuntimeError("at the end")
        return watch(self, frame, event, arg)

    monkeypatch.setattr(Reads, "enter", enter)
    before = dict(vars(builtins))
    assert torch.equal(make_traced(lambda x: x * 2)(X), X * 2)
    assert vars(builtins) == before
