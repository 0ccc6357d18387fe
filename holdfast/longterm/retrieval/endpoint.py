"""Embeddings from any endpoint that speaks OpenAI's `/v1/embeddings`."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.retrieval.vectors import InContext, Query, encode_windows, unit


class OpenAI:
    """Any endpoint that speaks OpenAI's `/v1/embeddings`.

    Args:
        base_url: up to and including `/v1`, e.g. "http://localhost:11434/v1".
        model: the name that the endpoint knows it by.
        key: sent as a bearer token; default: the environment's OPENAI_API_KEY, if any. It never
            becomes part of `id`.
        dim: of the vectors; default: asked from the endpoint when first needed.
    """

    BATCH = 64
    TRIES = 4

    def __init__(
        self,
        base_url: str = "https://api.openai.com/v1",
        model: str = "text-embedding-3-small",
        key: str | None = None,
        *,
        dim: int | None = None,
        timeout_seconds: float = 60,
        wait_seconds: float = 1,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"base_url={base_url!r} is no http(s) address; e.g. http://host:1/v1")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.id = f"openai:{model}@{self.base_url}"
        self._key = os.environ.get("OPENAI_API_KEY") if key is None else key
        self._dim, self._timeout, self._wait = dim, timeout_seconds, wait_seconds

    @property
    def dim(self) -> int:
        if self._dim is None:
            self._dim = len(self._ask(["dimension"])[0])
        return self._dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows: list[list[float]] = []
        for start in range(0, len(texts), self.BATCH):
            # The protocol refuses empty strings.
            rows += self._ask([text or " " for text in texts[start : start + self.BATCH]])
        if not rows:
            return np.empty((0, self.dim), np.float32)
        got = sorted({len(row) for row in rows})
        self._dim = self._dim or got[0]
        if got != [self._dim]:
            raise HoldfastError(f"{self.id} sent vectors of {got} dimensions, expected {self._dim}")
        return unit(np.array(rows))

    def encode_query(self, text: str) -> Query:
        return Query(text, self.encode([text])[0])

    def encode_in_context(self, texts: Sequence[str], at: Sequence[int]) -> list[InContext]:
        return encode_windows(self, texts, at)

    def _ask(self, texts: list[str]) -> list[list[float]]:
        for tried in range(1, self.TRIES + 1):
            try:
                return self._post(texts)
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                status = getattr(error, "code", None)
                again = status is None or status in (408, 409, 429) or status >= 500
                if not again or tried == self.TRIES:
                    said = error.read(500).decode(errors="replace") if status else error
                    raise HoldfastError(
                        f"{self.base_url}/embeddings failed after {tried} of {self.TRIES} tries, "
                        f"status {status}: {said}; check base_url, model={self.model!r} and the key"
                    ) from error
                time.sleep(self._wait * 2 ** (tried - 1))
        raise AssertionError("unreachable")

    def _post(self, texts: list[str]) -> list[list[float]]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = json.dumps({"model": self.model, "input": texts}).encode()
        request = urllib.request.Request(f"{self.base_url}/embeddings", body, headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            answer = response.read()
        try:
            data: list[Any] = sorted(json.loads(answer)["data"], key=lambda row: row["index"])
            rows = [row["embedding"] for row in data]
            if len(rows) != len(texts):
                raise ValueError(f"{len(rows)} vectors for {len(texts)} texts")
        except (ValueError, KeyError, TypeError) as error:
            raise HoldfastError(
                f"{self.base_url}/embeddings sent no list of embeddings ({error}): {answer[:200]!r}"
            ) from error
        return rows
