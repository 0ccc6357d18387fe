"""English clauses: where one ends, and what its verb phrase says."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from holdfast.longterm.language import slots
from holdfast.longterm.language.slots import listed
from holdfast.longterm.language.tokens import (
    ADVERBS,
    BE,
    BREAK,
    CONDITION,
    DETERMINERS,
    DO,
    FIRST,
    HAVE,
    MODAL,
    NOT,
    OWN,
    PARTICLES,
    PREPOSITIONS,
    THIRD,
    Token,
    adverb,
    finite,
    helps,
    next_word,
    participle,
    participle_next,
    past,
    pronoun,
    verb_at,
)


def clauses(tokens: list[Token]) -> Iterator[tuple[list[Token], bool]]:
    """Clauses with whether they may continue the subject of the one before."""
    start, inherits = 0, False
    i = 0
    while i < len(tokens):
        low = tokens[i].low
        nxt = tokens[i + 1] if i + 1 < len(tokens) else None
        after = tokens[i + 2] if i + 2 < len(tokens) else None
        cut = None
        if i > start:
            if low in (";", ":", "—", "–", "(", ")", "…", ".", "!", "?") or (
                low == "-" and nxt and tokens[i - 1].end < tokens[i].start
            ):
                cut = (i + 1, False)
            elif low == "," and nxt:
                if nxt.low in ("and", "but", "so", "or") and after and _opens(after, tokens, i + 2):
                    cut = (i + 2, after.low not in FIRST)
                elif _opens(nxt, tokens, i + 1) and not (
                    nxt.name and tokens[i - 1].low in slots.KIN
                ):
                    cut = (i + 1, True)
                elif nxt.low in BREAK | {"since"} and nxt.low != "as":
                    cut = (i + 1, False)
            elif low in ("and", "but", "or") and nxt and _opens(nxt, tokens, i + 1):
                # "Ann and Bob live in Rome" is one clause: nothing was said of Ann yet.
                if not nxt.name or any(_verbal(t) for t in tokens[start:i]):
                    cut = (i + 1, True)
            elif low in ("that", "because", "while") and nxt and _opens(nxt, tokens, i + 1):
                cut = (i + 1, False)
            elif low in BREAK | {"since"} and nxt and pronoun(nxt):
                cut = (i + (low not in CONDITION), False)
            elif pronoun(tokens[i]) and slots.lemma(tokens[i - 1].low) in slots.EMPTY:
                cut = (i, False)
        if cut:
            if start < i:
                yield tokens[start:i], inherits
            start, inherits = cut
            i = max(i + 1, start)
        else:
            i += 1
    while start < len(tokens) and not tokens[start].text[0].isalnum():
        start += 1
    if start < len(tokens):
        yield tokens[start:], inherits


def _verbal(token: Token) -> bool:
    return token.low in BE | HAVE | DO | MODAL | {"'s"} or finite(token)


def _opens(token: Token, tokens: list[Token], i: int) -> bool:
    """Whether a clause may start here: a subject, or a verb that shares the last one."""
    if token.low in FIRST | THIRD | {"you", "it", "there"}:
        return True
    rest = tokens[i + 1 : i + 6]
    if token.low in OWN or token.name:
        return any(
            t.low in BE | HAVE | DO | MODAL or (finite(t) and not t.name) for t in rest
        ) and not any(t.text in ",." for t in rest[:1])
    if adverb(token) and len(rest) > 0:
        return rest[0].low in FIRST or past(rest[0])
    return (finite(token) or token.low in BE | DO | HAVE | MODAL) and not (
        token.low.endswith("ing")
    )


# Relations whose objects may be several: "I like jazz and pizza".
LISTS = frozenset(listed("likes dislikes prefers has speaks plays studies plans"))
_TRAILING = ADVERBS | frozenset([*listed("more and or with well today"), *",.!?;:-()\"'"])
# In the simple past these say that something was so and is no more: "I lived in Rome".
_LASTING = frozenset({"live", "reside", "work", "have", "own"})


@dataclass(frozen=True)
class Predicate:
    """A verb phrase: its relation, its object's tokens and how it is meant."""

    relation: str
    rest: list[Token]
    negated: bool
    state: bool
    over: bool = False  # it held once: "used to live"
    lone: bool = False  # means something without an object: "I smoke"

    @classmethod
    def read(cls, tokens: list[Token], at: int) -> "Predicate | None":
        negated, wish, over, helper = False, False, False, ""
        ended = any(a.low == "no" and b.low == "longer" for a, b in pairwise(tokens[at:]))
        tokens = [
            t
            for i, t in enumerate(tokens)
            if not (
                i >= at
                and (
                    (t.low == "no" and i + 1 < len(tokens) and tokens[i + 1].low == "longer")
                    or (t.low == "longer" and tokens[i - 1].low == "no")
                )
            )
        ]
        while at < len(tokens):
            low, after = tokens[at].low, tokens[at + 1].low if at + 1 < len(tokens) else ""
            if low in NOT:
                negated = True
            elif low in MODAL or (low == "'d" and after != "better"):
                wish = wish or low in ("will", "'ll", "wo")
                if low in ("would", "'d", "could", "should", "might", "may") and after != "like":
                    helper = "unreal"
            elif low in DO and helps(tokens, at):
                pass
            elif low in HAVE and participle_next(tokens, at):
                helper = helper or "have"
            elif low == "used" and after == "to":
                over = True
                at += 1
            elif low == "gonna" or (low == "going" and after == "to" and verb_at(tokens, at + 2)):
                wish = True
                at += low == "going"
            elif low in BE or (low == "'s" and helper != "be"):
                nxt = next_word(tokens, at)
                if nxt is None:
                    return cls("is", [], negated or ended, True, over)
                if low == "'s" and nxt.low == "got":
                    helper = "have"
                elif (nxt.low.endswith("ing") and nxt.low not in slots.QUALITIES) or nxt.low in (
                    "gonna",
                ):
                    helper = "be"
                else:
                    return _copula(tokens, at, negated or ended, over)
            elif adverb(tokens[at]) or low in ("been", "being"):
                if low == "been" and helper == "have" and not (after.endswith("ing")):
                    return _copula(tokens, at, negated or ended, over)
            else:
                break
            at += 1
        if at >= len(tokens) or not tokens[at].text[0].isalpha():
            return None
        if helper == "unreal":
            return None
        lived = helper != "have" and past(tokens[at])
        return _verb_phrase(tokens, at, negated or ended, wish, over, lived)


def _verb_phrase(tokens, at, negated, wish, over, lived=False) -> "Predicate | None":
    verb = slots.lemma(tokens[at].low)
    rest = tokens[at + 1 :]
    lows = [t.low for t in rest]
    if verb in ("stop", "quit", "finish") and rest and lows[0].endswith("ing"):
        inner = _verb_phrase(tokens, at + 1, True, False, False)
        return inner and _state(inner)
    if verb == "give" and lows[:1] == ["up"]:
        return Predicate("likes" if not lows[1:] else "has", rest[1:], True, True)
    if verb in ("quit", "leave", "resign", "lose") and (
        lows[:2] in (["my", "job"], ["his", "job"], ["her", "job"], ["their", "job"])
        or lows[:1] == ["from"]
    ):
        rest = rest[1:] if lows[:1] == ["from"] else rest[2:]
        if rest and rest[0].low in ("at", "as", "with"):
            relation = "works_as" if rest[0].low == "as" else "works_at"
            return Predicate(relation, rest[1:], True, True)
        return Predicate("works_at", rest, True, True, lone=True)
    if verb in ("leave", "quit", "join") and rest and rest[0].name:
        return Predicate("works_at", rest, verb != "join", True)
    if verb == "plan" and lows[:1] and not _to(lows):
        return Predicate("plans", rest, negated, False)
    if verb == "sell":
        return Predicate("has", rest, True, True)
    if verb == "get" and lows[:1] and lows[0] in slots.STATUS:
        return Predicate("status", rest[:1], negated, True)
    if verb == "become" and any(t.low in slots.WORK for t in rest[:4]):
        return Predicate("works_as", rest, negated, True)
    if verb in ("have", "get", "start", "take", "find", "accept", "land", "begin") and (
        found := _job(rest)
    ):
        return Predicate(*found, negated, True)
    if verb in slots.WISHES and _to(lows):
        skip = lows.index("to") + 1
        if verb == "need":
            return Predicate("needs", rest[skip:], negated, False)
        return Predicate("plans", rest[skip:], negated, False)
    if verb == "look" and lows[:2] == ["forward", "to"]:
        return Predicate("plans", rest[2:], negated, False)
    if verb == "think" and lows[:1] in (["of"], ["about"]):
        return Predicate("plans", rest[1:], negated, False)
    if verb == "switch" and "to" in lows:
        return Predicate("prefers", rest[lows.index("to") + 1 :], negated, True)
    if verb == "stand" and negated:
        return Predicate("dislikes", rest, False, True)
    if wish and f"{verb} {lows[0] if lows else ''}" not in slots.VERBS and verb not in slots.VERBS:
        return Predicate("plans", [tokens[at], *rest], negated, False)
    if verb in ("move", "relocate") and lows[:1] in (["from"], ["back"]) and "to" in lows:
        rest = rest[lows.index("to") :]
        lows = ["to"]
    for width in (2, 1):
        key = " ".join([verb, *lows[:width]])
        if len(lows) >= width and key in slots.VERBS:
            rest = rest[width:]
            over = over or (lived and verb in _LASTING)
            return Predicate(slots.VERBS[key], rest, negated, True, over)
    if verb in slots.VERBS and not (lows and lows[0] in PREPOSITIONS):
        over = over or (lived and verb in _LASTING)
        return Predicate(slots.VERBS[verb], rest, negated, True, over)
    if verb == "have" and lows[:1] == ["to"]:
        return None
    if verb in ("love", "like", "enjoy", "hate") and lows[:1] == ["to"]:
        return Predicate(slots.VERBS[verb], rest[1:], negated, True, over)
    relation = verb
    while lows and lows[0] in PREPOSITIONS | PARTICLES and len(relation) < 24:
        relation, rest, lows = f"{relation}_{lows[0]}", rest[1:], lows[1:]
    return Predicate(relation, rest, negated, not past(tokens[at]), over, lone=True)


def _state(predicate: Predicate) -> Predicate:
    return replace(predicate, state=True)


def _job(rest: list[Token]) -> tuple[str, list[Token]] | None:
    """The employer or the profession in "a new job at Acme", "my first job as a nurse"."""
    words = [t.low for t in rest]
    for i, word in enumerate(words[:5]):
        if word in ("job", "position", "role", "work", "working"):
            for j in range(i + 1, min(i + 3, len(words))):
                if words[j] in ("at", "with", "for"):
                    return "works_at", rest[j + 1 :]
                if words[j] == "as":
                    return "works_as", rest[j + 1 :]
    return None


def _copula(tokens, at, negated, over) -> "Predicate | None":
    over = over or tokens[at].low in ("was", "were")
    at += 1
    while at < len(tokens) and (adverb(tokens[at]) or tokens[at].low in NOT):
        negated = negated or tokens[at].low in NOT
        at += 1
    rest = tokens[at:]
    if not rest:
        return None
    lows = [t.low for t in rest]
    first = lows[0]
    two = " ".join(lows[:2])
    if first == "to" and tokens[at - 1].low == "been":
        return Predicate("been_to", rest[1:], negated, True)
    if first == "from":
        return Predicate("from", rest[1:], negated, True)
    if two in ("allergic to", "interested in", "married to", "engaged to", "fond of"):
        name = {"fond of": "likes"}.get(two, two.replace(" ", "_"))
        return Predicate(name, rest[2:], negated, True, over)
    if two in ("born in", "born on"):
        return Predicate("born_in" if two == "born in" else "birthday", rest[2:], negated, True)
    if first == "born" and len(rest) == 1:
        return Predicate("birthday", [], negated, True)
    if first == "into":
        return Predicate("likes", rest[1:], negated, True, over)
    if first in ("named", "called"):
        return Predicate("name", rest[1:], negated, True, over)
    if first.isdigit() and (len(rest) == 1 or lows[1] in ("years", "now", "today")):
        return Predicate("age", rest[:1], negated, True, over)
    if "fan" in lows[:4] and "of" in lows[:5]:
        return Predicate("likes", rest[lows.index("of") + 1 :], negated, True, over)
    if two == "able to":
        return Predicate("can", rest[2:], negated, True, over)
    if two in ("supposed to", "about to", "ready to", "planning to", "going to"):
        return Predicate("plans", rest[2:], negated, False)
    verb = slots.lemma(first)
    if len(rest) > 1 and f"{verb} {lows[1]}" in slots.VERBS and participle(rest[0]):
        key = f"{verb} {lows[1]}"
        return Predicate(slots.VERBS[key], rest[2:], negated, True, over)
    if first in ("a", "an", "the", "my", "our"):
        noun = [t for t in rest[:4] if t.low in slots.WORK]
        if noun and first in ("a", "an"):
            tail = rest[rest.index(noun[-1]) + 1 :]
            kept = rest[1 : rest.index(noun[-1]) + 1]
            if tail and tail[0].low in ("at", "for", "with") and len(tail) > 1:
                kept = [*kept, *tail]
            return Predicate("works_as", kept, negated, True, over)
        return Predicate("is_a", rest, negated, True, over)
    if first in ("in", "at", "on"):
        return Predicate("is_at", rest[1:], negated, not over, over=False)
    return Predicate("is", rest, negated, not over, over=False)


def _to(lows: list[str]) -> bool:
    return "to" in lows[:2]


def trimmed(tokens: list[Token], verb: str) -> list[Token]:
    """An object without determiner, subordinate clause and trailing adverbs."""
    end = len(tokens)
    for i, token in enumerate(tokens):
        if i and (token.low in BREAK - {"as", "that"} or token.low == "since"):
            end = i
            break
        if i > 1 and token.low == "," and verb not in LISTS:
            end = i
            break
    tokens = tokens[:end]
    while tokens and (tokens[-1].low in _TRAILING or not tokens[-1].text[-1].isalnum()):
        if tokens[-1].low == "'s":
            break
        tokens = tokens[:-1]
    if len(tokens) > 1 and [t.low for t in tokens[-2:]] == ["any", "more"]:
        tokens = tokens[:-2]
    if tokens and tokens[-1].low == "any":
        tokens = tokens[:-1]
    while tokens and (
        tokens[0].low in DETERMINERS - OWN - {"no", "his", "her", "their", "its", "your"}
        or tokens[0].low in ("really", "very", "so", "such")
        or not tokens[0].text[0].isalnum()
    ):
        tokens = tokens[1:]
    return tokens[:24]
