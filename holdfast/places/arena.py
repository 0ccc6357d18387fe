"""Arenas: keyed tensors in host memory or on disk, never above a cap in bytes."""

import functools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.errors import OverBudget, UsageError
from holdfast.places.copies import Begun, Copies
from holdfast.units import format_bytes


class ArenaFull(OverBudget):
    """An arena was asked to hold more bytes than its cap; nothing was stored."""


@dataclass
class Entry:
    """One stored tensor: where it lies, and an empty tensor with its dtype, device and fakeness."""

    slot: Any
    like: Tensor
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.like.itemsize


class Arena(ABC):
    """Compact copies of tensors under keys; bit-exact for every strided dtype.

    `resident_bytes` is everything held, kept-for-reuse space included, and is at most
    `budget_bytes` at every moment; `peak_bytes` is its maximum so far. `hits` and `misses` count
    `get`s of present and absent keys; `bytes_in` and `bytes_out` what `put` and `get` moved.
    Fake tensors are accounted for like real ones and moved nowhere.
    """

    place: str

    def __init__(self, budget_bytes: int):
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 0:
            raise UsageError(
                f"arena budget {budget_bytes!r} is not a number of bytes; pass an integer >= 0"
            )
        self.budget_bytes = budget_bytes
        self.peak_bytes = self.hits = self.misses = self.bytes_in = self.bytes_out = 0
        self.closed = False
        self._resident = 0
        self._entries: dict[Hashable, Entry] = {}
        self._lock = threading.Lock()
        self._doomed: deque[Hashable] = deque()

    @property
    def resident_bytes(self) -> int:
        return self._resident

    def put(self, key: Hashable, tensor: Tensor, copies: Copies | None = None) -> Begun | None:
        """Store a copy of `tensor`, any strides and device, under a new key.

        On CUDA the copy is ordered on the current stream, like any operation on `tensor`.

        Args:
            copies: copy beside the computation; until what is returned has been waited for,
                `tensor` must not change and `key` must not be evicted.

        Raises:
            ArenaFull: the cap would be passed.
            UsageError: the key is taken, or the arena is closed.
        """
        tensor = tensor.detach()
        with self._locked():
            if self.closed or key in self._entries:
                why = "the arena is closed" if self.closed else "the key is taken; evict it first"
                raise UsageError(f"cannot put {key!r} into the {self.place} arena: {why}")
            slot = self._reserve(tensor)
            entry = Entry(slot, tensor.new_empty(0), tensor.shape)
            try:
                begun = _copy(functools.partial(self._write, entry, tensor), copies)
            except BaseException:
                self._release(entry)
                raise
            self._entries[key] = entry
            self.bytes_in += entry.nbytes
            return begun

    def load(self, key: Hashable, out: Tensor, copies: Copies | None = None) -> Begun | None:
        """`get` into `out`, with `copies` beside the computation, as `put`.

        Raises:
            KeyError, UsageError: as `get`.
        """
        with self._locked():
            return _copy(functools.partial(self._read, self._found(key, out), out), copies)

    def get(self, key: Hashable, out: Tensor | None = None) -> Tensor:
        """Copy a stored tensor into `out`, or into a new one on the device it came from.

        Raises:
            KeyError: nothing is stored under `key`.
            UsageError: `out` has another shape or dtype.
        """
        with self._locked():
            entry = self._found(key, out)
            if out is None:
                out = entry.like.new_empty(entry.shape)
            self._read(entry, out)
        return out

    def _found(self, key: Hashable, out: Tensor | None) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            raise KeyError(f"{key!r} is not in the {self.place} arena")
        if out is not None and (out.shape != entry.shape or out.dtype != entry.like.dtype):
            raise UsageError(
                f"out is {tuple(out.shape)} {out.dtype}, {key!r} was stored as "
                f"{tuple(entry.shape)} {entry.like.dtype}; pass a matching tensor"
            )
        self.hits += 1
        self.bytes_out += entry.nbytes
        return entry

    def prefetch(self, keys: Iterable[Hashable]) -> None:  # noqa: B027
        """Hint that `keys` are needed soon; absent ones are skipped, no resident byte is added."""

    def evict(self, key: Hashable) -> None:
        """Drop a stored tensor; an absent key is left alone."""
        # Finalizers call this, from any thread and even while this thread is inside `put`
        # (a collection can run there). So it only queues; whoever holds the lock frees.
        self._doomed.append(key)
        self._drain()

    def close(self) -> None:
        """Drop everything; further `put`s are refused."""
        with self._locked():
            while self._entries:
                self._release(self._entries.popitem()[1])
            self.closed = True

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        used, cap = format_bytes(self._resident), format_bytes(self.budget_bytes)
        return f"{type(self).__name__}({used} of {cap}, {len(self)} tensors)"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        finally:
            self._drain()

    def _drain(self) -> None:
        while self._doomed and self._lock.acquire(blocking=False):
            try:
                while self._doomed:
                    entry = self._entries.pop(self._doomed.popleft(), None)
                    if entry is not None:
                        self._release(entry)
            finally:
                self._lock.release()

    def _charge(self, nbytes: int) -> None:
        self._resident += nbytes
        assert 0 <= self._resident <= self.budget_bytes, (self._resident, self.budget_bytes)
        self.peak_bytes = max(self.peak_bytes, self._resident)

    def _full(self, asked: int, free: int, short: int, detail: str = "") -> ArenaFull:
        return ArenaFull(
            f"{self.place} arena is full: {format_bytes(asked)} asked, {format_bytes(free)} free "
            f"of {format_bytes(self.budget_bytes)}{detail}; raise the {self.place} budget by "
            f"{format_bytes(short)} or keep less there"
        )

    @abstractmethod
    def _reserve(self, tensor: Tensor) -> Any:
        """A slot for `tensor`, charged; raises ArenaFull."""

    @abstractmethod
    def _write(self, entry: Entry, tensor: Tensor) -> None: ...

    @abstractmethod
    def _read(self, entry: Entry, out: Tensor) -> None: ...

    @abstractmethod
    def _release(self, entry: Entry) -> None: ...


def _copy(copy: Callable[[], None], copies: Copies | None) -> Begun | None:
    if copies is not None:
        return copies.run(copy)
    copy()
    return None


@dataclass
class _HostSlot:
    raw: Tensor  # uint8
    event: torch.cuda.Event | None = None


class HostArena(Arena):
    """Copies in host memory; pinned by default where CUDA is available.

    Pageable slots are allocated by `put` and freed by `evict`, so that a meter of live storages
    sees exactly what is held. Pinned slots are kept and reused by size, because pinning is slow;
    each counts as the power of two that torch's pinned allocator rounds it to.
    """

    place = "host"

    def __init__(self, budget_bytes: int, *, pinned: bool | None = None):
        super().__init__(budget_bytes)
        self.pinned = torch.cuda.is_available() if pinned is None else pinned
        if self.pinned and not torch.cuda.is_available():
            raise UsageError("pinned=True needs CUDA, which is not available; pass pinned=False")
        self._spare: dict[int, list[_HostSlot]] = {}

    def close(self) -> None:
        super().close()
        self._drop_spares()

    def _reserve(self, tensor: Tensor) -> _HostSlot:
        nbytes = tensor.nbytes
        if self.pinned and nbytes:
            nbytes = 1 << (nbytes - 1).bit_length()
        if self._spare.get(nbytes):
            return self._spare[nbytes].pop()
        if self._resident + nbytes > self.budget_bytes:
            self._drop_spares()
        if self._resident + nbytes > self.budget_bytes:
            free = self.budget_bytes - self._resident
            raise self._full(nbytes, free, nbytes - free)
        pin = self.pinned and not isinstance(tensor, FakeTensor)
        # new_empty and not empty: a fake tensor's copy is fake even outside its mode.
        raw = tensor.new_empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
        self._charge(nbytes)
        return _HostSlot(raw)

    def _write(self, entry: Entry, tensor: Tensor) -> None:
        self._copy(entry.slot, self._typed(entry), tensor, tensor.device)

    def _read(self, entry: Entry, out: Tensor) -> None:
        self._copy(entry.slot, out, self._typed(entry), out.device)

    @staticmethod
    def _typed(entry: Entry) -> Tensor:
        return entry.slot.raw[: entry.nbytes].view(entry.like.dtype).view(entry.shape)

    def _copy(self, slot: _HostSlot, to: Tensor, source: Tensor, device: torch.device) -> None:
        on_stream = self.pinned and device.type == "cuda" and not isinstance(to, FakeTensor)
        stream = torch.cuda.current_stream(device) if on_stream else None
        # A slot may still be read or written by an earlier copy on another stream.
        if slot.event is not None:
            if stream is None:
                slot.event.synchronize()
            else:
                stream.wait_event(slot.event)
        to.copy_(source, non_blocking=on_stream)
        slot.event = None if stream is None else stream.record_event()

    def _release(self, entry: Entry) -> None:
        slot = entry.slot
        if self.pinned and not isinstance(slot.raw, FakeTensor):
            self._spare.setdefault(slot.raw.nbytes, []).append(slot)
        else:
            self._charge(-slot.raw.nbytes)

    def _drop_spares(self) -> None:
        for slots in self._spare.values():
            self._charge(-sum(slot.raw.nbytes for slot in slots))
        self._spare.clear()
