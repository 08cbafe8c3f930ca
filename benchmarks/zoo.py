"""Architectures of `transformers` that nothing was tuned for, small and with random weights, beside eager mode.

`python -m benchmarks.zoo opt swin` measures two; without names, all are measured, each in a fresh process, and
`--write docs/zoo.md` writes the table.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import primexec
from benchmarks.models import ON_LLVM, results, without_dropout
from benchmarks.process import answer, fresh
from benchmarks.run import processor
from benchmarks.timing import Turns, by_turns

Inputs = Callable[[], dict[str, Tensor]]
Measured = dict[str, Any]

LAYERS = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
TEXT = LAYERS | {"vocab_size": 1000}
DECODER = TEXT | {"num_key_value_heads": 2}
VISION = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1,
}  # fmt: skip
NARROW = ("embedding_size", "true_hidden_size", "intra_bottleneck_size")
EXPERTS = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
CODEC = {"encoder_hidden_size": 32, "downsampling_ratios": [2, 4, 4], "decoder_hidden_size": 256, "n_codebooks": 4}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 256]}


def tokens(length: int = 64) -> Inputs:
    return lambda: {"input_ids": torch.randint(5, 1000, (1, length))}


def image(size: int) -> Inputs:
    return lambda: {"pixel_values": torch.randn(1, 3, size, size)}


# The stem of the names of configuration and model, options, and inputs.
MODELS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "distilbert": ("DistilBert", {"dim": 256, "n_layers": 4, "n_heads": 4, "hidden_dim": 1024}, tokens()),
    "albert": ("Albert", TEXT | {"embedding_size": 64}, tokens()),
    "roberta": ("Roberta", TEXT, tokens()),
    "electra": ("Electra", TEXT | {"embedding_size": 64}, tokens()),
    "deberta-v2": ("DebertaV2", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, tokens()),
    "layoutlm": ("LayoutLM", TEXT, tokens()),
    "fnet": ("FNet", {k: v for k, v in TEXT.items() if k != "num_attention_heads"}, tokens()),
    "xlnet": ("XLNet", {"d_model": 256, "n_layer": 2, "n_head": 4, "d_inner": 512, "vocab_size": 1000}, tokens()),
    "opt": ("OPT", LAYERS | {"ffn_dim": 1024, "vocab_size": 1000, "word_embed_proj_dim": 256}, tokens()),
    "bloom": ("Bloom", {"hidden_size": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1000}, tokens()),
    "gpt-neox": ("GPTNeoX", TEXT, tokens()),
    "phi": ("Phi", TEXT, tokens()),
    "qwen2": ("Qwen2", DECODER, tokens()),
    "gemma": ("Gemma", DECODER | {"head_dim": 64}, tokens()),
    "mistral": ("Mistral", DECODER, tokens()),
    "mixtral": ("Mixtral", DECODER | {"num_local_experts": 4}, tokens()),
    "mamba": ("Mamba", {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 1000}, tokens()),
    "rwkv": ("Rwkv", {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}, tokens(32)),
    "swin": ("Swin", {"embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "image_size": 112}, image(112)),
    "deit": ("DeiT", VISION, image(224)),
    "clip-vision": ("CLIPVision", LAYERS, image(224)),
    "vit-msn": ("ViTMSN", VISION, image(224)),
    "yolos": ("Yolos", VISION | {"image_size": [128, 128], "num_detection_tokens": 20}, image(128)),
    "segformer": ("Segformer", {}, image(128)),
    "pvt": ("Pvt", {"image_size": 128, "hidden_sizes": [32, 64, 160, 256]}, image(128)),
    "levit": ("Levit", {}, image(224)),
    "mobilevit": ("MobileViT", {}, image(256)),
    "poolformer": ("PoolFormer", {"depths": [1] * 4, "hidden_sizes": [64, 128, 320, 512]}, image(160)),
    "convnext-v2": ("ConvNextV2", STAGES, image(160)),
    "regnet": ("RegNet", STAGES | {"groups_width": 16}, image(160)),
    "convbert": ("ConvBert", TEXT, tokens()),
    "mobilebert": ("MobileBert", TEXT | dict.fromkeys(NARROW, 64), tokens()),
    "funnel": (
        "Funnel",
        {"block_sizes": [1, 1, 1], "d_model": 256, "n_head": 4, "d_inner": 1024, "vocab_size": 1000},
        tokens(),
    ),
    "deepseek-v3": ("DeepseekV3", TEXT | LATENT | EXPERTS, tokens()),
    "gpt-oss": ("GptOss", DECODER | {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2}, tokens()),
    "qwen2-moe": ("Qwen2Moe", DECODER | EXPERTS | {"num_experts": 4}, tokens()),
    "swin-v2": ("Swinv2", {"embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "image_size": 112}, image(112)),
    "hiera": ("Hiera", {"embed_dim": 48, "depths": [1, 1, 2, 1], "image_size": [128, 128]}, image(128)),
    "bit": ("Bit", STAGES | {"num_groups": 8}, image(160)),
    "dac": ("Dac", CODEC, lambda: {"input_values": torch.randn(1, 1, 4096)}),
    "patch-tst": ("PatchTST", {}, lambda: {"past_values": torch.randn(8, 32, 1)}),
}


NOTES = """
levit in training: PyTorch's own gradient is wrong, in float64 too. Its kernel for the gradient of batch norm misreads a
gradient of a batch of one that lies as tokens, `batch_norm(x).flatten(2).transpose(1, 2)`; ours is that of the formula.
mobilevit in inference: with random weights its results are around 5e-40, where float32 has few digits: eager is as far
from float64.
"""


def build(name: str) -> nn.Module:
    """The model, without dropout, so that what contenders compute can be compared."""
    import transformers

    stem, options, _ = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{stem}Model")(getattr(transformers, f"{stem}Config")(**options))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return without_dropout(model)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, as a part of the largest number."""
    largest = max(float(t.abs().max()) for t in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def measured(turns: Turns, first: float, apart: float) -> Measured:
    return {"eager": turns.median("eager"), "ratio": turns.ratio("primexec", "eager"), "first": first, "apart": apart}


def inference(name: str, seconds: float) -> Measured:
    """Calls in inference: eager's median in seconds, our ratio to it, our first call, and the results' difference."""
    model, inputs = build(name).eval(), MODELS[name][2]
    with torch.no_grad():
        model(**inputs())
        traced = primexec.make_traced(model, **ON_LLVM)
        given = inputs()
        started = time.perf_counter()
        ours = results(traced(**given))
        first, theirs = time.perf_counter() - started, results(model(**given))
        turns = by_turns({"eager": model, "primexec": traced}, lambda: ((), inputs()), seconds)
    return measured(turns, first, difference(ours, theirs))


def training(name: str, seconds: float) -> Measured:
    """Forward and backward passes, each of a model of its own; the difference is that of the gradients."""
    models, inputs = {"eager": build(name).train()}, MODELS[name][2]
    models["primexec"] = copy.deepcopy(models["eager"])
    run = {"eager": models["eager"], "primexec": primexec.make_traced(models["primexec"], **ON_LLVM)}

    def step(contender: str, given: dict[str, Tensor]) -> None:
        models[contender].zero_grad()
        result = next(t for t in results(run[contender](**given)) if t.requires_grad)
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
        (result * weights).sum().backward()

    given = inputs()
    torch.manual_seed(0)  # the same draws for both
    step("eager", given)
    torch.manual_seed(0)
    started = time.perf_counter()
    step("primexec", given)
    first = time.perf_counter() - started
    found = [[p.grad for p in models[c].parameters() if p.grad is not None] for c in ("primexec", "eager")]
    apart = difference(*found)
    turns = by_turns({c: lambda c=c, **given: step(c, given) for c in models}, lambda: ((), inputs()), seconds)
    return measured(turns, first, apart)


KINDS: dict[str, Callable[[str, float], Measured]] = {"inference": inference, "training": training}


def row(name: str, found: dict[str, Measured]) -> str:
    cells = [name]
    for kind in KINDS:
        m = found[kind]
        cells += [f"{m['eager'] * 1e3:.2f}", f"{m['ratio']:.2f}", f"{m['first']:.1f}", f"{m['apart']:.0e}"]
    return f"| {' | '.join(cells)} |"


def page(found: dict[str, dict[str, Measured]], seconds: float) -> str:
    means = {k: statistics.geometric_mean(r[k]["ratio"] for r in found.values()) for k in KINDS}
    head = [
        "# Models that nothing was tuned for",
        "",
        f"Written by `python -m benchmarks.zoo --seconds {seconds:g} --write docs/zoo.md` on {datetime.date.today()}.",
        f"{processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}.",
        "",
        "Architectures of `transformers`, small and with random weights. By turns in a process: medians of eager mode",
        "in milliseconds, and the ratio of ours to them; our first call in seconds, after an eager one; the largest",
        "difference of results (in training, of gradients) from eager's, as a part of the largest one.",
        "",
        f"Geometric means of the ratios: inference {means['inference']:.2f}, training {means['training']:.2f}.",
        "",
        "| model | inference, ms | ratio | first | apart | training, ms | ratio | first | apart |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(row(*item) for item in found.items()), NOTES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--kind", choices=KINDS)
    options = parser.parse_args()
    if options.kind:
        answer(**KINDS[options.kind](options.names[0], options.seconds))
        return
    found = {}
    for name in options.names:
        arguments = ("benchmarks.zoo", name, f"--seconds={options.seconds}")
        found[name] = {kind: fresh(*arguments, f"--kind={kind}") for kind in KINDS}
        print(row(name, found[name]), flush=True)
    if options.write is not None:
        options.write.write_text(page(found, options.seconds))


if __name__ == "__main__":
    main()
