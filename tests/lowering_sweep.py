"""Which entries of op_db lower to prims only: the first float32 sample of each, captured and expanded.

`section()` is what `python -m tests.lowering_sweep` prints and docs/coverage.md may hold.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable

import torch

from primexec import CaptureError, Program, make_traced, prims
from primexec.lowering import expand, why_not
from primexec.program import op_name
from tests.sweep import OPS, op_samples

UNRUNNABLE = "jiterator"  # these entries run on GPUs only


def captured(name: str) -> Program | None:
    """The program of the first sample; None where there is none or it cannot be captured."""
    op = OPS[name]
    samples = op_samples(op, {torch.float32: 1})
    if name.startswith(UNRUNNABLE) or not samples:
        return None
    call = samples[0][2]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return make_traced(op.op).trace(*call.args, **call.kwargs)
        except CaptureError:
            return None


def opaque(program: Program) -> dict[str, str]:
    """Operator → reason, for each node that does not lower to prims."""
    left = {}
    for node in program.lower().nodes:
        if node.target is not operator.getitem and not prims.is_prim(node.target) and expand(node) is None:
            left[op_name(node.target)] = why_not(node)
    return left


def sweep(names: Iterable[str] = tuple(OPS)) -> tuple[int, dict[str, dict[str, str]]]:
    """How many entries were captured, and what is left opaque in which of them."""
    count, left = 0, {}
    for name in names:
        program = captured(name)
        if program is not None:
            count += 1
            if reasons := opaque(program):
                left[name] = reasons
    return count, left


def section() -> list[str]:
    """The lines of docs/coverage.md about lowering."""
    count, left = sweep()
    lines = ["## What does not lower to prims only", ""]
    lines.append(f"{1 - len(left) / count:.1%} of the {count} captured entries lower to prims only; the others:")
    lines.append("")
    for name, reasons in left.items():
        lines.append(f"- {name}: " + "; ".join(f"`{op}`, {reason}" for op, reason in reasons.items()))
    return [*lines, ""]


if __name__ == "__main__":
    print("\n".join(section()))
