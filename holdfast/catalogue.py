"""The catalogue: `systems.toml` as rows, and where the module, tests, check, record of each lie."""

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from holdfast.errors import unknown

ROOMS = (
    "weights",
    "training",
    "parallel",
    "context",
    "knowledge",
    "longterm",
    "lifelong",
    "agents",
    "probes",
    "perception",
    "plan",
)
KINDS = ("system", "finding", "survey")
STATUSES = ("planned", "works")

_PACKAGE = Path(__file__).parent
RECORDS = _PACKAGE / "checks" / "records"


@dataclass(frozen=True)
class System:
    """One row. Paths are derived, and may not exist while the status is `planned`."""

    number: int
    key: str
    title: str
    room: str
    kind: str
    status: str
    module: str
    paper: str

    def __post_init__(self):
        for field, value, known in (
            ("room", self.room, ROOMS),
            ("kind", self.kind, KINDS),
            ("status", self.status, STATUSES),
        ):
            if value not in known:
                raise unknown(f"{field} of system {self.number}", value, known)

    @property
    def module_path(self) -> Path:
        *parents, name = self.module.split(".")[1:]
        return _PACKAGE.joinpath(*parents, f"{name}.py")

    @property
    def test_path(self) -> Path:
        """Tests mirror the package, to its depth or one folder less; in a source checkout only."""
        *parents, name = self.module.split(".")[1:]
        mirror = _PACKAGE.parent.joinpath("tests", *parents, f"test_{name}.py")
        above = mirror.parents[1] / mirror.name
        return above if len(parents) > 1 and above.exists() else mirror

    @property
    def check_path(self) -> Path:
        return _PACKAGE / "checks" / self.room / f"{self.key}.py"

    @property
    def record_path(self) -> Path:
        return RECORDS / f"{self.key}.json"

    def row(self) -> dict[str, Any]:
        """What `holdfast systems --json` prints."""
        names = ("number", "key", "title", "room", "kind", "module", "status")
        return {name: getattr(self, name) for name in names}

    def missing(self) -> list[str]:
        """Reasons why this row may not say `works`; empty if it may."""
        files = {"module": self.module_path, "tests": self.test_path, "check": self.check_path}
        reasons = [f"no {what}: {path}" for what, path in files.items() if not path.exists()]
        record = read_record(self.key)
        if record is None:
            return [*reasons, f"no record: run `holdfast check {self.key} --write`"]
        if not record["passed"]:
            reasons.append("its recorded check failed")
        if not reasons and record["sha256"] != source_hashes(self.key):
            reasons.append(f"its record is stale: run `holdfast check {self.key} --write`")
        return reasons


@cache
def systems() -> list[System]:
    """All rows, by number."""
    rows = tomllib.loads((_PACKAGE / "systems.toml").read_text(encoding="utf-8"))["systems"]
    return [System(**row) for row in rows]


def keys() -> list[str]:
    return [system.key for system in systems()]


def find(key_or_number: str | int) -> System:
    """The row with that key ("qgalore") or number (65, "65" or "065").

    Raises:
        UsageError: there is none; the message lists the nearest keys.
    """
    text = str(key_or_number).strip()
    for system in systems():
        if text == system.key or (re.fullmatch(r"[0-9]+", text) and int(text) == system.number):
            return system
    raise unknown("system", text, keys())


def count_works() -> int:
    return sum(system.status == "works" for system in systems())


def read_record(key: str) -> dict[str, Any] | None:
    """The last recorded run of a check, of a system or of the core; None if there is none."""
    path = RECORDS / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def source_hashes(key: str) -> dict[str, str]:
    """SHA-256 of the sources behind a check: its own, and the module of a system's."""
    paths = {"check": _PACKAGE / "checks" / "core" / f"{key}.py"}
    if key in keys():
        system = find(key)
        paths = {"module": system.module_path, "check": system.check_path}
    return {what: hashlib.sha256(path.read_bytes()).hexdigest() for what, path in paths.items()}
