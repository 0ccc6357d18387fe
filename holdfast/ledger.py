"""Ledger: integer bytes by rank, place, category and phase.

Prediction, simulation and measurement all return one, so that `predicted - measured` is the error
table. A cell is what its category holds at the instant at which its place peaks in its phase: a
column sums to that peak, and peaks are never added across phases.
"""

from collections.abc import Iterator, Mapping

from holdfast.budget import PLACES
from holdfast.units import format_bytes

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "cache",
    "knowledge",
    "buffers",
    "inputs",
    "temporary",
)
PHASES = ("forward", "backward", "step", "load", "prefill", "decode")


class Ledger:
    """Mapping from (rank, place, category, phase) to integer bytes; absent cells are 0."""

    def __init__(self, cells: Mapping[tuple[int, str, str, str], int] | None = None):
        self._cells: dict[tuple[int, str, str, str], int] = {}
        for key, value in (cells or {}).items():
            self[key] = value

    def __getitem__(self, key: tuple[int, str, str, str]) -> int:
        return self._cells.get(self._checked(key), 0)

    def __setitem__(self, key: tuple[int, str, str, str], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"ledger cell {key} = {value!r} must be an integer number of bytes")
        key = self._checked(key)
        if value:
            self._cells[key] = value
        else:
            self._cells.pop(key, None)

    @staticmethod
    def _checked(key: tuple[int, str, str, str]) -> tuple[int, str, str, str]:
        rank, place, category, phase = key
        for what, name, known in (
            ("place", place, PLACES),
            ("category", category, CATEGORIES),
            ("phase", phase, PHASES),
        ):
            if name not in known:
                raise KeyError(f"unknown {what} {name!r}; known: {', '.join(known)}")
        if not isinstance(rank, int) or rank < 0:
            raise KeyError(f"rank {rank!r} is not a non-negative integer")
        return key

    def __iter__(self) -> Iterator[tuple[int, str, str, str]]:
        return iter(self._cells)

    def items(self):
        return self._cells.items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._cells == other._cells

    def __sub__(self, other: "Ledger") -> "Ledger":
        keys = set(self._cells) | set(other._cells)
        return Ledger({key: self[key] - other[key] for key in keys})

    def put(self, place: str, phase: str, by_category: Mapping[str, int], *, rank: int = 0) -> None:
        """Set a whole column: what each category holds at that place's peak in that phase."""
        for category, value in by_category.items():
            self[rank, place, category, phase] = value

    def column(self, place: str, phase: str, *, rank: int = 0) -> dict[str, int]:
        """Bytes per category, all categories listed."""
        return {c: self[rank, place, c, phase] for c in CATEGORIES}

    def phases(self, *, rank: int = 0) -> list[str]:
        present = {phase for r, _, _, phase in self._cells if r == rank}
        return [phase for phase in PHASES if phase in present]

    def phase_peaks(self, place: str = "device", *, rank: int = 0) -> dict[str, int]:
        """Peak bytes of each phase at a place."""
        return {p: sum(self.column(place, p, rank=rank).values()) for p in self.phases(rank=rank)}

    def peak(self, place: str = "device", *, rank: int = 0) -> int:
        """Largest sum over categories of any phase."""
        return max(self.phase_peaks(place, rank=rank).values(), default=0)

    def peak_phase(self, place: str = "device", *, rank: int = 0) -> str:
        peaks = self.phase_peaks(place, rank=rank)
        return max(peaks, key=lambda phase: peaks[phase]) if peaks else PHASES[0]

    def at_peak(self, place: str = "device", *, rank: int = 0) -> dict[str, int]:
        """Bytes per category in the phase in which the place peaks; sums to `peak`."""
        return self.column(place, self.peak_phase(place, rank=rank), rank=rank)

    def to_json(self) -> list[dict]:
        """Rows in a stable order, for plan files and `--json`."""
        order = {name: i for i, name in enumerate((*PLACES, *CATEGORIES, *PHASES))}
        rows = sorted(self._cells, key=lambda k: (k[0], order[k[1]], order[k[3]], order[k[2]]))
        names = ("rank", "place", "category", "phase")
        return [dict(zip(names, key, strict=True)) | {"bytes": self._cells[key]} for key in rows]

    @classmethod
    def from_json(cls, rows: list[dict]) -> "Ledger":
        return cls({(r["rank"], r["place"], r["category"], r["phase"]): r["bytes"] for r in rows})

    def __repr__(self) -> str:
        peaks = ", ".join(
            f"{place} {format_bytes(self.peak(place))} in {self.peak_phase(place)}"
            for place in PLACES
            if self.peak(place)
        )
        return f"Ledger({peaks or 'empty'})"
