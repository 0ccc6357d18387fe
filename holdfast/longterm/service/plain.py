"""Memories, hits, edges, events and changes as JSON: what the command line and servers hand out."""

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from holdfast.longterm.records import Space


def plain(value: Any) -> Any:
    """A record as what JSON can hold: times in ISO 8601 with zone, a space as its text."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Space):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
