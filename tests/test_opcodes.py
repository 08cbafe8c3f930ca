"""Bytecode of Python 3.13 and 3.14 as their `dis` shows it, made of what this version's shows."""

import dis
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from primexec import bytecode, opcodes


class Instruction(NamedTuple):
    opname: str
    opcode: int
    arg: int | None
    argval: Any
    offset: int
    starts_line: bool
    line_number: int | None
    is_jump_target: bool


@pytest.fixture(params=["", "_BORROW"])
def later(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    present = dis.get_instructions

    def shown(code: types.CodeType) -> Iterator[Instruction]:
        line, given = None, list(present(code))
        while given:
            x = given.pop(0)
            starts, line = opcodes.line_of(x, -1) not in (-1, line), opcodes.line_of(x, line or 0)
            name, arg, value = x.opname, x.arg, x.argval
            if given and (name, given[0].opname) in {("LOAD_FAST", "LOAD_FAST"), ("STORE_FAST", "LOAD_FAST")}:
                following = given.pop(0)
                arg, value = (x.arg or 0) << 4 | (following.arg or 0), (value, following.argval)
                last = f"LOAD_FAST{request.param}"
                name = f"{last}_{last}" if name == "LOAD_FAST" else "STORE_FAST_LOAD_FAST"
            elif name == "LOAD_FAST":
                name += request.param
            yield Instruction(name, x.opcode, arg, value, x.offset, starts, line, x.is_jump_target)

    monkeypatch.setattr(dis, "get_instructions", shown)


class Asks:
    """What looks at the code that looks for it among keys."""

    def __hash__(self) -> int:
        self.keys = bytecode.keys_compared(sys._getframe(1))
        return 0


def _in_arguments(n: Any, keys: Any) -> bool:
    return n in keys


def _in_a_variable(n: Any, keys: Any) -> bool:
    found = keys
    return n in found


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("looks", [_in_arguments, _in_a_variable])
def test_keys_in_variables(looks: Callable[..., bool]) -> None:
    asks = Asks()
    assert not looks(asks, {2: "two", 5: "five"})
    assert asks.keys == [2, 5]


@pytest.mark.usefixtures("later")
def test_lines_and_names() -> None:
    def draws(self: Any, n: int) -> Any:
        m = n
        self.m, self.n = m, n
        return random.random()

    first = draws.__code__.co_firstlineno
    names = bytecode.names_of(draws.__code__)
    assert names is not None
    assert names.suspects == {bytecode.RANDOM: first + 3}
    stored = bytecode.stores_attribute(iter([draws.__code__]), "m", "")
    assert stored is not None
    assert stored.line == first + 1
