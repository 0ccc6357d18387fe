"""Style preferences, one only stated and two only shown; and frequent facts among many others."""

import random
from datetime import UTC, datetime, timedelta

import torch
import torch.nn.functional as F

from holdfast.checks import Result, check
from holdfast.longterm.memory import Memory
from holdfast.longterm.personal import MaLPTrainer
from holdfast.longterm.policies.malp import MaLP
from holdfast.longterm.retrieval.embed import Hash

START = datetime(2024, 1, 1, tzinfo=UTC)
SLOTS = {
    "greeting": ("hello", "hey", "dear", "welcome"),
    "style": ("brief", "flowery", "formal", "funny"),
    "closing": ("bye", "cheers", "regards", "ciao"),
}
TOPICS = ("tea", "chess", "rowing", "jazz", "bread", "storks", "bridges", "maps")
ASK, ANSWER = "<ask>", "<answer>"
WORDS = [ASK, ANSWER, *SLOTS, *(v for values in SLOTS.values() for v in values), *TOPICS]
IDS = {word: i for i, word in enumerate(WORDS)}
STATED, *SHOWN = SLOTS
USERS, TRAINING, BATCH, STEPS = 4, 500, 64, 60
FACTS, SESSION, OFTEN, CAPACITY, ASKED = 240, 12, 20, 48, 0.9


def encode(text: str) -> list[int]:
    """The words that the tiny model knows; it does not read any other."""
    return [IDS[word] for word in text.replace(".", " ").split() if word in IDS]


def asked(topic: str) -> str:
    return f"{ASK} {topic} {ANSWER}"


def tiny(seed: int) -> torch.nn.Module:
    """A language model that does as its prompt says, and anything where it says nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TRAINING):
        rows = []
        for _ in range(BATCH):
            reply = {slot: draw.choice(values) for slot, values in SLOTS.items()}
            told = [slot for slot in SLOTS if draw.random() < 0.5]
            draw.shuffle(told)
            notes = [f"{slot} {reply[slot]}" for slot in told]
            rows.append(encode(" ".join([*notes, asked(draw.choice(TOPICS)), *reply.values()])))
        ids = torch.zeros(BATCH, max(map(len, rows)), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, len(row) - len(SLOTS) : len(row)] = ids[i, len(row) - len(SLOTS) : len(row)]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def followed(model: torch.nn.Module, wants: dict[str, str], notes: str = "") -> float:
    """Share of a user's preferences that replies follow."""
    right = 0
    for topic in TOPICS:
        ids = encode(f"{notes} {asked(topic)}")
        for slot in SLOTS:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            right += WORDS[ids[-1]] == wants[slot]
    return right / len(TOPICS) / len(SLOTS)


def styles(seed: int) -> dict[str, float]:
    model, clock = tiny(seed), _clock()
    scores: dict[str, list[float]] = {
        name: [] for name in ("base", "memory", "LoRA", "memory and LoRA")
    }
    with Memory(":memory:", policy=MaLP(), embedder=Hash(), clock=clock) as memory:
        for number in range(USERS):
            user = f"user{number}"
            wants = {slot: values[number] for slot, values in SLOTS.items()}
            memory.add(
                {"speaker": user, "content": f"I want the {STATED} {wants[STATED]}."},
                session="first", space=user,
            )  # fmt: skip
            memory.summarise("first", space=user)
            dialogues = []
            for i, topic in enumerate(TOPICS * 4):
                # What is stated changes: of that the adapter learns only to do as the notes say.
                reply = {**wants, STATED: SLOTS[STATED][(i + i // len(TOPICS)) % 4]}
                for notes in ("", f"{STATED} {reply[STATED]} "):
                    dialogues.append((notes + asked(topic), " ".join(reply.values())))
            question = f"Which {STATED} does {user} want?"
            notes = memory.context(question, 100, space=user).text
            scores["base"].append(followed(model, wants))
            scores["memory"].append(followed(model, wants, notes))
            trainer = MaLPTrainer(model, memory, user, encode, budget=128 * 1024, rank=4, seed=seed)
            trainer.fit(dialogues, steps=STEPS)
            scores["LoRA"].append(followed(model, wants))
            notes = trainer.context(question).text
            scores["memory and LoRA"].append(followed(model, wants, notes))
            trainer.close()
    return {name: sum(values) / USERS for name, values in scores.items()}


def frequent(seed: int) -> tuple[float, float, int]:
    """Facts asked for often that are found in the end: here, among as many newest; how many."""
    draw, clock = random.Random(seed), _clock()
    texts = [f"{name} lives in {place}" for name, place in _pairs(draw)]
    often = sorted(draw.sample(range(FACTS // 2), OFTEN))
    with Memory(":memory:", policy=MaLP(capacity=CAPACITY), embedder=Hash(), clock=clock) as memory:
        for start in range(0, FACTS, SESSION):
            said = [{"speaker": "Ann", "content": f"{t}."} for t in texts[start : start + SESSION]]
            memory.add(said, session=str(start))
            memory.summarise(str(start))
            for fact in often:
                if fact < start + SESSION and draw.random() < ASKED:
                    memory.search(_question(texts[fact]), limit=1)
        kept = sum(n.data["shelf"] != "archive" for n in memory.get_all(kind="note", limit=10_000))
        ours = _found(memory, [texts[i] for i in often])
    with Memory(":memory:", embedder=Hash(), clock=clock) as newest:
        newest.add(texts[-kept:])
        return ours, _found(newest, [texts[i] for i in often]), kept


def _pairs(draw: random.Random) -> list[tuple[str, str]]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < 2 * FACTS:
        names["".join(draw.choices(syllables, k=4)).capitalize()] = None
    made = list(names)
    return list(zip(made[:FACTS], made[FACTS:], strict=True))


def _question(text: str) -> str:
    return f"Where does {text.split()[0]} live?"


def _found(memory: Memory, texts: list[str]) -> float:
    found = [text in [h.text for h in memory.search(_question(text), limit=6)] for text in texts]
    return sum(found) / len(found)


def _clock():
    now = [START]

    def tell() -> datetime:
        now[0] += timedelta(minutes=1)
        return now[0]

    return tell


@check(
    "malp",
    claim="a tiny model follows a user's three style preferences, one only stated and two only "
    "shown, at least 10 points more often with memory and the user's adapter than with the adapter "
    "alone, and with that than without; of facts that are asked for often, at least 95 % are found "
    "after the short-term memory has overflowed five times, at most 30 % among as many newest",
)
def run(seed: int) -> Result:
    share = styles(seed)
    ours, newest, kept = frequent(seed)
    both, lora, base = share["memory and LoRA"], share["LoRA"], share["base"]
    return Result(
        measured={"followed, memory and LoRA": both, "frequent facts found": ours, "kept": kept},
        baseline={
            "followed, LoRA": lora,
            "followed, memory": share["memory"],
            "followed, base": base,
            "frequent facts found, as many newest": newest,
        },
        threshold="followed: memory and LoRA >= LoRA + 0.1 >= base + 0.2; "
        "found >= 0.95, as many newest <= 0.3",
        passed=both >= lora + 0.1 and lora >= base + 0.1 and ours >= 0.95 and newest <= 0.3,
    )
