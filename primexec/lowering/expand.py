"""One ATen operator as a graph of prims.

PyTorch's decompositions, and the rules of `rules.py` where those are missing, read values or lose precision, are
run on fake tensors under a mode that records members of the table and takes everything else apart.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_fake, effects
from primexec._torch import pytree
from primexec.lowering.operands import rounded
from primexec.lowering.rules import NoExpansionError
from primexec.lowering.rules_special import RULES
from primexec.passes.common import merge_equal, remove_no_ops
from primexec.prims import is_prim
from primexec.program import TensorSpec, op_name

MEMO_SIZE = 4096
_UNRECORDED = frozenset({"prim", "profiler"})


@dataclass(frozen=True, eq=False, slots=True)
class Expansion:
    """The prims that compute what a node computes.

    Attributes:
        graph: its placeholders are the node's `all_input_nodes`, in order; its output is the tuple of the node's
            results (one for an operator that returns a tensor; None where a result is none). Every node carries
            `meta["val"]`; operators with several results are followed by `getitem` nodes.
        prims: the nodes of the graph that are operators, in order.
        results: the nodes (or None) that the graph returns.
    """

    graph: fx.Graph
    prims: tuple[fx.Node, ...]
    results: tuple[fx.Node | None, ...]


_lock = threading.RLock()
_memo: OrderedDict[Any, Expansion | str] = OrderedDict()


def expand(node: fx.Node) -> Expansion | None:
    """The expansion of a node of a captured program; None where the operator is a prim itself or has none.

    Results keep the node's dtypes, shapes and strides. The same object is returned for every node of equal operator
    and static arguments, so its graph must not be changed.
    """
    found = _find(node)
    return found if isinstance(found, Expansion) else None


def expand_by(node: fx.Node, rule: Callable[..., Any]) -> Expansion | str:
    """The expansion of a node, a prim perhaps, by another function in place of its operator; or why there is none.

    The function takes the operator's arguments and returns what the operator returns, or a text: why it does not.
    """
    key = _key(node)
    if key is None:
        return "its arguments are not all static"
    with _lock:
        found = _memo.get((rule, key))
        if found is None:
            found = _memo[rule, key] = _expand(node, rule)
            if len(_memo) > MEMO_SIZE:
                _memo.popitem(last=False)
        return found


def why_not(node: fx.Node) -> str:
    """Why `expand` returns None, or an empty text."""
    found = _find(node)
    return found if isinstance(found, str) else ""


def _find(node: fx.Node) -> Expansion | str:
    if is_prim(node.target):
        return "it is a prim"
    if not isinstance(node.target, _torch.OpOverload):
        return "it is no operator that can be taken apart"
    if effects.writes(node):
        return "it changes an argument in place"
    key = _key(node)
    if key is None:
        return "its arguments are not all static"
    with _lock:
        found = _memo.get(key)
        if found is None:
            found = _memo[key] = _expand(node)
            if len(_memo) > MEMO_SIZE:
                _memo.popitem(last=False)
        else:
            _memo.move_to_end(key)
        return found


_storages = itertools.count(-1, -1)  # addresses, which other nodes are told apart by, are positive


def inline(expansion: Expansion, node: fx.Node, graph: fx.Graph, inputs: list[fx.Node]) -> tuple[fx.Node | None, ...]:
    """Copies an expansion into a graph in place of a node whose inputs are given there; returns its results.

    The copies carry the node's source line.
    """
    copies: dict[fx.Node, fx.Node] = {}
    storages: dict[int, int | None] = {}
    remaining = iter(inputs)
    carried: dict[str, Any] = {k: node.meta[k] for k in ("source", "stack_trace", "inference") if k in node.meta}
    for prim in expansion.graph.nodes:
        if prim.op == "placeholder":
            copies[prim] = next(remaining)
            storages.setdefault(_torch.storage_key(prim.meta["val"]), effects.storage_of(copies[prim]))
        elif prim.op == "call_function":
            args, kwargs = fx.node.map_arg((prim.args, prim.kwargs), copies.__getitem__)
            copy = graph.create_node("call_function", prim.target, args, kwargs, name=prim.name)
            copy.meta.update(prim.meta)  # assigning it costs ten times as much
            copy.meta.update(carried)
            if isinstance(value := prim.meta.get("val"), Tensor):
                key = _torch.storage_key(value)
                copy.meta["storage"] = storages[key] if key in storages else storages.setdefault(key, next(_storages))
            copies[prim] = copy
    return tuple(None if r is None else copies[r] for r in expansion.results)


# The key ------------------------------------------------------------------------------------------------


def _key(node: fx.Node) -> Any:
    """Everything that an expansion depends on; None where a size is not known or an argument is no plain value."""
    numbers = {n: i for i, n in enumerate(node.all_input_nodes)}
    try:
        inputs = tuple(_tensor_key(n) for n in numbers)
        values = _value_key(node.args, numbers), _value_key(node.kwargs, numbers)
        results = _results(node)
        aliases = tuple(effects.storage_of(n) == s for n in numbers for s in map(_storage, results))
        specs = tuple(None if t is None else _spec_key(t) for t in results)
    except NoExpansionError:
        return None
    return node.target, inputs, values, specs, aliases, torch.get_default_dtype()


def _tensor_key(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise NoExpansionError
    return _spec_key(value)


def _spec_key(t: Tensor) -> Any:
    spec = t.dtype, tuple(t.shape), t.stride(), t.device, t.is_conj(), t.is_neg(), t.layout
    if any(type(n) is not int for ns in spec[1:3] for n in ns):
        raise NoExpansionError
    return spec


def _value_key(value: Any, numbers: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return fx.Node, numbers[value]
    if isinstance(value, (list, tuple)):
        return tuple(_value_key(v, numbers) for v in value)
    if isinstance(value, dict):
        return tuple((k, _value_key(v, numbers)) for k, v in value.items())
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # NaN equals itself, -0.0 differs from 0.0
    if isinstance(value, (*_torch.SYMBOLS, Tensor)):
        raise NoExpansionError
    return type(value), value


def _results(node: fx.Node) -> list[Tensor | None]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    if all(v is None for v in values) and node.target._schema.returns:  # type: ignore[union-attr]
        raise NoExpansionError
    return [v if isinstance(v, Tensor) else None for v in values]


def _storage(t: Tensor | None) -> int | None:
    return None if t is None else _torch.storage_key(t)


# Recording ----------------------------------------------------------------------------------------------


def _expand(node: fx.Node, function: Callable[..., Any] | None = None) -> Expansion | str:
    inputs = node.all_input_nodes
    aliased = {effects.storage_of(n) for n in inputs}

    def run(*tensors: Tensor) -> list[Any]:
        stand_ins = dict(zip(inputs, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), stand_ins.__getitem__)
        if function is None:
            args, kwargs = rounded(node.target, args, kwargs)
        out = (function or node.target)(*args, **kwargs)  # type: ignore[operator]
        if isinstance(out, str):
            raise NoExpansionError(out)
        results = list(out) if isinstance(out, (tuple, list)) else [out]
        expected = _results(node)
        if len(results) < len(expected):
            raise NoExpansionError(f"its decomposition returns {len(results)} results, not {len(expected)}")
        own = {_torch.storage_key(t) for t in tensors}
        finished: list[Any] = []
        for got, like in zip(results, expected, strict=False):
            fresh = like is not None and _torch.storage_key(like) not in aliased
            finished.append(None if like is None else _finish(got, like, own if fresh else set()))
            own |= {_torch.storage_key(t) for t in finished if isinstance(t, Tensor) and fresh}
        return finished

    return record(run, [n.meta["val"] for n in inputs], by_strides=function is not None)


def _finish(got: Any, like: Tensor, taken: set[int]) -> Tensor:
    """The result with eager's strides, in memory of its own where eager's is."""
    if not isinstance(got, Tensor) or (got.dtype, got.shape) != (like.dtype, like.shape):
        made = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise NoExpansionError(f"its decomposition makes {made}, not {like.dtype} {tuple(like.shape)}")
    wanted = [i for i, n in enumerate(like.shape) if n > 1]
    if like.numel() and any(got.stride(i) != like.stride(i) for i in wanted) and _is_dense(like):
        order = sorted(range(like.dim()), key=lambda i: (like.stride(i), like.shape[i]), reverse=True)
        back = sorted(range(like.dim()), key=order.__getitem__)
        return got.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
    return got.clone() if _torch.storage_key(got) in taken else got


def _is_dense(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((t.stride(i), t.shape[i]) for i in range(t.dim()) if t.shape[i] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def record(run: Callable[..., list[Any]], inputs: list[Tensor], by_strides: bool = False) -> Expansion | str:
    """The prims that `run` computes its list of results with, on fake tensors like the inputs; or why not.

    Args:
        by_strides: whether it may read the inputs' elements by their strides.
    """
    mode = _mode()
    recorder = _Recorder(by_strides)
    try:
        with _torch.quiet_modes(), mode, torch.no_grad():
            tensors = [_like(t) for t in inputs]
            for t in tensors:
                recorder.bind(t, recorder.graph.placeholder("input"))
            with recorder:
                results = [recorder.node_of(t) if isinstance(t, Tensor) else None for t in run(*tensors)]
    except NoExpansionError as error:
        return str(error)
    except Exception as error:
        return f"its decomposition fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return finish_graph(recorder.graph, results)


def finish_graph(graph: fx.Graph, results: list[fx.Node | None]) -> Expansion:
    """Closes a recorded graph, and drops what its results do not need and what computes nothing new."""
    output = graph.output(tuple(results))
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not effects.has_effect(node):
            graph.erase_node(node)
    remove_no_ops(graph)
    merge_equal(graph)
    results = output.args[0]
    prims = tuple(n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
    return Expansion(graph, prims, tuple(results))


def _mode() -> Any:
    global _fake_mode
    if _fake_mode is None:
        _fake_mode = _torch_fake.fake_mode(cached=False)
    return _fake_mode


_fake_mode: Any = None


def _like(t: Tensor) -> Tensor:
    made = _torch_fake.empty_like(t, _mode())
    if t.is_conj():
        made = torch.conj(made)
    return torch._neg_view(made) if t.is_neg() else made


class _Recorder(_torch.TorchDispatchMode):  # type: ignore[misc]
    """Records prims, and takes every other operator apart."""

    def __init__(self, by_strides: bool) -> None:
        super().__init__()
        self.by_strides = by_strides
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[object] = []
        self.inputs: set[int] = set()  # storages of the inputs

    def bind(self, t: Tensor, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.inputs.add(_torch.storage_key(t))
        self.nodes[id(t)] = node
        self.alive.append(t)
        node.meta["val"] = t
        node.meta["spec"] = TensorSpec.of(t)

    def node_of(self, t: Tensor) -> fx.Node:
        if id(t) not in self.nodes:
            raise NoExpansionError("its decomposition uses a tensor that it did not make")
        return self.nodes[id(t)]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace in _UNRECORDED:
            return op(*args, **kwargs)
        if is_prim(op):
            return self.record(op, args, kwargs)
        for way in (RULES.get(str(op)), _torch.decomposition(op)):
            if way is not None:
                with self:
                    out = way(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        if op.namespace == "aten":
            with self:
                out = op.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        raise NoExpansionError(f"{op_name(op)} has no decomposition")

    def record(self, op: Any, args: Any, kwargs: Any) -> Any:
        if effects_of := [t for t in _written(op, args, kwargs) if _torch.storage_key(t) in self.inputs]:
            raise NoExpansionError(f"its decomposition changes {len(effects_of)} of its arguments")
        strided = str(op) == "aten.as_strided.default" and not self.by_strides
        if strided and _torch.storage_key(args[0]) in self.inputs:
            raise NoExpansionError("its decomposition reads the memory of an argument by strides")
        node_args, node_kwargs = pytree.tree_map_only(Tensor, self.node_of, (list(args), kwargs))
        out = _torch_fake.run(op, args, kwargs)
        name = op._schema.name.partition("::")[2]
        node = self.graph.create_node("call_function", op, tuple(node_args), node_kwargs, name=name)
        if isinstance(out, Tensor):
            if id(out) not in self.nodes:
                self.bind(out, node)
        elif isinstance(out, (tuple, list)):
            node.meta["val"] = tuple(out)
            node.meta["spec"] = [TensorSpec.of(t) for t in out]
            for i, t in enumerate(out):
                self.bind(t, self.graph.call_function(operator.getitem, (node, i)))
        return out


def _written(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    actual = [kwargs.get(name, args[i] if i < len(args) else None) for i, name in effects.written_arguments(op)]
    return [t for t in pytree.tree_leaves(actual) if isinstance(t, Tensor)]
