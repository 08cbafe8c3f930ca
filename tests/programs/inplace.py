"""Writing in place: to inputs, to views of them, to intermediates; out= arguments; assignment by index."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.programs.table import Call, Family, cases, draw, of, tensors

FAMILY = Family("inplace")

# Each is run on an input, on a view of an input, and on an intermediate.
OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add_": lambda x, y: x.add_(y),
    "add_alpha": lambda x, y: x.add_(y, alpha=2),
    "add_scalar": lambda x, y: x.add_(1.5),
    "sub_": lambda x, y: x.sub_(y),
    "mul_": lambda x, y: x.mul_(y),
    "div_": lambda x, y: x.div_(y, rounding_mode="floor"),
    "pow_": lambda x, y: x.pow_(2),
    "neg_": lambda x, y: x.neg_(),
    "relu_": lambda x, y: x.relu_(),
    "clamp_": lambda x, y: x.clamp_(-0.5, 0.5),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.5),
    "addcdiv_": lambda x, y: x.addcdiv_(y, y + 10),
    "lerp_": lambda x, y: x.lerp_(y, 0.25),
    "copy_": lambda x, y: x.copy_(y),
    "copy_broadcast": lambda x, y: x.copy_(y[0]),
    "copy_other_dtype": lambda x, y: x.copy_(y.double()),
    "fill_": lambda x, y: x.fill_(7),
    "fill_tensor": lambda x, y: x.fill_(y[0, 0]),
    "zero_": lambda x, y: x.zero_(),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, -1.0),
    "masked_scatter_": lambda x, y: x.masked_scatter_(y > 0, y),
    "scatter_": lambda x, y: x.scatter_(0, torch.zeros(1, 4, dtype=torch.long), y),
    "scatter_value": lambda x, y: x.scatter_(1, torch.zeros(3, 1, dtype=torch.long), 5.0),
    "scatter_add_": lambda x, y: x.scatter_add_(0, torch.zeros(3, 4, dtype=torch.long), y),
    "scatter_reduce_": lambda x, y: x.scatter_reduce_(0, torch.ones(3, 4, dtype=torch.long), y, "amax"),
    "index_put_": lambda x, y: x.index_put_((torch.tensor([0, 2]),), y[0]),
    "index_put_accumulate": lambda x, y: x.index_put_((torch.tensor([1, 1]),), y[0], accumulate=True),
    "index_add_": lambda x, y: x.index_add_(0, torch.tensor([0, 0, 2]), y),
    "index_copy_": lambda x, y: x.index_copy_(1, torch.tensor([3, 0]), y[:, :2]),
    "index_fill_": lambda x, y: x.index_fill_(0, torch.tensor([1]), 9.0),
    "addmm_": lambda x, y: x.addmm_(y, torch.eye(4)),
    "cumsum_": lambda x, y: x.cumsum_(0),
    "tril_": lambda x, y: x.tril_(),
    "sigmoid_": lambda x, y: torch.sigmoid_(x),
    "functional_relu": lambda x, y: F.relu(x, inplace=True),
    "functional_elu": lambda x, y: F.elu(x, inplace=True),
    "iadd": lambda x, y: x.__iadd__(y),
    "logical": lambda x, y: x.logical_and_(y),
    "comparison": lambda x, y: x.gt_(y),
    "foreach": lambda x, y: torch._foreach_add_([x, y], 1.0),
    "uniform_": lambda x, y: x.uniform_(-1, 1),
    "bernoulli_": lambda x, y: x.bernoulli_(0.5),
    "set_row": lambda x, y: x.__setitem__(0, y[1]),
    "set_scalar": lambda x, y: x.__setitem__((1, 2), 3.0),
    "set_slice": lambda x, y: x.__setitem__((slice(None), slice(0, 2)), y[:, 2:]),
    "set_ellipsis": lambda x, y: x.__setitem__((..., 0), y[:, 0]),
    "set_step": lambda x, y: x.__setitem__(slice(None, None, 2), 0),
    "set_mask": lambda x, y: x.__setitem__(y > 0, 0.5),
    "set_list": lambda x, y: x.__setitem__([0, 2], y[:2]),
    "set_index_tensor": lambda x, y: x.__setitem__((torch.tensor([0, 1]), torch.tensor([3, 2])), y[0, :2]),
    "set_mixed": lambda x, y: x.__setitem__((slice(1, None), torch.tensor([0, 2])), -y[:2, :2]),
    "set_all": lambda x, y: x.__setitem__(..., y),
    "set_itself": lambda x, y: x.__setitem__(0, x[0]),
}


def on_view(op: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    def run(x: Tensor, y: Tensor) -> Any:
        rows = x[1:4]
        total = x + 0
        return op(rows, y), total, x * 2

    return run


def on_intermediate(op: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    def run(x: Tensor, y: Tensor) -> Any:
        z = x * 2
        column = z[:, 1]
        return op(z, y), column, z

    return run


for name, op in OPS.items():
    FAMILY.add(name, op, tensors((3, 4), (3, 4)))
    FAMILY.add(f"view_{name}", on_view(op), tensors((5, 4), (3, 4)))
    FAMILY.add(f"intermediate_{name}", on_intermediate(op), tensors((3, 4), (3, 4)))

# Metadata in place: on an input, on a view of an input, and on an intermediate.
METADATA: dict[str, Callable[[Tensor], Any]] = {
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "swapdims_": lambda x: x.swapdims_(0, 1),
    "swapaxes_": lambda x: x.swapaxes_(1, 0),
    "squeeze_nothing_": lambda x: x.squeeze_(),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "unsqueeze_squeeze_": lambda x: x.unsqueeze_(1).squeeze_(1),
    "as_strided_": lambda x: x.as_strided_((2, 2), (1, 2)),
    "t_then_write": lambda x: x.t_().add_(1),
    "write_then_t_": lambda x: x.add_(1).t_(),
    "t_twice": lambda x: x.t_().t_(),
}
for name, change in METADATA.items():
    FAMILY.add(f"metadata_{name}", change, tensors((3, 4)))
    FAMILY.add(f"metadata_view_{name}", lambda x, f=change: (f(x[1:3]), x + 1), tensors((4, 3)))
    FAMILY.add(f"metadata_intermediate_{name}", lambda x, f=change: (f(x + 1), x), tensors((3, 4)))
FAMILY.add("detach_", lambda x: (x.detach_(), x + 1), tensors((3,)))
FAMILY.add("detach_of_view", lambda x: x[1:].detach_(), tensors((3,)), raises=RuntimeError, match="detach views")
FAMILY.add("metadata_nothing_returned", lambda x: (x.t_(), None)[1], tensors((1, 1)))
FAMILY.add("squeeze_", lambda x: x.squeeze_(), tensors((1, 3, 1)))
FAMILY.add("squeeze_dim_", lambda x: x.squeeze_(0), tensors((1, 3, 1)))
FAMILY.add("resize_fresh", lambda x: torch.empty(0).resize_(3).copy_(x), tensors((3,)))
FAMILY.add("resize_smaller", lambda x: (x + 1).resize_(2), tensors((3,)))
FAMILY.add("resize_same", lambda x: x.resize_(3), tensors((3,)))
FAMILY.add("resize_input_smaller", lambda x: x.resize_(2), tensors((3,)))

# out= variants.
FAMILY.add("out_input", lambda x, y: torch.add(x, y, out=x), tensors((3,), (3,)))
FAMILY.add("out_third", lambda x, y, out: torch.mul(x, y, out=out), tensors((3,), (3,), (3,)))
FAMILY.add("out_view", lambda x, out: torch.exp(x, out=out[1:4]), tensors((3,), (5,)))
FAMILY.add("out_transposed", lambda x, out: torch.exp(x, out=out.t()), tensors((3, 4), (4, 3)))
FAMILY.add("out_fresh", lambda x: torch.sin(x, out=torch.empty(0)), tensors((3,)))
FAMILY.add("out_resized_fresh", lambda x: torch.cat([x, x], out=torch.empty(0)), tensors((3,)))
FAMILY.add("out_other_dtype", lambda x, out: torch.add(x, 1, out=out), lambda i: (draw(i, 3), draw(i, 3).double()))
FAMILY.add(
    "out_two",
    lambda x, values, indices: torch.max(x, dim=0, out=(values, indices)),
    lambda i: (draw(i, 3, 4), draw(i, 4), torch.zeros(4, dtype=torch.long)),
)
FAMILY.add("out_matmul", lambda x, y, out: torch.mm(x, y, out=out), tensors((2, 3), (3, 4), (2, 4)))
FAMILY.add("out_sum", lambda x, out: torch.sum(x, 0, out=out) * 2, tensors((2, 3), (3,)))

# Errors of eager.
FAMILY.add("write_to_expanded", lambda x: x.expand(4, 3).add_(1), tensors((1, 3)), raises=RuntimeError)
FAMILY.add("set_item_of_expanded", lambda x: x.__setitem__(0, 1.0), of(lambda x: (x.expand(4, 3),), 1, 3))
FAMILY.add("input_expanded_write", lambda x: x.add_(1), of(lambda x: (x.expand(4, 3),), 1, 3), raises=RuntimeError)
FAMILY.add("write_int_with_float", lambda x: x.add_(0.5), tensors((3,), dtype=torch.int64), raises=RuntimeError)
FAMILY.add("write_too_large", lambda x, y: x.add_(y), tensors((3,), (2, 3)), raises=RuntimeError)

# What in-place reaches: order against reads, repetition, many inputs, other dtypes and layouts.
FAMILY.add("nothing_returned", lambda x: x.add_(1) is None, tensors((3,)))
FAMILY.add("zero_dim", lambda x, y: x.add_(y), tensors((), ()))
FAMILY.add("empty", lambda x: x.add_(1), tensors((0, 3)))
FAMILY.add("transposed_input", lambda x: x.mul_(2), of(lambda x: (x.t(),), 3, 4))
FAMILY.add("strided_input", lambda x: x.mul_(2), of(lambda x: (x[:, ::2],), 3, 4))
FAMILY.add("bool", lambda x: x.logical_not_(), tensors((5,), dtype=torch.bool))
FAMILY.add("integers", lambda x: x.bitwise_xor_(3).mul_(2), tensors((5,), dtype=torch.int32))
FAMILY.add("halves", lambda x: x.mul_(1.1).add_(x), tensors((5,), dtype=torch.bfloat16))
FAMILY.add("complex", lambda z: z.mul_(1j).real.add_(1), tensors((5,), dtype=torch.complex128))
FAMILY.add("kwarg", lambda x, *, out: out.copy_(x), lambda i: Call((draw(i, 3),), {"out": draw(i + 9, 3)}))
FAMILY.add(
    "shape_changes",
    lambda x: x.add_(1),
    cases(lambda i: (draw(i, 3),), lambda i: (draw(i, 2, 2),)),
    calls=4,
    traces_at=(0, 1),
)


@FAMILY.program(tensors((3,)))
def read_before_and_after(x: Tensor) -> Any:
    before = x * 2
    x.add_(1)
    after = x * 2
    x.mul_(after)
    return before, after, x.sum()


@FAMILY.program(tensors((4, 4)))
def write_through_two_views(x: Tensor) -> Any:
    row, column = x[1], x[:, 1]
    row.add_(1)
    column.mul_(row)
    return row, column


@FAMILY.program(tensors((3,), (3,), (3,)))
def swap(x: Tensor, y: Tensor, z: Tensor) -> None:
    old = x.clone()
    x.copy_(y)
    y.copy_(z)
    z.copy_(old)


@FAMILY.program(tensors((4,)))
def rebind(x: Tensor) -> Tensor:
    y = x
    y += 1
    y = y * 2
    y += x
    return y


@FAMILY.program(tensors((4,)))
def write_and_undo(x: Tensor) -> Tensor:
    """The values are as before; the version counter is not."""
    x.neg_()
    y = x * 1
    x.neg_()
    return y


@FAMILY.program(tensors((5, 4)))
def loop_of_writes(x: Tensor) -> Tensor:
    for k in range(1, x.shape[0]):
        x[k] += x[k - 1] * 0.5
    return x


@FAMILY.program(tensors((4,), (4,)))
def argument_of_write_is_written(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y.mul_(2))
    y.sub_(x)
    return x


@FAMILY.program(tensors((2, 3)))
def write_to_constant(x: Tensor) -> Tensor:
    """A constant made by the function is a fresh one at each call."""
    total = torch.tensor([1.0, 2.0, 3.0])
    total += x.sum(0)
    return total


@FAMILY.program(tensors((3, 4)))
def delete_and_reuse(x: Tensor) -> Tensor:
    y = x + 1
    view = y[0]
    del y
    return view.mul_(2)


@FAMILY.program(tensors((3, 4)))
def set_through_chain(x: Tensor) -> Tensor:
    x[1:][0][2:] = 5
    x.t()[0, 0] = -1
    return x
