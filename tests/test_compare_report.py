"""What a comparison shows, draws and writes, and what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec
from primexec import CaptureError, Comparison, PrimexecError
from tests.faulty import WrongPolynomial, one_by_one
from tests.isolated import ROOT
from tests.toy import install

X = torch.linspace(-2, 2, 24).reshape(2, 12)


def function(x: Tensor) -> Tensor:
    y = x * 2
    return y.exp() + y


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    install(monkeypatch, fused=WrongPolynomial, alone=one_by_one(WrongPolynomial))
    return primexec.compare(function, X, executors=["aten", "alone", "fused"])


def test_table(comparison: Comparison) -> None:
    text = str(comparison)
    assert text.startswith("function: 3 operators against float64\naten: rounding explains every difference\n")
    assert "alone diverges at exp = aten.exp (forward), run alone on the inputs it had\n" in text
    assert "fused diverges at exp = aten.exp (forward), found among 3 operators by 5 compiles\n" in text
    assert text.count("return y.exp() + y") == 2
    assert comparison._repr_html_().startswith("<pre>function: 3 operators")
    (line,) = [line for line in text.splitlines() if line.startswith("exp = aten.exp")]
    assert "test_compare_report.py:" in line
    assert line.count("<") == 2


def test_errors_are_those_of_eager_against_float64(comparison: Comparison) -> None:
    exact = function(X.double())
    apart = (function(X).double() - exact).abs()
    error = comparison.rows[-1].errors["aten"].accumulated
    assert error.absolute == pytest.approx(apart.max().item())
    assert error.relative == pytest.approx((apart / exact.abs()).max().item())
    near = torch.tensor(torch.finfo(torch.float32).eps) * 2 ** exact.abs().log2().floor()
    assert error.ulps == pytest.approx((apart / near).max().item())


def test_plot(comparison: Comparison) -> None:
    axes = comparison.plot().axes[0]
    assert axes.get_yscale() == "log"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["aten", "alone", "alone diverges", "fused", "fused diverges"]


@pytest.mark.parametrize("executor", ["alone", "fused"])
def test_repro_fails_by_itself(comparison: Comparison, tmp_path: Path, executor: str) -> None:
    script = comparison.repro(tmp_path / "fault", executor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fault.pt", "fault.py"]
    done = run(script, fuses=executor == "fused", wrong=True)
    assert done.returncode == 1, done.stderr
    assert f"{executor} diverges at exp = aten.exp" in done.stdout
    assert run(script, fuses=executor == "fused", wrong=False).returncode == 0


def run(script: Path, *, fuses: bool, wrong: bool) -> subprocess.CompletedProcess[str]:
    """The script where the plug-in is installed, still wrong or repaired."""
    plugin = script.parent / f"plugin_{wrong}"
    (plugin / "faulty_plugin-1.dist-info").mkdir(parents=True)
    (plugin / "faulty_plugin-1.dist-info" / "METADATA").write_text("Name: faulty-plugin\nVersion: 1\n")
    (plugin / "faulty_plugin-1.dist-info" / "entry_points.txt").write_text(
        "[primexec.executors]\nalone = faulty_plugin:It\nfused = faulty_plugin:It\n"
    )
    kind = "WrongPolynomial" if wrong else "Honest"
    text = f"from tests.faulty import {kind}, one_by_one\nIt = {kind if fuses else f'one_by_one({kind})'}\n"
    (plugin / "faulty_plugin.py").write_text(text)
    environment = {"PYTHONPATH": f"{plugin}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)


def test_nothing_to_write(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(PrimexecError, match="no divergence of aten"):
        comparison.repro(tmp_path / "x.py", "aten")


def branch(x: Tensor) -> Tensor:
    return x if complex(x.sum()) == 0 else -x


def decided(x: Tensor) -> Tensor:
    return x.exp() if (x - x.mean()).sum() >= 0 else x.sin()


def test_every_executor_goes_the_way_that_the_trace_took() -> None:
    """The sum is a rounding error, of another sign in float64 perhaps."""
    for seed in range(4):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        found = primexec.compare(decided, x, executors=["llvm", "aten"])
        assert set(found.first.values()) == {None}
        assert ("aten.exp" in str(found)) == ((x - x.mean()).sum().item() >= 0)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "executor": (function, {"executors": ["nobody"]}, ValueError, "'executor': nobody. Allowed values are: aten"),
    "no executor": (function, {"executors": []}, ValueError, "at least one executor"),
    "reference": (
        function,
        {"executors": ["aten"], "reference": "exact"},
        ValueError,
        "'reference': exact. Allowed values are: float64, eager, aten",
    ),
    "not a function": (3, {"executors": ["aten"]}, TypeError, "takes a callable, got int"),
    "not captured": (branch, {"executors": ["aten"]}, CaptureError, "return x if complex"),
    "no rounding": (lambda x: x > 0, {"executors": ["aten"]}, ValueError, "computes nothing in floating point"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fn, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        primexec.compare(fn, X, **options)
