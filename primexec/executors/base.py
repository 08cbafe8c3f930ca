"""What an executor is.

An executor is asked, node by node, whether it can run an operator (`supports`), and is then given regions of
the program to turn into callables (`compile`). It sees metadata only; what it does not know, it declines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx

from primexec.program import ApiCall

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Support:
    """Whether an executor takes a node: true, or false with a reason that `explain()` shows."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


YES = Support()


def no(reason: str) -> Support:
    """A refusal; the reason must not be empty."""
    if not reason:
        raise ValueError("a refusal needs a reason")
    return Support(reason)


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a program that one executor runs.

    Attributes:
        graph_module: takes the region's inputs in order and returns a tuple. Every node carries
            `meta["val"]` (a fake tensor: shape, dtype, strides, device) and `meta["source"]` (the user's line).
        calls: the calls of torch's API that nodes of this graph came from.
        ambient_inference: whether the program is called inside inference mode.
        boxed: for executors that say so: the callable takes its inputs in one list and empties it, so that they can
            be freed while it runs. Arguments of a call are held by the caller.
        freed: positions of inputs that are freed with the last reference of the region to them.
        training: whether the program takes part in autograd: what it returns is kept for backward, or made there.
        donated: positions of inputs that nobody needs afterwards, in memory of their own: results may be written there.
        kept: positions of results that somebody outside of the program may see; None: all of them.
    """

    name: str
    executor: str
    graph_module: fx.GraphModule
    calls: tuple[ApiCall, ...] = ()
    ambient_inference: bool = False
    boxed: bool = False
    freed: frozenset[int] = frozenset()
    training: bool = False
    donated: frozenset[int] = frozenset()
    kept: frozenset[int] | None = None


RegionFunction = Callable[..., Sequence[Tensor]]


@runtime_checkable
class Executor(Protocol):
    """The interface that executors implement; `protocol_version` must equal PROTOCOL_VERSION.

    Only nodes without effects are offered to executors other than `aten`: what changes a tensor in place,
    draws random numbers or makes an alias that outlives the program stays there.

    An executor may say `fuses = False`: it runs the operators of a region one by one, so that a region of one
    operator tells how it runs that operator anywhere. `primexec.compare` then judges each alone, and does not bisect.

    An executor may say `exact = True`: when it compiles, it makes sure that its code returns what the region's
    metadata says, strides included. Results of all others are checked at every call.

    An executor may say `any_layout = True`: its code runs as well on tensors in another layout, so that chains of
    convolutions around it may be kept in channels-last memory. Results of the program keep eager's strides.

    An executor may say `asks_grad_mode = False`: its code does the same under any grad mode, which is not set for it.

    An executor may have a method `leaves(node)`: why it leaves an operator to the executors after it, which run it
    faster than its own code or that of the operator's expansion; None where it does not. It is not asked where falling
    back is forbidden.

    An executor may have a method `instead(node)`: a `passes.instead.Call` that `aten` is to run in place
    of a node with effects, and perhaps of nodes that follow it; None where there is none.

    An executor may have a method `empties(region)`: whether it compiles the region as `boxed` where it is asked to.

    An executor may have a method `describe(region, options)`: lines of text that `explain()` shows about a region.

    An executor may have an attribute `expected_failures`: the path of the TOML file of what it is known to do wrong,
    which `primexec.testing` holds it to.

    An executor may have an attribute `strict`: where it is true, naming the executor forbids falling back to
    `aten`, as `{"strict": True}` among the parameters does.
    """

    name: str
    protocol_version: int
    parameters: frozenset[str]  # names that `executor_parameters` may hold for this executor

    def supports(self, node: fx.Node) -> Support:
        """Whether this executor runs the node; from metadata only, and no wherever it is not sure."""
        ...

    def compile(self, region: Region, options: Mapping[str, Any]) -> RegionFunction:
        """A callable from the region's inputs to the sequence of its outputs: new tensors, inputs untouched."""
        ...

    def fingerprint(self) -> str:
        """What the compiled code depends on: versions, the machine's features. Enters every cache key."""
        ...
