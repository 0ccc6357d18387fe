"""Gradients consumed in backward and blocks run again change nothing but bytes."""

import copy

import pytest
import torch
from torch import nn

from holdfast.meter import Meter
from holdfast.training.loss import IGNORE
from holdfast.training.optim.adamw4 import AdamW4
from holdfast.training.step import StepInBackward, counted_tokens, recompute


class Tied(nn.Module):
    """Embedding and head share a weight, so its gradient arrives in two parts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(3)
        )
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.body:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-default": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw4": lambda p: AdamW4(p, lr=1e-2),
}


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(80, (4, 9), generator=generator) for _ in range(5)]


@pytest.fixture
def model():
    return Tied()


def groups(model: nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model, optimizer, batches, schedule=None):
    for ids in batches:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_the_plain_step_bitwise(kind, model, batches):
    twin = copy.deepcopy(model)
    plain = OPTIMIZERS[kind](groups(model))
    consuming = StepInBackward(OPTIMIZERS[kind](groups(twin)))
    train(model, plain, batches, torch.optim.lr_scheduler.LinearLR(plain))
    train(twin, consuming, batches, torch.optim.lr_scheduler.LinearLR(consuming.wrapped))
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(plain.state_dict(), consuming.state_dict())
    assert twin.head.weight is twin.embed.weight


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_dict_round_trip_is_bitwise(kind, model, batches):
    optimizer = StepInBackward(OPTIMIZERS[kind](groups(model)))
    train(model, optimizer, batches[:2])
    resumed = copy.deepcopy(Tied())
    resumed.load_state_dict(model.state_dict())
    other = StepInBackward(OPTIMIZERS[kind](groups(resumed)))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[2:])
    train(resumed, other, batches[2:])
    assert_same(model.state_dict(), resumed.state_dict())
    assert_same(optimizer.state_dict(), other.state_dict())


def test_gradients_are_freed_at_once(model, batches):
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=0.1))
    model(batches[0]).backward()
    assert all(p.grad is None for p in model.parameters())
    with Meter(model, optimizer, inputs=batches) as meter:
        model(batches[1]).backward()
    largest = max(p.nbytes for p in model.parameters())
    total = sum(p.nbytes for p in model.parameters())
    # The tied weight's gradient has two parts, which meet at the end.
    assert meter.ledger.column("device", "backward")["gradients"] <= 2 * largest < total
    assert meter.end == meter.base


def test_schedulers_reach_the_wrapped_optimizer(model, batches):
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, batches[:1], schedule)
    assert [group["lr"] for group in optimizer.wrapped.param_groups] == [0.0]
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches[1:2], schedule)
    assert_same(model.state_dict(), before)


def test_remove_gives_gradients_back(model, batches):
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.remove()
    before = copy.deepcopy(model.state_dict())
    model(batches[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_same(model.state_dict(), before)
    assert repr(optimizer).startswith("StepInBackward(SGD")


def test_a_recomputed_block_gives_the_same_gradients(model, batches):
    twin = copy.deepcopy(model)
    handles = [recompute(block) for block in twin.body]
    for one in (model, twin):
        one(batches[0]).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)

    ids = torch.randint(80, (16, 32))

    def peak(m) -> int:
        m.zero_grad()
        with Meter(m, inputs=ids) as meter:
            m(ids).backward()
        return meter.peak

    hidden = 4 * ids.numel() * 128
    # At least what GELU reads and what it writes, of all blocks but the one that is running.
    assert peak(model) - peak(twin) >= 2 * 2 * hidden
    with torch.no_grad():
        assert torch.equal(twin(batches[0]), model(batches[0]))
    for handle in handles:
        handle.remove()
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_a_recomputed_block_draws_the_same_dropout():
    block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    twin = copy.deepcopy(block)
    recompute(twin)
    x, gradients = torch.randn(8, 16), []
    for one in (block, twin):
        torch.manual_seed(3)
        one(x).square().sum().backward()
        gradients.append(one[0].weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"labels": torch.tensor([[1, 2, 3], [IGNORE, 5, IGNORE]])}, 3),
        ({"labels": torch.tensor([1, 2])}, None),
        ({"x": torch.ones(2, 2)}, None),
    ],
)
def test_counted_tokens(batch, count):
    # The first label of a row is predicted by nothing.
    assert counted_tokens(batch) == count
