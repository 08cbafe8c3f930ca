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
        for number, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert (g.dtype, g.shape) == (e.dtype, e.shape)
            # PyTorch's fake tensors give dimensions of size 1 other strides than its kernels do, and results follow.
            if all(n > 1 for s in program.sources for n in s.shape):
                assert all(g.stride(d) == e.stride(d) for d in range(g.dim()) if g.shape[d] > 1)
            if not same_bits(e, g):
                assert not program.exact, f"output {number}: {differing(g, e)}"
                check_error(program, inputs, g, e, number)
    assert traced.cache_info().traces == 1


def differing(g: Tensor, e: Tensor) -> str:
    different = (g != e) & ~(g.isnan() & e.isnan())
    if not different.any():
        return "the sign of a zero"
    return f"{int(different.sum())} of {g.numel()}: {g[different][:5].tolist()} for {e[different][:5].tolist()}"


def widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def nudged(t: Tensor) -> Tensor:
    """Every number changed by one unit in its last place, up or down by turns."""
    if not t.is_floating_point():
        return t
    signs = torch.arange(t.numel()).reshape(t.shape) % 2 * 2 - 1
    return (t.double() * (1 + signs * torch.finfo(t.dtype).eps)).to(t.dtype)


def check_error(program: Program, inputs: list[Tensor], g: Tensor, e: Tensor, number: int) -> None:
    """At most twice eager's largest error, here and where the inputs change by one unit in their last place, some units
    in the last place of the largest number, and what that change makes: without bounds where a row of equal numbers is
    normalised."""
    assert g.dtype in FLOATS, f"output {number}"
    near = [nudged(t) for t in inputs]
    beside = program(*near)[number].double()
    x, exact_beside = (program(*map(widened, given))[number].double() for given in (inputs, near))
    theirs, theirs_beside, change, mine = (
        t.abs().nan_to_num(0.0).max() for t in (e.double() - x, beside - exact_beside, exact_beside - x, g.double() - x)
    )
    allowed = 2 * max(theirs, theirs_beside) + 8 * torch.finfo(g.dtype).eps * x.abs().max() + change
    assert not (g.isnan() ^ e.isnan()).any(), f"output {number}"
    assert mine <= allowed, f"output {number}: error {mine}, eager's {theirs} and {theirs_beside}, of {x.abs().max()}"


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
