"""Kernels as code: equal ones, in whatever regions of a process, are written and compiled once.

Kernels are equal that differ in names, in which buffers they use and where they begin in these, and in the numbers of
their checks: all this a program tells them. So the steps of an unrolled loop share their code.
"""

from __future__ import annotations

import threading
from collections.abc import Set
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from primexec.executors.llvm import engine
from primexec.executors.llvm.ir import (
    Access,
    Const,
    Expr,
    Index,
    Kernel,
    Load,
    Op,
    Place,
    Reduce,
    Scan,
    Within,
    operands,
    roots_of,
    walk,
)
from primexec.executors.llvm.layout import accesses


@dataclass(frozen=True, eq=False)
class Binding:
    """What a program tells the code of a kernel.

    Attributes:
        starts: for each buffer, in the order of the arguments, the element from which on the kernel's places count.
        check: the number from which on its checks count.
    """

    starts: dict[int, int]
    check: int

    @classmethod
    def of(cls, kernel: Kernel, whole: Set[int]) -> Binding:
        """That of a kernel; the `whole` buffers count from their own start, on whose alignment code may rely."""
        starts: dict[int, int] = {}
        for a in accesses(kernel):
            starts[a.buffer] = 0 if a.buffer in whole else min(a.offset, starts.get(a.buffer, a.offset))
        checks = [v.check for v in walk(roots_of(kernel)) if isinstance(v, Place)]
        return cls(starts, min(checks, default=0))


@dataclass(frozen=True)
class Part:
    """A function that runs a range of units, by what its name ends with."""

    suffix: str
    units: int


@dataclass(frozen=True, eq=False)
class Code:
    """The functions of a kernel, which are to run one after the other.

    Attributes:
        name: that their names begin with in the module where they were written.
        grain: units that are worth a thread.
        room: bytes of the workspace.
    """

    name: str
    parts: tuple[Part, ...]
    grain: int
    room: int


@dataclass(frozen=True, eq=False)
class Loaded:
    """Code in memory."""

    code: Code
    module: engine.Module


_known: WeakValueDictionary[Any, Loaded] = WeakValueDictionary()
_lock = threading.Lock()


def known(key: Any) -> Loaded | None:
    """The code of an equal kernel, if some program still uses it."""
    with _lock:
        return _known.get(key)


def remember(codes: dict[Any, Code], module: engine.Module) -> list[Loaded]:
    """Lets later kernels find the codes of a module, as long as somebody holds what is returned."""
    loaded = {key: Loaded(code, module) for key, code in codes.items()}
    with _lock:
        _known.update(loaded)
    return list(loaded.values())


def key_of(kernel: Kernel, binding: Binding, whole: Set[int]) -> Any:
    """What the code of a kernel depends on."""
    places = {b: (i, b in whole) for i, b in enumerate(binding.starts)}
    numbers: dict[int, int] = {}

    def numbered(values: tuple[Expr, ...]) -> tuple[int, ...]:
        return tuple(numbers[id(v)] for v in values)

    def affine(at: Access | Index | Within, start: int = 0) -> Any:
        return at.offset - start, at.strides, tuple(f for f, _ in at.indirect)

    def place(a: Access) -> Any:
        return places[a.buffer], affine(a, binding.starts[a.buffer]), a.dtype

    def own(v: Expr) -> Any:
        """What tells a value apart from others of the same kind, dtype and operands."""
        match v:
            case Load(access):
                return place(access)
            case Index():
                return affine(v)
            case Within():
                return affine(v), v.low, v.high
            case Place():
                return v.size, v.wraps, v.check - binding.check
            case Const(value):
                return type(value), repr(value)
            case Op(name) | Reduce(name) | Scan(name):
                return name

    rows = []
    for v in walk(roots_of(kernel)):
        rows.append((type(v), v.dtype, numbered(operands(v)), own(v)))
        numbers[id(v)] = len(numbers)
    stores = tuple(
        (place(s.access), numbered(tuple(i for _, i in s.access.indirect)), numbers[id(s.value)], s.how)
        for s in kernel.stores
    )
    return kernel.axes, kernel.reduced, kernel.ordered, tuple(rows), stores
