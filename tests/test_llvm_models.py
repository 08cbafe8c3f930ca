"""Models of `transformers`, tiny and with random weights, on ("llvm", "aten"): as near to float64 as eager mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import primexec
from tests.test_training_models import loss_of
from tests.test_transformers import DECIDING, MODEL, Arch, counts

QUICK = ("Bert", "GPT2", "Llama", "T5", "ViT", "ResNet", "ConvNext", "MobileNetV2", "Whisper", "Mistral")
QUICK_TRAINING = ("Bert", "GPT2", "Llama", "T5", "ViT", "ResNet", "ConvNext", "MobileNetV2")
SHORT = ("Bert", "GPT2", "Llama")
# Their operators differ between dtypes, so that float64 judges another computation or has none.
UNJUDGED = frozenset({"Rwkv", "FNet", "Mixtral"})
# In training they branch on a drawn number to skip a layer: each way is a program.
SKIPPING = frozenset({"Hubert", "Wav2Vec2"})


def names(quick: tuple[str, ...], without: frozenset[str] = frozenset()) -> list[Any]:
    rest = [n for n in MODEL if n not in {*quick, *DECIDING, *UNJUDGED, *without}]
    return [*quick, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in rest)]


def wide(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def assert_as_near(actual: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """The largest error at most three times eager's and some rounding errors of the tensor's largest element.

    What cancels to nothing is judged by the largest element of all.
    """
    assert len(actual) == len(eager) == len(exact)
    largest = max((float(right.abs().max()) for right in exact if right.numel()), default=0.0)
    for got, theirs, right in zip(actual, eager, exact, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        assert not got.isnan().any()
        scale = float(right.abs().max()) if right.numel() else 0.0
        rounding = torch.finfo(got.dtype).eps * max(16 * scale, largest)
        allowed = 3 * float((theirs.double() - right).abs().max()) + rounding
        assert float((got.double() - right).abs().max()) <= allowed


def build(arch: Arch) -> tuple[nn.Module, nn.Module]:
    model = arch.build()
    return model, copy.deepcopy(model).double()


@pytest.mark.parametrize("name", names(QUICK))
@torch.no_grad()
def test_inference(name: str) -> None:
    arch = MODEL[name]
    model, exact = build(arch)
    traced = primexec.make_traced(model, executor=("llvm", "aten"))
    for _ in range(2):
        inputs = arch.inputs(arch.lengths[0])
        assert_as_near(floats(traced(**inputs)), floats(model(**inputs)), floats(exact(**wide(inputs))))
    assert counts(traced) == (1, 1, 1)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", SHORT)
@torch.no_grad()
def test_short_floats(name: str, autocast: bool) -> None:
    """Weights and activations in bfloat16, and float32 weights under autocast."""
    arch = MODEL[name]
    model = arch.build()
    model = model if autocast else model.bfloat16()
    exact = copy.deepcopy(model).double()
    traced = primexec.make_traced(model, executor=("llvm", "aten"))
    for _ in range(2):
        inputs = arch.inputs(arch.lengths[0])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got, theirs = floats(traced(**inputs)), floats(model(**inputs))
        assert_as_near(got, theirs, floats(exact(**wide(inputs))))
    assert counts(traced) == (1, 1, 1)


@pytest.mark.parametrize("name", names(QUICK_TRAINING, SKIPPING))
def test_training_step(name: str) -> None:
    """Gradients of parameters, and buffers, after two steps without dropout, whose draws differ between dtypes."""
    arch = MODEL[name]
    model, exact = build(arch)
    traced_model = copy.deepcopy(model)
    traced = primexec.make_traced(traced_model, executor=("llvm", "aten"))
    for m in (model, exact, traced_model):
        m.train()
        for part in m.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            for drawn in ("attention_dropout", "drop_prob"):
                if isinstance(getattr(part, drawn, None), float):
                    setattr(part, drawn, 0.0)
    for _ in range(2):
        inputs = arch.inputs(arch.lengths[0])
        losses = [loss_of(run(**given)) for run, given in ((traced, inputs), (model, inputs), (exact, wide(inputs)))]
        for loss in losses:
            loss.backward()
        assert_as_near(*([loss.detach()] for loss in losses))
    assert counts(traced) == (1, 1, 1)
    gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (traced_model, model, exact)]
    assert gradients[0]
    assert_as_near(*gradients)
    assert_as_near(*(floats(dict(m.named_buffers())) for m in (traced_model, model, exact)))
