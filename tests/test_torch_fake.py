"""Rules that are asked without the mode of fake tensors give what the mode gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import _torch_fake

PRIMS, ATEN = torch.ops.prims, torch.ops.aten


def _described(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    where = value.untyped_storage()._cdata, value.storage_offset()
    return value.shape, value.stride(), value.dtype, value.device, type(value), where


def assert_as_the_mode(op: Any, *args: Any, **kwargs: Any) -> None:
    old = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}

    def without_new(value: Any) -> Any:
        if isinstance(value, tuple) and value and not isinstance(value[0], torch.Size):
            return tuple(map(without_new, value))
        *layout, (storage, offset) = value
        return *layout, storage if storage in old else None, offset

    results = [without_new(_described(run)) for run in (_torch_fake.run(op, args, kwargs), op(*args, **kwargs))]
    assert results[0] == results[1]


LAYOUTS = {
    "plain": lambda: torch.empty(2, 4, 6),
    "transposed": lambda: torch.empty(6, 4, 2).permute(2, 1, 0),
    "every other": lambda: torch.empty(2, 4, 12)[..., ::2],
    "from the middle": lambda: torch.empty(4, 4, 6)[1:3],
    "expanded": lambda: torch.empty(2, 1, 6).expand(2, 4, 6),
    "empty": lambda: torch.empty(2, 0, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prims(layout: str) -> None:
    with _torch_fake.fake_mode(cached=False), torch.no_grad():
        x = LAYOUTS[layout]()
        y = torch.empty(x.shape)
        assert_as_the_mode(PRIMS.add.default, x, y)
        assert_as_the_mode(PRIMS.add.default, x, 2.0)
        assert_as_the_mode(PRIMS.eq.default, x, y)
        assert_as_the_mode(PRIMS.where.default, x > 0, x, y)
        assert_as_the_mode(PRIMS.where.default, x > 0, torch.empty(()), x)
        assert_as_the_mode(PRIMS.add.default, torch.empty(()), x)
        assert_as_the_mode(PRIMS.exp.default, x)
        assert_as_the_mode(PRIMS.convert_element_type.default, x, torch.float64)
        assert_as_the_mode(PRIMS.sum.default, x, [0, 2])
        assert_as_the_mode(PRIMS.transpose.default, x, [2, 0, 1])
        assert_as_the_mode(PRIMS.broadcast_in_dim.default, x, [3, *x.shape], [1, 2, 3])
        assert_as_the_mode(PRIMS.cat.default, [x, y], 1)
        assert_as_the_mode(PRIMS.clone.default, x)
        assert_as_the_mode(PRIMS.view_of.default, x)
        assert_as_the_mode(PRIMS.copy_to.default, y, x)
        assert_as_the_mode(PRIMS.full_like.default, x, 3, dtype=x.dtype, device=x.device, requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(dtype: torch.dtype, training: bool) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        with _torch_fake.fake_mode(), torch.no_grad():
            x = torch.empty(2, 4, 6, 6, dtype=dtype).to(memory_format=layout)
            scale, running = torch.empty(4, dtype=dtype), torch.empty(4, dtype=torch.float32)
            for given in (x, x[:, ::2], x[..., :3]):
                size = given.shape[1]
                stats = scale[:size], None, running[:size], running[:size]
                assert_as_the_mode(ATEN.native_batch_norm.default, given, *stats, training, 0.1, 1e-5)
