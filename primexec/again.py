"""Calls in which a program raises: where it has changed nothing yet, the function itself can still be run."""

from __future__ import annotations

import traceback

from torch import fx

from primexec import _torch, effects
from primexec.decisions import Undo, can_be_undone, decide
from primexec.errors import PrimexecError
from primexec.numbers import symbol_of
from primexec.program import Program
from primexec.value_checks import CHECK, check


def changes_nothing_outside(program: Program) -> bool:
    """Whether a program neither writes to its inputs nor draws random numbers, nor does what is not known."""
    graph = program.graph_module.graph
    inputs = {effects.storage_of(n) for n in graph.find_nodes(op="placeholder")} | {None}

    def stays_inside(node: fx.Node) -> bool:
        op = node.target
        if op in (CHECK, decide) or symbol_of(node.meta.get("val")) or not effects.has_effect(node):
            return True
        if not isinstance(op, _torch.OpOverload) or op.namespace != "aten" or effects.is_random(node):
            return False
        return inputs.isdisjoint(effects.storage_of(w) for w in effects.writes(node))

    return all(stays_inside(n) for n in graph.nodes if n.op == "call_function")


def changed_before_checks(program: Program, leaves_behind: bool) -> Undo | None:
    """What a program changes before its last check of a value, if it is worth to be put back where the check fails.

    Args:
        leaves_behind: whether the function leaves something in Python, which it would have done before.
    """
    nodes = list(program.graph_module.graph.nodes)
    last = max((i for i, n in enumerate(nodes) if n.target is CHECK), default=None)
    if last is None or not all(
        can_be_undone(n) for n in nodes[:last] if n.op == "call_function" and n.target is not CHECK
    ):
        return None
    undo = Undo.of(program.graph_module.graph, CHECK)
    return undo if leaves_behind or not undo else None


def raised_by_a_check(error: Exception) -> bool:
    """Whether an error is what a check of a value raises."""
    return any(frame.f_code is check.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def raised_by_an_operator(error: Exception) -> bool:
    """Whether an error is what an operator of PyTorch's or of Python's says, as it would in the function as well."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return not isinstance(error, PrimexecError) and any(f.startswith("<primexec aten ") for f in files)
