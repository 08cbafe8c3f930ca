"""Lowering of whole programs: random programs of prims and of the operators above them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import primexec
from primexec import Program, make_traced, prims
from primexec.verify import verify_prims
from tests.prims_oracle import run_graph

X = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)


def _prim(name: str) -> Any:
    primexec.prims.TABLE[f"prims.{name}.default"]  # a member of the table
    return getattr(torch.ops.prims, name).default


PRIMS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: _prim("add")(a, b),
    lambda a, b: _prim("mul")(a, b),
    lambda a, b: _prim("sub")(a, 0.5),
    lambda a, b: _prim("tanh")(a),
    lambda a, b: _prim("where")(_prim("lt")(a, b), a, b),
    lambda a, b: _prim("transpose")(a, [1, 0]),
    lambda a, b: _prim("broadcast_in_dim")(_prim("sum")(a, [0]), [3, 3], [1]),
    lambda a, b: _prim("convert_element_type")(_prim("convert_element_type")(a, torch.float32), torch.float64),
    lambda a, b: torch.ops.aten.mm.default(a, b),
    lambda a, b: torch.ops.aten.cat.default([a, b], 1)[:, ::2],
    lambda a, b: torch.ops.aten.gather.default(a, 1, torch.ops.aten.argmax.default(b, 1, True).expand(3, 3)),
]
ABOVE: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a.softmax(-1) + b.t(),
    lambda a, b: torch.nn.functional.layer_norm(a, (3,), b[0]),
    lambda a, b: torch.addmm(b, a, b, alpha=0.5),
    lambda a, b: (a - a.mean(0)) * b.var(1, keepdim=True),
    lambda a, b: torch.nn.functional.gelu(a).clamp(-1, 1).masked_fill(b > 0, 2.0),
    lambda a, b: a.clone().mul_(2).index_add_(0, torch.tensor([0, 2]), b[:2]),
    lambda a, b: torch.stack([a, b]).logsumexp(0).unsqueeze(0).squeeze_(0),
]
STEPS = PRIMS + ABOVE
Steps = list[tuple[int, int, int]]


def steps(kinds: int) -> st.SearchStrategy[Steps]:
    return st.lists(st.tuples(st.integers(0, kinds - 1), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)


def function(drawn: Steps) -> Callable[[Tensor], Any]:
    def program(x: Tensor) -> Any:
        made = [x, x + 1]
        for step, a, b in drawn:
            made.append(STEPS[step](made[a % len(made)], made[b % len(made)]))
        return made[-1], made[-1] * made[len(made) // 2]

    return program


def shown(program: Program) -> list[tuple[str, str, str]]:
    """Every node with its arguments, whatever names the nodes have."""
    number = {n: f"%{i}" for i, n in enumerate(program.graph_module.graph.nodes)}
    return [
        (
            str(n.target),
            str(torch.fx.node.map_arg(n.args, number.get)),
            str(torch.fx.node.map_arg(n.kwargs, number.get)),
        )
        for n in program.nodes
    ]


def check_lowered(program: Program) -> Program:
    before = shown(program)
    lowered = program.lower()
    assert shown(program) == before
    assert all(n.target is operator.getitem or prims.is_prim(n.target) for n in lowered.nodes)
    verify_prims(lowered)
    assert shown(lowered.lower()) == shown(lowered)
    assert shown(program.lower()) == shown(lowered)  # from the memo
    return lowered


@settings(max_examples=25)
@given(steps(len(PRIMS)))
def test_programs_of_prims(drawn: Steps) -> None:
    fn = function(drawn)
    lowered = check_lowered(make_traced(fn).trace(X))
    for mine, eager in zip(run_graph(lowered.graph_module.graph, [X]), fn(X), strict=True):
        assert torch.equal(mine, eager)  # the very same operators, merged at most


@settings(max_examples=15)
@given(steps(len(STEPS)))
def test_programs_of_any_operators(drawn: Steps) -> None:
    fn = function(drawn)
    lowered = check_lowered(make_traced(fn).trace(X))
    constants = list(lowered.constants)
    for mine, eager in zip(run_graph(lowered.graph_module.graph, [X, *constants]), fn(X), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-9, atol=1e-9)
