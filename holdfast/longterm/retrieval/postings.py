"""Words of memories, and who stands beside whom: what BM25 over turns in context is made of.

Form     4 bytes per distinct word of a memory: its slot and, in the last 6 bits, a count.
Bytes    8.5 per posting, about 250 per distinct word; 20 per memory, 20 more in a session.
"""

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from holdfast.longterm.retrieval.rows import Column

# What a word counts for the next three turns, and for the previous three.
AHEAD, BACK = (0.6, 0.4, 0.3), (0.4, 0.3, 0.2)
_BITS = 6
_MOST = (1 << _BITS) - 1


class Postings:
    """Which slots have a word and how often (at most 63 times), and which words a slot has.

    Words have numbers, in the order in which they came.
    """

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._names: list[str] = []
        self._slots: list[array] = []  # by word
        self._having = Column(np.int32)  # by word: slots that have it and were not dropped
        self._words = Column(np.uint32)  # of all slots, one after the other
        self._ends = Column(np.int64)  # by slot

    @property
    def nbytes(self) -> int:
        """What Python says of its objects; a string, a number and an array each have their own."""
        columns = self._having.nbytes + self._words.nbytes + self._ends.nbytes
        names = sum(map(sys.getsizeof, self._number)) + sys.getsizeof(self._number)
        numbers = 36 * len(self._number) + sys.getsizeof(self._slots)
        return columns + names + numbers + sum(map(sys.getsizeof, self._slots))

    def add(self, first: int, texts: Sequence[Sequence[str]]) -> None:
        """The stems of the slots from `first` on, which is the next that has none."""
        known, slots = self._number, self._slots
        words: list[int] = []
        ends = []
        for slot, stems in enumerate(texts, first):
            for term, count in Counter(stems).items():
                word = known.get(term)
                if word is None:
                    word = known[term] = len(slots)
                    slots.append(array("I"))
                    self._names.append(term)
                count = count if count < _MOST else _MOST
                slots[word].append(slot << _BITS | count)
                words.append(word << _BITS | count)
            ends.append(self._words.count + len(words))
        packed = np.array(words, np.uint32)
        self._words.append(packed)
        self._ends.append(np.array(ends))
        self._having.append(np.zeros(len(slots) - self._having.count))
        np.add.at(self._having.values, packed >> _BITS, 1)

    def name(self, word: int) -> str:
        return self._names[word]

    def number(self, term: str) -> int:
        """A word's number, -1 for none that is known."""
        return self._number.get(term, -1)

    def having(self, words: np.ndarray) -> np.ndarray:
        """How many slots have each word; the unknown, -1, has none."""
        return self._having.values[words]

    def read(self, term: str) -> tuple[np.ndarray, np.ndarray]:
        """Slots int64 and counts uint32, dropped slots among them."""
        word = self._number.get(term)
        packed = np.array(() if word is None else self._slots[word], np.uint32)
        return (packed >> _BITS).astype(np.int64), packed & _MOST

    def words(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all words of `slots`: whose they are (places in `slots`), numbers and counts."""
        ends = self._ends.values[slots]
        starts = np.where(slots > 0, self._ends.values[slots - 1], 0)
        lengths = ends - starts
        whose = np.repeat(np.arange(len(slots)), lengths)
        at = np.arange(len(whose)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        packed = self._words.values[at]
        return whose, (packed >> _BITS).astype(np.int64), packed & _MOST

    def drop(self, slots: np.ndarray) -> None:
        """Count the words of `slots` no more."""
        np.subtract.at(self._having.values, self.words(slots)[1], 1)

    def keep(self, kept: np.ndarray, moved: np.ndarray) -> None:
        """Only the slots `kept`, which have become `moved[kept]`; words keep their numbers."""
        for word, posting in enumerate(self._slots):
            packed = np.array(posting, np.uint32)
            slots = moved[packed >> _BITS]
            packed = slots << _BITS | (packed & _MOST)
            self._slots[word] = array("I", packed[slots >= 0].astype(np.uint32).tobytes())
        whose, words, counts = self.words(kept)
        lengths = np.bincount(whose, minlength=len(kept))
        self._words, self._ends = Column(np.uint32), Column(np.int64)
        self._words.append(words << _BITS | counts)
        self._ends.append(np.cumsum(lengths))


class Neighbours:
    """The order of slots within their sessions."""

    def __init__(self) -> None:
        # Slots, -1 for none; a column's unused last element is -1 too, so that -1 leads to -1.
        self._next, self._previous = Column(np.int32, -1), Column(np.int32, -1)
        self._chain = Column(np.int32, -1)
        self._chains: dict[tuple[int | str, str], int] = {}
        # Positions and, where they are equal, keys rise; slots go with them.
        self._members: list[tuple[array, array, array]] = []

    @property
    def nbytes(self) -> int:
        members = sum(sys.getsizeof(one) for member in self._members for one in member)
        columns = self._next.nbytes + self._previous.nbytes + self._chain.nbytes
        return members + columns + 200 * len(self._chains)

    def append(self, count: int) -> None:
        """Slots without neighbours."""
        for column in (self._next, self._previous, self._chain):
            column.append(np.full(count, -1))

    def link(self, slot: int, session: int | str, kind: str, position: int, key: int) -> None:
        """Put a slot into its place; `key` decides between equal positions."""
        chain = self._chains.setdefault((session, kind), len(self._chains))
        if chain == len(self._members):
            self._members.append((array("q"), array("q"), array("I")))
        positions, keys, slots = self._members[chain]
        end = bisect_right(positions, position)
        at = bisect_right(keys, key, bisect_left(positions, position, hi=end), end)
        positions.insert(at, position)
        keys.insert(at, key)
        slots.insert(at, slot)
        self._chain.values[slot] = chain
        self._join(slots[at - 1] if at else -1, slot)
        self._join(slot, slots[at + 1] if at + 1 < len(slots) else -1)

    def unlink(self, slot: int) -> None:
        chain = int(self._chain.values[slot])
        if chain < 0:
            return
        at = self._members[chain][-1].index(slot)
        for member in self._members[chain]:
            del member[at]
        self._join(int(self._previous.values[slot]), int(self._next.values[slot]))
        for column in (self._next, self._previous, self._chain):
            column.values[slot] = -1

    def _join(self, before: int, after: int) -> None:
        if before >= 0:
            self._next.values[before] = after
        if after >= 0:
            self._previous.values[after] = before

    def ahead(self, slots: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
        """The slots that hear those given, -1 for none, and by how much."""
        return self._walk(slots, self._next.values, self._previous.values)

    def behind(self, slots: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
        """The slots that those given hear, -1 for none, and by how much."""
        return self._walk(slots, self._previous.values, self._next.values)

    @staticmethod
    def _walk(
        slots: np.ndarray, ahead: np.ndarray, back: np.ndarray
    ) -> Iterator[tuple[np.ndarray, float]]:
        for step, weights in ((ahead, AHEAD), (back, BACK)):
            at = slots
            for weight in weights:
                at = step[at]
                yield at, weight

    def near(self, slots: np.ndarray) -> np.ndarray:
        """`slots` and all that hear them, rising."""
        found = np.unique(np.concatenate([slots, *(at for at, _ in self.ahead(slots))]))
        return found[found >= 0]

    def keep(self, kept: np.ndarray, moved: np.ndarray) -> None:
        """Only the slots `kept`, which have become `moved[kept]`."""
        for _, _, slots in self._members:
            slots[:] = array("I", moved[np.array(slots, np.int64)].tolist())
        for links in (self._next, self._previous):
            links.values[:-1] = moved[links.values[:-1]]
        for column in (self._next, self._previous, self._chain):
            column.keep(kept)
