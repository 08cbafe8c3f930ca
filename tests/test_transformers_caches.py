"""Caches of keys and values of `transformers`, made by models and given to them, and `generate()` with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import primexec
from tests.test_transformers import MODEL, assert_same, bare, counts, ids, text


def assert_like(cache: Any, expected: Any) -> None:
    """The same kinds of layers with the same attributes, tensors equal to rounding."""
    assert type(cache) is type(expected)
    for mine, eagers in zip(cache.layers, expected.layers, strict=True):
        assert type(mine) is type(eagers)
        assert list(vars(mine)) == list(vars(eagers))
        for name, value in vars(eagers).items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(getattr(mine, name), value)
            else:
                assert getattr(mine, name) == value


@torch.no_grad()
def test_caches_are_made_and_taken() -> None:
    """A cache of keys and values is an object that the model makes, or changes."""
    model = MODEL["GPT2"].build()
    traced = primexec.make_traced(model, executor="aten")
    for _ in range(2):
        inputs, following = text(8), ids(2, 1)
        cache, expected = (call(**inputs).past_key_values for call in (traced, model))
        assert_like(cache, expected)
        actual = traced(input_ids=following, past_key_values=cache)
        assert_same(actual.logits, model(input_ids=following, past_key_values=expected).logits)
        assert actual.past_key_values is cache
        assert_like(cache, expected)
    assert counts(traced) == (2, 2, 2)


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic, empty": lambda config: transformers.DynamicCache(),
    "dynamic, with its layers": lambda config: transformers.DynamicCache(config=config),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=16),
}


@pytest.mark.parametrize("name", ["Gemma2", "Mistral"])
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_caches_of_the_callers(name: str, kind: str) -> None:
    """Sliding windows among them; a second cache of the same kind is served from the cache.

    For compilers, transformers makes masks that it does without in eager mode: equal to rounding.
    """
    model = MODEL[name].build()
    traced = primexec.make_traced(model, executor="aten")
    for _ in range(2):
        cache, expected = CACHES[kind](model.config), CACHES[kind](model.config)
        for length in (3, 1, 1):
            tokens = ids(2, length)
            actual = traced(input_ids=tokens, past_key_values=cache)
            torch.testing.assert_close(actual.logits, model(input_ids=tokens, past_key_values=expected).logits)
            assert actual.past_key_values is cache
            assert_like(cache, expected)
    assert counts(traced)[2] == counts(traced)[1] <= 3


@torch.no_grad()
def test_windows_that_fill() -> None:
    """Layers with a window count tokens, and compare the count: one program before they are full and one after."""
    model = MODEL["Gemma2"].build()
    traced = primexec.make_traced(model, executor="aten")
    caches = [transformers.StaticCache(config=model.config, max_cache_len=24) for _ in range(2)]
    for length in (3, *[1] * 14):
        tokens = ids(2, length)
        actual, expected = (
            m(input_ids=tokens, past_key_values=c) for m, c in zip((traced, model), caches, strict=True)
        )
        torch.testing.assert_close(actual.logits, expected.logits)
        assert_like(*caches)
    assert counts(traced)[1] == 5


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["no cache", "dynamic", "beams", "static"],
)
@torch.no_grad()
def test_generate(settings: dict[str, Any]) -> None:
    """The original's methods run with the traced module as self: each step of generate() is a traced call."""
    model = MODEL["Llama"].build()
    traced = primexec.make_traced(model, executor="aten")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | settings
    traces = 2 if "cache_implementation" in settings else 4
    for _ in range(2):
        prompt = text(6)
        # A decoder is padded on the left.
        prompt["attention_mask"] = prompt["attention_mask"].flip(1)
        assert_same(traced.generate(**prompt, **settings), model.generate(**prompt, **settings))
    assert counts(traced) == (8 - traces, traces, traces)


@torch.no_grad()
def test_generate_with_a_traced_forward() -> None:
    model, expected = MODEL["GPT2"].build(), MODEL["GPT2"].build()
    model.forward = primexec.make_traced(model.forward, executor="aten")
    for _ in range(2):
        prompt = bare(6)
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert_same(*(m.generate(**prompt, **settings) for m in (model, expected)))  # type: ignore[operator]
    assert counts(model.forward) == (4, 4, 4)
