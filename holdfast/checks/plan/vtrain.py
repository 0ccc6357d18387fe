"""Ten training steps and a sweep of thirty plans on this machine, predicted before they are run.

A rank is a process with one thread. The baseline is the roofline of the small CPU preset: the same
replay, with FLOPs and bytes in place of measured operations and links.
"""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import binom, spearmanr
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from holdfast.checks import Result, check
from holdfast.parallel.launch import launch
from holdfast.plan import contention
from holdfast.plan.apply import set_option
from holdfast.plan.blocks import find_stacks, members
from holdfast.plan.hardware import load_hardware
from holdfast.plan.models import loss_of
from holdfast.plan.profile import Profile
from holdfast.plan.step_graph import OPTIONS, optimizer
from holdfast.plan.sweep import sweep
from holdfast.plan.vtrain import ParallelPlan, TrainConfig, VTrain

SEQUENCE = 64
ROUNDS, RIVALS, WITHIN = 5, 4, 1.05
# A race ends when it is decided, or after so many seconds.
RACE_SECONDS, LAP, CONFIDENCE = 45.0, 8, 0.99
# (blocks, width, batch, plan): the depths of the first rows predict the later ones. Times are
# further apart than two runs of one plan are, so that there is an order to find.
CASES = (
    (3, 128, 8, ParallelPlan(micro=4)),
    (8, 128, 8, ParallelPlan(micro=4)),
    (3, 128, 8, ParallelPlan(micro=4, recompute=True)),
    (8, 128, 8, ParallelPlan(micro=4, recompute=True)),
    (6, 128, 8, ParallelPlan(micro=4, d=2)),
    (6, 192, 16, ParallelPlan(micro=8)),
    (4, 192, 8, ParallelPlan(micro=4, d=2, recompute=True)),
    (8, 256, 8, ParallelPlan(micro=2)),
    (8, 256, 8, ParallelPlan(micro=2, d=2)),
    (2, 64, 16, ParallelPlan(micro=8)),
)
SWEPT = (4, 128, 16)
PLANS = (
    *(ParallelPlan(micro=m, recompute=r) for m in (1, 2, 4, 8, 16) for r in (False, True)),
    *(
        ParallelPlan(d=2, micro=m, recompute=r, bucket_bytes=bucket)
        for m in (1, 2, 4, 8)
        for r in (False, True)
        for bucket in (2**18, 25 * 2**20)
    ),
    *(ParallelPlan(p=2, micro=m) for m in (1, 2, 4, 8)),
)
Case = tuple[int, int, int, ParallelPlan]


@functools.cache
def config(layers: int, width: int, batch: int) -> TrainConfig:
    fields = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQUENCE,
    }
    return TrainConfig(fields, batch, SEQUENCE)


def name(plan: ParallelPlan) -> str:
    return f"{plan} bucket={plan.bucket_bytes}" if plan.d > 1 else str(plan)


class Half(nn.Module):
    """One of two pipeline stages of a LLaMA."""

    def __init__(self, model: Any, rank: int):
        super().__init__()
        middle = (len(model.model.layers) + 1) // 2
        cut = slice(None, middle) if rank == 0 else slice(middle, None)
        self.embed = model.model.embed_tokens if rank == 0 else None
        self.layers = nn.ModuleList(model.model.layers[cut])
        self.rotary = model.model.rotary_emb
        self.head = nn.Sequential(model.model.norm, model.lm_head) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        at = torch.arange(x.shape[1], device=x.device)[None]
        positions = self.rotary(x, position_ids=at)
        for layer in self.layers:
            x = layer(x, position_embeddings=positions, position_ids=at)
        return x if self.head is None else self.head(x)


def step_of(case: Case) -> Callable[[], None] | None:
    """A real training step under a plan, as this rank runs it; None if it takes no part."""
    layers, width, batch, plan = case
    if dist.get_rank() >= plan.devices:
        return None
    made = config(layers, width, batch)
    torch.manual_seed(0)
    model: Any = made.source.build("cpu", torch.float32)
    for path in find_stacks(model):
        for block in members(model, path):
            set_option(block, OPTIONS[plan.recompute], None)
    micros = [
        made.source.example_inputs(plan.micro, SEQUENCE, "cpu") for _ in range(plan.micros(made))
    ]
    if plan.p == 2:
        return _piped(model, micros)
    update = optimizer(list(model.parameters()))
    if plan.d == 2:
        model = DistributedDataParallel(
            model,
            bucket_cap_mb=plan.bucket_bytes / 2**20,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def step() -> None:
        for i, micro in enumerate(micros):
            local = plan.d == 2 and i < len(micros) - 1
            with model.no_sync() if local else nullcontext():
                loss_of(model(**micro)).backward()
        update.step()
        update.zero_grad()

    return step


def _piped(model: Any, micros: list[dict[str, Tensor]]) -> Callable[[], None]:
    rank = dist.get_rank()
    stage = PipelineStage(Half(model, rank), rank, 2, torch.device("cpu"))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])

    schedule = Schedule1F1B(stage, len(micros), loss_fn=loss)
    update = optimizer(list(stage.submod.parameters()))
    ids, labels = (torch.cat([m[name] for m in micros]) for name in ("input_ids", "labels"))

    def step() -> None:
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=labels)
        update.step()
        update.zero_grad()

    return step


def run_all(
    cases: Sequence[Case], swept: Sequence[int], chosen: int, naive: int
) -> tuple[list[float], dict[int, list[float]]]:
    """Best seconds of each case, taken in turns, and those of a race; runs in both ranks.

    `chosen`, `naive` and the fastest of `swept` race.
    """
    steps = [step_of(case) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(ROUNDS + 1):
        for case, step, seen in zip(cases, steps, times, strict=True):
            seen.append(_timed(step, alone=case[3].devices == 1))
    best = [min(seen[1:]) for seen in times]
    fastest = sorted(swept, key=lambda i: best[i])[:RIVALS]
    box = [list(dict.fromkeys([chosen, naive, *fastest]))]
    dist.broadcast_object_list(box)
    return best, race(steps, box[0])


def race(steps: Sequence[Callable[[], None] | None], entrants: list[int]) -> dict[int, list[float]]:
    """Seconds of each round of every entrant, until it is clear how far the first is behind."""
    times: dict[int, list[float]] = {i: [] for i in entrants}
    began, over = time.monotonic(), [False]
    while not over[0]:
        for turn in range(LAP):
            # Who follows whom changes, so that nobody always finds the same caches.
            first = turn % len(entrants)
            for i in entrants[first:] + entrants[:first]:
                times[i].append(_timed(steps[i]))
        low, _, high = behind(times, entrants[0])
        over = [high <= WITHIN or low > WITHIN or time.monotonic() - began > RACE_SECONDS]
        dist.broadcast_object_list(over)
    return times


def behind(times: dict[int, list[float]], one: int) -> tuple[float, float, float]:
    """How many times slower `one` is than the fastest: the median, between its bounds.

    Of the ratios to each other entrant in the same round, which other load slows alike, the worst
    median. The bounds hold it with `CONFIDENCE`, whatever the distribution of the ratios.
    """
    worst = (1.0, 1.0, 1.0)
    for other, seconds in times.items():
        if other == one:
            continue
        ratios = sorted(a / b for a, b in zip(times[one], seconds, strict=True))
        outside = int(binom.ppf((1 - CONFIDENCE) / 2, len(ratios), 0.5))
        low, high = ratios[max(outside - 1, 0)], ratios[-max(outside, 1)]
        middle = statistics.median(ratios)
        worst = tuple(map(max, worst, (low, middle, high)))  # type: ignore[assignment]
    return worst


def _timed(step: Callable[[], None] | None, *, alone: bool = False) -> float:
    """Seconds until the slowest rank ends; `alone`, of the one that works, its thread's own.

    The latter leave out what other programs take of its core.
    """
    dist.barrier()
    start, own = time.perf_counter(), time.thread_time()
    if step is not None:
        step()
    own = time.thread_time() - own
    dist.barrier()
    return own if alone else time.perf_counter() - start


def predicted(vtrain: VTrain, cases: Sequence[Case]) -> list[float]:
    return [vtrain.predict(config(*shape), plan).time for *shape, plan in cases]


def figures(guessed: Sequence[float], real: Sequence[float]) -> tuple[float, float]:
    """Median relative error and rank correlation."""
    errors = [abs(g / r - 1) for g, r in zip(guessed, real, strict=True)]
    return statistics.median(errors), float(spearmanr(guessed, real).statistic)


@check(
    "vtrain",
    claim="predicts step times within 15 %, and picks a plan within 5 % of the fastest of thirty",
)
def run(seed: int) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run()
    finally:
        torch.set_num_threads(threads)


def _run() -> Result:
    hardware = load_hardware("cpu-2core")
    profile = Profile.of_this_device()
    ours = VTrain(profile, hardware)
    plain = copy.copy(ours)  # shares what was traced
    plain.profile, plain.fallback = Profile(), hardware
    # What three blocks of one width taught is enough for eight.
    shallow, deep = CASES[0], CASES[1]
    ours.measure(config(*shallow[:3]), shallow[3])
    new_for_depth = ours.measure(config(*deep[:3]), deep[3])
    plans = [(*SWEPT, plan) for plan in PLANS]
    cases = [*CASES, *plans]
    for *shape, plan in cases:
        ours.measure(config(*shape), plan)
    contention.measure(profile, 2)
    guesses = {v: predicted(v, cases) for v in (ours, plain)}
    first = len(CASES)

    def choice(vtrain: VTrain) -> int:
        rows = sweep(vtrain, config(*SWEPT), PLANS)
        return first + PLANS.index(rows[0].plan)

    swept = range(first, len(cases))
    chosen, naive = choice(ours), choice(plain)
    real, raced = launch(run_all, 2, cases, swept, chosen, naive, timeout=120, limit=300)[0]
    error, order = figures(guesses[ours][:first], real[:first])
    plain_error, plain_order = figures(guesses[plain][:first], real[:first])
    low, gap, high = behind(raced, chosen)
    return Result(
        measured={
            "median_error": error,
            "rank_correlation": order,
            "chosen_over_fastest": gap,
            "chosen_over_fastest_between": [low, high],
            "rounds_raced": len(raced[chosen]),
            "chosen": name(cases[chosen][3]),
            "fastest": name(cases[min(raced, key=lambda i: behind(raced, i)[1])][3]),
            "sweep_rank_correlation": figures(guesses[ours][first:], real[first:])[1],
            "operations_profiled": len(profile.ops),
            "new_operations_for_a_deeper_model": new_for_depth,
            "slowdown_of_2_ranks": profile.slowdown[2],
            "all_reduce_seconds": profile.collectives["all_reduce"][2],
            "stall_seconds": profile.collectives["stall"][2],
        },
        baseline={
            "roofline_median_error": plain_error,
            "roofline_rank_correlation": plain_order,
            "roofline_chosen_over_fastest": behind(raced, naive)[1],
        },
        threshold="median error <= 0.15, rank correlation >= 0.9, chosen <= 1.05 x fastest, "
        "no new operation for a deeper model",
        passed=error <= 0.15 and order >= 0.9 and gap <= WITHIN and new_for_depth == 0,
    )
