import math

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleLoopedBFS

from holdfast.errors import UsageError
from holdfast.parallel.schedule import (
    ORDERS,
    Action,
    breadth_first,
    gis,
    make,
    needs,
    one_f_one_b,
    peak_chunks,
    split_backward,
    uniform,
    validate,
    zero_bubble,
)
from holdfast.plan.simulate import Task, simulate


def _bubbles(schedule) -> set[int]:
    """Slots in which each rank waits, where F, I and W last one each and B two."""
    parts: dict = {}
    for order in schedule.values():
        for a in order:
            parts[a.stage, a.micro] = parts.get((a.stage, a.micro), "") + a.kind
    stages = 1 + max(stage for stage, _ in parts)
    trace = simulate(
        Task(a, rank, 2 if a.kind == "B" else 1, tuple(needs(a, stages, parts)))
        for rank, order in schedule.items()
        for a in order
    )
    return {trace.bubble(rank) for rank in schedule}


@pytest.mark.parametrize(
    ("schedule", "peaks"),
    [
        (one_f_one_b(4, 1, 8), [4, 3, 2, 1]),
        (one_f_one_b(4, 2, 8), [11, 9, 7, 5]),
        (gis(4, 2, 12, 4), [8, 7, 6, 5]),
        (gis(4, 2, 12, 2), [6, 5, 4, 3]),
        (uniform(4, 2, 12), [7, 6, 5, 4]),
        (breadth_first(4, 2, 6), [12, 12, 12, 12]),
        (zero_bubble(4, 8), [4, 4, 4, 4]),
    ],
)
def test_peaks_of_the_paper(schedule, peaks):
    validate(schedule)
    assert peak_chunks(schedule) == peaks


def test_synchronous_offload_leaves_one_chunk():
    assert peak_chunks(uniform(4, 2, 12), offloaded=1) == [3, 2, 2, 1]
    assert peak_chunks(uniform(4, 2, 12), offloaded=2) == [1, 1, 1, 1]


@pytest.mark.parametrize("ranks", range(3, 9))
@pytest.mark.parametrize("chunks", [2, 3])
def test_gis_has_the_peak_and_the_bubble_of_its_formula(ranks, chunks):
    for group in range(math.ceil(ranks / 2), ranks + 1):
        schedule = gis(ranks, chunks, 4 * group, group)
        assert peak_chunks(schedule) == [ranks + group * (chunks - 1) - r for r in range(ranks)]
        assert _bubbles(schedule) == {2 * (ranks - 1) + (ranks - group) * (chunks - 1)}


def test_interleaving_has_the_peak_of_its_formula():
    for ranks, chunks, micros in [(4, 2, 4), (4, 3, 8), (8, 2, 8), (2, 4, 6)]:
        expected = [
            min(micros * chunks, 2 * (ranks - 1 - r) + (chunks - 1) * ranks + 1)
            for r in range(ranks)
        ]
        assert peak_chunks(one_f_one_b(ranks, chunks, micros)) == expected


def test_bubbles_of_1f1b_and_zero_bubble():
    # (ranks - 1) * (F + B) against (ranks - 1) * (F + I - W)
    assert _bubbles(one_f_one_b(4, 1, 8)) == {9}
    assert _bubbles(zero_bubble(4, 8)) == {3}


def _torch_order(kind, ranks, chunks, micros):
    """What torch would run, asked of its schedule without a process group."""
    schedule = kind.__new__(kind)
    schedule.pp_group_size, schedule.n_local_stages = ranks, chunks
    schedule._n_microbatches, schedule._num_stages = micros, ranks * chunks
    schedule._stages = [None] * chunks
    schedule.number_of_rounds = max(1, micros // ranks)
    schedule.microbatches_per_round = micros // schedule.number_of_rounds
    orders = {}
    for rank in range(ranks):
        schedule.rank = rank
        found = [a for a in schedule._calculate_single_rank_operations(rank) if a is not None]
        orders[rank] = [
            Action(a.stage_index, a.computation_type.value, a.microbatch_index) for a in found
        ]
    return orders


def test_orders_are_those_of_torch():
    assert one_f_one_b(4, 2, 8) == _torch_order(ScheduleInterleaved1F1B, 4, 2, 8)
    ours, theirs = breadth_first(4, 2, 6), _torch_order(ScheduleLoopedBFS, 4, 2, 6)
    for rank in ours:
        # torch runs the backwards of the last micro-batch first.
        assert [a for a in ours[rank] if a.kind == "F"] == [
            a for a in theirs[rank] if a.kind == "F"
        ]
        assert [a.stage for a in ours[rank]] == [a.stage for a in theirs[rank]]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_valid_whole_and_split(order):
    for ranks, micros in [(2, 4), (4, 8), (3, 6)]:
        chunks = 1 if order == "zero-bubble" else 2
        schedule = make(order, ranks, chunks, micros)
        validate(schedule)
        validate(split_backward(schedule))


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({0: [Action(0, "F", 0)], 1: []}, "only F"),
        ({0: [Action(0, "B", 0)]}, "0B0 on rank 0 comes after nothing"),
        ({0: [Action(0, "F", 0), Action(0, "W", 0)]}, "comes after F"),
        ({0: [Action(1, "F", 0)], 1: []}, "rank stage % ranks"),
    ],
)
def test_incomplete_schedules_are_refused(schedule, says):
    with pytest.raises(UsageError, match=says):
        validate(schedule)


def test_ranks_that_would_wait_for_each_other_are_refused():
    crossed = {
        0: [Action(0, "F", 0), Action(0, "B", 0), Action(0, "F", 1), Action(0, "B", 1)],
        1: [Action(1, "F", 1), Action(1, "B", 1), Action(1, "F", 0), Action(1, "B", 0)],
    }
    with pytest.raises(UsageError, match="wait for each other"):
        validate(crossed)


def test_impossible_sizes_name_the_knob():
    with pytest.raises(UsageError, match="use 12 micro-batches"):
        one_f_one_b(4, 2, 9)
    with pytest.raises(UsageError, match="group=5 is outside 2"):
        gis(4, 2, 10, 5)
    with pytest.raises(UsageError, match="multiple of group=3; use 12"):
        gis(4, 2, 10, 3)
    with pytest.raises(UsageError, match="lifetime=1"):
        uniform(4, 2, 8, 1)
    with pytest.raises(UsageError, match="unknown schedule"):
        make("gpipe", 4, 1, 4)
    with pytest.raises(UsageError, match="ranks=0"):
        make("1f1b", 0, 1, 4)
    with pytest.raises(UsageError, match="one chunk"):
        make("zero-bubble", 4, 2, 4)
