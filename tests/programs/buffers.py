"""State that a callable holds, in closures, globals, attributes and modules: read, written, replaced."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.table import Family, draw, tensors

FAMILY = Family("buffers")
X = tensors((3, 4))

KEPT = torch.zeros(4)
SHARED = torch.zeros(6)
REPLACED = torch.zeros(4)


@FAMILY.factory(X)
def closure_tensor() -> Any:
    weight = draw(1, 4)
    return lambda x: x * weight


@FAMILY.factory(X)
def closure_tensor_written() -> Any:
    total = torch.zeros(4)

    def run(x: Tensor) -> Tensor:
        total.add_(x.sum(0))
        return total * 2

    return run


@FAMILY.factory(X)
def closure_tensor_returned() -> Any:
    weight = draw(1, 4)
    return lambda x: (weight, weight[1:], x + weight)


@FAMILY.factory(X)
def closure_tensors_that_overlap() -> Any:
    base = draw(1, 6)
    a, b = base[:4], base[2:]

    def run(x: Tensor) -> Tensor:
        a.add_(x[0])
        return b * 2

    return run


@FAMILY.factory(X)
def closure_tensor_replaced() -> Any:
    total = torch.zeros(4)

    def run(x: Tensor) -> Tensor:
        nonlocal total
        total = total + x.sum(0)
        return total * 2

    return run


@FAMILY.factory(X, traces_at=(0, 1))
def dict_item_made() -> Any:
    """The second call finds the item that the first one left."""
    table: dict[str, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        table["x"] = table.get("x", x) * 2
        return table["x"] + 1

    return run


@FAMILY.program(X)
def global_tensor_replaced(x: Tensor) -> Tensor:
    global REPLACED
    REPLACED = x
    return x + 1


@FAMILY.factory(X, before=lambda run, i: run.__closure__[0].cell_contents.add_(i))
def closure_tensor_written_outside() -> Any:
    """What others write between calls is seen, and costs no retrace."""
    weight = torch.zeros(4)
    return lambda x: x + weight


@FAMILY.factory(lambda i: (SHARED[:4],))
def input_overlaps_closure() -> Any:
    SHARED.copy_(draw(5, 6))
    inner = SHARED[2:]

    def run(x: Tensor) -> Tensor:
        x.mul_(2)
        return inner + 1

    return run


@FAMILY.factory(lambda i: (SHARED[:4] if i % 2 else draw(i, 4),), calls=4)
def input_overlaps_closure_later() -> Any:
    SHARED.copy_(draw(5, 6))
    inner = SHARED[2:]

    def run(x: Tensor) -> Tensor:
        x.mul_(2)
        return inner + 1

    return run


@FAMILY.factory(lambda i: (SHARED,))
def input_is_closure() -> Any:
    SHARED.copy_(draw(5, 6))
    inner = SHARED

    def run(x: Tensor) -> Any:
        x.mul_(2)
        return inner, inner + 1

    return run


@FAMILY.factory(X)
def global_tensor_written() -> Any:
    KEPT.zero_()

    def run(x: Tensor) -> Tensor:
        KEPT.add_(x.sum(0))
        return KEPT + 1

    return run


@FAMILY.factory(X)
def global_tensor_returned() -> Any:
    KEPT.zero_()
    return lambda x: (KEPT, x + KEPT)


@FAMILY.factory(X)
def containers_of_tensors() -> Any:
    weights = [draw(1, 4), draw(2, 4)]
    named = {"bias": draw(3, 4)}

    def run(x: Tensor) -> Tensor:
        for weight in weights:
            x = x * weight
        return x + named["bias"]

    return run


class Scale:
    """A callable that is no module."""

    def __init__(self) -> None:
        self.weight = draw(1, 4)
        self.total = torch.zeros(4)
        self.factor = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.weight * self.factor

    def accumulate(self, x: Tensor) -> Tensor:
        self.total += x.sum(0)
        return self.total * 1


FAMILY.add_factory("callable_object", Scale, X)
FAMILY.add_factory("bound_method", lambda: Scale().accumulate, X, either=True)


class Buffers(nn.Module):
    """The forward is given, so that each program is one line."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", draw(1, 4), persistent=False)
        self.register_buffer("absent", None)
        self.weight = nn.Parameter(draw(2, 4), requires_grad=False)
        self.function = forward
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def buffers_program(**options: Any) -> Any:
    """Register forward(self, x) as the program of a module with those buffers."""

    def register(function: Any) -> Any:
        FAMILY.add_factory(function.__name__, lambda: Buffers(function), X, **options)
        return function

    return register


@buffers_program()
def buffer_written(self: Any, x: Tensor) -> Tensor:
    self.total.add_(x.sum(0))
    self.count += 1
    return x + self.total


@buffers_program()
def buffer_copied_into(self: Any, x: Tensor) -> Tensor:
    self.total.copy_(x.mean(0))
    return self.total + self.scratch


@buffers_program()
def buffer_row_set(self: Any, x: Tensor) -> Tensor:
    self.total[1:3] = x[0, 1:3]
    return x


@buffers_program()
def buffer_returned(self: Any, x: Tensor) -> Any:
    return self.total, self.total[1:], self.weight, self.weight.view(2, 2)


@buffers_program()
def buffer_written_and_returned(self: Any, x: Tensor) -> Any:
    return self.total.add_(x[0])


@buffers_program()
def buffer_reassigned(self: Any, x: Tensor) -> Tensor:
    self.total = self.total * 0.9 + x.mean(0)
    return x - self.total


@buffers_program()
def buffer_reassigned_twice(self: Any, x: Tensor) -> Tensor:
    self.total = self.total + 1
    y = x * self.total
    self.total = self.total * 2
    return y


@buffers_program()
def buffer_reassigned_and_returned(self: Any, x: Tensor) -> Tensor:
    self.total = self.total + x[0]
    return self.total


@buffers_program()
def buffer_reassigned_to_input(self: Any, x: Tensor) -> Tensor:
    self.total = x[0]
    return x * 2


@buffers_program()
def buffers_swapped(self: Any, x: Tensor) -> Tensor:
    self.total, self.scratch = self.scratch, self.total
    return x + self.total


@buffers_program()
def buffer_written_then_reassigned(self: Any, x: Tensor) -> Tensor:
    old = self.total
    old.add_(1)
    self.total = old * 2
    old.add_(1)
    return old


@buffers_program(traces_at=(0, 1))
def buffer_grows(self: Any, x: Tensor) -> Tensor:
    """From (4,) to (3, 4), once: the buffer's metadata is read, so the second call traces anew."""
    self.total = self.total + x
    return self.total.sum()


@buffers_program()
def absent_buffer_tested(self: Any, x: Tensor) -> Tensor:
    return x if self.absent is None else x + self.absent


@buffers_program(traces_at=(0, 1))
def plain_attribute_kept(self: Any, x: Tensor) -> Tensor:
    """An attribute that was None, and becomes a tensor that is no buffer."""
    self.kept = x * 2
    return x + 1


@buffers_program(traces_at=(0, 1))
def buffer_registered_within(self: Any, x: Tensor) -> Tensor:
    self.register_buffer("late", x.sum(0))
    return self.late * 2


@buffers_program()
def parameter_written(self: Any, x: Tensor) -> Tensor:
    self.weight.mul_(0.5)
    return x * self.weight


@buffers_program(exact_versions=False)
def parameter_data_written(self: Any, x: Tensor) -> Tensor:
    self.weight.data.mul_(0.5)
    return x * self.weight


@buffers_program()
def state_found_by_name(self: Any, x: Tensor) -> Tensor:
    for _, buffer in self.named_buffers():
        x = x + buffer
    for parameter in self.parameters():
        x = x * parameter
    return x


def replace_weight(module: Any, i: int) -> None:
    if i == 2:
        module.weight = nn.Parameter(draw(60, 4), requires_grad=False)


def replace_buffer(module: Any, i: int) -> None:
    module.total = draw(60 + i, 4)


def load(module: Any, i: int) -> None:
    module.load_state_dict({"total": draw(i, 4), "count": torch.tensor(i), "weight": draw(i + 9, 4)})


def widen(module: Any, i: int) -> None:
    if i == 1:
        module.total = module.total.double()


def drop(module: Any, i: int) -> None:
    if i == 1:
        module.absent = torch.ones(4)


def step(module: Any, i: int) -> None:
    module.weight.sub_(0.1)


# Replacing a tensor by another of the same metadata is seen, and costs no retrace.
FAMILY.add_factory("weight_replaced", lambda: Buffers(lambda self, x: x * self.weight), X, before=replace_weight)
FAMILY.add_factory("buffer_replaced", lambda: Buffers(lambda self, x: x + self.total), X, before=replace_buffer)
FAMILY.add_factory(
    "replaced_and_written", lambda: Buffers(lambda self, x: self.total.add_(x[0])), X, before=replace_buffer
)
FAMILY.add_factory("state_loaded", lambda: Buffers(lambda self, x: x * self.weight + self.total), X, before=load)
FAMILY.add_factory("weight_stepped", lambda: Buffers(lambda self, x: x * self.weight), X, before=step)
FAMILY.add_factory(
    "buffer_changes_dtype", lambda: Buffers(lambda self, x: x + self.total), X, before=widen, traces_at=(0, 1)
)
FAMILY.add_factory("buffer_appears", lambda: Buffers(absent_buffer_tested), X, before=drop, traces_at=(0, 1))


class Tied(nn.Module):
    """Two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, generator=torch.Generator().manual_seed(3))

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.embed(tokens)), self.head.weight


class TiedAndWritten(Tied):
    def forward(self, tokens: Tensor) -> Any:
        self.head.weight.mul_(0.5)
        return self.embed(tokens)


def untie(module: Any, i: int) -> None:
    if i == 1:
        module.head.weight = nn.Parameter(draw(3, 7, 4))


def tokens(i: int) -> tuple[Tensor]:
    return (draw(i, 2, 3, dtype=torch.uint8).long() % 7,)


FAMILY.add_factory("tied", Tied, tokens, contexts=(torch.no_grad,))
FAMILY.add_factory("tied_written", TiedAndWritten, tokens, contexts=(torch.no_grad,))
# Which tensors are one object is read where one is written or returned.
FAMILY.add_factory("untied_written", TiedAndWritten, tokens, contexts=(torch.no_grad,), before=untie, traces_at=(0, 1))


class Nested(nn.Module):
    """Buffers of submodules, written from the outside, and a tensor that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Buffers(buffer_written)
        self.plain = draw(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.scratch.mul_(2)
        self.plain.add_(1)
        return self.inner(x) + self.plain


FAMILY.add_factory("nested", Nested, X)
FAMILY.add_factory("method_of_module", lambda: Buffers(buffer_written).forward, X)
FAMILY.add_factory("batch_norm_train", lambda: nn.BatchNorm1d(4), X, contexts=(torch.no_grad,))
FAMILY.add_factory("batch_norm_eval", lambda: nn.BatchNorm1d(4).eval(), X, contexts=(torch.no_grad,))
FAMILY.add_factory(
    "batch_norm_cumulative",
    lambda: nn.BatchNorm1d(4, momentum=None),
    X,
    contexts=(torch.no_grad,),
    either=True,
)
FAMILY.add_factory(
    "batch_norm_no_stats", lambda: nn.BatchNorm1d(4, track_running_stats=False), X, contexts=(torch.no_grad,)
)
FAMILY.add_factory("instance_norm", lambda: nn.InstanceNorm1d(3, track_running_stats=True), X)
FAMILY.add_factory(
    "batch_norm_toggled",
    lambda: nn.BatchNorm1d(4),
    X,
    calls=4,
    traces_at=(0, 1),
    contexts=(torch.no_grad,),
    before=lambda module, i: module.train(i % 2 == 0),
)
FAMILY.add_factory(
    "batch_norm_in_sequence",
    lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.BatchNorm1d(4, affine=False)),
    X,
    contexts=(torch.no_grad,),
)
FAMILY.add_factory(
    "functional_batch_norm",
    lambda: lambda x, mean, var: F.batch_norm(x, mean, var, training=True),
    lambda i: (draw(i, 3, 4), torch.zeros(4), torch.ones(4)),
)
