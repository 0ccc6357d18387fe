"""A consistent reading of one space: all that a policy sees before it decides."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Judgement
from holdfast.longterm.records import Edge, Event, Hit, Item, Source, Space, micros, moment
from holdfast.longterm.retrieval.search import Searcher
from holdfast.longterm.store.rows import made_from
from holdfast.longterm.store.sqlite import Transaction
from holdfast.longterm.work import Work

_ITEM = (
    "version, id, kind, text, speaker, session, position, data, metadata, valid_from, valid_to, "
    "recorded_at, retired_at, strength, uses, used_at"
)
_EDGE = "id, src, rel, dst, data, valid_from, valid_to, recorded_at, retired_at"
_MANY = 500  # ids in one SQL statement


class View:
    """One space as it is in one transaction.

    Attributes:
        space: whose memories these are.
        now: the clock, once for the whole call.
        judgement: typed calls that need understanding; rules, or a language model where there is
            one.
    """

    def __init__(
        self,
        transaction: Transaction,
        space: Space,
        space_id: int,
        *,
        now: datetime,
        searcher: Searcher,
        work: Work,
        judgement: Judgement,
    ):
        self.space, self.now, self.judgement = space, now, judgement
        self._sql, self._space_id = transaction, space_id
        self._searcher, self._work = searcher, work

    @property
    def embedder(self) -> str:
        """The id of the embedder that vectors are of."""
        return self._searcher.embedder.id

    def get(self, item: str) -> Item | None:
        """The current version of a memory, or None."""
        return self.get_many([item]).get(item)

    def get_many(self, items: Iterable[str]) -> dict[str, Item]:
        """Current versions by id, in the order asked for; ids that are not current are left out."""
        wanted, found = list(dict.fromkeys(items)), {}
        for start in range(0, len(wanted), _MANY):
            some = wanted[start : start + _MANY]
            for item in self._items(
                f"id IN ({', '.join('?' * len(some))}) AND retired_at IS NULL", some
            ):
                found[item.id] = item
        return {item: found[item] for item in wanted if item in found}

    def items(
        self,
        *,
        kind: str | None = None,
        session: str | None = None,
        shelf: str | None = None,
        newest: bool = False,
        limit: int | None = None,
        after: int = 0,
    ) -> list[Item]:
        """Current memories in the order in which they came in, or newest first.

        Args:
            shelf: only those whose `data["shelf"]` is this; give their kind too.
            after: leaves out positions up to this one, for paging; with `newest`, positions from
                this one on, where it is not 0.
        """
        among = {"kind": kind, "session": session, "shelf": shelf}
        return self._page("retired_at IS NULL", [], among, newest=newest, limit=limit, after=after)

    def as_of(
        self,
        valid: datetime | None,
        recorded: datetime | None,
        *,
        kind: str | None = None,
        session: str | None = None,
        newest: bool = False,
        limit: int | None = None,
        after: int = 0,
    ) -> list[Item]:
        """What held in the world at `valid`, as this space knew it at `recorded`; None is now.

        The other arguments are those of `items`.
        """
        seen = micros(recorded or self.now, "recorded")
        holds = micros(valid or recorded or self.now, "valid")
        return self._page(
            "recorded_at <= ? AND (retired_at IS NULL OR retired_at > ?) "
            "AND (valid_from IS NULL OR valid_from <= ?) AND (valid_to IS NULL OR valid_to > ?)",
            [seen, seen, holds, holds],
            {"kind": kind, "session": session},
            newest=newest, limit=limit, after=after,
        )  # fmt: skip

    def _page(
        self,
        where: str,
        args: list[Any],
        among: Mapping[str, str | None],
        *,
        newest: bool,
        limit: int | None,
        after: int,
    ) -> list[Item]:
        for name, value in among.items():
            if value is not None:
                where += f" AND {name} = ?"
                args.append(value)
        if after:
            where += f" AND position {'<' if newest else '>'} ?"
            args.append(after)
        tail = f"ORDER BY position {'DESC' if newest else 'ASC'}"
        if limit is not None:
            tail += " LIMIT ?"
            args.append(limit)
        return self._items(where, args, tail)

    def versions(self, item: str) -> list[Item]:
        """All versions of a memory, oldest first."""
        return self._items("id = ?", [item], "ORDER BY version")

    def with_text(self, hash_: bytes) -> list[Item]:
        """Current memories whose text has this `records.text_hash`."""
        return self._items("text_hash = ? AND retired_at IS NULL", [hash_], "ORDER BY position")

    def _items(self, where: str, args: Sequence[Any], tail: str = "") -> list[Item]:
        rows = self._sql.rows(
            f"SELECT {_ITEM} FROM memory WHERE {'+' if ' IN (' in where else ''}space = ? "
            f"AND {where} {tail}",
            [self._space_id, *args],
        )
        return [_item(self.space, row) for row in rows]

    def kinds(self) -> list[str]:
        """The kinds that current memories have."""
        rows = self._sql.rows(
            "SELECT DISTINCT kind FROM memory WHERE space = ? AND retired_at IS NULL ORDER BY kind",
            [self._space_id],
        )
        return [kind for (kind,) in rows]

    def count(self, kind: str | None = None) -> int:
        """How many current memories there are."""
        more, args = (" AND kind = ?", [kind]) if kind is not None else ("", [])
        return self._sql.rows(
            f"SELECT count(*) FROM memory WHERE space = ? AND retired_at IS NULL{more}",
            [self._space_id, *args],
        )[0][0]

    def edges(
        self, *, src: str | None = None, dst: str | None = None, rel: str | None = None
    ) -> list[Edge]:
        """Current edges, in the order in which they were recorded."""
        where, args = ["retired_at IS NULL"], []
        for name, value in (("src", src), ("dst", dst), ("rel", rel)):
            if value is not None:
                where.append(f"{name} = ?")
                args.append(value)
        return self._edges(" AND ".join(where), args)

    def edges_of(self, items: Collection[str]) -> list[Edge]:
        """Current edges from or to any of some memories, in the order of their recording."""
        found: dict[str, Edge] = {}
        wanted = list(items)
        for start in range(0, len(wanted), _MANY):
            some = wanted[start : start + _MANY]
            for end in ("src", "dst"):
                where = f"{end} IN ({', '.join('?' * len(some))}) AND retired_at IS NULL"
                found.update((edge.id, edge) for edge in self._edges(where, some))
        return sorted(found.values(), key=lambda edge: (edge.recorded_at, edge.id))

    def _edges(self, where: str, args: Sequence[Any]) -> list[Edge]:
        rows = self._sql.rows(
            f"SELECT {_EDGE} FROM edge WHERE space = ? AND {where} ORDER BY recorded_at, id",
            [self._space_id, *args],
        )
        return [
            Edge(i, src, rel, dst, json.loads(data), *map(moment, times))  # type: ignore[arg-type]
            for i, src, rel, dst, data, *times in rows
        ]

    def sources(self, items: Sequence[str]) -> dict[str, tuple[Source, ...]]:
        """What each memory was made from."""
        found: dict[str, list[Source]] = {item: [] for item in items}
        for start in range(0, len(items), _MANY):
            some = list(items[start : start + _MANY])
            for memory, *source in self._sql.rows(
                "SELECT memory, origin, start_byte, end_byte FROM source "
                f"WHERE memory IN ({', '.join('?' * len(some))}) "
                "ORDER BY origin, start_byte NULLS FIRST, end_byte NULLS FIRST",
                some,
            ):
                found[memory].append(Source(*source))
        return {item: tuple(sources) for item, sources in found.items()}

    def derived(self, items: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """What was made from each memory, current or not."""
        found: dict[str, list[str]] = {item: [] for item in items}
        for start in range(0, len(items), _MANY):
            some = list(items[start : start + _MANY])
            for origin, memory in self._sql.rows(
                "SELECT DISTINCT origin, memory FROM source "
                f"WHERE origin IN ({', '.join('?' * len(some))}) ORDER BY memory",
                some,
            ):
                found[origin].append(memory)
        return {item: tuple(made) for item, made in found.items()}

    def made_of(self, item: str) -> list[str]:
        """All that was made from a memory, directly or not: what a purge takes along."""
        return made_from(self._sql, item)

    def events(self, item: str | None = None, *, after: int = 0, limit: int | None = None):
        """The log, of one memory or of the space, oldest first."""
        where, args = "seq > ?", [after]
        if item is not None:
            where, args = f"{where} AND item = ?", [*args, item]
        tail = "" if limit is None else f" LIMIT {int(limit)}"
        rows = self._sql.rows(
            "SELECT seq, time, actor, op, item, before, after, why FROM event "
            f"WHERE space = ? AND {where} ORDER BY seq{tail}",
            [self._space_id, *args],
        )
        return [
            Event(
                seq, moment(time), actor, op, name,  # type: ignore[arg-type]
                None if old is None else json.loads(old), None if new is None else json.loads(new),
                why,
            )
            for seq, time, actor, op, name, old, new, why in rows
        ]  # fmt: skip

    def search(
        self,
        query: str,
        limit: int = 10,
        *,
        kinds: Sequence[str] | None = None,
        among: Iterable[str] | None = None,
    ) -> list[Hit]:
        """Hybrid search, best first.

        Args:
            kinds: only memories of these kinds.
            among: only memories of these ids.
        """
        if limit < 1:
            raise UsageError(f"limit={limit} is not positive; ask for at least one memory")
        encoded = self._work.query(query)
        allow = None if among is None else {i.version for i in self.get_many(among).values()}
        scored = self._searcher.search(
            self._sql, self._space_id, encoded, limit, kinds=kinds, allow=allow
        )
        items = self._by_version([s.key for s in scored])
        return self.hits([(items[s.key], s.score, s.terms) for s in scored if s.key in items])

    def search_items(self, query: str, items: Sequence[Item], limit: int) -> list[Hit]:
        """Hybrid search among versions of any time, best first."""
        by_version = {item.version: item for item in items}
        scored = self._searcher.search_rows(
            self._sql, list(by_version), self._work.query(query), limit
        )
        return self.hits([(by_version[s.key], s.score, s.terms) for s in scored])

    def nearest(
        self,
        to: str | np.ndarray,
        limit: int,
        *,
        kinds: Sequence[str] | None = None,
        among: Iterable[str] | None = None,
    ) -> list[tuple[Item, float]]:
        """Memories by the cosine of their own vector to a text's or to a vector, highest first."""
        vector = self.embed([to])[0] if isinstance(to, str) else np.asarray(to, np.float32)
        allow = None if among is None else {i.version for i in self.get_many(among).values()}
        found = self._searcher.nearest(
            self._sql, self._space_id, vector, limit, kinds=kinds, allow=allow
        )
        items = self._by_version([key for key, _ in found])
        return [(items[key], cosine) for key, cosine in found if key in items]

    def _by_version(self, versions: Sequence[int]) -> dict[int, Item]:
        found = {}
        for start in range(0, len(versions), _MANY):
            some = list(versions[start : start + _MANY])
            for item in self._items(
                f"version IN ({', '.join('?' * len(some))}) AND retired_at IS NULL", some
            ):
                found[item.version] = item
        return found

    def hits(self, scored: Sequence[tuple[Item, float, dict[str, float]]]) -> list[Hit]:
        """Hits of items with their scores and what these are made of."""
        sources = self.sources([item.id for item, _, _ in scored])
        return [hit_of(item, score, terms, sources[item.id]) for item, score, terms in scored]

    def with_neighbours(self, hits: Sequence[Hit], reach: int) -> list[Hit]:
        """Hits, and behind them what stands up to `reach` places from them in their sessions."""
        known = {hit.id for hit in hits}
        near = {
            item.id: item
            for hit in hits
            if hit.session is not None
            for newest in (True, False)
            for item in self.items(
                session=hit.session, kind=hit.kind, limit=reach, after=hit.position, newest=newest
            )
        }
        return [*hits, *self.hits([(item, 0.0, {}) for i, item in near.items() if i not in known])]

    def vector(self, item: str) -> np.ndarray | None:
        """The stored vector of a memory's own text, f32[dim]; None if it is not searched."""
        found = self.get(item)
        if found is None:
            return None
        return self._searcher.vectors(self._sql, [found.version]).get(found.version)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors f32[n,dim] of any texts."""
        return self._work.encode(texts)


def hit_of(item: Item, score: float, terms: dict[str, float], sources=()) -> Hit:
    return Hit(
        item.id, item.text, score, item.metadata, item.valid_from, item.valid_to, sources,
        item.kind, item.speaker, item.session, item.position, item.recorded_at, terms,
    )  # fmt: skip


def _item(space: Space, row: Sequence[Any]) -> Item:
    version, name, kind, text, speaker, session, position, data, metadata, *rest = row
    first, last, recorded, retired, strength, uses, used = rest
    return Item(
        version, name, space, kind, text, speaker, session, position, json.loads(data),
        json.loads(metadata), moment(first), moment(last),
        moment(recorded), moment(retired), strength, uses, moment(used),  # type: ignore[arg-type]
    )  # fmt: skip
