"""The reference executor: each prim by its NumPy reference, one after the other.

It is strict always: it computes what it says or raises, and nothing falls back from it to `aten` in silence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from primexec import effects, reference
from primexec.errors import ExecutorError
from primexec.executors.base import PROTOCOL_VERSION, YES, Region, RegionFunction, Support, no
from primexec.program import op_name

_NARROW = (torch.float16, torch.bfloat16)


class NumpyExecutor:
    """Runs prims on the CPU in NumPy, in the dtype of the program; float16 and bfloat16 round after each prim."""

    name = "numpy"
    protocol_version = PROTOCOL_VERSION
    parameters: frozenset[str] = frozenset()
    strict = True
    fuses = False

    def supports(self, node: fx.Node) -> Support:
        name = str(node.target)
        if name in reference.declined():
            return no(reference.declined()[name])
        if name not in reference.references():
            return no("it is no prim")
        for tensor in _tensors(node):
            if tensor.device.type != "cpu":
                return no(f"NumPy has no arrays on {tensor.device.type}")
            if any(type(n) is not int for n in tensor.shape):
                return no("a size depends on data")
            if tensor.layout != torch.strided:
                return no(f"NumPy has no arrays of layout {tensor.layout}")
            try:
                reference.name_of(tensor.dtype)
            except TypeError as error:
                return no(str(error))
        return _CONDITIONS[name](node) if name in _CONDITIONS else YES

    def compile(self, region: Region, options: Mapping[str, Any]) -> RegionFunction:
        nodes = list(region.graph_module.graph.nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        calls = [n for n in nodes if n.op == "call_function"]
        outputs: Any = region.graph_module.graph.output_node().args[0]
        last_use = {a: n for n in calls for a in n.all_input_nodes if a not in outputs}

        def run(*inputs: Tensor) -> list[Tensor]:
            values: dict[fx.Node, Any] = {
                n: _array(t) if isinstance(t, Tensor) else t for n, t in zip(placeholders, inputs, strict=True)
            }
            for node in calls:
                values[node] = _evaluate(node, values)
                for used in node.all_input_nodes:
                    if last_use.get(used) is node:
                        del values[used]
            return [_tensor(values[n], n) for n in outputs]

        return run

    def fingerprint(self) -> str:
        return f"numpy {np.__version__}"


def _tensors(node: fx.Node) -> list[Tensor]:
    """The tensors that a node takes and returns."""
    found: list[Tensor] = []
    for value in (node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)):
        found += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor)]
    return found


def _whole_memory(node: fx.Node) -> Support:
    """Where a reference reads memory, the operand must be all of it, in row-major order."""
    base = node.args[0].meta["val"]  # type: ignore[union-attr]
    whole = base.is_contiguous() and base.storage_offset() == 0
    return YES if whole else no("its operand is not contiguous from the start of its memory")


def _wide(node: fx.Node) -> Support:
    narrow = any(t.dtype in _NARROW for t in _tensors(node))
    return no("16-bit floats are held as float32, whose bits and neighbours are others") if narrow else YES


_CONDITIONS: dict[str, Callable[[fx.Node], Support]] = {
    "aten.as_strided.default": _whole_memory,
    "prims.as_strided_scatter.default": _whole_memory,
    "prims.view_of_dtype.default": _wide,
    "prims.nextafter.default": _wide,
}


def _array(tensor: Tensor) -> Any:
    """A tensor's values in an array of its own, as the references hold them."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in _NARROW:
        tensor = tensor.float()
    return tensor.numpy().copy()


def _tensor(array: Any, node: fx.Node) -> Tensor:
    """An array as a new tensor of the node's dtype and strides."""
    like = node.meta["val"]
    if not _dense(like):
        return torch.from_numpy(np.array(array)).to(like.dtype)
    result = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    result.copy_(torch.from_numpy(np.array(array)))
    return result


def _dense(tensor: Tensor) -> bool:
    """Whether no two elements of a tensor share a place, and all of its memory is its own."""
    return effects.storage_bytes(tensor.shape, tensor.stride(), tensor.dtype) == tensor.nbytes


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target is operator.getitem:
        results, index = args
        return results[index]
    try:
        result = reference.lookup(str(node.target))(*args, **kwargs)
        val = node.meta.get("val")
        if isinstance(val, (tuple, list)):
            return tuple(_as_declared(r, v) for r, v in zip(result, val, strict=True))
        return result if val is None else _as_declared(result, val)
    except Exception as error:
        error.add_note(f"  in {op_name(node.target)} on the executor 'numpy'\n  {node.meta.get('source')}")
        raise


def _as_declared(array: Any, val: Any) -> Any:
    """A result in the dtype that the program says it has; its shape must be the program's too."""
    if array is None or val is None:
        return array
    if tuple(val.shape) != array.shape:
        raise ExecutorError(f"the reference returned shape {array.shape}, the program says {tuple(val.shape)}")
    return reference.cast(array, val.dtype)
