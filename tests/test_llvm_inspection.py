"""What one can look at: loops, LLVM IR, assembly, explain(), logs, torch.profiler, and the bisection by fuel."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec
from primexec.executors.llvm import codegen, codes
from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.instructions import pointwise
from tests.isolated import python
from tests.llvm_golden import CASES, loops, path_of

BOTH = ("llvm", "aten")


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_golden_loops(fn: Callable[..., Any]) -> None:
    assert loops(fn) == path_of(fn).read_text(), "python -m tests.llvm_golden writes the files anew"


def normalised(x: Tensor, y: Tensor) -> Tensor:
    shares = torch.softmax(x * 2, -1)
    return shares + y.sum(0)


X, Y = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)), torch.ones(6, 40)
SHARES_LINE = "normalised: shares = torch.softmax(x * 2, -1)"


def test_backward_programs_are_shown_too() -> None:
    program = primexec.make_traced(lambda x: torch.softmax(x, -1)).trace(X.clone().requires_grad_())
    assert "\nbackward region0\n" in program.inspect_loops()


def test_what_two_operators_compute_alike_is_computed_once() -> None:
    x = X.clone().requires_grad_()
    program = primexec.make_traced(lambda x: torch.nn.functional.gelu(x), executor_parameters={"save": "less"}).trace(x)
    assert program.inspect_loops().count("erf(") == 2  # forward, and backward
    same = primexec.make_traced(lambda x: torch.sigmoid(x) + torch.nn.functional.silu(x)).trace(X)
    assert same.inspect_loops().count("exp(") == 1


def test_equal_kernels_share_their_code() -> None:
    """Whatever buffers they read, and however many rows they have."""
    one = [torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.ReLU()]
    model = torch.nn.Sequential(*(copy.deepcopy(layer) for _ in range(6) for layer in one)).requires_grad_(False)

    def run(x: Tensor, longer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return model(x), torch.softmax(x, -1), torch.softmax(longer, -1)

    x, longer = X[:, :16].contiguous(), torch.randn(300, 16)
    traced = primexec.make_traced(run, executor=BOTH)
    program = traced.trace(x, longer)
    assert (program.inspect_loops().count("kernel k"), program.inspect_llvm().count("define void @k")) == (13, 4)
    torch.testing.assert_close(traced(x, longer), run(x, longer))


def test_nothing_on_llvm_says_so() -> None:
    program = primexec.make_traced(lambda x: torch.sort(x)[0]).trace(X)
    assert {f() for f in (program.inspect_loops, program.inspect_llvm, program.inspect_asm)} == {
        "nothing of this program runs on llvm"
    }


def test_parameters_are_those_of_the_executor() -> None:
    program = primexec.make_traced(normalised).trace(X, Y)
    assert program.inspect_loops(fuel=0).count("kernel k") > program.inspect_loops().count("kernel k")
    with pytest.raises(ValueError, match="fuell"):
        program.inspect_loops(fuell=0)


def test_explain_shows_kernels_with_reasons_and_lines() -> None:
    explanation = primexec.make_traced(normalised).explain(X, Y, executor=BOTH)
    text = str(explanation)
    assert "region0: kernel k0_mul_amax_sub_exp_sum over 6 x 40 (reduced)" in text
    assert SHARES_LINE in text
    assert "amax opens (a reduction)" in text
    assert explanation.kernels


def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "primexec.kernels"):
        primexec.make_traced(normalised)(X, Y, executor=BOTH)
    assert "kernel k0_mul_amax_sub_exp_sum" in caplog.text
    done = python("import primexec", PRIMEXEC_LOGS="kernels")
    assert done.returncode == 0, done.stderr


def test_kernels_show_in_the_profiler() -> None:
    traced = primexec.make_traced(normalised)
    expected = traced(X, Y, executor=BOTH)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = traced(X, Y, executor=BOTH)
    assert torch.equal(got, expected)
    names = [e.name for e in profile.events() if e.name.startswith("primexec::k")]
    assert len(names) == traced.trace(X, Y).inspect_loops().count("kernel k")
    assert names[0].startswith("primexec::k0_mul_amax_sub_exp_sum test_llvm_inspection.py:")
    assert SHARES_LINE in names[0]


def test_kernels_show_where_the_gil_is_released() -> None:
    big = torch.ones(300, 300)
    traced = primexec.make_traced(lambda x: x.exp() + 1)
    traced(big, executor=BOTH)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        traced(big, executor=BOTH)
    assert any(e.name.startswith("primexec::k0_exp_add") for e in profile.events())


def blocks(x: Tensor) -> Tensor:
    """Kernels of several roots each, one after the other: the rows of one are the columns of the next."""
    for i in range(6):
        x = torch.softmax(x * (i + 2), -1).t().contiguous()
    return x


def test_fuel_finds_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the fifth kernel, where it is a fused one: by halving, fuel names it."""
    wanted = blocks(X)
    fused = [f"kernel {k.name}" for k in _kernels(None) if len(k.why) > 1]
    assert len(fused) >= 5
    culprit = fused[4].removeprefix("kernel ")
    write = KernelWriter.write

    def faulty(self: KernelWriter) -> Any:
        with monkeypatch.context() as inside:
            if self.kernel.name == culprit:
                inside.setattr(codegen, "pointwise", _wrong)
            return write(self)

    monkeypatch.setattr(KernelWriter, "write", faulty)

    def right(fuel: int) -> bool:
        codes._known.clear()
        traced = primexec.make_traced(blocks, executor=BOTH, executor_parameters={"fuel": fuel})
        return torch.allclose(traced(X), wanted)

    assert right(0)
    assert not right(len(fused))
    low, high = 0, len(fused)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if right(middle) else (low, middle)
    with_it, without = ({k.name for k in _kernels(fuel) if len(k.why) > 1} for fuel in (high, low))
    assert with_it - without == {culprit}


def _kernels(fuel: int | None) -> list[Any]:
    traced = primexec.make_traced(blocks, executor=BOTH, executor_parameters={} if fuel is None else {"fuel": fuel})
    made: list[Any] = []
    lower = llvm.lower
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args: Any) -> Any:
            compiled = lower(*args)
            made.extend(compiled.schedule.kernels)
            return compiled

        patch.setattr(llvm, "lower", spy)
        traced.trace(X)
    return made


def _wrong(prim: str, dtype: torch.dtype) -> Any:
    """Every division gives its numerator."""
    return (lambda a, b: a) if prim == "div" else pointwise(prim, dtype)
