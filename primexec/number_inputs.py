"""Numbers that a program takes as inputs, because they keep changing from call to call."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from primexec import _torch, statics
from primexec.appended import GROWS, Appended
from primexec.bytecode import HANDLED, TYPES
from primexec.conditions import Condition, in_terms_of_inputs, is_of_few, value_of
from primexec.errors import PrimexecError
from primexec.namespaces import Cell
from primexec.numbers import Number, as_input, item
from primexec.statics import LARGEST, may_vary

if TYPE_CHECKING:
    from primexec.tracer import Tracer


class NumberInputs:
    """Numbers that a program takes as inputs: arguments, attributes, and what stands in dicts.

    Args:
        labels: what they are called.

    Attributes:
        counts: whether the function changes them, so that none of them can be a constant.
        arguments: those among the arguments: position → label.
        conditions: what the function decides by them alone.
    """

    def __init__(self, tracer: Tracer, labels: frozenset[str]) -> None:
        self._tracer, self._labels = tracer, labels
        self.counts = False
        self.arguments: dict[int, str] = {}
        self.conditions: dict[Condition, None] = {}
        self._values: dict[str, Any] = {}  # name of an input → number
        self._logging_raises = logging.raiseExceptions
        self._changes: list[tuple[Any, Any, Any, str]] = []
        self._appended: dict[int, Appended] = {}  # identity of a list → what stands in for it
        self._kept: list[tuple[dict[Any, Any] | Cell, Any, Any, str, int]] = []  # the same, with lengths of lists
        self._lists: dict[int, list[Any]] = {}  # identity of what stands in for a list → what is in it
        # (dict or cell, key, number, stand-in, label)
        self._places: list[tuple[dict[Any, Any] | Cell, Any, Any, Any, str]] = []

    def argument(self, value: Any, position: int, label: str) -> Any:
        """The stand-in for an argument."""
        if label not in self._labels or not may_vary(value):
            return self._tracer.argument(value, position, label)
        self.arguments[position] = label
        return self._read_off(self._tracer.argument(as_input(value), position, label), value)

    def start(self) -> None:
        """From now on stand-ins take the place of numbers in dicts.

        A message that needs a value is no error of the function's: `logging` does not tell of it on stderr.
        """
        if self._labels:
            logging.raiseExceptions = False
        self._tracer.reads.number_found = self._place_all  # type: ignore[method-assign]
        self._place_all()

    @_torch.modes_off()
    def _place_all(self) -> None:
        for held, name, label in self._tracer.reads.numbers[len(self._places) :]:
            value = held.get() if isinstance(held, Cell) else statics.get_item(held, name)
            if type(value) is list and f"{label}{GROWS}" in self._labels:
                stand_in: Any = self._appended.setdefault(
                    id(value), Appended(value, functools.partial(self._read, label))
                )
            elif type(value) in (tuple, list):
                get = [functools.partial(_part, held, name, i) for i in range(len(value))]
                places = [(g, None, f"{label}[{i}]") for i, g in enumerate(get)]
                stand_ins = list(map(self._stand_in, places, value))
                stand_in = type(value)(stand_ins)
                self._lists |= {id(stand_in): stand_ins} if type(value) is list else {}
            else:
                stand_in = self._stand_in((held.get if isinstance(held, Cell) else held, name, label), value)
            self._set(held, name, stand_in)
            self._places.append((held, name, value, stand_in, label))

    def _read(self, label: str) -> Exception:
        return self._tracer.fail(f"the function reads {label}, to which it appends", "keep what it reads in a tensor")

    def _stand_in(self, place: tuple[Any, Any, str], value: Any) -> Number | None:
        tensor = as_input(value)
        self._tracer.add_place(tensor, place)
        return self._read_off(self._tracer.lift(tensor), value)

    def changes(self) -> list[tuple[Any, Any, Any, str]]:
        """(dict or setter, key, number, label) of what the function left in the place of others; nobody else's."""
        changes, self._changes = self._changes, []
        return changes

    def is_list(self, value: Any) -> bool:
        """Whether a value stands in for a list of numbers."""
        return id(value) in self._lists

    def _get(self, held: dict[Any, Any] | Cell, name: Any) -> Any:
        return held.get() if isinstance(held, Cell) else dict.get(self._seen(held), name)

    def _set(self, held: dict[Any, Any] | Cell, name: Any, value: Any) -> None:
        if isinstance(held, Cell):
            held.set(value)
        else:
            statics.set_item(self._seen(held), name, value)

    def _seen(self, held: dict[Any, Any]) -> dict[Any, Any]:
        """What the function sees in place of a dict: that of a module's shadow, or the dict itself."""
        shadow = self._tracer.shadows.by_dict.get(id(held))
        return held if shadow is None else shadow.__dict__

    def _read_off(self, stand_in: Tensor, value: Any) -> Number | None:
        node = self._tracer.node_of(stand_in)
        node.meta["largest"], self._values[node.name] = LARGEST[type(value)], value
        return item(self._tracer, stand_in)

    def ask(self, question: str, values: list[Any], each: bool = False) -> Any:
        """The answer to a question about numbers that are made of inputs alone; None where they are not, or refused.

        Args:
            each: whether a program may serve one number only.
        """
        expressions = tuple(map(in_terms_of_inputs, values))
        refused = question == "index" and not each and not is_of_few(expressions[0])
        if refused or None in expressions or self._tracer.scope.parent is not None:
            return None
        try:
            answer = getattr(operator, question)(*(value_of(e, self._values) for e in expressions))
        except (ArithmeticError, PrimexecError):  # as the program would raise where it reckons
            return None
        self.conditions[Condition(question, expressions, answer, self._tracer.source())] = None
        return answer

    def is_made_of(self, value: Any) -> bool:
        """Whether a node depends on one of them: it stays a constant then where its value is asked for."""
        waiting, seen = [value] if self._labels and isinstance(value, fx.Node) else [], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if "largest" in node.meta:
                return True
            waiting += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
        return False

    def put_back(self) -> None:
        """Put the numbers back where they stood, and note by what others the function replaced them."""
        logging.raiseExceptions = self._logging_raises
        for held, name, value, number, label in self._places:
            new = self._get(held, name)
            inside = self._lists.get(id(number))
            if inside and not (len(number) == len(inside) and all(map(operator.is_, number, inside))):
                self._tracer.fail(f"the function changes {label}, a list of numbers", "put another list in its place")
            if new is number and isinstance(number, Appended):
                get = held.get if isinstance(held, Cell) else functools.partial(statics.get_item, held, name)
                if number.added:
                    self._changes.append((functools.partial(_extend, get), None, tuple(number.added), label))
                    number.added.clear()  # it may stand in a second place
            elif new is not number:
                self._changes.append((held.set if isinstance(held, Cell) else held, name, new, label))
                numbers: Any = new if type(new) in (tuple, list) else [new]
                if not all(isinstance(n, (int, float)) for n in numbers):
                    self._tracer.fail(f"the function puts something else in the place of {label}", "keep it a number")
            self._set(held, name, value)
            self._kept.append((held, name, value, label, len(value) if type(value) is list else 0))
        for topic, hint in ((TYPES, "use isinstance()"), (HANDLED, "let errors pass")):
            disguised = self.arguments or self._places or self._tracer.reads.disguised
            if disguised and topic in self._tracer.reads.suspects:
                self._tracer.fail("the exact type of a number or array may be asked for", hint)
        self._places.clear()
        self._appended.clear()

    def check_kept(self) -> None:
        """Raise where hooks and custom functions, which ran in a backward pass, have changed one of the places."""
        kept, self._kept = self._kept, []
        self._lists.clear()
        for held, name, value, label, length in kept:
            now = self._get(held, name)
            grown = type(value) is list and len(value) != length
            if now is not value or grown:
                self._set(held, name, value)
                if grown:
                    del value[length:]
                self._tracer.fail(f"the function changes {label} in a backward pass", "do so in the forward pass")
        self._tracer.raise_failure()


def _extend(get: Callable[[], list[Any]], values: Any) -> None:
    """Append to the list that stands at a place now."""
    get().extend(values)


def _part(held: Any, name: Any, index: int) -> Any:
    """A number of a tuple or list that stands in a dict."""
    return statics.get_item(held, name)[index]
