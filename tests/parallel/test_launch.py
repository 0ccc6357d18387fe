import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from holdfast.errors import UsageError
from holdfast.parallel.launch import RankFailed, launch


def _total(value: float) -> tuple[float, str, int]:
    tensor = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(tensor)
    return tensor.item(), os.environ["WORLD_SIZE"], torch.get_num_threads()


def _one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.barrier()


def _one_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _one_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_ranks_reach_each_other_and_results_come_by_rank():
    assert launch(_total, 3, 2.0) == [(12.0, "3", 1)] * 3
    assert launch(_total, 1, 2.0, threads=2) == [(2.0, "1", 2)]


def test_the_rank_that_raised_is_named_first_with_its_traceback():
    with pytest.raises(RankFailed, match="rank 1 of 2 failed") as failure:
        launch(_one_raises, 2)
    assert "ValueError: planted" in failure.value.ranks[1]
    assert next(iter(failure.value.ranks)) == 1


def test_a_rank_that_is_killed_ends_the_others():
    began = time.monotonic()
    with pytest.raises(RankFailed, match="of 2 failed") as failure:
        launch(_one_dies, 2)
    assert "exit code -9" in failure.value.ranks[1]
    assert time.monotonic() - began < 30


def test_a_rank_that_hangs_is_stopped():
    with pytest.raises(RankFailed, match="stopped here") as failure:
        launch(_one_hangs, 2, limit=5.0)
    assert "in _one_hangs" in failure.value.ranks[1]


def test_what_cannot_be_launched_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        launch(_total, 0, 1.0)
    with pytest.raises(UsageError, match="top level"):
        launch(lambda: None, 2)
