"""An index of vectors in PostgreSQL (pgvector): shared by all clients, in the RAM of none.

Keeps    unit vectors by id, in a table of their own beside a memory's tables.
Form     fp32 rows, and a graph over them (HNSW) for up to 2,000 dimensions.
Bytes    4*d + 8 per row, and about as much again for the graph; `nbytes` asks the server.
Departs  pgvector filters what the graph has found, and so finds too few; where only some ids are
         allowed, all of these are compared instead, and the answer is exact.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.retrieval.index import _check_query, _check_rows
from holdfast.longterm.store.postgres import PostgresStore
from holdfast.longterm.store.postgres_session import psycopg
from holdfast.longterm.store.schema import OWN

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory

_BATCH = 2000
_GRAPH = 2000  # dimensions that pgvector makes a graph of
_BEAM = 1000  # candidates that it keeps in one search at most


class PgVector:
    """Vectors found by cosine, by the server.

    Args:
        store: where; the table is one of its schema.
        name: of the table, which is made where it is not.
        dim: of the vectors.
        beam: candidates that a search keeps; more find more and take longer.

    Raises:
        UsageError: a beam that is out of range; the server has no pgvector, or this user may not
            create the extension.
    """

    def __init__(self, store: PostgresStore, name: str, dim: int, *, beam: int = 100):
        if not 1 <= beam <= _BEAM:
            raise UsageError(f"beam={beam} is outside 1..{_BEAM}, which is what pgvector can keep")
        self._store, self._dim, self._beam = store, dim, beam
        self._table = f"{store.schema}.{name}"
        with store.session() as connection:
            found = _extension(connection) or _created(connection)
            self._type, self._far = f"{found}.vector", f"OPERATOR({found}.<=>)"
            self._order = f"{found}.vector_cosine_ops"
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {self._table} "
                f"(id BIGINT PRIMARY KEY, v {self._type}({dim}) NOT NULL)"
            )
            # A sample of vectors would be of no use to the planner.
            connection.execute(f"ALTER TABLE {self._table} ALTER COLUMN v SET STATISTICS 0")

    @property
    def dim(self) -> int:
        return self._dim

    def __len__(self) -> int:
        with self._store.read() as sql:
            return sql.rows(f"SELECT count(*) FROM {self._table}")[0][0]

    def nbytes(self) -> int:
        """Bytes on the server."""
        with self._store.read() as sql:
            return sql.rows("SELECT pg_total_relation_size(?::text::regclass)", [self._table])[0][0]

    def add(self, ids: np.ndarray, X: np.ndarray) -> None:
        """Take in rows f32[n,dim]; an id that is here already gets the new vector."""
        X = np.asarray(X, np.float32)
        _check_rows(ids, X, self.dim)
        self.fill([(ids, X)])

    def fill(self, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """`add` for many (ids, rows): the graph of an empty index is made when all are in."""
        with self._store.session() as connection:
            for ids, X in blocks:
                texts = map(str, X.tolist())
                with connection.transaction():
                    connection.cursor().executemany(
                        f"INSERT INTO {self._table} (id, v) VALUES (%s, %s::{self._type}) "
                        "ON CONFLICT (id) DO UPDATE SET v = excluded.v",
                        zip(np.asarray(ids).tolist(), texts, strict=True),
                    )
            if self.dim <= _GRAPH:
                connection.execute(
                    f"CREATE INDEX IF NOT EXISTS {self._table.split('.')[1]}_graph "
                    f"ON {self._table} USING hnsw (v {self._order})"
                )

    def remove(self, ids: np.ndarray) -> None:
        """Forget ids; unknown ones are ignored."""
        with self._store.session() as connection:
            connection.execute(
                f"DELETE FROM {self._table} WHERE id = ANY(%s)", (np.asarray(ids).tolist(),)
            )

    def search(
        self, q: np.ndarray, k: int, allow: Iterable[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64[<=k] and cosines f32, highest first, of those allowed."""
        _check_query(q, k, self.dim)
        vector = str(np.asarray(q, np.float32).tolist())
        where, args = self._table, [vector]
        if allow is not None:
            where = f"(SELECT id, v FROM {self._table} WHERE id = ANY(?) OFFSET 0) AS allowed"
            args.append([int(name) for name in allow])
        with self._store.read() as sql:
            if k > _BEAM:
                sql.rows("SELECT set_config('enable_indexscan', 'off', true)")
            else:
                sql.rows("SELECT set_config('hnsw.ef_search', ?, true)", [str(max(k, self._beam))])
            rows = sql.rows(
                f"SELECT id, 1 - (v {self._far} ?::{self._type}) FROM {where} "
                f"ORDER BY v {self._far} ?::{self._type} LIMIT ?",
                [*args, vector, k],
            )
        ids = np.array([name for name, _ in rows], np.int64)
        cosines = np.array([cosine for _, cosine in rows], np.float32)
        order = np.lexsort((ids, -cosines))
        return ids[order], cosines[order]


def own_vectors(memory: "Memory", *, beam: int = 100) -> PgVector:
    """The index of all current memories' own vectors, by version, brought up to date.

    Calling it again takes in what is new, and drops what is not current any more, a purged
    memory's vector too.

    Raises:
        UsageError: the memory is not in PostgreSQL, or its vectors are another embedder's.
    """
    store = memory.store
    if not isinstance(store, PostgresStore):
        raise UsageError(
            f"{store.url} is not in PostgreSQL; open the memory by a postgresql:// URL"
        )
    with store.write() as sql:
        model = memory.searcher.claim(sql)
    made = PgVector(store, f"own_{model}", memory.embedder.dim, beam=beam)
    live = "m.retired_at IS NULL AND m.searchable = 1"
    with store.session() as connection:
        connection.execute(
            f"DELETE FROM {made._table} t WHERE NOT EXISTS "
            f"(SELECT 1 FROM memory m WHERE m.version = t.id AND {live})"
        )
    with store.read() as sql:
        new = [
            version
            for (version,) in sql.rows(
                f"SELECT m.version FROM memory m JOIN embedding e ON e.version = m.version WHERE "
                f"{live} AND e.model = ? AND e.part = ? AND NOT EXISTS "
                f"(SELECT 1 FROM {made._table} t WHERE t.id = m.version) ORDER BY m.version",
                (model, OWN),
            )
        ]

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start in range(0, len(new), _BATCH):
                found = memory.searcher.vectors(sql, new[start : start + _BATCH])
                yield np.array(list(found), np.int64), np.array(list(found.values()))

        made.fill(blocks())
    return made


def _extension(connection: psycopg.Connection) -> str | None:
    """The schema that pgvector is in."""
    found = connection.execute(
        "SELECT quote_ident(n.nspname) FROM pg_extension e "
        "JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    ).fetchall()
    return found[0][0] if found else None


def _created(connection: psycopg.Connection) -> str:
    try:
        # Not among the memory's own tables: it serves the whole database.
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.FeatureNotSupported) as error:
        raise UsageError(
            f"there is no pgvector in this database ({str(error).splitlines()[0]}); install it on "
            "the server, and let an administrator run CREATE EXTENSION vector"
        ) from error
    return _extension(connection) or "public"
