"""Care for a memory as a whole: verify it, list its spaces, rehearse a change."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.longterm.records import Space
from holdfast.longterm.store.schema import OWN, WINDOW
from holdfast.longterm.store.sqlite import Store, Transaction

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory

PAGE = 500  # ids that one pass of `verify` holds in RAM
# What a version says, as the log and the row both hold it.
_SAID = (
    "kind", "text", "speaker", "session", "position", "data", "metadata", "valid_from",
    "valid_to", "strength", "uses", "used_at", "searchable",
)  # fmt: skip
_RELATED = ("src", "rel", "dst", "data", "valid_from", "valid_to")
_JSON = ("data", "metadata")

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong in a memory: of which kind, where, and what it is."""

    kind: str
    space: Space | None
    id: str | None
    message: str


@dataclass(frozen=True)
class Report:
    """What `verify` looked at and found; `ok` if nothing is wrong."""

    memories: int
    edges: int
    events: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def stats(memory: "Memory") -> dict[str, Any]:
    """Counts, bytes on disk and in RAM, and what the language model has cost so far."""
    with memory.store.read() as transaction:
        counts = {
            name: transaction.rows(f"SELECT count(*) FROM {table}{where}")[0][0]
            for name, table, where in (
                ("memories", "memory", " WHERE retired_at IS NULL"),
                ("versions", "memory", ""),
                ("edges", "edge", " WHERE retired_at IS NULL"),
                ("events", "event", ""),
                ("spaces", "space", ""),
            )
        }
    usage = memory.llm.usage if memory.llm is not None else None
    return {
        **counts,
        "store": memory.store.url,
        "bytes": {"store": memory.store.nbytes(), "index": memory.searcher.nbytes()},
        "embedder": memory.embedder.id,
        "policy": type(memory.policy).__name__,
        "llm": None
        if usage is None
        else {
            "calls": usage.calls, "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens, "cost": usage.cost,
        },
    }  # fmt: skip


def spaces(
    memory: "Memory", *, limit: int | None = None, after: int = 0
) -> list[tuple[int, Space, int]]:
    """(number, space, current memories) of every space, in the order in which they came to be.

    Args:
        limit, after: a page: at most so many, with numbers above `after`.
    """
    tail, args = ("", [after]) if limit is None else (" LIMIT ?", [after, limit])
    with memory.store.read() as transaction:
        return [
            (number, Space(*names), count)
            for number, *names, count in transaction.rows(
                "SELECT id, tenant, user_id, agent_id, run_id, (SELECT count(*) FROM memory "
                "WHERE memory.space = space.id AND retired_at IS NULL) FROM space "
                f"WHERE id > ? ORDER BY id{tail}",
                args,
            )
        ]


def replay(events: Sequence[tuple[str, int, str | None]]) -> dict[str, Any] | None:
    """What a memory or an edge says after its log: (op, time, after) in order -> state or None."""
    state: dict[str, Any] | None = None
    for op, time, after in events:
        if op in ("retire", "unlink", "purge") or after is None:
            state = None  # a purge leaves events without a text
        elif op == "touch":
            state = None if state is None else {**state, **json.loads(after)}
        else:
            state = {**json.loads(after), "recorded_at": time}
    return state


def verify(memory: "Memory", tell: Tell = lambda done: None) -> Report:
    """Compare all that a memory keeps with what it should: file, log, rows, edges, vectors.

    Args:
        tell: called with how many ids have been compared since it was called last.
    """
    problems = [Problem("file", None, None, text) for text in memory.store.damage()]
    with memory.store.read() as transaction:
        counts = {
            table: transaction.rows(f"SELECT count(*) FROM {table}{where}")[0][0]
            for table, where in (
                ("memory", " WHERE retired_at IS NULL"),
                ("edge", " WHERE retired_at IS NULL"),
                ("event", ""),
            )
        }
        for number, *names in transaction.rows(
            "SELECT id, tenant, user_id, agent_id, run_id FROM space ORDER BY id"
        ):
            space = Space(*names)
            problems += _log_against_rows(transaction, number, space, tell)
            problems += _log_itself(transaction, number, space)
            problems += _edges(transaction, number, space)
        problems += _vectors(transaction)
    return Report(counts["memory"], counts["edge"], counts["event"], tuple(problems))


def _log_against_rows(sql: Transaction, number: int, space: Space, tell: Tell) -> Iterator[Problem]:
    after = ""
    while True:
        ids = [
            row[0]
            for row in sql.rows(
                "SELECT item FROM event WHERE space = ? AND item > ? UNION "
                "SELECT id FROM memory WHERE space = ? AND id > ? AND retired_at IS NULL UNION "
                "SELECT id FROM edge WHERE space = ? AND id > ? AND retired_at IS NULL "
                f"ORDER BY 1 LIMIT {PAGE}",
                [number, after] * 3,
            )
        ]
        if not ids:
            return
        after = ids[-1]
        marks = ", ".join("?" * len(ids))
        logs: dict[str, list[tuple[str, int, str | None]]] = {}
        for item, *event in sql.rows(
            f"SELECT item, op, time, after FROM event WHERE space = ? AND item IN ({marks}) "
            "ORDER BY time, seq",
            [number, *ids],
        ):
            logs.setdefault(item, []).append(tuple(event))
        rows = {}
        for table, names in (("memory", _SAID), ("edge", _RELATED)):
            names = (*names, "recorded_at")
            for item, *values in sql.rows(
                f"SELECT id, {', '.join(names)} FROM {table} WHERE space = ? AND id IN ({marks}) "
                "AND retired_at IS NULL",
                [number, *ids],
            ):
                rows[item] = dict(zip(names, values, strict=True))
        for item in ids:
            message = _difference(replay(logs.get(item, ())), rows.get(item))
            if message:
                yield Problem("log", space, item, message)
        tell(len(ids))


def _difference(logged: dict[str, Any] | None, row: dict[str, Any] | None) -> str | None:
    if row is None:
        return None if logged is None else "the log says that it is current, there is no row of it"
    if logged is None:
        return "it is current, the log says nothing of it or that it is not"
    for name, value in row.items():
        try:
            found = json.loads(value) if name in _JSON else value
        except ValueError:
            return f"{name} is not JSON: {value!r}"
        if name in logged and found != logged[name]:
            return f"{name} is {_short(found)}, the log says {_short(logged[name])}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _log_itself(sql: Transaction, number: int, space: Space) -> Iterator[Problem]:
    ((noted, last, count),) = sql.rows(
        "SELECT max(s.seq), coalesce(max(e.seq), 0), count(e.seq) FROM space s "
        "LEFT JOIN event e ON e.space = s.id WHERE s.id = ?",
        (number,),
    )
    if not noted == last == count:
        yield Problem(
            "log", space, None,
            f"the log has {count} events up to number {last}, the space counts {noted}: "
            "events are missing",
        )  # fmt: skip


def _edges(sql: Transaction, number: int, space: Space) -> Iterator[Problem]:
    for end in ("src", "dst"):
        for edge, item in sql.rows(
            f"SELECT e.id, e.{end} FROM edge e WHERE e.space = ? AND e.retired_at IS NULL AND NOT "
            f"EXISTS (SELECT 1 FROM memory m WHERE m.id = e.{end} AND m.space = e.space AND "
            "m.retired_at IS NULL)",
            (number,),
        ):
            yield Problem("edge", space, edge, f"its {end} {item} is no current memory")


def _vectors(sql: Transaction) -> Iterator[Problem]:
    used = sql.rows(
        "SELECT m.id, m.name, m.dim FROM meta JOIN model m ON m.name = meta.value "
        "WHERE meta.key = 'embedder'"
    )
    model, name, dim = used[0] if used else (0, "any embedder", 0)
    for version, item, *names in sql.rows(
        "SELECT v.version, v.id, s.tenant, s.user_id, s.agent_id, s.run_id FROM memory v "
        "JOIN space s ON s.id = v.space WHERE v.searchable = 1 AND v.retired_at IS NULL AND "
        "(SELECT count(*) FROM embedding e WHERE e.version = v.version AND e.model = ? "
        "AND e.part IN (?, ?)) < 2 ORDER BY v.version",
        (model, OWN, WINDOW),
    ):
        yield Problem(
            "vector", Space(*names), item,
            f"version {version} has no vectors of {name}; "
            f"`holdfast memory reembed --embedder {name}` makes them",
        )  # fmt: skip
    for item, part, size in sql.rows(
        "SELECT v.id, e.part, length(e.bytes) FROM embedding e JOIN memory v "
        "ON v.version = e.version WHERE e.model = ? AND e.part IN (?, ?) AND length(e.bytes) <> ?",
        (model, OWN, WINDOW, 4 * dim),
    ):
        yield Problem(
            "vector", None, item, f"vector {part} has {size} bytes, {name} makes {4 * dim}"
        )
    for other, count in sql.rows(
        "SELECT m.name, count(*) FROM embedding e JOIN model m ON m.id = e.model "
        "WHERE e.model <> ? GROUP BY m.name",
        (model,),
    ):
        yield Problem(
            "vector", None, None,
            f"{count} vectors of {other} are left of a change of embedder that was cut off; "
            f"`holdfast memory reembed --embedder {other}` completes it, "
            f"`--embedder {name}` undoes it",
        )  # fmt: skip


class _Undone(Exception):
    pass


class _Rehearsed:
    """A store whose transactions are undone at their end; notes what they would have logged."""

    def __init__(self, store: Store, noted: list[dict[str, Any]]):
        self._store, self._noted = store, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def shred(self) -> None:
        pass

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        with contextlib.suppress(_Undone), self._store.write() as transaction:
            before = dict(transaction.rows("SELECT id, seq FROM space"))
            yield transaction
            for number, *names, seq in transaction.rows(
                "SELECT id, tenant, user_id, agent_id, run_id, seq FROM space"
            ):
                if seq > before.get(number, 0):
                    self._noted += _events(transaction, number, Space(*names), before)
            raise _Undone


def _events(
    sql: Transaction, number: int, space: Space, before: dict[int, int]
) -> Iterator[dict[str, Any]]:
    for op, item, old, new in sql.rows(
        "SELECT op, item, before, after FROM event WHERE space = ? AND seq > ? ORDER BY seq",
        (number, before.get(number, 0)),
    ):
        said = json.loads(new or old or "{}")
        text = said.get("text") or sql.rows("SELECT max(text) FROM memory WHERE id = ?", (item,))
        yield {
            "op": op, "id": item, "space": str(space),
            "text": text if isinstance(text, str) else text[0][0],
        }  # fmt: skip


@contextlib.contextmanager
def rehearsal(memory: "Memory") -> Iterator[list[dict[str, Any]]]:
    """Within it, what the memory is told to do is done and undone; yields what would be logged.

    Each entry is `{op, id, space, text}`; ids of new memories will be others.
    """
    noted: list[dict[str, Any]] = []
    store = memory.store
    memory.store = _Rehearsed(store, noted)  # type: ignore[assignment]
    try:
        yield noted
    finally:
        memory.store = store
