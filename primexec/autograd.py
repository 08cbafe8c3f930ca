"""Runs programs under autograd: one node of PyTorch's autograd graph for a call of a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from primexec import _torch, _torch_autograd, batched, effects, replayed, twice
from primexec._torch_dynamo import capture_lock
from primexec.errors import PrimexecError
from primexec.joint import Joint, Pass, strides_of
from primexec.partition import Plan
from primexec.program import Program, Static
from primexec.runtime import Executable

Compile = Callable[..., Executable]  # of a program, perhaps `boxed`


# From the saved values, in a list that is emptied, and the gradients of the roots to what `Function.backward` returns.
Backward = Callable[..., Sequence[Tensor | None]]


class Training:
    """Runs a program, and its backward programs once gradients arrive."""

    def __init__(self, joint: Joint, forward: Executable, compile_: Compile) -> None:
        self.joint, self.forward, self.compile = joint, forward, compile_
        self.compiles = 0  # of regions of backward programs
        self.compiled: Callable[[], Callable[[int], None] | None] = lambda: None  # gives what is told of later ones
        self.program = forward.plan.program
        backward: Any = self.program.backward
        self.saved = [(i.label, *joint.places[i.label]) for i in backward.inputs if i.kind == "saved"]
        self._positions = {name: i for i, (name, _, _) in enumerate(self.saved)}
        self._backward: dict[tuple[Pass, ...], Backward] = {}
        self._plans: dict[Any, Plan] = {}
        self.differentiable: dict[tuple[Pass, ...], tuple[bool, ...]] = {}  # which gradients require grad themselves
        self.enter = self._write_forward()
        self.leave = self._write_backward()

    def plan(self) -> Plan:
        """Of the backward program that decided what is saved."""
        usual = (self.joint.recorder.usual,)
        if usual not in self._backward:
            self.record(usual)
        return self._plans[usual]

    def saved_bytes(self) -> tuple[int, int]:
        """How many bytes are kept for backward, and how many eager keeps; memory that is shared counts once."""
        recorder = self.joint.recorder
        inputs = self.program.graph_module.graph.find_nodes(op="placeholder")
        values = [(inputs if given else self.program.outputs)[i].meta["val"] for _, given, i in self.saved]
        ours = {_torch.storage_key(v): v.untyped_storage().nbytes() for v in values}
        eager = _torch_autograd.saved_by_autograd([n.meta["val"] for n in recorder.roots])
        return sum(ours.values()), sum(eager.values())

    def write_run(self) -> Callable[..., list[Any]]:
        """From the program's inputs to what the function returns, tied to autograd.

        Written out, as guards are: loops over positions would cost as much as a small program.
        """
        joint = self.joint
        names = [f"i{n}" for n in range(len(self.program.inputs))]
        namespace: dict[str, Any] = {"apply": _apply, "training": self}
        lines = [f"def run({', '.join(names)}):"]
        if joint.roots:
            tied = [names[i] for i in joint.inputs]
            roots = ", ".join([*(f"r{n}" for n in joint.roots), *self.besides])
            lines.append(f"  made = []; [{roots}] = apply({', '.join(['training', _tuple(names), 'made', *tied])})")
        else:  # nothing but views of inputs
            namespace |= {"no_grad": torch.no_grad, "forward": self.forward.run}
            lines += ["  with no_grad():", f"    made = forward({', '.join(names)})"]
        results = []
        for number, result in enumerate(joint.results):
            source = f"r{result.index}" if result.index in joint.roots else f"made[{result.index}]"
            source = names[result.index] if result.is_input else source
            for step, view in enumerate(result.views):
                place = f"_{number}_{step}"
                namespace |= {f"view{place}": view.op, f"args{place}": view.args, f"kwargs{place}": view.kwargs}
                call = f"v{number} = view{place}({source}, *args{place}, **kwargs{place})"
                namespace["grad_mode"] = torch.set_grad_enabled
                lines += [f"  with grad_mode({view.grad_mode}):", f"    {call}"]
                source = f"v{number}"
            results.append(source)
        lines.append(f"  return [{', '.join(results)}]")
        return _written("run", lines, namespace)

    def _write_forward(self) -> Callable[..., tuple[Tensor, ...]]:
        """Runs the program inside of `Function.forward`, and saves what backward takes."""
        made = [f"o{n}" for n in range(len(self.program.outputs))]
        saved = [f"inputs[{i}]" if is_input else made[i] for _, is_input, i in self.saved]
        returned, own = [made[i] for i in self.joint.roots], self._alone()
        ties = [] if self.leads_to_inputs() else [*(made[i] for i in self._ties(own)), "tie"][:1]
        alone = [made[i] for i in own if made[i] in returned + ties]
        self.tie = [*saved, *ties].index(ties[0]) if ties else None
        self.besides = ["_" for tie in ties if tie not in returned]
        # As in eager, grad mode is on for kernels. Where one raises, what called `forward` sets it back.
        asks = self.forward.asks_grad_mode
        lines = [
            "def enter(context, inputs, made):",
            "  set_grad(True)" if asks else "",
            f"  {'with below_autograd(): ' * asks}made += forward(*inputs)",
            "  set_grad(False)" if asks else "",
            f"  [{', '.join(made)}] = made",
            *(f"  if {o}._is_view(): {o} = alone({o})" for o in alone),
            "  tie = detach(link)" if ties == ["tie"] else "",
            "  context.materialize_grads = False",
            f"  context.to_save = {_tuple(list(dict.fromkeys(saved + ties)))}",
            f"  return {_tuple(list(dict.fromkeys(returned + ties)))}",
        ]
        namespace = {"below_autograd": _torch_autograd.below_autograd(), "set_grad": _torch.set_grad_enabled}
        namespace |= {"alone": _torch.alone, "detach": Tensor.detach, "link": twice.LINK}
        return _written("enter", lines, {"forward": self.forward.run, **namespace})

    def _alone(self) -> list[int]:
        """Positions of the outputs whose memory is no other output's or input's."""
        graph = self.program.graph_module.graph
        nodes = [*self.program.outputs, *(n for n in graph.nodes if n.op == "placeholder")]
        uses = Counter(map(effects.storage_of, nodes))
        return [i for i, n in enumerate(self.program.outputs) if uses[effects.storage_of(n)] == 1]

    def _ties(self, alone: list[int]) -> list[int]:
        """Positions of saved outputs by which passes over the program can be tied to its node, the cheapest first."""
        saved = {i for _, is_input, i in self.saved if not is_input}
        seen = {result.index for result in self.joint.results if not result.is_input}
        floats = [i for i in alone if self.program.outputs[i].meta["val"].is_floating_point()]
        return [*(i for i in self.joint.roots if i in saved), *(i for i in floats if i in saved - seen)]

    def _positions_of_inputs(self) -> list[int | None]:
        """Where the inputs that may get gradients are among what is saved."""
        at = {i: n for n, (_, is_input, i) in enumerate(self.saved) if is_input}
        return [at.get(i) for i in self.joint.inputs]

    def leads_to_inputs(self) -> bool:
        """Whether passes over the program can be tied to its inputs themselves: they are saved, or leaves."""
        recorder = self.joint.recorder
        at = zip(self._positions_of_inputs(), recorder.inputs, strict=True)
        known = all(i is not None or isinstance(n.meta["val"], torch.nn.Parameter) for i, n in at)
        return known and recorder.is_linear

    def is_tied(self, context: Any) -> bool:
        """Whether a pass over a node is tied to the node itself."""
        return bool(context.passes) or self.tie is not None

    def held(self, context: Any) -> tuple[list[Tensor], list[Tensor]]:
        """What a node saved for backward programs, and what ties passes to it: an output of it, or its inputs."""
        tensors = list(context.saved_tensors)
        if context.passes:
            return tensors[:-1], tensors[-1:]
        if self.tie is not None:
            return tensors[: len(self.saved)], [tensors[self.tie]]
        edges = zip(self._positions_of_inputs(), context.next_functions, strict=True)
        return tensors, [node.variable if i is None else tensors[i] for i, (node, _) in edges]

    def _write_backward(self) -> Callable[..., Sequence[Tensor | None]]:
        """What `Function.backward` does: finds the program for the gradients that it gets, and those asked for."""
        given = [f"g{n}" for n in range(len(self.joint.roots))]
        unknown = self.joint.recorder.unknown
        strides = [f"strides({g})" if u else f"{g}.stride()" for g, u in zip(given, unknown, strict=True)]
        found = _tuple([f"None if {g} is None else {s}" for g, s in zip(given, strides, strict=True)])
        # A gradient may be told from its memory by a bit, which a kernel does not see.
        roots = [self.program.outputs[i].meta["val"] for i in self.joint.roots]
        lazy = [(g, "neg") for g in given]
        lazy += [(g, "conj") for g, root in zip(given, roots, strict=True) if root.is_complex()]
        # The node would not run if the gradient of its only input were not asked for.
        needed = "(True,)" if len(self.joint.inputs) == 1 else "needed(context)"
        run = f"run(take_saved(context), {', '.join(given)})"
        again = f"({'None, ' * twice.NOT_DIFFERENTIABLE}*gradients_of(context, {_tuple(given)}))"
        are_batched = " or ".join(["False", *(f"{g} is not None and is_batched({g})" for g in given)])
        lines = [
            f"def leave({', '.join(['context', *given, *self.besides])}):",
            f"  if is_grad_enabled() or context.left: return {again}",
            f"  if {are_batched}: return one_by_one(context, {_tuple(given + self.besides)})",
            *(f"  if {g} is not None and {g}.is_{bit}(): {g} = {g}.resolve_{bit}()" for g, bit in lazy),
            f"  key = ({found}, {needed}, None),",
            "  run = programs.get(key) or context.training.record(key)",
            f"  if not any_autocast_enabled(): return {run}",
            f"  with autocast_off(): return {run}",
        ]
        namespace = {"programs": self._backward, "strides": strides_of, "is_grad_enabled": torch.is_grad_enabled}
        namespace |= {"is_batched": _torch_autograd.is_batched, "one_by_one": batched.one_by_one}
        namespace["gradients_of"] = twice.gradients_of
        namespace |= {"needed": _torch_autograd.needed_gradients, "take_saved": _torch_autograd.take_saved}
        namespace |= {"any_autocast_enabled": _torch.any_autocast_enabled, "autocast_off": _torch_autograd.autocast_off}
        return _written("leave", lines, namespace)

    def backward(self, passes: tuple[Pass, ...]) -> Backward:
        """What runs a backward pass behind earlier ones."""
        return self._backward.get(passes) or self.record(passes)

    def record(self, passes: tuple[Pass, ...]) -> Backward:
        """The backward program for gradients that arrive for the first time, compiled.

        That of the capture is compiled no earlier: often others arrive, such as none for all results but a loss.
        """
        recorder = self.joint.recorder
        with capture_lock():
            if (there := self._backward.get(passes)) is not None:  # of another thread
                return there
            if passes == (recorder.usual,):
                program: Any = self.program.backward
            else:
                program = recorder.record(passes)
                self.differentiable[passes] = recorder.differentiable
                recorder.tracer.complete_metadata([program.graph_module.graph])
            executable = self.compile(program, boxed=True)
            self.compiles += executable.compiles
            if (told := self.compiled()) is not None:
                told(executable.compiles)
            self._plans[passes] = executable.plan
            run = self._backward[passes] = self._joined(program, passes, executable)
        return run

    def _joined(self, program: Program, passes: tuple[Pass, ...], executable: Executable) -> Backward:
        """What stands between a backward program and autograd, written out.

        It takes what was saved out of the list, so that each tensor goes when the program has used it; behind it are
        the gradients that arrived at earlier passes.
        """
        given = [f"g{n}" for n in range(len(passes[-1][0]))]
        before = sum(strides is not None for gradients, _, _ in passes[:-1] for strides in gradients)
        arriving = iter(
            [
                *(f"saved[{len(self.saved) + n}]" for n in range(before)),
                *(name for name, strides in zip(given, passes[-1][0], strict=True) if strides is not None),
            ]
        )
        constants = iter(f"constants[{i}]" for i in range(len(program.constants)))
        inputs = []
        for i in program.inputs:
            if i.kind == "saved" and i.label not in self._positions:
                what = f"the backward pass of {program.name} needs {i.label}, which was not saved"
                raise PrimexecError(f"{what}\nWhat to do: call the function inside `with primexec.disable():`")
            place = {"tangent": arriving, "constant": constants}.get(i.kind)
            inputs.append(f"saved[{self._positions[i.label]}]" if place is None else next(place))
        found = ["None" if isinstance(leaf, Static) else f"out[{leaf}]" for leaf in program.output_leaves]
        lines = [
            f"def backward(saved, {', '.join(given)}):",
            f"  args = [{', '.join(inputs)}]",
            "  saved.clear()",
            "  out = run(args)",
            f"  return {_tuple(['None'] * twice.NOT_DIFFERENTIABLE + found)}",
        ]
        return _written("backward", lines, {"run": executable.run, "constants": program.constants})


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)}{',' * (len(names) == 1)})"


def _written(name: str, lines: list[str], namespace: dict[str, Any]) -> Callable[..., Any]:
    exec(compile("\n".join(lines), f"<primexec {name}>", "exec"), namespace)
    return namespace.pop(name)  # type: ignore[no-any-return]  # no cycle through its globals


class _Run(torch.autograd.Function):
    """One call of a program."""

    @staticmethod
    def forward(ctx: Any, training: Training, inputs: tuple[Any, ...], made: list[Any], *_: Tensor) -> Any:
        ctx.training = training
        return training.enter(ctx, inputs, made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return ctx.training.leave(ctx, *gradients)


_torch_autograd.call_directly(_Run)
twice.prepare(_Run)
# Function.apply looks at every argument for functorch's sake first (0.1 µs each); no transform is active here.
_apply: Any = super(torch.autograd.Function, _Run).apply


def bind(
    joint: Joint, forward: Executable, compile_: Compile, on_aten: Callable[[], Executable] | None = None
) -> Executable:
    """The executable with its results tied to autograd.

    Args:
        on_aten: compiles the program for PyTorch's kernels; None where executors are not chosen by cost.
    """
    training = Training(joint, forward, compile_)
    if on_aten is not None and replayed.is_worthwhile(joint, forward.plan, training.plan):
        is_there = all(region.executor == "aten" for region in forward.plan.regions)
        alone = forward if is_there else on_aten()
        if replayed.records_itself(joint, alone.plan.program, alone.run):
            program = replace(alone.plan.program, notes=(*alone.plan.program.notes, replayed.NOTE))
            return replace(alone, plan=replace(alone.plan, program=program))
    run = training.write_run()
    return replace(forward, run=run, compiles=forward.compiles + training.compiles, training=training)
