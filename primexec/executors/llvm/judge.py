"""Which nodes the executor takes, and why not the others; from metadata only."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.base import YES, Support, no
from primexec.executors.llvm import indirect, maps, own, piecewise, products, writes
from primexec.executors.llvm.indirect import INDIRECT
from primexec.executors.llvm.instructions import (
    COPIES,
    DTYPES,
    F16,
    FLOATS,
    INTEGER_DIVISIONS,
    INTEGERS,
    REDUCTIONS,
    pointwise,
)
from primexec.executors.llvm.maps import VIEWS
from primexec.executors.llvm.piecewise import PIECEWISE
from primexec.executors.llvm.schedule import ASSERTION, SCANS, prim, reduced_axes
from primexec.executors.llvm.target import host
from primexec.executors.llvm.writes import SCATTERS
from primexec.prims import lookup

_NUMBERS = (bool, int, float)


def support(node: fx.Node) -> Support:
    """Whether there is code for a node."""
    if lookup(node.target) is None:
        return no("it is no prim")
    if own.is_own(node) and prim(node) not in SCANS:
        found = _judge_own(node)
        return found if found or prim(node) not in SCATTERS else _judge_write(node)
    t = node.meta.get("val")
    if prim(node) == ASSERTION:
        return _judge_assertion(node)
    if prim(node) in SCANS:
        return _judge_scan(node)
    if not isinstance(t, Tensor):
        return no("it has several results")
    for operand in (t, *(n.meta.get("val") for n in node.all_input_nodes)):
        reason = unfit(operand)
        if reason:
            return no(reason)
    return _judge(node)


def _judge_assertion(node: fx.Node) -> Support:
    asked: Any = node.args[0]
    t: Tensor = asked.meta["val"]
    reason = unfit(t) or ("" if t.dtype is torch.bool and not t.dim() else "it asks what is no bool, or no number")
    return no(reason) if reason else YES


def _judge_write(node: fx.Node) -> Support:
    t = node.meta["val"]
    for operand in (t, *(n.meta.get("val") for n in node.all_input_nodes)):
        reason = unfit(operand)
        if reason:
            return no(reason)
    reason = writes.why_not(node, prim(node))
    if reason:
        return no(reason)
    source = writes.write_of(node, prim(node)).source
    if isinstance(source, fx.Node) and source.meta["val"].dtype != t.dtype:
        return no("operands of different dtypes")
    return YES


def _judge_own(node: fx.Node) -> Support:
    for operand in node.all_input_nodes:
        reason = unfit(operand.meta.get("val"))
        if reason:
            return no(reason)
    if own.OWN[str(node.target)] is products.product and (reason := products.why_not(node)):
        return no(reason)
    expansion = own.expansion(node)
    if isinstance(expansion, str):
        return no(expansion)
    for part in expansion.prims:
        found = YES if part.target is operator.getitem else support(part)
        if not found:
            return no(f"{part.target}: {found.reason}")
    return YES


def _judge_as_strided(node: fx.Node) -> Support:
    """Where it is a view of contiguous memory in another shape, or steps in it are steps along dimensions."""
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if maps.is_reshaped(source, result):
        return YES
    found = VIEWS["as_strided"](node, source.shape, maps.identity(tuple(result.shape)), result.dim())
    return YES if found is not None else no("it is no view of contiguous memory in another shape, nor windows")


def unfit(t: Any) -> str:
    """Why a tensor cannot be read or written; empty where it can."""
    if not isinstance(t, Tensor):
        return "an operand is no tensor"
    if t.dtype not in DTYPES:
        return f"the dtype {t.dtype} has no instructions here"
    if t.device.type != "cpu" or t.layout is not torch.strided:
        return f"a tensor is {t.layout} on {t.device}, not strided on the CPU"
    if t.is_neg() or t.is_conj():
        return "a tensor carries a lazy negation or conjugation"
    if any(type(n) is not int for n in (*t.shape, *t.stride())):
        return "a size is not known"
    target = host()
    if t.dtype is F16 and not ("+f16c" in target.features or target.triple.startswith("aarch64")):
        return "this CPU has no conversions of float16"
    return ""


def _judge(node: fx.Node) -> Support:
    """Whether there is code for a prim of fit operands."""
    name, t = prim(node), node.meta["val"]
    if name == "as_strided":
        return _judge_as_strided(node)
    if name in VIEWS or name in COPIES or name == "full":
        return YES
    reason = ""
    if name in INDIRECT:
        reason = indirect.why_not(node, name)
    elif name in PIECEWISE:
        reason = piecewise.why_not(node, name, [n.meta["val"].shape for n in node.all_input_nodes])
    if name in INDIRECT or name in PIECEWISE:
        return no(reason) if reason else YES
    if name == "iota":
        whole = all(isinstance(node.kwargs[k], int) for k in ("start", "step"))
        return YES if whole else no("iota of fractions")
    operands = [n.meta["val"] for n in node.all_input_nodes]
    if name == "convert_element_type":
        return YES
    if name in REDUCTIONS:
        return _judge_reduction(node, operands[0], t)
    if name == "where":
        return YES if node.args[0].meta["val"].dtype is torch.bool else no("the predicate is not bool")  # type: ignore[union-attr]
    if any(v.dtype != operands[0].dtype for v in operands) or not operands:
        return no("operands of different dtypes")
    if any(not isinstance(a, (fx.Node, *_NUMBERS)) for a in node.args) or node.kwargs:
        return no("an argument is neither tensor nor number")
    if operands[0].dtype not in FLOATS and any(isinstance(a, float) for a in node.args):
        return no("a float beside integers")
    if name in INTEGER_DIVISIONS and operands[0].dtype in INTEGERS and not _divides(node.args[1]):
        return no("a division of integers by what may be 0")
    if pointwise(name, operands[0].dtype) is None:
        return no(f"there is no code for {name} of {operands[0].dtype}")
    return YES


def _divides(divisor: Any) -> bool:
    return isinstance(divisor, int) and divisor != 0


def _judge_scan(node: fx.Node) -> Support:
    """`cummax` and `cummin` have two results, of which the first is a scan; `own.py` makes the second from scans."""
    results: Any = node.meta.get("val")
    values: list[Any] = list(results) if isinstance(results, (tuple, list)) else [results]
    for operand in (*values, node.all_input_nodes[0].meta.get("val")):
        reason = unfit(operand)
        if reason:
            return no(reason)
    if not values[0].dim():
        return no("a scan of a number")
    if prim(node) == "logcumsumexp" and values[0].dtype not in FLOATS:
        return no("logcumsumexp of integers")
    return YES


def _judge_reduction(node: fx.Node, source: Tensor, result: Tensor) -> Support:
    name = prim(node)
    if source.dim() and not reduced_axes(node):
        return no("a reduction over no dimension")
    if name in ("amax", "amin") and not source.numel():
        return no("the extreme of nothing")
    if name in ("sum", "prod") and (source.dtype in FLOATS) != (result.dtype in FLOATS):
        return no("a sum of one kind of numbers in another")
    return YES
