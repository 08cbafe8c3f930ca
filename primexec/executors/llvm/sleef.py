"""SLEEF's vector functions, which torch's library exports on x86-64, for what is not computed faster without them."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

from primexec._torch import load_libtorch

FUNCTIONS = ("cbrt", "lgamma", "pow")
ELEMENTS = {"f32": ("f", 4), "f64": ("d", 8)}
SUFFIXES = {32: "avx2", 64: "avx512f"}  # by the bytes of a vector


def name_of(function: str, element: str, lanes: int) -> str:
    """The C name: Sleef_powd8_u10avx512f."""
    letter, size = ELEMENTS[element]
    return f"Sleef_{function}{letter}{lanes}_u10{SUFFIXES[lanes * size]}"


@cache
def symbols() -> dict[str, int]:
    """Addresses by C name; empty where one is missing."""
    library = load_libtorch()
    if library is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    names = [name_of(f, e, n // size) for f in FUNCTIONS for e, (_, size) in ELEMENTS.items() for n in SUFFIXES]
    if not all(hasattr(library, name) for name in names):
        return {}
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names}
