"""Programs whose results take part in autograd: what ties them to it, and their backward programs.

A capture under grad mode leaves the autograd graph of PyTorch itself behind, made of fake tensors. Running that
graph under the tracer's modes records the operators of the backward pass, those of custom functions and of hooks
included. One backward program is recorded with the forward one and decides what is saved; another one is recorded
when a backward pass asks for other gradients or is given other ones (`loss.backward()` where the function also
returns logits): a gradient that is absent in eager is never replaced by zeros, for zero times infinity is NaN.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_autograd, _torch_capture, _torch_formulas, effects
from primexec.cut import made_again
from primexec.errors import CaptureError, SourceLine
from primexec.higher_order import add_placeholder
from primexec.program import Input, Program, Static
from primexec.tracer import Scope, Tracer

# Of each differentiable root the strides of its gradient, if it gets one. A contiguous gradient of a root whose
# strides depend on data has none to name.
CONTIGUOUS = ()
Gradients = tuple[tuple[int, ...] | None, ...]
# The gradients that arrive, those of which inputs are asked for, and, of a pass to be differentiated itself, which of
# those that arrive require grad.
Pass = tuple[Gradients, tuple[bool, ...], tuple[bool, ...] | None]
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # an operator and its arguments


def strides_of(gradient: Tensor) -> tuple[int, ...]:
    """The strides of a gradient of a root whose own strides depend on data."""
    return CONTIGUOUS if gradient.is_contiguous() else gradient.stride()


@dataclass(frozen=True, slots=True)
class View:
    """One step from a tensor to an alias of it, repeated outside of the program so that autograd sees it."""

    op: Any
    args: tuple[Any, ...]  # behind the tensor
    kwargs: dict[str, Any]
    grad_mode: bool  # whether the function made the alias under grad mode

    @classmethod
    def of(cls, node: fx.Node) -> View:
        op = effects.view_form(node.target) or node.target
        return cls(op, node.args[1:], dict(node.kwargs), node.meta.get("grad_mode", True))


@dataclass(frozen=True, slots=True)
class Result:
    """How a result is made: from an input or an output of the program, through views."""

    is_input: bool
    index: int
    views: tuple[View, ...] = ()


@dataclass(frozen=True, eq=False)
class Joint:
    """What ties a program to autograd.

    Attributes:
        inputs: positions of the program's inputs that may get gradients.
        roots: positions of its outputs that have gradients and own their memory.
        results: how each output that the function returns is made.
        places: for the name of an input or output its position: (whether it is an input, position).
        recorder: records backward programs.
    """

    inputs: tuple[int, ...]
    roots: tuple[int, ...]
    results: tuple[Result, ...]
    places: dict[str, tuple[bool, int]]
    recorder: Recorder


class Recorder:
    """The autograd graph that a capture left behind, and the backward programs recorded from it."""

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        roots: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        results: Sequence[fx.Node],
        save: str,
    ) -> None:
        self.tracer, self.name, self.save = tracer, name, save
        self.results = tuple(results)
        self._again: dict[fx.Node, _Call] | None = None  # what backward programs compute again
        self.roots, self.inputs = tuple(roots), tuple(inputs)
        strides = [n.meta["val"].stride() for n in roots]
        self.unknown = tuple(any(isinstance(s, _torch.SYMBOLS) for s in of_root) for of_root in strides)
        usual = (
            CONTIGUOUS if unknown else tuple(of_root) for of_root, unknown in zip(strides, self.unknown, strict=True)
        )
        self.usual: Pass = tuple(usual), (True,) * len(self.inputs), None
        self.operators: Counter[Any] = Counter()  # of the backward pass that was recorded last
        self.differentiable: tuple[bool, ...] = ()  # which of its gradients require grad
        # Hooks and custom functions may make of the sum of two gradients something else than the sum of two results.
        self.is_linear = not tracer.hooks and not _torch_autograd.runs_custom_functions([n.meta["val"] for n in roots])
        self._retained = [
            n for n in tracer.graph.nodes if isinstance(t := n.meta.get("val"), Tensor) and t.retains_grad
        ]
        if returned := next((n for n in self._retained if n in results), None):
            raise CaptureError(
                "the function returns a tensor on which it called retain_grad()",
                hint="call retain_grad() on what the traced function returns",
                source=returned.meta.get("source"),
            )
        # Passes may remove these nodes from the forward graph before another backward program is recorded.
        nodes = (n for n in tracer.graph.nodes if n.op == "call_function" and _is_step(n))
        self._operands: list[fx.Node] = [n.args[0] for n in tracer.graph.nodes if n.target in _KEEPING]
        self._steps: dict[fx.Node, tuple[Any, View]] = {n: (n.args[0], View.of(n)) for n in nodes}

    def record(self, passes: Sequence[Pass]) -> Program:
        """The program of a backward pass, or of one over the gradients of another one, which it runs again.

        Its inputs are the values it takes from the forward program, labelled with their names there, and the
        gradients that arrive at all passes. Its outputs are the gradients that the last one gives, None where there is
        none: of the inputs, and of the gradients that arrived at earlier passes.
        """
        tracer, forward = self.tracer, self.tracer.scope
        earlier = frozenset(tracer.inputs)
        tracer.scope = scope = Scope(forward)
        found: list[Any] = [n.meta["val"] for n in self.roots]
        inputs, arriving, given = [n.meta["val"] for n in self.inputs], list[Any](), list[Any]()
        retained = {n: n.meta["val"].grad for n in self._retained}
        try:
            environment = _torch_capture.capture_environment(tracer.entrances)
            with environment, _torch_autograd.autocast_off(), torch.enable_grad():
                for number, (gradients, needed, differentiable) in enumerate(passes):
                    inputs += [t for t in arriving if t is not None]
                    arriving = self._arriving(scope, found, gradients, differentiable)
                    given = [(root, t) for root, t in zip(found, arriving, strict=True) if t is not None]
                    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
                    reached = [root for root, _ in given]
                    if number:
                        self._check_repeatable(scope, reached)
                    with _torch_formulas.as_eager_chooses(reached, differentiable is not None):
                        asked = given, wanted, differentiable is not None
                        got = iter(tracer._stand_ins(tracer.run(_gradients, asked, {})))
                    found = [next(got) if need else None for need in needed]
            results = [None if g is None else tracer.node_of(g) for g in found]
            for operand in self._operands if self._again is None else ():  # the pass that decides what is saved
                tracer.node_of(operand.meta["val"])
            self.differentiable = tuple(g is not None and g.requires_grad for g in found)
            targets = [n.target for n in scope.graph.nodes if n.op == "call_function"]
            self.operators = Counter(t for t in targets if t is not operator.getitem)
        except BaseException:
            tracer.raise_failure()
            raise
        finally:
            tracer.scope = forward
            for node, grad in retained.items():  # nobody can ask for it, and the next pass would add to it
                node.meta["val"].grad = grad
            # They would look like tensors that escaped.
            found = inputs = arriving = given = wanted = reached = asked = got = None  # type: ignore[assignment]
        tracer.raise_failure()
        return self._program(scope, results, earlier)

    def _check_repeatable(self, scope: Scope, roots: list[Tensor]) -> None:
        """Raise where the passes recorded so far, which the program runs again, draw or write, or end in an error."""
        if _torch_autograd.raises_later(roots, [n.meta["val"] for n in self.inputs]):
            raise self._refused("reaches what is differentiable once only", None)
        outside, is_set = set(map(_torch.storage_key, scope.lifted)), False
        for node in (n for n in scope.graph.nodes if n.op == "call_function"):
            if node.target is _torch_capture.rng_operators()[1].set_rng_state.default:
                is_set = node.args[0].op == "placeholder"  # as a checkpoint does, until it puts back what it found
            writes = any(w.op == "placeholder" or effects.storage_of(w) in outside for w in effects.writes(node))
            if writes or (effects.is_random(node) and not is_set):
                what = "writes to memory outside of it" if writes else "draws random numbers"
                raise self._refused(what, node.meta.get("source"))

    def _refused(self, what: str, source: SourceLine | None) -> CaptureError:
        return CaptureError(
            f"a backward pass of {self.name} that is differentiated itself {what}",
            hint="call the function inside `with primexec.disable():`",
            source=source,
        )

    def _arriving(
        self, scope: Scope, roots: list[Any], gradients: Gradients, differentiable: tuple[bool, ...] | None
    ) -> list[Tensor | None]:
        """Stand-ins for the gradients of the roots."""
        requires = differentiable or (False,) * len(gradients)
        found: list[Tensor | None] = []
        for index, (root, strides, requires_grad) in enumerate(zip(roots, gradients, requires, strict=True)):
            tangent = None
            if strides is not None:
                like: Any = {"dtype": root.dtype, "device": root.device, "requires_grad": requires_grad}
                with _torch.modes_off(), self.tracer.fake_mode:
                    tangent = (
                        torch.empty(root.shape, **like)
                        if strides == CONTIGUOUS
                        else torch.empty_strided(root.shape, strides, **like)
                    )
                scope.bind(tangent, add_placeholder(scope.graph, f"gradient_{index}"))
            found.append(tangent)
        return found

    def _program(self, scope: Scope, results: list[fx.Node | None], earlier: frozenset[str]) -> Program:
        forward = self.tracer.scope
        lifted = {scope.nodes[_torch.identity(t)]: forward.nodes[_torch.identity(t)] for t in scope.lifted}
        taken = self._take_bases(scope.graph, lifted)
        made = {n: i for n in taken.values() if (i := self.tracer.inputs.get(n.name)) and i.input.kind == "constant"}
        roots = {f"gradient_{i}": n.name for i, n in enumerate(self.roots)}
        inputs, constants = [], []
        for node in scope.graph.nodes:
            if node.op == "placeholder" and taken.get(node) in made:
                constant = made[taken[node]]
                inputs.append(Input(node.name, "constant", constant.input.label))
                constants.append(constant.binding)
            elif node.op == "placeholder" and node in taken:
                inputs.append(Input(node.name, "saved", taken[node].name))
            elif node.op == "placeholder":
                inputs.append(Input(node.name, "tangent", f"of {roots.get(node.name, 'a gradient')}"))
        for node in made:
            if node.name not in earlier:  # made by the backward pass: the forward program may be compiled already
                self.tracer.graph.erase_node(node)
                del self.tracer.inputs[node.name]
        outputs = [n for n in results if n is not None]
        places = iter(range(len(outputs)))
        scope.graph.output(tuple(outputs))
        scope.alive.clear()
        scope.lifted.clear()
        return Program(
            name=f"{self.name}_backward",
            graph_module=_torch.graph_module(self.tracer.submodules, scope.graph, "Backward"),
            inputs=tuple(inputs),
            output_tree=None,
            output_leaves=tuple(Static(None) if n is None else next(places) for n in results),
            constants=tuple(constants),
        )

    def _take_bases(self, graph: fx.Graph, lifted: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Let the graph take tensors that own their memory, and make views of them itself.

        A view costs a microsecond, while one that is saved keeps the forward program from replaying `F.linear` whole.

        Args:
            lifted: placeholder → node of the forward graph.
        """
        taken: dict[fx.Node, fx.Node] = {}
        made: dict[fx.Node, fx.Node] = {}
        at = {source: placeholder for placeholder, source in lifted.items()}
        if self._again is None:
            cheap = self._made_again(lifted.values()) if self.save == "less" else {}
            nodes = [n for n in self.tracer.graph.nodes if n in cheap and n not in self._steps]
            self._again = {n: (n.target, n.args, n.kwargs) for n in nodes}
        again = self._again
        last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), graph._root)

        def make(node: fx.Node) -> fx.Node:
            nonlocal last
            if node in made:
                return made[node]
            source: Any
            source, step = self._steps.get(node, (None, None))
            if node in again:
                last = new = self._made(graph, node, fx.node.map_arg(again[node], make), last)
            elif step is None or (step.op in _FRESH and node in node.graph.nodes):
                new = at.get(node) or add_placeholder(graph, node.name)
                new.name = new.target = graph._graph_namespace.create_name(f"saved_{node.name}", None)
                new.meta["spec"] = node.meta["spec"]
                taken[new] = node
            elif step.op in _SAME:
                new = make(source)
            else:
                last = new = self._made(graph, node, (step.op, (make(source), *step.args), step.kwargs), last)
            made[node] = new
            return new

        wanted = _sources(lifted.values(), again, self._steps)
        for node in again:  # in order: a chain of them may be longer than Python's stack is deep
            if node in wanted:
                make(node)
        for placeholder, node in lifted.items():
            new = make(node)
            if new is not placeholder:
                placeholder.replace_all_uses_with(new)
                graph.erase_node(placeholder)
        if not any(effects.writes(n) for n in graph.nodes if n.op == "call_function"):
            for new in reversed(made.values()):
                if new.op == "call_function" and new.users:
                    min(new.users).prepend(new)  # what is made early is kept long
        self.tracer.taken.update(taken)
        return taken

    def _made_again(self, needed: Collection[fx.Node]) -> Mapping[fx.Node, float]:
        """What is computed again; after the forward program, whose memory is never written to later.

        Memory that the caller can see, of inputs and results, is saved only where eager saves it: a change of it before
        the backward pass is an error then, and only then. Parameters cost nothing: they live on.
        """
        inputs = (n for n in self.tracer.graph.nodes if n.op == "placeholder")
        seen = {effects.storage_of(n) for n in (*self.results, *inputs)} - {effects.storage_of(n) for n in needed}

        def cost(node: fx.Node) -> float:
            if effects.storage_of(node) in seen:
                return math.inf
            return 0 if isinstance(node.meta["val"], torch.nn.Parameter) else effects.nbytes(node)

        return made_again(dict.fromkeys(needed, math.inf), cost)

    def _made(self, graph: fx.Graph, node: fx.Node, call: _Call, last: fx.Node) -> fx.Node:
        """A node of a backward graph that makes the value of a node of the forward graph again."""
        sources: list[fx.Node] = []
        fx.node.map_arg(call, sources.append)
        with graph.inserting_after(max((last, *sources))):
            new = graph.call_function(*call)
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        self.tracer.taken[new] = node
        return new


def _sources(
    nodes: Iterable[fx.Node], again: Mapping[fx.Node, _Call], steps: Mapping[fx.Node, tuple[Any, View]]
) -> set[fx.Node]:
    """The nodes, and what they are made again from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            fx.node.map_arg(again.get(node) or steps.get(node, (None,))[0], waiting.append)
    return found


# Their first argument is kept for second derivatives, and read by first ones under `create_graph=True` only.
_KEEPING = frozenset(
    {
        torch.ops.aten._linalg_solve_ex.default,
        torch.ops.aten._linalg_det.default,
        torch.ops.aten._linalg_slogdet.default,
    }
)
_FRESH = frozenset({torch.ops.aten.lift_fresh_copy.default})
_SAME = frozenset({torch.ops.aten.detach.default, *_FRESH})


def _is_step(node: fx.Node) -> bool:
    return node.target in _FRESH or (effects.is_view(node) and not effects.stands_alone(node))


def _gradients(given: list[tuple[Tensor, Tensor]], wanted: list[Tensor], twice: bool) -> tuple[Tensor | None, ...]:
    if not given:
        return (None,) * len(wanted)
    outputs, tangents = zip(*given, strict=True)
    # The graph stays: other gradients may be asked for later.
    return torch.autograd.grad(outputs, wanted, tangents, retain_graph=True, create_graph=twice, allow_unused=True)


def _owns_memory(node: fx.Node) -> bool:
    """Whether a tensor that changed its own shape made its memory, and so is no alias of another one."""
    while effects.changes_metadata(node.target):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "call_function" and not effects.aliases_input(node)


def result_of(node: fx.Node) -> tuple[fx.Node, tuple[View, ...]]:
    """The node that made the memory of a result, and the views that lead from it to the result.

    Raises:
        CaptureError: where autograd cannot be shown how the result aliases it.
    """
    views: list[View] = []
    while node.op == "call_function" and effects.aliases_input(node):
        if effects.stands_alone(node) or (node.meta["val"].requires_grad and not node.meta["grad_mode"]):
            break  # the latter where a custom autograd function returned an alias
        if effects.changes_metadata(node.target) and _owns_memory(node):
            break
        source = node.args[0]
        if node.target is operator.getitem and isinstance(source, fx.Node):
            views.append(View.of(node))
            node, source = source, source.args[0]
        view = _with_size_inferred(View.of(node))
        others: list[fx.Node] = []
        fx.node.map_arg((view.args, view.kwargs), others.append)
        if (
            not isinstance(source, fx.Node)
            or others
            or (effects.has_effect(node) and not effects.view_form(node.target))
        ):
            raise CaptureError(
                f"the function returns an alias of a tensor, made by {node.target}, which autograd cannot follow",
                hint="return a clone of it, or call under torch.no_grad()",
                source=node.meta.get("source"),
            )
        views.append(view)
        node = source
    return node, tuple(reversed(views))


def _with_size_inferred(view: View) -> View:
    """The same view by plain numbers, where only one size depends on data: the others tell it."""
    sizes: Any = view.args[0] if view.op is torch.ops.aten.view.default else ()
    if 0 in sizes or sum(isinstance(n, fx.Node) for n in sizes) != 1:
        return view
    return replace(view, args=([-1 if isinstance(n, fx.Node) else n for n in sizes],))
