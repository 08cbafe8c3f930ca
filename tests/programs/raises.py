"""What cannot be captured soundly: each raises a CaptureError that quotes the line, and changes nothing."""

import functools
import random
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.programs.table import Family, draw, of, tensors

FAMILY = Family("raises")
X = tensors((3, 4))
FILE = "raises.py"

# A value as a Python number: the text of the line is the text of the lambda.
VALUES: dict[str, Any] = {
    "complex": (lambda x: x * complex(x.sum()), "complex(x.sum())"),
    "numpy": (lambda x: x.numpy(), "x.numpy()"),
    "numpy_detached": (lambda x: x.detach().numpy().sum(), "x.detach().numpy()"),
    "np_asarray": (lambda x: np.asarray(x).sum(), "np.asarray(x)"),
    "np_function": (lambda x: np.abs(x), "np.abs(x)"),
    "format": (lambda x: f"{x.sum():.2f}", 'f"{x.sum():.2f}"'),
    "exact_type": (lambda x: x * 2 if type(x) is Tensor else x * 3, "type(x) is Tensor"),
    "data_ptr": (lambda x: x.data_ptr(), "x.data_ptr()"),
    "repr": (lambda x: repr(x), "repr(x)"),
    "hash_of_values": (lambda x: hash(tuple(x[0].tolist())), "x[0].tolist()"),
}
for name, (function, line) in VALUES.items():
    FAMILY.add(f"value_{name}", function, X, line=line)


@FAMILY.program(X, line="if complex(x.sum()) == 0:")
def value_after_write(x: Tensor) -> Tensor:
    """The write that came before must not have reached the real tensor."""
    x.add_(1)
    if complex(x.sum()) == 0:
        return x
    return -x


# Python side effects.
LEAF = of(lambda x: (x.requires_grad_(),), 3)


@FAMILY.factory(LEAF, line="log.append(g.shape)")
def list_append_in_hook() -> Any:
    log: list[Any] = []

    def run(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: log.append(g.shape))
        return y.sum()

    return run


@FAMILY.factory(LEAF, line="held.last = g")
def attribute_in_hook() -> Any:
    held = types.SimpleNamespace(last=None)

    def run(x: Tensor) -> Tensor:
        def hook(g: Tensor) -> None:
            held.last = g

        y = x * 2
        y.register_hook(hook)
        return y.sum()

    return run


@FAMILY.factory(LEAF, line="log.append(g)")
def list_append_in_custom_function() -> Any:
    log: list[Any] = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            log.append(g)
            return g * 2

    return lambda x: Doubled.apply(x).sum()


@FAMILY.factory(LEAF, line="checkpoint(layer, x, use_reentrant=True)")
def reentrant_checkpoint() -> Any:
    layer = nn.Linear(3, 3)

    def run(x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=True)

    return run


@FAMILY.factory(LEAF, match="use_reentrant=False")
def reentrant_checkpoint_in_a_step() -> Any:
    layer = nn.Linear(3, 3)

    def run(x: Tensor) -> None:
        checkpoint(layer, x, use_reentrant=True).sum().backward()

    return run


class Counter(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def module_program(line: str) -> Any:
    def register(function: Any) -> Any:
        FAMILY.add_factory(function.__name__, lambda: Counter(function), X, line=line)
        return function

    return register


@module_program("self.train(not self.training)")
def module_toggles_training(self: Any, x: Tensor) -> Tensor:
    self.train(not self.training)
    return x + 1


# Random numbers that are not torch's, and torch's seeds.
RANDOM: dict[str, Any] = {
    "python_int": (lambda x: x * random.getrandbits(3), "random.getrandbits(3)"),
    "python_choice": (lambda x: random.choices([x, -x])[0], "random.choices([x, -x])[0]"),
    "python_shuffle": (lambda x: random.sample(range(3), 3), "random.sample(range(3), 3)"),
    "numpy_normal": (lambda x: x + np.random.normal(size=3), "np.random.normal(size=3)"),
    "manual_seed": (lambda x: (torch.manual_seed(0), x + torch.rand(4))[1], "torch.manual_seed(0)"),
    "seed": (lambda x: (torch.seed(), x + torch.rand(4)), "torch.seed()"),
    "set_rng_state": (lambda x: (torch.set_rng_state(torch.get_rng_state()), x)[1], "torch.set_rng_state("),
    "generator_seed": (
        lambda x: (torch.default_generator.manual_seed(1), x)[1],
        "torch.default_generator.manual_seed(1)",
    ),
}
for name, (function, line) in RANDOM.items():
    FAMILY.add(f"random_{name}", function, X, line=line)

FAMILY.add(
    "generator_argument_seeded",
    lambda x, g: (g.manual_seed(1), torch.rand(2, generator=g))[1],
    lambda i: (draw(i, 3), torch.Generator().manual_seed(i)),
    line="g.manual_seed(1)",
)


# Arguments that nothing is known about: the message names them.
class Options:
    """Neither a pytree nor a plain value, nor nothing but its `__dict__`."""

    __slots__ = ()
    scale = 2.0


ARGUMENTS: dict[str, Any] = {
    "object": Options,
    "set": lambda: {1, 2},
    "bytearray": lambda: bytearray(b"ab"),
    "array": lambda: np.ones(3, dtype=">f4"),
    "iterator": lambda: iter([1, 2]),
    "object_in_list": lambda: [1, Options()],
}
for name, make in ARGUMENTS.items():
    FAMILY.add(
        f"argument_{name}",
        lambda x, odd: x + 1,
        lambda i, make=make: (draw(i, 3), make()),
        match="odd|args?\\[1\\]",
    )


# Results that require grad, though no input does under grad mode.
FAMILY.add("grad_made_inside", lambda x: torch.zeros(3).requires_grad_(), X, match="grad")


@FAMILY.factory(X, match="grad", contexts=(torch.no_grad,))
def grad_enabled_inside() -> Any:
    weight = draw(1, 4).requires_grad_()

    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x * weight

    return run


# What comes back is no value.
def yields(x: Tensor) -> Any:
    yield x + 1


async def waits(x: Tensor) -> Tensor:
    return x + 1


FAMILY.add("result_generator", yields, X)
FAMILY.add("result_generator_expression", lambda x: (row * 2 for row in x), X)
FAMILY.add("result_coroutine", lambda x: functools.partial(waits, x), X)
FAMILY.add("result_function", lambda x: lambda: x + 1, X)
FAMILY.add("result_object_twice", lambda x: (Options(),) * 2, X)
FAMILY.add("result_array", lambda x: np.ones(3), X)
FAMILY.add("result_set", lambda x: {x.dtype}, X)
FAMILY.add_factory("lazy_module", lambda: nn.LazyLinear(2), X, contexts=(torch.no_grad,), match="[Ll]azy|uninitialized")

# A size that depends on values is a value.
FAMILY.add("size_of_mask", lambda x: x[x > 0].shape, X, line="x[x > 0].shape")
