"""Five ways to context on one language model and Python's library: who is better, and where.

A document is 192 tokens from the start of a function or class on. Text repeats as it does in any
archive: half of the training documents, and all test documents, are revisions of the other half,
with a tenth of their text replaced. Retrieval is also measured on a data set without the test
documents' originals. Every model goes on from one that was trained with short window, long window
and retrieval in turn, and sees the same batches; the few positions within the short window weigh a
third of all, or models would give them up for the others' sake.
"""

import random
import re
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from holdfast.checks import Result, check, tinylm
from holdfast.longterm.marge import CausalMARGE, Index, MargeConfig, train
from holdfast.longterm.retrieval_need import (
    KINDS,
    LONGER,
    bands,
    continued,
    gains,
    near_duplicates,
    position_losses,
)

VOCABULARY, LENGTH, WINDOW = 512, 192, 20
ORIGINALS, TEST, BATCH = 400, 160, 8
SPAN, REPLACED = 12, 0.1  # tokens that a revision replaces at once, and their share
TOGETHER, APART = 320, 110  # steps
LR, LR_APART = 4e-3, 2e-3
EARLY = 1 / 3
EQUAL, BETTER = 0.03, 0.05  # nats


def documents(seed: int) -> tuple[Tensor, Tensor]:
    """Training and test documents: (2*ORIGINALS,LENGTH) and (TEST,LENGTH) int64."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / f"{name}.py").read_text(errors="ignore") for name in tinylm.FILES[::2]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts[::4],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    rows = []
    for text in texts:
        row: list[int] = []
        for part in re.split(r"(?m)^(?= *(?:def|class) )", text):
            if len(row) >= LENGTH:
                rows.append(row[:LENGTH])
                row = []
            row = row + tokenizer.encode(part).ids
        if len(row) >= LENGTH:
            rows.append(row[:LENGTH])
    random.Random(seed).shuffle(rows)
    found = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    originals, others = found[:ORIGINALS], found[ORIGINALS:]
    learned = torch.cat([originals, revised(originals, others, generator)])
    return learned, revised(originals[:TEST], others, generator)


def revised(rows: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """The documents with spans replaced by what stands there in some other document."""
    new = torch.rand(len(rows), LENGTH // SPAN, generator=generator) < REPLACED
    chosen = torch.randint(len(others), (len(rows),), generator=generator)
    return torch.where(new.repeat_interleave(SPAN, 1), others[chosen], rows)


def batches(rows: Tensor, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(rows), (BATCH,), generator=generator)
        yield rows[chosen], chosen


class InTurn(nn.Module):
    """One model under the short window, the long one, retrieval and the long one, a step each."""

    def __init__(self, model: CausalMARGE):
        super().__init__()
        self.model, self.steps = model, 0

    def refreshed(self, index: Index) -> Index:
        return self.model.refreshed(index)

    def forward(self, rows: Tensor, index: Index, document: Tensor) -> Tensor:
        way = self.steps % 4
        self.steps += 1
        for block in self.model.blocks:
            block.window = WINDOW * (LONGER if way % 2 else 1)
        return self.model(rows, index, document) if way == 2 else self.model(rows)


def together(rows: Tensor, seed: int) -> CausalMARGE:
    torch.manual_seed(seed)
    model = CausalMARGE(MargeConfig(VOCABULARY, layers=2, encoder=1, window=WINDOW))
    index = model.index(rows)
    train(InTurn(model), batches(rows, seed), TOGETHER, LR, index, TOGETHER // 4, weights())
    return model


def weights() -> Tensor:
    """Weights of positions: `EARLY` of their sum lies before the short window is full."""
    early = torch.arange(1, LENGTH) < WINDOW
    share = torch.where(early, EARLY / early.sum(), (1 - EARLY) / (~early).sum())
    return share * len(early)


def curve(model: nn.Module, rows: Tensor, index: Index | None = None) -> Tensor:
    if index is None:
        return position_losses(model, rows)
    # The inputs of a document are one token less than it; padding the end changes nothing before.
    padded = lambda ids: model(nn.functional.pad(ids, (0, 1)), index)[:, :-1]  # noqa: E731
    return position_losses(padded, rows)


@check(
    "retrieval_need",
    claim="an 8 times longer window leaves the loss of the first tokens of a document as it is "
    "(0.03 nat) and lowers it after twice the short window (0.05 nat); retrieval lowers it "
    "among the first tokens already (0.05 nat), on text that the data set repeats",
)
def run(seed: int) -> Result:
    rows, test = documents(seed)
    start = together(rows, seed)
    curves, sizes = {}, {}
    for kind in KINDS:
        torch.manual_seed(seed)
        model = continued(kind, start)
        index = model.index(rows) if kind == "retrieval" else None
        train(model, batches(rows, seed + 1), APART, LR_APART, index, APART // 2, weights())
        sizes[kind] = sum(p.numel() for p in model.parameters())
        if index is not None:
            index = model.refreshed(index)
            repeated = near_duplicates(test, rows)
            apart = ~repeated[index.document]
            parts = (index.tokens, index.vectors, index.document, index.place)
            without = Index(*(part[apart] for part in parts))
            curves["retrieval_without_repeats"] = curve(model, test, without)
        curves[kind] = curve(model, test, index)
    better = gains(curves, WINDOW)
    measured = {f"{kind}_{band}": v for kind, g in better.items() for band, v in g.items()}
    del measured["short_early"], measured["short_middle"], measured["short_late"]
    long, found = better["long"], better["retrieval"]
    return Result(
        measured=measured | {f"{kind}_parameters": n for kind, n in sizes.items()},
        baseline=bands(curves["short"], WINDOW) | {"repeated_documents": int(repeated.sum())},
        threshold=f"nats better than the short window: long within {EQUAL} early and >= {BETTER} "
        f"late; retrieval >= {BETTER} early",
        passed=abs(long["early"]) <= EQUAL and long["late"] >= BETTER and found["early"] >= BETTER,
    )
