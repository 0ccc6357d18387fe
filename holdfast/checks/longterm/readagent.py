"""ReadAgent on Python's manual: what gists alone tell, and what opened pages add."""

import random
import re
from collections import Counter
from pydoc_data.topics import topics

from holdfast.checks import Result, check
from holdfast.longterm.language.tokens import sentences
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.readagent import ReadAgent
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.retrieval.terms import STOP
from holdfast.longterm.retrieval.terms import words as terms

_QUESTIONS, _BUDGET = 60, 40_000


@check("readagent", claim="gists and a few opened pages hold the answer in a third of the words")
def run(seed: int) -> Result:
    """Questions of three rare words of one sentence; is that sentence in the context?"""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    asked = _questions(text, random.Random(seed))
    with Memory(":memory:", embedder=Hash(), policy=Policy()) as memory:
        document = ReadAgent(memory).read(text, "Python's manual")
        opened = [document.context(question, _BUDGET) for question, _ in asked]
        gists = document.context(asked[0][0], _BUDGET, pages=0).text
    ours, alone = (
        sum(_plain(wanted) in _plain(one) for one, (_, wanted) in zip(texts, asked, strict=True))
        / len(asked)
        for texts in ([context.text for context in opened], [gists] * len(asked))
    )
    whole = len(text.split())
    ratio = whole / max(len(context.text.split()) for context in opened)
    return Result(
        measured={"answers": ours, "words": whole, "least_compression": ratio},
        baseline={"answers_in_gists": alone},
        threshold="answers >= 85 %, in gists alone <= 50 %; words / words in context >= 3",
        passed=ours >= 0.85 and alone <= 0.5 and ratio >= 3 and whole > 50_000,
    )


def _questions(text: str, pick: random.Random) -> list[tuple[str, str]]:
    seen = Counter(terms(text))
    found = []
    for low, high in sentences(text):
        sentence = text[low:high]
        told = {w for w in terms(sentence) if w not in STOP and w.isalpha() and len(w) > 3}
        rare = sorted((w for w in told if seen[w] <= 8), key=lambda w: (seen[w], w))[:3]
        if len(rare) == 3 and 8 <= len(sentence.split()) <= 40:
            found.append((f"What is said about {', '.join(rare)}?", sentence))
    return pick.sample(found, _QUESTIONS)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)
