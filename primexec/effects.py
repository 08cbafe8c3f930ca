"""What a node does besides computing its result. Unknown operators are taken to have effects."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from primexec import _torch

# Positions of arguments that operators write to without marking them in their schema.
_UNDECLARED_WRITES = {
    "native_batch_norm": (3, 4),
    "cudnn_batch_norm": (3, 4),
    "miopen_batch_norm": (3, 4),
    "batch_norm_update_stats": (1, 2),
}
_VIEWS = {f"{name}_": f"aten.{name}.{{}}" for name in ("as_strided", "detach", "squeeze", "t", "unsqueeze")}
_VIEWS["transpose_"] = "aten.transpose.int"
_MADE_HERE = frozenset({"aten", "prims"})


def writes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors this node changes in place."""
    op: Any = node.target
    formals = written_arguments(op) if isinstance(op, _torch.OpOverload) else ()
    if not formals or (str(op) == "aten.native_batch_norm.default" and argument(node, "training") is False):
        return []
    found: list[fx.Node] = []
    for i, name in formals:
        fx.node.map_arg(node.kwargs.get(name, node.args[i] if i < len(node.args) else None), found.append)
    return found


@cache
def written_arguments(op: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operator overload writes to."""
    undeclared = _UNDECLARED_WRITES.get(op._schema.name.partition("::")[2], ())
    formals = enumerate(op._schema.arguments)
    return tuple(
        (i, f.name) for i, f in formals if i in undeclared or (f.alias_info is not None and f.alias_info.is_write)
    )


def written_memory(graph: fx.Graph) -> set[int | None]:
    """Storages that an operator of the graph writes to."""
    return {storage_of(w) for n in graph.nodes if n.op == "call_function" for w in writes(n)}


def seen_memory(graph: fx.Graph, *, inputs: bool = False) -> set[int | None]:
    """Storages in which it shows who shares them: those written to and those of results; if asked, of inputs too."""
    ends = graph.output_node().all_input_nodes + (graph.find_nodes(op="placeholder") if inputs else [])
    return written_memory(graph).union(map(storage_of, ends))


def memory_of(graph: fx.Graph) -> Callable[[fx.Node], int | None]:
    """As `storage_of`; but all inputs are one memory where one is written to: later calls may pass overlapping ones."""
    inputs = {s for n in graph.find_nodes(op="placeholder") if (s := storage_of(n)) is not None}
    if inputs.isdisjoint(written_memory(graph)):
        return storage_of
    one = min(inputs)

    def memory(node: fx.Node) -> int | None:
        return one if (storage := storage_of(node)) in inputs else storage

    return memory


def moves_memory(node: fx.Node) -> bool:
    """Whether a node gives a tensor the memory of another: who shares memory is not told by `storage_of` then."""
    return str(node.target).startswith("aten.set_.")


def changes_metadata(op: Any) -> bool:
    """Whether an operator gives the very tensor it takes another shape or other strides, as `aten.squeeze_` does."""
    return torch.Tag.inplace_view in getattr(op, "tags", ())


@cache
def view_form(op: Any) -> Any | None:
    """The operator that makes a view where this one changes the tensor itself: `aten.squeeze` for `aten.squeeze_`."""
    name = op._schema.name.partition("::")[2] if changes_metadata(op) else ""
    return _torch.operator(_VIEWS[name].format(op._overloadname or "default")) if name in _VIEWS else None


def written_result(node: fx.Node) -> fx.Node | None:
    """The argument that the node changes in place and returns as it is; None where there is none."""
    written = writes(node)
    if len(written) != 1 or changes_metadata(node.target):
        return None
    returns = node.target._schema.returns  # type: ignore[union-attr]
    marked = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
    return written[0] if marked else None


def is_random(node: fx.Node) -> bool:
    """Whether the node draws from a random generator."""
    tagged = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return tagged and argument(node, "dropout_p") != 0.0


def argument(node: fx.Node, name: str) -> Any:
    """What the node passes under a name of the operator's schema, or its default; None where there is no such name."""
    for i, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if formal.name == name:
            given = node.args[i] if i < len(node.args) else formal.default_value
            return node.kwargs.get(name, given)
    return None


def has_effect(node: fx.Node) -> bool:
    """Whether the node must run even if nobody uses its result."""
    op: Any = node.target
    if op is operator.getitem:
        return False
    if not isinstance(op, _torch.OpOverload) or op.namespace not in _MADE_HERE:
        return True
    return bool(writes(node)) or is_random(node) or not op._schema.returns


def results_of(node: fx.Node) -> list[fx.Node]:
    """The nodes of an operator's several results, or the node itself."""
    return [u for u in node.users if u.target is operator.getitem] or [node]


def aliases_input(node: fx.Node) -> bool:
    """Whether the result shares memory with an argument of the node, or of the operator that it is one result of."""
    storage = storage_of(node)
    made_by: Any = node.args[0] if node.target is operator.getitem else node
    return storage is not None and storage in {storage_of(n) for n in made_by.all_input_nodes}


def is_view(node: fx.Node) -> bool:
    """Whether the node does nothing but make an alias of its first argument, its only tensor."""
    if node.target is operator.getitem or not aliases_input(node) or has_effect(node):
        return False
    return node.all_input_nodes == [node.args[0]]


def is_complex(node: fx.Node) -> bool:
    """Whether the node's result is a tensor of complex numbers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def stands_alone(node: fx.Node) -> bool:
    """Whether an alias is none to autograd: it has a version of its own, and a history that changes in place add to.

    So are results of `aten._unsafe_view`, with which `x @ w` and `reshape` end, and zeros that C++ hands on detached.
    """
    value: torch.Tensor = node.meta["val"]
    return value.requires_grad and not value._is_view()


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors differ in nothing but their elements and their place in memory."""
    mine, others = (
        (t.dtype, t.shape, t.stride(), t.device, t.is_conj(), t.is_neg()) for t in (a.meta["val"], b.meta["val"])
    )
    return mine == others


def storage_of(node: fx.Node) -> int | None:
    """A number that two nodes share exactly when their tensors share memory; None for what is no tensor.

    Nodes of one expansion that stands at several places share their fake tensors, so they carry a number.
    """
    if "storage" in node.meta:
        return node.meta["storage"]  # type: ignore[no-any-return]
    value = node.meta.get("val")
    return _torch.storage_key(value) if isinstance(value, torch.Tensor) else None


_UNKNOWN_SIZE = 1 << 10  # a guess at sizes that depend on data


def nbytes(node: fx.Node) -> int:
    """Bytes of the elements of a node's tensor; 0 for what is none."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(n if type(n) is int else _UNKNOWN_SIZE for n in value.shape) * value.element_size()


def storage_bytes(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to the last element of a strided tensor.

    >>> storage_bytes((2, 3), (3, 1), torch.float32), storage_bytes((0, 3), (3, 1), torch.float32)
    (24, 0)
    """
    if math.prod(shape) == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.itemsize


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
