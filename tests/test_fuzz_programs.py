"""Generated programs: lists of method calls on a few tensors that may overlap, traced, against eager."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from tests import harness
from tests.programs.table import Program, draw

BASE = 24  # elements of each storage


@dataclass(frozen=True)
class Var:
    """The tensor of that number: first the inputs, then what the steps made, in order."""

    number: int

    def __repr__(self) -> str:
        return f"t{self.number}"


@dataclass(frozen=True)
class Step:
    """A call of a tensor's method; what it returns is a new tensor, or takes the place of one."""

    on: Var
    method: str
    args: tuple[Any, ...]
    into: Var | None

    def __repr__(self) -> str:
        call = f"{self.on}.{self.method}({', '.join(map(repr, self.args))})"
        return f"{self.into} = {call}" if self.into else call


@dataclass(frozen=True)
class Source:
    """A tensor: strided over a storage of its own, or over the base that several share.

    It is made anew for each call, or held by the function, which then finds what the last call made of it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    shared: bool
    held: bool


METADATA_WRITES = {"t_", "transpose_", "unsqueeze_", "squeeze_"}


@dataclass(frozen=True)
class Generated:
    """A whole program."""

    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Var, ...]

    def make(self) -> Callable[..., Any]:
        held = make_tensors(self.sources, 1000, held=True)
        return lambda *tensors: interpret(self.steps, self.outputs, held + tensors)

    def program(self) -> Program:
        # What is held may have other metadata at the next call: how often that traces, nobody says beforehand.
        unsettled = any(s.held for s in self.sources) and any(s.method in METADATA_WRITES for s in self.steps)
        return Program(
            name="generated",
            make=self.make,
            inputs=lambda i: make_tensors(self.sources, i, held=False),
            either=unsettled,
        )

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.sources, *self.steps, self.outputs]))


def interpret(steps: tuple[Step, ...], outputs: tuple[Var, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    known = list(tensors)
    for step in steps:
        args = [known[arg.number] if isinstance(arg, Var) else arg for arg in step.args]
        result = getattr(known[step.on.number], step.method)(*args)
        if step.into is not None:
            known[step.into.number] = result
        elif result is not None:
            known.append(result)
    return [known[var.number] for var in outputs]


def make_tensors(sources: tuple[Source, ...], seed: int, *, held: bool) -> tuple[Tensor, ...]:
    bases = {source.dtype: draw(seed, BASE, dtype=source.dtype) for source in sources}
    return tuple(
        (bases[source.dtype] if source.shared else draw(100 * seed + k, BASE, dtype=source.dtype)).as_strided(
            source.shape, source.strides, source.offset
        )
        for k, source in enumerate(sources)
        if source.held is held
    )


@st.composite
def sources(choose: st.DrawFn) -> tuple[Source, ...]:
    common = choose(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.complex64]))
    several = []
    for _ in range(choose(st.integers(1, 4))):
        shape = choose(st.sampled_from([(2, 3), (3,), (3, 2), (4,), (1, 3), (), (2, 1, 3), (0, 3)]))
        dense = torch.empty(shape).stride()
        wider, none = tuple(2 * stride for stride in dense), (0,) * len(dense)
        strides = choose(st.sampled_from([dense, dense, dense, dense[::-1], wider, none]))
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        offset = choose(st.integers(0, min(4, BASE - 1 - max(last, 0))))
        dtype = choose(st.sampled_from([common, common, common, torch.float32, torch.bool]))
        several.append(Source(shape, strides, offset, dtype, choose(st.booleans()), choose(st.integers(0, 3)) == 0))
    return tuple(several)


class Chooser:
    """Chooses the arguments of a method of x, among the variables known so far."""

    def __init__(self, choose: st.DrawFn, x: Tensor, variables: st.SearchStrategy[Var]) -> None:
        self.choose, self.x, self.variables = choose, x, variables

    def other(self) -> Var:
        return self.choose(self.variables)

    def one_of(self, *values: Any) -> Any:
        return self.choose(st.sampled_from(values))

    def number(self) -> int:
        return self.one_of(2, 3, -1)

    def either(self) -> Any:
        return self.other() if self.choose(st.booleans()) else self.number()

    def dim(self) -> int:
        return self.choose(st.integers(-self.x.dim(), self.x.dim() - 1)) if self.x.dim() else 0

    def slice(self, size: int) -> slice:
        start, stop = self.choose(st.integers(0, size)), self.choose(st.integers(0, size) | st.none())
        return slice(start, stop, self.one_of(None, 2))

    def index(self) -> Any:
        sizes = self.x.shape
        kinds = ["ellipsis", "none", "slice", "last", "integer"] if sizes and sizes[0] else ["ellipsis", "none"]
        match self.one_of(*kinds):
            case "slice":
                return self.slice(sizes[0])
            case "last":
                return ..., self.slice(sizes[-1])
            case "integer":
                return self.choose(st.integers(-sizes[0], sizes[0] - 1))
            case "none":
                return None
        return ...

    def sizes(self) -> tuple[int, ...]:
        n = self.x.numel()
        halves = [(2, n // 2)] if n and n % 2 == 0 else []
        return self.one_of((-1,), (n,), (1, n), (n, 1), tuple(self.x.shape), *halves)

    def range(self) -> tuple[int, int]:
        size = self.x.shape[0] if self.x.dim() else 1
        start = self.choose(st.integers(0, size))
        return start, self.choose(st.integers(0, size - start))


Arguments = Callable[[Chooser], tuple[Any, ...]]


def nothing(c: Chooser) -> tuple[Any, ...]:
    return ()


VIEWS: dict[str, Arguments] = {
    **dict.fromkeys(("t", "detach", "squeeze", "conj", "contiguous", "diagonal", "ravel"), nothing),
    "__getitem__": lambda c: (c.index(),),
    "select": lambda c: (c.dim(), 0),
    "unsqueeze": lambda c: (c.dim(),),
    "transpose": lambda c: (c.dim(), c.dim()),
    "narrow": lambda c: (0, *c.range()),
    "view": lambda c: (c.sizes(),),
    "reshape": lambda c: (c.sizes(),),
    "expand": lambda c: ((2, *c.x.shape),),
    "as_strided": lambda c: c.one_of(((2,), (1,)), ((2, 2), (1, 1)), ((2, 2), (2, 1)), ((3,), (0,)), ((), ())),
    "view_as": lambda c: (c.other(),),
    "expand_as": lambda c: (c.other(),),
}
WRITES: dict[str, Arguments] = {
    **dict.fromkeys(("zero_", "neg_", "abs_", "sin_", "uniform_", "t_", "squeeze_"), nothing),
    **dict.fromkeys(("add_", "mul_", "sub_"), lambda c: (c.either(),)),
    "copy_": lambda c: (c.other(),),
    "fill_": lambda c: (c.number(),),
    "clamp_": lambda c: (c.number(),),
    "masked_fill_": lambda c: (c.other(), 2),
    "addcmul_": lambda c: (c.other(), c.other()),
    "__setitem__": lambda c: (c.index(), c.either()),
    "transpose_": lambda c: (c.dim(), c.dim()),
    "unsqueeze_": lambda c: (c.dim(),),
    "cumsum_": lambda c: (c.dim(),),
    "bernoulli_": lambda c: (0.5,),
}
RESULTS: dict[str, Arguments] = {
    **dict.fromkeys(("clone", "neg", "sin", "sigmoid", "argmax"), nothing),
    **dict.fromkeys(("add", "mul", "gt"), lambda c: (c.either(),)),
    **dict.fromkeys(("sub", "eq", "matmul"), lambda c: (c.other(),)),
    **dict.fromkeys(("sum", "amax", "cumsum"), lambda c: (c.dim(),)),
    "to": lambda c: (c.one_of(torch.float32, torch.float64, torch.int64, c.x.dtype),),
    "flip": lambda c: (c.dim(),),
    "masked_fill": lambda c: (c.other(), 2),
    "new_zeros": lambda c: (c.sizes(),),
    "index_select": lambda c: (0, c.other()),
    "bernoulli": lambda c: (0.5,),
}


@st.composite
def programs(choose: st.DrawFn) -> Generated:
    """Choose a program step by step, running it eagerly, so that most steps are ones that eager accepts."""
    inputs = choose(sources())
    known = [*make_tensors(inputs, 1000, held=True), *make_tensors(inputs, 0, held=False)]
    steps: list[Step] = []
    for _ in range(choose(st.integers(3, 14))):
        variables = st.builds(Var, st.integers(0, len(known) - 1))
        on = choose(variables)
        methods = choose(st.sampled_from((VIEWS, WRITES, RESULTS)))
        method = choose(st.sampled_from(list(methods)))
        args = methods[method](Chooser(choose, known[on.number], variables))
        into = None if method == "__setitem__" else choose(st.none() | variables)
        step = Step(on, method, args, into)
        made = into is None and method != "__setitem__"
        try:
            known = interpret((step,), tuple(map(Var, range(len(known) + made))), tuple(known))
        except Exception:
            # Most steps that eager refuses are left out; some end the program, which then has to raise.
            if choose(st.integers(0, 9)):
                continue
            # It is returned: what is not used is not run, and then does not raise.
            return Generated(inputs, (*steps, step), (into or Var(len(known) - (not made)),))
        steps.append(step)
    outputs = choose(st.lists(st.builds(Var, st.integers(0, len(known) - 1)), min_size=1, max_size=3))
    return Generated(inputs, tuple(steps), tuple(outputs))


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # torch says it once in a process
@given(programs())
def test_generated_program(generated: Generated) -> None:
    note(str(generated))
    harness.compare(generated.program(), may_raise=True)
