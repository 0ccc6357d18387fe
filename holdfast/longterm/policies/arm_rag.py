"""ARM-RAG (157): rationales of solved problems help with problems of the same structure.

Keeps    of each verified solution the problem, its obfuscated text, rationale and answer; failures
         apart from them.
Form     a memory of kind "rationale" whose text is the obfuscated problem, so that search compares
         structures; kind "failure" for what was not verified, which no search finds.
Bytes    text + 4d.
Source   E. Melz, "Enhancing LLM Intelligence with ARM-RAG: Auxiliary Rationale Memory for Retrieval
         Augmented Generation", 2023.
Departs  words are told apart by lists, not by a tagger: whatever is no function word, number word,
         unit or common verb of such problems counts as a name or thing. The same problem under
         other names is left out of the examples unless `seen`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import UsageError
from holdfast.longterm.budget import words
from holdfast.longterm.language.llm import LLM
from holdfast.longterm.language.shapes import record
from holdfast.longterm.language.slots import lemma, listed
from holdfast.longterm.memory import Memory, SpaceLike
from holdfast.longterm.records import Add, Change, Item, Retire
from holdfast.longterm.retrieval.terms import STOP, stem
from holdfast.longterm.store.view import View

SOLVED, FAILED = "rationale", "failure"
_TASK = (
    "Solve the problem step by step. `rationale` is the chain of steps, `answer` the result alone. "
    "The examples are problems that were solved before."
)
_REPLY = record(rationale={"type": "string"}, answer={"type": "string"})
# What says how quantities relate; all other content is story.
_STRUCTURE = frozenset(
    listed(
        """
    zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty
    hundred thousand dozen half third quarter twice double triple thrice times first second last
    many much more fewer less least most total altogether together sum difference equal equally
    average remain remaining rest left extra another every per percent share evenly fraction part
    ratio rate speed distance cost price amount number pair group than
    second minute hour day week month year weekday weekend dollar cent euro pound mile kilometre
    km metre meter foot feet inch gram kilogram kg litre liter gallon ounce degree
    monday tuesday wednesday thursday friday saturday sunday today yesterday tomorrow"""
    )
)
_VERBS = frozenset(
    listed(
        """
    add be become begin borrow bring build buy carry charge collect come contain cook cost count
    cut deliver divide do donate drink drive earn eat fill find finish get give go grow have hold
    keep last leave lend live lose make need pack pay pick plant produce put read receive remain
    return run save sell send share spend split start stop take throw travel use walk want weigh
    win work write"""
    )
)
_SOUNDS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_PRONOUNS = {
    **dict.fromkeys(("he", "she", "they"), "they"),
    **dict.fromkeys(("him", "her", "his", "hers", "their", "theirs", "them"), "their"),
    "an": "a",
}  # fmt: skip
_PART = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+(?:-[^\W\d_]+)*|['’]s\b|[^\w\s]|_")
_DETERMINER = frozenset(listed("a the each every some any his her their its my our your this"))


@dataclass(frozen=True)
class Solution:
    """An answer and how it came about; `used` are the memories that were shown as examples."""

    answer: str
    rationale: str
    used: tuple[str, ...]
    verified: bool


class ARM:
    """Solves problems with the rationales of problems that were solved before.

    Args:
        verify: (problem, answer) -> whether the answer is right; only such solutions are kept.
        k: examples in a prompt, at most 5.
        budget: tokens of the examples, in words and marks.
        tries: attempts at a problem until an answer is verified.
        votes: replies per attempt; the most frequent answer is taken.
        seen: also show the same problem, under the same or other names, if it was solved before.
        space: whose rationales these are; the memory's own by default.
    """

    def __init__(
        self,
        memory: Memory,
        llm: LLM,
        verify: Callable[[str, str], bool],
        *,
        k: int = 3,
        budget: int = 1000,
        tries: int = 1,
        votes: int = 1,
        seen: bool = False,
        space: SpaceLike = None,
    ):
        if not callable(verify):
            raise UsageError(
                f"verify={verify!r} cannot tell right answers, and unverified rationales are never "
                "kept; pass a function of (problem, answer)"
            )
        if not 1 <= k <= 5 or min(tries, votes) < 1:
            raise UsageError(f"k={k} must be 1 to 5, tries={tries} and votes={votes} at least 1")
        self.memory, self.llm, self.verify = memory, llm, verify
        self.k, self.budget, self.tries, self.votes = k, budget, tries, votes
        self.seen, self.space = seen, space

    def examples(self, problem: str) -> list[Item]:
        """Solved problems of the most similar structure, best first."""
        plain = obfuscate(problem)
        with self.memory.reading(space=self.space) as view:
            # The approaches to one problem share its text, so that more than k may be left out.
            found = view.nearest(plain, view.count(SOLVED) or 1, kinds=(SOLVED,))
        items = [item for item, _ in found if self.seen or item.text != plain]
        chosen: list[Item] = []
        used = 0
        for item in items[: self.k]:
            used += words(_shown(item))
            if used <= self.budget:
                chosen.append(item)
        return chosen

    def solve(self, problem: str) -> Solution:
        """Solve a problem; what is verified is remembered, what is not is kept as a failure.

        Raises:
            UsageError: the problem is empty.
            LLMError: the model failed.
        """
        if not problem.strip():
            raise UsageError("the problem is empty; there is nothing to solve")
        examples = self.examples(problem)
        used = tuple(item.id for item in examples)
        solution = None
        for attempt in range(self.tries):
            replies = [
                self.llm.complete(
                    self._prompt(problem, examples, attempt * self.votes + vote), _REPLY
                )
                for vote in range(self.votes)
            ]
            solution = self._voted(problem, replies, used)
            self._keep(problem, solution)
            if solution.verified:
                break
        assert solution is not None
        return solution

    def _prompt(self, problem: str, examples: Sequence[Item], turn: int) -> list[dict[str, str]]:
        # A model that is asked the same again says the same again: examples change places.
        start = turn % max(1, len(examples))
        shown = [_shown(item) for item in [*examples[start:], *examples[:start]]]
        return [
            {"role": "system", "content": _TASK},
            {"role": "user", "content": "\n\n".join([*shown, f"Problem: {problem}"])},
        ]

    def _voted(self, problem: str, replies: Sequence[Any], used: tuple[str, ...]) -> Solution:
        answers = [reply["answer"].strip() for reply in replies]
        answer = max(dict.fromkeys(answers), key=answers.count)
        rationales = [r["rationale"] for r, a in zip(replies, answers, strict=True) if a == answer]
        verified = bool(self.verify(problem, answer))
        return Solution(answer, min(rationales, key=len), used, verified)

    def _keep(self, problem: str, solution: Solution) -> None:
        said = {"problem": problem, "rationale": solution.rationale, "answer": solution.answer}
        plain = obfuscate(problem)

        def decide(view: View) -> list[Change]:
            if not solution.verified:
                return [Add(problem, FAILED, metadata=said, key=solution.rationale,
                            searchable=False)]  # fmt: skip
            way = approach(solution.rationale)
            same = [
                item
                for item in view.items(kind=SOLVED)
                if item.text == plain and item.data["approach"] == way
            ]
            if any(len(item.metadata["rationale"]) <= len(solution.rationale) for item in same):
                return []
            ended: list[Change] = [Retire(item.id, "a shorter rationale") for item in same]
            data = {"approach": way, "verified": True}
            return [*ended, Add(plain, SOLVED, data=data, metadata=said, key=solution.rationale)]

        self.memory.transact(decide, space=self.space)


def approach(rationale: str) -> str:
    """What tells ways to solve a problem apart: its arithmetic signs in their order."""
    return "".join(re.findall(r"(?<=[\d\s)])[-+*/×÷=%](?=[\s\d($])", rationale))


def obfuscate(text: str, *, numbers: bool = False) -> str:
    """A text with made-up words for its names and things, the same for each word throughout.

    Args:
        numbers: also replace numbers, by N.
    """
    out: list[str | tuple[str, bool]] = []  # words, and the heads of names and things
    before = ""
    for match in _PART.finditer(text):
        part, low, start = match[0], match[0].lower(), match.start()
        if part[0].isalpha() and not _structural(low, before):
            named = part[0].isupper() and before not in ("", ".", "?", "!")
            # Of "red apples" the last word says what is meant, "Ann apples" are two.
            if out and isinstance(out[-1], tuple) and out[-1][1] == named:
                out.pop()
            out.append((stem(low), named))
        else:
            shown = _PRONOUNS.get(low, low)
            if part[0].isdigit():
                shown = "N" if numbers else part
            space = " " if start and (text[start - 1].isspace() or part[0].isalnum()) else ""
            out.append(space + shown)
        before = low
    heads = dict.fromkeys(one[0] for one in out if isinstance(one, tuple))
    made = {head: f" {_nonsense(number)}" for number, head in enumerate(heads)}
    return "".join(made[one[0]] if isinstance(one, tuple) else one for one in out).strip()


def _structural(word: str, before: str) -> bool:
    if word in STOP or word in _STRUCTURE or stem(word) in _STEMS:
        return True
    # "a plant", "3 plants", but "they plant".
    thing = before in _DETERMINER or before[:1].isdigit()
    return lemma(word) in _VERBS and not thing


def _nonsense(number: int) -> str:
    """A word without meaning or digits, another for each number."""
    first, second = divmod(number, len(_SOUNDS))
    return f"{_SOUNDS[second]}o{_SOUNDS[(second * 5 + 3 * first + 2) % 14]}u" + "x" * first


def _shown(item: Item) -> str:
    said = item.metadata
    return f"Problem: {said['problem']}\nRationale: {said['rationale']}\nAnswer: {said['answer']}"


_STEMS = frozenset(map(stem, _STRUCTURE))
