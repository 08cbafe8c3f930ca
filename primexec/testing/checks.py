"""The rules that every call of an executor's code is held to, one function each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.base import Executor, RegionFunction, Support

THREADS = 4
_ROUNDS = 3

Problem = tuple[str, str]  # the rule, and what happened


class BrokenRuleError(Exception):
    """An executor raised where it must not."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(message)


@dataclass(frozen=True)
class Call:
    """One region, compiled, with its inputs.

    Attributes:
        specs: dtype and shape of each result.
        view: whether results may share memory with inputs and with each other.
    """

    function: RegionFunction
    inputs: Sequence[Tensor]
    specs: Sequence[tuple[torch.dtype, torch.Size]]
    view: bool = False


def claim(executor: Executor, node: fx.Node) -> Support:
    """What the executor says of a node.

    Raises:
        BrokenRuleError: where it says something else than yes or no, or something else the second time.
    """
    try:
        said = [executor.supports(node) for _ in range(2)]
    except Exception as error:
        raise BrokenRuleError("claim", f"supports raised {type(error).__name__}: {error}") from error
    if not all(isinstance(s, Support) for s in said):
        raise BrokenRuleError("claim", f"supports returned {said[0]!r}, not YES or no(reason)")
    if said[0] != said[1]:
        raise BrokenRuleError("claim", "supports says something else when asked again")
    return said[0]


def run(call: Call) -> list[Tensor]:
    """The results of one call, each of the dtype and shape that it must have.

    Raises:
        BrokenRuleError: where the code raises, or returns something else.
    """
    _poison(call.specs)
    try:
        outputs = list(call.function(*call.inputs))
    except Exception as error:
        raise BrokenRuleError("claim", f"declared, and raised {type(error).__name__}: {error}") from error
    if len(outputs) != len(call.specs):
        raise BrokenRuleError("results", f"{len(outputs)} results, not {len(call.specs)}")
    for out, (dtype, shape) in zip(outputs, call.specs, strict=True):
        if not isinstance(out, Tensor):
            raise BrokenRuleError("results", f"returned {type(out).__name__}, not a tensor")
        if out.dtype != dtype:
            raise BrokenRuleError("dtype", f"returned {out.dtype}, not {dtype}")
        if out.shape != shape:
            raise BrokenRuleError("shape", f"returned shape {tuple(out.shape)}, not {tuple(shape)}")
    return outputs


def _poison(specs: Sequence[tuple[torch.dtype, torch.Size]]) -> None:
    """Leave freed memory of the results' sizes full of ones (NaN, or -1), for code that reads what it never wrote."""
    held = [torch.full((max(1, dtype.itemsize * shape.numel()),), 255, dtype=torch.uint8) for dtype, shape in specs]
    held += [h.clone() for h in held]


def watched(call: Call) -> tuple[list[Tensor], list[Problem]]:
    """The results, and the inputs that lost a byte, those around a view included."""
    before = [_bytes(t) for t in call.inputs]
    outputs = run(call)
    pairs = enumerate(zip(call.inputs, before, strict=True))
    return outputs, [("mutation", f"input {i} was changed") for i, (t, old) in pairs if not torch.equal(_bytes(t), old)]


def fresh(call: Call) -> Iterator[Problem]:
    """Results share no memory with inputs, each other or the next call's results, and stay as they are."""
    outputs = run(call)
    kept = [_bytes(o) for o in outputs]
    again = run(replace(call, inputs=[reversed_values(t) for t in call.inputs]))
    if any(not torch.equal(_bytes(out), old) for out, old in zip(outputs, kept, strict=True)):
        yield "alias", "a result of one call was changed by the next"
    if call.view:
        return
    named = [(f"input {i}", t) for i, t in enumerate(call.inputs)]
    for kind, results in (("result", outputs), ("the next call's result", again)):
        for i, out in enumerate(results):
            shared = [name for name, other in named if _overlap(out, other)]
            if shared:
                yield "alias", f"{kind} {i} shares memory with {shared[0]}"
            named.append((f"{kind} {i}", out))


def repeatable(call: Call) -> Iterator[Problem]:
    """The same inputs give the same bits."""
    first = run(call)
    for _ in range(_ROUNDS):
        # A generator that the code should not be reading is elsewhere each time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.getrandbits(32))
            again = run(call)
        if not all(map(_same_bits, first, again)):
            yield "determinism", "the same inputs gave other bits"
            return


def threaded(calls: Sequence[Call]) -> Iterator[Problem]:
    """Calls at once from several threads give what they give one after another."""
    alone = [[o.clone() for o in run(c)] for c in calls]

    def work(i: int) -> bool:
        return all(map(_same_bits, run(calls[i]), alone[i]))

    with ThreadPoolExecutor(THREADS) as pool:
        order = [i for _ in range(_ROUNDS) for i in range(len(calls))]
        if not all(pool.map(work, order)):
            yield "threads", f"calls from {THREADS} threads at once gave other results than one by one"


def drawn(call: Call, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Problem]:
    """A random draw gives eager's numbers for the same seed, moves the generator as eager does, and draws anew."""
    results = []
    for seed in (1, 1, 2):
        for function in (lambda: run(call)[0], lambda: op(*args, **kwargs)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                results.append((function(), torch.get_rng_state()))
    mine, eager = results[0::2], results[1::2]
    for (got, state), (want, wanted) in zip(mine, eager, strict=True):
        if not _same_bits(got, want):
            yield "values", "another draw than eager's for the same seed"
        if not torch.equal(state, wanted):
            yield "generator", "the generator is elsewhere than after eager's draw"
    if not _same_bits(mine[0][0], mine[1][0]):
        yield "determinism", "the same seed gave other bits"


RULES: tuple[Callable[[Call], Iterator[Problem]], ...] = (fresh, repeatable)


def _bytes(t: Tensor) -> Tensor:
    storage = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = a.untyped_storage(), b.untyped_storage()
    if not a.numel() or not b.numel():
        return False
    distance = second.data_ptr() - first.data_ptr()
    return -second.nbytes() < distance < first.nbytes()


def reversed_values(t: Tensor) -> Tensor:
    """The values of a floating tensor in the reverse order, in the same layout; other tensors as they are."""
    expanded = any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))
    if expanded or not t.numel() or not t.dtype.is_floating_point:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t.flip(list(range(t.dim()))))


def _same_bits(a: Any, b: Any) -> bool:
    a, b = (torch.empty(x.shape, dtype=x.dtype).copy_(x).reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)
