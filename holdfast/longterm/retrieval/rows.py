"""Arrays that grow: numbers, and many unit vectors in little memory, scanned whole.

Keeps    what was appended, in that order.
Form     vectors as int8 with one fp32 scale per row, in blocks, so that growing copies nothing.
Bytes    d + 4 per row, at most twice that in the last block.
"""

import numpy as np

BLOCK = 4096
PIECE = 1024  # rows multiplied at a time; divides BLOCK


class Column:
    """A 1-D array that grows by an eighth."""

    def __init__(self, dtype: type, fill: float = 0):
        self._data, self._fill, self.count = np.full(16, fill, dtype), fill, 0

    def append(self, values: np.ndarray) -> None:
        end = self.count + len(values)
        if end >= len(self._data):
            grown = np.full(max(end + 1, len(self._data) * 9 // 8), self._fill, self._data.dtype)
            grown[: self.count] = self._data[: self.count]
            self._data = grown
        self._data[self.count : end] = values
        self.count = end

    @property
    def values(self) -> np.ndarray:
        """A view of what was appended and of one unused element, which [-1] finds."""
        return self._data[: self.count + 1]

    def keep(self, places: np.ndarray) -> None:
        kept = Column(self._data.dtype.type, self._fill)
        kept.append(self._data[places])
        self._data, self.count = kept._data, kept.count

    @property
    def nbytes(self) -> int:
        return self._data.nbytes


class Rows:
    """Append, overwrite and scan rows of `dim` numbers; an error of a cosine is about 0.002."""

    def __init__(self, dim: int):
        self.dim, self.count = dim, 0
        self._codes: list[np.ndarray] = []
        self._scales: list[np.ndarray] = []

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in [*self._codes, *self._scales])

    def append(self, rows: np.ndarray) -> None:
        """rows: f32[n,dim]."""
        codes, scales = _quantise(rows)
        at = 0
        while at < len(codes):
            start = self.count % BLOCK
            taken = min(len(codes) - at, BLOCK - start)
            self._reserve(start, taken)
            self._codes[-1][start : start + taken] = codes[at : at + taken]
            self._scales[-1][start : start + taken] = scales[at : at + taken]
            at += taken
            self.count += taken

    def _reserve(self, start: int, count: int) -> None:
        """Room for `count` rows from `start` of the last block on, which grows by doubling."""
        if start == 0:
            self._codes.append(np.zeros((0, self.dim), np.int8))
            self._scales.append(np.zeros(0, np.float32))
        size = len(self._scales[-1])
        if start + count > size:
            size = min(BLOCK, max(start + count, 2 * size))
            self._codes[-1] = _resized(self._codes[-1], size)
            self._scales[-1] = _resized(self._scales[-1], size)

    def put(self, slots: np.ndarray, row: np.ndarray) -> None:
        """Overwrite the rows at `slots` by one, f32[dim]."""
        (code,), (scale,) = _quantise(row[None])
        for slot in slots:
            self._codes[slot // BLOCK][slot % BLOCK] = code
            self._scales[slot // BLOCK][slot % BLOCK] = scale

    def take(self, slots: np.ndarray) -> np.ndarray:
        """f32[len(slots),dim] as kept."""
        out = np.empty((len(slots), self.dim), np.float32)
        for i, slot in enumerate(slots):
            np.multiply(
                self._codes[slot // BLOCK][slot % BLOCK],
                self._scales[slot // BLOCK][slot % BLOCK],
                out=out[i],
                dtype=np.float32,
            )
        return out

    def dot(self, vector: np.ndarray) -> np.ndarray:
        """f32[count]: the product of every row with `vector` f32[dim]."""
        out = np.empty(self.count, np.float32)
        # Little enough for the processor's cache, and no fresh pages for each piece.
        wide = np.empty((PIECE, self.dim), np.float32)
        for first in range(0, self.count, PIECE):
            at, size = first % BLOCK, min(PIECE, self.count - first)
            np.copyto(wide[:size], self._codes[first // BLOCK][at : at + size])
            np.matmul(wide[:size], vector, out=out[first : first + size])
            out[first : first + size] *= self._scales[first // BLOCK][at : at + size]
        return out

    def keep(self, slots: np.ndarray) -> None:
        """Drop all rows but those at `slots`, which must rise."""
        kept = Rows(self.dim)
        for start in range(0, len(slots), BLOCK):
            kept.append(self.take(slots[start : start + BLOCK]))
        self._codes, self._scales, self.count = kept._codes, kept._scales, kept.count


def _resized(block: np.ndarray, size: int) -> np.ndarray:
    grown = np.zeros((size, *block.shape[1:]), block.dtype)
    grown[: len(block)] = block
    return grown


def _quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.asarray(rows, np.float32)
    scales = np.abs(rows).max(1, initial=0) / 127
    codes = np.rint(rows / np.maximum(scales, 1e-30)[:, None]).astype(np.int8)
    return codes, scales
