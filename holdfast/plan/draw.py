"""Draw what `simulate` found: who works when and who waits, and the bytes held meanwhile.

A task is read from its name, however deep its tuples: the first word is its kind and, of the kinds
in COLOURS, the first number the stage and the second the micro-batch. (5, "F", 3) is a forward of
stage 5 on micro-batch 3, ("load", 5, 3) brings back what it saved. Shades tell a rank's chunks
apart: stage // ranks.
"""

import itertools
import json
import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError
from holdfast.files import write_text
from holdfast.plan.figures import plots, save_figure
from holdfast.plan.simulate import Span, Trace, lane_of
from holdfast.units import format_bytes

# F, I and W, and F, W and B, stay apart in each form of colour blindness, in all their shades.
COLOURS = {
    "F": ("#332288", "F: forward"),
    "I": ("#e69f00", "I: gradients of inputs"),
    "W": ("#009e73", "W: gradients of weights"),
    "B": ("#d55e00", "B: backward"),
    "save": ("#56b4e9", "save: copy out"),
    "load": ("#cc79a7", "load: copy in"),
    "hop": ("#777777", "send"),
    "send": ("#777777", "send"),
}
COMPUTING = frozenset("FIWB")
OTHERS = ("#f0e442", "#0072b2", "#882255", "#999933", "#44aa99", "#aa4499")
WAITING, STRIP = "#e4e4e4", "#5d6b78"
_UNITS = (("ns", 1), ("µs", 10**3), ("ms", 10**6), ("s", 10**9))

# Inches; type sizes in points.
COMPUTE, LANE, HELD, GAP, BETWEEN = 0.25, 0.17, 0.34, 0.04, 0.24
SMALL, SIZES = 7.0, (7.0, 6.0, 5.0)
_DIGIT = 0.636 / 72  # width of a digit of one point's size

Box = tuple[float, float, float, float]  # left, top, right, bottom


def timeline(
    trace: Trace,
    path: str | Path,
    *,
    title: str = "",
    places: Sequence[str] = ("device", "host"),
) -> None:
    """Draw a lane for each rank and stream, and under each rank its bytes over time.

    What a rank's compute stream waits shows as gaps, and as a share of the whole. Each place has
    one scale for all ranks; a dot marks the peak. Places in which nothing ever lies are left out.

    Args:
        path: the suffix says the format, .png or .svg.

    Raises:
        UsageError: matplotlib is missing, the trace is empty, or the suffix is unknown.
    """
    module = plots()
    if not trace.end:
        raise UsageError("nothing to draw: no task of this trace takes any time")
    _Picture(trace, places).draw(module, Path(path), title)


def write_chrome(trace: Trace, path: str | Path) -> None:
    """Write a trace as JSON for chrome://tracing and ui.perfetto.dev, atomically.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        write_text(path, json.dumps(trace.to_chrome(), separators=(",", ":")) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another") from error


class _Picture:
    """What is to be drawn, in inches downwards and in the time unit to the right."""

    def __init__(self, trace: Trace, places: Sequence[str]):
        self.trace = trace
        self.unit, factor = next(
            (unit, size) for unit, size in reversed(_UNITS) if trace.end >= size
        )
        self.scale = 1 / factor
        self.end = trace.end * self.scale
        working = [s for s in trace.spans if s.end > s.start]
        self.lanes: dict[Hashable, list[Span]] = {}
        for span in working:
            self.lanes.setdefault(span.stream, []).append(span)
        ranks = {lane_of(stream)[0] for stream in self.lanes}
        ranks |= {change.rank for _, _, change in trace.changes}
        self.ranks = sorted(rank for rank in ranks if rank is not None)
        self.chunks = 1 + max((chunk for _, chunk, _ in map(self.read, working)), default=0)
        kinds = dict.fromkeys(self.read(span)[0] for span in working)
        spare = itertools.cycle(OTHERS)
        self.colours = {k: COLOURS[k] if k in COLOURS else (next(spare), k) for k in kinds}
        peaks = {p: [trace.peak(rank, p) for rank in self.ranks] for p in places}
        self.most = {place: max(found) for place, found in peaks.items() if any(found)}
        # Wide enough for two digits in the usual task.
        computing = [s for s in working if lane_of(s.stream)[1] == "compute"]
        usual = statistics.median(s.end - s.start for s in computing or working)
        self.width = min(max(0.15 * trace.end / usual, 7.5), 28.0)
        self.boxes: list[Box] = []
        self.fills: list[str] = []
        self.labels: list[tuple[float, float, str, float, str]] = []
        self.names: list[tuple[float, str]] = []  # of lanes
        self.heads: list[tuple[float, str, str]] = []  # of ranks
        self.peaks: list[tuple[float, float, str]] = []
        self.backs: list[tuple[Box, str]] = []
        self.curves: list[list[tuple[float, float]]] = []

    def read(self, span: Span) -> tuple[str, int, str]:
        """Kind, chunk, and the micro-batch as text."""
        parts = list(_flat(span.name))
        words = [part for part in parts if isinstance(part, str)]
        numbers = [part for part in parts if isinstance(part, int)]
        kind = next(iter(" ".join(words).split()), "other")
        chunk = numbers[0] // max(len(self.ranks), 1) if kind in COMPUTING and numbers else 0
        return kind, chunk, str(numbers[1]) if kind in COLOURS and len(numbers) > 1 else ""

    def draw(self, module: Any, path: Path, title: str) -> None:
        height = self._place()
        margin = 1.08 + 0.062 * max(len(name) for _, name in self.names)
        right = 1.15 if self.curves else 0.2
        rows, columns = self._legend_shape(margin + self.width + right)
        above = 0.16 + (0.26 if title else 0) + 0.19 * rows
        size = (margin + self.width + right, above + height + 0.5)
        figure = module.Figure(figsize=size, dpi=150)
        axes = figure.add_axes(
            (margin / size[0], 0.5 / size[1], self.width / size[0], height / size[1])
        )
        axes.set(xlim=(0, self.end), ylim=(height, 0), yticks=[])
        axes.set_xlabel(f"{self.unit}; the end is at {self.end:.4g} {self.unit}", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL, length=2)
        axes.grid(axis="x", color="#d0d0d0", lw=0.4)
        axes.set_axisbelow(True)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        self._fill(axes)
        self._write(axes, margin)
        if title:
            figure.text(
                0.1 / size[0], 1 - 0.1 / size[1], title, fontsize=10, va="top", weight="bold"
            )
        self._legend(figure, columns, 1 - (0.08 + (0.26 if title else 0)) / size[1])
        save_figure(figure, path)

    def _place(self) -> float:
        """Give everything its place from the top; returns the height."""
        y = 0.06
        for rank in [*self.ranks, None]:
            mine = [stream for stream in self.lanes if lane_of(stream)[0] == rank]
            mine.sort(key=lambda stream: lane_of(stream)[1] != "compute")
            if rank is None and not mine:
                continue
            share = ""
            compute = next((s for s in mine if lane_of(s)[1] == "compute"), None)
            if rank is not None and compute is not None:
                share = f"{self.trace.bubble(compute) / self.trace.end:.1%} bubble"
            self.heads.append((y, "all ranks" if rank is None else f"rank {rank}", share))
            top = y
            for stream in mine:
                y = self._lane(stream, y) + GAP
            if rank is not None:
                for place, most in self.most.items():
                    y = self._bytes(rank, place, most, y) + GAP
            y = max(y, top + 0.32) + BETWEEN
        return y - BETWEEN + 0.06

    def _lane(self, stream: Hashable, top: float) -> float:
        name = lane_of(stream)[1]
        bottom = top + (COMPUTE if name == "compute" else LANE)
        self.names.append(((top + bottom) / 2, name))
        self.backs.append(((0, top, self.end, bottom), WAITING if name == "compute" else "#f4f4f4"))
        for span in self.lanes[stream]:
            kind, chunk, text = self.read(span)
            left, right = span.start * self.scale, span.end * self.scale
            fill = self._shade(kind, chunk)
            self.boxes.append((left, top, right, bottom))
            self.fills.append(fill)
            room = (right - left) / self.end * self.width - 0.02
            size = next((s for s in SIZES if len(text) * s * _DIGIT <= room), None)
            if text and size is not None:
                ink = "white" if _luminance(fill) < 0.4 else "black"
                middle = (left + right) / 2, (top + bottom) / 2
                self.labels.append((*middle, text, size, ink))
        return bottom

    def _bytes(self, rank: int, place: str, most: int, top: float) -> float:
        bottom = top + HELD
        steps = self.trace.bytes(rank, place)
        peak = max((held for _, held in steps), default=0)
        when = next((time for time, held in steps if held == peak), 0)

        def level(held: int) -> float:
            return bottom - 0.92 * HELD * held / most

        self.names.append(((top + bottom) / 2, place))
        self.backs.append(((0, top, self.end, bottom), "#f4f4f4"))
        self.peaks.append((when * self.scale, level(peak), f"peak {format_bytes(peak)}"))
        curve, last = [(0.0, bottom)], bottom
        for time, held in steps:
            x = time * self.scale
            if curve[-1] != (x, last):
                curve.append((x, last))
            last = level(held)
            curve.append((x, last))
        self.curves.append([*curve, (self.end, last), (self.end, bottom)])
        return bottom

    def _shade(self, kind: str, chunk: int) -> str:
        """Later chunks are paler."""
        colour = self.colours[kind][0]
        if self.chunks == 1 or kind not in COMPUTING:
            return colour
        pale = 0.5 * chunk / (self.chunks - 1)
        return "#" + "".join(f"{round(255 * (c + (1 - c) * pale)):02x}" for c in _rgb(colour))

    def _fill(self, axes: Any) -> None:
        from matplotlib.collections import PolyCollection

        for shapes, fills, edge in (
            ([box for box, _ in self.backs], [fill for _, fill in self.backs], 0.0),
            (self.boxes, self.fills, 0.3),
        ):
            corners = [[(a, b), (c, b), (c, d), (a, d)] for a, b, c, d in shapes]
            lines = [edge if (c - a) / self.end * self.width > 0.05 else 0 for a, _, c, _ in shapes]
            axes.add_collection(
                PolyCollection(corners, facecolors=fills, edgecolors="white", linewidths=lines)
            )
        axes.add_collection(PolyCollection(self.curves, facecolors=STRIP, linewidths=0))

    def _write(self, axes: Any, margin: float) -> None:
        for x, y, text, size, ink in self.labels:
            axes.text(x, y, text, fontsize=size, color=ink, ha="center", va="center_baseline")
        beside = axes.get_yaxis_transform()
        for y, name in self.names:
            axes.text(
                -0.07 / self.width,
                y,
                name,
                fontsize=SMALL,
                ha="right",
                va="center",
                transform=beside,
            )
        edge = (0.1 - margin) / self.width
        for y, head, share in self.heads:
            axes.text(edge, y, head, fontsize=9, weight="bold", va="top", transform=beside)
            axes.text(edge, y + 0.18, share, fontsize=SMALL, va="top", transform=beside)
        for x, y, text in self.peaks:
            axes.plot([x, self.end], [y, y], color="black", lw=0.5, ls=":", clip_on=False)
            axes.plot([x], [y], "o", color="black", ms=2.5, clip_on=False)
            axes.text(1 + 0.07 / self.width, y, text, fontsize=SMALL, va="center", transform=beside)

    def _entries(self) -> list[tuple[tuple[str, ...], str]]:
        """Colours and words of the legend."""
        order = [k for k in COLOURS if k in self.colours]
        order += [k for k in self.colours if k not in COLOURS]
        entries = {self.colours[k][1]: (self.colours[k][0],) for k in order}
        found: list[tuple[tuple[str, ...], str]] = [(fill, text) for text, fill in entries.items()]
        found.append(((WAITING,), "bubble"))
        first = next((k for k in order if k in COMPUTING), None)
        if self.chunks > 1 and first is not None:
            shades = tuple(self._shade(first, chunk) for chunk in range(self.chunks))
            found.append((shades, f"chunks 0 to {self.chunks - 1}"))
        return found

    def _legend_shape(self, width: float) -> tuple[int, int]:
        wide = [0.55 + 0.06 * len(text) for _, text in self._entries()]
        columns = len(wide) if sum(wide) <= width else max(1, int(width / max(wide)))
        return math.ceil(len(wide) / columns), columns

    def _legend(self, figure: Any, columns: int, top: float) -> None:
        from matplotlib.legend_handler import HandlerTuple
        from matplotlib.patches import Patch

        entries = self._entries()
        figure.legend(
            [tuple(Patch(facecolor=fill) for fill in fills) for fills, _ in entries],
            [text for _, text in entries],
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
            loc="upper left",
            bbox_to_anchor=(0, top),
            ncols=columns,
            fontsize=SMALL,
            frameon=False,
            borderpad=0.2,
            labelspacing=0.4,
        )


def _flat(name: Hashable) -> Iterator[Any]:
    if isinstance(name, tuple):
        for part in name:
            yield from _flat(part)
    else:
        yield name


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    red, green, blue = _rgb(colour)
    return 0.3 * red + 0.59 * green + 0.11 * blue
