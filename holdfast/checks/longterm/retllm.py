"""RET-LLM's triplets against reading the five texts that search finds, and a model that calls."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime

from holdfast.checks import Result, check
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.retllm import Controller, TripletMemory
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.tools.calls import (
    Call,
    CallError,
    Grammar,
    finetune,
    parse,
    pieces,
    write_call,
)

_NOW = datetime(2024, 1, 1, tzinfo=UTC)
_PERSONS, _COMPANIES, _CITIES, _ASKED = 500, 60, 10, 50
_SYLLABLES = [a + b for a in "bklmnprstv" for b in ("a", "e", "in", "or")]


@check("retllm", claim="answers about who, where and when from triplets, not from five texts")
def run(seed: int) -> Result:
    """Jobs that change, companies in cities, other names; each is said in several ways."""
    draw = random.Random(seed)
    stories, questions, misspelt = _world(draw)
    memory = Memory(":memory:", embedder=Hash(64), clock=lambda: _NOW)
    triplets = Controller(None, TripletMemory(memory))
    for story in stories:
        triplets.run(story)
    texts = Memory(":memory:", embedder=Hash(), clock=lambda: _NOW)
    texts.add(stories)
    ours = {kind: _share(triplets, asked) for kind, asked in questions.items()}
    theirs = {
        kind: sum(_read(texts, question) == wanted for question, wanted in asked) / len(asked)
        for kind, asked in questions.items()
    }
    fuzzy = _share(triplets, misspelt)
    valid, exact, free = _trained(draw)
    mean, base = (sum(shares.values()) / len(shares) for shares in (ours, theirs))
    return Result(
        measured={
            "answered": mean, **ours, "misspelt": fuzzy, "valid_calls": valid, "exact_calls": exact,
            "valid_without_grammar": free,
        },
        baseline={"top_5_texts": base, **{f"top_5_{kind}": s for kind, s in theirs.items()}},
        threshold="answered >= 0.95, top 5 <= 0.6, misspelt >= 0.9, valid >= 0.95, exact >= 0.8",
        passed=mean >= 0.95 and base <= 0.6 and fuzzy >= 0.9 and valid >= 0.95 and exact >= 0.8,
    )  # fmt: skip


def _share(controller: Controller, asked: Sequence[tuple[str, set[str]]]) -> float:
    return sum(set(controller.run(q).answers) == wanted for q, wanted in asked) / len(asked)


def _read(texts: Memory, question: str) -> set[str]:
    """The same rules, given only what search finds."""
    with Memory(":memory:", embedder=Hash(64), clock=lambda: _NOW) as few:
        reader = Controller(None, TripletMemory(few))
        for hit in texts.search(question, limit=5):
            reader.run(hit.text)
        return set(reader.run(question).answers)


def _world(draw: random.Random):
    def named(parts: int, suffix: str = "") -> str:
        return "".join(draw.choices(_SYLLABLES, k=parts)).title() + suffix

    def distinct(count: int, make) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[make()] = None
        return list(found)

    persons = distinct(_PERSONS, lambda: f"{named(2)} {named(3)}")
    companies = distinct(_COMPANIES, lambda: named(3, draw.choice((" Labs", " Group", " Works"))))
    cities = distinct(_CITIES, lambda: named(2, "ville"))
    nicknames = distinct(_PERSONS // 5, lambda: named(2, "o"))
    stories: list[str] = []
    place = {company: draw.choice(cities) for company in companies}
    for company, city in place.items():
        since = draw.choice(("is", "has been"))
        stories.append(f"{company} {since} located in {city}.")
    jobs: dict[str, list[tuple[int, int | None, str]]] = {}
    other = dict(zip(draw.sample(persons, len(nicknames)), nicknames, strict=True))
    for person in persons:
        years = sorted(draw.sample(range(2002, 2023), draw.choice((2, 3))))
        where = draw.sample(companies, len(years))
        if person in other:
            stories.append(f"{person}'s nickname is {other[person]}.")
        jobs[person] = []
        for i, (year, company) in enumerate(zip(years, where, strict=True)):
            end = years[i + 1] if i + 1 < len(years) else None
            jobs[person].append((year, end, company))
            # The nickname is used only once it is known.
            who = other.get(person, person) if i else person
            stories.append(
                draw.choice([f"{who} joined {company} in {year}.",
                             f"{who} started at {company} in {year}.",
                             f"{who} has worked at {company} since {year}."])
            )  # fmt: skip

    def held(person: str, year: int) -> set[str]:
        return {c for lo, hi, c in jobs[person] if lo <= year and (hi is None or year < hi)}

    def at(company: str, year: int) -> set[str]:
        return {p for p in persons if company in held(p, year)}

    def year_of(person: str) -> int:
        return draw.randrange(jobs[person][0][0], 2024)

    dated = [(p, year_of(p)) for p in draw.sample(persons, _ASKED)]
    known = [(p, year_of(p)) for p in draw.sample(list(other), _ASKED)]
    staffed = [(c, draw.randrange(2008, 2024)) for c in draw.sample(companies, _ASKED)]
    questions = {
        "where_then": [(f"Where did {p} work in {y}?", held(p, y)) for p, y in dated],
        "where_now": [
            (f"Where does {p} work?", held(p, 2024)) for p in draw.sample(persons, _ASKED)
        ],
        "who_then": [(f"Who worked at {c} in {y}?", at(c, y)) for c, y in staffed],
        "which_there": [
            (f"Which companies are located in {city}?", {c for c in place if place[c] == city})
            for city in cities
        ],
        "other_name": [(f"Where did {other[p]} work in {y}?", held(p, y)) for p, y in known],
    }
    misspelt = [
        (f"Where does {_misspelt(draw, p)} work?", held(p, 2024))
        for p in draw.sample(persons, 2 * _ASKED)
    ]
    return stories, questions, misspelt


def _misspelt(draw: random.Random, name: str) -> str:
    """One letter left out, doubled, replaced or swapped with the next, none of them a first one."""
    at = draw.choice([i for i in range(1, len(name) - 1) if name[i - 1 : i + 2].isalpha()])
    letter = draw.choice("aeiourstln")
    return draw.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + letter + name[at + 1 :],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        ]
    )


def _trained(draw: random.Random) -> tuple[float, float, float]:
    """Valid and exact calls of a small model for names it has never seen together."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    firsts, lasts = (
        ["".join(draw.choices(_SYLLABLES, k=2)).title() for _ in range(40)] for _ in range(2)
    )
    companies = ["".join(draw.choices(_SYLLABLES, k=3)).title() for _ in range(40)]

    def example(person: str) -> tuple[str, Call]:
        company, year = draw.choice(companies), draw.randrange(2000, 2024)
        when = datetime(year, 1, 1, tzinfo=UTC)
        return draw.choice([
            (f"{person} joined {company} in {year}.",
             Call(True, person, "works_at", company, (when, None))),
            (f"{person} likes {company}.", Call(True, person, "likes", company)),
            (f"Where does {person} work?", Call(False, person, "works_at", "")),
            (f"Who works at {company}?", Call(False, "", "works_at", company)),
            (f"Who likes {company}?", Call(False, "", "likes", company)),
        ])  # fmt: skip

    people = list(dict.fromkeys(f"{a} {b}" for a in firsts for b in lasts))
    draw.shuffle(people)
    train = [example(person) for person in people[200:] for _ in range(3)]
    test = [example(person) for person in people[:200]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [part for text, call in train for part in (text, str(call))],
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<end>"], show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model = finetune(model, tokenizer, train, steps=400, rank=0)
    grammar = Grammar(pieces(tokenizer))
    made = [write_call(model, tokenizer, text, grammar) for text, _ in test]
    free = [_unbound(model, tokenizer, text) for text, _ in test]
    exact = sum(_call(text) == call for text, (_, call) in zip(made, test, strict=True))
    valid, loose = (sum(_call(text) is not None for text in texts) for texts in (made, free))
    return valid / len(test), exact / len(test), loose / len(test)


def _call(text: str) -> Call | None:
    try:
        return parse(text)
    except CallError:
        return None


def _unbound(model, tokenizer, text: str) -> str:
    import torch

    ids = torch.tensor([tokenizer.encode(text + "\n", add_special_tokens=False)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
