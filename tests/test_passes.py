"""Passes: what they remove, and above all what they leave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import make_traced, passes
from primexec.passes.constants import FoldConstants, ShareConstants
from primexec.passes.copies import RemoveLastCopies
from primexec.passes.dead_code import RemoveDeadCode
from primexec.passes.renames import RemoveRenames

X = torch.arange(6.0).reshape(2, 3)


def targets(fn: Callable[..., Any], *args: Any) -> list[str]:
    """The operators of the program that is run, without overload names."""
    program = make_traced(fn).trace(*args)
    return [str(n.target).split(".")[1] for n in program.nodes if n.op == "call_function" and "aten" in str(n.target)]


def test_pipeline() -> None:
    assert (RemoveRenames(), RemoveLastCopies(), RemoveDeadCode(), ShareConstants(), FoldConstants()) == passes.PIPELINE


def test_backward_of_a_linear_layer_has_no_renames() -> None:
    layer = torch.nn.Linear(3, 4)
    x = torch.randn(2, 3, requires_grad=True)
    program = make_traced(layer).trace(x)
    assert program.backward is not None
    assert [n.target for n in program.backward.nodes if n.op == "call_function"] == [
        torch.ops.aten.mm.default,
        torch.ops.aten.t.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.sum.dim_IntList,
    ]
    gradient = torch.randn(2, 4)
    tensors = (x, *layer.parameters())
    mine, eagers = (torch.autograd.grad(f(x), tensors, gradient) for f in (make_traced(layer), layer))
    for a, b in zip(mine, eagers, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


# Dead code ----------------------------------------------------------------------------------------------

DEAD: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "view": (lambda x: (x.view(-1), x + 1)[1], ["add"]),
    "chain of views": (lambda x: (x.t()[0].unsqueeze(0), x + 1)[1], ["add"]),
    "constant": (lambda x: (torch.tensor([1, 2]), x + 1)[1], ["add"]),
    "detach": (lambda x: (x.detach(), x + 1)[1], ["add"]),
    "empty": (lambda x: (torch.empty(3), x + 1)[1], ["add"]),
    "copies": (lambda x: (torch.stack([x, x]), torch.cat([x.clone(), x]), x + 1)[2], ["add"]),
    # What computes may raise, and what writes or draws is seen.
    "arithmetic": (lambda x: (x * 2, x + 1)[1], ["mul", "add"]),
    "index": (lambda x: (x[torch.tensor([0])], x + 1)[1], ["index", "add"]),
    "write": (lambda x: (x.mul_(2), x + 1)[1], ["mul_", "add"]),
    "write through a view": (lambda x: (x.view(-1).mul_(2), x + 1)[1], ["view", "mul_", "add"]),
    "random": (lambda x: (torch.rand(2), x + 1)[1], ["rand", "add"]),
    "random in place": (lambda x: (torch.empty(2).normal_(), x + 1)[1], ["empty", "detach", "normal_", "add"]),
    "part of a result": (lambda x: (x.max(0)[1], x + 1)[1], ["max", "add"]),
    "as_strided": (lambda x: (x.as_strided((2,), (1,)), x + 1)[1], ["as_strided", "add"]),
}


@pytest.mark.parametrize(("fn", "left"), DEAD.values(), ids=DEAD)
def test_only_what_cannot_fail_is_dead(fn: Callable[[Tensor], Any], left: list[str]) -> None:
    assert targets(fn, X.clone()) == left
    traced = make_traced(fn)
    for _ in range(2):
        mine, eagers = X.clone(), X.clone()
        states = []
        for f, x in ((traced, mine), (fn, eagers)):
            torch.manual_seed(0)
            states.append((f(x), torch.get_rng_state()))
        assert torch.equal(states[0][0], states[1][0])
        assert torch.equal(states[0][1], states[1][1])
        assert torch.equal(mine, eagers)


def test_unused_operator_still_raises() -> None:
    traced = make_traced(lambda x, i: (x[i], x + 1)[1])
    assert torch.equal(traced(X, torch.tensor([0])), X + 1)
    with pytest.raises(IndexError):
        traced(X, torch.tensor([7]))


def test_inputs_stay() -> None:
    program = make_traced(lambda x, y: y).trace(X, X.clone())
    assert [i.label for i in program.inputs] == ["x", "y"]


# Constants ----------------------------------------------------------------------------------------------


def shared(x: Tensor) -> Any:
    return x * torch.tensor([1.0, 2.0, 3.0])


def shared_by_views(x: Tensor) -> Any:
    table = torch.tensor([[1.0, 2.0, 3.0]])
    return x + table.view(-1) + table[0]


def returned(x: Tensor) -> Any:
    table = torch.tensor([1.0, 2.0, 3.0])
    return x * table, table


def returned_view(x: Tensor) -> Any:
    table = torch.tensor([1.0, 2.0, 3.0])
    return x * table, table[:1]


def written(x: Tensor) -> Any:
    table = torch.tensor([1.0, 2.0, 3.0])
    table += 1
    return x * table


def written_through_a_view(x: Tensor) -> Any:
    table = torch.tensor([1.0, 2.0, 3.0])
    table[0] = 7
    return x * table


def written_by_a_neighbour(x: Tensor) -> Any:
    table = torch.tensor([1.0, 2.0, 3.0])
    out = torch.empty(2, 3)
    torch.mul(x, table, out=out)
    return out


def written_as_out(x: Tensor) -> Any:
    table = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    torch.add(x, 1, out=table)
    return table * 1


def seen_by_custom_operator(x: Tensor) -> Any:
    return keeps(torch.tensor([1.0, 2.0, 3.0])) + x


KEPT: list[Tensor] = []


@torch.library.custom_op("primexec_test_passes::keeps", mutates_args=())
def keeps(x: Tensor) -> Tensor:
    KEPT.append(x)
    return x.clone()


@keeps.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


CONSTANTS: dict[Callable[[Tensor], Any], int] = {
    shared: 0,
    shared_by_views: 0,
    written_by_a_neighbour: 0,
    returned: 1,
    returned_view: 1,
    written: 1,
    written_through_a_view: 1,
    written_as_out: 1,
    seen_by_custom_operator: 1,
}


@pytest.mark.parametrize("fn", CONSTANTS, ids=lambda f: f.__name__)
def test_constant_is_copied_only_where_it_shows(fn: Callable[[Tensor], Any]) -> None:
    assert targets(fn, X).count("lift_fresh_copy") == CONSTANTS[fn]
    traced = make_traced(fn)
    for _ in range(3):
        outs, expected = (torch.utils._pytree.tree_leaves(f(X)) for f in (traced, fn))
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
        for out in outs:
            out.zero_()  # the caller may do what it likes with what it got
        for seen in KEPT:
            seen.zero_()
        KEPT.clear()
    assert traced.cache_info()[:3] == (2, 1, 1)


# Copies -------------------------------------------------------------------------------------------------


def copied(x: Tensor, stride: list[int], before: bool = False) -> tuple[Tensor, Tensor]:
    made = torch.ops.aten.exp(x)
    buffer = torch.ops.aten.new_empty_strided(made, [2, 3], stride)
    if before:
        torch.ops.aten.fill_(buffer, 0)
    torch.ops.aten.copy_(buffer, made)
    return made, torch.ops.aten.add_(buffer, 1)


COPIES: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "last use": (lambda x: copied(x, [3, 1])[1], False),
    "used again": (lambda x: copied(x, [3, 1]), True),
    "used through a view": (lambda x: (lambda m, b: torch.ops.aten.mul(m[0], 2) + b)(*copied(x, [3, 1])), True),
    "other strides": (lambda x: copied(x, [1, 2])[1], True),
    "buffer used before": (lambda x: copied(x, [3, 1], before=True)[1], True),
}


@pytest.mark.parametrize(("fn", "stays"), COPIES.values(), ids=COPIES)
def test_last_copy_goes(fn: Callable[[Tensor], Any], stays: bool) -> None:
    expected, out = fn(X), make_traced(fn)(X)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (expected, out)), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    program = make_traced(fn).trace(X)
    assert ("copy_" in str(program)) == stays
    assert torch.equal(X, torch.arange(6.0).reshape(2, 3))


def test_copy_of_an_input_stays() -> None:
    def f(x: Tensor) -> Tensor:
        buffer = torch.ops.aten.new_empty_strided(x, [2, 3], [3, 1])
        torch.ops.aten.copy_(buffer, x)
        return torch.ops.aten.add_(buffer, 1)

    x = X.clone()
    assert torch.equal(make_traced(f)(x), X + 1)
    assert torch.equal(x, X)


def test_views_of_a_copy_that_went_are_views_of_its_source() -> None:
    """Otherwise a write through one of them would be lost where writing is taken out of the program."""

    def changed(x: Tensor) -> Tensor:
        y = x * 2
        y[1:].mul_(3).add_(x[1:])
        y[0] = x.sum()
        return y.sin_()

    x = torch.randn(5, 6)
    mine, eager = x.clone().requires_grad_(), x.clone().requires_grad_()
    make_traced(changed, executor=("numpy", "aten"))(mine).square().sum().backward()
    changed(eager).square().sum().backward()
    torch.testing.assert_close(mine.grad, eager.grad)


# Views that are returned ----------------------------------------------------------------------------------


def test_a_returned_view_that_is_read_inside_cuts_no_region() -> None:
    def program(x: Tensor) -> Any:
        first = x.exp().sum(0)
        rows = first.view(2, -1)
        second = rows.sin().cumsum(1)
        columns = second.t()
        return rows, columns, (columns + 1).softmax(0)

    x = torch.randn(5, 6)
    traced = make_traced(program, executor=("llvm", "aten"))
    made, wanted = traced(x), program(x)
    torch.testing.assert_close(made, wanted)
    assert [t.stride() for t in made] == [t.stride() for t in wanted]
    made[0].add_(1)  # nobody else's memory
    torch.testing.assert_close(made[1:], wanted[1:])
    regions = [
        line.split()[2].rstrip(":")
        for line in str(traced.explain(x)).splitlines()
        if line.startswith("  region") and " on " in line
    ]
    assert regions == ["llvm", "aten"]
