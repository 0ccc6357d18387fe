"""`Memory` for asyncio, derived from it: there is no second version of anything to keep in step."""

import asyncio
import functools
import os
from collections.abc import Callable
from typing import Any

from holdfast.longterm.memory import Memory


class AsyncMemory:
    """`Memory` for asyncio: the same methods, awaited; each runs in a thread."""

    def __init__(self, path_or_url: str | os.PathLike[str], **options: Any):
        self.sync = Memory(path_or_url, **options)

    async def __aenter__(self) -> "AsyncMemory":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.sync.close)


def _asynchronous(name: str) -> Callable:
    method = getattr(Memory, name)

    @functools.wraps(method)
    async def call(self: AsyncMemory, *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(getattr(self.sync, name), *args, **options)

    return call


for _name in (
    "add", "search", "context", "ask", "get", "get_all", "update", "delete", "purge", "history",
    "as_of", "forget", "summarise", "transact", "export", "import_", "stats", "close",
):  # fmt: skip
    setattr(AsyncMemory, _name, _asynchronous(_name))
