"""An agent without a model: fixed patterns decide which function of a memory to call next."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.longterm.language.llm import Rules, Usage
from holdfast.longterm.retrieval.embed import Embedder

_PERSONAL = re.compile(
    r"\b(?:my name is|call me|i live in|i work (?:at|as|for)|i am from|i'm from|my birthday)\b",
    re.I,
)
_ASKS = re.compile(
    r"^\s*(?:who|what|when|where|why|which|how|do|does|did|is|are|was|were|can)\b", re.I
)
_PAGES = 5
_ROW = re.compile(r"^(?:\[[^\]]*\] \w+: )?(.*)$")


class Patterns:
    """Stands in for a model in `MemGPT`: saves who the user is, looks questions up, notes the rest.

    Args:
        embedder: helps to tell which memory answers a question.
    """

    def __init__(self, embedder: Embedder | None = None):
        self.usage = Usage()
        self._rules = Rules(embedder)

    def complete(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The next call for the messages of a context."""
        self.usage.add(sum(len(m["content"].split()) for m in messages), 0)
        events = [json.loads(m["content"]) for m in messages[1:]]
        asked = next(
            (i for i in reversed(range(len(events))) if events[i].get("type") == "user"), 0
        )
        text = events[asked]["text"] if events else ""
        since = events[asked + 1 :]
        called = [event["function"] for event in since if "function" in event]
        results = [event["text"] for event in since if event.get("type") == "result"]
        if "?" in text or _ASKS.match(text):
            if len(called) < 2:
                name = ("archival_search", "recall_search")[len(called)]
                return _call(name, True, query=text)
            # The question itself and others like it may fill a small page.
            if len(called) < _PAGES and not _rows(results) and "more on page" in results[-1]:
                return _call("recall_search", True, query=text, page=len(called) - 1)
            return _call("send_message", False, message=self._answer(text, results))
        if _PERSONAL.search(text):
            if not called:
                return _call("core_append", True, label="human", text=text)
            if results[-1].startswith("error") and len(called) == 1:
                return _call("archival_insert", True, text=text)
        return _call("send_message", False, message="I will remember that.")

    def _answer(self, question: str, results: Sequence[str]) -> str:
        """What was said that answers best; a question does not answer one."""
        rows = _rows(results)
        if not rows:
            return "I do not know."
        return str(self._rules.judge(question, rows))


def _rows(results: Sequence[str]) -> list[str]:
    rows = [_said(row) for result in results for row in result.split("\n")[1:]]
    return [row for row in dict.fromkeys(rows) if row and "?" not in row]


def _said(row: str) -> str:
    text = _ROW.sub(r"\1", row)
    # What the agent said or did itself says nothing about the user.
    return "" if row.find("] assistant: ") > 0 else text


def _call(function: str, again: bool, **arguments: Any) -> dict[str, Any]:
    return {"function": function, "arguments": arguments, "request_heartbeat": again}
