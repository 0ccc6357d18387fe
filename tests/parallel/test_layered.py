import copy
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.parallel import schedule as schedules
from holdfast.parallel.launch import launch
from holdfast.parallel.layer_shards import ShardedLayers
from holdfast.parallel.layered import bubble, layered_accumulate, modular_pipeline
from holdfast.parallel.offload_plan import OffloadPlan, StageCost, timeline
from holdfast.parallel.sharded import Traffic
from holdfast.parallel.zero import zero
from holdfast.places import HostArena
from holdfast.plan.formulas import layered as formulas
from holdfast.plan.formulas.zero import shard_elements

WIDTH, LAYERS, BATCH, LENGTH = 8, 4, 3, 5
SGD = partial(torch.optim.SGD, lr=0.1)


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


def make(dropout=0.0, layers=LAYERS):
    torch.manual_seed(0)
    return nn.ModuleList(Layer(dropout) for _ in range(layers))


def micros_of(count, rank=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    shape = (BATCH, LENGTH, WIDTH)
    return [
        (torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator))
        for _ in range(count)
    ]


def loss_fn(y, target):
    return (y.float() - target).square().mean()


def micro_outer(blocks, micros, seed):
    """The usual order, with the dropout of the layered one for each layer and micro-batch."""
    total = 0.0
    for j, (x, target) in enumerate(micros):
        for i, block in enumerate(blocks):
            torch.manual_seed(seed + i * len(micros) + j)
            x = block(x)
        loss = loss_fn(x, target) / len(micros)
        loss.backward()
        total += loss.item()
    return total


def grads_of(blocks):
    return [p.grad for p in blocks.parameters()]


@pytest.mark.parametrize("in_arena", [False, True])
@pytest.mark.parametrize("micros", [1, 3])
def test_gradients_equal_the_usual_order_with_dropout(micros, in_arena):
    batch, reference, blocks = micros_of(micros), make(0.3), make(0.3)
    want = micro_outer(reference, batch, seed=5)
    arena = HostArena(2**20, pinned=False) if in_arena else None
    state = torch.get_rng_state()
    got = layered_accumulate(blocks, batch, loss_fn, arena=arena, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.item() == pytest.approx(want, rel=1e-6) and not got.requires_grad
    for ours, theirs in zip(grads_of(blocks), grads_of(reference), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    if arena is not None:
        one = BATCH * LENGTH * WIDTH * 4
        assert arena.peak_bytes == formulas.boundaries([one] * LAYERS, micros)
        assert arena.peak_bytes == micros * (LAYERS - 1) * one and arena.resident_bytes == 0


def test_dropout_differs_between_micro_batches_and_batches():
    blocks, batch = make(0.5, layers=2), micros_of(1) * 2
    seen = []
    layered_accumulate(blocks, batch, lambda y, _: seen.append(y.detach()) or y.mean())
    layered_accumulate(blocks, batch, lambda y, _: seen.append(y.detach()) or y.mean())
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_double_precision():
    blocks, reference = make().double(), make().double()
    batch = micros_of(4, dtype=torch.float64)
    micro_outer(reference, batch, 0)
    layered_accumulate(blocks, batch, loss_fn, seed=0)
    for ours, theirs in zip(grads_of(blocks), grads_of(reference), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)


def step_peak(layers, micros, arena):
    """Device bytes (simulated: peak less what the arena holds) that one batch adds."""
    blocks, batch = make(layers=layers), micros_of(micros)

    def step():
        layered_accumulate(blocks, batch, loss_fn, arena=arena, seed=0)

    step()  # makes the gradients, to which the next one adds
    with Meter(blocks, inputs=batch) as meter:
        step()
    return meter.peak - meter.base, meter.end - meter.base


def test_device_bytes_are_one_layer_and_the_boundaries():
    one = BATCH * LENGTH * WIDTH * 4
    peaks = {}
    for layers, micros in ((3, 2), (3, 6), (5, 2)):
        peak, left = step_peak(layers, micros, HostArena(2**20, pinned=False))
        assert left == 0
        peaks[layers, micros] = peak - formulas.boundaries([one] * layers, micros)
    # What is beside the boundaries grows neither with the micro-batches nor with the depth.
    assert len(set(peaks.values())) == 1
    plain, _ = step_peak(5, 2, None)
    assert plain - formulas.boundaries([one] * 5, 2) < 1.1 * peaks[5, 2]


def test_what_is_refused():
    batch = micros_of(2)
    with pytest.raises(UsageError, match=r"block 0 changes its buffers.*BatchNorm1d"):
        layered_accumulate([nn.BatchNorm1d(LENGTH)], batch, loss_fn)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    arena = HostArena(2**20, pinned=False)
    with pytest.raises(UsageError, match=r"block 1 changes its buffers.*Counts"):
        layered_accumulate([Layer(0.0), Counts()], batch, loss_fn, arena=arena)
    assert arena.resident_bytes == 0
    evaluated = nn.BatchNorm1d(LENGTH).eval()
    layered_accumulate([evaluated, Layer(0.0)], batch, loss_fn)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UsageError, match="block 0 returned tuple"):
        layered_accumulate([Pair()], batch, loss_fn)
    with pytest.raises(UsageError, match="0 micro-batches"):
        layered_accumulate(make(), [], loss_fn)


# --- several ranks


def reference_steps(steps, micros):
    blocks = make(0.2)
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-2)
    for step in range(steps):
        for rank in range(dist.get_world_size()):
            micro_outer(blocks, micros_of(micros, rank), seed=100 * step + 50 * rank)
        for p in blocks.parameters():
            p.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in blocks.parameters()]


def trained(steps, micros, begin=0, saved=None, dtype=torch.float32):
    blocks, rank = make(0.2).to(dtype), dist.get_rank()
    shard = ShardedLayers(blocks, partial(torch.optim.AdamW, lr=1e-2))
    if saved is not None:
        shard.load_state_dict(saved)
    batch = micros_of(micros, rank, dtype)
    for step in range(begin, begin + steps):
        layered_accumulate(blocks, batch, loss_fn, shard=shard, seed=100 * step + 50 * rank)
    with shard.gathered():
        return shard, [p.detach().clone() for p in blocks.parameters()]


def traffic_of(micros):
    """Elements sent for gathers and for gradients, layered and by ZeRO's stage 3."""
    blocks, batch = make(), micros_of(micros)
    shard = ShardedLayers(blocks, SGD)
    with Traffic() as layered:
        layered_accumulate(blocks, batch, loss_fn, shard=shard)
    usual = nn.Sequential(*make())
    usual, optimizer = zero(usual, SGD, stage=3, units=list(usual))
    with Traffic() as other:
        for x, target in batch:
            loss_fn(usual(x), target).backward()
        optimizer.step()
    return [t.elements(kind) for t in (layered, other) for kind in ("gather", "reduce")]


def metered(micros):
    blocks, batch = make(), micros_of(micros)
    shard = ShardedLayers(blocks, partial(torch.optim.AdamW, lr=1e-2))
    arena = HostArena(2**20, pinned=False)

    def step():
        layered_accumulate(blocks, batch, loss_fn, shard=shard, arena=arena, seed=0)

    step()
    with Meter(blocks, shard, inputs=batch) as meter:
        step()
    return meter.base, meter.end, meter.peak - arena.peak_bytes


def on_two():
    shard, ours = trained(3, 2)
    pairs = zip(ours, reference_steps(3, 2), strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    half, _ = trained(1, 2)
    saved = copy.deepcopy(half.state_dict())
    _, again = trained(2, 2, begin=1, saved=saved)
    everyones = half.consolidated()
    _, from_all = trained(2, 2, begin=1, saved=_to_all(everyones))
    said = []
    failed, failing = make(), micros_of(2)
    shard = ShardedLayers(failed, SGD)
    masters = [layer.master.clone() for layer in shard.layers]
    with pytest.raises(ZeroDivisionError):
        layered_accumulate(failed, failing, lambda y, target: 1 / 0, shard=shard)
    layered_accumulate(failed, failing, lambda y, target: 0 * y.sum(), shard=shard)
    untouched = all(torch.equal(a, b.master) for a, b in zip(masters, shard.layers, strict=True))
    blocks = make()
    blocks[2].norm.weight = blocks[0].norm.weight
    for call in (
        lambda: ShardedLayers(blocks, SGD),
        lambda: layered_accumulate(make(), micros_of(1), loss_fn, shard=shard),
        lambda: shard.clip_grad_norm_(1.0),
        lambda: ShardedLayers([nn.Tanh()], SGD),
    ):
        try:
            call()
        except UsageError as error:
            said.append(str(error))
    return {
        "apart": apart,
        "resumed": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
        "from all": all(torch.equal(a, b) for a, b in zip(ours, from_all, strict=True)),
        "traffic": {m: traffic_of(m) for m in (2, 8)},
        "metered": {m: metered(m) for m in (2, 6)},
        "half": [p.dtype for p in trained(1, 2, dtype=torch.bfloat16)[1]],
        "said": said,
        "untouched": untouched and all(p.numel() == 0 for p in failed.parameters()),
    }


def _to_all(consolidated):
    box = [consolidated]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@pytest.fixture(scope="module")
def two():
    return launch(on_two, 2, limit=300.0)


def test_sharded_steps_equal_one_process(two):
    assert all(rank["apart"] < 1e-6 for rank in two)


def test_states_resume_on_the_same_ranks_and_consolidated(two):
    assert all(rank["resumed"] and rank["from all"] for rank in two)
    assert all(set(rank["half"]) == {torch.bfloat16} for rank in two)


def test_gathers_do_not_depend_on_the_number_of_micro_batches(two):
    layer = sum(p.numel() for p in Layer(0.0).parameters())
    once = LAYERS * shard_elements(layer, 2)
    for rank in two:
        traffic = rank["traffic"]
        assert traffic[2][:2] == traffic[8][:2] == [formulas.gathered([layer] * LAYERS, 2), once]
        # The usual order gathers and reduces for every micro-batch.
        assert traffic[8][2:] == [4 * n for n in traffic[2][2:]] == [16 * once, 8 * once]


def test_device_holds_shards_and_two_layers(two):
    one, count = BATCH * LENGTH * WIDTH * 4, sum(p.numel() for p in Layer(0.0).parameters())
    for rank in two:
        (base, end, few), (_, _, many) = rank["metered"][2], rank["metered"][6]
        # Parameters and two moments of one half, a step count for each layer, and the inputs.
        shards = LAYERS * (12 * shard_elements(count, 2) + 4)
        assert base == end == shards + 2 * 2 * one
        # Twice parameters, twice gradients; what a layer saves for one micro-batch; Adam's scratch.
        assert few - base <= 4 * 4 * count + 20 * one
        assert many - few == (6 - 2) * 2 * one  # only the batch itself


def test_an_error_leaves_nothing_behind(two):
    assert all(rank["untouched"] for rank in two)


def test_what_shards_refuse(two):
    want = ["block 2 shares a parameter", "made for other blocks", "clip by value", "none that"]
    said = two[0]["said"]
    assert len(said) == len(want), said
    for part, text in zip(want, said, strict=True):
        assert part in text


# --- modular pipelines

PIPE_MICROS, PIPE_LAYERS = 4, 6
PIPES = {
    "plain": {"recompute": False},
    "recompute": {},
    "host": {"offload": "full", "asynchronous": False},
}


class Wide(nn.Module):
    """Its input is large enough to be worth moving."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


def pipelined():
    """Per mode: chunks, device and host bytes at the peak, and how far gradients are apart."""
    torch.manual_seed(0)
    x, target = torch.randn(2, PIPE_MICROS * 8, 6, 32)
    found = {}
    for name, options in PIPES.items():
        torch.manual_seed(0)
        layers = nn.ModuleList(Wide() for _ in range(PIPE_LAYERS))
        reference = copy.deepcopy(layers)
        pipe = modular_pipeline(
            layers, microbatches=PIPE_MICROS, loss_fn=nn.functional.mse_loss, **options
        )
        pipe.step(x, target)
        nn.functional.mse_loss(nn.Sequential(*reference)(x), target).backward()
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        pairs = zip(grads_of(layers[mine]), grads_of(reference[mine]), strict=True)
        apart = max((a - b).abs().max().item() for a, b in pairs)
        predicted = pipe.predicted.peak(dist.get_rank(), "device")
        found[name] = (pipe.measured, predicted, apart)
    with pytest.warns(UserWarning, match="1 micro-batches on 2 ranks: each waits 100% .* 17%"):
        modular_pipeline(layers, microbatches=1, loss_fn=nn.functional.mse_loss)
    said = []
    for bad in (layers[:3], [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]):
        try:
            modular_pipeline(bad, microbatches=4, loss_fn=nn.functional.mse_loss)
        except UsageError as error:
            said.append(str(error))
    return found, said


@pytest.fixture(scope="module")
def pipes():
    return launch(pipelined, 2, limit=120.0)


def test_a_modular_pipeline_holds_all_micro_batches_as_its_boundaries(pipes):
    one, chunks = 8 * 6 * 32 * 4, PIPE_MICROS * PIPE_LAYERS // 2
    for rank, (found, _) in enumerate(pipes):
        for measured, predicted, apart in found.values():
            assert apart < 1e-6 and measured.device_bytes == predicted
        assert found["plain"][0].chunks == chunks
        # The first layer's input is the batch; what the loss saves is no boundary.
        boundaries = (chunks - PIPE_MICROS if rank == 0 else chunks) * one
        loss = 0 if rank == 0 else PIPE_MICROS * one
        assert found["recompute"][0].device_bytes == boundaries + loss
        assert found["host"][0].host_bytes == boundaries + loss
        assert found["host"][0].chunks == 1
        assert found["host"][0].device_bytes == (one if rank == 0 else 2 * one)


def test_a_modular_pipeline_refuses(pipes):
    for _, said in pipes:
        assert "2 ranks do not divide 3 layers" in said[0]
        assert "block 0 changes its buffers" in said[1] or "block 1 changes its buffers" in said[1]


@pytest.mark.parametrize(
    ("ranks", "chunks", "micros"), [(2, 2, 2), (4, 3, 4), (4, 2, 9), (8, 4, 16)]
)
def test_the_simulated_bubble_is_the_formulas(ranks, chunks, micros):
    layers = ranks * chunks
    order = schedules.breadth_first(ranks, chunks, micros)
    trace = timeline(OffloadPlan(order), [StageCost(10, 12, 8, 0)] * layers)
    want = formulas.bubble(ranks, micros, layers, modular=True)
    assert want == Fraction(ranks - 1, micros * chunks)
    for rank in range(ranks):
        stream = (rank, "compute")
        assert Fraction(trace.bubble(stream), trace.busy(stream)) == want
    assert bubble(ranks, layers, micros) == pytest.approx(float(want))
    contiguous = schedules.one_f_one_b(ranks, 1, micros)
    trace = timeline(OffloadPlan(contiguous), [StageCost(10, 12, 8, 0)] * ranks)
    usual = Fraction(trace.bubble((0, "compute")), trace.busy((0, "compute")))
    assert usual == formulas.bubble(ranks, micros, layers, modular=False)


# --- formulas


def test_bubbles():
    assert formulas.bubble(4, 4, 16, modular=True) == Fraction(3, 16)
    assert formulas.bubble(4, 4, 16, modular=False) == Fraction(3, 4)
    with pytest.raises(UsageError, match="use 4 or more"):
        formulas.bubble(4, 3, 16, modular=True)
    with pytest.raises(UsageError, match="do not divide"):
        formulas.bubble(3, 3, 16, modular=True)


def test_shortest_time():
    assert formulas.critical_batch(1.0) == 2e8
    assert formulas.critical_batch(2.0) == pytest.approx(7.4e6, rel=0.01)
    job = formulas.Training(
        parameters=175_000_000_000, layers=96, width=12288, tokens=300e9, sequence=2048,
        batch=formulas.critical_batch(2.0), flops=187e12, network=25e9, memory=80 * 2**30,
        devices=4096,
    )  # fmt: skip
    ours, usual = formulas.shortest(job, layered=True), formulas.shortest(job, layered=False)
    assert usual.seconds / ours.seconds > 1.5
    # No way of those that were searched is faster.
    for stages in (1, 2, 3, 4, 6):
        way = formulas.way(job, 4096 // 8 // stages, stages, 8, layered=True)
        assert way.seconds >= ours.seconds
    # By hand: one replica, one stage, no network; 8 FLOPs for each parameter and token.
    alone = formulas.way(job, 1, 1, 1, layered=True)
    assert alone.step_seconds == pytest.approx(8 * 175e9 * 2048 / 187e12)
    assert alone.boundary_bytes == 2 * 2048 * 12288 * 96
