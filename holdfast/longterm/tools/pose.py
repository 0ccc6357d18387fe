"""Behaviour from tracked animals: speeds, distances, angles, regions, and events made of them.

A pose is float[T, animals, keypoints, 2 or 3] in any unit of length, NaN where nothing was seen.
Signals are float[T], masks bool[T], False where something is unseen; `Events` are half-open ranges
of frames. Seconds are turned into frames with the pose's frames per second.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from holdfast.errors import UsageError, unknown

SPAN = 5  # frames before and after, that a speed is measured over


@dataclass(frozen=True, eq=False)
class Events:
    """Frames [start, stop) during which something happens, sorted and apart: int64[n, 2]."""

    frames: np.ndarray
    total: int

    def __len__(self) -> int:
        return len(self.frames)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Events)
            and self.total == other.total
            and np.array_equal(self.frames, other.frames)
        )


def events(mask: np.ndarray, min_len: int = 1, smooth: int = 0) -> Events:
    """Runs of True of `min_len` frames or more, after gaps of up to `smooth` frames are closed."""
    mask = np.asarray(mask)
    if mask.ndim != 1 or mask.dtype != bool:
        raise UsageError(
            f"events need a mask, bool[T], not {mask.dtype}{list(mask.shape)}; compare first, "
            "for example speed(0) > 5"
        )
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    frames = edges.reshape(-1, 2).astype(np.int64)
    if smooth > 0 and len(frames) > 1:
        apart = frames[1:, 0] - frames[:-1, 1] > smooth
        frames = np.stack([frames[np.r_[True, apart], 0], frames[np.r_[apart, True], 1]], axis=1)
    return Events(frames[frames[:, 1] - frames[:, 0] >= max(min_len, 1)], len(mask))


def mask(found: Events) -> np.ndarray:
    """The frames in which an event lasts, bool[T]."""
    steps = np.zeros(found.total + 1, np.int64)
    np.add.at(steps, found.frames[:, 0], 1)
    np.add.at(steps, found.frames[:, 1], -1)
    return np.cumsum(steps[:-1]) > 0


def both(a: Events, b: Events) -> Events:
    """The times in which both last."""
    return events(mask(a) & mask(b))


def either(a: Events, b: Events) -> Events:
    """The times in which one of them lasts."""
    return events(mask(a) | mask(b))


def overlap(a: Events, b: Events) -> Events:
    """The events of `a`, whole, that share a frame with one of `b`."""
    # Of b's events the last that begins before a's end is the one that reaches furthest.
    last = np.searchsorted(b.frames[:, 0], a.frames[:, 1]) - 1
    ends = np.r_[b.frames[:, 1], -1][last]
    return Events(a.frames[ends > a.frames[:, 0]], a.total)


def before(a: Events, b: Events, within: int) -> Events:
    """The events of `a` that end at most `within` frames before one of `b` begins."""
    following = np.searchsorted(b.frames[:, 0], a.frames[:, 1])
    starts = np.r_[b.frames[:, 0], np.iinfo(np.int64).max][following]
    return Events(a.frames[starts - a.frames[:, 1] <= within], a.total)


class Pose:
    """Tracks of some animals, and what can be measured on them.

    Args:
        data: float[T, animals, keypoints, 2 or 3].
        fps: frames per second.
        front, back: keypoints that an animal's heading points along, from back to front.
        regions: name -> (x0, y0, x1, y1) of a box, or a polygon float[n, 2], n >= 3.
    """

    def __init__(
        self,
        data: np.ndarray,
        fps: float,
        *,
        front: int = 0,
        back: int = -1,
        regions: Mapping[str, object] | None = None,
    ):
        self.data = np.asarray(data, float)
        if self.data.ndim != 4 or self.data.shape[-1] not in (2, 3) or 0 in self.data.shape:
            raise UsageError(
                f"a pose is float[T, animals, keypoints, 2 or 3], not {list(self.data.shape)}"
            )
        if not fps > 0:
            raise UsageError(f"fps={fps} must be above 0 frames per second")
        keypoints = self.data.shape[2]
        if not (-keypoints <= front < keypoints and -keypoints <= back < keypoints):
            raise UsageError(f"front={front}, back={back}: there are {keypoints} keypoints")
        self.fps, self.front, self.back = float(fps), front, back
        self.regions = {name: _polygon(name, shape) for name, shape in (regions or {}).items()}

    @property
    def frames(self) -> int:
        return len(self.data)

    def _animal(self, animal: int) -> np.ndarray:
        if isinstance(animal, bool) or not isinstance(animal, int | np.integer):
            raise UsageError(f"animal {animal!r} must be a number from 0")
        if not 0 <= animal < self.data.shape[1]:
            raise UsageError(
                f"animal {animal} is not tracked; there are 0 to {self.data.shape[1] - 1}"
            )
        return self.data[:, animal]

    def centre(self, animal: int) -> np.ndarray:
        """The mean of an animal's seen keypoints, float[T, 2 or 3]."""
        points = self._animal(animal)
        seen = ~np.isnan(points)
        count = seen.sum(1)
        total = np.where(seen, points, 0.0).sum(1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def size(self, animal: int) -> float:
        """The median distance from an animal's back to its front; one length."""
        points = self._animal(animal)
        lengths = np.linalg.norm(points[:, self.front] - points[:, self.back], axis=-1)
        lengths = lengths[~np.isnan(lengths)]
        if not len(lengths):
            raise UsageError(f"animal {animal} is never seen with both front and back")
        return float(np.median(lengths))

    def speed(self, animal: int) -> np.ndarray:
        """Length per second of the centre, over 5 frames before and after; float[T]."""
        centre = self.centre(animal)
        index = np.arange(self.frames)
        low, high = np.maximum(index - SPAN, 0), np.minimum(index + SPAN, self.frames - 1)
        moved = np.linalg.norm(centre[high] - centre[low], axis=-1)
        return moved / np.maximum(high - low, 1) * self.fps

    def distance(self, a: int, b: int) -> np.ndarray:
        """Between the centres of two animals; float[T]."""
        return np.linalg.norm(self.centre(a) - self.centre(b), axis=-1)

    def heading(self, animal: int) -> np.ndarray:
        """The direction from back to front in the plane of x and y; radians in (-pi, pi]."""
        points = self._animal(animal)
        along = points[:, self.front] - points[:, self.back]
        return np.arctan2(along[:, 1], along[:, 0])

    def angle(self, a: int, b: int) -> np.ndarray:
        """How far `a`'s heading is off the direction to `b`; radians from 0 to pi."""
        to = self.centre(b) - self.centre(a)
        off = self.heading(a) - np.arctan2(to[:, 1], to[:, 0])
        return np.abs((off + np.pi) % (2 * np.pi) - np.pi)

    def inside(self, animal: int, region: str) -> np.ndarray:
        """Whether an animal's centre is in a named region; bool[T]."""
        if region not in self.regions:
            raise (
                unknown("region", region, self.regions)
                if self.regions
                else UsageError(
                    f"unknown region {region!r}: none was given; pass regions={{{region!r}: ...}}"
                )
            )
        x, y = self.centre(animal)[:, :2].T
        corners = self.regions[region]
        within = np.zeros(self.frames, bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (y0 > y) != (y1 > y)
                within ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return within


def _polygon(name: str, shape: object) -> np.ndarray:
    corners = np.asarray(shape, float)
    if corners.shape == (4,):
        x0, y0, x1, y1 = corners
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
        raise UsageError(
            f"region {name!r} is neither a box (x0, y0, x1, y1) nor a polygon float[n, 2], n >= 3: "
            f"its shape is {list(corners.shape)}"
        )
    return corners
