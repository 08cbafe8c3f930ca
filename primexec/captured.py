"""What a capture gives: a program, and how it is bound to the Python world."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from primexec import _torch, statics
from primexec._torch import pytree
from primexec.conditions import Condition
from primexec.decisions import Decisions, Undo
from primexec.errors import CaptureError
from primexec.gradients import GradientOf, read_place
from primexec.instances import Part
from primexec.joint import Joint
from primexec.program import Program, Static
from primexec.reads import Reads


@dataclass(frozen=True, eq=False)
class Captured:
    """A program and how its inputs and outputs are bound to the Python world.

    Attributes:
        arguments: positions, among the leaves of the call, of the inputs of kind `argument`.
        states: for each input of kind `state`, the places that hold it: (container or getter, key, label).
        tied: arguments that the function also reached by itself: (position, places).
        stores: what the function leaves behind.
        without_gradient: inputs whose `.grad` must be None.
        runs_backward: whether the function runs backward passes itself, so that hooks of its inputs would run in it.
        reads: the Python state that the program depends on.
        joint: what ties the program to autograd, where results require grad.
        reached: identities of the objects that the function reaches by itself, where an argument is an object.
        decisions: by what values the function takes the way that the program is.
        undo: what the program changes before the last of them.
        apart: inputs that share no memory with others.
        first_use: what the function sets up in Python at this call only; the program is that of later ones.
        varying: numbers among the arguments that are inputs: position → label.
        conditions: what the function decides by numbers that are inputs.
    """

    program: Program
    arguments: tuple[int, ...]
    states: tuple[list[tuple[Any, Any, str]], ...]
    tied: tuple[tuple[int, list[tuple[Any, Any, str]]], ...]
    stores: tuple[Store, ...]
    without_gradient: tuple[str, ...]
    runs_backward: bool
    reads: Reads
    joint: Joint | None
    uses_layout: bool
    uses_sdpa: bool
    inference_segments: bool
    reached: frozenset[int]
    decisions: Decisions
    undo: Undo
    apart: tuple[str, ...]
    first_use: FirstUse | None
    varying: dict[int, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()

    def labels(self) -> frozenset[str]:
        """What the inputs are called that may be numbers."""
        return frozenset([*self.varying.values(), *(i.label for i in self.program.inputs if i.kind == "state")])

    def state_values(self) -> dict[str, Tensor]:
        """What the inputs of kind `state` hold, by name: tensors that know how often they were written to."""
        names = [i.name for i in self.program.inputs if i.kind == "state"]
        held = {n: p[0] for n, p in zip(names, self.states, strict=True) if not isinstance(p[0][0], GradientOf)}
        values = {n: read_place(place, {}) for n, place in held.items()}
        return {n: v for n, v in values.items() if isinstance(v, Tensor) and not v.is_inference()}


@dataclass(frozen=True, slots=True)
class Way:
    """Finds the dict that stands at a place when a run ends."""

    find: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Store:
    """A value that the function leaves behind: in a dict, in a variable, or as the attribute `key` of an input.

    Attributes:
        held: the dict, the way to it, a function that takes the value, the name of the input, or a part of an argument.
        tree, leaves: the value, as a program's `output_tree` and `output_leaves`.
        plain: whether it is the same at every call.
    """

    held: dict[Any, Any] | Way | Callable[[Any], None] | str | Part
    key: Any
    tree: Any
    leaves: tuple[int | Static, ...]
    label: str
    plain: bool

    def run(self) -> None:
        """Leave a plain value where it belongs."""
        value = pytree.tree_unflatten([leaf.value for leaf in self.leaves if isinstance(leaf, Static)], self.tree)
        if isinstance(self.held, dict):
            statics.set_item(self.held, self.key, value)
        elif callable(self.held):
            self.held(value)


@dataclass(frozen=True, slots=True)
class FirstUse:
    """What a trace left behind in Python beside what a program can do again at every call.

    Attributes:
        error: what to raise where the next trace leaves something behind as well.
        attributes: what it left in modules, by the `id` of a module's `__dict__`: name → value.
        numbers: labels of the numbers among it, and of lists that were appended to.
        kept: whether tensors or numbers of the trace are among it.
    """

    error: CaptureError
    attributes: dict[int, dict[str, Any]]
    numbers: frozenset[str]
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """What a traced function is called, and its positional parameters, for labels.

    Attributes:
        rest: the name of `*args`, or "args" where there is none.
    """

    name: str
    parameters: tuple[str, ...]
    rest: str

    @classmethod
    def of(cls, fn: Any) -> Signature:
        try:
            parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature
            parameters = ()  # type: ignore[assignment]
        positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
        while isinstance(fn, functools.partial):
            fn = fn.func
        name = getattr(fn, "__name__", None) or type(fn).__name__
        return cls(name if name.isidentifier() else "traced", positional, rest)

    def labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """How a user writes each leaf of arguments that are opened: `x`, `batch['mask']`, `args[2].state`."""
        roots = (*((self._positional(i), arg) for i, arg in enumerate(args)), *kwargs.items())
        return [f"{root}{path}" for root, value in roots for path in _paths(value)]

    def _positional(self, index: int) -> str:
        known = len(self.parameters)
        return self.parameters[index] if index < known else f"{self.rest}[{index - known}]"


def _paths(tree: Any) -> list[str]:
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree, is_leaf=_torch.is_leaf)[0]]
    except ValueError:  # a class in it was registered without names for its parts
        return [f"[{i}]" for i in range(len(_torch.flatten(tree)[0]))]
