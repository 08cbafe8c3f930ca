"""Packed sequences: recurrent layers over sequences of different lengths, which only the values of tensors tell."""

import copy
import gc
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from primexec import CaptureError, make_traced

EXECUTORS = ["aten", ("llvm", "aten")]
LENGTHS = ([3, 7, 5], [2, 1, 6], [7, 7, 7])


class Classifier(nn.Module):
    def __init__(self, layer: Any, total: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.total = total
        self.embedding = nn.Embedding(10, 4)
        self.layer = layer(4, 5, batch_first=True, **kwargs)
        self.head = nn.Linear(10 if kwargs.get("bidirectional") else 5, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        packed, hidden = self.layer(packed)
        last = hidden[0][-1] if isinstance(hidden, tuple) else hidden[-1]
        padded, found = pad_packed_sequence(packed, batch_first=True, total_length=self.total)
        return self.head(padded.mean(1)) + self.head(padded[:, 0]).sum() + last.sum(-1, keepdim=True), found


def step(run: Any, model: nn.Module, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    logits, found = run(tokens, lengths)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])).backward()
    return [logits.detach(), found, torch.rand(1), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("kwargs", [{"total": 7}, {"bidirectional": True}, {"num_layers": 2, "dropout": 0.5}])
def test_classifier_trains(executor: Any, layer: Any, kwargs: Any) -> None:
    model = Classifier(layer, **kwargs)
    traced = make_traced(model, executor=executor)
    for lengths in LENGTHS:
        tokens = torch.randint(0, 10, (3, 7))
        results = [step(run, model, tokens, torch.tensor(lengths)) for run in (traced, model)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()
            assert executor != "aten" or torch.equal(found, expected)
        assert len(results[0]) == 3 + len(list(model.parameters()))
    assert traced.cache_info().traces == 1


def test_without_gradients() -> None:
    model = Classifier(nn.LSTM).eval()
    traced = make_traced(model, executor="aten")
    with torch.inference_mode():
        for lengths in LENGTHS:
            tokens = torch.randint(0, 10, (3, 7))
            for found, expected in zip(
                traced(tokens, torch.tensor(lengths)), model(tokens, torch.tensor(lengths)), strict=True
            ):
                assert torch.equal(found, expected)
    assert traced.cache_info().traces == 1


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_packed_arguments(layer: Any, is_sorted: bool) -> None:
    model = layer(4, 5, bidirectional=True)
    traced = make_traced(model)
    for lengths in ((7, 5, 1), (7, 4, 2)):  # as many elements, and as many steps
        given = pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=is_sorted)
        results = []
        for run in (traced, model):
            model.zero_grad()
            out, hidden = run(given)
            assert isinstance(out, PackedSequence)
            out.data.square().sum().backward()
            results.append([*pytree.tree_leaves((out, hidden)), *(p.grad.clone() for p in model.parameters())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
    assert traced.cache_info().traces == 1


def test_state_that_is_given_gets_gradients() -> None:
    model = nn.LSTM(4, 5, proj_size=3)

    def fn(x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Tensor:
        _, (last, cell) = model(pack_padded_sequence(x, lengths), (h, c))
        return last.sum() + cell.square().sum()

    results = []
    given = [torch.randn(6, 2, 4), torch.tensor([6, 3]), torch.randn(1, 2, 3), torch.randn(1, 2, 5)]
    for run in (make_traced(fn, executor="aten"), fn):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in given]
        run(*leaves).backward()
        results.append([t.grad for t in leaves])
    for found, expected in zip(*results, strict=True):
        assert expected is None or torch.equal(found, expected)


def test_lengths_are_checked_as_in_eager() -> None:
    traced = make_traced(lambda x, lengths: pack_padded_sequence(x, lengths).data * 2)
    x = torch.randn(4, 2, 3)
    assert traced(x, torch.tensor([4, 2])).shape == (6, 3)
    with pytest.raises(RuntimeError, match="greater than 0"):
        traced(x, torch.tensor([4, 0]))
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):
        traced(x, torch.tensor([2, 4]))


def test_batch_sizes_that_change_are_read_again() -> None:
    def fn(x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths)
        before = torch.zeros(packed.batch_sizes[0])
        packed.batch_sizes[:].add_(1)
        return before, torch.zeros(packed.batch_sizes[0])

    with torch.inference_mode():
        before, after = make_traced(fn)(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    assert (before.shape, after.shape) == ((2,), (3,))


def test_a_tensor_as_the_size_of_a_new_one() -> None:
    traced = make_traced(lambda n, x: torch.zeros(n.max(), 3) + x)
    for n in (2, 5):
        assert torch.equal(traced(torch.tensor([n, 1]), torch.ones(3)), torch.ones(n, 3))
    assert traced.cache_info().traces == 1


def test_whole_training_step() -> None:
    tokens = [torch.randint(0, 10, (3, 7)) for _ in LENGTHS]
    results = []
    initial = Classifier(nn.GRU, num_layers=2, dropout=0.2)
    for executor in ("aten", None):
        model = copy.deepcopy(initial)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def train(x: Tensor, lengths: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            loss = model(x, lengths)[0].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        torch.manual_seed(0)
        run = train if executor is None else make_traced(train, executor=executor)
        losses = [run(x, torch.tensor(lengths)) for x, lengths in zip(tokens, LENGTHS, strict=True)]
        results.append([*losses, *model.parameters()])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_second_derivatives_are_refused() -> None:
    model = nn.GRU(4, 5)

    def fn(x: Tensor, lengths: Tensor) -> Tensor:
        last = model(pack_padded_sequence(x, lengths))[1]
        (gradient,) = torch.autograd.grad(last.sum(), x, create_graph=True)
        return gradient.square().sum() + last.sum()

    with pytest.raises(CaptureError, match="a second derivative"):
        make_traced(fn)(torch.randn(5, 2, 4, requires_grad=True), torch.tensor([5, 2]))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("copies", [False, True])
def test_a_layer_runs_again_for_a_second_pass_only(layer: Any, copies: bool) -> None:
    model = Classifier(layer, num_layers=2, dropout=0.5)
    tokens, lengths = torch.randint(0, 10, (3, 7)), torch.tensor([3, 7, 5])
    results = []
    for run in (make_traced(model, executor="aten"), model):
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone if copies else Tensor.detach, lambda t: t):
            loss = run(tokens, lengths)[0].square().sum()
        gradients, forward = [], []
        for wanted in ([model.layer.weight_hh_l0], list(model.parameters())):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                gradients += torch.autograd.grad(loss, wanted, retain_graph=True)
            forward.append(any(re.fullmatch("aten::(tanh|sigmoid)_?", e.key) for e in profiler.key_averages()))
        assert forward == ([False, False] if run is model else [copies, True])
        results.append([*gradients, torch.rand(1)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_memory_of_the_graph_goes_with_the_pass() -> None:
    model, found = nn.LSTM(4, 5), []

    def fn(x: Tensor, lengths: Tensor) -> Tensor:
        return model(pack_padded_sequence(x, lengths))[0].data

    traced = make_traced(fn, executor="aten")
    for last in ("backward", "deleted"):
        out = traced(torch.randn(6, 2, 4), torch.tensor([6, 3]))
        found.append(_live_graphs())
        if last == "backward":
            out.sum().backward()
        else:
            del out
        found.append(_live_graphs())
    assert found == [1, 0, 1, 0]


def _live_graphs() -> int:
    return sum("graph" in vars(o) for o in gc.get_objects() if type(o) is torch.UntypedStorage)
