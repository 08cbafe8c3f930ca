"""Products computed in a given way, whatever measurements say."""

from __future__ import annotations

import pytest
import torch

from primexec.executors.llvm import measured

WAYS = ["ATen", "oneDNN", "kernel"]


def compute_products_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is possible; by ATen elsewhere."""

    def fastest(shape: measured.Shape, with_library: bool) -> str:
        possible = {"oneDNN": with_library, "kernel": shape.dtype is torch.float32}
        return way if possible.get(way) else "ATen"

    monkeypatch.setattr(measured, "SMALLEST", 0)
    monkeypatch.setattr(measured, "_fastest", fastest)
