"""Operators of packed sequences, which PyTorch runs as loops over lengths that C++ reads: here each is one operator.

Its gradients are those of PyTorch's own operator, whose graph is kept from forward to backward by the memory of one
more result. In a second pass over the graph, and where that memory was copied, the operator runs again. Like
`_torch.py`, this file touches private names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from primexec._torch import pytree, storage_key
from primexec._torch_autograd import with_autograd
from primexec._torch_capture import rng_operators
from primexec.errors import CaptureError

_TENSOR = object()  # stands among other arguments for a tensor


def stand_in(fn: Any, args: tuple[Any, ...]) -> Any:
    """What runs in place of a call of torch's API; None where the call itself does."""
    if fn not in _rules() or not args[0].is_cpu:
        return None
    name, op = _operators()[fn]
    wanted = [str(a.type) == "Tensor" for a in op._schema.arguments]
    if [isinstance(v, Tensor) for v in args] != wanted:  # other overloads have as many arguments
        return None
    return partial(_call, name, *args)


def _call(name: str, *args: Any) -> Any:
    given = dict(zip((f.name for f in _whole(name)._schema.arguments[1:]), args, strict=False))
    draws = given.get("train") and given.get("dropout") and given["num_layers"] > 1
    state = rng_operators()[1].rng_state() if draws and torch.is_grad_enabled() else None
    leaves, tree = pytree.tree_flatten([*args, state])
    others = [_TENSOR if isinstance(v, Tensor) else v for v in leaves]
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    return _Whole.apply(name, tree, others, wanted, *tensors)  # type: ignore[no-untyped-call]


class _Whole(torch.autograd.Function):
    """An operator that stands for many, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, name: str, tree: Any, others: list[Any], wanted: list[bool], *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.name, ctx.tree, ctx.others = name, tree, others
        *results, kept = _whole(name)(wanted, *_joined(tree, others, tensors))
        ctx.save_for_backward(*tensors, kept)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise CaptureError(
                "a second derivative of an operator of packed sequences is asked for (create_graph=True)",
                hint="keep this part outside of the traced function",
            )
        wanted = ctx.needs_input_grad[4:]
        *tensors, kept = ctx.saved_tensors
        args = _joined(ctx.tree, ctx.others, tensors)
        found = iter(_whole(f"{ctx.name}_gradients")(list(gradients), kept, list(wanted), *args))
        return None, None, None, None, *(next(found) if needed else None for needed in wanted)


def _joined(tree: Any, others: list[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The arguments of an operator."""
    given = iter(tensors)
    leaves = [next(given) if v is _TENSOR else v for v in others]
    return pytree.tree_unflatten(leaves, tree)  # type: ignore[no-any-return]


def _whole(name: str) -> Any:
    return getattr(torch.ops.primexec, name).default


@cache
def _rules() -> dict[Any, tuple[Any, Callable[..., Any]]]:
    """Function of torch's API → its operator, and what makes the results of that on fake tensors."""
    aten = torch.ops.aten
    rules: dict[Any, Callable[..., Any]] = {
        aten._pack_padded_sequence.default: _packed,
        aten._pad_packed_sequence.default: _padded,
        **{getattr(aten, name).data: _layer for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    }
    return {getattr(torch, _plain(op)): (op, rule) for op, rule in rules.items()}


def _plain(op: Any) -> str:
    name: str = op._schema.name.partition("::")[2]
    return name


@cache
def _operators() -> dict[Any, tuple[str, Any]]:
    """Function of torch's API → the name of the operator that stands for it, and PyTorch's own."""
    library = torch.library.Library("primexec", "FRAGMENT")
    found = {}
    for fn, (op, rule) in _rules().items():
        name = f"whole_{_plain(op).strip('_')}"
        arguments, _, returns = str(op._schema).partition("(")[2].rpartition(") -> ")
        arguments = re.sub(r"\bint total_length", "SymInt total_length", arguments) + ", Tensor? state"
        library.define(f"{name}(bool[] wanted, {arguments}) -> {returns.rstrip(')')}, Tensor kept)")
        library.impl(name, partial(_run, op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"primexec::{name}", partial(_results, rule), lib=library)
        name_of_gradients = f"{name}_gradients"
        library.define(f"{name_of_gradients}(Tensor?[] gradients, Tensor kept, bool[] wanted, {arguments}) -> Tensor[]")
        library.impl(name_of_gradients, partial(_run_gradients, op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"primexec::{name_of_gradients}", _gradients, lib=library)
        found[fn] = name, op
    _LIBRARIES.append(library)
    return found


_LIBRARIES: list[Any] = []  # their operators live as long as they do


def _run(op: Any, wanted: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    kept = torch.empty(1, dtype=torch.uint8, device="cpu")
    if not any(wanted):
        return (*op(*args[:-1]), kept)
    ends, leaves, results = _with_graph(op, wanted, args)
    kept.untyped_storage().graph = ends, leaves  # type: ignore[attr-defined]
    return (*(r.detach() for r in results), kept)


def _with_graph(op: Any, wanted: Sequence[bool], args: Sequence[Any]) -> tuple[list[Any], list[Tensor], Any]:
    """What an operator gives under autograd, after the ends of its graph at the results and its leaves."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            leaves.append(value.detach().requires_grad_(wanted[len(leaves)]))
            return leaves[-1]
        return [leaf(v) for v in value] if isinstance(value, (list, tuple)) else value

    given = [leaf(v) for v in args]
    with with_autograd():
        results = op(*given[:-1])
    return [get_gradient_edge(r) if r.requires_grad else None for r in results], leaves, results


def _run_gradients(
    op: Any, gradients: Sequence[Tensor | None], kept: Tensor, wanted: Sequence[bool], *args: Any
) -> list[Tensor]:
    state, graph = args[-1], vars(kept.untyped_storage()).pop("graph", None)  # its nodes free what they kept
    if graph is None:
        with torch.random.fork_rng(devices=(), enabled=state is not None):
            if state is not None:
                torch.default_generator.set_state(state)
            graph = _with_graph(op, wanted, args)[:2]
    ends, leaves = graph
    pairs = [(end, g) for end, g in zip(ends, gradients, strict=True) if g is not None]
    inputs = [t for t, needed in zip(leaves, wanted, strict=True) if needed]
    found = torch.autograd.grad([end for end, _ in pairs], inputs, [g for _, g in pairs])
    return [g.clone(memory_format=torch.contiguous_format) for g in found]


# Results on fake tensors --------------------------------------------------------------------------------


def _results(rule: Callable[..., Any], wanted: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    return (*rule(*args), torch.empty(1, dtype=torch.uint8, device="cpu"))


def _gradients(gradients: Any, kept: Tensor, wanted: Sequence[bool], *args: Any) -> list[Tensor]:
    tensors = [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)]
    return [t.new_empty(t.shape) for t, needed in zip(tensors, wanted, strict=True) if needed]


def _packed(x: Tensor, lengths: Tensor, batch_first: bool, state: None) -> tuple[Tensor, Tensor]:
    batch, time, *others = x.shape if batch_first else (x.shape[1], x.shape[0], *x.shape[2:])
    context = torch.library.get_ctx()
    longest = context.new_dynamic_size(max=time if type(time) is int else None)
    batch_sizes = lengths.new_empty(longest, dtype=torch.int64, device="cpu")
    counts(batch_sizes.fake_mode)[storage_key(batch_sizes)] = batch  # type: ignore[attr-defined]
    return x.new_empty(context.new_dynamic_size(), *others), batch_sizes


def _padded(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: Any, total_length: Any, state: None
) -> tuple[Tensor, Tensor]:
    batch = count(batch_sizes)
    if batch is None:
        batch = torch.library.get_ctx().new_dynamic_size()
    padded = data.new_empty(total_length, batch, *data.shape[1:])
    return padded.transpose(0, 1) if batch_first else padded, batch_sizes.new_empty(batch)


def _layer(
    data: Tensor, batch_sizes: Tensor, hx: Any, params: Any, has_biases: bool, num_layers: int, *others: Any
) -> tuple[Tensor, ...]:
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    directions = states[0].shape[0] // num_layers
    output = data.new_empty(data.shape[0], directions * states[0].shape[2])
    return output, *(s.new_empty(s.shape) for s in states)


# How many sequences there are ---------------------------------------------------------------------------


def counts(mode: Any) -> dict[int, Any]:
    """Memory of batch sizes, by its `storage_key` → the first of them, which is how many sequences there are."""
    return mode.__dict__.setdefault("primexec_counts", {})  # type: ignore[no-any-return]


def count(batch_sizes: Any) -> Any:
    """How many sequences fake batch sizes, or the first of these, tell about; None where that is not known."""
    begins = batch_sizes.dtype is torch.int64 and batch_sizes.storage_offset() == 0
    return counts(batch_sizes.fake_mode).get(storage_key(batch_sizes)) if begins else None


def note_counts(mode: Any, arguments: Any) -> None:
    """Note how many sequences are packed in arguments, where that is the size of a permutation."""
    for value in pytree.tree_leaves(arguments, is_leaf=lambda v: isinstance(v, PackedSequence)):
        if isinstance(value, PackedSequence) and value.sorted_indices is not None:
            counts(mode)[storage_key(value.batch_sizes)] = len(value.sorted_indices)


def forget_counts(mode: Any, op: Any, operands: Any) -> None:
    """Forget what an operator may write to."""
    if mode.__dict__.get("primexec_counts") and op._schema.is_mutable:
        for t in pytree.tree_leaves(operands):
            if isinstance(t, Tensor):
                counts(mode).pop(storage_key(t), None)
