"""What each prim means, as a function of NumPy arrays, written from its meaning and independent of PyTorch.

Arrays of float16 and bfloat16 hold float32 values that are rounded to the narrow dtype (`dtypes.cast`); a dtype
among the arguments is a name such as "float32".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from primexec.reference import (
    contraction,
    creation,
    effects,
    fft,
    indexing,
    linalg,
    pointwise,
    pooling,
    reduction,
    scan,
    shape,
)
from primexec.reference.dtypes import cast, name_of, storage
from primexec.reference.registry import DECLINED, FUNCTIONS

__all__ = ["FAMILIES", "cast", "declined", "lookup", "name_of", "references", "storage"]

FAMILIES = (pointwise, shape, reduction, indexing, contraction, pooling, scan, fft, linalg, creation, effects)


def references() -> Mapping[str, Callable[..., Any]]:
    """All references by the names of their prims."""
    return MappingProxyType(FUNCTIONS)


def declined() -> Mapping[str, str]:
    """The prims that have no reference, each with the reason."""
    return MappingProxyType(DECLINED)


def lookup(name: str) -> Callable[..., Any]:
    """The reference of a prim.

    >>> import numpy as np
    >>> lookup("aten.mm.default")(np.eye(2), np.array([[1.0], [2.0]])).tolist()
    [[1.0], [2.0]]

    Raises:
        KeyError: where the prim has none, with the reason.
    """
    if name not in FUNCTIONS:
        raise KeyError(f"{name} has no reference: {DECLINED.get(name, 'it is no prim')}")
    return FUNCTIONS[name]
