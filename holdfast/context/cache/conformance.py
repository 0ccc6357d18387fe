"""What every cache policy must do, as functions that anybody can run on their own.

    import pytest
    from holdfast.context.cache.conformance import INVARIANTS

    @pytest.mark.parametrize("name", INVARIANTS)
    def test_my_policy(name):
        INVARIANTS[name](lambda: MyPolicy(sinks=2))

Each takes a function that makes the policy and raises AssertionError where it is broken, SkipTest
where it does not apply. Models are tiny, untrained and made here.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.layer import BoundedLayer
from holdfast.context.cache.policy import CachePolicy
from holdfast.context.stream import prefill_chunks, read, stream
from holdfast.errors import DoesNotFit, UsageError
from holdfast.forms.affine import Int8
from holdfast.meter import StorageLog

Make = Callable[[], CachePolicy]
TOLERANCE = 1e-5
# Entries and tokens per chunk of the caches that overflow here.
CAPACITY, CHUNK = 32, 8
_MODELS = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 24},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 4},
}
_SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def model(kind: str = "llama", **more: Any) -> PreTrainedModel:
    """A tiny untrained decoder with grouped queries."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(_SIZES | _MODELS.get(kind, {}) | more))
        return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (rows, length), generator=g)


def equals_dynamic_cache_under_budget(make: Make) -> None:
    """While nothing has to be dropped, logits are those of DynamicCache, padding included."""
    for kind in _MODELS:
        net = model(kind)
        ids = tokens(2, 36)
        mask = torch.ones_like(ids)
        mask[1, :8] = 0
        plain = DynamicCache(config=net.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            want = net(
                ids, attention_mask=mask, position_ids=positions, past_key_values=plain
            ).logits
            cache = _cache(net, make(), tokens=64)
            got = []
            for start, stop in ((0, 24), (24, 34), (34, 35), (35, 36)):
                got.append(net(
                    ids[:, start:stop], attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop], past_key_values=cache,
                ).logits)  # fmt: skip
        _close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], f"{kind}: logits")


def attends_to_what_it_keeps(make: Make) -> None:
    """After entries were dropped, a token attends to those that stay, in order, at 0, 1, 2, ..."""
    if not make().rotates or type(make()).attend is not CachePolicy.attend:
        raise SkipTest("the policy looks at entries in its own way; test that against an oracle")
    net = model(num_hidden_layers=1)
    ids = torch.randperm(255, generator=torch.Generator().manual_seed(0))[None, :120] + 1
    seen: dict[str, Tensor] = {}
    module = net.model.layers[0].self_attn
    net.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.update(out=args[0].detach())
    )
    cache = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    prefill_chunks(net, ids[:, :-1], cache)
    read(net, ids[:, -1:], cache)
    # With one layer an entry depends on its token alone.
    with torch.no_grad():
        x = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids))
        q, k, v = (
            f(x).view(1, ids.shape[1], -1, module.head_dim).transpose(1, 2).double()
            for f in (module.q_proj, module.k_proj, module.v_proj)
        )
    layer = cache.bounded[0]
    rope = layer._rope
    assert rope is not None
    wanted = []
    for head in range(layer.heads):
        kept = layer.stored_keys(slice(0, layer.length))[0, head].double()
        distance, place = torch.cdist(kept, k[0, head]).min(1)
        assert distance.max() < 1e-4, "an entry is not the key of any token"
        assert (place.diff() > 0).all(), "entries are not in reading order"
        assert place[-1] == ids.shape[1] - 1, "the last token is not in the cache"
        slots = torch.arange(len(place))[None, None]
        keys = rope.rotate(k[:, head : head + 1, place].float(), slots).double()
        group = q.shape[1] // layer.heads
        for query in range(head * group, (head + 1) * group):
            at = rope.rotate(q[:, query : query + 1, -1:].float(), slots[..., -1:]).double()
            p = (at @ keys.mT * module.scaling).softmax(-1)
            wanted.append((p @ v[:, head : head + 1, place])[0, 0, 0])
    _close(seen["out"][0, -1], torch.cat(wanted), "attention over kept entries")


def padding_changes_nothing(make: Make) -> None:
    """A row padded on the left by whole chunks reads as it does alone, beyond the budget too."""
    net = model()
    ids = tokens(2, 12 * CHUNK)
    mask = torch.ones_like(ids)
    mask[1, : 3 * CHUNK] = 0
    policy = make()
    if not policy.rotates:
        raise SkipTest("padding in the middle of a text has no original positions")
    both = _cache(net, policy, tokens=CAPACITY, chunk=CHUNK)
    got = prefill_chunks(net, ids, both, mask=mask)
    alone = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    want = prefill_chunks(net, ids[1:, 3 * CHUNK :], alone)
    _close(got[1:], want, "padded row")


def stays_within_its_bytes(make: Make) -> None:
    """Whatever is live of the cache stays below the budget, for a prompt of 100 times as much."""
    net = model(num_hidden_layers=1)
    for rows, form, times in ((1, None, 100), (2, Int8(), 5)):
        policy = make()
        budget = BoundedCache.for_model(
            net, policy, tokens=max(CAPACITY, policy.least(CHUNK)), batch=rows, form=form
        ).peak_nbytes()
        chunk = 2 * CHUNK
        cache = BoundedCache.for_model(
            net, make(), budget=budget, batch=rows, form=form, chunk=chunk
        )
        length = times * cache.capacity
        with measured() as log:
            logits = prefill_chunks(net, tokens(rows, length), cache)
            held = {cache.nbytes()}
            for _ in stream(net, cache, logits, tokens=cache.capacity):
                held.add(cache.nbytes())
        assert held == {cache.predict_held(cache.capacity)}, (
            f"bytes change once full: {sorted(held)}, formula {cache.predict_held(cache.capacity)}"
        )
        more = log.live - cache.nbytes()
        assert 0 <= more <= 8 * rows * policy.observes, f"{more} bytes stay beside nbytes()"
        assert log.peak <= budget, f"held {log.peak} bytes, the budget is {budget}"
        assert cache.predict(cache.capacity + 1, cache.chunk) > budget, "budget is not used"


def generates(make: Make) -> None:
    """`generate()` gives DynamicCache's tokens under budget, with beams too, and runs beyond it."""
    net = model()
    ids = tokens(2, 20)
    for options in ({}, {"num_beams": 3}):
        want = _generate(net, ids, DynamicCache(config=net.config), 8, **options)
        got = _generate(net, ids, _cache(net, make(), tokens=64), 8, **options)
        assert torch.equal(got, want), f"generate({options}) differs from DynamicCache"
    small = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    out = _generate(net, tokens(2, 3 * CAPACITY), small, CAPACITY)
    assert out.shape[1] == 4 * CAPACITY
    assert all(layer.length <= CAPACITY for layer in small.bounded)


def goes_on_after_loading(make: Make) -> None:
    """A saved cache, loaded into a new one, reads on as the old one does."""
    net = model()
    ids = tokens(1, 3 * CAPACITY)
    cache = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    prefill_chunks(net, ids, cache)
    again = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    with TemporaryDirectory() as folder:
        cache.save(Path(folder) / "context")
        again.load(Path(folder) / "context")
    more = tokens(1, 2 * CAPACITY, seed=1)
    _close(prefill_chunks(net, more, again), prefill_chunks(net, more, cache), "after loading")
    cache.reset()
    _close(
        prefill_chunks(net, ids, cache),
        prefill_chunks(net, ids, _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)),
        "after reset",
    )


def reorders_rows(make: Make) -> None:
    """Beams and dropped rows: the cache follows."""
    net = model()
    ids = tokens(3, 2 * CAPACITY)
    cache = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    prefill_chunks(net, ids, cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    other = _cache(net, make(), tokens=CAPACITY, chunk=CHUNK)
    prefill_chunks(net, ids[order], other)
    last = tokens(3, 1, seed=2)
    want = read(net, last, other)
    _close(read(net, last, cache), want, "after reorder_cache")
    cache.batch_select_indices(torch.tensor([1]))
    other.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes() < BoundedCache.peak_nbytes(cache)
    _close(read(net, last[1:2], cache), read(net, last[1:2], other), "after dropping rows")


def stores_fewer_bytes(make: Make) -> None:
    """int8 entries take fewer bytes, and logits stay near."""
    net = model()
    ids = tokens(1, 24)
    dense, small = (_cache(net, make(), tokens=64, form=form) for form in (None, Int8()))
    want, got = (prefill_chunks(net, ids, cache) for cache in (dense, small))
    kv = [cache.shape.kv_bytes(64) for cache in (dense, small)]
    assert kv[1] < 0.5 * kv[0]
    assert dense.nbytes() - small.nbytes() == kv[0] - kv[1]
    difference = (got - want).abs().max() / want.std()
    assert 0 < difference < 0.1, f"int8 moved logits by {difference} of their deviation"


def refuses_what_it_cannot_do(make: Make) -> None:
    """Too small budgets name one that works; models without RoPE are refused where it is needed."""
    net = model()
    try:
        BoundedCache.for_model(net, make(), budget="100B", batch=1)
    except DoesNotFit as error:
        need = error.details["needs_bytes"]
    else:
        raise AssertionError("100 bytes were accepted")
    BoundedCache.for_model(net, make(), budget=need, batch=1)
    if make().rotates:
        gpt2 = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
        )
        try:
            BoundedCache.for_model(gpt2, make(), tokens=64)
        except UsageError as error:
            assert "no rotary positions" in str(error)
        else:
            raise AssertionError("GPT-2, which has learned positions, was accepted")


INVARIANTS: dict[str, Callable[[Make], None]] = {
    test.__name__: test
    for test in (
        equals_dynamic_cache_under_budget,
        attends_to_what_it_keeps,
        padding_changes_nothing,
        stays_within_its_bytes,
        generates,
        goes_on_after_loading,
        reorders_rows,
        stores_fewer_bytes,
        refuses_what_it_cannot_do,
    )
}


class CacheLog(StorageLog):
    """Bytes of storages that were made by the cache's own work: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0

    def _enter(self, storage: torch.UntypedStorage, category: str) -> None:
        super()._enter(storage, "cache" if self.inside else category)

    def _running(self) -> Iterator[int]:
        total = 0
        for sid, change, _ in self.log.events:
            if self.log.storages[sid].category == "cache":
                total += change
            yield total

    @property
    def live(self) -> int:
        return [0, *self._running()][-1]

    @property
    def peak(self) -> int:
        return max(self._running(), default=0)


@contextmanager
def measured() -> Iterator[CacheLog]:
    """Follow what a cache allocates: slots, tables, scores, choices and copies while dropping.

    What attention itself computes with, such as rotated keys, is the model's, as it is elsewhere.
    """
    log = CacheLog()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            log.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                log.inside -= 1

        return call

    work = [
        (owner, name)
        for owner, names in (
            (BoundedLayer, ("_allocate", "append", "compress", "observe", "drop_last")),
            (BoundedCache, ("table",)),
            *((cls, ("attended",)) for cls in _subclasses(CachePolicy)),
        )
        for name in names
        if name in vars(owner)
    ]
    with ExitStack() as stack:
        for owner, name in work:
            stack.enter_context(patch.object(owner, name, counted(vars(owner)[name])))
        stack.enter_context(log)
        yield log


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _subclasses(sub)


def _cache(net: PreTrainedModel, policy: CachePolicy, **options: Any) -> BoundedCache:
    return BoundedCache.for_model(net, policy, **options)


def _generate(net: PreTrainedModel, ids: Tensor, cache: Any, new: int, **options: Any) -> Tensor:
    return net.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
        max_new_tokens=new, min_new_tokens=new, **options,
    )  # fmt: skip


def _close(got: Tensor, want: Tensor, what: str) -> None:
    difference = (got.double() - want.double()).abs().max().item()
    assert math.isfinite(difference) and difference <= TOLERANCE, f"{what} differ by {difference}"
