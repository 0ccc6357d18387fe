"""An embedder whose encodings are kept in a file, for comparisons that need the same ones often."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from holdfast.longterm.retrieval.vectors import Embedder, InContext, Query


class Kept:
    """`embedder`, each of whose encodings is made once and then read from `file`."""

    def __init__(self, embedder: Embedder, file: Path):
        self.embedder, self.id = embedder, embedder.id
        if hasattr(embedder, "count"):
            self.count: Callable[[str], int] = embedder.count
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._sql = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = OFF")
        self._sql.execute("CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB)")

    @property
    def dim(self) -> int:
        return self.embedder.dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return self.embedder.encode(texts)

        def make(missing: list[int]) -> list[bytes]:
            return [row.tobytes() for row in self.embedder.encode([texts[i] for i in missing])]

        blobs = self._kept([("own", text) for text in texts], make)
        return np.stack([np.frombuffer(blob, np.float32) for blob in blobs])

    def encode_in_context(self, texts: Sequence[str], at: Sequence[int]) -> list[InContext]:
        def make(missing: list[int]) -> list[bytes]:
            found = self.embedder.encode_in_context(texts, [at[i] for i in missing])
            return [one.window.tobytes() + (one.tokens or b"") for one in found]

        # What lies further away than a window reaches changes nothing; the key holds all the same.
        asked = [("turn", *texts[max(0, i - 3) : i + 4], str(min(i, 3))) for i in at]
        size = 4 * self.dim
        return [
            InContext(np.frombuffer(blob[:size], np.float32), blob[size:] or None)
            for blob in self._kept(asked, make)
        ]

    def encode_query(self, text: str) -> Query:
        def make(_: list[int]) -> list[bytes]:
            query = self.embedder.encode_query(text)
            states = b"" if query.states is None else query.states.astype(np.float32).tobytes()
            head = json.dumps([query.words, len(states)]).encode()
            return [len(head).to_bytes(4, "little") + head + states + query.vector.tobytes()]

        (blob,) = self._kept([("query", text)], make)
        end = 4 + int.from_bytes(blob[:4], "little")
        words, size = json.loads(blob[4:end])
        states = None
        if words is not None:
            states = np.frombuffer(blob[end : end + size], np.float32).reshape(-1, self.dim)
        return Query(text, np.frombuffer(blob[end + size :], np.float32), states, words)

    def _kept(
        self, asked: list[tuple[str, ...]], make: Callable[[list[int]], list[bytes]]
    ) -> list[bytes]:
        keys = [_key(self.id, *one) for one in asked]
        with self._lock:
            found: dict[bytes, bytes] = {}
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                marks = ", ".join("?" * len(some))
                found.update(
                    self._sql.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", some)
                )
            missing = [i for i, key in enumerate(keys) if key not in found]
            if missing:
                made = list(zip((keys[i] for i in missing), make(missing), strict=True))
                found.update(made)
                self._sql.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", made)
        return [found[key] for key in keys]


def _key(*parts: str) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
