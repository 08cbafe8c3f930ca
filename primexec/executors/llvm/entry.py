"""A built-in function made of our own machine code: checks tensors, makes outputs, packs pointers, calls a program.

Calling through ctypes costs microseconds, most of them in Python; this costs some hundred nanoseconds. The code is
compiled once a process, and a plan, one for each program, tells it what to do. Tensors are read through PyTorch's
stable C functions; that a tensor's handle lies behind the header of its Python object is verified first, and where
it does not, or anything else is missing, there is no native function.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import Template
from typing import Any

import torch
from torch import Tensor

from primexec import _torch
from primexec.executors.llvm import engine
from primexec.executors.llvm.target import host

Make = tuple[Callable[..., Any], tuple[Any, ...]]  # a callable, and what it is called with

_FASTCALL = 0x80  # METH_FASTCALL: the arguments come as an array and their number
_PYTHON = {
    "Py_DecRef": "void (ptr)",
    "PyBytes_AsString": "ptr (ptr)",
    "PyEval_RestoreThread": "void (ptr)",
    "PyEval_SaveThread": "ptr ()",
    "PyLong_FromLongLong": "ptr (i64)",
    "PyList_New": "ptr (i64)",
    "PyList_SetItem": "i32 (ptr, i64, ptr)",
    "PyObject_Call": "ptr (ptr, ptr, ptr)",
    "PyObject_CallNoArgs": "ptr (ptr)",
    "PyObject_CallOneArg": "ptr (ptr, ptr)",
    "PyObject_Vectorcall": "ptr (ptr, ptr, i64, ptr)",
    "PyTuple_GetItem": "ptr (ptr, i64)",
    "PyType_IsSubtype": "i32 (ptr, ptr)",
}
_GETTERS = ("data_ptr", "device_type", "dim", "dtype", "sizes", "strides")
_SHIMS = {f"aoti_torch_get_{what}": "i32 (ptr, ptr)" for what in _GETTERS}

# The words of a plan, 64 bits each. Behind them: for each output its maker and the tuple of the maker's arguments; the
# offset of each slot in the arena; for each input its dtype, number of dimensions, sizes and strides.
_HEADER = {
    "inputs": "i64",
    "outputs": "i64",
    "slots": "i64",
    "pointers": "i64",
    "device": "i64",
    "program": "ptr",
    "tensor_type": "ptr",
    "parameter_type": "ptr",
    "fallback": "ptr",
    "before": "ptr",
    "failed": "ptr",
    "take": "ptr",
    "take_arguments": "ptr",
    "give_back": "ptr",
}

_TEXT = """
define internal ptr @data(ptr %object) {
  %place = alloca ptr
  %t = getelementptr i8, ptr %object, i64 $payload
  %error = call i32 @aoti_torch_get_data_ptr(ptr %t, ptr %place)
  %data = load ptr, ptr %place
  ret ptr %data
}

; Whether a tensor is what the words at %want say, and has memory, whose address goes to %place; gives the words behind,
; or null.
define internal ptr @fits(ptr %plan, ptr %object, ptr %want, ptr %place) {
entry:
  %dtype.at = alloca i32
  %device.at = alloca i32
  %dim.at = alloca i64
  %sizes.at = alloca ptr
  %strides.at = alloca ptr
  %type.at = getelementptr i8, ptr %object, i64 $type
  %type = load ptr, ptr %type.at
  $tensor_type
  %is.tensor = icmp eq ptr %type, %tensor_type
  br i1 %is.tensor, label %known, label %other
other:
  $parameter_type
  %is.parameter = icmp eq ptr %type, %parameter_type
  br i1 %is.parameter, label %known, label %stranger
stranger:
  %sub = call i32 @PyType_IsSubtype(ptr %type, ptr %tensor_type)
  %is.sub = icmp ne i32 %sub, 0
  br i1 %is.sub, label %known, label %bad
known:
  $device
  %t = getelementptr i8, ptr %object, i64 $payload
  %e0 = call i32 @aoti_torch_get_dtype(ptr %t, ptr %dtype.at)
  %e1 = call i32 @aoti_torch_get_device_type(ptr %t, ptr %device.at)
  %e2 = call i32 @aoti_torch_get_dim(ptr %t, ptr %dim.at)
  %e3 = call i32 @aoti_torch_get_sizes(ptr %t, ptr %sizes.at)
  %e4 = call i32 @aoti_torch_get_strides(ptr %t, ptr %strides.at)
  %e5 = call i32 @aoti_torch_get_data_ptr(ptr %t, ptr %place)
  %e01 = or i32 %e0, %e1
  %e23 = or i32 %e2, %e3
  %e45 = or i32 %e4, %e5
  %e03 = or i32 %e01, %e23
  %e = or i32 %e03, %e45
  %dim.want.at = getelementptr i64, ptr %want, i64 1
  %dtype = load i32, ptr %dtype.at
  %device.is = load i32, ptr %device.at
  %dim = load i64, ptr %dim.at
  %dtype.want = load i32, ptr %want
  %device.want = trunc i64 %device to i32
  %dim.want = load i64, ptr %dim.want.at
  %dtype.same = icmp eq i32 %dtype, %dtype.want
  %device.same = icmp eq i32 %device.is, %device.want
  %dim.same = icmp eq i64 %dim, %dim.want
  %no.error = icmp eq i32 %e, 0
  %two = and i1 %dtype.same, %device.same
  %three = and i1 %two, %dim.same
  %all = and i1 %three, %no.error
  br i1 %all, label %shape, label %bad
shape:
  %sizes = load ptr, ptr %sizes.at
  %strides = load ptr, ptr %strides.at
  %sizes.want = getelementptr i64, ptr %want, i64 2
  %strides.want = getelementptr i64, ptr %sizes.want, i64 %dim
  br label %axes
axes:
  %d = phi i64 [ 0, %shape ], [ %d.next, %axis ]
  %d.next = add i64 %d, 1
  %more = icmp slt i64 %d, %dim
  br i1 %more, label %axis, label %good
axis:
  %size.at = getelementptr i64, ptr %sizes, i64 %d
  %size.want.at = getelementptr i64, ptr %sizes.want, i64 %d
  %stride.at = getelementptr i64, ptr %strides, i64 %d
  %stride.want.at = getelementptr i64, ptr %strides.want, i64 %d
  %size = load i64, ptr %size.at
  %size.want = load i64, ptr %size.want.at
  %stride = load i64, ptr %stride.at
  %stride.want = load i64, ptr %stride.want.at
  %size.same = icmp eq i64 %size, %size.want
  %stride.same = icmp eq i64 %stride, %stride.want
  %same = and i1 %size.same, %stride.same
  br i1 %same, label %axes, label %bad
good:
  %behind = getelementptr i64, ptr %strides.want, i64 %dim
  %data = load ptr, ptr %place
  %no.memory = icmp eq ptr %data, null
  %fit = select i1 %no.memory, ptr null, ptr %behind
  ret ptr %fit
bad:
  ret ptr null
}

; Pointers to the data of the inputs; false where one does not fit.
define internal i1 @pack_inputs(ptr %plan, ptr %args, ptr %want.first, ptr %places) {
entry:
  $inputs
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %i.next, %check ]
  %want = phi ptr [ %want.first, %entry ], [ %behind, %check ]
  %i.next = add i64 %i, 1
  %more = icmp slt i64 %i, %inputs
  br i1 %more, label %check, label %done
check:
  %at = getelementptr ptr, ptr %args, i64 %i
  %object = load ptr, ptr %at
  %place = getelementptr ptr, ptr %places, i64 %i
  %behind = call ptr @fits(ptr %plan, ptr %object, ptr %want, ptr %place)
  %unfit = icmp eq ptr %behind, null
  br i1 %unfit, label %bad, label %next
done:
  ret i1 true
bad:
  ret i1 false
}

; A list of new outputs, and pointers to their data; null, with Python's error set, where one cannot be made.
define internal ptr @make_outputs(ptr %plan, ptr %makers, ptr %places) {
entry:
  $outputs
  %list = call ptr @PyList_New(i64 %outputs)
  %no.list = icmp eq ptr %list, null
  br i1 %no.list, label %none, label %next
next:
  %i = phi i64 [ 0, %entry ], [ %i.next, %made ]
  %maker.at = phi ptr [ %makers, %entry ], [ %behind, %made ]
  %i.next = add i64 %i, 1
  %behind = getelementptr i64, ptr %maker.at, i64 2
  %more = icmp slt i64 %i, %outputs
  br i1 %more, label %make, label %done
make:
  %arguments.at = getelementptr i64, ptr %maker.at, i64 1
  %maker = load ptr, ptr %maker.at
  %arguments = load ptr, ptr %arguments.at
  %new = call ptr @PyObject_Call(ptr %maker, ptr %arguments, ptr null)
  %failed = icmp eq ptr %new, null
  br i1 %failed, label %drop, label %made
made:
  %set = call i32 @PyList_SetItem(ptr %list, i64 %i, ptr %new)
  %data = call ptr @data(ptr %new)
  %place = getelementptr ptr, ptr %places, i64 %i
  store ptr %data, ptr %place
  br label %next
drop:
  call void @Py_DecRef(ptr %list)
  br label %none
none:
  ret ptr null
done:
  ret ptr %list
}

; A block for intermediates, and pointers into it.
define internal ptr @borrow(ptr %plan, ptr %offsets, ptr %places) {
entry:
  $slots
  $take
  $take_arguments
  %block = call ptr @PyObject_Call(ptr %take, ptr %take_arguments, ptr null)
  %none = icmp eq ptr %block, null
  br i1 %none, label %done, label %taken
taken:
  %base = call ptr @data(ptr %block)
  br label %next
next:
  %i = phi i64 [ 0, %taken ], [ %i.next, %next ]
  %i.next = add i64 %i, 1
  %offset.at = getelementptr i64, ptr %offsets, i64 %i
  %place = getelementptr ptr, ptr %places, i64 %i
  %offset = load i64, ptr %offset.at
  %slot = getelementptr i8, ptr %base, i64 %offset
  store ptr %slot, ptr %place
  %more = icmp slt i64 %i.next, %slots
  br i1 %more, label %next, label %done
done:
  ret ptr %block
}

; Call something for its effect; false, with Python's error set, where it raised.
define internal i1 @dropped(ptr %result) {
  %failed = icmp eq ptr %result, null
  br i1 %failed, label %bad, label %good
good:
  call void @Py_DecRef(ptr %result)
  ret i1 true
bad:
  ret i1 false
}

; Run the program, without the GIL where the plan names what to call before. Where the plan names what to call after a
; failure, the program returns a number, which is 0 if all went well.
define internal i1 @run(ptr %plan, ptr %places) {
  $program
  $failed
  $before
  %short = icmp eq ptr %before, null
  br i1 %short, label %held, label %wake
held:
  %code.held = call i64 %program(ptr %places)
  br label %ran
wake:
  %result = call ptr @PyObject_CallNoArgs(ptr %before)
  %woke = call i1 @dropped(ptr %result)
  br i1 %woke, label %released, label %asleep
released:
  %thread = call ptr @PyEval_SaveThread()
  %code.released = call i64 %program(ptr %places)
  call void @PyEval_RestoreThread(ptr %thread)
  br label %ran
ran:
  %code = phi i64 [ %code.held, %held ], [ %code.released, %released ]
  %reports = icmp ne ptr %failed, null
  %is.code = icmp ne i64 %code, 0
  %bad = and i1 %reports, %is.code
  br i1 %bad, label %report, label %well
report:
  %number = call ptr @PyLong_FromLongLong(i64 %code)
  %raised = call ptr @PyObject_CallOneArg(ptr %failed, ptr %number)
  call void @Py_DecRef(ptr %number)
  %forgiven = call i1 @dropped(ptr %raised)
  ret i1 %forgiven
well:
  ret i1 true
asleep:
  ret i1 false
}

define ptr @primexec_launch(ptr %self, ptr %args, i64 %count) {
entry:
  %held = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %plan = call ptr @PyBytes_AsString(ptr %held)
  $inputs
  $outputs
  $slots
  $pointers
  %makers = getelementptr i64, ptr %plan, i64 $header
  %maker.words = shl i64 %outputs, 1
  %offsets = getelementptr i64, ptr %makers, i64 %maker.words
  %wants = getelementptr i64, ptr %offsets, i64 %slots
  %places = alloca ptr, i64 %pointers
  %places.out = getelementptr ptr, ptr %places, i64 %inputs
  %places.slots = getelementptr ptr, ptr %places.out, i64 %outputs
  %as.many = icmp eq i64 %count, %inputs
  br i1 %as.many, label %make, label %refuse
make:
  %list = call ptr @make_outputs(ptr %plan, ptr %makers, ptr %places.out)
  %not.made = icmp eq ptr %list, null
  br i1 %not.made, label %none, label %pack
pack:
  %packed = call i1 @pack_inputs(ptr %plan, ptr %args, ptr %wants, ptr %places)
  br i1 %packed, label %arena, label %unfit
arena:
  %no.slots = icmp eq i64 %slots, 0
  br i1 %no.slots, label %alone, label %lent
alone:
  %ran.alone = call i1 @run(ptr %plan, ptr %places)
  br i1 %ran.alone, label %done, label %failed
lent:
  $give_back
  %block = call ptr @borrow(ptr %plan, ptr %offsets, ptr %places.slots)
  %no.block = icmp eq ptr %block, null
  br i1 %no.block, label %failed, label %both
both:
  %ran = call i1 @run(ptr %plan, ptr %places)
  br i1 %ran, label %return.block, label %drop.block
return.block:
  %result = call ptr @PyObject_CallOneArg(ptr %give_back, ptr %block)
  call void @Py_DecRef(ptr %block)
  %returned = call i1 @dropped(ptr %result)
  br i1 %returned, label %done, label %failed
drop.block:
  call void @Py_DecRef(ptr %block)
  br label %failed
done:
  ret ptr %list
failed:
  call void @Py_DecRef(ptr %list)
  br label %none
none:
  ret ptr null
unfit:
  call void @Py_DecRef(ptr %list)
  br label %refuse
refuse:
  $fallback
  %other = call ptr @PyObject_Vectorcall(ptr %fallback, ptr %args, i64 %count, ptr null)
  ret ptr %other
}
"""


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (("name", ctypes.c_char_p), ("code", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


@dataclass(frozen=True, slots=True)
class Job:
    """What a native function does.

    Attributes:
        program: address of `void @program(ptr %pointers)`, or with `failed` of one that returns an i64.
        inputs: of each tensor its dtype, sizes and strides.
        makers: what makes each output.
        slots: offsets into the arena in bytes.
        take: what makes the arena.
        give_back: takes the arena when the program has run.
        before: called before a program that runs without the GIL; None where it keeps it.
        failed: called with what the program returns where that is not 0, to raise; None where it returns nothing.
        keep: lives as long as the function.
    """

    program: int
    inputs: Sequence[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]]
    makers: Sequence[Make]
    slots: Sequence[int]
    take: Make
    give_back: Callable[..., Any]
    before: Callable[[], Any] | None
    failed: Callable[[int], None] | None
    keep: object


def native(job: Job, fallback: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]] | None:
    """A built-in function from a program's inputs to its outputs; None where this machine has none.

    Args:
        fallback: called with tensors that are not as the job's inputs say.
    """
    make = _function_maker()
    if make is None:
        return None
    words = {
        "inputs": len(job.inputs),
        "outputs": len(job.makers),
        "slots": len(job.slots),
        "pointers": len(job.inputs) + len(job.makers) + len(job.slots),
        "device": _code("device_type_cpu"),
        "program": job.program,
        "tensor_type": id(torch.Tensor),
        "parameter_type": id(torch.nn.Parameter),
        "fallback": id(fallback),
        "before": 0 if job.before is None else id(job.before),
        "failed": 0 if job.failed is None else id(job.failed),
        "take": id(job.take[0]),
        "take_arguments": id(job.take[1]),
        "give_back": id(job.give_back),
    }
    plan = [words[name] for name in _HEADER]
    for maker in job.makers:
        plan += map(id, maker)
    plan += job.slots
    for dtype, sizes, strides in job.inputs:
        plan += (_code(f"dtype_{str(dtype).removeprefix('torch.')}"), len(sizes), *sizes, *strides)
    return make((struct.pack(f"{len(plan)}q", *plan), job, fallback))


@cache
def _function_maker() -> Callable[[tuple[Any, ...]], Callable[..., list[Tensor]]] | None:
    """From a tuple that starts with a plan to a built-in function."""
    offsets, symbols = _torch.tensor_object_offsets(), _symbols()
    if offsets is None or symbols is None:
        return None
    # The code generator's level 0 saves 25 ms of the first call and costs 30 ns a call.
    module = engine.compile_module(_text(*offsets), symbols=symbols, level=0)
    method = _Method(b"primexec_launch", module.address("primexec_launch"), _FASTCALL, None)
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    new = prototype(("PyCFunction_NewEx", ctypes.pythonapi))
    return lambda held: new(ctypes.addressof(method), (*held, method, module), None)


def _symbols() -> Mapping[str, int] | None:
    """Addresses of what the native code calls; None where something is missing."""
    shims = _torch.load_libtorch()
    try:
        found = [getattr(ctypes.pythonapi, name) for name in _PYTHON] + [getattr(shims, name) for name in _SHIMS]
    except AttributeError:
        return None
    addresses = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found)
    return dict(zip((*_PYTHON, *_SHIMS), addresses, strict=True))


@cache
def _code(name: str) -> int:
    """PyTorch's number for `dtype_float32` or `device_type_cpu`."""
    return int(getattr(_torch.load_libtorch(), f"aoti_torch_{name}")())


def _text(type_offset: int, payload_offset: int) -> str:
    loads = {
        word: f"%{word}.word = getelementptr i64, ptr %plan, i64 {i}\n  %{word} = load {kind}, ptr %{word}.word"
        for i, (word, kind) in enumerate(_HEADER.items())
    }
    declarations = []
    for name, signature in (_PYTHON | _SHIMS).items():
        returns, _, takes = signature.partition(" ")
        declarations.append(f"declare {returns} @{name}{takes}")
    body = Template(_TEXT).substitute(loads, type=type_offset, payload=payload_offset, header=len(_HEADER))
    return "\n".join([f'target triple = "{host().triple}"', *declarations, body])
