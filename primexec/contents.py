"""What Python's containers hold, and how to tell quickly that it is still the same."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch

from primexec import statics


@dataclass(slots=True)
class Container:
    """A list, set or array, and what it held."""

    value: Any
    frozen: Any
    copied: Any
    label: str

    def changed(self) -> bool:
        return statics.freeze(self.value) != self.frozen  # type: ignore[no-any-return]

    def put_back(self) -> None:
        """Let it hold again what it held; a tuple does."""
        if statics.is_array(self.value):
            self.value[... if hasattr(self.value, "shape") else slice(None)] = self.copied
        elif not isinstance(self.value, (tuple, frozenset)):
            base = statics.builtin_base(self.value)
            base.clear(self.value)
            (base.update if hasattr(base, "update") else base.extend)(self.value, self.copied)


class Contents:
    """What containers hold: compared by identity, at the speed of C, and by value only where that differs."""

    __slots__ = ("_containers", "_replaced", "_snapshot", "empty")

    def __init__(self, containers: list[Container]) -> None:
        self._containers, self._replaced = containers, dict[Any, list[Container]]()
        self._snapshot, self.empty = _Snapshot(containers), not containers

    def same(self) -> bool:
        if self._snapshot.same():
            return True
        containers = [*self._containers, *chain.from_iterable(self._replaced.values())]
        if any(c.changed() for c in containers):
            return False
        self._snapshot = _Snapshot(containers)  # other objects of the same values
        return True

    def replace(self, place: Any, values: list[tuple[Any, Any]]) -> None:
        """Compare what has come to a place as well: (container, frozen) of those that are equal to what was there."""
        if values or place in self._replaced:
            self._replaced[place] = [Container(v, frozen, None, "") for v, frozen in values]
            self._snapshot = _Snapshot([*self._containers, *chain.from_iterable(self._replaced.values())])
            self.empty = False


class _Snapshot:
    """The elements of containers and of those inside of them, now."""

    __slots__ = ("_elements", "_lengths", "_others", "_tensors", "_types", "_views", "_walk")

    def __init__(self, containers: list[Container]) -> None:
        plain: list[Any] = []
        self._tensors: list[Any] = []  # a program reads them again: only that they are tensors counts
        self._others: list[Container] = []  # compared by value each time
        seen: set[int] = set()
        for container in containers:
            views = _views(container.value, seen)
            if views is None:
                self._others.append(container)
            else:
                for view in views:
                    (self._tensors if any(isinstance(v, torch.Tensor) for v in view) else plain).append(view)
        self._views = plain + self._tensors
        self._lengths = list(map(len, self._views))
        self._walk: Callable[[], Iterable[Any]] = functools.partial(chain.from_iterable, plain)
        if len(plain) == 1:
            self._walk = plain[0].__iter__
        self._elements = list(self._walk())
        self._types = list(map(type, chain.from_iterable(self._tensors)))

    def same(self) -> bool:
        return (
            list(map(len, self._views)) == self._lengths
            and all(map(is_, self._walk(), self._elements))
            and (not self._types or list(map(type, chain.from_iterable(self._tensors))) == self._types)
            and not any(c.changed() for c in self._others)
        )


def _views(value: Any, seen: set[int]) -> list[Any] | None:
    """What to walk to see all that a container holds; None where its elements and their identities do not tell."""
    views: list[Any] = []
    todo = [value]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        base = statics.builtin_base(value) if statics.is_container(value) else None
        if base is None or (base is not dict and any(getattr(type(value), n) is not getattr(base, n) for n in _WALK)):
            return None
        seen.add(id(value))
        new: list[Any] = [dict.keys(value), dict.values(value)] if base is dict else [value]
        for part in chain.from_iterable(new):
            if statics.has_contents(part) and statics.freeze_static(part) is None:
                todo.append(part)
        if any(0 < sum(isinstance(v, torch.Tensor) for v in view) < len(view) for view in new):
            return None
        views += new
    return views


_WALK = ("__iter__", "__len__")


def contents_of(values: list[Any]) -> dict[int, Any]:
    """Values, and all that stands in the containers among them, weakly or not, by its identity."""
    found: dict[int, Any] = {}
    while values:
        value = values.pop()
        if id(value) not in found:
            found[id(value)] = value
            if isinstance(value, weakref.ref):
                values.append(value())
            if statics.is_container(value):
                values += [*(dict.keys(value) if isinstance(value, dict) else ()), *statics.contents(value)]
    return found
