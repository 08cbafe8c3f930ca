"""Watches the calls of torch's Python API during a capture."""

from __future__ import annotations

import sys
import types
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_packed, arrays, effects, literals, numbers, parts, sizes
from primexec._torch import pytree
from primexec.decisions import decide
from primexec.errors import CaptureError
from primexec.program import ApiCall
from primexec.statics import freeze_static
from primexec.value_checks import CHECK, assertions, value_check

if TYPE_CHECKING:
    from primexec.tracer import Tracer

_BINDINGS = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
)  # fmt: skip
READS_DATA = "data is not allocated yet"  # what a kernel in C++ says when it reads a fake tensor
NEEDS_INTS = "expected to contain only concrete integers"  # what C++ says where it takes no unknown sizes
VALUE_HINT = "return the tensor instead, or trace what comes before this and what comes after it apart"
COPY_HINT = "write into it: t.copy_(...) under torch.no_grad()"


# Answered by the fake tensor; a program that asked checks them at every call.
_properties: Any = Tensor
_LAYOUT_QUESTIONS: frozenset[Any] = frozenset(
    {Tensor.storage_offset, Tensor.untyped_storage, Tensor.storage, Tensor._is_view}
    | {_properties.is_leaf.__get__, _properties.grad_fn.__get__}
)
_DATA = _properties.data.__get__  # no autocast changes it, and its operator, `detach`, shares the version counter
_TRUTHS: frozenset[Any] = frozenset({Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero})
_HOOKS: frozenset[Any] = frozenset(
    {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, _properties.grad_fn.__get__}
)


class Calls(_torch.TorchFunctionMode):
    """Sees calls of torch's Python API."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Only fn may run the user's code: what is done around it would be recorded as read, and guarded.
        watching = sys.gettrace()
        sys.settrace(None)
        try:
            return self._call(fn, args, kwargs or {}, watching)
        finally:
            sys.settrace(watching)

    def _call(self, fn: Any, args: Any, kwargs: dict[str, Any], watching: Any) -> Any:
        tracer = self.tracer
        if fn in literals.makers():
            return fn(*args, **kwargs)
        if fn in forbidden():
            if fn == _set_data():
                held, value = tracer._stand_ins(args)
                if _torch.same_elements(held, value) or tracer.gradients.replace(held, value.detach()):
                    return None  # p.data = p.data.to(device), or the memory of an input
            if fn is Tensor.__format__ and (number := self._formatted(args[0])) is not None:
                return format(number, *args[1:])
            raise tracer.fail(forbidden()[fn], COPY_HINT if fn == _set_data() else VALUE_HINT)
        if fn in _sensitive():
            tracer.uses_sdpa = True
        elif fn in _LAYOUT_QUESTIONS:
            tracer.uses_layout = True
        tracer.hooks |= fn in _HOOKS
        args = arrays.as_taken(fn, args)
        given, args, kwargs = args, tracer._stand_ins(args), tracer._stand_ins(kwargs)
        if _torch.functorch_active():
            sys.settrace(watching)
            return fn(*args, **kwargs)
        if fn in _TRUTHS and (truth := self._checked(args[0], sys._getframe(2))) is not None:
            return truth
        if fn in (Tensor.item, numbers.READ) and (number := numbers.item(tracer, args[0])) is not None:
            return number
        if (made := literals.assembled(fn, args, kwargs)) is not None:
            return made
        if tracer.numbers and tracer.scope.parent is None:
            args = parts.taken(tracer, fn, args)
        args = numbers.bounds_decided(fn, literals.spelled_out(fn, args))
        args, kwargs = sizes.decided_for_formulas(fn, args, kwargs)
        given_later: dict[str, fx.Node] = {}  # what C++ takes as a float only, and no metadata depends on
        if fn in _torch.fused_optimizers():
            kwargs = {k: self._left_for_later(k, v, given_later) for k, v in kwargs.items()}
        if fn in _gradient_accessors():
            tracer.gradients.ask(args[0])
        if fn is torch.batch_norm:
            args = (*args[:6], self._left_for_later("momentum", args[6], given_later), *args[7:])
        replaced = None if _autocast_enabled() or kwargs else _torch_packed.stand_in(fn, args)
        graph = tracer.graph
        before = graph._root.prev
        outer, tracer.calling = tracer.calling, fn
        try:
            sys.settrace(watching)
            out = self._run(fn, args, kwargs) if replaced is None else replaced()
            sys.settrace(None)
            if fn is torch.nn.functional.scaled_dot_product_attention:
                _require_fitting_mask(*args, **kwargs)
            for holds, message in assertions(fn, args, kwargs):
                torch._assert_async(holds, message)
        except CaptureError:
            raise
        except Exception as error:
            if _torch.asks_unknown_size(error):
                raise tracer.unknown_size() from None
            if READS_DATA in str(error) or (type(error) is TypeError and "FakeTensor" in str(error)):  # as a size
                raise tracer.fail(f"{name_of(fn)} reads the values of a tensor", VALUE_HINT) from None
            raise
        finally:
            tracer.calling = outer
        if kwargs.get("out") is not None:
            self._check_out(fn, kwargs["out"], before)
        if given_later:
            self._give(given_later, before)
        elif before is not graph._root.prev and isinstance(fn, _BINDINGS) and not (_autocast_enabled() and fn != _DATA):
            self._remember(fn, args, kwargs, before, out)
        return given[0] if args and out is args[0] else out  # `weight.to(dtype) is weight`

    def _run(self, fn: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a function returns; where C++ needs the values of ints, it gets those that the function goes on with."""
        before, failure = self.tracer.graph._root.prev, self.tracer.failure
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            needs = self.tracer.failure is not failure or NEEDS_INTS in str(error)
            known = numbers.all_decided(args, kwargs) if needs and before is self.tracer.graph._root.prev else None
            if known is None:
                raise
        self.tracer.failure = failure
        return fn(*known[0], **known[1])

    def _checked(self, value: Tensor, frame: types.FrameType) -> Any:
        """The truth value with which a frame goes on; None where that is known, or refused."""
        tracer = self.tracer
        known = getattr(value, "constant", None) is not None
        if known or value.numel() != 1 or tracer.scope.parent is not None:
            return None
        check = value_check(frame, type(tracer).run.__code__)
        if check is None:
            return tracer.deciding.ask("truth", tracer.node_of(value))
        tracer.add_node(CHECK, (tracer.node_of(value), *check), {}, None)
        return not check.fails

    def _formatted(self, value: Tensor) -> Any:
        """The int or truth value that stands in a text, with which the function goes on; None where that is refused."""
        value = self.tracer._stand_ins(value)
        is_number = value.dim() == 0 and not isinstance(value, torch.nn.Parameter)  # others show as tensors
        return numbers.whole(self.tracer, value) if is_number else None

    def _check_out(self, fn: Any, out: Any, before: fx.Node) -> None:
        """A few functions in C++ forget `out=` when they see a tensor that is not an ordinary one."""
        written: set[int] = set()
        node = before.next
        while node is not self.tracer.graph._root:
            written.update(_torch.storage_key(n.meta["val"]) for n in effects.writes(node))
            node = node.next
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() and _torch.storage_key(t) not in written:
                raise self.tracer.fail(
                    f"{name_of(fn)} leaves out= as it was while it is traced", "use the result instead of out="
                )

    def _left_for_later(self, name: str, value: Any, given_later: dict[str, fx.Node]) -> Any:
        """A float in place of a number that the operators get once they are recorded; a learning rate as a tensor."""
        number = numbers.symbol_of(value)
        if number is None:
            return value
        if name == "lr":
            return numbers.as_tensor(self.tracer, number)
        given_later[name] = numbers.node_of(self.tracer, number)
        return 0.5

    def _give(self, values: dict[str, fx.Node], before: fx.Node) -> None:
        """Let the operators that were recorded after a node take values for the arguments of these names."""
        node = before.next
        while node is not self.tracer.graph._root:
            schema = getattr(node.target, "_schema", None)
            for i, formal in enumerate(schema.arguments if schema else ()):
                if formal.name in values:
                    if formal.kwarg_only:
                        node.update_kwarg(formal.name, values[formal.name])
                    else:
                        node.update_arg(i, values[formal.name])
            node = node.next

    def _remember(self, fn: Any, args: Any, kwargs: Any, before: fx.Node, out: Any) -> None:
        tracer = self.tracer
        nodes: list[fx.Node] = []
        node = before.next
        while node is not tracer.graph._root:
            nodes.append(node)
            node = node.next
        if tracer.scope.parent is not None or any(n.op != "call_function" or n.target is decide for n in nodes):
            return
        inputs: set[fx.Node] = set()
        try:
            call_args, call_kwargs = _copy(args, tracer, inputs), _copy(kwargs, tracer, inputs)
        except _NotReplayableError:
            return
        results = out if isinstance(out, (tuple, list)) else (out,)
        known = [tracer.scope.nodes.get(_torch.identity(r)) for r in results]
        if out is not None and any(n is None for n in known):
            return
        made = set(nodes)
        if not inputs.isdisjoint(made):  # an argument took another shape, and goes by another name since
            return
        if any(a.op == "placeholder" and tracer.input_kind(a) == "constant" for n in nodes for a in n.all_input_nodes):
            return
        tracer.calls.append(
            ApiCall(
                function=fn,
                args=call_args,
                kwargs=call_kwargs,
                nodes=tuple(nodes),
                results=tuple(n for n in known if n is not None) if out is not None else (),
                sequence=isinstance(out, (tuple, list)),
                inputs=frozenset(inputs),
            )
        )


class _NotReplayableError(Exception):
    pass


def _copy(value: Any, tracer: Tracer, inputs: set[fx.Node]) -> Any:
    """value with tensors replaced by nodes, and lists copied: what a call of the API was given."""
    if isinstance(value, (Tensor, torch.Generator)):
        node = tracer.scope.nodes.get(_torch.identity(value))
        if node is None:
            raise _NotReplayableError
        inputs.add(node)
        return node
    if type(value) in (tuple, list):
        return type(value)(_copy(v, tracer, inputs) for v in value)
    if type(value) is dict:
        return {k: _copy(v, tracer, inputs) for k, v in value.items()}
    if type(value) is slice:
        return slice(*(_copy(v, tracer, inputs) for v in (value.start, value.stop, value.step)))
    if freeze_static(value) is None:
        raise _NotReplayableError
    return value


def name_of(fn: Any) -> str:
    """What a user calls a function of torch's API."""
    return getattr(fn, "__qualname__", None) or str(fn)


def _autocast_enabled() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@cache
def forbidden() -> dict[Any, str]:
    """API calls that read a value, an address or a version, or replace a tensor's contents unseen."""
    value = "the values of a tensor are read in Python"
    properties: Any = Tensor
    return {
        Tensor.numpy: value,
        Tensor.__array__: value,
        Tensor.__repr__: value,
        Tensor.__format__: value,
        Tensor.__dlpack__: value,
        Tensor.data_ptr: "the address of a tensor is read",
        Tensor.__deepcopy__: "a tensor is copied with copy.deepcopy; use clone()",
        properties._base.__get__: "the base of a view is read",
        Tensor.__reduce_ex__: "a tensor is pickled",
        Tensor.is_shared: "whether a tensor is in shared memory is asked",
        Tensor.is_set_to: "whether two tensors are one piece of memory is asked",
        Tensor.share_memory_: "a tensor is moved to shared memory",
        properties._version.__get__: "the version counter of a tensor is read",
        _set_data(): "the .data of a tensor is replaced",
    }


@cache
def _set_data() -> Any:
    data: Any = Tensor.data
    return data.__set__


@cache
def _gradient_accessors() -> frozenset[Any]:
    grad: Any = Tensor.grad
    return frozenset({grad.__get__, grad.__set__, grad.__delete__})


def _require_fitting_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> None:
    """Eager mode adds the mask in place, which refuses one larger than the scores; PyTorch's fake tensors do not."""
    if attn_mask is not None:
        heads = (1,) if enable_gqa else key.shape[-3:-2]
        batch = torch.broadcast_shapes(query.shape[:-2], (*key.shape[:-3], *heads))
        scores = torch.Size((*batch, query.shape[-2], key.shape[-2]))
        if (both := torch.broadcast_shapes(scores, attn_mask.shape)) != scores:
            raise RuntimeError(f"output with shape {list(scores)} doesn't match the broadcast shape {list(both)}")


@cache
def _sensitive() -> frozenset[Any]:
    """Calls whose operators depend on process-wide kernel switches."""
    f = torch.nn.functional
    return frozenset(
        {f.scaled_dot_product_attention, f.multi_head_attention_forward, torch.lstm, torch.gru, torch.rnn_tanh}
        | {torch.rnn_relu, torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention}
    )
