"""What a row of the table of prims says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from primexec import _torch

Effects = Literal["none", "random", "writes", "collective", "raises"]
Recompute = Literal["free", "cheap", "dear"]

FLOATS = "float16 bfloat16 float32 float64"
COMPLEX = "complex64 complex128"
INTEGERS = "uint8 int8 int16 int32 int64"
NUMBERS = f"{FLOATS} {COMPLEX} {INTEGERS}"
REALS = f"{FLOATS} {INTEGERS}"
ANY = f"{NUMBERS} bool"
DOUBLES = "float32 float64"
LINALG = f"{DOUBLES} {COMPLEX}"


@dataclass(frozen=True, slots=True)
class Prim:
    """One primitive operation.

    Attributes:
        op: the qualified name of the operator overload, such as `prims.exp.default` or `aten.max.dim`. It is
            resolved when it is asked for, so that a PyTorch without it breaks nothing else.
        family: the file of the table that the row stands in.
        meaning: what the result is, in a sentence.
        shapes: the shapes of arguments and result.
        dtypes: dtypes of the principal argument, separated by spaces.
        promotion: the dtype of the result, and how the arguments' dtypes must relate.
        effects: what it does besides computing: `random` draws from a generator, `writes` changes an argument,
            `collective` talks to other processes, `raises` exists for its error.
        deterministic: whether equal arguments give equal results, bit for bit, at every call on one machine.
        recompute: what computing it again costs: `free` (a view), `cheap` (pointwise, creation) or `dear`.
        view: whether the result shares memory with the first argument.
    """

    op: str
    family: str
    meaning: str
    shapes: str
    dtypes: str
    promotion: str
    effects: Effects = "none"
    deterministic: bool = True
    recompute: Recompute = "dear"
    view: bool = False

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload: `exp`, `max`."""
        return self.op.split(".")[1]

    @property
    def reference(self) -> str:
        """The key under which `primexec.reference` holds the NumPy function."""
        return self.op

    @property
    def operator(self) -> Any:
        """The operator overload itself; raises PrimexecError where this PyTorch has none."""
        return _torch.operator(self.op)

    @property
    def signature(self) -> str:
        """The operator's schema, as PyTorch prints it."""
        return str(self.operator._schema)
