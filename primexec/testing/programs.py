"""Random whole programs, whose results are known exactly.

The inputs are small integers, and a step is kept only while no result, in whatever order its terms are added,
leaves the integers that the dtype holds exactly. So every executor, however it fuses and reorders, must give
the same numbers as float64, to the bit; only operators that end a program are compared by their tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from primexec.executors.base import Executor
from primexec.prims import TABLE
from primexec.testing import checks, oracle
from primexec.testing.exploration import explore
from primexec.testing.regions import Builder
from primexec.testing.report import Finding
from primexec.testing.tolerance import TOLERANCES, differ

# Integers up to this are exact in a dtype, sums of them in any order too.
_EXACT = {
    torch.bfloat16: 2.0**8, torch.float16: 2.0**11, torch.float32: 2.0**24, torch.float64: 2.0**50,
    torch.int64: 2.0**50,
}  # fmt: skip
_SHAPES = ((3, 5), (5,), (2, 3, 4), (1, 7), (), (13, 11), (0, 3), (4, 1, 3))


@dataclass(frozen=True)
class Plan:
    """What is drawn: a dtype, the inputs' shapes and layouts, and steps as numbers that `_Writer` makes sense of."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    turned: tuple[bool, ...]
    steps: tuple[tuple[int, int, int, int], ...]
    values: int


@st.composite
def plans(choose: st.DrawFn) -> Plan:
    """Plans of up to 24 steps on one to three inputs."""
    number = st.integers(0, 1 << 16)
    shapes = choose(st.lists(st.sampled_from(_SHAPES), min_size=1, max_size=3))
    return Plan(
        choose(st.sampled_from(list(_EXACT))),
        tuple(shapes),
        tuple(choose(st.booleans()) for _ in shapes),
        tuple(choose(st.lists(st.tuples(number, number, number, number), min_size=3, max_size=24))),
        choose(number),
    )


@dataclass
class Known:
    """A value of the program: its node, its exact value, and whether it ends the program."""

    node: fx.Node
    value: Tensor
    ends: bool = False


Arguments = Callable[["_Writer", Known, int, int], tuple[Any, ...] | None]


def _alone(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...]:
    return (a,)


def _pair(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...]:
    return (a, w.like(a, b))


def _dims(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    rank = a.value.dim()
    dims = [d for d in range(rank) if (b >> d) & 1] or list(range(rank))
    return (a, dims) if rank else None


def _nonempty_dims(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    return _dims(w, a, b, c) if a.value.numel() else None


def _broadcast(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    shape = list(a.value.shape)
    at = b % (len(shape) + 1)
    kept = [d + (d >= at) for d in range(len(shape))]
    wider = [(2, 3)[c % 2] if n == 1 and c % 3 == 0 else n for n in shape]
    wider.insert(at, (1, 3, 2)[c % 3])
    return (a, wider, kept) if len(wider) <= 4 else None


def _transpose(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...]:
    order = list(range(a.value.dim()))
    k = b % len(order) if order else 0
    turned = order[k:] + order[:k]
    return a, turned[::-1] if c % 2 else turned


def _reshape(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    n = a.value.numel()
    shape = [(n,), (1, n), (n, 1), (2, n // 2)][b % (4 if n and n % 2 == 0 else 3)]
    try:
        a.node.meta["val"].view(shape)
    except (RuntimeError, ValueError):
        return None  # its strides do not allow it
    return a, shape


def _squeeze(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    ones = [d for d, n in enumerate(a.value.shape) if n == 1]
    return (a, ones) if ones else None


def _cat(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    return ([a, w.like(a, b), a], c % a.value.dim()) if a.value.dim() else None


def _slice(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    if not a.value.dim():
        return None
    d = b % a.value.dim()
    n = a.value.shape[d]
    return (a, d, c % (n + 1), n, 1 + b % 2)


def _mask(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...] | None:
    masks = [k for k in w.known if k.value.dtype == torch.bool and k.value.shape == a.value.shape and not k.ends]
    return (masks[b % len(masks)], a, w.like(a, c)) if masks else None


def _to_number(w: _Writer, a: Known, b: int, c: int) -> tuple[Any, ...]:
    return a, w.dtype


_NUMBERS: dict[str, Arguments] = {
    **dict.fromkeys(("prims.neg.default", "prims.abs.default", "prims.sign.default"), _alone),
    **{f"prims.{n}.default": _pair for n in ("add", "sub", "mul", "maximum", "minimum", "eq", "lt", "ge")},
    "prims.sum.default": _dims,
    "prims.amax.default": _nonempty_dims,
    "prims.amin.default": _nonempty_dims,
    "prims.where.default": _mask,
}
_ANY: dict[str, Arguments] = {
    "prims.broadcast_in_dim.default": _broadcast,
    "prims.transpose.default": _transpose,
    "aten.view.default": _reshape,
    "prims.squeeze.default": _squeeze,
    "prims.cat.default": _cat,
    "prims.rev.default": _dims,
    "aten.slice.Tensor": _slice,
}
_MASKS: dict[str, Arguments] = {
    "prims.bitwise_not.default": _alone,
    "prims.bitwise_and.default": _pair,
    "prims.convert_element_type.default": _to_number,
}
_ENDS: dict[str, Arguments] = {f"prims.{n}.default": _alone for n in ("exp", "sin", "tanh", "erf", "atan")}


class _Writer:
    """Turns a plan into a region, among the operators that the executor takes."""

    def __init__(self, executor: Executor, plan: Plan) -> None:
        self.executor, self.dtype = executor, plan.dtype
        self.builder = Builder(executor.name)
        self.known: list[Known] = []
        generator = torch.Generator().manual_seed(plan.values)
        for shape, turned in zip(plan.shapes, plan.turned, strict=True):
            value = torch.randint(-4, 5, shape, generator=generator).to(plan.dtype)
            value = value.mT.contiguous().mT if turned and value.dim() >= 2 else value
            self.known.append(Known(self.builder.input(value), value.to(torch.float64)))
        if not plan.dtype.is_floating_point:
            for k in self.known:
                k.value = k.value.to(plan.dtype)
        for step in plan.steps:
            self.step(*step)

    def like(self, a: Known, number: int) -> Known:
        """A value of the same shape and dtype."""
        same = [k for k in self.known if (k.value.shape, k.value.dtype) == (a.value.shape, a.value.dtype)]
        return [k for k in same if not k.ends][number % sum(not k.ends for k in same)]

    def step(self, which: int, on: int, b: int, c: int) -> None:
        open_ends = [k for k in self.known if not k.ends]
        a = open_ends[-1 - on % len(open_ends)]
        if a.value.dtype == torch.bool:
            table = {**_ANY, **_MASKS}
        elif self.dtype.is_floating_point:
            table = {**_NUMBERS, **_ANY, **_ENDS}
        else:
            table = {**_NUMBERS, **_ANY}
        name = list(table)[which % len(table)]
        args = table[name](self, a, b, c)
        op: Any = TABLE[name].operator
        if args is None:
            return
        values = _each(args, lambda k: k.value)
        if name == "prims.convert_element_type.default" and self.dtype.is_floating_point:
            values = values[0], torch.float64
        (value,) = oracle.evaluate(name, values, {})
        ends = name in _ENDS
        if not ends and not self.is_exact(name, value, values):
            return
        node = self.builder.call(op, _each(args, lambda k: k.node), {})
        if not checks.claim(self.executor, node):
            self.builder.graph.erase_node(node)
            return
        self.known.append(Known(node, value, ends))

    def is_exact(self, name: str, value: Tensor, values: tuple[Any, ...]) -> bool:
        if value.dtype == torch.bool:
            return True
        total = values[0].abs().sum(values[1]) if name == "prims.sum.default" else value.abs()
        return value.numel() <= 4096 and (not total.numel() or float(total.max()) <= _EXACT[self.dtype])


def _each(args: tuple[Any, ...], change: Callable[[Known], Any]) -> tuple[Any, ...]:
    def one(x: Any) -> Any:
        if isinstance(x, Known):
            return change(x)
        return [change(i) if isinstance(i, Known) else i for i in x] if isinstance(x, list) else x

    return tuple(map(one, args))


def try_plan(executor: Executor, plan: Plan) -> bool:
    """Run the program of a plan; false where the executor takes none of its steps.

    Raises:
        BrokenRuleError: where a result is wrong.
    """
    writer = _Writer(executor, plan)
    made = [k for k in writer.known if k.node.op == "call_function"]
    outputs = [k for k in made if not k.node.users]
    if not outputs:
        return False
    region = writer.builder.finish(tuple(k.node for k in outputs))
    shown = str(region.graph_module.graph)
    inputs = writer.builder.inputs
    before = [t.clone() for t in inputs]
    try:
        function = executor.compile(region, {})
    except Exception as error:
        raise checks.BrokenRuleError("claim", f"compile raised {type(error).__name__}: {error}\n{shown}") from error
    specs = [(k.node.meta["val"].dtype, k.node.meta["val"].shape) for k in outputs]
    try:
        results = checks.run(checks.Call(function, inputs, specs))
    except checks.BrokenRuleError as error:
        raise checks.BrokenRuleError(error.rule, f"{error}\n{shown}") from error
    for k, got in zip(outputs, results, strict=True):
        tolerance = TOLERANCES["pointwise"] if k.ends else TOLERANCES["sum"]  # the sign of a zero is left open
        problem = differ(got, k.value, tolerance).problem
        if not k.ends and not problem and not torch.equal(got.to(k.value.dtype), k.value):
            problem = "the results are not exact"
        if problem:
            raise checks.BrokenRuleError("values", f"{k.node.name}: {problem}\n{shown}")
    if not all(map(torch.equal, before, inputs)):
        raise checks.BrokenRuleError("mutation", f"an input was changed\n{shown}")
    return True


def check(executor: Executor, count: int, start: int) -> tuple[int, list[Finding]]:
    """Run random programs: how many ran, and the smallest one found that fails."""
    return explore(plans(), partial(try_plan, executor), "programs", count, start) if count else (0, [])
