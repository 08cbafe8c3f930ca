"""Runs a program eagerly and traced, and compares all that a caller can observe.

A run is described by facts: a flat dictionary from a path ("call 1: out[0].stride") to a plain value. Two
runs are equal if their facts are. Which tensors are one object, and which share a storage, are facts too:
objects and storages are numbered in the order in which they are met.
"""

import functools
import inspect
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import primexec
from tests.programs.table import Call, Program

TESTS = Path(__file__).parent
# Code of this file runs at every call by right: the bodies of custom operators, flattening of own classes.
RUNS_EVERY_CALL = TESTS / "programs" / "library.py"
MODULES = Path(nn.modules.__file__).parent

Facts = dict[str, Any]


class Values:
    """A copy of a tensor's values; equal if dtype, shape and every bit are, where any NaN equals any NaN.

    Within `rounding()` they are equal if they are close.
    """

    exact = True

    def __init__(self, tensor: Tensor) -> None:
        with torch.no_grad():
            self.values = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return NotImplemented
        a, b = self.values, other.values
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(bits(a), bits(b)) or (not Values.exact and close(a, b))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.values)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether values differ by rounding only: of 16-bit floats, in attention, of numbers as large as the largest."""
    kind: dict[str, float] = {}
    if a.dtype in (torch.bfloat16, torch.float16) and a.numel():
        kind = {"rtol": 1.6e-2, "atol": torch.finfo(a.dtype).eps * float(b.abs().nan_to_num(0, 0).max())}
    try:
        torch.testing.assert_close(a, b, equal_nan=True, **kind)
    except AssertionError:
        return False
    return True


def bits(tensor: Tensor) -> Tensor:
    """Give the bytes of a contiguous tensor, with one bit pattern for every NaN."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.reshape(-1).view(torch.uint8)


def leaves(root: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Walk a pytree."""
    for key, leaf in pytree.tree_flatten_with_path(root)[0]:
        yield path + pytree.keystr(key), leaf


def reachable(owner: Any) -> Facts:
    """Find the tensors, generators and plain values that a callable holds, by path."""
    found: Facts = {}
    seen: set[int] = set()

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Tensor | torch.Generator | int | float | complex | str | None):
            found[path] = value
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, child in children(value):
            visit(child, f"{path}{name}")

    visit(owner, "state")
    return found


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Give what a value of the user's holds, by the text that reaches it."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif isinstance(value, list | tuple | set):
        yield from ((f"[{k}]", child) for k, child in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif inspect.ismethod(value):
        yield ".__self__", value.__self__
    elif inspect.isfunction(value):
        if not Path(value.__code__.co_filename).is_relative_to(TESTS):
            return
        found = inspect.getclosurevars(value)
        yield from ((f".{name}", child) for name, child in found.nonlocals.items())
        yield from ((f".{name}", child) for name, child in found.globals.items() if holds_state(child))
    elif isinstance(value, nn.Module):
        yield from ((f".{name}", child) for name, child in value._parameters.items())
        yield from ((f".{name}", child) for name, child in value._buffers.items())
        yield from ((f".{name}", child) for name, child in value._modules.items())
        yield from ((f".{name}", child) for name, child in vars(value).items() if not name.startswith("_"))
    elif type(value).__module__.startswith("tests.") and hasattr(value, "__dict__"):
        yield from ((f".{name}", child) for name, child in vars(value).items())


def holds_state(value: Any) -> bool:
    return not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType)


def facts_of(roots: Facts) -> Facts:
    """Describe pytrees: their structure, and each leaf with its metadata, values, identity and storage."""
    facts: Facts = {}
    objects: dict[int, int] = {}
    storages: dict[int, int] = {}
    for path, root in roots.items():
        facts[f"{path} structure"] = str(pytree.tree_structure(root))
        for at, leaf in leaves(root, path):
            if isinstance(leaf, Tensor):
                facts[f"{at} object"] = objects.setdefault(id(leaf), len(objects))
                facts |= {f"{at}.{name}": fact for name, fact in tensor_facts(leaf, storages).items()}
            elif isinstance(leaf, torch.Generator):
                facts[f"{at} object"] = objects.setdefault(id(leaf), len(objects))
                facts[f"{at}.state"] = Values(leaf.get_state())
            else:
                plain = isinstance(leaf, int | float | complex | str | bytes | None)
                facts[at] = repr(leaf) if plain else type(leaf).__qualname__
    return facts


def tensor_facts(tensor: Tensor, storages: dict[int, int]) -> Facts:
    if nn.parameter.is_lazy(tensor):
        return {"type": type(tensor)}
    if tensor.layout is not torch.strided:
        return {"layout": tensor.layout, "values": Values(tensor.to_dense())}
    storage = tensor.untyped_storage()
    facts = {
        "type": type(tensor),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "shape": tuple(tensor.shape),
        "stride": [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if Values.exact or n > 1],
        "storage_offset": tensor.storage_offset(),
        "storage": storages.setdefault(storage._cdata, len(storages)),
        "nbytes": storage.nbytes(),
        "requires_grad": tensor.requires_grad,
        "is_leaf": tensor.is_leaf,
        "is_inference": tensor.is_inference(),
        "is_conj": tensor.is_conj(),
        "is_neg": tensor.is_neg(),
        "is_view": tensor._is_view(),
        "attributes": sorted(vars(tensor)),
    }
    if tensor.device.type != "meta":
        facts["values"] = Values(tensor)
    return facts


def surroundings() -> Facts:
    """Describe the state of the process that a call might have left changed."""
    return {
        "rng": Values(torch.get_rng_state()),
        "python rng": random.getstate(),
        "numpy rng": numpy_state(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "compiling": torch.compiler.is_compiling(),
    }


def numpy_state() -> tuple[bytes, int]:
    _, keys, position, *_ = np.random.get_state()
    return keys.tobytes(), position


def versions(roots: Facts) -> dict[str, tuple[Tensor, int]]:
    """Note every tensor's version counter; inference tensors have none."""
    return {
        at: (leaf, leaf._version)
        for path, root in roots.items()
        for at, leaf in leaves(root, path)
        if isinstance(leaf, Tensor) and not nn.parameter.is_lazy(leaf) and not leaf.is_inference()
    }


@contextmanager
def user_frames() -> Iterator[list[str]]:
    """Note which functions of the tests run within it, except those that every call runs."""
    names: list[str] = []

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and is_user_code(frame.f_code.co_filename):
            names.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")

    outer = sys.getprofile()
    sys.setprofile(note)
    try:
        yield names
    finally:
        sys.setprofile(outer)


@functools.cache
def is_user_code(file: str) -> bool:
    path = Path(file)
    if path.parent == MODULES:
        return path.name != "module.py"  # a traced module is itself one
    return path.is_relative_to(TESTS) and path not in (Path(__file__), RUNS_EVERY_CALL)


def arguments(program: Program, i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    made = program.inputs(i)
    call = made if isinstance(made, Call) else Call(made)
    return call.args, call.kwargs or {}


def run(program: Program, prepare: Callable[[Any], Any], *, counted: bool) -> Facts:
    """Make all calls of a program, and collect the facts after each, and at the end about all calls.

    The last tells whether a later call wrote into what an earlier one returned. Where they are counted, each
    call must have traced or hit as the program says, and a hit must have run no user code.
    """
    torch.default_generator.manual_seed(0)  # of the parameters that modules draw
    original = program.make()
    callee = prepare(original)
    facts: Facts = {}
    history: Facts = {}
    for i in range(program.calls):
        args, kwargs = arguments(program, i)
        if program.before:
            program.before(original, i)
        inputs = {"args": args, "kwargs": kwargs}
        noted = versions(inputs | {"state": reachable(original)})
        torch.default_generator.manual_seed(i)
        watch = user_frames() if counted and program.hits(i) else nullcontext()
        with program.around(i):
            with watch as frames:
                out = callee(*args, **kwargs)
            after = surroundings()
        roots = inputs | {"state": reachable(original), "out": out}
        history |= {f"call {i} {name}": root for name, root in roots.items()}
        here = facts_of(roots) | after
        if program.exact_versions:
            here |= {f"{at} written": tensor._version > before for at, (tensor, before) in noted.items()}
        facts |= {f"call {i}: {name}": fact for name, fact in here.items()}
        if counted:
            check_counts(program, callee.cache_info(), i)
            assert not frames, f"call {i} hit the cache, and yet ran {frames}"
    return facts | {f"at the end: {name}": fact for name, fact in facts_of(history).items()}


def check_counts(program: Program, info: Any, i: int) -> None:
    if program.either:
        assert info.hits + info.misses == i + 1, f"after call {i}: {info}"
        return
    traces = sum(at <= i for at in program.traces_at)
    got = {"traces": info.traces, "misses": info.misses, "hits": info.hits}
    want = {"traces": traces, "misses": traces, "hits": i + 1 - traces}
    assert got == want, f"after call {i}: {got}, not {want}"
    assert info.compiles == traces or not Values.exact, f"after call {i}: {info.compiles} compilations"


def differences(eager: Facts, traced: Facts) -> str:
    missing = object()
    names = [*eager, *(name for name in traced if name not in eager)]
    lines = []
    for name in names:
        a, b = eager.get(name, missing), traced.get(name, missing)
        if a is missing or b is missing:
            lines.append(f"{name}: only {'traced' if a is missing else 'eager'}")
        elif a != b:
            lines.append(f"{name}:\n  eager  {a}\n  traced {b}")
    return "\n".join(lines)


def same_module(original: Any, callee: Any) -> None:
    """Check that a traced module is a module that shares the original's state."""
    if isinstance(original, nn.Module):
        assert isinstance(callee, nn.Module)
        for ours, theirs in ((callee.state_dict(), original.state_dict()),):
            assert list(ours) == list(theirs)
            assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


def attempt(program: Program, prepare: Callable[[Any], Any], *, counted: bool) -> Facts | Exception:
    try:
        return run(program, prepare, counted=counted)
    except Exception as error:
        return error


@contextmanager
def rounding() -> Iterator[None]:
    """Values are compared as of executors that round in other places than eager, in several regions."""
    Values.exact = False
    try:
        yield
    finally:
        Values.exact = True


def compare(program: Program, executor: Any = "auto", *, may_raise: bool = False) -> None:
    """Hold the traced program against eager; raise an AssertionError that lists every difference.

    Where eager raises, the traced program has to raise the same type; where nobody knew beforehand
    (`may_raise`), a CaptureError will do too.
    """

    def prepare(original: Any) -> Any:
        callee = primexec.make_traced(original, executor=executor)
        same_module(original, callee)
        return callee

    eager = attempt(program, lambda fn: fn, counted=False)
    if isinstance(eager, Exception):
        if not may_raise and program.raises is not type(eager):
            raise eager
        raises_too(program, eager, attempt(program, prepare, counted=False), or_refuses=may_raise)
        return
    assert program.raises is None, f"eager was to raise {program.raises}, and did not"
    traced = attempt(program, prepare, counted=True)
    if isinstance(traced, Exception):
        if program.either and isinstance(traced, primexec.CaptureError):
            return
        raise traced
    found = differences(eager, traced)
    assert not found, found


def raises_too(program: Program, eager: Exception, traced: Facts | Exception, *, or_refuses: bool) -> None:
    """Check that the traced program raises what eager raised."""
    assert isinstance(traced, Exception), f"eager raised {eager!r}, and traced nothing"
    assert re.search(program.match, str(eager)), f"{eager!r} does not match {program.match!r}"
    if or_refuses and isinstance(traced, primexec.CaptureError):
        return
    same = type(traced) is type(eager) or (not Values.exact and isinstance(traced, type(eager)))
    assert same, f"traced raised {traced!r}, eager {eager!r}"
    assert re.search(program.match, str(traced)), f"{traced!r} does not match {program.match!r}"


def refuses(program: Program, file: str) -> None:
    """Check that a program cannot be captured, says why and where, and leaves everything as it was; twice."""
    torch.default_generator.manual_seed(0)  # of the parameters that modules draw
    original = program.make()
    callee = primexec.make_traced(original)
    for i in range(2):
        args, kwargs = arguments(program, i)
        inputs = {"args": args, "kwargs": kwargs}
        torch.default_generator.manual_seed(i)
        noted = versions(inputs | {"state": reachable(original)})
        before = facts_of(inputs | {"state": reachable(original)}) | surroundings()
        message = ""
        try:
            with program.around(i):
                callee(*args, **kwargs)
        except primexec.CaptureError as error:
            message = str(error)
        assert message, f"call {i} raised no CaptureError"
        after = facts_of(inputs | {"state": reachable(original)}) | surroundings()
        found = differences(before, after)
        assert not found, found
        assert all(tensor._version == version for tensor, version in noted.values())
        assert re.search(program.match, message), f"{message!r} does not match {program.match!r}"
        if program.line is not None:
            assert file in message, f"{message!r} does not name {file}"
            assert program.line in message, f"{message!r} does not quote {program.line!r}"
