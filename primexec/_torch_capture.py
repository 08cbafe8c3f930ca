"""What a capture replaces in PyTorch while it runs. Like `_torch.py`, this file touches private names."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from primexec._torch import modes_off, private, pytree, torch_directory
from primexec._torch_dynamo import replaced
from primexec._torch_flag import CapturingFlag
from primexec._torch_flag import capturing as capturing
from primexec._torch_flag import state as _capturing
from primexec._torch_rules import shifts


class Trace(Protocol):
    """What a capture asks of the trace that it serves."""

    def stand_in(self, value: Any) -> Any:
        """The fake tensor for a real one; any other value as it is."""

    def before_backward(self, roots: Sequence[Tensor], accumulates: bool) -> None:
        """A backward pass begins at these tensors; it may accumulate into the `.grad` of leaves."""

    def before_control_flow(self, tensors: Iterable[Any]) -> None:
        """torch.cond or its like is called with these tensors among other values."""

    def before_hooks(self) -> None:
        """Hooks are set for what autograd saves from here on."""


@contextmanager
def capture_environment(trace: Trace) -> Iterator[list[str]]:
    """What must hold in this thread while a capture runs. Callers hold the capture lock.

    Yields:
        A list that gets an entry for each backward pass that runs meanwhile.
    """
    outer = _capturing.__dict__.copy()
    _capturing.depth = outer.get("depth", 0) + 1
    _capturing.trace, _capturing.passes = trace, []
    autocast_cache = torch.is_autocast_cache_enabled()
    try:
        with ExitStack() as patches:
            for owner, name, replacement in _stand_ins():
                original = getattr(owner, name)
                patches.callback(setattr, owner, name, original)
                replaced.append((owner, name, original))
                patches.callback(replaced.pop)
                setattr(owner, name, replacement(original))
            if "float" not in (names := vars(torch.nn.modules.batchnorm)):
                names["float"] = _as_number
                patches.callback(names.pop, "float")
            patches.enter_context(torch.autograd.set_detect_anomaly(False))  # it reads values, which are not there
            patches.enter_context(_without_saved_tensors_hooks())  # those of the caller run at every call
            torch.set_autocast_cache_enabled(False)  # it would keep fake tensors for the next eager call
            patches.enter_context(collector_paused())  # a callback of the collector is not the function's code
            yield _capturing.passes
    finally:
        torch.set_autocast_cache_enabled(autocast_cache)
        _capturing.__dict__.clear()
        _capturing.__dict__.update(outer)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's collector of cycles waits: for the nodes of a program it would look at all objects of PyTorch, often."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def standing_in(shadows: Mapping[int, torch.nn.Module]) -> Iterator[None]:
    """Who reads or sets an attribute of a module in this thread reads or sets that of its shadow.

    A bound method that the module keeps, a hook, a child that knows its parent refer to the module itself, and would
    not see what the function assigns to `self`.

    Args:
        shadows: by the identity of the module's `__dict__`, which a traced module shares.
    """
    outer, _capturing.shadows = getattr(_capturing, "shadows", None), shadows
    module: Any = torch.nn.Module
    names = ("__getattribute__", "__setattr__", "__delattr__") if shadows else ()
    before = {name: module.__dict__.get(name) for name in names}
    try:
        for name in names:
            setattr(module, name, _of_shadow(before[name] or getattr(object, name)))
        yield
    finally:
        _capturing.shadows = outer
        for name, original in before.items():
            setattr(module, name, original) if original else delattr(module, name)


@contextmanager
def _without_saved_tensors_hooks() -> Iterator[None]:
    hooks = private("torch._C._autograd")
    taken = []
    while (pair := hooks._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(pair)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(taken):
            hooks._push_saved_tensors_default_hooks(*pair)


def _of_shadow(original: Callable[..., Any]) -> Callable[..., Any]:
    def access(module: torch.nn.Module, /, *args: Any) -> Any:
        shadows = getattr(_capturing, "shadows", None)
        if shadows:
            module = shadows.get(id(object.__getattribute__(module, "__dict__")), module)
        return original(module, *args)

    return access


@contextmanager
def modules_themselves() -> Iterator[None]:
    """Modules are themselves again in this thread, whatever stands in for them."""
    outer, _capturing.shadows = getattr(_capturing, "shadows", None), None
    try:
        yield
    finally:
        _capturing.shadows = outer


@cache
def _stand_ins() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """(owner, name, original → stand-in): what a capture replaces; other threads still get the original's answer."""
    compiling = (torch.compiler, "_is_compiling_flag", CapturingFlag)
    control_flow = (private("torch._higher_order_ops.utils"), "_hop_compile_and_call", _call_directly)
    fake_log = (logging.getLogger("torch._subclasses.fake_tensor"), "handle", _quietly)
    questions = [(torch.overrides, "has_torch_function", _without_our_mode)]
    # Python functions would hand themselves to our mode and then run unseen; so it sees what they call.
    for module in (torch.nn.functional, torch.functional):
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            if hasattr(module, name):
                questions.append((module, name, _without_our_mode))
    rng = [
        (torch, f"{verb}_rng_state", _recorded_rng(op)) for verb, op in (("get", "rng_state"), ("set", "set_rng_state"))
    ]
    backward = (torch.autograd, "_engine_run_backward", _noted)
    causal = (torch.nn.modules.transformer, "_detect_is_causal_mask", _without_hint)
    entrances = [
        (private(module), name, _given)
        for module, name in (
            ("torch._functorch.utils", "unwrap_dead_wrappers"),  # what torch.autograd.Function.apply begins with
            ("torch.autograd.function", "custom_function_call"),  # the same inside of transforms
            ("torch._functorch.vmap", "_add_batch_dim"),
            ("torch._functorch.eager_transforms", "_wrap_for_grad"),
            ("torch._functorch.eager_transforms", "_maybe_wrap_functional_tensor"),
            ("torch._functorch.eager_transforms", "_propagate_functional_input_mutation"),
        )
    ]
    saving = (private("torch._C._autograd"), "_push_saved_tensors_default_hooks", _told)
    return [compiling, control_flow, fake_log, backward, causal, saving, *entrances, *rng, *questions]


def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.autograd.grad and backward() run."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if capturing():
            _capturing.passes.append("backward")
            _capturing.trace.before_backward(args[0], kwargs.get("accumulate_grad", False))
        return original(*args, **kwargs)

    return run


def _told(original: Callable[..., Any]) -> Callable[..., Any]:
    def push(*pair: Any) -> Any:
        if capturing():
            _capturing.trace.before_hooks()
        return original(*pair)

    return push


def _given(original: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd and torch.func note the tensors given here, before our modes see them in an operator."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if capturing():
            stand_in = _capturing.trace.stand_in
            with modes_off():
                args = tuple([tuple(map(stand_in, a)) if type(a) is tuple else stand_in(a) for a in args])
        return original(*args, **kwargs)

    return call


def _call_directly(original: Callable[..., Any]) -> Callable[..., Any]:
    """Eagerly torch.cond and its like go through Dynamo; a capture records the operator itself."""

    def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if not capturing():
            return original(fn, args, kwargs)
        with modes_off():
            args, kwargs = pytree.tree_map_only(Tensor, _capturing.trace.stand_in, (args, kwargs or {}))
        _capturing.trace.before_control_flow(pytree.tree_leaves((args, kwargs)))
        return fn(*args, **kwargs)

    return call


def _without_hint(original: Callable[..., bool]) -> Callable[..., bool]:
    """nn.Transformer compares a mask with the causal one, and attention then masks by position in place of adding it.

    The values of the mask are unknown in a capture. Used as it is, it gives the same but for rounding, unless it wants
    a gradient, which it gets only so.
    """

    def detect(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        unknown = capturing() and is_causal is None and mask is not None and not mask.requires_grad
        return False if unknown else original(mask, is_causal, size)

    return detect


def _as_number(value: Any) -> Any:
    """What `float` is to batch norms, which divide by how many batches they have seen."""
    return value.item() if capturing() and isinstance(value, Tensor) else float(value)


def _quietly(original: Callable[[logging.LogRecord], None]) -> Callable[[logging.LogRecord], None]:
    """An error on fake tensors is raised; it need not be logged as well."""
    return lambda record: None if capturing() else original(record)


def _without_our_mode(original: Callable[..., bool]) -> Callable[..., bool]:
    """has_torch_function says yes to any tensor while a mode is active; torch.nn then leaves its fast paths."""
    plain = (Tensor, torch.nn.Parameter, private("torch._subclasses.fake_tensor.FakeTensor"))

    def overridden(*args: Any) -> bool:
        if not capturing():
            return original(*args)
        tensors = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return any(isinstance(t, Tensor) and type(t) not in plain for t in tensors)

    return overridden


@cache
def rng_operators() -> Any:
    """Operators that read and set the state of the CPU generator, so that checkpoints can be recorded."""
    library = torch.library.Library("primexec", "FRAGMENT")
    library.define("rng_state() -> Tensor")
    library.define("set_rng_state(Tensor state) -> ()")
    library.impl("rng_state", lambda: torch.default_generator.get_state(), "CompositeExplicitAutograd")
    library.impl("set_rng_state", lambda state: torch.default_generator.set_state(state) and None, "CPU")
    with modes_off():
        size = torch.default_generator.get_state().numel()
    torch.library.register_fake("primexec::rng_state", lambda: torch.empty(size, dtype=torch.uint8), lib=library)
    torch.library.register_fake("primexec::set_rng_state", lambda state: None, lib=library)
    return library, torch.ops.primexec


def _recorded_rng(name: str) -> Callable[[Any], Any]:
    """Checkpoints read the generator's state in forward, and set it in backward: both are recorded."""

    def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*state: Tensor) -> Any:
            ours = capturing() and sys._getframe(1).f_code.co_filename.startswith(torch_directory())
            return getattr(rng_operators()[1], name)(*state) if ours else original(*state)

        return call

    return stand_in


def as_kernels_have_it(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """out with the shapes and strides that the kernel gives, where PyTorch's rule for fake tensors gives others."""
    op = shifts().get(op, op)
    correct = _corrections().get(op)
    if correct is not None and kwargs.get("memory_format") in (None, torch.preserve_format):
        return correct(args, out)
    if torch.Tag.pointwise in op.tags and not op._schema.is_mutable and isinstance(out, Tensor):
        stand_ins, leaves = _in_float32(args), pytree.tree_leaves(args)
        if any(map(_has_odd_strides, leaves)) and all(map(_is_sized, leaves)):
            return _with_strides_of(_iterated(op, stand_ins, kwargs), out)
        return out if stand_ins is args else _with_strides_of(op(*stand_ins, **kwargs), out)
    return out


def _is_sized(t: Any) -> bool:
    """Whether a number, or the sizes of a tensor, are numbers, not symbols."""
    return not any(isinstance(n, torch.SymInt) for n in ((*t.shape, *t.stride()) if isinstance(t, Tensor) else (t,)))


def _has_odd_strides(t: Any) -> bool:
    """Whether dimensions of size 1 have strides, at which kernels look, that they have in no new tensor."""
    if not isinstance(t, Tensor) or not _is_sized(t) or 1 not in t.shape:
        return False
    return t.stride() != _on_meta(t, torch.contiguous_format).stride()


def _iterated(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """As pointwise kernels do, without the shortcuts of fake tensors. Numbers are tensors without dimensions to them.

    Operands of one shape and order take a shortcut of TensorIterator, which tensors on meta do not take.
    """
    if op._overloadname == "Scalar" and hasattr(op.overloadpacket, "Tensor"):
        op = op.overloadpacket.Tensor
        args, kwargs = args[: sum(not p.kwarg_only for p in op._schema.arguments)], {}
    with modes_off():
        operands = [
            torch.empty((), device="meta") if "Tensor" in str(p.type) and isinstance(a, (int, float, complex)) else a
            for p, a in zip(op._schema.arguments, args, strict=False)
        ]
    first, *others = tensors = [t for t in pytree.tree_leaves(operands) if isinstance(t, Tensor)]
    copies = any(p.name == "memory_format" for p in op._schema.arguments)
    if not copies and all(t.shape == first.shape for t in others):
        for format in (torch.contiguous_format, torch.channels_last)[: 2 if first.dim() == 4 else 1]:
            if all(t.is_contiguous(memory_format=format) for t in tensors):
                return _on_meta(first, format)
    return _run_on_meta(op, operands, kwargs)


def _run_on_meta(op: Any, operands: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    with modes_off():
        result: Tensor = op(*pytree.tree_map_only(Tensor, _on_meta, operands), **kwargs)
        return result


def _on_meta(t: Tensor, format: torch.memory_format | None = None) -> Tensor:
    if t.is_meta:
        return t
    with modes_off():
        if format is None:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        return torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=format)


def _in_float32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Stand-ins for expanded operands of half precision and what they are combined with, if anything is expanded.

    PyTorch's rules compute in float32, on dense copies, which have lost the order of dimensions that kernels look at.
    Kernels make such copies only of operands that are not of the type in which they compute.
    """
    tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    dtypes = {t.dtype for t in tensors if t.dim()}
    if not (dtypes == {torch.bfloat16} or dtypes == {torch.float16}) or not any(0 in t.stride() for t in tensors):
        return args
    stand_ins = {id(t): t.new_empty_strided(t.shape, t.stride(), dtype=torch.float32) for t in tensors}
    return tuple(stand_ins.get(id(a), a) for a in args)


def _with_strides_of(like: Tensor, out: Tensor) -> Tensor:
    return out if out.stride() == like.stride() else out.new_empty_strided(out.shape, like.stride())


@cache
def _corrections() -> dict[Any, Callable[[tuple[Any, ...], Any], Any]]:
    aten = torch.ops.aten
    pointwise = (
        aten.floor_divide.default, aten.copysign.Tensor, aten.xlogy.Tensor, aten.special_xlog1py.default,
        aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default, aten.heaviside.default,
        aten.logaddexp.default, aten.logaddexp2.default, aten.div.Tensor_mode, aten.native_dropout_backward.default,
        aten.softplus_backward.default, aten.hardsigmoid_backward.default, aten.hardswish_backward.default,
        aten.hardtanh_backward.default, aten.logit_backward.default,
    )  # fmt: skip
    normed = (
        aten.native_batch_norm.default, aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats,
        aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default,
        aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default,
        aten._batch_norm_no_update.default,
    )  # fmt: skip
    formatted = (
        aten.max_unpool2d.default, aten.channel_shuffle.default, aten.reflection_pad3d.default,
        aten.replication_pad3d.default,
    )  # fmt: skip
    convolutions = [getattr(getattr(aten, f"conv{n}d"), how) for n in (1, 2, 3) for how in ("default", "padding")]
    likes = (
        aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
        aten.fill.Scalar, aten.fill.Tensor, aten.hardtanh.default, aten.nan_to_num.default, aten.rad2deg.default,
        aten.deg2rad.default,
    )  # fmt: skip
    contiguous = (
        aten.pow.Scalar, aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar, aten._softmax_backward_data.default,
        aten._log_softmax_backward_data.default, aten.mse_loss_backward.default, aten.huber_loss_backward.default,
        aten.smooth_l1_loss_backward.default, aten.poisson.default, aten._standard_gamma.default,
        aten.normal.float_Tensor, aten.normal.Tensor_Tensor,
    )  # fmt: skip
    return {
        aten.multilabel_margin_loss_forward.default: _loss_of_one_row,
        aten.binary_cross_entropy.default: lambda args, out: _like_a_sum(args, out) if out.dim() else out,
        aten.binary_cross_entropy_backward.default: lambda args, out: _with_strides_of(torch.empty_like(args[1]), out),
        aten.rrelu_with_noise_backward.default: lambda args, out: _like_a_sum(args[2::-2], out) if args[5] else out,
        aten.log_sigmoid_forward.default: lambda args, out: tuple(t.contiguous() if t.is_cpu else t for t in out),
        aten.ldexp.Tensor: lambda args, out: args[0] * torch.pow(2.0, args[1]).contiguous(),
        **dict.fromkeys(contiguous, lambda args, out: _contiguous(out)),
        aten.native_layer_norm.default: lambda args, out: (_contiguous(out[0]), *_statistics(args, out)),
        aten.native_group_norm.default: lambda args, out: (out[0], *_statistics(args, out)),
        aten._scaled_dot_product_flash_attention_for_cpu.default: lambda args, out: (
            _like_a_copy(args, out[0]),
            *out[1:],
        ),
        **dict.fromkeys(likes, _like_a_copy),
        **dict.fromkeys(pointwise, _like_a_sum),
        **dict.fromkeys(normed, lambda args, out: (_in_format_of(args[0], out[0]), *_statistics(args, out), *out[3:])),
        **dict.fromkeys(formatted, lambda args, out: _in_format_of(args[0], out)),
        aten.native_batch_norm_backward.default: lambda args, out: (_in_format_of(args[1], out[0]), *out[1:]),
        aten.replication_pad2d_backward.default: lambda args, out: _in_format_of(args[1], out),
        **{op: partial(_like_its_parts, op) for op in convolutions},
        aten.view.default: _viewed,
        aten._unsafe_view.default: _viewed,
    }


def _like_its_parts(op: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """In inference mode PyTorch leaves the operator whole, and its rule for meta tensors knows one layout."""
    return _with_strides_of(op.decompose(*args), out)


def _like_a_copy(args: tuple[Any, ...], out: Tensor) -> Tensor:
    if not _has_odd_strides(args[0]):
        return out
    return _with_strides_of(_run_on_meta(torch.ops.aten.clone.default, args[:1], {}), out)


def _viewed(args: tuple[Any, ...], out: Tensor) -> Tensor:
    """PyTorch's rule for views of fake tensors differs where a size is 1; that for meta tensors does not."""
    x = args[0]
    if not (_is_sized(x) and _is_sized(out)) or 1 not in (*x.shape, *out.shape):
        return out
    with modes_off():
        stride = _on_meta(x).view(out.shape).stride()
    return out if out.stride() == stride else out.as_strided(out.shape, stride, out.storage_offset())


def _loss_of_one_row(args: tuple[Any, ...], out: Any) -> Any:
    loss, is_target = out
    return (loss.new_empty(()) if args[0].dim() < 2 else loss), is_target


def _contiguous(out: Tensor) -> Tensor:
    """With the strides of new memory, where a size is 1, too."""
    if not out.is_cpu or not _is_sized(out):
        return out.contiguous()
    return _with_strides_of(_on_meta(out, torch.contiguous_format), out)


def _like_a_sum(args: tuple[Any, ...], out: Any) -> Any:
    """With the strides of other pointwise operators: PyTorch's rules let the second argument choose."""
    return _with_strides_of(torch.add(*_in_float32(args[:2])), out)


def _statistics(args: tuple[Any, ...], out: Any) -> Any:
    """Those of half precision are float32 beside float32 parameters, which PyTorch's rules do not know."""
    x, parameters = args[0], [t for t in args[1:5] if isinstance(t, Tensor)]
    mixed = x.is_cpu and x.dtype.itemsize == 2 and any(t.dtype is torch.float32 for t in parameters)
    return [t.float() for t in out[1:3]] if mixed else out[1:3]


def _in_format_of(operand: Tensor, out: Any) -> Any:
    """As on CPUs: in channels last where the operand is, else contiguous. PyTorch's rules keep any order or none."""
    if out is None or not operand.is_cpu:
        return out
    format = private("torch._prims_common.suggest_memory_format")(operand)
    return out.contiguous(memory_format=format)
