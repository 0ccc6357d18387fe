"""Checks: a reproducible, scaled-down proof of each system's claim, against a named baseline.

A check is a function in `checks/<room>/<key>.py`, or `checks/core/<name>.py` for what is not one of
the catalogue's systems, decorated with `@check(key, claim=...)`. Its measurement is kept, with the
hashes of the sources that produced it, in `checks/records/<key>.json`.
"""

import importlib
import inspect
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import catalogue
from holdfast.errors import UsageError, unknown


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
        if (at_least is None) == (at_most is None):
            raise ValueError("Result.ratio needs one of at_least and at_most")
        if ours < 0 or base < 0:
            raise ValueError(f"a ratio of {ours} to {base} means nothing; both must be >= 0")
        factor, larger = (at_least, ours) if at_most is None else (at_most, base)
        sign = ">=" if at_most is None else "<="
        holds = ours >= factor * base if at_most is None else ours <= factor * base
        threshold = f"{name} {sign} {factor:g} x baseline"
        if floor is not None:
            side = name if at_most is None else "baseline"
            threshold += f", {side} >= {floor:g}"
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

    @property
    def path(self) -> Path:
        return Path(inspect.getfile(self.run))


_checks: dict[str, Check] = {}


def check(key: str, *, claim: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register the decorated function as the check of `key`; one sentence says what it shows."""

    def register(run: Callable[..., Result]) -> Callable[..., Result]:
        _checks[key] = Check(key, claim, run)
        return run

    return register


def available() -> list[str]:
    """Keys that have a check: systems in the catalogue's order, then the core's."""
    core = Path(__file__).parent / "core"
    named = sorted(path.stem for path in core.glob("*.py") if not path.stem.startswith("_"))
    return [s.key for s in catalogue.systems() if s.check_path.exists()] + named


def load(key: str) -> Check:
    """Import the check of a system's key or number, or of a core name.

    Raises:
        UsageError: no such system or core check, or a system that has no check yet.
    """
    core = [path.stem for path in (Path(__file__).parent / "core").glob("[!_]*.py")]
    if key in core:
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
    """Run one check.

    Returns:
        system, claim, measured, baseline, threshold, passed, seconds, peak_bytes (increase of the
        process's resident set at its peak), seed and machine, ready for JSON.
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


def data_dir() -> Path:
    """Where optional data lies: `HOLDFAST_DATA`, else `../shared/data` beside the checkout."""
    given = os.environ.get("HOLDFAST_DATA")
    return Path(given) if given else Path(__file__).parents[3] / "shared" / "data"


def cache_dir() -> Path:
    """Where what can be computed again is kept: `XDG_CACHE_HOME/holdfast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"


def write_record(result: dict[str, Any]) -> Path:
    """Store what `run_check` returned, with the hashes of its sources; atomic."""
    record = result | {"sha256": catalogue.source_hashes(result["system"])}
    path = catalogue.RECORDS / f"{result['system']}.json"
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a kill, finds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private; what replaces a shared file should not be.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def figures(numbers: dict[str, Any]) -> str:
    """Named numbers on one line, for people."""
    return ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class PeakRss:
    """How far the resident set of this process rises above where it stood: `.increase` in bytes.

    Pages that the allocator already holds are not seen, so that the figure is a lower bound.
    """

    increase = 0

    def __enter__(self) -> "PeakRss":
        self._reset()
        self._start = _status("VmRSS") or _maxrss()
        return self

    def __exit__(self, *_: object) -> None:
        self.increase = max(0, (_status("VmHWM") or _maxrss()) - self._start)

    @staticmethod
    def _reset() -> None:
        # Linux forgets the high-water mark on request; elsewhere it is that of the whole life.
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(li.split()[1]) * 1024 for li in lines if li.startswith(field + ":")), None)


def _maxrss() -> int:
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, torch and Python versions."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The processor's name, for example "AMD EPYC 7R13"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plain(value: Any) -> Any:
    """Tensor and numpy scalars as Python numbers; NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
