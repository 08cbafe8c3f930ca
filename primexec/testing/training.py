"""Training with an executor: functions of every kind, and random ones, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from primexec._torch_dynamo import capture_lock
from primexec.cache import compile_captured
from primexec.capture import capture
from primexec.captured import Signature
from primexec.config import Options
from primexec.errors import ExecutorError
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.guards import make_entry
from primexec.testing.checks import BrokenRuleError
from primexec.testing.exploration import explore
from primexec.testing.report import Finding
from primexec.testing.tolerance import TOLERANCES, differ

Function = Callable[..., Tensor]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return weights @ v


def _masked(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > y, x * y, x.clamp(-1, 1)).masked_fill(x > 1.5, 0.25)


def _normalised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def _root_mean_square(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w


def _convolved(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.max_pool2d(F.conv2d(x, w, b, padding=1).relu(), 2)


def _averaged(x: Tensor, w: Tensor) -> Tensor:
    return F.avg_pool2d(F.conv2d(x, w, stride=2).sigmoid(), 2)


def _classified(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x @ w, labels)


def _embedded(table: Tensor, w: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, table) @ w


def _scattered(x: Tensor, src: Tensor, index: Tensor) -> Tensor:
    return x.scatter_add(0, index, src).gather(0, index.flip(0)).tanh()


def _indexed(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return x[index].index_put((index % 2,), y, accumulate=True)


def _in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.add_(y).mul_(y)
    z[1:] -= y[:-1]
    return z.exp_()


def _rearranged(x: Tensor, y: Tensor) -> Tensor:
    parts = torch.cat([x.t(), y.t().flip(0)], 0).split(3)
    return torch.stack([p.sum(0) for p in parts]).roll(1, 1) @ x[:, :2]


def _elementary(x: Tensor, y: Tensor) -> Tensor:
    return (x.sin() * y.exp()).tanh() + torch.atan2(x, y) + (x * x + 1).log().sqrt() + x.erf()


def _selected(x: Tensor, y: Tensor) -> Tensor:
    values, _ = x.sort(-1)
    return values[:, 1:] - x.topk(4, -1).values + y.amax(0)[:4] + y.cumsum(1).min(1).values[:4]


# Functions of real numbers: the shapes of what gets a gradient, the ranges of index arguments, their shapes.
PROGRAMS: dict[str, tuple[Function, tuple[tuple[int, ...], ...], tuple[tuple[int, tuple[int, ...]], ...]]] = {
    "gelu of a linear layer": (lambda x, w, b: F.gelu(F.linear(x, w, b)), ((7, 5), (3, 5), (3,)), ()),
    "swiglu": (lambda x, w, v: F.silu(x @ w) * (x @ v), ((7, 5), (5, 3), (5, 3)), ()),
    "cross entropy": (_classified, ((7, 5), (5, 11)), ((11, (7,)),)),
    "layer norm": (_normalised, ((7, 33), (33,), (33,)), ()),
    "rms norm": (_root_mean_square, ((7, 33), (33,)), ()),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((8, 3, 5), (3,), (3,)), ()),
    "attention": (_attention, ((2, 7, 4), (2, 7, 4), (2, 7, 4)), ()),
    "convolution and maximum": (_convolved, ((2, 3, 6, 6), (4, 3, 3, 3), (4,)), ()),
    "convolution and average": (_averaged, ((2, 3, 9, 9), (4, 3, 3, 3)), ()),
    "embedding": (_embedded, ((13, 5), (5, 3)), ((13, (2, 7)),)),
    "scatter and gather": (_scattered, ((5, 3), (5, 3)), ((5, (5, 3)),)),
    "indexing": (_indexed, ((5, 3), (4, 3)), ((5, (4,)),)),
    "masks": (_masked, ((7, 5), (7, 5)), ()),
    "in place": (_in_place, ((5, 3), (5, 3)), ()),
    "rearranging": (_rearranged, ((3, 6), (3, 6)), ()),
    "sorting": (_selected, ((4, 5), (4, 4)), ()),
    "broadcasting": (lambda x, y, z: (x * y + z).sum((0, 2)) / y.exp().sum(), ((4, 1, 5), (3, 1), ()), ()),
    "elementary functions": (_elementary, ((7, 5), (7, 5)), ()),
    "products": (lambda x, y: (x.abs() + 0.5).cumprod(1) * (y.abs() + 0.5).prod(1, keepdim=True), ((3, 5), (3, 5)), ()),
    "spread": (lambda x: x.var(0) + x.std(1, True) + x.logsumexp(0) + x.norm(dim=1, keepdim=True), ((7, 7),), ()),
    "an input twice": (lambda x: x @ x.t() + x.sum() * x.mean(), ((5, 5),), ()),
    "nothing": (lambda x: (x.sum(0) * 2).exp(), ((0, 3),), ()),
    "a number": (lambda x: x.exp() * x, ((),), ()),
    "large": (lambda x, y: (x * y).tanh().sum(0), ((127, 513), (513,)), ()),
}  # fmt: skip
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Trained:
    """The results of a function and the gradients of its inputs."""

    result: Tensor
    gradients: tuple[Tensor, ...]

    def named(self) -> list[tuple[str, Tensor]]:
        """Each tensor, and what it is."""
        return [("the result", self.result), *((f"gradient {i}", g) for i, g in enumerate(self.gradients))]


def train(function: Function, calls: Sequence[Sequence[Tensor]], seed: int) -> list[Trained]:
    """Run a function on the inputs of each call, and only then the backward passes, in the same order.

    The gradients of the results are small integers, drawn from the seed.
    """
    leaves = [[t.detach().requires_grad_(t.dtype.is_floating_point) for t in inputs] for inputs in calls]
    results = [function(*inputs) for inputs in leaves]
    done = []
    for inputs, result in zip(leaves, results, strict=True):
        drawn = torch.randint(-2, 3, result.shape, generator=torch.Generator().manual_seed(seed))
        wanted = [t for t in inputs if t.requires_grad]
        gradients = torch.autograd.grad(result, wanted, drawn.to(result.dtype), allow_unused=True)
        done.append(Trained(result.detach(), tuple(g if g is not None else torch.zeros(()) for g in gradients)))
    return done


def traced(executor: Executor, function: Function, inputs: Sequence[Tensor]) -> tuple[Function, bool]:
    """The function as `make_traced` runs it where all is saved, and whether any of it runs on the executor."""
    options = Options((executor.name,))
    executors = tuple({e.name: e for e in (executor, registry.load("aten"))}.values())
    leaves = tuple(t.detach().requires_grad_(t.dtype.is_floating_point) for t in inputs)
    with capture_lock():
        captured = capture(function, leaves, {}, Signature.of(function), options.save)
        captured, executable = compile_captured(captured, options, executors)
        entry = make_entry(captured, executable, leaves, {}, {})
    mine = any(region.executor == executor.name for region in executable.plan.regions)
    return lambda *args: entry.call(args, {}), mine


def inputs_of(name: str, dtype: torch.dtype, start: int) -> list[Tensor]:
    """Random inputs of a program of the table; those of float64 are those of float32."""
    generator = torch.Generator().manual_seed(start + len(name))
    _, shapes, ranges = PROGRAMS[name]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return drawn + [torch.randint(0, high, shape, generator=generator) for high, shape in ranges]


@cache
def reference(name: str, start: int) -> Trained:
    """A program of the table by the NumPy references of its prims, in float64."""
    inputs = inputs_of(name, torch.float64, start)
    function, _ = traced(registry.load("numpy"), PROGRAMS[name][0], inputs)
    return train(function, [inputs], start)[0]


def examine(executor: Executor, name: str, dtype: torch.dtype, start: int) -> bool:
    """Train a program of the table; false where the executor takes none of it.

    Raises:
        BrokenRuleError: where a result or a gradient is wrong, or differs at the second call.
    """
    inputs = inputs_of(name, dtype, start)
    function = _claimed(executor, PROGRAMS[name][0], inputs)
    if function is None:
        return False
    want = reference(name, start)
    turned = [t.flip(0) if t.dim() else t for t in inputs]
    try:
        first, _, second = train(function, (inputs, turned, inputs), start)
    except Exception as error:
        raise BrokenRuleError("claim", f"training raised {type(error).__name__}: {error}") from error
    for (what, got), (_, exact), (_, again) in zip(first.named(), want.named(), second.named(), strict=True):
        scale = (exact.abs().max() if exact.numel() else exact).expand(exact.shape)
        found = differ(got, exact, TOLERANCES["training"], scale=scale)
        if found.problem:
            raise BrokenRuleError("gradients" if what != "the result" else "values", f"{what}: {found.problem}")
        if not torch.equal(got, again):
            raise BrokenRuleError("determinism", f"{what} is another at the second call")
    return True


def _claimed(executor: Executor, function: Function, inputs: Sequence[Tensor]) -> Function | None:
    """The function traced; None where the executor takes nothing of it, or is strict and declines something."""
    try:
        made, mine = traced(executor, function, inputs)
    except ExecutorError as error:
        if str(error).startswith("strict: "):
            return None
        raise BrokenRuleError("claim", str(error)) from error
    return made if mine else None


# Random functions of small integers, whose results and gradients are exact -------------------------------

_EXACT = 2.0**24  # integers up to this are exact in float32
_SHAPES = ((3, 5), (5,), (2, 3, 4), (1, 7), (4, 4), ())
_Step = Callable[[list[Tensor], Tensor, int, int], Tensor | None]


def _like(known: list[Tensor], a: Tensor, number: int) -> Tensor:
    same = [k for k in known if k.shape == a.shape]
    return same[number % len(same)]


def _dim(a: Tensor, number: int) -> int:
    return number % max(a.dim(), 1)


def _some(a: Tensor, number: int, count: int) -> Tensor:
    """Indices along the first dimension, repeated ones among them."""
    return (torch.arange(count) * (number % 5) + number) % a.shape[0]


_STEPS: dict[str, _Step] = {
    "add": lambda known, a, b, c: a + _like(known, a, b),
    "sub": lambda known, a, b, c: a - _like(known, a, b) * (c % 3),
    "mul": lambda known, a, b, c: a * _like(known, a, b),
    "neg": lambda known, a, b, c: -a,
    "relu": lambda known, a, b, c: a.relu(),
    "abs": lambda known, a, b, c: a.abs(),
    "where": lambda known, a, b, c: torch.where(a > b % 3, a, _like(known, a, c)),
    "sum": lambda known, a, b, c: a.sum(_dim(a, b), keepdim=bool(c % 2)) if a.dim() else None,
    "total": lambda known, a, b, c: a.sum(),
    "transpose": lambda known, a, b, c: a.transpose(_dim(a, b), _dim(a, c)) if a.dim() else None,
    "flatten": lambda known, a, b, c: a.reshape(-1),
    "slice": lambda known, a, b, c: a.narrow(_dim(a, b), 0, max(1, a.shape[_dim(a, b)] - 1)) if a.dim() else None,
    "cat": lambda known, a, b, c: torch.cat([a, _like(known, a, b)], _dim(a, c)) if a.dim() else None,
    "expand": lambda known, a, b, c: a.unsqueeze(0).expand(2 + b % 2, *a.shape) if a.dim() < 3 else None,
    "flip": lambda known, a, b, c: a.flip(_dim(a, b)) if a.dim() else None,
    "cumsum": lambda known, a, b, c: a.cumsum(_dim(a, b)) if a.dim() else None,
    "product": lambda known, a, b, c: a.transpose(-1, -2) @ a if a.dim() >= 2 else None,
    "index": lambda known, a, b, c: a[_some(a, b, 1 + c % 4)] if a.dim() else None,
    "add to": lambda known, a, b, c: a.clone().add_(_like(known, a, b)),
    "write": lambda known, a, b, c: a.index_add(0, _some(a, b, a.shape[0]), a) if a.dim() else None,
}


# As large as each step can make its result: without what cancels.
_BOUNDS: dict[str, _Step] = {
    **_STEPS,
    "sub": lambda known, a, b, c: a + _like(known, a, b) * (c % 3),
    "neg": lambda known, a, b, c: a * 1,
    "where": lambda known, a, b, c: a + _like(known, a, c),
}


@dataclass(frozen=True)
class Plan:
    """What is drawn: the inputs' shapes, steps (a name, and numbers that it makes sense of), a seed for all values."""

    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[str, int, int, int], ...]
    values: int

    def run(self, table: dict[str, _Step], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs and the result of every step that applies."""
        known = list(inputs)
        for name, on, b, c in self.steps:
            made = table[name](known, known[-1 - on % len(known)], b, c)
            if made is not None and made.numel() <= 500:
                known.append(made)
        return known

    def function(self, *inputs: Tensor) -> Tensor:
        return self.run(_STEPS, inputs)[-1]

    def is_exact(self) -> bool:
        """Whether no number on the way, forward or backward, leaves the integers that float32 holds."""
        leaves = [torch.full(shape, 3.0, dtype=torch.float64, requires_grad=True) for shape in self.shapes]
        known = self.run(_BOUNDS, leaves)
        ones = torch.full_like(known[-1], 2.0)
        gradients = torch.autograd.grad(known[-1], leaves, ones, allow_unused=True)
        numbers = [t.detach().abs().max() for t in (*known, *(g for g in gradients if g is not None)) if t.numel()]
        return all(float(n) <= _EXACT for n in numbers)


_numbers = st.integers(0, 1 << 10)
plans = st.builds(
    Plan,
    st.lists(st.sampled_from(_SHAPES), min_size=1, max_size=3).map(tuple),
    st.lists(st.tuples(st.sampled_from(list(_STEPS)), _numbers, _numbers, _numbers), min_size=2, max_size=12).map(
        tuple
    ),
    _numbers,
)


def try_plan(executor: Executor, plan: Plan) -> bool:
    """Train the function of a plan; false where its numbers are too large or the executor takes none of it.

    Raises:
        BrokenRuleError: where a result or a gradient is not exact.
    """
    while not plan.is_exact():
        plan = replace(plan, steps=plan.steps[:-1])
    generator = torch.Generator().manual_seed(plan.values)
    inputs = [torch.randint(-3, 4, shape, generator=generator).float() for shape in plan.shapes]
    function = _claimed(executor, plan.function, inputs)
    if function is None:
        return False
    (want,) = train(plan.function, [[t.double() for t in inputs]], plan.values)
    try:
        (got,) = train(function, [inputs], plan.values)
    except Exception as error:
        raise BrokenRuleError("claim", f"training raised {type(error).__name__}: {error}\n{plan}") from error
    for (what, mine), (_, exact) in zip(got.named(), want.named(), strict=True):
        if not torch.equal(mine.double(), exact):
            rule = "values" if what == "the result" else "gradients"
            raise BrokenRuleError(rule, f"{what} is {mine.tolist()}, not {exact.tolist()}\n{plan}")
    return True


def check(executor: Executor, count: int, start: int) -> tuple[int, list[Finding]]:
    """Train the programs of the table and random functions: how many ran, and what is wrong."""
    if not count:
        return 0, []
    written, wrong = check_table(executor, start)
    drawn, findings = explore(plans, partial(try_plan, executor), "training", count, start)
    return written + drawn, wrong + findings


def check_table(executor: Executor, start: int) -> tuple[int, list[Finding]]:
    """Train the programs of the table: how many ran, and what is wrong."""
    ran, findings = 0, []
    for name in PROGRAMS:
        for dtype in DTYPES:
            try:
                ran += examine(executor, name, dtype, start)
            except BrokenRuleError as error:
                text = str(dtype).removeprefix("torch.")
                findings.append(Finding("training", text, error.rule, f"{name}: {error}"))
    return ran, findings
