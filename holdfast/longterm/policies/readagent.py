"""ReadAgent (026): pages of a long text by their gists, opened again where a question needs them.

Keeps    each page word for word, a gist of it, and gists of gists where there are many.
Form     memories of kinds "document", "page" and "gist", in the text's order. Gists are made when
         the text is read, before any question.
Bytes    text + gists, at most `share` of the words of what they stand for; + 4d for each page.
Source   K.-H. Lee et al., "A Human-Inspired Reading Agent with Gist Memory of Very Long Contexts",
         2024; the numbers 280 and 600 are recalled.
Departs  without a model a page ends where the paragraphs around are least alike, and a gist is a
         selection of sentences. Gists that take more than half of a budget are replaced by those of
         eight pages each, and so on; an opened page then follows the gist that it belongs to.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from holdfast.errors import UsageError, unknown
from holdfast.longterm.budget import Context, words
from holdfast.longterm.language.judgement import FallbackWarning, Judgement, Rules
from holdfast.longterm.language.prompted import Prompted
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.memory import Memory, SpaceLike
from holdfast.longterm.records import Add, Change, Item
from holdfast.longterm.store.view import View

MODES = ("P", "S")
DOCUMENT, PAGE, GIST = "document", "page", "gist"
GROUP = 8  # gists that one gist of the next level stands for
TURNS = 6  # of a sequential look-up
AROUND = 3  # paragraphs on each side of a break that are compared
_PARAGRAPH = re.compile(r".*?(?:\n[ \t]*\n\s*|\Z)", re.S)
_NUMBER = {"type": "integer"}
_BREAK = "Give the number of the best place to break the text: where one subject ends."
_LOOK = (
    "You read a text page by page and remember gists. Give the numbers of the pages, the most "
    "useful first, that must be read again to answer the question; none if the gists suffice."
)


class ReadAgent:
    """Reads texts longer than any context.

    Args:
        memory: where documents stay; its language model, if it has one, chooses breaks, writes
            gists and looks pages up.
        low, high: words between which a page ends; a longer paragraph is a page of its own.
        share: words of a gist by those of what it stands for.
        space: whose documents these are; the memory's own by default.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        low: int = 280,
        high: int = 600,
        share: float = 0.15,
        space: SpaceLike = None,
    ):
        if not 1 <= low <= high:
            raise UsageError(f"low={low} and high={high} must be 1 or more and in this order")
        if not 0 < share <= 0.2:
            raise UsageError(f"share={share} is outside (0, 0.2]; a gist is at most a fifth")
        self.memory, self.low, self.high, self.share = memory, low, high, share
        self.space = space

    def read(self, text: str, title: str = "document") -> "Document":
        """Read a text into the memory; one that was read before is found again.

        Raises:
            UsageError: an empty text or title.
        """
        if not text.strip() or not title.strip():
            raise UsageError("there is no text or no title; pass both")
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        with self.memory.reading(space=self.space) as view:
            for item in view.items(kind=DOCUMENT):
                if item.data["digest"] == digest:
                    return Document(self, item.id)
        judge = _judgement(self.memory)
        pages = self.pages(text, judge)
        levels = self._gists(pages, judge)

        def decide(view: View) -> list[Change]:
            root = Add(title, DOCUMENT, data={"digest": digest}, key=digest, searchable=False)
            made = [
                Add(
                    page, PAGE, data={"document": digest, "number": number},
                    key=f"{digest}:{number}", sources=(root,),
                )
                for number, page in enumerate(pages)
            ]  # fmt: skip
            gists = [
                Add(
                    gist, GIST, key=f"{digest}:{level}:{first}", searchable=False,
                    data={"document": digest, "level": level, "first": first, "last": last},
                    sources=made[first : last + 1],
                )
                for level, some in enumerate(levels)
                for first, last, gist in some
            ]  # fmt: skip
            return [root, *made, *gists]

        return Document(self, self.memory.transact(decide, space=self.space)[0])

    def pages(self, text: str, judge: Judgement | None = None) -> list[str]:
        """A text in pages, which joined are the text."""
        judge = judge if judge is not None else _judgement(self.memory)
        parts = [part for part in _PARAGRAPH.findall(text) if part]
        sizes = [len(part.split()) for part in parts]
        pages, start = [], 0
        while start < len(parts):
            end, total = start + 1, sizes[start]
            breaks = []
            while end < len(parts) and total + sizes[end] <= self.high:
                if total >= self.low:
                    breaks.append(end)
                total += sizes[end]
                end += 1
            if end < len(parts) and breaks:
                end = self._break(parts, start, [*breaks, end], judge)
            pages.append("".join(parts[start:end]))
            start = end
        return pages

    def _break(
        self, parts: Sequence[str], start: int, breaks: Sequence[int], judge: Judgement
    ) -> int:
        passage = []
        for i in range(start, breaks[-1]):
            passage += [f"<{breaks.index(i)}>"] if i in breaks else []
            passage.append(parts[i].strip())
        answer = judge.ask(
            _BREAK,
            {"passage": "\n".join([*passage, f"<{len(breaks) - 1}>"])},
            record(number={"type": "integer", "minimum": 0, "maximum": len(breaks) - 1}),
        )
        if answer is not None:
            return breaks[answer["number"]]
        sides = [
            " ".join(side)
            for at in breaks
            for side in (parts[max(start, at - AROUND) : at], parts[at : at + AROUND])
        ]
        rows = self.memory.embedder.encode(sides)
        return breaks[int(np.argmin(np.sum(rows[::2] * rows[1::2], 1)))]

    def _gists(self, pages: Sequence[str], judge: Judgement) -> list[list[tuple[int, int, str]]]:
        """For each level (first page, last page, gist)."""
        levels = [[(i, i, self._gist([page], judge)) for i, page in enumerate(pages)]]
        while len(levels[-1]) > 1:
            below = levels[-1]
            groups = [below[i : i + GROUP] for i in range(0, len(below), GROUP)]
            levels.append(
                [(g[0][0], g[-1][1], self._gist([one[2] for one in g], judge)) for g in groups]
            )
        return levels

    def _gist(self, texts: Sequence[str], judge: Judgement) -> str:
        size = sum(len(text.split()) for text in texts)
        room = max(1, int(self.share * size))
        # Where no sentence is short enough the first words have to do.
        return judge.summarise(texts, room) or " ".join(" ".join(texts).split()[:room]) or "(blank)"


class Document:
    """A text that was read; `id` is the memory that its pages are made from."""

    def __init__(self, reader: ReadAgent, id: str):
        self.reader, self.id = reader, id

    def pages(self) -> list[Item]:
        """The pages in order."""
        with self.reader.memory.reading(space=self.reader.space) as view:
            return self._of(view)[0]

    def gists(self) -> list[list[Item]]:
        """For each level the gists in order; those of single pages come first."""
        with self.reader.memory.reading(space=self.reader.space) as view:
            return self._of(view)[1]

    def _of(self, view: View) -> tuple[list[Item], list[list[Item]]]:
        made = view.get_many(view.derived([self.id])[self.id])
        pages = sorted(made.values(), key=lambda item: item.data["number"])
        below = view.derived([page.id for page in pages])
        gists = view.get_many(dict.fromkeys(i for some in below.values() for i in some)).values()
        levels: list[list[Item]] = [[] for _ in range(1 + max(g.data["level"] for g in gists))]
        for gist in sorted(gists, key=lambda item: item.data["first"]):
            levels[gist.data["level"]].append(gist)
        return pages, levels

    def compression(self, context: Context) -> float:
        """Percent of the document's words that a context saves."""
        whole = sum(len(page.text.split()) for page in self.pages())
        return 100 * (1 - len(context.text.split()) / whole)

    def context(
        self,
        question: str,
        budget: int,
        mode: str = "P",
        *,
        pages: int = 5,
        count: Callable[[str], int] | None = None,
    ) -> Context:
        """The gists in order, with the pages that a question needs in their place.

        Args:
            budget: tokens, by `count`, words and punctuation marks by default.
            mode: "P": pages are chosen at once; "S": one after another, in view of those before.
            pages: how many are opened at most; in mode "S" there are at most 6 turns.

        Raises:
            UsageError: an unknown mode, an empty question, or a budget below the shortest gists.
        """
        if mode not in MODES:
            raise unknown("mode of looking up", mode, MODES)
        if not question.strip() or pages < 0:
            raise UsageError(f"question={question!r} is empty or pages={pages} is negative")
        count = count or words
        memory, space = self.reader.memory, self.reader.space
        with memory.reading(space=space) as view:
            every, levels = self._of(view)
            sizes = [count(_laid_out(gists, {})) for gists in levels]
            fitting = [i for i, size in enumerate(sizes) if size <= budget]
            if not fitting:
                raise UsageError(
                    f"a budget of {budget} is below the shortest gists of the document, which take "
                    f"{min(sizes)}; raise it to that"
                )
            roomy = [i for i in fitting if sizes[i] <= budget / 2 or not pages]
            gists = levels[roomy[0] if roomy else min(fitting, key=lambda i: sizes[i])]
            opened: dict[int, Item] = {}
            if mode == "P":
                for page in self._chosen(view, question, gists, every, opened, pages):
                    _open(page, gists, opened, budget, count)
            else:
                for _ in range(min(pages, TURNS)):
                    chosen = self._chosen(view, question, gists, every, opened, 1)
                    if not chosen or not _open(chosen[0], gists, opened, budget, count):
                        break
        text = _laid_out(gists, opened)
        ids = (*(g.id for g in gists), *(p.id for _, p in sorted(opened.items())))
        return Context(text, count(text), budget, ids, len(every) - len(opened))

    def _chosen(
        self,
        view: View,
        question: str,
        gists: Sequence[Item],
        every: Sequence[Item],
        opened: dict[int, Item],
        limit: int,
    ) -> list[Item]:
        """Pages to open, at most `limit`, none that is open."""
        by_number = {page.data["number"]: page for page in every}
        left = {number: page for number, page in by_number.items() if number not in opened}
        if not limit or not left:
            return []
        given: dict[str, Any] = {"question": question, "text": _laid_out(gists, opened)}
        answer = view.judgement.ask(
            f"{_LOOK} At most {limit}.", given, record(pages=listing(_NUMBER))
        )
        if answer is None:
            hits = view.search(question, limit, among=[page.id for page in left.values()])
            found = {page.id: page for page in left.values()}
            return [found[hit.id] for hit in hits]
        strange = [number for number in answer["pages"] if number not in by_number]
        if strange:
            warnings.warn(
                f"there are no pages {strange}, only 0 to {max(by_number)}; they are left out",
                FallbackWarning,
                stacklevel=3,
            )
        return [left[n] for n in dict.fromkeys(answer["pages"]) if n in left][:limit]


def _open(
    page: Item,
    gists: Sequence[Item],
    opened: dict[int, Item],
    budget: int,
    count: Callable[[str], int],
) -> bool:
    """Open a page if the whole then stays within the budget; whether it did."""
    number = page.data["number"]
    fits = count(_laid_out(gists, {**opened, number: page})) <= budget
    if fits:
        opened[number] = page
    return fits


def _laid_out(gists: Sequence[Item], opened: dict[int, Item]) -> str:
    rows = []
    for gist in gists:
        first, last = gist.data["first"], gist.data["last"]
        inside = [number for number in range(first, last + 1) if number in opened]
        if not inside or first != last:
            name = f"Page {first}" if first == last else f"Pages {first}-{last}"
            rows.append(f"<{name}>\n{gist.text}")
        rows += [f"<Page {number}>\n{opened[number].text.strip()}" for number in inside]
    return "\n".join(rows)


def _judgement(memory: Memory) -> Judgement:
    # Reading takes many answers, one after the other: too long for a transaction.
    rules = Rules(memory.embedder)
    return rules if memory.llm is None else Prompted(memory.llm, rules)
