"""Functions by which a model edits the blocks of its context and searches its memory.

Each takes a view and returns changes and a result; what fails raises `UsageError` with a text from
which a model can see what to do instead.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from holdfast.errors import UsageError, unknown
from holdfast.longterm.records import Add, Change, Hit, Item, Retire, Revise
from holdfast.longterm.store.view import View

MESSAGE, PASSAGE, BLOCK = "message", "passage", "block"
FOUND = 100  # memories in the pages of one search
_NAMES = (
    "core_append", "core_replace", "recall_search", "archival_insert", "archival_search",
    "send_message",
)  # fmt: skip
Outcome = tuple[list[Change], str]


class Functions:
    """What a model may call.

    Args:
        limits: tokens that each block holds, by its label.
        room: tokens of a page of results, as `framed` shows them.
        count: tokens of a text.
    """

    def __init__(self, limits: Mapping[str, int], room: int, count: Callable[[str], int]):
        self.limits, self.count = dict(limits), count
        self._room = room
        self.known = {name: getattr(self, name) for name in _NAMES}
        rows = [f"{name}({', '.join(p)}): {inspect.getdoc(self.known[name])}"
                for name in _NAMES if (p := self.parameters(name))]  # fmt: skip
        self.manual = "\n".join(rows)

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """What a model gives to a function: all but the view."""
        return dict(list(inspect.signature(self.known[name]).parameters.items())[1:])

    def call(self, view: View, name: str, arguments: Mapping[str, Any]) -> Outcome:
        """Call a function by its name with arguments of a model's choice."""
        if name not in self.known:
            raise unknown("function", name, self.known)
        known = self.parameters(name)
        missing = [n for n, p in known.items() if p.default is p.empty and n not in arguments]
        wrong = [
            n for n, v in arguments.items() if n not in known or type(v) is not known[n].annotation
        ]
        if missing or wrong:
            form = ", ".join(f"{n}: {p.annotation.__name__}" for n, p in known.items())
            raise UsageError(f"{name} takes {form}; got {dict(arguments)!r:.200}")
        return self.known[name](view, **arguments)

    def blocks(self, view: View) -> dict[str, Item | None]:
        """The memory that each block is; None for an empty one."""
        stored = {item.data["label"]: item for item in view.items(kind=BLOCK)}
        return {label: stored.get(label) for label in self.limits}

    def texts(self, view: View, changes: Iterable[Change] = ()) -> dict[str, str]:
        """The texts of the blocks, after changes that a function has returned."""
        found = {item.id: item for item in self.blocks(view).values() if item}
        texts = {item.data["label"]: item.text for item in found.values()}
        for change in changes:
            if isinstance(change, Add) and change.kind == BLOCK:
                texts[change.data["label"]] = change.text
            elif isinstance(change, Revise | Retire) and change.id in found:
                texts[found[change.id].data["label"]] = getattr(change, "text", "") or ""
        return {label: texts.get(label, "") for label in self.limits}

    def core_append(self, view: View, label: str, text: str) -> Outcome:
        """add a line to a block"""
        old = self._block(view, label)
        return self._written(label, old, f"{old.text}\n{text}" if old else text)

    def core_replace(self, view: View, label: str, old: str, new: str) -> Outcome:
        """replace text that a block has once"""
        block = self._block(view, label)
        times = block.text.count(old) if block and old else 0
        if times != 1:
            raise UsageError(
                f"{old!r:.80} is {times} times in block {label!r}, expected once; "
                + ("quote more of it" if times else f"the block says {block and block.text!r}")
            )
        return self._written(label, block, block.text.replace(old, new))

    def _block(self, view: View, label: str) -> Item | None:
        blocks = self.blocks(view)
        if label not in blocks:
            raise unknown("block", label, blocks)
        return blocks[label]

    def _written(self, label: str, old: Item | None, text: str) -> Outcome:
        size, limit = self.count(text), self.limits[label]
        if size > limit:
            raise UsageError(
                f"block {label!r} would hold {size} tokens, its limit is {limit}; shorten it with "
                "core_replace, or use archival_insert"
            )
        if not text.strip():
            return ([Retire(old.id, "emptied")] if old else []), f"{label} is empty"
        done = f"{label} holds {size} of {limit} tokens"
        if old is None:
            return [Add(text, BLOCK, data={"label": label}, key=label, searchable=False)], done
        return [Revise(old.id, text=text, why="edited by the agent")], done

    def archival_insert(self, view: View, text: str) -> Outcome:
        """store a passage"""
        return [Add(text, PASSAGE, valid_from=view.now)], "stored"

    def archival_search(self, view: View, query: str, page: int = 0) -> Outcome:
        """find passages"""
        _asked(query)
        hits = view.search(query, FOUND, kinds=(PASSAGE,))
        return [], self._page([hit.text for hit in hits], page)

    def recall_search(
        self, view: View, query: str = "", start: str = "", end: str = "", page: int = 0
    ) -> Outcome:
        """find messages by words, dates (ISO 8601, UTC) or both"""
        first, last = (_time(given, name) for given, name in ((start, "start"), (end, "end")))
        if not (query or start or end):
            _asked(query)
        found: Iterable[Item | Hit]
        if query:
            _asked(query)
            found = view.search(query, FOUND, kinds=(MESSAGE,))
        else:
            found = _all(view)
        rows = (
            f"[{one.valid_from:%Y-%m-%d %H:%M}] {one.speaker}: {one.text}"
            for one in found
            if one.valid_from is not None
            and (first is None or one.valid_from >= first)
            and (last is None or one.valid_from < last)
        )
        return [], self._page(rows, page)

    def send_message(self, view: View, message: str) -> Outcome:
        """say something to the user"""
        if not message.strip():
            raise UsageError("the message is empty; say something, or call nothing")
        return [], "sent"

    def _page(self, rows: Iterable[str], page: int) -> str:
        """One page of results, so small that it is never shown cut."""
        number, held = 0, []
        for part in (part for row in rows for part in _split(row, self._room, self._size)):
            if held and self._size("\n".join([*held, part])) > self._room:
                if number == page:
                    return "\n".join([f"page {page}, more on page {page + 1}", *held])
                number, held = number + 1, []
            held.append(part)
        if number != page:
            raise UsageError(f"page={page} is not there; pages are 0 to {number}")
        return "\n".join([f"page {page}, the last", *held]) if held else "nothing found"

    def _size(self, text: str) -> int:
        return self.count(framed("function", f"page 100, more on page 101\n{text}"))


def framed(kind: str, text: str) -> str:
    """What did not come from the model, marked so that no text can pass for another kind."""
    return json.dumps({"type": "result" if kind == "function" else kind, "text": text},
                      ensure_ascii=False)  # fmt: skip


def _all(view: View) -> Iterator[Item]:
    after = 0
    while items := view.items(kind=MESSAGE, limit=200, after=after):
        yield from items
        after = items[-1].position


def _asked(query: str) -> None:
    if not query.strip():
        raise UsageError("the query is empty; say what to look for")


def _time(given: str, name: str) -> datetime | None:
    if not given:
        return None
    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        raise UsageError(
            f"{name}={given!r} is no date; write 2024-05-08 or 2024-05-08T13:56"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _split(text: str, room: int, size: Callable[[str], int]) -> Iterator[str]:
    """A text in pieces that fit, cut between words where it has any."""
    while size(text) > room and len(text) > 1:
        low, high = 1, len(text) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(text[:middle]) <= room else (low, middle - 1)
        space = text.rfind(" ", 1, low + 1)
        low = space if space > 0 else low
        yield text[:low]
        text = text[low:]
    yield text
