"""Generated programs on the executor `llvm`, against eager and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note, seed, settings
from torch import Tensor

import primexec
from tests.llvm_programs import FLOATS, Program, programs
from tests.observe import same_bits

SHARDS, OF = 100, 100  # programs of each kind under --exhaustive


def check(program: Program) -> None:
    traced = primexec.make_traced(program, executor=("llvm", "aten"))
    for data in (0, 1):
        inputs = program.inputs(data)
        kept = [t.clone() for t in inputs]
        expected, got = program(*inputs), traced(*inputs)
        assert all(same_bits(k, t) for k, t in zip(kept, inputs, strict=True)), "an input has changed"
        exact = program(*map(widened, inputs)) if not program.exact else expected
        near = program(*map(nudged, inputs)) if not program.exact else expected
        for number, (g, e, x, n) in enumerate(zip(got, expected, exact, near, strict=True)):
            assert (g.dtype, g.shape) == (e.dtype, e.shape)
            # PyTorch's fake tensors give dimensions of size 1 other strides than its kernels do, and results follow.
            if all(n > 1 for s in program.sources for n in s.shape):
                assert all(g.stride(d) == e.stride(d) for d in range(g.dim()) if g.shape[d] > 1)
            if not same_bits(e, g):
                assert not program.exact, f"output {number}: {differing(g, e)}"
                check_error(g, e, x, n, number)
    assert traced.cache_info().traces == 1


def differing(g: Tensor, e: Tensor) -> str:
    different = (g != e) & ~(g.isnan() & e.isnan())
    if not different.any():
        return "the sign of a zero"
    return f"{int(different.sum())} of {g.numel()}: {g[different][:5].tolist()} for {e[different][:5].tolist()}"


def widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def nudged(t: Tensor) -> Tensor:
    """In float64, every number changed by one unit in its last place, up or down by turns."""
    if not t.is_floating_point():
        return t
    signs = torch.arange(t.numel()).reshape(t.shape) % 2 * 2 - 1
    return t.double() * (1 + signs * torch.finfo(t.dtype).eps)


def check_error(g: Tensor, e: Tensor, x: Tensor, near: Tensor, number: int) -> None:
    """At most twice eager's largest error, some units in the last place of the largest number, and the change that
    one unit in the last place of the inputs makes: without bounds where a row of equal numbers is normalised."""
    assert g.dtype in FLOATS, f"output {number}"
    x = x.double()
    mine, theirs = ((v.double() - x).abs() for v in (g, e))
    change = (near.double() - x).abs().nan_to_num(0.0).max()
    allowed = 2 * theirs.max() + 8 * torch.finfo(g.dtype).eps * x.abs().max() + change
    assert not (g.isnan() ^ e.isnan()).any(), f"output {number}"
    worst = mine.nan_to_num(0.0).max()
    assert worst <= allowed, f"output {number}: error {worst}, eager's {theirs.max()}, of {x.abs().max()}"


def fuzz(exact: bool, shard: int, count: int) -> None:
    @seed(shard)
    @settings(max_examples=count, derandomize=False, deadline=None, print_blob=False)
    @given(programs(exact))
    def test(program: Program) -> None:
        note(str(program))
        check(program)

    test()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "smooth"])
def test_generated(exact: bool) -> None:
    fuzz(exact, 0, 150)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "smooth"])
def test_many_generated(exact: bool, shard: int) -> None:
    fuzz(exact, shard, OF)
