"""What a memory is made of, what is asked of it, and the changes that policies decide."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

from holdfast.errors import UsageError

_FIELDS = ("tenant", "user", "agent", "run")


@dataclass(frozen=True, order=True)
class Space:
    """Whose memories these are; nothing is ever read or written across two spaces."""

    tenant: str = ""
    user: str = ""
    agent: str = ""
    run: str = ""

    def __str__(self) -> str:
        if not (self.tenant or self.agent or self.run):
            return quote(self.user, safe="@:+ ")
        return "/".join(quote(getattr(self, name), safe="@:+ ") for name in _FIELDS)

    @classmethod
    def of(cls, given: "Space | str | Mapping[str, str] | None" = None, **parts: str | None):
        """A space from itself, from fields, or from text: `user` or `tenant/user[/agent[/run]]`.

        Raises:
            UsageError: more than four parts, an unknown field, or a space given twice.
        """
        named = {name: value for name, value in parts.items() if value is not None}
        if given is not None and named:
            raise UsageError(
                f"space={given!r} and {', '.join(f'{k}={v!r}' for k, v in named.items())} were "
                "both given; pass one of them"
            )
        if isinstance(given, Space):
            return given
        if isinstance(given, str):
            words = [unquote(word) for word in given.split("/")]
            if len(words) > 4:
                raise UsageError(
                    f"space {given!r} has {len(words)} parts; it is user, or "
                    "tenant/user[/agent[/run]], with %2F for a slash inside a name"
                )
            return cls(user=words[0]) if len(words) == 1 else cls(*words)
        named = dict(given or named)
        for name, value in named.items():
            if name not in _FIELDS or not isinstance(value, str):
                raise UsageError(
                    f"space field {name}={value!r} is not one of {', '.join(_FIELDS)} with a text"
                )
        return cls(**named)


@dataclass(frozen=True)
class Turn:
    """One message, fact or note that is to be remembered.

    `when` is the world's time at which it was said; `id` is the caller's name for it, which
    tells two equal messages of one session apart.
    """

    text: str
    speaker: str | None = None
    when: datetime | None = None
    session: str | None = None
    id: str | None = None
    kind: str = "turn"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a memory comes from: bytes `start` to `end` of another memory's text."""

    id: str
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Item:
    """A memory as it is stored: one version of it.

    `valid_from` to `valid_to` is when it holds in the world, `recorded_at` to `retired_at` when
    this store held it so; both half-open, in UTC, None for no bound.
    """

    version: int
    id: str
    space: Space
    kind: str
    text: str
    speaker: str | None
    session: str | None
    position: int
    data: dict[str, Any]
    metadata: dict[str, Any]
    valid_from: datetime | None
    valid_to: datetime | None
    recorded_at: datetime
    retired_at: datetime | None
    strength: float
    uses: int
    used_at: datetime | None

    @property
    def document(self) -> str:
        """What is searched: the speaker counts as part of what was said."""
        return document(self.speaker, self.text)


@dataclass(frozen=True)
class Edge:
    """A typed relation between two memories, with the same four times as an item."""

    id: str
    src: str
    rel: str
    dst: str
    data: dict[str, Any]
    valid_from: datetime | None
    valid_to: datetime | None
    recorded_at: datetime
    retired_at: datetime | None


@dataclass(frozen=True)
class Event:
    """One entry of the log, which is only ever appended to; `before` and `after` are states."""

    seq: int
    time: datetime
    actor: str
    op: str
    id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    why: str = ""


@dataclass(frozen=True)
class Hit:
    """A memory that was found; `terms` says what its score is made of."""

    id: str
    text: str
    score: float
    metadata: dict[str, Any]
    valid_from: datetime | None
    valid_to: datetime | None
    provenance: tuple[Source, ...]
    kind: str = "turn"
    speaker: str | None = None
    session: str | None = None
    position: int = 0
    recorded_at: datetime | None = None
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Add:
    """Store a new memory.

    `data` is the policy's own; what it keeps under "shelf", a text, `View.items` finds by an index.
    Another change of the same batch refers to it by this object: `Link(add, "next", other.id)`.
    `key` tells inputs apart that have the same text; a memory with the same kind, text and key in
    the same space is touched instead of stored twice.
    """

    text: str
    kind: str = "fact"
    speaker: str | None = None
    session: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    sources: Sequence["Source | Add"] = ()
    strength: float = 1.0
    key: str = ""
    searchable: bool = True


@dataclass(frozen=True, eq=False)
class Revise:
    """Replace a memory's text, data or validity by a new version; None leaves a field alone.

    `sources` are what the new version is made from besides what the memory was made from before.
    """

    id: "str | Add"
    text: str | None = None
    data: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    sources: Sequence["Source | Add"] = ()
    why: str = ""


@dataclass(frozen=True, eq=False)
class Retire:
    """End a memory or an edge: no longer found, still in the history and in the past."""

    id: str
    why: str = ""


@dataclass(frozen=True, eq=False)
class Link:
    """Relate two memories; linking the same pair by the same relation again changes nothing."""

    src: "str | Add"
    rel: str
    dst: "str | Add"
    data: Mapping[str, Any] = field(default_factory=dict)
    valid_from: datetime | None = None
    valid_to: datetime | None = None


@dataclass(frozen=True, eq=False)
class Unlink:
    """Retire an edge by its id."""

    id: str
    why: str = ""


@dataclass(frozen=True, eq=False)
class Touch:
    """Note that a memory was used; `strength` and `data` replace theirs when given.

    Neither makes a version: they describe how a memory is used, not what it says.
    """

    id: str
    strength: float | None = None
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Purge:
    """Erase a memory and whatever was made from it; a tombstone without text remains."""

    id: str
    why: str = ""


Change = Add | Revise | Retire | Link | Unlink | Touch | Purge


def document(speaker: str | None, text: str) -> str:
    return f"{speaker}: {text}" if speaker else text


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in case and white space."""
    plain = re.sub(r"\s+", " ", text).strip().casefold()
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def micros(time: datetime | None, name: str) -> int | None:
    """Microseconds since 1970 of an aware time.

    Raises:
        UsageError: a time without zone, or something that is not a time.
    """
    if time is None:
        return None
    if not isinstance(time, datetime):
        raise UsageError(f"{name}={time!r} is a {type(time).__name__}; pass an aware datetime")
    if time.utcoffset() is None:
        raise UsageError(
            f"{name}={time} has no time zone; facts are stored in UTC.\n"
            f"Pass an aware datetime, e.g. datetime({time.year}, {time.month}, {time.day}, "
            f"{time.hour}, {time.minute}, tzinfo=timezone.utc)."
        )
    delta = time - _EPOCH
    value = (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
    if not _FIRST <= value < _END:  # in UTC it is in a year that no datetime has
        raise UsageError(f"{name}={time} is not in the years 1 to 9999 in UTC; pass such a time")
    return value


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _END = (days * 86_400_000_000 for days in (-719_162, 2_932_897))


def moment(value: int | None) -> datetime | None:
    """The time of so many microseconds since 1970."""
    if value is None:
        return None
    return datetime.fromtimestamp(value // 1_000_000, UTC).replace(microsecond=value % 1_000_000)


def turns_of(
    given: "str | Turn | Mapping[str, Any] | Iterable[str | Turn | Mapping[str, Any]]",
    *,
    when: datetime | None = None,
    session: str | None = None,
    kind: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[Turn]:
    """Turns from a text, a turn, a chat message, or a list of them.

    A message is `{"role" or "speaker", "content" or "text", ["name", "when", "session", "id",
    "metadata"]}`; the arguments fill what it leaves out.

    Raises:
        UsageError: a message without text, of the wrong type, or with a time without zone.
    """
    if isinstance(given, str | Turn | Mapping):
        given = [given]
    turns = []
    for index, message in enumerate(given):
        if isinstance(message, Turn):
            turn = message
        elif isinstance(message, str):
            turn = Turn(message, kind=kind or ("fact" if session is None else "turn"))
        elif isinstance(message, Mapping):
            turn = _turn(message, index, kind)
        else:
            raise UsageError(
                f"message {index} is a {type(message).__name__}; pass a text or a mapping "
                '{"role": ..., "content": ...}'
            )
        if not turn.text.strip():
            raise UsageError(f"message {index} has no text; there is nothing to remember")
        turns.append(
            Turn(
                turn.text,
                turn.speaker,
                turn.when or when,
                turn.session if turn.session is not None else session,
                turn.id,
                turn.kind,
                {**(metadata or {}), **turn.metadata},
            )
        )
        micros(turns[-1].when, "when")
    return turns


def _turn(message: Mapping[str, Any], index: int, kind: str | None) -> Turn:
    text = message.get("content", message.get("text"))
    if isinstance(text, list):  # the parts of a multimodal message
        text = "\n".join(p["text"] for p in text if isinstance(p, Mapping) and "text" in p)
    if not isinstance(text, str):
        raise UsageError(
            f"message {index} has keys {', '.join(map(str, message))} and no text under "
            '"content" or "text"; pass {"role": ..., "content": "..."}'
        )
    when = message.get("when")
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            raise UsageError(
                f"message {index} has when={when!r}; write it as 2024-05-08T13:56:00+00:00"
            ) from None
    return Turn(
        text,
        message.get("speaker") or message.get("name") or message.get("role"),
        when,
        message.get("session"),
        None if message.get("id") is None else str(message["id"]),
        message.get("kind", kind or "turn"),
        message.get("metadata") or {},
    )
