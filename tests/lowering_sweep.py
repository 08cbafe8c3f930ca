"""Which entries of op_db lower to prims only: the first float32 sample of each, captured and expanded.

`section()` is what `python -m tests.lowering_sweep` prints and docs/coverage.md holds.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable

import torch

from primexec import CaptureError, Program, make_traced, prims
from primexec.lowering import expand, why_not
from primexec.program import op_name
from tests.sweep import OPS, SEEDS, seed_everything
from tests.training_sweep import DIFFERENTIABLE

UNRUNNABLE = "jiterator"  # these entries run on GPUs only


def captured(name: str, *, backward: bool = False) -> Program | None:
    """The program of the first sample, or its backward program; None where there is none or it cannot be captured."""
    op = OPS[name]
    if name.startswith(UNRUNNABLE) or torch.float32 not in op.supported_dtypes("cpu"):
        return None
    seed_everything(SEEDS[0])
    with warnings.catch_warnings(), torch.set_grad_enabled(backward):
        warnings.simplefilter("ignore")
        sample = next(iter(op.sample_inputs("cpu", torch.float32, requires_grad=backward)), None)
        if sample is None:
            return None
        try:
            program = make_traced(op.op).trace(sample.input, *sample.args, **sample.kwargs)
        except CaptureError:
            return None
    return program.backward if backward else program


def opaque(program: Program) -> dict[str, str]:
    """Operator → reason, for each node that does not lower to prims."""
    left = {}
    for node in program.lower().nodes:
        if node.target is not operator.getitem and not prims.is_prim(node.target) and expand(node) is None:
            left[op_name(node.target)] = why_not(node)
    return left


def sweep(names: Iterable[str] = tuple(OPS), *, backward: bool = False) -> tuple[int, dict[str, dict[str, str]]]:
    """How many entries have such a program, and what is left opaque in which of them."""
    count, left = 0, {}
    for name in names:
        program = captured(name, backward=backward)
        if program is not None:
            count += 1
            if reasons := opaque(program):
                left[name] = reasons
    return count, left


def section() -> list[str]:
    """The lines of docs/coverage.md about lowering."""
    lines = ["## What does not lower to prims only", ""]
    for what, (count, left) in (
        ("captured entries", sweep()),
        ("backward programs", sweep(DIFFERENTIABLE, backward=True)),
    ):
        lines += [f"{1 - len(left) / count:.1%} of the {count} {what} lower to prims only; the others:", ""]
        for name, reasons in left.items():
            lines.append(f"- {name}: " + "; ".join(f"`{op}`, {reason}" for op, reason in reasons.items()))
        lines.append("")
    return lines


if __name__ == "__main__":
    print("\n".join(section()))
