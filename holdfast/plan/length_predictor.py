"""LengthPredictor: how long the answer to a prompt will be, as one of a few buckets.

A softmax over buckets on features of the text: hashed words and pairs of words, or whatever
`encode` returns (a sentence encoder such as MiniLM, say). It learns in milliseconds, so that a
server can go on teaching it the lengths that it observes.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from scipy import sparse

from holdfast.errors import UsageError

_WORD = re.compile(r"\w+|[^\w\s]")
RATE = 0.05


class LengthPredictor:
    """Predicts the upper end of the bucket of output lengths that is most likely.

    Args:
        max_length: longest output in tokens.
        buckets: number of buckets of equal width; the last ends at `max_length`.
        features: size of the hash table of words and pairs; of no effect with `encode`.
        encode: texts -> float array (n, features), for example a sentence encoder's `encode`.
        seed: order of the examples in `fit`.
    """

    def __init__(
        self,
        max_length: int,
        *,
        buckets: int = 10,
        features: int = 4096,
        encode: Callable[[Sequence[str]], np.ndarray] | None = None,
        seed: int = 0,
    ):
        if not 1 <= buckets <= max_length:
            raise UsageError(
                f"{buckets} buckets of lengths up to {max_length}: use 1 to {max_length} buckets"
            )
        self.max_length, self.buckets, self.features = max_length, buckets, features
        self.encode = encode
        self.seed = seed
        self._ends = np.arange(1, buckets + 1) * max_length // buckets
        self._weight: np.ndarray | None = None  # (features + 1, buckets), the last row a bias
        self._square = np.zeros(0)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and of the running squares that partial_fit continues from."""
        return 0 if self._weight is None else self._weight.nbytes + self._square.nbytes

    def bucket(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which bucket each length falls into; longer ones than `max_length` into the last."""
        return np.minimum(np.searchsorted(self._ends, lengths), self.buckets - 1)

    def fit(self, texts: Sequence[str], lengths: Sequence[int], epochs: int = 20):
        """Learn from scratch; lengths in tokens. Returns itself."""
        self._weight = None
        return self._learn(texts, lengths, epochs)

    def partial_fit(self, texts: Sequence[str], lengths: Sequence[int]):
        """Learn from more examples, passing over them twice. Returns itself."""
        return self._learn(texts, lengths, 2)

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """The longest output of the most likely bucket, in tokens: int64 (n,).

        Before it has learnt anything the answer is `max_length`, which is always enough.
        """
        if self._weight is None:
            return np.full(len(texts), self.max_length)
        return self._ends[np.asarray(self._features(texts) @ self._weight).argmax(1)]

    def _learn(self, texts: Sequence[str], lengths: Sequence[int], epochs: int):
        if len(texts) != len(lengths) or not len(texts):
            raise UsageError(
                f"{len(texts)} texts and {len(lengths)} lengths; give one length for each text, "
                "at least one"
            )
        x, wanted = self._features(texts), self.bucket(lengths)
        if self._weight is None:
            self._weight = np.zeros((x.shape[1], self.buckets), np.float32)
            self._square = np.zeros_like(self._weight)
        order = np.random.default_rng(self.seed)
        for _ in range(epochs):
            for rows in np.array_split(order.permutation(len(texts)), -(-len(texts) // 32)):
                logits = np.asarray(x[rows] @ self._weight)
                p = np.exp(logits - logits.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                p[np.arange(len(rows)), wanted[rows]] -= 1
                gradient = np.asarray(x[rows].T @ p) / len(rows)
                # AdaGrad: a word that is rare still moves its weights when it is seen.
                self._square += gradient**2
                self._weight -= RATE * gradient / (np.sqrt(self._square) + 1e-8)
        return self

    def _features(self, texts: Sequence[str]):
        if self.encode is not None:
            found = np.asarray(self.encode(list(texts)), np.float32)
            return np.hstack([found, np.ones((len(texts), 1), np.float32)])
        columns: list[int] = []
        values: list[float] = []
        ends = [0]
        for text in texts:
            words = _WORD.findall(text.lower())
            grams = [*words, *map(" ".join, pairwise(words))]
            # Not hash(): Python salts it, and a saved predictor would forget everything.
            found_at = {zlib.crc32(gram.encode()) % self.features for gram in grams}
            columns += [*sorted(found_at), self.features]
            values += [len(found_at) ** -0.5] * len(found_at) + [1.0]
            ends.append(len(columns))
        shape = (len(texts), self.features + 1)
        return sparse.csr_matrix((np.array(values, np.float32), columns, ends), shape)
