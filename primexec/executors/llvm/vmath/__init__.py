"""Vector mathematics as LLVM IR: at most 2 ulp in float32 and 4 in float64, special values exact.

Every function works at every width, lanes=1 included, and on every target. Functions of the second table have no
float32 algorithm of their own: their operands are widened to float64 and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from primexec.executors.llvm.emit import Emitter, Value
from primexec.executors.llvm.vmath import binary, core, elementary, special, trigonometry

Function = Callable[..., Value]

# The same algorithm, with its own constants, in both formats.
BOTH: dict[str, Function] = {
    "abs": lambda x: x.abs(),
    "ceil": lambda x: x.intrinsic("ceil"),
    "cos": trigonometry.cos,
    "erf": elementary.erf,
    "exp": core.exp,
    "exp2": elementary.exp2,
    "expm1": core.expm1,
    "floor": lambda x: x.intrinsic("floor"),
    "fmax": binary.fmax,
    "fmin": binary.fmin,
    "fmod": binary.fmod,
    "log": core.log,
    "log1p": core.log1p,
    "maximum": binary.maximum,
    "minimum": binary.minimum,
    "neg": lambda x: -x,
    "nextafter": binary.nextafter,
    "reciprocal": binary.reciprocal,
    "remainder": binary.remainder,
    "round": lambda x: x.intrinsic("roundeven"),
    "rsqrt": elementary.rsqrt,
    "sigmoid": elementary.sigmoid,
    "sign": binary.sign,
    "sin": trigonometry.sin,
    "sqrt": elementary.sqrt,
    "tanh": elementary.tanh,
    "trunc": lambda x: x.intrinsic("trunc"),
}

# float64 algorithms; float32 is widened.
WIDENED: dict[str, Function] = {
    "acos": trigonometry.acos,
    "acosh": elementary.acosh,
    "asin": trigonometry.asin,
    "asinh": elementary.asinh,
    "atan": trigonometry.atan,
    "atan2": trigonometry.atan2,
    "atanh": elementary.atanh,
    "cbrt": special.cbrt,
    "cosh": elementary.cosh,
    "digamma": special.digamma,
    "erf_inv": special.erf_inv,
    "erfc": elementary.erfc,
    "lgamma": special.lgamma,
    "log10": elementary.log10,
    "log2": elementary.log2,
    "sinh": elementary.sinh,
    "tan": trigonometry.tan,
}


def widened(function: Function) -> Function:
    """The float32 form of a float64 function."""
    return lambda *operands: function(*(v.cast("fpext", "f64") for v in operands)).cast("fptrunc", "f32")


FUNCTIONS: dict[tuple[str, str], Function] = {
    **{(name, dtype): f for name, f in BOTH.items() for dtype in ("f32", "f64")},
    **{(name, "f64"): f for name, f in WIDENED.items()},
    **{(name, "f32"): widened(f) for name, f in WIDENED.items()},
    ("erf_inv", "f32"): widened(special.erf_inv_f32),
    ("pow", "f32"): widened(binary.pow_f32),
    ("pow", "f64"): binary.pow_f64,
    ("hypot", "f32"): widened(binary.hypot_f32),
    ("hypot", "f64"): binary.hypot_f64,
}


def emit_call(e: Emitter, name: str, dtype: str, operands: Sequence[str], lanes: int) -> str:
    """Emit one function of the table; returns the result's name.

    The emitter's current block may be another one afterwards.

    Raises:
        KeyError: where `(name, dtype)` is not in FUNCTIONS.
    """
    return FUNCTIONS[name, dtype](*(Value(e, dtype, lanes, operand) for operand in operands)).name
