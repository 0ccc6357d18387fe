import copy
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.parallel.launch import launch
from holdfast.parallel.sharded import Traffic
from holdfast.parallel.zero import zero
from holdfast.plan.formulas import zero as formulas
from holdfast.training import checkpoint

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
STEPS, MICROS, CLIP, BUCKET = 10, 2, 0.5, 600


class Block(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 13), nn.Linear(13, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """A tied embedding, a frozen bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[1].up.bias.requires_grad_(False)

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def make(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def loss_of(model, step, micro, rank=None):
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    ids = torch.randint(11, (4, 5), generator=generator)
    logits = model(ids)[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) / MICROS


def train(model, optimizer, steps):
    norms = []
    for step in steps:
        for micro in range(MICROS):
            loss_of(model, step, micro).backward()
        norms.append(optimizer.clip_grad_norm_(CLIP).item())
        optimizer.step()
    return norms


def values(model):
    found = (p.detach() for p in model.parameters())
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def ddp():
    """Ten steps of DistributedDataParallel: parameters and gradient norms."""
    plain = make()
    model, optimizer, norms = nn.parallel.DistributedDataParallel(plain), ADAMW(trained(plain)), []
    for step in range(STEPS):
        with model.no_sync():
            loss_of(model, step, 0).backward()
        loss_of(model, step, 1).backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return values(plain), norms


def peak_of(log, category):
    held = peak = 0
    for sid, change, _ in log.events:
        if log.storages[sid].category == category:
            held += change
            peak = max(peak, held)
    return peak


def shapes_of(parameters):
    return [tuple(p.shape) for p in parameters]


def measured(dtype, stage):
    """What a Meter and the recorded collectives say of one step, beside the formulas."""
    plain = make(dtype)
    units = [shapes_of(block.parameters()) for block in plain.blocks] + [[(11, 6)]]
    frozen = [p for p in plain.parameters() if not p.requires_grad]
    frozen_shapes, frozen_bytes = shapes_of(frozen), sum(p.nbytes for p in frozen)
    shapes = shapes_of(trained(plain))
    model, optimizer = zero(plain, ADAMW, stage=stage, bucket_bytes=BUCKET)
    train(model, optimizer, [0])
    with Meter(model, optimizer) as meter:
        train(model, optimizer, [1])
    with Traffic() as traffic:
        train(model, optimizer, [2])
    ranks, element = dist.get_world_size(), dtype.itemsize
    step = meter.ledger.column("device", "step")
    found = {
        "resident": {c: step[c] for c in ("parameters", "gradients", "optimizer")},
        "end": meter.end,
        "gradient peak": peak_of(meter.log, "gradients"),
        "parameter peak": peak_of(meter.log, "parameters"),
        "volume": traffic.elements("gather") + traffic.elements("reduce"),
        "norm": traffic.elements("all-reduce"),
    }
    if stage == 3:
        resident = formulas.sharded_rows(shapes, ranks, dist.get_rank(), frozen=frozen_shapes)
        gathered = formulas.gathered(units, ranks, element=element)
        want = {
            "gradient peak": resident["gradients"],
            "parameter peak": resident["parameters"] + gathered,
            "volume": formulas.volume_rows(units, ranks, MICROS, frozen=frozen_shapes),
        }
        end = resident["parameters"] + resident["optimizer"]
    else:
        sizes = [[p.numel() for p in bucket.parameters] for bucket in optimizer.order]
        sums = [sum(bucket) for bucket in sizes]
        resident = formulas.resident(sums, ranks, stage, element=element, frozen=frozen_bytes)
        want = {
            "gradient peak": formulas.gradient_peak(sizes, ranks, stage, element=element),
            "parameter peak": resident["parameters"],
            "volume": formulas.volume(sums, ranks, stage, MICROS),
        }
        end = sum(resident.values())
    return found, want | {"resident": resident, "end": end, "norm": 2 * (ranks - 1) // ranks}


def resumed(stage, dtype):
    """Seven steps, and a fresh model that loads this rank's checkpoint of the first five."""
    whole, optimizer = zero(make(dtype), ADAMW, stage=stage, bucket_bytes=BUCKET)
    train(whole, optimizer, range(5))
    weights, everyones = values(whole), optimizer.consolidated()
    saved = copy.deepcopy(optimizer.state_dict())
    again, fresh = zero(make(dtype), ADAMW, stage=stage, bucket_bytes=BUCKET)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 5, whole, optimizer, {})
        train(whole, optimizer, range(5, 7))
        checkpoint.load(path, again, fresh)
    train(again, fresh, range(5, 7))
    equal = all(torch.equal(a, b) for a, b in zip(values(whole), values(again), strict=True))
    return equal, (everyones, weights, saved, values(whole))


def uneven_use(stage):
    """A branch that only the first rank takes; and a parameter that nobody uses."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, x):
            h = self.always(x)
            return self.sometimes(h) if dist.get_rank() == 0 else h

    model, sgd = Branch(), partial(torch.optim.SGD, lr=0.1)
    reference = nn.parallel.DistributedDataParallel(
        copy.deepcopy(model), find_unused_parameters=True
    )
    plain = sgd(reference.parameters())
    model, optimizer = zero(model, sgd, stage=stage, bucket_bytes=40)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        for m, o in ((reference, plain), (model, optimizer)):
            m(x).square().sum().backward()
            o.step()
            o.zero_grad()
    pairs = zip(values(model), values(reference), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def large_gradient():
    """What backward adds where one gradient is larger than a bucket, and the bytes of that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    model, optimizer = zero(model, partial(torch.optim.SGD, lr=0.1), stage=2, bucket_bytes=1024)

    def step():
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()

    step()
    with Meter(model, optimizer) as meter:
        step()
    return meter.ledger.phase_peaks()["backward"] - meter.base, model[0].weight.nbytes


def half_precision(stage):
    """How far ten tiny steps of SGD bring weights of 1, where bfloat16 has steps of 1/128; and the
    master after other weights were loaded."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    nn.init.ones_(model[0].weight)
    model, optimizer = zero(model, partial(torch.optim.SGD, lr=1e-3), stage=stage)
    for _ in range(10):
        model(torch.ones(1, 4).bfloat16()).sum().backward()
        optimizer.step()
    moved = 1 - optimizer.units[0].master.mean().item()
    model.load_state_dict({name: 3 * p.detach().clone() for name, p in model.state_dict().items()})
    optimizer.zero_grad()
    optimizer.step()
    return moved, optimizer.units[0].master.mean().item()


def grouped(stage):
    """Groups with rates of their own under a schedule, stepped twice, beside DDP."""

    def groups(model):
        decayed = [p for p in trained(model) if p.dim() > 1]
        rest = [p for p in trained(model) if p.dim() == 1]
        return [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "lr": 0.05}]

    plain = make()
    ddp, reference = nn.parallel.DistributedDataParallel(plain), ADAMW(groups(plain))
    model = make()
    model, optimizer = zero(model, ADAMW, stage=stage, params=groups(model), bucket_bytes=BUCKET)
    for m, o in ((ddp, reference), (model, optimizer)):
        schedule = torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))
        for step in range(2):
            loss_of(m, step, 0).backward()
            o.step()
            o.zero_grad()
            schedule.step()
    pairs = zip(values(model), values(plain), strict=True)
    consolidated = optimizer.consolidated()
    same = consolidated is None or [
        {k: v for k, v in group.items() if k != "params"} for group in consolidated["param_groups"]
    ] == [{k: v for k, v in g.items() if k != "params"} for g in reference.param_groups]
    return max((a - b).abs().max().item() for a, b in pairs), same


def refusals():
    """Messages of what is refused where ranks are there."""
    said = []

    def tell(call):
        try:
            call()
        except UsageError as error:
            said.append(str(error))

    for make_optimizer in (torch.optim.Muon, torch.optim.LBFGS, torch.optim.Adafactor):
        tell(lambda cls=make_optimizer: zero(make(), cls, stage=1))
    tell(lambda: zero(nn.Linear(2, 2).requires_grad_(False), ADAMW, stage=1))
    tell(lambda: zero(make(), ADAMW, stage=1, params=[nn.Parameter(torch.ones(2))]))
    tied = make()
    tied.blocks[2].norm.weight = tied.blocks[0].norm.weight
    tell(lambda: zero(tied, ADAMW, stage=3))
    mixed = make()
    mixed.head.weight.data = mixed.head.weight.data.bfloat16()
    tell(lambda: zero(mixed, ADAMW, stage=3))
    model, optimizer = zero(make(), ADAMW, stage=2)
    optimizer.load_state_dict(ADAMW(trained(make())).state_dict())  # of a plain one, not stepped
    tell(lambda: optimizer.step(lambda: None))
    loss_of(model, 0, 0).backward()
    optimizer.clip_grad_norm_(1.0)
    tell(lambda: loss_of(model, 0, 1).backward())
    optimizer.zero_grad()
    loss_of(model, 0, 0).backward()
    for p in model.parameters():
        p.data = p.data.clone()
    tell(optimizer.step)
    return said


def adopted(stage, consolidated, weights, foreign, _):
    """A state of another number of ranks: refused as it is, loaded when consolidated."""
    model = make(seed=1)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    model, optimizer = zero(model, ADAMW, stage=stage, bucket_bytes=BUCKET)
    with pytest.raises(UsageError, match=r"saved by rank 0 of 2.*consolidated\(\)"):
        optimizer.load_state_dict(foreign)
    optimizer.load_state_dict(consolidated)
    return optimizer.consolidated()


def compared(reference, norms, stage):
    model, optimizer = zero(make(), ADAMW, stage=stage, bucket_bytes=BUCKET)
    ours = train(model, optimizer, range(STEPS))
    pairs = zip(values(model), reference, strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    return {"apart": apart, "norms": (ours, norms), torch.float32: measured(torch.float32, stage)}


def on_two():
    reference = ddp()
    found = {stage: compared(*reference, stage) for stage in (1, 2, 3)}
    for stage, of_stage in found.items():
        of_stage[torch.bfloat16] = measured(torch.bfloat16, stage)
        of_stage["resumed"] = resumed(stage, torch.float32)
        of_stage["resumed half"] = resumed(stage, torch.bfloat16)[0]
        of_stage["half"] = half_precision(stage)
        of_stage["grouped"] = grouped(stage)
        if stage < 3:
            of_stage["uneven use"] = uneven_use(stage)
    return found | {"refusals": refusals(), "large": large_gradient()}


def over_a_part(stage, mesh):
    """One step over two of four ranks, beside DDP over the same two."""
    plain = make()
    ddp = nn.parallel.DistributedDataParallel(plain, process_group=mesh["data"].get_group())
    reference = ADAMW(trained(plain))
    model, optimizer = zero(make(), ADAMW, stage=stage, mesh=mesh["data"], bucket_bytes=BUCKET)
    for m, o in ((ddp, reference), (model, optimizer)):
        loss_of(m, 0, 0).backward()
        o.step()
    pairs = zip(values(model), values(plain), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def on_four(saved):
    reference = ddp()
    found = {stage: compared(*reference, stage) for stage in (1, 2, 3)}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    with pytest.raises(UsageError, match="mesh has 2 dimensions"):
        zero(make(), ADAMW, stage=1, mesh=mesh)
    for stage, of_stage in found.items():
        of_stage["part"] = over_a_part(stage, mesh)
    for stage, of_stage in found.items():
        of_stage["adopted"] = adopted(stage, *saved[stage])
    return found


@pytest.fixture(scope="module")
def two():
    return launch(on_two, 2, limit=300.0)


@pytest.fixture(scope="module")
def four(two):
    """Four ranks, which also load what two have saved."""
    return launch(on_four, 4, {s: two[0][s]["resumed"][1] for s in (1, 2, 3)}, limit=300.0)


@pytest.fixture(scope="module")
def each(two, four):
    """What was found, by stage: (number of ranks, results) of all ranks of both worlds."""
    return {s: [(len(w), rank[s]) for w in (two, four) for rank in w] for s in (1, 2, 3)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ten_steps_equal_ddp(each, stage):
    for _, found in each[stage]:
        assert found["apart"] < 1e-6
        ours, norms = found["norms"]
        assert ours == pytest.approx(norms, rel=1e-5) and min(norms) > CLIP


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_measured_bytes_and_traffic_equal_the_formulas(each, stage):
    for _, rank in each[stage]:
        for dtype in (
            (torch.float32, torch.bfloat16) if torch.bfloat16 in rank else (torch.float32,)
        ):
            found, want = rank[dtype]
            assert found == want


def test_gradients_of_stage_2_are_a_shard_and_one_bucket(each):
    plain = 4 * sum(p.numel() for p in trained(make()))
    for ranks, rank in each[2]:
        found = rank[torch.float32][0]
        # Padding: less than one element for each rank in each of the seven buckets.
        assert found["gradient peak"] <= plain / ranks + BUCKET + 4 * 7
        assert found["resident"]["gradients"] <= plain / ranks + 4 * 7


def test_a_gradient_larger_than_a_bucket_is_not_copied(two):
    for rank in two:
        peak, large = rank["large"]
        assert large <= peak <= large + 2 * 1024


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_resume_on_the_same_ranks(two, stage):
    assert all(rank[stage]["resumed"][0] and rank[stage]["resumed half"] for rank in two)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_consolidated_states_are_those_of_the_plain_optimizer(two, four, stage):
    state, weights, _, later = two[0][stage]["resumed"][1]
    assert two[1][stage]["resumed"][1][0] is None
    model = make(seed=1)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    optimizer = ADAMW(trained(model))
    optimizer.load_state_dict(copy.deepcopy(state))
    for step in range(5, 7):
        for micro in range(MICROS):
            for rank in range(2):
                (loss_of(model, step, micro, rank) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    assert len(state["state"]) == 18 and all(s["step"] == 5 for s in state["state"].values())
    for a, b in zip(values(model), later, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    again = four[0][stage]["adopted"]
    for number, entry in state["state"].items():
        assert all(torch.equal(value, again["state"][number][k]) for k, value in entry.items())


def test_half_precision_keeps_master_weights(two):
    for rank in two:
        # Steps of 0.001 are below half of bfloat16's distance at 1: without a master all are lost.
        moved, loaded = zip(*(rank[s]["half"] for s in (1, 2, 3)), strict=True)
        assert moved == pytest.approx((0.01,) * 3, rel=1e-3)
        assert loaded == pytest.approx((3.0,) * 3, rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_mesh_says_which_ranks(four, stage):
    assert all(rank[stage]["part"] < 1e-6 for rank in four)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_groups_and_schedules(two, stage):
    for rank in two:
        apart, same_settings = rank[stage]["grouped"]
        assert apart < 1e-6 and same_settings


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_may_use_different_parameters(two, stage):
    assert all(rank[stage]["uneven use"] < 1e-6 for rank in two)


def test_bad_input_says_what_to_do(two):
    want = [
        "Muon'> cannot step flat shards", "LBFGS'> cannot step flat shards",
        "Adafactor'> is not elementwise", "no parameter that requires a gradient",
        "not the model's", "tied to a parameter of another unit", "stage 3 wants one dtype",
        "call backward before", "clip once, after the last backward", "call zero() last",
    ]  # fmt: skip
    said = two[0]["refusals"]
    assert len(said) == len(want), said
    for part, text in zip(want, said, strict=True):
        assert part in text
    with pytest.raises(UsageError, match="stage=4 is unknown"):
        zero(make(), ADAMW, stage=4)
    with pytest.raises(UsageError, match="bucket_bytes=0"):
        zero(make(), ADAMW, stage=1, bucket_bytes=0)
    with pytest.raises(UsageError, match="meta device"):
        zero(make().to("meta"), ADAMW, stage=1)
