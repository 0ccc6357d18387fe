"""XL3M (151): answer from the segments after which the model is most certain.

Keeps    ids of the whole text; segments of it that fit a window, in their order, and the question.
Form     ids as they are given; two numbers for each segment.
Bytes    n ids and n bits of choice. While segments are read there is no cache, but keys and values
         of one layer, batch*2*H*(S+|q|)*d*b, whatever n; then the cache of a window,
         2*L*H*(W+new-1)*d*b.
Source   Wang et al., "XL3M: A Training-free Framework for LLM Length Extension Based on
         Segment-wise Inference", 2024. No code was read.
Departs  the paper speaks of certainty without its statistic: it is the entropy of the token after
         the question here; how much a segment makes the question likelier is reported beside it and
         can be chosen. The last segment ends with the text, so that all are of one length. What
         texts must begin with (`prefix`) stands before every segment.
"""

import itertools
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from holdfast.errors import HoldfastError, UsageError, unknown

STATISTICS = ("entropy", "gain")
# Nats: smaller differences are of kernels, and must not decide between segments that are alike.
_RESOLUTION = 1e-4


class Reading(NamedTuple):
    """What a model says of a prompt, in natural logarithms.

    Args:
        following: (k,) log-probabilities of the next token, of all tokens or of the likeliest.
        tail: (t,) log-probabilities of the prompt's last tokens, each given those before it.
    """

    following: Tensor
    tail: Tensor


class Backend(Protocol):
    """Whatever reads prompts: a local model, or a server."""

    def logprobs(self, prompts: Iterable[Tensor], tail: int) -> Iterable[Reading]:
        """A reading of each prompt (n,), in order, with its last `tail` tokens; n > tail."""


@dataclass(frozen=True)
class Local:
    """A causal model in this process.

    Args:
        batch: prompts per forward pass; all of one length.
    """

    model: PreTrainedModel
    batch: int = 8

    @torch.no_grad()
    def logprobs(self, prompts: Iterable[Tensor], tail: int) -> Iterator[Reading]:
        rest = iter(prompts)
        while group := list(itertools.islice(rest, self.batch)):
            ids = torch.stack(group).to(self.model.device, torch.long)
            logits = self.model(ids, use_cache=False, logits_to_keep=tail + 1).logits
            logs = logits.float().log_softmax(-1)
            told = logs[:, :-1].gather(-1, ids[:, ids.shape[1] - tail :, None])[..., 0]
            yield from map(Reading, logs[:, -1], told)


@dataclass(frozen=True)
class Endpoint:
    """A server with OpenAI's /v1/completions that takes ids as prompts and, with `echo`, gives
    log-probabilities of the prompt.

    Args:
        url: up to and with "/v1".
        model: its name there.
        token: for the header "Authorization: Bearer".
        top: how many of the likeliest next tokens are asked for; the others count as one, so that
            an entropy is never overestimated.
        batch: prompts per request.
        seconds: to wait for an answer.
    """

    url: str
    model: str
    token: str | None = None
    top: int = 20
    batch: int = 8
    seconds: float = 600.0

    def logprobs(self, prompts: Iterable[Tensor], tail: int) -> Iterator[Reading]:
        rest = iter(prompts)
        while group := [ids.tolist() for ids in itertools.islice(rest, self.batch)]:
            answer = self._post(
                {
                    "model": self.model,
                    "prompt": group,
                    "max_tokens": 1,
                    "temperature": 0,
                    "logprobs": self.top,
                    "echo": True,
                }
            )
            choices = sorted(answer.get("choices", ()), key=lambda choice: choice["index"])
            if len(choices) != len(group):
                raise HoldfastError(f"{self.url} answered {len(choices)} of {len(group)} prompts")
            for ids, choice in zip(group, choices, strict=True):
                yield self._reading(choice.get("logprobs") or {}, len(ids), tail)

    def _reading(self, found: dict[str, Any], length: int, tail: int) -> Reading:
        told, likely = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        # The prompt, whose first token has none, and one token more.
        if len(told) != length + 1 or len(likely) != length + 1:
            raise HoldfastError(
                f"{self.url} gave log-probabilities of {len(told)} tokens for a prompt of {length} "
                "and one more; it must support echo=true together with logprobs"
            )
        return Reading(
            torch.tensor(list(likely[-1].values())), torch.tensor(told[length - tail : length])
        )

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise HoldfastError(f"{request.full_url} answered {error.code}: {said}") from error
        except (urllib.error.URLError, TimeoutError) as error:
            raise HoldfastError(f"{request.full_url} does not answer: {error}") from error


@dataclass(frozen=True)
class Report:
    """What was read, segment by segment; empty where the text fits the window.

    Args:
        starts: first token of each segment, which has `segment` tokens.
        entropy: nats, of the token after the question.
        gain: nats per token by which the segment makes the question likelier; NaN where the
            question alone has no token that follows another.
        kept: segments that make up the key context, ascending.
    """

    segment: int
    starts: tuple[int, ...] = ()
    entropy: tuple[float, ...] = ()
    gain: tuple[float, ...] = ()
    kept: tuple[int, ...] = ()

    def ranked(self, by: str = "entropy") -> list[int]:
        """Segments, the most relevant first, of equals the first first; NaN comes last."""
        worth = self.entropy if by == "entropy" else [-gain for gain in self.gain]
        steps = [round(x / _RESOLUTION) if math.isfinite(x) else math.inf for x in worth]
        return sorted(range(len(steps)), key=lambda i: (steps[i], i))


def xl3m_select(
    model: PreTrainedModel | Backend,
    ids: Tensor,
    question_len: int,
    *,
    segment: int,
    window: int,
    overlap: int | None = None,
    prefix: int = 0,
    by: str = "entropy",
    top: int | None = None,
    batch: int = 8,
) -> tuple[Tensor, Report]:
    """The part of a text that a model with a short window should see.

    Args:
        model: a causal model, or whatever has `logprobs`.
        ids: (n,) or (1,n) integers: prefix, text and question.
        question_len: tokens at the end that are the question.
        segment: tokens per segment.
        window: most tokens that are kept, prefix and question included; what is generated comes on
            top. A text that fits is returned as it is, and nothing is read.
        overlap: tokens that neighbouring segments share; a tenth of a segment by default.
        prefix: tokens at the start that every segment and the key context begin with, for example a
            token that begins texts.
        by: "entropy" of the token after the question, or "gain" in likelihood of the question.
        top: most segments that are kept; as many as fit by default.
        batch: segments per forward pass of a model; it changes nothing but bytes and time.

    Returns:
        ids as given, (m,) or (1,m), in the order of the text; and what was read.

    Raises:
        UsageError: an empty text, a question or a segment that leaves no room in the window.
    """
    flat = ids.reshape(-1)
    lengths = _Lengths(len(flat), prefix, question_len, segment, window)
    overlap = segment // 10 if overlap is None else overlap
    _check(ids, lengths, overlap, by, top, batch)
    if len(flat) <= window:
        return ids, Report(segment)
    head, text, question = flat.split([prefix, lengths.text, question_len])
    report = _read(
        Local(model, batch) if isinstance(model, PreTrainedModel) else model,
        head, text, question, segment, overlap,
    )  # fmt: skip
    kept, chosen = torch.zeros(len(text), dtype=torch.bool), []
    for i in report.ranked(by)[:top]:
        own = slice(report.starts[i], report.starts[i] + report.segment)
        # Tokens that another segment brought already cost nothing.
        if int(kept.sum()) + report.segment - int(kept[own].sum()) > lengths.room:
            break
        kept[own] = True
        chosen.append(i)
    keys = torch.cat([head, text[kept.to(text.device)], question])
    return keys.reshape(*ids.shape[:-1], -1), replace(report, kept=tuple(sorted(chosen)))


@torch.no_grad()
def xl3m_generate(
    model: PreTrainedModel,
    ids: Tensor,
    question_len: int,
    *,
    segment: int,
    window: int,
    prefix: int = 0,
    max_new_tokens: int = 64,
    generation_config: GenerationConfig | None = None,
) -> tuple[Tensor, Report]:
    """Select as `xl3m_select` does, then continue the key context as `model.generate()` does.

    Args:
        ids: (1,n) int64.
        max_new_tokens: on top of the window.
        generation_config: of `model.generate()`; the model's own by default.

    Returns:
        the new tokens alone, (1,new), and what was read.
    """
    if ids.dim() != 2:
        raise UsageError(f"ids of shape {tuple(ids.shape)}; expected (1,n)")
    keys, report = xl3m_select(
        model, ids, question_len, segment=segment, window=window, prefix=prefix
    )
    out = model.generate(  # type: ignore[operator]
        keys,
        attention_mask=torch.ones_like(keys),
        generation_config=generation_config,
        max_new_tokens=max_new_tokens,
    )
    return out[:, keys.shape[1] :], report


class _Lengths(NamedTuple):
    all: int
    prefix: int
    question: int
    segment: int
    window: int

    @property
    def text(self) -> int:
        return self.all - self.prefix - self.question

    @property
    def room(self) -> int:
        """Tokens of the text that fit the window."""
        return self.window - self.prefix - self.question


def _read(
    backend: Backend, head: Tensor, text: Tensor, question: Tensor, segment: int, overlap: int
) -> Report:
    last = len(text) - segment
    starts = (*range(0, last, segment - overlap), last)
    # With nothing before it, the first token of the question has no probability.
    tail = len(question) - (len(head) == 0)
    alone = math.nan
    if tail:
        [reading] = backend.logprobs([torch.cat([head, question])], tail)
        alone = float(reading.tail.mean())
    prompts = (torch.cat([head, text[at : at + segment], question]) for at in starts)
    entropy, gain = [], []
    for reading in backend.logprobs(prompts, tail):
        entropy.append(_entropy(reading.following))
        gain.append(float(reading.tail.mean()) - alone if tail else math.nan)
    return Report(segment, starts, tuple(entropy), tuple(gain))


def _entropy(logs: Tensor) -> float:
    """Nats; what is missing from the sum of probabilities counts as one token."""
    p = logs.double().exp()
    rest = (1 - p.sum()).clamp(min=0)
    return float(torch.special.entr(torch.cat([p, rest[None]])).sum())


def _check(
    ids: Tensor, lengths: _Lengths, overlap: int, by: str, top: int | None, batch: int
) -> None:
    if by not in STATISTICS:
        raise unknown("statistic", by, STATISTICS)
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != 1) or ids.is_floating_point():
        raise UsageError(
            f"ids are {ids.dtype} of shape {tuple(ids.shape)}; expected integers (n,) or (1,n)"
        )
    n, prefix, question, segment, window = lengths
    if question < 1 or prefix < 0 or lengths.text < 1:
        raise UsageError(
            f"{n} tokens with a prefix of {prefix} and a question of {question} leave no text "
            "between them; the question has at least 1 token and is part of ids"
        )
    if by == "gain" and question == 1 and prefix == 0:
        raise UsageError(
            'by="gain" compares the question\'s tokens but the first; give a question of at least '
            "2 tokens, or a prefix"
        )
    if segment < 1 or not 0 <= overlap < segment:
        raise UsageError(
            f"segment={segment}, overlap={overlap}: a segment has at least 1 token, and fewer "
            "than that are shared"
        )
    if prefix + question + segment > window:
        raise UsageError(
            f"prefix {prefix} + segment {segment} + question {question} tokens exceed window "
            f"{window}; a segment of at most {max(lengths.room, 0)} fits"
        )
    if (top is not None and top < 1) or batch < 1:
        raise UsageError(f"top={top}, batch={batch}: at least 1 of each")
