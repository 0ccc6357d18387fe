import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import INVARIANTS, model, tokens
from holdfast.context.cache.layer import BoundedLayer
from holdfast.context.cache.locret import Locret, RetainingHeads, _visitor, labels_of
from holdfast.context.stream import prefill_chunks, stream
from holdfast.errors import UsageError

WIDTH = 16


def heads_of(net, seed=0):
    return RetainingHeads.untrained(net, width=WIDTH, seed=seed)


def small(net, policy, capacity=32, chunk=8, rows=1):
    return BoundedCache.for_model(net, policy, tokens=capacity, batch=rows, chunk=chunk)


class ForAnyModel(Locret):
    """With untrained heads of the shape of whichever model it is bound to."""

    def __init__(self):
        super().__init__(heads=heads_of(model()))

    def bind(self, cache):
        self.heads = heads_of(cache._model())
        super().bind(cache)


@pytest.mark.parametrize("name", INVARIANTS)
def test_policy(name):
    # The catalogue's test makes policies by name alone, this one needs heads.
    INVARIANTS[name](ForAnyModel)


def test_scores_are_those_of_the_projections_whatever_the_chunk():
    net = model(num_hidden_layers=1)
    heads, ids = heads_of(net), tokens(1, 60)
    with torch.no_grad():
        x = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids))
        attn = net.model.layers[0].self_attn
        token = torch.cat([f(x) for f in (attn.q_proj, attn.k_proj, attn.v_proj)], 2)
        w1, w2 = (heads.layers[0][i].weight for i in (0, 2))
        want = (torch.nn.functional.silu(token @ w1.T) @ w2.T).transpose(1, 2)
    for chunk in (1, 7, 16, 60):
        cache = small(net, Locret(heads=heads), 64, max(chunk, 4))
        prefill_chunks(net, ids, cache, chunk)
        got = cache.bounded[0].field("score")
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_labels_by_hand():
    # Two query heads of one key head, one query each, two keys.
    q = torch.tensor([[[[1.0, 0.0]], [[0.0, -2.0]]]])
    k = torch.tensor([[[[3.0, 1.0], [-5.0, -4.0]]]])
    assert labels_of(q, k, 0.5).tolist() == [[[1.5, 4.0]]]


@torch.no_grad()
def test_labels_are_the_largest_raw_scores_of_answers_and_not_probabilities():
    net, ids = model(), tokens(1, 30)
    prompt, answer = ids[0, :24], ids[0, 24:]
    found = []
    _visitor(net, 30)((prompt, answer), lambda n, q, k, v, labels: found.append(labels))
    net.set_attn_implementation("eager")
    seen = {}
    for number, layer in enumerate(net.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, kw, number=number: seen.update({number: kw}), with_kwargs=True
        )
    net(ids)
    for number, labels in enumerate(found):
        x, (cos, sin) = (seen[number][name] for name in ("hidden_states", "position_embeddings"))
        attn = net.model.layers[number].self_attn
        q, k = (f(x).view(1, 30, -1, 8).transpose(1, 2) for f in (attn.q_proj, attn.k_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        raw = q[:, :, 23:] @ k.repeat_interleave(2, 1)[:, :, :24].mT * 8**-0.5
        want = raw.amax(2).unflatten(1, (2, 2)).amax(2)
        torch.testing.assert_close(labels, want, atol=1e-5, rtol=0)


def test_fit_learns_and_leaves_the_model_as_it_was():
    net = model().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    attention = net.config._attn_implementation
    data = [(tokens(1, 40, seed)[0], tokens(1, 5, 100 + seed)[0]) for seed in range(4)]
    losses = []
    options = {"width": WIDTH, "steps": 60, "lr": 3e-3}
    heads = RetainingHeads.fit(net, data, on_step=lambda _, loss: losses.append(loss), **options)
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert net.training and net.config._attn_implementation == attention
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    again = RetainingHeads.fit(net, data, **options)
    assert again.digest() == heads.digest()
    assert heads.agreement(net, data) > heads_of(net).agreement(net, data)


@pytest.mark.parametrize("stabilizers", [0, 5])
def test_the_best_of_each_head_stay_beside_stabilizers_until_the_text_ends(stabilizers):
    net = model(num_hidden_layers=1)
    cache = small(net, Locret(heads=heads_of(net), stabilizers=stabilizers))
    layer = cache.bounded[0]
    prefill_chunks(net, tokens(1, 32), cache)
    scores = layer.field("score").clone()
    keys = layer.stored_keys(slice(0, 32)).clone()

    def best(row, among, keep):
        return sorted(sorted(among, key=lambda i: -row[i])[:keep])

    got = cache.policy.select(layer, 24)
    for head, row in enumerate(scores[0].tolist()):
        old, recent = range(32 - stabilizers), list(range(32 - stabilizers, 32))
        assert got[0, head].tolist() == best(row, old, 24 - stabilizers) + recent
    cache.turn()
    assert layer.counts == [24]
    for head, row in enumerate(scores[0].tolist()):
        stay = best(row, range(32), 24)
        assert torch.equal(layer.stored_keys(slice(0, 24))[0, head], keys[0, head, stay])


def test_entries_never_exceed_what_stays_and_a_chunk(monkeypatch):
    net, held, chosen = model(num_hidden_layers=1), [], []
    append, select = BoundedLayer.append, Locret.select
    monkeypatch.setattr(
        BoundedLayer, "append", lambda x, *a: (append(x, *a), held.append(x.length))[0]
    )
    monkeypatch.setattr(
        Locret, "select", lambda p, x, keep: (chosen.append(keep), select(p, x, keep))[1]
    )
    cache = small(net, Locret(heads=heads_of(net)))
    logits = prefill_chunks(net, tokens(1, 400), cache)
    assert set(chosen) == {24} and max(held) == 24 + 8
    for _ in stream(net, cache, logits, tokens=40):
        pass
    assert max(held) == 32
    assert cache.bounded[0].nbytes() == 2 * 2 * 32 * 8 * 4 + 4 * 2 * 32


def test_parameters_by_formula():
    heads = RetainingHeads.untrained(model())
    assert sum(p.numel() for p in heads.parameters()) == 2 * 1024 * ((4 + 2 * 2) * 8 + 2)


def test_heads_are_saved_and_loaded(tmp_path):
    net = model()
    heads, path = heads_of(net).bfloat16(), tmp_path / "heads.safetensors"
    heads.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = Locret(heads=path).heads
    assert again.sizes == heads.sizes and again.digest() == heads.digest()
    assert next(again.parameters()).dtype == torch.bfloat16
    prefill_chunks(net, tokens(1, 60), small(net, Locret(heads=again)))
    save_file(load_file(path), path)
    with pytest.raises(UsageError, match="holds no retaining heads"):
        RetainingHeads.load(path)
    with pytest.raises(UsageError, match=r"give a file that RetainingHeads\.save wrote"):
        RetainingHeads.load(tmp_path / "nothing")


def test_a_saved_cache_belongs_to_its_heads(tmp_path):
    net = model(num_hidden_layers=1)
    cache = small(net, Locret(heads=heads_of(net)))
    prefill_chunks(net, tokens(1, 60), cache)
    cache.save(tmp_path / "context")
    with pytest.raises(UsageError, match="was saved with policy"):
        small(net, Locret(heads=heads_of(net, seed=1))).load(tmp_path / "context")


def test_errors():
    net = model()
    heads = heads_of(model(num_key_value_heads=4))
    with pytest.raises(UsageError, match=r"made for Sizes.*heads=4.*the model has Sizes.*heads=2"):
        small(net, Locret(heads=heads))
    with pytest.raises(UsageError, match="stabilizers=-1 is negative"):
        Locret(heads=heads, stabilizers=-1)
    with pytest.raises(UsageError, match="24 stabilizers leave none of the 24 entries"):
        small(net, Locret(heads=heads_of(net), stabilizers=24))
    with pytest.raises(UsageError, match="0 steps on 1 examples"):
        RetainingHeads.fit(net, [(torch.tensor([1, 2]), torch.tensor([3]))], steps=0)
    with pytest.raises(UsageError, match="prompt of 1 tokens and an answer of 1 teach nothing"):
        RetainingHeads.fit(net, [(torch.tensor([1]), torch.tensor([3]))], steps=1, width=WIDTH)


@pytest.mark.parametrize("stabilizers", [None, 0, 20, 400])
@pytest.mark.parametrize("chunk", [1, 8])
def test_least_is_the_smallest_capacity_accepted(stabilizers, chunk):
    policy = Locret(heads=heads_of(model()), stabilizers=stabilizers)
    least = policy.least(chunk)
    policy.check(least, chunk)
    with pytest.raises(UsageError):
        policy.check(least - 1, chunk)
