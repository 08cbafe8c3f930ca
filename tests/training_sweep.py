"""Trains through torch's own samples, traced and eagerly: outputs, gradients and everything left behind.

As tests/sweep.py, but under grad mode and with a backward pass. The first call of a sample uses all outputs and
accumulates into `.grad`; the second one, a cache hit with other values, differentiates the last output alone by
the last input, with the expanded gradient that `sum()` gives; the third asks for second derivatives.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.observe import (
    Call,
    Kind,
    Observed,
    alike,
    compare,
    copied,
    leaves_of,
    sharing,
    state_of,
    untouched,
)
from tests.sweep import (
    HIT,
    MODULES,
    OPS,
    SEEDS,
    TRACED,
    Pair,
    Result,
    Subject,
    counts,
    seed_everything,
)

Loss = Callable[[Any], Any]
RAN = (Kind.SAME, Kind.CLOSE)

# Entries whose gradients raise CaptureError for some sample though their forward pass is traced, and entries whose
# gradients are equal within tolerance only: entry → reason. A name that no longer needs its place fails its test.
NOT_TRAINED: dict[str, str] = {}
INEXACT_GRADIENTS: dict[str, str] = {
    "nn.LinearCrossEntropyLoss#54": "eager itself rounds so wherever a dispatch mode watches its backward pass, "
    "even one that does nothing",
}

SECOND = "second derivatives"
# Entries whose second derivatives are not eager's: entry → what alone differs, and why. The values of cumprod are
# equal to 1e-15 in float64.
OTHER_SECOND: dict[str, tuple[str, str]] = {
    "cumprod": ("values", "eager chooses a formula by values; the one that is always right rounds elsewhere"),
    "linalg.eig": ("stride", "under create_graph fake tensors take another path"),
    "ormqr": ("stride", "under create_graph fake tensors take another path"),
}

DIFFERENTIABLE = [
    name for name, op in OPS.items() if op.supports_autograd and torch.float32 in op.supported_backward_dtypes("cpu")
]


class Use(enum.Enum):
    """What a step does with the results."""

    ALL = "backward from every output"
    LAST = "the gradient of the last output by the last input"
    TWICE = SECOND


def cotangent(tensor: Tensor, use: Use, position: int) -> Tensor:
    if use is Use.LAST:
        return torch.full((), 0.5, dtype=tensor.dtype).expand(tensor.shape)
    generator = torch.Generator().manual_seed(position)
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def differentiate(outputs: list[Any], wanted: list[Tensor], use: Use) -> list[Tensor | None]:
    roots = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not roots or not wanted:
        return []
    if use is Use.LAST:
        roots, wanted = roots[-1:], wanted[-1:]
    tangents = [cotangent(root, use, position) for position, root in enumerate(roots)]
    if use is Use.ALL:
        torch.autograd.backward(roots, tangents)
        return [tensor.grad for tensor in wanted]
    first = torch.autograd.grad(roots, wanted, tangents, create_graph=use is Use.TWICE, allow_unused=True)
    if use is Use.LAST:
        return list(first)
    again = [gradient for gradient in first if gradient is not None and gradient.requires_grad]
    if not again:
        return list(first)
    tangents = [cotangent(gradient, use, len(roots) + position) for position, gradient in enumerate(again)]
    return [
        *(g if g is None else g.detach() for g in first),
        *torch.autograd.grad(again, wanted, tangents, allow_unused=True),
    ]


def step(fn: Callable[..., Any], call: Call, seed: int, use: Use, loss: Loss) -> Observed:
    """Forward and backward; the gradients are noted as further outputs."""
    inputs = leaves_of(call)
    parameters = list(fn.parameters()) if isinstance(fn, torch.nn.Module) else []
    for parameter in parameters:
        parameter.grad = None
    different = {id(t): t for t in (*inputs, *parameters) if isinstance(t, Tensor) and t.requires_grad}
    output, gradients, error = None, [], None
    leaves: list[Any] = []
    structure = None
    torch.default_generator.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = fn(*call.args, **call.kwargs)
            leaves, structure = pytree.tree_flatten(output)
            gradients = differentiate(pytree.tree_leaves(loss(output)), list(different.values()), use)
        except Exception as raised:
            error = raised.with_traceback(None)
    rng = torch.get_rng_state()
    state = {name: tensor.detach().clone() for name, tensor in state_of(fn).items()}
    shared = sharing([*inputs, *leaves, *(gradients if use is Use.ALL else ())])
    return Observed([*leaves, *gradients], (structure, len(gradients)), inputs, state, shared, rng, error)


class Trained(Pair):
    """A function, traced, next to its original; both are trained.

    `loss` is applied outside of them: eager refuses gradients that the mathematics leaves undefined, such as that
    of the phase of an eigenvector.
    """

    loss: Loss = staticmethod(lambda output: output)

    def check_step(self, call: Call, seed: int, use: Use, legal: tuple[Any, ...]) -> tuple[Kind, str]:
        before = {name: tensor.detach().clone() for name, tensor in state_of(self.traced).items()}
        counted = counts(self.traced)
        expected = step(self.eager, copied(call), seed, use, self.loss)
        mine = copied(call)
        actual = step(self.traced, mine, seed, use, self.loss)
        if isinstance(actual.error, self.subject.capture_error):
            changed = untouched(call, self.traced, before, actual, seed)
            return (Kind.WRONG, changed) if changed else (Kind.CAPTURE, str(actual.error))
        kind, detail = compare(expected, actual, self.values)
        delta = tuple(now - then for now, then in zip(counts(self.traced), counted, strict=True))
        if kind in RAN and delta not in legal:
            return Kind.WRONG, f"counted {delta} (hits, misses, traces)"
        return kind, detail

    def check_sample(self, call: Call, other: Call) -> tuple[Kind, str]:
        kind, detail = self.check_step(call, SEEDS[0], Use.ALL, (HIT, TRACED))
        if kind not in RAN:
            return kind, detail
        again, detail = self.check_step(other if alike(call, other) else call, SEEDS[1], Use.LAST, (HIT,))
        if again in (Kind.WRONG, Kind.CAPTURE):
            return Kind.WRONG, f"second call: {detail or again}"
        return (kind if again is Kind.RAISED else max(kind, again, key=list(Kind).index)), ""

    def check_second_derivatives(self, call: Call) -> tuple[Kind, str]:
        """Right, or an error of ours that says so."""
        expected = step(self.eager, copied(call), SEEDS[0], Use.TWICE, self.loss)
        actual = step(self.traced, copied(call), SEEDS[0], Use.TWICE, self.loss)
        if isinstance(actual.error, self.subject.error):
            return Kind.CAPTURE, str(actual.error)
        return compare(expected, actual, self.values)


def generate(op: Any, seed: int, limit: int | None) -> list[tuple[Call, Loss]]:
    seed_everything(seed)
    found: list[tuple[Call, Loss]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs_func(op, "cpu", torch.float32, True):
            if limit is not None and len(found) == limit:
                break
            found.append((Call((sample.input, *sample.args), sample.kwargs), sample.output_process_fn_grad))
    return found


def gradient_samples(op: Any, limit: int | None) -> list[tuple[Call, Call, Loss]]:
    """Each call, the call with other values, and what makes of its result something to differentiate."""
    calls, others = (generate(op, seed, limit) for seed in SEEDS)
    pairs = zip(calls, others if len(others) == len(calls) else calls, strict=True)
    return [(call, other, loss) for (call, loss), (other, _) in pairs]


def on_a_clone(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A leaf that requires grad must not be changed in place; a copy of it may."""

    def changed(first: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(pytree.tree_map_only(Tensor, Tensor.clone, first), *args, **kwargs)

    return changed


def sweep_gradients(name: str, limit: int | None, subject: Subject) -> Iterator[Result]:
    op = OPS[name]
    samples = gradient_samples(op, limit)
    pair = Trained(op.op, subject)
    for index, (call, other, loss) in enumerate(samples):
        pair.loss = loss
        kind, detail = pair.check_sample(call, other)
        yield Result(name, "gradients", "float32", index, kind, detail)
        if index == 0 and kind in RAN:
            yield Result(name, SECOND, "float32", index, *pair.check_second_derivatives(call))
    if op.inplace_variant is not None and samples:
        call, other, _ = samples[0]
        kind, detail = Trained(on_a_clone(op.inplace_variant), subject).check_sample(call, other)
        yield Result(name, "gradients, in-place", "float32", 0, kind, detail)


def training_inputs(info: Any, seed: int, limit: int | None) -> list[Any]:
    seed_everything(seed)
    made = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    return list(made)[:limit]


def sweep_training(name: str, limit: int | None, subject: Subject) -> Iterator[Result]:
    """Modules in train mode: the gradients of parameters and inputs, and the buffers afterwards."""
    info = MODULES[name]
    inputs = (training_inputs(info, seed, limit) for seed in SEEDS)
    for index, both in enumerate(zip(*inputs, strict=True)):
        if both[0].forward_input is None:
            continue
        call, other = (Call(tuple(side.forward_input.args), side.forward_input.kwargs) for side in both)
        made = both[0].constructor_input
        seed_everything(SEEDS[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = info.module_cls(*made.args, **made.kwargs).to(torch.float32).train()
            if info.is_lazy:
                with torch.no_grad():
                    module(*copied(call).args, **copied(call).kwargs)
        kind, detail = Trained(module, subject).check_sample(call, other)
        yield Result(name, "training", "float32", index, kind, detail)
