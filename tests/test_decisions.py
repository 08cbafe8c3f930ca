"""Functions that decide by the values of tensors: a program for each way, chosen by the values of a call."""

import itertools
import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, RetraceWarning, make_traced
from primexec.decisions import MOST
from primexec.rehearsal import Rehearsal
from tests.test_threads import together

EXECUTORS = ["aten", ("numpy", "aten"), ("llvm", "aten")]
scale = 3.0


def filled(*values: float) -> list[Tensor]:
    return [torch.full((2, 3), float(v)) for v in values]


def check(fn: Callable[..., Any], calls: list[Any], traces_at: set[int], executor: Any = "auto") -> Any:
    """Compare results, arguments and random states with eager's, call by call; which calls trace is exact."""
    traced = make_traced(fn, executor=executor)
    for i, args in enumerate(calls):
        args = args if isinstance(args, tuple) else (args,)
        copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        state = torch.get_rng_state()
        expected = fn(*args)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        before = traced.cache_info()
        torch.testing.assert_close(traced(*copies), expected)
        torch.testing.assert_close(copies, args)
        assert torch.equal(torch.get_rng_state(), after)
        info = traced.cache_info()
        assert (info.traces - before.traces, info.hits - before.hits) == ((1, 0) if i in traces_at else (0, 1)), i
    return traced


# What decides ---------------------------------------------------------------------------------------------


def branch(x: Tensor) -> Tensor:
    y = x * 2
    if y.sum() > 0:
        return y + 1
    return y - 1


def number(x: Tensor) -> Tensor:
    top = x.max().item()
    return x / top if top > 10 else x * top


def truth(x: Tensor) -> Tensor:
    if not x.sum().item():
        return x + 1
    return x


def element(x: Tensor) -> Tensor:
    return x + 1 if 2.0 in x else x


def item_of_bool(x: Tensor) -> Tensor:
    return x + 1 if (x == 2).any().item() else x


def equal(x: Tensor) -> Tensor:
    return x + 1 if torch.equal(x, x.round()) else x


def close(x: Tensor) -> Tensor:
    return x + 1 if torch.allclose(x, x.round(), atol=0.01) else x


def builtin_max(x: Tensor) -> Tensor:
    return x * max(1, x.sum().item())


def against_a_tensor(x: Tensor) -> Tensor:
    return x + 1 if (x.sum().item() > x).all() else x


def asked_in_c(x: Tensor) -> Tensor:
    return x + 1 if torch.is_nonzero(x.sum() > 6) else x


def masked(x: Tensor) -> Tensor:
    mask = x > 2
    if mask.any():
        x[mask] = 0
    return x * 2


WAYS: list[tuple[Callable[..., Any], list[float], set[int]]] = [
    (branch, [1, 2, -1, -2, 3], {0, 2}),
    (number, [1, 20, 2, 30], {0, 1}),
    (truth, [0, 1, 0, 2], {0, 1}),
    (element, [1, 2, 3, 2], {0, 1}),
    (item_of_bool, [1, 2, 3, 2], {0, 1}),
    (equal, [1, 1.5, 2, 2.5], {0, 1}),
    (close, [1, 1.5, 1.001, 2.5], {0, 1}),
    (builtin_max, [1, -1, 2, -2], {0, 1}),
    (against_a_tensor, [1, -1, 2, -2], {0, 1}),
    (asked_in_c, [1, 2, 3, -2], {0, 1}),
    (masked, [1, 5, 2, 7], {0, 1}),
]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("fn", "values", "traces_at"), WAYS, ids=lambda v: getattr(v, "__name__", ""))
def test_each_way_has_a_program(fn: Any, values: list[float], traces_at: set[int], executor: Any) -> None:
    check(fn, filled(*values), traces_at, executor)


def nested(x: Tensor, y: Tensor) -> Tensor:
    if x.sum() > 0:
        return x + 1 if y.sum() > 0 else x - 1
    return x * 2 if y.max() > 5 else x * 3


def test_ways_within_ways() -> None:
    pairs = [(1, 1), (1, -1), (-1, 6), (-1, 1), (1, 1), (-1, 6), (1, -1), (-1, -1)]
    check(nested, [tuple(filled(*pair)) for pair in pairs], {0, 1, 2, 3})


@pytest.mark.parametrize("executor", EXECUTORS)
def test_loops(executor: Any) -> None:
    def halve(x: Tensor) -> tuple[Tensor, int]:
        steps = 0
        while x.abs().max() > 1:
            x = x / 2
            steps += 1
        return x, steps

    check(halve, filled(1, 5, 100, 6, 90, 0.5, 2), {0, 1, 2, 6}, executor)


def test_a_way_that_calls_leave_again_is_served_by_what_is_there() -> None:
    traced = check(branch, filled(*[1, -1] * 5), {0, 1})
    assert traced.cache_info().misses == 2


# What a program has done when it is left ----------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_writes_to_arguments_are_put_back(executor: Any) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        y[0].mul_(3)
        if x.sum() > y.sum():
            x.mul_(2)
            return x + y
        y.sub_(x)
        return x * y

    check(fn, [tuple(filled(*pair)) for pair in [(1, 5), (5, 1), (2, 9), (9, 2)]], {0, 1}, executor)


def test_arguments_that_share_memory() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        if y.sum() > 9:
            return y + x.sum()
        return y - x.sum()

    traced = make_traced(fn)
    for value in (0.0, 5.0, 1.0, 3.0):
        a, b = torch.full((8,), value), torch.full((8,), value)
        assert torch.equal(traced(a[:6], a[2:]), fn(b[:6], b[2:]))
        assert torch.equal(a, b)
    assert traced.cache_info().traces == 2


@pytest.mark.parametrize("executor", EXECUTORS)
def test_random_numbers_before_and_behind(executor: Any) -> None:
    def fn(x: Tensor) -> Tensor:
        y = nn.functional.dropout(x, 0.5)
        if y.sum() > 6:
            return y + torch.rand(3)
        return y * torch.randn(2, 3) + torch.rand(3)

    traced = make_traced(fn, executor=executor)
    torch.manual_seed(0)
    expected = [fn(x) for x in filled(*[1.0] * 20)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for x, result in zip(filled(*[1.0] * 20), expected, strict=True):
        torch.testing.assert_close(traced(x), result)
    assert torch.equal(torch.get_rng_state(), state)
    assert traced.cache_info()[:3] == (18, 2, 2)


def test_a_generator_is_put_back() -> None:
    def fn(x: Tensor, generator: torch.Generator) -> Tensor:
        y = x * torch.rand(2, 3, generator=generator)
        return y + torch.rand(3, generator=generator) if y.sum() > 3 else y - 1

    traced, a, b = make_traced(fn), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for x in filled(1, 5, 0.1, 7, 0.2):
        assert torch.equal(traced(x, a), fn(x, b))
        assert torch.equal(a.get_state(), b.get_state())
    assert traced.cache_info().traces == 2


class Normed(nn.Module):
    """Changes buffers and attributes before and behind a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seen: Tensor | None = None
        self.register_buffer("large", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.seen = x.sum()
        if self.norm.running_mean.abs().max() > 1:
            self.large += 1
            self.norm.running_mean.zero_()
            return y * 2
        return y


@pytest.mark.parametrize("executor", EXECUTORS)
def test_buffers_and_attributes_of_modules(executor: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = Normed(), Normed()
    traced = make_traced(ours, executor=executor)
    for i in range(12):
        x = torch.randn(4, 3) + i
        with torch.no_grad():
            torch.testing.assert_close(traced(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.seen, theirs.seen)
    assert traced.cache_info()[:3] == (9, 3, 3)  # `seen` is no tensor at the first call
    assert ours.large > 0


def test_python_state_is_left_as_the_way_taken_leaves_it() -> None:
    class Log:
        last: Any = None

    ours, theirs = Log(), Log()

    def fn(x: Tensor, log: Any) -> Tensor:
        log.last = "before"
        if x.sum() > 0:
            log.last = x * scale
        return x

    traced = make_traced(fn)
    for x in filled(1, -1, 2, -2):
        traced(x, ours), fn(x, theirs)
        assert type(ours.last) is type(theirs.last)
        assert ours.last == "before" or torch.equal(ours.last, theirs.last)


def test_a_global_that_one_way_reads() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * scale if x.sum() > 0 else x

    global scale
    traced = make_traced(fn)
    for value, x, traces in zip((3.0, 3.0, 4.0, 4.0), filled(1, -1, -1, 1), (1, 2, 3, 4), strict=True):
        scale = value
        assert torch.equal(traced(x), fn(x))
        assert traced.cache_info().traces == traces
    scale = 3.0


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_lies_behind_a_branch_does_not_run_before_it(executor: Any) -> None:
    def fn(x: Tensor, index: Tensor) -> Tensor:
        if (index < 6).all():
            return x.flatten()[index] * 2
        return x.flatten()[index.clamp(max=5)]

    calls = [(X, torch.tensor(i)) for X in filled(1) for i in ([0, 1], [2, 700], [5, 5], [6, 6])]
    check(fn, calls, {0, 1}, executor)


def test_errors_are_eagers() -> None:
    def fn(x: Tensor, index: Tensor) -> Tensor:
        y = x.flatten()[index]
        try:
            if y.sum() > 0:
                print("positive")
                raise KeyError(f"of {y.numel()}")
        except IndexError:  # not what the operator above raises
            return x
        return y

    traced = make_traced(fn)
    (x,), bad = filled(1), torch.tensor([9])
    for args, kind in (((-x, bad * 0), None), ((x, bad * 0), KeyError), ((-x, bad), IndexError), ((-x, bad * 0), None)):
        if kind is None:
            assert torch.equal(traced(*args), fn(*args))
        else:
            with pytest.raises(kind) as eager:
                fn(*args)
            with pytest.raises(kind) as caught:
                traced(*args)
            assert str(caught.value) == str(eager.value)
    with pytest.raises(IndexError):
        make_traced(fn)(x, bad)  # found while it is traced
    with pytest.raises(CaptureError, match="raises IndexError") as refused:
        make_traced(fn).trace(x, bad)
    assert "y = x.flatten()[index]" in str(refused.value)


# Around it --------------------------------------------------------------------------------------------------


def test_trace_and_explain_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fn(x: Tensor) -> Tensor:
        x.add_(torch.rand(3))
        if x.sum() > 0:
            return x
        return -x

    traced, (x,) = make_traced(fn), filled(1)
    state = torch.get_rng_state()
    assert "decide('truth', [gt], True, 0)" in str(traced.trace(x))
    report = traced.explain(x)
    assert torch.equal(x, filled(1)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [d.outcome for d in report.decisions] == [True]
    assert "decided at every call: True in test_decisions.py" in capsys.readouterr().out
    traced(x.clone())
    assert traced.explain(x).cached
    assert not traced.explain(x - 100).cached


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_under_modes(mode: Any) -> None:
    linear = nn.Linear(3, 3)

    def fn(x: Tensor) -> Tensor:
        y = linear(x.add_(1))
        return y + 1 if x.sum() > 0 else y.add_(x) * 2

    with mode():
        check(fn, filled(1, -5, 2, -6), {0, 1})


def test_what_a_rehearsal_gets_wrong_is_found_by_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "answer", lambda *_: False)
    traced = make_traced(nested)
    for pair in [(1, 1), (1, -1), (-1, 6), (-1, 1)]:
        args = tuple(filled(*pair))
        assert torch.equal(traced(*args), nested(*args))


def test_programs_that_never_agree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = itertools.cycle([7, 8])
    monkeypatch.setattr(
        "primexec.decisions.operator", types.SimpleNamespace(index=lambda value: next(outcomes), eq=operator.eq)
    )
    with pytest.raises(CaptureError, match="another value than it was traced for") as caught:
        make_traced(lambda x: x * int(x.sum().long()))(torch.ones(3))
    assert caught.value.source.text


def test_a_function_that_keeps_deciding_otherwise_is_named() -> None:
    def bits(x: Tensor) -> Tensor:
        for i in range(4):
            if x[i] > 0:
                x = x - i
        return x

    traced = make_traced(bits)
    inputs = [torch.tensor([100.0 if i >> k & 1 else -1.0 for k in range(4)]) for i in range(10)]
    with pytest.warns(RetraceWarning, match=r"test_decisions\.py:\d+ in .*bits: if x\[i\] > 0: decides \(8 times\)"):
        results = [traced(x) for x in inputs]
    assert all(torch.equal(result, bits(x)) for result, x in zip(results, inputs, strict=True))


@pytest.mark.parametrize("threads", [4])
def test_threads(threads: int) -> None:
    traced = make_traced(nested)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            args = torch.randn(2, 2, 3, generator=generator).mul(4).unbind()
            assert torch.equal(traced(*args), nested(*args))

    together(work, threads)
    assert traced.cache_info().traces <= 4


class Doubled(torch.autograd.Function):
    """Decides in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2 if gradient.sum() > 0 else gradient


WEIGHT = nn.Parameter(torch.ones(3))


def many(x: Tensor) -> Tensor:
    while x.sum() < MOST:
        x = x + 0.01
    return x


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "cond": lambda x: torch.cond(x.sum() > 0, lambda y: y if y.sum() > 1 else -y, lambda y: y * 2, (x,)),
    "backward": lambda x: Doubled.apply(x * WEIGHT).sum(),
    "moved": lambda x: x if x.t_().sum() > 0 else -x,
    "beyond": lambda x: x if x.as_strided((6,), (1,)).mul_(2).sum() > 0 else -x,
    "repeated": lambda x: x if x[0].mul_(2).sum() > 0 else -x,
    "many": many,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    x = torch.ones(1, 3).expand(2, 3) if name == "repeated" else torch.ones(2, 3)
    with pytest.raises(CaptureError, match="value"):
        make_traced(REFUSED[name])(x)
    assert torch.equal(x, torch.ones(2, 3))
