"""Private names of PyTorch's autograd. Like `_torch.py`, this file touches private modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from primexec._torch import late, private, pytree, storage_key


def sequence_number() -> int:
    """The number of the autograd node that this thread made last."""
    return int(private("torch._C._autograd._get_sequence_nr")()) - 1


def autograd_node() -> Any:
    """The autograd node whose backward runs in this thread, or None."""
    return private("torch._C._current_autograd_node")()


def has_gradient_hooks(t: Tensor) -> bool:
    """Whether a hook runs once the gradient of a tensor is there."""
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def graph_is_freed(error: RuntimeError) -> bool:
    """Whether a backward pass came to what another one has freed."""
    return "backward through the graph a second time" in str(error)


def _saved(node: Any, name: str) -> Any:
    try:
        return getattr(node, name, None)
    except RuntimeError:  # freed
        return None


def autograd_nodes(roots: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the autograd graph behind the roots."""
    stack, seen = [root.grad_fn for root in roots], set()
    while stack:
        node: Any = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def runs_custom_functions(roots: Sequence[Tensor]) -> bool:
    """Whether custom functions are in the autograd graph behind the roots."""
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in autograd_nodes(roots))


def raises_later(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether an error waits between the roots and the inputs, as `once_differentiable` leaves it."""
    of_roots, of_inputs = (
        {node for node in autograd_nodes(ends) if node.name() == "torch::autograd::Error"} for ends in (roots, inputs)
    )
    return not of_roots <= of_inputs


def leaves_behind(roots: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves of the autograd graph behind the roots."""
    return (node.variable for node in autograd_nodes(roots) if hasattr(node, "variable"))


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread."""
    return graph_task() != -1


graph_task: Callable[[], int] = late("torch._C._current_graph_task_id")  # -1 outside of backward passes


def same_graphs(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the autograd graphs behind two roots each have equal nodes and edges, and end at the same tensors."""
    waiting, known = list(pairs), dict[Any, Any]()
    while waiting:
        a, b = waiting.pop()
        if a is b or (a in known and known[a] is b):
            continue
        if None in (a, b) or a in known or a.name() != b.name() or type(a) is not type(b):
            return False
        known[a] = b
        if getattr(a, "variable", None) is not getattr(b, "variable", None):
            return False
        edges = list(zip(a.next_functions, b.next_functions, strict=True))
        if any(number != of_b for (_, number), (_, of_b) in edges):
            return False
        waiting += [(of_a, of_b) for (of_a, _), (of_b, _) in edges]
    return True


def saved_by_autograd(roots: Sequence[Tensor]) -> dict[int, int]:
    """What the autograd graph behind the roots keeps for backward: storage → bytes."""
    kept: dict[int, int] = {}
    for node in autograd_nodes(roots):
        names = [n for n in dir(node) if n.startswith("_saved_")]
        for tensor in pytree.tree_leaves([_saved(node, n) for n in (*names, "saved_tensors")]):
            if isinstance(tensor, Tensor):
                kept[storage_key(tensor)] = tensor.untyped_storage().nbytes()
    return kept


_executes: Callable[[Any], bool] = late("torch._C._will_engine_execute_node")


def needed_gradients(ctx: Any) -> tuple[bool, ...]:
    """Which gradients of a custom function's tensors the backward pass that runs asks for."""
    following = next(zip(*ctx.next_functions, strict=True))
    if len(following) - following.count(None) == 1:  # else this one would not run
        return tuple([node is not None for node in following])
    needed: list[bool] = []
    asked = map(_executes, following)
    while len(needed) < len(following):
        try:
            needed.extend(asked)
        except RuntimeError:  # 20 µs: PyTorch does not say it of a leaf whose gradient is what is asked for
            needed.append(following[len(needed)] is not None)
    return tuple(needed)


def call_directly(function: Any) -> None:
    """Let autograd's engine call a custom function's `backward` without PyTorch's two methods between (1.5 µs)."""
    function._backward_cls.apply = function.backward


def take_saved(ctx: Any) -> list[Tensor]:
    """What a custom function saved, which nobody else keeps for it if the backward pass that runs frees the graph."""
    saved = list(ctx.saved_tensors)
    ctx.maybe_clear_saved_tensors()
    return saved


is_batched: Callable[[Any], bool] = late("torch._C._functorch.is_legacy_batchedtensor")  # by is_grads_batched=True


def taken_apart(tensors: Sequence[Tensor | None]) -> tuple[int, list[tuple[Tensor | None, ...]]]:
    """The level at which tensors are batched, and each of the batch; what is not batched is the same in all."""
    level = private("torch._C._vmapmode_increment_nesting")() - 1
    private("torch._C._vmapmode_decrement_nesting")()
    parts: list[Any] = [
        private("torch._remove_batch_dim")(t, level, 1, 0) if t is not None and is_batched(t) else t for t in tensors
    ]
    pairs = list(zip(parts, tensors, strict=True))
    size = next(len(part) for part, t in pairs if part is not t)
    return level, [tuple(part if part is t else part[i] for part, t in pairs) for i in range(size)]


def batched(t: Tensor, level: int) -> Tensor:
    """A tensor as a batch along its first dimension."""
    made: Tensor = private("torch._add_batch_dim")(t, 0, level)
    return made


def below_autograd() -> Any:
    """A context without arguments in which operators record nothing for autograd; kernels still see the grad mode."""
    return private("torch._C._AutoDispatchBelowAutograd")


@contextmanager
def autocast_off() -> Iterator[None]:
    """Without autocast: eager's backward formulas run outside of it."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    with ExitStack() as off:
        for device in devices:
            off.enter_context(torch.autocast(device, enabled=False))
        yield


def left_the_trace(error: BaseException) -> bool:
    """Whether a backward pass came to the history of a fake tensor that stands for one with a history."""
    return isinstance(error, RuntimeError) and "backward() through example input" in str(error)


@contextmanager
def with_autograd() -> Iterator[None]:
    """Autograd records again, where a program runs without it."""
    c = private("torch._C")
    excluded = c._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(c.DispatchKey, key))
    included = c._dispatch_tls_local_include_set().add(c.DispatchKey.ADInplaceOrView)
    with c._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
