"""RelayAttention against a cache per request, both ours and full: the same slots and kernels.

Pairs of decode steps take turns on one thread, so that a busy machine slows both. DynamicCache,
which copies all it holds at every step, is slower still and no baseline here; the benchmark shows
it.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.checks import Result, check
from holdfast.context.attention.relay import SharedPrefix, relay_nbytes
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.layer import BoundedLayer, New
from holdfast.context.stream import prefill_chunks, read

REQUESTS, OWN = 16, 32
# Tokens of the prefix: where attention alone is timed, and where whole decode steps are.
SHORT, LONG = 1024, 4096
STEPS, WARM = 12, 3


def model(seed: int) -> LlamaForCausalLM:
    """Untrained: time and bytes do not depend on what it says."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def caches(net: LlamaForCausalLM, prefix: Tensor) -> tuple[BoundedCache, BoundedCache, int]:
    """Shared and per-request caches that have read the prefix, and the bytes that are shared."""
    shared = SharedPrefix(net, prefix)
    relay = shared.cache(REQUESTS, tokens=OWN, chunk=OWN // 2)
    own = BoundedCache.for_model(net, "full", tokens=len(prefix) + OWN, batch=REQUESTS)
    one = BoundedCache.for_model(net, "full", tokens=len(prefix) + OWN, batch=1)
    prefill_chunks(net, prefix[None], one)
    # Reading the same prefix for each request would give the same keys, sixteen times as slowly.
    for layer, source in zip(own.bounded, one.bounded, strict=True):
        k, v = (f(slice(0, source.length)) for f in (source.stored_keys, source.stored_values))
        k, v = (x.expand(REQUESTS, -1, -1, -1) for x in (k, v))
        layer._allocate(k.new_empty(REQUESTS, relay.shape.query_heads, 1, k.shape[-1]), k, v)
        layer.append(k, v)
        layer.seen = source.length
    return relay, own, shared.nbytes()


def in_turn(
    ours: Callable[[], object], base: Callable[[], object], steps: int
) -> tuple[float, float, float]:
    """Median seconds of both and the median ratio of neighbours, base to ours."""
    times: list[tuple[float, float]] = []
    for _ in range(WARM + steps):
        pair = []
        for call in (ours, base):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    mine, other = zip(*times[WARM:], strict=True)
    return (statistics.median(mine), statistics.median(other),
            statistics.median(b / a for a, b in times[WARM:]))  # fmt: skip


def attention(relay: BoundedCache, own: BoundedCache) -> float:
    """How many times as fast the attention of a decode step is."""
    shape = relay.shape
    q = torch.randn(REQUESTS, shape.query_heads, 1, shape.key_width)

    def look(layer: BoundedLayer) -> Callable[[], object]:
        new = New(1, layer.length - 1, layer.counts, q.device)
        return lambda: layer.look(q, new, shape.key_width**-0.5)

    return in_turn(look(relay.bounded[0]), look(own.bounded[0]), 10 * STEPS)[2]


@check(
    "relay",
    claim="16 requests decode at twice the speed and more behind a prefix kept once, same logits",
)
def run(seed: int) -> Result:
    threads = torch.get_num_threads()
    # A second thread would measure who else uses the cores: steps take milliseconds.
    torch.set_num_threads(1)
    try:
        return _run(seed)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _run(seed: int) -> Result:
    net = model(seed)
    g = torch.Generator().manual_seed(seed)
    prefix = torch.randint(256, (LONG,), generator=g)
    more = torch.randint(256, (REQUESTS, OWN // 2), generator=g)

    relay, own, _ = caches(net, prefix[:SHORT])
    for cache in (relay, own):
        prefill_chunks(net, more, cache)
    share = relay_nbytes(relay.shape, SHORT, OWN) / relay.shape.kv_bytes(SHORT + OWN)
    looks = attention(relay, own)

    relay, own, prefix_bytes = caches(net, prefix)
    logits = [prefill_chunks(net, more, cache) for cache in (relay, own)]
    difference = (logits[0] - logits[1]).abs().max().item()
    ids = logits[0].argmax(-1)[:, None]
    ours, base, ratio = in_turn(lambda: read(net, ids, relay), lambda: read(net, ids, own), STEPS)
    measured, formula = prefix_bytes + relay.nbytes(), relay_nbytes(relay.shape, LONG, OWN)
    passed = (
        measured == formula and share <= 0.15 and difference <= 1e-5 and looks >= 2 and ratio >= 2
    )
    return Result(
        measured={
            "tokens per second": REQUESTS / ours, "times baseline": ratio, "bytes": measured,
            "attention, times baseline": looks, "share of bytes at 1,024": share,
            "logits differ by": difference,
        },
        baseline={"tokens per second": REQUESTS / base, "bytes": own.nbytes()},
        threshold=f"bytes = formula, {formula:,}; at 4,096 tokens and 16 requests >= 2 x tokens "
        "per second; at 1,024 attention >= 2 x as fast, share of bytes <= 0.15; logits <= 1e-5",
        passed=passed,
    )  # fmt: skip
