"""The same kernels for every target: the modules are well formed, and use the registers that the target has."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import primexec
from primexec.executors.llvm import engine
from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm.target import NAMED, Target, host
from tests.llvm_golden import CASES

SCALAR = Target("x86_64-unknown-linux-gnu", "x86-64", frozenset(), 4)  # vectors of one float32
TARGETS = {**NAMED, "scalar": SCALAR}
# What the assembly of float32 kernels holds, and what it does not. With AVX-512, wide registers are taken for some of
# these small kernels only; the scalar target's vectors of one element may end in any instruction of the baseline.
REGISTERS = {
    "x86-64": ("xmm", "ymm"),
    "x86-64-avx2": ("ymm", "zmm"),
    "x86-64-avx512": ("[xyz]mm", None),
    "aarch64": (r"\.4s", "xmm"),
    "scalar": ("xmm", "ymm"),
}
CONTRACTED = {"x86-64-avx2": "vfmadd", "x86-64-avx512": "vfmadd", "aarch64": "fmla"}


def runs_here(target: Target) -> bool:
    mine = host()
    return target.triple.split("-")[0] == mine.triple.split("-")[0] and target.features <= mine.features


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The regions that are compiled during the test."""
    found: list[fx.Graph] = []
    lower = llvm.lower

    def spy(graph: fx.Graph, *rest: Any) -> Any:
        found.append(graph)
        return lower(graph, *rest)

    monkeypatch.setattr(llvm, "lower", spy)
    return found


def filled(t: Tensor, seed: int) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.dtype)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_registers(fn: Callable[..., Any], name: str, graphs: list[fx.Graph]) -> None:
    primexec.make_traced(fn)(*CASES[fn], executor=("llvm", "aten"))
    (graph,) = graphs
    compiled = llvm.lower(graph, {}, frozenset(), TARGETS[name])
    engine.verify(compiled.llvm)
    assembly = compiled.asm
    present, absent = REGISTERS[name]
    assert re.search(present, assembly)
    assert absent is None or absent not in assembly
    if fn.__name__ == "gelu_chain" and name in CONTRACTED:
        assert CONTRACTED[name] in assembly


@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if runs_here(t)])
@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_values(fn: Callable[..., Any], name: str, graphs: list[fx.Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target whose instructions this machine has gives eager's values."""
    monkeypatch.setattr(llvm, "host", lambda: TARGETS[name])
    inputs = [filled(t, i) for i, t in enumerate(CASES[fn])]
    got = primexec.make_traced(fn)(*inputs, executor=("llvm", "aten"))
    assert len(graphs) == 1
    torch.testing.assert_close(got, fn(*inputs))


def test_float16_needs_its_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    from primexec.executors.llvm import judge

    monkeypatch.setattr(judge, "host", lambda: NAMED["x86-64"])
    x = torch.ones(3, dtype=torch.float16)
    traced = primexec.make_traced(lambda t: t * 2 + 1)
    assert torch.equal(traced(x, executor=("llvm", "aten")), x * 2 + 1)
    text = str(traced.explain(x, executor=("llvm", "aten")))
    assert "this CPU has no conversions of float16" in text
