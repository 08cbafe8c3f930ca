"""Every program of tests/programs, traced, against eager."""

import pytest

from tests import harness
from tests.programs import PROGRAMS, REFUSED
from tests.programs.raises import FILE
from tests.programs.table import Program


def name_of(program: Program) -> str:
    return program.name


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_same_as_eager(program: Program) -> None:
    harness.compare(program)


@pytest.mark.parametrize("program", REFUSED, ids=name_of)
def test_refused(program: Program) -> None:
    harness.refuses(program, FILE)


def test_names_are_unique() -> None:
    names = [program.name for program in [*PROGRAMS, *REFUSED]]
    assert len(names) == len(set(names))
