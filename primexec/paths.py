"""Tensors in containers that are replaced from call to call, such as `self.hidden = (h, c)`: they are found by path.

A container that holds tensors is compared by its identity, for tensors are read from it, and it may be written to.
Where a program only reads, or puts another one in its place, and one path leads there, the container that stands at
that path at a call will do.
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from primexec import statics
from primexec.bytecode import IDENTITY
from primexec.captured import Captured, Way
from primexec.contents import contents_of
from primexec.namespaces import Namespace
from primexec.reads import Reads
from primexec.record import ORDERED

_Place = tuple[Any, Any, str]


def by_path(captured: Captured) -> Captured:
    """The same with places of tensors that hold for containers that are equal to those found."""
    reads = captured.reads
    paths: dict[int, Callable[[], Any]] = {}
    met: Counter[int] = Counter()
    remade = _remade(captured)
    for get, held in _roots(reads, [id(held) for *_, held in remade]):
        _walk(held, get, paths, met)
    fixed = contents_of(list(reads.fixed)).keys() | {id(n.held) for n in reads.namespaces.values() if n.inputs}
    movable = {i for i in paths if met[i] == 1 and i not in fixed}
    followed = {i for *_, held in remade for i in _containers(held)} & movable
    written = {id(store.held) for store in captured.stores} & paths.keys()
    if not written <= followed or IDENTITY in reads.suspects or not movable:
        return captured

    def found(place: _Place) -> _Place:
        container, key, label = place
        return (_Item(paths[id(container)], key), None, label) if id(container) in movable else place

    stores = [replace(s, held=Way(paths[id(s.held)])) if id(s.held) in written else s for s in captured.stores]
    reads.loosen(lambda value: all(i in movable for i in _containers(value)))
    reads.follow([(n, name) for n, name, held in remade if id(held) in followed], followed)
    return replace(
        captured,
        stores=tuple(stores),
        states=tuple([found(p) for p in places] for places in captured.states),
        tied=tuple((position, [found(p) for p in places]) for position, places in captured.tied),
    )


class _Item:
    """Gets what stands under a key of the container that a getter finds."""

    __slots__ = ("_container", "_key")

    def __init__(self, container: Callable[[], Any], key: Any) -> None:
        self._container, self._key = container, key

    def __call__(self) -> Any:
        return statics.get_item(self._container(), self._key)


def _remade(captured: Captured) -> list[tuple[Namespace, Any, Any]]:
    """(namespace, name, container) of what the program writes to, and puts another one in the place of."""
    written = {id(store.held) for store in captured.stores}
    places = [(captured.reads.namespaces.get(id(store.held)), store.key) for store in captured.stores]
    held = [(n, name, n.originals.get(name)) for n, name in places if n is not None]
    return [place for place in held if statics.is_container(place[2]) and not written.isdisjoint(_containers(place[2]))]


def _roots(reads: Reads, remade: list[int]) -> Iterator[tuple[Callable[[], Any], Any]]:
    """(getter, value) of the containers in attributes, variables and cells that are compared by what they hold.

    Those of optimizers, which hold thousands of tensors, are replaced by nobody but the program itself.
    """
    held = [
        (n, name, value)
        for n in reads.namespaces.values()
        for name, value in n.originals.items()
        if statics.is_container(value)
        and (not n.flags or id(value) in remade)
        and not isinstance(n.values.get(name), statics.Identity)
    ]
    inside = contents_of([value for _, _, value in held])
    for namespace, name, value in held:
        if id(namespace.held) not in inside:
            yield functools.partial(namespace.get, name), value
    for cell in reads.cells:
        if statics.is_container(cell.original):
            yield cell.get, cell.original


def _walk(held: Any, get: Callable[[], Any], paths: dict[int, Callable[[], Any]], met: Counter[int]) -> None:
    """Note the paths to a container and to those inside of it."""
    met[id(held)] += 1
    attributes = hasattr(held, "__dict__") and type(held) is not OrderedDict
    if id(held) in paths or attributes or not isinstance(held, ORDERED):
        return
    paths[id(held)] = get
    for key, part in dict.items(held) if isinstance(held, dict) else enumerate(held):
        if statics.is_container(part):
            _walk(part, _Item(get, key), paths, met)


def _containers(value: Any) -> list[int]:
    """The identities of a container and of those inside of it."""
    return [i for i, v in contents_of([value]).items() if statics.is_container(v)]
