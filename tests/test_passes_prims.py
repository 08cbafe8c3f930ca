"""Passes on programs in prims: random programs keep their values, and what must stay stays."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from primexec import VerificationError, effects, make_traced
from primexec.verify import verify_prims
from tests.prims_oracle import run_graph

X = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
STEPS = [lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a.t().t() - b, lambda a, b: a.sum() + b,
         lambda a, b: torch.rand_like(a) + b, lambda a, b: a.detach().clone(),
         lambda a, b: a.reshape(2, 3).double()]  # fmt: skip


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10))
def test_random_programs(steps: list[tuple[int, int, int]]) -> None:
    def program(x: Tensor) -> Any:
        made = [x, x * 2]
        for step, a, b in steps:
            made.append(STEPS[step](made[a % len(made)], made[b % len(made)]))
        return made[-1], sum(made), x.add_(1), made[-1] * x

    lowered = make_traced(program).trace(X.clone()).lower()
    torch.manual_seed(0)
    expected = program(X.clone())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for mine, eager in zip(run_graph(lowered.graph_module.graph, [X.clone()]), expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-14, atol=1e-14)
    assert torch.equal(state, torch.get_rng_state())


def names(fn: Any, *args: Tensor) -> list[str]:
    nodes = make_traced(fn).trace(*args).lower().nodes
    return [str(n.target).split(".")[1] for n in nodes if n.target is not operator.getitem]


def test_equal_operators_are_merged() -> None:
    assert names(lambda x: x.exp() * x.exp() + 1, X) == ["exp", "mul", "add"]


def test_draws_are_not_merged() -> None:
    assert names(lambda x: torch.rand(2) + torch.rand(2), X).count("rand") == 2


def test_reads_around_a_write_are_not_merged() -> None:
    assert names(lambda x: (x.exp() * 2, x.add_(1), x.exp() * 3)[::2], X.clone()).count("exp") == 2


def test_results_keep_their_own_memory() -> None:
    lowered = make_traced(lambda x: (x + 1, x + 1)).trace(X).lower()
    first, second = run_graph(lowered.graph_module.graph, [X])
    assert first.data_ptr() != second.data_ptr()


def test_no_ops_go() -> None:
    assert names(lambda x: x.detach().clone().double().reshape(2, 3).exp() + 1, X) == ["exp", "add"]


def test_views_of_views_are_one() -> None:
    assert names(lambda x: x.exp().view(3, 2).view(6) + 1, X) == ["exp", "view", "add"]
    assert names(lambda x: x.exp().view(3, 2).view(2, 3) + 1, X) == ["exp", "add"]
    assert names(lambda x: x.t().exp().view(3, 1, 2).view(3, 2) + 1, X) == ["transpose", "exp", "view", "view", "add"]


def test_law_of_prims() -> None:
    program = make_traced(lambda x: x.exp().softmax(0)).trace(X)
    lowered = program.lower()
    verify_prims(lowered)
    lowered.nodes[0].target = torch.ops.aten.exp.default
    with pytest.raises(VerificationError, match=r"is no prim\n[^→]*→ ") as found:
        verify_prims(lowered)
    assert f'File "{__file__}"' in str(found.value)
    assert not any(effects.has_effect(n) for n in lowered.nodes)
