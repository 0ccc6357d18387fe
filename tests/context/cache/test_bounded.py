"""Bounded caches beside what every policy must do: what they hold, and what they refuse."""

import copy

import pytest
import torch

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.stream import prefill_chunks, read
from holdfast.errors import DoesNotFit, UsageError
from holdfast.meter import StorageLog


@pytest.mark.parametrize("policy", ["full", "sinks_recent", "random"])
def test_a_forward_pass_leaves_nothing_but_its_logits(policy):
    net = model()
    cache = BoundedCache.for_model(net, policy, tokens=64, chunk=8)
    ids = tokens(1, 8)
    read(net, ids, cache)
    with StorageLog() as log:
        logits = read(net, ids, cache)
    assert log.live_bytes() == logits.nbytes


def test_a_copy_goes_its_own_way():
    net = model()
    cache = BoundedCache.for_model(net, "sinks_recent", tokens=32, chunk=8)
    prefill_chunks(net, tokens(1, 80), cache)
    other = copy.deepcopy(cache)
    want = read(net, tokens(1, 4, seed=1), copy.deepcopy(cache))
    read(net, tokens(1, 8, seed=2), other)
    assert torch.equal(read(net, tokens(1, 4, seed=1), cache), want)


def test_refusals_name_the_remedy():
    net = model()
    with pytest.raises(UsageError, match='budget="64MiB" or tokens=1024'):
        BoundedCache.for_model(net, "full")
    with pytest.raises(UsageError, match='expected "device" or "host"'):
        BoundedCache.for_model(net, "full", tokens=8, place="disk")
    with pytest.raises(UsageError, match="unknown cache policy 'sink'"):
        BoundedCache.for_model(net, "sink", tokens=8)
    full = BoundedCache.for_model(net, "full", tokens=16)
    with pytest.raises(DoesNotFit, match=r"full: 16 entries.*raise the budget"):
        prefill_chunks(net, tokens(1, 32), full)
    with pytest.raises(UsageError, match="holds 1 rows and got 2"):
        read(net, tokens(2, 2), full)
    with pytest.raises(UsageError, match="cannot go back"):
        full.crop(1)
    net.set_attn_implementation("sdpa")
    other = BoundedCache.for_model(net, "full", tokens=16)
    net.set_attn_implementation("sdpa")
    net(tokens(1, 2), past_key_values=other)
    with pytest.raises(UsageError, match="does not use the attention 'holdfast'"):
        net(tokens(1, 2), past_key_values=other)


def test_entries_may_lie_on_the_host_or_be_offloaded_meanwhile():
    net = model()
    ids = tokens(2, 80)
    device, host = (
        BoundedCache.for_model(net, "sinks_recent", tokens=32, chunk=8, place=place)
        for place in ("device", "host")
    )
    want, got = (prefill_chunks(net, ids, cache) for cache in (device, host))
    assert torch.equal(got, want) and host.nbytes() == device.nbytes()
    for layer in device.layers:
        layer.offload()
        layer.prefetch()
    more = tokens(2, 3, seed=1)
    assert torch.equal(read(net, more, device), read(net, more, host))
