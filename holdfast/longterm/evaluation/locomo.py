"""LoCoMo and LongMemEval: long conversations with questions, and how much of the answers is found.

Source   A. Maharana et al., "Evaluating Very Long-Term Conversational Memory of LLM Agents", 2024;
         D. Wu et al., "LongMemEval: Benchmarking Chat Assistants on Long-Term Interactive Memory",
         2024.
Departs  evidence is repaired: strings that join several ids are split, misspelt ids put right, ids
         that no turn has dropped; a question left without evidence is kept but not scored.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from holdfast import host
from holdfast.errors import UsageError

CATEGORIES = {
    1: "multi-hop",
    2: "temporal",
    3: "open-domain",
    4: "single-hop",
    5: "adversarial",
}


@dataclass(frozen=True)
class Turn:
    """What somebody said; `id` is unique in its conversation, `when` is the session's, in UTC."""

    id: str
    session: str
    speaker: str
    text: str
    when: datetime

    @property
    def line(self) -> str:
        return f"{self.speaker}: {self.text}"


@dataclass(frozen=True)
class Question:
    """`evidence` are the ids of turns that answer it, `sessions` those of their sessions."""

    text: str
    answer: str
    category: str
    evidence: tuple[str, ...]
    sessions: tuple[str, ...]
    when: datetime | None = None


@dataclass(frozen=True)
class Conversation:
    id: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


def path() -> Path:
    """Where the five conversations lie: `locomo/locomo5.json` under `HOLDFAST_DATA`."""
    return host.data_dir() / "locomo" / "locomo5.json"


def load(source: str | Path, ids: Iterable[str] | None = None) -> list[Conversation]:
    """The conversations of a LoCoMo file, in its order, or only those named.

    Raises:
        UsageError: no such file, not LoCoMo's layout, or no conversation of that name.
    """
    read = [_conversation(item) for item in _items(source, "conversation")]
    if ids is None:
        return read
    by_id = {conversation.id: conversation for conversation in read}
    missing = [name for name in ids if name not in by_id]
    if missing:
        raise UsageError(f"{source} has no {', '.join(missing)}; it has {', '.join(by_id)}")
    return [by_id[name] for name in ids]


def _items(source: str | Path, key: str) -> list[dict[str, Any]]:
    try:
        items = json.loads(Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{source} does not exist; name the benchmark's JSON file") from None
    except ValueError as error:
        raise UsageError(f"{source} is not JSON: {error}") from None
    items = items if isinstance(items, list) else [items]
    if not items or any(not isinstance(item, dict) or key not in item for item in items):
        raise UsageError(f"{source} is not laid out as expected: its items need {key!r}")
    return items


def moment(text: str) -> datetime:
    """ "1:56 pm on 8 May, 2023" or "2023/05/20 (Sat) 02:21" in UTC.

    Raises:
        UsageError: the text is in neither form.
    """
    plain = re.sub(r"\s*\(\w+\)\s*", " ", text.strip())
    for form in ("%I:%M %p on %d %B, %Y", "%Y/%m/%d %H:%M"):
        try:
            return datetime.strptime(plain, form).replace(tzinfo=UTC)
        except ValueError:
            continue
    raise UsageError(
        f"{text!r} is no date here; expected '1:56 pm on 8 May, 2023' or '2023/05/20 (Sat) 02:21'"
    )


def _conversation(item: Mapping[str, Any]) -> Conversation:
    said = item["conversation"]
    sessions = sorted(
        int(name.removeprefix("session_")) for name in said if re.fullmatch(r"session_\d+", name)
    )
    turns = tuple(
        Turn(
            turn["dia_id"],
            str(session),
            turn["speaker"],
            _with_caption(turn),
            moment(said[f"session_{session}_date_time"]),
        )
        for session in sessions
        for turn in said[f"session_{session}"]
    )
    session_of = {turn.id: turn.session for turn in turns}
    questions = []
    for asked in item["qa"]:
        evidence = repair(asked.get("evidence", []), session_of)
        questions.append(
            Question(
                asked["question"],
                str(asked.get("answer", asked.get("adversarial_answer", ""))),
                CATEGORIES[asked["category"]],
                evidence,
                tuple(dict.fromkeys(session_of[turn] for turn in evidence)),
            )
        )
    return Conversation(item["sample_id"], turns, tuple(questions))


def _with_caption(turn: Mapping[str, Any]) -> str:
    caption = turn.get("blip_caption")
    return f"{turn['text']} [{caption}]" if caption else turn["text"]


def repair(evidence: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Evidence as distinct ids among `known`: "D8:6; D9:17", "D:11:26", "D30:05" are understood."""
    known = set(known)
    found = (
        f"D{int(session)}:{int(turn)}"
        for text in evidence
        for session, turn in re.findall(r"D:?(\d+):(\d+)", text)
    )
    return tuple(dict.fromkeys(one for one in found if one in known))


def load_longmemeval(source: str | Path) -> list[Conversation]:
    """LongMemEval's questions, each with its own haystack as a conversation.

    A question whose id ends in `_abs` has no answer to find: its category says so and its evidence
    is empty.
    """
    return [_haystack(item) for item in _items(source, "haystack_sessions")]


def _haystack(item: Mapping[str, Any]) -> Conversation:
    turns, evidence = [], []
    for name, date, said in zip(
        item["haystack_session_ids"],
        item["haystack_dates"],
        item["haystack_sessions"],
        strict=True,
    ):
        for turn in said:
            # The same session may be drawn twice; only its place makes it unique.
            turns.append(Turn(f"{len(turns)}", name, turn["role"], turn["content"], moment(date)))
            if turn.get("has_answer"):
                evidence.append(turns[-1].id)
    abstain = item["question_id"].endswith("_abs")
    question = Question(
        item["question"],
        str(item["answer"]),
        item["question_type"] + ("_abs" if abstain else ""),
        () if abstain else tuple(evidence),
        () if abstain else tuple(item["answer_session_ids"]),
        moment(item["question_date"]),
    )
    return Conversation(item["question_id"], tuple(turns), (question,))


@dataclass(frozen=True)
class Score:
    """One question's figures: shares of its evidence by k and by token budget."""

    conversation: str
    question: Question
    recall: dict[int, float]
    packed: dict[int, float]
    sessions: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Scores of all questions that have evidence, in order."""

    scores: list[Score] = field(repr=False)

    def recall(self, k: int, category: str | None = None) -> float:
        """Mean evidence recall@k in percent, of one category or of all; NaN without questions."""
        return _mean(s.recall[k] for s in self.scores if category in (None, s.question.category))

    def packed(self, budget: int) -> float:
        """Mean share of the evidence inside a context of `budget` tokens, in percent."""
        return _mean(score.packed[budget] for score in self.scores)

    def sessions(self, name: str) -> float:
        """Mean of "any@k", "all@k" or "ndcg@k" over sessions, in percent."""
        return _mean(score.sessions[name] for score in self.scores)

    def categories(self) -> list[str]:
        return sorted({score.question.category for score in self.scores})


def _mean(shares: Iterable[float]) -> float:
    shares = list(shares)
    return 100 * sum(shares) / len(shares) if shares else math.nan


def evaluate(
    search: Callable[[str, Question], Sequence[str]],
    data: Sequence[Conversation],
    ks: Sequence[int] = (5, 10, 20, 50),
    budgets: Sequence[int] = (500, 1000, 2000),
    count: Callable[[str], int] = lambda text: len(re.findall(r"\w+|[^\w\s]", text)),
) -> Report:
    """What `search` finds of the evidence.

    Args:
        search: (conversation's id, question) -> ids of turns, best first.
        count: tokens of a text; a packed context takes turns by rank, leaving out what is too long.

    Raises:
        UsageError: a search returned an id that is no turn, or one twice.
    """
    scores = []
    for conversation in data:
        sizes = {turn.id: count(turn.line) for turn in conversation.turns}
        session_of = {turn.id: turn.session for turn in conversation.turns}
        for question in conversation.questions:
            if not question.evidence:
                continue
            ranked = list(search(conversation.id, question))
            if len(set(ranked)) != len(ranked) or not sizes.keys() >= set(ranked):
                raise UsageError(
                    f"the search of {conversation.id} for {question.text!r} returned ids twice or "
                    "ids of no turn; return each turn's id at most once"
                )
            found = list(dict.fromkeys(session_of[turn] for turn in ranked))
            scores.append(
                Score(
                    conversation.id,
                    question,
                    {k: _share(question.evidence, ranked[:k]) for k in ks},
                    {b: _share(question.evidence, _packed(ranked, sizes, b)) for b in budgets},
                    {
                        f"{name}@{k}": measure(question.sessions, found[:k])
                        for k in ks
                        for name, measure in _SESSIONS.items()
                    },
                )
            )
    return Report(scores)


def _share(wanted: Sequence[str], got: Iterable[str]) -> float:
    return len(set(wanted) & set(got)) / len(set(wanted))


def _packed(ranked: Sequence[str], sizes: Mapping[str, int], budget: int) -> list[str]:
    kept = []
    for turn in ranked:
        if sizes[turn] <= budget:
            budget -= sizes[turn]
            kept.append(turn)
    return kept


def _ndcg(wanted: Sequence[str], got: Sequence[str]) -> float:
    gain = sum(1 / math.log2(2 + rank) for rank, one in enumerate(got) if one in wanted)
    best = sum(1 / math.log2(2 + rank) for rank in range(min(len(wanted), len(got))))
    return gain / best if best else 0.0


_SESSIONS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "any": lambda wanted, got: float(bool(set(wanted) & set(got))),
    "all": lambda wanted, got: float(set(wanted) <= set(got)),
    "ndcg": _ndcg,
}


def difference(
    ours: Report, base: Report, k: int = 10, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of recall@k in points and its 95 % interval, by paired bootstrap.

    Raises:
        UsageError: the two reports are of different questions.
    """
    if [s.question for s in ours.scores] != [s.question for s in base.scores]:
        raise UsageError(
            "the two reports are of different questions; evaluate both on one data set"
        )
    gaps = np.array(
        [a.recall[k] - b.recall[k] for a, b in zip(ours.scores, base.scores, strict=True)]
    )
    drawn = np.random.default_rng(seed).integers(0, len(gaps), (draws, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(1), (2.5, 97.5))
    return float(100 * gaps.mean()), float(100 * low), float(100 * high)
