"""Decisions: where Python goes on by the value of a tensor, a program is that of the way which this call takes.

The value is found while the function is traced, by a rehearsal of what was recorded so far. The program finds it again
at every run, before it does anything that was recorded later. Where it is another one, the run is abandoned, what it
changed is put back, and another program serves the call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec.draws import DRAW, Outside
from primexec.errors import PrimexecError, SourceLine

if TYPE_CHECKING:
    from primexec.tracer import Tracer

MOST = 1000  # decisions of one program: a loop that goes on longer would be too long a program


@dataclass(frozen=True, slots=True)
class Decision:
    """What was asked of a value, the answer, and the line that decides by it. Lines may differ in equal decisions."""

    question: str
    outcome: bool | int
    source: SourceLine | None = field(compare=False)


def decided_in(source: SourceLine | None) -> str:
    """What a line decides, in words."""
    return f"what {source and source.short} decides"


Decisions = tuple[Decision, ...]
NOTHING: Decisions = ()


def agree(some: Decisions, others: Decisions) -> bool:
    """Whether two rows of decisions are equal as far as both go; no longer where other things are asked."""
    for one, other in zip(some, others, strict=False):
        if one != other:
            return one.question != other.question
    return True


class DecidedOtherwiseError(PrimexecError):
    """A run came to another value than the one that its program was traced for; no user meets it.

    Attributes:
        known: what the call decides, as far as the run came.
    """

    known: Decisions = ()

    def __init__(self, position: int, found: bool | int) -> None:
        super().__init__("a program was left because a value decides otherwise")
        self._position, self._found = position, found

    def of(self, traced: Decisions) -> DecidedOtherwiseError:
        """The error, of a program that was traced for these decisions."""
        left = traced[self._position]
        self.known = *traced[: self._position], Decision(left.question, self._found, left.source)
        return self


def following(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    """The nodes that compute something and stand behind one of them; all of them where there is none."""
    node = graph._root.next if last is None else last.next
    while node is not graph._root:
        if node.op == "call_function":
            yield node
        node = node.next


def decide(question: str, values: Sequence[Any], outcome: bool | int, position: int) -> None:
    """Go on where a question, a function of `operator`, has this answer."""
    found = getattr(operator, question)(*values)
    if found != outcome:
        raise DecidedOtherwiseError(position, found)


def take_for_granted(graph: fx.Graph) -> None:
    """Let the graph go the way that it was traced for, whatever the values are."""
    for node in graph.find_nodes(op="call_function", target=decide):
        graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class Undo:
    """What a program changes before its last decision, or before the last check of a value.

    Attributes:
        written: names of inputs that are written to.
        generators: names of inputs that numbers are drawn from.
        draws: whether numbers are drawn from the default generator.
        outside: whether numbers are drawn from the generators of Python or NumPy.
    """

    written: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    draws: bool = False
    outside: bool = False

    @classmethod
    def of(cls, graph: fx.Graph, asks: Any = decide) -> Undo:
        nodes = list(graph.nodes)
        last = max((i for i, n in enumerate(nodes) if n.target is asks), default=0)
        before = [n for n in nodes[:last] if n.op == "call_function"]
        inputs = [n for n in nodes if n.op == "placeholder"]
        written = {effects.storage_of(w) for n in before for w in effects.writes(n)}
        used = {a for n in before for a in n.all_input_nodes}
        return cls(
            tuple(n.name for n in inputs if n.meta.get("val") is not None and effects.storage_of(n) in written),
            tuple(n.name for n in inputs if n.meta.get("val") is None and n in used),
            any(map(draws, before)),
            any(n.target is DRAW for n in before),
        )

    def __bool__(self) -> bool:
        return self != Undo()


class Before:
    """Tensors and generators as they were before a run."""

    def __init__(self, tensors: Iterable[Tensor], generators: Iterable[torch.Generator | Outside]) -> None:
        self._tensors = [(t.data, t.detach().clone()) for t in tensors]  # so that no version counter moves
        self._generators = [(g, g.get_state()) for g in generators]

    def put_back(self) -> None:
        for t, value in self._tensors:
            t.copy_(value)
        for generator, state in self._generators:
            generator.set_state(state)


class Deciding:
    """The decisions of a function that is traced.

    Args:
        known: those that are known of this call.
    """

    def __init__(self, tracer: Tracer, known: Decisions) -> None:
        self._tracer, self._known = tracer, known
        self.made: Decisions = ()
        self._judged: fx.Node | None = None  # up to where what was recorded can be undone

    def ask(self, question: str, *values: Any) -> Any:
        """The answer with which the function goes on; None where no program could be left here."""
        tracer = self._tracer
        if tracer.scope.parent is not None or _torch.functorch_active() or not self._can_be_left():
            return None
        if len(self.made) == MOST:
            raise tracer.fail(f"the function decides by more than {MOST} values of tensors", _torch.VALUE_NEEDED[1])
        position = len(self.made)
        if position < len(self._known) and self._known[position].question != question:
            self._known = self._known[:position]
        if position < len(self._known):
            outcome = self._known[position].outcome
        else:
            outcome = tracer.rehearsal.answer(question, values)
        node = tracer.graph.call_function(decide, (question, list(values), outcome, position))
        tracer.describe(node)
        self.made = *self.made, Decision(question, outcome, node.meta["source"])
        return outcome

    def _can_be_left(self) -> bool:
        """Whether what was recorded so far changes nothing but memory and generators that can be put back."""
        for node in following(self._tracer.graph, self._judged):
            if not can_be_undone(node):
                return False
            self._judged = node
        return True


_KNOWN = frozenset({"aten", "prims", "primexec"})
_ANYWHERE = frozenset({"as_strided", "as_strided_", "set_"})  # reach memory beyond the tensor that they are given


def can_be_undone(node: fx.Node) -> bool:
    """Whether a node changes nothing but memory and generators that can be put back."""
    op: Any = node.target
    if not isinstance(op, _torch.OpOverload):  # arithmetic of Python's has no effects
        return not isinstance(op, _torch.HigherOrderOperator)
    moves = effects.changes_metadata(op) or op._schema.name.partition("::")[2] in _ANYWHERE
    if touched := set(map(effects.storage_of, node.all_input_nodes if moves else effects.writes(node))):
        given = [n for n in node.graph.find_nodes(op="placeholder") if effects.storage_of(n) in touched]
        if any(moves or _repeats(n.meta.get("val")) for n in given):
            return False
    return op.namespace in _KNOWN and not (draws(node) and any(t.device.type != "cpu" for t in _tensors(node)))


def _repeats(t: Any) -> bool:
    """Whether elements of a tensor are one piece of memory, to which nothing can be copied."""
    return isinstance(t, Tensor) and any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True))


def _tensors(node: fx.Node) -> list[Tensor]:
    values = [n.meta.get("val") for n in (*node.all_input_nodes, *effects.results_of(node))]
    return [v for v in values if isinstance(v, Tensor)]


def draws(node: fx.Node) -> bool:
    """Whether a node moves on, or sets, the state of a generator."""
    return effects.is_random(node) or str(node.target) == "primexec.set_rng_state.default"
