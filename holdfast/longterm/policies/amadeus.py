"""AmadeusGPT (056): symbols as pointers from a short chat window into long-term memory.

Keeps    in the window the latest messages; behind it, for good, each symbol's name, the message
         that defined it word for word, its program, and what it found.
Form     `<|name|>` in a message loads what it names into the window, once, however long ago it was
         defined; names are matched exactly. "define <|name|> as ..." writes one.
Bytes    of the window: at most `budget` in `count` of its messages, UTF-8 bytes by default; of the
         store: the UTF-8 of names, definitions, programs and results.
Source   Ye, Lauer, Zhou, A. Mathis, M. W. Mathis, "AmadeusGPT: a natural language interface for
         interactive animal behavioral analysis", NeurIPS 2023.
Departs  what evicts and what loads a symbol is not established; here the oldest messages leave
         first, and a loaded definition counts as a message. Programs are never given to Python:
         they run in an interpreter of a small language over the pose functions. Without a model
         fixed phrases become programs.
"""

import inspect
import json
import re
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from holdfast.errors import HoldfastError, UsageError, unknown
from holdfast.longterm.language.phrases import SYMBOL, phrase
from holdfast.longterm.retrieval.terms import query_terms, stems
from holdfast.longterm.tools import pose as poses
from holdfast.longterm.tools.pose import Events, Pose
from holdfast.longterm.tools.restricted import Stopped, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from holdfast.longterm.language.llm import LLM

REPAIRS = 3
SECONDS = 5.0
_DEFINES = re.compile(r"\s*define\s+<\|([^|<>]+)\|>\s+as\s+(.+)", re.I | re.S)


@dataclass(frozen=True)
class Definition:
    """A symbol: the whole message that defined it, its program, and its result as text."""

    name: str
    text: str
    code: str = ""
    result: str = ""


class Store(Protocol):
    """Where definitions stay: text by name."""

    def get(self, name: str) -> str | None: ...

    def put(self, name: str, text: str) -> None: ...

    def names(self) -> Iterable[str]: ...


class FileStore:
    """A `Store` in one SQLite file; what `put` returned from is on disk."""

    def __init__(self, path: str | Path = ":memory:"):
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("CREATE TABLE IF NOT EXISTS symbol (name TEXT PRIMARY KEY, text TEXT)")
        except sqlite3.Error as error:
            raise UsageError(
                f"{path} does not open as a store of symbols: {error}; name a new file"
            ) from error

    def get(self, name: str) -> str | None:
        row = self._db.execute("SELECT text FROM symbol WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def put(self, name: str, text: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO symbol VALUES (?, ?)", (name, text))

    def names(self) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT name FROM symbol ORDER BY name")]


class SymbolMemory:
    """A window of messages and the symbols behind it; of use to any agent.

    Args:
        budget: the most that the window takes, in `count`.
        count: of a text; UTF-8 bytes by default.
        store: where definitions stay; by default no longer than this object.
    """

    def __init__(
        self,
        budget: int,
        *,
        count: Callable[[str], int] | None = None,
        store: Store | None = None,
    ):
        if budget < 1:
            raise UsageError(f"budget={budget} holds no message; give 1 or more")
        self.budget = budget
        self.count = count or (lambda text: len(text.encode()))
        self.store = store if store is not None else FileStore()
        self._window: deque[tuple[str, str | None]] = deque()
        self.used = 0

    @property
    def window(self) -> list[str]:
        """The messages that a model would see, oldest first."""
        return [text for text, _ in self._window]

    def get(self, name: str) -> Definition:
        """A symbol's definition.

        Raises:
            UsageError: no symbol of exactly this name; names the nearest ones.
        """
        text = self.store.get(name)
        if text is None:
            known = list(self.store.names())
            if not known:
                raise UsageError(
                    f"unknown symbol {name!r}: none is defined; say define <|{name}|> as ..."
                )
            raise unknown("symbol", name, known)
        return Definition(**json.loads(text))

    def define(self, definition: Definition) -> None:
        """Write a symbol; a later definition of the same name takes its place."""
        self.store.put(definition.name, json.dumps(asdict(definition), ensure_ascii=False))
        # What else the window says of it is no longer so.
        self._drop([e for e in self._window if e[1] == definition.name and e[0] != definition.text])

    def read(self, text: str) -> list[Definition]:
        """Take a message into the window, with the symbols that it names and the window lacks.

        Raises:
            UsageError: an undefined symbol, or a message that with its symbols exceeds the budget;
                the window is then as it was.
        """
        defined = _DEFINES.match(text)
        own = defined[1] if defined else None
        found = [self.get(name) for name in dict.fromkeys(SYMBOL.findall(text)) if name != own]
        held = {name: (said, name) for said, name in self._window if name is not None}
        needed = [held.get(d.name, (f"<|{d.name}|>: {d.text}", d.name)) for d in found]
        needed.append((text, own))
        size = sum(self.count(said) for said, _ in needed)
        if size > self.budget:
            raise UsageError(
                f"the message and the {len(found)} symbols that it names take {size}, the window "
                f"holds {self.budget}; shorten them or raise the budget"
            )
        # What is needed and still there moves to the end, so that nothing evicts it first.
        self._drop([entry for entry in needed[:-1] if entry in self._window])
        self._add(needed)
        return found

    def say(self, text: str) -> None:
        """Take an answer into the window; one that exceeds it alone stays out."""
        if self.count(text) <= self.budget:
            self._add([(text, None)])

    def _drop(self, entries: list[tuple[str, str | None]]) -> None:
        for entry in entries:
            self._window.remove(entry)
            self.used -= self.count(entry[0])

    def _add(self, entries: list[tuple[str, str | None]]) -> None:
        self.used += sum(self.count(text) for text, _ in entries)
        while self.used > self.budget:
            self.used -= self.count(self._window.popleft()[0])
        self._window.extend(entries)


@dataclass(frozen=True)
class Result:
    """What was found: its events, the program that found them, and how often it was repaired."""

    events: Events
    code: str
    fps: float
    repairs: int = 0

    @property
    def fig(self) -> "Figure":
        """The events over time; needs matplotlib."""
        from holdfast.plan.figures import plots

        figure = plots().Figure(figsize=(8, 1.5), layout="constrained")
        axes = figure.subplots()
        frames = self.events.frames / self.fps
        axes.broken_barh([(start, stop - start) for start, stop in frames], (0, 1))
        axes.set(xlim=(0, self.events.total / self.fps), yticks=[], xlabel="seconds")
        return figure


class Analyst:
    """Answers questions on behaviour in words, and remembers the behaviours that it was taught.

    Args:
        pose: tracks, or float[T, animals, keypoints, 2 or 3].
        fps: frames per second of an array; None where `pose` has its own.
        llm: writes the programs; without it fixed phrases are understood.
        memory: its budget also bounds what a model is sent.
    """

    def __init__(
        self,
        pose: Pose | np.ndarray,
        fps: float | None = None,
        llm: "LLM | None" = None,
        *,
        memory: SymbolMemory | None = None,
    ):
        if not isinstance(pose, Pose):
            if fps is None:
                raise UsageError("fps is missing; say how many frames of the pose are a second")
            pose = Pose(pose, fps)
        self.pose, self.llm = pose, llm
        self.memory = memory or SymbolMemory(16_384)

    def ask(self, text: str) -> Result:
        """The events that a sentence describes; "define <|name|> as ..." also remembers them.

        Raises:
            UsageError: an undefined symbol, or words that no phrase and no model turns into code.
            Stopped: the program was stopped, after `REPAIRS` corrections by a model.
        """
        self.memory.read(text)
        defined = _DEFINES.match(text)
        wanted = defined[2] if defined else text
        if self.llm is None:
            code = phrase(wanted, self.pose)
            result = Result(self.run(code), code, self.pose.fps)
        else:
            result = self._program(wanted)
        if defined:
            summary = f"{len(result.events)} events"
            self.memory.define(Definition(defined[1], text, result.code, summary))
        self.memory.say(f"{len(result.events)} events")
        return result

    def run(self, code: str) -> Events:
        """The events that a program returns, in at most `SECONDS` with the symbols that it uses.

        Raises:
            Stopped: see `restricted.run`; also if it returns anything but events.
        """
        return self._run(code, (), time.monotonic() + SECONDS)

    def _run(self, code: str, within: tuple[str, ...], end: float) -> Events:
        left = max(end - time.monotonic(), 0.0)
        found = run(code, self._functions(within, end), seconds=left)
        if isinstance(found, np.ndarray) and found.dtype == bool and found.ndim == 1:
            found = poses.events(found)
        if not isinstance(found, Events):
            raise Stopped(f"the program returns {type(found).__name__}, not events or a mask")
        return found

    def _functions(self, within: tuple[str, ...] = (), end: float = 0.0) -> dict[str, Callable]:
        pose, fps = self.pose, self.pose.fps

        def frames(seconds: float) -> int:
            return round(seconds * fps)

        def events(mask: np.ndarray, min_len: float = 0, smooth: float = 0) -> Events:
            """Events of a mask that last `min_len` seconds, gaps of `smooth` seconds closed."""
            return poses.events(mask, frames(min_len), frames(smooth))

        def before(a: Events, b: Events, within: float) -> Events:
            """The events of `a` that end at most `within` seconds before one of `b` begins."""
            return poses.before(a, b, frames(within))

        def symbol(name: str) -> Events:
            """The events of a behaviour that was defined before, as in symbol("name")."""
            if name in within:
                raise Stopped(f"<|{name}|> is defined by itself: {' -> '.join(within)}")
            return self._run(self.memory.get(name).code, (*within, name), end)

        def absolute(x: Any) -> Any:
            """Without its sign."""
            return abs(x)

        def count(a: Events) -> int:
            """How many events."""
            return len(a)

        ours = [pose.speed, pose.distance, pose.heading, pose.angle, pose.inside, pose.size]
        ours += [poses.mask, poses.both, poses.either, poses.overlap]
        named = {function.__name__: function for function in ours}
        return named | {
            "events": events, "before": before, "symbol": symbol, "abs": absolute, "count": count,
        }  # fmt: skip

    def _program(self, text: str) -> Result:
        messages = [
            {"role": "system", "content": self._instructions(text)},
            {"role": "user", "content": "\n".join(self.memory.window)},
        ]
        last: HoldfastError | None = None
        for repairs in range(1 + REPAIRS):
            code = _code(str(self.llm.complete(messages)))
            try:
                return Result(self.run(code), code, self.pose.fps, repairs)
            except (Stopped, UsageError) as error:
                last = error
                messages = [
                    *messages[:2],
                    {"role": "assistant", "content": code},
                    {"role": "user", "content": f"It was stopped: {error}. Write it again."},
                ]
        raise Stopped(f"after {REPAIRS} repairs: {last}") from last

    def _instructions(self, text: str) -> str:
        """How to write a program, with the functions nearest to the words, within the budget."""
        asked = set(query_terms(text))
        docs = []
        for name, function in self._functions().items():
            signature = str(inspect.signature(function)).replace("numpy.ndarray", "array")
            docs.append(f"{name}{signature}: {(function.__doc__ or '').splitlines()[0]}")
        docs.sort(key=lambda doc: -len(asked & set(stems(doc))))
        head = (
            "Write a program in a small part of Python that ends with return of events: names, "
            "numbers, + - * /, & | ~ and comparisons of arrays, if, for, while, and calls of the "
            f"functions below. Animals are 0 to {self.pose.data.shape[1] - 1}; regions are "
            f"{', '.join(self.pose.regions) or 'none'}. Answer with the program only."
        )
        for doc in docs:
            if self.memory.count(f"{head}\n{doc}") <= self.memory.budget:
                head += f"\n{doc}"
        return head


def _code(reply: str) -> str:
    fenced = re.search(r"```(?:python)?\s*\n(.*?)```", reply, re.S)
    return (fenced[1] if fenced else reply).strip()
