"""SCM (036): a controller decides whether, which and how much of the past a prompt gets.

Keeps    every turn, and a summary of each long one; the last turn is the flash memory.
Form     text; a summary in `data` of its turn, where the turn has more than `long` words.
Bytes    text + summary + 4d.
Source   B. Wang et al., "Unleashing Infinite-Length Input Capacity for Large-scale Language Models
         with Self-Controlled Memory System", 2023; authors' code read.
Departs  the authors' code shortens turns until they fit and never ends where even the summaries are
         too long; here the least similar ones are dropped then, and at last the text is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.budget import Context, line, words
from holdfast.longterm.language.judgement import Judgement
from holdfast.longterm.policy import Policy, Traits, as_turn
from holdfast.longterm.records import Change, Hit, Item, Turn
from holdfast.longterm.store.view import View

_KINDS = ("turn", "fact")


class SCM(Policy):
    """The last turn, and of the turns most similar to the query as much as answers it.

    Args:
        top_k: turns that are activated.
        budget: tokens of a context at most, whatever more its caller allows.
        flash: tokens up to which the last turn stays as it is; a longer one is summarised.
        long: words above which a turn gets a summary when it is written.
        summary: words of a summary.
        recency: weight of recency beside similarity; it halves each day.
        needed: how well a text must answer the query to be worth its tokens, in 0..1.
    """

    traits = Traits(
        types=("episodic",), form="turns", processes=("encode", "consolidate", "store", "retrieve")
    )

    def __init__(
        self,
        *,
        top_k: int = 6,
        budget: int = 2500,
        flash: int = 500,
        long: int = 300,
        summary: int = 60,
        recency: float = 0.0,
        needed: float = 0.35,
    ):
        if min(top_k, budget, long, summary) < 1 or flash < 0:
            raise UsageError(
                f"top_k={top_k}, budget={budget}, long={long} and summary={summary} must be at "
                f"least 1, flash={flash} at least 0"
            )
        if not 0 <= needed <= 1 or recency < 0:
            raise UsageError(f"needed={needed} must be in 0..1 and recency={recency} at least 0")
        self.top_k, self.budget, self.flash, self.long = top_k, budget, flash, long
        self.summary, self.recency, self.needed = summary, recency, needed

    def write(self, view: View, turns: Sequence[Turn]) -> list[Change]:
        changes: list[Change] = []
        for turn in turns:
            data = {}
            if words(turn.text) > self.long:
                data["summary"] = view.judgement.summarise([turn.text], self.summary)
            changes.append(as_turn(turn, data=data))
        return changes

    def retrieve(self, view: View, query: str, limit: int) -> list[Hit]:
        """Turns by similarity and, with `recency`, age."""
        found = view.nearest(query, limit if not self.recency else view.count(), kinds=_KINDS)
        if self.recency:
            days = np.array([_days(view, item) for item, _ in found])
            bonus = self.recency * 0.5**days
        else:
            bonus = np.zeros(len(found))
        scored = [
            (item, cosine + float(more), {"similarity": cosine, "recency": float(more)})
            for (item, cosine), more in zip(found, bonus, strict=True)
        ]
        scored.sort(key=lambda one: (-one[1], one[0].position))
        return view.hits(scored[:limit])

    def compose(self, view: View, query: str, budget: int, count: Callable[[str], int]) -> Context:
        """The last turn, and before it in their order what the controller lets in.

        Raises:
            UsageError: not even the last turn fits.
        """
        budget = min(budget, self.budget)
        last = [i for kind in _KINDS for i in view.items(kind=kind, newest=True, limit=1)]
        if not last:
            return Context("", 0, budget, ())
        now = max(last, key=lambda item: item.position)
        (flash,) = view.hits([(now, 0.0, {})])
        if count(flash.text) > self.flash:
            flash = _short(flash, now) or flash
        if count(line(flash)) > budget:
            raise UsageError(
                f"a budget of {budget} does not hold the last turn, which takes "
                f"{count(line(flash))}; raise the budget to that"
            )
        hits = [hit for hit in self.retrieve(view, query, self.top_k + 1) if hit.id != now.id]
        activated = hits[: self.top_k]
        if activated and not self._history_is_needed(view, query, activated):
            activated = []
        items = view.get_many(hit.id for hit in activated)
        kept = self._fit(view, query, activated, items, flash, budget, count)
        kept.sort(key=lambda hit: hit.position)
        text = "\n".join(line(hit) for hit in [*kept, flash])
        ids = (*(hit.id for hit in kept), flash.id)
        return Context(text, count(text), budget, ids, len(activated) - len(kept))

    def _history_is_needed(self, view: View, query: str, hits: Sequence[Hit]) -> bool:
        reply = view.judgement.ask(
            "Does answering need anything that was said earlier?",
            {"question": query},
            {
                "type": "object",
                "properties": {"needed": {"type": "boolean"}},
                "required": ["needed"],
                "additionalProperties": False,
            },
        )
        if reply is not None:
            return reply.get("needed") is not False
        # Without a model, and without a usable reply of one, recalling is the safe side.
        return True

    def _fit(
        self,
        view: View,
        query: str,
        hits: Sequence[Hit],
        items: dict[str, Item],
        flash: Hit,
        budget: int,
        count: Callable[[str], int],
    ) -> list[Hit]:
        """What stays of the activated turns, in at most 3 k + 1 steps."""
        # Least similar first, as they give way.
        kept = list(reversed(hits))

        def fits() -> bool:
            ordered = sorted(kept, key=lambda hit: hit.position)
            return count("\n".join(line(hit) for hit in [*ordered, flash])) <= budget

        if fits():
            return kept
        answering: list[Hit] = []
        for hit in kept[:-1]:
            if view.judgement.judge(query, hit.text) < self.needed:
                continue
            short = _short(hit, items[hit.id])
            if short is not None and view.judgement.judge(query, short.text) >= self.needed:
                hit = short
            answering.append(hit)
        kept = [*answering, kept[-1]]
        for place, hit in enumerate(kept):
            if fits():
                return kept
            kept[place] = _short(hit, items[hit.id]) or hit
        while len(kept) > 1 and not fits():
            del kept[0]
        if not fits():
            kept = [_cut(kept[0], flash, budget, count)] if kept else []
        return [hit for hit in kept if hit.text]

    def summarise_document(
        self, judgement: Judgement, chunks: Sequence[str], budget: int = 2300
    ) -> str:
        """One summary of a document of any length: groups of chunks, then groups of summaries.

        Args:
            budget: words of the chunks that are summarised at once.

        Raises:
            UsageError: a chunk of more words than that, or no chunk.
        """
        if not chunks:
            raise UsageError("there are no chunks to summarise; pass the document's text in pieces")
        longest = max(len(chunk.split()) for chunk in chunks)
        if longest > budget:
            raise UsageError(f"a chunk has {longest} words, more than {budget}; cut it in pieces")
        texts = list(chunks)
        while True:
            groups: list[list[str]] = [[]]
            for text in texts:
                size = sum(len(one.split()) for one in groups[-1]) + len(text.split())
                if groups[-1] and size > budget:
                    groups.append([])
                groups[-1].append(text)
            texts = [judgement.summarise(group, self.summary) for group in groups]
            if len(texts) == 1:
                return texts[0]


def _days(view: View, item: Item) -> float:
    return max(0.0, (view.now - (item.valid_from or item.recorded_at)).total_seconds() / 86_400)


def _short(hit: Hit, item: Item) -> Hit | None:
    """A hit with its turn's summary for its text."""
    summary = item.data.get("summary")
    return replace(hit, text=summary) if summary else None


def _cut(hit: Hit, flash: Hit, budget: int, count: Callable[[str], int]) -> Hit:
    """As many of a text's first words as fit before the last turn; none at all may."""
    parts = hit.text.split(" ")
    low, high = 0, len(parts)
    while low < high:
        middle = (low + high + 1) // 2
        short = replace(hit, text=" ".join(parts[:middle]))
        if count(f"{line(short)}\n{line(flash)}") <= budget:
            low = middle
        else:
            high = middle - 1
    return replace(hit, text=" ".join(parts[:low]))
