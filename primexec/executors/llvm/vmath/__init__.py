"""Vector mathematics as LLVM IR: at most 2 ulp in float32 and 4 in float64, special values exact.

Every function works at every width, lanes=1 included, and on every target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from primexec.executors.llvm.emit import Emitter, Value
from primexec.executors.llvm.vmath import binary, core, elementary, special, trigonometry

Function = Callable[..., Value]

# The same algorithm, with its own constants, in both formats.
BOTH: dict[str, Function] = {
    "abs": lambda x: x.abs(),
    "acosh": elementary.acosh,
    "asinh": elementary.asinh,
    "atan": trigonometry.atan,
    "atan2": trigonometry.atan2,
    "atanh": elementary.atanh,
    "cbrt": special.cbrt,
    "ceil": lambda x: x.intrinsic("ceil"),
    "cos": trigonometry.cos,
    "cosh": elementary.cosh,
    "erf": elementary.erf,
    "exp": core.exp,
    "exp2": elementary.exp2,
    "expm1": core.expm1,
    "floor": lambda x: x.intrinsic("floor"),
    "fmax": binary.fmax,
    "fmin": binary.fmin,
    "fmod": binary.fmod,
    "lgamma": special.lgamma,
    "log": core.log,
    "log10": elementary.log10,
    "log1p": core.log1p,
    "log2": elementary.log2,
    "maximum": binary.maximum,
    "minimum": binary.minimum,
    "neg": lambda x: -x,
    "nextafter": binary.nextafter,
    "pow": binary.power,
    "reciprocal": binary.reciprocal,
    "remainder": binary.remainder,
    "round": lambda x: x.intrinsic("roundeven"),
    "rsqrt": elementary.rsqrt,
    "sigmoid": elementary.sigmoid,
    "sign": binary.sign,
    "sin": trigonometry.sin,
    "sinh": elementary.sinh,
    "sqrt": elementary.sqrt,
    "tanh": elementary.tanh,
    "trunc": lambda x: x.intrinsic("trunc"),
}

# Computed in float64 for both formats: the algorithm for float64, and the shorter one for what is rounded to float32.
IN_FLOAT64: dict[str, tuple[Function, Function]] = {
    "acos": (trigonometry.acos, partial(trigonometry.acos, accuracy="rounded")),
    "asin": (trigonometry.asin, partial(trigonometry.asin, accuracy="rounded")),
    "digamma": (special.digamma, special.digamma),
    "erf_inv": (special.erf_inv, special.erf_inv_f32),
    "erfc": (elementary.erfc, partial(elementary.erfc, accuracy="rounded")),
    "hypot": (binary.hypot_f64, binary.hypot_f32),
    "tan": (trigonometry.tan, partial(trigonometry.tan, accuracy="rounded")),
}

FUNCTIONS: dict[tuple[str, str], Function] = {
    **{(name, dtype): f for name, f in BOTH.items() for dtype in ("f32", "f64")},
    **{(name, "f64"): f for name, (f, _) in IN_FLOAT64.items()},
    **{(name, "f32"): partial(core.narrowed, f) for name, (_, f) in IN_FLOAT64.items()},
}

# float32 functions for results that are rounded to half precision: special values exact, a relative error of 2**-16.
COARSE: dict[str, Function] = {
    "exp": partial(core.exp, coarse=True),
    "tanh": elementary.tanh_coarse,
}


def emit_call(e: Emitter, name: str, dtype: str, operands: Sequence[str], lanes: int) -> str:
    """Emit one function of the table; returns the result's name.

    The emitter's current block may be another one afterwards.

    Raises:
        KeyError: where `(name, dtype)` is not in FUNCTIONS.
    """
    return FUNCTIONS[name, dtype](*(Value(e, dtype, lanes, operand) for operand in operands)).name
