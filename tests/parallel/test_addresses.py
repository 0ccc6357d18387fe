"""Planned addresses: plans are valid and low, and a step that runs at them is the same step."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from holdfast.errors import UsageError
from holdfast.forms.affine import Int4
from holdfast.meter import Meter
from holdfast.native.allocator import AllocatorPeak
from holdfast.parallel import addresses
from holdfast.parallel.addresses import Planned, bilevel, most_alive
from holdfast.parallel.births import ALIGN, Life, StepChanged
from holdfast.plan.pack import Buffer, first_fit


def random_lives(seed, count, duration=20):
    g = torch.Generator().manual_seed(seed)
    lives = []
    for _ in range(count):
        lower = int(torch.randint(duration - 1, (), generator=g))
        upper = int(torch.randint(lower + 1, duration, (), generator=g))
        size = int(torch.randint(1, 9, (), generator=g))
        lives.append(Life(size * ALIGN, lower, upper))
    return sorted(lives, key=lambda v: v.lower)


def optimum(lives):
    """The card's mixed-integer program, by HiGHS: heights in units of ALIGN."""
    n = len(lives)
    sizes = [v.size // ALIGN for v in lives]
    big = sum(sizes)
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(n), 2)
        if lives[i].lower < lives[j].upper and lives[j].lower < lives[i].upper
    ]
    width = n + len(pairs) + 1  # offsets, orders, height
    rows, upper = [], []

    def constrain(bound, **terms):
        row = np.zeros(width)
        for name, factor in terms.items():
            row[int(name[1:])] = factor
        rows.append(row)
        upper.append(bound)

    for z, (i, j) in enumerate(pairs, start=n):
        constrain(-sizes[i], **{f"_{i}": 1, f"_{j}": -1, f"_{z}": -big})
        constrain(big - sizes[j], **{f"_{j}": 1, f"_{i}": -1, f"_{z}": big})
    for i in range(n):
        constrain(-sizes[i], **{f"_{i}": 1, f"_{width - 1}": -1})
    cost = np.zeros(width)
    cost[-1] = 1
    bounds = Bounds(0, [big] * n + [1] * len(pairs) + [big])
    limits = LinearConstraint(np.array(rows), -np.inf, upper)
    solved = milp(cost, constraints=limits, integrality=np.ones(width), bounds=bounds)
    assert solved.success
    return round(solved.fun) * ALIGN


def check_no_overlap(lives, layout):
    placed = [(v, at) for v, at in zip(lives, layout.offsets, strict=True) if at is not None]
    for (a, i), (b, j) in itertools.combinations(placed, 2):
        if a.lower < b.upper and b.lower < a.upper:
            assert i + a.size <= j or j + b.size <= i
    assert all(at >= 0 and at + v.size <= layout.height for v, at in placed)


@pytest.mark.parametrize("seed", range(12))
def test_level_one_is_the_optimum_of_the_program(seed):
    lives = random_lives(seed, 6)
    layout = bilevel(lives, [], seconds=1.0)
    assert layout.height == optimum(lives)
    check_no_overlap(lives, layout)


@pytest.mark.parametrize("seed", range(12))
def test_two_levels_never_overlap_and_leave_out_what_outlives(seed):
    lives = random_lives(seed, 40, duration=60)
    lives[7].upper = lives[30].upper = None
    layout = bilevel(lives, [15, 30, 45], seconds=0.5)
    check_no_overlap(lives, layout)
    assert [i for i, at in enumerate(layout.offsets) if at is None] == [7, 30]
    assert most_alive(lives) == layout.lower_bound <= layout.height


def test_equal_segments_are_packed_once(monkeypatch):
    one = random_lives(3, 6)
    lives = [Life(v.nbytes, v.lower + 20 * k, v.upper + 20 * k) for k in range(5) for v in one]
    problems = []

    def noted(buffers, **options):
        problems.append(list(buffers))
        return really(problems[-1], **options)

    really = addresses.pack
    monkeypatch.setattr(addresses, "pack", noted)
    layout = bilevel(lives, [0, 20, 40, 60, 80])
    # One for a segment, and level 2, where nothing lives longer.
    assert [len(p) for p in problems] == [6, 5, 5]
    # Blocks of segments that follow each other lie at one place.
    assert layout.height == bilevel(one, []).height


class Block(nn.Module):
    """Attention, layer norm and a wide layer: kernels with results and workspaces of their own."""

    def __init__(self, h=16):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(h), nn.Linear(h, 3 * h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x):
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in parts)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


def stepping(depth=4):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(depth)))

    def step(x, weight):
        model.zero_grad(set_to_none=False)
        y = x
        for block in model:
            addresses.cut()
            y = block(y)
        addresses.cut()
        torch.autograd.backward(y, weight)

    return model, step, (torch.randn(2, 24, 16), torch.randn(2, 24, 16))


@pytest.fixture
def one_thread():
    # Attention's backward allocates 128 bytes in each further thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_planned_step_is_the_same_step_without_allocations(one_thread):
    model, step, inputs = stepping()
    step(*inputs)
    want = [p.grad.clone() for p in model.parameters()]
    planned = Planned(step)
    for _ in range(4):
        planned(*inputs)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    with AllocatorPeak() as allocator:
        planned(*inputs)
    assert (allocator.allocations, planned.outside, planned.outside_bytes) == (0, 0, 0)
    with Meter(model, inputs=[*inputs, planned.memory]) as meter:
        planned(*inputs)
    assert meter.peak == meter.base
    # Other inputs of the same shape run at the same addresses.
    other = tuple(torch.randn_like(t) for t in inputs)
    planned(*other)
    got = [p.grad.clone() for p in model.parameters()]
    step(*other)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), got, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_may_be_part_of_the_step(kind):
    trajectories = []
    for run in (lambda step: step, Planned):
        model, step, inputs = stepping()
        optimizer = kind(model.parameters(), lr=1e-4)

        def whole(step=step, optimizer=optimizer, inputs=inputs):
            step(*inputs)
            optimizer.step()

        whole = run(whole)
        for _ in range(6):
            whole()
        trajectories.append([p.detach().clone() for p in model.parameters()])
    assert whole.outside == 0
    assert all(torch.equal(a, b) for a, b in zip(*trajectories, strict=True))


def test_wrapped_tensors_run_their_own_operations():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64, bias=False), torch.randn(3, 64)
    packed = Int4(group=32).encode(linear.weight.detach())
    kept = F.linear(x, packed)
    results: list[torch.Tensor] = []
    planned = Planned(lambda: results.append(F.linear(x, packed).sum().item()))
    for _ in range(4):
        planned()
    assert results == [pytest.approx(kept.sum().item())] * 4


def online_height(lives):
    """What an allocator gets that does not know the future: the lowest hole at each birth."""
    return first_fit(
        Buffer(v.lower, v.upper, v.size, i) for i, v in enumerate(lives) if v.upper is not None
    ).height


def recorded(depth):
    _, step, inputs = stepping(depth)
    planned = Planned(step)
    for _ in range(2):
        planned(*inputs)
    return planned.layout, planned._replay.lives


def test_a_traced_block_is_packed_lower_than_an_allocator_without_a_plan_does():
    _, lives = recorded(1)
    layout = bilevel(lives, [])
    assert layout.segments[0].optimal
    assert layout.height < online_height(lives)


def test_the_arena_is_hardly_higher_than_what_lives_at_one_time():
    layout, lives = recorded(6)
    check_no_overlap(lives, layout)
    assert all(segment.optimal for segment in layout.segments)
    assert layout.lower_bound <= layout.height <= online_height(lives)
    assert layout.height <= 1.02 * layout.lower_bound


def test_what_outlives_the_step_is_never_overwritten():
    model, _, (x, _) = stepping()
    planned = Planned(lambda x: model(x).sum().detach())
    results = [planned(x * (i + 1)) for i in range(6)]
    want = [model(x * (i + 1)).sum() for i in range(6)]
    torch.testing.assert_close(torch.stack(results), torch.stack(want))
    assert (planned.outside, planned.outside_bytes) == (1, 4)


def test_a_tensor_that_somebody_holds_keeps_its_bytes():
    model, _, (x, _) = stepping()
    kept: list[torch.Tensor] = []

    def step(x):
        y = model(x)
        if len(kept) < keep:
            kept.append(y.detach())
        y.sum().item()

    keep = 0
    planned = Planned(step)
    for _ in range(3):
        planned(x)
    assert planned.outside == 0
    keep = 1
    planned(x)
    copy = kept[0].clone()
    planned(2 * x)
    assert planned.outside > 0
    assert torch.equal(kept[0], copy)
    kept.clear()
    keep = 0
    planned(x)
    assert planned.outside == 0


def test_another_step_is_refused():
    _, step, (x, weight) = stepping()
    planned = Planned(step)
    for _ in range(3):
        planned(x, weight)
    with pytest.raises(StepChanged, match="in the recorded one it was"):
        planned(x[:, :20], weight[:, :20])
    planned(x, weight)


def test_planned_steps_do_not_nest():
    inner = Planned(lambda: torch.zeros(3).sum().item())
    outer = Planned(lambda: inner())
    outer()
    with pytest.raises(UsageError, match="do not nest"):
        outer()
