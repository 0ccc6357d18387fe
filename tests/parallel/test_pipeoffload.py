from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from holdfast.errors import UsageError
from holdfast.meter import Meter, open_storages
from holdfast.parallel.launch import launch
from holdfast.parallel.offload_plan import StageCost
from holdfast.parallel.pipeoffload import pipeoffload
from holdfast.parallel.schedule import peak_chunks

RANKS, WIDTH, ROWS = 4, 40, 30


def _parts(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(count):
        layers = [nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)]
        parts.append(nn.Sequential(*layers).double())
    return parts


def _batch(micros: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    shape = (micros * ROWS, WIDTH)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def _reference(count: int, micros: int) -> tuple[list[list[torch.Tensor]], float]:
    parts, (x, target) = _parts(count), _batch(micros)
    for part in parts:
        x = part(x)
    loss = _loss(x, target)
    loss.backward()
    return [[p.grad for p in part.parameters()] for part in parts], loss.item()


def _costs(stages: int, k: float = 0.5) -> list[StageCost]:
    """Given, so that the plan is the same on every rank and every machine."""
    saved = 8 * ROWS * WIDTH
    # A part's input and the output of tanh; the batch is nobody's, the loss saves a difference.
    sizes = [2 * saved, *[3 * saved] * (stages - 2), 4 * saved]
    copy = int(1500 * k)
    costs = [StageCost(1000, 1000, 1000, n, copy, copy) for n in sizes]
    # No weight needs the loss's difference.
    return [*costs[:-1], replace(costs[-1], left=3 * saved)]


CASES = {
    "gis full": (2, 12, {"order": "gis", "group": "full", "offload": 0}),
    "gis half": (2, 12, {"order": "gis", "group": "half", "offload": 0}),
    "uniform": (2, 12, {"offload": 0}),
    "interleaved": (2, 8, {"order": "1f1b", "offload": 0, "split_backward": False}),
    "1f1b": (1, 8, {"order": "1f1b", "offload": 0, "split_backward": False}),
    "bfs": (2, 4, {"order": "bfs", "offload": 0, "split_backward": False}),
    "zero bubble": (1, 8, {"order": "zero-bubble", "offload": 0}),
    "one chunk at once": (2, 12, {"offload": 1, "asynchronous": False}),
    "all chunks at once": (2, 12, {"offload": "full", "asynchronous": False}),
    "one chunk beside": (2, 12, {"offload": 1}),
    "all chunks beside": (2, 12, {"offload": "full"}),
    "pairs": (2, 8, {"offload": "full", "pair": True}),
}
COUNTS = {
    "gis full": [8, 7, 6, 5],
    "gis half": [6, 5, 4, 3],
    "uniform": [7, 6, 5, 4],
    "interleaved": [11, 9, 7, 5],
    "1f1b": [4, 3, 2, 1],
    "bfs": [8, 8, 8, 8],
    "zero bubble": [4, 4, 4, 4],
    "one chunk at once": [3, 2, 2, 1],
    "all chunks at once": [1, 1, 1, 1],
}


def _beyond(pipe, micros: int) -> list[int]:
    """Bytes that are neither saved nor at a boundary, whenever an action of a step begins."""
    keeper, runtime = pipe._keeper, pipe._keeper.runtime
    batch = _batch(micros)
    original, found = keeper.before, []
    meter = Meter(nn.ModuleList(pipe.chunks), inputs=batch)

    def before(action) -> None:
        original(action)
        tensors = [op.tensor for _, _, operations in runtime._sent for op in operations]
        for stage in runtime._stages:
            for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                tensors += [i.buffer for i in infos if getattr(i, "buffer", None) is not None]
        boundary = sum(s.nbytes() for s in {s._cdata: s for s in open_storages(tensors)}.values())
        saved = sum(store.device_bytes for stores in keeper.stores.values() for store in stores)
        found.append(meter._storages.live_bytes() - meter.base - saved - boundary)

    keeper.before = before
    with meter:
        pipe.step(*batch)
    return found


def _run(chunks: int, micros: int, options: dict, costs) -> dict:
    rank = dist.get_rank()
    parts = _parts(chunks * RANKS)
    mine = [parts[c * RANKS + rank] for c in range(chunks)]
    pipe = pipeoffload(mine, microbatches=micros, loss_fn=_loss, costs=costs, **options)
    state = torch.get_rng_state()
    losses = pipe.step(*_batch(micros))
    grads = [[p.grad.clone() for p in part.parameters()] for part in mine]
    first = pipe.measured
    pipe.step(*_batch(micros))
    twice = all(
        torch.allclose(p.grad, 2 * g, rtol=1e-12)
        for part, kept in zip(mine, grads, strict=True)
        for p, g in zip(part.parameters(), kept, strict=True)
    )
    trace = pipe.predicted
    return {
        "beyond": [] if options.get("split_backward", True) else _beyond(pipe, micros),
        "grads": grads,
        "twice": twice,
        "again": (first.chunks, first.device_bytes, first.host_bytes)
        == (pipe.measured.chunks, pipe.measured.device_bytes, pipe.measured.host_bytes),
        "loss": sum(loss.item() for loss in losses) / micros if losses else None,
        "measured": first,
        "device": trace.peak(rank, "device"),
        "host": trace.peak(rank, "host"),
        "order": peak_chunks(pipe.plan.schedule),
        "resident": pipe.arena.resident_bytes,
        "saved": [(cost.saved, cost.freed("W")) for cost in pipe.costs],
        "rng": torch.equal(state, torch.get_rng_state()) or costs is None,
        "report": pipe.report(),
    }


def _all_cases() -> dict[str, dict]:
    found = {
        name: _run(chunks, micros, options, _costs(chunks * RANKS))
        for name, (chunks, micros, options) in CASES.items()
    }
    found["profiled"] = _run(2, 12, {"offload": 1}, None)
    return found


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict]]:
    ranks = launch(_all_cases, RANKS, timeout=120)
    return {name: [found[name] for found in ranks] for name in ranks[0]}


@pytest.mark.parametrize("name", [*CASES, "profiled"])
def test_gradients_and_loss_are_those_of_one_process(runs, name):
    chunks, micros, _ = CASES.get(name, (2, 12, {}))
    grads, loss = _reference(chunks * RANKS, micros)
    for rank, run in enumerate(runs[name]):
        for chunk, found in enumerate(run["grads"]):
            for grad, expected in zip(found, grads[chunk * RANKS + rank], strict=True):
                torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
        assert run["twice"] and run["again"]
    assert runs[name][-1]["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("name", COUNTS)
def test_peaks_are_the_counts_of_the_paper(runs, name):
    assert [run["measured"].chunks for run in runs[name]] == COUNTS[name]


@pytest.mark.parametrize("name", [*CASES, "profiled"])
def test_simulated_bytes_are_the_measured_ones(runs, name):
    for run in runs[name]:
        assert run["device"] == run["measured"].device_bytes
        assert run["host"] == run["measured"].host_bytes
        assert run["resident"] == 0, "something stayed in the arena"


@pytest.mark.parametrize("name", ["interleaved", "1f1b", "bfs"])
def test_a_rank_holds_what_is_saved_and_what_is_at_its_boundaries(runs, name):
    chunks, micros, _ = CASES[name]
    for run in runs[name]:
        # Of an output that was sent and an input that was saved one element stays; and the losses.
        assert len(run["beyond"]) == 2 * chunks * micros
        assert 0 <= min(run["beyond"]) <= max(run["beyond"]) <= 3 * 8 * chunks * micros


def test_profiling_finds_the_sizes_that_the_costs_state(runs):
    assert runs["profiled"][0]["saved"] == runs["uniform"][0]["saved"]


def test_offload_beside_the_computation_holds_few_chunks(runs):
    assert max(run["measured"].chunks for run in runs["all chunks beside"]) <= 4
    assert runs["all chunks beside"][0]["host"] > runs["one chunk beside"][0]["host"] > 0


def test_report_shows_predicted_beside_measured(runs):
    report = runs["one chunk beside"][0]["report"]
    assert "rank 0: 1 of 2 chunks offloaded" in report
    assert "activations, host" in report


def _refusals() -> list[str]:
    said = []
    for options in (
        {"offload": 3},
        {"group": "most"},
        {"order": "spiral"},
        {"order": "gis", "group": 3, "microbatches": 8},
        {"order": "1f1b", "microbatches": 7},
    ):
        arguments = {"microbatches": 8, "loss_fn": _loss} | options
        try:
            pipeoffload(_parts(2), **arguments)
        except UsageError as error:
            said.append(str(error))
    pipe = pipeoffload(_parts(1), microbatches=4, order="1f1b", offload=0, loss_fn=_loss)
    for call in (pipe.report, lambda: pipe.step(*_batch(1))):
        try:
            call()
        except UsageError as error:
            said.append(str(error))
    return said


def test_what_cannot_work_is_refused_before_anything_runs():
    said = launch(_refusals, 2)[0]
    expected = [
        "offload=3 of 2",
        "'half', 'full'",
        "unknown schedule",
        "group=3",
        "use 8 micro-batches",
        "run step()",
        "30 cannot be split in 4",
    ]
    assert len(said) == len(expected)
    for message, part in zip(said, expected, strict=True):
        assert part in message
