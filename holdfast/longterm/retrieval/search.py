"""Find memories: an image of each space in RAM, kept up to date with the store; encode new ones.

The image is a cache: it is made from the store's rows, stamped with the space's last event, and
brought up to date from the log before each search, whoever wrote meanwhile.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.records import document
from holdfast.longterm.retrieval.corpus import Corpus, Doc, Scored, Stored
from holdfast.longterm.retrieval.vectors import AFTER, BEFORE, Embedder, Query
from holdfast.longterm.store.apply import Applied
from holdfast.longterm.store.schema import OWN, TOKENS, WINDOW
from holdfast.longterm.store.sqlite import Store, Transaction
from holdfast.longterm.work import Work

RAM = 512 << 20
_MANY = 500
_PAGE = 2048
_ROW = "version, position, session, kind, speaker, text, terms, valid_from"
_LIVE = "space = ? AND retired_at IS NULL AND searchable = 1"


@dataclass
class _Image:
    """A space's corpus, and up to which event and version it has been read."""

    corpus: Corpus
    seq: int = 0
    version: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


class Searcher:
    """Searches any space of a store with one embedder.

    Args:
        ram: bytes of all images together; those used longest ago are dropped first.
    """

    def __init__(self, store: Store, embedder: Embedder, ram: int = RAM):
        self.store, self.embedder, self.ram = store, embedder, ram
        self._images: OrderedDict[int, _Image] = OrderedDict()
        self._lock = threading.Lock()

    def model(self, transaction: Transaction) -> int:
        """The number under which the store keeps this embedder's vectors.

        Raises:
            UsageError: the store's vectors are another embedder's.
        """
        # Asked each time: another process may have changed over to another embedder.
        used = transaction.rows(
            "SELECT meta.value, model.id FROM meta LEFT JOIN model ON model.name = meta.value "
            "WHERE meta.key = 'embedder'"
        )
        if not used:
            return 0
        ((name, number),) = used
        if name != self.embedder.id:
            raise UsageError(
                f"this memory was embedded by {name}, not by {self.embedder.id}; open it "
                f"with that embedder, or change over: `holdfast memory reembed --embedder "
                f"{self.embedder.id}`"
            )
        return number or 0

    def claim(self, transaction: Transaction) -> int:
        """`model`, in a writing transaction: made where the store has none yet."""
        found = self.model(transaction)
        if found == 0:
            name = self.embedder.id
            transaction.run(
                "INSERT INTO model (name, dim) VALUES (?, ?) ON CONFLICT (name) DO NOTHING",
                (name, self.embedder.dim),
            )
            transaction.run("INSERT INTO meta (key, value) VALUES ('embedder', ?)", (name,))
            found = self.model(transaction)
        return found

    def search(
        self,
        transaction: Transaction,
        space: int,
        query: Query,
        limit: int,
        *,
        kinds: Sequence[str] | None = None,
        allow: Iterable[int] | None = None,
    ) -> list[Scored]:
        """Versions by hybrid score, best first."""
        model = self.model(transaction)
        image = self.sync(space)
        with image.lock:
            return image.corpus.search(
                query, limit, _keys(allow), self._fetch(transaction, model, query), kinds
            )

    def search_rows(
        self, transaction: Transaction, versions: Sequence[int], query: Query, limit: int
    ) -> list[Scored]:
        """Versions of any time, retired ones too, by hybrid score; an image is made for them."""
        rows: list[tuple] = []
        for start in range(0, len(versions), _MANY):
            some = list(versions[start : start + _MANY])
            rows += transaction.rows(
                f"SELECT {_ROW} FROM memory WHERE searchable = 1 AND version IN "
                f"({', '.join('?' * len(some))}) ORDER BY position",
                some,
            )
        corpus, model = self._empty(), self.model(transaction)
        own, window = (
            self.vectors(transaction, [row[0] for row in rows], part) for part in (OWN, WINDOW)
        )
        _fill(
            corpus,
            [(*row, own[row[0]], window[row[0]]) for row in rows if row[0] in own],
        )
        return corpus.search(query, limit, None, self._fetch(transaction, model, query))

    def _empty(self) -> Corpus:
        return Corpus(self.embedder.id, self.embedder.dim)

    def nearest(
        self,
        transaction: Transaction,
        space: int,
        vector: np.ndarray,
        limit: int,
        *,
        kinds: Sequence[str] | None = None,
        allow: Iterable[int] | None = None,
    ) -> list[tuple[int, float]]:
        """(version, cosine) of own vectors, highest first; cosines are exact."""
        if vector.shape != (self.embedder.dim,):
            raise UsageError(
                f"a vector of shape {vector.shape} was given, {self.embedder.id} has "
                f"{self.embedder.dim} dimensions"
            )
        image = self.sync(space)
        with image.lock:
            keys, _ = image.corpus.nearest(vector, 2 * limit + 8, _keys(allow), kinds)
        # The image holds short codes; what is returned is measured on the stored vectors.
        exact = self.vectors(transaction, [int(key) for key in keys])
        scored = [(key, float(own @ vector)) for key, own in exact.items()]
        return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:limit]

    def vectors(
        self, transaction: Transaction, versions: Sequence[int], part: int = OWN
    ) -> dict[int, np.ndarray]:
        """Stored vectors f32[dim] by version."""
        model = self.model(transaction)
        return {
            version: _vector(blob)
            for version, _, blob in _parts(transaction, model, (part,), versions)
        }

    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(image.corpus.nbytes() for image in self._images.values())

    def forget(self) -> None:
        """Drop all images; the next search makes its own anew."""
        with self._lock:
            self._images.clear()

    def _fetch(
        self, transaction: Transaction, model: int, query: Query
    ) -> Callable[[Sequence[int]], Mapping[int, Stored]]:
        # With token states a memory's own vector has no say.
        wanted = (OWN, WINDOW) if query.states is None else (WINDOW, TOKENS)

        def fetch(keys: Sequence[int]) -> Mapping[int, Stored]:
            found: dict[int, dict[int, bytes]] = {}
            for version, part, blob in _parts(transaction, model, wanted, keys):
                found.setdefault(version, {})[part] = blob
            return {
                version: Stored(
                    tokens=parts.get(TOKENS),
                    window=_vector(parts[WINDOW]),
                    own=_vector(parts[OWN]) if OWN in parts else None,
                )
                for version, parts in found.items()
            }

        return fetch

    def sync(self, space: int) -> _Image:
        """The image of a space, with all that has been committed.

        It is read through a reader of its own even while a transaction of this thread is open:
        what may yet be rolled back must not get into it.
        """
        with self._lock:
            image = self._images.get(space)
            if image is None:
                image = self._images[space] = _Image(self._empty())
            self._images.move_to_end(space)
        with image.lock, self.store.read() as transaction:
            rows = transaction.rows("SELECT seq FROM space WHERE id = ?", (space,))
            seq = rows[0][0] if rows else 0
            if seq > image.seq:
                self._catch_up(transaction, space, image)
                image.seq = seq
        with self._lock:
            while len(self._images) > 1 and self.nbytes() > self.ram:
                self._images.popitem(last=False)
        return image

    def _catch_up(self, transaction: Transaction, space: int, image: _Image) -> None:
        moved: list[tuple[str, str, int]] = []
        if image.seq:
            image.corpus.remove(sorted(self._gone(transaction, space, image.seq, moved)))
        known: set[int] = set()
        last = image.version
        for rows in self._pages(transaction, space, image.version):
            known.update(row[0] for row in rows)
            last = max(last, rows[-1][0])
            if image.seq:
                moved += [(row[3], row[2], row[1]) for row in rows if row[2] is not None]
            _fill(image.corpus, rows)
        image.version = last
        if image.seq:  # a first reading has every window as it is now
            beside = {
                row[0]
                for kind, session, position in moved
                for row in _around(
                    transaction, space, kind, session, position, position, max(BEFORE, AFTER)
                )
            }
            windows = self.vectors(transaction, sorted(beside - known), WINDOW)
            image.corpus.reframe(list(windows), np.array(list(windows.values())))

    def _pages(self, transaction: Transaction, space: int, after: int) -> Iterator[list[tuple]]:
        """Rows with their two vectors, a page at a time: all at once would take as much again."""
        model = self.model(transaction)
        columns = ", ".join(f"m.{name}" for name in _ROW.split(", "))
        while True:
            rows = transaction.rows(
                f"SELECT {columns}, o.bytes, w.bytes FROM memory m "
                "JOIN embedding o ON o.version = m.version AND o.model = ? AND o.part = ? "
                "JOIN embedding w ON w.version = m.version AND w.model = ? AND w.part = ? "
                # The plus keeps the space's index out of it: versions come in their own order.
                "WHERE m.version > ? AND +m.space = ? AND m.retired_at IS NULL "
                "AND m.searchable = 1 ORDER BY m.version LIMIT ?",
                (model, OWN, model, WINDOW, after, space, _PAGE),
            )
            if not rows:
                return
            yield rows
            after = rows[-1][0]

    def _gone(
        self,
        transaction: Transaction,
        space: int,
        seq: int,
        moved: list[tuple[str, str, int]],
    ) -> set[int]:
        gone: set[int] = set()
        for op, item, after in transaction.rows(
            "SELECT op, item, after FROM event WHERE space = ? AND seq > ? "
            "AND op IN ('revise', 'retire', 'purge')",
            (space, seq),
        ):
            if op == "purge":
                tombstone = json.loads(after)
                gone.update(tombstone["versions"])
                moved += [tuple(place) for place in tombstone["places"]]
                continue
            for version, kind, session, position in transaction.rows(
                "SELECT version, kind, session, position FROM memory "
                "WHERE id = ? AND retired_at IS NOT NULL",
                (item,),
            ):
                gone.add(version)
                if session is not None:
                    moved.append((kind, session, position))
        return gone

    def encode(self, transaction: Transaction, space: int, done: Applied, work: Work) -> None:
        """Write the vectors of what changed, and of the turns that stand beside it."""
        fresh = _rows(transaction, space, done.versions)
        # What has no session, or is of the past, stands alone.
        turns: dict[int, tuple[tuple[str, ...], int]] = {
            row[0]: ((document(row[4], row[5]),), 0) for row in fresh
        }
        for (kind, session), positions in _by_session(done.moved).items():
            # Far enough that the windows of the neighbours' neighbours are whole.
            rows = _around(
                transaction, space, kind, session, min(positions), max(positions),
                2 * (BEFORE + AFTER),
            )  # fmt: skip
            texts = [document(row[4], row[5]) for row in rows]
            places = np.array([row[1] for row in rows], np.int64)
            touched = set()
            for position in positions:
                at = int(np.searchsorted(places, position))
                touched.update(range(max(0, at - AFTER), min(len(rows), at + BEFORE + 1)))
            for i in sorted(touched):
                first, end = max(0, i - BEFORE), min(len(rows), i + AFTER + 1)
                turns[rows[i][0]] = (tuple(texts[first:end]), i - first)
            if done.purged:
                # Windows of past versions may still tell of a neighbour that is erased now.
                for row in transaction.rows(
                    f"SELECT {_ROW} FROM memory WHERE space = ? AND kind = ? AND session = ? "
                    "AND retired_at IS NOT NULL AND searchable = 1",
                    (space, kind, session),
                ):
                    turns[row[0]] = ((document(row[4], row[5]),), 0)
        own, windows = work.encode_both(
            [document(row[4], row[5]) for row in fresh], list(turns.values())
        )
        model = self.claim(transaction)
        parts: list[tuple[int, int, int, bytes]] = [
            (row[0], model, OWN, vector.astype(np.float32).tobytes())
            for row, vector in zip(fresh, own, strict=True)
        ]
        for version, found in zip(turns, windows, strict=True):
            parts.append((version, model, WINDOW, found.window.astype(np.float32).tobytes()))
            if found.tokens is not None:
                parts.append((version, model, TOKENS, found.tokens))
        transaction.many(
            "INSERT INTO embedding (version, model, part, bytes) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (version, model, part) DO UPDATE SET bytes = excluded.bytes",
            parts,
        )


def _fill(corpus: Corpus, rows: Sequence[tuple]) -> None:
    """Enter rows of `_ROW`, own vector, window vector."""
    corpus.add([
        Doc(
            version, position, session, kind, speaker, document(speaker, text),
            np.frombuffer(own, np.float32), np.frombuffer(window, np.float32), terms.split(), when,
        )
        for version, position, session, kind, speaker, text, terms, when, own, window in rows
    ])  # fmt: skip


def _keys(allow: Iterable[int] | None) -> np.ndarray | None:
    return None if allow is None else np.array(sorted(allow), np.int64)


def _vector(blob: bytes) -> np.ndarray:
    return np.frombuffer(blob, np.float32)


def _parts(
    transaction: Transaction, model: int, parts: Sequence[int], versions: Sequence[int]
) -> Iterator[tuple[int, int, bytes]]:
    """(version, part, bytes) of what is stored."""
    for start in range(0, len(versions), _MANY):
        some = [int(version) for version in versions[start : start + _MANY]]
        yield from transaction.rows(
            "SELECT version, part, bytes FROM embedding WHERE model = ? "
            f"AND part IN ({', '.join('?' * len(parts))}) "
            f"AND version IN ({', '.join('?' * len(some))})",
            [model, *parts, *some],
        )  # type: ignore[misc]


def _rows(transaction: Transaction, space: int, versions: Sequence[int]) -> list[tuple]:
    found: list[tuple] = []
    for start in range(0, len(versions), _MANY):
        some = list(versions[start : start + _MANY])
        found += transaction.rows(
            f"SELECT {_ROW} FROM memory WHERE space = ? AND searchable = 1 AND version IN "
            f"({', '.join('?' * len(some))}) ORDER BY version",
            [space, *some],
        )
    return found


def _around(
    transaction: Transaction,
    space: int,
    kind: str,
    session: str,
    first: int,
    last: int,
    reach: int,
) -> list[tuple]:
    """The rows of a session from `reach` before a position to `reach` after another, in order."""
    where = f"SELECT {_ROW} FROM memory WHERE {_LIVE} AND kind = ? AND session = ? AND position "
    args = [space, kind, session]
    before = transaction.rows(where + "< ? ORDER BY position DESC LIMIT ?", [*args, first, reach])
    within = transaction.rows(where + "BETWEEN ? AND ? ORDER BY position", [*args, first, last])
    after = transaction.rows(where + "> ? ORDER BY position LIMIT ?", [*args, last, reach])
    return [*reversed(before), *within, *after]


def _by_session(
    moved: Iterable[tuple[str, str, int]],
) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for kind, session, position in moved:
        found.setdefault((kind, session), []).append(position)
    return found
