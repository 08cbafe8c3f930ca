"""Runs programs under autograd: one node of PyTorch's autograd graph for a call of a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from primexec import _torch
from primexec.capture import capture_lock
from primexec.errors import PrimexecError
from primexec.joint import Gradients, Joint
from primexec.partition import Plan
from primexec.program import Program, Static
from primexec.runtime import Executable

Compile = Callable[[Program], Executable]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A backward program, ready to run.

    Attributes:
        select: picks its inputs from the saved values followed by the gradients that are there.
        places: for each input of the forward program that may get a gradient, the index of the output, or None.
    """

    run: Callable[..., Sequence[Tensor]]
    select: Callable[[Sequence[Any]], tuple[Any, ...]]
    places: tuple[int | None, ...]


class Training:
    """Runs a program, and its backward programs once gradients arrive."""

    def __init__(self, joint: Joint, forward: Executable, compile_: Compile) -> None:
        self.joint, self.forward, self.compile = joint, forward.run, compile_
        self.plans: list[Plan] = []  # of the backward programs, the one that decided what is saved first
        self.compiles = 0
        self.program = forward.plan.program
        backward: Any = self.program.backward
        self.saved = [(i.label, *joint.places[i.label]) for i in backward.inputs if i.kind == "saved"]
        self._positions = {name: i for i, (name, _, _) in enumerate(self.saved)}
        self._backward: dict[tuple[Gradients, tuple[bool, ...]], _Compiled] = {}
        recorder = self.joint.recorder
        self._backward[recorder.gradients, recorder.needed] = self._prepare(backward, recorder.gradients)

    def saved_bytes(self) -> tuple[int, int]:
        """How many bytes are kept for backward, and how many eager keeps; memory that is shared counts once."""
        recorder = self.joint.recorder
        nodes = {n.name: n for n in self.program.graph_module.graph.nodes}
        values = [nodes[name].meta["val"] for name, _, _ in self.saved]
        ours = {_torch.storage_key(v): v.untyped_storage().nbytes() for v in values}
        eager = _torch.saved_by_autograd([n.meta["val"] for n in recorder.roots])
        return sum(ours.values()), sum(eager.values())

    def run(self, *inputs: Any) -> list[Any]:
        """What the program returns, tied to autograd."""
        joint, made = self.joint, []  # type: ignore[var-annotated]
        if joint.roots:
            rooted = _apply(self, inputs, made, *[inputs[i] for i in joint.inputs])
            for i, root in zip(joint.roots, rooted, strict=True):
                made[i] = root
        else:  # nothing but views of inputs
            with torch.no_grad():
                made.extend(self.forward(*inputs))
        results = []
        for result in joint.results:
            value = (inputs if result.is_input else made)[result.index]
            for view in result.views:
                with torch.set_grad_enabled(view.grad_mode):
                    value = view.op(value, *view.args, **view.kwargs)
            results.append(value)
        return results

    def backward(self, saved: Sequence[Tensor], gradients: Sequence[Tensor | None], needed: tuple[bool, ...]) -> Any:
        key = tuple(None if g is None else g.stride() for g in gradients), needed
        compiled = self._backward.get(key)
        if compiled is None:
            with capture_lock():
                program = self.joint.recorder.record(*key)
                self.joint.recorder.tracer.complete_metadata([program.graph_module.graph])
                compiled = self._backward[key] = self._prepare(program, key[0])
        values = compiled.select((*saved, *(g for g in gradients if g is not None)))
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with _torch.autocast_off():
                out = compiled.run(*values)
        else:
            out = compiled.run(*values)
        return [None if i is None else out[i] for i in compiled.places]

    def _prepare(self, program: Program, gradients: Gradients) -> _Compiled:
        arriving = iter(range(len(self.saved), len(self.saved) + len(gradients)))
        places = []
        for i in program.inputs:
            if i.kind == "saved" and i.label not in self._positions:
                raise PrimexecError(f"the backward pass of {program.name} needs {i.label}, which was not saved")
            places.append(self._positions[i.label] if i.kind == "saved" else next(arriving))
        executable = self.compile(program)
        self.plans.append(executable.plan)
        self.compiles += executable.compiles
        return _Compiled(
            executable.run,
            _picker(places),
            tuple(None if isinstance(leaf, Static) else leaf for leaf in program.output_leaves),
        )


def _picker(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


class _Run(torch.autograd.Function):
    """One call of a program."""

    @staticmethod
    def forward(ctx: Any, training: Training, inputs: tuple[Any, ...], made: list[Any], *_: Tensor) -> Any:
        # Some kernels do more under grad mode (an LSTM keeps its workspace), so it is on, as in eager.
        with _torch.below_autograd(), torch.enable_grad():
            made.extend(training.forward(*inputs))
        ctx.training = training
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[(inputs if is_input else made)[i] for _, is_input, i in training.saved])
        return tuple(made[i] for i in training.joint.roots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise PrimexecError(
                f"gradients of the traced function {ctx.training.joint.recorder.name} are asked for with "
                "create_graph=True, and its backward program cannot be differentiated\nWhat to do: call the function "
                "inside `with primexec.disable():` where second derivatives are needed"
            )
        needed = _torch.needed_gradients(ctx, ctx.needs_input_grad[3:])
        found = ctx.training.backward(ctx.saved_tensors, gradients, needed)
        return None, None, None, *found


# Function.apply looks at every argument for functorch's sake first (0.1 µs each); no transform is active here.
_apply: Any = super(torch.autograd.Function, _Run).apply


def bind(joint: Joint, forward: Executable, compile_: Compile) -> Executable:
    """The executable with its results tied to autograd."""
    training = Training(joint, forward, compile_)
    return replace(forward, run=training.run, compiles=forward.compiles + training.compiles, training=training)
