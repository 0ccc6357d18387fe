import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from holdfast.checks.plan.vtrain import WITHIN, behind
from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.plan.apply import set_option
from holdfast.plan.blocks import find_stacks, members
from holdfast.plan.hardware import load_hardware
from holdfast.plan.models import loss_of
from holdfast.plan.profile import Profile
from holdfast.plan.simulate import Task, simulate
from holdfast.plan.step_graph import OPTIONS, optimizer
from holdfast.plan.sweep import (
    TrainJob,
    compute_optimal,
    expected_loss,
    plans,
    schedule_jobs,
    sweep,
)
from holdfast.plan.vtrain import ParallelPlan, TrainConfig, VTrain

HARDWARE = load_hardware("cpu-2core")
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip


def config(layers, batch=8, sequence=16, **fields):
    return TrainConfig(LLAMA | {"num_hidden_layers": layers} | fields, batch, sequence)


CONFIG = config(6)
WEIGHTS = 6 * 9 + 3  # of its blocks; embedding, norm and head


@pytest.fixture(scope="module")
def roofline():
    return VTrain(Profile(), HARDWARE, missing="roofline")


class Equal(VTrain):
    """Every block costs 1 ms forward and 2 ms backward; nothing else costs any time."""

    def __init__(self):
        super().__init__(Profile(device="cuda"), HARDWARE)

    def replay(self, plan, **links):
        self.profile.collectives = {
            name: {n: [(1, links.get(name, 0.0))] for n in (2, 4)}
            for name in ("send", "all_reduce", "stall")
        }
        return self.predict(CONFIG, plan)

    def graph(self, made, plan):
        graph = super().graph(made, plan)
        if "all of F" in {op.key for op in graph.all_ops(False)}:
            return graph
        for ops in graph.ops["keep"].values():
            self.profile.ops |= {op.key: 0.0 for op in ops}
        for parameter in graph.whole.parameters():
            self.profile.ops |= {op.key: 0.0 for op in graph.update_ops(tuple(parameter.shape))}
        for key, backward in graph.ops["keep"]:
            if key[0] in ("F", "B"):
                whole = graph.ops["keep"][key, backward][0]._replace(key=f"all of {key[0]}")
                graph.ops["keep"][key, backward] = [whole]
        self.profile.ops |= {"all of F": 1e-3, "all of B": 2e-3}
        return graph


@pytest.fixture(scope="module")
def equal():
    return Equal()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 8), (6, 2)])
def test_the_bubble_is_exact(equal, schedule, p, m):
    plan = ParallelPlan(p=p, micro=8 // m, schedule=schedule)
    found = equal.replay(plan)
    stage = 3_000_000 * 6 // p  # ns
    assert found.trace.end == (m + p - 1) * stage
    for rank in range(p):
        bubble = found.trace.bubble((rank, "compute"))
        assert bubble * (m + p - 1) == (p - 1) * found.trace.end
    assert found.breakdown["idle"] == pytest.approx((p - 1) * stage / 1e9)


def test_1f1b_holds_fewer_micro_batches_than_gpipe(equal):
    lean, all_at_once = (
        equal.replay(ParallelPlan(p=3, micro=1, schedule=name)).trace for name in ("1f1b", "gpipe")
    )
    for rank in range(3):
        few, many = (t.peak(rank, "device", "activations") for t in (lean, all_at_once))
        # 3 - rank micro-batches instead of all 8; what backward makes anew comes on top.
        assert 0.99 * (3 - rank) / 8 < few / many < (4 - rank) / 8


def test_communication_by_hand(equal):
    links = {"send": 5e-4, "all_reduce": 1e-4}
    # Six blocks of 1 + 2 ms, each with two sums in both directions.
    tensor = equal.replay(ParallelPlan(t=2, micro=8), **links)
    assert tensor.trace.end == 18_000_000 + 6 * 4 * 100_000
    # One micro-batch through three stages: four sends, forward and back.
    piped = equal.replay(ParallelPlan(p=3, micro=8), **links)
    assert piped.trace.end == 18_000_000 + 4 * 500_000
    # A bucket per weight: the backward of those before hides it, but for the first block's last
    # two and the embedding's. 128 of a block's 37,120 bytes are those of its first norm.
    data = equal.replay(ParallelPlan(d=2, micro=4, bucket_bytes=1), **links)
    shown = 3 * 100_000 - round(2_000_000 * 128 / 37_120)
    assert data.trace.end == pytest.approx(18_000_000 + shown, abs=WEIGHTS)
    assert data.breakdown["communication"] == pytest.approx(WEIGHTS * 1e-4)
    assert data.breakdown["idle"] == pytest.approx(shown / 1e9, rel=1e-3)
    # One bucket waits for the whole of backward.
    data = equal.replay(ParallelPlan(d=2, micro=4), **links)
    assert data.trace.end == 18_000_000 + 100_000


def test_on_shared_cores_nothing_is_hidden(equal):
    plan = ParallelPlan(d=2, micro=4, bucket_bytes=1)
    links = {"all_reduce": 1e-4, "stall": 1e-4}
    kept = equal.profile
    equal.profile = replace(kept, slowdown={})
    late = WEIGHTS * 100_000
    rounding = {"abs": WEIGHTS}
    assert equal.replay(plan, **links).trace.end == pytest.approx(18_000_000 + late, **rounding)
    # Computing may lose more beside an all-reduce than that takes alone, but for the last.
    worse = equal.replay(plan, **links | {"stall": 3e-4}).trace.end
    assert worse == pytest.approx(18_000_000 + 3 * late - 200_000, **rounding)
    equal.profile = replace(equal.profile, device="cpu", slowdown={2: 1.5})
    assert equal.replay(plan, **links).trace.end == pytest.approx(27_000_000 + late, **rounding)
    equal.profile = replace(equal.profile, slowdown={})
    with pytest.raises(UsageError, match=r"how much 2 ranks on one CPU slow.*contention.measure"):
        equal.replay(plan)
    equal.profile = kept


def test_buckets_are_those_of_distributed_data_parallel(tmp_path):
    made = config(3, intermediate_size=96)
    limit = 20_000
    graph = VTrain(Profile(), HARDWARE, missing="roofline").graph(made, ParallelPlan(micro=4))
    parts = [part for part in graph.parts if part.backward]
    ours = [bucket.nbytes for bucket in graph.buckets(parts, limit)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = made.source.build("cpu", torch.float32)
        model = DistributedDataParallel(model, bucket_cap_mb=limit / 2**20)
        for _ in range(3):  # after the first, buckets follow the order of the gradients
            loss_of(model(**made.source.example_inputs(4, 16, "cpu"))).backward()
        theirs = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    finally:
        dist.destroy_process_group()
    assert ", ".join(map(str, ours)) == theirs and len(ours) > 3


def longest_path(tasks):
    """Slow and obvious: a task ends after whatever it waits for, by recursion."""
    by_name = {task.name: task for task in tasks}
    before = {}
    for i, task in enumerate(tasks):
        same = [other.name for other in tasks[:i] if other.stream == task.stream]
        before[task.name] = [*task.after, *same]

    def end(name):
        return by_name[name].duration + max(map(end, before[name]), default=0)

    return max(end(task.name) for task in tasks)


@pytest.mark.parametrize("seed", range(20))
def test_replay_is_the_longest_path(seed):
    rng = random.Random(seed)
    tasks = [
        Task(
            i, rng.randrange(3), rng.randrange(100),
            tuple(rng.sample(range(i), min(i, rng.randrange(3)))),
        )
        for i in range(12)
    ]  # fmt: skip
    assert simulate(tasks).end == longest_path(tasks) == simulate(tasks).end


@pytest.mark.parametrize("plan", [ParallelPlan(d=2, p=2, micro=2), ParallelPlan(t=2, micro=4)])
def test_a_real_plan_replays_to_its_longest_path(roofline, plan):
    found = roofline.predict(CONFIG, plan)
    assert found.trace == roofline.predict(CONFIG, plan).trace
    spans = found.trace.by_name
    assert found.trace.end == max(span.end for span in spans.values())
    assert found.time == found.trace.end / 1e9


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro", [2, 8])
def test_bytes_are_those_of_a_real_step(roofline, recompute, micro):
    plan = ParallelPlan(micro=micro, recompute=recompute)
    model = CONFIG.source.build("cpu", torch.float32)
    for path in find_stacks(model):
        for block in members(model, path):
            set_option(block, OPTIONS[recompute], None)
    update = optimizer(list(model.parameters()))
    batches = [CONFIG.source.example_inputs(micro, 16, "cpu") for _ in range(plan.micros(CONFIG))]

    def step():
        for batch in batches:
            loss_of(model(**batch)).backward()
        update.step()
        update.zero_grad()

    step()
    with Meter(model, update, inputs=batches) as meter:
        step()
    found = roofline.predict(CONFIG, plan).ledger
    assert found.phase_peaks() == meter.ledger.phase_peaks()
    if plan.micros(CONFIG) == 1:  # a gradient that is being added is of either category
        assert (found - meter.ledger).to_json() == []


def test_stages_hold_the_whole_model_between_them(roofline):
    whole = roofline.predict(CONFIG, ParallelPlan()).ledger
    stages = roofline.predict(CONFIG, ParallelPlan(p=3)).ledger
    for category in ("parameters", "optimizer"):
        parts = [stages[r, "device", category, "forward"] for r in range(3)]
        assert sum(parts) == whole[0, "device", category, "forward"] and all(parts)
    # Nothing but parameters, gradients, states, buffers and inputs outlives a step.
    trace = roofline.predict(CONFIG, ParallelPlan(p=3)).trace
    for rank in range(3):
        assert trace.bytes(rank, "device", "activations")[-1][1] == 0
        assert trace.bytes(rank, "device", "temporary")[-1][1] == 0
    tied = config(4, tie_word_embeddings=True)
    ends = roofline.predict(tied, ParallelPlan(p=2)).ledger
    shared = 96 * 32 * 4  # on both ends
    alone = roofline.predict(tied, ParallelPlan()).ledger[0, "device", "parameters", "forward"]
    both = sum(ends[r, "device", "parameters", "forward"] for r in range(2))
    assert both == alone + shared


def test_a_shard_holds_its_share_of_the_blocks(roofline):
    whole, half = (roofline.predict(CONFIG, ParallelPlan(t=t)).ledger for t in (1, 2))
    block = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # projections; norms stay whole
    gone = [ledger[0, "device", "parameters", "forward"] for ledger in (whole, half)]
    assert gone[0] - gone[1] == 6 * block // 2


@pytest.fixture(scope="module")
def measured():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    vtrain = VTrain(Profile.of_this_device(), HARDWARE)
    vtrain.added = vtrain.measure(config(4), ParallelPlan(micro=4), repeats=2)
    yield vtrain
    torch.set_num_threads(threads)


def test_only_unique_operations_are_profiled_and_one_depth_teaches_all(measured):
    plan = ParallelPlan(micro=4)
    shallow, deep = config(4), config(12)
    distinct = {op.key for op in measured.graph(shallow, plan).all_ops(False)}
    assert measured.added == len(measured.profile.ops) == len(distinct)
    ran = sum(
        len(measured.graph(deep, plan).ops["keep"].get((part.traced, part.backward), ()))
        for part in measured.graph(deep, plan).parts
    )
    assert ran > 8 * len(distinct)
    assert measured.measure(deep, plan) == 0
    times = [measured.predict(config(n), plan).time for n in (4, 8, 12)]
    # Each further block costs the same.
    assert times[2] - times[1] == pytest.approx(times[1] - times[0], rel=1e-3)
    assert times[1] > 1.3 * times[0]


def test_what_was_not_measured_is_named(measured):
    with pytest.raises(UsageError, match=r"the profile of cpu has no time for 'aten\..*measure"):
        measured.predict(config(4, sequence=8), ParallelPlan(micro=4))
    guess = VTrain(measured.profile, HARDWARE, missing="roofline")
    assert guess.predict(config(4, sequence=8), ParallelPlan(micro=4)).time > 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ParallelPlan(d=3), "batch of 8 is not a multiple of d=3 x micro=1"),
        (ParallelPlan(t=3), "t=3 does not divide num_attention_heads=4"),
        (ParallelPlan(p=7), r"p=7 cuts one list of at least as many blocks.*\[6\]; lower p"),
        (ParallelPlan(schedule="zb"), "unknown schedule 'zb'"),
        (ParallelPlan(micro=0), "must be at least 1"),
    ],
)
def test_plans_that_do_not_suit_are_refused(roofline, plan, message):
    with pytest.raises(UsageError, match=message):
        roofline.predict(CONFIG, plan)


def test_a_model_that_cannot_be_split_says_why(roofline):
    gpt2 = TrainConfig(
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}, 4, 8
    )
    with pytest.raises(UsageError, match=r"t=2 splits num_attention_heads.*use t=1"):
        roofline.predict(gpt2, ParallelPlan(t=2))
    assert {plan.t for plan in plans(gpt2, 2)} == {1}


def test_a_sweep_is_sorted_priced_and_knows_what_fits(roofline):
    candidates = plans(CONFIG, 4, micros=(1, 2))
    assert all(plan.devices == 4 for plan in candidates)
    assert {(plan.t, plan.d, plan.p) for plan in candidates} == {
        (1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2),
    }  # fmt: skip
    rows = sweep(roofline, CONFIG, candidates, price=3.0, steps=1000)
    times = [row.prediction.time for row in rows]
    assert times == sorted(times) and len(rows) == len(candidates)
    assert rows[0].cost == pytest.approx(times[0] * 1000 / 3600 * 4 * 3.0)
    peaks = sorted(row.prediction.peak_bytes for row in rows)
    tight = sweep(roofline, CONFIG, candidates, budget=peaks[2])
    fitting = [row.prediction.peak_bytes <= peaks[2] for row in tight]
    assert [row.fits for row in tight] == fitting == sorted(fitting, reverse=True)
    with pytest.raises(UsageError, match="no plan uses 16 devices for a batch of 6"):
        plans(config(2, batch=6), 16)


def test_deadlines_by_hand():
    # Perfect scaling: 10 s on one device, 5 on two, 2.5 on four.
    scaling = {1: 1.0, 2: 0.5, 4: 0.25}
    alone = schedule_jobs([TrainJob("a", scaling, 10, deadline=10.0)], 4)
    assert alone["a"].end == pytest.approx(2.5) and alone["a"].device_seconds == pytest.approx(10)
    # a needs 2 of 4 devices, b the other 2; c cannot start in time, d waits and still can.
    jobs = [
        TrainJob("a", scaling, 10, deadline=5.0),
        TrainJob("b", scaling, 10, deadline=5.0),
        TrainJob("c", scaling, 10, deadline=7.0, arrival=1.0),
        TrainJob("d", scaling, 10, deadline=8.0, arrival=1.0),
    ]
    found = schedule_jobs(jobs, 4)
    assert found["a"].end == found["b"].end == pytest.approx(5.0)
    assert found["c"].end is None and found["d"].end == pytest.approx(7.5)


@pytest.mark.parametrize("seed", range(10))
def test_whoever_is_admitted_meets_the_deadline(seed):
    rng = random.Random(seed)
    jobs = []
    for i in range(20):
        sizes = {n: rng.uniform(0.5, 1.0) / n**0.8 for n in (1, 2, 4, 8) if rng.random() < 0.8}
        sizes = sizes or {1: 1.0}
        steps, arrival = rng.randint(1, 40), rng.uniform(0, 40)
        jobs.append(TrainJob(str(i), sizes, steps, arrival + rng.uniform(1, 60), arrival))
    found = schedule_jobs(jobs, 8)
    ended = [job for job in jobs if found[job.name].end is not None]
    assert ended and len(ended) < 20
    assert all(found[job.name].end <= job.deadline * (1 + 1e-6) for job in ended)


def test_better_plans_meet_more_deadlines():
    # The same jobs with step times of a worse plan for each number of devices.
    best, worse = {1: 1.0, 2: 0.55, 4: 0.3}, {1: 1.0, 2: 0.8, 4: 0.7}
    met = [
        sum(
            o.end is not None
            for o in schedule_jobs(
                [TrainJob(str(i), times, 10, 3.5 * (i + 1)) for i in range(4)], 4
            ).values()
        )
        for times in (best, worse)
    ]
    assert met == [4, 2]


def test_the_best_model_is_chosen_by_what_devices_reach():
    # Hoffmann et al.: 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28.
    assert expected_loss(10**9, 2 * 10**10) == pytest.approx(2.58, abs=0.01)
    # The larger one would win at peak rate, but only a twentieth of it is reached.
    models = {"small": (10**8, 2e5), "large": (10**9, 5e3)}
    found = compute_optimal(models, seconds=1e6, peak_flops=6e14)
    assert [sized.name for sized in found] == ["small", "large"]
    assert found[1].tokens == 5e9 and found[1].tokens_at_peak == pytest.approx(1e11)
    assert found[1].loss_at_peak < found[0].loss_at_peak and found[0].loss < found[1].loss
    with pytest.raises(UsageError, match="give at least one and some time"):
        compute_optimal({}, 1.0, 1.0)


@pytest.mark.parametrize("slower", [1.0, 1.02, 1.1])
def test_a_race_on_a_busy_machine_tells_who_is_slower(slower):
    draw = random.Random(0)
    times = {0: [], 1: [], 2: []}
    for _ in range(64):
        load = draw.choice([1.0, 1.0, 1.5, 4.0])  # of the whole round
        for i, seconds in enumerate((slower, 1.0, 1.3)):
            hit = 3.0 if draw.random() < 0.1 else 1.0
            times[i].append(load * seconds * hit * draw.gauss(1.0, 0.01))
    low, middle, high = behind(times, 0)
    assert 1.0 <= low <= middle <= high
    assert middle == pytest.approx(slower, abs=0.01)
    assert low > WITHIN if slower > WITHIN else high <= WITHIN
    assert behind(times, 2)[0] > WITHIN
    assert behind({0: [slower] * 6, 1: [1.0] * 6}, 0) == (slower,) * 3
