"""Records the operators that a function runs on fake tensors.

Two modes watch the run. `_Operators` sits at the Python dispatch key and records every ATen operator into
an FX graph. `calls.Calls` sees the calls of torch's Python API: it replaces real tensors (parameters, closed-over
tensors) by fake ones, refuses what would read a value or change state behind the operators' back, and
remembers which operators belong to one call of a C++ binding.
"""

from __future__ import annotations

import gc
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from primexec import (
    _torch,
    _torch_autograd,
    _torch_capture,
    _torch_fake,
    _torch_packed,
    effects,
    functions,
    higher_order,
    literals,
    numbers,
    parts,
    sizes,
)
from primexec.bytecode import IDENTITY, NUMBER_TYPE, SUSPECTS, in_fx, user_source
from primexec.calls import Calls
from primexec.decisions import Deciding, Decisions
from primexec.entrances import Entrances
from primexec.errors import CaptureError, SourceLine
from primexec.fake_calls import fake_call
from primexec.gradients import LeafGradients
from primexec.number_inputs import NumberInputs
from primexec.program import MADE_WHILE_TRACING, ApiCall, Input, TensorSpec, identifier
from primexec.reads import Reads
from primexec.references import outlives
from primexec.rehearsal import Rehearsal
from primexec.shadow import Shadows
from primexec.statics import tensor_problem
from primexec.value_checks import CHECK, asked_inside

UNRECORDED = frozenset({"prim", "profiler"})  # asks for a device or layout; marks a range for the profiler

_READS = frozenset({numbers.READ, torch.ops.aten.item.default})  # the latter in inference mode


@dataclass(frozen=True, slots=True)
class BoundInput:
    """An input of the program under construction, and what it is bound to at run time."""

    input: Input
    binding: Any  # argument: its position; state: its places; constant: its value


class Scope:
    """One graph under construction: the program's, or that of a branch or loop body."""

    def __init__(self, parent: Scope | None = None, *, is_body: bool = False) -> None:
        self.graph = fx.Graph()
        self.parent, self.is_body = parent, is_body
        self.nodes: dict[int, fx.Node] = {}  # id of a fake tensor or generator → node
        self.alive: list[object] = []
        self.lifted: list[Tensor] = []  # tensors of an outer scope that this one uses

    def bind(self, value: object, node: fx.Node) -> None:
        self.nodes[_torch.identity(value)] = node
        self.alive.append(value)
        if isinstance(value, Tensor):
            node.meta["val"] = value
            node.meta["spec"] = TensorSpec.of(value)


class Tracer:
    """One capture in progress."""

    def __init__(self, reads: Reads, shadows: Shadows, known: Decisions = ()) -> None:
        self.reads, self.shadows = reads, shadows
        reads.refuse = self.fail  # type: ignore[method-assign]
        reads.float = functions.float_stand_in()
        self.fake_mode = _torch_fake.fake_mode()
        self.scope = Scope()
        self.inputs: dict[str, BoundInput] = {}  # by the names of their nodes
        self.calls: list[ApiCall] = []
        self.submodules = torch.nn.Module()
        self.failure: CaptureError | None = None
        self.uses_layout = self.uses_sdpa = self.inference_segments = False
        self.hooks = self.unpacks = False  # whether the function may have set hooks of gradients; of what is saved
        with self.fake_mode:  # what fake tensors have by themselves, and parameters and buffers made of them
            self._own_attributes = {"_is_param", "_is_buffer", "persistent", *_torch.LAYOUTS, *torch.empty(0).__dict__}
        self._running = False
        self.calling: Any = None  # the function of torch's API that runs
        self.running: Any = None  # the operator that runs
        self.taking: Any = None  # the size of the part of a tensor that is taken where a number says
        self._inference = torch.is_inference_mode_enabled()
        self._lifts: dict[int, tuple[object, Any]] = {}  # id of a real tensor or generator → (it, stand-in)
        self._positions: dict[int, int] = {}  # id of an argument → its position
        self.tied: dict[int, tuple[int, list[tuple[Any, Any, str]]]] = {}  # id of an argument → (position, places)
        self._places: dict[int, list[tuple[Any, Any, str]]] | None = None
        self._lifted_before: dict[int, tuple[Any, fx.Node]] = {}  # the same once the run is over, without owning it
        self.gradients = LeafGradients(self)
        self.entrances = Entrances(self)
        self.literals = literals.Literals(self)
        self.numbers = numbers.Numbers()
        self.number_inputs = NumberInputs(self, reads.varying)
        self.rehearsal, self.deciding = Rehearsal(self), Deciding(self, known)
        self._histories: dict[int, Any] = {}  # id of an input's stand-in → its autograd node
        self._lines: dict[int, SourceLine | None] = {}  # sequence number of an autograd node → line of its operator
        self.taken: dict[fx.Node, fx.Node] = {}  # placeholder of a backward graph → node of the forward graph

    @property
    def graph(self) -> fx.Graph:
        return self.scope.graph

    def run(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call fn under the modes; the result is made of fake tensors."""
        modes = _torch.modes(self.fake_mode, _Operators(self), Calls(self))
        with _torch_capture.standing_in(self.shadows.by_dict), modes:
            self.reads.start()
            self._running = True
            try:
                return fn(*args, **kwargs)
            finally:
                sys.settrace(None)  # what watches may raise, where it sees `stop` called
                self._running = False
                self.reads.stop()

    # Inputs --------------------------------------------------------------------------------------------

    def argument(self, leaf: Any, position: int, label: str) -> Any:
        """The stand-in for an argument: a fake tensor, the generator itself, or the static value."""
        if not isinstance(leaf, (Tensor, torch.Generator)):
            return leaf
        if _torch.identity(leaf) not in self._lifts:
            self._positions[_torch.identity(leaf)] = position
            self._add_input(leaf, "argument", position, label, label)
        return self._lifts[_torch.identity(leaf)][1]

    def lift(self, real: Any) -> Any:
        """The stand-in for a tensor or generator that the code reached by itself: an input read at every call."""
        key = _torch.identity(real)
        if key in self._lifts:
            if key in self._positions and key not in self.tied:
                self.tied[key] = self._positions[key], self._find(real)
            return self._lifts[key][1]
        before = self._lifted_before.get(key)
        if before is not None and before[0]() is real:
            return before[1].meta["val"]
        if isinstance(real, Tensor) and (problem := tensor_problem(real)):
            raise self.fail(f"the function uses {problem}", "pass plain strided tensors")
        places = self._find(real)
        if not places:
            kind = "tensor" if isinstance(real, Tensor) else "generator"
            raise self.fail(
                f"the function uses a {kind} that is not an argument and hangs on nothing that can be checked again",
                in_fx(sys._getframe()) or "pass it as an argument, or keep it in a module, closure or global variable",
            )
        self._add_state(real, places)
        return self._lifts[key][1]

    def _add_state(self, real: Any, places: list[tuple[Any, Any, str]]) -> None:
        self._add_input(real, "state", places, places[0][2].rpartition(": ")[2], places[0][2])

    def add_place(self, real: Any, place: tuple[Any, Any, str]) -> None:
        """The tensor was found at this place too, or first."""
        key = _torch.identity(real)
        if key not in self._lifts:
            self._add_state(real, [place, *self._find(real)])
        elif key in self._positions:
            self.tied.setdefault(key, (self._positions[key], self._find(real)))[1].append(place)
        else:
            node = self.outermost().nodes[_torch.identity(self._lifts[key][1])]
            self.inputs[node.name].binding.append(place)

    def _find(self, real: object) -> list[tuple[Any, Any, str]]:
        if self._places is None or _torch.identity(real) not in self._places:
            self._places = {}
            for container, key, label, value in self.reads.tensors():
                self._places.setdefault(_torch.identity(value), []).append((container, key, label))
        return self._places.get(_torch.identity(real), [])

    def constant(self, real: Tensor) -> fx.Node:
        """An input for a tensor made from Python numbers while tracing, such as `torch.tensor([1, 2])`."""
        return self._add_input(real, "constant", real, "constant", MADE_WHILE_TRACING)

    def _add_input(self, real: Any, kind: Any, binding: Any, name: str, label: str) -> fx.Node:
        node = higher_order.add_placeholder(self.outermost().graph, identifier(name))
        if isinstance(real, Tensor):
            with _torch.modes_off(), torch.inference_mode(real.is_inference()), warnings.catch_warnings():
                # torch asks for `.grad` of every tensor, whether it can have one or not.
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
                stand_in = self.fake_mode.from_tensor(real)
            self._own_attributes |= stand_in.__dict__.keys()
            self._histories[id(stand_in)] = stand_in.grad_fn
            self.gradients.note(real, stand_in, node, label)
        else:
            stand_in = real
        self._lifts[_torch.identity(real)] = real, stand_in
        self.rehearsal.give(node, real)
        self.outermost().bind(stand_in, node)
        if not isinstance(real, Tensor):
            with _torch.modes_off():
                self.reads.generators.append((real, real.get_state()))
            node.meta["spec"] = f"generator {real.device}"
        self.inputs[node.name] = BoundInput(Input(node.name, kind, label), binding)
        return node

    def inner_scope(self) -> Scope:
        """A graph inside the present one, for a branch or loop body."""
        return Scope(self.scope, is_body=True)

    def recording(self) -> _Operators:
        """The mode that records operators, to enter again from inside an operator."""
        return _Operators(self)

    def outermost(self) -> Scope:
        """The graph of the program."""
        scope = self.scope
        while scope.parent is not None:
            scope = scope.parent
        return scope

    # Operators -----------------------------------------------------------------------------------------

    def input_kind(self, placeholder: fx.Node) -> str:
        return self.inputs[placeholder.name].input.kind

    def node_of(self, t: Any) -> fx.Node:
        """The node of a fake tensor or generator in the current graph."""
        node = self.scope.nodes.get(_torch.identity(t))
        if node is not None:
            return node
        if self.gradients.adopt(t):
            return self.node_of(t)
        if self.scope.parent is not None:
            return higher_order.lift_from_outside(self, t)
        raise self.fail(
            "the function uses a tensor that no recorded operator made (a part of another trace)",
            "pass it as an argument",
        )

    def record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator on fake tensors and add its node."""
        if isinstance(op, _torch.HigherOrderOperator):
            return higher_order.record(self, op, args, kwargs)
        with _torch.FunctionModesOff():  # that of API calls is on where TorchScript or C++ calls an operator
            return self._record(op, args, kwargs)

    def _record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op.namespace in UNRECORDED:
            return op(*args, **kwargs)
        aten = _torch.prim_as_aten(op)
        if aten is not None:
            with self.recording():
                return aten(*args, **kwargs)
        if (check := asked_inside(self.calling, op)) is not None:
            with self.recording():
                truth = torch.eq(*args).all()
            self.add_node(CHECK, (self.node_of(truth), *check), {}, None)
            return not check.fails
        if op in literals.makers() and not _torch.is_fake(args[0]):
            return self.literals.record(op, args[0])
        args, kwargs = self._stand_ins(args), self._stand_ins(kwargs)
        if op in _READS:
            if (count := _torch_packed.count(args[0])) is not None:
                return count
            for ask in (sizes.read, numbers.asked_by_pytorch, numbers.whole):  # the first of them records an operator
                if (answer := ask(self, args[0])) is not None:
                    return answer
        if self.numbers:
            if (part := parts.recorded(self, op, args)) is not None:
                return part
            args, kwargs = sizes.given(self, op, args, kwargs)
        node_args, node_kwargs = self._nodes(args), self._nodes(kwargs)
        if (answer := numbers.answer(self, op, node_args)) is not None:
            return answer
        view_before = self._alias(args[0]) if effects.changes_metadata(op) else None
        is_known = not args or numbers.symbol_of(args[0]) is None
        if self.numbers:
            args, kwargs = numbers.on_metadata(op, args, kwargs)
        out = _torch_capture.as_kernels_have_it(op, args, kwargs, fake_call(self, op, args, kwargs))
        if op is torch.ops.aten.scalar_tensor.default and is_known:
            with _torch.modes_off():
                out.constant = op(*args, **kwargs)  # as that of `torch.tensor(1)`; torch.cov asks for it
        if isinstance(out, (bool, int, float, complex)):
            return out  # of a tensor whose value is known
        _torch_packed.forget_counts(self.fake_mode, op, (args, kwargs))
        if view_before is not None and (node := node_args[0]).op == "call_function":
            # From here on the tensor is another one: `x.squeeze_()` is what it is known by, and x keeps its shape.
            del self.scope.nodes[_torch.identity(args[0])]
            node.meta["val"] = view_before
        return self.add_node(op, node_args, node_kwargs, out)

    def add_node(self, op: Any, node_args: Any, node_kwargs: Any, out: Any) -> Any:
        name = op._schema.name.partition("::")[2] if isinstance(op, _torch.OpOverload) else op.name()
        node = self.graph.create_node("call_function", op, node_args, node_kwargs, name=name)
        source = self.describe(node)
        self.inference_segments |= node.meta["inference"] != self._inference
        # Without grad mode the node made last is that of a custom function whose forward runs, or has its line.
        self._lines.setdefault(_torch_autograd.sequence_number(), source)
        if isinstance(out, Tensor):
            self._bind_output(out, node)
        elif isinstance(out, (tuple, list)):
            node.meta["spec"] = [TensorSpec.of(t) if isinstance(t, Tensor) else t for t in out]
            for i, t in enumerate(out):
                if isinstance(t, Tensor):
                    item = self.graph.create_node("call_function", operator.getitem, (node, i), name=f"{node.name}_{i}")
                    item.meta.update({k: v for k, v in node.meta.items() if k not in ("spec", "stack_trace")})
                    self._bind_output(t, item)
        return out

    def describe(self, node: fx.Node) -> SourceLine | None:
        """Note where a node comes from, and the modes under which it runs."""
        node.meta["source"] = source = self.source()
        if source is not None:
            node.meta["stack_trace"] = f"  {source}"
        node.meta["inference"], node.meta["grad_mode"] = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        node.meta["in_backward"] = _torch_autograd.in_backward()
        return source

    def _bind_output(self, t: Tensor, node: fx.Node) -> None:
        if t.layout is not torch.strided:
            raise self.fail(f"{node.target} makes a tensor of layout {t.layout}", "keep it outside the traced function")
        if _torch.identity(t) in self.scope.nodes:  # an operator that returns its argument, such as add_
            node.meta["effect"] = True
        else:
            self.scope.bind(t, node)

    def _alias(self, t: Tensor) -> Tensor:
        with _torch.modes_off(), self.fake_mode, torch.no_grad():
            return t.detach()

    def _stand_ins(self, value: Any) -> Any:
        """value with real tensors replaced by fake ones, and numbers read off tensors by what operators take."""
        if isinstance(value, Tensor):
            return self.entrances.stand_in(value)
        if isinstance(value, numbers.Number):
            return value.as_pytorch_has_it()
        if type(value) in (tuple, list):
            return type(value)(self._stand_ins(v) for v in value)
        if type(value) is dict:
            return {k: self._stand_ins(v) for k, v in value.items()}
        return value

    def _nodes(self, value: Any) -> Any:
        """value with tensors and generators replaced by their nodes."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.Generator):
            if _torch.identity(value) == _torch.identity(torch.default_generator):
                return None
            self.lift(value)
            return self.node_of(value)
        if (number := numbers.symbol_of(value)) is not None:
            return numbers.node_of(self, number)
        if isinstance(value, _torch.SYMBOLS):
            if (node := sizes.node_of(self, value)) is None:
                raise self.unknown_size()
            return node
        if type(value) in (tuple, list):
            return type(value)(self._nodes(v) for v in value)
        if type(value) is dict:
            return {k: self._nodes(v) for k, v in value.items()}
        return value

    def unknown_size(self, source: SourceLine | None = None) -> CaptureError:
        """The error for a use in Python of a size that depends on data."""
        return self.fail(
            "a size that depends on the values of a tensor is needed in Python",
            "use a mask or torch.where in place of boolean indexing, nonzero or unique, or keep this part outside "
            "the traced function",
            source,
        )

    # Errors and sources --------------------------------------------------------------------------------

    def source(self) -> SourceLine | None:
        """The user's line that runs now; None before and after the run. During a backward pass, the forward line."""
        if not self._running:
            return None
        node = _torch_autograd.autograd_node()
        return user_source(sys._getframe(1), Tracer.run.__code__) or (node and self._lines.get(node._sequence_nr()))

    def fail(self, reason: str, hint: str, source: SourceLine | None = None) -> CaptureError:
        """A CaptureError for the current line; it is raised at the end even where the user's code catches it."""
        self.failure = self.failure or CaptureError(reason, hint=hint, source=source or self.source())
        return self.failure

    def raise_failure(self) -> None:
        """Raise what was refused during the run, even where the user's code caught it."""
        if self.failure is not None:
            raise self.failure
        harmless = {IDENTITY: lambda: not self._reaches_an_argument(), NUMBER_TYPE: lambda: not self.numbers}
        for topic, (reason, hint) in SUSPECTS.items():
            if topic in self.reads.suspects and not (topic in harmless and harmless[topic]()):
                raise CaptureError(reason, hint=hint, source=self.reads.suspects[topic]) from None

    def _reaches_an_argument(self) -> bool:
        return any(_torch.identity(value) in self._positions for *_, value in self.reads.tensors())

    # Afterwards ----------------------------------------------------------------------------------------

    def output(self, leaf: Any) -> fx.Node | None:
        """The node of a tensor that the function returns, or of a number or size; None where it is neither."""
        if isinstance(leaf, (numbers.Number, *_torch.SYMBOLS)):
            return self._nodes(leaf)  # type: ignore[no-any-return]
        if not isinstance(leaf, Tensor):
            return None
        if type(leaf) is not Tensor and not isinstance(leaf, torch.nn.Parameter) and not _torch.is_fake(leaf):
            raise self.fail(f"the function returns a {type(leaf).__qualname__}", "return plain tensors")
        if _torch.is_fake(leaf) and (names := sorted(leaf.__dict__.keys() - self._own_attributes)):
            reason = f"the function returns a tensor with the Python attributes {', '.join(names)}"
            raise self.fail(reason, "return such values beside the tensor")
        return self.node_of(leaf if _torch.is_fake(leaf) else self.lift(leaf))

    def check_metadata(self, grad_hint: str) -> None:
        """Inputs whose history or Python attributes the function changes, or asks for, raise."""
        for real, stand_in in self._lifts.values():
            if not isinstance(real, Tensor):
                continue
            known = isinstance(real, torch.nn.Parameter) and self.reads.namespaces.get(id(real.__dict__))
            guarded = known.values if known else {}
            asked = {name for name in real.__dict__ if name not in guarded and self.reads.asks_for(name)}
            if attributes := sorted((stand_in.__dict__.keys() - self._own_attributes) | asked):
                raise CaptureError(
                    f"the function uses the Python attributes {', '.join(attributes)} of a tensor",
                    hint="pass such values as arguments of their own",
                )
            if self._histories[id(stand_in)] is not stand_in.grad_fn:
                raise CaptureError(
                    "the function changes one of its inputs in a way that autograd records", hint=grad_hint
                )

    def check_escapes(self) -> None:
        """Raise if a tensor of the trace is still referred to from outside, such as a list it was appended to."""
        graphs = [self.scope.graph, *{n.graph for n in self.taken}]
        nodes = [n for graph in graphs for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        self.scope.alive.clear()
        self._lifted_before = {
            key: (weakref.ref(real), self.scope.nodes[_torch.identity(stand_in)])
            for key, (real, stand_in) in self._lifts.items()
            if isinstance(real, Tensor)
        }
        self._lifts.clear()
        self.gradients.clear()
        if any(_torch.python_references(n.meta, "val") > 1 for n in nodes):
            gc.collect()  # exceptions that the user's code caught keep frames alive in cycles
        if self.numbers.kept() and gc.collect() >= 0 and self.numbers.kept():
            raise CaptureError(
                "a number that was read off a tensor is kept somewhere outside of the traced function",
                hint="return it instead",
            )
        own = [n.meta for n in nodes]
        suspects = [n for n in nodes if _torch.python_references(n.meta, "val") > 1]
        if suspects and outlives([n.meta["val"] for n in suspects], own, self.reads.fn):
            kept = [n for n in suspects if outlives([n.meta["val"]], own, self.reads.fn)]
            raise CaptureError(
                "a tensor of the traced function is kept somewhere outside of it (a list, an attribute, a cache)",
                hint="return it instead",
                source=(kept or suspects)[0].meta.get("source"),
            )
        self.complete_metadata(graphs)

    def complete_metadata(self, graphs: Iterable[fx.Graph]) -> None:
        """As FX has it: an operator with several results carries them all, and inputs what they stand for."""
        for node, source in self.taken.items():
            node.meta.update({k: v for k, v in source.meta.items() if k == "val"})
        self.taken.clear()
        for node in (n for graph in graphs for n in graph.nodes):
            items = {u.args[1]: u.meta.get("val") for u in node.users if u.target is operator.getitem}
            if items and "val" not in node.meta:
                node.meta["val"] = tuple(items.get(i) for i in range(len(node.meta["spec"])))


class _Operators(_torch.TorchDispatchMode):  # type: ignore[misc]
    """Records every operator into the tracer's graph."""

    supports_higher_order_operators = True

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Fake tensors run much Python code of torch's own, which need not be watched.
        watching = self.tracer.reads.pause()
        try:
            return self.tracer.record(op, args, kwargs or {})
        finally:
            self.tracer.reads.resume(watching)
