"""Backward passes that are differentiated themselves: `create_graph=True` through traced functions."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from primexec import CaptureError, PrimexecError, make_traced
from tests.programs.opaque import Cube

EXECUTORS = pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=["aten", "llvm"])


class OwnSecond(Cube):
    """What its backward pass is made of has a derivative of its own: twice the right one."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Derivative.apply(gradient, ctx.saved_tensors[0])


class Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Any:
        ctx.save_for_backward(gradient, x)
        return 3 * gradient * x**2

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> Any:
        gradient, x = ctx.saved_tensors
        return 3 * second * x**2, 12 * second * gradient * x


class Once(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 3 * gradient * ctx.saved_tensors[0] ** 2


class Drawing(Cube):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.saved_tensors[0] * torch.rand_like(gradient)


def layers() -> nn.Sequential:
    torch.manual_seed(1)
    made = nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)
    return nn.Sequential(*made).double()


def images() -> nn.Sequential:
    torch.manual_seed(2)
    made = nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 3, (1, 3)), nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d((1, 2))
    return nn.Sequential(*made).double()


def with_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        size = x.norm()
    return x.pow(3) / size * x.detach()


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[0] = x[1].exp()
    return y.sin_().pow(2)


def several(x: Tensor) -> Any:
    y = x.relu().exp()
    return y.sin(), y.cos() * x, x > 0, y.view(-1)[:3], x.T


INDEX = torch.tensor([[0, 1, 1, 0, 4]] * 4)
MODEL, IMAGES = layers(), images()
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "modules": MODEL,
    "images": IMAGES,
    "an input that is not kept": lambda x: MODEL(x.relu() + 1),
    "a result that is kept": lambda x: (x + 1).tanh(),
    "nothing but inputs is kept": lambda x: (x.sin() * x.exp()).cos(),
    "nothing is kept that may tie": lambda x: (x + 1).relu() * 3,
    "several": several,
    "in place": in_place,
    "without grad": with_no_grad,
    "softmax": lambda x: F.cross_entropy(x * x, torch.tensor([1, 0, 2, 3])),
    "attention": lambda x: (x @ x.T / 3).softmax(1) @ x,
    "at places": lambda x: torch.zeros(4, 5).double().scatter_add(1, INDEX, x[:, [0, 0, 2, 1, 4]].pow(3)).exp(),
    "masks": lambda x: torch.where(x > 0, x.exp(), x.clamp(-0.5, 0.5).pow(3)),
    "by values": lambda x: x.prod(1).exp() + x.relu().prod(1) + x.masked_fill(x > 0, 2).pow(3).sum(1),
    "complex": lambda x: torch.fft.rfft(x).abs().pow(2),
    "solves": lambda x: torch.linalg.solve(x[:, 1:] * x[0, 0], x[:, :2]).sin(),
    "determinants": lambda x: (torch.linalg.det(x[:, 1:] * 2), torch.linalg.slogdet(x[:, :4] * 2)[1]),
    "logdet": lambda x: torch.logdet(x @ x.T + torch.eye(4, dtype=x.dtype)),
    "products at places": lambda x: (x * 2).scatter_reduce(1, INDEX, x, "prod"),
    "a checkpoint": lambda x: checkpoint(lambda a: F.dropout((a * a).tanh(), 0.5).sin(), x, use_reentrant=False),
}


def inputs(leaf: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    return x, x if leaf else x * 1.5


def derivatives(fn: Callable[[Tensor], Any], leaf: bool) -> list[Any]:
    """First, second and third ones, whether each may be differentiated, and the state of the generator."""
    for module in (MODEL, IMAGES):
        for buffer in module.buffers():
            buffer.zero_()
    x, given = inputs(leaf)
    results = fn(given)
    roots = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
    wanted = [x, *MODEL.parameters(), *IMAGES.parameters()]
    found: list[Any] = []
    gradients = [torch.randn_like(r).requires_grad_(i % 2 == 0) for i, r in enumerate(roots)]
    for order in range(3):
        first = torch.autograd.grad(roots, wanted, gradients, create_graph=order < 2, allow_unused=True)
        found += [g if g is None else (g.requires_grad, g.detach()) for g in first]
        roots = [g for g in first if g is not None and g.requires_grad]
        if order == 0:  # what arrives in first derivatives arrives together with what arrives in second ones
            roots += [r * r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
        gradients = [torch.randn_like(g) for g in roots]
        if not roots:
            break
    return [*found, torch.get_rng_state()]


@pytest.mark.parametrize(("leaf", "executor"), [(True, "aten"), (False, "aten"), (False, ("llvm", "aten"))])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_eager(name: str, leaf: bool, executor: Any) -> None:
    fn = FUNCTIONS[name]
    traced = make_traced(fn, executor=executor)
    expected = derivatives(fn, leaf)
    for _ in range(2):
        torch.testing.assert_close(derivatives(traced, leaf), expected)
    assert traced.cache_info()[:3] == (1, 1, 1)


@pytest.mark.parametrize("fn", [torch.linalg.det, lambda x: x.scatter_reduce(1, INDEX, x * 2, "prod").sum()])
def test_where_formulas_of_first_derivatives_have_no_right_one(fn: Any) -> None:
    """First derivatives are eager's; what is differentiated again raises, in eager in part later."""
    x = torch.zeros(4, 5 if fn is not torch.linalg.det else 4, dtype=torch.float64, requires_grad=True)
    traced = make_traced(fn)
    torch.testing.assert_close(torch.autograd.grad(traced(x), x), torch.autograd.grad(fn(x), x))
    with pytest.raises(RuntimeError, match="is differentiated"):
        torch.autograd.grad(traced(x), x, create_graph=True)


@EXECUTORS
def test_derivatives_are_those_of_finite_differences(executor: Any) -> None:
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x, _ = inputs(leaf=True)
    traced = make_traced(lambda x, w: (torch.tanh(x.exp() @ w).sin(), (x * x).sum(1)), executor=executor)
    assert torch.autograd.gradgradcheck(traced, (x, w))
    assert traced.cache_info().traces == 1


@EXECUTORS
def test_gradient_penalty(executor: Any) -> None:
    """A critic that is trained, with the norm of its gradient."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 8), nn.GELU())
    embedding, head = nn.Embedding(5, 8), nn.Linear(8, 1)
    models = [nn.ModuleList((critic, embedding, head)), nn.ModuleList((critic, embedding, head))]
    models[1] = copy.deepcopy(models[0])
    for parts, trace in zip(models, (lambda f: f, lambda f: make_traced(f, executor=executor)), strict=True):

        def score(x: Tensor, label: Tensor, parts: Any = parts) -> Any:
            return parts[2](parts[0](x) * parts[1](label)).squeeze(1)

        fn, optimizer = trace(score), torch.optim.Adam(parts.parameters(), 0.01)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            real, fake = torch.randn(2, 6, 1, 8, 8, generator=generator)
            label = torch.randint(5, (6,), generator=generator)
            between = torch.lerp(real, fake, 0.3).requires_grad_()
            (slope,) = torch.autograd.grad(fn(between, label).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            loss = fn(fake, label).mean() - fn(real, label).mean() + 10 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert fn.cache_info()[1:3] == (2, 2)
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@EXECUTORS
def test_network_that_solves_an_equation(executor: Any) -> None:
    """u'' + u = 0 by the derivatives of a network, and its parameters' gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1)).double()
    traced = make_traced(model, executor=executor)

    def gradients(u: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(1).requires_grad_()
        y = u(x)
        (dy,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (ddy,) = torch.autograd.grad(dy.sum(), x, create_graph=True)
        return list(torch.autograd.grad((ddy + y).square().mean() + y[0].square().sum(), list(model.parameters())))

    expected = gradients(model)
    for _ in range(2):
        torch.testing.assert_close(gradients(traced), expected)
    assert traced.cache_info()[:3] == (1, 1, 1)


@EXECUTORS
def test_products_with_the_hessian(executor: Any) -> None:
    def fn(x: Tensor) -> Tensor:
        return (x.exp() * x.roll(1)).tanh().sum() + x.pow(3).prod()

    traced, x = make_traced(fn, executor=executor), torch.linspace(-1, 2, 4, dtype=torch.float64)
    of = torch.autograd.functional
    for ask in (of.hessian, lambda f, x: of.hvp(f, x, x + 1), lambda f, x: of.vhp(f, x, x + 1)):
        torch.testing.assert_close(ask(traced, x), ask(fn, x))
    assert traced.cache_info().traces == 1


def test_learning_to_learn() -> None:
    """The gradient of a loss after a step, by what the step was made from."""
    w, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 5), (3,)))
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return F.smooth_l1_loss(torch.tanh(F.linear(x, w, b)), y)

    def after(loss: Any) -> Any:
        fast = [w, b]
        for _ in range(3):
            steps = torch.autograd.grad(loss(*fast), fast, create_graph=True)
            fast = [p - 0.4 * g for p, g in zip(fast, steps, strict=True)]
        return torch.autograd.grad(loss(*fast), [w, b])

    traced = make_traced(loss, executor=("llvm", "aten"))
    torch.testing.assert_close(after(traced), after(loss))
    assert traced.cache_info().traces == 1


@EXECUTORS
def test_custom_functions(executor: Any) -> None:
    for function in (Cube, OwnSecond):
        x, _ = inputs(leaf=True)
        found = []
        for fn in (function.apply, make_traced(lambda x, f=function: f.apply(x) + 0, executor=executor)):
            (first,) = torch.autograd.grad(fn(x.sin()).sum(), x, create_graph=True)
            found.append((first, *torch.autograd.grad(first.sum(), x)))
        torch.testing.assert_close(found[1], found[0])


def test_what_is_differentiable_once_only() -> None:
    x, _ = inputs(leaf=True)
    (first,) = torch.autograd.grad(make_traced(lambda x: Once.apply(x.sin()).exp())(x).sum(), x, create_graph=True)
    with pytest.raises(CaptureError, match=r"differentiable once only(?s:.)*primexec.disable"):
        first.sum().backward()


def test_hooks_that_would_get_gradients_apart() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: g.clamp(-1, 1))
        return y.exp()

    traced = make_traced(fn)
    x, _ = inputs(leaf=True)
    y, mine = fn(x), traced(x)
    (expected,), (first,) = (torch.autograd.grad(r.sum(), x, create_graph=True) for r in (y, mine))
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x), torch.autograd.grad(expected.sum(), x))
    mine = traced(x)
    (first,) = torch.autograd.grad(mine.sum(), x, create_graph=True)
    with pytest.raises(PrimexecError, match=r"arrive together(?s:.)*primexec.disable"):
        (first.sum() + mine.sum()).backward()


def test_backward_pass_that_draws() -> None:
    x, _ = inputs(leaf=True)
    (first,) = torch.autograd.grad(make_traced(lambda x: Drawing.apply(x).sin())(x).sum(), x, create_graph=True)
    with pytest.raises(
        CaptureError, match=r"draws random numbers\n  File .*in Drawing.backward\n.*(?s:.)*primexec.disable"
    ):
        first.sum().backward()


def test_what_was_changed_meanwhile_is_an_error_as_in_eager() -> None:
    w = torch.ones(5, dtype=torch.float64)
    traced = make_traced(lambda x, w: (x * w).exp())
    x, _ = inputs(leaf=True)
    y = traced(x, w)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_what_cannot_be_differentiated_again_does_not_require_grad() -> None:
    w = torch.randn(5, 3, requires_grad=True)
    traced = make_traced(lambda x: (x @ w).sum(1))
    x = torch.randn(4, 5, requires_grad=True)
    of_x, of_w = torch.autograd.grad(traced(x).sum(), (x, w), create_graph=True)
    assert of_x.requires_grad
    assert of_w.requires_grad
    (fixed,) = torch.autograd.grad(make_traced(lambda x: (x * 3 + 1).sum(1))(x).sum(), x, create_graph=True)
    assert not fixed.requires_grad


def test_passes_free_what_they_keep() -> None:
    traced, kept = make_traced(lambda x: (x + 1).exp().sin(), executor="aten"), []
    for _ in range(2):
        x, _ = inputs(leaf=True)
        y = traced(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        kept += map(weakref.ref, (y.grad_fn, first.grad_fn))
        first.sum().backward(retain_graph=True)
        (first * y).sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            first.sum().backward()
    del x, _, y, first
    gc.collect()
    assert [of() for of in kept] == [None] * 4


@EXECUTORS
def test_gradients_that_are_negated_by_a_bit(executor: Any) -> None:
    def fn(x: Tensor) -> Tensor:
        return (x * x).exp().sin() * x + 1

    traced = make_traced(fn, executor=executor)
    x, _ = inputs(leaf=True)
    gradient = torch.complex(x, x + 1).detach().conj().imag
    assert gradient.is_neg()
    for twice in (False, True):
        asked = [torch.autograd.grad(f(x), x, gradient, create_graph=twice)[0] for f in (fn, traced)]
        torch.testing.assert_close(asked[1], asked[0])
