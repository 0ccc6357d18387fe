"""Long-term memory of agents: one durable store, and published ways to use it."""

from typing import Any

__all__ = ["AsyncMemory", "Memory", "Space"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the room's tools work without what the whole of it needs.
    if name == "Memory":
        from holdfast.longterm.memory import Memory

        return Memory
    if name == "AsyncMemory":
        from holdfast.longterm.asynchronous import AsyncMemory

        return AsyncMemory
    if name == "Space":
        from holdfast.longterm.records import Space

        return Space
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
