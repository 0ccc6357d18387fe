"""Disk arena: tensors in one unlinked file, space reused first-fit."""

import errno
import os
import tempfile
from collections.abc import Hashable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.errors import HoldfastError, UsageError
from holdfast.places.arena import Arena, Entry
from holdfast.units import format_bytes


class DiskArena(Arena):
    """Copies in one file under `directory`; `resident_bytes` is the length of the file.

    The file has no name from the moment it is made, so nothing stays behind whatever ends the
    process. Contiguous host tensors are written from and read into their own memory; others pass
    through one staging copy.

    Raises:
        UsageError: `directory` is no directory that can be written to.
        HoldfastError: from `put`, the file system is full; names the directory and the bytes.
    """

    place = "disk"

    def __init__(self, budget_bytes: int, directory: str | Path | None = None):
        super().__init__(budget_bytes)
        self.directory = Path(directory or tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"disk arena cannot write to {self.directory} ({error.strerror}); "
                "name an existing directory that can be written to"
            ) from error
        self._holes: list[tuple[int, int]] = []  # (offset, nbytes), sorted, never adjacent

    def close(self) -> None:
        super().close()
        self._file.close()

    def prefetch(self, keys: Iterable[Hashable]) -> None:
        """Ask the kernel to read `keys` ahead into its page cache."""
        if not hasattr(os, "posix_fadvise"):
            return
        with self._locked():
            for entry in filter(None, map(self._entries.get, keys)):
                if not isinstance(entry.like, FakeTensor):
                    os.posix_fadvise(
                        self._file.fileno(), entry.slot, entry.nbytes, os.POSIX_FADV_WILLNEED
                    )

    def _reserve(self, tensor: Tensor) -> int:
        nbytes = tensor.nbytes
        for index, (offset, size) in enumerate(self._holes):
            if size >= nbytes:
                rest = (offset + nbytes, size - nbytes)
                self._holes[index : index + 1] = [rest] if rest[1] else []
                return offset
        end = self._resident
        if end + nbytes > self.budget_bytes:
            holes = sum(size for _, size in self._holes)
            detail = f" ({format_bytes(holes)} of it in holes that are too small)" if holes else ""
            free = self.budget_bytes - end
            raise self._full(nbytes, free + holes, nbytes - free, detail)
        self._charge(nbytes)
        return end

    def _write(self, entry: Entry, tensor: Tensor) -> None:
        staged = tensor.resolve_conj().resolve_neg().contiguous().to("cpu")
        if isinstance(tensor, FakeTensor):
            return
        try:
            self._transfer(os.pwrite, staged, entry.slot)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise HoldfastError(
                f"disk is full ({error.strerror}): {format_bytes(entry.nbytes)} could not be "
                f"written to {self.directory}, where this arena holds "
                f"{format_bytes(sum(e.nbytes for e in self._entries.values()))}; free space "
                "there or name another directory"
            ) from error

    def _read(self, entry: Entry, out: Tensor) -> None:
        direct = out.device.type == "cpu" and out.is_contiguous()
        staged = out if direct else out.new_empty(out.shape, device="cpu")
        if not isinstance(out, FakeTensor):
            self._transfer(lambda fd, part, at: os.preadv(fd, [part], at), staged, entry.slot)
        if not direct:
            out.copy_(staged)

    def _transfer(self, call, tensor: Tensor, offset: int) -> None:
        if not tensor.numel():
            return
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(memory):  # one call moves at most 2 GiB on Linux
            moved = call(self._file.fileno(), memory[done:], offset + done)
            if not moved:
                raise EOFError(f"disk arena in {self.directory} ends at byte {offset + done}")
            done += moved

    def _release(self, entry: Entry) -> None:
        start, stop = entry.slot, entry.slot + entry.nbytes
        if start == stop:
            return
        before = [hole for hole in self._holes if hole[0] < start]
        after = [hole for hole in self._holes if hole[0] > start]
        if before and sum(before[-1]) == start:
            start = before.pop()[0]
        if after and after[0][0] == stop:
            stop = sum(after.pop(0))
        if stop == self._resident:
            self._charge(start - stop)
            if os.fstat(self._file.fileno()).st_size > start:
                os.ftruncate(self._file.fileno(), start)
            self._holes = before
        else:
            self._holes = [*before, (start, stop - start), *after]
