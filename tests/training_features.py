"""What training loops do with a function: procedures that train, and return all that they saw.

Each takes `trace` (the identity, or `make_traced`); how many programs it may trace is part of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Trace = Callable[..., Any]
Feature = Callable[[Trace], Any]
FEATURES: dict[str, tuple[Feature, int]] = {}


def feature(traces: int = 1) -> Callable[[Feature], Feature]:
    def enter(procedure: Feature) -> Feature:
        FEATURES[procedure.__name__] = procedure, traces
        return procedure

    return enter


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))


def rows(seed: int = 1, *shape: int) -> Tensor:
    return torch.randn(shape or (5, 6), generator=torch.Generator().manual_seed(seed))


def leaf(seed: int = 1, *shape: int) -> Tensor:
    return rows(seed, *shape).requires_grad_()


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@feature()
def backward(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    x = leaf()
    loss = run(x).square().sum()
    loss.backward()
    return loss, x.grad, grads(model)


@feature()
def autograd_grad(trace: Trace) -> Any:
    run = trace(lambda a, b: (a * b).sin() + b)
    a, b = leaf(1), leaf(2)
    both = torch.autograd.grad(run(a, b).sum(), (a, b))
    one = torch.autograd.grad(run(a, b).sum(), a)
    return both, one, a.grad


@feature()
def closed_over_tensor(trace: Trace) -> Any:
    weight = leaf(3, 6, 2)
    run = trace(lambda x: torch.tanh(x @ weight))
    for seed in range(3):
        run(rows(seed)).sum().backward()
    return weight.grad


@feature()
def gradient_accumulation(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    for seed in range(4):
        (run(rows(seed)).square().mean() / 4).backward()
    return grads(model)


@feature()
def retain_graph(trace: Trace) -> Any:
    model = mlp()
    loss = trace(model)(rows()).square().sum()
    loss.backward(retain_graph=True)
    first = [g.clone() for g in grads(model) if g is not None]
    loss.backward()
    return first, grads(model)


@feature()
def two_forwards_before_one_backward(trace: Trace) -> Any:
    model = mlp(0.3)
    run = trace(model)
    one, other = run(rows(1)), run(rows(2))
    (one * other).sum().backward()
    return grads(model)


@feature()
def backwards_in_the_other_order(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    losses = [run(rows(seed)).square().sum() for seed in range(3)]
    for loss in reversed(losses):
        loss.backward()
    return grads(model)


def tensor_hooks(trace: Trace) -> Any:
    run = trace(lambda x, w: torch.tanh(x @ w))
    x, w = leaf(1), leaf(2, 6, 3)
    seen: list[Tensor] = []
    w.register_hook(lambda g: seen.append(g.clone()))
    x.register_hook(lambda g: g * 2)
    w.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    for _ in range(2):
        out = run(x, w)
        out.register_hook(lambda g: g + 1)
        out.sum().backward()
    return seen, x.grad, w.grad


feature()(tensor_hooks)


@feature()
def hook_on_a_parameter(trace: Trace) -> Any:
    model = mlp()
    model[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
    run = trace(model)
    run(rows()).sum().backward()
    run(rows(2)).sum().backward()
    return grads(model)


@feature()
def full_backward_hook_of_a_module(trace: Trace) -> Any:
    model = mlp()
    model[1].register_full_backward_hook(lambda module, given, made: (given[0] * 3,))
    run = trace(model)
    for seed in range(2):
        run(rows(seed)).sum().backward()
    return grads(model)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def ten_steps(make: Callable[[Any], torch.optim.Optimizer], clip: float | None = None) -> Feature:
    def procedure(trace: Trace) -> Any:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        run, optimizer = trace(model), make(model.parameters())
        losses, norms = [], []
        for seed in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(run(rows(seed)), torch.arange(5) % 3)
            loss.backward()
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
            losses.append(loss.detach())
        return losses, norms, values(model)

    return procedure


FEATURES |= {f"ten steps of {name}": (ten_steps(make), 1) for name, make in OPTIMIZERS.items()}
FEATURES["gradient clipping"] = ten_steps(OPTIMIZERS["SGD"], clip=0.1), 1


def scaled(dtype: torch.dtype) -> Feature:
    def procedure(trace: Trace) -> Any:
        model = mlp(0.2)
        run = trace(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        seen = []
        for seed in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                out = run(rows(seed))
                loss = out.float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            seen.append((out.detach(), loss.detach(), scaler.get_scale()))
        return seen, values(model)

    return procedure


FEATURES["GradScaler, bfloat16"] = scaled(torch.bfloat16), 1
FEATURES["GradScaler, float16"] = scaled(torch.float16), 1


class Checkpointed(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = mlp(dropout), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def checkpointed(dropout: float) -> Feature:
    def procedure(trace: Trace) -> Any:
        model = Checkpointed(dropout)
        run = trace(model)
        x = leaf()
        for _ in range(2):
            run(x).square().sum().backward()
        return x.grad, grads(model)

    return procedure


FEATURES["checkpoint"] = checkpointed(0.0), 1
FEATURES["checkpoint with dropout"] = checkpointed(0.5), 1


class Straight(torch.autograd.Function):
    """Rounds; its gradient is made up, so that a derived one would be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.abs() + 7


@feature()
def custom_function(trace: Trace) -> Any:
    run = trace(lambda x: Straight.apply(x * 3).sum())
    x = leaf()
    for _ in range(2):
        run(x).backward()
    return x.grad


def partly_without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x @ w).abs().mean()
    return (x @ w) / scale + x.detach().sum() * w.sum()


@feature()
def no_grad_and_detach_inside(trace: Trace) -> Any:
    run = trace(partly_without_grad)
    x, w = leaf(1), leaf(2, 6, 3)
    for _ in range(2):
        out = run(x, w)
        out.sum().backward()
    return out, x.grad, w.grad


@feature()
def outputs_that_do_not_require_grad(trace: Trace) -> Any:
    run = trace(lambda x: (x.exp(), x.detach() * 2, x.argmax(1), x > 0, (x * 3).detach(), 5))
    x = leaf()
    out = run(x)
    out[0].sum().backward()
    return out, [t.requires_grad for t in out[:-1]], [t.is_leaf for t in out[:-1]], x.grad


@feature()
def frozen_parameters(trace: Trace) -> Any:
    model = mlp()
    model[0].requires_grad_(False)
    run = trace(model)
    for seed in range(2):
        run(rows(seed)).sum().backward()
    return grads(model)
