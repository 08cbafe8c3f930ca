"""What the traced code leaves behind: what a program can do again at every call, and what it cannot."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

from torch import Tensor, fx

from primexec import _torch, statics
from primexec.appended import GROWS, grew
from primexec.bytecode import stores_attribute
from primexec.captured import Store
from primexec.errors import CaptureError
from primexec.lookups import Disguised
from primexec.program import Static
from primexec.reads import Reads
from primexec.shadow import Shadows, may_stand
from primexec.tracer import Tracer


def _is_grad_leaf(t: Tensor) -> bool:
    return t.requires_grad and t.is_leaf


class Assigned(NamedTuple):
    """What the traced code left somewhere: in a dict, behind a setter, in an input or in a part of an argument."""

    held: Any
    key: Any
    value: Any
    label: str


def assigned(tracer: Tracer, shadows: Shadows, changes: list[CaptureError]) -> list[Assigned]:
    """What the traced code assigned, in its order: tensors, plain values of attributes, and gradients.

    Plain values are set at every call where the attribute is new or not asked for. Anything else is one of the
    changes that only a first call may make, or raises.
    """
    found = []
    for held, name, old, value, label in shadows.differences():
        free = name not in held or name not in tracer.reads.loaded
        number = isinstance(value, (Disguised, *_torch.SYMBOLS)) and (free or not statics.may_vary(old))
        if number or _can_be_made(tracer, value):
            if number and id(held) in tracer.reads.namespaces:
                tracer.reads.namespaces[id(held)].made.add(name)
            found.append(Assigned(held, name, value, label))
        elif statics.freeze_static(value) is None or not free:
            if statics.freeze_static(value) is None or statics.freeze(old) != statics.freeze(value):
                changes.append(side_effect(label, name, tracer.reads))
                if not may_stand(value):
                    raise changes[-1]
        else:
            found.append(Assigned(held, name, value, label))
    for held, name, value, label in tracer.reads.assigned(_torch.holds_fake):
        _check_stored(tracer, value, label)
        found.append(Assigned(held, name, value, label))
    found += [Assigned(of, "grad", value, label) for of, value, label in tracer.gradients.changes()]
    found += [Assigned(of, "data", value, label) for of, value, label in tracer.gradients.replaced()]
    found += [Assigned(of, "requires_grad", value, label) for of, value, label in tracer.gradients.switched()]
    for change in tracer.number_inputs.changes():
        _check_stored(tracer, change[2], change[3])
        found.append(Assigned(*change))
    return found


def _check_stored(tracer: Tracer, value: Any, label: str) -> None:
    """Raise where a program cannot make a value again."""
    for leaf in _torch.flatten(value)[0]:
        plain = statics.freeze_found(leaf) is not None or tracer.output(leaf) is not None
        if _is_grad_leaf(leaf) if isinstance(leaf, Tensor) else not plain:
            raise side_effect(label, _variable_in(label), tracer.reads)


def _can_be_made(tracer: Tracer, value: Any) -> bool:
    """Whether a value consists of tensors of the trace, and perhaps of plain values and containers."""
    leaves = _torch.flatten(value)[0] if isinstance(value, Tensor) or _torch.holds_fake(value) else ()
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    made = all(not _is_grad_leaf(t) and tracer.output(t) is not None for t in tensors)
    return bool(tensors) and made and all(statics.freeze_static(leaf) is not None for leaf in others)


def store(tracer: Tracer, place: Assigned, value: Any, outputs: list[fx.Node]) -> Store:
    """How a value that was assigned, in which containers may be marked, is left there; its tensors are outputs."""
    leaves, tree = _torch.flatten(value)
    places: list[int | Static] = []
    for leaf in leaves:
        node = tracer.output(leaf)
        places.append(Static(leaf) if node is None else len(outputs))
        outputs += [] if node is None else [node]
    plain = statics.freeze_static(place.value) is not None
    return Store(place.held, place.key, tree, tuple(places), place.label, plain)


def changed_numbers(tracer: Tracer, shadows: Shadows) -> frozenset[str]:
    """Labels of the numbers that the function found, and left changed, and of lists that it appended to."""
    changed = list(tracer.reads.changed())
    found = {label for label, *both in changed if statics.are_numbers(*both)}
    found |= {f"{label}{GROWS}" for label, *both in changed if grew(*both)}
    for held, name, old, new, _ in shadows.differences():
        if id(held) in tracer.reads.namespaces and statics.are_numbers(statics.freeze(old), statics.freeze(new)):
            found.add(tracer.reads.namespaces[id(held)].label_of(name))
    return frozenset(found)


def side_effects(reads: Reads) -> list[CaptureError]:
    """What the function changed that it has read: the first of it."""
    labels = [label for label, *_ in itertools.islice(reads.changed(), 1)]
    return [side_effect(label, _variable_in(label), reads) for label in labels]


def _variable_in(label: str) -> str:
    """`table` in "global of file.py: table: 'key'", "table (closed over by f)" and "state (closed over by f).table"."""
    name = re.sub(r"^global of \S+: ", "", label)
    return re.sub(r" \(.*?\)", "", name).partition(": ")[0].rpartition(".")[2]


def side_effect(label: str, name: str, reads: Reads) -> CaptureError:
    """The refusal of a change, with the line that makes it."""
    return CaptureError(
        f"the function changes {label}, which a program would do only once",
        hint="return the new value, or keep it outside the traced function",
        source=stores_attribute(iter(reads.codes.values()), name, label.rpartition(": ")[2]),
    )
