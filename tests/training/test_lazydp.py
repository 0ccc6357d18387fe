import builtins
import copy
import itertools
import math

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter
from holdfast.training.optim.ghost import GhostNorms, norms_ref
from holdfast.training.optim.lazydp import DenseDPSGD, LazyDPSGD, LookaheadLoader, epsilon

ROWS, WIDTH = 11, 3


class Recommender(nn.Module):
    """Two tables, of which one gives several rows per example, and a small network."""

    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(ROWS, WIDTH, sparse=True)
        self.items = nn.Embedding(7, WIDTH, sparse=True)
        self.top = nn.Sequential(nn.Linear(2 * WIDTH, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, user, items):
        x = torch.cat([self.users(user), self.items(items).sum(1)], 1)
        return self.top(x).squeeze(1)


def build(seed=0):
    torch.manual_seed(seed)
    return Recommender()


def make(kind, model, **changes):
    settings = {"lr": 0.3, "noise_multiplier": 1.5, "max_grad_norm": 0.4, "expected_batch": 4.0}
    settings |= {"generator": torch.Generator().manual_seed(5), **changes}
    optimizer = kind(model.parameters(), [model.users, model.items], **settings)
    optimizer.watch(model)
    return optimizer


def batches(seed, steps, size=4):
    """Batches of changing size, some empty, with rows that come once, often or never."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        m = 0 if step % 5 == 3 else size + step % 2
        user = (torch.rand(m, generator=g) ** 3 * ROWS).long()
        items = torch.randint(5, (m, 3), generator=g)
        found.append((user, items, torch.randn(m, generator=g)))
    return found


def train(optimizer, model, data, schedule=lambda step: 0.3):
    for step, (user, items, y) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        losses = (model(user, items) - y).square()
        optimizer.backward(losses)
        following = data[step + 1] if step + 1 < len(data) else None
        optimizer.step(None if following is None else following[:2])
    optimizer.flush()
    return [p.detach().clone() for p in model.parameters()]


class Planted:
    """Noise that is a function of step, row and column instead of a draw."""

    plant = staticmethod(lambda step, rows, width: torch.ones(len(rows), width))
    rates = ()

    def owed(self, weight, rows, since):
        total = torch.zeros(len(rows), weight.shape[1])
        scale = self.noise_multiplier * self.max_grad_norm / self.expected_batch
        end = self.steps
        for step in range(end - self._now, end):
            owing = (since + (end - self._now) <= step).float()[:, None]
            total += owing * self.rates[step] * scale * self.plant(step, rows, weight.shape[1])
        return total

    def _randn(self, shape, like):
        return torch.ones(shape)


class PlantedLazy(Planted, LazyDPSGD):
    pass


class PlantedDense(Planted, DenseDPSGD):
    pass


def table_of_noise(step, rows, width):
    return torch.sin(step * 1.7 + rows[:, None] * 0.9 + torch.arange(width) * 2.3)


@pytest.mark.parametrize("schedule", [lambda s: 0.3, lambda s: 0.5 / (1 + s)], ids=["flat", "fall"])
@pytest.mark.parametrize("plant", [Planted.plant, table_of_noise], ids=["ones", "table"])
@pytest.mark.parametrize("seed", range(5))
def test_flushed_lazy_equals_dense_dp_sgd(seed, plant, schedule):
    data = batches(seed, 17)
    ends = []
    for kind in (PlantedLazy, PlantedDense):
        model = build(seed)
        optimizer = make(kind, model)
        optimizer.plant, optimizer.rates = plant, [schedule(s) for s in range(len(data))]
        ends.append(train(optimizer, model, data, schedule))
        assert optimizer.steps == 17 and not optimizer.owes
    for lazy, dense in zip(*ends, strict=True):
        torch.testing.assert_close(lazy, dense, atol=1e-6, rtol=1e-6)


def test_without_noise_it_is_clipped_sgd():
    model = build()
    plain = copy.deepcopy(model)
    optimizer = make(LazyDPSGD, model, noise_multiplier=0.0)
    data = batches(1, 3)
    train(optimizer, model, data)
    for user, items, y in data:
        losses = (plain(user, items) - y).square()
        sums = [torch.zeros_like(p) for p in plain.parameters()]
        for loss in losses:
            grads = torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True)
            grads = [g.to_dense() if g.is_sparse else g for g in grads]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            for total, g in zip(sums, grads, strict=True):
                total += g * min(1.0, 0.4 / (norm.item() + 1e-6))
        with torch.no_grad():
            for p, total in zip(plain.parameters(), sums, strict=True):
                p -= 0.3 * total / 4.0
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_a_batch_may_come_in_parts_and_foreign_gradients_go():
    whole, parts = build(), build()
    user, items, y = batches(2, 1)[0]
    one, two = (make(LazyDPSGD, model, noise_multiplier=0.0) for model in (whole, parts))
    whole(user, items).mean().backward()
    one._norms._seen.clear()
    one.backward((whole(user, items) - y).square())
    for rows in (slice(0, 1), slice(1, None)):
        two.backward((parts(user[rows], items[rows]) - y[rows]).square())
    one.step()
    two.step()
    for got, want in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", [lambda s: 0.5, lambda s: 0.9**s], ids=["flat", "fall"])
def test_a_rarely_read_row_has_the_variance_of_dense_noise(schedule):
    """Columns are independent draws: 2,000 seeds side by side."""
    steps, seeds = 9, 2000
    table = nn.Embedding(2, seeds, sparse=True)
    model = nn.Sequential(table)
    with torch.no_grad():
        table.weight.zero_()
    optimizer = LazyDPSGD(
        [], [table], 0.5, 2.0, 0.7, expected_batch=4.0, generator=torch.Generator().manual_seed(1)
    )
    optimizer.watch(model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        reads = torch.tensor([0, 1]) if step in (0, 4) else torch.tensor([0])
        upcoming = torch.tensor([0, 1]) if step == 3 else torch.tensor([0])
        optimizer.backward((model(reads) * 0).sum(1))
        optimizer.step([upcoming])
    optimizer.flush()
    want = (2.0 * 0.7 / 4.0) ** 2 * sum(schedule(s) ** 2 for s in range(steps))
    for row in table.weight.detach():
        assert row.mean().abs() < 4 * (want / seeds) ** 0.5
        assert row.var().item() == pytest.approx(want, rel=0.1)


class Sequence(nn.Module):
    """A shared linear, several positions, and a table that is read twice in different places."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(6, width)
        self.shared = nn.Linear(width, width)
        self.out = nn.Linear(width, 2, bias=False)

    def forward(self, ids):
        h = torch.tanh(self.shared(torch.tanh(self.shared(self.table(ids)))))
        return (self.out(h).sum((1, 2)) + self.table(ids[:, 0]).sum(1)).sin()


@pytest.mark.parametrize("length, width", [(1, 4), (3, 8), (40, 4)])
def test_ghost_norms_equal_one_backward_per_example(length, width):
    torch.manual_seed(0)
    model = Sequence(width)
    ids = torch.randint(6, (5, length))
    ids[0] = 2  # one row for all positions
    norms = GhostNorms(model)
    losses = model(ids)
    got = norms(losses)
    torch.testing.assert_close(got, norms_ref(model, list(losses)), atol=1e-5, rtol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_a_row_that_is_read_twice_counts_once_as_a_sum():
    table = nn.Embedding(3, 1)
    norms = GhostNorms(nn.Sequential(table))
    losses = table(torch.tensor([[1, 1], [0, 2]])).sum((1, 2))
    # |(0, 1+1, 0)| = 2 and |(1, 0, 1)| = sqrt 2
    torch.testing.assert_close(norms(losses), torch.tensor([2.0, math.sqrt(2)]))


def test_what_has_no_ghost_norm_is_refused():
    for layer in (nn.Conv1d(2, 2, 1), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False)):
        with pytest.raises(UsageError, match=f"1 is a {type(layer).__name__}"):
            GhostNorms(nn.Sequential(nn.Linear(2, 2), layer))
    tied = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(UsageError, match="shares a parameter"):
        GhostNorms(tied)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    norms = GhostNorms(model)
    with pytest.raises(UsageError, match="changed in place"):
        norms(model(torch.randn(3, 4)).squeeze(1))
    with pytest.raises(UsageError, match="no forward pass"):
        norms(torch.zeros(3, requires_grad=True))
    turned = nn.Sequential(nn.Linear(4, 1))
    norms = GhostNorms(turned)
    with pytest.raises(UsageError, match="saw 6 rows for 3 losses"):
        norms(turned(torch.randn(6, 4)).view(3, 2).sum(1))


def test_history_takes_four_bytes_per_row_and_goes_with_the_flush():
    model = build()
    optimizer = make(LazyDPSGD, model)
    data = batches(0, 4)

    def step(now, following):
        user, items, y = now
        optimizer.backward((model(user, items) - y).square())
        optimizer.step(following[:2])

    step(data[0], data[1])
    with Meter(model, optimizer) as meter:
        step(data[1], data[2])
    assert meter.at_peak["optimizer"] == 4 * (ROWS + 7)
    optimizer.flush()
    assert not optimizer.state


def test_only_read_rows_are_written():
    model = build()
    optimizer = make(LazyDPSGD, model)
    (user, items, y), following = batches(0, 2)
    before = model.users.weight.detach().clone()
    optimizer.backward((model(user, items) - y).square())
    optimizer.step(following[:2])
    changed = (model.users.weight != before).any(1).nonzero().flatten().tolist()
    assert set(changed) == {*user.tolist(), *following[0].tolist()} and len(changed) < ROWS


def test_unflushed_states_are_refused():
    model = build()
    optimizer = make(LazyDPSGD, model)
    user, items, y = batches(0, 1)[0]
    optimizer.backward((model(user, items) - y).square())
    optimizer.step()
    with pytest.raises(UsageError, match=r"flush\(\) before state_dict"):
        optimizer.state_dict()
    with pytest.raises(UsageError, match=r"flush\(\) before state_dict"):
        model.state_dict()
    with pytest.raises(UsageError, match=r"flush\(\) before state_dict"):
        optimizer.load_state_dict({})
    with torch.no_grad(), pytest.raises(UsageError, match="noise is not paid"):
        model(user, items)
    optimizer.flush()
    model.state_dict()
    assert optimizer.state_dict()["param_groups"][-1]["steps"] == 1
    model(user, items)


@pytest.mark.parametrize(
    "extra", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"betas": (0.9, 0.99)}]
)
def test_what_is_not_plain_sgd_is_refused(extra):
    model = build()
    with pytest.raises(UsageError, match=f"{next(iter(extra))}: LazyDP is plain SGD"):
        make(LazyDPSGD, model, **extra)
    with pytest.raises(UsageError, match="plain SGD"):
        LazyDPSGD(
            [{"params": model.top.parameters(), **extra}], [], 0.1, 1.0, 1.0, expected_batch=4
        )


def test_other_misuse_is_refused():
    model = build()
    for changes, message in (
        ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be > 0"),
    ):
        with pytest.raises(UsageError, match=message):
            make(LazyDPSGD, model, **changes)
    for table in (nn.Embedding(3, 2), nn.Embedding(3, 2, sparse=True, max_norm=1.0)):
        with pytest.raises(UsageError, match="not a table for LazyDP"):
            LazyDPSGD([], [table], 0.1, 1.0, 1.0, expected_batch=4)
    with pytest.raises(UsageError, match="padding_idx=0"):
        padded = nn.Embedding(3, 2, sparse=True, padding_idx=0)
        LazyDPSGD([], [padded], 0.1, 1.0, 1.0, expected_batch=4)
    optimizer = make(LazyDPSGD, model)
    with pytest.raises(UsageError, match=r"call optimizer.backward\(losses\) before each step"):
        optimizer.step()
    user, items, y = batches(0, 1)[0]
    losses = (model(user, items) - y).square()
    with pytest.raises(UsageError, match=r"losses of shape \(\).*one per example"):
        optimizer.backward(losses.mean())
    optimizer.backward(losses)
    with pytest.raises(UsageError, match="rows of 1 tables given, expected 2"):
        optimizer.step([user])
    lone = LazyDPSGD(model.top.parameters(), [], 0.1, 1.0, 1.0, expected_batch=4)
    with pytest.raises(UsageError, match="nothing is watched"):
        lone.backward(losses)
    with pytest.raises(UsageError, match=r"the optimizer lacks users\.weight, items\.weight"):
        lone.watch(model)
    with pytest.raises(UsageError, match="it has others"):
        make(LazyDPSGD, model).watch(model.top)


def test_rows_that_were_not_announced_cannot_be_read():
    model = build()
    optimizer = make(LazyDPSGD, model)
    user, items = torch.tensor([1, 2]), torch.tensor([[0, 1], [1, 2]])
    optimizer.backward(model(user, items))
    optimizer.step([torch.tensor([3]), items])
    with pytest.raises(UsageError, match="noise is not paid: give step"):
        model(user, items)
    model(torch.tensor([3]), items[:1])


def test_a_run_resumes_to_the_bit_with_the_same_generator():
    data = batches(3, 8)
    whole = build()
    first = make(LazyDPSGD, whole)
    train(first, whole, data[:4])
    model = build(9)
    generator = torch.Generator()
    generator.set_state(first._generators[torch.device("cpu")].get_state())
    second = make(LazyDPSGD, model, generator=generator)
    model.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    for got, want in zip(
        train(second, model, data[4:]), train(first, whole, data[4:]), strict=True
    ):
        assert torch.equal(got, want)
    assert second.steps == 8


def test_schedulers_and_groups():
    model = build()
    groups = [{"params": model.parameters(), "lr": 0.05}]
    optimizer = make(LazyDPSGD, model)
    optimizer = LazyDPSGD(groups, [model.users, model.items], 0.2, 1.0, 1.0, expected_batch=4.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.2]
    assert len(optimizer.param_groups[0]["params"]) == 4
    optimizer.watch(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    user, items, _ = batches(0, 1)[0]
    optimizer.backward(model(user, items))
    optimizer.step((user, items))
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.1]


def test_noise_without_a_generator_is_not_predictable():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build()
        optimizer = make(LazyDPSGD, model, generator=None)
        ends.append(train(optimizer, model, batches(0, 2)))
    assert not torch.equal(ends[0][0], ends[1][0])


def loader(**changes):
    settings = {"examples": 50, "sample_rate": 0.1, "steps": 6}
    settings |= {"generator": torch.Generator().manual_seed(0), **changes}
    return LookaheadLoader(lambda i: (i, i * 2), lambda b: [b[0], b[1]], **settings)


def test_the_loader_announces_the_batch_after():
    drawn = list(loader())
    assert len(drawn) == len(loader()) == 6
    for (_, upcoming), (following, _) in itertools.pairwise(drawn):
        assert all(torch.equal(a, b) for a, b in zip(upcoming, following, strict=True))
    assert drawn[-1][1] is None
    again = list(loader())
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(drawn, again, strict=True))


def test_batches_are_poisson_samples():
    counts, sizes = torch.zeros(50), []
    for (indices, _), _ in loader(steps=4000):
        assert (indices.diff() > 0).all()
        counts[indices] += 1
        sizes.append(float(len(indices)))
    # Each example enters with probability 0.1, and sizes vary as those of a binomial law.
    assert ((counts / 4000 - 0.1).abs() < 5 * (0.09 / 4000) ** 0.5).all()
    assert torch.tensor(sizes).var().item() == pytest.approx(50 * 0.09, rel=0.15)
    assert min(sizes) == 0
    every = next(iter(loader(sample_rate=1.0)))[0][0]
    assert every.tolist() == list(range(50))
    assert loader().expected_batch == 5
    with pytest.raises(UsageError, match=r"sample_rate=1.5 is outside \(0, 1\]"):
        loader(sample_rate=1.5)


def test_accountant():
    pytest.importorskip("opacus", reason="the accountant is Opacus's: holdfast[privacy]")
    spent = [epsilon(1.0, 0.01, steps, 1e-5) for steps in (100, 1000)]
    assert 0 < spent[0] < spent[1] < 3
    # One full-batch step is the Gaussian mechanism: at most its classical bound, for sigma > 1.
    assert epsilon(5.0, 1.0, 1, 1e-5) <= math.sqrt(2 * math.log(1.25e5)) / 5.0


def test_accountant_without_opacus(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("opacus"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(HoldfastError, match=r"pip install 'holdfast\[privacy\]'"):
        epsilon(1.0, 0.01, 10, 1e-5)
