"""What operators on whole arrays are tried on: products, windows, indices, sorting, transforms, factorisations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from primexec.testing.samples import Sample, Samples, number_of
from primexec.testing.values import Draw

# Products and windows ------------------------------------------------------------------------------------


def products(batched: bool) -> Samples:
    """Matrices, or batches of them."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for m, k, n in ((1, 1, 1), (3, 5, 7), (0, 3, 2), (2, 0, 3), (1, 127, 1), (65, 129, 33), (17, 513, 16)):
            for batch in ((),) if not batched else ((1,), (3,), (0,)):
                yield Sample((draw.tensor(*batch, m, k), draw.tensor(*batch, k, n)), terms=max(k, 1))

    return samples


# input, weight, stride, padding, dilation, transposed, groups
_CONVOLUTIONS: tuple[tuple[Any, ...], ...] = (
    ((1, 1, 7), (1, 1, 3), 1, 0, 1, False, 1),
    ((2, 4, 9), (6, 2, 3), 2, 1, 1, False, 2),
    ((2, 3, 9, 7), (5, 3, 3, 3), 1, 1, 1, False, 1),
    ((1, 4, 11, 11), (4, 1, 3, 3), 1, 2, 2, False, 4),
    ((2, 3, 5, 5), (3, 4, 3, 3), 2, 1, 1, True, 1),
    ((1, 2, 5, 5, 5), (3, 2, 2, 2, 2), 1, 0, 1, False, 1),
)


def convolutions(draw: Draw) -> Iterator[Sample]:
    """convolution: input, weight, bias, stride, padding, dilation, transposed, output padding, groups."""
    for x, w, stride, padding, dilation, transposed, groups in _CONVOLUTIONS:
        n = len(x) - 2
        bias = w[1] * groups if transposed else w[0]
        arguments = ([stride] * n, [padding] * n, [dilation] * n, transposed, [0] * n, groups)
        terms = math.prod(w) // (w[0] if not transposed else 1)
        for b in (draw.tensor(bias), None):
            yield Sample((draw.tensor(*x), draw.tensor(*w), b, *arguments), terms=terms, layouts=False)


def convolutions_backward(draw: Draw) -> Iterator[Sample]:
    """convolution_backward: gradient, input, weight, bias sizes, the settings of convolution, which results."""
    for x, w, stride, padding, dilation, transposed, groups in _CONVOLUTIONS:
        n = len(x) - 2
        channels = w[1] * groups if transposed else w[0]
        spatial = [
            (a - 1) * stride - 2 * padding + dilation * (k - 1) + 1
            if transposed
            else (a + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for a, k in zip(x[2:], w[2:], strict=True)
        ]
        out = (x[0], channels, *spatial)
        arguments = ([stride] * n, [padding] * n, [dilation] * n, transposed, [0] * n, groups)
        for mask in ([True, True, True], [True, False, False]):
            tensors = draw.tensor(*out), draw.tensor(*x), draw.tensor(*w)
            terms = math.prod(w) + math.prod(out)
            yield Sample((*tensors, [channels], *arguments, mask), terms=terms, layouts=False)


def pooling(rank: int, *more: Any, backward: bool = False) -> Samples:
    """Images of batch, channel and `rank` sizes (distinct values), then kernel size, stride, padding and `more`.

    With `backward` the gradient of the result stands first.
    """
    shape = (2, 2, 5, 7, 6)[: 2 + rank]

    def samples(draw: Draw) -> Iterator[Sample]:
        for kernel, stride, padding in ((2, 2, 0), (3, 1, 1), (3, 2, 1)):
            x = draw.permutation(*shape)
            settings = ([kernel] * rank, [stride] * rank, [padding] * rank)
            spatial = [(n + 2 * padding - kernel) // stride + 1 for n in shape[2:]]
            before = (draw.tensor(*shape[:2], *spatial),) if backward else ()
            yield Sample((*before, x, *settings, *more), terms=kernel**rank, layouts=False)

    return samples


def adaptive_pooling(rank: int) -> Samples:
    """Images of distinct values, and the output's sizes."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape in ((2, 2, 5, 7, 6), (1, 1, 4, 4, 4)):
            yield Sample((draw.permutation(*shape[: 2 + rank]), [3, 4, 2][:rank]), layouts=False)

    return samples


def fractional_pooling(rank: int) -> Samples:
    """Images of distinct values, kernel, output sizes, and the random samples that place the windows."""

    def samples(draw: Draw) -> Iterator[Sample]:
        x = draw.permutation(*(2, 3, 5, 7, 6)[: 2 + rank])
        where = draw.tensor(2, 3, rank, low=0, high=0.875)
        yield Sample((x, [2] * rank, [3] * rank, where), layouts=False)

    return samples


# Indices -------------------------------------------------------------------------------------------------

_INDEXED: tuple[tuple[tuple[int, ...], int], ...] = (((5,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1))


def gathering(draw: Draw) -> Iterator[Sample]:
    """A tensor, a dimension and indices along it."""
    for shape, dim in (*_INDEXED, ((127, 513), 0)):
        yield Sample((draw.tensor(*shape), dim, _indices(draw, shape, shape[dim])))
    yield Sample((draw.tensor(), 0, torch.zeros((), dtype=torch.int64)), note="0-d")
    yield Sample((draw.tensor(3, 5), 0, torch.zeros((0, 5), dtype=torch.int64)), note="no index")
    yield Sample((draw.tensor(3, 5), 1, _indices(draw, (2, 4), 5)), note="fewer indices than elements")


def _indices(draw: Draw, shape: tuple[int, ...], size: int) -> Tensor:
    return draw.tensor(*shape, low=0, high=size - 1, dtype=torch.int64)


def scattering(source: bool, *more: Any, repeats: bool = False) -> Samples:
    """A tensor, a dimension, indices and a source or a number; indices repeat only where that is defined."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dim in _INDEXED:
            if repeats:
                index = _indices(draw, shape, shape[dim])
            else:
                index = torch.rand(shape, generator=draw.generator).argsort(dim)
            value = draw.tensor(*shape) if source else number_of(draw.dtype, 2)
            yield Sample((draw.tensor(*shape), dim, index, value, *more), terms=shape[dim] + 1, layouts=False)
        value = draw.tensor(2, 4) if source else number_of(draw.dtype, 1)
        index = torch.rand((2, 3), generator=draw.generator).argsort(1)
        yield Sample((draw.tensor(4, 5), 1, index, value, *more), terms=4, layouts=False, note="fewer indices")
        nothing = torch.zeros((0, 5), dtype=torch.int64)
        value = draw.tensor(3, 5) if source else number_of(draw.dtype, 1)
        yield Sample((draw.tensor(3, 5), 0, nothing, value, *more), layouts=False, note="no index")

    return samples


def scatter_reducing(draw: Draw) -> Iterator[Sample]:
    """scatter_reduce: tensor, dimension, repeated indices, source, reduction; with and without self."""
    kinds = ("sum", "prod") if draw.dtype.is_complex else ("sum", "prod", "mean", "amax", "amin")
    for reduce in kinds:
        for include in (True, False):
            for shape, dim in _INDEXED:
                # Neither overflow nor the rounding of quotients of integers is the subject.
                x, src = (draw.tensor(*shape, low=1, high=2) for _ in range(2))
                args = (x, dim, _indices(draw, shape, shape[dim]), src, reduce)
                yield Sample(args, {"include_self": include}, reduce, terms=shape[dim] + 1, layouts=False)


def indexing(draw: Draw) -> Iterator[Sample]:
    """A tensor and a list of index tensors: None among them, negative ones, masks."""
    for shape, indices in (
        ((5,), [_indices(draw, (3,), 5)]),
        ((3, 5), [_indices(draw, (4,), 3)]),
        ((3, 5), [None, _indices(draw, (2, 2), 5)]),
        ((3, 5), [_indices(draw, (4,), 3), _indices(draw, (4,), 5) - 5]),
        ((2, 3, 4), [_indices(draw, (2, 1), 2), None, _indices(draw, (3,), 4)]),
        ((3, 5), [torch.zeros(0, dtype=torch.int64)]),
        ((127, 513), [_indices(draw, (300,), 127)]),
    ):
        yield Sample((draw.tensor(*shape), indices), layouts=False)


def index_writing(draw: Draw) -> Iterator[Sample]:
    """A tensor, index tensors and values; indices repeat only where the values are added up."""
    order = torch.randperm(5, generator=draw.generator)
    yield Sample((draw.tensor(5), [order[:3]], draw.tensor(3)), layouts=False)
    yield Sample((draw.tensor(5, 2), [order[:3]], draw.tensor(3, 2)), layouts=False)
    yield Sample((draw.tensor(5, 2), [order[:3]], draw.tensor()), layouts=False, note="one value")
    yield Sample((draw.tensor(3, 5), [None, order[:2]], draw.tensor(3, 2)), layouts=False)
    if draw.dtype != torch.bool:
        for shape in ((5,), (5, 2)):
            repeated = _indices(draw, (7,), 5)
            yield Sample((draw.tensor(*shape), [repeated], draw.tensor(7, *shape[1:]), True), terms=8, layouts=False)


def nonzero(draw: Draw) -> Iterator[Sample]:
    """Tensors with zeros in them."""
    for shape in ((), (0,), (7,), (3, 5), (2, 3, 4)):
        x = draw.tensor(*shape, low=-1, high=1)
        yield Sample((torch.where(draw.tensor(*shape, dtype=torch.bool), x, torch.zeros_like(x)),))


# Sorting and searching -----------------------------------------------------------------------------------

_SORTED: tuple[tuple[tuple[int, ...], int], ...] = (
    ((1,), 0), ((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((17, 127), 1), ((4099,), 0),
)  # fmt: skip


def ordered(*, empty: bool = False, special: bool = True, layouts: bool = True) -> Samples:
    """A tensor, some of its elements equal, and a dimension; `empty` adds one without elements."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dim in _SORTED:
            x = draw.tensor(*shape)
            yield Sample((x, dim), note=f"dim {dim}", layouts=layouts and shape == (3, 5))
        yield Sample((draw.tensor(), 0), note="0-d", layouts=False)
        if empty:
            yield Sample((draw.tensor(0), 0), note="of nothing", layouts=False)
        if special and draw.dtype.is_floating_point:
            nan, inf = float("nan"), float("inf")
            for row in ((nan, 1, 2), (1, nan, 2), (1, 2, nan), (inf, 1, -inf)):
                x = torch.tensor([row, (1, 2, 3)]).to(draw.dtype)
                yield Sample((x, 1), note=f"{row}", layouts=False)

    return samples


def sorting(draw: Draw) -> Iterator[Sample]:
    """sort: a tensor with equal values, and keywords; rising and falling."""
    for descending in (False, True):
        for sample in ordered(empty=True)(draw):
            x, dim = sample.args
            options = {"stable": True, "dim": dim, "descending": descending}
            yield Sample((x,), options, sample.note, layouts=sample.layouts)


def selecting(draw: Draw) -> Iterator[Sample]:
    """topk: a tensor, how many, the dimension, whether the largest."""
    for largest in (True, False):
        for shape, dim in _SORTED[1:]:
            for k in (1, 3):
                yield Sample((draw.tensor(*shape), k, dim, largest), note=f"{k} along {dim}", layouts=shape == (3, 5))


def kth(draw: Draw) -> Iterator[Sample]:
    """kthvalue: a tensor, k, the dimension."""
    for shape, dim in _SORTED:
        for k in sorted({1, (shape[dim] + 1) // 2, shape[dim]}):
            yield Sample((draw.tensor(*shape), k, dim), note=f"{k} along {dim}", layouts=shape == (3, 5))


def searching(draw: Draw) -> Iterator[Sample]:
    """searchsorted: a sorted sequence and values, some of them equal to elements."""
    for sequence, values in (((7,), (3, 5)), ((7,), ()), ((3, 7), (3, 5)), ((0,), (4,)), ((127,), (513,))):
        sorted_ = draw.tensor(*sequence).sort(-1).values
        for options in ({}, {"right": True}, {"out_int32": True}):
            yield Sample((sorted_, draw.tensor(*values)), options, note=str(options), layouts=False)


# Transforms ----------------------------------------------------------------------------------------------


def transforms(kind: str) -> Samples:
    """FFTs (dims, normalization, then a flag or the last size): complex to complex, real to complex and back."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dims in (((1,), [0]), ((8,), [0]), ((7,), [0]), ((3, 10), [1]), ((4, 6), [0, 1]), ((2, 127), [1])):
            terms = math.prod(shape[d] for d in dims)
            for normalization in range(3):
                lasts = (2 * (shape[dims[-1]] - 1) or 1,) if kind == "c2r" else (True, False)
                for last in lasts:
                    yield Sample((draw.tensor(*shape), dims, normalization, last), terms=terms, layouts=kind != "c2r")

    return samples


# Factorisations ------------------------------------------------------------------------------------------

_MATRICES = ((1, 1), (3, 3), (2, 5, 5), (7, 4), (4, 7), (0, 3, 3), (2, 0, 0))


def _matrix(draw: Draw, *shape: int, turned: bool = False) -> Tensor:
    """A matrix far from singular: random numbers, and a diagonal that outweighs them; turned, its rows are moved."""
    a = draw.tensor(*shape, low=-1, high=1)
    diagonal = torch.arange(2, 2 + min(shape[-2:])) * 2
    a.diagonal(dim1=-2, dim2=-1).add_(diagonal.to(a.dtype))
    return a.roll(1, -2) if turned else a


def _hermitian(draw: Draw, *shape: int, upper: bool = False) -> Tensor:
    """One triangle of a Hermitian matrix far from singular; the other one holds what nobody is to read."""
    a = _matrix(draw, *shape)
    a = (a + a.mH) / 2
    garbage = draw.tensor(*shape)
    return a.triu() + garbage.tril(-1) if upper else a.tril() + garbage.triu(1)


def matrices(*choices: tuple[Any, ...], square: bool = True, hermitian: bool = False, turned: bool = False) -> Samples:
    """A matrix (square, or of any shape), and each choice of further arguments."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape in _MATRICES:
            if square and shape[-1] != shape[-2]:
                continue
            for more in choices or ((),):
                a = _hermitian(draw, *shape, upper="U" in more) if hermitian else _matrix(draw, *shape, turned=turned)
                yield Sample((a, *more), note=str(more), terms=max(1, *shape), layouts=False)

    return samples


def systems(kind: str) -> Samples:
    """A square matrix and right-hand sides, as the solver of this kind takes them."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, columns in (((1, 1), 1), ((3, 3), 2), ((2, 5, 5), 3), ((2, 0, 0), 2)):
            n, batch = shape[-1], shape[:-2]
            a = _hermitian(draw, *shape) if kind == "ldl" else _matrix(draw, *shape, turned=kind != "triangle")
            for left in (True, False) if kind != "ldl" else (True,):
                b = draw.tensor(*batch, *((n, columns) if left else (columns, n)))
                for args, keywords in _systems[kind](a, b, left):
                    yield Sample(args, keywords, terms=max(1, n), layouts=False)

    return samples


_System = Iterator[tuple[tuple[Any, ...], dict[str, Any]]]


def _by_solve(a: Tensor, b: Tensor, left: bool) -> _System:
    yield (a, b), {"left": left}


def _by_triangle(a: Tensor, b: Tensor, left: bool) -> _System:
    for upper in (True, False):
        for unit in (True, False):
            scaled = a / 8 if unit else a
            yield (scaled, b), {"upper": upper, "left": left, "unitriangular": unit}


def _by_lu(a: Tensor, b: Tensor, left: bool) -> _System:
    lu, pivots, _ = torch.linalg.lu_factor_ex(a)
    for adjoint in (False, True):
        yield (lu, pivots, b), {"left": left, "adjoint": adjoint}


def _by_ldl(a: Tensor, b: Tensor, left: bool) -> _System:
    for hermitian in (False, True) if a.is_complex() else (False,):
        ld, pivots, _ = torch.linalg.ldl_factor_ex(a, hermitian=hermitian)
        yield (ld, pivots, b), {"hermitian": hermitian}


_systems = {"solve": _by_solve, "triangle": _by_triangle, "lu": _by_lu, "ldl": _by_ldl}


def factored(draw: Draw) -> Iterator[Sample]:
    """lu_unpack: a compact LU factorisation and its pivots; which results."""
    for shape in ((1, 1), (3, 3), (2, 5, 5), (7, 4), (4, 7)):
        lu, pivots, _ = torch.linalg.lu_factor_ex(_matrix(draw, *shape, turned=True))
        for flags in ((), (True, False), (False, True)):
            yield Sample((lu, pivots, *flags), note=str(flags), layouts=False)


def reflectors(product: bool) -> Samples:
    """Householder vectors and factors of a QR factorisation; with `product` a matrix to multiply, side and adjoint."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape in ((1, 1), (3, 3), (7, 4), (2, 5, 3)):
            vectors, tau = torch.geqrf(_matrix(draw, *shape))
            if not product:
                yield Sample((vectors, tau), terms=shape[-2], layouts=False)
                continue
            for left in (True, False):
                for adjoint in (False, True):
                    m = shape[-2]
                    other = draw.tensor(*shape[:-2], *((m, 2) if left else (2, m)))
                    yield Sample((vectors, tau, other, left, adjoint), terms=m, layouts=False)

    return samples


# Draws ---------------------------------------------------------------------------------------------------


def sized(*before: Any) -> Samples:
    """Static arguments, a size, and the dtype."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape in ((), (0,), (7,), (3, 5), (4099,)):
            yield Sample((*before, list(shape)), {"dtype": draw.dtype})

    return samples


def permuted(draw: Draw) -> Iterator[Sample]:
    """randperm: how many, and the dtype."""
    for n in (0, 1, 7, 100):
        yield Sample((n,), {"dtype": draw.dtype})


def shaped(*more: Any, low: float = -4, high: float = 4) -> Samples:
    """A tensor, the parameters of each draw among them, then static arguments."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape in ((), (0,), (7,), (3, 5), (4099,)):
            yield Sample((draw.tensor(*shape, low=low, high=high), *more))

    return samples


def weights(draw: Draw) -> Iterator[Sample]:
    """multinomial: weights, how many, whether one may be drawn again."""
    for shape in ((7,), (3, 5)):
        for replacement in (True, False):
            yield Sample((draw.tensor(*shape, low=0.125, high=1), 3, replacement))


def trials(draw: Draw) -> Iterator[Sample]:
    """binomial: counts and probabilities."""
    for shape in ((), (7,), (3, 5)):
        yield Sample((draw.tensor(*shape, low=1, high=20).round(), draw.tensor(*shape, low=0, high=1)))
