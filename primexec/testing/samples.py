"""What the operators are tried on: generators of arguments, one for each kind of operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from primexec.testing.values import ALL, SHAPES, Draw, special_values

CPU = torch.device("cpu")
_LARGE = (127, 513)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Attributes:
        terms: how many terms make one element of the result.
        layouts: whether the tensors are to be tried in other layouts too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    terms: int = 1
    layouts: bool = True


Samples = Callable[[Draw], Iterator[Sample]]


def pointwise(
    arity: int,
    *,
    low: float = -4,
    high: float = 4,
    nonzero: bool = False,
    special: bool = True,
    number: float | None = None,
) -> Samples:
    """Tensors of equal shapes with values in [low, high], and every combination of special values.

    `number` stands as the last argument of one more sample, as Python numbers do in lowered programs.
    """

    def samples(draw: Draw) -> Iterator[Sample]:
        def operand(i: int, *shape: int) -> Tensor:
            return draw.tensor(*shape, low=low, high=high, nonzero=nonzero and i == arity - 1)

        for shape in SHAPES:
            yield Sample(tuple(operand(i, *shape) for i in range(arity)))
        if number is not None and draw.dtype != torch.bool:
            yield Sample((*(operand(i, 3, 5) for i in range(arity - 1)), _number(draw.dtype, number)), note="a number")
        if special and not draw.dtype.is_complex:
            one = special_values(draw.dtype)
            grid = torch.cartesian_prod(*[one] * arity).unbind(-1) if arity > 1 else (one,)
            for values in (grid, tuple(g[:11] for g in grid)):
                yield Sample(tuple(v.clone() for v in values), note="special values", layouts=False)

    return samples


def _number(dtype: torch.dtype, number: float) -> float | int:
    return number if dtype.is_floating_point or dtype.is_complex else int(number)


def selection(draw: Draw) -> Iterator[Sample]:
    """A mask and two tensors."""
    for shape in SHAPES:
        yield Sample((draw.tensor(*shape, dtype=torch.bool), draw.tensor(*shape), draw.tensor(*shape)))
    if not draw.dtype.is_complex:
        values = special_values(draw.dtype)
        yield Sample((values == values, values, values.flip(0)), note="special values")


def conversion(targets: tuple[torch.dtype, ...]) -> Samples:
    """A tensor and a dtype; values that the target cannot hold are left out where C leaves the result open."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for target in targets:
            if draw.dtype.is_complex and not target.is_complex:
                continue
            low = 0 if target == torch.uint8 else -100
            for shape in ((), (0,), (7,), (3, 5), (4099,)):
                yield Sample((draw.tensor(*shape, low=low, high=100), target), note=f"to {target}")
            if not draw.dtype.is_complex and (target.is_floating_point or not draw.dtype.is_floating_point):
                yield Sample((special_values(draw.dtype), target), note=f"special values to {target}", layouts=False)

    return samples


def reinterpretation(draw: Draw) -> Iterator[Sample]:
    """A tensor and a dtype of the same size."""
    for target in ALL:
        if target.itemsize == draw.dtype.itemsize and target != torch.bool and draw.dtype != torch.bool:
            for shape in ((), (0,), (3, 5)):
                yield Sample((draw.tensor(*shape), target), note=f"as {target}")


# Shapes --------------------------------------------------------------------------------------------------


def static(*choices: tuple[tuple[int, ...], tuple[Any, ...]], layouts: bool = True) -> Samples:
    """A tensor of each shape, followed by the static arguments beside it."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, arguments in choices:
            yield Sample((draw.tensor(*shape), *arguments), note=str(arguments), layouts=layouts)

    return samples


def concatenation(draw: Draw) -> Iterator[Sample]:
    """Lists of one to three tensors, empty ones among them."""
    for shapes, dim in (
        (((3,),), 0), (((3,), (5,)), 0), (((2, 3), (2, 1), (2, 4)), 1), (((2, 3), (0, 3), (1, 3)), 0),
        (((0,), (0,)), 0), (((127, 513), (3, 513)), 0),
    ):  # fmt: skip
        yield Sample(([draw.tensor(*shape) for shape in shapes], dim))


def rewriting(draw: Draw) -> Iterator[Sample]:
    """as_strided_scatter: a tensor, what is written into it, and where (size, stride, offset)."""
    for shape, size, stride, offset in (((12,), (2, 3), (6, 2), 0), ((3, 5), (3, 2), (5, 1), 1), ((7,), (), (), 3)):
        yield Sample((draw.tensor(*shape), draw.tensor(*size), size, stride, offset), layouts=False)


def factory(*choices: tuple[Any, ...], **more: Any) -> Samples:
    """No tensor: static arguments, and the dtype and device as keywords."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for arguments in choices:
            yield Sample(arguments, {"dtype": draw.dtype, "device": CPU, **more}, note=str(arguments))

    return samples


def iota(draw: Draw) -> Iterator[Sample]:
    """A length, and start, step, dtype and device."""
    for length, start, step in ((0, 0, 1), (1, 5, 1), (7, 3, 2), (100, 0, 1)):
        options = {"start": start, "step": step, "dtype": draw.dtype, "device": CPU, "requires_grad": False}
        yield Sample((length,), options)


def like(draw: Draw) -> Iterator[Sample]:
    """A tensor, a number, and the dtype and device."""
    for shape in ((), (0,), (3, 5)):
        options = {"dtype": draw.dtype, "device": CPU, "requires_grad": False}
        yield Sample((draw.tensor(*shape), 2), options)


# Reductions ----------------------------------------------------------------------------------------------

_DIMS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((), ()), ((1,), (0,)), ((7,), (0,)), ((4099,), (0,)), ((3, 5), (0,)), ((3, 5), (1,)), ((3, 5), (0, 1)),
    ((2, 3, 4), (1,)), ((2, 3, 4), (0, 2)), ((2, 3, 4), (2,)), (_LARGE, (0,)), (_LARGE, (1,)), (_LARGE, (0, 1)),
)  # fmt: skip


def reduction(
    *,
    low: float = -4,
    high: float = 4,
    empty: bool = True,
    nothing: bool = True,
    special: bool = True,
    large: bool = True,
    more: Any = (),
) -> Samples:
    """A tensor and the dimensions to reduce; `empty` adds reductions of nothing, `nothing` those without results."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dims in _DIMS:
            if not large and shape in (_LARGE, (4099,)):
                continue
            x = draw.tensor(*shape, low=low, high=high)
            yield Sample((x, list(dims), *more), note=f"{dims}", terms=_terms(shape, dims))
        if empty:
            yield Sample((draw.tensor(0, low=low), [0], *more), note="of nothing")
            yield Sample((draw.tensor(2, 0, 3, low=low), [1], *more), note="of nothing")
        if nothing:
            yield Sample((draw.tensor(2, 0, 3, low=low), [2], *more), note="no result")
        if special and draw.dtype.is_floating_point:
            nan, inf = float("nan"), float("inf")
            for row in ((nan, 1, 2), (1, nan, 2), (1, 2, nan), (inf, 1, 2), (-inf, 1, 2), (inf, -inf, 1)):
                x = torch.tensor([row, (1, 2, 3)]).to(draw.dtype)
                yield Sample((x, [1], *more), note=f"{row}", terms=3)
                yield Sample((x.t().contiguous(), [0], *more), note=f"{row}", terms=3)
        elif special and not draw.dtype.is_complex:
            values = special_values(draw.dtype)
            yield Sample((values, [0], *more), note="special values", terms=len(values))

    return samples


def _terms(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    count = 1
    for d in dims:
        count *= shape[d]
    return count


def along(*more: Any, low: float = -4, high: float = 4, special: bool = True, shapes: Any = None) -> Samples:
    """A tensor and one dimension, then further static arguments."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dim in shapes or (((1,), 0), ((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((127, 53), 1)):
            yield Sample((draw.tensor(*shape, low=low, high=high), dim, *more), note=f"dim {dim}", terms=shape[dim])
        if special and draw.dtype.is_floating_point:
            x = torch.tensor([[1, float("nan"), 2], [3, 1, float("inf")], [-float("inf"), 0, 1]]).to(draw.dtype)
            yield Sample((x, 1, *more), note="special values", terms=3)

    return samples


def ordering(*more: Any, distinct: bool = True) -> Samples:
    """A tensor of distinct values (which of equal values comes first is left open) and a dimension."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dim in (((1,), 0), ((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1)):
            x = draw.permutation(*shape) if distinct else draw.tensor(*shape)
            yield Sample((x, *more[:1], dim, *more[1:]), note=f"dim {dim}", layouts=False)

    return samples


# Products ------------------------------------------------------------------------------------------------


def products(batched: bool) -> Samples:
    """Matrices, or batches of them."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for m, k, n in ((1, 1, 1), (3, 5, 7), (0, 3, 2), (2, 0, 3), (1, 127, 1), (65, 129, 33), (17, 513, 16)):
            for batch in ((),) if not batched else ((1,), (3,), (0,)):
                yield Sample((draw.tensor(*batch, m, k), draw.tensor(*batch, k, n)), terms=max(k, 1))

    return samples


def convolutions(draw: Draw) -> Iterator[Sample]:
    """convolution: input, weight, bias, stride, padding, dilation, transposed, output padding, groups."""
    for x, w, stride, padding, dilation, transposed, groups in (
        ((1, 1, 7), (1, 1, 3), 1, 0, 1, False, 1),
        ((2, 4, 9), (6, 2, 3), 2, 1, 1, False, 2),
        ((2, 3, 9, 7), (5, 3, 3, 3), 1, 1, 1, False, 1),
        ((1, 4, 11, 11), (4, 1, 3, 3), 1, 2, 2, False, 4),
        ((2, 3, 5, 5), (3, 4, 3, 3), 2, 1, 1, True, 1),
        ((1, 2, 5, 5, 5), (3, 2, 2, 2, 2), 1, 0, 1, False, 1),
    ):  # fmt: skip
        n = len(x) - 2
        bias = w[1] * groups if transposed else w[0]
        arguments = ([stride] * n, [padding] * n, [dilation] * n, transposed, [0] * n, groups)
        terms = Tensor.numel(torch.empty(w)) // (w[0] if not transposed else 1)
        for b in (draw.tensor(bias), None):
            yield Sample((draw.tensor(*x), draw.tensor(*w), b, *arguments), terms=terms, layouts=False)


def pooling(*more: Any) -> Samples:
    """Images of batch, channel, height and width (distinct values), then kernel size, stride and padding."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for kernel, stride, padding in (([2, 2], [2, 2], [0, 0]), ([3, 2], [1, 2], [1, 1])):
            yield Sample((draw.permutation(2, 2, 7, 6), kernel, stride, padding, *more), terms=6, layouts=False)

    return samples


# Indices -------------------------------------------------------------------------------------------------

_INDEXED: tuple[tuple[tuple[int, ...], int], ...] = (((5,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1))


def gathering(draw: Draw) -> Iterator[Sample]:
    """A tensor, a dimension and indices along it."""
    for shape, dim in _INDEXED:
        yield Sample((draw.tensor(*shape), dim, _indices(draw, shape, shape[dim])))


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
            value = draw.tensor(*shape) if source else _number(draw.dtype, 2)
            yield Sample((draw.tensor(*shape), dim, index, value, *more), terms=shape[dim] + 1, layouts=False)

    return samples


def indexing(draw: Draw) -> Iterator[Sample]:
    """A tensor and a list of index tensors, None among them, and negative ones."""
    for shape, indices in (
        ((5,), [_indices(draw, (3,), 5)]),
        ((3, 5), [_indices(draw, (4,), 3)]),
        ((3, 5), [None, _indices(draw, (2, 2), 5)]),
        ((3, 5), [_indices(draw, (4,), 3), _indices(draw, (4,), 5) - 5]),
        ((2, 3, 4), [_indices(draw, (2, 1), 2), None, _indices(draw, (3,), 4)]),
    ):
        yield Sample((draw.tensor(*shape), indices), layouts=False)


def index_writing(draw: Draw) -> Iterator[Sample]:
    """A tensor, index tensors and values; indices repeat only where the values are added up."""
    order = torch.randperm(5, generator=draw.generator)
    yield Sample((draw.tensor(5), [order[:3]], draw.tensor(3)), layouts=False)
    yield Sample((draw.tensor(5, 2), [order[:3]], draw.tensor(3, 2)), layouts=False)
    for shape in ((5,), (5, 2)):
        repeated = _indices(draw, (7,), 5)
        yield Sample((draw.tensor(*shape), [repeated], draw.tensor(7, *shape[1:]), True), terms=8, layouts=False)


def index_selecting(draw: Draw) -> Iterator[Sample]:
    """A tensor, a dimension and a list of indices."""
    for shape, dim in _INDEXED:
        for count in (0, 1, 6):
            yield Sample((draw.tensor(*shape), dim, _indices(draw, (count,), shape[dim])))


def masked_writing(draw: Draw) -> Iterator[Sample]:
    """A tensor, a mask of its shape, and a source."""
    for shape in ((), (7,), (3, 5)):
        yield Sample((draw.tensor(*shape), draw.tensor(*shape, dtype=torch.bool), draw.tensor(*shape)), layouts=False)


# Transforms ----------------------------------------------------------------------------------------------


def transforms(kind: str) -> Samples:
    """FFTs: complex to complex (both directions), real to complex, complex to real."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dims in (((1,), [0]), ((8,), [0]), ((7,), [0]), ((3, 10), [1]), ((4, 6), [0, 1])):
            if kind == "c2r":
                last = 2 * (shape[dims[-1]] - 1) or 1
                yield Sample((draw.tensor(*shape),), {"dim": dims, "last_dim_size": last}, layouts=False)
                continue
            for flag in (True, False):
                word = "forward" if kind == "c2c" else "onesided"
                yield Sample((draw.tensor(*shape),), {"dim": dims, word: flag}, terms=60)

    return samples
