"""The program: what a capture returns and everything else works on; its text form."""

from __future__ import annotations

import html
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import fx

from primexec import _torch
from primexec.errors import SourceLine

_Stage = TypeVar("_Stage", bound=Callable[..., Any])
_DTYPES = {
    torch.float16: "f16", torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16",
    torch.complex32: "c32", torch.complex64: "c64", torch.complex128: "c128",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64", torch.bool: "b8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype, shape, strides (in elements) and device of a tensor at the moment it was made."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    stride: tuple[int | str, ...]
    device: torch.device

    @classmethod
    def of(cls, t: torch.Tensor) -> TensorSpec:
        # A size that depends on data stands as its symbol.
        shape, stride = ([n if type(n) is int else str(n) for n in ns] for ns in (t.shape, t.stride()))
        return cls(t.dtype, tuple(shape), tuple(stride), t.device)

    def __str__(self) -> str:
        device = "" if self.device.type == "cpu" else f" {self.device}"
        dtype = _DTYPES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, self.shape))}]{device}"


MADE_WHILE_TRACING = "made while tracing"  # the label of a constant that nobody outside refers to


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a program.

    Attributes:
        name: the placeholder's name in the graph.
        kind: an `argument` of the call, `state` that is read again at every call (parameters, buffers,
            closed-over tensors and generators), or a `constant` made while tracing; of a backward program what
            the forward one has `saved`, or a `tangent`: the gradient of a result.
        label: where it comes from, as a user would write it.
    """

    name: str
    kind: Literal["argument", "state", "constant", "saved", "tangent"]
    label: str


def identifier(label: str) -> str:
    """The name of an input that comes from there."""
    label = re.sub(r" \(closed over by [^)]*\)", "", label)
    name = "".join(c if c.isalnum() else "_" for c in label).strip("_")
    return name if name and not name[0].isdigit() else f"t_{name}"


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One call of a C++ binding by the user's code, such as `F.linear(x, w, b)`, and its nodes in the graph.

    Replaying the call does exactly what eager does; its nodes are what executors claim.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    sequence: bool  # the call returns a tuple or list of its results, not one tensor
    inputs: frozenset[fx.Node]

    def renamed(self, instead: Mapping[fx.Node, fx.Node]) -> ApiCall:
        """The same call with other nodes in place of some."""

        def rename(node: fx.Node) -> fx.Node:
            return instead.get(node, node)

        args, kwargs = fx.node.map_arg((self.args, self.kwargs), rename)
        return replace(
            self,
            args=args,
            kwargs=kwargs,
            nodes=tuple(map(rename, self.nodes)),
            results=tuple(map(rename, self.results)),
            inputs=frozenset(map(rename, self.inputs)),
        )


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function: a graph of ATen operators in the order in which eager runs them, and its signature.

    `graph_module(*inputs)` takes the inputs in the order of `inputs` and returns a tuple of tensors.
    Operators that change a tensor in place are kept as they are. Where results take part in autograd, the graph's
    last outputs, `extras` in number, are what autograd and the backward program need besides.
    """

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    output_tree: Any  # pytree spec of what the function returns
    output_leaves: tuple[int | Static, ...]  # index into the graph's outputs, or a Python value
    # What the function leaves behind: where, and its index into the graph's outputs or a Python value.
    stored: tuple[tuple[str, int | Static], ...] = ()
    calls: tuple[ApiCall, ...] = field(default=(), repr=False)
    extras: int = 0
    constants: tuple[torch.Tensor, ...] = field(default=(), repr=False)  # the values of the inputs of that kind
    notes: tuple[str, ...] = field(default=(), repr=False)  # what passes decided, and why: for `explain()`
    frozen: tuple[str, ...] = ()  # inputs whose values constants were made of
    backward: Program | None = None  # its `saved` inputs are labelled with the names of nodes of this program

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that the graph returns."""
        return list(self.graph_module.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def is_backward(self) -> bool:
        """Whether the program computes gradients from arriving ones."""
        return any(i.kind == "tangent" for i in self.inputs)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that compute something, in order."""
        return [n for n in self.graph_module.graph.nodes if n.op == "call_function"]

    def lower(self) -> Program:
        """The program in prims (docs/prims.md); operators that do not decompose to prims stay as they are.

        >>> import torch, primexec
        >>> print(primexec.make_traced(torch.nn.functional.silu).trace(torch.ones(2)).lower())
        def silu(
            input_1: f32[2], # argument input
        ):
            ...
            return mul
        """
        lowered: Program = _stages["lower"](self)
        return lowered

    def inspect_loops(self, **parameters: object) -> str:
        """The loops that the executor `llvm` makes of the program: buffers, and each kernel with where it comes from.

        Every value of a kernel has a name and a dtype; a reduction shows the loops that it runs over, and, where there
        are several passes over them, in which pass a value is known. Nothing is compiled.

        Args:
            parameters: executor parameters of `llvm`, `fuel=3` for instance.

        >>> import torch, primexec
        >>> program = primexec.make_traced(lambda x: (x * 2).sum(-1)).trace(torch.ones(3, 5))
        >>> print(program.inspect_loops())
        region0
        b0: input float32[3, 5] strides [5, 1]
        b1: output float32[3] strides [1]
        kernel k0_mul_sum
          # ...
          for i0 in 3:
            v0: float32 = b0[5*i0 + i1]  # pass 0
            v1: float32 = 2.0  # pass 0
            v2: float32 = mul(v0, v1)  # pass 0
            v3: float32 = sum(for i1 in 5: v2)  # pass 1
            b1[i0] = v3
        """
        return str(_stages["inspect"](self, "loops", parameters))

    def inspect_llvm(self, **parameters: object) -> str:
        """The LLVM IR of the program's kernels, one module for each region of `llvm`; arguments as `inspect_loops`.

        >>> import torch, primexec
        >>> program = primexec.make_traced(lambda x: x * 2 + 1).trace(torch.ones(100))
        >>> text = program.inspect_llvm()
        >>> "define void @k0_mul_add(ptr %args, i64 %begin, i64 %end)" in text, "fmul" in text
        (True, True)
        """
        return str(_stages["inspect"](self, "llvm", parameters))

    def inspect_asm(self, **parameters: object) -> str:
        """The machine code of the program's kernels, as assembly for this machine; arguments as `inspect_loops`.

        >>> import torch, primexec
        >>> program = primexec.make_traced(lambda x: x * 2 + 1).trace(torch.ones(100))
        >>> "k0_mul_add:" in program.inspect_asm()
        True
        """
        return str(_stages["inspect"](self, "asm", parameters))

    def __str__(self) -> str:
        backward = f"\n\n{self.backward}" if self.backward is not None else ""
        return "\n".join(_lines(self)) + backward

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True, slots=True)
class Static:
    """A Python value among the outputs of a program."""

    value: object


_stages: dict[str, Callable[..., Any]] = {}


def stage(name: str) -> Callable[[_Stage], _Stage]:
    """Makes a function the implementation of a method of Program: what it needs stands above this file."""

    def register(function: _Stage) -> _Stage:
        _stages[name] = function
        return function

    return register


def spec_of(node: fx.Node) -> str:
    """Shape and dtype of a node's result, for people."""
    spec = node.meta.get("spec")
    if isinstance(spec, (tuple, list)):
        return f"({', '.join(map(str, spec))})"
    return str(spec) if spec is not None else "?"


def op_name(target: Any) -> str:
    """`aten.add.Tensor`, without the overload where it is the default one."""
    if isinstance(target, (types.BuiltinFunctionType, types.FunctionType)):  # arithmetic of Python's
        return target.__name__
    name = str(target).removeprefix("torch.ops.")
    return name.removesuffix(".default")


def base_name(node: fx.Node) -> str:
    """`exp`, for a node of `prims.exp.default`; empty for what is no operator."""
    op: Any = node.target
    return _base_name(op) if isinstance(op, _torch.OpOverload) else ""


@cache  # asked 60,000 times while BERT is fused
def _base_name(op: Any) -> str:
    return str(op._schema.name).partition("::")[2]


def show_argument(arg: Any) -> str:
    """An argument of a node as it stands in the text form."""
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, (list, tuple)):
        inner = ", ".join(map(show_argument, arg))
        return f"[{inner}]" if isinstance(arg, list) else f"({inner}{',' * (len(arg) == 1)})"
    if isinstance(arg, slice):
        return f"slice({show_argument(arg.start)}, {show_argument(arg.stop)}, {show_argument(arg.step)})"
    return str(arg) if isinstance(arg, (torch.dtype, torch.device)) else repr(arg)


def _lines(program: Program) -> Iterator[str]:
    nodes = {n.name: n for n in program.graph_module.graph.nodes}
    yield f"def {program.name}("
    width = min(60, max((len(i.name) + len(spec_of(nodes[i.name])) for i in program.inputs), default=0))
    for i in program.inputs:
        text = f"{i.name}: {spec_of(nodes[i.name])},"
        yield f"    {text:<{width + 4}}# {i.kind} {i.label}"
    yield "):"
    current: SourceLine | None = None
    for node in program.nodes:
        if node.target is operator.getitem:
            continue
        source = node.meta.get("source")
        if source is not None and source != current:
            yield f"    # {source.short}"
            current = source
        yield "    " + _line(node)
    outputs = nodes["output"].args[0]
    shown = [repr(x.value) if isinstance(x, Static) else outputs[x].name for x in program.output_leaves]
    yield f"    return {', '.join(shown)}"
    for label, value in program.stored:
        yield f"    # then {label} = {value.value if isinstance(value, Static) else outputs[value].name}"


def _line(node: fx.Node) -> str:
    arguments = [show_argument(a) for a in node.args]
    arguments += [f"{k}={show_argument(v)}" for k, v in node.kwargs.items()]
    call = f"{op_name(node.target)}({', '.join(arguments)})"
    items = [u for u in node.users if u.target is operator.getitem]
    if items:
        return ", ".join(f"{u.name}: {spec_of(u)}" for u in items) + f" = {call}"
    if node.meta.get("spec") is None or (not node.users and node.meta.get("effect")):
        return call
    return f"{node.name}: {spec_of(node)} = {call}"
