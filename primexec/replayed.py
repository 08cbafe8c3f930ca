"""Programs whose backward pass is left to PyTorch's autograd, which records it while their operators run.

A node of our own costs 14 µs and more a call. Where the programs run PyTorch's kernels, or next to nothing, that is all
that it changes. It is left out where the autograd graph that the program's operators make by themselves is the one that
the function made: the same nodes, edges and leaves, and a backward pass of the same operators. Hooks, custom functions
and what the function hid from autograd make it another one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_autograd, _torch_capture, _torch_formulas, effects
from primexec.executors.base import RegionFunction
from primexec.joint import Joint
from primexec.partition import Plan, gains_nothing
from primexec.placement import is_free
from primexec.prims import Prim, lookup
from primexec.program import Program
from primexec.tracer import UNRECORDED

NOTE = "autograd records the operators one by one: a node of our own would cost more than it gains"
OPERATORS = 32  # in a program of more of them a node costs little
FEW = 2
ELEMENTS = 4096  # kernels of so many take less time than a node
QUICK_ELEMENTS = 1 << 15  # kernels that are no faster than PyTorch's gain less than a node costs
_QUICK = frozenset({"broadcast_in_dim", "div", "exp", "log", "reciprocal", "rsqrt", "sqrt"})


def is_worthwhile(joint: Joint, forward: Plan, planned: Callable[[], Plan]) -> bool:
    """Whether a node of our own would cost more than kernels of our own gain.

    Args:
        planned: plans the backward pass, which takes its time.
    """
    if len(forward.program.nodes) > OPERATORS or len((backward := planned()).program.nodes) > OPERATORS:
        return False
    plans = forward, backward
    if (all(map(_is_small, plans)) and not _is_loss(forward)) or (
        _keeps_size(forward) and _is_quick(forward, 1) and _is_quick(backward, FEW)
    ):
        return True
    # Where autograd chooses one of two formulas by values, a backward program computes both.
    roots = [n.meta["val"] for n in joint.recorder.roots]
    if _gains_nothing(forward) and (_torch_formulas.has_choices(roots) or _gains_nothing(backward)):
        return True
    return all(map(_is_arithmetic, plans))


def _is_arithmetic(plan: Plan) -> bool:
    """Whether the program is one operator of comparisons, products and their like, which integers have as well."""
    rows = _prims(plan, 1)
    return bool(rows) and all(row is not None and _for_integers(row) for row in rows)


def _is_quick(plan: Plan, operators: int) -> bool:
    """Whether it is a few operators, not large, that PyTorch computes as fast in vectors: softmax, layer norm."""
    rows = _prims(plan, operators)
    quick = [row and (row.family == "reduction" or row.name in _QUICK or _for_integers(row)) for row in rows]
    return bool(rows) and all(quick) and _is_at_most(QUICK_ELEMENTS, plan)


def _is_loss(plan: Plan) -> bool:
    """Whether it is one operator that makes a number of several tensors, for which PyTorch takes several passes."""
    working = _working(plan)
    one = len(working) == 1 and len(working[0].all_input_nodes) > 1 and len(effects.results_of(working[0])) == 1
    return one and _is_at_most(1, plan)


def _keeps_size(plan: Plan) -> bool:
    """Whether the results are about as large as the inputs: PyTorch makes losses and variances in several passes."""
    inputs = [n.meta["val"] for n in plan.program.graph_module.graph.find_nodes(op="placeholder")]
    sizes = [n for t in inputs if isinstance(t, Tensor) and isinstance(n := t.numel(), int)]
    return not _is_at_most(max(sizes, default=0) // 2 - 1, plan)


def _prims(plan: Plan, most: int) -> list[Prim | None]:
    """The prims of a program of so many operators at most; none of others, nor where one has no expansion."""
    working = _working(plan)
    expansions = [plan.claims[n].expansion for n in working]
    if len(working) > most or not all(expansions):
        return []
    return [lookup(p.target) for e in expansions if e for p in e.prims if p.all_input_nodes]


def _for_integers(row: Prim) -> bool:
    return row.family == "pointwise" and "int32" in row.dtypes.split()


def _gains_nothing(plan: Plan) -> bool:
    regions = zip(plan.nodes, plan.regions, strict=True)
    return all(region.executor == "aten" or gains_nothing(nodes, plan.claims) for nodes, region in regions)


def _is_small(plan: Plan) -> bool:
    return len(_working(plan)) <= FEW and _is_at_most(ELEMENTS, plan)


def _working(plan: Plan) -> list[fx.Node]:
    return [n for n in plan.program.nodes if not is_free(n) and n.target is not operator.getitem]


def _is_at_most(elements: int, plan: Plan) -> bool:
    """Whether no result has more elements."""
    results = [t.meta.get("val") for n in _working(plan) for t in effects.results_of(n)]
    sizes = [t.numel() for t in results if isinstance(t, Tensor)]
    return all(isinstance(size, int) and size <= elements for size in sizes)


def records_itself(joint: Joint, program: Program, run: RegionFunction) -> bool:
    """Whether the program, run under autograd, makes the autograd graph that the function made.

    Args:
        run: the program on PyTorch's kernels.
    """
    tracer = joint.recorder.tracer
    inputs = [n.meta.get("val") for n in program.graph_module.graph.find_nodes(op="placeholder")]
    if not all(isinstance(t, Tensor) for t in inputs) or any(map(effects.has_effect, program.nodes)):
        return False
    if any(isinstance(s, _torch.SYMBOLS) for n in program.nodes for s in _sizes(n)):
        return False
    if tracer.hooks or tracer.unpacks or _torch.any_autocast_enabled() or None in joint.recorder.usual[0]:
        return False
    with _torch_capture.capture_environment(tracer.entrances), tracer.fake_mode, torch.enable_grad():
        try:
            made = run(*inputs)
        except Exception:  # an operator that only a trace can run without values
            return False
        known = [n.meta["val"] for n in program.outputs]
        returned = list(zip(known, made, strict=True))[: len(joint.results)]
        if not all(isinstance(a, Tensor) and _alike(a, b) for a, b in returned):
            return False
        if not _torch_autograd.same_graphs([(a.grad_fn, b.grad_fn) for a, b in returned]):
            return False
        roots = [made[i] for i in joint.roots]
        return all(r.requires_grad for r in roots) and _backward(joint, inputs, roots) == joint.recorder.operators


def _sizes(node: fx.Node) -> Iterable[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else (value,)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.requires_grad == b.requires_grad and a._is_view() == b._is_view()


def _backward(joint: Joint, inputs: list[Any], roots: list[Tensor]) -> Counter[Any]:
    """The operators of the backward pass from these roots."""
    tangents = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in roots]
    wanted = [inputs[i] for i in joint.inputs]
    operators = _Operators()
    with operators, _torch_formulas.as_eager_chooses(roots):
        torch.autograd.grad(roots, wanted, tangents, retain_graph=True, allow_unused=True)
    return operators.seen


class _Operators(_torch.TorchDispatchMode):  # type: ignore[misc]
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace not in UNRECORDED:
            self.seen[op] += 1
        return op(*args, **(kwargs or {}))
