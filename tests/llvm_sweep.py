"""Runs the samples that torch ships on the executor `llvm`, and holds the values against eager and float64.

Structure, dtypes, shapes, strides, aliasing, inputs afterwards and the generator are eager's. Integers, truth values,
NaN and infinities are equal; the error of the other numbers against the same call in float64 is at most twice
eager's largest and 2 units in the last place, for gradients of the largest element. What eager computes in float64 is
judged by the error of its float32, scaled.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import primexec
from primexec.executors.llvm import executor as llvm
from tests.observe import Call, Kind, Observed, compare, copied, leaves_of, observe, same_bits, sharing, untouched
from tests.sweep import NOT_CAPTURED, OPS, SEEDS, VALUES_UNDEFINED, seed_everything
from tests.sweep import Result as SweptResult

BOTH = ("llvm", "aten")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)
HALVES = (torch.bfloat16, torch.float16)
SAMPLES = 3
# Entries whose numbers are no function of their arguments that float64 could judge.
NO_ORACLE = {
    **dict.fromkeys(VALUES_UNDEFINED, "allocates without writing"),
}


VARIANTS = ("llvm", "llvm, gradients")


@dataclass(frozen=True)
class Result(SweptResult):
    """What became of one sample; `kernels` is how many loops of `llvm` ran."""

    kernels: int = 0


@dataclass
class Watch:
    """Counts the kernels that are compiled."""

    kernels: int = 0
    lower: Callable[..., Any] = field(default=llvm.lower)

    def __enter__(self) -> Watch:
        llvm.lower = self._lower  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        llvm.lower = self.lower  # type: ignore[assignment]

    def _lower(self, *args: Any) -> Any:
        made = self.lower(*args)
        self.kernels += len(made.schedule.kernels)
        return made


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def generate(op: Any, dtype: torch.dtype, seed: int, limit: int | None, gradients: bool) -> list[tuple[Call, Any]]:
    """Calls with what makes of their results something to differentiate; float64 values are ones of float32."""
    seed_everything(seed)
    found: list[tuple[Call, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs_func(op, "cpu", dtype, gradients):
            if limit is not None and len(found) == limit:
                break
            call = Call((sample.input, *sample.args), sample.kwargs)
            if dtype is torch.float64:
                for t in leaves_of(call):
                    if isinstance(t, Tensor) and t.dtype is dtype and t.layout is torch.strided:
                        t.detach().copy_(t.detach().float())
            found.append((call, sample.output_process_fn_grad))
    return found


def cast(call: Call, target: torch.dtype) -> Call:
    """The call with all floating-point tensors, and dtypes asked for, in another precision."""

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype in FLOATS:
            made = leaf.detach().to(target)
            return made.requires_grad_(leaf.requires_grad)
        return target if isinstance(leaf, torch.dtype) and leaf in FLOATS else leaf

    return Call(pytree.tree_map(change, call.args), pytree.tree_map(change, call.kwargs))


def step(fn: Callable[..., Any], call: Call, seed: int, loss: Any, rounded: torch.dtype) -> Observed:
    """Forward, and backward from every output; the gradients are noted as further outputs."""
    inputs = leaves_of(call)
    wanted = list({id(t): t for t in inputs if isinstance(t, Tensor) and t.requires_grad}.values())
    leaves: list[Any] = []
    gradients: list[Any] = []
    structure, error = None, None
    torch.default_generator.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = fn(*call.args, **call.kwargs)
            leaves, structure = pytree.tree_flatten(output)
            roots = [t for t in pytree.tree_leaves(loss(output)) if isinstance(t, Tensor) and t.requires_grad]
            generator = torch.Generator().manual_seed(seed)
            tangents = [
                torch.randn(t.shape, generator=generator, dtype=torch.float32).to(rounded).to(t.dtype) for t in roots
            ]
            if roots and wanted:
                gradients = list(torch.autograd.grad(roots, wanted, tangents, allow_unused=True))
        except Exception as raised:
            error = raised.with_traceback(None)
    leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
    rng = torch.get_rng_state()
    return Observed([*leaves, *gradients], (structure, len(gradients)), inputs, {}, sharing(inputs), rng, error)


def numbers(seen: Observed) -> list[Tensor | None]:
    """What the call returned and left in its inputs, densely, as far as these are tensors."""
    found: list[Tensor | None] = []
    for leaf in (*seen.output, *seen.inputs):
        if not isinstance(leaf, Tensor):
            found.append(None)
            continue
        t = leaf.detach()
        found.append((t.to_dense() if t.layout is not torch.strided else t).resolve_conj().resolve_neg())
    return found


def unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of a dtype's numbers around each element of a float64 tensor."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs()).exponent - 1
    floor = round(torch.frexp(torch.tensor(info.tiny, dtype=torch.float64)).exponent.item()) - 1
    return torch.ldexp(torch.full_like(x, info.eps), exponent.clamp(min=floor))


def error_of(value: Tensor, exact: Tensor) -> Tensor:
    """Distance from the exact value; 0 where both are the same infinity or NaN, infinite where only one is."""
    alike = (value == exact) | (value.isnan() & exact.isnan())
    return torch.where(alike, 0.0, (value - exact).abs().nan_to_num(torch.inf, torch.inf))


def judge_values(got: Tensor, eager: Tensor, oracle: Tensor | None, low: Tensor | None, summed: bool = False) -> str:
    """Empty, or how far the result is from where it should be.

    Args:
        got, eager: in one dtype.
        oracle: the result in float64; None where there is none.
        low: for float64, eager's result in float32.
        summed: whether elements are sums of terms that may cancel, as gradients are: units are those of the largest.
    """
    if same_bits(eager, got):
        return ""
    if got.dtype not in FLOATS:
        return f"{int((got != eager).sum())} of {got.numel()} elements of {name_of(got.dtype)} differ"
    g, e = got.double(), eager.double()
    odd = (e.isnan() != g.isnan()) | (e.isinf() != g.isinf()) | (e.isinf() & (e != g))
    odd |= (e == 0) & (g == 0) & (torch.signbit(e) != torch.signbit(g))
    exact = e if oracle is None or oracle.shape != e.shape else oracle.double()
    theirs = error_of(e, exact)
    if (
        got.dtype is torch.float64 and low is not None and low.shape == e.shape
    ):  # rounding errors grow with the distance of the numbers
        theirs = error_of(low.double(), exact) * 2.0**-29 + 2 * unit(exact, torch.float64)
    mine = error_of(g, exact)
    worst = theirs[theirs.isfinite()].max() if theirs.isfinite().any() else torch.zeros((), dtype=torch.float64)
    known = exact[exact.isfinite()].abs()
    units = unit(known.max(), got.dtype) if summed and known.numel() else unit(exact, got.dtype)
    allowed = 2 * torch.where(theirs.isfinite(), torch.maximum(theirs, worst), theirs) + 2 * units
    bad = (mine > allowed) | (odd & (error_of(g, exact) > theirs))
    if not bad.any():
        return ""
    place = int(torch.where(bad, mine.nan_to_num(torch.inf), -1.0).flatten().argmax())
    shown = (v.flatten()[place].item() for v in (g, e, exact))
    return "{} of {} elements: {!r}, eager {!r}, exactly {!r}".format(int(bad.sum()), got.numel(), *shown)


def nearly(got: Tensor, eager: Tensor) -> bool:
    """Whether results differ by rounding errors of terms around 1."""
    return bool(((got - eager).abs() <= 256 * unit(torch.ones((), dtype=torch.float64), got.dtype)).all())


# Entries whose results lie in memory otherwise than eager's, because PyTorch's fake tensors do so.
OTHER_STRIDES: frozenset[str] = frozenset({"grid_sampler_3d", "ormqr", "tensordot"})
# Gradients of which little or nothing is left but the rounding errors of terms around 1.
CANCELLING = frozenset({
    "_softmax_backward_data", "addmm", "corrcoef", "nn.functional.cross_entropy", "nn.functional.instance_norm",
    "nn.functional.layer_norm", "nn.functional.normalize", "nn.functional.scaled_dot_product_attention", "softmax",
})  # fmt: skip
# Results that blow up rounding errors of what they are made of: exponentials of scores around 70. Over 300 sets of
# values our largest error is 0.87 of eager's in the mean, more than twice as large in 5 % and less than half in 11 %.
AMPLIFYING = frozenset({"nn.functional.scaled_dot_product_attention"})
# Where eager's float64 itself is no judge: its error near -4 is 1e-11, that of the expansion 1e-15 (against mpmath).
LOOSE64 = {"special.airy_ai": 1e-10, "special.bessel_y0": 1e-7, "special.bessel_y1": 1e-6}


def judge(r: Result) -> bool:
    """Whether a result is as it should be."""
    if r.kind is Kind.CAPTURE:
        return r.entry in NOT_CAPTURED
    return r.kind is not Kind.WRONG or (r.entry in OTHER_STRIDES and ": stride (" in r.detail)


def supported(name: str, dtype: torch.dtype, gradients: bool) -> bool:
    op = OPS[name]
    if gradients:
        return op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    return dtype in op.supported_dtypes("cpu")


class Entry:
    """One operation in one dtype."""

    def __init__(self, name: str, dtype: torch.dtype, gradients: bool) -> None:
        self.name, self.dtype, self.gradients = name, dtype, gradients
        self.fn = OPS[name].op
        self.traced = primexec.make_traced(self.fn, executor=BOTH, cache_size=4096)

    def observe(self, fn: Callable[..., Any], call: Call, seed: int, loss: Any) -> Observed:
        return step(fn, call, seed, loss, self.dtype) if self.gradients else observe(fn, call, seed)

    def oracle(self, call: Call, seed: int, loss: Any, target: torch.dtype) -> list[Tensor | None] | None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(target)
        try:
            seen = self.observe(self.fn, cast(copied(call), target), seed, loss)
        finally:
            torch.set_default_dtype(before)
        return numbers(seen) if seen.error is None else None

    def check(self, call: Call, seed: int, loss: Any) -> tuple[Kind, str]:
        expected = self.observe(self.fn, copied(call), seed, loss)
        actual = self.observe(self.traced, copied(call), seed, loss)
        if isinstance(actual.error, primexec.CaptureError):
            changed = untouched(call, self.traced, {}, actual, seed)
            return (Kind.WRONG, changed) if changed else (Kind.CAPTURE, str(actual.error))
        kind, detail = compare(expected, actual, False)
        if kind is not Kind.METADATA and kind is not Kind.SAME:
            return kind, detail
        if self.name in NO_ORACLE:
            return Kind.METADATA, ""
        mine, theirs = numbers(actual), numbers(expected)
        if all(a is None or b is None or same_bits(b, a) for a, b in zip(mine, theirs, strict=True)):
            return Kind.SAME, ""
        if self.dtype is torch.float64 and self.name in LOOSE64:
            limit = LOOSE64[self.name]
            near = all(torch.allclose(a, b, 0.0, limit, equal_nan=True) for a, b in zip(mine, theirs, strict=True))
            return (Kind.CLOSE, "") if near else (Kind.WRONG, f"an error above {limit}")
        exact = self.oracle(call, seed, loss, torch.float64)
        wide = any(t is not None and t.dtype is torch.float64 for t in theirs)
        low = self.oracle(call, seed, loss, torch.float32) if wide else None
        for place, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a is None or b is None:
                continue
            wrong = judge_values(a, b, exact[place] if exact else None, low[place] if low else None, self.gradients)
            if wrong and not (self.name in (CANCELLING if self.gradients else AMPLIFYING) and nearly(a, b)):
                return Kind.WRONG, f"output {place}: {wrong}"
        return Kind.CLOSE, ""


def sweep(name: str, dtype: torch.dtype, limit: int | None, gradients: bool) -> Iterator[Result]:
    """Every sample of an entry, each with two sets of values."""
    op = OPS[name]
    if not supported(name, dtype, gradients):
        return
    samples, others = (generate(op, dtype, seed, limit, gradients) for seed in SEEDS)
    entry = Entry(name, dtype, gradients)
    for index, (call, loss) in enumerate(samples):
        with Watch() as watch:
            kind, detail = entry.check(call, SEEDS[0], loss)
            if kind in (Kind.SAME, Kind.CLOSE) and len(others) == len(samples):
                again, detail = entry.check(others[index][0], SEEDS[1], others[index][1])
                kind = max(kind, again, key=list(Kind).index) if again is not Kind.RAISED else kind
        yield Result(name, VARIANTS[gradients], name_of(dtype), index, kind, detail, watch.kernels)


NAMES = [*map(name_of, DTYPES)]
HEADER = [
    "## `llvm`: `op_db` by dtype, held to eager and float64",
    "",
    'As `executor=("llvm", "aten")`. Integers, truth values, NaN and infinities are eager\'s; the error of the other',
    "numbers against float64 is at most twice eager's largest plus 2 units in the last place: in gradients, which are",
    "sums whose terms may cancel, of the largest element.",
    "",
    "| dtype | what | samples | kernels ran | equal bit for bit | within tolerance | CaptureError | wrong |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


GRADIENTS_OF = 3  # one entry in so many has its gradients checked if that is to be quick


def number(name: str) -> int:
    """Tells what an entry is chosen for, whatever the others are."""
    return zlib.crc32(name.encode())


def run_entry(name: str, quick: bool) -> list[Result]:
    """An entry in every dtype without and, for floats, with gradients; if quick, one sample of one dtype.

    Else a few of each: all samples of all dtypes would take most of a day.
    """
    found: list[Result] = []
    for gradients in (False, True):
        fit = [d for d in (FLOATS if gradients else DTYPES) if supported(name, d, gradients)]
        if quick and fit:
            fit = [] if gradients and number(name) % GRADIENTS_OF else [fit[number(name) // 8 % len(fit)]]
        for dtype in fit:
            found += sweep(name, dtype, 1 if quick else SAMPLES, gradients)
    return found


def section(results: Sequence[Result]) -> list[str]:
    """The lines of docs/coverage.md about results of `run_entry`."""
    lines = list(HEADER)
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for r in results:
        groups[r.dtype, r.variant].append(r)
    for (dtype, variant), group in sorted(groups.items(), key=lambda item: (item[0][1], NAMES.index(item[0][0]))):
        counted = Counter(r.kind for r in group)
        cells = [
            dtype,
            "forward" if variant == VARIANTS[0] else "gradients",
            len(group),
            sum(r.kernels > 0 for r in group),
            *(counted[k] for k in (Kind.SAME, Kind.CLOSE, Kind.CAPTURE)),
            sum(not judge(r) for r in group if r.kind is not Kind.CAPTURE),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--dtypes", default=",".join(NAMES))
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--names", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for dtype in options.dtypes.split(","):
        for name in OPS:
            if options.names and name not in options.names.split(","):
                continue
            start = time.time()
            try:
                for r in sweep(name, getattr(torch, dtype), options.samples or None, options.gradients):
                    counted[dtype][r.kind] += 1
                    counted[dtype]["llvm"] += r.kernels > 0
                    if not judge(r):
                        print(r.kind, dtype, name, r.index, r.kernels, r.detail[:700], flush=True)
            except Exception as error:
                print("FAILED", dtype, name, repr(error)[:1000], flush=True)
            if time.time() - start > 5:
                print(f"slow {dtype} {name} {time.time() - start:.1f}", flush=True)
        print(dtype, dict(counted[dtype]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
