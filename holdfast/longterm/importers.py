"""Read what other memory libraries export."""

from collections.abc import Callable
from pathlib import Path

from holdfast.longterm.records import Change

FORMATS: dict[str, Callable[[Path], list[Change]]] = {}
