"""English words one by one: tokens, sentences, and what a word may be in a clause."""

import re
from dataclasses import dataclass

from holdfast.longterm.language import slots
from holdfast.longterm.language.slots import listed


@dataclass(frozen=True)
class Token:
    text: str
    low: str
    start: int
    end: int

    @property
    def name(self) -> bool:
        return self.text[:1].isupper() and self.low not in LOWER


_TOKEN = re.compile(
    r"[^\W\d_]+(?=n['’]t\b)|n['’]t\b|['’](?:m|re|ve|ll|d|s)\b|['’](?=\s)"
    r"|[^\W_]+(?:[-.&+/@_][^\W_]+)*|[^\w\s]"
)
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|[Ee]\.g|[Ii]\.e|[A-Z])\.\s*$")
FIRST = frozenset({"i", "we"})
OWN = frozenset({"my", "our"})
THIRD = frozenset({"he", "she", "they"})
SILENT = frozenset(listed("you it that this there these those what who it's here one everyone"))
BE = frozenset(listed("am is are was were be been being 'm 're"))
HAVE = frozenset(listed("have has had 've"))
DO = frozenset(listed("do does did"))
MODAL = frozenset(listed("will 'll would can could should might may must shall wo ca"))
NOT = frozenset({"not", "n't", "never"})
DETERMINERS = frozenset(
    listed("a an the some any this that these those another my our his her their its your no")
)
ADVERBS = frozenset(
    listed(
        """also just still always usually now often even ever never already once soon again too
        very so well really quite pretty finally recently lately currently actually totally
        definitely probably maybe sometimes both all mostly long ago yet anymore"""
    )
)
OPENERS = frozenset(
    listed(
        """well so oh hey yeah yes yep no nope wow actually also and but then anyway btw lol
        honestly basically fortunately sadly luckily unfortunately recently lately currently now
        hi hello thanks thank ok okay sure plus or because since though although haha aww cool
        great nice yay ugh hmm guess that while"""
    )
)
CONDITION = frozenset(listed("if when unless whether whenever until once how why where what"))
BREAK = frozenset(
    listed("but because so while although though when which who whose that if whether where as")
)
PREPOSITIONS = frozenset(
    listed(
        """in at for as to from with on of about by into onto over after up down out off through
        around near under against toward towards during without within"""
    )
)
PARTICLES = frozenset(listed("up down out off back over away on in around along together"))
# Words that are no names when they have a capital.
LOWER = frozenset().union(
    FIRST, OWN, THIRD, SILENT, DETERMINERS, ADVERBS, OPENERS, CONDITION, BREAK, PREPOSITIONS,
    BE, HAVE, DO, MODAL, NOT, listed("me him them us according despite besides overall"),
)  # fmt: skip


def split(text: str, lo: int, hi: int) -> list[Token]:
    """The words and signs of `text[lo:hi]`; contractions are two: do n't, I 'm."""
    return [
        Token(m[0], m[0].lower().replace("’", "'"), lo + m.start(), lo + m.end())
        for m in _TOKEN.finditer(text[lo:hi])
    ]


def sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences of `text`, without surrounding white space."""
    cuts, start = [], 0
    for match in _SENTENCE.finditer(text):
        if "\n" not in match[0] and _ABBREVIATED.search(text[start : match.start()]):
            continue
        cuts.append((start, match.start()))
        start = match.end()
    cuts.append((start, len(text)))
    out = []
    for lo, hi in cuts:
        part = text[lo:hi]
        lo, hi = lo + len(part) - len(part.lstrip()), hi - len(part) + len(part.rstrip())
        if lo < hi:
            out.append((lo, hi))
    return out


def adverb(token: Token) -> bool:
    low = token.low
    return low in ADVERBS or (
        low.endswith("ly")
        and len(low) > 4
        and low not in ("family", "reply", "apply", "supply", "italy", "lily", "belly", "jelly")
        and not token.name
    )


def past(token: Token) -> bool:
    low = token.low
    if low in slots.IRREGULAR:
        return not low.endswith(("ing", "s")) or low in ("was",)
    return low.endswith("ed") and len(low) > 4 and low not in ("need", "speed", "hundred", "indeed")


def finite(token: Token) -> bool:
    low = token.low
    if low.endswith("s"):
        low = slots.lemma(low)
    return past(token) or low in slots.LEMMAS


def participle(token: Token) -> bool:
    return past(token) or token.low in slots.IRREGULAR


def participle_next(tokens: list[Token], at: int) -> bool:
    nxt = next_word(tokens, at)
    return nxt is not None and (nxt.low == "been" or (past(nxt) and nxt.low != "had"))


def next_word(tokens: list[Token], at: int) -> Token | None:
    return next(
        (t for t in tokens[at + 1 :] if not adverb(t) and t.low not in NOT and t.text != ","),
        None,
    )


def helps(tokens: list[Token], at: int) -> bool:
    nxt = next_word(tokens, at)
    return nxt is not None and (
        nxt.low in slots.LEMMAS or nxt.low in ("have",) or tokens[at + 1].low in NOT
    )


def verb_at(tokens: list[Token], at: int) -> bool:
    return at < len(tokens) and tokens[at].low not in DETERMINERS and not tokens[at].name


def is_be(tokens: list[Token], at: int) -> bool:
    low = tokens[at].low if at < len(tokens) else ""
    nxt = next_word(tokens, at) if at < len(tokens) else None
    return (low in BE or low == "'s") and not (nxt is not None and nxt.low.endswith("ing"))


def is_verb_s(tokens: list[Token], at: int) -> bool:
    """Whether 's is "is": "Ann's moving", "Ann's a nurse", not "Ann's dog"."""
    if tokens[at].low != "'s" or at + 1 >= len(tokens):
        return False
    nxt = tokens[at + 1]
    if tokens[at - 1].low == "name":
        return True  # "my name's Bob"
    if nxt.low in DETERMINERS | NOT or adverb(nxt) or nxt.low in ("from", "in", "at", "been"):
        return True
    return nxt.low.endswith("ing") and len(nxt.low) > 4


def pronoun(token: Token) -> bool:
    return token.low in FIRST | THIRD | OWN | {"you", "it"}


def starts_predicate(tokens: list[Token], at: int, has_subject: bool) -> bool:
    token = tokens[at]
    if token.low in BE | HAVE | DO | MODAL | NOT | {"gonna", "'d"}:
        return True
    if token.low == "'s":
        return True
    if not has_subject or (token.name and not finite(token)):
        return False
    if adverb(token) or (token.low == "no" and has_subject):
        return True
    if token.name:
        return False
    # A noun may look like a verb: "my work schedule", "my favourite drink is".
    after_owner = tokens[at - 1].low in OWN | {"'s", "the", "his", "her", "their"}
    return finite(token) and not after_owner and not is_be(tokens, at + 1)
