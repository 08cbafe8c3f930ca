"""Training loops as libraries write them, through torch.compile(backend="primexec"). The oracle is eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from primexec import dynamo

# Dynamo itself looks at the gradients of the tensors that it meets, and imports what torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

UPDATES, ACCUMULATE, CLIP = 3, 2, 0.5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=97, n_positions=40, n_embd=32, n_layer=1, n_head=4)
    config.use_cache = False
    return transformers.GPT2LMHeadModel(config)


def bert_batch(rows: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {
        "input_ids": torch.randint(0, 97, (rows, length)),
        "attention_mask": mask,
        "labels": torch.randint(0, 3, (rows,)),
    }


def gpt2_batch(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (rows, length))
    return {"input_ids": ids, "labels": ids}


def batches(make: Callable[[int, int], dict[str, Tensor]], last: int) -> list[dict[str, Tensor]]:
    """The last batch of each epoch may be smaller, as data loaders give it."""
    torch.manual_seed(1)
    return [make(last if i % 3 == 2 else 4, 12) for i in range(UPDATES * ACCUMULATE)]


def train(call: Any, module: nn.Module, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """Losses and norms of gradients: accumulation, clipping, a scheduler with warm-up, two groups of parameters."""
    decayed = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 1, UPDATES + 1)
    module.train()
    torch.manual_seed(2)
    seen = []
    for i, batch in enumerate(data, 1):
        loss = call(**batch).loss / ACCUMULATE
        loss.backward()
        seen.append(loss.detach())
        if i % ACCUMULATE == 0:
            seen.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    module.eval()
    with torch.no_grad():
        seen.append(call(**data[0]).logits)
    return seen


@pytest.mark.parametrize(
    ("model", "batch", "last"), [(bert, bert_batch, 2), (gpt2, gpt2_batch, 4)], ids=["bert", "gpt2"]
)
def test_loop_of_a_trainer(
    model: Callable[[], nn.Module], batch: Callable[[int, int], dict[str, Tensor]], last: int
) -> None:
    torch.manual_seed(0)
    eager = model()
    mine = copy.deepcopy(eager)
    data = batches(batch, last)
    expected = train(eager, eager, data)
    actual = train(torch.compile(mine, backend="primexec"), mine, data)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(mine.parameters()), list(eager.parameters()), rtol=1e-4, atol=1e-5)


def test_loss_scaling_and_autocast() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    mine = copy.deepcopy(eager)
    data = [torch.randn(4, 6) for _ in range(3)]
    for module, call in ((eager, eager), (mine, torch.compile(mine, backend="primexec"))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for x in data:
            with torch.autocast("cpu", torch.bfloat16):
                loss = call(x).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(list(mine.parameters()), list(eager.parameters()), rtol=1e-3, atol=1e-4)


def test_shared_and_frozen_parameters_and_hooks() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight
            self.mid.bias.requires_grad_(False)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.mid(self.embed(ids))
            with torch.no_grad():
                size = hidden.norm()
            return self.head(hidden), size

    torch.manual_seed(0)
    eager = Tied()
    mine = copy.deepcopy(eager)
    ids = torch.randint(0, 11, (3, 5))
    for module, call in ((eager, eager), (mine, torch.compile(mine, backend="primexec"))):
        module.embed.weight.register_hook(lambda grad: grad * 2)
        out, size = call(ids)
        assert not size.requires_grad
        out.logsumexp(-1).sum().backward()
    assert mine.mid.bias.grad is None
    torch.testing.assert_close(mine.embed.weight.grad, eager.embed.weight.grad)
    torch.testing.assert_close(mine.mid.weight.grad, eager.mid.weight.grad)


def test_two_forwards_before_one_backward() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    mine = copy.deepcopy(eager)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    for call in (eager, torch.compile(mine, backend="primexec")):
        torch.manual_seed(3)
        (call(x) * call(y)).sum().backward()
    torch.testing.assert_close([p.grad for p in mine.parameters()], [p.grad for p in eager.parameters()])
    torch.testing.assert_close(list(mine.buffers()), list(eager.buffers()))


def test_optimizer_inside() -> None:
    """The whole step compiled, optimizer included: updates of parameters in place are part of the graph."""
    torch.manual_seed(0)
    eager = nn.Linear(4, 3)
    mine = copy.deepcopy(eager)
    data = [torch.randn(5, 4) for _ in range(3)]

    def make_step(module: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)

        def step(x: Tensor) -> Tensor:
            loss: Tensor = module(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    plain, compiled = make_step(eager), torch.compile(make_step(mine), backend="primexec")
    for x in data:
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(list(mine.parameters()), list(eager.parameters()))


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=str)
def test_backward_graphs_transpose_nothing_twice(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    compile_program = dynamo.compile_program

    def spy(*args: Any, **kwargs: Any) -> Any:
        executable = compile_program(*args, **kwargs)
        programs.append(executable.plan.program)
        return executable

    monkeypatch.setattr(dynamo, "compile_program", spy)
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    module = copy.deepcopy(eager)
    x = torch.randn(3, 6)
    compiled = torch.compile(module, backend="primexec", options={"executor": executor})
    for _ in range(2):
        compiled(x).square().sum().backward()
        eager(x).square().sum().backward()
    for p, q in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.stride() == q.grad.stride()
    (backward,) = [p for p in programs if any(i.kind == "tangent" for i in p.inputs)]
    nodes = [n for n in backward.graph_module.graph.nodes if n.op == "call_function"]
    assert not any(n.target is torch.ops.aten.detach.default for n in nodes)
    transposes = [n for n in nodes if n.target is torch.ops.aten.t.default]
    assert transposes
    assert not any(n.args[0] in transposes for n in transposes)
