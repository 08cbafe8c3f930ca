"""Python callable → Program: run it once on fake tensors and record every operator.

The recording sits at the Python dispatch key, above fake tensors and below autograd: what is recorded is
the sequence of ATen operators that eager itself would run, operators that change a tensor in place
included. Replaying the sequence on real tensors repeats eager's values, mutation, aliasing and random
draws, whatever memory the inputs share.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import traceback
import types
from collections.abc import Callable, Iterator, Set, ValuesView
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from primexec import (
    _torch,
    _torch_autograd,
    _torch_capture,
    _torch_packed,
    arrays,
    draws,
    effects,
    functions,
    numbers,
    statics,
)
from primexec._torch import pytree
from primexec.bytecode import user_source_of
from primexec.calls import COPY_HINT
from primexec.captured import Captured, FirstUse, Signature
from primexec.config import logger
from primexec.decided_first import decide_first
from primexec.decisions import Decisions, Undo
from primexec.errors import CaptureError, SourceLine
from primexec.identities import Found, with_identities
from primexec.instances import Part, StandIns, is_object, opened, parts, taken_apart
from primexec.joint import Joint, Recorder, Result, View, result_of
from primexec.left_behind import Assigned, assigned, changed_numbers, side_effect, side_effects, store
from primexec.paths import by_path
from primexec.program import Program, Static
from primexec.random_state import RandomState
from primexec.reads import Reads
from primexec.shadow import Shadows
from primexec.tracer import Tracer

_log = logger("trace")

_RUNS_LATER = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_GRAD_HINT = "call it under torch.no_grad(), or work on a clone of the tensor"


def capture(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: Signature,
    save: str = "default",
    varying: frozenset[str] = frozenset(),
    earlier: Captured | None = None,
    known: Decisions = (),
    counts: bool = False,
) -> Captured:
    """Trace one call; once more where it sets something up in Python that a second call would find.

    Numbers that each call changes, such as counters, are read and written by the program.

    Args:
        save: "less" to compute cheap values again in backward rather than save them, "default", or "more".
        varying: labels of numbers that the program takes as inputs: arguments, attributes, what stands in dicts.
        earlier: the first of two traces.
        known: what is known of the values that the function decides by.
        counts: whether sizes may be numbers that vary, a program for each, because the function changes them.

    Raises:
        CaptureError: where the call cannot be captured soundly. What the user's own code raises passes
            through unchanged; what it did to Python state is undone.
    """
    leaves, tree = _torch.flatten(whole := opened((args, kwargs)))
    labels = signature.labels(*whole)
    try:
        for leaf, label in zip(leaves, labels, strict=True):
            _check_argument(leaf, label)
        reads = Reads(fn, varying)
        for leaf, label in zip(leaves, labels, strict=True):
            if not isinstance(leaf, (Tensor, torch.Generator)):
                reads.reach(leaf, label)
    except CaptureError as error:
        raise_located(error, fn)
    for part, _ in parts((args, kwargs)):
        reads.reach(type(part), type(part).__name__)
    first_use = earlier.first_use if earlier is not None else None
    shadows = Shadows(first_use.attributes if first_use else {})
    tracer = Tracer(reads, shadows, known)
    tracer.number_inputs.counts = counts
    before, same_globals, grad = RandomState(), _torch.global_state_check(), torch.is_grad_enabled()
    try:
        captured = _capture(fn, (args, kwargs), leaves, labels, tree, tracer, shadows, signature.name, save)
        if first_use and captured.first_use:
            raise first_use.error
    except BaseException as error:
        reads.restore()
        if earlier is not None:
            earlier.reads.restore()
        torch.set_grad_enabled(grad)
        changed = before.changes(reads)
        if not isinstance(error, CaptureError):
            raise
        raise_located(changed or (first_use and first_use.error) or error, fn)
    if (changed := before.changes(reads)) is not None:
        raise_located(changed, fn)
    if not same_globals():
        torch.set_grad_enabled(grad)
        raise_located(
            CaptureError("the function leaves grad mode or a default of torch changed", hint="restore it"), fn
        )
    if captured.first_use is not None:
        try:
            if captured.first_use.kept:
                reads.restore()
                raise_located(captured.first_use.error, fn)
            for store in captured.stores:
                if store.plain and id(store.held) not in captured.first_use.attributes:
                    store.run()
            return capture(fn, args, kwargs, signature, save, varying, captured, known)
        except CaptureError as error:
            counters = captured.first_use.numbers
            if counters <= varying:
                raise
            try:
                return capture(fn, args, kwargs, signature, save, varying | counters, known=known, counts=True)
            except Exception:  # of the user's code, too, which may raise none with plain numbers
                raise error from None
        except Exception as error:
            if not left_the_function(error):
                raise
            return captured  # a second trace finds tensors as they were, which need not fit what else was set up
    if earlier is not None:
        reads.restore()
        earlier.reads.restore()
        captured = replace(captured, first_use=first_use)
    found = tracer.number_inputs
    captured = by_path(replace(captured, varying=found.arguments, conditions=tuple(found.conditions)))
    try:
        reads.pin_numbers()
    except CaptureError as error:
        raise_located(error, fn)
    reads.settle()
    _log.debug("%s", captured.program)
    return captured


def _capture(
    fn: Any,
    arguments: Any,
    leaves: list[Any],
    labels: list[str],
    tree: Any,
    tracer: Tracer,
    shadows: Shadows,
    name: str,
    save: str,
) -> Captured:
    run = shadows.function(fn)
    inputs = tracer.number_inputs
    try:
        inputs.start()
        given = arrays.Arguments(tracer)
        fakes = [given.stand_in(leaf, i, label) for i, (leaf, label) in enumerate(zip(leaves, labels, strict=True))]
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, tree)
        _torch_packed.note_counts(tracer.fake_mode, (fake_args, fake_kwargs))
        stand_ins = StandIns((fake_args, fake_kwargs), arguments)
        drawn = functools.partial(numbers.drawn, tracer)
        environment = _torch_capture.capture_environment(tracer.entrances)
        with environment as passes, draws.recorded(drawn), functions.recorded(), arrays.taken():
            result = tracer.run(run, fake_args, fake_kwargs)
    except BaseException as error:
        if _torch.asks_unknown_size(error):
            tracer.unknown_size(user_source_of(error))
        if _torch_autograd.left_the_trace(error):
            tracer.fail(
                "backward() goes on into the history of an argument, outside of the traced function",
                "call backward() on what the traced function returns, or pass a leaf",
                user_source_of(error),
            )
        tracer.raise_failure()
        raise
    finally:
        inputs.put_back()
        tracer.rehearsal.clear()
        tracer.reads.cached_calls.put_back()
        tracer.reads.drop_keys(_torch.is_fake_class)
    tracer.raise_failure()
    if passes:
        tracer.gradients.check_hooks()
    captured = _finish(tracer, shadows, stand_ins, result, name, save, bool(passes))
    shadows.clear()
    del run, result, given, fakes, fake_args, fake_kwargs, stand_ins
    try:
        tracer.check_escapes()
    except CaptureError:
        if captured.first_use is None:
            raise
        return replace(captured, first_use=replace(captured.first_use, kept=True))
    return captured


def left_the_function(error: Exception) -> bool:
    """Whether an exception came out of the function that was traced."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return (_capture.__code__, Tracer.run.__code__) in itertools.pairwise(codes)


def raise_located(error: CaptureError, fn: Any) -> NoReturn:
    """Raise the error; where it knows no line, with the line at which the function is defined."""
    if error.source is not None:
        raise error
    while isinstance(fn, functools.partial):
        fn = fn.func
    target = getattr(type(fn), "forward", None) if isinstance(fn, torch.nn.Module) else fn
    if isinstance(target, (types.FunctionType, types.MethodType)):
        target = inspect.unwrap(target)
    code = getattr(target, "__code__", None)
    source = code and SourceLine(code.co_filename, code.co_firstlineno, code.co_qualname)
    raise CaptureError(error.reason, hint=error.hint, source=source) from error.__cause__


def _instead_of(leaf: object) -> str:
    """What may be passed in place of an argument."""
    if statics.is_array(leaf):
        return "pass an array that torch.from_numpy() takes, such as array.copy()"
    if isinstance(leaf, (Set, Iterator, ValuesView)):
        return "pass a list or tuple of what is in it"
    return "pass tensors and plain values, or register the class with torch.utils._pytree.register_pytree_node"


def _check_argument(leaf: object, label: str) -> None:
    if isinstance(leaf := statics.of_array(leaf), Tensor):
        reason = statics.tensor_problem(leaf)
        if reason:
            raise CaptureError(f"{label} is {reason}", hint="pass a plain strided tensor")
    elif not isinstance(leaf, torch.Generator) and statics.freeze_argument(leaf) is None:
        raise CaptureError(
            f"{label} is of type {type(leaf).__qualname__}, which can be neither traced nor compared",
            hint=_instead_of(leaf),
        )


def _check_memory(tracer: Tracer) -> None:
    """Where results require grad, inputs that do so keep their memory: what was made of it before has a history."""
    for node in filter(effects.moves_memory, tracer.graph.nodes):
        if any(w.op == "placeholder" and w.meta["val"].requires_grad for w in effects.writes(node)):
            raise CaptureError(
                "the function gives an input that requires grad other memory, and returns what requires grad",
                hint="write into it: t.copy_(...) under torch.no_grad()",
                source=node.meta["source"],
            )


def _finish(
    tracer: Tracer, shadows: Shadows, stand_ins: StandIns, result: Any, name: str, save: str, runs_backward: bool
) -> Captured:
    changes: list[CaptureError] = []
    left = assigned(tracer, shadows, changes)

    def found(value: Any) -> bool:
        if tracer.number_inputs.is_list(value):
            raise CaptureError(
                "the function returns or keeps a list of numbers that it found", hint="make a copy of it"
            )
        return tracer.reads.pin(value)

    *values, result = with_identities((*(a.value for a in left), result), stand_ins.nodes(), found)
    result, parts_changed = _left_in_arguments(stand_ins, result)
    leaves, tree = _torch.flatten(result)
    outputs: list[fx.Node] = []
    places: list[int | Static] = []
    for leaf in leaves:
        node = tracer.output(leaf)
        if node is None:
            if any(isinstance(n, _torch.SYMBOLS) for n in (leaf if isinstance(leaf, torch.Size) else (leaf,))):
                raise tracer.unknown_size()
            value = shadows.adopt(leaf)
            if isinstance(leaf, _RUNS_LATER):
                raise CaptureError(
                    f"the function returns a {type(leaf).__name__}, whose code runs later, outside of the trace",
                    hint="return a list, or trace the functions that it calls",
                )
            if not isinstance(leaf, Found) and not _is_constant(value, tracer.reads):
                raise CaptureError(
                    f"the function returns an object of type {leaf.__class__.__qualname__}, which cannot be rebuilt",
                    hint="return tensors and plain values in tuples, lists and dicts, or in an object of plain "
                    "attributes that nobody else holds, or register the class with "
                    "torch.utils._pytree.register_pytree_node",
                )
            places.append(Static(value))
        else:
            places.append(len(outputs))
            outputs.append(node)
    stores = [store(tracer, a, value, outputs) for a, value in zip(left, values, strict=True)]
    del left, values
    for (part, key, label), value in parts_changed:
        for leaf in _torch.flatten(value)[0]:
            if tracer.output(leaf) is None and not _is_constant(leaf, tracer.reads):
                raise side_effect(label, str(key), tracer.reads)
        stores.append(store(tracer, Assigned(part, key, value, label), value, outputs))
    reached = tracer.reads.reached() if stand_ins.objects or parts_changed else {}
    stand_ins.check_apart(reached, [target for target, _ in parts_changed])
    differentiable = [node for node in outputs if node.op != "placeholder" and _needs_autograd(node.meta["val"])]
    changes += side_effects(tracer.reads)
    tracer.check_metadata(_GRAD_HINT)
    if differentiable:
        tracer.gradients.check_switched()
        _check_memory(tracer)
    tracer.literals.check(outputs)
    tracer.entrances.before_backward([n.meta["val"] for n in differentiable])
    joint, extras, backward = _join(tracer, name, outputs, differentiable, save) if differentiable else (None, [], None)
    if backward is not None and tracer.gradients.has_replaced({i.label for i in backward.inputs if i.kind == "saved"}):
        raise CaptureError("the .data of a tensor is replaced that a backward pass needs", hint=COPY_HINT)
    tracer.number_inputs.check_kept()
    if differentiable and not changes:  # hooks and custom functions ran in a backward pass, which is none of a call
        for change in side_effects(tracer.reads):
            raise change
    apart = decide_first(tracer) if tracer.deciding.made else ()
    tracer.graph.output((*outputs, *extras))
    tracer.graph.on_generate_code(lambda _: _spell_keywords)
    graph_module = _torch.graph_module(tracer.submodules, tracer.graph, name.title().replace("_", ""))
    kinds: dict[str, list[Any]] = {"argument": [], "state": [], "constant": []}
    for i in tracer.inputs.values():
        kinds[i.input.kind].append(i.binding)
    program = Program(
        name=name,
        graph_module=graph_module,
        inputs=tuple(i.input for i in tracer.inputs.values()),
        output_tree=tree,
        output_leaves=tuple(places),
        stored=tuple((s.label, leaf) for s in stores for leaf in s.leaves),
        calls=tuple(tracer.calls),
        extras=len(extras),
        constants=tuple(kinds["constant"]),
        backward=backward,
    )
    return Captured(
        program=program,
        arguments=tuple(kinds["argument"]),
        states=tuple(kinds["state"]),
        tied=tuple(tracer.tied.values()),
        stores=tuple(stores),
        without_gradient=tuple(tracer.gradients.absent()),
        runs_backward=runs_backward,
        reads=tracer.reads,
        joint=joint,
        uses_layout=tracer.uses_layout,
        uses_sdpa=tracer.uses_sdpa,
        inference_segments=tracer.inference_segments,
        decisions=tracer.deciding.made,
        undo=Undo.of(tracer.graph) if tracer.deciding.made else Undo(),
        apart=apart,
        reached=frozenset(i for i, value in reached.items() if is_object(value)),
        first_use=FirstUse(changes[0], shadows.left(), changed_numbers(tracer, shadows)) if changes else None,
    )


def _is_constant(value: object, reads: Reads) -> bool:
    """Whether a value that is no tensor is the same at every call."""
    return statics.freeze_found(value) is not None and not reads.made_inside(value)


def _left_in_arguments(stand_ins: StandIns, result: Any) -> tuple[Any, list[tuple[tuple[Part, Any, str], Any]]]:
    """What the function returned and what it left in its arguments: (part, key, label) and value; nobody else's."""
    changes = stand_ins.changes()
    results = (result, *(value for _, _, value, _ in changes))
    targets = [(part, key, label) for part, key, _, label in changes]
    changes.clear()
    result, *values = taken_apart(results, stand_ins)
    return result, list(zip(targets, values, strict=True))


def _join(
    tracer: Tracer, name: str, outputs: list[fx.Node], differentiable: list[fx.Node], save: str
) -> tuple[Joint, list[fx.Node], Program]:
    """What ties the program to autograd, the outputs that it needs besides, and the backward program."""
    placeholders = tracer.graph.find_nodes(op="placeholder")
    wanted = [n for n in placeholders if isinstance(t := n.meta.get("val"), Tensor) and t.requires_grad]
    inside = next((n for n in differentiable if n.meta["val"].is_leaf), None)
    if inside is not None or not wanted or not torch.is_grad_enabled():
        raise CaptureError(
            "the result requires grad, but not because of an input under grad mode",
            hint="call requires_grad_() and enable grad outside of the traced function",
            source=(inside or differentiable[0]).meta.get("source"),
        )
    made = [_result(node) for node in outputs]
    roots = list(dict.fromkeys(root for node, (root, _) in zip(outputs, made, strict=True) if node in differentiable))
    roots = [r for r in roots if r.op != "placeholder"]
    recorder = Recorder(tracer, name, roots, wanted, outputs, save)
    try:
        backward = recorder.record([recorder.usual])
    except RuntimeError as error:
        if not _torch_autograd.graph_is_freed(error):
            raise
        # The function ran a backward pass through it; another one raises when it is run, as in eager.
        recorder.usual = (None,) * len(roots), *recorder.usual[1:]
        backward = recorder.record([recorder.usual])
    placeholders = tracer.graph.find_nodes(op="placeholder")  # hooks may have used others than the function did
    forward = {n.name: n for n in tracer.graph.nodes}
    taken = [forward[i.label] for i in backward.inputs if i.kind == "saved"]
    sources = [root for root, _ in made if root.op != "placeholder"]
    extras = [n for n in dict.fromkeys((*sources, *taken)) if n.op != "placeholder" and n not in outputs]
    places = {n: i for i, n in enumerate((*outputs, *extras))}
    results = [
        Result(
            root.op == "placeholder", (placeholders.index if root.op == "placeholder" else places.__getitem__)(root), v
        )
        for root, v in made
    ]
    joint = Joint(
        inputs=tuple(map(placeholders.index, wanted)),
        roots=tuple(places[n] for n in roots),
        results=tuple(results),
        places={
            n.name: (n.op == "placeholder", i) for i, n in (*enumerate((*outputs, *extras)), *enumerate(placeholders))
        },
        recorder=recorder,
    )
    return joint, extras, backward


def _result(node: fx.Node) -> tuple[fx.Node, tuple[View, ...]]:
    try:
        return result_of(node)
    except CaptureError:
        if _needs_autograd(node.meta["val"]):
            raise
        return node, ()


def _spell_keywords(body: list[str]) -> list[str]:
    """The overload `aten.random_.from` is named by a keyword, which FX writes out as it is."""
    return [re.sub(r"(torch\.ops\.aten\.\w+)\.from\(", r"getattr(\1, 'from')(", line) for line in body]


def _needs_autograd(t: object) -> bool:
    """Whether a result takes part in autograd. Under no_grad a view of a leaf requires grad as the leaf does."""
    return isinstance(t, Tensor) and t.requires_grad and (t.grad_fn is not None or not t._is_view())
