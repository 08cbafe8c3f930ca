"""What a program of the suite is, how a family registers its programs, and how their inputs are made."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


Inputs = Callable[[int], "Call | tuple[Any, ...]"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function, how it is called, and what the cache must report about those calls.

    `make` gives a fresh callable with state of its own, so that the eager and the traced run share nothing;
    `inputs(i)` gives fresh arguments for call i, the same ones each time it is asked.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    inputs: Inputs
    calls: int = 3
    traces_at: tuple[int, ...] = (0,)
    """Which calls trace; every other call must be a hit."""
    contexts: tuple[Callable[[], AbstractContextManager[Any]], ...] = (nullcontext,)
    """Entered around the calls, by turns."""
    before: Callable[[Any, int], None] | None = None
    """Done to the original callable before call i."""
    raises: type[BaseException] | None = None
    """What every call raises, eagerly and traced."""
    match: str = ""
    """A regular expression that the message holds, where a call raises."""
    line: str | None = None
    """Text of the user's line that a CaptureError has to quote, along with its file."""
    exact_versions: bool = True
    """Whether version counters move only where eager's do."""
    either: bool = False
    """Eager's result or a CaptureError are both right, in whatever number of traces: nothing in between is."""

    def hits(self, i: int) -> bool:
        """Whether call i must be served from the cache."""
        return not self.either and i not in self.traces_at

    def around(self, i: int) -> AbstractContextManager[Any]:
        """Give what is entered around call i."""
        return self.contexts[i % len(self.contexts)]()


class Family:
    """The programs of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.programs: list[Program] = []

    def add(self, name: str, function: Callable[..., Any], inputs: Inputs, **options: Any) -> None:
        """Register a function without state of its own."""
        self.add_factory(name, lambda: function, inputs, **options)

    def add_factory(self, name: str, make: Callable[[], Any], inputs: Inputs, **options: Any) -> None:
        """Register what makes a callable with state."""
        self.programs.append(Program(name=f"{self.name}.{name}", make=make, inputs=inputs, **options))

    def program(self, inputs: Inputs, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.add(function.__name__, function, inputs, **options)
            return function

        return register

    def factory(self, inputs: Inputs, **options: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Register the decorated factory."""

        def register(make: Callable[[], Any]) -> Callable[[], Any]:
            self.add_factory(make.__name__, make, inputs, **options)
            return make

        return register


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a tensor without touching the default generator; whole numbers are small."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if dtype.is_floating_point or dtype.is_complex:
        work = dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        return torch.randn(shape, generator=generator, dtype=work).to(dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    low = 0 if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64) else -9
    return torch.randint(low, 10, shape, generator=generator).to(dtype)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs that are one separate tensor for each shape."""
    return lambda i: tuple(draw(10 * i + k, *shape, dtype=dtype) for k, shape in enumerate(shapes))


def of(make: Callable[[Tensor], "Call | tuple[Any, ...]"], *shape: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs that are made from one tensor: views of it, for instance."""
    return lambda i: make(draw(10 * i, *shape, dtype=dtype))


def cases(*makes: Callable[[int], "Call | tuple[Any, ...]"]) -> Inputs:
    """Inputs that differ in kind from call to call: they take turns."""
    return lambda i: makes[i % len(makes)](i)
