"""Python values that a program may depend on, and how to tell that one is still the same.

A *static* value is immutable and compared by type and value. Everything else is compared by identity,
containers by the statics and identities that they hold.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import functools
import math
import sys
import types
from typing import Any

import torch

# The closed list of types whose values are compared with ==, once the types are the same.
_BY_VALUE: frozenset[type] = frozenset(
    {
        type(None), bool, int, str, bytes, type(Ellipsis), type(NotImplemented),
        torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    }
)  # fmt: skip

_TENSOR, _PARAMETER = "a tensor", "a parameter"
_IDENTICAL: tuple[type, ...] = (torch.nn.Module, types.FunctionType, types.BuiltinFunctionType, type)
_WORKED_WITH: tuple[type, ...] = (
    torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler,
    functools.partial, types.MethodDescriptorType, types.ModuleType,
    type(torch.ops.aten.neg), type(torch.ops.aten.neg.default),
)  # fmt: skip


class Identity:
    """The identity of a value, keeping it alive so that its address is not used again."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


A_LIST = "any list"  # in place of the frozen form of one that is not read

# How large a number may be that is an input: float64 holds any such int, float32 such a float and one more.
LARGEST: dict[type, int | float] = {int: 1 << 53, float: 1e38}


def may_vary(value: Any) -> bool:
    """Whether a value is a number, or a tuple or list of numbers, that a program can take as inputs."""
    if type(value) in (tuple, list):
        return bool(value) and all(type(v) in LARGEST and may_vary(v) for v in value)
    return type(value) in LARGEST and -LARGEST[type(value)] <= value <= LARGEST[type(value)]


def are_numbers(then: Any, now: Any) -> bool:
    """Whether two frozen values are numbers of one type, or tuples or lists of such."""
    if isinstance(now, Identity) and isinstance(then, tuple):  # a stand-in, which says what it is
        return then[0] in LARGEST and now.value.__class__ is then[0]
    if not isinstance(then, tuple) or not isinstance(now, tuple) or then[0] is not now[0]:
        return False
    if then[0] in (tuple, list) and len(then[1]) == len(now[1]) > 0:
        return all(map(are_numbers, then[1], now[1]))
    return then[0] in LARGEST


class AnyNumbers:
    """Equal to the frozen form of any tuple or list of as many numbers of these types."""

    __slots__ = ("kinds",)

    def __init__(self, numbers: Any) -> None:
        self.kinds = [type(numbers), *map(type, numbers)]

    def __eq__(self, other: object) -> bool:
        holds = isinstance(other, tuple) and other[0] in (tuple, list)
        same = holds and [other[0], *(part[0] for part in other[1])] == self.kinds  # type: ignore[index]
        return same or (isinstance(other, AnyNumbers) and other.kinds == self.kinds)

    __hash__ = None  # type: ignore[assignment]


def freeze_static(value: Any) -> Any:
    """A hashable stand-in that is equal for equal statics only, or None where value is not static.

    NaN equals NaN, -0.0 differs from 0.0, and 1, 1.0 and True all differ.

    >>> freeze_static(-0.0) == freeze_static(0.0), freeze_static(1) == freeze_static(True)
    (False, False)
    """
    kind = type(value)
    if kind in _BY_VALUE:
        return None if kind is torch.Size and any(type(n) is not int for n in value) else (kind, value)
    if isinstance(value, float) and kind is float:
        return kind, "nan" if math.isnan(value) else value, math.copysign(1.0, value)
    if isinstance(value, complex) and kind is complex:
        return kind, freeze_static(value.real), freeze_static(value.imag)
    if isinstance(value, enum.Enum):  # combinations of flags may have no name
        return kind, value.value if isinstance(value, enum.Flag) else value.name
    if isinstance(value, (slice, range)):
        return _freeze_all(kind, (value.start, value.stop, value.step))
    if kind is tuple or kind is frozenset:
        return _freeze_all(kind, value)
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is not None and parameters.frozen:
        return _freeze_all(kind, _attributes(value))
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.generic) and not value.dtype.hasobject:
        return kind, value.dtype.str, value.tobytes()
    return None


def _attributes(value: Any) -> list[Any]:
    """What a frozen dataclass holds: its fields, and the names and values of what else was set, caches apart."""
    names = [f.name for f in dataclasses.fields(value)]
    cached = functools.cached_property
    others = getattr(value, "__dict__", {}).keys() - names
    others = sorted(n for n in others if not isinstance(getattr(type(value), n, None), cached))
    return [*(getattr(value, n) for n in (*names, *others)), *others]


def _freeze_all(kind: type, values: Any) -> Any:
    parts = [freeze_static(v) for v in values]
    if any(p is None for p in parts):
        return None
    return kind, frozenset(parts) if kind is frozenset else tuple(parts)


def freeze_found(value: object) -> Any:
    """As freeze_static, and modules, functions and classes by their identity."""
    return Identity(value) if isinstance(value, _IDENTICAL) else freeze_static(value)


def freeze_argument(value: object) -> Any:
    """As freeze_found, and what else a function may be given to work with, by its identity."""
    if (found := freeze_found(value)) is not None:
        return found
    if isinstance(value, types.MethodType):  # made anew wherever it is asked for
        return types.MethodType, Identity(value.__self__), Identity(value.__func__)
    return Identity(value) if isinstance(value, _WORKED_WITH) else None


def freeze(value: object) -> Any:
    """A stand-in for any value, equal as long as what it stands for is unchanged as far as can be seen."""
    static = freeze_static(value)
    if static is not None:
        return static
    if isinstance(value, torch.Tensor):
        return _TENSOR  # tensors that a program uses are its inputs, read again at every call
    if is_container(value):
        return _freeze_container(value)
    if is_array(value):
        layout = value.typecode if isinstance(value, array.array) else (value.dtype.str, value.shape)  # type: ignore[attr-defined]
        return type(value), layout, value.tobytes()  # type: ignore[attr-defined]
    return Identity(value)


def is_array(value: object) -> bool:
    """Whether a value is an array of numbers, NumPy's or the standard library's."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(type(value), numpy.ndarray):  # no stand-in
        return not value.dtype.hasobject  # type: ignore[attr-defined]
    return isinstance(value, array.array)


def of_array(value: Any) -> Any:
    """The tensor in the memory of a NumPy array; any other value, and arrays unknown to PyTorch, as they are."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) not in (numpy.ndarray, numpy.memmap):
        return value
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError):
        return value


def is_container(value: object) -> bool:
    """Whether a value is one of Python's own containers, or of a class derived from one."""
    return isinstance(value, _BUILTIN_CONTAINERS)


def has_contents(value: object) -> bool:
    """Whether a value is compared by what it holds."""
    return is_container(value) or is_array(value)


_BUILTIN_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, set, frozenset, bytearray, collections.deque)


def builtin_base(container: Any) -> Any:
    """The builtin type of a container: methods that its own class overrides may run user code."""
    kind = type(container)
    return kind if kind in _BUILTIN_CONTAINERS else next(b for b in _BUILTIN_CONTAINERS if issubclass(kind, b))


def get_item(container: Any, key: Any) -> Any:
    """What stands in a list, tuple or dict, read with the builtin type's method."""
    return builtin_base(container).__getitem__(container, key)


def set_item(container: Any, key: Any, value: Any) -> None:
    """Let a list or dict hold a value, without what its own class would make of it."""
    base = collections.OrderedDict if isinstance(container, collections.OrderedDict) else builtin_base(container)
    base.__setitem__(container, key, value)


def contents(container: Any) -> list[Any]:
    """The elements of a container, or the values of a dict, read with the builtin type's methods."""
    base = builtin_base(container)
    return list(base.values(container) if base is dict else base.__iter__(container))


def _freeze_container(value: Any) -> Any:
    """Deep form of a list, tuple, dict or set; its identity too, where tensors or attributes are read from it."""
    seen: set[int] = set()

    def deep(v: Any) -> Any:
        static = freeze_static(v)
        if static is not None:
            return static
        if isinstance(v, torch.Tensor):
            return Identity(v) if v.__dict__ else _PARAMETER if isinstance(v, torch.nn.Parameter) else _TENSOR
        if not is_container(v) or id(v) in seen:
            return freeze(v) if is_array(v) else Identity(v)
        seen.add(id(v))
        parts = [x for item in dict.items(v) for x in item] if isinstance(v, dict) else contents(v)
        owned = getattr(v, "__dict__", None) or any(isinstance(x, torch.Tensor) for x in parts)
        held = Identity(v) if owned else None
        return type(v), (frozenset if isinstance(v, (set, frozenset)) else tuple)(map(deep, parts)), held

    return deep(value)


class _Any(Identity):
    """Equal to every identity."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity)

    __hash__ = Identity.__hash__


def of_any(frozen: Any) -> Any:
    """The stand-in for a container, equal to that of any container that holds the same and as many tensors."""
    if not isinstance(frozen, tuple) or len(frozen) != 3 or not issubclass(frozen[0], _BUILTIN_CONTAINERS):
        return frozen
    kind, parts, held = frozen
    return kind, type(parts)(map(of_any, parts)), held and _Any(None)


def tensor_problem(t: torch.Tensor) -> str:
    """Why a real tensor cannot be traced; empty where it can."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return f"a tensor subclass, {type(t).__qualname__}"
    if t._is_zerotensor():
        return "a tensor of zeros without memory, as jvp, jacfwd and hessian make inside of transforms (use jacrev)"
    if t.layout is not torch.strided:
        return f"a tensor of layout {t.layout}"
    if t.is_quantized or t.is_nested:
        return "a quantized or nested tensor"
    return ""


def show(frozen: object) -> str:
    """A short form for messages."""
    if isinstance(frozen, tuple) and len(frozen) >= 2 and isinstance(frozen[0], type):
        value = frozen[1]
        if isinstance(value, tuple):
            return f"{frozen[0].__name__}({', '.join(show(v) for v in value)})"
        return "-0.0" if frozen[1:] == (0.0, -1.0) else repr(value)
    return str(frozen)
