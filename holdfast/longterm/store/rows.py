"""How a memory stands in a row and in the log, and the keys by which it is found again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.errors import UsageError
from holdfast.longterm.records import Space, text_hash
from holdfast.longterm.store.sqlite import Transaction

STATE = (
    "version, id, kind, text, speaker, session, position, data, metadata, valid_from, valid_to, "
    "recorded_at, strength, uses, used_at, searchable"
)


def space_row(transaction: Transaction, space: Space, *, create: bool = True) -> tuple[int, int]:
    """Number of a space and of its last event; (0, 0) for one that is not there."""
    parts = (space.tenant, space.user, space.agent, space.run)
    find = (
        "SELECT id, seq FROM space WHERE tenant = ? AND user_id = ? AND agent_id = ? AND run_id = ?"
    )
    rows = transaction.rows(find, parts)
    if not rows and create:
        transaction.run(
            "INSERT INTO space (tenant, user_id, agent_id, run_id) VALUES (?, ?, ?, ?)", parts
        )
        rows = transaction.rows(find, parts)
    return rows[0] if rows else (0, 0)


def made_from(transaction: Transaction, item: str) -> list[str]:
    """All that was made from a memory, directly or not, current or not: a purge takes it along."""
    found: dict[str, None] = {}
    open_ = [item]
    while open_:
        made = transaction.rows("SELECT memory FROM source WHERE origin = ?", (open_.pop(),))
        fresh = [one for (one,) in made if one not in found and one != item]
        found.update(dict.fromkeys(fresh))
        open_ += fresh
    return list(found)


def dumps(value: Any) -> str:
    """JSON that is the same for equal values."""
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{value!r} cannot be stored ({error}); data and metadata hold what JSON can hold"
        ) from None


def key_hash(kind: str, text: str, key: str) -> bytes:
    parts = "\x1f".join((kind, key)).encode()
    return hashlib.blake2b(parts, key=text_hash(text), digest_size=16).digest()


def state(row: Sequence[Any]) -> dict[str, Any]:
    """A row of `STATE` with its JSON read."""
    names = [name.strip() for name in STATE.split(",")]
    found = dict(zip(names, row, strict=True))
    found["data"], found["metadata"] = json.loads(found["data"]), json.loads(found["metadata"])
    return found


def logged(item: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state that the log keeps: what a version says."""
    return {k: v for k, v in item.items() if k not in ("version", "id", "recorded_at")}
