"""Checks: a reproducible, scaled-down proof of each system's claim, against a named baseline.

A check is a function in `checks/<room>/<key>.py`, or `checks/core/<name>.py` for what is not one of
the catalogue's systems, decorated with `@check(key, claim=...)`. Its measurement is kept, with the
hashes of the sources that produced it, in `checks/records/<key>.json`.
"""

import importlib
import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import catalogue
from holdfast.errors import UsageError, unknown
from holdfast.host import PeakRss, machine

FIELDS = (
    "system",
    "claim",
    "measured",
    "baseline",
    "threshold",
    "passed",
    "seconds",
    "peak_bytes",
    "seed",
    "machine",
)


@dataclass(frozen=True)
class Result:
    """What a check measured: ours and the baseline's numbers, by name, and the verdict."""

    measured: dict[str, Any]
    baseline: dict[str, Any]
    threshold: str
    passed: bool

    @classmethod
    def ratio(
        cls,
        ours: float,
        base: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        floor: float | None = None,
        name: str = "value",
    ) -> "Result":
        """Compare two numbers of one kind, neither negative.

        Args:
            at_least: pass if `ours >= at_least * base`.
            at_most: pass if `ours <= at_most * base`.
            floor: what the side that should be larger must reach: `ours` with `at_least`, `base`
                with `at_most`. Without it a baseline of 0 fails: 1.5 times nothing is nothing.
            name: what the numbers are, for example "loss" or "bytes per parameter".
        """
        if ours < 0 or base < 0:
            raise ValueError(f"a ratio of {ours} to {base} means nothing; both must be >= 0")
        if at_least is not None and at_most is None:
            side, larger, holds = name, ours, ours >= at_least * base
            threshold = f"{name} >= {at_least:g} x baseline"
        elif at_most is not None and at_least is None:
            side, larger, holds = "baseline", base, ours <= at_most * base
            threshold = f"{name} <= {at_most:g} x baseline"
        else:
            raise ValueError("Result.ratio needs one of at_least and at_most")
        if floor is not None:
            threshold += f", {side} >= {floor:g}"
        holds = holds and math.isfinite(ours) and math.isfinite(base)
        return cls(
            measured={name: ours, "ratio": ours / base if base else math.inf},
            baseline={name: base},
            threshold=threshold,
            passed=bool(holds and (larger >= floor if floor is not None else base > 0)),
        )


@dataclass(frozen=True)
class Check:
    """A registered check; `run(seed)`, or `run(seed, full)` if it has a larger form."""

    key: str
    claim: str
    run: Callable[..., Result]


_checks: dict[str, Check] = {}


def check(key: str, *, claim: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register the decorated function as the check of `key`; one sentence says what it shows."""

    def register(run: Callable[..., Result]) -> Callable[..., Result]:
        _checks[key] = Check(key, claim, run)
        return run

    return register


def core_names() -> list[str]:
    """Names of the checks that belong to no catalogued system."""
    folder = Path(__file__).parent / "core"
    return sorted(path.stem for path in folder.glob("[!_]*.py"))


def available() -> list[str]:
    """Keys that have a check: systems in the catalogue's order, then the core's."""
    return [
        system.key for system in catalogue.systems() if system.check_path.exists()
    ] + core_names()


def load(key: str) -> Check:
    """Import the check of a system's key or number, or of a core name.

    Raises:
        UsageError: no such system or core check, or a system that has no check yet.
    """
    if key in core_names():
        room = "core"
    else:
        try:
            system = catalogue.find(key)
        except UsageError:
            raise unknown("check", key, [*available(), *catalogue.keys()]) from None
        if not system.check_path.exists():
            raise UsageError(
                f"{system.number} {system.title} has no check yet: it is {system.status}; "
                "`holdfast systems --status works` lists systems that have one"
            )
        room, key = system.room, system.key
    module = f"holdfast.checks.{room}.{key}"
    importlib.import_module(module)
    if key not in _checks:
        raise LookupError(f"{module} registers no check named {key!r}")
    return _checks[key]


def run_check(key: str, *, full: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run one check; returns `FIELDS`, ready for JSON.

    `peak_bytes` is the increase of the process's resident set at its peak.
    """
    import torch

    found = load(key)
    options = {"full": full} if "full" in inspect.signature(found.run).parameters else {}
    torch.manual_seed(seed)
    start = time.perf_counter()
    with PeakRss() as rss:
        result = found.run(seed, **options)
    return {
        "system": found.key,
        "claim": found.claim,
        "measured": _plain(result.measured),
        "baseline": _plain(result.baseline),
        "threshold": result.threshold,
        "passed": bool(result.passed),
        "seconds": round(time.perf_counter() - start, 3),
        "peak_bytes": rss.increase,
        "seed": seed,
        "machine": machine(),
    }


def write_record(result: dict[str, Any]) -> Path:
    """Store what `run_check` returned, with the hashes of its sources; atomic."""
    record = result | {"sha256": catalogue.source_hashes(result["system"])}
    path = catalogue.RECORDS / f"{result['system']}.json"
    from holdfast.files import write_text  # imports torch

    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def figures(numbers: dict[str, Any]) -> str:
    """Named numbers on one line, for people."""
    return ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """Tensor and numpy scalars as Python numbers; NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
