"""Decisions that depend on little are made before anything large is written, so that nothing large must be put back.

An optimizer that decides by the counter of its steps does so for one parameter after the other, each behind writes
to the last one. What such decisions are made of moves to the front of the program. The memory of the inputs in it must
be no other input's then, which is checked at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, fx

from primexec import _torch, effects
from primexec.decisions import decide, draws

if TYPE_CHECKING:
    from primexec.program import ApiCall
    from primexec.tracer import Tracer

FEW = 64  # elements of a tensor that costs nothing to copy


def decide_first(tracer: Tracer) -> tuple[str, ...]:
    """Move what decides to the front of the graph, where something else is written before.

    Returns:
        The inputs that must share no memory with others from now on.
    """
    nodes = [n for n in tracer.graph.nodes if n.op == "call_function"]
    last = max((i for i, n in enumerate(nodes) if n.target is decide), default=-1)
    nodes = nodes[: last + 1]
    needed = _needed(nodes)
    others = [n for n in nodes if n not in needed]
    if not any(map(effects.writes, others)) or not _may_move(nodes, needed, tracer.calls):
        return ()
    memory = {effects.storage_of(t) for n in needed for t in n.all_input_nodes}
    inputs = [n for n in tracer.graph.find_nodes(op="placeholder") if _is_tensor(n)]
    few = [n.name for n in inputs if effects.storage_of(n) in memory]
    made = tracer.outermost().nodes
    real = {made[_torch.identity(stand_in)].name: t for t, stand_in in tracer._lifts.values() if isinstance(t, Tensor)}
    if not Apart(len(few))(*(real[name] for name in arranged(few, [n.name for n in inputs]))):
        return ()
    for node in needed:
        others[0].prepend(node)
    return tuple(few)


def arranged(few: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """The order in which `Apart` takes inputs."""
    return [*few, *(name for name in inputs if name not in few)]


class Apart:
    """Whether each of the first tensors lies in memory of its own; always of the same sizes and strides.

    Args:
        few: how many the first ones are.
    """

    def __init__(self, few: int) -> None:
        self._few, self._known = few, list[int]()

    def __call__(self, *tensors: Tensor) -> bool:
        addresses = [t.data_ptr() for t in tensors]
        if addresses == self._known:
            return True
        sizes = [effects.storage_bytes(t.shape, t.stride(), t.dtype) for t in tensors]
        spans = sorted((a, a + n, i < self._few) for i, (a, n) in enumerate(zip(addresses, sizes, strict=True)))
        end = end_of_few = 0
        for start, stop, is_one in spans:
            if start < (end if is_one else end_of_few):
                return False
            end = max(end, stop)
            end_of_few = max(end_of_few, stop if is_one else 0)
        self._known = addresses
        return True


def _needed(nodes: list[fx.Node]) -> dict[fx.Node, None]:
    """What decisions are made of, writes included, in the order of the program."""
    found: set[fx.Node] = set()
    read: set[int | None] = set()
    for node in reversed(nodes):
        if node.target is decide or node in found or any(effects.storage_of(w) in read for w in effects.writes(node)):
            found |= {node, *node.all_input_nodes}
            read |= {effects.storage_of(n) for n in node.all_input_nodes} - {None}
    return {n: None for n in nodes if n in found}


def _may_move(nodes: list[fx.Node], needed: dict[fx.Node, None], calls: Sequence[ApiCall]) -> bool:
    touched: set[int | None] = set()  # by what comes later then
    for node in nodes:
        memory = {s for n in (*node.all_input_nodes, node) if (s := effects.storage_of(n)) is not None}
        if node not in needed:
            touched |= memory
        elif draws(node) or not _is_small(node) or any(effects.storage_of(w) in touched for w in effects.writes(node)):
            return False
    return all(len({n in needed for n in call.nodes}) == 1 for call in calls)


def _is_small(node: fx.Node) -> bool:
    """Whether a node works on few elements, and does nothing but compute and write."""
    known = node.target is decide or not isinstance(node.target, _torch.OpOverload) or bool(node.target._schema.returns)
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    tensors = [v for v in values if isinstance(v, Tensor)]
    return known and all(type(n) is int for v in tensors for n in v.shape) and all(v.numel() <= FEW for v in tensors)


def _is_tensor(placeholder: fx.Node) -> bool:
    """Whether an input is a tensor of somebody's; a number's is made for the call."""
    return isinstance(placeholder.meta.get("val"), Tensor) and "largest" not in placeholder.meta
