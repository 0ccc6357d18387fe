"""BigBird in stock encoders: the published model's numbers, its memory, its refusals."""

import warnings

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from holdfast.context.attention import bigbird as method
from holdfast.context.attention.bigbird import bigbird, bigbird_attention
from holdfast.context.kernels import attention_with_lse
from holdfast.context.patterns import BlockPattern
from holdfast.errors import UsageError
from holdfast.meter import Meter

PATTERN = BlockPattern(8)
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def encoder(n=512, layers=2, **more):
    config = BertConfig(**SIZES | {"num_hidden_layers": layers}, max_position_embeddings=n, **more)
    return sharpened(BertModel(config, add_pooling_layer=False).eval())


def sharpened(model):
    """Weights far from their initialisation, so that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(n):
    ids, mask = torch.randint(1, 50, (2, n)), torch.ones(2, n, dtype=torch.long)
    mask[1, n - n // 3 :] = 0
    return ids, mask


@pytest.mark.parametrize("n", [160, 157, 96])
def test_equals_transformers_bigbird_under_the_same_plan(monkeypatch, n):
    stock = sharpened(
        BigBirdModel(
            BigBirdConfig(**SIZES, block_size=8, max_position_embeddings=512, sep_token_id=2)
        )
    ).eval()
    ours = encoder()
    state = {k: v for k, v in stock.state_dict().items() if not k.startswith("pooler")}
    ours.load_state_dict(state)
    blocks = -(-n // 8)

    def plan(self, *_, num_heads, **__):
        seen = PATTERN.table(blocks, num_heads, layer=self.seed)
        rows = range(1, blocks - 1)
        for i in rows:
            seen[:, i, [0, i - 1, i, i + 1, blocks - 1]] = False
        return [np.stack([np.flatnonzero(own[i]) for i in rows]) for own in seen]

    monkeypatch.setattr(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", plan)
    bigbird(ours, PATTERN)
    ids, mask = batch(n)
    real = mask.bool()
    one, two = (m(ids, attention_mask=mask).last_hidden_state[real] for m in (ours, stock))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    weight = torch.randn_like(one)
    for x in (one, two):
        (x * weight).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = theirs[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(
            parameter.grad / scale, theirs[name].grad / scale, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("heads", [4, 2])
def test_equals_dense_attention_with_the_expanded_mask(heads):
    q, k, v = (torch.randn(2, h, 157, 8, requires_grad=True) for h in (4, heads, heads))
    valid = torch.rand(2, 157) > 0.3
    seen = PATTERN.dense(157, 4, layer=3)[None] & valid[:, None, None]
    out = bigbird_attention(q, k, v, PATTERN, layer=3, valid=valid)
    want, _ = attention_with_lse(q, k, v, mask=seen)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    dout = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, want)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_calls_agree_and_layers_differ():
    q, k, v = (torch.randn(1, 2, 256, 8) for _ in range(3))
    first = bigbird_attention(q, k, v, PATTERN, layer=1)
    assert torch.equal(bigbird_attention(q, k, v, PATTERN, layer=1), first)
    assert not torch.allclose(bigbird_attention(q, k, v, PATTERN, layer=0), first, atol=1e-3)
    model = encoder()
    ids = torch.randint(1, 50, (1, 256))
    with torch.no_grad(), bigbird(model, PATTERN):
        evaluated = model(ids).last_hidden_state
        assert torch.equal(model.train()(ids).last_hidden_state, evaluated)


def test_padding_within_the_last_block_changes_nothing():
    model = encoder()
    bigbird(model, PATTERN)
    ids = torch.randint(1, 50, (1, 120))
    mask = (torch.arange(120) < 116).long()[None]
    with torch.no_grad():
        short = model(ids[:, :116]).last_hidden_state
        padded = model(ids, attention_mask=mask).last_hidden_state[:, :116]
    torch.testing.assert_close(padded, short, atol=1e-5, rtol=0)


def test_short_inputs_are_attended_in_full_with_a_warning():
    model = encoder()
    ids, mask = batch(88)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        with bigbird(model, PATTERN), pytest.warns(UserWarning, match="88 tokens are 11 blocks of"):
            found = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
        with bigbird(model, PATTERN), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randint(1, 50, (1, 89)))


def test_switching_back_leaves_no_trace():
    model = encoder()
    ids = torch.randint(1, 50, (1, 200))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        use = bigbird(model, PATTERN)
        assert not torch.allclose(model(ids).last_hidden_state, before, atol=1e-3)
        use.remove()
        assert torch.equal(model(ids).last_hidden_state, before)


def test_peak_memory_is_linear_and_nothing_is_n_by_n():
    def peak(model, n):
        ids = torch.randint(1, 50, (1, n))

        def step():
            model(ids).last_hidden_state.sum().backward()
            model.zero_grad()

        step()
        with Meter(model, inputs=ids) as meter:
            step()
        largest = max(s.nbytes for s in meter.log.storages)
        return meter.peak - meter.base, largest

    model = encoder(8192, layers=1)
    bigbird(model, BlockPattern(32))
    (one, _), (eight, largest) = peak(model, 1024), peak(model, 8192)
    assert 7 < eight / one < 9
    assert largest < 8192 * 8192 / 8  # bytes: a mask of single bits would be as large
    model.set_attn_implementation("eager")
    assert peak(model, 2048)[0] / peak(model, 1024)[0] > 3


def test_dropout_is_honoured_in_training_alone():
    model = encoder()
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    bigbird(model, PATTERN)
    ids = torch.randint(1, 50, (1, 160))
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, plain)
        dropped = [model.train()(ids).last_hidden_state for _ in range(2)]
    assert not torch.allclose(*dropped, atol=1e-3)
    assert not torch.allclose(dropped[0], plain, atol=1e-3)


def test_decoders_and_masks_that_are_more_than_padding_are_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2)
    )  # fmt: skip
    bigbird(llama)
    with pytest.raises(UsageError, match=r"hides more than padding.*bidirectional"):
        llama(torch.randint(1, 50, (1, 20)))
    with pytest.raises(UsageError, match="BertModel with causal=False: BigBird's attention is bi"):
        bigbird(encoder(is_decoder=True))
    with pytest.raises(UsageError, match="causal=True: BigBird's attention is bidirectional"):
        bigbird(encoder(), BlockPattern(causal=True))
    model = encoder()
    bigbird(model, PATTERN)
    given = torch.ones(1, 1, 160, 160, dtype=torch.bool).tril()
    with pytest.raises(UsageError, match=r"takes an attention_mask of \(B,n\) alone"):
        model(torch.randint(1, 50, (1, 160)), attention_mask=given)


def test_flex_is_for_cuda_without_dropout():
    q = torch.zeros(1, 1, 1, 8)
    assert method.choose_path(q, PATTERN) == "panels"
    if torch.cuda.is_available():
        assert method.choose_path(q.cuda(), BlockPattern(64)) == "flex"
        assert method.choose_path(q.cuda(), BlockPattern(64), dropout=0.1) == "panels"
        assert method.choose_path(q.cuda(), BlockPattern(48)) == "panels"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
def test_flex_on_cuda_equals_panels(padded):
    q, k, v = (torch.randn(2, 4, 1500, 64, device="cuda", requires_grad=True) for _ in range(3))
    valid = torch.rand(2, 1500, device="cuda") > 0.3 if padded else None
    one = bigbird_attention(q, k, v, BlockPattern(64), valid=valid)
    panels = BlockPattern(64).panels(24, 4)
    two, _ = method.panel_attention(q, k, v, panels, 64, valid=valid)
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)  # TF32 in the compiled kernel
    dout = torch.randn_like(one)
    pairs = zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (one, two)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)
