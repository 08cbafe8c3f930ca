"""Runs the samples that torch itself ships through a traced function and eagerly, and compares all of it.

The samples are those of `op_db` (calls of one operation) and of `module_db` (modules in train and eval mode).
One traced function serves all samples of an entry, so the guards are under test too: two samples that differ
only in a static argument must not share a program. Every sample is called twice. The second call has other
values and another seed wherever the samples allow it, must be a cache hit, and so finds what the trace baked
in. In the end all samples of the entry are replayed in another order.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.testing._internal import common_methods_invocations as invocations
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

from tests.observe import RIGHT, Call, Kind, alike, compare, copied, observe, state_of, untouched

SEEDS = (11, 12)
OTHER_DTYPES = (
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
# Samples an entry per dtype; None means all of them.
QUICK: dict[torch.dtype, int | None] = {torch.float32: 2, torch.int64: 1, torch.complex64: 1}
EXHAUSTIVE: dict[torch.dtype, int | None] = {torch.float32: None, **dict.fromkeys(OTHER_DTYPES, 3)}
QUICK_MODULE_INPUTS = 2

# Where eager's own values differ from call to call, only the metadata can be compared.
VALUES_UNDEFINED = {
    name: "allocates without writing"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
}
# Entries that raise CaptureError for some sample. Any other entry that does so fails its test; a name here that
# never does so fails tests/coverage.py.
NOT_CAPTURED = {
    name: reason
    for reason, names in {
        "returns a number of a tensor": "item",
        "a tensor holds offsets": "tensor_split",
        "the shape of the result depends on values, and torch has no rule for it": "linalg.lstsq "
        "linalg.lstsq.grad_oriented masked_select nonzero",
        "sparse tensors": "sparse.mm.reduce sparse.sampled_addmm to_sparse",
        "compares a mask with a causal one": "nn.Transformer#71",
        "eager's error depends on values or on overlapping memory": "gather masked_fill",
        "C++ writes nothing to out= while it is traced": "linalg.matrix_rank linalg.matrix_rank.hermitian",
    }.items()
    for name in names.split()
}
# Entries whose results are equal within tolerance only: their C++ code takes another path under any trace.
INEXACT = frozenset({"norm.nuc"})
# Entries that may be: LAPACK rounds by where in memory its operands begin, in eager too.
UNSTEADY = frozenset({"linalg.lstsq", "linalg.lstsq.grad_oriented"})


@dataclass(frozen=True)
class Result:
    entry: str
    variant: str  # how the operation was called: "function", "method", "in-place", ..., "train", "eval"
    dtype: str
    index: int
    kind: Kind
    detail: str = ""


Swept = Callable[[str, str], list[Result]]  # a sweep and an entry → its results: the fixture `swept`


@dataclass(frozen=True)
class Subject:
    """What is under test: how to trace, which exception says that something cannot be traced, and their base."""

    make_traced: Callable[..., Callable[..., Any]]
    capture_error: type[BaseException]
    error: type[BaseException]


def primexec_subject() -> Subject:
    """On `aten`, the one executor that gives eager's bits."""
    import primexec

    return Subject(
        functools.partial(primexec.make_traced, executor="aten"), primexec.CaptureError, primexec.PrimexecError
    )


def unexpected(results: Iterable[Result], expected: Mapping[Kind, Collection[str]]) -> list[Result]:
    """The results of a kind that their entry is not listed for; wrong is what no entry is listed for."""
    known = {Kind.WRONG: (), **expected}
    return [result for result in results if result.kind in known and result.entry not in known[result.kind]]


Counts = tuple[int, int, int]  # hits, misses, traces
HIT: Counts = (1, 0, 0)
TRACED: Counts = (0, 1, 1)


def counts(traced: Any) -> Counts:
    info = traced.cache_info()
    return info.hits, info.misses, info.traces


class Pair:
    """A function, traced, next to its original."""

    def __init__(self, fn: Callable[..., Any], subject: Subject, values: bool = True) -> None:
        self.eager = copy.deepcopy(fn) if isinstance(fn, torch.nn.Module) else fn
        self.traced = subject.make_traced(fn, cache_size=4096)
        self.subject = subject
        self.values = values

    def check(self, call: Call, seed: int, legal: Iterable[Counts]) -> tuple[Kind, str]:
        before = {name: tensor.detach().clone() for name, tensor in state_of(self.traced).items()}
        counted = counts(self.traced)
        expected = observe(self.eager, copied(call), seed)
        mine = copied(call)
        actual = observe(self.traced, mine, seed)
        if isinstance(actual.error, self.subject.capture_error):
            changed = untouched(call, self.traced, before, actual, seed)
            return (Kind.WRONG, changed) if changed else (Kind.CAPTURE, str(actual.error))
        kind, detail = compare(expected, actual, self.values)
        delta = tuple(now - then for now, then in zip(counts(self.traced), counted, strict=True))
        if kind in RIGHT and kind is not Kind.RAISED and delta not in legal:
            return Kind.WRONG, f"counted {delta} (hits, misses, traces)"
        return kind, detail


def decides(traced: Any) -> bool:
    """Whether a program was made for values of tensors, so that others may need another one."""
    return any(entry.captured.decisions for entry in getattr(traced, "_primexec_traced", traced)._cache.entries)


def check_twice(pair: Pair, call: Call, other: Call) -> tuple[Kind, str]:
    kind, detail = pair.check(call, SEEDS[0], (HIT, TRACED))
    if kind not in (Kind.SAME, Kind.CLOSE, Kind.METADATA):
        return kind, detail
    legal = (HIT, TRACED) if decides(pair.traced) else (HIT,)
    again, detail = pair.check(other if alike(call, other) else call, SEEDS[1], legal)
    if again is Kind.WRONG or again is Kind.CAPTURE:
        return Kind.WRONG, f"second call: {detail or again}"
    return (kind if again is Kind.RAISED else max(kind, again, key=list(Kind).index)), ""


Sample = tuple[str, int, Call, Call]  # dtype, number, the call, the call with other values


def check_all(pair: Pair, samples: Sequence[Sample], entry: str, variant: str) -> Iterator[Result]:
    """Every sample twice; then all in another order, which finds programs that the guards mix up."""
    ran = []
    for dtype, index, call, other in samples:
        kind, detail = check_twice(pair, call, other)
        yield Result(entry, variant, dtype, index, kind, detail)
        if kind in (Kind.SAME, Kind.CLOSE, Kind.METADATA):
            ran.append((dtype, index, call))
    random.Random(entry).shuffle(ran)
    for dtype, index, call in ran:
        kind, detail = pair.check(call, SEEDS[0], (HIT,))
        if kind not in RIGHT:
            yield Result(entry, variant, dtype, index, Kind.WRONG, f"replayed: {detail}")


def _unseeded(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


# op_db seeds the generator inside of random operations. The sweep does so outside, and compares its state.
invocations.wrapper_set_seed = _unseeded
OPS = {op.full_name: op for op in invocations.op_db}


def seed_everything(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(0)  # the samples take their shapes from Python's and NumPy's generator: these stay as they are
    np.random.seed(0)


def generate(op: Any, dtype: torch.dtype, seed: int, limit: int | None) -> list[Call]:
    seed_everything(seed)
    found: list[Call] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs_func(op, "cpu", dtype, False):
            if limit is not None and len(found) == limit:
                break
            found.append(Call((sample.input, *sample.args), sample.kwargs))
    return found


def op_samples(op: Any, limits: dict[torch.dtype, int | None]) -> list[Sample]:
    found: list[Sample] = []
    for dtype, limit in limits.items():
        if dtype in op.supported_dtypes("cpu"):
            calls, others = (generate(op, dtype, seed, limit) for seed in SEEDS)
            pairs = zip(calls, others if len(others) == len(calls) else calls, strict=True)
            found += [(str(dtype).removeprefix("torch."), i, *pair) for i, pair in enumerate(pairs)]
    return found


def error_samples(op: Any) -> list[Sample]:
    """The calls that torch's own tests expect to fail."""
    if op.error_inputs_func is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = [error.sample_input for error in op.error_inputs("cpu")]
    calls = [Call((sample.input, *sample.args), sample.kwargs) for sample in inputs]
    return [("any", i, call, call) for i, call in enumerate(calls)]


def with_out(op: Any, samples: Sequence[Sample]) -> list[Sample]:
    """The same calls with `out=`, where the result is all tensors."""
    found = []
    for dtype, index, *calls in samples:
        seen = observe(op.op, copied(calls[0]), SEEDS[0])
        if seen.error is None and all(isinstance(leaf, torch.Tensor) for leaf in seen.output):
            out = pytree.tree_unflatten([torch.zeros_like(leaf) for leaf in seen.output], seen.structure)
            found.append((dtype, index, *(Call(call.args, {**call.kwargs, "out": out}) for call in calls)))
    return found


def sweep_op(name: str, limits: dict[torch.dtype, int | None], subject: Subject) -> Iterator[Result]:
    op = OPS[name]
    samples = op_samples(op, limits)
    firsts = [sample for sample in samples if sample[1] == 0 and sample[0] == "float32"]
    variants = {
        "function": (op.op, samples),
        "method": (op.method_variant, firsts),
        "operator": (op.operator_variant, firsts),
        "in-place": (op.inplace_variant, firsts),
        "in-place operator": (op.inplace_operator_variant, firsts),
        "out=": (op.op, with_out(op, firsts) if op.supports_out else []),
        "errors": (op.op, error_samples(op)),
    }
    values = op.name not in VALUES_UNDEFINED
    for variant, (fn, calls) in variants.items():
        if fn is not None and calls:
            yield from check_all(Pair(fn, subject, values), calls, name, variant)


MODULES = {f"{info.name}#{position}": info for position, info in enumerate(module_db)}


def module_inputs(info: Any, training: bool, seed: int) -> list[Any]:
    seed_everything(seed)
    return list(
        info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=training)
    )


def sweep_module(name: str, training: bool, subject: Subject, limit: int | None) -> Iterator[Result]:
    info = MODULES[name]
    variant = "train" if training else "eval"
    inputs = (module_inputs(info, training, seed)[:limit] for seed in SEEDS)
    for index, both in enumerate(zip(*inputs, strict=True)):
        if both[0].forward_input is None:
            continue
        call, other = (Call(tuple(side.forward_input.args), side.forward_input.kwargs) for side in both)
        made = both[0].constructor_input
        seed_everything(SEEDS[0])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = info.module_cls(*made.args, **made.kwargs).to(torch.float32).train(training)
            if info.is_lazy:  # its parameters take their shapes from a first call
                module(*copied(call).args, **copied(call).kwargs)
        yield from check_all(Pair(module, subject), [("float32", index, call, other)], name, variant)
