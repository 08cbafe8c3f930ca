"""NumPy arrays among the arguments: inputs of the program, by the tensors in their memory.

A function may make tensors of an array, index tensors with it, take basic parts of it, and do the arithmetic that is
the same in PyTorch. What else NumPy makes of it is refused, for its values are known to the program only.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from primexec import _torch, statics
from primexec.lookups import Disguised

if TYPE_CHECKING:
    from primexec.tracer import Tracer

_HINT = "make a tensor of it with torch.from_numpy(), and work on that"
_REFUSED = """array array_ufunc array_function int complex contains setitem delitem repr str format
    reduce_ex copy deepcopy eq ne lt le gt ge neg pos abs invert divmod rdivmod"""
_REFUSED_OPERATORS = "mod floordiv pow matmul and or xor lshift rshift"


class Array(Disguised):
    """What stands in for an array, or for a number that was taken out of one, while the function is traced.

    Attributes:
        tensor: the stand-in for the tensor in its memory.
        dtype: NumPy's.
    """

    __hash__ = None  # type: ignore[assignment]  # as of arrays

    def __init__(self, tensor: Tensor, kind: type, dtype: Any, refuse: Callable[[str], Exception]) -> None:
        self.tensor, self.dtype, self._kind, self._refuse = tensor, dtype, kind, refuse

    @property  # type: ignore[misc]  # as mocks have it, for isinstance
    def __class__(self) -> Any:
        return self._kind

    shape: Any = property(lambda self: tuple(self.tensor.shape))
    ndim: Any = property(lambda self: self.tensor.ndim)
    size: Any = property(lambda self: self.tensor.numel())
    itemsize: Any = property(lambda self: self.dtype.itemsize)
    nbytes: Any = property(lambda self: self.size * self.itemsize)
    T: Any = property(lambda self: self._of(self.tensor.permute(*reversed(range(self.ndim)))))

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> Array:
        keys = key if type(key) is tuple else (key,)
        if not all(k is ... or type(k) in (int, slice) for k in keys):
            raise self._refuse("is indexed by something else than ints and slices")
        part = self.tensor[key]
        return self._of(part) if part.ndim else Array(part.clone(), self.dtype.type, self.dtype, self._refuse)

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __index__(self) -> int:
        return self.tensor.__index__()

    def __float__(self) -> float:
        return float(self.tensor)

    def item(self) -> Any:
        """The number that is the only one in it."""
        return self.tensor.item()

    def tolist(self) -> Any:
        """Its numbers."""
        return self.tensor.tolist()

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._kind, name):
            raise AttributeError(f"'{self._kind.__module__}.{self._kind.__name__}' object has no attribute '{name}'")
        raise self._refuse(f"is asked for its {name}")

    def as_tensor(self) -> Tensor:
        """A new tensor in its memory."""
        return self.tensor.detach()

    def copy(self, *order: str) -> Array:
        """As that of arrays, in C order."""
        if order not in ((), ("C",)):
            raise self._refuse("is copied in another order")
        return self._of(self.tensor.clone(memory_format=torch.contiguous_format))

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        """As that of arrays; not all floats are the same ints in NumPy and in PyTorch."""
        target = sys.modules["numpy"].dtype(dtype)
        if not (target.kind == "f" or (target.kind in "iu" and self.dtype.kind in "iub")):
            raise self._refuse(f"is converted to {target}")
        return self._of(self.tensor.to(_of_numpy(target), copy=copy), target)

    def _of(self, tensor: Tensor, dtype: Any = None) -> Array:
        return Array(tensor, self._kind, dtype or self.dtype, self._refuse)

    def _reckon(self, name: str, reflected: bool, other: Any) -> Any:
        numpy, kinds = sys.modules["numpy"], (Array, int, float)
        if isinstance(other, Tensor) and not self.ndim:
            return getattr(operator, name)(*((other, self.item()) if reflected else (self.item(), other)))
        if type(other) not in kinds:
            raise self._refuse(f"is reckoned with a {type(other).__name__}")
        target = numpy.result_type(self.dtype, other.dtype if type(other) is Array else other)
        if name == "truediv":
            target = numpy.true_divide.resolve_dtypes((target, target, None))[2]
        if target.kind not in "iuf" or target.itemsize < (4 if target.kind == "f" else 1):
            raise self._refuse(f"is reckoned with as {target}")
        pair = [self.tensor.to(_of_numpy(target)), other]
        pair[1] = other.tensor.to(_of_numpy(target)) if type(other) is Array else other
        return self._of(getattr(operator, name)(*(pair[::-1] if reflected else pair)), target)


@_torch.modes_off()
def _of_numpy(dtype: Any) -> torch.dtype:
    return torch.from_numpy(sys.modules["numpy"].empty(0, dtype)).dtype


def _refusing(name: str) -> Any:
    def method(self: Array, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse(f"is given to NumPy or Python for its values ({name})")

    return method


def _reckoning(name: str, reflected: bool) -> Any:
    return lambda self, other: self._reckon(name, reflected, other)


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Array, f"__{_name}__", _reckoning(_name, reflected=False))
    setattr(Array, f"__r{_name}__", _reckoning(_name, reflected=True))
    setattr(Array, f"__i{_name}__", _refusing(f"__i{_name}__"))
for _name in (*_REFUSED.split(), *(f"{way}{name}" for name in _REFUSED_OPERATORS.split() for way in ("", "r", "i"))):
    setattr(Array, f"__{_name}__", _refusing(f"__{_name}__"))


class Arguments:
    """The arguments of a trace, with stand-ins for arrays; one array has one, wherever it stands."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._made: dict[int, Array] = {}

    def stand_in(self, leaf: Any, position: int, label: str) -> Any:
        """What the function gets for an argument."""
        tensor = statics.of_array(leaf)
        if tensor is leaf:
            return self._tracer.number_inputs.argument(leaf, position, label)
        if id(leaf) not in self._made:
            self._tracer.reads.disguised = True
            fake = self._tracer.argument(tensor, position, label)
            self._tracer.node_of(fake).meta["array"] = True

            def refuse(reason: str) -> Exception:
                return self._tracer.fail(f"{label}, a NumPy array, {reason}", _HINT)

            self._made[id(leaf)] = Array(fake, type(leaf), leaf.dtype, refuse)
        return self._made[id(leaf)]


@cache
def _takers() -> frozenset[Any]:
    return frozenset({torch.as_tensor, torch.asarray, Tensor.__getitem__, Tensor.__setitem__})


def as_taken(fn: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with tensors in place of arrays, where a function of torch's API takes these."""
    return tuple(map(_as_taken, args)) if fn in _takers() else args


def _as_taken(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_as_taken, value))
    return value.as_tensor() if type(value) is Array else value


@contextmanager
def taken() -> Iterator[None]:
    """In this thread, functions that C++ or NumPy would refuse to give a stand-in take it."""
    thread, numpy = threading.get_ident(), sys.modules.get("numpy")
    places: list[tuple[Any, str, Callable[[Array], Any]]] = [(torch, "from_numpy", Array.as_tensor)]
    if numpy is not None:
        places += [(numpy, "asarray", lambda a: a), (numpy, "ascontiguousarray", Array.copy)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]

    def standing_in(original: Any, way: Callable[[Array], Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ours = threading.get_ident() == thread and len(args) == 1 and type(args[0]) is Array and not kwargs
            return way(args[0]) if ours else original(*args, **kwargs)

        return call

    try:
        for (owner, name, way), (*_, original) in zip(places, originals, strict=True):
            setattr(owner, name, standing_in(original, way))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
