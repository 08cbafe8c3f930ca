"""Writing taken out of programs: random programs of views and writes against eager, and what must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from primexec import CaptureError, effects, make_traced
from primexec.config import Options
from primexec.dynamo import compile_graph
from primexec.passes.functionalize import Functionalize
from tests.prims_oracle import run_graph

X = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)

VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[1:],
    lambda t: t[0],
    lambda t: t[..., ::2],
    lambda t: t.t() if t.dim() <= 2 else t,
    lambda t: t.unsqueeze(0),
    lambda t: t.squeeze(),
    lambda t: t.reshape(-1),
    lambda t: t.diagonal() if t.dim() == 2 else t,
    lambda t: t.movedim(0, -1) if t.dim() else t,
    lambda t: t.detach(),
    lambda t: t.chunk(2)[-1],
]
WRITES: list[Callable[[Tensor], Any]] = [
    lambda t: t.add_(1),
    lambda t: t.mul_(t),
    lambda t: t.fill_(7),
    lambda t: t.zero_(),
    lambda t: t.copy_(t.flip(0) if t.dim() else t),
    lambda t: t.logical_not_(),
    lambda t: t.clamp_(min=3),
    lambda t: t.masked_fill_(t > 4, -1),
    lambda t: t.sub_(t.sum()),
]
STEP = st.tuples(st.sampled_from(["view", "write", "read"]), st.integers(0, 9), st.integers(0, 10))


@given(st.lists(STEP, min_size=1, max_size=12))
def test_random_programs(steps: list[tuple[str, int, int]]) -> None:
    def program(x: Tensor) -> Any:
        tensors, sums = [x * 2], []
        for kind, which, what in steps:
            t = tensors[which % len(tensors)]
            if kind == "view" and t.numel():
                if t.dim():
                    tensors.append(VIEWS[what](t))
            elif kind == "write":
                WRITES[what % len(WRITES)](t)
            else:
                sums.append(t * 3)
        return (*sums, tensors[-1] + 1)

    traced = make_traced(program).trace(X)
    functional, lowered = Functionalize()(traced), traced.lower()
    expected = program(X)
    for changed in (functional, lowered):
        results = run_graph(changed.graph_module.graph, [X])
        for mine, eager in zip(results, expected, strict=True):
            assert torch.equal(mine, eager)
            assert mine.dtype == eager.dtype
    if not any("squeeze" in str(n.target) or "movedim" in str(n.target) for n in traced.nodes):
        assert not any(effects.writes(n) for n in functional.nodes)


def test_gates_of_a_recurrent_cell() -> None:
    """In inference PyTorch's cell changes parts of a product where they lie."""
    cell, x, h = torch.nn.GRUCell(5, 7), torch.randn(3, 5), torch.randn(3, 7)
    with torch.no_grad():
        traced = make_traced(cell, executor=("llvm", "aten"))
        torch.testing.assert_close(traced(x, h), cell(x, h))
        program = traced.trace(x, h)
    assert any("unsafe_split" in str(n.target) for n in program.nodes)
    assert not any(effects.writes(n) for n in Functionalize()(program).nodes)


def targets(fn: Callable[..., Any], *args: Tensor) -> list[str]:
    return [str(n.target) for n in Functionalize()(make_traced(fn).trace(*args)).nodes]


def two_views(x: Tensor) -> Any:
    z = x * 2
    z.add_(1)
    return z, z[0]


STAY: dict[str, Callable[[Tensor], Any]] = {
    "input": lambda x: x.add_(1),
    "view of an input": lambda x: x[0].add_(1),
    "seen by two results": two_views,
    "metadata of an input": lambda x: x.unsqueeze_(0),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_seen_outside_stays(name: str) -> None:
    program = make_traced(STAY[name]).trace(X.clone())
    assert Functionalize()(program) is program


def test_returned_memory_may_be_written_before() -> None:
    assert targets(lambda x: (x * 2).add_(1), X) == ["aten.mul.Tensor", "aten.add.Tensor"]


def test_random_draws_keep_their_numbers() -> None:
    def draw(x: Tensor) -> Tensor:
        return torch.empty_like(x).normal_(1, 2) + torch.empty_like(x).uniform_()

    program = Functionalize()(make_traced(draw).trace(X))
    assert not any(effects.writes(n) for n in program.nodes)
    torch.manual_seed(3)
    (mine,) = run_graph(program.graph_module.graph, [X])
    torch.manual_seed(3)
    assert torch.equal(mine, draw(X))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x[None].to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, ::2],
}
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.3),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "bernoulli_": lambda x: torch.zeros_like(x).bernoulli_(0.4),
    "exponential_": lambda x: (x * 2).exponential_(),
    "view": lambda x: (x * 2).transpose(-1, -2).uniform_(),
    "rand_like": torch.rand_like,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_fall_where_eagers_do(draw: str, layout: str) -> None:
    def fn(x: Tensor) -> Tensor:
        return DRAWS[draw](LAYOUTS[layout](x * 2)) + 1

    x = torch.randn(3, 4, 5)
    torch.manual_seed(3)
    mine = make_traced(fn, executor=("llvm", "aten"))(x)
    torch.manual_seed(3)
    torch.testing.assert_close(mine, fn(x))


@pytest.mark.parametrize("write", WRITES)
def test_lowered_writes_to_inputs_are_copies(write: Callable[[Tensor], Any]) -> None:
    def program(x: Tensor) -> Any:
        before = x[1] * 2
        write(x[1:])
        return before, x + 1

    lowered = make_traced(program).trace(X.clone()).lower()
    mine, eagers = X.clone(), X.clone()
    for a, b in zip(run_graph(lowered.graph_module.graph, [mine]), program(eagers), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mine, eagers)
    assert {str(n.target) for n in lowered.nodes if effects.writes(n)} == {"aten.copy_.default"}


def test_the_door_takes_writing_out_too() -> None:
    def written(x: Tensor) -> tuple[Tensor]:
        made = torch.zeros(4, 4, dtype=torch.float64)
        made.add_(x)
        made[0].mul_(2)
        return (made,)

    graph = make_fx(written, tracing_mode="fake")(X)
    run = compile_graph(graph, [X], options=Options.of("numpy", None))  # strict: it never falls back
    assert torch.equal(run([X])[0], written(X)[0])


def test_complex_numbers_are_written_in_place() -> None:
    """No kernel of ours could take them, and PyTorch's functional forms copy the whole tensor."""

    def filtered(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        kept = torch.zeros_like(spectrum)
        kept[:2, :2] = spectrum[:2, :2]
        return torch.fft.irfft2(kept) + 1

    traced = make_traced(filtered, executor=("llvm", "aten"))
    torch.testing.assert_close(traced(X), filtered(X))
    program = traced.trace(X)
    assert any(effects.writes(n) for n in Functionalize()(program).nodes)
    assert not any(effects.writes(n) for n in Functionalize(copy_back=True)(program).nodes)
    assert "slice_scatter" not in str(traced.explain(X))


@pytest.mark.parametrize("executor", ["aten", "llvm", ("llvm", "aten")], ids=str)
def test_a_slice_whose_size_depends_on_data_is_written(executor: Any) -> None:
    def padded(x: Tensor, counts: Tensor) -> Tensor:
        rows = x.new_zeros(len(x), 12, 4)
        for i in range(len(x)):
            repeated = torch.repeat_interleave(x[i] * 2, counts[i], dim=0)
            rows[i, : repeated.shape[0]] = repeated
        return (rows * X[0]).relu().square().sum()

    traced = make_traced(padded, executor=executor)
    for counts in ([[0, 1, 2], [2, 2, 2]], [[4, 4, 4], [0, 0, 1]]):
        mine, eagers = (torch.linspace(-1, 2, 24, dtype=X.dtype).view(2, 3, 4).requires_grad_() for _ in range(2))
        got, expected = traced(mine, torch.tensor(counts)), padded(eagers, torch.tensor(counts))
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
        torch.testing.assert_close(mine.grad, eagers.grad)
    assert traced.cache_info().traces == 1


# Views in place: the tensor itself takes another shape ---------------------------------------------------

SHAPED: list[Callable[[Tensor], Any]] = [
    lambda x: (x * 2).unsqueeze_(0).squeeze_(0).t_() + 1,
    lambda x: (y := x * 2, z := y + 1, y.transpose_(0, 1), y @ z)[1:],  # y + 1 saw the shape before
    lambda x: (x * 2).view(1, 4, 4).squeeze_(0),
    lambda x: (x * 1).as_strided_((4,), (5,)) * 3,
]


@pytest.mark.parametrize("fn", SHAPED)
@pytest.mark.parametrize("executor", ["aten", "llvm"])
def test_views_in_place(fn: Callable[[Tensor], Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for x in (X, X + 1):
        mine, eagers = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = (torch.utils._pytree.tree_leaves(f(t)) for f, t in ((traced, mine), (fn, eagers)))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, check_stride=True)
            a.square().sum().backward(retain_graph=True)
            b.square().sum().backward(retain_graph=True)
        torch.testing.assert_close(mine.grad, eagers.grad)
    assert traced.cache_info()[:3] == (1, 1, 1)
    names = [str(n.target) for n in traced.trace(X).lower().nodes]
    assert not any(name.partition(".")[2].split(".")[0].endswith("_") for name in names)


def test_argument_that_changes_shape_does_so_for_the_caller() -> None:
    def shaped(x: Tensor) -> Tensor:
        return x.unsqueeze_(0) * 2

    x, traced = X.clone(), make_traced(shaped, executor="llvm")
    assert torch.equal(traced(x), shaped(X.clone()))
    assert x.shape == (1, 4, 4)
    assert any(effects.has_effect(n) for n in traced.trace(X.clone()).lower().nodes)


@pytest.mark.parametrize("norm", [torch.nn.functional.batch_norm, torch.nn.functional.instance_norm])
def test_running_statistics_are_copied_back(norm: Callable[..., Tensor]) -> None:
    def program(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (
            norm(x, mean, var, None, None, True, 0.3)
            if norm is torch.nn.functional.batch_norm
            else norm(x, mean, var, use_input_stats=True, momentum=0.3)
        )

    given = X.reshape(2, 2, 4), torch.tensor([1.0, 2.0], dtype=X.dtype), torch.tensor([3.0, 4.0], dtype=X.dtype)
    mine, eagers = ([t.clone() for t in given] for _ in range(2))
    lowered = make_traced(program).trace(*given).lower()
    assert {str(n.target) for n in lowered.nodes if effects.has_effect(n)} == {"aten.copy_.default"}
    torch.testing.assert_close(run_graph(lowered.graph_module.graph, mine)[0], program(*eagers))
    torch.testing.assert_close(mine, eagers)


def seen_before(p: Tensor, x: Tensor) -> Any:
    whole = p.view(-1)
    p.add_(x)
    twice = whole * 2
    p.set_(p * 0.9 + x)
    return twice, whole * 3, p * 2


def row_written_after(p: Tensor, x: Tensor) -> Any:
    row = p[0]
    p.set_(x * 2)
    row.add_(5)
    p.sub_(1)
    return row * 3, p.sum()


def shared(p: Tensor, x: Tensor) -> Any:
    same, q = p.detach(), x * 2
    p.set_(torch.where(p > 0, q, x))
    q.set_(p)
    same.add_(1)
    return same * 2, q.mul_(3) + 1, p * 2


@pytest.mark.parametrize("fn", [seen_before, row_written_after, shared], ids=lambda f: f.__name__)
def test_tensors_that_are_given_other_memory(fn: Callable[[Tensor, Tensor], Any]) -> None:
    traced, expected, found = make_traced(fn), X.clone(), X.clone()
    for i in range(3):
        before = expected.view(-1), found.view(-1)
        torch.testing.assert_close(traced(found, X + i), fn(expected, X + i))
        torch.testing.assert_close([found, before[1]], [expected, before[0]])
    assert traced.cache_info().traces == 1


def test_memory_of_what_requires_grad_stays() -> None:
    weight = X.clone().requires_grad_()

    def fn(x: Tensor) -> Tensor:
        made = (x @ weight).tanh()
        with torch.no_grad():
            weight.set_(weight * 0.5)
        return made.sum()

    with pytest.raises(CaptureError, match=r"(?s)other memory.*weight.set_"):
        make_traced(fn)(X)
    assert torch.equal(weight, X)
    expected = (X @ weight).tanh().sum()
    torch.testing.assert_close(make_traced(lambda x: fn(x).detach())(X), expected.detach())
    assert torch.equal(weight, X * 0.5)
