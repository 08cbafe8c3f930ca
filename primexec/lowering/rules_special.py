"""Special functions that PyTorch keeps whole: Bessel functions, Airy's function, Chebyshev polynomials.

The intervals and forms are those of Moshier's Cephes library (Methods and Programs for Mathematical Functions, 1989),
whose functions eager runs too; the tables were fitted for this file, in 40 digits, by interpolation at Chebyshev
points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from primexec.lowering.rules import rule
from primexec.lowering.rules_grid import RULES

__all__ = ["RULES"]


def _floats(*values: Any) -> list[Tensor]:
    """The arguments as tensors of one floating dtype and shape; integers become the default dtype."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    dtype = torch.result_type(*(values if len(values) == 2 else (values[0], 0.0)))
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    made = (v if isinstance(v, Tensor) else torch.full((), v, device=tensors[0].device) for v in values)
    return list(torch.broadcast_tensors(*(t.to(dtype) for t in made)))


def _series(coefficients: tuple[float, ...], t: Tensor) -> Any:
    """The sum of c_k T_k(t) for t in [-1, 1], by Clenshaw's recurrence."""
    after: Any = 0.0
    total: Any = coefficients[-1]
    twice = t + t
    for c in coefficients[-2:0:-1]:
        total, after = twice * total + c - after, total
    return t * total - after + coefficients[0]


def _power_series(coefficients: list[float], x: Tensor) -> Any:
    total: Any = coefficients[-1]
    for c in coefficients[-2::-1]:
        total = x * total + c
    return total


# Bessel functions ---------------------------------------------------------------------------------------


def _modified(small: tuple[float, ...], large: tuple[float, ...], order: int, scaled: bool) -> Callable[[Tensor], Any]:
    """K_0 or K_1, times exp(x) where scaled; infinite at 0, NaN below."""

    def function(a: Tensor) -> Any:
        (x,) = _floats(a)
        regular = _series(small, x * x * 0.5 - 1)
        first = torch.special.i1(x) if order else torch.special.i0(x)
        near = torch.log(x * 0.5) * first
        near = near + regular / x if order else regular - near
        far = _series(large, 4 / x - 1) / torch.sqrt(x)
        near, far = (near * torch.exp(x), far) if scaled else (near, far * torch.exp(-x))
        out = torch.where(x <= 2, near, far)
        return torch.where(x == 0, math.inf, torch.where(x < 0, math.nan, out))

    return function


def _second_kind(
    order: int, first_kind: tuple[float, ...], small: tuple[float, ...], p: tuple[float, ...], q: tuple[float, ...]
) -> Any:
    """Y_0 or Y_1; minus infinity at 0, NaN below."""

    def function(a: Tensor) -> Any:
        (x,) = _floats(a)
        square = x * x * 0.08 - 1
        near = _series(small, square) + torch.log(x) * _series(first_kind, square) * (2 / math.pi)
        near = x * near - 2 / math.pi / x if order else near
        inverse = 5 / x
        t = inverse * inverse * 2 - 1
        phase = x - math.pi * (2 * order + 1) / 4
        wave = _series(p, t) * torch.sin(phase) + _series(q, t) * inverse * torch.cos(phase)
        far = wave * math.sqrt(2 / math.pi) / torch.sqrt(x)
        return torch.where(x == 0, -math.inf, torch.where(x < 0, math.nan, torch.where(x <= 5, near, far)))

    return function


# Airy's function ----------------------------------------------------------------------------------------


def _airy_terms(start: int) -> list[float]:
    """Coefficients in x³ of the two solutions of w'' = x w, up to the factor x of the second."""
    terms = [1.0]
    for k in range(1, 18):
        terms.append(terms[-1] / ((3 * k + start) * (3 * k + start - 1)))
    return terms


_AT_0, _SLOPE = 0.355028053887817239, 0.258819403792806799  # Ai(0), -Ai'(0)


@rule("aten.special_airy_ai.default")
def _airy_ai(a: Tensor) -> Any:
    (x,) = _floats(a)
    cube = x * x * x
    middle = _power_series(_airy_terms(0), cube) * _AT_0 - x * _power_series(_airy_terms(1), cube) * _SLOPE
    size = x.abs()
    root = torch.sqrt(size)
    zeta = size * root * (2 / 3)
    scale = torch.sqrt(root) * math.sqrt(math.pi)
    inverse = 1 / zeta
    right = torch.exp(-zeta) * _series(_AIRY_RIGHT, inverse * (1 / 0.66) - 1) / (scale * 2)
    t = inverse * inverse * 8 - 1
    angle = zeta + math.pi / 4
    left = (torch.sin(angle) * _series(_AIRY_F, t) - torch.cos(angle) * inverse * _series(_AIRY_G, t)) / scale
    out = torch.where(x > 1.09, right, torch.where(x < -2.09, left, middle))
    out = torch.where(x > 103.892, 0.0, out)
    return torch.where(size == math.inf, math.nan, out)


# Chebyshev polynomials ----------------------------------------------------------------------------------

_INSIDE, _OUTSIDE = 8, 16  # up to these degrees by recurrence, where |x| < 1 and where it is larger


def _polynomial(kind: str, shifted: bool) -> Callable[[Any, Any], Any]:
    """Kinds T, U, V and W, of 2x - 1 where shifted; degrees are cut to integers, and negative ones give 0.

    Beyond the first degrees: cos nθ, sin (n+1)θ / sin θ, cos (n+½)θ / cos ½θ, sin (n+½)θ / sin ½θ with x = cos θ, and
    the hyperbolic functions where |x| > 1 (Mason and Handscomb, Chebyshev Polynomials, 2003, chapter 1).
    """

    def function(a: Any, n: Any) -> Any:
        x, n = _floats(a, n)
        x, n = (x + x - 1 if shifted else x), torch.trunc(n)
        twice = x + x
        values = [torch.ones_like(x), {"t": x, "u": twice, "v": twice - 1, "w": twice + 1}[kind]]
        while len(values) <= _OUTSIDE:
            values.append(twice * values[-1] - values[-2])
        degree, over = (n + 1, 1) if kind == "u" else (n, 1) if kind == "t" else (n + 0.5, 0.5)
        theta = torch.acos(x)
        beyond = torch.log1p((size := x.abs() - 1) + torch.sqrt(size * (size + 2)))
        even, odd = (torch.cos, torch.sin), (torch.cosh, torch.sinh)
        sign = torch.where((x < 0) & (torch.remainder(n, 2) == 1), -1.0, 1.0).to(x.dtype)
        inside = even[kind in "uw"](degree * theta)
        if kind == "t":
            outside, end = torch.cosh(n * beyond), torch.ones_like(n)
        else:
            inside = inside / even[kind in "uw"](theta * over)
            # V of a negative x is W of its absolute value, and the other way round.
            forms = [f(degree * beyond) / f(beyond * over) for f in odd]
            ends = [torch.ones_like(n), n + n + 1]
            right = kind == "w"
            outside = forms[1] if kind == "u" else torch.where(x < 0, forms[not right], forms[right])
            end = n + 1 if kind == "u" else torch.where(x < 0, ends[not right], ends[right])
        out = torch.where(size < 0, inside, torch.where(size == 0, end * sign, outside * sign))
        chosen = torch.where((size > 0) | (n <= _INSIDE), n, -1.0)
        for k, value in enumerate(values):
            out = torch.where(chosen == k, value, out)
        return torch.where(n < 0, 0.0, out)

    return function


def _register() -> None:
    for scaled in (False, True):
        prefix = "aten.special_scaled_" if scaled else "aten.special_"
        rule(f"{prefix}modified_bessel_k0.default")(_modified(_K0_SMALL, _K0_LARGE, 0, scaled))
        rule(f"{prefix}modified_bessel_k1.default")(_modified(_K1_SMALL, _K1_LARGE, 1, scaled))
    rule("aten.special_bessel_y0.default")(_second_kind(0, _J0, _Y0_SMALL, _Y0_P, _Y0_Q))
    rule("aten.special_bessel_y1.default")(_second_kind(1, _J1, _Y1_SMALL, _Y1_P, _Y1_Q))
    for kind in "tuvw":
        for shifted in (False, True):
            name = f"aten.special_{'shifted_' * shifted}chebyshev_polynomial_{kind}"
            rule(f"{name}.default", f"{name}.n_scalar", f"{name}.x_scalar")(_polynomial(kind, shifted))


# Chebyshev coefficients ---------------------------------------------------------------------------------
# K: in x² on [0, 4]; of sqrt(x) exp(x) K in 1/x on [0, 1/2]. Y: in x² on [0, 25], as J; P and Q in 25/x² on [0, 1].
# Ai: of the factor of exp(-ζ) in 1/ζ on [0, 1.32]; those of sine and cosine in 1/ζ² on [0, 1/4].

_K0_SMALL = (
    -0.2676636966169514, 0.3442898999246285, 0.0359799365153615, 0.001264615411446926, 2.286212103119452e-05,
    2.5347910790261494e-07, 1.904516377220209e-09, 1.0349695257633625e-11, 4.2598161427910826e-14,
    1.3744654358807508e-16,
)  # fmt: skip
_K0_LARGE = (
    1.2201515410329777, -0.0314481013119645, 0.0015698838857300533, -0.00012849549581627802, 1.39498137188765e-05,
    -1.8317555227191195e-06, 2.766813639445015e-07, -4.660489897687948e-08, 8.574034017414225e-09,
    -1.6975345093890614e-09, 3.5773972814003283e-10, -7.957489244477396e-11, 1.8559491149549264e-11,
    -4.514597883374519e-12, 1.1403405882073441e-12, -2.9800969231481784e-13, 8.032890775068375e-14,
    -2.2275133267462965e-14, 6.340076476276646e-15, -1.848593377920907e-15, 5.5120559994043335e-16,
    -1.6782311257549006e-16, 5.2103917776435543e-17, -1.6475805939842632e-17,
)  # fmt: skip
_K1_SMALL = (
    0.7626501136694739, -0.3531559607765449, -0.12261118082265715, -0.006975723859639864, -0.0001730288957513052,
    -2.4334061415659684e-06, -2.213387630734726e-08, -1.4114883926335278e-10, -6.666901694199329e-13,
    -2.427449850519366e-15,
)  # fmt: skip
_K1_LARGE = (
    1.3603130952422213, 0.10392373657681724, -0.002857816859622779, 0.00019521551847135162, -1.936197974166083e-05,
    2.406484947837217e-06, -3.5019606030878126e-07, 5.7410841254500495e-08, -1.0345762465678097e-08,
    2.0150497551970347e-09, -4.1903547593419254e-10, 9.218315187605315e-11, -2.129967838427791e-11,
    5.139639673482343e-12, -1.2891739609498229e-12, 3.348419666052243e-13, -8.976705182010146e-14,
    2.4771544242195988e-14, -7.0198370892147685e-15, 2.038703166239861e-15, -6.057047270643018e-16,
    1.8380935752430455e-16, -5.689462849193648e-17, 1.7940510478863572e-17,
)  # fmt: skip
_Y0_SMALL = (
    0.20605257634092228, -0.13017522381095709, -0.291894720865317, 0.10268287966073635, -0.014279159901781987,
    0.0011164629864165486, -5.677525113380376e-05, 2.0406703657627165e-06, -5.476431029755533e-08,
    1.141220652090372e-09, -1.9021689490013906e-11, 2.5954970583106197e-13, -2.9540707750193604e-15,
    2.848154182311252e-17,
)  # fmt: skip
_Y1_SMALL = (
    0.0531074450560213, 0.14189450894667655, -0.08834328868289824, 0.017111109934210778, -0.0017057852565133666,
    0.000105257530278434, -4.44507526565354e-06, 1.3699277670028168e-07, -3.222883768023259e-09,
    5.984534092223177e-11, -9.000965667133812e-13, 1.1194186560306676e-14, -1.1707921590181557e-16,
)  # fmt: skip
_Y0_P = (
    0.9986523398776954, -0.00132937162125028, 1.761305551290559e-05, -6.319367118733069e-07, 3.948825587093808e-08,
    -3.5409678948019087e-09, 4.103246366872386e-10, -5.765747662655223e-11, 9.423105578391987e-12,
    -1.7401405706283885e-12, 3.5557750052411783e-13, -7.914641501338115e-14, 1.8959456362961828e-14,
    -4.841483019175697e-15, 1.3078555195901338e-15, -3.714050821413154e-16, 1.103023177871277e-16,
    -3.410936210498114e-17, 1.0942187869810236e-17,
)  # fmt: skip
_Y0_Q = (
    -0.024729405164334986, 0.00026380388099845215, -6.43759824253235e-06, 3.247418641128558e-07,
    -2.548657948406561e-08, 2.7026065526268818e-09, -3.5701518102394104e-10, 5.5817142695807205e-11,
    -9.977816055305666e-12, 1.990142733561329e-12, -4.3502412086017667e-13, 1.0280254324855211e-13,
    -2.5986485312118355e-14, 6.967527155377957e-15, -1.9680115145087463e-15, 5.8230549837184e-16,
    -1.7964302342606689e-16, 5.755537813115849e-17, -1.9085810023462685e-17, 6.5316323887296735e-18,
    -2.301036357065232e-18, 8.326408530757179e-19, -3.0887382878007314e-19,
)  # fmt: skip
_Y1_P = (
    1.00226762068534, 0.0022437352958079985, -2.3071018862548286e-05, 7.639181732533905e-07,
    -4.589685232343401e-08, 4.020515478419001e-09, -4.586773977170972e-10, 6.373158962859246e-11,
    -1.0327344567640412e-11, 1.8943274995111034e-12, -3.849703387824105e-13, 8.529914525779044e-14,
    -2.03544697865723e-14, 5.180421738900549e-15, -1.3953502148258493e-15, 3.9523601713314257e-16,
    -1.171117080126803e-16, 3.614078564738109e-17, -1.1572356053251518e-17,
)  # fmt: skip
_Y1_Q = (
    0.07461746924293727, -0.00037410379362102955, 8.01139890409206e-06, -3.828805678171264e-07,
    2.917633021484398e-08, -3.036679728934633e-09, 3.9598445211790335e-10, -6.131962898875392e-11,
    1.0880467184119506e-11, -2.1573304385076937e-12, 4.692705663517787e-13, -1.1044093713083652e-13,
    2.781945696278766e-14, -7.436303350432923e-15, 2.0948126235658333e-15, -6.183568405835825e-16,
    1.9036103662163e-16, -6.087290133410104e-17, 2.0150975159994986e-17, -6.885261323962649e-18,
    2.4221007940443373e-18, -8.752777804856654e-19,
)  # fmt: skip
_AIRY_RIGHT = (
    0.9671178745029975, -0.029684509531124233, 0.0027116684409652426, -0.00039247075518357574,
    7.253063057932839e-05, -1.5708353869035307e-05, 3.8131880626576888e-06, -1.0101824803608067e-06,
    2.869834232408197e-07, -8.636553062735183e-08, 2.728697491004235e-08, -8.989688013341491e-09,
    3.0718400621676316e-09, -1.0841048615926965e-09, 3.937844306294446e-10, -1.4679618877352776e-10,
    5.602659471236777e-11, -2.1847829289364666e-11, 8.689485297878953e-12, -3.519576666104999e-12,
    1.449839497912565e-12, -6.067005352934373e-13, 2.5763430804653365e-13, -1.109192375344144e-13,
    4.8375417543262236e-14, -2.135668962812437e-14, 9.537667615518566e-15, -4.3060996918013855e-15,
    1.9643450470010094e-15, -9.049448192239228e-16, 4.208178209942424e-16, -1.9744544105334431e-16,
    9.343481383708565e-17, -4.457788975479002e-17, 2.1435397578534237e-17, -1.038501958238837e-17,
)  # fmt: skip
_AIRY_F = (
    0.9961508376217008, -0.003640771660765177, 0.00018364019267342306, -2.040300132363281e-05,
    3.3768732477147068e-06, -7.151623188924357e-07, 1.7956316320453565e-07, -5.1138095200433716e-08,
    1.6060485541165908e-08, -5.456815445047385e-09, 1.9785018648350652e-09, -7.577548531148554e-10,
    3.041781856800399e-10, -1.2719581824395943e-10, 5.513510753213843e-11, -2.4674696211591147e-11,
    1.1363183979868275e-11, -5.369840841305628e-12, 2.5978119706381253e-12, -1.2839779318078438e-12,
    6.472153082969833e-13, -3.322133679647588e-13, 1.734121345118423e-13, -9.194347330083416e-14,
    4.94633827279344e-14, -2.6974882114032837e-14, 1.4899832727369924e-14, -8.32949638791618e-15,
    4.70947396287991e-15, -2.69135211570288e-15, 1.5536931921740005e-15, -9.055864321779152e-16,
    5.326677441577061e-16, -3.160481014811787e-16, 1.8907898002491252e-16, -1.1401504061984017e-16,
    6.927167269604111e-17, -4.2391269475180124e-17, 2.6120250695960877e-17, -1.6199371514237332e-17,
    1.0107292126702072e-17,
)  # fmt: skip
_AIRY_G = (
    0.06602541973670688, -0.0030987768192664846, 0.0002694599890894299, -3.999493981121172e-05,
    8.020273989481884e-06, -1.9576244249801634e-06, 5.498023403547455e-07, -1.7172322459457345e-07,
    5.832932654668536e-08, -2.121398583294622e-08, 8.168028241150776e-09, -3.30115640461433e-09,
    1.391223345622242e-09, -6.081792588168106e-10, 2.746176670903226e-10, -1.2763611579848652e-10,
    6.088425886143998e-11, -2.973432306551554e-11, 1.483626688715656e-11, -7.549584525246305e-12,
    3.911782282256005e-12, -2.061037767117331e-12, 1.1028951088875541e-12, -5.987649942333431e-13,
    3.294883018673403e-13, -1.8361816068829147e-13, 1.0355022084670879e-13, -5.905355074166727e-14,
    3.4035202747544144e-14, -1.9812997330205127e-14, 1.164354335175507e-14, -6.9043985745920715e-15,
    4.129348671301979e-15, -2.489868311035554e-15, 1.5130296223499738e-15, -9.262813871736418e-16,
    5.71110144677666e-16, -3.545195960512183e-16, 2.2149503293560636e-16, -1.3923037295908594e-16,
    8.801215674370846e-17, -5.590570005088145e-17, 3.5631887193752485e-17, -2.271656259054257e-17,
    1.4384857623174143e-17, -8.894449607545132e-18, 5.1285759078430434e-18, -2.3426056371817865e-18,
)  # fmt: skip
_J0 = (
    0.0023409898253245504, -0.49420509340952434, 0.39793736723207573, -0.09383145879659378, 0.010887531648681012,
    -0.0007606267657733754, 3.569483646356939e-05, -1.2060697061368316e-06, 3.079038572034392e-08,
    -6.154405541206829e-10, 9.89883306235983e-12, -1.3093862877228934e-13, 1.449925455546083e-15,
    -1.3640331632027614e-17,
)  # fmt: skip
_J1 = (
    0.12472176826504336, -0.2686845684799195, 0.09129790663903893, -0.014004653451391028, 0.001219706194308904,
    -6.861294107933131e-05, 2.7033690715030914e-06, -7.885506927808829e-08, 1.7729297565883533e-09,
    -3.168183400785992e-11, 4.609607207864301e-13, -5.568208308467139e-15, 5.674750797163287e-17,
)  # fmt: skip

_register()
