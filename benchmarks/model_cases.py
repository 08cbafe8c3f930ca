"""Whole models to measure, built from configurations of `transformers`: the table MODELS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case, bert, gpt2, minilm, mlp, resnet, tensors, tokens
from benchmarks.timing import Call


def of(name: str, head: str, **config: Any) -> nn.Module:
    """`<name><head>` with random weights."""
    import transformers

    made: nn.Module = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**config))
    return made


def vit_tiny() -> nn.Module:
    return of("ViT", "Model", hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)


def convnext() -> nn.Module:
    return of("ConvNext", "Model")


def mobilenet() -> nn.Module:
    return of("MobileNetV2", "Model")


def llama() -> nn.Module:
    """Four query heads to each head of keys and values."""
    return of(
        "Llama",
        "ForCausalLM",
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )


class Decoding(nn.Module):
    """The next token of a Llama, after 64 others whose keys and values lie in a cache of fixed size."""

    def __init__(self) -> None:
        from transformers import StaticCache

        super().__init__()
        self.model: Any = llama().eval()
        self.cache = StaticCache(config=self.model.config, max_cache_len=128)
        with torch.no_grad():
            self.model(torch.randint(8192, (1, 64)), past_key_values=self.cache)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for layer in self.cache.layers:
            layer.keys, layer.values = fn(layer.keys), fn(layer.values)
        return super()._apply(fn, recurse)

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(64)  # else each call would take the next place
        given = {"position_ids": position[None], "cache_position": position, "past_key_values": self.cache}
        found: torch.Tensor = self.model(token, **given).logits
        return found


def next_token() -> Call:
    return (torch.randint(8192, (1, 1)), torch.tensor([64])), {}


class WhisperEncoder(nn.Module):
    """The encoder of Whisper-tiny."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
        self.encoder = of("Whisper", "Model", **sizes, decoder_layers=1).encoder

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(frames).last_hidden_state
        return found


def t5_small() -> nn.Module:
    return of("T5", "Model")


def sequences() -> Call:
    _, kwargs = tokens(32128, 1, 64, use_cache=False)()
    return (), kwargs | {"decoder_input_ids": torch.randint(32128, (1, 16))}


def pixels() -> Call:
    return (), {"pixel_values": torch.randn(1, 3, 224, 224)}


class Autocast(nn.Module):
    """A model under autocast to bfloat16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(*args, **kwargs)


def short(case: Case) -> Case:
    """The case with weights and activations in bfloat16."""

    def build() -> nn.Module:
        model: Any = case.build()
        made: nn.Module = model.bfloat16()
        return made

    return replace(case, title=f"{case.title}, bfloat16", build=build)


def autocast(case: Case) -> Case:
    """The case with weights in float32, under autocast."""
    return replace(case, title=f"{case.title}, autocast to bfloat16", build=lambda: Autocast(case.build()))


MODELS = {
    "mlp": Case("MLP, batch 1", mlp, tensors((1, 256))),
    "gpt2": Case("GPT-2 small, 1x64 tokens", gpt2, tokens(50257, 1, 64, use_cache=False)),
    "bert": Case("BERT base, 1x128 tokens", bert, tokens(30522, 1, 128)),
    "vit": Case("ViT-tiny, 224x224", vit_tiny, pixels),
    "resnet": Case("ResNet-18, 224x224", resnet, pixels),
    "convnext": Case("ConvNeXt-tiny, 224x224", convnext, pixels),
    "mobilenet": Case("MobileNetV2, 224x224", mobilenet, pixels),
    "llama": Case("Llama, 8 layers of 512, grouped queries, 1x64 tokens", llama, tokens(8192, 1, 64, use_cache=False)),
    "llama-decode": Case("the same Llama, one token after 64, static cache", Decoding, next_token),
    "whisper": Case("Whisper-tiny's encoder, 30 s", WhisperEncoder, tensors((1, 80, 3000))),
    "minilm": Case("MiniLM, real weights, 4x32 tokens", minilm, tokens(30522, 4, 32)),
    "t5": Case("T5-small, 1x64 tokens, 16 decoded", t5_small, sequences),
}
MODELS |= {
    f"{name}-{suffix}": change(MODELS[name])
    for name in ("bert", "gpt2", "llama")
    for suffix, change in (("bf16", short), ("autocast", autocast))
}
