"""Prims that are made of simpler ones here: extremes with their places, writes at few places, small products."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from primexec import effects
from primexec.executors.llvm import convolution, maps, products, windows
from primexec.executors.llvm.late_views import move_views
from primexec.executors.llvm.schedule import SCANS, prim, step, value
from primexec.lowering.expand import Expansion, expand_by, inline
from primexec.passes.common import merge_equal, remove_no_ops

_prims = torch.ops.prims
FEW_PLACES = 4
Rule = Callable[..., Any]


# Extremes ------------------------------------------------------------------------------------------------


def _places(a: Tensor, dims: list[int]) -> Tensor:
    """Row-major numbers of the elements along some dimensions, in the smallest dtype that counts as far."""
    dtype = torch.int32 if a.numel() < 2**31 else torch.int64
    found, count = torch.zeros((), dtype=dtype), 1
    for d in reversed(dims):
        along = torch.arange(a.shape[d], dtype=dtype) * count
        found = found + along.reshape([-1 if d == e else 1 for e in range(a.dim())])
        count *= a.shape[d]
    return found.expand(a.shape)


def _extreme(a: Tensor, dims: list[int], kind: str) -> Tensor:
    """The place of the first extreme, or of the first NaN."""
    if not dims or not a.numel():
        return torch.zeros([n for d, n in enumerate(a.shape) if d not in dims], dtype=torch.int64)
    best = getattr(_prims, kind).default(a, dims)
    for d in dims:
        best = best.unsqueeze(d)
    here = a == best
    if a.is_floating_point():
        here = here | (a != a)
    places = _places(a, dims)
    first: Tensor = _prims.amin.default(torch.where(here, places, torch.iinfo(places.dtype).max), dims)
    return first.to(torch.int64)


def _arg(kind: str) -> Rule:
    def rule(a: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        dims = list(range(a.dim())) if dim is None else [dim % a.dim()] if a.dim() else []
        found = _extreme(a, dims, kind)
        for d in dims if keepdim else ():
            found = found.unsqueeze(d)
        return found

    return rule


def _with_place(kind: str) -> Rule:
    def rule(a: Tensor, dim: int, keepdim: bool = False) -> Any:
        if not a.dim():
            return a.clone(), torch.zeros((), dtype=torch.int64)
        dim %= a.dim()
        place = _extreme(a, [dim], kind).unsqueeze(dim)
        best = torch.gather(a, dim, place)
        return (best, place) if keepdim else (best.squeeze(dim), place.squeeze(dim))

    return rule


# Scans with places ---------------------------------------------------------------------------------------


def _running(scan: Any) -> Rule:
    """The place of a running extreme is the last one so far that equals it."""

    def rule(a: Tensor, dim: int) -> Any:
        if not a.dim():
            return a.clone(), torch.zeros((), dtype=torch.int64)
        dim %= a.dim()
        best, _ = scan(a, dim)
        here = a == best
        if a.is_floating_point():
            here = here | (a != a)
        last, _ = torch.ops.aten.cummax.default(torch.where(here, _places(a, [dim]), 0), dim)
        return best, last.to(torch.int64)

    return rule


# Writes at few places ------------------------------------------------------------------------------------


def _written(change: Callable[[Tensor, Any], Any]) -> Rule:
    """Each element asks whether it is written to, where all of them can be asked."""

    def rule(a: Tensor, dim: int, index: Tensor, source: Any) -> Any:
        if not a.dim() or not index.numel():
            return "nothing is written, or to a number"
        dim %= a.dim()
        others = [n for d, n in enumerate(a.shape) if d != dim]
        if index.shape[dim] > FEW_PLACES or [n for d, n in enumerate(index.shape) if d != dim] != others:
            return f"more than {FEW_PLACES} places along a dimension, or not all of the others, are written to"
        numbers = torch.arange(a.shape[dim], dtype=torch.int32).reshape([-1 if d == dim else 1 for d in range(a.dim())])
        numbers = numbers.expand(a.shape)
        for k in range(index.shape[dim]):
            checked = torch.gather(numbers, dim, index.narrow(dim, k, 1))
            new = source.narrow(dim, k, 1) if isinstance(source, Tensor) else torch.full((), source, dtype=a.dtype)
            for d, n in enumerate(index.shape) if new.dim() else ():
                new = new.narrow(d, 0, n if d != dim else 1)
            a = torch.where(numbers == checked, change(a, new), a)
        return a.clone() if not index.shape[dim] else a

    return rule


def _kept(*args: Any, **kwargs: Any) -> str:
    return "it is a write in memory"


def _in_float32(op: Any, rule: Rule) -> Rule:
    """Half precision is added up in float32, as in eager."""

    def wide(a: Tensor, dim: int, index: Tensor, source: Tensor, *rest: Any, **kwargs: Any) -> Any:
        if a.dtype not in (torch.bfloat16, torch.float16):
            return rule(a, dim, index, source, *rest, **kwargs)
        return op(a.float(), dim, index, source.float(), *rest, **kwargs).to(a.dtype)

    return wide


_replaced, _added = _written(lambda old, new: new), _written(lambda old, new: old + new)

OWN: dict[str, Rule] = {
    "aten.cummax.default": _running(torch.ops.aten.cummax.default),
    "aten.cummin.default": _running(torch.ops.aten.cummin.default),
    "aten.scatter.value": _replaced,
    "aten.scatter.src": _replaced,
    "aten.scatter_add.default": _in_float32(torch.ops.aten.scatter_add.default, _added),
    "aten.scatter_reduce.two": _in_float32(torch.ops.aten.scatter_reduce.two, _kept),
    "aten.index_put.default": _kept,
    "prims.as_strided_scatter.default": _kept,
    "aten.argmax.default": _arg("amax"),
    "aten.argmin.default": _arg("amin"),
    "aten.max.dim": _with_place("amax"),
    "aten.min.dim": _with_place("amin"),
    "aten.mm.default": products.product,
    "aten.bmm.default": products.product,
    "aten.convolution.default": convolution.convolution,
    "aten.convolution_backward.default": convolution.convolution_backward,
    "aten.avg_pool2d.default": windows.mean_pool(2),
    "aten.avg_pool3d.default": windows.mean_pool(3),
    "aten.avg_pool2d_backward.default": windows.mean_pool_backward(2),
    "aten.avg_pool3d_backward.default": windows.mean_pool_backward(3),
    "aten.max_pool2d_with_indices.default": windows.max_pool(2),
    "aten.max_pool3d_with_indices.default": windows.max_pool(3),
}


# Rewriting -----------------------------------------------------------------------------------------------


def is_own(node: fx.Node) -> bool:
    """Whether a node is computed by simpler prims, or writes in memory and has not been prepared."""
    ready = node.meta.get("written") or (prim(node) in SCANS and isinstance(node.meta["val"], Tensor))
    return str(node.target) in OWN and not ready


def expansion(node: fx.Node) -> Expansion | str:
    """The simpler prims; or why there are none."""
    return expand_by(node, OWN[str(node.target)])


def rewritten(graph: fx.Graph) -> fx.Graph:
    """A copy with the simpler prims in place, equal ones merged, and copies before writes."""
    graph = _once(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_async.msg):
        node.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")  # the place that stands for it
    if any(_bounds(n)[3] != 1 for n in graph.find_nodes(op="call_function", target=_SLICES)):
        remove_no_ops(graph)
        merge_equal(graph)
        _write_slices(graph)
    while any(is_own(n) and isinstance(expansion(n), Expansion) for n in graph.nodes if n.op == "call_function"):
        graph = _once(graph)
    move_views(graph)
    remove_no_ops(graph)
    merge_equal(graph)
    if any(_is_write(n) for n in graph.nodes):  # last: it would be taken for a copy that changes nothing
        graph, _ = with_copies(graph, lambda n: _is_write(n) and not _goes_on(n), value)
        for node in filter(_is_write, graph.nodes):
            node.meta["written"] = True
    if any(_is_no_view_of_memory(n) for n in graph.nodes):
        graph, _ = with_copies(graph, _is_no_view_of_memory, lambda n: _contiguous(value(n.args[0])))  # type: ignore[arg-type]
    return graph


def _is_write(node: fx.Node) -> bool:
    return node.op == "call_function" and is_own(node)


def _goes_on(node: fx.Node) -> bool:
    """Whether a node writes to what another write has made for it alone."""
    whole: Any = node.args[0]
    return _is_write(whole) and len(whole.users) == 1 and node.args.count(whole) == 1


_SLICES = torch.ops.aten.slice_scatter.default


def _bounds(node: fx.Node) -> tuple[int, int, int, int]:
    return maps.bounds(node, 1 if prim(node) == "slice" else 2, value(node.args[0]).shape)  # type: ignore[arg-type]


def _write_slices(graph: fx.Graph) -> None:
    """Slices with steps as writes in memory; slices of slices are written to at once."""
    for node in reversed(graph.find_nodes(op="call_function", target=_SLICES)):
        whole, part = cast(tuple[fx.Node, fx.Node], node.args[:2])
        chain, base = [_bounds(node)], whole
        while part.target is _SLICES and _is_slice(part.args[0], base, chain[-1]):
            chain.append(_bounds(part))
            base, part = cast(tuple[fx.Node, fx.Node], part.args[:2])
        if not node.users or all(by == 1 for *_, by in chain) or not value(part).numel():
            continue
        strides, offset = list(effects.row_major(value(whole).shape)), 0
        for dim, start, _, by in chain:
            offset += start * strides[dim]
            strides[dim] *= by
        node.target = _prims.as_strided_scatter.default
        node.args, node.kwargs = (whole, part, list(value(part).shape), strides, offset), {}
    remove_no_ops(graph)


def _is_slice(node: Any, base: fx.Node, bounds: tuple[int, int, int, int]) -> bool:
    return prim(node) == "slice" and node.args[0] is base and _bounds(node) == bounds


def _is_no_view_of_memory(node: fx.Node) -> bool:
    """Whether a view that no index map makes is none of its argument's memory either, but of a contiguous copy."""
    if prim(node) != "view" or step(node, maps.identity(value(node).shape), value(node).dim()) is not None:
        return False
    t = value(node.args[0])  # type: ignore[arg-type]
    try:
        torch.empty_strided(t.shape, t.stride(), device="meta").view(value(node).shape)
    except RuntimeError:
        return True
    return False


def _contiguous(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def with_copies(
    graph: fx.Graph, chosen: Callable[[fx.Node], bool], laid_out: Callable[[fx.Node], Tensor]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph where the chosen nodes take copies of their first arguments, and the nodes that stand for those before.

    `laid_out` gives a copy's metadata.
    """
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = copy = made.node_copy(node, copies.__getitem__)
        if chosen(node):
            with made.inserting_before(copy):
                fresh = made.call_function(_prims.clone.default, (copy.args[0],))
            fresh.meta.update(copy.meta, val=laid_out(node))
            copy.args = (fresh, *copy.args[1:])
    return made, copies


def _lay_out(made: Sequence[fx.Node | None], said: Any) -> None:
    """Gives results the strides that they are said to have along dimensions of size 1, which reach nothing."""
    for node, like in zip(made, said if isinstance(said, (tuple, list)) else [said], strict=False):
        if node is None or like is None or value(node).stride() == like.stride():
            continue
        pairs = zip(value(node).stride(), like.stride(), like.shape, strict=True)
        if all(old == new or n == 1 for old, new, n in pairs):
            node.meta["val"] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def _once(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.target is operator.getitem:
            copies[node] = copies[node.args[0]][node.args[1]]
            continue
        parts = expansion(node) if node.op == "call_function" and is_own(node) else None
        if isinstance(parts, Expansion):
            results = inline(parts, node, made, [copies[n] for n in node.all_input_nodes])
            _lay_out(results, node.meta["val"])
            if isinstance(node.meta["val"], (tuple, list)):
                copies[node] = results
                taken = {results[u.args[1]] for u in node.users}
                inlined = sum(n.op == "call_function" for n in parts.graph.nodes)
                for new in list(itertools.islice(reversed(made.nodes), inlined)):
                    if not new.users and new not in taken:  # nobody asked for that result
                        made.erase_node(new)
            else:
                copies[node] = results[0]
            continue
        copies[node] = made.node_copy(node, copies.__getitem__)
    for node in made.find_nodes(op="call_function", target=operator.getitem):
        scan: Any = node.args[0]  # a running extreme: its values alone
        scan.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(scan)
        made.erase_node(node)
    return made
