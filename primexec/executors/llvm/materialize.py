"""What reductions in several kernels would compute again for themselves, and is cheaper kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from primexec.executors.llvm import maps
from primexec.executors.llvm.costs import GATHER_COST, READ_COST, prim_cost
from primexec.executors.llvm.maps import VIEWS, Map
from primexec.executors.llvm.schedule import State, prim, value

KERNEL_COST = 1 << 10  # of one more kernel, in additions of an element

Reads = Callable[[fx.Node, tuple[int, ...]], list[tuple[fx.Node, Map | None]]]


def materialized(nodes: Sequence[fx.Node], state: State, reads: Reads) -> dict[fx.Node, str]:
    """The nodes to keep, and why, where the roots so far have been placed.

    Only kernels that reduce count: what else a kernel reads is about as much as it writes.
    """
    found: dict[fx.Node, str] = {}
    points: dict[fx.Node, dict[int, int]] = {}  # for each node the kernels that compute it, and at how many points
    for node in reversed(nodes):
        t = value(node)
        here: dict[int, int] = {}
        for user in node.users:
            uses = points.get(user, {})
            if user in state.place:
                kernel = state.place[user]
                uses = {kernel: t.numel()} if state.groups[kernel].axes else {}
            for kernel, count in uses.items():
                here[kernel] = max(here.get(kernel, 0), min(count, t.numel()))
        points[node] = here
        if len(here) < 2 or not t.numel() or node in state.roots or prim(node) in VIEWS:
            continue
        again, read = _cost(node, state, reads), _read_cost(node)
        kept = t.numel() * (again + 2 * read) + KERNEL_COST  # a line is fetched to be written
        if sum(here.values()) * (again - read) > kept:
            found[node] = f"kept: {len(here)} reductions read it"
            points[node] = {}
    return found


def _cost(node: fx.Node, state: State, reads: Reads) -> float:
    """What an element costs to compute, in additions of a vector; what fewer elements share costs less."""
    t = value(node)
    total, seen, waiting = 0.0, {node}, [node]
    while waiting:
        part = waiting.pop()
        total += prim_cost(prim(part)) * min(1.0, value(part).numel() / t.numel())
        more = [n for n in part.all_input_nodes if n not in seen and n not in state.roots and n not in state.buffer_of]
        seen.update(more)
        waiting += more
    lane = min((a for a, n in enumerate(t.shape) if n != 1), key=t.stride, default=None)
    for source, index in reads(node, tuple(t.shape)):
        term = maps.linear(index, value(source).stride(), t.dim()) if index else maps.constant(0, t.dim())
        if term.reads or (lane is not None and term.strides[lane] not in (0, 1)):
            total += GATHER_COST
        elif lane is not None and term.strides[lane]:
            total += _read_cost(source)
    return total


def _read_cost(node: fx.Node) -> float:
    return READ_COST * float(value(node).dtype.itemsize) / 4
