"""Models of `transformers`, tiny and with dropout, trained for ten steps traced and eagerly: the same parameters.

One trace serves all steps: each has other data and other padding, and continues the random numbers of the last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import primexec
from tests.test_transformers import MODEL, Arch, assert_same, counts

STEPS = 10

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}

QUICK = ("Bert", "GPT2", "Llama", "ResNet")
EXHAUSTIVE = (
    "Albert",
    "Bart",
    "Bloom",
    "CLIP",
    "ConvNext",
    "DebertaV2",
    "DistilBert",
    "Electra",
    "GPTNeo",
    "GPTNeoX",
    "Mamba",
    "Mistral",
    "MobileNetV2",
    "OPT",
    "Qwen2",
    "Roberta",
    "Segformer",
    "Swin",
    "T5",
    "ViT",
    "Whisper",
)
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in EXHAUSTIVE)]


def loss_of(output: Any) -> Tensor:
    """The mean square of the first result that requires grad: logits or hidden states."""
    leaves = pytree.tree_leaves(dict(output))
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad).square().mean()


def train(run: Callable[..., Any], arch: Arch, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        inputs = arch.inputs(arch.lengths[0])
        optimizer.zero_grad()
        loss = loss_of(run(**inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps(name: str) -> None:
    arch = MODEL[name]
    make = list(OPTIMIZERS.values())[len(name) % len(OPTIMIZERS)]
    eager = arch.build().train()
    model = copy.deepcopy(eager)
    traced = primexec.make_traced(model)
    expected = train(eager, arch, make(eager.parameters()))
    actual = train(traced, arch, make(model.parameters()))
    assert counts(traced) == (STEPS - 1, 1, 1)
    assert_same(actual, expected)
    assert_same(dict(model.state_dict()), dict(eager.state_dict()))
    assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])


@pytest.mark.parametrize("name", ["GPT2"])
def test_labels_and_clipping(name: str) -> None:
    """The loss that the model itself computes, as a trainer does it: all of it inside of the program."""
    arch = MODEL[name]
    eager = arch.build().train()
    model = copy.deepcopy(eager)
    runs = {"eager": (eager, eager), "traced": (model, primexec.make_traced(model))}
    for step in range(3):
        for module, run in runs.values():
            torch.manual_seed(step)
            inputs = arch.inputs(8)
            out = run(**inputs, labels=inputs["input_ids"])
            out.loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            with torch.no_grad():
                for p in module.parameters():
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None
    assert counts(runs["traced"][1]) == (2, 1, 1)
    assert_same(dict(model.state_dict()), dict(eager.state_dict()))


@pytest.mark.parametrize("name", ["Bert", pytest.param("T5", marks=pytest.mark.exhaustive)])
def test_under_autocast(name: str) -> None:
    arch = MODEL[name]
    eager = arch.build().train()
    model = copy.deepcopy(eager)
    traced = primexec.make_traced(model)
    for step in range(2):
        for module, run in ((eager, eager), (model, traced)):
            torch.manual_seed(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(run(**arch.inputs(8)))
            loss.backward()
            assert not all(p.grad is None for p in module.parameters())
    assert counts(traced) == (1, 1, 1)
    assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])


@pytest.mark.parametrize("name", ["GPT2"])
def test_gradient_checkpointing(name: str) -> None:
    """`transformers` checkpoints each layer; dropout draws the same numbers again."""
    arch = MODEL[name]
    eager = arch.build().train()
    eager.activation_checkpointing_enable({"use_reentrant": False})
    model = copy.deepcopy(eager)
    traced = primexec.make_traced(model)
    for step in range(2):
        for run in (eager, traced):
            torch.manual_seed(step)
            loss_of(run(**arch.inputs(8))).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])
    assert counts(traced) == (1, 1, 1)
