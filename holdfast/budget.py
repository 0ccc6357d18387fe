"""Budget: a cap in bytes for each place. A place that is not named has budget 0."""

from dataclasses import dataclass

from holdfast.errors import UsageError
from holdfast.units import format_bytes, parse_bytes

PLACES = ("device", "host", "disk")


@dataclass(frozen=True)
class Budget:
    """Caps in integer bytes; `Budget.parse("24GiB")` means device only."""

    device: int = 0
    host: int = 0
    disk: int = 0

    def __post_init__(self):
        for place in PLACES:
            value = getattr(self, place)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(
                    f"budget {place}={value!r} is not a number of bytes; "
                    f"use Budget.parse('{place}=24GiB')"
                )

    @classmethod
    def parse(cls, text: "str | int | Budget") -> "Budget":
        """Read "24GiB" or "device=24GiB,host=64GiB,disk=200GiB".

        Raises:
            UsageError: unknown or repeated place, malformed size, or no device bytes.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, int) or "=" not in text:
            caps = {"device": parse_bytes(text)}
        else:
            caps = {}
            for part in text.split(","):
                place, _, size = part.partition("=")
                place = place.strip()
                if place not in PLACES or place in caps:
                    what = "repeated" if place in caps else "unknown"
                    raise UsageError(
                        f"budget {text!r}: {what} place {place!r}; "
                        "expected for example device=24GiB,host=64GiB,disk=200GiB"
                    )
                caps[place] = parse_bytes(size)
        if not caps.get("device"):
            raise UsageError(f"budget {text!r} leaves no device bytes; name for example 24GiB")
        return cls(**caps)

    def __str__(self) -> str:
        caps = {p: getattr(self, p) for p in PLACES if getattr(self, p)}
        return ", ".join(f"{place} {format_bytes(size)}" for place, size in caps.items())
