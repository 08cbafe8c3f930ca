"""The `.grad` of tensors that a traced function did not make: what it finds there, and what it leaves there."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from primexec import _torch, _torch_autograd, effects, statics
from primexec.errors import CaptureError

if TYPE_CHECKING:
    from primexec.tracer import Tracer


@dataclass(frozen=True, slots=True)
class GradientOf:
    """A place that holds a tensor: the `.grad` of an input of the program."""

    input: str


def read_place(place: tuple[Any, Any, str], inputs: Mapping[str, Any]) -> Any:
    """What a place holds; `inputs` are those of the program by name, as far as they come before."""
    container, key, _ = place
    if isinstance(container, GradientOf):
        return inputs[container.input].grad
    return statics.get_item(container, key) if statics.is_container(container) else container()


@dataclass(slots=True)
class _Leaf:
    """An input that has a `.grad`, and the stand-in for what it held before the run."""

    node: fx.Node
    label: str
    real: Tensor
    stand_in: Tensor
    before: Tensor | None
    asked: bool = False
    data: Tensor | None = None  # what the function has put in its place by `t.data = ...`


class LeafGradients:
    """Follows the `.grad` of a tracer's inputs.

    The autograd engine of PyTorch itself accumulates into the stand-ins, so that what is recorded is what it does.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._leaves: dict[int, _Leaf] = {}  # identity of a stand-in → its leaf
        self._inputs: list[Tensor] = []
        self._held: dict[int, _Leaf] = {}  # identity of the stand-in of a .grad → the leaf that holds it

    def note(self, real: Tensor, stand_in: Tensor, node: fx.Node, label: str) -> None:
        """A new input of the program."""
        self._inputs.append(real)
        if not stand_in.is_leaf:
            return
        with _torch.modes_off():
            leaf = _Leaf(node, label, real, stand_in, stand_in.grad)
        self._leaves[_torch.identity(stand_in)] = leaf
        if leaf.before is not None:
            self._held[_torch.identity(leaf.before)] = leaf

    def ask(self, stand_in: Any) -> None:
        """The function reads or assigns the `.grad` of a tensor; whether there is one decides what it does."""
        leaf = self._leaves.get(_torch.identity(stand_in))
        if leaf is not None and not leaf.asked:
            leaf.asked = True
            if leaf.before is not None:
                place = GradientOf(leaf.node.name), None, f"{leaf.label}.grad"
                self._tracer.add_place(leaf.real.grad, place)

    def adopt(self, t: object) -> bool:
        """Whether a tensor is the `.grad` of an input, used for the first time; it is an input itself from now on."""
        leaf = self._held.get(_torch.identity(t))
        if leaf is None or leaf.asked:
            return False
        self.ask(leaf.stand_in)
        return True

    def changes(self) -> list[tuple[str, Tensor | None, str]]:
        """(input, what its `.grad` is now, label) of those that the function left another `.grad`."""
        found = []
        for leaf in self._leaves.values():
            now = leaf.stand_in.grad
            if now is leaf.before:
                continue
            if now is not None and now.requires_grad:
                raise CaptureError(
                    f"the function leaves a gradient that requires grad itself in {leaf.label}.grad",
                    hint="detach it; for second derivatives, use torch.autograd.grad(..., create_graph=True)",
                    source=self._tracer.node_of(now).meta["source"],
                )
            self.ask(leaf.stand_in)
            found.append((leaf.node.name, now, f"{leaf.label}.grad"))
            leaf.stand_in.grad = None
        return found

    def switched(self) -> list[tuple[str, bool, str]]:
        """(input, whether it requires grad now, label) of those of which the function changed that."""
        return [
            (leaf.node.name, leaf.stand_in.requires_grad, f"{leaf.label}.requires_grad")
            for leaf in self._leaves.values()
            if leaf.stand_in.is_leaf and leaf.stand_in.requires_grad != leaf.real.requires_grad
        ]

    def check_switched(self) -> None:
        """Where results require grad, inputs must have required it before the run."""
        if switched := self.switched():
            raise CaptureError(
                f"the function sets {switched[0][2]}, of an input, and returns what requires grad",
                hint="set it outside of the traced function, work on x.detach().requires_grad_(), or return "
                "detached results",
            )

    def replace(self, stand_in: Any, data: Tensor) -> bool:
        """Let the stand-in for a leaf have the memory of another tensor from here on; false where it is none."""
        leaf, tracer = self._leaves.get(_torch.identity(stand_in)), self._tracer
        if leaf is None or tracer.scope.parent is not None:
            return False
        if leaf.data is None:
            leaf.node.meta["val"] = tracer._alias(stand_in)
        tracer.scope.nodes[_torch.identity(stand_in)] = tracer.node_of(data)
        with _torch.modes_off():
            stand_in.data = leaf.data = data
        return True

    def replaced(self) -> list[tuple[str, Tensor, str]]:
        """(input, tensor, label) of the leaves to which the function gave the memory of other tensors."""
        leaves = self._leaves.values()
        return [(leaf.node.name, leaf.data, f"{leaf.label}.data") for leaf in leaves if leaf.data is not None]

    def has_replaced(self, saved: Container[str]) -> bool:
        """Whether a leaf that requires grad got other memory, or one whose old or new memory is among what is saved."""
        kept = {effects.storage_of(node) for node in self._tracer.graph.nodes if node.name in saved}
        replaced = [leaf for leaf in self._leaves.values() if leaf.data is not None]
        return any(
            leaf.real.requires_grad
            or not kept.isdisjoint(map(effects.storage_of, (leaf.node, self._tracer.node_of(leaf.data))))
            for leaf in replaced
        )

    def absent(self) -> list[str]:
        """The inputs whose `.grad` must be None for the program to be right."""
        return [leaf.node.name for leaf in self._leaves.values() if leaf.asked and leaf.before is None]

    def check_hooks(self) -> None:
        """Hooks of inputs would run in the backward passes of the function, unseen."""
        followed = [leaf.real for leaf in self._leaves.values() if leaf.stand_in.requires_grad]
        followed += [t for t in self._inputs if t.requires_grad]
        if any(map(_torch_autograd.has_gradient_hooks, followed)):
            raise CaptureError(
                "the function runs a backward pass, and one of its inputs has hooks that would run in it",
                hint="register hooks on tensors made inside the traced function, or call backward() on its result",
            )

    def clear(self) -> None:
        """Let go of the inputs."""
        self._leaves.clear()
        self._held.clear()
        self._inputs.clear()
