"""Native CPU kernels: built at install time where a C++ compiler exists, never required.

The library is plain C called through ctypes, so it has no tie to torch's or Python's ABI. It is
opened on first use. The environment variable `HOLDFAST_NATIVE` forces a variant (portable, avx2,
avx512) or turns it off (off).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from holdfast.errors import UsageError

VARIANTS = ("portable", "avx2", "avx512")
_PATH = Path(__file__).with_name("_kernels.so")
_forced: list[str] = []

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Hyper(ctypes.Structure):
    """The numbers of one AdamW step, in double precision as Python has them."""

    _fields_ = [(n, ctypes.c_double) for n in ("lr", "b1", "b2", "eps", "weight_decay", "step")]


_SIGNATURES = {
    "hf_variants": (_int, []),
    "hf_adamw4": (
        _int,
        [_int, _int, _int, _long, _int, _pointer, _pointer, _int, _pointer, _int] + [_pointer] * 6,
    ),
    "hf_adamw": (None, [_long, _pointer, _int, _pointer, _int, _pointer, _pointer, _pointer]),
    "hf_adamw8": (
        None,
        [_int, _int, _long, _int, _pointer, _int, _pointer, _int] + [_pointer] * 8,
    ),
    "hf_pack": (None, [_int] * 4 + [_long] * 2 + [_pointer] * 2),
    "hf_steps": (None, [_int] * 5 + [_long, _pointer, _int] + [_pointer] * 3),
    "hf_affine": (None, [_int] * 3 + [_long] * 3 + [_pointer, _long] + [_pointer] * 3),
}


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if not _PATH.exists():
        return None, "not built: no C++ compiler at install time; reinstall where one exists"
    try:
        # torch is imported above, so that its OpenMP runtime is the one both use.
        library = ctypes.CDLL(str(_PATH))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{_PATH.name} cannot be used ({error}); reinstall to build it again"
    return library, ""


@cache
def _choose(asked: str) -> tuple[str, str]:
    """(variant, "") or ("", why the library stays unused) for a value of HOLDFAST_NATIVE."""
    if asked == "off":
        return "", "turned off by HOLDFAST_NATIVE=off"
    library, reason = _open()
    if library is None:
        return "", reason
    usable = VARIANTS[: library.hf_variants() + 1]
    if asked and asked not in VARIANTS:
        return "", f"HOLDFAST_NATIVE={asked!r} is not one of off, {', '.join(VARIANTS)}"
    if asked and asked not in usable:
        return "", f"HOLDFAST_NATIVE={asked}: this CPU runs only {', '.join(usable)}"
    return asked or usable[-1], ""


def _asked() -> str:
    return _forced[-1] if _forced else os.environ.get("HOLDFAST_NATIVE", "")


def turned_off() -> bool:
    """Whether HOLDFAST_NATIVE or `force` says that torch does all work."""
    return _asked() == "off"


def status() -> dict[str, bool | str]:
    """{"available", "reason", "variant"}: whether kernels are used, why not, and which."""
    variant, reason = _choose(_asked())
    return {"available": bool(variant), "reason": reason, "variant": variant}


def usable() -> list[str]:
    """Variants that run on this machine, slowest first; empty without the library."""
    library, _ = _open()
    return [] if library is None else list(VARIANTS[: library.hf_variants() + 1])


def library() -> tuple[ctypes.CDLL, int] | None:
    """The library and the number of the variant to run, or None where torch must do the work."""
    variant, _ = _choose(_asked())
    if not variant:
        return None
    opened, _ = _open()
    assert opened is not None
    return opened, VARIANTS.index(variant)


@contextmanager
def force(variant: str) -> Iterator[None]:
    """Use "portable", "avx2", "avx512" or "off" inside the block, whatever HOLDFAST_NATIVE says.

    Raises:
        UsageError: the variant does not run here.
    """
    chosen, reason = _choose(variant)
    if not chosen and variant != "off":
        raise UsageError(f"native variant {variant!r} cannot be used: {reason}")
    _forced.append(variant)
    try:
        yield
    finally:
        _forced.pop()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# GNU's OpenMP hangs in a forked child whose parent has used threads, as torch's own operators do.
os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads for a kernel: as many as torch uses, one in a forked process."""
    return 1 if _forked else torch.get_num_threads()
