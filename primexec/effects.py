"""What a node does besides computing its result. Unknown operators are taken to have effects."""

from __future__ import annotations

import operator
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
_MADE_HERE = frozenset({"aten", "prims"})


def writes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors this node changes in place."""
    op: Any = node.target
    if not isinstance(op, _torch.OpOverload):
        return []
    name = op._schema.name.partition("::")[2]
    undeclared = _UNDECLARED_WRITES.get(name, ())
    if name == "native_batch_norm" and argument(node, "training") is False:
        undeclared = ()
    found = [a for i in undeclared if i < len(node.args) and isinstance(a := node.args[i], fx.Node)]
    for i, formal in enumerate(op._schema.arguments):
        if formal.alias_info is not None and formal.alias_info.is_write:
            actual = node.kwargs.get(formal.name, node.args[i] if i < len(node.args) else None)
            fx.node.map_arg(actual, found.append)
    return found


def written_result(node: fx.Node) -> fx.Node | None:
    """The argument that the node changes in place and returns as it is; None where there is none."""
    written = writes(node)
    if len(written) != 1 or torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
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


def aliases_input(node: fx.Node) -> bool:
    """Whether the result shares memory with an argument of the node."""
    storage = storage_of(node)
    return storage is not None and storage in {storage_of(n) for n in node.all_input_nodes}


def is_view(node: fx.Node) -> bool:
    """Whether the node does nothing but make an alias of its first argument, its only tensor."""
    return aliases_input(node) and not has_effect(node) and node.all_input_nodes == [node.args[0]]


def storage_of(node: fx.Node) -> int | None:
    """A number that two nodes share exactly when their tensors share memory; None for what is no tensor.

    Nodes of one expansion that stands at several places share their fake tensors, so they carry a number.
    """
    if "storage" in node.meta:
        return node.meta["storage"]  # type: ignore[no-any-return]
    value = node.meta.get("val")
    return _torch.storage_key(value) if isinstance(value, torch.Tensor) else None
