"""More procedures that train: state, aliasing, and gradients that are absent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.training_features import FEATURES, Feature, Trace, feature, grads, leaf, mlp, rows, values

__all__ = ["FEATURES"]  # complete once this file has added its own


@feature(traces=2)
def parameters_frozen_later(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    run(rows()).sum().backward()
    model[0].requires_grad_(False)
    run(rows(2)).sum().backward()
    return grads(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@feature()
def shared_parameters(trace: Trace) -> Any:
    model = Tied()
    run = trace(model)
    for seed in range(2):
        run(rows(seed)).square().sum().backward()
    return grads(model)


@feature()
def buffers_of_batch_norm(trace: Trace) -> Any:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    run = trace(model)
    for seed in range(3):
        run(rows(seed, 2, 2, 6, 6)).square().sum().backward()
    return grads(model), values(model)


@feature(traces=2)
def batch_norm_of_half_precision(trace: Trace) -> Any:
    model = nn.BatchNorm2d(2)  # float32, beside which statistics of half precision are float32
    run = trace(model)
    for seed, dtype in enumerate((torch.bfloat16, torch.float16)):
        run(rows(seed, 2, 2, 6, 6).to(dtype)).square().sum().backward()
    return grads(model), values(model)


def masked_loss(x: Tensor) -> Tensor:
    mask = x[:, 0] > 0
    return F.mse_loss(x[mask], x.roll(1, 0)[mask]) + (x * x)[x > 0].mean()


def written_where_negative(x: Tensor) -> Tensor:
    y = x * 1
    y[y < 0] *= 0.1
    return y


def dispatched(x: Tensor) -> Tensor:
    """As a mixture of experts: rows to the expert that they choose."""
    out = torch.zeros_like(x)
    for expert in range(3):
        chosen = torch.where(x.argmax(-1) == expert)[0]
        out = out.index_add(0, chosen, x[chosen] * x.softmax(-1)[chosen, expert, None])
    return out


@feature(traces=3)
def sizes_that_depend_on_data(trace: Trace) -> Any:
    seen = []
    for fn in (masked_loss, written_where_negative, dispatched):
        run = trace(fn)
        for seed in range(4):
            x = leaf(seed)
            y = run(x - 9) if seed == 3 else run(x)  # at the end nothing is positive
            y.square().sum().backward()
            seen += [y, x.grad]
    return seen


@feature(traces=2)
def lstm_with_its_backward(trace: Trace) -> Any:
    model = nn.LSTM(6, 4)

    def step(x: Tensor) -> None:
        model(x)[0].sum().backward()

    run = trace(step)
    for seed in range(2):
        run(rows(seed, 3, 2, 6))
    return grads(model)


@feature()
def dropout(trace: Trace) -> Any:
    run = trace(mlp(0.5))
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = leaf(seed)
        out = run(x)
        out.sum().backward()
        seen.append((out.detach(), x.grad, torch.get_rng_state()))
    return seen


@feature()
def dropout_of_attention(trace: Trace) -> Any:
    run = trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True))
    q, k, v = (leaf(seed, 2, 2, 5, 4) for seed in range(3))
    torch.manual_seed(3)
    for _ in range(2):
        run(q, k, v).square().sum().backward()
    return q.grad, k.grad, v.grad, torch.get_rng_state()


@feature()
def views_of_inputs(trace: Trace) -> Any:
    run = trace(lambda x: (x.t(), x[1:], x * 2))
    x = torch.arange(30.0).view(5, 6).requires_grad_()  # sums are exact: eager adds up in another order
    t, tail, double = run(x)
    (t.square().sum() + tail.sum() * 3 + double.square().sum()).backward()
    return t, tail, x.grad, [o.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for o in (t, tail)]


@feature()
def only_views_of_inputs(trace: Trace) -> Any:
    run = trace(lambda x: x.view(-1)[::2])
    x = leaf()
    run(x).square().sum().backward()
    return x.grad


@feature()
def outputs_that_alias_each_other(trace: Trace) -> Any:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.sin()
        return y, y.t(), y[0]

    x = leaf()
    y, t, first = trace(fn)(x)
    (y.sum() + t.square().sum() + first.exp().sum()).backward()
    return y, t, first, x.grad, [o.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for o in (t, first)]


@feature()
def output_that_is_an_input(trace: Trace) -> Any:
    run = trace(lambda x, w: (x, x * w))
    x, w = leaf(1), leaf(2)
    same, product = run(x, w)
    (same.sum() + product.sum()).backward()
    return same is x, x.grad, w.grad


@feature()
def the_same_output_twice(trace: Trace) -> Any:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y

    x = leaf()
    one, other = trace(fn)(x)
    (one * other).sum().backward()
    return one is other, x.grad


@feature()
def an_output_that_is_not_used(trace: Trace) -> Any:
    run = trace(lambda x: (x * 2, x.log()))
    x = torch.zeros(3, requires_grad=True)
    for _ in range(2):
        run(x)[0].sum().backward()
    assert not x.grad.isnan().any()
    return x.grad


@feature()
def gradients_of_zero_are_no_absent_gradients(trace: Trace) -> Any:
    run = trace(lambda x: (x * 2, x.log()))
    x = torch.zeros(3, requires_grad=True)
    double, log = run(x)
    (double.sum() + log.sum() * 0).backward()
    assert x.grad.isnan().all()
    return x.grad


@feature()
def unused_parameters_and_inputs(trace: Trace) -> Any:
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    run = trace(lambda x, y: model["used"](x))
    x, y = leaf(1), leaf(2)
    run(x, y).sum().backward()
    return grads(model), x.grad, y.grad


@feature()
def saved_twice(trace: Trace) -> Any:
    def fn(x: Tensor) -> Tensor:
        y = x.exp()
        return y * y + y.sin() * y

    x = leaf()
    trace(fn)(x).sum().backward()
    return x.grad


@feature()
def intermediate_changed_in_place(trace: Trace) -> Any:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y[1:].mul_(3).add_(x[1:])
        y[0] = x.sum()
        return y.sin_()

    run = trace(fn)
    x = leaf()
    for _ in range(2):
        run(x).square().sum().backward()
    return x.grad


@feature()
def input_that_is_not_a_leaf(trace: Trace) -> Any:
    run = trace(lambda x, w: torch.relu(x @ w))
    x, w = leaf(1), leaf(2, 6, 6)
    out = x
    for _ in range(3):
        out = run(out * 1.5, w)
    out.sum().backward()
    return x.grad, w.grad


@feature(traces=2)
def inference_after_training(trace: Trace) -> Any:
    model = mlp()
    run = trace(model)
    run(rows()).sum().backward()
    with torch.no_grad():
        quiet = run(rows())
    run(rows(2)).sum().backward()
    return quiet, quiet.requires_grad, grads(model)


@feature()
def complex_numbers(trace: Trace) -> Any:
    run = trace(lambda x: torch.fft.rfft(x).abs().square().log1p())
    x = leaf()
    for _ in range(2):
        run(x).sum().backward()
    return x.grad


@feature()
def gradients_of_other_strides(trace: Trace) -> Any:
    run = trace(lambda x, w: x @ w)
    x, w = leaf(1), leaf(2, 6, 5)
    run(x, w).sum().backward()
    run(x, w).t().contiguous().square().sum().backward()
    run(x, w).backward(rows(4, 5, 5).t())
    return x.grad, w.grad


@feature()
def saved_tensors_hooks(trace: Trace) -> Any:
    run = trace(mlp())
    x = leaf()
    with torch.autograd.graph.save_on_cpu():
        out = run(x)
    out.square().sum().backward()
    return x.grad


@feature()
def anomaly_mode(trace: Trace) -> Any:
    run = trace(lambda x: x.sqrt().sum())
    x = rows().abs().requires_grad_()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        run(x).backward()
    return x.grad


def changed_in_place(change: Any) -> Feature:
    """A procedure around `change(x, w, b)`, which writes to the result of a product or to a reshaped copy."""

    def procedure(trace: Trace) -> Any:
        run = trace(change)
        x, w, b = leaf(1, 2, 3, 4), leaf(2, 4, 5), leaf(3, 5)
        out = run(x, w, b)
        for each in out if isinstance(out, tuple) else (out,):
            each.square().sum().backward(retain_graph=True)
        return out, x.grad, w.grad, b.grad

    return procedure


def written_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x @ w
    h[:, 0] = b
    h[:, 1] += b
    return h


def with_its_sum(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w.t())
    h *= b
    return h, h.sum()


def with_its_source(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    h = torch.ops.aten._unsafe_view(y, [6, 4])
    return y, h.sin_()


def through_a_view(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x @ w
    h.view(6, 5).sigmoid_()
    return h


for name, change in {
    "matmul, added to": lambda x, w, b: (x @ w).add_(b),
    "matmul in batches, scaled": lambda x, w, b: (x @ w.expand(2, 4, 5)).mul_(b),
    "linear without bias, ReLU in place": lambda x, w, b: F.relu(F.linear(x, w.t()), inplace=True),
    "matmul, masked": lambda x, w, b: (x @ w).masked_fill_(x[..., :1] > 0, 0.5),
    "reshape, scaled": lambda x, w, b: (x * 2).transpose(0, 1).reshape(6, 4).mul_(b[:4]),
    "flatten, clamped": lambda x, w, b: (x * 2).transpose(0, 1).flatten(0, 1).clamp_(-0.5, 0.5),
    "matmul, squeezed": lambda x, w, b: (x[:, :1] @ w).squeeze_().mul_(b),
    "matmul, scaled, views": lambda x, w, b: ((h := (x @ w).mul_(b)).view(-1), h.transpose(0, 1)),
    "a view written to": lambda x, w, b: (x @ w).view(6, 5).mul_(b),
    **{f.__name__: f for f in (written_rows, with_its_sum, with_its_source, through_a_view)},
}.items():
    FEATURES[f"changed in place: {name}"] = changed_in_place(change), 1
