"""Backward passes that are differentiated themselves (`create_graph=True`).

Such a pass is one node of autograd's graph. It is a function of what the program was made of and of the gradients that
arrived, and what it saves is what the program saved, and those gradients. Its own backward program is recorded from the
same autograd graph of the capture, runs the pass again, and gives all gradients: those of the gradients that arrived,
and those of the program's inputs. Where these are neither saved nor leaves, the pass cannot be tied to them: it is tied
to the program's node, whose edges lead there, and leaves the gradients with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from primexec import _torch_autograd
from primexec.errors import PrimexecError
from primexec.joint import strides_of

NOT_DIFFERENTIABLE = 3  # leading arguments of the `forward` of a program's node
LINK = torch.empty(0)  # its aliases tie passes to the node that they went over; they have no gradients


def gradients_of(context: Any, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """What a node gives back where its pass is to be differentiated, or where passes over it left gradients with it.

    Args:
        context: of a program's node, or of a pass.
        gradients: that arrive there.
    """
    training, recorder = context.training, context.training.joint.recorder
    if any(g is not None and _torch_autograd.is_batched(g) for g in gradients):
        raise PrimexecError(
            f"second derivatives of {recorder.name} are asked for in batches (is_grads_batched=True, vectorize=True)\n"
            "What to do: ask for one after the other, or call the function inside `with primexec.disable():`"
        )
    gradients = tuple(None if g is None else g.resolve_conj().resolve_neg() for g in gradients)
    found = context.left.pop(_torch_autograd.graph_task(), [])
    if not found or any(g is not None for g in gradients):
        saved, ties = training.held(context)
        twice = torch.is_grad_enabled()
        strides = tuple(None if g is None else strides_of(g) for g in gradients)
        differentiable = tuple(g is not None and g.requires_grad for g in gradients) if twice else None
        passes = (*context.passes, (strides, _needed(context), differentiable))
        run = training.backward(passes)
        if twice:
            below = context if training.is_tied(context) else None
            found.append(_apply(training, run, below, passes, saved, *ties, *gradients)[:-1])
        else:
            with _torch_autograd.autocast_off():
                found.append(run(saved, *gradients)[NOT_DIFFERENTIABLE:])
    if len(found) > 1 and not recorder.is_linear:
        raise PrimexecError(
            f"gradients of first and of second derivatives of {recorder.name} arrive together, and hooks or custom "
            "functions inside of it would be given them apart\n"
            "What to do: call the function inside `with primexec.disable():`, or once for each"
        )
    return [_sum(of_one) for of_one in zip(*found, strict=True)]


def _sum(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    total: Tensor | None = None
    for gradient in gradients:
        total = gradient if total is None else total if gradient is None else total + gradient
    return total


def _needed(context: Any) -> tuple[bool, ...]:
    """Which gradients are asked for: of the inputs of the program, and of what arrived at the passes over it."""
    needed = _torch_autograd.needed_gradients(context)
    if context.below is None:
        return needed
    below, *arrived = needed
    return (*(below and need for need in _needed(context.below)), *arrived)


class _Pass(torch.autograd.Function):
    """One backward pass.

    `below` is the node that it is tied to, None where it is tied to the program's inputs; `passes` are those up to it.
    """

    @staticmethod
    def forward(ctx: Any, training: Any, run: Any, below: Any, passes: Any, saved: list[Tensor], *tensors: Any) -> Any:
        ctx.training, ctx.below, ctx.passes = training, below, passes
        gradients = tensors[len(tensors) - len(passes[-1][0]) :]
        ctx.set_materialize_grads(False)
        tie = LINK.detach()
        ctx.save_for_backward(*saved, *(g for g in gradients if g is not None), tie)
        with _torch_autograd.autocast_off():
            found = run(saved, *gradients)[NOT_DIFFERENTIABLE:]
        # Each is a tensor of its own to autograd, whatever the program returns twice, or as it is.
        found = [None if g is None else g.detach() for g in found]
        marks = zip(found, training.differentiable[passes], strict=True)
        ctx.mark_non_differentiable(*(g for g, differs in marks if g is not None and not differs))
        return (*found, tie)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found = gradients_of(ctx, gradients[:-1])
        arrived = [strides is not None for strides in ctx.passes[-1][0]]
        border = len(found) - sum(arrived)
        below, own = found[:border], iter(found[border:])
        if ctx.below is not None:
            if any(g is not None for g in below):
                left = ctx.below.__dict__.setdefault("left", {})
                left.setdefault(_torch_autograd.graph_task(), []).append(below)
            below = [None]
        return (*[None] * 5, *below, *(next(own) if there else None for there in arrived))


_apply: Any = _Pass.apply


def prepare(function: Any) -> None:
    """Let the nodes of a custom function be such that no pass went over them yet."""
    made = function._backward_cls
    made.passes, made.below, made.left = (), None, {}


prepare(_Pass)
