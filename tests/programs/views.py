"""Views of every kind: returned, written through, and taken of an intermediate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.programs.table import Family, cases, draw, of, tensors

FAMILY = Family("views")

MATRIX: dict[str, Callable[[Tensor], Any]] = {
    "select": lambda x: x.select(0, 1),
    "select_negative": lambda x: x[-1],
    "select_twice": lambda x: x[1][2],
    "slice": lambda x: x[1:3],
    "slice_step": lambda x: x[:, ::2],
    "slice_all": lambda x: x[:],
    "slice_empty": lambda x: x[2:2],
    "ellipsis": lambda x: x[..., 0],
    "none_index": lambda x: x[None, :, None],
    "mixed_index": lambda x: x[1:, None, 3],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "diagonal": lambda x: x.diagonal(),
    "diagonal_offset": lambda x: torch.diagonal(x, offset=2),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "as_strided": lambda x: x.as_strided((2, 3), (6, 2), 1),
    "view": lambda x: x.view(-1),
    "view_as": lambda x: x.view_as(torch.empty(6, 4)),
    "reshape": lambda x: x.reshape(2, -1),
    "reshape_itself": lambda x: x.reshape(4, 6),
    "flatten": lambda x: torch.flatten(x),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "ravel": lambda x: x.ravel(),
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "H": lambda x: x.H,
    "mH": lambda x: x.mH,
    "adjoint": lambda x: x.adjoint(),
    "transpose": lambda x: x.transpose(0, -1),
    "permute": lambda x: x.permute(1, 0),
    "movedim": lambda x: x.unflatten(1, (2, 3)).movedim(0, -1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "squeeze_nothing": lambda x: x.squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "detach": lambda x: x.detach(),
    "alias": lambda x: torch.ops.aten.alias.default(x),
    "view_same_dtype": lambda x: x.view(torch.float32),
    "view_int32": lambda x: x.view(torch.int32),
    "view_uint8": lambda x: x.view(torch.uint8),
    "view_float64": lambda x: x.view(torch.float64),
    "view_as_complex": lambda x: torch.view_as_complex(x.unflatten(1, (3, 2))),
    "split": lambda x: x.split(2),
    "split_sizes": lambda x: x.split([1, 3, 2], dim=1),
    "chunk": lambda x: x.chunk(3, dim=1),
    "tensor_split": lambda x: x.tensor_split(4, dim=1),
    "hsplit": lambda x: x.hsplit((2, 4)),
    "vsplit": lambda x: torch.vsplit(x, 2),
    "unbind": lambda x: x.unbind(1),
    "iterate": lambda x: list(x),
    "real_of_real": lambda x: x.real,
    "conj_of_real": lambda x: x.conj(),
    "contiguous": lambda x: x.contiguous(),
    "to_same": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "cpu": lambda x: x.cpu(),
    "type_same": lambda x: x.type(torch.float32),
    "positive": lambda x: +x,
    "expand_same": lambda x: x.expand(4, 6),
    "expand_minus_one": lambda x: x.expand(1, -1, -1),
    "broadcast_to": lambda x: x.broadcast_to((1, 4, 6)),
    "atleast_3d": lambda x: torch.atleast_3d(x),
    "neg_view": lambda x: torch._neg_view(x),
    "chain": lambda x: x.t()[1:5].unflatten(0, (2, 2)).transpose(0, 2)[::2],
}

# Copies where eager copies: what they return shares nothing with x.
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda x: x.clone(),
    "reshape_copy": lambda x: x.t().reshape(-1),
    "contiguous_copy": lambda x: x.t().contiguous(),
    "clone_transposed": lambda x: x.t().clone(),
    "to_double": lambda x: x.to(torch.float64),
    "to_copy": lambda x: x.to(torch.float32, copy=True),
    "mask_index": lambda x: x[torch.tensor([True, False, True, True])],
    "list_index": lambda x: x[[0, 2]],
    "tensor_index": lambda x: x[:, torch.tensor([5, 0, 0])],
    "flip": lambda x: x.flip(0),
    "repeat": lambda x: x.repeat(1, 2),
    "tile": lambda x: x.tile(2, 1),
    "roll": lambda x: x.roll(1, 0),
    "diag_embed": lambda x: x[0].diag_embed(),
    "view_copy": lambda x: torch.ops.aten.view_copy.default(x, [24]),
    "cat_itself": lambda x: torch.cat([x]),
    "squeeze_copy": lambda x: torch.squeeze_copy(x[None], 0),
}

COMPLEX: dict[str, Callable[[Tensor], Any]] = {
    "real": lambda z: z.real,
    "imag": lambda z: z.imag,
    "imag_of_conj": lambda z: z.conj().imag,
    "view_as_real": lambda z: torch.view_as_real(z),
    "conj": lambda z: z.conj(),
    "conj_twice": lambda z: z.conj().conj(),
    "conj_physical": lambda z: z.conj_physical(),
    "resolve_conj": lambda z: z.conj().resolve_conj(),
    "resolve_nothing": lambda z: z.resolve_conj(),
    "H": lambda z: z.H,
    "mH": lambda z: z.mH,
    "adjoint": lambda z: z.adjoint(),
    "view_float": lambda z: z.view(torch.float32),
    "resolve_neg": lambda z: z.conj().imag.resolve_neg(),
}


def first(views: Any) -> Tensor:
    return views if isinstance(views, Tensor) else views[0]


def writing(view: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Write through the (first) view, and return it with what else was there."""

    def write(x: Tensor) -> Any:
        before = x * 1
        views = view(x)
        one = first(views)
        one.add_(1) if one.dtype is torch.uint8 else one.mul_(2)
        return views, before, x.sum(0)

    return write


def of_intermediate(view: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """View an intermediate, write to the intermediate, and return only the view."""

    def look(x: Tensor) -> Any:
        y = x + 1
        views = view(y)
        y.mul_(3)
        return views

    return look


for name, view in MATRIX.items():
    FAMILY.add(name, view, tensors((4, 6)))
    FAMILY.add(f"write_{name}", writing(view), tensors((4, 6)))
    FAMILY.add(f"intermediate_{name}", of_intermediate(view), tensors((4, 6)))
for name, view in COPIES.items():
    FAMILY.add(name, view, tensors((4, 6)))
    FAMILY.add(f"write_{name}", writing(view), tensors((4, 6)))
for name, view in COMPLEX.items():
    FAMILY.add(f"complex_{name}", view, tensors((3, 4), dtype=torch.complex64))
    FAMILY.add(f"complex_write_{name}", writing(view), tensors((3, 4), dtype=torch.complex64))
    FAMILY.add(f"complex_intermediate_{name}", of_intermediate(view), tensors((3, 4), dtype=torch.complex64))

ONES = tensors((1, 3, 1, 2))
FAMILY.add("squeeze", lambda x: x.squeeze(), ONES)
FAMILY.add("squeeze_dim", lambda x: (x.squeeze(0), x.squeeze(1), x.squeeze(-2)), ONES)
FAMILY.add("squeeze_dims", lambda x: x.squeeze((0, 2)), ONES)
FAMILY.add("dsplit", lambda x: torch.dsplit(x, 2), tensors((2, 3, 4)))
FAMILY.add("expand", lambda x: x.expand(4, 3), tensors((1, 3)))
FAMILY.add("expand_as", lambda x, y: x.expand_as(y), tensors((3,), (2, 3)))
# Of the argument only the metadata is used.
FAMILY.add("view_as_intermediate", lambda x: x.view_as(x * 2), tensors((2, 3)))
FAMILY.add("reshape_as_intermediate", lambda x: x.reshape_as(x.t() * 2), tensors((2, 3)))
FAMILY.add("expand_as_intermediate", lambda x: x[:1].expand_as(x.clone()), tensors((2, 3)))
FAMILY.add("type_as_intermediate", lambda x: x.type_as(x.double() * 2), tensors((2, 3)))
FAMILY.add("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), tensors((3, 1), (4,)))
FAMILY.add("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), tensors((3,), (4,)))
FAMILY.add("zero_dim", lambda x: (x[None], x.view(1), x.expand(3), x[...], x.squeeze(), x.t()), tensors(()))
FAMILY.add("empty", lambda x: (x.t(), x[:, 1:], x.view(-1), x.unsqueeze(0)), tensors((0, 3)))
FAMILY.add("of_expanded", lambda x: (x.t(), x[1:], x[:, 0]), of(lambda x: (x.expand(4, 3),), 1, 3))
FAMILY.add("of_transposed", lambda x: (x.t(), x[1:], x.reshape(-1), x.contiguous()), of(lambda x: (x.t(),), 3, 4))
FAMILY.add("of_offset", lambda x: (x, x[1:], x.view(2, 2)), of(lambda x: (x[2:6],), 9))
FAMILY.add(
    "of_conj",
    lambda z: (z.real, z.imag, z.conj(), z + 0),
    of(lambda z: (z.conj(),), 3, dtype=torch.complex64),
)
FAMILY.add("of_neg", lambda x: (x, x[1:], x + 0), of(lambda z: (z.conj().imag,), 3, dtype=torch.complex64))
FAMILY.add("write_of_conj", lambda z: z.mul_(2j), of(lambda z: (z.conj(),), 3, dtype=torch.complex64))
FAMILY.add("write_of_neg", lambda x: x.add_(1), of(lambda z: (z.conj().imag,), 3, dtype=torch.complex64))

# The conjugate bit and the strides are part of the metadata; where a tensor lies in its storage is not.
FAMILY.add(
    "conj_or_not",
    lambda z: z * 2,
    cases(lambda i: (draw(i, 3, dtype=torch.complex64),), lambda i: (draw(i, 3, dtype=torch.complex64).conj(),)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "strides_change",
    lambda x: (x.t(), x * 2),
    cases(lambda i: (draw(i, 4, 4),), lambda i: (draw(i, 4, 4).t(),)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "offset_changes",
    lambda x: (x[1:], x * 2),
    cases(lambda i: (draw(i, 6)[:4],), lambda i: (draw(i, 6)[2:],)),
    calls=4,
)


@FAMILY.program(tensors((4, 6)))
def views_of_views_written_in_turn(x: Tensor) -> Any:
    a = x[:2]
    b = x.t()
    a.add_(1)
    c = b[0]
    c.mul_(10)
    b[1].fill_(0)
    return a, c, b.sum()


@FAMILY.program(tensors((4, 6)), exact_versions=False)
def data(x: Tensor) -> Tensor:
    """`.data` shares memory; writing through it is seen in x."""
    x.data.mul_(2)
    return x + 1


@FAMILY.program(tensors((6,)))
def write_to_every_split(x: Tensor) -> Any:
    for k, part in enumerate(x.split(2)):
        part.mul_(k)
    return x


@FAMILY.program(tensors((3, 4)))
def unpack(x: Tensor) -> Any:
    a, *rest = x
    return rest[-1], a


@FAMILY.program(tensors((4, 6)))
def shape_arithmetic(x: Tensor) -> Any:
    rows, columns = x.shape
    return x.view(rows * 2, columns // 2)[: x.size(0) - 1], x.view(x.numel() // 3, 3)


for op in (
    torch.floor_divide, torch.copysign, torch.xlogy, torch.div, torch.special.xlog1py, torch.logical_and,
    torch.logical_or, torch.logical_xor, torch.heaviside, torch.logaddexp, torch.logaddexp2,
):  # fmt: skip
    FAMILY.add(f"transposed_{op.__name__}", lambda x, op=op: (op(x, x.t()), op(x.t(), x)), tensors((4, 4)))
FAMILY.add("transposed_ldexp", lambda x: torch.ldexp(x, x.t().int()), tensors((4, 4)))
DRAWS: tuple[Any, ...] = (torch.poisson, lambda t: torch.normal(0.0, t), lambda t: torch.normal(t, t))
FAMILY.add("transposed_draws", lambda x: [draw(x.t().abs()).view(-1) for draw in DRAWS], tensors((3, 4)))
FAMILY.add("transposed_exponent", lambda x: (2.0 ** x.t(), torch.isin(x.t(), x)), tensors((3, 4)))
FAMILY.add("transposed_logsigmoid", lambda x: torch.nn.functional.logsigmoid(x.t()), tensors((3, 4)))
FAMILY.add("transposed_floor", lambda x: x.div(x.t(), rounding_mode="floor"), tensors((4, 4)))
