"""Late interaction: each token of a question against the best token of a memory.

Source   O. Khattab, M. Zaharia, "ColBERT", 2020.
Departs  a memory's tokens are signs only; tokens of rare words weigh more.
"""

from collections.abc import Sequence

import numpy as np


def maxsim(states: np.ndarray, weights: np.ndarray, blobs: Sequence[bytes]) -> np.ndarray:
    """How well each memory's best token fits each token asked about, by weight: f32[len(blobs)].

    Args:
        states: f32[m,d], unit rows.
        weights: f32[m].
        blobs: of n tokens, n*d/8 bytes of sign bits each; an empty one scores 0.
    """
    dim = states.shape[1]
    width = (dim + 7) // 8
    counts = np.array([len(blob) // width for blob in blobs])
    scores = np.zeros(len(blobs), np.float32)
    if not counts.any() or not weights.any():
        return scores
    packed = np.frombuffer(b"".join(blobs), np.uint8).reshape(-1, width)
    bits = np.unpackbits(packed, axis=1, count=dim).astype(np.float32)
    # Signs are 2*bit - 1.
    fits = (2 * (bits @ states.T) - states.sum(1)) / np.float32(dim**0.5)
    starts = (np.cumsum(counts) - counts)[counts > 0]
    scores[counts > 0] = np.maximum.reduceat(fits, starts) @ (weights / weights.sum())
    return scores
