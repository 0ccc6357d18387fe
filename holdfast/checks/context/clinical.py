"""A small encoder of 512 positions, lengthened to 4,096 by the recipe, and put to use.

Its domain is the prose of Python's language reference, its first training was on Python's sources.
Then documents are told apart by a cue that lies behind position 512.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerBase,
)

from holdfast.checks import Result, check, tinylm
from holdfast.context.attention.clinical import lengthen
from holdfast.context.attention.masked_lm import Run, Settings, mask_tokens
from holdfast.meter import Meter
from holdfast.training.data import DataSource
from holdfast.training.tokenizers import byte_tokenizer

SHORT, LONG = 512, 4096
BASE_STEPS, MLM_STEPS, LR = 250, 50, 2e-3
DOCUMENT, CUE, CLASSES = 768, 8, 4
TASK_STEPS, BATCH, TESTS = 90, 4, 96
DOMAIN_BYTES = 120_000
# Bytes that occur in no ASCII text.
FIRST_CUE = 0xF8


def tokenizer() -> PreTrainedTokenizerBase:
    found = byte_tokenizer()
    found.cls_token, found.sep_token, found.mask_token = "<|bos|>", "<|eos|>", "<|reserved|>"
    return found


def short_encoder(folder: Path, seed: int) -> None:
    """A BERT that read Python's sources, 512 bytes at a time, written to `folder`."""
    torch.manual_seed(seed)
    words = tokenizer()
    config = BertConfig(
        vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=SHORT, pad_token_id=words.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(words.all_special_ids)
    for ids in tinylm.batches(tinylm.corpus()[0], BASE_STEPS, seed, 2, SHORT):
        inputs = mask_tokens(ids, words.mask_token_id, special, 256, generator)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def domain(folder: Path) -> None:
    """Prose: what `help()` tells about the language."""
    from pydoc_data.topics import topics

    folder.mkdir()
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    for i in range(10):
        part = text[i * DOMAIN_BYTES // 10 : (i + 1) * DOMAIN_BYTES // 10]
        (folder / f"{i}.txt").write_bytes(part)


def documents(count: int, batch: int, seed: int, split: int) -> Iterator[tuple[Tensor, Tensor]]:
    """ids (B,DOCUMENT) of source text in which a cue behind position 512 says the class (B,)."""
    generator = torch.Generator().manual_seed(seed)
    for text in tinylm.batches(tinylm.corpus()[split], count, seed, batch, DOCUMENT):
        ids = text.clone()
        ids[:, 0] = 256  # what begins a text
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        start = torch.randint(SHORT, DOCUMENT - CUE, (batch,), generator=generator)
        at = start[:, None] + torch.arange(CUE)
        yield ids.scatter(1, at, (FIRST_CUE + labels)[:, None].expand(-1, CUE)), labels


def accuracy(folder: Path, length: int, seed: int) -> float:
    """Of a classifier on what `AutoModel` opens, which reads `length` tokens of each document."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    model.train()
    for ids, labels in documents(TASK_STEPS, BATCH, seed, split=0):
        model(ids[:, :length], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    hits = 0
    with torch.no_grad():
        for ids, labels in documents(TESTS // 16, 16, seed + 1, split=1):
            hits += int((model(ids[:, :length]).logits.argmax(-1) == labels).sum())
    return hits / TESTS


def peak(model: nn.Module, length: int) -> int:
    """Bytes that a forward and backward pass holds beside the model and its input."""
    ids = torch.zeros(1, length, dtype=torch.long)

    def step() -> None:
        model.base_model(ids).last_hidden_state.sum().backward()  # type: ignore[operator,union-attr]
        model.zero_grad()

    step()
    with Meter(model, inputs=ids) as meter:
        step()
    return meter.peak - meter.base


@torch.no_grad()
def difference(short: Path, long: Path, seed: int) -> float:
    """Largest difference of logits between the encoder and its conversion on inputs that fit."""
    text = next(tinylm.batches(tinylm.corpus()[1], 1, seed, 2, 257))
    one, two = (AutoModelForMaskedLM.from_pretrained(f).eval()(text).logits for f in (short, long))
    return (one - two).abs().max().item()


@check(
    "clinical",
    claim="a 512-token encoder reads 4,096: equal on what fits the window, memory linear, better "
    "on its domain after 50 steps, and finds cues that a truncated one cannot see",
)
def run(seed: int) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        short, converted, long = (root / name for name in ("short", "converted", "long"))
        short_encoder(short, seed)
        Run(Settings(str(short), None, length=LONG, steps=0), converted, device="cpu").run()
        apart = difference(short, converted, seed)
        domain(root / "domain")
        source = DataSource((str(root / "domain"),), validation=0.1, seed=seed)
        settings = Settings(
            str(short), source, length=LONG, steps=MLM_STEPS, learning_rate=LR, seed=seed
        )
        report = Run(settings, long, device="cpu").run()
        positions = json.loads((long / "config.json").read_text())["max_position_embeddings"]
        ours, base = accuracy(long, DOCUMENT, seed), accuracy(short, SHORT, seed)
        doubled = []
        for attention in ("longformer", "bigbird"):
            model = AutoModelForMaskedLM.from_pretrained(short)
            lengthen(model, attention, LONG)
            doubled.append(peak(model, 4096) / peak(model, 2048))
    before, after = report["loss"]["held_out_before"], report["loss"]["held_out_after"]
    linear = all(1.7 <= ratio <= 2.3 for ratio in doubled)
    bytes_ = report["predicted"]["peak_bytes"], report["measured"]["peak_bytes"]
    return Result(
        measured={
            "accuracy": ours,
            "held_out_loss": after,
            "difference": apart,
            "peak_doubles_longformer": doubled[0],
            "peak_doubles_bigbird": doubled[1],
            "step_peak_bytes": bytes_[1],
        },
        baseline={
            "truncated_accuracy": base,
            "held_out_loss_before": before,
            "step_peak_bytes_predicted": bytes_[0],
        },
        threshold="accuracy >= truncated + 0.15, held-out loss lower, difference <= 1e-4, peak x "
        "1.7 to 2.3 for twice the length, predicted bytes = measured",
        passed=ours >= base + 0.15
        and after < before
        and apart <= 1e-4
        and linear
        and positions > LONG
        and bytes_[0] == bytes_[1],
    )
