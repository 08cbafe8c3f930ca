"""Tensors from numbers."""

from primexec.prims.base import ANY, INTEGERS, Prim


def _row(op: str, meaning: str, shapes: str, dtypes: str, deterministic: bool = True) -> Prim:
    name = f"prims.{op}.default"
    return Prim(name, "creation", meaning, shapes, dtypes, "dtype", deterministic=deterministic, recompute="cheap")


ROWS = (
    _row("full", "Every element is fill_value.", "shape → shape", ANY),
    _row("iota", "start, start + step, ..., length numbers.", "length → (length,)", INTEGERS),
    _row("empty_strided", "New memory with these strides, not written.", "shape, strides → shape", ANY, False),
)
