import pytest

from holdfast.errors import DoesNotFit, UsageError
from holdfast.parallel.offload_plan import OffloadPlan, StageCost, plan_offload, ratio, timeline
from holdfast.parallel.pipeoffload import choose_offload
from holdfast.parallel.schedule import make, peak_chunks, uniform, uniform_slots

A = 1000


def _costs(stages: int, k: float, slots: int = 1000) -> list[StageCost]:
    copy = int(k * 3 * slots / 2)
    return [StageCost(slots, slots, slots, A, copy, copy)] * stages


def _peaks(plan: OffloadPlan, costs: list[StageCost], place: str = "device") -> list[int]:
    trace = timeline(plan, costs)
    return [trace.peak(rank, place) // A for rank in range(plan.ranks)]


@pytest.mark.parametrize("order", ["1f1b", "gis", "uniform", "bfs"])
def test_without_offload_the_simulated_peak_is_the_schedule_s(order):
    schedule = make(order, 4, 2, 8)
    assert _peaks(OffloadPlan(schedule), _costs(8, 0.5)) == peak_chunks(schedule)


@pytest.mark.parametrize("offloaded", [1, 2])
def test_synchronous_offload_is_counted_by_order_alone(offloaded):
    schedule, costs = uniform(4, 2, 12), _costs(8, 0.5)
    plan = plan_offload(schedule, costs, offloaded, asynchronous=False)
    assert _peaks(plan, costs) == peak_chunks(schedule, offloaded)


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("k", [0.25, 0.5, 0.9, 1.0])
def test_full_offload_holds_four_chunks_however_many_ranks(ranks, chunks, k):
    micros = 2 * ranks
    costs = _costs(ranks * chunks, k)
    plan = choose_offload("uniform", ranks, chunks, micros, costs, offload="full")
    assert max(_peaks(plan, costs)) <= 4
    plain = timeline(OffloadPlan(plan.schedule), costs)
    # Copies that take as long as the computation leave no slack at the turn from save to load.
    assert timeline(plan, costs).end <= plain.end * (1.01 if k <= 0.5 else 1.04)


def test_selective_offload_falls_better_than_linearly_in_uniform_and_linearly_in_groups():
    for ranks in (8, 16):
        costs = _costs(ranks * 2, 1.5)
        grouped = choose_offload(
            "gis", ranks, 2, 2 * ranks, costs, group=ranks, offload=1, asynchronous=True
        )
        even = choose_offload("uniform", ranks, 2, 2 * ranks, costs, offload=1)
        interleaved = max(peak_chunks(make("1f1b", ranks, 2, 2 * ranks)))
        assert max(_peaks(even, costs)) < interleaved / 3
        assert max(_peaks(grouped, costs)) > max(_peaks(even, costs))


def test_host_bytes_follow_the_lifetime_of_offloaded_chunks():
    # A chunk of d ranks lives 3d + 6g(v-1-c) - 3r slots, and one micro-batch comes every 3v.
    ranks, chunks, group = 8, 2, 4
    costs = _costs(ranks * chunks, 0.25)
    plan = choose_offload("uniform", ranks, chunks, 48, costs, group=group, offload=1)
    for rank, host in enumerate(_peaks(plan, costs, "host")):
        life = 3 * ranks + 6 * group * (chunks - 1) - 3 * rank
        # In flight beyond the mean: the copy is reserved once F ends and kept until W ends.
        assert abs(host - life / (3 * chunks)) <= 2


def test_k_decides_how_much_auto_offloads():
    assert choose_offload("uniform", 4, 4, 16, _costs(16, 0.5)).offloaded == 4
    assert choose_offload("uniform", 4, 4, 16, _costs(16, 2.0)).offloaded == 2
    assert choose_offload("uniform", 4, 4, 16, _costs(16, 5.0)).offloaded == 0
    assert ratio(_costs(2, 0.5)) == pytest.approx(0.5)


def test_a_budget_takes_the_least_offload_that_fits():
    costs = _costs(8, 0.5)
    free = choose_offload("uniform", 4, 2, 12, costs, budget=7 * A)
    assert free.offloaded == 0
    some = choose_offload("uniform", 4, 2, 12, costs, budget=5 * A)
    assert some.offloaded == 1
    with pytest.raises(DoesNotFit, match="activations need") as none:
        choose_offload("uniform", 4, 2, 12, costs, budget=A)
    smallest = none.value.details["smallest"]
    assert choose_offload("uniform", 4, 2, 12, costs, budget=smallest)


def test_pairs_copy_in_opposite_directions():
    costs = _costs(8, 0.5)
    plan = choose_offload("uniform", 4, 2, 12, costs, offload="full", pair=True)
    trace = timeline(plan, costs)
    copies = {}
    for (kind, stage, _), slot in plan.slots.items():
        copies.setdefault((stage % 4 // 2, slot), set()).add((stage % 4, kind))
    shared = [who for who in copies.values() if len({rank for rank, _ in who}) == 2]
    opposite = [who for who in shared if len({kind for _, kind in who}) == 2]
    assert len(opposite) > 0.8 * len(shared) > 10
    assert trace.end <= 1.02 * timeline(OffloadPlan(plan.schedule), costs).end


def test_long_forwards_get_a_longer_lifetime():
    even = choose_offload("uniform", 4, 2, 12, _costs(8, 0.5), offload=0)
    assert even.schedule == uniform(4, 2, 12, 2)
    # Four forwards of 2600 take as long as 3.5 micro-batches of 3000.
    slow = [StageCost(2600, 200, 200, A, 100, 100)] * 8
    long = choose_offload("uniform", 4, 2, 12, slow, offload=0)
    assert long.schedule == uniform(4, 2, 12, 4) != even.schedule


def test_what_cannot_be_copied_in_time_is_refused_by_name():
    schedule = make("gis", 8, 2, 16, 8)
    with pytest.raises(UsageError, match="reduce offload"):
        plan_offload(schedule, _costs(16, 2.0), 2)
    with pytest.raises(UsageError, match="offload=3 of 2 chunks"):
        plan_offload(schedule, _costs(16, 0.5), 3)
    with pytest.raises(UsageError, match="even number of ranks"):
        plan_offload(uniform(3, 2, 6), _costs(6, 0.5), 1, pair=True)
    with pytest.raises(UsageError, match="offload='half'"):
        choose_offload("uniform", 4, 2, 8, _costs(8, 0.5), offload="half")


def test_pace_of_the_slots_is_that_of_equal_costs():
    slots = uniform_slots(4, 2, 8)
    trace = timeline(OffloadPlan(uniform(4, 2, 8)), _costs(8, 0.5))
    late = [slots[a.name] * 1000 - a.start for a in trace.spans]
    assert min(late) >= 0
