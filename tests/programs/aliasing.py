"""Inputs that share memory with one another, and outputs that are or share memory with something."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.programs.table import Call, Family, Inputs, cases, draw, of, tensors

FAMILY = Family("aliasing")


def separate(i: int) -> tuple[Tensor, Tensor]:
    return draw(i, 4), draw(i + 50, 4)


def overlapping(i: int) -> tuple[Tensor, Tensor]:
    base = draw(i, 6)
    return base[:4], base[2:]


def overlapping_more(i: int) -> tuple[Tensor, Tensor]:
    base = draw(i, 6)
    return base[1:5], base[2:]


def neighbours(i: int) -> tuple[Tensor, Tensor]:
    """One storage, no element in common."""
    base = draw(i, 8)
    return base[:4], base[4:]


def interleaved(i: int) -> tuple[Tensor, Tensor]:
    """One range of memory, no element in common."""
    base = draw(i, 8)
    return base[::2].view(4), base[1::2].view(4)


def same(i: int) -> tuple[Tensor, Tensor]:
    z = draw(i, 4)
    return z, z


def same_memory(i: int) -> tuple[Tensor, Tensor]:
    """Two objects of the same memory."""
    z = draw(i, 4)
    return z, z.view(4)


PAIRS: dict[str, Inputs] = {
    "separate": separate,
    "overlapping": overlapping,
    "neighbours": neighbours,
    "interleaved": interleaved,
    "same": same,
    "same_memory": same_memory,
}

# Without one element in common a sum is a sum; with some, each of these depends on where they lie.
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "write_first": lambda a, b: (a.mul_(2), a + b),
    "write_second": lambda a, b: (b.fill_(3), a * b),
    "write_both": lambda a, b: (a.add_(1), b.mul_(2), a + b),
    "write_view": lambda a, b: (a[1:3].zero_(), a + b),
    "write_read_write": lambda a, b: (a.add_(1), b.add(a), b.neg_(), a.sum()),
    "exp_then_read": lambda a, b: (torch.exp_(a), b * 1),
}
for where, inputs in PAIRS.items():
    FAMILY.add(f"{where}_pure", lambda a, b: (a + b, a * 2), inputs)
    FAMILY.add(f"{where}_returned", lambda a, b: (b, a, a[1:]), inputs)
    for name, write in WRITES.items():
        FAMILY.add(f"{where}_{name}", write, inputs)

ORDERS: dict[str, tuple[Callable[[int], tuple[Tensor, Tensor]], ...]] = {
    "separate_then_overlapping": (separate, overlapping),
    "overlapping_then_separate": (overlapping, separate),
    "same_then_separate": (same, separate),
    "separate_then_same": (separate, same),
    "same_memory_then_separate": (same_memory, separate),
    "overlapping_then_overlapping_more": (overlapping, overlapping_more),
}
for order, makes in ORDERS.items():
    # A program is eager's operators in eager's order, so how its inputs overlap makes no difference. Whether
    # they are one object does: the function can ask.
    options = {"calls": 4, "traces_at": (0, 1) if same in makes else (0,)}
    FAMILY.add(f"{order}_pure", lambda a, b: (a + b, a), cases(*makes), **options)
    for name, write in WRITES.items():
        FAMILY.add(f"{order}_{name}", write, cases(*makes), **options)

# f(z, z) of one tensor.
FAMILY.add("twice_write", lambda x, y: (x.add_(1), y * 2), same)
FAMILY.add("twice_pure", lambda x, y: x - y, same)
FAMILY.add("twice_is", lambda x, y: x * 2 if x is y else x * 3, cases(same, separate), calls=4, traces_at=(0, 1))
FAMILY.add("thrice", lambda x, y, z: x.add_(y).add_(z), of(lambda x: (x, x, x), 3))
FAMILY.add("twice_in_list", lambda xs: [x.add_(1) for x in xs], of(lambda x: ([x, x],), 3))
FAMILY.add("twice_as_keyword", lambda x, *, y: (x.add_(1), y), of(lambda x: Call((x,), {"y": x}), 3))
FAMILY.add("view_and_base", lambda x, view: (view.add_(1), x * 2), of(lambda x: (x, x[1:]), 4))
FAMILY.add("base_and_view", lambda view, x: (x.add_(1), view * 2), of(lambda x: (x[1:], x), 4))
FAMILY.add("transposed_and_base", lambda x, y: (x[0].zero_(), y * 2), of(lambda x: (x, x.t()), 3, 3))
FAMILY.add("other_dtype_view", lambda x, y: (x.zero_(), y + 1), of(lambda x: (x, x.view(torch.int32)), 3))
FAMILY.add("real_and_complex", lambda z, r: (r.zero_(), z * 2), of(lambda z: (z, z.real), 3, dtype=torch.complex64))
FAMILY.add("conj_and_base", lambda z, c: (z.mul_(2j), c * 2), of(lambda z: (z, z.conj()), 3, dtype=torch.complex64))
FAMILY.add("expanded_and_base", lambda x, y: (x.add_(1), y * 2), of(lambda x: (x, x.expand(4, 3)), 1, 3))
FAMILY.add("empty_overlap", lambda x, y: (x.add_(1), y), of(lambda x: (x[:0], x[2:2]), 4))
FAMILY.add(
    "three_of_which_two_overlap",
    lambda a, b, c: (a.add_(1), b.mul_(2), a + b + c),
    of(lambda x: (x[:4], draw(77, 4), x[1:5]), 6),
)
FAMILY.add(
    "third_overlaps_another",
    lambda a, b, c: (a.add_(1), b + c),
    cases(
        lambda i: (lambda x: (x[:4], draw(i + 9, 4), x[1:5]))(draw(i, 6)),
        lambda i: (lambda x: (x[:4], x[1:5], draw(i + 9, 4)))(draw(i, 6)),
    ),
    calls=4,
)

# Outputs that are inputs, share memory with them, or with one another.
FAMILY.add("input", lambda x: x, tensors((3,)))
FAMILY.add("inputs_swapped", lambda x, y: (y, x), tensors((3,), (3,)))
FAMILY.add("input_twice", lambda x: (x, x), tensors((3,)))
FAMILY.add("input_in_containers", lambda x: {"a": [x], "b": (x, x + 1)}, tensors((3,)))
FAMILY.add("written_input", lambda x: (x.add_(1), x), tensors((3,)))
FAMILY.add("output_twice", lambda x: [x + 1] * 2, tensors((3,)))
FAMILY.add("outputs_view_each_other", lambda x: (lambda y: (y, y[1:], y.view(-1, 1), y[1:]))(x + 1), tensors((3,)))
FAMILY.add("outputs_views_of_hidden", lambda x: (lambda y: (y[1:], y[:-1]))(x + 1), tensors((4,)))
FAMILY.add("output_is_view_and_view_of_view", lambda x: (x[1:], x[1:][1:], x), tensors((4,)))
FAMILY.add("one_output_written_after", lambda x: (lambda y: (y, y[0].fill_(9), y * 2))(x * 1), tensors((4,)))
FAMILY.add("unused_input", lambda x, y: x + 1, tensors((3,), (3,)))
FAMILY.add("nothing_used", lambda x, y: None, tensors((3,), (3,)))
FAMILY.add("base_and_t_", lambda x, y: (x.t_(), y + 1), of(lambda x: (x, x), 3, 4))
FAMILY.add("noop_chain", lambda x: x.contiguous().to(torch.float32).cpu(), tensors((3, 4)))
FAMILY.add("dropout_off", lambda x: torch.dropout(x, 0.5, False), tensors((3, 4)))
FAMILY.add("real_input", lambda x: (x.real, x.conj(), x.resolve_conj(), x.resolve_neg()), tensors((3,)))
FAMILY.add("input_and_its_view_returned", lambda x: (x.view(-1), x), tensors((2, 3)))
FAMILY.add("fresh_each_call", lambda x: (torch.zeros(3), torch.tensor([1.0, 2.0]), x * 0), tensors((3,)))
FAMILY.add("constant_twice", lambda x: [torch.ones(2)] * 2, tensors((3,)))


@FAMILY.program(tensors((4,)))
def write_after_view_of_intermediate(x: Tensor) -> Any:
    y = x + 1
    view = y[1:]
    z = view * 1
    y.zero_()
    return z, view


@FAMILY.factory(tensors((4,)))
def previous_output_as_input() -> Any:
    """Feeding an output back must not see it overwritten by a later call."""

    def run(x: Tensor) -> Any:
        return x * 2, x[1:] + 1

    return run


@FAMILY.program(tensors((4,)), calls=5)
def large_intermediates(x: Tensor) -> Any:
    a = x.expand(64, 4) * 2
    b = a.sin()
    c = b + a
    return a, c, c[0]


@FAMILY.program(tensors((2, 3), (2, 3)))
def conditional_identity(x: Tensor, y: Tensor) -> Any:
    same_shape = x.shape == y.shape
    return (x if same_shape else y), y.view(6) if same_shape else None
