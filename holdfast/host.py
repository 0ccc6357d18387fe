"""This process and the machine under it: peak resident memory, CPU, where data and caches lie."""

import os
import platform
from pathlib import Path
from typing import Any


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


def data_dir() -> Path:
    """Where optional data lies: `HOLDFAST_DATA`, else `../shared/data` beside the checkout."""
    given = os.environ.get("HOLDFAST_DATA")
    return Path(given) if given else Path(__file__).parents[2] / "shared" / "data"


def cache_dir() -> Path:
    """Where what can be computed again is kept: `XDG_CACHE_HOME/holdfast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"
