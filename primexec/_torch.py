"""The only file that touches private PyTorch modules.

Private names are looked up when they are first needed, so that a release of PyTorch that moved one
breaks the feature which needs it, with a clear error, and never `import primexec`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from primexec.errors import PrimexecError

__all__ = ["TorchDispatchMode", "TorchFunctionMode", "private", "pytree"]


@cache
def private(path: str) -> Any:
    """The object at a dotted path inside torch, such as `torch._C._dynamo.guards.TensorGuards`."""
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
            for name in parts[i:]:
                found = getattr(found, name)
            return found
        except (ImportError, AttributeError):
            continue
    raise PrimexecError(
        f"PyTorch {torch.__version__} has no {path}, which primexec needs. "
        f"docs/compatibility.md lists the releases that primexec was run with."
    )


def late(path: str) -> Any:
    """As `private`; where there is no such name, a class that says so when it is used, not on import."""
    try:
        return private(path)
    except PrimexecError as error:
        return _missing(error)


def _missing(error: PrimexecError) -> Any:
    def fail(*args: object, **kwargs: object) -> Any:
        raise error

    # A class whose subclasses can be defined, and which fails when it or one of them is used.
    meta: Any = type("Missing", (type,), {"__getattr__": fail, "__call__": fail})
    return meta.__new__(meta, "Missing", (), {})


pytree = late("torch.utils._pytree")
TorchDispatchMode = late("torch.utils._python_dispatch.TorchDispatchMode")
OpOverload = late("torch._ops.OpOverload")
HigherOrderOperator = late("torch._ops.HigherOrderOperator")
pad: Callable[..., Tensor] = late("torch._C._nn.pad")
empty_strided_cpu: Callable[..., Tensor] = late("torch._C._dynamo.guards._empty_strided_cpu")
set_version_counter: Callable[..., None] = late("torch._C._autograd._unsafe_set_version_counter")
storage_use_count: Callable[[int], int] = late("torch._C._storage_Use_Count")
FunctionModesOff: Any = late("torch._C.DisableTorchFunction")
function_mode_depth: Callable[[], int] = late("torch._C._len_torch_function_stack")
any_autocast_enabled: Callable[[], bool] = late("torch._C._is_any_autocast_enabled")
set_grad_enabled: Callable[[bool], None] = late("torch._C._set_grad_enabled")


# Pytrees ------------------------------------------------------------------------------------------------


def is_leaf(value: object) -> bool:
    """torch.Size is a value here; pytree would take it apart and rebuild it as a tuple."""
    return type(value) is torch.Size


def flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves, spec = pytree.tree_flatten(tree, is_leaf=is_leaf)
    return leaves, spec


# Guards -------------------------------------------------------------------------------------------------


def dict_version() -> Callable[[dict[Any, Any]], int]:
    """A function from a dict to a number that changes whenever the dict does."""
    return private("torch._C._dynamo.guards.dict_version")  # type: ignore[no-any-return]


def tensor_guards(tensors: list[Tensor]) -> Callable[..., bool]:
    """A check in C++ of class, dispatch keys, dtype, device, requires_grad, shape and strides.

    The dispatch keys are those in force at the check: inside another dispatch mode, a functorch
    transform, autocast or inference mode that was not active now, it fails.
    """
    guards = private("torch._C._dynamo.guards.TensorGuards")
    return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # type: ignore[no-any-return]


def global_state_check() -> Callable[[], bool]:
    """A check in C++ of grad mode, autocast, default dtype, determinism and matmul precision."""
    return private("torch._C._dynamo.guards.GlobalStateGuard")().check  # type: ignore[no-any-return]


def describe_global_state() -> dict[str, object]:
    """The process-wide and thread-local state that a program depends on, for messages."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": tuple(d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)),
        "autocast dtype": torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        "default dtype": torch.get_default_dtype(),
        "default device": default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def global_hooks() -> dict[str, dict[int, Any]]:
    """The tables of the hooks of all modules, by their names."""
    found = vars(private("torch.nn.modules.module")).items()
    return {name: held for name, held in found if name.startswith("_global_") and isinstance(held, dict)}


@cache
def fused_optimizers() -> frozenset[Any]:
    """Optimizer steps whose learning rate may be a tensor, which they read."""
    names = [n for n in dir(torch) if n.startswith("_fused_")]
    return frozenset(getattr(torch, n) for n in names if hasattr(getattr(torch.ops.aten, n, None), "tensor_lr"))


def sdpa_switches() -> tuple[bool, ...]:
    """The switches that choose a kernel for scaled_dot_product_attention and recurrent layers."""
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        private("torch._C._get_mkldnn_enabled")(),
    )


# Modes --------------------------------------------------------------------------------------------------

is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def function_modes() -> list[Any]:
    return [private("torch._C._get_function_stack_at")(i) for i in range(function_mode_depth())]


def default_device() -> torch.device | None:
    """The device of `torch.set_default_device` or `with torch.device(...)`, if that is all that is active."""
    modes = function_modes()
    return modes[-1].device if modes and _is_device_context(modes[-1]) else None


def _is_device_context(mode: object) -> bool:
    return type(mode) is private("torch.utils._device.DeviceContext")


def foreign_mode_active() -> bool:
    """Whether somebody else is watching torch calls now: another trace, a fake mode, torch.func, forward AD."""
    return (
        private("torch._C._len_torch_dispatch_stack")() > 0
        or private("torch._C._functorch.peek_interpreter_stack")() is not None
        or private("torch.autograd.forward_ad")._current_level >= 0
        or private("torch._C._is_tracing")()
        or any(not _is_device_context(mode) for mode in function_modes())
        or not private("torch._C._is_torch_function_enabled")()
        or bool(torch.compiler.is_compiling())
    )


def is_foreign_tensor(t: object) -> bool:
    """A tensor that only makes sense inside somebody else's trace: fake, functional or functorch-wrapped."""
    if not isinstance(t, Tensor):
        return False
    return (
        is_fake(t)
        or is_functorch_wrapped(t)
        or private("torch._is_functional_tensor")(t)
        or type(t).__name__ == "FunctionalTensor"
    )


def is_functorch_wrapped(t: Tensor) -> bool:
    return private("torch._C._functorch.is_functorch_wrapped_tensor")(t)  # type: ignore[no-any-return]


def functorch_active() -> bool:
    return private("torch._C._functorch.peek_interpreter_stack")() is not None


# Fake tensors -------------------------------------------------------------------------------------------


def graph_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph, name: str = "GraphModule") -> fx.GraphModule:
    """A module that runs a graph; its code, which compiling never looks at, is written when it is first asked for."""
    return private("torch.fx._lazy_graph_module._LazyGraphModule")(root, graph, class_name=name)  # type: ignore[no-any-return]


def asks_unknown_size(error: BaseException) -> bool:
    """Whether Python code asked for a size that depends on data."""
    return type(error).__name__ == "GuardOnDataDependentSymNode"


SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
# Attributes in which fake tensors keep an unknown layout that C++ asked for.
LAYOUTS = {f"_{kind}_capsule{end}" for kind in ("sizes", "strides", "sym_sizes", "sym_strides") for end in ("", "_len")}


def expression(symbol: Any) -> Any:
    """What a size that depends on data is, as SymPy has it."""
    return symbol.node.expr


def is_fake(t: object) -> bool:
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(t, fake.FakeTensor)


def is_fake_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, private("torch._subclasses.fake_tensor.FakeTensor"))


def holds_fake(tree: Any) -> bool:
    """Whether there is a fake tensor in a value, or in a list, tuple or dict."""
    return any(map(is_fake, pytree.tree_leaves(tree)))


VALUE_NEEDED = (
    "the value of a tensor is needed in Python ({op}), but a program is traced without values",
    "keep it a tensor, or a number by .item(); return it, or use torch.where, torch.cond or torch.compile",
)


@cache
def uncapturable() -> dict[type[Exception], tuple[str, str]]:
    """Exceptions of fake tensors that mean "this has no static program": class to (reason, way out)."""
    fake = "torch._subclasses.fake_tensor."
    return {
        private(fake + "DataDependentOutputException"): VALUE_NEEDED,
        private(fake + "DynamicOutputShapeException"): (
            "the shape of the result of {op} depends on the values of its inputs",
            "use a mask or torch.where in place of boolean indexing, nonzero or unique, or keep this part "
            "outside the traced function",
        ),
        private(fake + "UnsupportedOperatorException"): (
            "{op} has no implementation for fake tensors",
            "register one with torch.library.register_fake, or keep it outside the traced function",
        ),
        private(fake + "UnsupportedFakeTensorException"): (
            "a tensor of this kind has no fake counterpart ({error})",
            "keep it outside the traced function",
        ),
        private(fake + "UnsupportedMutationAliasingException"): (
            "{op} returns an alias of an input that it changes",
            "keep it outside the traced function",
        ),
    }


# Entering modes ---------------------------------------------------------------------------------------


@contextmanager
def modes(*stack: Any) -> Iterator[None]:
    """Enter the modes in order; the last one sees operations first."""
    with ExitStack() as entered:
        for mode in stack:
            entered.enter_context(mode)
        yield


# Operators ----------------------------------------------------------------------------------------------


def prim_as_aten(op: Any) -> Callable[..., Any] | None:
    """The ATen form of one of torch's own prims: called one by one, prims cost 68 to 126 µs each."""
    return getattr(op, "impl_aten", None) if op.namespace == "prims" else None


def operator(name: str) -> Any:
    """The operator overload of a qualified name such as `aten.max.dim`."""
    namespace, packet, overload = name.split(".")
    if namespace == "prims":
        private("torch._prims")  # registers them
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        raise PrimexecError(f"PyTorch {torch.__version__} has no operator {name}") from None


version_of: Callable[[Tensor], int] = Tensor._version.__get__  # type: ignore[attr-defined]


def packed_convolution() -> tuple[Any, Any] | None:
    """oneDNN's operator that packs a convolution's weight, and the convolution that takes it; None without them."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    found = [getattr(torch.ops.mkldnn, n, None) for n in ("_reorder_convolution_weight", "_convolution_pointwise")]
    pack, run = (getattr(packet, "default", None) for packet in found)
    return None if pack is None or run is None else (pack, run)


@cache
def decomposition(op: Any) -> Callable[..., Any] | None:
    """PyTorch's own decomposition of an operator overload, if there is one."""
    private("torch._refs")  # registers most of them
    table: dict[Any, Callable[..., Any]] = private("torch._decomp.decomposition_table")
    return table.get(op)


def raw_call(op: Any) -> Callable[..., Any]:
    """The C++ entry of an operator overload, without the Python frame of OpOverload.__call__."""
    return getattr(op, "_op", op)  # type: ignore[no-any-return]


def returned_names(op: Any) -> list[str]:
    return [r.name for r in op._schema.returns]


def binding_namespaces() -> tuple[Any, ...]:
    """Where torch's Python bindings of ATen operators live."""
    c = torch._C
    return (torch, c._nn, c._special, c._linalg, c._fft, Tensor)  # type: ignore[attr-defined]


@cache
def torch_directory() -> str:
    return os.path.dirname(torch.__file__) + os.sep


@cache
def load_libtorch() -> ctypes.CDLL | None:
    """The library of torch's CPU operators, through which its OpenMP runtime is found; None where it is elsewhere."""
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    found = [path for name in names if os.path.exists(path := os.path.join(torch_directory(), "lib", name))]
    return ctypes.CDLL(found[0]) if found else None


@cache
def tensor_object_offsets() -> tuple[int, int] | None:
    """Where a tensor's Python object holds its type and its C++ handle, in bytes; None where that is not so simple."""
    header = object.__basicsize__  # an object's header ends with its type
    type_offset = header - struct.calcsize("P")

    def read(t: Tensor, offset: int) -> int | None:
        return ctypes.c_void_p.from_address(id(t) + offset).value

    with modes_off():
        some = torch.empty(6, device="cpu")
        samples: list[Any] = [some, some[1:], torch.nn.Parameter(some)]
    held = all(read(t, header) == t._cdata and read(t, type_offset) == id(type(t)) for t in samples)
    return (type_offset, header) if held and struct.calcsize("P") == 8 else None


def identity(value: Any) -> int:
    """A number for a tensor or generator, as long as it lives; operators see generators in new Python objects."""
    return -int(getattr(value, "_cdata")) if isinstance(value, torch.Generator) else id(value)  # noqa: B009


def layout_of(t: Any) -> tuple[int, int, bool, bool]:
    """What Python code may ask about the memory behind a tensor, and whether it has a history."""
    return t.storage_offset(), t.untyped_storage().nbytes(), t._is_view(), t.is_leaf


def storage_key(t: Any) -> int:
    """A number that two tensors share exactly when they share memory."""
    return int(t.untyped_storage()._cdata)


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements of one memory."""
    places = [(t.dtype, t.shape, t.stride(), t.storage_offset(), t.is_conj(), t.is_neg()) for t in (a, b)]
    return places[0] == places[1] and storage_key(a) == storage_key(b)


def overlap(tensors: list[Tensor]) -> bool:
    """Whether any two tensors of one storage have an element in common."""
    return bool(private("torch._C._dynamo.guards.compute_overlapping_tensors")(tensors, symbolic=False))


@contextmanager
def modes_off() -> Iterator[None]:
    """Without any dispatch or function mode of anybody's."""
    with private("torch.utils._python_dispatch._disable_current_modes")(), FunctionModesOff():
        yield


@contextmanager
def quiet_modes() -> Iterator[None]:
    """Without modes of anybody's, without autocast and outside of inference mode."""
    with modes_off(), private("torch._C._DisableAutocast")(), torch.inference_mode(False):
        yield


def python_references(held: dict[str, Any], key: str) -> int:
    """How many Python objects refer to the tensor `held[key]`, that dict included.

    Where C++ holds a tensor too (a view its base), PyTorch counts that as one more reference.
    """
    return _count_references(held, key) - _references_of_a_call()


def _count_references(held: dict[str, Any], key: str) -> int:
    value = held[key]
    return sys.getrefcount(value) - int(value._use_count() > 1 and _cpp_counts())


@cache
def _cpp_counts() -> bool:
    with torch.inference_mode(False):  # an inference tensor keeps no base
        base = torch.empty(1)
        alone = sys.getrefcount(base)
        view = base.view(1)
    return view._is_view() and sys.getrefcount(base) > alone


@cache
def _references_of_a_call() -> int:
    return _count_references({"val": torch.empty(0)}, "val") - 1


def laid_out(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The same memory in another layout, and no view."""
    made: Tensor = t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), shape, strides)
    return made


def alone(t: Tensor) -> Tensor:
    """The same memory and no view: eager's result is none where a kernel ends in one (stack), and may be changed."""
    made = laid_out(t, t.shape, t.stride())
    if t.is_conj() or t.is_neg():
        private("torch._C._set_conj")(made, t.is_conj())
        private("torch._C._set_neg")(made, t.is_neg())
    return made


# AOTAutograd --------------------------------------------------------------------------------------------


def aot_autograd(
    compile_graph: Callable[[fx.GraphModule, list[Any]], Callable[[list[Any]], Sequence[Any]]], save: str
) -> Any:
    """A compiler for Dynamo's graphs: AOTAutograd makes forward and backward, compile_graph compiles each.

    PyTorch's own partitioners divide the joint graph here, for they also know symbolic sizes and subclasses.
    The operators are those that eager runs, random ones included, so the same seed gives the same numbers.
    """
    partitioner = "min_cut_rematerialization_partition" if save == "less" else "default_partition"
    return private("torch._dynamo.backends.common.aot_autograd")(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        inference_compiler=compile_graph,
        partition_fn=private("torch._functorch.partitioners." + partitioner),
        keep_inference_input_mutations=True,
    )


def is_tangent(placeholder: str) -> bool:
    """Whether AOTAutograd names the gradient of a result so, among the inputs of a backward graph."""
    return placeholder.startswith("tangents_")
