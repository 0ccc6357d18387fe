import math

import pytest
import torch

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.camelot import Camelot, remember_ref
from holdfast.context.cache.conformance import measured, model, tokens
from holdfast.context.cache.policy import CacheShape
from holdfast.context.stream import prefill_chunks, read, stream
from holdfast.errors import UsageError
from holdfast.forms.affine import Int8

C, CHUNK, M = 48, 8, 12


def small(net, policy=None, capacity=C, chunk=CHUNK, rows=1, **options):
    policy = policy or Camelot(slots=M, threshold=0.3)
    return BoundedCache.for_model(net, policy, tokens=capacity, batch=rows, chunk=chunk, **options)


def told(net, ids):
    """Un-rotated keys and values (B,H,n,d) of a one-layer model."""
    with torch.no_grad():
        x = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids))
        attn = net.model.layers[0].self_attn
        return tuple(f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (attn.k_proj, attn.v_proj))


def memory_of(layer, row, head, slots=M):
    fields = [layer.field(name)[row, head, :slots] for name in ("count", "age")]
    return (
        layer.stored_keys(slice(0, slots))[row, head],
        layer.stored_values(slice(0, slots))[row, head],
        *fields,
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 12])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.7, math.inf])
def test_memory_equals_sequential_reference(slots, threshold):
    net, rows = model(num_hidden_layers=1), 2
    ids = tokens(rows, 25 * CHUNK)
    cache = small(net, Camelot(slots=slots, threshold=threshold), rows=rows)
    prefill_chunks(net, ids, cache)
    layer = cache.bounded[0]
    written = layer.read[0] - (layer.counts[0] - slots)
    keys, values = told(net, ids)
    for row in range(rows):
        for head in range(2):
            empty = {"k": [0.0] * 8, "v": [0.0] * 8, "count": 0, "age": 0}
            want = [dict(empty) for _ in range(slots)]
            pairs = zip(*(x[row, head, :written].tolist() for x in (keys, values)), strict=True)
            # Blocks go no further than what leaves the window at a time.
            pairs = list(pairs)
            first = C - (C - CHUNK - slots)
            for start in (0, *range(first, written, CHUNK)):
                stop = first if start == 0 else start + CHUNK
                remember_ref(want, pairs[start:stop], threshold)
            k, v, count, age = memory_of(layer, row, head, slots)
            assert count.tolist() == [slot["count"] for slot in want]
            assert [a for a, c in zip(age.tolist(), count, strict=True) if c] == [
                slot["age"] for slot in want if slot["count"]
            ]
            for got, name in ((k, "k"), (v, "v")):
                used = count > 0
                torch.testing.assert_close(
                    got[used], torch.tensor([s[name] for s in want])[used], atol=1e-5, rtol=0
                )


def test_without_likes_it_is_a_ring_of_the_last_tokens():
    net = model(num_hidden_layers=1)
    ids = tokens(1, 200)
    cache = small(net, Camelot(slots=M, threshold=math.inf))
    prefill_chunks(net, ids, cache)
    layer = cache.bounded[0]
    written = layer.read[0] - (layer.counts[0] - M)
    keys, values = told(net, ids)
    for head in range(2):
        k, v, count, age = memory_of(layer, 0, head)
        at = written - 1 - age.long()
        assert sorted(at.tolist()) == list(range(written - M, written))
        assert at.tolist() == sorted(range(written - M, written), key=lambda i: i % M)
        assert count.tolist() == [1] * M
        torch.testing.assert_close(k, keys[0, head, at], atol=1e-5, rtol=0)
        torch.testing.assert_close(v, values[0, head, at], atol=1e-5, rtol=0)


def test_slots_times_their_counts_are_the_sum_of_all_that_was_read():
    net = model(num_hidden_layers=1)
    ids = tokens(1, 400)
    # Everything is alike, so that nothing is ever replaced.
    cache = small(net, Camelot(slots=M, threshold=-1.0))
    prefill_chunks(net, ids, cache)
    layer = cache.bounded[0]
    written = layer.read[0] - (layer.counts[0] - M)
    for name, x in zip(("stored_keys", "stored_values"), told(net, ids), strict=True):
        mean = getattr(layer, name)(slice(0, M))
        total = (mean * layer.field("count")[..., :M, None]).sum(2)
        torch.testing.assert_close(total, x[:, :, :written].sum(2), atol=1e-4, rtol=1e-5)
    assert (layer.field("count")[..., :M].sum(2) == written).all()


def test_by_hand():
    near, like, other = ([1.0, 0.0], [4.0, 3.0]), ([2.0, 0.0], [0.0, 1.0]), ([0.0, 1.0], [5.0, 5.0])
    slots = [{"k": [0.0, 0.0], "v": [0.0, 0.0], "count": 0, "age": 0} for _ in range(2)]
    remember_ref(slots, [near, like, other], 0.9)
    assert slots == [
        {"k": [1.5, 0.0], "v": [2.0, 2.0], "count": 2, "age": 1},
        {"k": [0.0, 1.0], "v": [5.0, 5.0], "count": 1, "age": 0},
    ]


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_a_token_sees_its_window_and_what_it_recalls(threshold):
    net = model(num_hidden_layers=1)
    ids = tokens(1, 131)
    cache = small(net, Camelot(slots=M, threshold=threshold))
    seen = {}
    attn = net.model.layers[0].self_attn
    attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0].detach()))
    for at in range(0, 128, CHUNK):
        prefill_chunks(net, ids[:, at : at + CHUNK], cache)
    before = cache.bounded[0].field("count").clone()
    for at in range(128, 131):
        read(net, ids[:, at : at + 1], cache)
    layer, rope = cache.bounded[0], cache.bounded[0]._rope
    assert layer.counts[0] > C - 8 and before.shape  # nothing left meanwhile
    keys, values = told(net, ids)
    with torch.no_grad():
        x = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids))
        q = attn.q_proj(x).unflatten(2, (4, -1)).transpose(1, 2)
    window = layer.counts[0] - M
    numbers = []
    for head in range(2):
        k, v, count, _ = memory_of(layer, 0, head)
        recalled = set()
        # The window's tokens recalled when they were read: these were, since the last writing.
        hits = layer.field("recalled")[0, head, M : layer.length].long().tolist()
        cosine = torch.nn.functional.cosine_similarity(keys[0, head, -3:, None], k[None], dim=2)
        cosine[:, count == 0] = -2
        for token, row in zip(hits[-3:], cosine, strict=True):
            assert token == (int(row.argmax()) + 1 if row.max() > threshold else 0)
        recalled = sorted({hit - 1 for hit in hits if hit})
        numbers.append(len(recalled))
        places = torch.cat([torch.full((len(recalled),), M - 1), torch.arange(M, M + window)])
        all_k = torch.cat([k[recalled], keys[0, head, -window:]])[None, None]
        all_v = torch.cat([v[recalled], values[0, head, -window:]])
        turned = rope.rotate(all_k, places[None, None])[0, 0]
        for group in range(2):
            last = rope.rotate(q[:, 2 * head + group, None, -1:], places[None, None, -1:])[0, 0]
            p = (last @ turned.T * 8**-0.5).softmax(1)
            got = seen["out"][0, -1].unflatten(0, (4, 8))[2 * head + group]
            torch.testing.assert_close(got, (p @ all_v)[0], atol=1e-5, rtol=0)
    assert any(numbers), "nothing was recalled"
    assert any(number < M for number in numbers), "everything was recalled"


def test_chunks_change_nothing_until_something_leaves():
    net, ids = model(), tokens(2, 120)
    found = []
    for chunk in (8, 4, 1):
        cache = small(net, rows=2)
        prefill_chunks(net, ids[:, :112], cache)
        for layer in cache.bounded:
            layer.compress(C - CHUNK)
        found.append([read(net, part, cache) for part in ids[:, 112:].split(chunk, 1)][-1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=0)


def test_without_slots_it_is_a_window():
    net, ids = model(), tokens(2, 150)
    got = prefill_chunks(net, ids, small(net, Camelot(slots=0), rows=2))
    want = prefill_chunks(net, ids, small(net, "window", rows=2))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_rows_of_different_length_have_memories_of_their_own():
    net, lengths = model(), (150, 150 - 37)
    ids = tokens(2, lengths[0])
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    cache = small(net, rows=2)
    prefill_chunks(net, ids, cache, mask=mask)
    whole, padded = (memory_of(cache.bounded[0], row, 0) for row in range(2))
    alone = small(net)
    prefill_chunks(net, ids[:1], alone)
    for got, want in zip(whole, memory_of(alone.bounded[0], 0, 0), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    # The other row leaves its window at other tokens than alone, but loses none.
    layer = cache.bounded[0]
    assert padded[2].sum() <= layer.read[1] - (layer.counts[1] - M)
    assert not torch.equal(whole[0], padded[0])


@pytest.mark.parametrize("form", [None, Int8()])
def test_bytes_are_constant_and_those_of_the_formula(form):
    net = model(num_hidden_layers=1)
    cache = small(net, form=form)
    with measured() as log:
        logits = prefill_chunks(net, tokens(1, 10 * C), cache)
        for _ in stream(net, cache, logits, tokens=8):
            pass
    kv = 2 * 2 * C * (8 * 4 if form is None else 8 + 4)
    assert cache.bounded[0].nbytes() == kv + 12 * 2 * C
    assert log.live == cache.nbytes()
    assert log.peak <= cache.peak_nbytes()


def test_scratch_of_large_memories_holds():
    net = model(num_hidden_layers=1)
    cache = small(net, Camelot(slots=600, threshold=0.3), 1024, 256, rows=2)
    with measured() as log:
        prefill_chunks(net, tokens(2, 2048), cache)
    shape = CacheShape(1, 2, 2, 4, 8, 8, torch.float32)
    assert log.peak - cache.nbytes() <= cache.policy.scratch(shape, 1024) + 2 * 2 * 64 * 32


def test_the_model_stays_as_it_is():
    net = model()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    prefill_chunks(net, tokens(1, 150), small(net))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_memory_goes_on_in_another_run_of_the_same_size(tmp_path):
    net, more = model(), tokens(1, 90, seed=1)
    cache = small(net)
    prefill_chunks(net, tokens(1, 150), cache)
    cache.save(tmp_path / "memory")
    again = small(net)
    again.load(tmp_path / "memory")
    torch.testing.assert_close(prefill_chunks(net, more, again), prefill_chunks(net, more, cache))
    with pytest.raises(UsageError, match="was saved with 48 entries, this cache has 64"):
        small(net, capacity=64).load(tmp_path / "memory")


def test_errors():
    net = model()
    with pytest.raises(UsageError, match="slots=-1 is negative"):
        Camelot(slots=-1)
    for threshold in (1.5, -2, math.nan):
        with pytest.raises(UsageError, match=r"is no cosine; give one in \[-1, 1\]"):
            Camelot(threshold=threshold)
    with pytest.raises(UsageError, match=r"40 slots and chunks of 8 leave no window in 48.*or 49"):
        small(net, Camelot(slots=40))


@pytest.mark.parametrize("slots", [None, 0, 10, 300])
@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_least_is_the_smallest_capacity_accepted(slots, chunk):
    policy = Camelot(slots=slots)
    least = policy.least(chunk)
    policy.check(least, chunk)
    with pytest.raises(UsageError):
        policy.check(least - 1, chunk)
