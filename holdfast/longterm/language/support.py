"""Whether passages support a claim, by words: content, names, numbers, negation and who speaks."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from holdfast.longterm.language import dates
from holdfast.longterm.language.judgement import Judgement
from holdfast.longterm.language.tokens import sentences
from holdfast.longterm.language.wording import NEGATION, content, numbers, root
from holdfast.longterm.retrieval.terms import STOP, words

SHARE = 0.6  # of a claim's content words that must be covered
REACH = 2  # turns before and after a passage that may complete it
NEAR, AROUND = 0.5, 0.2  # what a word counts there: in the same speaker's turn, in another's
SCOPE = 3  # content words that a negation denies
SLACK = 0.03  # by how much others may cover a claim better than its subject does
ALONE = 0.5  # what a passage without "you" or "we" counts for a claim about two speakers
MOST_CITED = 4  # passages for one claim
# How something was said is not what was said: "Ann mentioned that", "Ann finds it".
_REPORTING = frozenset(
    root(word)
    for line in (
        "find value believe express mention consider acknowledge feel think say tell share",
        "describe state report explain note admit discuss",
    )
    for word in line.split()
)
_YOU = re.compile(r"\byou(?:r|rs)?\b|\bwe\b|\bour\b", re.I)


@dataclass(frozen=True)
class Passage:
    """A text that may support something.

    Args:
        uri: where `text` is found again, for example a memory's id.
        time: when it was said; resolves "last year".
        speaker: who says "I" in it, or None for a document.
        session, position: passages of one session at neighbouring positions complete one another.
    """

    text: str
    uri: str
    time: datetime | None = None
    speaker: str | None = None
    session: str | None = None
    position: int = 0


@dataclass(frozen=True)
class Citation:
    """Bytes `start` to `end` of the source at `uri`, as it was when its text had this `sha256`."""

    uri: str
    start: int
    end: int
    sha256: str


@dataclass(frozen=True)
class Reading:
    """A passage with what the rules look at."""

    passage: Passage
    stems: frozenset[str]
    figures: frozenset[str]

    @classmethod
    def of(cls, passage: Passage) -> "Reading":
        figures = set(numbers(passage.text))
        moments = [p.lo for p in dates.find(passage.text, passage.time) if p.lo]
        for moment in [*moments, *([passage.time] if passage.time else [])]:
            month, weekday = moment.strftime("%B %A").lower().split()
            # A day counts as one of a month: else any small number would be on some date.
            figures |= {str(moment.year), month, weekday, f"{moment.day} {month}"}
        said = f"{passage.speaker or ''} {passage.text}"
        dated = [root(figure) for figure in figures if " " not in figure]
        stems = frozenset([*map(root, words(said)), *dated])
        return cls(passage, stems, frozenset(figures))

    def share(self, wanted: Sequence[str]) -> float:
        return sum(s in self.stems for s in wanted) / len(wanted)

    def about(self, subject: Sequence[str]) -> bool:
        """Whether it may speak of `subject`: said by them, about them, or by nobody."""
        speaker = self.passage.speaker
        if not subject or speaker is None or _is_called(speaker, subject):
            return True
        return any(_mentions(self.passage.text, name) for name in subject)

    def beside(self, other: "Reading") -> bool:
        a, b = self.passage, other.passage
        return (
            a.session is not None
            and a.session == b.session
            and (0 < abs(a.position - b.position) <= REACH)
        )


def support(
    text: str,
    named: list[str],
    subject: list[str],
    read: Sequence[Reading],
    judge: Judgement | None,
) -> tuple[float, str | None, tuple[Citation, ...]]:
    """Share covered, why it is not enough, and citations if it is."""
    if not read:
        return 0.0, "no source", ()
    wanted = wanted_in(text, subject)
    own, other, centre = 0.0, 0.0, None
    # Rare words tell speakers apart, what both talk about does not.
    weights = {s: math.log(1 + len(read) / (1 + sum(s in r.stems for r in read))) for s in wanted}
    second = speaking([n for n in named if n not in subject], read)
    for one in read:
        value = _weighed(one, weights, read)
        if second and not _YOU.search(one.passage.text):
            value *= ALONE
        if not one.about(subject):
            other = max(other, value)
        elif centre is None or value > own:
            own, centre = value, one
    if centre is None:
        return 0.0, f"no source says anything of {' '.join(subject)}", ()
    chosen = _chosen(centre, wanted, read)
    share = sum(any(s in r.stems for r in chosen) for s in wanted) / max(1, len(wanted))
    cited = tuple(_citation(r.passage, wanted) for r in chosen)
    if judge is not None:
        share = max(float(judge.judge(text, r.passage.text)) for r in chosen)
    if share < SHARE:
        return share, f"sources cover {share:.0%} of its words, {SHARE:.0%} are needed", ()
    if other > own + SLACK:
        return share, f"it is said of somebody else than {' '.join(subject)}", ()
    everything = frozenset().union(
        *(r.stems | r.figures for r in {*chosen, *(r for r in read if r.beside(centre))})
    )
    months = [w for w in words(text) if w in dates.MONTHS]
    absent = [
        n
        for n in sorted(numbers(text))
        if n not in everything and not any(f"{n} {month}" in everything for month in months)
    ]
    if absent:
        return share, f"no source has the number {', '.join(absent)}", ()
    absent = [n for n in named if n not in subject and not _known(n, everything)]
    if absent:
        return share, f"no source has the name {', '.join(absent)}", ()
    if not _same_polarity(text, wanted, chosen):
        return share, "sources say the opposite", ()
    return share, None, cited


def _company(centre: Reading, read: Sequence[Reading]) -> list[Reading]:
    """What may complete a passage: its neighbours, and whatever else its speaker said."""
    return [
        r
        for r in read
        if r is not centre and (r.beside(centre) or r.passage.speaker == centre.passage.speaker)
    ]


def _weighed(one: Reading, weights: Mapping[str, float], read: Sequence[Reading]) -> float:
    """Weight of the words that a passage covers; those of its neighbours count less."""
    near: set[str] = set()
    around: set[str] = set()
    for r in read:
        if r.beside(one):
            (near if r.passage.speaker == one.passage.speaker else around).update(r.stems)
    total = 0.0
    for s, rarity in weights.items():
        total += rarity * (
            1.0 if s in one.stems else NEAR if s in near else AROUND if s in around else 0.0
        )
    return total / sum(weights.values())


def _chosen(centre: Reading, wanted: Sequence[str], read: Sequence[Reading]) -> list[Reading]:
    """The passage and those that complete it, at most `MOST_CITED`."""
    chosen, left = [centre], [s for s in wanted if s not in centre.stems]
    rest = _company(centre, read)
    while left and rest and len(chosen) < MOST_CITED:
        best = max(rest, key=lambda r: sum(s in r.stems for s in left))
        if not any(s in best.stems for s in left):
            break
        chosen.append(best)
        rest.remove(best)
        left = [s for s in left if s not in best.stems]
    return chosen


def _citation(passage: Passage, wanted: Sequence[str]) -> Citation:
    """The shortest run of sentences that holds every wanted word that the passage has."""
    spans = sentences(passage.text)
    held = [set(map(root, words(passage.text[lo:hi]))) & set(wanted) for lo, hi in spans]
    needed = set().union(*held)
    have: Counter[str] = Counter()
    best, i = (0, len(spans) - 1), 0
    for j, here in enumerate(held):
        have.update(here)
        while i < j and all(have[s] > 1 for s in held[i]):
            have.subtract(held[i])
            i += 1
        if all(have[s] > 0 for s in needed) and _length(spans, i, j) < _length(spans, *best):
            best = i, j
    i, j = best
    start = len(passage.text[: spans[i][0]].encode())
    end = len(passage.text[: spans[j][1]].encode())
    digest = hashlib.sha256(passage.text.encode()).hexdigest()
    return Citation(passage.uri, start, end, digest)


def _length(spans: Sequence[tuple[int, int]], i: int, j: int) -> int:
    return spans[j][1] - spans[i][0]


def _same_polarity(text: str, wanted: Sequence[str], chosen: Sequence[Reading]) -> bool:
    """Whether a sentence that covers the claim's core denies what the claim denies.

    Only sentences with half of the covered words say the same thing; without one there is nothing
    to compare.
    """
    covered = {s for s in wanted if any(s in r.stems for r in chosen)}
    denied = _denied(text) & covered
    cores = []
    for r in chosen:
        for lo, hi in sentences(r.passage.text):
            said = r.passage.text[lo:hi]
            held = covered & set(map(root, words(said)))
            if held and 2 * len(held) >= len(covered):
                cores.append(denied & held == _denied(said) & held)
    return not cores or any(cores)


def _denied(text: str) -> set[str]:
    """Stems of the words under a negation: those after it in its clause, at most `SCOPE`."""
    found: set[str] = set()
    for match in NEGATION.finditer(text):
        clause = re.split(r"[,.;:!?]|\b(?:but|and|so|because)\b", text[match.end() :])[0]
        found.update([root(w) for w in words(clause) if w not in STOP][:SCOPE])
    return found


def wanted_in(text: str, subject: Sequence[str]) -> list[str]:
    """Content stems of a claim without its subject's name, which its speaker stands for."""
    drop = {root(w) for name in subject for w in words(name)}
    drop |= _REPORTING
    return [s for s in content(text) if s not in drop] or content(text)


def speaking(named: Sequence[str], read: Sequence[Reading]) -> list[str]:
    """The first of the names that belongs to a speaker."""
    speakers = {r.passage.speaker for r in read if r.passage.speaker}
    return [name for name in named if any(_is_called(s, [name]) for s in speakers)][:1]


def _is_called(speaker: str, named: Iterable[str]) -> bool:
    """Whether one of the names is the speaker's, or short for it: Mel is Melanie."""
    return any(
        a == b or (min(len(a), len(b)) > 2 and (a.startswith(b) or b.startswith(a)))
        for a in words(speaker)
        for name in named
        for b in words(name)
    )


def _mentions(text: str, name: str) -> bool:
    """Whether a text speaks of somebody; "Thanks, Ann!" only calls her."""
    called = rf"(?:(?:^|[,.!?])\s*(?:\w+\s+)?|\b){re.escape(name)}\s*(?:[,.!?;]|$)"
    return re.search(rf"\b{re.escape(name)}\b", re.sub(called, " ", text)) is not None


def _known(name: str, everything: frozenset[str]) -> bool:
    return all(root(w) in everything or w in everything for w in words(name))
