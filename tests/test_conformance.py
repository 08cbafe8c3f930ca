"""The conformance suite: it passes what is right, and finds every fault planted in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from primexec import reference
from primexec.executors import YES, Support, no, registry
from primexec.prims import TABLE
from primexec.testing import ConformanceError, Expected, Finding, check_executor, programs, suite, training
from primexec.testing.exploration import explore
from primexec.testing.families import DRAWS, NAMES, ROWS, UNCHECKED, UNTRIED, dtypes_of
from primexec.testing.tolerance import TOLERANCES, differ, ulp
from primexec.testing.values import DTYPES, Draw
from tests.faults import PLANTED, REGIONS, VIEWS, OnPrims, Planted, fuses_wrongly, mean_for_sum, wrong_polynomial
from tests.torch_executor import TorchExecutor

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
@pytest.mark.parametrize("name", ["numpy", "aten", "llvm"])
def test_executor_conforms(name: str) -> None:
    report = check_executor(name, random_programs=1000)
    assert report, str(report)


def test_the_suite_is_total_over_the_table_of_prims() -> None:
    kinds = (ROWS, DRAWS, UNCHECKED)
    assert sorted(name for kind in kinds for name in kind) == sorted(TABLE)
    assert {name for name, row in TABLE.items() if row.effects == "random"} == DRAWS.keys()
    assert {name: TABLE[name].effects for name in UNCHECKED if TABLE[name].effects != "collective"} == {
        "aten.copy_.default": "writes",
        "aten._linalg_check_errors.default": "raises",
        "aten._assert_async.msg": "raises",
    }
    assert {row.tolerance for row in ROWS.values()} <= TOLERANCES.keys()
    assert UNTRIED.keys() <= {(name, DTYPES[dtype]) for name in NAMES for dtype in TABLE[name].dtypes.split()}


def test_the_oracle_is_the_reference_of_each_prim() -> None:
    """Where something stands in for it, no reference is there, or it does not tell dtypes of 16 bits apart."""
    stand_ins = {name for name, row in ROWS.items() if row.stand_in is not None}
    native = {"prims.nextafter.default", "prims.view_of_dtype.default"}
    assert stand_ins == {name for name in ROWS if name not in reference.references()} | native
    assert all(ROWS[name].stand_in.__doc__ for name in stand_ins)


WHOLE = ("linalg", "scan", "contraction", "reduction", "indexing", "fft")


@pytest.mark.parametrize("name", [name for name in ROWS if TABLE[name].family in WHOLE])
def test_references_of_whole_arrays_agree_with_pytorch(name: str) -> None:
    """In float64, where neither side is the more exact one."""
    aten = registry.load("aten")
    dtype = F64 if F64 in dtypes_of(name) else torch.complex128
    report = check(aten, name, dtypes=(dtype,), expected=Expected())
    known = Expected.of(aten).reasons
    assert [str(f) for f in report.findings if (f.name, f.dtype) not in known] == []
    assert report.rows[name, str(dtype)[6:]].cases


def test_every_dtype_of_a_prim_has_samples() -> None:
    for name in NAMES:
        for dtype in dtypes_of(name):
            assert next((ROWS[name].samples if name in ROWS else DRAWS[name])(Draw(dtype, 0)), None), (name, dtype)


@pytest.mark.parametrize("name", training.PROGRAMS)
def test_trained_references_agree_with_pytorch(name: str) -> None:
    """In float64: passes that every executor shares would be wrong in the reference, too."""
    inputs = training.inputs_of(name, F64, 0)
    (eager,) = training.train(training.PROGRAMS[name][0], [inputs], 0)
    for (what, got), (_, exact) in zip(training.reference(name, 0).named(), eager.named(), strict=True):
        torch.testing.assert_close(got, exact, msg=lambda m, what=what: f"{what}: {m}")


# Planted faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_planted_fault_is_found(planted: Planted) -> None:
    report = check(TorchExecutor(planted.fault), planted.name, dtypes=(planted.dtype,))
    assert not report
    assert planted.rules <= {f.check for f in report.findings}, str(report)
    assert {(f.name, f.dtype) for f in report.findings} == {(planted.name, str(planted.dtype)[6:])}
    with pytest.raises(ConformanceError, match=planted.name):
        report.check()
    assert check(TorchExecutor(), planted.name, dtypes=(planted.dtype,)), "the right executor must pass there"


@pytest.mark.parametrize("name", REGIONS)
def test_fault_of_regions_is_found_by_training(name: str) -> None:
    """Each is right for every operator alone."""
    executor, rules = REGIONS[name]
    _, findings = training.check_table(executor(), 0)
    assert rules <= {f.check for f in findings}, list(map(str, findings))


def test_faults_of_fusion_are_found_by_random_programs() -> None:
    ran, findings = programs.check(TorchExecutor(fuses_wrongly), 60, 0)
    assert ran
    assert any(view in findings[0].message for view in VIEWS)


def test_faults_of_gradients_are_found_by_random_functions() -> None:
    ran, findings = explore(training.plans, partial(training.try_plan, OnPrims(mean_for_sum)), "training", 60, 0)
    assert ran
    assert [f.check for f in findings] in (["gradients"], ["values"])  # a function may add up by itself, too


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


def test_an_executor_brings_its_own_file(tmp_path: Path) -> None:
    executor = TorchExecutor(wrong_polynomial)
    executor.expected_failures = expecting(tmp_path, ("prims.exp.default", "float32"))
    assert check(executor, "prims.exp.default")
    assert not check(executor, "prims.exp.default", expected=Expected())


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
