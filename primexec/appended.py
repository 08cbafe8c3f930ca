"""Lists outside of a traced function to which it only appends: a program appends to them at every call.

What they hold is neither compared nor read. While the function is traced a stand-in takes the place of each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from primexec.lookups import Disguised

GROWS = "[]"  # ends the label of a list that is only appended to


class Appended(Disguised):
    """What stands in for a list in the thread that traces.

    Args:
        real: the list.
        refuse: makes the error for all else that may be done to a list.
    """

    __slots__ = ("_thread", "added", "real", "refuse")

    def __init__(self, real: list[Any], refuse: Callable[[], Exception]) -> None:
        self.real, self.refuse, self._thread = real, refuse, threading.get_ident()
        self.added: list[Any] = []

    @property  # type: ignore[misc]  # as mocks have it, for isinstance
    def __class__(self) -> Any:
        return list

    def _list(self) -> list[Any]:
        return self.added if threading.get_ident() == self._thread else self.real

    def append(self, value: Any) -> None:
        self._list().append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self._list().extend(values)

    def __iadd__(self, values: Iterable[Any]) -> Appended:
        self._list().extend(values)
        return self

    def __getattr__(self, name: str) -> Any:
        if name not in dir(list):
            raise AttributeError(f"'list' object has no attribute {name!r}")
        return getattr(_asked(self), name)


def _asked(stand_in: Appended) -> list[Any]:
    """The list, for other threads."""
    if stand_in._list() is stand_in.added:
        raise stand_in.refuse()
    return stand_in.real


def _refused(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(_asked(self), name)(*args)


for _name in (
    "add", "bool", "contains", "delitem", "eq", "format", "ge", "getitem", "gt", "hash", "imul", "iter", "le", "len",
    "lt", "mul", "ne", "reduce_ex", "repr", "reversed", "rmul", "setitem", "str",
):  # fmt: skip
    setattr(Appended, f"__{_name}__", _refused(f"__{_name}__" if _name != "bool" else "__len__"))


def grew(then: Any, now: Any) -> bool:
    """Whether of two frozen lists the second is the first with more at its end."""
    lists = all(isinstance(v, tuple) and len(v) == 3 and v[0] is list for v in (then, now))
    return lists and len(now[1]) > len(then[1]) and now[1][: len(then[1])] == then[1]
