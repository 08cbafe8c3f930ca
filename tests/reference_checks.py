"""Runs a reference and the operator that it describes, and compares."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from primexec import reference
from primexec.prims import TABLE

NARROW = (torch.float16, torch.bfloat16)
DTYPES = {name: getattr(torch, name) for name in (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
    "complex128")}  # fmt: skip


def array(value: Any) -> Any:
    """Tensors as arrays; a dtype by its name."""
    if isinstance(value, torch.dtype):
        return str(value)[6:]
    if not isinstance(value, Tensor):
        return value
    value = value.detach().resolve_conj()
    return (value.float() if value.dtype in NARROW else value).numpy().copy()


def declared(name: str) -> list[torch.dtype]:
    """The dtypes that the table declares for a prim."""
    return [DTYPES[d] for d in TABLE[name].dtypes.split()]


def run(name: str, *args: Any, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """Results of the operator and of its reference; arguments of both must come out as they went in."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    arrays = [array(leaf) for leaf in leaves]
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
    rargs, rkwargs = pytree.tree_unflatten(arrays, spec)
    actual = reference.lookup(name)(*rargs, **rkwargs)
    for a, b in zip(arrays, before, strict=True):
        assert not isinstance(a, np.ndarray) or np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    expected = evaluate(name, args, kwargs)
    as_list = lambda r: list(r) if isinstance(r, (tuple, list)) else [r]  # noqa: E731
    return as_list(expected), as_list(actual)


def evaluate(name: str, args: Any, kwargs: Any) -> Any:
    """The operator's results; where it has no kernel for 16-bit floats, those of float32, rounded."""
    try:
        return TABLE[name].operator(*args, **kwargs)
    except NotImplementedError:
        dtype = next(a.dtype for a in pytree.tree_leaves(args) if isinstance(a, Tensor))
        assert dtype in NARROW
        wide = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
        result = TABLE[name].operator(*wide[0], **wide[1])
        return pytree.tree_map_only(Tensor, lambda t: t.to(dtype), result)


def check(name: str, *args: Any, rtol: float = 0.0, atol: float = 0.0, **kwargs: Any) -> None:
    """The reference agrees with the operator: dtype, shape, values, NaN where it has NaN, the signs of infinities."""
    expected, actual = run(name, *args, **kwargs)
    assert len(actual) == len(expected)
    for e, a in zip(expected, actual, strict=True):
        close(e, a, rtol=rtol, atol=atol)


def close(expected: Tensor, actual: Any, *, rtol: float, atol: float) -> None:
    assert type(actual) is np.ndarray
    assert actual.shape == tuple(expected.shape)
    if expected.dtype in NARROW:
        actual = reference.cast(actual, str(expected.dtype))
    wanted = array(expected)
    assert actual.dtype == wanted.dtype, f"{actual.dtype} for {wanted.dtype}"
    if wanted.dtype.kind not in "fc":
        rtol = atol = 0.0
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol, equal_nan=True)
