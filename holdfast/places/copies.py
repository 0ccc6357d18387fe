"""Copies beside the computation: a stream of its own on CUDA, a thread elsewhere."""

import functools
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
    """Copies between `device` and another place, in the order in which they were begun."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is None:
            self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True)
            thread.start()
            weakref.finalize(self, _end, self._jobs, thread)

    def run(self, copy: Callable[[], object]) -> "Begun":
        """Begin `copy`, whose tensors must be held and left alone until what is returned `wait`s.

        On CUDA it is called at once, its operations go to the side stream, after those of the
        current one, and it is the current stream that waits.
        """
        if self._stream is None:
            job = _Job(copy)
            self._jobs.put(job)
            return job
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copy()
        return _OnStream(self._stream)

    def start(self, pairs: list[Pair]) -> Callable[[], None]:
        """Begin to copy (to, source) pairs; calling the result waits for the end.

        `pairs` is emptied, and afterwards nothing here holds them.
        """
        return self.run(functools.partial(_copy_all, pairs)).wait


class _Job:
    """A copy in the thread's queue."""

    def __init__(self, copy: Callable[[], object]):
        self.copy: Callable[[], object] | None = copy
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            assert self.copy is not None
            self.copy()
        except Exception as error:
            self.error = error
        # Before `done`, so that no tensor is held any more when it is set.
        self.copy = None
        self.done.set()

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error

    def outlive(self, tensor: Tensor | None) -> None:
        """Nobody may reuse the memory of `tensor` before the end, which its owner does not need."""
        self.done.wait()


class _OnStream:
    """A copy on the side stream."""

    def __init__(self, stream: torch.cuda.Stream):
        self.stream, self.event = stream, stream.record_event()

    def wait(self) -> None:
        torch.cuda.current_stream(self.stream.device).wait_event(self.event)

    def outlive(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            tensor.record_stream(self.stream)


Begun = _Job | _OnStream


@functools.cache
def copies_of(device: torch.device) -> Copies:
    """The one copier of all stores on `device`."""
    return Copies(device)


def _copy_all(pairs: list[Pair]) -> None:
    try:
        while pairs:
            _copy(*pairs.pop())
    except Exception as error:
        raise HoldfastError(f"a copy failed: {error}") from error


def _copy(to: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        to.copy_(source, non_blocking=True)


def _work(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job


def _end(jobs: "queue.SimpleQueue[_Job | None]", thread: threading.Thread) -> None:
    jobs.put(None)
    # A thread that still copies while the interpreter is torn down would take the process with it.
    if thread is not threading.current_thread():
        thread.join()


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
