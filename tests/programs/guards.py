"""Python state that the function read while it was traced: when it changes, the next call traces anew."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.programs.table import Family, cases, draw, tensors

FAMILY = Family("guards")
X = tensors((3,))
TWICE = {"calls": 4, "traces_at": (0, 1)}

SCALE = 1.0
MODE = "mul"
SETTINGS = {"scale": 1.0}
WEIGHT = torch.ones(3)
FUNCTION = torch.sin


def set_global(name: str, *values: Any) -> Any:
    """Set a global of this file before each call: to the first value, the second, and over again."""

    def change(original: Any, i: int) -> None:
        globals()[name] = values[i % len(values)]

    return change


def set_cell(*values: Any) -> Any:
    """Set the first free variable of the function before each call."""

    def change(original: Any, i: int) -> None:
        original.__closure__[0].cell_contents = values[i % len(values)]

    return change


FAMILY.add("global_number", lambda x: x * SCALE, X, before=set_global("SCALE", 2.0, 3.0), **TWICE)
FAMILY.add("global_number_type", lambda x: x * SCALE, X, before=set_global("SCALE", 2, 2.0), **TWICE)
FAMILY.add("global_same_value", lambda x: x * SCALE, X, before=set_global("SCALE", 2.0, 4.0 / 2))
FAMILY.add("global_unread", lambda x: x * 2, X, before=set_global("SCALE", 2.0, 3.0))
FAMILY.add("global_string", lambda x: getattr(x, MODE)(2), X, before=set_global("MODE", "mul", "add"), **TWICE)
FAMILY.add("global_function", lambda x: FUNCTION(x), X, before=set_global("FUNCTION", torch.sin, torch.cos), **TWICE)
FAMILY.add(
    "global_dict",
    lambda x: x * SETTINGS["scale"],
    X,
    before=lambda original, i: SETTINGS.update(scale=float(i % 2 + 1)),
    **TWICE,
)
FAMILY.add(
    "global_tensor_metadata",
    lambda x: x * WEIGHT,
    X,
    before=set_global("WEIGHT", torch.ones(3), torch.full((1,), 2.0)),
    **TWICE,
)


def by_helper(x: Tensor) -> Tensor:
    return helper(x) + 1


def helper(x: Tensor) -> Tensor:
    return x * SCALE


FAMILY.add("global_of_helper", by_helper, X, before=set_global("SCALE", 2.0, 3.0), **TWICE)


@FAMILY.factory(X, before=set_cell(2.0, 3.0), **TWICE)
def cell_number() -> Any:
    k = 2.0
    return lambda x: x * k


@FAMILY.factory(X, before=set_cell(torch.sin, torch.cos), **TWICE)
def cell_function() -> Any:
    f = torch.sin
    return lambda x: f(x)


@FAMILY.factory(X, before=set_cell((1.0, 2.0), (1.0, 3.0)), **TWICE)
def cell_tuple() -> Any:
    pair = (1.0, 2.0)
    return lambda x: x * pair[0] + pair[1]


@FAMILY.factory(X, before=lambda run, i: run.__closure__[0].cell_contents.__setitem__(0, i % 2), **TWICE)
def cell_list() -> Any:
    values = [0]
    return lambda x: x + values[0]


@FAMILY.factory(X, before=lambda run, i: run.__closure__[0].cell_contents.append(1), traces_at=(0, 1, 2))
def cell_list_length() -> Any:
    values = [0]
    return lambda x: x + len(values)


@FAMILY.factory(X, before=lambda run, i: setattr(run.__closure__[0].cell_contents, "k", i % 2), **TWICE)
def cell_namespace() -> Any:
    options = SimpleNamespace(k=1)
    return lambda x: x + options.k


@FAMILY.factory(X, before=lambda run, i: setattr(run, "__defaults__", (i % 2 + 1,)), **TWICE)
def default_value() -> Any:
    return lambda x, k=1: x * k


class Holder:
    def __init__(self) -> None:
        self.k = 1.0
        self.nested = SimpleNamespace(k=1.0)

    def method(self, x: Tensor) -> Tensor:
        return x * self.k + self.nested.k

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x)


FAMILY.add_factory(
    "self_attribute", lambda: Holder().method, X, before=lambda f, i: setattr(f.__self__, "k", i % 2), **TWICE
)
FAMILY.add_factory("object_attribute", Holder, X, before=lambda holder, i: setattr(holder, "k", i % 2), **TWICE)
FAMILY.add_factory("nested_attribute", Holder, X, before=lambda holder, i: setattr(holder.nested, "k", i % 2), **TWICE)

# Of the arguments.
FAMILY.add(
    "shape",
    lambda x: x * 2,
    cases(tensors((3,)), tensors((4,)), tensors((2, 2))),
    calls=6,
    traces_at=(0, 1, 2),
)
FAMILY.add("dtype", lambda x: x * 2, cases(tensors((3,)), tensors((3,), dtype=torch.float64)), **TWICE)
FAMILY.add("strides", lambda x: x * 2, cases(lambda i: (draw(i, 2, 2),), lambda i: (draw(i, 2, 2).t(),)), **TWICE)
FAMILY.add("dimensions", lambda x: x.sum(0), cases(tensors((3,)), tensors((3, 1))), **TWICE)
FAMILY.add("zero_size", lambda x: x.sum(0), cases(tensors((0, 3)), tensors((2, 3))), **TWICE)
FAMILY.add(
    "parameter_or_tensor",
    lambda x: x * 2,
    cases(lambda i: (torch.nn.Parameter(draw(i, 3), requires_grad=False),), tensors((3,))),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add("positional_or_keyword", lambda x, y: x - y, cases(tensors((3,), (3,)), tensors((3,), (3,))), calls=4)


# Of torch.
class Setting:
    """Sets something of torch's for a while."""

    def __init__(self, get: Any, put: Any, value: Any) -> None:
        self.get, self.put, self.value = get, put, value

    def __enter__(self) -> None:
        self.before = self.get()
        self.put(self.value)

    def __exit__(self, *_: object) -> None:
        self.put(self.before)


def settings(get: Any, put: Any, *values: Any) -> tuple[Any, ...]:
    return tuple(lambda value=value: Setting(get, put, value) for value in values)


FAMILY.add("grad_mode", lambda x: x * 2, X, contexts=(torch.no_grad, torch.enable_grad), **TWICE)
FAMILY.add("inference_mode", lambda x: x * 2, X, contexts=(torch.inference_mode, torch.no_grad), **TWICE)
FAMILY.add(
    "autocast_dtype",
    lambda x: x[None] @ x[:, None],
    X,
    contexts=(
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.float16),
        lambda: torch.autocast("cpu", enabled=False),
    ),
    calls=6,
    traces_at=(0, 1, 2),
)
FAMILY.add(
    "default_dtype",
    lambda x: x + torch.ones(3) * 0.1,
    tensors((3,), dtype=torch.int64),
    contexts=settings(torch.get_default_dtype, torch.set_default_dtype, torch.float64, torch.float32),
    **TWICE,
)
FAMILY.add(
    "deterministic",
    lambda x: x.index_add(0, torch.tensor([0, 0]), x[:2]),
    X,
    contexts=settings(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True, False),
    **TWICE,
)
FAMILY.add(
    "matmul_precision",
    lambda x: x[None] @ x[:, None],
    X,
    contexts=settings(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"),
    **TWICE,
)
