import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from holdfast.context.attention import fot_cache
from holdfast.context.attention.fot import (
    FoT,
    at_start,
    cross_batch_attention,
    cross_batch_ref,
    reach,
)
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.rope import Rope
from holdfast.errors import UsageError
from holdfast.forms.affine import Int8

WINDOW = 8
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}


def read(fot, cache, ids, chunk=None, **options):
    parts = ids.split(chunk or ids.shape[1], 1)
    with torch.no_grad():
        return torch.cat(
            [fot.model(part, past_key_values=cache, **options).logits for part in parts], 1
        )


def windows(n=4, length=WINDOW, heads=2, keys=2, d=8):
    g = torch.Generator().manual_seed(0)
    shapes = ((n, heads, length, d), *((n, keys, length, d),) * 3)
    return [torch.randn(shape, generator=g).double().requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("range_", "pack"), [(0, 1), (1, 1), (2, 1), (3, 2), (9, 4)])
def test_cross_batch_equals_a_loop_over_rows(range_, pack):
    q, k, v, memory = windows(6)
    own = {"range": range_, "pack": pack, "memory_keys": memory}
    got, want = cross_batch_attention(q, k, v, **own), cross_batch_ref(q, k, v, **own)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, (q, k, v, memory), grad, materialize_grads=True)
    theirs = torch.autograd.grad(want, (q, k, v, memory), grad, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_reach_by_hand():
    assert reach(5, 2) == [0, 1, 2, 2, 2]
    assert reach(9, 8, pack=4) == [0, 1, 2, 3, 2, 4, 6, 7, 2]


def test_grouped_heads_and_padding():
    q, k, v, _ = windows(3, heads=4)
    valid = torch.ones(3, WINDOW, dtype=torch.bool)
    valid[0, :3] = False
    poison = torch.where(valid[:, None, :, None], k, 1e3)
    got = cross_batch_attention(q, poison, v, range=2, valid=valid)
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    want = cross_batch_ref(q[1:], *(x[1:] for x in repeated), range=1)
    # Without the first row, and with what is real of it.
    torch.testing.assert_close(
        cross_batch_attention(q[1:], k[1:], v[1:], range=2), want, atol=1e-9, rtol=0
    )
    keys = torch.cat([k[0, :, 3:], k[1]], 1).repeat_interleave(2, 0)
    values = torch.cat([v[0, :, 3:], v[1]], 1).repeat_interleave(2, 0)
    p = (q[1, :, -1:] @ keys.mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(got[1, :, -1:], p @ values, atol=1e-9, rtol=0)


def test_gradients_reach_rows_before_and_none_after():
    net = model()
    embeds = net.get_input_embeddings()(tokens(5, WINDOW)).detach().requires_grad_()
    with FoT(net, [1]).across(range=2):
        logits = net(inputs_embeds=embeds, use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[3].square().sum(), embeds)
    reached = grad.abs().sum((1, 2)) > 0
    assert reached.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {}), ("qwen2", {}), ("gpt_neox", {}), ("llama", {"rope_parameters": YARN})],
)
def test_training_and_reading_are_the_same_function(kind, more):
    net, ids = model(kind, **more), tokens(4, WINDOW)
    fot = FoT(net, [0, 1])
    with fot.across(range=3), torch.no_grad():
        want = net(ids, use_cache=False).logits
    cache = fot.cache(window=WINDOW, memory=3 * WINDOW)
    # Chunks that end anywhere.
    got = read(fot, cache, ids.view(1, -1), chunk=5).view_as(want)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    again = fot.cache(window=WINDOW, memory=3 * WINDOW, place="host")
    torch.testing.assert_close(
        read(fot, again, ids.view(1, -1)).view_as(want), want, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt_neox"])
def test_with_an_empty_memory_it_is_the_model(kind):
    net = model(kind)
    ids, mask = tokens(2, 36), torch.ones(2, 36, dtype=torch.long)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    fot = FoT(net, [0])
    with torch.no_grad():
        want = net(ids, attention_mask=mask, position_ids=positions).logits
        cache, got = fot.cache(window=36, memory=36), []
        for start, stop in ((0, 20), (20, 35), (35, 36)):
            got.append(net(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                position_ids=positions[:, start:stop],
            ).logits)  # fmt: skip
    got = torch.cat(got, 1)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)


def test_padding_in_memory_is_not_attended():
    net = model(num_hidden_layers=1)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :WINDOW] = 0
    for topk in (None, 12):
        fot = FoT(net, [0], "dense" if topk is None else "topk", topk)
        cache = fot.cache(window=WINDOW, memory=4 * WINDOW)
        with torch.no_grad():
            got = net(ids, attention_mask=mask, past_key_values=cache).logits[1, WINDOW:]
        alone = fot.cache(window=WINDOW, memory=4 * WINDOW)
        want = read(fot, alone, ids[1:, WINDOW:])[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_best_keys():
    net, ids = model(), tokens(2, 5 * WINDOW + 3)
    memory = 5 * WINDOW
    dense = FoT(net, [1])
    want = read(dense, dense.cache(window=WINDOW, memory=memory), ids)
    for topk, same in ((memory, True), (10**6, True), (3, False)):
        fot = FoT(net, [1], backend="topk", topk=topk)
        got = read(fot, fot.cache(window=WINDOW, memory=memory), ids, chunk=11)
        assert torch.allclose(got, want, atol=1e-5, rtol=0) == same
    # Of one layer and one key the oracle is a line.
    net = model(num_hidden_layers=1)
    fot, seen = FoT(net, [0], backend="topk", topk=1), {}
    net.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.update(out=args[0].detach())
    )
    cache = fot.cache(window=WINDOW, memory=memory)
    read(fot, cache, ids[:1, : 2 * WINDOW])
    x = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids[:1, : 2 * WINDOW]))
    attention = net.model.layers[0].self_attn
    q, k, v = (
        f(x).unflatten(-1, (-1, 8)).transpose(1, 2).detach()
        for f in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    rope, at = Rope.from_model(net), torch.arange(WINDOW)[None, None]
    last, local = (rope.rotate(t[:, :, WINDOW:], at) for t in (q, k))
    far = last[:, :, -1:] @ k[:, :, :WINDOW].mT
    best = far.argmax(-1)[..., None].expand(-1, -1, -1, 8)
    scores = torch.cat([far.amax(-1, keepdim=True), last[:, :, -1:] @ local.mT], -1)
    values = torch.cat([v.gather(2, best), v[:, :, WINDOW:]], 2)
    want = (scores * 8**-0.5).softmax(-1) @ values
    torch.testing.assert_close(seen["out"][0, -1], want.flatten(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_parts_of_the_memory_are_one_softmax(monkeypatch, padded):
    net, ids = model(), tokens(2, 6 * WINDOW + 3)
    options = {"attention_mask": torch.ones_like(ids)}
    options["attention_mask"][1, :5] = 1 - padded
    made = [FoT(net, [0, 1], name, topk) for name, topk in (("dense", None), ("topk", 7))]
    want = [read(f, f.cache(window=WINDOW, memory=6 * WINDOW), ids, **options) for f in made]
    monkeypatch.setattr(fot_cache, "KEYS", 5)
    monkeypatch.setattr(fot_cache, "PAIRS", 5 * WINDOW)
    for fot, whole in zip(made, want, strict=True):
        cache = fot.cache(window=WINDOW, memory=6 * WINDOW)
        got, real = read(fot, cache, ids, **options), options["attention_mask"].bool()
        torch.testing.assert_close(got[real], whole[real], atol=1e-5, rtol=0)


def test_training_keeps_copies_of_the_windows_before():
    def saved(range_):
        found = {}

        def keep(x):
            if x.is_floating_point():
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        given = windows(6, heads=4)[:3]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = cross_batch_attention(*given, range=range_)
        return sum(found.values()), out

    rows, heads, d = 6, 2, 8
    assert saved(4)[0] - saved(0)[0] == 2 * rows * 4 * heads * WINDOW * d * 8


def test_a_full_memory_forgets_its_oldest_window():
    net, ids = model(num_hidden_layers=1), tokens(1, 4 * WINDOW)
    fot = FoT(net, [0])
    caches = [fot.cache(window=WINDOW, memory=size * WINDOW) for size in (2, 3)]
    short = read(fot, caches[0], ids)[:, -WINDOW:]
    want = read(fot, fot.cache(window=WINDOW, memory=2 * WINDOW), ids[:, WINDOW:])[:, -WINDOW:]
    torch.testing.assert_close(short, want, atol=1e-5, rtol=0)
    assert not torch.allclose(read(fot, caches[1], ids)[:, -WINDOW:], want, atol=1e-4)
    assert caches[0].layers[0].remembered == 2 * WINDOW


@pytest.mark.parametrize("form", [None, Int8()])
def test_bytes_are_constant_and_as_stated(form):
    net, rows, memory = model(), 2, 4 * WINDOW
    fot = FoT(net, [1])
    cache = fot.cache(window=WINDOW, memory=memory, form=form)
    held = set()
    for part in tokens(rows, 9 * WINDOW).split(WINDOW, 1):
        read(fot, cache, part)
        held.add(cache.nbytes())
    layers, heads, d = 2, 2, 8
    vector = d * 4 if form is None else d + 4
    local = 2 * layers * rows * heads * WINDOW * d * 4 + layers * rows * WINDOW
    table = 4 * WINDOW * d
    assert held == {local + 2 * rows * heads * memory * vector + rows * memory + table}


def test_generate_beams_and_reset():
    net, ids = model(), tokens(2, 3 * WINDOW)
    fot = FoT(net, [1])

    def generate(cache, **options):
        return net.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
            max_new_tokens=8, min_new_tokens=8, **options,
        )  # fmt: skip

    for options in ({}, {"num_beams": 3}):
        want = generate(DynamicCache(config=net.config), **options)
        assert torch.equal(generate(fot.cache(window=64, memory=64), **options), want)
        small = fot.cache(window=WINDOW, memory=2 * WINDOW)
        assert generate(small, **options).shape == (2, 32)
    first = fot.cache(window=WINDOW, memory=2 * WINDOW)
    want = read(fot, first, ids)
    first.reset()
    torch.testing.assert_close(read(fot, first, ids), want)
    first.batch_select_indices(torch.tensor([1]))
    second = fot.cache(window=WINDOW, memory=2 * WINDOW)
    read(fot, second, ids[1:])
    more = tokens(1, 3, seed=1)
    torch.testing.assert_close(read(fot, first, more), read(fot, second, more), atol=1e-5, rtol=0)


def test_memory_keys_are_those_of_position_0():
    for more in ({}, {"rope_parameters": YARN}):
        rope = Rope.from_model(model(**more))
        x = torch.randn(2, 2, 5, 8, dtype=torch.float64).float().requires_grad_()
        positions = torch.tensor([[3, 4, 5, 9, 30]])
        turned = rope.rotate(x.detach(), positions[:, None]).requires_grad_()
        got = at_start(rope, turned, positions)
        zero = torch.zeros(1, 1, 5, dtype=torch.int64)
        torch.testing.assert_close(got, rope.rotate(x.detach(), zero), atol=1e-5, rtol=0)
        # It is linear: <grad, J d> = <J' grad, d>.
        grad, step = torch.randn_like(got), torch.randn_like(x)
        (back,) = torch.autograd.grad(got, turned, grad)
        want = (grad * at_start(rope, step, positions)).sum()
        torch.testing.assert_close((back * step).sum(), want, atol=1e-4, rtol=1e-5)


def test_the_model_gets_its_attention_back():
    net = model()
    ids, before = tokens(2, WINDOW), net.config._attn_implementation
    fot = FoT(net, [1])
    with torch.no_grad():
        want = net(ids).logits
        across = fot.across(range=1)
        assert not torch.allclose(net(ids, use_cache=False).logits, want, atol=1e-5)
        with pytest.raises(UsageError, match="attends across its batch already"):
            fot.across(range=2)
        across.range = 0
        torch.testing.assert_close(net(ids, use_cache=False).logits, want, atol=1e-5, rtol=0)
        twin = copy.deepcopy(net)
        across.remove()
        across.remove()
        assert net.config._attn_implementation == before
        torch.testing.assert_close(net(ids).logits, want)
    assert twin.config._attn_implementation == "fot"


def test_errors():
    net = model()
    with pytest.raises(UsageError, match=r"mem_layers=\[0, 2\]: expected one or more of 0 to 1"):
        FoT(net, [0, 2])
    with pytest.raises(UsageError, match="mem_layers"):
        FoT(net, [])
    with pytest.raises(UsageError, match="faiss"):
        FoT(net, [0], backend="faiss")
    with pytest.raises(UsageError, match='topk=3 needs backend="topk"'):
        FoT(net, [0], topk=3)
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    )
    with pytest.raises(UsageError, match="no rotary positions"):
        FoT(gpt2, [0])
    fot = FoT(net, [0])
    with pytest.raises(UsageError, match="memory=20 and window=8"):
        fot.cache(window=8, memory=20)
    with pytest.raises(UsageError, match="range=-1"):
        fot.across(range=-1)
    with pytest.raises(UsageError, match="pack=0"):
        cross_batch_attention(*windows()[:3], range=1, pack=0)
    cache = fot.cache(window=8, memory=8)
    read(fot, cache, tokens(2, 4))
    with pytest.raises(UsageError, match="holds 2 rows and got 1"):
        read(fot, cache, tokens(1, 4))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(UsageError, match="4-D attention mask"):
        read(fot, fot.cache(window=8, memory=8), tokens(1, 4), attention_mask=mask)
