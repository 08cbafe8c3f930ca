"""Dtypes, layouts, flags and modes: what of an output is not its values."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.programs.table import Family, Inputs, cases, draw, of, tensors

FAMILY = Family("metadata")
X = tensors((3, 4))

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def arithmetic(x: Tensor, y: Tensor) -> Any:
    return x * y, x + 1, x == y, x.sum(), x * 1.5, torch.where(x == y, x, y), x.t()


for dtype in DTYPES:
    FAMILY.add(f"dtype_{dtype}".replace("torch.", ""), arithmetic, tensors((3, 4), (3, 4), dtype=dtype))
for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2):
    FAMILY.add(
        f"dtype_{dtype}".replace("torch.", ""),
        lambda x: (x.to(torch.float64) + 1, x.t(), x.clone()),
        tensors((2, 3), dtype=dtype),
    )
FAMILY.add(
    "mixed_dtypes",
    lambda x, y: (x + y, x @ x.t() * y[0, 0]),
    lambda i: (draw(i, 3, 4), draw(i, 3, 4).double()),
)
FAMILY.add("zero_dim_promotion", lambda x, y: (x + y, y + x), lambda i: (draw(i, 3), draw(i, dtype=torch.float64)))
FAMILY.add("integer_division", lambda x: (x / 2, x // 2, x % 3, x**2), tensors((5,), dtype=torch.int32))

LAYOUTS: dict[str, Inputs] = {
    "contiguous": tensors((2, 3, 4, 5)),
    "channels_last": of(lambda x: (x.to(memory_format=torch.channels_last),), 2, 3, 4, 5),
    "permuted": of(lambda x: (x.permute(3, 1, 0, 2),), 2, 3, 4, 5),
    "sliced": of(lambda x: (x[:, ::2, 1:],), 2, 3, 4, 5),
    "expanded": of(lambda x: (x.expand(2, 3, 4, 5),), 1, 3, 4, 1),
    "offset": of(lambda x: (x[3:123].view(2, 3, 4, 5),), 130),
    "overlapping_itself": of(lambda x: (x.as_strided((2, 3, 4, 5), (1, 2, 3, 4)),), 40),
    "ones": of(lambda x: (x.as_strided((2, 1, 4, 1), (4, 77, 1, 99)),), 8),
    "empty": tensors((2, 0, 4, 5)),
}


def norms(x: Tensor) -> Any:
    channels = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    sides = [x, x.flatten(2), x.flatten(2).transpose(0, 2), x.unsqueeze(2)]
    return [functional.batch_norm(s, *channels) for s in sides if s.shape[1] == x.shape[1]]


def windows(x: Tensor) -> Any:
    indices = torch.arange(x[0, 0].numel()).view(x[0, 0].shape).expand(x.shape)
    shuffled = torch.channel_shuffle(x, x.shape[1])
    return functional.max_unpool2d(x, indices, 2), functional.pad(x, [1] * 6, "replicate"), shuffled


STRIDES: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: (x + 1, x * x, x.relu(), x.to(torch.float64), x > 0),
    "like": lambda x: (torch.zeros_like(x), x.clone(), torch.ones_like(x, dtype=torch.int32)),
    "reduce": lambda x: (x.sum(1), x.mean((0, 3), keepdim=True), x.sum()),
    "shape": lambda x: (x.flatten(1), x.contiguous(), x.transpose(1, 2), torch.cat([x, x], 1), x[..., None]),
    "norm": norms,
}
for layout, inputs in LAYOUTS.items():
    for name, function in STRIDES.items():
        FAMILY.add(f"{layout}_{name}", function, inputs)
    if layout != "empty":
        FAMILY.add(f"{layout}_windows", windows, inputs)


def image_of_tokens(x: Tensor) -> Any:
    """A view whose first dimension has another stride than any new tensor's: kernels look at it."""
    y = x.transpose(1, 2).view(1, 6, 2, 2)
    attention = functional.scaled_dot_product_attention(*[y.flatten(2)[:, None].transpose(1, 2)[..., :1, :]] * 3)
    normed = functional.layer_norm(y[..., :1].transpose(2, 3), (2,)), functional.group_norm(y, 2)
    made = torch.zeros_like(y), torch.rand_like(y), torch.full_like(y, 3), torch.ones_like(y, dtype=torch.int32)
    return *made, y, y / 2, y * y, y + y[:, :1], functional.gelu(y), y.clamp(0, 1), y.softmax(1), *normed, attention


FAMILY.add("image_of_tokens", image_of_tokens, tensors((1, 4, 6)))
FAMILY.add(
    "pixels_of_an_image",
    lambda x: (x + x, x * 2, torch.ops.aten.add.Scalar(x, 1), x.masked_fill(x > 0, 1), torch.lerp(x, x * 2, 0.5)),
    of(lambda x: (x.as_strided((1, 6, 1, 1), (6, 1, 6, 6)),), 6),
)
FAMILY.add(
    "pooled_to_one_pixel",
    lambda x: functional.interpolate(torch.relu(functional.adaptive_avg_pool2d(x, 1)), size=(4, 4), mode="bilinear"),
    of(lambda x: (x.to(memory_format=torch.channels_last),), 2, 6, 4, 4),
)
FAMILY.add("two_layouts", lambda x, y: x + y, lambda i: (draw(i, 3, 4), draw(i, 4, 3).t()))
for dtype in (torch.bfloat16, torch.float16):
    FAMILY.add(
        f"expanded_{dtype}".replace("torch.", ""),
        lambda x, y: (y * x, torch.maximum(x, y), torch.addcmul(y, x, y), y * x.float(), y.reshape(-1)),
        lambda i, dtype=dtype: (draw(i, 4, 3, dtype=dtype).t(), draw(i, dtype=dtype).expand(3, 4)),
    )
FAMILY.add("broadcast_layouts", lambda x, y: x * y, lambda i: (draw(i, 4, 3).t(), draw(i, 4)))
FAMILY.add(
    "to_channels_last",
    lambda x: (x.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last) + 1),
    tensors((2, 3, 4, 5)),
)
FAMILY.add("preserve_format", lambda x: x.clone(memory_format=torch.preserve_format), of(lambda x: (x.t(),), 3, 4))
FAMILY.add("zero_dim", lambda x, y: (x + y, x.view(1), -x, x.sum()), tensors((), ()))
FAMILY.add("empty_reductions", lambda x: (x.sum(), x.prod(0), x.mean(), x.any(), x + 1), tensors((0, 3)))
FAMILY.add("nan_and_zero", lambda x: (x * float("nan"), x * -0.0, x / 0, torch.full((2,), -0.0)), X)

# Sizes that depend on values: another one at each call, in one trace.
DYNAMIC: dict[str, Callable[[Tensor], Any]] = {
    "mask": lambda x: x[x > 0],
    "mask_of_rows": lambda x: x[x[:, 0] > 0] * 2,
    "nonzero": lambda x: (x > 0).nonzero(),
    "nonzero_tuple": lambda x: (x > 0).nonzero(as_tuple=True),
    "index_by_nonzero": lambda x: x[(x > 0).nonzero(as_tuple=True)].sum(),
    "masked_select": lambda x: x.masked_select(x > 0).sort(),
    "unique": lambda x: x.round().unique(return_inverse=True, return_counts=True),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].abs().long(), dim=0),
    "computed_with": lambda x: (lambda y: (y.mean(), y.unsqueeze(0), torch.cat([y, y]), torch.zeros_like(y)))(x[x > 0]),
    "matmul": lambda x: x[x[:, 0] > 0] @ x.t(),
    "written": lambda x: x[x > 0].add_(1).t(),
    "set": lambda x: x.__setitem__(x > 0, x[x > 0] * 2),
    "view_written": lambda x: (lambda y: (y.detach().add_(1), y * 2)[1])(torch.zeros_like(x[x > 0])),
}
for name, function in DYNAMIC.items():
    FAMILY.add(f"dynamic_{name}", function, X, calls=5)

# Modes outside of the function.
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast_off": lambda: torch.autocast("cpu", enabled=False),
}


def mixed(x: Tensor, y: Tensor) -> Any:
    """Autocast changes matmul, not pointwise; inference mode marks what is made, not what is viewed."""
    z = x @ y.t()
    x.add_(1)
    return z, z + 1, x[1:], y.t(), y * 2, torch.zeros(2), z.softmax(-1)


for name, mode in MODES.items():
    FAMILY.add(f"mode_{name}", mixed, tensors((3, 4), (3, 4)), contexts=(mode,))
    FAMILY.add(
        f"mode_{name}_and_none",
        lambda x, y: (x @ y.t(), x[1:], x + 1),
        tensors((3, 4), (3, 4)),
        contexts=(mode, nullcontext),
        calls=4,
        traces_at=(0,) if name in ("enable_grad", "autocast_off") else (0, 1),
    )


def inference_tensors(*shapes: tuple[int, ...]) -> Inputs:
    def make(i: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(draw(i + k, *shape) for k, shape in enumerate(shapes))

    return make


FAMILY.add("inference_input", lambda x: (x + 1, x[1:], x), inference_tensors((3, 4)))
FAMILY.add(
    "inference_input_in_mode",
    lambda x: (x.add_(1), x[1:], x * 2),
    inference_tensors((3, 4)),
    contexts=(torch.inference_mode,),
)
FAMILY.add("inference_input_written_outside", lambda x: x.add_(1), inference_tensors((3, 4)), raises=RuntimeError)
FAMILY.add(
    "inference_or_not",
    lambda x: (x + 1, x[1:]),
    cases(lambda i: (draw(i, 3, 4),), inference_tensors((3, 4))),
    calls=4,
    traces_at=(0, 1),
)


# Modes inside of the function.
@FAMILY.program(X)
def no_grad_inside(x: Tensor) -> Any:
    with torch.no_grad():
        y = x * 2
    return y, y[1:]


@FAMILY.program(X)
def inference_mode_inside(x: Tensor) -> Any:
    """Inference tensors come out; what is made outside is none."""
    with torch.inference_mode():
        y = x * 2
        view = x[1:]
    return y, view, x + 1


@FAMILY.program(X, contexts=(torch.inference_mode,))
def inference_mode_left_inside(x: Tensor) -> Any:
    with torch.inference_mode(False):
        y = torch.ones(4)
    return y * 2, y, x + 1


@FAMILY.program(X)
def autocast_inside(x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.t()
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ x
    return y, z, x @ x.t()


@FAMILY.program(X, contexts=(lambda: torch.autocast("cpu", dtype=torch.bfloat16),))
def autocast_off_inside(x: Tensor) -> Any:
    y = x @ x.t()
    with torch.autocast("cpu", enabled=False):
        z = x @ x.t()
    return y, z


@FAMILY.program(X)
@torch.no_grad()
def no_grad_decorator(x: Tensor) -> Tensor:
    return x * 2


@FAMILY.program(X)
@torch.inference_mode()
def inference_decorator(x: Tensor) -> Any:
    return x * 2, x[1:]


@FAMILY.program(X)
def grad_mode_asked(x: Tensor) -> Any:
    return x * 2 if torch.is_grad_enabled() else x * 3


@FAMILY.program(X)
def metadata_asked(x: Tensor) -> Any:
    assert x.is_contiguous()
    assert not x.requires_grad
    assert x.device == torch.device("cpu")
    return (
        x.shape,
        x.dtype,
        x.dim(),
        x.numel(),
        x.stride(),
        x.element_size(),
        x.is_floating_point(),
        x.device.type,
    )


# Tensors that require grad, where no result does.
def requiring(*shapes: tuple[int, ...]) -> Inputs:
    return lambda i: tuple(draw(i + k, *shape).requires_grad_() for k, shape in enumerate(shapes))


FAMILY.add("grad_input_no_grad", lambda x: (x * 2, x.detach(), x), requiring((3,)), contexts=(torch.no_grad,))
FAMILY.add("grad_input_inference", lambda x: (x * 2, x), requiring((3,)), contexts=(torch.inference_mode,))
# Nothing is computed: the same object comes back, or training is refused.
FAMILY.add("grad_input_returned", lambda x: x, requiring((3,)), either=True)
# A view of what requires grad does so too, without a gradient function.
FAMILY.add("grad_input_view", lambda x: x[1:], requiring((3,)), contexts=(torch.no_grad,))
FAMILY.add(
    "grad_input_view_inference",
    lambda x: x[1:],
    requiring((3,)),
    contexts=(torch.inference_mode,),
)
FAMILY.add("grad_input_no_grad_inside", torch.no_grad()(lambda x: x * 2), requiring((3,)))
FAMILY.add("grad_input_written_no_grad", lambda x: x.mul_(0.5), requiring((3,)), contexts=(torch.no_grad,))
FAMILY.add("grad_input_shape_only", lambda x: torch.zeros(x.shape), requiring((3,)))
FAMILY.add("grad_input_detached", lambda x: x.detach() * 2, requiring((3,)))
FAMILY.add("grad_input_integers", lambda x: (x > 0, x.argmax()), requiring((3,)))
FAMILY.add(
    "requires_grad_changes",
    lambda x: x * 2,
    cases(lambda i: (draw(i, 3),), requiring((3,))),
    contexts=(torch.no_grad,),
    calls=4,
    traces_at=(0, 1),
)
