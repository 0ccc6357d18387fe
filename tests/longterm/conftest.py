"""Memories with a clock that ticks by itself, and a small world to fill them with."""

from datetime import UTC, datetime, timedelta

import pytest

from holdfast.longterm.embed import Hash
from holdfast.longterm.memory import Memory

START = datetime(2024, 1, 1, tzinfo=UTC)


class Clock:
    """A second later each time it is asked; tests may move it."""

    def __init__(self, start=START):
        self.time = start

    def __call__(self):
        self.time += timedelta(seconds=1)
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def memory(tmp_path, clock):
    with Memory(tmp_path / "memory.db", embedder=Hash(64), clock=clock) as made:
        yield made
