"""What Python code may read and write, from its bytecode, and which line of whose code is running."""

from __future__ import annotations

import dis
import functools
import inspect
import os
import random
import types
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from primexec import _torch
from primexec.errors import SourceLine
from primexec.lookups import ASKING, FORMATTERS, fields_of
from primexec.opcodes import VARIABLE, line_of
from primexec.opcodes import instructions as instructions_of
from primexec.origins import is_installed, is_layer, is_library

_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR", "IMPORT_FROM"})
_GLOBAL = frozenset(
    {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "STORE_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
)
_GETTERS = frozenset({"attrgetter", "methodcaller"})
_UNSEEN = _GETTERS | {
    "vars",
    "__dict__",
    "__getattribute__",
    "getattr_static",
}  # who asks for which names there is not seen
_REFLECTION = _UNSEEN | ASKING.keys()
# What code that computes names of attributes asks for: plain values, or whatever there is.
PLAIN, ALL = 1, 2
RANDOM, SEEDS, EXACT_TYPE = "random numbers outside of torch", "seeds", "the exact type of a tensor"
INSTALLED_RANDOM = "random numbers in installed packages"
IDENTITY = "whether two variables are one object"
TYPES, NUMBER_TYPE = "exact types", "the exact type of a number"
HANDLED = "errors that code in C raises for numbers of other classes"
# What is refused at the end of a trace: (reason, way out); comparisons where an argument is also reached otherwise.
SUSPECTS = {
    SEEDS: (
        "the function sets the state of a random generator; a program would do so only once",
        "set seeds outside the traced function",
    ),
    EXACT_TYPE: (
        "the exact type of a tensor is compared, and while tracing it is another one",
        "use isinstance(x, torch.Tensor)",
    ),
    NUMBER_TYPE: (
        "the exact type of a number is compared, and one that is read off a tensor is of another one while tracing",
        "use isinstance(x, float)",
    ),
    IDENTITY: (
        "objects are compared by identity, and an argument is a tensor that the function also reaches by itself",
        "pass a flag that says so",
    ),
}
COMPILED = (
    "a function that torch.compile made is called",
    'call the function that it was made of, or pass backend="primexec" to torch.compile',
)
_SUSPECT_NAMES = {
    **dict.fromkeys(("random", "randint", "randrange", "uniform", "choice", "choices", "shuffle", "sample"), RANDOM),
    **dict.fromkeys(("gauss", "seed", "set_state", "getrandbits"), RANDOM),
    **dict.fromkeys(("manual_seed", "set_rng_state", "fork_rng"), SEEDS),
}
_MUTATORS = frozenset(
    {"append", "extend", "insert", "pop", "popleft", "appendleft", "remove", "clear", "sort", "reverse", "add"}
    | {"discard", "update", "setdefault", "popitem", "train", "eval"}
)
_NEAR = 12  # instructions between a variable and what changes its contents
_TYPE_ERRORS = frozenset({"TypeError", "Exception", "BaseException"})
_SYMBOLIC = {"SymInt": "int", "SymFloat": "float"}
_WRAPPERS = frozenset({"wrapper", "_use_grad", "_fn"})  # around an optimizer's `step`, and what Dynamo leaves alone
_COMPARISONS = frozenset({"IS_OP", "COMPARE_OP", "CONTAINS_OP"})


@functools.cache
def refused() -> dict[types.CodeType, tuple[str, str]]:
    """Functions that are stopped before they run: (reason, way out).

    They change state, or ask for it, without an operator, or run a backward pass of their own, whose gradients go to
    leaves.
    """
    seeds: Any = (torch.manual_seed, torch.seed, torch.random.set_rng_state)
    defaults: Any = (
        torch.set_default_dtype, torch.set_default_device, torch.set_default_tensor_type,
        torch.use_deterministic_algorithms, torch.set_float32_matmul_precision,
    )  # fmt: skip
    entropy: Any = (
        random.SystemRandom.random, random.SystemRandom.getrandbits, random.Random.seed, uuid.uuid1, uuid.uuid4,
    )  # fmt: skip
    outside, passed = "set it outside the traced function", "ask outside the traced function, and pass the value"
    found = dict.fromkeys(seeds, ("the function sets the state of torch's random generator", outside))
    found |= dict.fromkeys(defaults, ("the function sets a default of torch", outside))
    found |= dict.fromkeys(entropy, ("the function asks for numbers that are others at every call", passed))
    found[torch.initial_seed] = "the function asks for the seed of torch's random generator", passed
    found[random.Random.setstate] = "the function sets the state of a random generator", outside
    found[CheckpointFunction.backward] = ("a checkpoint is reentrant", "pass use_reentrant=False to checkpoint()")
    return {inspect.unwrap(fn).__code__: told for fn, told in found.items()}


def is_refused(frame: types.FrameType) -> bool:
    """Whether a call of one of the refused functions has begun."""
    if frame.f_code not in refused():
        return False
    if frame.f_code is random.Random.seed.__code__:
        return frame.f_locals["a"] is None
    asker = frame.f_back
    # NumPy's RandomState is made of numbers of the system's, and then of those that its seed, an argument, gives.
    seeded = asker is not None and "RandomState" in asker.f_code.co_names and asker.f_code.co_code[asker.f_lasti + 1]
    return not seeded


def user_source(frame: types.FrameType | None, outermost: types.CodeType) -> SourceLine | None:
    """The innermost line outside of torch and primexec, from this frame outwards to the one that runs `outermost`.

    Where there is none, as in a Sequential of torch's own layers, the layer's line in torch.
    """
    layer = None
    while frame is not None and frame.f_code is not outermost:
        code = frame.f_code
        if not is_library(code.co_filename):
            return SourceLine(code.co_filename, frame.f_lineno, code.co_qualname)
        if layer is None and is_layer(code.co_filename):
            layer = SourceLine(code.co_filename, frame.f_lineno, code.co_qualname)
        frame = frame.f_back
    return layer if frame is not None else None


def running_in(frame: types.FrameType | None, folder: str) -> str:
    """The outermost function of a folder of torch's that runs in this frame or outside of it; empty where none does."""
    found = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(f"{_torch.torch_directory()}{folder}{os.sep}") and code.co_name not in _WRAPPERS:
            found = code.co_name
        frame = frame.f_back
    return found


def in_fx(frame: types.FrameType | None) -> str:
    """What to do where the function has torch.fx trace and run something, as `torch.func.linearize` has."""
    name = running_in(frame, "fx") and (running_in(frame, "_functorch") or "torch.fx")
    return (
        f"call {name}() outside of the traced function, for it traces by itself; torch.func.jvp() does not"
        if name
        else ""
    )


@dataclass(frozen=True, slots=True)
class CodeNames:
    """What one code object may read, from its bytecode."""

    globals: tuple[str, ...]
    attributes: frozenset[str]
    loaded: frozenset[str]  # those of them that are not set only
    reflective: bool  # getattr or its like, in user code, or a handler for attributes that are not there
    everything: int  # PLAIN or ALL where attribute names are computed
    modules: bool  # sys.modules, in user code
    suspects: dict[str, int]  # topic → line: what a trace cannot follow, if it really happens
    typed: frozenset[str]  # variables whose exact types are asked for
    typed_at: frozenset[int]  # lines that ask for those of other expressions
    floats: frozenset[int]  # instructions that load `float` to call it


def user_source_of(error: BaseException) -> SourceLine | None:
    """The innermost line outside of torch and primexec in an exception's traceback."""
    found, step = None, error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if not is_library(code.co_filename):
            found = SourceLine(code.co_filename, step.tb_lineno, code.co_qualname)
        step = step.tb_next
    return found


def names_of(code: types.CodeType) -> CodeNames | None:
    """The names that code may read, or None where it need not be watched."""
    return _names_of(code, code.co_filename)  # equal code of two files is equal as an object


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType, file: str) -> CodeNames | None:
    torch_module = is_layer(file)
    if is_library(file) and not torch_module:
        return None
    globals_: dict[str, None] = {}
    attributes: set[str] = set()
    loaded: set[str] = set()
    computed = False
    suspects: dict[str, int] = {}
    typed: set[str] = set()
    typed_at: set[int] = set()
    floats: set[int] = set()
    line = code.co_firstlineno
    instructions = instructions_of(code)
    for i, instruction in enumerate(instructions):
        line = line_of(instruction, line)
        if isinstance(instruction.argval, str):
            topic = _SUSPECT_NAMES.get(instruction.argval)
            if is_installed(file):
                topic = INSTALLED_RANDOM if topic is RANDOM else None
            through_torch = i > 0 and instructions[i - 1].argval in ("torch", "random")  # `seeding` sees these run
            if topic and not (topic is SEEDS and through_torch):
                suspects.setdefault(topic, line)
        if instruction.argval in _UNSEEN and instruction.opname in _ATTRIBUTE | _GLOBAL:
            computed |= not _takes_constant_name(instructions[i + 1 :], instruction.argval in _GETTERS)
        if instruction.argval in FORMATTERS and instruction.opname in _ATTRIBUTE:
            computed |= instructions[i - 1].opname != "LOAD_CONST" and not is_installed(file)
        if instruction.opname in _ATTRIBUTE:
            attributes.add(instruction.argval)
            if instruction.opname != "STORE_ATTR":
                loaded.add(instruction.argval)
            if instruction.argval in _SYMBOLIC and not _stands_with_number(instructions, i):
                suspects.setdefault(TYPES, line)
        elif instruction.opname in _GLOBAL:
            globals_[instruction.argval] = None
            if instruction.argval == "id" and not is_installed(file):
                suspects.setdefault(IDENTITY, line)
            if instruction.argval == "float" and instruction.opname == "LOAD_GLOBAL" and (instruction.arg or 0) & 1:
                floats |= {x.offset for x in instructions[max(0, i - 1) : i] if x.opname == "EXTENDED_ARG"}
                floats.add(instruction.offset)
            if instruction.argval == "type":
                of, call = [x for x in instructions[i + 1 : i + 4] if x.opname != "PRECALL"][:2]
                if of.opname in VARIABLE and (call.opname, call.arg) == ("CALL", 1):
                    typed.add(of.argval)
                else:
                    typed_at.add(line)
        elif instruction.opname in _COMPARISONS and not is_installed(file):
            written = file != "<string>"  # by somebody, not by a dataclass
            if instruction.opname == "IS_OP" and instructions[i - 1].opname != "LOAD_CONST" and written:  # `is None`
                suspects.setdefault(IDENTITY, line)
            near = [x.argval for x in instructions[max(0, i - 12) : i]]
            if "type" in near and near[-1] in ("Tensor", "Parameter"):
                suspects.setdefault(EXACT_TYPE, line)
            if "type" in near and not {"int", "float"}.isdisjoint(near[-8:]):
                suspects.setdefault(NUMBER_TYPE, line)
        elif instruction.opname == "CHECK_EXC_MATCH" and not is_installed(file):
            if not _TYPE_ERRORS.isdisjoint(x.argval for x in instructions[max(0, i - 5) : i]):
                suspects.setdefault(HANDLED, line)
        elif instruction.opname == "MATCH_CLASS":
            attributes |= {name for c in code.co_consts if isinstance(c, tuple) for name in c if isinstance(name, str)}
            computed |= bool(instruction.arg)  # the class tells the names of what patterns do not name
    texts = [c for c in code.co_consts if isinstance(c, str)]
    constants = {name for c in texts for name in c.split(".") if name.isidentifier()}
    if not attributes.isdisjoint(FORMATTERS):
        attributes |= {name for c in texts for name in fields_of(c)}
    reflective = bool(_REFLECTION & (globals_.keys() | attributes)) or "AttributeError" in globals_
    if reflective:
        attributes |= constants
        loaded |= constants
    return CodeNames(
        () if torch_module else tuple(globals_),
        frozenset(attributes),
        frozenset(loaded),
        reflective and not is_installed(file),
        computed and not torch_module and (PLAIN if is_installed(file) else ALL),
        "modules" in attributes and not is_installed(file) and any(i.argval == "sys" for i in instructions),
        suspects,
        frozenset(typed - {"self"}),
        frozenset(typed_at),
        frozenset(floats),
    )


def loaded_by(code: types.CodeType) -> set[str]:
    """The names of attributes that code asks for."""
    return {x.argval for x in instructions_of(code) if x.opname in _ATTRIBUTE and x.opname != "STORE_ATTR"}


def keys_compared(frame: types.FrameType) -> list[Any] | None:
    """The keys among which `x in container`, the instruction at which a frame stands, looks for a number.

    None where it stands at another one, or it cannot be told what the container is, or its keys are not a few numbers.
    """
    instructions = instructions_of(frame.f_code)
    i = next((i for i, x in enumerate(instructions) if x.offset == frame.f_lasti), 0)
    first = i - 1
    while instructions[first].opname == "LOAD_ATTR":
        first -= 1
    # Where a jump leads to between them, another instruction gave the container.
    if instructions[i].opname != "CONTAINS_OP" or any(x.is_jump_target for x in instructions[first + 1 : i + 1]):
        return None
    opname, name = instructions[first].opname, instructions[first].argval
    if opname == "LOAD_CONST":
        found = name
    elif opname in VARIABLE:
        found = frame.f_locals.get(name)
    else:
        found = frame.f_globals.get(name) if opname == "LOAD_GLOBAL" else None
    for x in instructions[first + 1 : i]:
        plain = type(found).__getattribute__ in _PLAIN_LOOKUPS
        found = inspect.getattr_static(found, x.argval, None) if plain else None
        if hasattr(type(found), "__get__"):
            return None
    contains = getattr(type(found), "__contains__", None)
    if contains not in _HASHING or len(found) > _FEW:
        return None
    keys = list(found)
    return keys if all(type(k) in (int, bool, float) and k == k for k in keys) else None


_PLAIN_LOOKUPS: tuple[Any, ...] = tuple(
    kind.__getattribute__ for kind in (object, type, types.ModuleType, types.SimpleNamespace)
)
_HASHING = (dict.__contains__, set.__contains__, frozenset.__contains__)
_FEW = 16


def _stands_with_number(instructions: list[dis.Instruction], i: int) -> bool:
    """Whether a symbolic type stands in a tuple with Python's: `isinstance(x, (int, torch.SymInt))`."""
    end = next(j for j in range(i, len(instructions)) if not instructions[j].opname.startswith("LOAD_"))
    count = (instructions[end].arg or 0) if instructions[end].opname == "BUILD_TUPLE" else 0
    while count and end and instructions[end - 1].opname.startswith("LOAD_"):
        end -= 1
        if instructions[end].argval == _SYMBOLIC[instructions[i].argval]:
            return True
        count -= instructions[end].opname != "LOAD_ATTR"
    return False


def _takes_constant_name(instructions: list[dis.Instruction], getter: bool) -> bool:
    """Whether what follows a load is a call such as `getattr(x, "name", 0)`; for a getter, `attrgetter("name")`."""
    depth = 0
    for i, instruction in enumerate(instructions):
        if instruction.opname in ("PRECALL", "CALL"):
            count = instruction.arg or 0
            names = instructions[i - count : i] if getter else instructions[i - count + 1 : i - count + 2]
            constant = all(name.opname == "LOAD_CONST" and isinstance(name.argval, str) for name in names)
            return constant and depth == count >= (1 if getter else 2)
        if instruction.opname != "PUSH_NULL":
            depth += dis.stack_effect(instruction.opcode, instruction.arg)
    return False


def stores_attribute(codes: Iterator[types.CodeType], name: str, key: str) -> SourceLine | None:
    """The first line in code that assigns to a variable or attribute of this name, or changes what it holds.

    One that names the key goes first.
    """
    found = None
    for code in codes:
        if names_of(code) is None:
            continue
        line, loaded = code.co_firstlineno, -9
        instructions = instructions_of(code)
        for i, instruction in enumerate(instructions):
            line = line_of(instruction, line)
            if instruction.argval == name and instruction.opname.startswith("LOAD_"):
                loaded = i
            stores = instruction.argval == name and instruction.opname.startswith(("STORE_", "DELETE_"))
            changes = instruction.argval in _MUTATORS or instruction.opname in ("STORE_SUBSCR", "DELETE_SUBSCR")
            toggles = name == "training" and instruction.argval in ("train", "eval")
            if stores or toggles or (changes and i - loaded < _NEAR):
                source = SourceLine(code.co_filename, line, code.co_qualname)
                if any(near.argval == key for near in instructions[max(0, i - _NEAR) : i + 1]):
                    return source
                found = found or source
    return found
