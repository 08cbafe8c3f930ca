"""The conformance suite as tests: one for each operator, then random programs and training."""

from __future__ import annotations

import pytest

from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.testing.families import NAMES
from primexec.testing.report import Expected
from primexec.testing.suite import check_executor

WHOLE = ("programs", "training", "supports")  # names of findings that are no prims


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> Executor:
    return registry.load(request.config.getoption("--executor"))


@pytest.fixture(scope="session")
def expected(request: pytest.FixtureRequest, executor: Executor) -> Expected:
    return Expected.of(executor, request.config.getoption("--expected"))


@pytest.fixture(scope="session")
def declared() -> set[str]:
    """The operators found declared so far."""
    return set()


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str, executor: Executor, expected: Expected, declared: set[str]) -> None:
    mine = expected.only({name})
    report = check_executor(executor, names=[name], expected=mine, random_programs=0)
    if report.declared:
        declared.add(name)
    report.check()


def test_random_programs(executor: Executor, expected: Expected, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--random-programs")
    check_executor(executor, names=[], expected=expected.only(WHOLE), random_programs=count).check()


def test_expected_failures_name_something(expected: Expected) -> None:
    assert sorted(name for name, _ in expected.reasons if name not in (*NAMES, *WHOLE)) == []


def test_something_is_declared(declared: set[str], request: pytest.FixtureRequest) -> None:
    if any(item.name.startswith("test_operator") for item in request.session.items):
        assert declared, "the executor declares no operator of the table"
