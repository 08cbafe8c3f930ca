"""Programs whose backward pass is left to PyTorch's autograd: where that is so, and where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from primexec import make_traced

DEFAULT = ("llvm", "aten")


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def grads(fn: Callable[..., Any], given: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, and gradients of the inputs where every result gets one."""
    for t in given:
        t.grad = None
    out = fn(*given)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    torch.autograd.backward([o for o in out if o.requires_grad], [torch.ones_like(o) for o in out if o.requires_grad])
    return out, [t.grad for t in given]


def is_replayed(out: Tensor) -> bool:
    node: Any = out.grad_fn
    while node is not None:
        if "_Run" in node.name():
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return True


LEFT: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "convolution": (F.conv2d, [leaf(2, 3, 8, 8), leaf(4, 3, 3, 3), leaf(4)]),
    "convolution and relu": (lambda x, w: F.conv2d(x, w).relu(), [leaf(2, 3, 8, 8), leaf(4, 3, 3, 3)]),
    "transposed": (F.conv_transpose1d, [leaf(2, 3, 8), leaf(3, 4, 3)]),
    "a view of a root": (lambda x: F.avg_pool1d(x, 2), [leaf(2, 3, 8)]),
    "a root and a view of it": (lambda x: ((y := x * 2), y.t()), [leaf(3, 4)]),
    "a view of an input": (lambda x, w: (x[1:], x * w), [leaf(3, 4), leaf(3, 4)]),
    "one operator": (torch.relu, [leaf(100)]),
    "one large operator": (torch.relu, [leaf(300, 300)]),
    "one of comparisons and products": (F.hardswish, [leaf(300, 300)]),
    "two results": (lambda x: x.sort(-1)[0], [leaf(16)]),
    "a softmax": (lambda x: torch.softmax(x, -1), [leaf(64, 128)]),
    "a layer norm": (lambda x, w, b: F.layer_norm(x, (128,), w, b), [leaf(64, 128), leaf(128), leaf(128)]),
    "a choice by values": (lambda x: x.prod(), [leaf(200, 100)]),
    "a loss": (lambda x, w: (x * w).sum(), [leaf(16), leaf(16)]),
    "an LSTM whose last state nobody uses": (
        lambda x, *w: torch.lstm(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), w, True, 1, 0.0, True, False, False)[
            0
        ],
        [leaf(*shape) for shape in ((5, 2, 3), (16, 3), (16, 4), (16,), (16,))],
    ),
    "a layer with a bias": (F.linear, [leaf(64, 96), leaf(128, 96), leaf(128)]),
    "a detached result": (lambda x: ((y := x * 2), y.detach()), [leaf(16)]),
}


@pytest.mark.parametrize("name", LEFT)
def test_small_programs_are_left_to_autograd(name: str) -> None:
    fn, given = LEFT[name]
    traced = make_traced(fn, executor=DEFAULT)
    expected, wanted = grads(fn, given)
    for _ in range(2):
        found, mine = grads(traced, given)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, mine, wanted))  # type: ignore[arg-type]
        assert [o.requires_grad for o in found] == [o.requires_grad for o in expected]
        assert [o._is_view() for o in found] == [o._is_view() for o in expected]
    assert all(is_replayed(o) for o in found)
    assert traced.cache_info()[:3] == (1, 1, 1)
    assert "autograd records the operators one by one" in str(traced.explain(*given))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 5


def _hidden(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 3
    return y * w


def _hooked(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        y.register_hook(change)
        return y.relu()

    return fn


def _packed(x: Tensor, w: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t, lambda t: t * 7):
        return x * w


def _exchanging(x: Tensor, w: Tensor) -> Tensor:
    y, other = x * w, w.detach()
    y.register_hook(lambda g: other)
    return y.relu()


def _hooked_node(x: Tensor, w: Tensor) -> Tensor:
    y, other = x * w, w.detach()
    y.grad_fn.register_hook(lambda gradients, _: (other * 2, other * 3))  # type: ignore[union-attr]
    return y.relu()


def _exchanged(x: Tensor, w: Tensor) -> Tensor:
    other = w.detach()
    with saved_tensors_hooks(lambda t: t, lambda t: other):
        return x * w


APART: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "custom function": lambda x, w: _Twice.apply(x) * w,
    "no_grad": _hidden,
    "detach": lambda x, w: (x * 3).detach() * w,
    "detached input": lambda x, w: x.detach() * w,
    "hook": _hooked(lambda g: g * 3),
    "hook that turns": _hooked(lambda g: g.t()),
    "hook that gives another": _exchanging,
    "hook of a node": _hooked_node,
    "hook that reverses": _hooked(lambda g: g.flip(0)),
    "hooks of what is saved": _packed,
    "another one in place of what is saved": _exchanged,
    "in-place": lambda x, w: (x * w).mul_(2),
}


@pytest.mark.parametrize("name", APART)
def test_gradients_where_the_operators_alone_would_give_others(name: str) -> None:
    fn, given = APART[name], [leaf(3, 3), (leaf(3, 3) * 2).detach().requires_grad_()]
    traced = make_traced(fn, executor=DEFAULT)
    for _ in range(2):
        expected, wanted = grads(fn, given)
        found, mine = grads(traced, given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(mine, wanted)
    assert traced.cache_info()[:3] == (1, 1, 1)


def test_a_checkpoint_stays_one() -> None:
    traced = make_traced(lambda x: checkpoint(torch.sin, x, use_reentrant=False), executor=DEFAULT)
    x = leaf(8)
    traced(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())


def test_a_history_before_the_arguments_gets_its_gradients() -> None:
    x = leaf(8)
    (traced := make_traced(torch.relu, executor=DEFAULT))(x * 3).sum().backward()
    assert torch.equal(x.grad, 3.0 * (x > 0))  # type: ignore[arg-type]
    assert is_replayed(traced(x * 3))


def test_second_derivatives_are_eagers_there() -> None:
    x = leaf(8)
    (first,) = torch.autograd.grad(make_traced(torch.sin, executor=DEFAULT)(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -x.detach().sin())


def test_what_fuses_or_is_asked_for_keeps_its_node() -> None:
    x = leaf(300, 300)
    assert not is_replayed(make_traced(lambda x: torch.softmax(x.sin() * 2, -1), executor=DEFAULT)(x))
    assert not is_replayed(make_traced(torch.relu, executor="aten")(x))
    for slow in (lambda x: F.group_norm(x, 8), torch.tanh, lambda x: x.exp() * x.sigmoid()):
        assert not is_replayed(make_traced(slow, executor=DEFAULT)(leaf(64, 128)))
    for n in (16, 128):
        loss = make_traced(lambda x, y: F.mse_loss(x, y), executor=DEFAULT)(leaf(n, n), torch.ones(n, n))
        assert not is_replayed(loss)
    assert not is_replayed(make_traced(torch.sigmoid, executor=DEFAULT)(x))
    strict = make_traced(torch.relu, executor="llvm", executor_parameters={"strict": True})
    assert not is_replayed(strict(x))


def test_a_layer_is_trained_as_in_eager() -> None:
    torch.manual_seed(0)
    eager, mine = nn.Conv1d(3, 4, 3), nn.Conv1d(3, 4, 3)
    mine.load_state_dict(eager.state_dict())
    traced = make_traced(mine, executor=DEFAULT)
    x = torch.randn(2, 3, 8)
    for model, layer in ((eager, eager), (traced, mine)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(eager.weight, mine.weight)
    assert torch.equal(eager.bias, mine.bias)  # type: ignore[arg-type]
