"""Plug-ins: the tutorial's executor, installed as a stranger would, and what happens where a plug-in is bad."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import ExecutorError, make_traced
from tests.isolated import ROOT
from tests.test_readme import blocks
from tests.toy import Toy, broken, install

PAGE = ROOT / "docs" / "write-an-executor.md"
EXAMPLE = ROOT / "tests" / "example_executor"
SOURCE = (EXAMPLE / "example_executor.py").read_text()
X = torch.arange(6.0).reshape(2, 3)

SHIPPED = ("primexec", "pytest_primexec.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which primexec and the example were installed from copies of their sources."""
    folder = tmp_path_factory.mktemp("plugins")
    ours = folder / "primexec-source"
    ours.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, ours / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, ours)
    shutil.copytree(EXAMPLE, folder / "example", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    for source in (ours, folder / "example"):
        run(folder, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--target",
            str(folder / "site"), str(source))  # fmt: skip
    return folder / "site"


def run(folder: Path, *arguments: str, path: Path | None = None, fails: bool = False) -> str:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_installed_executor_runs_programs(site: Path, tmp_path: Path) -> None:
    shown = run(
        tmp_path,
        "-c",
        "import primexec, torch, sys; print(primexec.__file__);"
        "print('example_executor' in sys.modules);"
        "f = primexec.make_traced(lambda x, y: (x * y).exp() / 2, executor='example');"
        "x, y = torch.rand(3, 4), torch.rand(3, 4);"
        "torch.testing.assert_close(f(x, y), (x * y).exp() / 2);"
        "print(primexec.executors()['example'] == ''); f.explain(x, y)",
        path=site,
    )
    assert shown.splitlines()[:3] == [str(site / "primexec" / "__init__.py"), "False", "True"]
    assert "region0 on example: 3 operators" in shown
    assert "region1" not in shown


def test_the_suite_runs_on_the_installed_executor(site: Path, tmp_path: Path) -> None:
    suite = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "primexec.testing", "--executor", "example")
    few = "prims.exp.default or prims.neg.default or random_programs or expected or declared"
    some = ("-k", few, "--random-programs", "20")
    assert re.search(r"^5 passed", run(tmp_path, *suite, *some, path=site), re.MULTILINE)
    file = tmp_path / "expected.toml"
    file.write_text('[[failure]]\nname = "prims.exp.default"\nreason = "we think so"\n')
    shown = run(tmp_path, *suite, "--expected", str(file), "-k", "prims.exp.default", path=site, fails=True)
    assert "expected failure prims.exp.default of every dtype (we think so) passes: strike it out" in shown


def test_without_an_executor_nothing_runs(site: Path, tmp_path: Path) -> None:
    assert "no tests ran" in run(tmp_path, "-m", "pytest", "-q", "--pyargs", "primexec.testing", path=site, fails=True)


def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text()
    assert f"```python\n{SOURCE}```" in page
    assert f"```toml\n{(EXAMPLE / 'pyproject.toml').read_text()}```" in page
    assert len(SOURCE.splitlines()) < 100
    module = types.ModuleType("__main__")
    first, *rest = blocks(PAGE)
    assert len(rest) == 2
    first.run(module.__dict__)
    install(monkeypatch, example=module.__dict__["ExampleExecutor"])
    for block in rest:
        block.run(module.__dict__)


# Plug-ins that fail --------------------------------------------------------------------------------------


def add(x: Tensor) -> Tensor:
    return x + x


def raising(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("the plug-in's own bug")


def at_run_time(self: Any, region: Any, options: Mapping[str, Any]) -> Any:
    return raising


FAILS: dict[str, tuple[dict[str, Any], str]] = {
    "in supports": ({"supports": raising}, "the executor 'toy' failed to judge .*: the plug-in's own bug"),
    "in compile": ({"compile": raising}, "the executor 'toy' failed to compile region0: the plug-in's own bug"),
    "supports says a bool": ({"supports": lambda self, node: True}, "'toy' answered True .* not YES or no"),
    "compiles to nothing": ({"compile": lambda self, region, options: None}, "'toy' compiled region0 to a NoneType"),
    "returns no sequence": (
        {"compile": lambda self, region, options: lambda *inputs: inputs[0].sum()},
        "toy returned Tensor for region0, not a list or tuple of tensors",
    ),
}


@pytest.mark.parametrize(("members", "message"), FAILS.values(), ids=FAILS)
def test_failure_names_the_executor(monkeypatch: pytest.MonkeyPatch, members: dict[str, Any], message: str) -> None:
    install(monkeypatch, toy=broken(**members))
    with pytest.raises(ExecutorError, match=message) as failed:
        make_traced(add, executor="toy")(X)
    if "own bug" in message:
        assert isinstance(failed.value.__cause__, ZeroDivisionError)


def test_failure_at_run_time_names_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error keeps its type: it may be one that the program is to raise."""
    install(monkeypatch, toy=broken(compile=at_run_time))
    with pytest.raises(ZeroDivisionError) as failed:
        make_traced(add, executor="toy")(X)
    assert failed.value.__notes__ == ["raised by the executor 'toy' while it ran region0"]


def test_results_get_the_strides_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor may lay its results out as it likes."""

    def dense(self: Any, region: Any, options: Mapping[str, Any]) -> Any:
        run = Toy.compile(self, region, options)
        return lambda *inputs: [out.contiguous() for out in run(*inputs)]

    install(monkeypatch, toy=broken(compile=dense))
    for fn in (lambda x: x.t() + x.t(), lambda x: (x.t() + x.t()).t().view(-1)):
        got, want = make_traced(fn, executor="toy")(X), fn(X)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
