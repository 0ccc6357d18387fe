import pytest
import torch
import torch.distributed as dist

from holdfast.errors import UsageError
from holdfast.parallel.launch import launch
from holdfast.parallel.ring import Traffic, ring, ring_sum


def _block(rank: int) -> list[torch.Tensor]:
    return [torch.full((3, 2), float(rank)), torch.full((5,), rank, dtype=torch.int64)]


def _visits() -> tuple[list, int]:
    traffic = Traffic()
    seen = []
    block = _block(dist.get_rank())
    # Strided views travel, too, and the caller's memory stays as it is.
    block[0] = block[0].mT.contiguous().mT
    before = [x.clone() for x in block]
    for owner, tensors in ring(block, traffic=traffic):
        assert all(torch.equal(x, y) for x, y in zip(tensors, _block(owner), strict=True))
        seen.append(owner)
    assert all(torch.equal(x, y) for x, y in zip(block, before, strict=True))
    return seen, traffic.sent


def _sums() -> tuple[list[float], int]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    traffic = Traffic()
    order = [(rank - 1 - hop) % ranks for hop in range(ranks)]
    parts = ([torch.tensor([10.0**rank * (owner + 1)])] for owner in order)
    (total,) = ring_sum(parts, traffic=traffic)
    return total.tolist(), traffic.sent


def _subgroup() -> list[int] | str:
    group = dist.new_group([2, 0])
    try:
        return [owner for owner, _ in ring([torch.zeros(1)], group)]
    except UsageError as error:
        return str(error)


def _all():
    return _visits(), _sums(), _subgroup()


@pytest.fixture(scope="module")
def of_three():
    return launch(_all, 3)


def test_every_block_visits_every_rank_and_bytes_are_counted(of_three):
    assert [visits for visits, _, _ in of_three] == [
        ([0, 2, 1], 2 * (24 + 40)),
        ([1, 0, 2], 2 * (24 + 40)),
        ([2, 1, 0], 2 * (24 + 40)),
    ]


def test_sums_arrive_at_their_owner(of_three):
    assert [sums for _, sums, _ in of_three] == [([111.0 * (r + 1)], 2 * 4) for r in range(3)]


def test_a_group_is_a_ring_of_its_own(of_three):
    first, outside, last = (answer for _, _, answer in of_three)
    assert sorted(first) == sorted(last) == [0, 1] and first[0] != last[0]
    assert "rank 1 is not in the group" in outside


def test_without_a_process_group_the_error_says_what_to_do():
    with pytest.raises(UsageError, match="not initialised; start the script with torchrun"):
        next(ring([torch.zeros(1)]))
