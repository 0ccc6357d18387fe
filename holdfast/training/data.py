"""Text files, directories and JSONL as packed sequences of tokens, with a validation split.

Keeps    every token once, and a mask where some tokens carry no loss.
Form     uint16 for vocabularies below 65,536, else int32; the mask is uint8 and absent in plain
         text.
Bytes    2 (or 4) per token, plus 1 where there is a mask; reading adds one file and, for a
         moment, the validation part.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from holdfast.errors import UsageError
from holdfast.training.sources import DataSource, Document, Reading, documents
from holdfast.training.tokenizers import TextEncoder, load_tokenizer, render_chat
from holdfast.units import format_bytes

__all__ = [
    "BatchStream",
    "DataSource",
    "Dataset",
    "PackedTokens",
    "Report",
    "load_tokenizer",
    "order",
    "prepare",
]

_Part = tuple[np.ndarray, np.ndarray | None]  # tokens (n,) and their mask

IGNORED = -100  # the label that Hugging Face losses skip
BATCH_CHARACTERS = 1 << 20


@dataclass
class Report:
    """What was read, what was left out and why, and what remains."""

    files: int = 0
    texts: int = 0
    chats: int = 0
    tokens: int = 0
    train_sequences: int = 0
    validation_sequences: int = 0
    split: str = "none"
    nbytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, what: str, count: int = 1) -> None:
        self.skipped[what] = self.skipped.get(what, 0) + count

    def __str__(self) -> str:
        lines = [
            f"{self.files:,} files, {self.texts:,} texts, {self.chats:,} chats, "
            f"{self.tokens:,} tokens ({format_bytes(self.nbytes)} held)",
            f"{self.train_sequences:,} training and {self.validation_sequences:,} validation "
            f"sequences (split: {self.split})",
        ]
        lines += [f"left out: {count:,} {what}" for what, count in sorted(self.skipped.items())]
        return "\n".join(lines + self.notes)


class PackedTokens:
    """Sequences of equal length, cut from one run of tokens.

    Args:
        tokens: (n, sequence), uint16 or int32.
        mask: (n, sequence) uint8, 1 where a token carries loss; None where all do.
    """

    def __init__(self, tokens: np.ndarray, mask: np.ndarray | None = None):
        self.tokens, self.mask = tokens, mask

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.mask is None else self.mask.nbytes)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """`input_ids` and unshifted `labels` (-100: no loss), int64: indices (B,) -> (B,sequence).

        Documents in a sequence are not kept apart, so positions are the model's own.
        """
        rows = indices.numpy()
        ids = torch.from_numpy(self.tokens[rows].astype(np.int64))
        labels = ids.clone()
        if self.mask is not None:
            labels[torch.from_numpy(self.mask[rows] == 0)] = IGNORED
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Dataset:
    """Training and validation sequences that share no token.

    `fingerprint` is a SHA-256 of both parts' tokens and masks and of the settings that shaped
    them; a run is resumed only on data of equal fingerprint.
    """

    train: PackedTokens
    validation: PackedTokens
    fingerprint: str
    report: Report

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.validation.nbytes


def prepare(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    sequence: int,
    *,
    batch_hint: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read, tokenize, split and pack `source` into sequences of `sequence` tokens.

    Args:
        batch_hint: sequences per batch; the report notes where training has fewer.
        progress: called with (bytes read, bytes in all) as reading goes on.

    Raises:
        UsageError: nothing to read, malformed data, or less than one training sequence.
    """
    if sequence < 2:
        raise UsageError(f"sequence {sequence} predicts nothing; it needs at least 2 tokens")
    encoder = TextEncoder(tokenizer)
    reading = Reading()
    run = _Run(encoder.dtype, source.seed)
    report = Report()
    for batch in _batches(documents(source, reading)):
        for ids, mask in _encode(encoder, batch, report):
            run.append(ids, mask)
        if progress is not None:
            progress(reading.bytes_read, reading.bytes_total)
    report.files, report.tokens = reading.files, len(run.tokens)
    report.skipped.update(reading.skipped)
    if not run.tokens:
        left_out = ", ".join(f"{n} {what}" for what, n in sorted(reading.skipped.items()))
        raise UsageError(
            f"no data: {reading.files} files read from {', '.join(source.paths)} hold no text"
            + (f" (left out: {left_out})" if left_out else "")
            + "; name text files, a directory of them (perhaps with a glob), or JSONL"
        )
    if len(run.tokens) < sequence:
        raise UsageError(
            f"too little data: {len(run.tokens):,} tokens in {reading.files} files, one sequence "
            f"needs {sequence:,}; add data, or shorten the sequence to {len(run.tokens)} or less"
        )
    train, validation = (
        _pack(part, sequence, report) for part in run.split(source.validation, sequence, report)
    )
    if len(train) == 0:
        raise UsageError(
            f"no training sequence of {sequence:,} tokens has a token with loss; the assistant's "
            "turns are too short or missing"
        )
    report.train_sequences, report.validation_sequences = len(train), len(validation)
    report.nbytes = train.nbytes + validation.nbytes
    if source.validation and not len(validation):
        report.notes.append("too little data for a validation sequence beside the training ones")
    if len(train) < batch_hint:
        report.notes.append(
            f"{len(train)} training sequences are fewer than a batch of {batch_hint}: "
            "a batch repeats some"
        )
    settings = f"{sequence} {source.validation} {source.seed} {len(tokenizer)}"
    return Dataset(train, validation, _fingerprint(settings, train, validation), report)


def order(n: int, epoch: int, seed: int) -> Tensor:
    """The permutation of `n` sequences in `epoch`: int64 (n,), a pure function."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.randperm(n, generator=generator)


class BatchStream:
    """Batches without end: every epoch visits each sequence once, in its own order.

    A batch that an epoch cannot fill goes on into the next one. The state is two integers, so a
    resumed stream gives the same batches to the bit.
    """

    def __init__(self, data: PackedTokens, batch: int, seed: int = 0):
        if len(data) == 0 or batch < 1:
            raise UsageError(f"cannot draw batches of {batch} from {len(data)} sequences")
        self.data, self.size, self.seed = data, batch, seed
        self.epoch = self.position = 0
        self._order = order(len(data), 0, seed)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> dict[str, Tensor]:
        parts, missing = [], self.size
        while missing:
            if self.position == len(self.data):
                self._seek(self.epoch + 1, 0)
            part = self._order[self.position : self.position + missing]
            parts.append(part)
            self.position += len(part)
            missing -= len(part)
        return self.data.batch(torch.cat(parts))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UsageError where the position lies outside this data."""
        if not 0 <= state["position"] <= len(self.data):
            raise UsageError(
                f"position {state['position']} is outside an epoch of {len(self.data)} sequences; "
                "resume with the data that the run began with"
            )
        self._seek(state["epoch"], state["position"])

    def _seek(self, epoch: int, position: int) -> None:
        if epoch != self.epoch:
            self._order = order(len(self.data), epoch, self.seed)
        self.epoch, self.position = epoch, position


class _Run:
    """All tokens in one growing array, with the ends and hashes of documents.

    `array` grows by realloc, which for large blocks remaps pages instead of copying, so that
    building never holds the corpus twice.
    """

    def __init__(self, dtype: np.dtype, seed: int):
        self.dtype = dtype
        self.tokens = array("H" if dtype == np.uint16 else "i")
        self.mask: array | None = None
        self.ends, self.hashes = array("q"), array("Q")
        self._key = str(seed).encode()

    def append(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        if mask is not None and self.mask is None:
            self.mask = array("B", b"\1") * len(self.tokens)
        self.tokens.frombytes(ids.tobytes())
        if self.mask is not None:
            self.mask.frombytes(b"\1" * len(ids) if mask is None else mask.tobytes())
        self.ends.append(len(self.tokens))
        digest = hashlib.blake2b(ids.tobytes(), digest_size=8, key=self._key).digest()
        self.hashes.append(int.from_bytes(digest))

    def split(self, fraction: float, sequence: int, report: Report) -> Iterator[_Part]:
        """Training, then validation; the run is spent afterwards."""
        total = len(self.tokens)
        # Validation wants a whole sequence; training keeps at least one.
        target = min(max(sequence, round(fraction * total)), total - sequence)
        spans = []
        if fraction > 0 and target >= sequence:
            spans = self._documents_of(target, min(2 * target, total - sequence))
            report.split = "by document"
            if sum(end - start for start, end in spans) < sequence:
                spans = [(total - target, total)]
                report.split = "tail of the text"
        masks: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        if self.mask is not None:
            masks = _take(self.mask, np.dtype(np.uint8), spans)
        return zip(_take(self.tokens, self.dtype, spans), masks, strict=True)

    def _documents_of(self, target: int, limit: int) -> list[tuple[int, int]]:
        """Documents of `target` tokens or a little more, up to `limit`, chosen by their hashes.

        Equal documents go together, so that none is in both parts.
        """
        ends = np.array(self.ends)
        starts = np.concatenate([[0], ends[:-1]])
        _, group = np.unique(np.array(self.hashes), return_inverse=True)
        chosen = np.zeros(group.max() + 1, bool)
        held = 0
        for i, length in enumerate(np.bincount(group, weights=ends - starts).astype(np.int64)):
            if held >= target:
                break
            if held + length <= limit:
                chosen[i] = True
                held += length
        held_out = chosen[group]
        return list(zip(starts[held_out].tolist(), ends[held_out].tolist(), strict=True))


def _take(
    values: array, dtype: np.dtype, spans: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """What lies outside the ascending `spans`, closed up in place, and a copy of what is inside."""
    view = np.frombuffer(values, dtype)
    inside = np.concatenate([view[start:end] for start, end in spans] or [view[:0]])
    kept = spans[0][0] if spans else len(view)
    for (_, start), (end, _) in pairwise([*spans, (len(view), len(view))]):
        view[kept : kept + end - start] = view[start:end]
        kept += end - start
    del view  # an array with a view on it cannot shrink
    del values[kept:]
    return np.frombuffer(values, dtype), inside


def _pack(part: _Part, sequence: int, report: Report) -> PackedTokens:
    tokens, mask = part
    count = len(tokens) // sequence
    if dropped := len(tokens) - count * sequence:
        report.leave_out("tokens at the end, short of a sequence", dropped)
    tokens = tokens[: count * sequence].reshape(count, sequence)
    if mask is None:
        return PackedTokens(tokens)
    mask = mask[: count * sequence].reshape(count, sequence)
    # A batch of nothing but such sequences would have a loss of 0/0. The first token of a
    # sequence has no predecessor to be predicted from.
    useful = mask[:, 1:].any(axis=1)
    if not useful.all():
        report.leave_out("sequences without a token that carries loss", int((~useful).sum()))
        tokens, mask = tokens[useful], mask[useful]
    return PackedTokens(tokens, None if mask.all() else mask)


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in stream:
        batch.append(document)
        size += len(document.content) if isinstance(document.content, str) else 1024
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    encoder: TextEncoder, batch: list[Document], report: Report
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    texts = iter(encoder.texts([d.content for d in batch if isinstance(d.content, str)]))
    for document in batch:
        if isinstance(document.content, str):
            report.texts += 1
            yield next(texts), None
            continue
        try:
            text, spans = render_chat(encoder.tokenizer, document.content)
        except UsageError as error:
            raise UsageError(f"{document.where}: {error}") from error
        if not spans:
            report.leave_out("chats without an assistant's turn")
            continue
        report.chats += 1
        yield encoder.chat(text, spans)


def _fingerprint(settings: str, *parts: PackedTokens) -> str:
    digest = hashlib.sha256(settings.encode())
    for part in parts:
        digest.update(f"{part.tokens.shape} {part.tokens.dtype} {part.mask is None}".encode())
        digest.update(part.tokens.data)
        if part.mask is not None:
            digest.update(part.mask.data)
    return digest.hexdigest()
