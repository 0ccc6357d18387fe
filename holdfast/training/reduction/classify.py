"""A small transformer that classifies texts, to measure what a way of shortening them costs.

It starts from random weights, so that words mean what the training part says of them, and its
attention is the eager kind, whose saved bytes grow with the square of the tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.training.data import order
from holdfast.training.reduction.shrink import words
from holdfast.training.saved import saved_bytes

PAD, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Texts:
    """Texts and the class of each; `names[label]` is what a class is called."""

    texts: list[str]
    labels: list[int]
    names: tuple[str, ...]

    def part(self, chosen: Sequence[int]) -> "Texts":
        return Texts([self.texts[i] for i in chosen], [self.labels[i] for i in chosen], self.names)

    def split(self, held_out: float, seed: int) -> tuple["Texts", "Texts"]:
        """Training and test part, with the same share of each class in both."""
        train: list[int] = []
        test: list[int] = []
        for label in range(len(self.names)):
            mine = [i for i, own in enumerate(self.labels) if own == label]
            drawn = [mine[i] for i in order(len(mine), label, seed).tolist()]
            cut = max(1, round(held_out * len(mine)))
            test += drawn[:cut]
            train += drawn[cut:]
        return self.part(train), self.part(test)


def read_folders(root: str | Path) -> Texts:
    """`root/<class>/<any>.txt` as texts.

    Raises:
        UsageError: fewer than two classes with two texts each.
    """
    root, texts, labels = Path(root), [], []
    names: list[str] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []:
        read = [p.read_text(encoding="utf-8", errors="replace") for p in sorted(folder.glob("*"))]
        if len(read) > 1:
            texts += read
            labels += [len(names)] * len(read)
            names.append(folder.name)
    if len(names) < 2:
        raise UsageError(
            f"{root} holds {len(names)} folders of two texts or more; expected one folder per "
            "class with a text file per example"
        )
    return Texts(texts, labels, tuple(names))


class Vocabulary:
    """Numbers of the most frequent words of the training texts."""

    def __init__(self, texts: Sequence[str], size: int = 20_000):
        counts = Counter(word.casefold() for text in texts for word in words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
        self.ids = {word: i for i, word in enumerate(ranked, start=2)}

    def __len__(self) -> int:
        return len(self.ids) + 2

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """The first `length` words of each text: (n,length) int64, 0 where a text is shorter."""
        ids = torch.full((len(texts), length), PAD)
        for row, text in zip(ids, texts, strict=True):
            found = [self.ids.get(word.casefold(), UNKNOWN) for word in words(text)[:length]]
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids


class Encoder(nn.Module):
    """Embeddings, one block of attention, the mean over words, and a linear.

    Forward takes ids (B,T) int64 and returns logits (B,classes).
    """

    def __init__(self, vocabulary: int, length: int, classes: int, width: int = 32, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        present = ids != PAD
        x = self.words(ids) + self.places[: ids.shape[1]]
        x = x + self.out(self._attend(self.before(x), present))
        x = x + self.mlp(self.after(x))
        weight = present[..., None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))

    def _attend(self, x: Tensor, present: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).mT.movedim(-1, 1) for t in self._parts(x))
        scores = (q @ k.mT) / math.sqrt(q.shape[-1])
        # Not -inf: a text without words would attend to nothing.
        scores = scores.masked_fill(~present[:, None, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).movedim(1, -2).flatten(-2)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, -1)


@dataclass(frozen=True)
class Setting:
    """How the classifier is trained."""

    lr: float = 2e-3
    batch: int = 32
    epochs: int = 3
    length: int = 128


def steps(examples: int, setting: Setting) -> int:
    return setting.epochs * -(-examples // setting.batch)


def accuracy(
    train: Texts,
    test: Texts,
    setting: Setting,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Train on the first part, count right answers on the second; texts as they are given."""
    vocabulary = Vocabulary(train.texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(len(vocabulary), setting.length, len(train.names))
    ids, labels = vocabulary.encode(train.texts, setting.length), torch.tensor(train.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    for epoch in range(setting.epochs):
        for rows in order(len(ids), epoch, seed).split(setting.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(ids[rows]), labels[rows]).backward()
            optimizer.step()
            on_step()
    with torch.no_grad():
        parts = vocabulary.encode(test.texts, setting.length).split(64)
        answers = torch.cat([model(part).argmax(1) for part in parts])
    return (answers == torch.tensor(test.labels)).double().mean().item()


def evidence(texts: Sequence[str], length: int) -> float:
    """Share of the words of the texts that lies within the first `length` of each."""
    counts = [len(words(text)) for text in texts]
    return sum(min(length, count) for count in counts) / max(1, sum(counts))


def batch_bytes(length: int, batch: int, classes: int) -> int:
    """Bytes that one batch of full length keeps for its backward pass."""
    with torch.random.fork_rng(devices=[]):
        model = Encoder(8, length, classes)
    ids = torch.full((batch, length), UNKNOWN)
    return saved_bytes(lambda: model(ids).logsumexp(1).sum(), model, [ids])
