"""Files of the disk index: what a kill may leave behind, and how the next opening knows.

A folder holds `manifest.json` and the files that it names. The manifest is replaced in one rename
after everything it names is on disk, so that it always describes a whole index. Bytes behind the
lengths that it gives belong to nobody: a kill left them. Changes since then are in the log; one is
acknowledged once its record is on disk, and a last record that is not whole was never.
"""

import fcntl
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError, UsageError

FORMAT = 2
MANIFEST = "manifest.json"
ADD, REMOVE = 1, 2
BLOCK = 512  # entries of the table of ids that one read takes
ID_TYPE = np.dtype([("id", "<i8"), ("slot", "<u4")])
_RECORD = struct.Struct("<4sIQQI")  # mark, kind, vectors or ids, bytes that follow, checksum
_MARK = b"HFSL"


def damaged(path: Path, what: str) -> HoldfastError:
    return HoldfastError(
        f"{path}: {what} does not match its checksum; the index is a copy of vectors kept "
        "elsewhere: rebuild it with SPANN.build"
    )


def write_at(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def read_at(fd: int, nbytes: int, offset: int) -> np.ndarray:
    """Bytes (nbytes) u8, fewer where the file ends."""
    data = np.empty(nbytes, np.uint8)
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [data[done:]], offset + done)
        if not got:
            break
        done += got
    return data[:done]


class Spool:
    """Rows of one type in an unnamed file; or, with `fd`, in one that has a name."""

    def __init__(self, folder: Path, kind: np.dtype, fd: int | None = None):
        self.kind, self._file = kind, None
        if fd is None:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            fd = self._file.fileno()
        self.fd = fd

    def write(self, rows: np.ndarray, at: int) -> None:
        write_at(self.fd, rows.view(np.uint8).reshape(-1), at * self.kind.itemsize)

    def read(self, start: int, end: int) -> np.ndarray:
        size = self.kind.itemsize
        return read_at(self.fd, (end - start) * size, start * size).view(self.kind)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> int:
    """Write named arrays, flushed; returns the checksum of their description.

    Read back into memory that is ours, not mapped: what the index keeps must be countable.
    """
    described = {
        name: [a.dtype.str, list(a.shape), zlib.crc32(np.ascontiguousarray(a).view(np.uint8))]
        for name, a in arrays.items()
    }
    text = json.dumps(described).encode()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(fd, struct.pack("<Q", len(text)) + text, 0)
        at = 8 + len(text)
        for a in arrays.values():
            if a.nbytes:
                write_at(fd, np.ascontiguousarray(a).reshape(-1).view(np.uint8), at)
            at += a.nbytes
        os.fsync(fd)
    finally:
        os.close(fd)
    return zlib.crc32(text)


def read_arrays(path: Path, check: int) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote.

    Raises:
        HoldfastError: a checksum does not match.
    """
    with open(path, "rb") as file:
        head = file.read(8)
        size = int.from_bytes(head, "little")
        text = file.read(size) if size < 1 << 20 else b""
        if zlib.crc32(text) != check:
            raise damaged(path, "the description of arrays")
        arrays = {}
        for name, (kind, shape, crc) in json.loads(text).items():
            a = np.empty(shape, kind)
            if a.nbytes:
                file.readinto(a.reshape(-1).view(np.uint8).data)
            if zlib.crc32(a.view(np.uint8)) != crc:
                raise damaged(path, f"array {name!r}")
            arrays[name] = a
    return arrays


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Make `manifest` the index: from the rename on, in one step."""
    text = json.dumps(manifest, sort_keys=True)
    document = json.dumps({"index": manifest, "check": zlib.crc32(text.encode())}, indent=1)
    temporary = folder / f".{MANIFEST}"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(fd, document.encode(), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(folder)
    os.replace(temporary, folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is no index.

    Raises:
        HoldfastError: it is damaged.
        UsageError: it has another format.
    """
    manifest = _read_manifest(folder)
    if manifest is not None and manifest["format"] != FORMAT:
        raise UsageError(
            f"{folder} has format {manifest['format']}, this version reads {FORMAT}; rebuild the "
            "index with SPANN.build"
        )
    return manifest


def read_manifest_or_none(folder: Path) -> dict[str, Any] | None:
    """What is there, in any format, or None where it is damaged: a build is the remedy for both.

    Until the build is done, the files of an old format stay for those who read it.
    """
    try:
        return _read_manifest(folder)
    except HoldfastError:
        return None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        document = json.loads(text)
        manifest, check = document["index"], document["check"]
        canonical = json.dumps(manifest, sort_keys=True)
    except (ValueError, TypeError, KeyError):
        raise damaged(folder / MANIFEST, "the manifest") from None
    if zlib.crc32(canonical.encode()) != check:
        raise damaged(folder / MANIFEST, "the manifest")
    return manifest


class Lock:
    """The right to write to an index, held by one process at a time until it is closed."""

    def __init__(self, folder: Path):
        self._fd: int | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UsageError(
                f"{folder} is being written by another process or another open SPANN; "
                "close that one first"
            ) from None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    # An index that nobody holds any more must not keep others from writing.
    __del__ = close


def remove_strays(folder: Path, keep: set[str]) -> None:
    """Delete what killed or replaced builds left. Only the holder of the lock may."""
    for path in folder.iterdir():
        stem = path.name.partition(".")[0]
        if stem in ("vectors", "lists", "ids", "heads", "log") and path.name not in keep:
            path.unlink(missing_ok=True)


def write_ids(path: Path, ids: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write the table from ids, ascending, to slots; returns (first id, checksum) per block."""
    fences, checks = [], []
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(ids), BLOCK * 128):
            piece = slice(start, start + BLOCK * 128)
            rows = np.empty(len(ids[piece]), ID_TYPE)
            rows["id"], rows["slot"] = ids[piece], slots[piece]
            fences.append(rows["id"][::BLOCK].copy())
            checks += [zlib.crc32(rows[i : i + BLOCK]) for i in range(0, len(rows), BLOCK)]
            write_at(file.fileno(), rows.view(np.uint8), start * ID_TYPE.itemsize)
        os.fsync(file.fileno())
    fence = np.concatenate(fences) if fences else np.empty(0, np.int64)
    return fence, np.array(checks, np.uint32)


class Ids:
    """The table from ids to slots: on disk, but for the first id of each block; one read per id."""

    def __init__(self, path: Path, count: int, fence: np.ndarray, check: np.ndarray):
        self._path, self._count, self.fence, self.check = path, count, fence, check
        self._fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def block(self, number: int) -> np.ndarray:
        rows = min(BLOCK, self._count - number * BLOCK)
        data = read_at(self._fd, rows * ID_TYPE.itemsize, number * BLOCK * ID_TYPE.itemsize)
        if zlib.crc32(data) != self.check[number]:
            raise damaged(self._path, f"block {number}")
        return data.view(ID_TYPE)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.block(number) for number in range(len(self.fence)))

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Slots (n) i64 of ids (n) i64; -1 where there is none."""
        out = np.full(len(ids), -1, np.int64)
        where = np.searchsorted(self.fence, ids, "right") - 1
        order = np.argsort(where, kind="stable")
        cuts = np.flatnonzero(np.diff(where[order])) + 1
        for rows in np.split(order, cuts):
            if not len(rows) or where[rows[0]] < 0:
                continue
            block = self.block(int(where[rows[0]]))
            at = np.minimum(np.searchsorted(block["id"], ids[rows]), len(block) - 1)
            hit = block["id"][at] == ids[rows]
            out[rows[hit]] = block["slot"][at[hit]]
        return out


class Log:
    """Changes since the manifest was written; `append` returns once they are on disk."""

    def __init__(self, path: Path, writable: bool):
        self._path, self.end = path, 0
        self._fd: int | None = None
        self._fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)

    @staticmethod
    def create(path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.fsync(fd)
        os.close(fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    __del__ = close

    def read(self, d: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(kind, ids, X (n,d)) of each whole record after `end`, which moves behind it.

        Raises:
            HoldfastError: a record that is not the last is damaged.
        """
        size = os.fstat(self._fd).st_size
        while self.end + _RECORD.size <= size:
            header = read_at(self._fd, _RECORD.size, self.end).tobytes()
            mark, kind, count, nbytes, check = _RECORD.unpack(header)
            after = self.end + _RECORD.size + nbytes
            if mark == _MARK and after > size:
                return
            payload = read_at(self._fd, nbytes if mark == _MARK else 0, self.end + _RECORD.size)
            if mark != _MARK or zlib.crc32(payload, zlib.crc32(header[:-4])) != check:
                rest = read_at(self._fd, size - self.end, self.end)
                # A kill or a power cut can only hurt what came last.
                if _MARK in rest[1:].tobytes():
                    raise damaged(self._path, f"the record at byte {self.end}")
                return
            ids = payload[: 8 * count].view(np.int64)
            X = payload[8 * count :].view(np.float32).reshape(-1, d)
            yield kind, ids, X
            self.end = after

    def append(self, kind: int, ids: np.ndarray, X: np.ndarray | None = None) -> None:
        parts = [
            np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (ids, X) if a is not None
        ]
        nbytes = sum(len(part) for part in parts)
        header = _RECORD.pack(_MARK, kind, len(ids), nbytes, 0)[:-4]
        check = zlib.crc32(header)
        for part in parts:
            check = zlib.crc32(part, check)
        at = self.end + _RECORD.size
        try:
            # What a kill left behind the last whole record must not follow this one.
            os.ftruncate(self._fd, self.end)
            write_at(self._fd, header + struct.pack("<I", check), self.end)
            for part in parts:
                write_at(self._fd, part, at)
                at += len(part)
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self.end)
            raise
        self.end = at
