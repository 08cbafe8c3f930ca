"""Elementwise operators. Operands have one dtype and one shape, or are 0-d, or Python numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from primexec.reference import special
from primexec.reference.dtypes import Array, cast, is_floating
from primexec.reference.registry import reference


def operand(value: Any, other: Any) -> Array:
    """An operand as an array; a Python number takes the other operand's dtype."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(other, np.ndarray):
        return cast(np.asarray(value), other.dtype) if not _widens(value, other) else np.asarray(value)
    return np.asarray(value)


def _widens(value: Any, other: Array) -> bool:
    """Whether a number does not fit the kind of an array's dtype, as in a comparison of integers with 0.5."""
    ranks = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}
    return ranks[np.asarray(value).dtype.kind] > ranks[other.dtype.kind]


def binary(name: str) -> Callable[[Callable[[Array, Array], Any]], Callable[[Array, Array], Any]]:
    """Register a function of two arrays, to be given arrays also where an operand is a number."""

    def register(function: Callable[[Array, Array], Any]) -> Callable[[Array, Array], Any]:
        def on_operands(self: Any, other: Any) -> Any:
            return function(operand(self, other), operand(other, self))

        on_operands.__doc__ = function.__doc__
        reference(name)(on_operands)
        return function

    return register


def _float64(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of float64 arrays for arrays of any floating-point dtype, rounded once."""

    def widened(*args: Any) -> Array:
        arrays = [np.asarray(a) for a in args]
        # Integers stay what they are in float64; floats come back in their own dtype.
        dtype = np.result_type(*[a.dtype if is_floating(a) else np.float64 for a in arrays])
        return function(*[a.astype(np.float64) for a in arrays]).astype(dtype)

    widened.__doc__ = function.__doc__
    return widened


def _identity_on_integers(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: function(x) if is_floating(x) else x.copy()


def _log1p(x: Array) -> Any:
    """Complex: log|1 + z| from x (2 + x) + y², in which 1 + z is not rounded."""
    if x.dtype.kind != "c":
        return np.log1p(x)
    z = x.astype(np.complex128)
    result = np.asarray(np.log(1 + z))
    moderate = np.abs(z) < 1e100
    result.real = np.where(moderate, np.log1p(z.real * (2 + z.real) + z.imag**2) / 2, result.real)
    return result.astype(x.dtype)


_UNARY: dict[str, Callable[[Array], Any]] = {
    "abs": np.abs, "acos": np.arccos, "acosh": np.arccosh, "asin": np.arcsin, "asinh": np.arcsinh,
    "atan": np.arctan, "atanh": np.arctanh, "cos": np.cos, "cosh": np.cosh, "exp": np.exp, "exp2": np.exp2,
    "expm1": np.expm1, "log": np.log, "log10": np.log10, "log1p": _log1p, "log2": np.log2, "sin": np.sin,
    "sinh": np.sinh, "sqrt": np.sqrt, "tan": np.tan, "tanh": np.tanh,
    "bitwise_not": np.invert, "conj_physical": np.conjugate,
    "isfinite": np.isfinite, "reciprocal": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
    "signbit": lambda x: np.signbit(x) if is_floating(x) else x < 0,
    "sign": lambda x: ((x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)) if x.dtype != bool else x.copy(),
    "neg": np.negative,
    **{name: _identity_on_integers(f) for name, f in
       {"ceil": np.ceil, "floor": np.floor, "trunc": np.trunc, "round": np.rint}.items()},
    **{name: _float64(getattr(special, name)) for name in (
        "erf", "erfc", "erfcx", "erf_inv", "ndtri", "lgamma", "digamma", "bessel_i0", "bessel_i0e", "bessel_i1",
        "bessel_i1e", "bessel_j0", "bessel_j1", "spherical_bessel_j0")},
}  # fmt: skip
for _name, _function in _UNARY.items():
    reference(f"prims.{_name}.default")(_function)


_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "atan2": np.arctan2, "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor, "eq": np.equal, "ne": np.not_equal, "ge": np.greater_equal, "gt": np.greater,
    "le": np.less_equal, "lt": np.less, "fmax": np.fmax, "fmin": np.fmin, "gcd": np.gcd, "hypot": np.hypot,
    "maximum": np.maximum, "minimum": np.minimum, "mul": np.multiply, "add": np.add,
    "sub": np.subtract, "nextafter": np.nextafter, "zeta": _float64(special.zeta),
    "igamma": _float64(special.igamma), "igammac": _float64(special.igammac),
}  # fmt: skip
for _name, _operation in _BINARY.items():
    binary(f"prims.{_name}.default")(_operation)


@binary("prims.div.default")
def div(a: Array, b: Array) -> Any:
    """The quotient; that of integers is cut towards zero, and wraps around at the smallest over -1.

    Raises:
        ZeroDivisionError: where an integer is divided by zero.
    """
    if a.dtype.kind in "fc" or b.dtype.kind in "fc":
        return a / b
    if np.any(b == 0):
        raise ZeroDivisionError("an integer is divided by zero")
    return (a - fmod(a, b)) // b


@binary("prims.fmod.default")
def fmod(a: Array, b: Array) -> Any:
    """What is left of a after the quotient cut towards zero; it has the sign of a.

    Raises:
        ZeroDivisionError: where an integer is divided by zero.
    """
    if a.dtype.kind != "f" and np.any(b == 0):
        raise ZeroDivisionError("an integer is divided by zero")
    return np.fmod(a, b)


@binary("prims.remainder.default")
def remainder(a: Array, b: Array) -> Any:
    """What is left of a after the quotient rounded down; where not zero it has the sign of b.

    Raises:
        ZeroDivisionError: where an integer is divided by zero.
    """
    rest = fmod(a, b)
    return np.where((rest != 0) & ((b < 0) != (rest < 0)), rest + b, rest)


@binary("prims.pow.default")
def power(a: Array, b: Array) -> Any:
    """a to the b; of integers modulo 2^bits, and cut towards zero where b is negative."""
    if a.dtype.kind in "fc" or b.dtype.kind in "fc":
        return np.power(a, b)
    if a.dtype == bool:
        return a | ~b
    positive = np.power(a, np.maximum(b, 0))
    one = np.ones((), a.dtype)
    sign = np.where(a == 1, one, np.where((a + one == 0), np.where(b % 2 == 0, one, -one), 0))
    return np.where(b < 0, sign, positive).astype(a.dtype)


@binary("prims.shift_left.default")
def shift_left(a: Array, b: Array) -> Any:
    """a times 2^b modulo 2^bits; 0 for a shift below 0 or by all bits."""
    bits = a.dtype.itemsize * 8
    valid = (b >= 0) & (b < bits)
    return np.where(valid, np.left_shift(a, np.where(valid, b, 0).astype(a.dtype)), np.zeros((), a.dtype))


@binary("prims.shift_right_arithmetic.default")
def shift_right(a: Array, b: Array) -> Any:
    """a over 2^b rounded down; a shift below 0 or by all bits leaves the sign alone: 0 or -1."""
    bits = a.dtype.itemsize * 8
    valid = (b >= 0) & (b < bits)
    sign = np.where(a < 0, np.array(-1).astype(a.dtype), np.zeros((), a.dtype))
    return np.where(valid, np.right_shift(a, np.where(valid, b, 0).astype(a.dtype)), sign)


@reference("prims.frexp.default")
def frexp(self: Array) -> tuple[Array, Array]:
    """The mantissa in [1/2, 1) and the exponent, an int32, whose product is the operand."""
    mantissa, exponent = np.frexp(self)
    return np.asarray(mantissa), np.asarray(exponent).astype(np.int32)


@reference("prims.where.default")
def where(pred: Array, a: Any, b: Any) -> Array:
    """a where pred is true, else b."""
    return np.where(pred, operand(a, b), operand(b, a))


@reference("prims.convert_element_type.default")
def convert_element_type(a: Array, dtype: Any) -> Array:
    """The values in another dtype."""
    return cast(a, dtype).copy()
