"""Parse and print bytes. "24GiB" is not "24GB": both are accepted and kept apart."""

import re

from holdfast.errors import UsageError

_FACTORS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _FACTORS[f"{_letter}B"] = 1000**_power
    _FACTORS[f"{_letter}IB"] = 1024**_power
_PATTERN = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes in "512", "24GiB", "1.5 GB" or an integer.

    Raises:
        UsageError: negative, no number, an unknown unit, or not a whole number of bytes.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UsageError(f"size {text!r} is not a number of bytes; write for example 24GiB")
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"size {text} is negative; write for example 24GiB")
        return text
    match = _PATTERN.fullmatch(text)
    if match is None or match[2].upper() not in _FACTORS:
        raise UsageError(
            f"size {text!r} is malformed; expected a number and one of "
            "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, for example 24GiB (1024-based) or 24GB"
        )
    number, factor = match[1].replace("_", ""), _FACTORS[match[2].upper()]
    whole, _, fraction = number.partition(".")
    scaled, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
    # A fraction of a byte is dropped for units, refused for plain bytes.
    if rest and factor == 1:
        raise UsageError(f"size {text!r} is not a whole number of bytes")
    return scaled


def format_bytes(count: int | float) -> str:
    """`count` bytes for people: "512 B", "1.50 KiB", "24.00 GiB"; negative counts keep the sign."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size < 1024:
        return f"{sign}{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if size < 1024 or unit == "PiB":
            return f"{sign}{size:.2f} {unit}"
    raise AssertionError
