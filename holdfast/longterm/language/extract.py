"""Facts from English chat and statements by rules: no model, the same answer every time.

A clause is subject, verb, object. "I" and "my" are the speaker, "he" and "she" the last person
named. Questions, conditions, "you" and "it" say nothing about a person and are left out. What is
returned stands in the source: `start` and `end` are bytes of its UTF-8 text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from holdfast.longterm.language import dates, slots
from holdfast.longterm.language.clauses import LISTS, Predicate, clauses, trimmed
from holdfast.longterm.language.slots import listed
from holdfast.longterm.language.tokens import (
    BE,
    BREAK,
    CONDITION,
    DO,
    FIRST,
    HAVE,
    LOWER,
    MODAL,
    OPENERS,
    OWN,
    SILENT,
    THIRD,
    Token,
    adverb,
    finite,
    is_be,
    is_verb_s,
    past,
    sentences,
    split,
    starts_predicate,
)

SPEAKER = "I"  # the subject of a first-person fact whose speaker is not known


@dataclass(frozen=True)
class Fact:
    """One statement about one subject.

    Attributes:
        text: the clause in the third person, readable on its own.
        start, end: bytes of the source that say it.
        valid_from, valid_to: when it holds in the world, half-open, UTC; None is unknown or open.
        negated: it does not hold, or no longer does from `valid_from`.
        single: its subject has at most one such object at a time.
    """

    text: str
    subject: str
    relation: str
    object: str
    start: int
    end: int
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    negated: bool = False
    single: bool = False


@dataclass(frozen=True)
class Triple:
    """Head, relation, tail, and the bytes of the source that say so."""

    head: str
    relation: str
    tail: str
    start: int
    end: int


_PREFIX = re.compile(r"\s*([A-Z][\w.'’-]*(?: [A-Z][\w.'’-]*){0,2}): ")
_SPLIT_LIST = re.compile(r"\s*,\s*(?:and |or )?|\s+and\s+|\s+or\s+|\s*&\s*")
_BOTH = re.compile(r"(.+?) (?:as|at|for|with) (.+)")
_NAMED = re.compile(r"\b(?:named|called)\s+([A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)?)")


def facts(text: str, when: datetime | None = None, speaker: str | None = None) -> list[Fact]:
    """What `text` states about people and named things, in order.

    Args:
        when: the time at which it was said; aware. States hold from then unless dated.
        speaker: who "I" is; without it a leading "Name: " says so, else the subject is "I".

    Raises:
        UsageError: `when` has no time zone.
    """
    dates.aware(when)
    offset = 0
    if speaker is None and (prefix := _PREFIX.match(text)):
        speaker, offset = prefix[1], prefix.end()
    reader = _Reader(text, when, speaker or SPEAKER)
    found: list[Fact] = []
    for lo, hi in sentences(text[offset:]):
        lo, hi = lo + offset, hi + offset
        if not text[lo:hi].rstrip("\"')").endswith("?"):
            found += reader.sentence(lo, hi)
    return list(dict.fromkeys(found))


def triples(text: str, when: datetime | None = None, speaker: str | None = None) -> list[Triple]:
    """The affirmed facts of `text` as head, relation, tail."""
    return [
        Triple(one.subject, one.relation, one.object, one.start, one.end)
        for one in facts(text, when, speaker)
        if not one.negated
    ]


class _Slot(NamedTuple):
    """Something that a sentence is about because somebody has it: my birthday."""

    owner: str
    noun: str


class _Reader:
    """Reads one text clause by clause, remembering who was named last."""

    def __init__(self, text: str, when: datetime | None, speaker: str):
        self.text, self.when, self.speaker = text, when, speaker
        self.person: str | None = None
        self.periods = dates.find(text, when)

    def sentence(self, lo: int, hi: int) -> Iterator[Fact]:
        words = split(self.text, lo, hi)
        subject: list[str] | None = None
        conditional = False
        for clause, inherits in clauses(words):
            conditional = conditional or clause[0].low in ("if", "unless", "whether")
            if conditional or clause[0].low in CONDITION:
                subject = None
                continue
            subject = yield from self._clause(clause, subject if inherits else None)

    def _clause(self, tokens: list[Token], inherited: list[str] | None):
        """Yields the clause's facts, returns its subjects for the clause after it."""
        inside = [p for p in self.periods if tokens[0].start <= p.start and p.end <= tokens[-1].end]
        whole = tokens
        tokens = [t for t in tokens if not any(p.start <= t.start < p.end for p in inside)]
        while tokens and (
            tokens[0].low in OPENERS or not tokens[0].text[0].isalnum() or adverb(tokens[0])
        ):
            tokens = tokens[1:]
        if not tokens:
            return inherited
        subjects, kin, at = self._subject(tokens, inherited)
        for owner, noun, name in kin:
            yield self._fact(whole, owner, noun, name, inside[:0], state=True)
        if subjects is None:
            return None
        predicate = Predicate.read(tokens, at)
        if predicate is not None:
            for subject in subjects:
                yield from self._stated(whole, tokens, at, subject, predicate, inside)
        return subjects

    def _subject(self, tokens: list[Token], inherited: list[str] | None):
        """Whom the clause is about (None: nobody), kinship, where the verb phrase starts."""
        first = tokens[0]
        if first.low in FIRST:
            return [self.speaker], [], 1
        if first.low in THIRD and self.person:
            return [self.person], [], 1
        if first.low in SILENT | THIRD:
            return None, [], 0
        dropped = self.speaker != SPEAKER and (
            (past(first) and first.low not in BE)
            or first.low in slots.ATTITUDES | {"gonna", "planning"}
        )
        if dropped and not inherited and len(tokens) > 1 and not finite(tokens[1]):
            return [self.speaker], [], 0  # chat drops the pronoun: "Went to the gym"
        if first.name and first.low in slots.LEMMAS and not inherited:
            return None, [], 0  # "Take care!"
        if first.low in OWN or first.name or first.low in ("the", "his", "her", "their"):
            return self._noun_phrase(tokens)
        if inherited and (finite(first) or first.low in BE | HAVE | DO | MODAL | {"gonna"}):
            return inherited, [], 0
        return None, [], 0

    def _noun_phrase(self, tokens: list[Token]):
        """A name, or an owner's things: "Ann", "my sister Ann", "Ann's dog's name"."""
        kin: list[tuple[str, str, str]] = []
        at, owner, nouns, names = 0, None, [], []
        first = tokens[0]
        if first.low in OWN:
            owner, at = self.speaker, 1
        elif first.low in ("his", "her", "their"):
            if self.person is None:
                return None, [], 0
            owner, at = self.person, 1
        elif first.low == "the":
            at = 1
        several: list[str] = []
        while at < len(tokens):
            token = tokens[at]
            if token.low in ("'s", "'") and (names or nouns) and not is_verb_s(tokens, at):
                owner = self._owned(owner, nouns, names, kin)
                nouns, names = [], []
            elif token.low == "and" and names and at + 1 < len(tokens) and tokens[at + 1].name:
                several.append(" ".join(names))
                names = []
            elif starts_predicate(tokens, at, bool(names or nouns)):
                break
            elif token.name and (at > 0 or token.low not in LOWER):
                names.append(token.text)
            elif token.text[0].isalnum() and not names and token.low not in BREAK:
                nouns.append(token.low)
            elif token.text == "," and names and nouns:
                pass  # "my sister, Ann, works"
            else:
                return None, kin, 0
            at += 1
            if len(nouns) > 4:
                return None, kin, 0
        if not (names or nouns):
            return None, kin, 0
        if owner is None and not names:
            return ["the " + " ".join(nouns)] if first.low == "the" else None, kin, at
        if owner is not None and not names and is_be(tokens, at):
            rest = [t for t in tokens[at + 1 :] if not adverb(t) and t.low not in BE]
            told = rest and rest[0].name and (len(rest) < 3 or not finite(rest[1]))
            # "My colour is blue", "my sister is Ann": about me; what she does: about her.
            if told or nouns[-1] not in slots.KIN:
                return [_Slot(owner, "_".join(nouns))], kin, at
        subject = self._owned(owner, nouns, names, kin)
        if names or (nouns and nouns[-1] in slots.KIN):
            self.person = subject
        return [*several, subject], kin, at

    def _owned(self, owner, nouns, names, kin) -> str:
        name = " ".join(names)
        if owner is None:
            return name or " ".join(nouns)
        if name and nouns:
            kin.append((owner, "_".join(nouns), name))
        return name or f"{owner}'s {' '.join(nouns)}"

    def _stated(self, whole, tokens, at, subject, predicate, periods) -> Iterator[Fact]:
        attribute = None
        if isinstance(subject, _Slot):
            subject, attribute = subject
        kept = trimmed(predicate.rest, verb=predicate.relation)
        objects = [self._phrase(kept)]
        if not objects[0] and periods and (attribute or predicate.relation == "birthday"):
            objects, periods = [_undated(periods[0].text)], []
        relation, negated, state = predicate.relation, predicate.negated, predicate.state
        if attribute is not None:
            relation = slots.attribute(attribute)
            if attribute.endswith("name") and attribute != "name" and "_" not in attribute:
                relation = "name"
            if "'s " in subject and relation == "name":
                owner, noun = subject.rsplit("'s ", 1)
                subject, relation = owner, noun
            state = True
        if relation in slots.EMPTY or not (objects[0] or predicate.lone):
            return
        if objects[0].lower() in SILENT | {"them", "him", "her"}:
            return  # what "it" is stands elsewhere
        if relation == "plans":
            periods = [dates.ahead(p, self.when) for p in periods]
        if relation == "prefers":
            objects = [re.split(r" (?:to|over|than|rather than) ", objects[0])[0]]
        second = _BOTH.match(objects[0]) if relation in ("works_at", "works_as") else None
        if second:
            other = "works_at" if relation == "works_as" else "works_as"
            objects = [second[1]]
            value = re.sub(r"^(?:an?|the) ", "", second[2])
            yield self._fact(
                whole, subject, other, value, periods,
                state=True, negated=negated, over=predicate.over,
            )  # fmt: skip
        if relation == "is" and objects[0].lower() in slots.STATUS:
            relation = "status"
        if relation in LISTS:
            objects = _listed(objects[0])
        # An attribute named by its noun has one value: "my car is a Volvo".
        only = slots.single(relation) or (attribute is not None and not attribute.endswith("s"))
        for value in objects:
            yield self._fact(
                whole, subject, relation, value, periods,
                state=state, negated=negated, over=predicate.over, only=only,
            )  # fmt: skip
            named = _NAMED.search(value)
            if named and not negated and attribute is None:
                thing = value[: named.start()].split()
                if thing and thing[-1].lower() in slots.KIN:
                    self.person = named[1]
                    yield self._fact(
                        whole, subject, thing[-1].lower(), named[1], periods, state=True
                    )

    def _phrase(self, tokens: list[Token]) -> str:
        """Tokens as they stand in the source, with "my" and "me" made the speaker's."""
        out, last = "", None
        for token in tokens:
            gap = last is not None and token.start > last
            word = token.text
            if token.low in OWN:
                word = f"{self.speaker}'s"
            elif token.low in ("me", "myself", "i", "us"):
                word = self.speaker
            out += (" " if gap else "") + word
            last = token.end
        return out

    def _fact(
        self, whole, subject, relation, value, periods,
        *, state, negated=False, over=False, only=None,
    ) -> Fact:  # fmt: skip
        lo = hi = None
        if periods:
            lo, hi = periods[0].lo, periods[0].hi
            if (state or negated) and hi is not None and not over:
                # A state begins with its date, unless only its end was given.
                hi = None if lo is not None else hi
        if lo is None and not over and (hi is None or self.when is None or self.when < hi):
            lo = self.when
        if over:
            hi = hi or self.when
        return Fact(
            self._sentence(whole, subject),
            subject,
            relation,
            value,
            self._byte(whole[0].start),
            self._byte(whole[-1].end),
            lo,
            hi,
            negated,
            slots.single(relation) if only is None else only,
        )

    def _byte(self, char: int) -> int:
        return len(self.text[:char].encode())

    def _sentence(self, tokens: list[Token], subject: str) -> str:
        """The clause retold: "I don't like my job" -> "Ann doesn't like Ann's job"."""
        told = self.text[tokens[0].start : tokens[-1].end]
        if self.speaker == SPEAKER and subject in told:
            return told
        tokens = list(tokens)
        while len(tokens) > 1 and (tokens[0].low in OPENERS or not tokens[0].text[0].isalnum()):
            tokens = tokens[1:]
        first = tokens[0]
        bare = finite(first) or first.low in BE | HAVE | DO | MODAL | {"gonna", "planning"}
        out, last, turned = "", None, bare and subject == self.speaker
        for i, token in enumerate(tokens):
            word, previous = token.text, tokens[i - 1].low if i else ""
            if token.low in ("i", "we", "me", "us", "myself"):
                word = self.speaker
            elif token.low in OWN:
                word = f"{self.speaker}'s"
            elif token.low in THIRD and i == 0:
                word = subject
            elif turned and token.low in _AGREE:
                word, turned = _AGREE[token.low], False
            elif turned and not adverb(token) and token.low not in ("no", "longer"):
                base = token.low in slots.LEMMAS and token.low not in _PAST_TOO
                word, turned = (slots.third_person(token.low) if base else word), False
            if token.low in ("i", "we"):
                turned = True
            gap = last is not None and token.start > last
            if word in ("is", "has", "will", "would") and previous in ("i", "we"):
                gap = True
            out += (" " if gap else "") + word
            last = token.end
        # The clause may share the subject of the one before, or leave it out.
        if (bare and not out.startswith(subject)) or subject.split("'s ")[
            0
        ].lower() not in out.lower():
            out = f"{subject} {out[0].lower()}{out[1:]}"
        return out


_PAST_TOO = frozenset(listed("cost put let hurt quit set cut read hit become come run"))
_AGREE = {
    "'m": "is", "am": "is", "are": "is", "'re": "is", "were": "was", "have": "has", "'ve": "has",
    "do": "does", "'ll": "will", "'d": "would",
}  # fmt: skip


def _undated(text: str) -> str:
    return re.sub(r"^(?:on|in|at) (?:the )?", "", text)


def _listed(value: str) -> list[str]:
    """The members of a list of short things; otherwise the whole."""
    parts = [re.sub(r"^(?:a|an|the|some) ", "", p).strip() for p in _SPLIT_LIST.split(value)]
    parts = [p for p in parts if p]
    if len(parts) > 1 and all(len(p.split()) <= 4 for p in parts):
        return parts
    return [value]
