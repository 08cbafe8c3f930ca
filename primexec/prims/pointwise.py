"""Elementwise functions. Arguments have one shape; one of two may be a Python number, of the tensor's dtype."""

from primexec.prims.base import ANY, COMPLEX, FLOATS, INTEGERS, NUMBERS, REALS, Prim

_F, _FC = FLOATS, f"{FLOATS} {COMPLEX}"
_BITS = f"{INTEGERS} bool"
_SAME = "the arguments' dtype"
_BOOL = "bool"
_UNARY, _BINARY = "any → the same", "two of one shape, or one and a number → the same"

# name: (meaning, dtypes, dtype of the result)
_ONE: dict[str, tuple[str, str, str]] = {
    "abs": ("Absolute value; the modulus of a complex number.", NUMBERS, "the argument's; real for complex"),
    "acos": ("Inverse cosine; NaN outside of [-1, 1].", _FC, _SAME),
    "acosh": ("Inverse hyperbolic cosine; NaN below 1.", _FC, _SAME),
    "asin": ("Inverse sine; NaN outside of [-1, 1].", _FC, _SAME),
    "asinh": ("Inverse hyperbolic sine.", _FC, _SAME),
    "atan": ("Inverse tangent.", _FC, _SAME),
    "atanh": ("Inverse hyperbolic tangent; infinite at -1 and 1, NaN beyond.", _FC, _SAME),
    "bessel_i0": ("Modified Bessel function of the first kind, order 0.", _F, _SAME),
    "bessel_i0e": ("exp(-|x|) times the modified Bessel function of the first kind, order 0.", _F, _SAME),
    "bessel_i1": ("Modified Bessel function of the first kind, order 1.", _F, _SAME),
    "bessel_i1e": ("exp(-|x|) times the modified Bessel function of the first kind, order 1.", _F, _SAME),
    "bessel_j0": ("Bessel function of the first kind, order 0.", _F, _SAME),
    "bessel_j1": ("Bessel function of the first kind, order 1.", _F, _SAME),
    "bitwise_not": ("Every bit inverted; logical not for bool.", _BITS, _SAME),
    "ceil": ("The smallest integer that is not below x, as a number of x's dtype.", REALS, _SAME),
    "conj_physical": ("Complex conjugate, in new memory.", COMPLEX, _SAME),
    "cos": ("Cosine of an angle in radians.", _FC, _SAME),
    "cosh": ("Hyperbolic cosine.", _FC, _SAME),
    "digamma": (
        "Derivative of the logarithm of the gamma function; infinite at 0, NaN at negative integers.",
        _F,
        _SAME,
    ),
    "erf": ("Error function.", _F, _SAME),
    "erf_inv": ("Inverse of the error function; infinite at -1 and 1, NaN beyond.", _F, _SAME),
    "erfc": ("One minus the error function, exact for large x too.", _F, _SAME),
    "erfcx": ("exp(x²) times erfc(x).", _F, _SAME),
    "exp": ("e to the power of x.", _FC, _SAME),
    "exp2": ("2 to the power of x.", _FC, _SAME),
    "expm1": ("exp(x) - 1, exact for small x too.", _FC, _SAME),
    "floor": ("The largest integer that is not above x, as a number of x's dtype.", REALS, _SAME),
    "isfinite": ("Whether x is neither infinite nor NaN.", ANY, _BOOL),
    "lgamma": (
        "Logarithm of the absolute value of the gamma function; infinite at 0 and negative integers.",
        _F,
        _SAME,
    ),
    "log": ("Natural logarithm; -inf at 0, NaN below.", _FC, _SAME),
    "log10": ("Logarithm to base 10.", _FC, _SAME),
    "log1p": ("log(1 + x), exact for small x too.", _FC, _SAME),
    "log2": ("Logarithm to base 2.", _FC, _SAME),
    "ndtri": ("The x below which the standard normal distribution has the given probability.", _F, _SAME),
    "neg": ("-x; integers wrap.", NUMBERS, _SAME),
    "reciprocal": ("1 / x.", _FC, _SAME),
    "round": ("The nearest integer, halves to even, as a number of x's dtype.", REALS, _SAME),
    "rsqrt": ("1 / sqrt(x); infinite at 0, NaN below.", _FC, _SAME),
    "sign": ("-1, 0 or 1; 0 for NaN of a float.", f"{REALS} bool", _SAME),
    "signbit": ("Whether the sign bit is set; true for -0.0.", f"{REALS} bool", _BOOL),
    "sin": ("Sine of an angle in radians.", _FC, _SAME),
    "sinh": ("Hyperbolic sine.", _FC, _SAME),
    "spherical_bessel_j0": ("sin(x) / x, and 1 at 0.", _F, _SAME),
    "sqrt": ("Square root; NaN below 0, -0.0 for -0.0.", _FC, _SAME),
    "tan": ("Tangent of an angle in radians.", _FC, _SAME),
    "tanh": ("Hyperbolic tangent.", _FC, _SAME),
    "trunc": ("The integer part, as a number of x's dtype.", REALS, _SAME),
    "convert_element_type": (
        "The same number in another dtype: to nearest even among floats, towards zero from float to integer, "
        "wrapped among integers, `x != 0` to bool; the imaginary part is dropped.",
        ANY,
        "the one asked for",
    ),
}
_TWO: dict[str, tuple[str, str, str]] = {
    "add": ("a + b; logical or for bool.", ANY, _SAME),
    "atan2": ("The angle of the point (b, a), in (-π, π], signed zeros told apart.", _F, _SAME),
    "bitwise_and": ("Bitwise and.", _BITS, _SAME),
    "bitwise_or": ("Bitwise or.", _BITS, _SAME),
    "bitwise_xor": ("Bitwise exclusive or.", _BITS, _SAME),
    "div": ("a / b; integers are truncated towards zero.", NUMBERS, _SAME),
    "eq": ("Whether a equals b; NaN equals nothing.", ANY, _BOOL),
    "fmax": ("The larger one; the number where the other one is NaN.", f"{REALS} bool", _SAME),
    "fmin": ("The smaller one; the number where the other one is NaN.", f"{REALS} bool", _SAME),
    "fmod": ("The remainder of a / b with the sign of a.", REALS, _SAME),
    "gcd": ("The greatest common divisor, not negative.", INTEGERS, _SAME),
    "ge": ("Whether a ≥ b; false with NaN.", f"{REALS} bool", _BOOL),
    "gt": ("Whether a > b; false with NaN.", f"{REALS} bool", _BOOL),
    "hypot": ("sqrt(a² + b²) without overflow.", _F, _SAME),
    "igamma": ("Regularised lower incomplete gamma function P(a, b).", _F, _SAME),
    "igammac": ("Regularised upper incomplete gamma function Q(a, b).", _F, _SAME),
    "le": ("Whether a ≤ b; false with NaN.", f"{REALS} bool", _BOOL),
    "lt": ("Whether a < b; false with NaN.", f"{REALS} bool", _BOOL),
    "maximum": ("The larger one; NaN where either is NaN.", f"{REALS} bool", _SAME),
    "minimum": ("The smaller one; NaN where either is NaN.", f"{REALS} bool", _SAME),
    "mul": ("a · b; logical and for bool, integers wrap.", ANY, _SAME),
    "ne": ("Whether a differs from b; NaN differs from everything.", ANY, _BOOL),
    "nextafter": ("The next number of the dtype after a in the direction of b.", _F, _SAME),
    "pow": ("a to the power of b; 1 for b = 0; integers wrap.", NUMBERS, _SAME),
    "remainder": ("a - floor(a / b) · b: the remainder with the sign of b.", REALS, _SAME),
    "shift_left": ("a with its bits moved b places up.", INTEGERS, _SAME),
    "shift_right_arithmetic": ("a with its bits moved b places down, its sign kept.", INTEGERS, _SAME),
    "sub": ("a - b; integers wrap.", NUMBERS, _SAME),
    "zeta": ("Hurwitz zeta function: the sum over k ≥ 0 of (k + b) to the power of -a.", _F, _SAME),
}


def _row(name: str, entry: tuple[str, str, str], shapes: str) -> Prim:
    meaning, dtypes, promotion = entry
    return Prim(f"prims.{name}.default", "pointwise", meaning, shapes, dtypes, promotion, recompute="cheap")


ROWS = (
    *(_row(name, entry, _UNARY) for name, entry in _ONE.items()),
    *(_row(name, entry, _BINARY) for name, entry in _TWO.items()),
    Prim(
        "prims.frexp.default",
        "pointwise",
        "Mantissa m with 0.5 ≤ |m| < 1 and exponent e with x = m · 2^e.",
        "any → two of the same",
        FLOATS,
        "the argument's dtype, and int32",
        recompute="cheap",
    ),
    Prim(
        "prims.where.default",
        "pointwise",
        "a where the predicate is true, b elsewhere.",
        "three of one shape; a and b may be numbers → the same",
        ANY,
        "predicate bool; a and b of one dtype, the result's",
        recompute="cheap",
    ),
)
