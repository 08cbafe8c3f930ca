"""One training case: steps of forward, loss, backward and optimizer by turns, and what is saved for backward."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import gpt2_of, mlp, resnet_classifier, tokens
from benchmarks.process import answer
from benchmarks.steady import CONTENDERS
from benchmarks.timing import Call, by_turns

Optimizer = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainingCase:
    """A model that is called with `inputs`, what makes a loss of its output and the targets, and the optimizer.

    Attributes:
        whole: whether contenders are given the whole step, the optimizer's update included, rather than the model.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Call]
    loss: Callable[[Any], Tensor]
    optimizer: Optimizer
    whole: bool = False


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, **options)


def sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **options)


def labelled_tokens() -> Call:
    _, kwargs = tokens(4096, 4, 64, use_cache=False)()
    return (), kwargs | {"labels": kwargs["input_ids"]}


def labelled_images() -> Call:
    return (), {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.randint(10, (2,))}


def rows() -> Call:
    return (torch.randn(64, 256),), {}


def first_class(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def own_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


TRAINING = {
    "train-mlp": TrainingCase("MLP, batch 64, SGD", mlp, rows, first_class, sgd),
    "train-gpt2": TrainingCase(
        "GPT-2, 4 layers, width 256, 4x64 tokens, dropout, AdamW", gpt2_of, labelled_tokens, own_loss, adamw
    ),
    "train-resnet": TrainingCase(
        "ResNet-18, 2 images of 224x224, SGD", resnet_classifier, labelled_images, own_loss, sgd
    ),
}

WHOLE_STEPS = {
    f"step-{name.removeprefix('train-')}": replace(
        TRAINING[name],
        title=f"{TRAINING[name].title}, fused: the whole step",
        optimizer=partial(TRAINING[name].optimizer, fused=True),
        whole=True,
    )
    for name in TRAINING
}


def stepper(case: TrainingCase, model: nn.Module, run: Callable[..., Any]) -> Callable[..., None]:
    optimizer = case.optimizer(model.parameters())

    def step(*args: Any, **kwargs: Any) -> None:
        optimizer.zero_grad()
        case.loss(run(*args, **kwargs)).backward()
        optimizer.step()

    return step


def contending(case: TrainingCase, model: nn.Module, make: Callable[[Any], Any]) -> Callable[..., None]:
    """The step of a contender, which makes its own of the model, or of the whole step."""
    return make(stepper(case, model, model)) if case.whole else stepper(case, model, make(model))  # type: ignore[no-any-return]


def bytes_saved(case: TrainingCase, model: nn.Module, run: Callable[..., Any], call: Call) -> int:
    """What autograd keeps between forward and backward, besides the inputs, parameters and buffers."""
    args, kwargs = call
    known = [*args, *kwargs.values(), *model.parameters(), *model.buffers()]
    skip = {t.untyped_storage().data_ptr() for t in known if isinstance(t, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.loss(run(*args, **kwargs))
        saved = sum(kept.values())
        loss.backward()
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TRAINING)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--inductor", action="store_true")
    options = parser.parse_args()

    case = TRAINING[options.name]
    torch.manual_seed(0)
    original = case.build().train()
    call = case.inputs()
    steps, saved = {}, {}
    for name, make in CONTENDERS.items():
        if name == "inductor" and not options.inductor:
            continue
        model = copy.deepcopy(original)
        run = make(model)
        steps[name] = stepper(case, model, run)
        args, kwargs = call
        steps[name](*args, **kwargs)
        saved[name] = bytes_saved(case, model, run, call)

    turns = by_turns(steps, case.inputs, options.seconds)
    answer(
        saved=saved,
        median={name: turns.median(name) for name in steps},
        ratio={name: turns.ratio(name, "eager") for name in steps},
        quartiles={name: turns.quartiles(name, "eager") for name in steps},
    )


if __name__ == "__main__":
    main()
