"""What can be traced, and how it is called: callables of every kind, arguments, plain Python within."""

import enum
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.table import Call, Family, cases, draw, tensors

FAMILY = Family("functions")
X = tensors((3, 4))
XY = tensors((3, 4), (3, 4))


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Config:
    width: int = 4
    scale: float = 0.5
    names: tuple[str, ...] = ("a", "b")


STATICS: dict[str, Any] = {
    "none": None,
    "true": True,
    "integer": 7,
    "huge_integer": 2**80,
    "negative": -3,
    "float": 2.5,
    "infinity": math.inf,
    "nan": math.nan,
    "negative_zero": -0.0,
    "complex": 1 + 2j,
    "string": "mean",
    "bytes": b"mean",
    "enum": Color.BLUE,
    "dtype": torch.float64,
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "memory_format": torch.channels_last,
    "size": torch.Size([2, 3]),
    "slice": slice(1, None, 2),
    "dataclass": Config(3),
    "tuple": (1, "a", (2.0, None)),
    "list": [1, [2, 3]],
    "dict": {"k": 1, "m": {"n": (2,)}},
    "range": (0, 1, 2),
}
for name, value in STATICS.items():
    FAMILY.add(f"static_{name}", lambda x, s: (x + 1, s), lambda i, value=value: (draw(i, 3), value))
    FAMILY.add(
        f"static_keyword_{name}",
        lambda x, *, s=0: (x + 1, [s]),
        lambda i, value=value: Call((draw(i, 3),), {"s": value}),
    )

# Each pair differs for the cache, though some are equal for Python.
CHANGES: dict[str, tuple[Any, Any]] = {
    "integer": (2, 3),
    "integer_or_float": (1, 1.0),
    "integer_or_bool": (1, True),
    "zero_or_negative_zero": (0.0, -0.0),
    "float_or_complex": (1.0, 1 + 0j),
    "none_or_zero": (None, 0),
    "string": ("sum", "mean"),
    "string_or_bytes": ("a", b"a"),
    "nan_or_number": (math.nan, 1.0),
    "enum": (Color.RED, Color.BLUE),
    "dtype": (torch.float32, torch.float64),
    "dataclass": (Config(3), Config(4)),
    "dataclass_field_type": (Config(3), Config(3.0)),  # type: ignore[arg-type]
    "slice": (slice(0, 2), slice(0, 3)),
    "tuple_or_list": ((1, 2), [1, 2]),
    "tensor_or_number": (torch.tensor(2.0), 2.0),
}
for name, (a, b) in CHANGES.items():
    FAMILY.add(
        f"changes_{name}",
        lambda x, s: (x + 1, s if isinstance(s, Tensor) else repr(s)),
        lambda i, pair=(a, b): (draw(i, 3), pair[i % 2]),
        calls=4,
        traces_at=(0, 1),
    )
FAMILY.add("nan_is_nan", lambda x, s: x * s, lambda i: (draw(i, 3), float("nan")))
FAMILY.add(
    "number_or_zero_dim",
    lambda x, s: x * s,
    cases(lambda i: (draw(i, 3), 2.0), lambda i: (draw(i, 3), torch.tensor(2.0))),
    calls=4,
    traces_at=(0, 1),
)


# Signatures.
def defaults(x: Tensor, y: Tensor | None = None, *, scale: float = 2.0, shift: int = 1) -> Tensor:
    return (x if y is None else x + y) * scale + shift


def variadic(first: Tensor, *rest: Tensor, **named: Any) -> Any:
    total = first
    for x in rest:
        total = total + x
    return total * named.get("scale", 1), sorted(named)


def positional_only(x: Tensor, /, y: Tensor) -> Tensor:
    return x - y


FAMILY.add("defaults", defaults, X)
FAMILY.add("defaults_overridden", defaults, lambda i: Call((draw(i, 3), draw(i + 5, 3)), {"shift": 4}))
FAMILY.add("by_name", defaults, lambda i: Call((), {"y": draw(i, 3), "x": draw(i + 5, 3), "scale": 0.5}))
FAMILY.add("variadic", variadic, tensors((3,), (3,), (3,)))
FAMILY.add("variadic_named", variadic, lambda i: Call((draw(i, 3),), {"scale": 3, "other": draw(i + 5, 3)}))
FAMILY.add("positional_only", positional_only, tensors((3,), (3,)))
FAMILY.add("count_changes", variadic, cases(tensors((3,)), tensors((3,), (3,))), calls=4, traces_at=(0, 1))
FAMILY.add("missing_argument", positional_only, X, raises=TypeError, match="missing 1 required positional argument")
FAMILY.add("extra_argument", lambda x: x, XY, raises=TypeError, match="positional argument")
FAMILY.add("unknown_keyword", lambda x: x, lambda i: Call((draw(i, 3),), {"z": 1}), raises=TypeError, match="'z'")
FAMILY.add("default_is_tensor", lambda x, y=torch.ones(4): x + y, X)  # noqa: B008

# Callables.
FAMILY.add_factory("partial", lambda: functools.partial(defaults, scale=3.0), X)
FAMILY.add_factory("partial_of_tensor", lambda: functools.partial(defaults, draw(1, 3, 4)), X)
FAMILY.add_factory("partial_of_partial", lambda: functools.partial(functools.partial(defaults, scale=3.0), shift=0), X)
FAMILY.add("builtin", torch.add, XY)
FAMILY.add("torch_function", F.gelu, X)
FAMILY.add("method_descriptor", Tensor.abs, X)
FAMILY.add("operator", torch.ops.aten.mul.Tensor, XY)
FAMILY.add("class_method", lambda x: Config.__name__ + str(x.dim()), X)


class Layer:
    scale = 2.0

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def method(self, x: Tensor) -> Tensor:
        return self.helper(x) * self.scale

    def helper(self, x: Tensor) -> Tensor:
        return x @ self.weight

    @property
    def doubled(self) -> Tensor:
        return self.weight * 2

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x + 1

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x) + self.doubled.sum()


FAMILY.add_factory("bound_method", lambda: Layer(draw(1, 4, 4)).method, X)
FAMILY.add_factory("callable_object", lambda: Layer(draw(1, 4, 4)), X)
FAMILY.add("static_method", Layer.static, X)
FAMILY.add("bound_class_method", Layer.of_class, X)
FAMILY.add_factory("partial_of_method", lambda: functools.partial(Layer(draw(1, 4, 4)).method), X)


@FAMILY.factory(X)
def closure_over_module() -> Any:
    inner = nn.Linear(4, 4).requires_grad_(False)
    return lambda x: inner(x) + inner.bias


@FAMILY.factory(X)
def module_returned() -> Any:
    inner = nn.Linear(4, 4).requires_grad_(False)
    return lambda x: (inner(x), inner)


@FAMILY.factory(X)
def closure_over_function() -> Any:
    def inner(x: Tensor, k: int = 2) -> Tensor:
        return x * k

    return lambda x: inner(inner(x), k=3)


@FAMILY.factory(X)
def method_calling_modules() -> Any:
    class Holder:
        def __init__(self) -> None:
            self.layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(2)]
            self.table = {"relu": F.relu}

        def run(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.table["relu"](layer(x))
            return x

    return Holder().run


# Python within.
def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    return wrapper


FAMILY.add("wrapped", decorated(lambda x: x + 1), X)


@FAMILY.program(X)
def recursion(x: Tensor) -> Tensor:
    def power(x: Tensor, n: int) -> Tensor:
        return x if n == 0 else x * power(x, n - 1)

    return power(x, 4)


def rows(x: Tensor) -> Iterator[Tensor]:
    for k in range(x.shape[0]):
        yield x[k] * k


@FAMILY.program(X)
def generators(x: Tensor) -> Any:
    total = sum(row.sum() for row in rows(x))
    return total, [*map(torch.neg, rows(x))], dict(zip("abc", x, strict=True))


@FAMILY.program(X)
def exceptions_caught(x: Tensor) -> Any:
    try:
        y = x @ x
    except RuntimeError:
        y = x @ x.t()
    with suppress(KeyError):
        y = {"a": x}["b"]
    try:
        return y
    finally:
        y = y + 1


@contextmanager
def doubling(x: Tensor) -> Iterator[Tensor]:
    yield x * 2


@FAMILY.program(X)
def context_managers(x: Tensor) -> Any:
    with doubling(x) as y, nullcontext(), torch.no_grad(), torch.autograd.profiler.record_function("name"):
        z = y + 1
    return z


@FAMILY.program(X)
def local_state(x: Tensor) -> Any:
    """What the function makes itself may change as it likes."""
    seen = []
    counts = {"n": 0}

    def note(y: Tensor) -> Tensor:
        nonlocal x
        counts["n"] += 1
        seen.append(y)
        x = x + y
        return x

    note(x)
    note(x[:1])
    holder = Layer(x)
    holder.weight = holder.weight.t()
    return holder.helper(x), counts, seen


@FAMILY.program(X)
def formatted(x: Tensor) -> Any:
    return f"{x.shape}, {x.dtype}, {x.dim():>3}", x * 2


@FAMILY.program(X)
def operators(x: Tensor) -> Any:
    y = 2 - x / 3 + abs(x) ** 2 // 1.5 % 2
    y @= x.t() @ x
    return y, -x, 1 / (x + 10), ~(x > 0) & (x < 1) | (x == 0), (x > 0) ^ True, divmod(x.shape[0], 2)


@FAMILY.program(X)
def type_checks(x: Tensor) -> Any:
    assert isinstance(x, Tensor)
    assert torch.is_tensor(x)
    assert callable(getattr(x, "add", None))
    return x + hasattr(x, "shape") + len(x) + x.ndim


@FAMILY.program(X)
def numbers(x: Tensor) -> Any:
    return x * math.sqrt(x.shape[-1]) + max(x.shape) - int(x.shape[0] * 1.5), math.prod(x.shape)


@FAMILY.program(X)
def imports_within(x: Tensor) -> Tensor:
    import torch.nn.functional as functional

    return functional.silu(x)


FAMILY.add("rearranged", lambda x: x.reshape(3, 2, 2).permute(2, 0, 1).reshape(2, -1), X)
FAMILY.add("einsum", lambda x, y: torch.einsum("ij,kj->ik", x, y), XY)
FAMILY.add("einsum_three", lambda x, y: torch.einsum("bi,bj,bk->ijk", x, y, x), XY)
FAMILY.add("einsum_diagonal", lambda x: torch.einsum("ii->i", x @ x.t()), X)
FAMILY.add("tensordot", lambda x, y: torch.tensordot(x, y, dims=([1], [1])), XY)
FAMILY.add("linalg", lambda x: torch.linalg.qr(x), X)
FAMILY.add("fft", lambda x: torch.fft.irfft(torch.fft.rfft(x)), X)
FAMILY.add("cumulative", lambda x: (x.cumsum(0), x.cummax(1), x.logcumsumexp(0)), X)
FAMILY.add("ordering", lambda x: (x.sort(), x.argsort(0), x.topk(2), x.median(), x.kthvalue(2)), X)
FAMILY.add("vmap", lambda x: torch.vmap(torch.dot)(x, x), X)
FAMILY.add("func_grad", lambda x: torch.func.grad(lambda y: (y**2).sum())(x), X)


def raising(x: Tensor) -> Tensor:
    if x.shape[0] == 3:
        raise ValueError("three rows are too few")
    return x


# Errors: the user's own pass through; those of torch have eager's type, and name the shapes.
FAMILY.add("own_error", raising, X, raises=ValueError, match="^three rows are too few$")
FAMILY.add("own_key_error", lambda x: {"a": x}["b"], X, raises=KeyError, match="b")
FAMILY.add("own_assertion", lambda x: raising_assertion(x), X, raises=AssertionError, match="shape")
FAMILY.add("shape_error", lambda x: x @ x, X, raises=RuntimeError, match="3x4 and 3x4")
FAMILY.add("broadcast_error", lambda x: x + torch.ones(5), X, raises=RuntimeError, match="must match|broadcast")
FAMILY.add("view_error", lambda x: x.view(5, 5), X, raises=RuntimeError, match=r"\[5, 5\]")
FAMILY.add("dim_error", lambda x: x.sum(4), X, raises=IndexError, match="range")
FAMILY.add("dtype_error", lambda x: x & 1, X, raises=NotImplementedError)
FAMILY.add("attribute_error", lambda x: x.no_such_thing, X, raises=AttributeError, match="no_such_thing")
FAMILY.add("index_error", lambda x: x[torch.tensor([7])], X, raises=IndexError)
FAMILY.add("argument_error", lambda x: torch.sum(x, no_such=1), X, raises=TypeError)


def raising_assertion(x: Tensor) -> None:
    assert x.shape == (1,), f"wrong shape {tuple(x.shape)}"
