"""Runs one operator on fake tensors, and says what is wrong where that fails."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from primexec import _torch, _torch_fake, _torch_rules, numbers, sizes
from primexec._torch import pytree
from primexec.calls import NEEDS_INTS, READS_DATA, VALUE_HINT

if TYPE_CHECKING:
    from primexec.tracer import Tracer

MAX_REHEARSAL_ELEMENTS = 1 << 26


def fake_call(tracer: Tracer, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The results of an operator, of fake tensors. Where it cannot do without a size, the function goes on with one."""
    pools = tracer.calling is torch.max_pool1d and op is torch.ops.aten.max_pool2d_with_indices.default
    if pools and args[0].is_cpu and not args[0].is_floating_point():
        with _torch.modes_off():  # the kernel that C++ takes where it sees no fake tensors, and that has no such dtypes
            torch.max_pool1d(torch.zeros(1, 1, dtype=args[0].dtype), 1)
    if tracer.fake_mode.shape_env is not None:
        sizes.decide_ones(op, args)
    outer, tracer.running = tracer.running, op
    try:
        rule = _torch_rules.rules().get(op)
        if rule is None:
            return _counted(tracer, op, args, kwargs, _torch_fake.run(op, args, kwargs))
        allow_unknown_sizes(tracer)
        with _torch.modes_off(), tracer.fake_mode:
            return rule(tracer.fake_mode, *args, **kwargs)
    except Exception as error:
        if type(error).__name__ == "DynamicOutputShapeException" and allow_unknown_sizes(tracer):
            return fake_call(tracer, op, args, kwargs)
        if _torch.asks_unknown_size(error) or NEEDS_INTS in str(error):
            tracer.running = outer
            decided = sizes.decided(tracer, op, (args, kwargs))
            if decided is None:
                raise tracer.unknown_size() from None
            return fake_call(tracer, op, *decided)
        if READS_DATA in str(error):
            raise tracer.fail(f"{op} reads the values of a tensor", VALUE_HINT) from None
        for kind, (reason, hint) in _torch.uncapturable().items():
            if isinstance(error, kind):
                raise tracer.fail(reason.format(op=op, error=error), numbers.in_optimizer() or hint) from None
        raise _eager_error(tracer, op, args, kwargs, error) from None
    finally:
        tracer.running = outer


def _counted(tracer: Tracer, op: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """The result; refused where it is one of ints for the one reason that operators take True for 1."""
    formals = op._schema.arguments
    truths = any(type(v) is bool and str(f.type) == "number" for f, v in zip(formals, args, strict=False))
    tensors = [t for t in args if isinstance(t, Tensor)]
    if truths and isinstance(out, Tensor) and out.dtype is torch.int64 and {t.dtype for t in tensors} == {torch.bool}:
        raise tracer.fail(f"{op} takes a bool for a number", "leave it out, or use torch.where")
    return out


def allow_unknown_sizes(tracer: Tracer) -> bool:
    """Let operators return tensors of unknown size from now on; false where they already may."""
    return _torch_rules.allow_unknown_sizes(tracer.fake_mode, partial(sizes.answer, tracer))


def _eager_error(tracer: Tracer, op: Any, args: Any, kwargs: Any, error: Exception) -> Exception:
    """What eager raises here: the operator is tried on tensors of zeros with the same metadata."""
    sizes = [t.numel() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if op.namespace == "aten" and sum(sizes) <= MAX_REHEARSAL_ELEMENTS:
        real_args, real_kwargs = pytree.tree_map_only(Tensor, _zeros_like, (args, kwargs))
        try:
            with _torch.modes_off(), torch.random.fork_rng(devices=[]):
                op(*real_args, **real_kwargs)
        except Exception as real_error:
            return real_error
    elif op.namespace == "aten":
        return error
    return tracer.fail(
        f"PyTorch's own implementation of {op} for fake tensors failed ({type(error).__name__}: {error})",
        "keep this call outside the traced function",
    )


def _zeros_like(t: Tensor) -> Tensor:
    with _torch.modes_off():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).zero_()
