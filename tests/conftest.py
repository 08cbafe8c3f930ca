"""What the whole suite shares: the exhaustive mode and the settings of hypothesis."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Captured programs are held to eager bit for bit, as only this executor runs them; tests of others name these.
os.environ["PRIMEXEC_EXECUTOR"] = "aten"
from primexec.config import verify_passes

# Reproducible and without a database: a run depends on the code alone. Tracing takes as long as it takes.
settings.register_profile(
    "default",
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("exhaustive", parent=settings.get_profile("default"), max_examples=4000)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test compiles what it runs: others may have changed how."""
    for name in ("codes", "repeats"):
        if (module := sys.modules.get(f"primexec.executors.llvm.{name}")) is not None:
            module._known.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether all samples are asked for."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture
def swept(request: pytest.FixtureRequest) -> Callable[[str, str], list[Any]]:
    """The results of one entry of a sweep of tests/coverage.py: of few samples, or of all that are asked for."""
    from tests.coverage import run  # takes a second, and most tests do without

    quick, keep = not request.config.getoption("--exhaustive"), request.config.getoption("--keep")
    return lambda sweep, name: run(sweep, name, quick, keep)[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=Path, metavar="FOLDER", help="where tests/coverage.py finds results of sweeps")
    parser.addoption("--exhaustive", action="store_true", help="every sample, and many more generated programs")


def pytest_configure(config: pytest.Config) -> None:
    verify_passes(True)
    settings.load_profile("exhaustive" if config.getoption("--exhaustive") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    skip = pytest.mark.skip(reason="runs only with --exhaustive")
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(skip)
