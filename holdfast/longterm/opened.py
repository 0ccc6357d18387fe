"""An open memory: consistent readings of its spaces, and decisions carried out all or nothing."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self

from holdfast.longterm.language.llm import LLM, Judgement, Prompted, Rules
from holdfast.longterm.policy import Policy, find
from holdfast.longterm.records import Change, Space, micros
from holdfast.longterm.retrieval import embed
from holdfast.longterm.retrieval.embed import Embedder, Query
from holdfast.longterm.retrieval.search import Searcher
from holdfast.longterm.store.apply import Applier
from holdfast.longterm.store.rows import space_row
from holdfast.longterm.store.sqlite import Store, open_store
from holdfast.longterm.store.view import View
from holdfast.longterm.work import ATTEMPTS, Pending, Work

SpaceLike = Space | str | Mapping[str, str] | None
Steps = Generator[Sequence[Change], list[str], None]


def in_space(method: Callable) -> Callable:
    """Let a method also be told its space as `user_id=`, `agent_id=`, `run_id=`, `tenant_id=`."""

    @functools.wraps(method)
    def call(
        self: "Opened",
        *args: Any,
        space: SpaceLike = None,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        tenant_id: str | None = None,
        **options: Any,
    ) -> Any:
        named = any(part is not None for part in (user_id, agent_id, run_id, tenant_id))
        if space is None and not named:
            space = self.space
        found = Space.of(space, user=user_id, agent=agent_id, run=run_id, tenant=tenant_id)
        return method(self, *args, space=found, **options)

    signature = inspect.signature(method)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
        for name in ("user_id", "agent_id", "run_id", "tenant_id")
    ]
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extra]
    )
    return call


class Opened:
    """A store with a policy, an embedder and a clock; `Memory` adds its verbs and explains them."""

    def __init__(
        self,
        path_or_url: str | os.PathLike[str],
        *,
        policy: str | Policy = "hybrid",
        embedder: Embedder | str | None = None,
        llm: LLM | None = None,
        clock: Callable[[], datetime] | None = None,
        durability: str = "full",
        space: SpaceLike = None,
        actor: str = "user",
    ):
        self.policy = find(policy)
        self.space = Space.of(space)
        self.llm, self.actor = llm, actor
        self._clock = clock or (lambda: datetime.now(UTC))
        self.store: Store = open_store(path_or_url, durability)
        try:
            self.embedder = self._embedder(embedder)
        except BaseException:
            self.store.close()
            raise
        self.searcher = Searcher(self.store, self.embedder)

    def _embedder(self, given: Embedder | str | None) -> Embedder:
        if isinstance(given, str):
            return embed.find(given)
        if given is not None:
            return given
        with self.store.read() as transaction:
            used = transaction.rows("SELECT value FROM meta WHERE key = 'embedder'")
        return embed.find(used[0][0]) if used else embed.default()

    @in_space
    def transact(
        self,
        decide: Callable[[View], Sequence[Change] | Steps],
        *,
        actor: str | None = None,
        space: SpaceLike = None,
    ) -> list[str]:
        """Decide changes on a consistent view and apply them, all or nothing; returns their ids.

        `decide` may be called several times and must have no effects of its own. A generator
        decides in steps: what it yields is applied before it goes on, `yield` gives it the ids.
        """
        return self._transact(
            lambda view, applier: _applied(applier, decide(view)), space, actor=actor
        )

    @in_space
    @contextlib.contextmanager
    def reading(self, *, encoded: Query | None = None, space: SpaceLike = None) -> Iterator[View]:
        """A context manager: a `View` of one instant, for reading."""
        with self.store.read() as transaction:
            work = Work(self.embedder, self.llm)
            if encoded is not None:
                work.know(encoded)
            space_id, _ = space_row(transaction, space, create=False)
            yield self._view(transaction, space, space_id, self.now(), work)

    def now(self) -> datetime:
        """The clock, checked."""
        time = self._clock()
        micros(time, "clock()")
        return time.astimezone(UTC)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transact(
        self, decide: Callable[[View, Applier], Any], space: Space, *, actor: str | None = None
    ) -> Any:
        """Decide and apply in one transaction, with slow work done between attempts."""
        work, now = Work(self.embedder, self.llm), self.now()
        for attempt in range(ATTEMPTS + 1):
            work.deferring = attempt < ATTEMPTS
            try:
                with self.store.write() as transaction:
                    applier = Applier(
                        transaction, space, actor=actor or self.actor, now=micros(now, "clock()")
                    )
                    if self.store.volatile:  # it has one connection, which sees what is not final
                        self.searcher.sync(applier.space_id)
                    view = self._view(transaction, space, applier.space_id, now, work)
                    result = decide(view, applier)
                    self.searcher.encode(transaction, applier.space_id, applier.done, work)
                    applier.finish()
                return result
            except Pending:
                work.settle()
        raise AssertionError("the last attempt does its work itself")

    def _view(self, transaction, space: Space, space_id: int, now: datetime, work: Work) -> View:
        return View(
            transaction, space, space_id,
            now=now, searcher=self.searcher, work=work, judgement=self._judgement(work),
        )  # fmt: skip

    def _judgement(self, work: Work) -> Judgement:
        rules = Rules(embedder=work)
        return rules if self.llm is None else Prompted(work, rules)


def _applied(applier: Applier, decided: Sequence[Change] | Steps) -> list[str]:
    if not isinstance(decided, Generator):
        return applier.apply(decided)
    ids: list[str] = []
    made = None
    while True:
        try:
            changes = decided.send(made)
        except StopIteration:
            return ids
        made = applier.apply(changes)
        ids += made
