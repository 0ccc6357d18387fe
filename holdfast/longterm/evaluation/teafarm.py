"""TeaFarm: is there in the context what refutes a question with a false premise?

Source   K. Ong et al., "Towards Lifelong Dialogue Agents via Timeline-based Memory Management",
         2025.
Departs  the conversations are made from a seed, so that the memory that refutes each premise is
         known and no model has to judge: what counts is whether the context holds it. Half of the
         questions deny something past, half take something past for the present.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from holdfast.longterm.memory import Memory
from holdfast.longterm.retrieval.vectors import Embedder

START = datetime(2024, 1, 1, tzinfo=UTC)
VERSIONS = 4  # a fact changes three times
_PEOPLE = ("Ben", "Clara", "Dmitri", "Elena", "Farid", "Greta")
_PLACES = (
    "Boston", "Denver", "Oslo", "Lima", "Cairo", "Kyoto", "Madrid", "Quito", "Nairobi", "Dublin",
    "Athens", "Hanoi", "Prague", "Bogota", "Tunis", "Seoul", "Riga", "Accra", "Lyon", "Perth",
    "Turin", "Malmo", "Porto", "Davos",
)  # fmt: skip
_FIRMS = (
    "Acme", "Globex", "Initech", "Umbrella", "Hooli", "Vandelay", "Stark", "Wonka", "Tyrell",
    "Cyberdyne", "Soylent", "Gringotts", "Oscorp", "Wayne", "Monarch", "Aperture", "Massive",
    "Veidt", "Zorin", "Duff", "Nakatomi", "Weyland", "Bluth", "Pied",
)  # fmt: skip
_ATTRIBUTES = {
    "lives": (_PLACES, ("lives in {}", "moved to {}", "relocated to {}", "settled in {}")),
    "works": (_FIRMS, ("works at {}", "started at {}", "was hired by {}", "is employed at {}")),
}
_ASIDE = (
    "{} likes {} soup", "{} bought a {} scarf", "{} painted a {} boat", "{} saw a {} film",
    "{} lost a {} key", "{} baked a {} cake",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "white", "yellow", "purple", "grey", "orange")


@dataclass(frozen=True)
class Question:
    """A false premise, and the sentence that refutes it."""

    text: str
    refuted_by: str


@dataclass(frozen=True)
class World:
    """Sessions of sentences, the sentences of each fact in order, and questions.

    Attributes:
        facts: (question about the fact, its sentences, oldest first).
    """

    sessions: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, tuple[str, ...]], ...]
    questions: tuple[Question, ...]


def world(seed: int) -> World:
    """Six people who move and change their employer three times, among things that just happen."""
    draw = random.Random(seed)
    sessions: list[list[str]] = [[] for _ in range(VERSIONS)]
    facts: list[tuple[str, tuple[str, ...]]] = []
    questions: list[Question] = []
    for name, (values, verbs) in _ATTRIBUTES.items():
        left = draw.sample(values, len(values))
        for person in _PEOPLE:
            own = [left.pop() for _ in range(VERSIONS)]
            # Each time in other words, as people speak.
            told = [
                f"{person} {verb.format(value)}"
                for value, verb in zip(own, draw.sample(verbs, VERSIONS), strict=True)
            ]
            for session, sentence in zip(sessions, told, strict=True):
                session.append(sentence)
            where = "Where does {} live?" if name == "lives" else "Where does {} work?"
            facts.append((where.format(person), tuple(told)))
            verb = "lived in" if name == "lives" else "worked at"
            past = draw.randrange(VERSIONS - 1)
            questions.append(
                Question(f"{person} never {verb} {own[past]}, is that right?", told[past])
            )
            questions.append(
                Question(
                    f"Is it true that {person} still {name} {verb[-2:]} {own[past]}?", told[-1]
                )
            )
    for session in sessions:
        for person in _PEOPLE:
            session += [one.format(person, draw.choice(_COLOURS)) for one in draw.sample(_ASIDE, 2)]
        draw.shuffle(session)
    return World(tuple(map(tuple, sessions)), tuple(facts), tuple(questions))


def lived(made: World, policy: str, embedder: Embedder) -> Memory:
    """A memory that went through the sessions, a month apart, and digested each."""
    now = [START]
    memory = Memory(":memory:", policy=policy, embedder=embedder, clock=lambda: now[0])
    for number, session in enumerate(made.sessions):
        now[0] = START + timedelta(days=30 * number)
        memory.add(
            [{"speaker": "Ann", "content": f"{text}."} for text in session], session=str(number)
        )
        memory.summarise(str(number))
    return memory


def refuted(
    memory: Memory, made: World, budget: int, advance: Callable[[], None] = lambda: None
) -> float:
    """Share of the questions whose context, of at most `budget` words, refutes their premise."""
    held = 0
    for question in made.questions:
        held += question.refuted_by in memory.context(question.text, budget).text
        advance()
    return held / len(made.questions)
