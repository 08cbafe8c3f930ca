"""From the text of a module to functions in memory, through llvmlite.

Kernels arrive vectorised and in SSA form, so no pass of LLVM's optimiser runs; the code generator's level 1 is as fast
in the result as level 3, and twice as fast to compile.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]

from primexec.errors import ExecutorError
from primexec.executors.llvm import sleef
from primexec.executors.llvm.target import Target, host

CODEGEN_LEVEL = 1
CONTEXT_LINES = 3

# LLVM's entry points in llvmlite are not safe to enter from two threads at once.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Module:
    """Machine code in memory, unloaded when this object goes.

    Attributes:
        addresses: of the functions asked for, by name.
        object_bytes: the relocatable object that was loaded.
    """

    addresses: Mapping[str, int]
    object_bytes: bytes
    _tracker: Any

    def address(self, name: str) -> int:
        return self.addresses[name]


@cache
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def _machine(target: Target, level: int = CODEGEN_LEVEL) -> Any:
    _initialize()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.feature_string, opt=level, reloc="pic", codemodel="small"
    )


def _parse(text: str) -> Any:
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise ExecutorError(f"LLVM refuses a module of ours: {error}{_excerpt(text, str(error))}") from error
    return module


def _excerpt(text: str, message: str) -> str:
    """The lines around the place that the message names."""
    found = re.search(r":(\d+):\d+: error", message)
    if found is None:
        return ""
    line, lines = int(found[1]), text.splitlines()
    shown = range(max(1, line - CONTEXT_LINES), min(len(lines), line + CONTEXT_LINES) + 1)
    return "".join(f"\n{'>' if n == line else ' '} {n:5}  {lines[n - 1]}" for n in shown)


def verify(text: str) -> None:
    """Raise ExecutorError, with the lines at fault, unless the text is a well-formed module."""
    with _lock:
        _initialize()
        _parse(text)


def emit_object(text: str, target: Target, level: int = CODEGEN_LEVEL) -> bytes:
    """Machine code as a relocatable object; any target, from any host."""
    with _lock:
        machine = _machine(target, level)
        module = _parse(text)
        return bytes(machine.emit_object(module))


def assembly(text: str, target: Target) -> str:
    """The module as assembly text for the target."""
    with _lock:
        machine = _machine(target)
        return str(machine.emit_assembly(_parse(text)))


@cache
def _jit() -> Any:
    return llvm.create_lljit_compiler(_machine(host()))


def load_object(object_bytes: bytes, names: Iterable[str], symbols: Mapping[str, int] | None = None) -> Module:
    """Load an object made for the host.

    Args:
        object_bytes: from `emit_object`.
        names: the functions whose addresses are wanted.
        symbols: addresses of functions that the object calls, beyond those of the process itself (libm) and SLEEF's.
    """
    wanted = list(names)
    with _lock:
        builder = llvm.JITLibraryBuilder().add_object_img(object_bytes).add_current_process()
        for name, address in {**sleef.symbols(), **(symbols or {})}.items():
            builder.import_symbol(name, address)
        for name in wanted:
            builder.export_symbol(name)
        try:
            tracker = builder.link(_jit(), f"primexec.{next(_numbers)}")
        except RuntimeError as error:
            raise ExecutorError(f"cannot load compiled kernels (LLVM names the cause on stderr): {error}") from error
    return Module({name: tracker[name] for name in wanted}, object_bytes, tracker)


def compile_module(
    text: str, target: Target | None = None, symbols: Mapping[str, int] | None = None, level: int = CODEGEN_LEVEL
) -> Module:
    """Compile a module for the host, or for a target whose code the host can run, and load all that it defines."""
    names = re.findall(r"^define (?!internal|private)[^@\n]*@([\w.]+)\(", text, re.MULTILINE)
    return load_object(emit_object(text, target or host(), level), names, symbols)
