"""Benchmark conversations read by an embedder once per machine, then from a file."""

import hashlib
import inspect
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast import host
from holdfast.longterm.evaluation.locomo import Conversation
from holdfast.longterm.retrieval.vectors import Embedder, InContext, Query


@dataclass(frozen=True)
class Encoded:
    """A conversation read by an embedder: what a store would keep of its turns, and its questions.

    `own` and `window` are f32[turns,dim]; `tokens` has a blob, or None, per turn.
    """

    own: np.ndarray
    window: np.ndarray
    tokens: list[bytes | None]
    queries: list[Query]


def encode(embedder: Embedder, conversation: Conversation) -> Encoded:
    """Encode a conversation, or read back what was encoded before; MiniLM needs minutes.

    The cached file is named by the hash of the texts, the embedder's id and its source.
    """
    lines = [turn.line for turn in conversation.turns]
    sessions = [turn.session for turn in conversation.turns]
    asked = [question.text for question in conversation.questions]
    recipe = [embedder.id, inspect.getsource(type(embedder)), lines, sessions, asked]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = host.cache_dir() / f"locomo-{conversation.id}-{digest}.npz"
    if not path.exists():
        found = _encode(embedder, lines, sessions, asked)
        _save(found, path)
        return found
    return _read(path, asked)


def _encode(embedder: Embedder, lines: list[str], sessions: list[str], asked: list[str]) -> Encoded:
    around: dict[int, InContext] = {}
    for session in dict.fromkeys(sessions):
        places = [i for i, name in enumerate(sessions) if name == session]
        texts = [lines[i] for i in places]
        around.update(
            zip(places, embedder.encode_in_context(texts, range(len(texts))), strict=True)
        )
    return Encoded(
        embedder.encode(lines),
        np.array([around[i].window for i in range(len(lines))]),
        [around[i].tokens for i in range(len(lines))],
        [embedder.encode_query(text) for text in asked],
    )


def _save(found: Encoded, path: Path) -> None:
    states = [query.states for query in found.queries if query.states is not None]
    arrays = {
        "own": found.own,
        "window": found.window,
        "sizes": np.array([-1 if blob is None else len(blob) for blob in found.tokens]),
        "tokens": np.frombuffer(b"".join(blob or b"" for blob in found.tokens), np.uint8),
        "vectors": np.array([query.vector for query in found.queries]),
        "states": np.concatenate([np.empty((0, found.own.shape[1]), np.float32), *states]),
        "words": np.array(json.dumps([query.words for query in found.queries])),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            np.savez(Path(folder) / path.name, **arrays)
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        warnings.warn(f"{path.name} is not cached and will be encoded again: {error}", stacklevel=3)


def _read(path: Path, asked: Sequence[str]) -> Encoded:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    tokens: list[bytes | None] = []
    start, blob = 0, arrays["tokens"].tobytes()
    for size in arrays["sizes"].tolist():
        tokens.append(None if size < 0 else blob[start : start + size])
        start += max(size, 0)
    queries, start = [], 0
    for text, vector, words in zip(
        asked, arrays["vectors"], json.loads(str(arrays["words"])), strict=True
    ):
        end = start + len(words or ())
        states = None if words is None else arrays["states"][start:end]
        queries.append(Query(text, vector, states, words))
        start = end
    return Encoded(arrays["own"], arrays["window"], tokens, queries)
