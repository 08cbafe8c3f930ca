"""What was recorded of Python's state, and how it compares with what is there now."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from primexec import _torch, statics
from primexec.contents import Container, Contents, contents_of
from primexec.errors import CaptureError
from primexec.lookups import Disguised
from primexec.namespaces import ABSENT, Cell, Namespace

_INPUTS = (torch.Tensor, torch.Generator)
ORDERED = (dict, list, tuple, collections.deque)  # containers whose parts stand under keys
# What can be exchanged in place, and how to ask for it: classes of objects, code of functions, bases of classes.
ASK: dict[str, Callable[[Any], Any]] = {
    "__class__": type, "__code__": operator.attrgetter("__code__"), "__mro__": operator.attrgetter("__mro__"),
}  # fmt: skip


class Record:
    """Places that were read, and what they held."""

    def __init__(self) -> None:
        self.namespaces: dict[int, Namespace] = {}
        self.cells: list[Cell] = []
        self.containers: list[Container] = []
        self.exchangeable: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in ASK}  # whose, what
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.loaded: set[str] = set()  # names of attributes that are asked for, and not set only
        self.fixed: list[Any] = []  # what functions in C work on
        self.appended: list[list[Any]] = []  # lists that the function only appends to
        self._seen: dict[int, object] = {}
        self._pinned: list[tuple[Any, Any, str, torch.Tensor]] = []  # places of tensors that must not be replaced

    def changed(self) -> Iterator[tuple[str, Any, Any]]:
        """(label, frozen then, frozen now) of what changed since recorded."""
        for namespace in self.namespaces.values():
            for name, then, now in namespace.changed():
                yield namespace.label_of(name), then, now
        for cell in self.cells:
            if cell.changed():
                yield cell.label, cell.value, statics.freeze(cell.get())
        for container in self.containers:
            if container.changed():
                yield container.label, container.frozen, statics.freeze(container.value)
        for name, owner, then in self._exchanged():
            label = f"{name} of a {type(owner).__name__}"
            yield label, statics.Identity(then), statics.Identity(ASK[name](owner))

    def keep(self, name: str, owners: list[Any]) -> None:
        """Record what can be exchanged in place."""
        self.exchangeable[name][0].extend(owners)
        self.exchangeable[name][1].extend(map(ASK[name], owners))

    def _exchanged(self) -> Iterator[tuple[str, Any, Any]]:
        for name, places in self.exchangeable.items():
            for owner, then in zip(*places, strict=True):
                if ASK[name](owner) is not then:
                    yield name, owner, then

    def assigned(self, fake: Callable[[Any], bool]) -> Iterator[tuple[Any, Any, Any, str]]:
        """(dict or setter, name, value, label) of new values that satisfy `fake`, and of plain ones that may be set.

        So are containers that were made anew: who holds the old one keeps it. What was there before is put back.
        """
        for namespace in self.namespaces.values():
            for name, value in list(dict.items(namespace.held)):
                new = name not in namespace.values and not namespace.had(name)
                known = name not in namespace.values or value is namespace.originals.get(name, ABSENT)
                if name in namespace.inputs or (known and not new):
                    continue
                anew = namespace.is_made_anew(name, value, self.loaded) and id(value) not in self._seen
                kept = (
                    new
                    or namespace.is_unasked(name, self.loaded)
                    or not statics.may_vary(namespace.originals.get(name))
                )
                made = anew or fake(value) or (kept and issubclass(type(value), Disguised))
                namespace.made |= {name} if made else set()
                if made or namespace.may_set(name, value, self.loaded):
                    held = namespace.setter(name) if namespace.owner else namespace.held
                    yield held, name, value, namespace.label_of(name)
                    namespace.put_back(name)
        for cell in self.cells:
            if (value := cell.get()) is not cell.original and fake(value):
                yield cell.set, None, value, cell.label
                cell.set(cell.original)

    def pin(self, value: Any) -> bool:
        """Whether a container was there before; from now on its place must hold that very one."""
        if id(value) not in self._seen and id(value) not in self.namespaces:
            return False
        if not self._pin(value):
            raise CaptureError(
                f"the function returns a {type(value).__name__} that it found inside of another one",
                hint="return a copy of it",
            )
        return True

    def pin_numbers(self) -> None:
        """The dicts whose numbers are inputs must stand where they are, and so must the dicts around them."""
        dicts = [n.held for n in self.namespaces.values() if n.inputs and n.of is None]
        inside = contents_of([c.value for c in self.containers]) if dicts or self.appended else {}
        if any(id(v) in inside or id(v) in self._seen for v in self.appended):
            raise CaptureError("the function appends to a list that it also reads", hint="keep two of them")
        for held in dicts:
            if id(held) in inside:
                raise CaptureError("a number varies in a dict that stands in a list", hint="keep it outside of lists")
            dicts += [d for d in self._pin(held) if not any(d is known for known in dicts)]

    def _pin(self, value: Any) -> list[Any]:
        """Let all places that hold a container hold that very one; what these places belong to."""
        pinned: list[Any] = []
        for namespace in self.namespaces.values():
            for name, original in namespace.originals.items():
                if _holds(original, value):
                    namespace.values[name] = statics.Identity(original)
                    pinned.append(namespace.held)
        for cell in self.cells:
            if _holds(cell.original, value):
                cell.value = statics.Identity(cell.original)
                pinned.append(cell)
        return pinned

    def loosen(self, may: Callable[[Any], bool]) -> None:
        """From now on containers of tensors may be replaced by others that hold as many, where `may` says so."""
        for namespace in self.namespaces.values():
            for name, original in namespace.originals.items():
                if statics.is_container(original) and may(original):
                    namespace.values[name] = statics.of_any(namespace.values[name])
        for cell in self.cells:
            if statics.is_container(cell.original) and may(cell.original):
                cell.value = statics.of_any(cell.value)
        for container in self.containers:
            if statics.is_container(container.value) and may(container.value):
                container.frozen = statics.of_any(container.frozen)

    def follow(self, places: list[tuple[Namespace, Any]], containers: set[int]) -> None:
        """From now on whatever stands at these places is compared with what these containers held."""
        for namespace, name in places:
            namespace.originals[name] = []  # nobody's
        self.namespaces = {i: n for i, n in self.namespaces.items() if i not in containers}
        self.containers = [c for c in self.containers if id(c.value) not in containers]

    def drop_keys(self, only: Callable[[Any], bool]) -> None:
        """Take out of dicts what the function filed under new keys that satisfy `only`."""
        for namespace in self.namespaces.values():
            for name in [n for n in namespace.held if not namespace.had(n) and only(n)]:
                namespace.put_back(name)

    def modules(self) -> list[torch.nn.Module]:
        """The modules that the function can reach."""
        return [m for m in self._seen.values() if isinstance(m, torch.nn.Module)]

    def restore(self) -> None:
        """Put back what the traced code changed."""
        for generator, state in self.generators:
            generator.set_state(state)
        for namespace in self.namespaces.values():
            if namespace.of is not None and namespace.of.__dict__ is not namespace.held:
                namespace.of.__dict__ = namespace.held
            namespace.restore()
        for cell in self.cells:
            if cell.changed():
                cell.set(cell.original)
        for container in self.containers:
            if container.changed():
                container.put_back()
        for name, owner, then in self._exchanged():
            setattr(owner, name, then)

    def tensors(self) -> Iterator[tuple[Any, Any, str, Any]]:
        """(container or getter, key, label, value) of every place reached that holds a tensor or generator."""
        for namespace in self.namespaces.values():
            for name, value in dict.items(namespace.held):
                if isinstance(value, _INPUTS):
                    yield namespace.held, name, namespace.label_of(name), value
        for value in list(self._seen.values()):
            if isinstance(value, ORDERED):
                for key, part in dict.items(value) if isinstance(value, dict) else enumerate(value):
                    if isinstance(part, _INPUTS):
                        yield value, key, f"[{key!r}]", part
        for cell in self.cells:
            if isinstance(cell.original, _INPUTS):
                yield cell.get, None, cell.label, cell.original
        yield from self._pinned


class PythonState:
    """The versions of the dicts that a program read, as of the last time their contents were compared."""

    __slots__ = ("_contents", "_namespaces", "_version", "owned", "versions")

    def __init__(self, namespaces: list[Namespace], contents: Contents) -> None:
        self._contents = contents
        self._namespaces = sorted(namespaces, key=lambda n: n.of is not None)
        self._version = _torch.dict_version()
        self.versions: list[int] = []
        self.owned: list[int] = []  # of the `__dict__` of objects, which can be exchanged
        self.revalidate()

    def revalidate(self) -> bool:
        """Compare by value; where nothing differs, remember the present versions, and what came in equal containers."""
        versions = [self._version(n.held if n.of is None else n.of.__dict__) for n in self._namespaces]
        before = [*self.versions, *self.owned] or [-1] * len(versions)
        moved = [n for n, then, now in zip(self._namespaces, before, versions, strict=True) if then != now]
        if any(True for n in moved for _ in n.changed()):
            return False
        for namespace in moved:
            self._contents.replace(id(namespace), namespace.replaced())
        plain = sum(n.of is None for n in self._namespaces)
        self.versions, self.owned = versions[:plain], versions[plain:]
        return True


def _holds(place: Any, value: Any) -> bool:
    """Whether a place holds a container, in tuples or as it is."""
    return place is value or (type(place) is tuple and any(_holds(part, value) for part in place))


class Frozen:
    """The weights that constants were made of, and how often each had been written to."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        self._held, self._versions = held, list(map(_torch.version_of, held))

    def __call__(self, *given: torch.Tensor) -> bool:
        """Whether these are the same tensors, and nobody has written to them."""
        return all(map(operator.is_, given, self._held)) and list(map(_torch.version_of, given)) == self._versions
