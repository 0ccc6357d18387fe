"""Packs of layers: ways to cut a chain into runs of layers that fit."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, pairwise

Pack = tuple[int, int]  # layers from the first to below the second
Packs = tuple[Pack, ...]
Size = Callable[[int, int], int | None]  # of a pack; None where it does not fit


def greedy_memory(size: Size, stop: int) -> Packs | None:
    """Packs of layers 0..stop, each as long as it fits; None where one layer does not."""
    packs: list[Pack] = []
    at = 0
    while at < stop:
        end = at
        while end < stop and size(at, end + 1) is not None:
            end += 1
        if end == at:
            return None
        packs.append((at, end))
        at = end
    return tuple(packs)


def balanced(cost: Size, size: Size, stop: int, count: int) -> Packs | None:
    """`count` packs of layers 0..stop that fit by `size`, the largest `cost` as small as possible.

    With `cost=size` this balances memory, with nanoseconds it balances time.
    """

    @cache
    def best(end: int, packs: int) -> tuple[int, int] | None:
        """The largest cost over layers 0..end in `packs` packs, and where the last one starts."""
        if packs == 1:
            fits = end > 0 and size(0, end) is not None
            return (cost(0, end) or 0, 0) if fits else None
        found = None
        for start in range(end - 1, packs - 2, -1):
            if size(start, end) is None:
                continue
            before = best(start, packs - 1)
            if before is not None:
                worst = max(before[0], cost(start, end) or 0)
                if found is None or worst < found[0]:
                    found = worst, start
        return found

    packs: list[Pack] = []
    end = stop
    for left in range(count, 0, -1):
        chosen = best(end, left)
        if chosen is None:
            return None
        packs.append((chosen[1], end))
        end = chosen[1]
    return tuple(reversed(packs))


def divisors(rows: int) -> list[int]:
    return [size for size in range(1, rows + 1) if rows % size == 0]


def all_packings(stop: int) -> Iterator[Packs]:
    """Every way to cut layers 0..stop into packs."""
    for count in range(stop):
        for cuts in combinations(range(1, stop), count):
            edges = [0, *cuts, stop]
            yield tuple(pairwise(edges))
