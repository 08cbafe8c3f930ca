"""Backward operators as prims: against eager in float64, and the rounding of 16-bit floats."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from primexec import make_traced, prims
from tests import prims_oracle

aten = torch.ops.aten
F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


def compare(op: Any, *args: Any) -> None:
    """Eager's results and those of the expansion, which is all prims."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = make_traced(op).trace(*args)
        assert all(prims.is_prim(n.target) for n in program.lower().nodes if "getitem" not in str(n.target))
        inputs = [a for a in args if isinstance(a, Tensor)]
        assert prims_oracle.check(program, inputs)


Calls = Iterator[tuple[Any, ...]]


def resizing(name: str, rank: int, aligns: bool) -> Calls:
    """Larger, smaller, twice, equal, one; without and with scales, which sizes need not follow."""
    for size, out, scale in ((3, 7, None), (7, 3, None), (4, 8, None), (5, 5, None), (4, 1, None), (1, 4, None),
                             (3, 6, 2.1), (4, 4, 1.1), (5, 12, 2.5), (9, 4, 0.45)):  # fmt: skip
        sizes, outs = [size + i for i in range(rank)], [out + i for i in range(rank)]
        for align in (False, True) if aligns else (None,):
            settings = () if align is None else (align,)
            yield draw(2, 2, *outs), outs, [2, 2, *sizes], *settings, *[scale] * rank


RESIZING = {
    **{f"upsample_nearest{n}d": (n, False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": (n, False) for n in (1, 2, 3)},
    "upsample_linear1d": (1, True),
    "upsample_bilinear2d": (2, True),
    "upsample_trilinear3d": (3, True),
    "upsample_bicubic2d": (2, True),
    "_upsample_bilinear2d_aa": (2, True),
    "_upsample_bicubic2d_aa": (2, True),
}


@pytest.mark.parametrize("name", RESIZING)
def test_resizing(name: str) -> None:
    for args in resizing(name, *RESIZING[name]):
        compare(getattr(aten, f"{name}_backward").default, *args)


@pytest.mark.parametrize("name", [name for name in RESIZING if name.endswith("_aa")])
def test_antialiased_forward(name: str) -> None:
    for _, outs, sizes, *settings in resizing(name, *RESIZING[name]):
        compare(getattr(aten, name).default, draw(*sizes), outs, *settings)


@pytest.mark.parametrize("name", ["upsample_nearest", "_upsample_nearest_exact"])
@pytest.mark.parametrize("scale", [None, 2.0, 0.5])
def test_doubling_and_halving(name: str, scale: float | None) -> None:
    for rank in (1, 2, 3):
        op, sizes = getattr(aten, f"{name}{rank}d_backward").default, [2, 4, 6][:rank]
        outs = [n * 2 if scale == 2.0 or n == 2 else n // 2 for n in sizes]
        compare(op, draw(2, 3, *outs), outs, [2, 3, *sizes], *[scale] * rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_padding_by_edges(rank: int) -> None:
    op = getattr(aten, f"replication_pad{rank}d_backward").default
    for pad in ([2, 1] * rank, [0, 3] * rank, [-1, 2] * rank, [-1, -1] * rank):
        for first in (4, 2, 1) if min(pad) >= 0 else (4,):
            a = draw(2, 3, *range(first, first + rank))
            compare(op, draw(*F.pad(a, pad, mode="replicate").shape), a, pad)


@pytest.mark.parametrize("rank", [2, 3])
def test_adaptive_means(rank: int) -> None:
    op = getattr(aten, f"_adaptive_avg_pool{rank}d_backward").default
    for sizes, outs in (
        ((6, 6, 6), (3, 2, 1)),
        ((5, 7, 4), (3, 4, 4)),
        ((3, 4, 5), (5, 6, 7)),
        ((49, 3, 9), (11, 49, 6)),
    ):
        for batch in ((2, 3), (3,), (0, 3)):
            compare(op, draw(*batch, *outs[:rank]), draw(*batch, *sizes[:rank]))


@pytest.mark.parametrize("rank", [2, 3])
def test_adaptive_means_of_windows(rank: int) -> None:
    op = getattr(aten, f"_adaptive_avg_pool{rank}d").default
    for sizes, outs in (((6, 6, 80), (3, 2, 40)), ((5, 7, 4), (3, 4, 4)), ((3, 4, 5), (1, 1, 1))):
        for batch in ((2, 3), (3,), (0, 3)):
            compare(op, draw(*batch, *sizes[-rank:]), list(outs[-rank:]))


def test_what_is_not_taken_is_not_multiplied() -> None:
    grad = torch.tensor([[[1.0, torch.inf, 2.0]]], dtype=F64).unsqueeze(2).expand(1, 1, 3, 3).contiguous()
    compare(aten._adaptive_avg_pool2d_backward.default, grad, draw(1, 1, 5, 5))


@pytest.mark.parametrize("rank", [2, 3])
def test_extremes_of_windows(rank: int) -> None:
    a = draw(2, 3, *(7, 6, 5)[:rank])
    pool = {2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[rank]
    out, indices = pool(a, (3, 4, 2)[:rank], return_indices=True)
    compare(getattr(aten, f"adaptive_max_pool{rank}d_backward").default, draw(*out.shape), a, indices)
    places = torch.rand(2, 3, rank, dtype=F64, generator=torch.Generator().manual_seed(0))
    fractional = getattr(aten, f"fractional_max_pool{rank}d").default
    settings = [2] * rank, [3] * rank
    out, indices = fractional(a, *settings, places)
    backward = getattr(aten, f"fractional_max_pool{rank}d_backward").default
    compare(backward, draw(*out.shape), a, *settings, indices)


def test_windows_that_overlap() -> None:
    a, settings = draw(2, 2, 5, 6, 7), ([3] * 3, [2] * 3, [1] * 3, [1] * 3, True)
    out, indices = aten.max_pool3d_with_indices.default(a, *settings)
    compare(aten.max_pool3d_with_indices_backward.default, draw(*out.shape), a, *settings, indices)


def test_shrinking() -> None:
    a = torch.tensor([-2, -0.5, -0.2, 0.0, 0.5, 0.7, torch.nan, torch.inf], dtype=F64)
    for op in (aten.softshrink_backward.default, aten.hardshrink_backward.default):
        compare(op, draw(8), a, 0.5)


def test_masked_scatter() -> None:
    for mask in (draw(4, 5) > 0, torch.zeros(4, 5, dtype=torch.bool), draw(5) > 0):
        for sizes in ([20], [3, 9]):
            compare(aten.masked_scatter_backward.default, draw(4, 5), mask.expand(4, 5), sizes)


def test_zeros_that_own_no_memory() -> None:
    program = make_traced(lambda x: x + aten._efficientzerotensor.default([3], dtype=F64, device="cpu")).trace(draw(3))
    assert all(prims.is_prim(n.target) for n in program.lower().nodes)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_margin_losses(reduction: int) -> None:
    # Small integers, so that margins are met exactly.
    a, t = draw(4, 3).round(), torch.tensor([0, 2, 1, 1])
    grad = draw(4) if reduction == 0 else draw()
    for p, margin, weight in ((1, 1.0, None), (2, 1.0, draw(3)), (1, 0.5, draw(3))):
        compare(aten.multi_margin_loss_backward.default, grad, a, t, p, margin, weight, reduction)
    compare(aten.multi_margin_loss_backward.default, draw(), a[0], t[:1], 1, 1.0, None, 1)
    labels = torch.tensor([[0, 2, -1], [1, -1, 2], [-1, 0, 1], [2, 1, 0]])
    for x, t in ((a, labels), (a[0], labels[0]), (a[2], labels[2])):
        compare(aten.multilabel_margin_loss_forward.default, x, t, reduction)
    _, is_target = aten.multilabel_margin_loss_forward.default(a, labels, reduction)
    compare(aten.multilabel_margin_loss_backward.default, grad, a, labels, reduction, is_target)
    _, is_target = aten.multilabel_margin_loss_forward.default(a[0], labels[0], reduction)
    compare(aten.multilabel_margin_loss_backward.default, draw(), a[0], labels[0], reduction, is_target)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, torch.inf])
def test_distances(p: float) -> None:
    a, b = draw(2, 4, 3), draw(2, 5, 3)
    b[0, 1] = a[0, 2]
    b[1, 1, 0] = a[1, 2, 0]
    distances = aten._cdist_forward.default(a, b, p, 2)
    compare(aten._cdist_backward.default, draw(2, 4, 5), a, b, p, distances)
    a = torch.cat([a[0], a[0, :1], a[0, :1] + torch.tensor([0.0, 1.0, 0.0], dtype=F64)])
    compare(aten._pdist_backward.default, draw(15), a, p, aten._pdist_forward.default(a, p))


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 5), (3, 6, 2, 3)])
def test_norms_of_groups(shape: tuple[int, ...]) -> None:
    a, weight = draw(*shape), draw(6)
    inner = a[0, 0].numel()
    sizes = shape[0], 6, inner, 3
    _, mean, rstd = aten.native_group_norm.default(a, weight, None, *sizes, 1e-5)
    grad = draw(*shape, seed=1)
    compare(aten.native_group_norm_backward.default, grad, a, mean, rstd, weight, *sizes, [True] * 3)
    x = a.requires_grad_()
    found = [torch.autograd.grad(f(x, 3).sin().sum(), x) for f in (F.group_norm, make_traced(F.group_norm))]
    torch.testing.assert_close(*found)  # without weights


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(("rank", "mode"), [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1)])
def test_sampling_on_grids(rank: int, mode: int, padding: int, align: bool) -> None:
    image = draw(2, 3, *(5, 4, 3)[:rank])
    # Places inside and far outside; forward, NaN as well.
    grid = draw(2, *(2, 6, 3)[:rank], rank) * 1.5
    backward = getattr(aten, f"grid_sampler_{rank}d_backward").default
    grad = draw(2, 3, *grid.shape[1:-1])
    for mask in ([True, True], [False, True]):
        compare(backward, grad, image, grid, mode, padding, align, mask)
    grid.view(-1)[[0, 7]] = torch.nan
    compare(getattr(aten, f"grid_sampler_{rank}d").default, image, grid, mode, padding, align)


@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_bags(mode: int, padding_idx: int) -> None:
    weight, indices = draw(5, 3), torch.tensor([0, 2, 2, 4, 1, 0, 2])
    offsets = torch.tensor([0, 2, 2, 5])
    for own in (None, draw(7)) if mode == 0 else (None,):
        bags = aten._embedding_bag.default(weight, indices, offsets, False, mode, False, own, False, padding_idx)
        settings = (5, False, mode, False, own, padding_idx)
        compare(aten._embedding_bag_backward.default, draw(4, 3), indices, offsets, *bags[1:], *settings)
    if mode == 0:
        given = draw(4, 3), weight, indices, offsets, bags[1], mode, padding_idx
        compare(aten._embedding_bag_per_sample_weights_backward.default, *given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_added_up_in_float32(dtype: torch.dtype) -> None:
    grad = (draw(1, 1, 64, 64) + 3).to(dtype)
    op = aten.upsample_bilinear2d_backward.default
    with torch.no_grad():
        program = make_traced(op).trace(grad, [64, 64], [1, 1, 4, 4], False)
    (mine,) = prims_oracle.run_graph(program.lower().graph_module.graph, [grad])
    exact = op(grad.double(), [64, 64], [1, 1, 4, 4], False)
    torch.testing.assert_close(mine, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
