"""Value checks: branches on the value of a tensor of which one side does nothing but raise, such as `assert`.

A program is traced without values. But where one side raises an exception that is known, the other side is the program,
and the branch is an operator that raises what eager raises.
"""

from __future__ import annotations

import builtins
import dis
import functools
import pkgutil
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from primexec.opcodes import VARIABLE, instructions

_LIBRARY = torch.library.Library("primexec", "FRAGMENT")
_LIBRARY.define("check(Tensor value, bool fails, str kind, str[] arguments) -> ()")
_FORMATTED = (str, int, float, type(None), torch.dtype, torch.device, torch.Size)
_METADATA = frozenset({"device", "dtype", "ndim", "shape"})
_NO_EFFECT = frozenset({"NOP", "NOT_TAKEN", "PRECALL"})
_EXPRESSIONS = frozenset(
    {
        "BINARY_OP", "BINARY_SLICE", "BINARY_SUBSCR", "BUILD_LIST", "BUILD_SLICE", "BUILD_TUPLE", "COMPARE_OP",
        "CONTAINS_OP", "CONVERT_VALUE", "FORMAT_SIMPLE", "FORMAT_VALUE", "FORMAT_WITH_SPEC", "IS_OP", "KW_NAMES",
        "LOAD_ATTR", "LOAD_METHOD", "PUSH_NULL", "UNARY_NEGATIVE",
    }
)  # fmt: skip
_UNKNOWN, _LEFT_OUT = object(), "..."
_BUILT_IN = frozenset(c for c in vars(builtins).values() if isinstance(c, type) and issubclass(c, Exception))


def check(value: Tensor, fails: bool, kind: str, arguments: list[str]) -> None:
    """Raise where a truth value is the one that fails."""
    if bool(value) == fails:
        raise pkgutil.resolve_name(kind)(*arguments)


_LIBRARY.impl("check", check, "CompositeExplicitAutograd")
CHECK = torch.ops.primexec.check.default


def assertions(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, str]]:
    """What a call of torch's API checks without an operator: truth values, and what is said where one is false."""
    return _UNRECORDED[fn](args, kwargs) if fn in _UNRECORDED else []


def _classes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, str]]:
    given = [*args, *kwargs.values()]
    (index,) = (v for v in given if isinstance(v, Tensor))
    count: Any = next((v for v in given if isinstance(v, (int, torch.SymInt))), -1)
    checks = [((index >= 0).all(), "Class values must be non-negative.")]
    if isinstance(count, torch.SymInt) or count >= 0:  # else there are as many as the largest one says
        checks.append(((index < count).all(), "Class values must be smaller than num_classes."))
    return checks


def _fractions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, str]]:
    q = kwargs["q"] if "q" in kwargs else args[1]
    inside = ((q >= 0) & (q <= 1)).all() if isinstance(q, Tensor) else None
    return [] if inside is None else [(inside, "quantile() q values must be in the range [0, 1]")]


_UNRECORDED: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], list[tuple[Tensor, str]]]] = {
    torch.nn.functional.one_hot: _classes,
    **dict.fromkeys((torch.quantile, Tensor.quantile, torch.nanquantile, Tensor.nanquantile), _fractions),
}


class ValueCheck(NamedTuple):
    """The truth value for which a branch raises, the exception's class as `module:name`, and its arguments."""

    fails: bool
    kind: str
    arguments: list[str]


def asked_inside(fn: Any, op: Any) -> ValueCheck | None:
    """What a call of torch's API checks that asks an operator for a truth value, and raises."""
    return _ASKED.get((fn, op))


_ASKED: dict[Any, ValueCheck] = {
    (torch.istft, torch.ops.aten.equal.default): ValueCheck(
        True, "builtins:RuntimeError", ["istft(...) window overlap add min: 1"]
    )
}


def value_check(frame: types.FrameType, outermost: types.CodeType) -> ValueCheck | None:
    """What the branch checks that a frame is about to take; None where both sides do more, or the error may be caught.

    Args:
        frame: it is asking a truth value.
        outermost: the code up to whose frame exceptions pass.
    """
    code = _instructions(frame.f_code)
    at = next(i for i, x in enumerate(code) if x.offset == frame.f_lasti)
    at += code[at].opname == "TO_BOOL"
    if not code[at].opname.startswith("POP_JUMP_") or not code[at].opname.endswith(("_IF_TRUE", "_IF_FALSE")):
        return None
    jumps = code[at].opname.endswith("_IF_TRUE")
    target = next(i for i, x in enumerate(code) if x.offset == code[at].argval)
    sides = {jumps: _raised(frame, code[target:]), not jumps: _raised(frame, code[at + 1 :])}
    raising = [(truth, *raised) for truth, raised in sides.items() if raised is not None]
    return ValueCheck(*raising[0]) if len(raising) == 1 and not _may_be_caught(frame, outermost) else None


_instructions = functools.lru_cache(maxsize=256)(instructions)


def _raised(frame: types.FrameType, code: list[dis.Instruction]) -> tuple[str, list[str]] | None:
    """The exception that a piece of code raises, if it does nothing else. What is not known of its text is left out."""
    stack: list[Any] = []
    for x in code:
        match x.opname, x.argval:
            case name, _ if name in _NO_EFFECT:
                pass
            case ("LOAD_ASSERTION_ERROR", _) | ("LOAD_COMMON_CONSTANT", 0):
                stack.append(AssertionError)
            case "LOAD_GLOBAL", name:
                found = frame.f_globals.get(name, frame.f_builtins.get(name))
                stack += [found] * dis.stack_effect(x.opcode, x.arg)  # twice where it is called
            case "LOAD_CONST", value:
                stack.append(value)
            case name, variable if name in VARIABLE and variable in frame.f_locals:
                stack.append(frame.f_locals[variable])
            case "LOAD_ATTR", name if name in _METADATA and isinstance(stack[-1], Tensor):
                stack.append(getattr(stack.pop(), name))
            case ("FORMAT_VALUE", (None, False)) | ("FORMAT_SIMPLE", _) if isinstance(stack[-1], _FORMATTED):
                stack.append(format(stack.pop()))
            case "BUILD_STRING", count:
                stack[-count:] = ["".join(_LEFT_OUT if s is _UNKNOWN else s for s in stack[-count:])]
            case "CALL", count:  # `assert truth, text` passes its text as if it were a method's object
                kind, *arguments = stack[-count - 2 :]
                arguments = arguments[-count:] if count else [a for a in arguments if a is not kind]
                stack[-count - 2 :] = [(kind, arguments) if _name(kind) else _UNKNOWN]
            case "RAISE_VARARGS", 1:
                kind, arguments = stack[-1] if isinstance(stack[-1], tuple) else (stack[-1], [])
                if kind in _BUILT_IN:
                    arguments = [_LEFT_OUT if a is _UNKNOWN else a for a in arguments]
                known = _name(kind) if all(isinstance(a, str) for a in arguments) else None
                return (known, arguments) if known else None
            case name, _ if name in _EXPRESSIONS:
                taken = 1 - dis.stack_effect(x.opcode, x.arg)
                del stack[len(stack) - taken :]
                stack.append(_UNKNOWN)
            case _:
                return None
    return None


def _name(kind: Any) -> str | None:
    """Where a class of exceptions is found again."""
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return None
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        return name if pkgutil.resolve_name(name) is kind else None
    except (ImportError, AttributeError, ValueError):  # a class that a function made
        return None


def _may_be_caught(frame: types.FrameType | None, outermost: types.CodeType) -> bool:
    """Whether a frame stands in a `try`; what `with` does at the end of its block, it does to any exception."""
    while frame is not None and frame.f_code is not outermost:
        code = {x.offset: x.opname for x in _instructions(frame.f_code)}
        for entry in dis.Bytecode(frame.f_code).exception_entries:  # type: ignore[attr-defined]
            if entry.start <= frame.f_lasti < entry.end:
                offsets = [o for o in code if o >= entry.target]
                if "WITH_EXCEPT_START" not in (code[o] for o in offsets[:2]):
                    return True
        frame = frame.f_back
    return False
