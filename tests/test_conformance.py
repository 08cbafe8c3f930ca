"""The conformance suite: it passes what is right, and finds every fault planted in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from primexec import reference
from primexec.executors import YES, Support, no
from primexec.prims import TABLE
from primexec.testing import ConformanceError, Expected, Finding, check_executor, suite
from primexec.testing.families import DRAWS, NAMES, ROWS, UNCHECKED, UNTRIED, dtypes_of
from primexec.testing.tolerance import TOLERANCES, differ, ulp
from primexec.testing.values import DTYPES, Draw
from tests.torch_executor import TorchExecutor

EXPECTED = Path(__file__).parent / "expected_torch.toml"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def check(executor: Any, *names: str, dtypes: Any = (F32,), **options: Any) -> Any:
    return check_executor(executor, names=names, dtypes=dtypes, **{"random_programs": 0, **options})


# What is right passes ------------------------------------------------------------------------------------

QUICK = [name for i, name in enumerate(NAMES) if i % 9 == 0]


def test_the_right_executor_passes() -> None:
    report = check(TorchExecutor(), *QUICK, dtypes=(F32, torch.int64), random_programs=40)
    assert [str(f) for f in report.findings] == []
    assert report
    assert report.programs > 20
    assert len(report.declared) > 12


@pytest.mark.exhaustive
def test_the_right_executor_passes_everywhere() -> None:
    report = check_executor(TorchExecutor(), expected=EXPECTED, random_programs=1000)
    assert report, str(report)


def test_the_suite_is_total_over_the_table_of_prims() -> None:
    kinds = (ROWS, DRAWS, UNCHECKED)
    assert sorted(name for kind in kinds for name in kind) == sorted(TABLE)
    assert {name for name, row in TABLE.items() if row.effects == "random"} == DRAWS.keys()
    assert {name: TABLE[name].effects for name in UNCHECKED if TABLE[name].effects != "collective"} == {
        "aten.copy_.default": "writes",
        "aten._linalg_check_errors.default": "raises",
    }
    assert {row.tolerance for row in ROWS.values()} <= TOLERANCES.keys()
    assert UNTRIED.keys() <= {(name, DTYPES[dtype]) for name in ROWS for dtype in TABLE[name].dtypes.split()}


def test_the_oracle_is_the_reference_of_each_prim() -> None:
    """Where something stands in for it, no reference is there, or it does not tell dtypes of 16 bits apart."""
    stand_ins = {name for name, row in ROWS.items() if row.stand_in is not None}
    native = {"prims.nextafter.default", "prims.view_of_dtype.default"}
    assert stand_ins == {name for name in ROWS if name not in reference.references()} | native
    assert all(ROWS[name].stand_in.__doc__ for name in stand_ins)


def test_every_dtype_of_a_prim_has_samples() -> None:
    for name in NAMES:
        for dtype in dtypes_of(name):
            assert next((ROWS[name].samples if name in ROWS else DRAWS[name])(Draw(dtype, 0)), None), (name, dtype)


# Planted faults ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A fault: where it shows, under which rules it is found, and what takes the place of the computation."""

    name: str
    rules: set[str]
    fault: Callable[..., Any]
    dtype: torch.dtype = F32


def wrong_polynomial(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x) * (1 + 8 * torch.finfo(F32).eps)


def sums_in_bfloat16(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    total = torch.zeros_like(x.sum(dims))
    for part in x.movedim(dims, list(range(len(dims)))).reshape(-1, *total.shape):
        total = total + part
    return total


def forgets_the_tail(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    """Vectors of four, and nothing for what is left."""
    out = compute(x)
    out.view(-1)[out.numel() // 4 * 4 :] = 0
    return out


def reads_uninitialised(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    out = torch.empty_like(compute(x, dims))
    return out.copy_(torch.where(out == out, compute(x, dims), out))


def mutates_its_input(compute: Any, node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    out = compute(x, y)
    if isinstance(y, Tensor) and y.is_contiguous() and x.numel() == 15:
        y.add_(1)
    return out


def returns_its_input(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return x


def returns_one_buffer(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    """The same memory at every call."""
    out = compute(x)
    kept = BUFFERS.setdefault(out.shape, torch.empty_like(out, memory_format=torch.contiguous_format))
    return kept.zero_().copy_(out * 1.0)


BUFFERS: dict[Any, Tensor] = {}


def wrong_dtype(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x.to(F32))


def wrong_shape(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    return compute(x, dims).reshape(-1)


def swallows_nan(compute: Any, node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > y, x, y)


def reduction_swallows_nan(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    return compute(x.nan_to_num(-math.inf, math.inf, -math.inf), dims)


def loses_negative_zero(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return 0 - x


def saturates(compute: Any, node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    info = torch.iinfo(x.dtype)
    exact = x.to(F64) + (y.to(F64) if isinstance(y, Tensor) else y)
    return torch.where((exact < info.min) | (exact > info.max), exact.sign() * info.max, exact).to(x.dtype)


def nondeterministic(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    out = compute(x, dims)
    return out + out.abs() * torch.finfo(F32).eps * torch.randint(0, 2, out.shape)


SCRATCH = torch.empty(4096)


def shares_scratch(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    if x.numel() > 4096:
        return compute(x)
    scratch = SCRATCH[: x.numel()].view(x.shape).copy_(x)
    time.sleep(0.002)
    return compute(scratch)


def ignores_strides(compute: Any, node: fx.Node, x: Tensor, y: Any) -> Tensor:
    return compute(x.as_strided(x.shape, torch.empty(x.shape).stride()) if x.stride(-1) == 2 else x, y)


def ignores_overlap(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    """Takes a stride of zero for a dense row."""
    return compute(x.contiguous() if 0 not in x.stride() else x.clone().zero_())


def ignores_offset(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x.as_strided(x.shape, x.stride(), 0))


def wrong_on_empty(compute: Any, node: fx.Node, x: Tensor, dims: list[int]) -> Tensor:
    return compute(x, dims) if x.numel() else torch.zeros_like(compute(x, dims))


def wrong_on_scalars(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return compute(x) if x.dim() else torch.zeros_like(x)


def wrong_broadcast(compute: Any, node: fx.Node, x: Tensor, shape: Any, dims: Any) -> Tensor:
    out = compute(x, shape, dims)
    return out.mT.contiguous() if out.dim() == 2 and out.shape[0] == out.shape[1] else out


def claims_too_much(compute: Any, node: fx.Node, *args: Any) -> Tensor:
    raise NotImplementedError("no such kernel")


def flushes_denormals(compute: Any, node: fx.Node, x: Tensor, y: Any) -> Tensor:
    out = compute(x, y)
    return torch.where(out.abs() < torch.finfo(F32).tiny, torch.zeros_like(out).copysign(out), out)


def rounds_half_up(compute: Any, node: fx.Node, x: Tensor) -> Tensor:
    return (x + 0.5).floor()


def loses_a_result(compute: Any, node: fx.Node, x: Tensor, dim: int) -> Any:
    values, indices = compute(x, dim)
    return values, indices.zero_()


def off_by_one(compute: Any, node: fx.Node, x: Tensor, dim: int, start: int, end: int, step: int = 1) -> Tensor:
    out = compute(x, dim, start, end, step)
    return out if step == 1 else out.roll(1, dim)


def truncates(compute: Any, node: fx.Node, x: Tensor, dtype: torch.dtype) -> Tensor:
    """To bfloat16 by dropping bits."""
    if x.dtype != F32 or dtype != BF16:
        return compute(x, dtype)
    return (x.contiguous().view(torch.int32) & -65536).view(F32).to(BF16)


def product_in_half(compute: Any, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for k in range(a.shape[1]):
        out = out + a[:, k, None] * b[None, k]
    return out


PLANTED = {
    f.fault.__name__: f
    for f in (
        Planted("prims.exp.default", {"values"}, wrong_polynomial),
        Planted("prims.sum.default", {"values"}, sums_in_bfloat16, BF16),
        Planted("prims.tanh.default", {"values"}, forgets_the_tail),
        Planted("prims.sum.default", {"values"}, reads_uninitialised),
        Planted("prims.add.default", {"mutation"}, mutates_its_input),
        Planted("prims.clone.default", {"alias"}, returns_its_input),
        Planted("prims.neg.default", {"alias"}, returns_one_buffer),
        Planted("prims.sin.default", {"dtype"}, wrong_dtype, F64),
        Planted("prims.amax.default", {"shape"}, wrong_shape),
        Planted("prims.maximum.default", {"values"}, swallows_nan),
        Planted("prims.amax.default", {"values"}, reduction_swallows_nan),
        Planted("prims.neg.default", {"values"}, loses_negative_zero),
        Planted("prims.add.default", {"values"}, saturates, torch.int8),
        Planted("prims.sum.default", {"determinism"}, nondeterministic),
        Planted("prims.exp.default", {"threads"}, shares_scratch),
        Planted("prims.mul.default", {"values"}, ignores_strides),
        Planted("prims.exp.default", {"values"}, ignores_overlap),
        Planted("prims.cos.default", {"values"}, ignores_offset),
        Planted("prims.prod.default", {"values"}, wrong_on_empty),
        Planted("prims.exp.default", {"values"}, wrong_on_scalars),
        Planted("prims.broadcast_in_dim.default", {"values"}, wrong_broadcast),
        Planted("prims.cosh.default", {"claim"}, claims_too_much),
        Planted("prims.mul.default", {"values"}, flushes_denormals),
        Planted("prims.round.default", {"values"}, rounds_half_up),
        Planted("aten.max.dim", {"values"}, loses_a_result),
        Planted("aten.slice.Tensor", {"values"}, off_by_one),
        Planted("prims.convert_element_type.default", {"values"}, truncates),
        Planted("aten.mm.default", {"values"}, product_in_half, F16),
    )
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_planted_fault_is_found(planted: Planted) -> None:
    report = check(TorchExecutor(planted.fault), planted.name, dtypes=(planted.dtype,))
    assert not report
    assert planted.rules <= {f.check for f in report.findings}, str(report)
    assert {(f.name, f.dtype) for f in report.findings} == {(planted.name, str(planted.dtype)[6:])}
    with pytest.raises(ConformanceError, match=planted.name):
        report.check()
    assert check(TorchExecutor(), planted.name, dtypes=(planted.dtype,)), "the right executor must pass there"


VIEWS = ("prims.transpose.default", "prims.broadcast_in_dim.default", "prims.squeeze.default")


def fuses_wrongly(compute: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Right for every operator alone; wrong for an operator on the result of a view."""
    out = compute(*args, **kwargs)
    if (
        any(a.op == "call_function" and str(a.target) in VIEWS for a in node.all_input_nodes)
        and isinstance(out, Tensor)
        and out.dtype.is_floating_point
    ):
        return out + 1
    return out


def test_faults_of_fusion_are_found_by_programs() -> None:
    report = check(TorchExecutor(fuses_wrongly), random_programs=150)
    assert [f.name for f in report.findings] == ["programs"]
    assert any(view in report.findings[0].message for view in VIEWS)


# What supports may say -----------------------------------------------------------------------------------


class Says(TorchExecutor):
    def __init__(self, answer: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self.answer = answer

    def supports(self, node: fx.Node) -> Support:
        return self.answer(node)


def raises(node: fx.Node) -> Support:
    raise KeyError("no idea")


ANSWERS: dict[str, tuple[Callable[[fx.Node], Any], str]] = {
    "raises": (raises, "supports raised KeyError: 'no idea'"),
    "a bool": (lambda node: True, "supports returned True, not YES or no(reason)"),
    "changes": (lambda node, seen=[]: seen.append(1) or (YES if len(seen) % 2 else no("odd")), "when asked again"),
    "everything": (lambda node: YES, "declares an operator that it cannot know"),
}


@pytest.mark.parametrize(("answer", "message"), ANSWERS.values(), ids=ANSWERS)
def test_answers_that_break_the_protocol(answer: Callable[[fx.Node], Any], message: str) -> None:
    report = check(Says(answer), "prims.neg.default")
    assert not report
    assert any(f.check == "claim" and message in f.message for f in report.findings), str(report)


def test_what_is_declined_is_counted_and_must_have_a_reason() -> None:
    report = check(Says(lambda node: no("only on Sundays")), "prims.neg.default")
    assert report
    assert report.declared == []
    assert set(report.rows["prims.neg.default", "float32"].declined) == {"only on Sundays"}


def test_declaring_nothing_at_all_is_no_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "NAMES", NAMES[:2])
    report = check_executor(Says(lambda node: no("never")), dtypes=(F32,), random_programs=0)
    assert [f.message for f in report.findings] == ["the executor declares no operator of the table"]


# Expected failures ---------------------------------------------------------------------------------------

FAILURE = '[[failure]]\nname = "{}"\ndtype = "{}"\nreason = "known"\n'


def expecting(folder: Path, *failures: tuple[str, str]) -> Path:
    file = folder / "expected.toml"
    file.write_text("".join(FAILURE.format(*f) for f in failures))
    return file


def test_expected_failure_is_accepted(tmp_path: Path) -> None:
    file = expecting(tmp_path, ("prims.exp.default", "float32"))
    report = check(TorchExecutor(wrong_polynomial), "prims.exp.default", expected=file)
    assert report
    assert report.findings
    assert not report.unexpected
    assert "conforms (1 expected failures)" in str(report)


def test_expected_failure_that_passes_fails(tmp_path: Path) -> None:
    file = expecting(tmp_path, ("prims.exp.default", "float32"))
    with pytest.raises(ConformanceError, match=r"prims.exp.default float32 \(known\) passes: strike it out"):
        check(TorchExecutor(), "prims.exp.default", expected=file).check()


@pytest.mark.parametrize("failure", [("prims.epx.default", "float32"), ("prims.exp.default", "float33")])
def test_expected_failure_that_names_nothing_fails(tmp_path: Path, failure: tuple[str, str]) -> None:
    with pytest.raises(ConformanceError, match="was not tried"):
        check(TorchExecutor(), "prims.exp.default", expected=expecting(tmp_path, failure)).check()


@pytest.mark.parametrize("text", ['[[failure]]\nname = "a"', '[[failure]]\nname = "a"\nreason = "b"\nwhy = 1'])
def test_malformed_file_of_expected_failures(tmp_path: Path, text: str) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="an expected failure has name, reason and at most dtype"):
        Expected.load(file)


def test_an_entry_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prims\.exp\.default float32 stands there twice"):
        Expected.load(expecting(tmp_path, *[("prims.exp.default", "float32")] * 2))


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match=r"no such operators in the table: prims\.nothing"):
        check(TorchExecutor(), "prims.nothing")


# The comparison ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_ulp_is_the_distance_of_neighbours(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    bits = x.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    above = (bits + 1).view(dtype)
    assert torch.equal(above.to(F64) - x.to(F64), ulp(x.to(F64), dtype))


def test_infinity_next_to_the_largest_number() -> None:
    largest = torch.finfo(F32).max
    want = torch.tensor([largest], dtype=F64)
    assert not differ(torch.tensor([math.inf]), want, TOLERANCES["pointwise"]).problem
    assert differ(torch.tensor([-math.inf]), want, TOLERANCES["pointwise"]).problem
    assert differ(torch.tensor([math.inf]), want / 2, TOLERANCES["pointwise"]).problem


def test_findings_print_what_and_where() -> None:
    finding = Finding("prims.exp.default", "float32", "values", "wrong")
    assert str(finding) == "prims.exp.default float32 (values): wrong"
