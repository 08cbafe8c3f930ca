"""Prints docs/prims.md: `python -m primexec.prims --write docs/prims.md`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from primexec.prims import FAMILIES, TABLE, Prim

_INTRODUCTION = """\
# Prims

Written by `python -m primexec.prims`. {count} operations: what programs are lowered to, and what an executor
implements. Members are PyTorch's own prims and the ATen overloads that decompose no further; the table is closed.
`executor.supports(node)` may decline any of them.

Rules that hold for all:

- Arguments are not changed and results are new memory, but for views (marked *view*: the result shares the first
  argument's memory) and the family *effects*.
- 16-bit floats: a prim rounds its result once, and computes in float32 or better inside.
- Equal arguments give equal bits at every call on one machine, unless the row says *not deterministic*.
- *Recompute* tells training what computing again costs: free (a view), cheap (pointwise), dear.
"""


def page() -> str:
    """The whole page."""
    return "\n".join((_INTRODUCTION.format(count=len(TABLE)), *_sections())) + "\n"


def _sections() -> Iterator[str]:
    for family in FAMILIES:
        name = family.__name__.rpartition(".")[2]
        yield f"## {name.capitalize()}\n\n{(family.__doc__ or '').strip()}\n"
        yield "| prim | meaning | shapes | dtypes | result's dtype | notes |\n| --- | --- | --- | --- | --- | --- |"
        for row in family.ROWS:
            cells = (
                f"`{row.op.removesuffix('.default')}`",
                row.meaning,
                row.shapes,
                row.dtypes,
                row.promotion,
                _notes(row),
            )
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
        yield from (f"    {row.signature}" for row in family.ROWS if _known(row))
        yield ""


def _known(row: Prim) -> bool:
    return not row.op.startswith("_c10d_functional")  # registered only where torch.distributed was built


def _notes(row: Prim) -> str:
    notes: list[str] = [] if row.effects == "none" else [row.effects]
    notes += ["view"] if row.view else []
    notes += [] if row.deterministic or row.effects == "random" else ["not deterministic"]
    return ", ".join([*notes, f"recompute {row.recompute}"])


def main() -> int:
    """Write the page where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write the page; else print it")
    target: Path | None = parser.parse_args().write
    if target:
        target.write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
