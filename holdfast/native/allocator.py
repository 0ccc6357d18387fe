"""Peak bytes of a whole run, as torch's allocators count them: requested, from every thread.

On CUDA the caching allocator keeps this figure itself. On a CPU torch keeps none, so a small
library wraps its allocator while the block runs: one lock and one hash entry per allocation, the
same memory at the same alignment. What was allocated before the block is not counted, nor is its
release.

Not seen on a CPU, by torch's profiler neither: what MKL, oneDNN or OpenMP take from `malloc` for
themselves. Not seen here, but by the profiler: storages that bypass the installed allocator, which
are those of `torch.UntypedStorage(n)` and those made before the block and resized in it.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from holdfast.errors import UsageError

_PATH = Path(__file__).with_name("_allocator.so")


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if not _PATH.exists():
        return None, "not built: no C++ compiler or no torch at install time; reinstall with both"
    try:
        # torch is imported above, so that its libc10 is the one that the loader takes.
        library = ctypes.CDLL(str(_PATH))
        library.holdfast_allocator_torch.restype = ctypes.c_char_p
        library.holdfast_allocator_read.argtypes = [ctypes.POINTER(ctypes.c_int64)] * 3
        built = library.holdfast_allocator_torch().decode()
    except (OSError, AttributeError) as error:
        return None, f"{_PATH.name} cannot be used ({error}); reinstall to build it again"
    if torch.__version__.split("+")[0] != built:
        return None, f"{_PATH.name} is built for torch {built}, not {torch.__version__}; reinstall"
    return library, ""


class AllocatorPeak:
    """Bytes and number of torch's CPU allocations in the `with` block, from every thread.

    `current`, `peak` (bytes since the start) and `allocations` may be read inside the block; after
    it they keep their last values. There is one count in a process, so blocks do not nest.

    Raises:
        UsageError: on entering, where `supported()` says no.
    """

    _running: ClassVar[bool] = False

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._last = (0, 0, 0)

    @staticmethod
    def supported() -> tuple[bool, str]:
        """Whether a block can begin now, and why not."""
        _, reason = _open()
        if AllocatorPeak._running:
            reason = "another block is counting, and there is one count in a process; end it first"
        return not reason, reason

    def __enter__(self) -> Self:
        able, reason = self.supported()
        library, _ = _open()
        if able and library is not None and not library.holdfast_allocator_start():
            reason = "torch's CPU allocator was replaced by one that cannot be wrapped"
        if reason:
            raise UsageError(f"CPU allocations cannot be counted: {reason}")
        self._library, AllocatorPeak._running = library, True
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._library is not None
        self._library.holdfast_allocator_stop()
        self._last = self._read()
        self._library, AllocatorPeak._running = None, False

    def _read(self) -> tuple[int, int, int]:
        if self._library is None:
            return self._last
        current, peak, allocations = (ctypes.c_int64() for _ in range(3))
        self._library.holdfast_allocator_read(current, peak, allocations)
        return current.value, peak.value, allocations.value

    @property
    def current(self) -> int:
        return self._read()[0]

    @property
    def peak(self) -> int:
        return self._read()[1]

    @property
    def allocations(self) -> int:
        return self._read()[2]

    def reset(self) -> None:
        """Inside the block: the peak begins anew, at what is held now."""
        assert self._library is not None, "reset() belongs inside the block"
        self._library.holdfast_allocator_reset_peak()


class ProfilerPeak:
    """The same by torch's profiler, after the block: the reference, for a few steps at most.

    It keeps every event, misses the worker threads of OpenMP, and counts the release of what an
    earlier profile saw allocated.
    """

    def __init__(self) -> None:
        self.current = self.peak = 0

    def __enter__(self) -> Self:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile: Any = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._profile.__exit__(*exc)
        # The raw trace keeps allocations in the order in which they happened.
        raw = self._profile.profiler.kineto_results.events()
        changes = [
            (e.start_ns(), i, e.nbytes()) for i, e in enumerate(raw) if e.name() == "[memory]"
        ]
        for _, _, change in sorted(changes):
            self.current += change
            self.peak = max(self.peak, self.current)


class CudaPeak:
    """Bytes requested from CUDA's caching allocator in the `with` block, as `AllocatorPeak` does.

    What was held before is the zero; where it is freed in the block, `current` can be negative.
    Entering and `reset()` reset torch's own peak statistics of the device.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._start: int | None = None
        self._last = (0, 0)

    def __enter__(self) -> Self:
        torch.cuda.init()
        self._start = self._absolute("current")
        self.reset()
        return self

    def __exit__(self, *exc: object) -> None:
        self._last = (self.current, self.peak)
        self._start = None

    def _absolute(self, what: str) -> int:
        return torch.cuda.memory_stats(self.device).get(f"requested_bytes.all.{what}", 0)

    @property
    def current(self) -> int:
        return self._last[0] if self._start is None else self._absolute("current") - self._start

    @property
    def peak(self) -> int:
        return self._last[1] if self._start is None else self._absolute("peak") - self._start

    def reset(self) -> None:
        """Inside the block: the peak begins anew, at what is held now."""
        torch.cuda.reset_peak_memory_stats(self.device)


def WholeRunPeak(device: torch.device | str = "cpu") -> AllocatorPeak | CudaPeak:
    """The counting block for a device; both have `current`, `peak` and `reset()`."""
    return CudaPeak(device) if torch.device(device).type == "cuda" else AllocatorPeak()
