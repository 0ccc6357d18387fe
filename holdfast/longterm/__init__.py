"""Long-term memory of agents: one durable store, and published ways to use it."""

from typing import Any

__all__ = ["AsyncMemory", "Memory", "Space"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the room's tools work without what the whole of it needs.
    if name in ("AsyncMemory", "Memory"):
        from holdfast.longterm import memory

        return getattr(memory, name)
    if name == "Space":
        from holdfast.longterm.records import Space

        return Space
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
