"""SCM against the same activated turns, raw and cut off by similarity, within equal tokens."""

import random

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.longterm.budget import Context, pack, words
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.evaluation.compare import remembered
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.scm import SCM
from holdfast.longterm.retrieval.embed import Hash

_BUDGET = 2500
_PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
_THINGS = {
    "bicycle": "wheel saddle pedal chain road hill brake tyre ride bell",
    "piano": "key pedal chord scale tune string hammer song lesson bench",
    "garden": "soil rake seed bean rose hedge spade rain worm weed",
    "boat": "sail mast keel wind harbour rope anchor deck tide oar",
}
_PLACES = (
    "attic", "cellar", "shed", "garage", "barn", "kitchen", "hallway", "loft", "porch", "studio",
)  # fmt: skip


@check("scm", claim="keeps more of what answers than the raw turns that are most similar")
def run(seed: int) -> Result:
    if not locomo.path().exists():
        raise UsageError(f"{locomo.path()} is absent; name its folder in HOLDFAST_DATA")
    ours, cut, questions = _stream(seed)
    kept, raw = _conversation()
    return Result(
        measured={"long_turns": ours, "locomo_evidence": kept, "questions": questions},
        baseline={"long_turns_cut": cut, "locomo_evidence_cut": raw},
        threshold="turns of 1,000 words: >= cut + 0.1; LoCoMo's short turns: no less evidence",
        passed=ours >= cut + 0.1 and kept >= raw,
    )


def _cut(memory: Memory, query: str) -> Context:
    """The same activated turns, whole, by similarity, as far as they fit."""
    with memory.reading() as view:
        hits = memory.policy.retrieve(view, query, 6)
        return pack(hits, _BUDGET, words)


def _stream(seed: int) -> tuple[float, float, int]:
    """Turns of about 1,000 words, each of which says where somebody keeps something."""
    pick = random.Random(seed)
    asked = []
    with Memory(":memory:", embedder=Hash(), policy=SCM()) as memory:
        for person in _PEOPLE:
            for thing, about in _THINGS.items():
                place = pick.choice(_PLACES)
                sentences = []
                while sum(len(s.split()) for s in sentences) < 960:
                    chosen = pick.sample(about.split(), 3)
                    sentences.append(f"We spoke of the {', the '.join(chosen)} and the {thing}.")
                fact = f"{person} keeps the {thing} in the {place}."
                sentences.insert(pick.randrange(len(sentences)), fact)
                memory.add({"role": "user", "content": " ".join(sentences)})
                asked.append((f"Where does {person} keep the {thing}?", fact))
        memory.add({"role": "user", "content": "That is all for today."})
        ours = sum(fact in memory.context(q, _BUDGET).text for q, fact in asked)
        cut = sum(fact in _cut(memory, q).text for q, fact in asked)
    return ours / len(asked), cut / len(asked), len(asked)


def _conversation() -> tuple[float, float]:
    """Evidence of LoCoMo's questions that reaches the context."""
    (conversation,) = locomo.load(locomo.path(), ["conv-41"])
    ours, theirs = [], []
    with remembered(conversation, SCM(), Hash()) as (memory, turn_of):
        for question in conversation.questions:
            if question.evidence:
                wanted = set(question.evidence)
                for shares, context in (
                    (ours, memory.context(question.text, _BUDGET)),
                    (theirs, _cut(memory, question.text)),
                ):
                    got = {turn_of(item) for item in context.ids}
                    shares.append(len(wanted & got) / len(wanted))
    return sum(ours) / len(ours), sum(theirs) / len(theirs)
