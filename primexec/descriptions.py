"""The key of a call in words: in what it differs from that of a program, and which numbers keep changing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primexec import _torch, statics
from primexec.captured import Captured, Signature
from primexec.config import RETRACES_BEFORE_WARNING
from primexec.decisions import decided_in
from primexec.instances import opened
from primexec.program import TensorSpec
from primexec.reads import Reads

_ANY, _VALUE = "any", " (value)"
VALUES_BEFORE_INPUT = 3  # of a number, each with a program that is kept, before one takes it as an input


@dataclass(frozen=True, slots=True)
class Key:
    """What a program was traced for: label → text, the Python state that it read, and line → the ints it asks for."""

    texts: dict[str, str]
    reads: Reads
    ints: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, captured: Captured, description: dict[str, str]) -> Key:
        """The key of a program that was just captured; numbers that it takes as inputs are none of it."""
        inputs = {f"{label}{_VALUE}" for label in captured.varying.values()}
        ints: dict[str, tuple[int, ...]] = {}
        for decision in captured.decisions:
            if type(decision.outcome) is int:
                label = decided_in(decision.source)
                ints[label] = *ints.get(label, ()), decision.outcome
        return cls({k: _ANY if k in inputs else text for k, text in description.items()}, captured.reads, ints)

    def differences(self, description: dict[str, str]) -> list[tuple[str, str, str]]:
        """(label, in the key, in the call) of everything that keeps this program from serving this call."""
        state = [(label, statics.show(then), statics.show(now)) for label, then, now in self.reads.changed()]
        return self.in_words(description) + state

    def in_words(self, description: dict[str, str]) -> list[tuple[str, str, str]]:
        """The same without Python state."""
        both = {
            label: (self.texts.get(label, "absent"), description.get(label, "absent"))
            for label in description | self.texts
        }
        return [(label, then, now) for label, (then, now) in both.items() if then not in (now, _ANY)]


def describe_call(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Everything in a call's key, apart from Python state, as label → text."""
    leaves, tree = _torch.flatten(whole := opened((args, kwargs)))
    described = {"structure of the arguments": str(tree)}
    labels, leaves = signature.labels(*whole), list(map(statics.of_array, leaves))
    for leaf, label in zip(leaves, labels, strict=True):
        if isinstance(leaf, Tensor):
            spec = TensorSpec.of(leaf) if leaf.layout is torch.strided and not leaf.is_nested else None
            described[f"{label} (type)"] = f"{type(leaf).__name__} of {leaf.layout}"
            described[f"{label} (shape)"] = "none" if leaf.is_nested else str(tuple(leaf.shape))
            described[f"{label} (dtype and device)"] = f"{leaf.dtype} {leaf.device}"
            described[f"{label} (strides)"] = str(spec.stride) if spec else "none"
            described[f"{label} (requires_grad)"] = str(leaf.requires_grad)
        else:
            described[f"{label}{_VALUE}"] = statics.show(statics.freeze_argument(leaf))
    described["arguments that are one object"] = ", ".join(
        f"{a} and {b}"
        for i, (a, x) in enumerate(zip(labels, leaves, strict=True))
        for b, y in zip(labels[:i], leaves[:i], strict=True)
        if x is y and isinstance(x, Tensor)
    )
    described.update({k: str(v) for k, v in _torch.describe_global_state().items()})
    return described


def changing_numbers(keys: Iterable[Key], description: dict[str, str], enough: int) -> list[str]:
    """Labels of numbers, and of lines that ask for ints, with so many values in programs that else would do."""
    values: dict[str, set[Any]] = {}
    compared = ((key, key.in_words(description)) for key in keys)
    near = ((key, texts) for key, texts in compared if all(_are_numbers(*found) for found in texts))
    for key, texts in itertools.islice(near, RETRACES_BEFORE_WARNING):  # Python state is slow to compare
        state = list(key.reads.changed())
        if all(statics.are_numbers(*both) for _, *both in state):
            for label, then in [*((label, then) for label, then, _ in [*texts, *state]), *key.ints.items()]:
                values.setdefault(label.removesuffix(_VALUE), set()).add(then)
    return [label for label, met in values.items() if len(met) >= enough]


def _are_numbers(label: str, *texts: str) -> bool:
    """Whether what differs is the value of an argument, and both are ints, or both floats."""
    kinds = [[bool(pattern.fullmatch(text)) for text in texts] for pattern in (_INT, _FLOAT)]
    return label.endswith(_VALUE) and any(map(all, kinds))


_INT, _FLOAT = re.compile(r"-?\d+"), re.compile(r"-?\d[\d.]*(\.\d+|e[+-]\d+)")
