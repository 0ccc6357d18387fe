"""Write tensors to disk without a second copy in memory, and directories that are whole or absent.

The format is safetensors, read back with its own library; that library's writer copies every
tensor to bytes first, which a memory budget cannot afford.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.units import format_bytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_PIECE = 16 * 2**20


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file and flush it to disk; scratch is one piece of 16 MiB at most.

    Raises:
        HoldfastError: the disk is full or not writable; the partial file is removed.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for tensor in tensors.values():
                _write_tensor(file, tensor.detach())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise HoldfastError(
            f"cannot write {path} ({format_bytes(offset)}): {error.strerror}; "
            "free space or name another directory, earlier files are untouched"
        ) from error


def _write_tensor(file, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    flat = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        if piece.device.type != "cpu":
            piece = piece.cpu()  # a bounded piece, on its way to the file
        file.write(piece.numpy().data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory that appears under its name only when complete and on disk.

    Yields a temporary path beside `target`, which must not exist; on error nothing remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        sync_directory(temporary)
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise HoldfastError(
            f"cannot write {target}: {error.strerror}; earlier files are untouched"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
