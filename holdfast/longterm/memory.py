"""`Memory`: one durable memory for every agent, whatever policy decides what it keeps."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError
from holdfast.longterm.budget import Context, words
from holdfast.longterm.echoes import without_echoes
from holdfast.longterm.ground import Answer
from holdfast.longterm.ground import ask as ask_source
from holdfast.longterm.language.support import REACH
from holdfast.longterm.opened import Opened, SpaceLike, in_space
from holdfast.longterm.records import (
    Change,
    Event,
    Hit,
    Item,
    Purge,
    Retire,
    Touch,
    Turn,
    micros,
    turns_of,
)
from holdfast.longterm.retrieval.embed import Query
from holdfast.longterm.store import maintain, transfer
from holdfast.longterm.store.apply import Applier
from holdfast.longterm.store.view import View


class Memory(Opened):
    """A durable memory in one file, or in PostgreSQL.

    Args:
        path_or_url: a file, `sqlite:///file`, ":memory:", or `postgresql://user@host/database`.
        policy: what decides what is kept and recalled: a name (`holdfast memory policies` lists
            them) or a `Policy`.
        embedder: turns text into vectors; default: the one that the file was written with, else
            MiniLM where it is installed, else hashes of words.
        llm: asked at most once per `add` by policies that can use one; nothing needs it.
        clock: tells the time as an aware datetime.
        durability: "full" syncs each commit to the disk, "process" survives kill -9 but may lose
            the last commits in a power cut.
        space: whose memories are meant where a call names none.
        actor: who is noted as the author of changes.

    Every method takes `space=` (a text `user` or `tenant/user/agent/run`, or a `Space`), or mem0's
    `user_id=`, `agent_id=`, `run_id=`.
    """

    @in_space
    def add(
        self,
        content: str | Turn | Mapping[str, Any] | Iterable[str | Turn | Mapping[str, Any]],
        *,
        when: datetime | None = None,
        session: str | None = None,
        kind: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        space: SpaceLike = None,
    ) -> list[str]:
        """Remember a text, a fact, or a list of chat messages; returns the ids concerned.

        All of one call is stored, or nothing. What was stored before is touched, not stored twice,
        and lines that `context` handed out are recognised as what they are.

        Args:
            content: a text, `{"role": ..., "content": ...}`, or a list of these.
            when: the world's time at which it held or was said; default: now.
            session: the conversation that it belongs to; its turns are read in context.
            kind: "fact" by default for texts without a session, "turn" for messages.
            metadata: anything that JSON can hold; comes back with every hit.

        Raises:
            UsageError: nothing to remember, or a time without zone.
        """
        turns = turns_of(content, when=when, session=session, kind=kind, metadata=metadata)
        return self._transact(lambda view, applier: self._add(view, applier, turns), space)

    def _add(self, view: View, applier: Applier, turns: Sequence[Turn]) -> list[str]:
        echoes: list[Change] = []
        fresh: list[Turn] = []
        for turn in turns:
            rest, known = without_echoes(view, turn)
            echoes += [Touch(item) for item in known]
            if rest is not None:
                fresh.append(replace(turn, text=rest, when=turn.when or view.now))
        ids = applier.apply(echoes)
        if fresh:
            ids += applier.apply(self.policy.write(view, fresh))
            self._link(view, applier)
        return list(dict.fromkeys(ids))

    def _link(self, view: View, applier: Applier) -> None:
        """Let the policy relate what has been added; what that adds is not linked again."""
        added = view.get_many(applier.done.added)
        if added:
            applier.apply(self.policy.link(view, list(added.values())))

    @in_space
    def search(
        self,
        query: str,
        *,
        limit: int = 10,
        filters: Mapping[str, Any] | None = None,
        kinds: Sequence[str] | None = None,
        valid: datetime | None = None,
        recorded: datetime | None = None,
        encoded: Query | None = None,
        space: SpaceLike = None,
    ) -> list[Hit]:
        """The memories that answer a query best, best first.

        Args:
            filters: metadata that a memory must have, by name and value.
            kinds: only memories of these kinds.
            valid, recorded: search what held then, as it was known then, instead of now.
            encoded: `embedder.encode_query(query)`, where the caller has it already.

        Raises:
            UsageError: an empty query, a limit below 1, or a time without zone.
        """
        if not query.strip():
            raise UsageError("the query is empty; ask for something")
        if limit < 1:
            raise UsageError(f"limit={limit} is not positive; ask for at least one memory")
        if valid is not None or recorded is not None or filters or kinds:
            return self._search_some(query, limit, filters, kinds, valid, recorded, space, encoded)
        with self.reading(space=space, encoded=encoded) as view:
            hits = self.policy.retrieve(view, query, limit)[:limit]
            changes = self.policy.recalled(view, hits)
        if changes:
            self._transact(lambda _, applier: applier.apply(_still(applier, changes)), space)
        return hits

    def _search_some(self, query, limit, filters, kinds, valid, recorded, space, encoded):
        """Restricted searches rank with the searcher itself, whatever the policy recalls."""
        with self.reading(space=space, encoded=encoded) as view:
            if valid is None and recorded is None:
                among = None
                if filters:
                    among = [i.id for i in view.items() if _has(i.metadata, filters)]
                return view.search(query, limit, kinds=kinds, among=among)
            items = [
                item
                for item in view.as_of(valid, recorded)
                if _has(item.metadata, filters or {}) and (not kinds or item.kind in kinds)
            ]
            return view.search_items(query, items, limit)

    @in_space
    def context(
        self,
        query: str,
        budget: int = 1000,
        *,
        count: Callable[[str], int] | None = None,
        encoded: Query | None = None,
        space: SpaceLike = None,
    ) -> Context:
        """Memories for a prompt, as one text of at most `budget` tokens.

        Args:
            count: tokens of a text; default: words and punctuation marks.
        """
        with self.reading(space=space, encoded=encoded) as view:
            made = self.policy.compose(view, query, budget, count or words)
            hits = view.hits([(i, 0.0, {}) for i in view.get_many(made.ids).values()])
            changes = self.policy.recalled(view, hits)
        if changes:
            self._transact(lambda _, applier: applier.apply(_still(applier, changes)), space)
        return made

    @in_space
    def ask(
        self,
        question: str,
        *,
        abstain: bool = True,
        limit: int = 10,
        encoded: Query | None = None,
        space: SpaceLike = None,
    ) -> Answer:
        """Answer from this memory, with citations: in a model's words, or with what was said.

        Hits are read together with the turns before and after them. A citation names a memory, a
        byte range and a hash; `ground.resolve` says whether they still stand there.

        Args:
            abstain: answer "not in memory" where nothing found covers the question.
            limit: hits to answer from.

        Raises:
            UsageError: an empty question, or a limit below 1.
        """

        def found(query: str, k: int) -> list[Hit]:
            hits = self.search(query, limit=k, encoded=encoded, space=space)
            with self.reading(space=space) as view:
                return view.with_neighbours(hits, REACH)

        return ask_source(found, question, self.llm, abstain=abstain, k=limit)

    @in_space
    def get(self, memory_id: str, *, space: SpaceLike = None) -> Item | None:
        """A memory as it is now, or None."""
        with self.reading(space=space) as view:
            return view.get(memory_id)

    @in_space
    def get_all(
        self,
        *,
        kind: str | None = None,
        session: str | None = None,
        filters: Mapping[str, Any] | None = None,
        limit: int = 100,
        after: int = 0,
        newest: bool = False,
        space: SpaceLike = None,
    ) -> list[Item]:
        """A page of current memories; `after=page[-1].position` asks for the next one."""
        with self.reading(space=space) as view:
            page = functools.partial(view.items, kind=kind, session=session, newest=newest)
            return _having(filters or {}, page, limit, after)

    @in_space
    def update(self, memory_id: str, text: str, *, space: SpaceLike = None) -> None:
        """Correct a memory; what it said before stays in its history.

        Raises:
            UsageError: there is no such memory, or the text is empty.
        """

        def decide(view: View, applier: Applier) -> None:
            item = view.get(memory_id)
            if item is None:
                raise UsageError(
                    f"cannot update {memory_id}: there is no such memory now in space {view.space}"
                )
            if not text.strip():
                raise UsageError(f"{memory_id} cannot be updated to an empty text; delete it")
            applier.apply(self.policy.update(view, item, text))
            self._link(view, applier)

        self._transact(decide, space)

    @in_space
    def delete(self, memory_id: str, *, why: str = "deleted", space: SpaceLike = None) -> None:
        """Retire a memory: no longer found, still in the history; `purge` erases.

        Raises:
            UsageError: there is no such memory.
        """

        def decide(view: View, applier: Applier) -> None:
            applier.apply([Retire(memory_id, why)])
            applier.apply(self.policy.removed(view, [memory_id], purged=False))

        self._transact(decide, space)

    @in_space
    def purge(self, memory_id: str, *, why: str = "", space: SpaceLike = None) -> list[str]:
        """Erase a memory and all that was made from it, its text in the log included.

        Returns the ids that are gone; tombstones without text remain in the log. When it returns,
        the text is in neither the file nor its write-ahead log.

        Raises:
            UsageError: there never was such a memory.
        """

        def decide(view: View, applier: Applier) -> list[str]:
            applier.apply([Purge(memory_id, why)])
            gone = list(applier.done.purged)
            applier.apply(self.policy.removed(view, gone, purged=True))
            return gone

        gone = self._transact(decide, space)
        self.store.shred()
        return gone

    @in_space
    def history(self, memory_id: str, *, space: SpaceLike = None) -> list[Event]:
        """All that happened to a memory, oldest first."""
        with self.reading(space=space) as view:
            return view.events(memory_id)

    @in_space
    def as_of(
        self,
        valid: datetime | None = None,
        recorded: datetime | None = None,
        *,
        kind: str | None = None,
        session: str | None = None,
        filters: Mapping[str, Any] | None = None,
        limit: int | None = None,
        after: int = 0,
        newest: bool = False,
        space: SpaceLike = None,
    ) -> list[Item]:
        """What held at `valid`, as this memory knew it at `recorded`; with `limit` a page of it."""
        with self.reading(space=space) as view:
            page = functools.partial(
                view.as_of, valid, recorded, kind=kind, session=session, newest=newest
            )
            return _having(filters or {}, page, limit, after)

    @in_space
    def forget(
        self, at: datetime | None = None, *, dry_run: bool = False, space: SpaceLike = None
    ) -> list[Change]:
        """Let the policy forget; returns what it retires (or would, with `dry_run`)."""
        micros(at, "at")
        if dry_run:
            with self.reading(space=space) as view:
                return self.policy.forget(view, at or view.now)

        def decide(view: View, applier: Applier) -> list[Change]:
            changes = self.policy.forget(view, at or view.now)
            applier.apply(changes)
            return changes

        return self._transact(decide, space)

    @in_space
    def summarise(self, session: str | None = None, *, space: SpaceLike = None) -> list[str]:
        """Tell the policy that a session has ended; returns the ids of what it made of it."""

        def decide(view: View, applier: Applier) -> list[str]:
            ids = applier.apply(self.policy.summarise(view, session))
            self._link(view, applier)
            return ids

        return self._transact(decide, space)

    @in_space
    def export(self, file: str | os.PathLike[str], *, space: SpaceLike = None) -> dict[str, Any]:
        """Write one space as JSON lines, log and past versions included; returns counts, digest."""
        with self.store.read() as transaction:
            return transfer.export(transaction, space, Path(file))

    @in_space
    def import_(
        self,
        file: str | os.PathLike[str],
        *,
        format: str = "holdfast",
        space: SpaceLike = None,
    ) -> dict[str, int]:
        """Read what `export` wrote, or another library's export; doing it twice changes nothing.

        Raises:
            UsageError: the file is damaged, or this space's log is neither a beginning of the
                file's nor goes on from it; another, empty space takes it.
        """
        counts = transfer.import_(self, Path(file), format, space)
        self.store.shred()  # it may have brought a purge
        return counts

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk and in RAM, and what the language model has cost so far."""
        return maintain.stats(self)


def _still(applier: Applier, changes: Sequence[Change]) -> list[Change]:
    """Without touches of memories that another process has retired: a read must not fail."""
    return [c for c in changes if not isinstance(c, Touch) or applier.is_current(c.id)]


def _having(
    filters: Mapping[str, Any], page: Callable[..., list[Item]], limit: int | None, after: int
) -> list[Item]:
    """The first `limit` items with some metadata, or all, read page by page."""
    if limit is None:
        return [item for item in page(after=after) if _has(item.metadata, filters)]
    if limit < 1:
        raise UsageError(f"limit={limit} is not positive; ask for at least one memory")
    found: list[Item] = []
    size = max(limit, 100) if filters else limit
    while len(found) < limit:
        items = page(limit=size, after=after)
        found += [item for item in items if _has(item.metadata, filters)]
        if len(items) < size:
            break
        after = items[-1].position
    return found[:limit]


def _has(metadata: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    return all(name in metadata and metadata[name] == value for name, value in filters.items())
