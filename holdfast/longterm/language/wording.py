"""What a text speaks of: its content words, names, numbers, and whether it denies."""

import re

from holdfast.longterm.language import slots
from holdfast.longterm.language.tokens import LOWER, sentences
from holdfast.longterm.retrieval.terms import STOP, stem, words

_NEGATIONS = frozenset(
    slots.listed("not never no none nobody nothing without neither nor cannot t stopped quit")
)
NEGATION = re.compile(
    r"\b(?:not|never|no longer|cannot|without|neither|nor|nobody|nothing|none|no one"
    r"|stopped|quit|gave up|given up|no)\b|n['’]t\b",
    re.I,
)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
# "One" is mostly no number: one of, no one, the right one.
COUNTED = {
    name: str(i)
    for i, name in enumerate(
        slots.listed(
            """two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen twenty"""
        ),
        2,
    )
}


def numbers(text: str) -> set[str]:
    """The numbers of a text in digits: "two", "2" and "2nd" are "2"."""
    found = {n.strip(".,:").replace(",", "") for n in _NUMBER.findall(text)}
    return found | {COUNTED[w] for w in words(text) if w in COUNTED}


def negated(text: str) -> bool:
    """Whether a text denies something or says that it ended."""
    return NEGATION.search(text) is not None


def root(word: str) -> str:
    """The stem of a folded word; went and goes have that of go, two is 2."""
    return COUNTED.get(word) or stem(slots.IRREGULAR.get(word, word))


def content(text: str) -> list[str]:
    """The stems of a text's words that say what it is about, in order, without repeats."""
    return list(
        dict.fromkeys(root(w) for w in words(text) if w not in STOP and w not in _NEGATIONS)
    )


def names(text: str) -> list[str]:
    """Capitalised words that are not merely first in a sentence."""
    found = []
    for lo, hi in sentences(text):
        for i, match in enumerate(re.finditer(r"[^\W\d_][\w'’-]*", text[lo:hi])):
            word = re.sub(r"['’]s$", "", match[0])
            if word[0].isupper() and word.lower() not in LOWER:
                if i == 0 and slots.lemma(word.lower()) in slots.LEMMAS:
                    continue
                found.append(word)
    return found
