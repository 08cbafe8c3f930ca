"""Methods that are exchanged in their class after a trace, also those that run without being named."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced

X = torch.arange(1.0, 7.0)


def classes() -> tuple[type[nn.Module], type]:
    """Fresh classes, so that no test sees what another one has exchanged."""

    class Layer(nn.Module):
        def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
            return x * factor

    class Thing:
        def __init__(self) -> None:
            self.k = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.k

        def __getitem__(self, i: int) -> float:
            return i * 2.0

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[float]:
            return iter((1.0, 2.0))

        def __mul__(self, x: Tensor) -> Tensor:
            return x * 4

        def __rmul__(self, x: Any) -> Tensor:
            return X * 3

        def __bool__(self) -> bool:
            return True

        def __enter__(self) -> float:
            return 2.0

        def __exit__(self, *error: object) -> None:
            pass

        def __contains__(self, x: object) -> bool:
            return True

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 1

        def __getattr__(self, name: str) -> float:
            return 7.0

    return Layer, Thing


def entered(thing: Any, x: Tensor) -> Tensor:
    with thing as k:
        return x * k


# What stands for the method afterwards, and an expression that runs it.
EXCHANGED: dict[str, tuple[Callable[..., Any], Callable[[Any, Tensor], Tensor]]] = {
    "__call__": (lambda self, x: x * 5, lambda thing, x: thing(x)),
    "__getitem__": (lambda self, i: i * 3.0, lambda thing, x: x * thing[1]),
    "__len__": (lambda self: 4, lambda thing, x: x * len(thing)),
    "__iter__": (lambda self: iter((5.0,)), lambda thing, x: sum(x * k for k in thing)),
    "__mul__": (lambda self, x: x * 5, lambda thing, x: thing * x),
    "__rmul__": (lambda self, x: X * 5, lambda thing, x: x * (2 * thing)),
    "__bool__": (lambda self: False, lambda thing, x: x * 2 if thing else x),
    "__enter__": (lambda self: 3.0, entered),
    "__contains__": (lambda self, x: False, lambda thing, x: x * 2 if 1 in thing else x),
    "__eq__": (lambda self, x: False, lambda thing, x: x * 2 if thing == 1 else x),
    "__getattr__": (lambda self, name: 8.0, lambda thing, x: x * thing.missing),
    "__init__": (lambda self: setattr(self, "k", 3.0), lambda thing, x: x * type(thing)().k),
}


def check_exchange(traced: Any, eager: Callable[[Tensor], Tensor], exchange: Callable[[], None]) -> None:
    before = traced(X)
    assert torch.equal(before, eager(X))
    assert torch.equal(traced(X), before)
    exchange()
    for _ in range(2):
        assert torch.equal(traced(X), eager(X))
    assert not torch.equal(eager(X), before)
    assert traced.cache_info()[:3] == (2, 2, 2)


@pytest.mark.parametrize("name", EXCHANGED)
def test_special_methods(name: str) -> None:
    _, kind = classes()
    thing = kind()
    method, run = EXCHANGED[name]
    check_exchange(make_traced(lambda x: run(thing, x)), lambda x: run(thing, x), lambda: setattr(kind, name, method))


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda layer: layer,
    "child": nn.Sequential,
    "closure": lambda layer: lambda x: layer(x),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_forward(wrap: Callable[[nn.Module], Any]) -> None:
    kind, _ = classes()
    eager: Any = wrap(kind())
    other = lambda self, x: x * 7  # noqa: E731
    check_exchange(make_traced(eager), eager, lambda: setattr(kind, "forward", other))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("name", ["__defaults__", "__kwdefaults__"])
def test_defaults(wrap: Callable[[nn.Module], Any], name: str) -> None:
    kind, _ = classes()
    if name == "__kwdefaults__":
        kind.forward = lambda self, x, *, factor=2.0: x * factor  # type: ignore[method-assign]
    eager: Any = wrap(kind())
    new = (3.0,) if name == "__defaults__" else {"factor": 3.0}
    check_exchange(make_traced(eager), eager, lambda: setattr(kind.forward, name, new))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_decorator_s_state(wrap: Callable[[nn.Module], Any]) -> None:
    kind, _ = classes()
    factor = 2.0

    def scaled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: method(*args) * factor

    def change() -> None:
        nonlocal factor
        factor = 3.0

    kind.forward = scaled(kind.forward)  # type: ignore[method-assign]
    eager: Any = wrap(kind())
    check_exchange(make_traced(eager), eager, change)


def test_a_method_of_one_instance() -> None:
    kind, _ = classes()
    layer = kind()
    factor = 2.0
    layer.forward = lambda x: x * factor  # type: ignore[method-assign]

    def change() -> None:
        nonlocal factor
        factor = 3.0

    check_exchange(make_traced(nn.Sequential(layer)), layer, change)
