import pytest

from holdfast.plan.formulas import zero


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_table(stage, gigabytes):
    total = sum(zero.model_state(7_500_000_000, 64, stage).values())
    assert round(total / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("stage", "per_rank"), [(0, (16, 0)), (1, (8, 8)), (2, (4, 12)), (3, (0, 16))]
)
def test_fp32_training(stage, per_rank):
    whole, shared = per_rank
    found = zero.model_state(1000, 4, stage, parameter_bytes=4, gradient_bytes=4, optimizer_bytes=8)
    assert sum(found.values()) == whole * 1000 + shared * 1000 // 4


def test_padding_is_counted():
    # 7 parameters on 4 ranks are 2 each.
    assert zero.model_state(7, 4, 3) == {"parameters": 4, "gradients": 4, "optimizer": 24}
    assert zero.model_state(7, 4, 1) == {"parameters": 14, "gradients": 14, "optimizer": 24}
    assert zero.shard_elements(7, 4) == 2 and zero.shard_elements(7, 4, 3) == 3


def test_buckets_by_hand():
    assert zero.bucketed([3, 4, 5, 20, 1], limit=8) == [[0, 1], [2], [3], [4]]
    assert zero.bucketed([], limit=8) == []
    # Buckets of 7, 5, 20 and 1 on 4 ranks: shards of 2, 2, 5 and 1, together 10.
    sizes = [[3, 4], [5], [20], [1]]
    sums = [sum(b) for b in sizes]
    stage_1 = {"parameters": 160, "gradients": 160, "optimizer": 80 + 16}
    assert zero.resident(sums, 4, 1) == stage_1
    assert zero.resident(sums, 4, 2) == stage_1 | {"gradients": 40}
    half = {"parameters": 80 + 6, "gradients": 20, "optimizer": 120 + 16}
    assert zero.resident(sums, 4, 2, element=2, frozen=6) == half
    assert zero.gradient_peak(sizes, 4, 1) == 160
    assert zero.gradient_peak(sizes, 4, 2) == 40 + 80
    # Each rank sends three shards for a gather and for each reduction.
    assert zero.volume(sums, 4, 1, micros=5) == 2 * 3 * 10
    assert zero.volume(sums, 4, 2, micros=5) == 6 * 3 * 10


def test_rows_by_hand():
    # 5 rows of 3 on 2 ranks: 3 and 2; one of 1 row: 1 and 0.
    shapes = [(5, 3), (1,)]
    first = {"parameters": 40, "gradients": 40, "optimizer": 8 * 10 + 8}
    assert zero.sharded_rows(shapes, 2, 0) == first
    assert zero.sharded_rows(shapes, 2, 1) == first | {"optimizer": 8 * 6 + 8}
    frozen = zero.sharded_rows(shapes, 2, 0, frozen=[(4,)])
    assert frozen == first | {"parameters": 40 + 8}
    assert zero.gathered([[(5, 3)], [(1,)], [(2,)]], 2, element=2) == 2 * (2 * 9 + 2)
    assert zero.volume_rows([[(5, 3)], [(1,)]], 2) == 3 * 9 + 2 * 1
    assert zero.volume_rows([[(5, 3)], [(1,)]], 2, micros=4, frozen=[(1,)]) == 4 * (3 * 9 + 1)
