"""Python state that a function reads: globals, closures, attributes, defaults."""

import array
import collections
import contextvars
import functools
import importlib
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)


def traces(traced: Any) -> int:
    info = traced.cache_info()
    assert info.misses == info.traces
    return info.traces


NUMBER = 1.0
TABLE: dict[str, Any] = {"k": 1.0, "inner": {"k": 1.0}, "list": [1.0]}
HELPERS = types.SimpleNamespace(scale=lambda x: x * NUMBER, k=1.0, deep=types.SimpleNamespace(k=1.0))


class Holder:
    shared = 1.0

    def __init__(self) -> None:
        self.k = 1.0
        self.items = [1.0]

    @property
    def twice(self) -> float:
        return self.k * 2

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.twice + self.items[0] + self.shared


def default(x: Tensor, k: float = 1.0, *, shift: float = 1.0) -> Tensor:
    return x * k + shift


def closure() -> tuple[Any, Callable[[Any], None]]:
    k: Any = 1.0

    def change(value: Any) -> None:
        nonlocal k
        k = value

    return lambda x: x * k, change


def set_global(value: Any) -> None:
    global NUMBER
    NUMBER = value


def in_global() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: x * NUMBER), set_global


def in_global_of_helper() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: HELPERS.scale(x)), set_global


def in_global_dict() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: x * TABLE["k"]), lambda value: TABLE.update(k=value)


def in_nested_dict() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: x * TABLE["inner"]["k"]), lambda value: TABLE["inner"].update(k=value)


def in_list_of_dict() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: x * TABLE["list"][0]), lambda value: TABLE["list"].__setitem__(0, value)


def in_namespace() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: x * HELPERS.k), lambda value: setattr(HELPERS, "k", value)


def in_deep_namespace() -> tuple[Any, Callable[[Any], None]]:
    return (lambda x: x * HELPERS.deep.k), lambda value: setattr(HELPERS.deep, "k", value)


def by_getattr() -> tuple[Any, Callable[[Any], None]]:
    names = ["k"]
    return (lambda x: x * getattr(HELPERS, names[0])), lambda value: setattr(HELPERS, "k", value)


def in_attribute() -> tuple[Any, Callable[[Any], None]]:
    holder = Holder()
    return holder, lambda value: setattr(holder, "k", value)


def in_list_attribute() -> tuple[Any, Callable[[Any], None]]:
    holder = Holder()
    return holder, lambda value: holder.items.__setitem__(0, value)


def in_class_attribute() -> tuple[Any, Callable[[Any], None]]:
    return Holder(), lambda value: setattr(Holder, "shared", value)


def in_attribute_that_hides_the_class() -> tuple[Any, Callable[[Any], None]]:
    holder = Holder()
    return holder, lambda value: setattr(holder, "shared", value)


def in_defaults() -> tuple[Any, Callable[[Any], None]]:
    return default, lambda value: setattr(default, "__defaults__", (value,))


def in_keyword_defaults() -> tuple[Any, Callable[[Any], None]]:
    return default, lambda value: default.__kwdefaults__.update(shift=value)  # type: ignore[union-attr]


def in_partial() -> tuple[Any, Callable[[Any], None]]:
    partial = functools.partial(default, k=1.0)
    return partial, lambda value: partial.keywords.update(k=value)


def in_module_attribute() -> tuple[Any, Callable[[Any], None]]:
    class Scale(nn.Module):
        k = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.k

    net = nn.Sequential(nn.ReLU(), Scale())
    return net, lambda value: setattr(net[1], "k", value)


def in_environment() -> tuple[Any, Callable[[Any], None]]:
    def f(x: Tensor) -> Tensor:
        return x * float(os.environ["TEST_FACTOR"]) + float(os.getenv("TEST_SHIFT", "0"))

    return f, lambda value: os.environ.update(TEST_FACTOR=str(value))


def in_context_variable() -> tuple[Any, Callable[[Any], None]]:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("factor", default=1.0)

    def change(value: Any) -> None:
        variable.set(value)

    return lambda x: x * variable.get(), change


def in_thread_local() -> tuple[Any, Callable[[Any], None]]:
    local = threading.local()
    return lambda x: x * local.factor, lambda value: setattr(local, "factor", value)


def in_user_dict() -> tuple[Any, Callable[[Any], None]]:
    held: Any = collections.UserDict()
    return lambda x: x * held["k"], lambda value: held.update(k=value)


def in_chain_map() -> tuple[Any, Callable[[Any], None]]:
    held: Any = collections.ChainMap({"j": 1.0}, {})
    return lambda x: x * held["k"], lambda value: held.maps[1].update(k=value)


def behind_mapping_proxy() -> tuple[Any, Callable[[Any], None]]:
    held: dict[str, Any] = {}
    proxy = types.MappingProxyType(held)
    return lambda x: x * proxy["k"], lambda value: held.update(k=value)


def behind_weak_reference() -> tuple[Any, Callable[[Any], None]]:
    holder = Holder()
    weak = weakref.ref(holder)

    def f(x: Tensor) -> Tensor:
        return x * weak().k  # type: ignore[union-attr]

    f.holder = holder  # type: ignore[attr-defined]
    return f, lambda value: setattr(holder, "k", value)


PLACES = [
    closure, in_global, in_global_of_helper, in_global_dict, in_nested_dict, in_list_of_dict, in_namespace,
    in_deep_namespace, by_getattr, in_attribute, in_list_attribute, in_class_attribute,
    in_attribute_that_hides_the_class, in_defaults, in_keyword_defaults, in_partial, in_module_attribute,
    in_environment, in_context_variable, in_thread_local, in_user_dict, in_chain_map, behind_mapping_proxy,
    behind_weak_reference,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__)
def test_python_state(place: Callable[[], tuple[Any, Callable[[Any], None]]]) -> None:
    fn, change = place()
    traced = make_traced(fn)
    try:
        expected = 0
        for value, new in [(1.0, True), (2.0, True), (1.0, False), (1, True), (2.0, False), (-0.0, True), (0.0, True)]:
            change(value)
            expected += new
            for x in (X, X + 1):
                out, eager = traced(x), fn(x)
                assert torch.equal(out, eager)
                assert torch.equal(out.signbit(), eager.signbit())
            assert traces(traced) == expected, value
    finally:
        change(1.0)


def test_tensors_in_python_state_are_read_again() -> None:
    held = [torch.ones(3), {"w": torch.ones(3)}]
    traced = make_traced(lambda x: x * held[0] + held[1]["w"])
    for i in range(3):
        held[0], held[1]["w"] = torch.full((3,), float(i)), torch.full((3,), float(-i))
        assert torch.equal(traced(X), X * i - i)
    assert traces(traced) == 1
    held[0] = torch.ones(1)
    assert torch.equal(traced(X), X - 2)
    assert traces(traced) == 2


def test_container_of_tensors_is_replaced() -> None:
    holder, table = Holder(), {"w": torch.ones(3)}
    holder.items = [torch.ones(3)]  # type: ignore[list-item]
    holder.pair = (torch.ones(3), {"deep": [torch.ones(3)]})  # type: ignore[attr-defined]

    def f(x: Tensor) -> Tensor:
        return x * holder.items[0] + table["w"] - holder.pair[0] / holder.pair[1]["deep"][0]  # type: ignore[attr-defined]

    traced = make_traced(f)

    def check() -> None:
        for _ in range(2):
            assert torch.equal(traced(X), f(X))
        assert traces(traced) == 1

    check()
    holder.items = [torch.full((3,), 2.0)]  # type: ignore[list-item]
    check()
    table = {"w": torch.full((3,), 3.0)}
    check()
    holder.pair = (torch.full((3,), 4.0), holder.pair[1])  # type: ignore[attr-defined]
    check()
    holder.pair[1]["deep"] = [torch.full((3,), 5.0)]  # type: ignore[attr-defined]
    check()


def test_array_of_the_standard_library() -> None:
    held = array.array("f", [1.0, 2.0])
    traced = make_traced(lambda x: x * held[0])
    for value, count in [(1.0, 1), (3.0, 2), (3.0, 2), (1.0, 2)]:
        held[0] = value
        assert torch.equal(traced(X), X * value)
        assert traces(traced) == count


def test_name_that_enters_the_globals() -> None:
    def f(x: Tensor) -> Tensor:
        return x + 1 if "ENTERED" in globals() else x

    traced = make_traced(f)
    try:
        for _ in range(2):
            assert torch.equal(traced(X), f(X))
            globals()["ENTERED"] = 1
    finally:
        del globals()["ENTERED"]


def test_replaced_method() -> None:
    class Net(nn.Module):
        def helper(self, x: Tensor) -> Tensor:
            return x + 1

        def forward(self, x: Tensor) -> Tensor:
            return self.helper(x)

    net = Net()
    traced = make_traced(net)
    assert torch.equal(traced(X), X + 1)
    Net.helper = lambda self, x: x + 2  # type: ignore[method-assign]
    assert torch.equal(traced(X), X + 2)
    assert traces(traced) == 2


def test_unread_state_does_not_retrace() -> None:
    holder = Holder()
    traced = make_traced(lambda x: x * holder.k)
    for i in range(3):
        holder.items[0] = float(i)
        holder.unrelated_before = i
        TABLE["other"] = i
        traced(X)
        assert traces(traced) <= 2  # a new attribute may hide one of the class; afterwards nothing does
    assert torch.equal(traced(X), X)


@pytest.mark.parametrize("file", ["<string>", "<stdin>", "<ipython-input-1>", "/tmp/script.py"])
def test_name_that_is_bound_later(file: str) -> None:
    """The file says where the code comes from: `python -c`, a prompt, a notebook, a script."""
    scope: dict[str, Any] = {}
    name = f"function_{len(file)}"
    text = f"def {name}(x):\n  try:\n    return x * SCALE\n  except NameError:\n    return x"
    exec(compile(text, file, "exec"), scope)
    traced = make_traced(scope[name])
    assert torch.equal(traced(X), X)
    scope["SCALE"] = 3.0
    assert torch.equal(traced(X), X * 3)
    del scope["SCALE"]
    assert torch.equal(traced(X), X)
    assert traces(traced) == 2


def test_equal_functions_of_two_files() -> None:
    """Code objects are equal whatever their file: the globals of each function count all the same."""
    text = "SCALE = 1.0\ndef scale(x):\n  return x * SCALE"
    scopes: list[dict[str, Any]] = [{}, {}]
    for scope, file in zip(scopes, ["/tmp/one.py", "/tmp/two.py"], strict=True):
        exec(compile(text, file, "exec"), scope)
    one, two = (scope["scale"] for scope in scopes)
    assert one.__code__ == two.__code__
    traced = make_traced(lambda x: one(x) + two(x))
    assert torch.equal(traced(X), X * 2)
    scopes[1]["SCALE"] = 2.0
    assert torch.equal(traced(X), X * 3)
    scopes[0]["SCALE"] = 2.0
    assert torch.equal(traced(X), X * 4)
    assert traces(traced) == 3


PACKAGE = """
BACKENDS, BY_TYPE, SEEN, READY = {}, {}, set(), False

def filled(x):
    global READY
    READY = True
    SEEN.add("filled")
    if type(x) not in BY_TYPE:
        BY_TYPE[type(x)] = BACKENDS.setdefault("torch", object())
    return x * 2

def other_at_first(x):
    global READY
    x, READY = (x if READY else x * 0), True
    return x

def remembered(x):
    SEEN.add(len(SEEN))
    return x * 2
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "set_up_at_first_use.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("set_up_at_first_use")
    del sys.modules["set_up_at_first_use"]


def test_tables_that_an_installed_package_fills_at_its_first_use(package: Any) -> None:
    """einops files a backend for each type of tensor: the first call runs as it is."""
    traced = make_traced(package.filled)
    for expected in (0, 1, 1):
        assert torch.equal(traced(X), X * 2)
        assert traced.cache_info().traces == expected
    assert (package.READY, package.SEEN, list(package.BACKENDS)) == (True, {"filled"}, ["torch"])
    assert list(package.BY_TYPE) == [Tensor]


def test_an_installed_package_that_does_something_else_at_first(package: Any) -> None:
    traced = make_traced(package.other_at_first)
    for expected in (X * 0, X, X):
        assert torch.equal(traced(X), expected)
    assert package.READY
    assert traced.cache_info().traces == 1


def test_an_installed_package_that_changes_at_every_call_is_refused(package: Any) -> None:
    with pytest.raises(CaptureError, match=r"the function changes global of set_up_at_first_use\.py: SEEN"):
        make_traced(package.remembered)(X)


class Remembering(nn.Module):
    """Keeps what it computed first, in an attribute of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, {})
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        kept = getattr(self, self.name)
        if "first" not in kept:
            kept["first"] = x * 3
        return x + kept["first"]


@pytest.mark.parametrize("name", ["kept", "_kept"])
def test_dicts_of_modules_are_filled_as_in_eager(name: str) -> None:
    expected, module = Remembering(name), Remembering(name)
    traced = make_traced(module)
    for k in range(3):
        assert torch.equal(traced(X + k), expected(X + k))
        assert torch.equal(getattr(module, name)["first"], X * 3)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._calls = {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        self._calls["n"] += 1
        return x * self._calls["n"]


def test_a_number_in_a_private_dict_of_a_module_is_not_lost() -> None:
    model, eager = Counting(), Counting()
    traced = make_traced(model)
    for _ in range(3):
        assert torch.equal(traced(X), eager(X))
        assert vars(model) == vars(eager)


def test_names_of_attributes_that_are_computed_beside_other_strings() -> None:
    holder = types.SimpleNamespace(name="table", table={"k": 2.0})
    traced = make_traced(lambda x: x * getattr(holder, holder.name)["k"])
    assert torch.equal(traced(X), X * 2)
    holder.table["k"] = 3.0
    assert torch.equal(traced(X), X * 3)


class Config(collections.OrderedDict[str, Any]):
    """Entries are attributes too, as in diffusers' configurations."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._config = Config(scale=2.0)

    def forward(self, x: Tensor) -> Tensor:
        scale: float = self._config.scale
        return x * scale


def test_a_dict_with_attributes_of_its_own_in_a_module() -> None:
    module = Configured()
    traced = make_traced(module)
    assert torch.equal(traced(X), X * 2)
    module._config.scale = 3.0
    assert torch.equal(traced(X), X * 3)


def test_closure_of_a_custom_function() -> None:
    scale, shift = [2.0], 1.0

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * scale[0] + shift

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * scale[0]

    traced = make_traced(lambda x: Scaled.apply(x))
    x = X.clone().requires_grad_()
    for n in range(3):
        scale[0], shift = n + 2.0, n // 2 + 1.0
        for _ in range(2):
            out = traced(x)
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert torch.equal(out, x * scale[0] + shift)
            assert torch.equal(gradient, torch.full_like(x, scale[0]))
        assert traces(traced) == n + 1
