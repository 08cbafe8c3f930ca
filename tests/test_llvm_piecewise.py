"""The executor `llvm`: results that come from several tensors in turn, and views that fuse. Values against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from primexec.executors.llvm import layout, segments
from primexec.executors.llvm.executor import Compiled
from primexec.executors.llvm.ir import Within
from primexec.executors.llvm.layout import Axis
from tests.test_llvm import compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_indexing import DTYPES, P

COS, SIN = data(40, 64, seed=1), data(40, 64, seed=2)


def rotated(a: Tensor) -> Tensor:
    left, right = a[..., :32], a[..., 32:64]
    return torch.cat([-right, left], -1)


def written(a: Tensor) -> Tensor:
    b = a * 2
    b[:, 3:9] = 1
    b[5] += 3
    b[:, 0] *= b[:, 1]
    return b


# Of tensors of shapes (40, 67), (40, 7) and (5, 67): exact, and each is one kernel.
MOVES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "columns": lambda a, b, c: torch.cat([a, b], 1),
    "rows": lambda a, b, c: torch.cat([a, c, a[:1]], 0),
    "transposed": lambda a, b, c: torch.cat([a.t(), c.t()], 1),
    "inside": lambda a, b, c: torch.cat([a.view(40, 1, 67), a.view(40, 1, 67), a.view(40, 1, 67)], 1),
    "with nothing": lambda a, b, c: torch.cat([a[:0], a, a[:, :67][:0]], 0),
    "many": lambda a, b, c: torch.cat([a[:, i : i + 1] for i in range(20)], 1),
    "many, and a long one": lambda a, b, c: torch.cat([*(a[:, i : i + 1] for i in range(10)), a], 1),
    "a long one, and many": lambda a, b, c: torch.cat([a.flip(1), *(b[:, i % 7 :][:, :1] for i in range(9))], 1),
    "rows of one memory": lambda a, b, c: F.pad(a.flatten(), (7, 5)).roll(-9)[: 40 * 67].view(40, 67),
    "stacked": lambda a, b, c: torch.stack([a, a.flip(1)], 1),
    "interleaved": lambda a, b, c: torch.stack([a, a.flip(0)], -1),
    "padded": lambda a, b, c: F.pad(a, (1, 2, 3, 4), value=1),
    "cropped": lambda a, b, c: F.pad(a, (-1, 2, 3, -4)),
    "rolled": lambda a, b, c: a.roll((3, -2), (0, 1)),
    "rolled flat": lambda a, b, c: a.roll(5),
    "slice replaced": lambda a, b, c: torch.slice_scatter(a, b, 1, 11, 18),
    "row replaced": lambda a, b, c: torch.select_scatter(a, c[0], 0, -2),
    "steps": lambda a, b, c: torch.cat([a[::2, ::3], a[1::2, 1::3].flip(0)], 1),
    "gathered parts": lambda a, b, c: torch.cat([a[P], c], 0),
    "gathered from parts": lambda a, b, c: torch.cat([a, c], 0)[P + 6],
    "chunks": lambda a, b, c: torch.cat([*reversed(a.chunk(4, 1))], 1),
    "windows": lambda a, b, c: a.unfold(1, 3, 2).flip(0),
}
ARITHMETIC: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "chain": lambda a, b, c: torch.cat([a.exp(), b * 2], 1) * 3 + 1,
    "sum of rows": lambda a, b, c: torch.cat([a.exp(), b * 2], 1).sum(1),
    "sum of columns": lambda a, b, c: torch.cat([a.exp(), c * 2], 0).sum(0),
    "softmax": lambda a, b, c: torch.softmax(torch.cat([a, b], 1), 1),
    "rotary": lambda a, b, c: a[:, :64] * COS.to(a.dtype) + rotated(a) * SIN.to(a.dtype),
    "stencil": lambda a, b, c: F.pad(a, (1, 0))[:, :-1] + F.pad(a, (0, 1))[:, 1:] - 2 * a,
    "reflected": lambda a, b, c: F.pad(a, (3, 2), mode="reflect") * 2,
    "replicated": lambda a, b, c: F.pad(a[None], (3, 2), mode="replicate") * 2,
    "triangles": lambda a, b, c: a.tril() + a.triu(1) * 2,
    "masked softmax": lambda a, b, c: a.masked_fill(a > 0, float("-inf")).softmax(1),
    "diagonal": lambda a, b, c: torch.diag(a[0]) + torch.eye(67, dtype=a.dtype),
    "positions": lambda a, b, c: torch.cat([a, b], 1) + torch.arange(74),
    "clamped, then padded": lambda a, b, c: F.pad(((a * 3 - c[0]) / 2 + a[0]).clamp(0, 1) - 1, (1, 2, 3, 4)),
    "a gate, then padded": lambda a, b, c: F.pad(F.silu(F.silu(a * 3 - c[0]) - a[0] * 2), (1, 2, 3, 4)),
    "clamped, then a stencil": lambda a, b, c: F.pad(((a * 3 - c[0]) / 2 + a[0]).clamp(0, 1) - 1, (1, 0))[:, :-1] + a,
    "moving sums": lambda a, b, c: a.unfold(1, 3, 1).sum(-1),
}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return data(40, 67, dtype=dtype), data(40, 7, dtype=dtype, seed=6), data(5, 67, dtype=dtype, seed=7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    tensors = inputs(dtype)
    for name, fn in MOVES.items():
        if dtype is torch.float32 or name in ("columns", "rows", "padded", "interleaved", "slice replaced"):
            got, expected = run(fn, *tensors), fn(*tensors)
            assert torch.equal(got, expected), name
            assert (got.dtype, got.stride()) == (expected.dtype, expected.stride()), name
            checks = (
                name == "gathered parts"
            )  # a kernel in pieces is not known to read by all indices: another one asks
            assert kernels(compiled) == [1 + checks], name
            compiled.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_fused(name: str, dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    fn, tensors = ARITHMETIC[name], inputs(dtype)
    torch.testing.assert_close(run(fn, *tensors), fn(*tensors))
    assert kernels(compiled) == [1]


def test_of_too_many_segments_the_long_ones_are_cut_out() -> None:
    conditions = [Within(0, (1,), (), k, k + 1) for k in range(20)]
    few, many = Axis(8, 0), Axis(100, 0)
    assert segments.edges(conditions, few) == list(range(9))
    assert segments.edges(conditions, many) == [0, 20, 100]
    assert not segments.known(conditions, many, 0, 20)
    assert segments.known(conditions, many, 20, 100) == dict.fromkeys(map(id, conditions), False)


def test_axes_that_are_walked_as_one_are_cut_as_one() -> None:
    condition = Within(0, (10, 1), (), 0, 37)
    assert segments.edges([condition], Axis(100, 1)) == [0, 100]
    assert segments.edges([condition], Axis(100, 1, frozenset({0}))) == [0, 37, 100]


def test_sums_of_what_counts_are_known_places(compiled: list[Compiled]) -> None:  # noqa: F811
    a, _, _ = inputs(torch.float32)
    for fn in (lambda a: a.unfold(1, 3, 2) * 2, lambda a: a.unfold(0, 5, 1).unfold(1, 4, 3).sum(-1)):
        torch.testing.assert_close(run(fn, a), fn(a))
        assert "= place(" not in str(compiled[-1].schedule)


def test_what_is_read_again_and_again_does_not_choose_the_lanes(compiled: list[Compiled]) -> None:  # noqa: F811
    a = data(64, dtype=torch.bfloat16)
    assert torch.equal(
        run(lambda a: F.pad(torch.stack([a] * 8, 1), (0, 56)), a), F.pad(torch.stack([a] * 8, 1), (0, 56))
    )
    (kernel,) = compiled[-1].schedule.kernels
    lane = layout.plan(kernel, compiled[-1].target).lane
    assert lane is not None
    assert lane.axis == 1


def test_several_dtypes() -> None:
    a, b, _ = inputs(torch.float32)
    assert torch.equal(run(lambda a, b: torch.cat([a.double(), b], 1), a, b), torch.cat([a.double(), b], 1))


def test_writes_through_views() -> None:
    a, _, _ = inputs(torch.float32)
    torch.testing.assert_close(run(written, a), written(a))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31, 64, 127])
def test_sizes(size: int) -> None:
    a, b = data(3, size), data(3, 5, seed=6)
    for dim in (0, 1):
        parts = [a, b] if dim else [a.t().contiguous(), b.t().contiguous()]
        got = run(lambda a, b, dim=dim: torch.cat([a, b, a], dim) * 2, *parts)
        assert torch.equal(got, torch.cat([*parts, parts[0]], dim) * 2)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_padding_by_what_is_there(rank: int, mode: str, compiled: list[Compiled]) -> None:  # noqa: F811
    """In one loop; negative numbers cut off, sides may be as wide as what is padded, axes of size 1 may be repeated."""
    small = 1 if mode == "replicate" else 4
    sizes = (*(9, 5, 12)[3 - rank : 2], small, 67)[-rank:]
    wide = [(3, 2), (0, small - 1 if mode == "reflect" else 1), (4, 1)][:rank]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        a = (data(2, 3, *sizes, dtype=torch.float32) * 9).to(dtype)
        for pads in (wide, [(-1, 2), *wide[1:]], [(3, -2), *wide[1:]], [(0, 0)] * rank, [(66, 66), *wide[1:]]):
            padding = [n for pair in pads for n in pair]
            if dtype is torch.float32 or pads is wide:
                for b in (a, a.transpose(-1, -2).contiguous().transpose(-1, -2)) if rank > 1 else (a,):
                    expected = F.pad(b, padding, mode=mode)
                    got = run(lambda b, p=padding: F.pad(b, p, mode=mode), b)
                    assert torch.equal(got, expected), (dtype, padding)
                    assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())
                    assert all(k == 1 for k in kernels(compiled))
                    compiled.clear()
    a = data(2, 3, *sizes)
    padding = [n for pair in wide for n in pair]
    got = run(lambda a: (F.pad(a.exp() * 2 - 1, padding, mode=mode) * 3).sum(-1), a)
    torch.testing.assert_close(got, (F.pad(a.exp() * 2 - 1, padding, mode=mode) * 3).sum(-1))


def test_memory_beyond_a_part_is_not_read() -> None:
    """What stands behind a part would show: it is NaN."""
    big = torch.full((6, 100), float("nan"))
    big[2:4, 40:60] = data(2, 20)
    a = big[2:4, 40:60]
    for fn in (
        lambda a: torch.cat([a, a], 1) + 0,
        lambda a: F.pad(a, (5, 5, 1, 1)) * 1,
        lambda a: F.pad(a, (9, 0)).sum(),
    ):
        got = run(fn, a)
        assert not got.isnan().any()
        torch.testing.assert_close(got, fn(a))


def test_what_is_refused() -> None:
    a, _, _ = inputs(torch.float32)
    with pytest.raises(primexec.ExecutorError, match="more than 32 tensors"):
        run(lambda a: torch.cat([a[:, i : i + 1] for i in range(40)], 1), a)


@pytest.mark.parametrize("name", ["columns", "rows", "padded", "rolled", "stacked", "slice replaced"])
def test_loops_are_cut_where_the_source_changes(name: str, compiled: list[Compiled]) -> None:  # noqa: F811
    """No element asks where it comes from."""
    tensors = inputs(torch.float32)
    assert torch.equal(run(MOVES[name], *tensors), MOVES[name](*tensors))
    assert "select" not in compiled[0].llvm
    assert "masked.load" not in compiled[0].llvm


def test_cuts_in_several_passes() -> None:
    """What a later pass reads again was kept in every segment."""

    def fn(a: Tensor, b: Tensor) -> Tensor:
        joined = torch.cat([a.exp(), b.tanh() * 2], 1)
        return torch.softmax(joined, 1) + torch.cat([joined[:, :60].exp(), a[:, :14]], 1)

    a, b, _ = inputs(torch.float32)
    torch.testing.assert_close(run(fn, a, b), fn(a, b))
    big = data(3, 70000), data(3, 9, seed=6)  # reductions cut into pieces
    torch.testing.assert_close(
        run(lambda a, b: torch.cat([b, a, b], 1).sum(), *big), torch.cat([*big, big[1]], 1).sum()
    )
