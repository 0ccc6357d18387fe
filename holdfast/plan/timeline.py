"""A plan's step over time: what each rank computes and copies, and the bytes that it holds.

Pipelines are simulated action by action. A step on one device, or on replicas, is shown by
micro-batches: a forward and a backward share its predicted seconds, its bytes are those of the
plan's ledger in each phase.
"""

from collections.abc import Iterator

from holdfast.errors import UsageError
from holdfast.ledger import CATEGORIES, Ledger
from holdfast.plan.file import PlanFile
from holdfast.plan.plan import Plan
from holdfast.plan.simulate import Change, Task, Trace, simulate

# What stands through the whole step.
RESIDENT = ("parameters", "optimizer", "buffers", "inputs", "cache", "knowledge")


def trace_of(plan: Plan) -> Trace:
    """The predicted timeline of one step, of one replica.

    Raises:
        UsageError: the plan carries no prediction.
    """
    spec = plan.spec
    if not spec.predicted.get("ledger"):
        raise UsageError("this plan has no prediction to draw; plan again with `holdfast fit`")
    ledger = plan.predicted
    if spec.parallel is not None and spec.parallel.pipeline > 1:
        return simulate([*_states(ledger, spec.parallel.pipeline), *_pipeline(spec)])
    ranks = 1 if spec.parallel is None else spec.parallel.ranks
    return simulate(
        task for rank in range(ranks) for task in _steps(spec, ledger, rank, plan.step_seconds)
    )


def _pipeline(spec: PlanFile) -> list[Task]:
    from holdfast.parallel.offload_plan import StageCost, pipeline_tasks
    from holdfast.parallel.pipeoffload import choose_offload

    parallel = spec.parallel
    assert parallel is not None
    costs = [StageCost(*cost[:6], left=cost[6]) for cost in parallel.costs]
    plan = choose_offload(
        parallel.order, parallel.pipeline, parallel.chunks, spec.accumulation, costs,
        offload=parallel.offload, split_backward=parallel.order != "1f1b",
    )  # fmt: skip
    return pipeline_tasks(plan, costs)


def _states(ledger: Ledger, ranks: int) -> Iterator[Task]:
    for rank in range(ranks):
        cells = ledger.at_peak("device", rank=rank)
        held = tuple(
            Change(rank, "device", c, cells[c]) for c in (*RESIDENT, "gradients") if cells[c]
        )
        yield Task(("states", rank), (rank, "compute"), 0, (), held)


def _steps(spec: PlanFile, ledger: Ledger, rank: int, seconds: float) -> Iterator[Task]:
    stream = (rank, "compute")
    recomputes = any("recompute" in runs for runs in spec.methods.blocks.values())
    parts = 4 if recomputes else 3  # a recomputed forward runs again in backward
    each = int(seconds * 1e9 / spec.accumulation)
    forward = each // parts
    columns = {p: ledger.column("device", p, rank=rank) for p in ledger.phases(rank=rank)}
    backward = columns.get("backward", dict.fromkeys(CATEGORIES, 0))
    resident = tuple(Change(rank, "device", c, backward[c]) for c in RESIDENT if backward[c])
    yield Task(("states", rank), stream, 0, (), resident)
    for micro in range(spec.accumulation):
        saved = columns.get("forward", backward)["activations"]
        yield Task(
            ("F", rank, micro), stream, forward, (),
            (Change(rank, "device", "activations", saved),), "forward",
        )  # fmt: skip
        held = [Change(rank, "device", "activations", -saved, "end")]
        moving = backward["activations"] + backward["temporary"] - saved
        if moving > 0:
            held += [
                Change(rank, "device", "temporary", moving),
                Change(rank, "device", "temporary", -moving, "end"),
            ]
        if not micro:
            held.append(Change(rank, "device", "gradients", backward["gradients"]))
        yield Task(("B", rank, micro), stream, each - forward, (), tuple(held), "backward")
    gone = Change(rank, "device", "gradients", -backward["gradients"], "end")
    yield Task(("step", rank), stream, 0, (), (gone,), "step")
