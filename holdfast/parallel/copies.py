"""Copies beside the computation: a stream of its own on CUDA, a thread on a CPU."""

import queue
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.units import format_bytes

Pair = tuple[Tensor, Tensor]


class Copies:
    """Copies between `device` and the host, in the order in which they were begun."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is None:
            self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._jobs,), daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)

    def start(self, pairs: list[Pair]) -> Callable[[], None]:
        """Begin to copy (to, source) pairs; calling the result waits for the end.

        On CUDA it is the current stream that waits. Until then both sides must be held and left
        alone; `pairs` is emptied, and afterwards nothing here holds them.
        """
        if self._stream is None:
            job = _Job(pairs)
            self._jobs.put(job)
            return job.wait
        device = self._stream.device
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            while pairs:
                _copy(*pairs.pop())
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(device).wait_event(done)


class _Job:
    def __init__(self, pairs: list[Pair]):
        self.pairs = pairs
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            # Popped, so that no tensor is held any more when `done` is set.
            while self.pairs:
                _copy(*self.pairs.pop())
        except Exception as error:
            self.error = error
        self.done.set()

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise HoldfastError(f"a copy failed: {self.error}") from self.error


def _copy(to: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        to.copy_(source, non_blocking=True)


def _work(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job


def pin(slab: Tensor) -> None:
    """Page-lock host memory where it lies; torch's own pinned memory is in powers of two.

    Raises:
        HoldfastError: CUDA refuses.
    """
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(slab.data_ptr(), slab.nbytes, 0))
    if code:
        raise HoldfastError(
            f"CUDA could not pin {format_bytes(slab.nbytes)} of host memory (error {code}); lower "
            "the host budget or raise the limit on locked memory"
        )
    weakref.finalize(slab.untyped_storage(), cudart.cudaHostUnregister, slab.data_ptr())
