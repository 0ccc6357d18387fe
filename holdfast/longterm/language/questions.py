"""Questions of who, what and where as calls, by the rules that read statements.

A name that no text has is put where the answer would stand, "Who worked at Acme?" becomes
"Qzxwho worked at Acme.", and the extractor says which relation that is. English only.
"""

import re
from dataclasses import replace

from holdfast.longterm.language import dates, slots
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.llm import Rules
from holdfast.longterm.tools.calls import Call

_BLANK = "Qzxwho"
_KIND = r"(?P<kind>(?i:where|who|whom|what|which)(?: [a-z]+)??)"
_SUBJECT = r"(?P<subject>(?:[A-Z0-9][\w.&'’-]*\s)+)"
# "Where did Ann work", "for which company does Ann work"
_OBJECT = re.compile(
    r"(?:(?i:in|at|for|to|from) )?"
    + _KIND
    + r"\s(?P<auxiliary>do|does|did|is|was|are|were|has|had)"
    r"\s" + _SUBJECT + r"(?P<rest>.*)"
)
# "Who worked at Acme", "which companies are based in Boston"
_WHO = re.compile(r"(?i:who|(?:which|what) [a-z]+)\s(?!(?:do|does|did)\b)(.+)")
_SINGULAR = {"are": "is", "were": "was", "have": "has", "work": "works", "live": "lives"}
_PASSIVE = re.compile(r"([a-z]+ed) (in|at|by|on|to|for|from|with) (.+)")


def readings(question: str) -> list[Call]:
    """The reads that would answer a question, the likeliest first; empty if it is not understood.

    A time in it is the time of the reads.
    """
    text = question.strip().rstrip("?").strip()
    when = None
    for period in dates.find(text, None):
        if period.lo is not None or period.hi is not None:
            when = (period.lo, period.hi)
            text = " ".join((text[: period.start] + text[period.end :]).split()).strip(" ,")
            break
    found: list[Call] = []
    for statement in _statements(text):
        for fact in map(passive, Rules().facts(f"{statement}.")):
            t1, t2 = ("" if f == _BLANK else f for f in (fact.subject, fact.object))
            if (not t1 or not t2) and _BLANK not in f"{t1} {fact.relation} {t2}":
                found.append(Call(False, t1, fact.relation, t2, when))
    return list(dict.fromkeys(found))


def _statements(text: str) -> list[str]:
    """What would answer a question, with a blank in it."""
    if asked := _OBJECT.fullmatch(f"{text} "):
        auxiliary, subject, rest = (asked[n].strip() for n in ("auxiliary", "subject", "rest"))
        if auxiliary in ("do", "does", "did"):
            verb, *more = rest.split() or [""]
            stated = " ".join((subject, slots.third_person(verb), *more))
        else:
            stated = f"{subject} {_SINGULAR.get(auxiliary, auxiliary)} {rest}".strip()
        place = asked["kind"].lower() == "where"
        between = ("in", "at") if place else ("", "in", "at", "for", "by")
        return [" ".join(f"{stated} {word} {_BLANK}".split()) for word in between]
    if told := _WHO.fullmatch(text):
        verb, *more = told[1].split()
        return [" ".join((_BLANK, _SINGULAR.get(verb, verb), *more))]
    return []


def passive(fact: Fact) -> Fact:
    """`located_in` Boston, where the extractor says that something `is` "located in Boston"."""
    found = _PASSIVE.fullmatch(fact.object) if fact.relation == "is" else None
    if found is None:
        return fact
    return replace(fact, relation=f"{found[1]}_{found[2]}", object=found[3])
