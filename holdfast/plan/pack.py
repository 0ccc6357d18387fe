"""Offsets for buffers that live at known times, so that all fit into one arena.

Lifetimes are half-open, [lower, upper), in any integers. `pack` starts from greedy packings and
then searches exactly. Problems and answers are MiniMalloc's CSV files (Moffitt, "MiniMalloc: A
Lightweight Memory Allocator for Hardware-Accelerated Machine Learning", ASPLOS 2023). `validate`
shares no code with the solvers.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.pack_search import Buffer, Search, sections_of
from holdfast.units import format_bytes


@dataclass(frozen=True)
class Packing:
    """Byte offsets by buffer id, and the arena that they need.

    `lower_bound` is a height below which no packing exists; `optimal` says that `height` equals it.
    """

    offsets: dict[Hashable, int]
    height: int
    lower_bound: int
    optimal: bool


def pack(buffers: Iterable[Buffer], capacity: int | None = None, seconds: float = 5.0) -> Packing:
    """The lowest packing found in `seconds`; with `capacity`, the first that fits it.

    Raises:
        UsageError: two buffers of one id, an empty lifetime, a negative size or capacity.
        DoesNotFit: nothing was found within `capacity`; `details` holds the height found, the
            lower bound, and whether it is proven that no packing fits.
    """
    buffers = _checked(buffers)
    if capacity is not None and capacity < 0:
        raise UsageError(f"capacity={capacity} is negative; pass bytes, 0 or more")
    deadline = time.monotonic() + seconds
    tries = [first_fit(buffers), *(_greedy(buffers, order, tightest=True) for order in _ORDERS)]
    found = min(tries, key=lambda packing: packing.height)
    if capacity is None:
        return _lowest(buffers, found, deadline)
    low = found.lower_bound
    if low <= capacity < found.height:
        search = Search(buffers)
        offsets = search.run(capacity, deadline)
        if offsets is not None:
            height = max(offsets[b.id] + b.size for b in buffers)
            found = Packing(offsets, height, low, height == low)
        elif search.complete:
            low = capacity - capacity % search.unit + search.unit
    if found.height <= capacity:
        return found
    need = (
        f"they need at least {low} bytes"
        if low > capacity
        else f"{seconds:g} s of search found {found.height} bytes and proved only that they need "
        f"{low}; give it more seconds"
    )
    error = DoesNotFit(
        f"{len(buffers)} buffers do not fit {capacity} bytes ({format_bytes(capacity)}): {need}"
    )
    error.details = {"height": found.height, "lower_bound": low, "proven": low > capacity}
    raise error


def _lowest(buffers: list[Buffer], found: Packing, deadline: float) -> Packing:
    """Search between the bound and the height of `found`."""
    offsets, height, low = found.offsets, found.height, found.lower_bound
    search = Search(buffers)
    # The bound itself first: it is usually reachable, and no slack prunes best. Then by halves,
    # and once time runs out for those, just below what is known, which is easiest.
    target, patient = low, True
    while height > low:
        now = time.monotonic()
        better = search.run(target, now + (deadline - now) * (0.5 if patient else 1))
        if better is not None:
            offsets, height = better, max(better[b.id] + b.size for b in buffers)
        elif search.complete:
            low = target + search.unit
        elif patient:
            patient = False
        else:
            break
        last = height - search.unit
        target = low + (last - low) // 2 // search.unit * search.unit if patient else last
    return Packing(offsets, height, low, height == low)


_ORDERS: tuple[Callable[[Buffer], Any], ...] = (
    lambda b: (-b.size, b.lower - b.upper, b.lower),
    lambda b: (b.lower - b.upper, -b.size, b.lower),
    lambda b: (b.size * (b.lower - b.upper), b.lower),
)


def first_fit(buffers: Iterable[Buffer]) -> Packing:
    """In order of birth, each buffer at the lowest offset that is free all its life."""
    return _greedy(_checked(buffers), lambda b: b.lower, tightest=False)


def best_fit(buffers: Iterable[Buffer]) -> Packing:
    """The largest first, then the longest-lived, each in the tightest gap that holds it."""
    return _greedy(_checked(buffers), _ORDERS[0], tightest=True)


def gap_offset(busy: Iterable[tuple[int, int]], size: int, *, tightest: bool = True) -> int:
    """Where `size` bytes go among `busy` (first, past the last) bytes: the tightest or lowest gap.

    Where no gap holds them it is the end of the busy bytes.
    """
    end, found, width = 0, None, math.inf
    for first, last in sorted(busy):
        if size <= first - end < width:
            found, width = end, first - end
            if not tightest:
                break
        end = max(end, last)
    return end if found is None else found


def validate(
    buffers: Iterable[Buffer], offsets: Mapping[Hashable, int], capacity: int | None = None
) -> int:
    """The height of a packing.

    Raises:
        UsageError: a buffer without an offset or below 0, two that overlap in time and in bytes,
            or one that ends above `capacity`; the message names them.
    """
    height = 0
    seen: list[tuple[Buffer, int, int]] = []
    for b in buffers:
        if b.id not in offsets or offsets[b.id] < 0:
            raise UsageError(f"buffer {b.id} has offset {offsets.get(b.id)}; it needs 0 or more")
        first, last = offsets[b.id], offsets[b.id] + b.size
        for other, low, high in seen:
            together = b.lower < other.upper and other.lower < b.upper
            if together and max(first, low) < min(last, high):
                raise UsageError(
                    f"buffers {other.id} and {b.id} both live at time "
                    f"{max(b.lower, other.lower)} and hold byte {max(first, low)}"
                )
        if capacity is not None and last > capacity:
            raise UsageError(f"buffer {b.id} ends at byte {last}, capacity is {capacity}")
        seen.append((b, first, last))
        height = max(height, last)
    return height


_COLUMNS = {"buffer": "id", "buffer_id": "id", "start": "lower", "begin": "lower", "end": "upper"}
_NEEDED = ("id", "lower", "upper", "size")


def parse_csv(text: str, name: str = "CSV") -> tuple[list[Buffer], dict[Hashable, int] | None]:
    """Buffers of a MiniMalloc file, and the offsets if it is an answer.

    A column `end`, of the older format, holds the last instant of a life instead of the first
    after it.

    Raises:
        UsageError: a missing or unknown column, a number that is none, alignments or gaps.
    """
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    given = [column.strip() for column in rows[0]] if rows else []
    columns = [_COLUMNS.get(column, column) for column in given]
    optional = ("offset", "alignment", "gaps")
    if not set(_NEEDED) <= set(columns) <= {*_NEEDED, *optional} or len(set(columns)) < len(given):
        raise UsageError(
            f"{name} has columns {', '.join(given) or 'none'}; "
            "a packing problem has id,lower,upper,size and, when solved, offset"
        )
    buffers: list[Buffer] = []
    offsets: dict[Hashable, int] = {}
    for at, row in enumerate(rows[1:], start=2):
        if len(row) != len(columns):
            raise UsageError(f"{name} line {at} has {len(row)} fields, its header {len(columns)}")
        field = {column: cell.strip() for column, cell in zip(columns, row, strict=True)}
        if field.get("alignment", "1") != "1" or field.get("gaps", ""):
            raise UsageError(
                f"{name} line {at} asks for an alignment or gaps; round sizes up to the alignment "
                "and cut buffers at their gaps"
            )
        try:
            numbers = {c: int(field[c]) for c in ("lower", "upper", "size", "offset") if c in field}
        except ValueError as error:
            raise UsageError(f"{name} line {at}: {error}; times and bytes are integers") from None
        upper = numbers["upper"] + ("end" in given)
        buffers.append(Buffer(numbers["lower"], upper, numbers["size"], field["id"]))
        if "offset" in numbers:
            offsets[field["id"]] = numbers["offset"]
    return _checked(buffers), offsets if "offset" in columns else None


def read_csv(path: Path | str) -> tuple[list[Buffer], dict[Hashable, int] | None]:
    """`parse_csv` of a file.

    Raises:
        UsageError: also a file that cannot be read.
    """
    try:
        return parse_csv(Path(path).read_text(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; name a CSV file") from None


def write_csv(
    path: Path | str, buffers: Iterable[Buffer], offsets: Mapping[Hashable, int] | None = None
) -> None:
    """Write a problem, or with `offsets` its answer, as MiniMalloc's tools read it."""
    Path(path).write_text(format_csv(buffers, offsets))


def format_csv(buffers: Iterable[Buffer], offsets: Mapping[Hashable, int] | None = None) -> str:
    """The text of `write_csv`."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*_NEEDED, "offset"] if offsets is not None else _NEEDED)
    for b in buffers:
        row = [b.id, b.lower, b.upper, b.size]
        rows.writerow([*row, offsets[b.id]] if offsets is not None else row)
    return text.getvalue()


def _checked(buffers: Iterable[Buffer]) -> list[Buffer]:
    buffers = list(buffers)
    seen: set[Hashable] = set()
    for b in buffers:
        if b.id in seen:
            raise UsageError(f"two buffers have id {b.id}; ids must differ")
        if b.upper <= b.lower:
            raise UsageError(
                f"buffer {b.id} lives in [{b.lower}, {b.upper}), which is empty; "
                "upper is the first instant after its life"
            )
        if b.size < 0:
            raise UsageError(f"buffer {b.id} has size {b.size}; bytes are 0 or more")
        seen.add(b.id)
    return buffers


def _greedy(buffers: list[Buffer], order: Callable[[Buffer], Any], *, tightest: bool) -> Packing:
    buffers = sorted(buffers, key=order)
    lower = np.array([b.lower for b in buffers], np.int64)
    upper = np.array([b.upper for b in buffers], np.int64)
    first, last = np.zeros(len(buffers), np.int64), np.zeros(len(buffers), np.int64)
    for i, b in enumerate(buffers):
        met = np.flatnonzero((lower[:i] < b.upper) & (b.lower < upper[:i]))
        busy = zip(first[met].tolist(), last[met].tolist(), strict=True)
        first[i] = gap_offset(busy, b.size, tightest=tightest)
        last[i] = first[i] + b.size
    height = int(last.max(initial=0))
    low = max((sum(buffers[i].size for i in s) for s in sections_of(buffers)), default=0)
    offsets = {b.id: offset for b, offset in zip(buffers, first.tolist(), strict=True)}
    return Packing(offsets, height, low, height == low)
