"""Small programs that are run eagerly and traced; tests/harness.py compares the two."""

from tests.programs import (
    aliasing,
    buffers,
    corners,
    decisions,
    factories,
    functions,
    guards,
    hidden,
    inplace,
    metadata,
    modules,
    opaque,
    pytrees,
    raises,
    random_,
    selves,
    views,
)
from tests.programs.table import Program

FAMILIES = (
    views,
    inplace,
    aliasing,
    buffers,
    random_,
    factories,
    metadata,
    pytrees,
    functions,
    guards,
    hidden,
    modules,
    opaque,
    corners,
    decisions,
    selves,
)
PROGRAMS: list[Program] = [program for file in FAMILIES for program in file.FAMILY.programs]
REFUSED: list[Program] = raises.FAMILY.programs
