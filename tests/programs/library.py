"""Custom operators, and own classes that are pytrees: code that runs at every call, traced or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@torch.library.custom_op("primexec_tests::scale", mutates_args=())
def scale(x: Tensor, factor: float) -> Tensor:
    return torch.from_numpy(x.numpy() * factor).to(x.dtype)


@scale.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


@torch.library.custom_op("primexec_tests::accumulate", mutates_args=("total",))
def accumulate(total: Tensor, x: Tensor) -> Tensor:
    """Add x to the total in place, and return what the total was."""
    before = total.clone()
    total.add_(x)
    return before


@accumulate.register_fake
def _(total: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(total)


@torch.library.custom_op("primexec_tests::increment", mutates_args=("xs",))
def increment(xs: list[Tensor]) -> None:
    """Add one to each in place: nothing is returned, and still it has to run."""
    for x in xs:
        x.add_(1)


@increment.register_fake
def _(xs: list[Tensor]) -> None:
    return None


@torch.library.custom_op("primexec_tests::parts", mutates_args=())
def parts(x: Tensor, sizes: Sequence[int], bias: Tensor | None = None) -> list[Tensor]:
    return [part.clone() if bias is None else part + bias for part in x.split(list(sizes))]


@parts.register_fake
def _(x: Tensor, sizes: Sequence[int], bias: Tensor | None = None) -> list[Tensor]:
    return [x.new_empty(size, *x.shape[1:]) for size in sizes]


LIBRARY = torch.library.Library("primexec_tests", "FRAGMENT")
LIBRARY.define("minus_one(Tensor x) -> Tensor")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.define("tail(Tensor(a) x) -> Tensor(a)")
LIBRARY.impl("minus_one", lambda x: x - 1, "CPU")
LIBRARY.impl("minus_one", lambda x: torch.empty_like(x), "Meta")
LIBRARY.impl("double", lambda x: x * 2, "CompositeImplicitAutograd")
LIBRARY.impl("tail", lambda x: x[1:], "CompositeExplicitAutograd")


@dataclass
class Point:
    x: Tensor
    y: Tensor
    name: str = "point"


pytree.register_dataclass(Point)


class Pair:
    """A container with a static part, which is no field of the pytree."""

    def __init__(self, left: Any, right: Any, label: str) -> None:
        self.left, self.right, self.label = left, right, label


pytree.register_pytree_node(
    Pair,
    lambda pair: ([pair.left, pair.right], pair.label),
    lambda values, label: Pair(*values, label),
    serialized_type_name="primexec_tests.Pair",
    flatten_with_keys_fn=lambda pair: (
        [(pytree.GetAttrKey("left"), pair.left), (pytree.GetAttrKey("right"), pair.right)],
        pair.label,
    ),
)


class Batch(NamedTuple):
    tokens: Tensor
    mask: Tensor | None = None


# Read and written by functions of this file, which programs of other files call.
SCALE = 1.0
CALLS: list[int] = []


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


def counted() -> int:
    CALLS.append(1)
    return len(CALLS)
