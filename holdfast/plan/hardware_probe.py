"""Measure this machine for a hardware file: compute, memory, disk and, with a GPU, the link.

Every number is the best of repetitions inside a small time box: a probe takes seconds, and other
programs on the machine can only make a repetition slower. Rates are those of well-shaped work,
hence both efficiencies of the result are 1.
"""

import contextlib
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from holdfast.errors import UsageError
from holdfast.plan.hardware import Device, Disk, Hardware, Host, Link

MiB = 1024**2
_BLOCK = 8 * MiB
_SYNC = 32 * MiB


def probe(
    *,
    disk_directory: str | os.PathLike[str] | None = None,
    disk_bytes: int = 256 * MiB,
    box_seconds: float = 0.7,
    tell: Callable[[str], None] = lambda what: None,
) -> Hardware:
    """Measure the CUDA device if there is one, else the processors; 5 to 20 s by default.

    Args:
        disk_directory: folder whose disk is measured; by default the temporary folder.
        disk_bytes: size of the test file, removed afterwards.
        box_seconds: time for each quantity.
        tell: called with the name of each quantity before it is measured.
    """
    kind: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    flops = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        tell(f"{name} matrix products on {kind}")
        flops[name] = gemm_flops(device, dtype, box_seconds)
    tell("memory bandwidth")
    host_bandwidth = memory_bandwidth(torch.device("cpu"), 128 * MiB, box_seconds)
    bandwidth, memory = host_bandwidth, _host_memory()
    links: tuple[Link, ...] = ()
    if kind == "cuda":
        bandwidth = memory_bandwidth(device, 1024 * MiB, box_seconds)
        memory = torch.cuda.get_device_properties(device).total_memory
        tell("link between host and device")
        links = _links(box_seconds)
    tell("disk")
    disk, read_note = disk_bandwidth(disk_directory, disk_bytes, 4 * box_seconds)
    device_name = torch.cuda.get_device_name() if kind == "cuda" else _processor()
    return Hardware(
        name=f"{platform.node() or 'this-machine'}-{kind}",
        source=(
            f"Measured by holdfast hw probe on {time.strftime('%Y-%m-%d')}: {device_name}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; {read_note}."
        ),
        devices=(
            Device(
                kind=kind,
                flops=flops,
                memory=memory,
                bandwidth=bandwidth,
                launch_seconds=launch_seconds(device),
                compute_efficiency=1.0,
                bandwidth_efficiency=1.0,
            ),
        ),
        host=Host(memory=_host_memory(), bandwidth=host_bandwidth),
        disk=disk,
        links=links,
    )


Clock = Callable[[], float]


def _timed(
    work: Callable[[], object],
    device: torch.device,
    box_seconds: float,
    clock: Clock = time.perf_counter,
) -> float:
    """Least seconds of one call, after one warm-up; at least 3 calls."""

    def once() -> float:
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    once()
    end = time.perf_counter() + box_seconds
    best = min(once() for _ in range(3))
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def gemm_flops(
    device: torch.device,
    dtype: torch.dtype,
    box_seconds: float,
    clock: Clock = time.perf_counter,
) -> float:
    """FLOP/s of square matrix products, the best over sides that fit the time box.

    With one thread on a CPU, `clock` may be `time.thread_time`, which leaves out other programs.
    """
    limit = 8192 if device.type == "cuda" else 2048
    side, best = 256, 0.0
    while side <= limit:
        left = torch.randn(side, side, device=device).to(dtype)
        seconds = _timed(partial(torch.mm, left, left), device, box_seconds / 4, clock)
        best = max(best, 2 * side**3 / seconds)
        # The next side takes 8 times longer, for at least 4 calls; where a format is emulated
        # that would be minutes.
        if 8 * 4 * seconds > 2 * box_seconds:
            break
        side *= 2
    return best


def memory_bandwidth(
    device: torch.device, nbytes: int, box_seconds: float, clock: Clock = time.perf_counter
) -> float:
    """Bytes/s of the better of a copy (2 passes) and a triad a + s*b (3 passes)."""
    a, b, out = (torch.ones(nbytes // 4, device=device) for _ in range(3))
    copy = _timed(lambda: out.copy_(a), device, box_seconds / 2, clock)
    triad = _timed(lambda: torch.add(a, b, alpha=3.0, out=out), device, box_seconds / 2, clock)
    return max(2 * nbytes / copy, 3 * nbytes / triad)


def launch_seconds(device: torch.device) -> float:
    """Seconds that an operation on one element costs, launches queued as in a real step."""
    x, repeat = torch.ones(1, device=device), 2000

    def work() -> None:
        for _ in range(repeat):
            x.mul_(1.0)

    return _timed(work, device, 0.1) / repeat


def _links(box_seconds: float) -> tuple[Link, ...]:
    nbytes = 256 * MiB
    device = torch.device("cuda")
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    latency = _timed(lambda: there[:1].copy_(host[:1], non_blocking=True), device, 0.1)
    up = _timed(lambda: there.copy_(host, non_blocking=True), device, box_seconds)
    down = _timed(lambda: host.copy_(there, non_blocking=True), device, box_seconds)
    ways: list[tuple[dict[str, Any], float]] = [
        ({"from": "host", "to": "device"}, nbytes / up),
        ({"from": "device", "to": "host"}, nbytes / down),
    ]
    return tuple(
        Link(**ends, bandwidth=rate, latency_seconds=latency, duplex=False) for ends, rate in ways
    )


def disk_bandwidth(
    directory: str | os.PathLike[str] | None, nbytes: int, box_seconds: float
) -> tuple[Disk, str]:
    """Bytes/s of writing until the data is on disk, and of reading it back past the page cache.

    Returns:
        The disk, and how reading avoided the page cache.

    Raises:
        UsageError: the folder cannot be written or has too little room.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="holdfast-probe-") as file:
            written, seconds = _write(file.fileno(), nbytes, box_seconds)
            rate, note = _read(Path(file.name), written)
    except OSError as error:
        raise UsageError(
            f"cannot measure the disk of {directory or tempfile.gettempdir()}: {error.strerror}; "
            f"name a folder with {nbytes // MiB} MiB free in --disk"
        ) from error
    return Disk(read_bandwidth=rate, write_bandwidth=written / seconds), note


def _write(fd: int, nbytes: int, box_seconds: float) -> tuple[int, float]:
    block = os.urandom(_BLOCK)  # some disks and file systems compress
    start, written = time.perf_counter(), 0
    while written < nbytes and (not written or time.perf_counter() - start < box_seconds):
        written += os.write(fd, block)
        if written % _SYNC == 0:
            os.fdatasync(fd)
    os.fdatasync(fd)
    return written, time.perf_counter() - start


def _read(path: Path, nbytes: int) -> tuple[float, str]:
    buffer = mmap.mmap(-1, _BLOCK)  # O_DIRECT wants aligned memory, and pages are
    fd, note = _open_direct(path, buffer)
    try:
        start, done = time.perf_counter(), 0
        while done < nbytes:
            got = os.preadv(fd, [buffer], done)
            if not got:
                break
            done += got
        return done / (time.perf_counter() - start), note
    finally:
        os.close(fd)
        buffer.close()


def _open_direct(path: Path, buffer: mmap.mmap) -> tuple[int, str]:
    with contextlib.suppress(OSError, AttributeError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [buffer], 0)
            return fd, "disk read with O_DIRECT"
        except OSError:
            os.close(fd)
            raise
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd, "disk read may include the page cache, O_DIRECT is refused there"


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
