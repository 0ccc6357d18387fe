"""Combiner: every token counts exactly once, directly or through a summary."""

import math

import pytest
import torch
import transformers as hf

from holdfast.context.attention.combiner import (
    combiner_attention,
    combiner_weights_ref,
    regions,
)
from holdfast.context.attention.combiner_state import CombinerCache, CombinerLayer
from holdfast.context.interface import use
from holdfast.errors import UsageError
from holdfast.meter import Meter

B, HQ, H, D, DV = 2, 4, 2, 8, 5
VARIANTS = ("fixed", "axial", "log")


def tensors(n, dtype=torch.float64, heads=H):
    shapes = (B, HQ, n, D), (B, heads, n, D), (B, heads, n, DV)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def visible(n, causal):
    return torch.ones(n, n).tril().bool() if causal else torch.ones(n, n).bool()


def dense(q, k, v, causal):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible(q.shape[2], causal), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "segment", "pool"), [(16, 4, "max"), (17, 4, "mean"), (11, 1, "sum"),
                                                    (33, 3, "max"), (21, 5, "sum")])  # fmt: skip
def test_weights_of_all_tokens_sum_to_one(n, segment, pool, variant, causal):
    q, k, v = given = tensors(n)
    options = {"segment": segment, "variant": variant, "causal": causal, "pool": pool}
    weights = combiner_weights_ref(q, k, **options)
    seen = visible(n, causal)
    assert (weights.sum(-1) - 1).abs().max() <= 1e-6
    assert (weights[..., seen] > 0).all() and not weights[..., ~seen].any()
    want = weights @ v.repeat_interleave(HQ // H, 1)
    got = combiner_attention(*given, **options)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    dout = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad(x, given, dout) for x in (got, want)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_regions_cover_every_visible_token_once(variant, causal):
    for n, segment in ((1, 1), (16, 4), (23, 4), (9, 2)):
        for i in range(n):
            direct, found = regions(i, n, segment, variant, causal)
            every = sorted(direct + [j for region in found for j in region])
            assert every == list(range(i + 1 if causal else n))


def test_logits_per_token():
    # n=64, s=8: own segment, and 7 others; a column of 7 and 7 others' above; regions of 1, 2, 4.
    for variant, want in (("fixed", 8 + 7), ("axial", 8 + 7 + 7), ("log", 8 + 3)):
        direct, found = regions(63, 64, 8, variant, True)
        assert len(direct) + len(found) == want


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_segment_is_dense_attention(variant, causal):
    given = tensors(13)
    for segment in (13, 50):
        got = combiner_attention(*given, segment=segment, variant=variant, causal=causal)
        torch.testing.assert_close(got, dense(*given, causal), atol=1e-9, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["fixed", "axial"])
def test_segments_of_one_token_are_dense_attention(variant, causal):
    given = tensors(13)
    for pool in ("max", "mean", "sum"):
        # Heads that share a key head would pool their queries, but one token has one value.
        got = combiner_attention(*given, segment=1, variant=variant, causal=causal, pool=pool)
        torch.testing.assert_close(got, dense(*given, causal), atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_summaries_do_not_leak_the_future(variant):
    q, k, v = (x.detach() for x in tensors(24))
    before = combiner_attention(q, k, v, segment=4, variant=variant)
    for t in (1, 6, 8, 23):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] += 3 * torch.randn_like(x[:, :, t:])
        after = combiner_attention(*changed, segment=4, variant=variant)
        torch.testing.assert_close(after[:, :, :t], before[:, :, :t], atol=1e-12, rtol=0)
        assert (after[:, :, t] - before[:, :, t]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_anywhere_is_as_if_it_were_not_there(variant, causal):
    q, k, v = tensors(21)
    options = {"segment": 4, "variant": variant, "causal": causal}
    valid = torch.ones(B, 21, dtype=torch.bool)
    valid[0, :6] = False  # left
    valid[1, [0, 3, 20]] = False  # anywhere
    got = combiner_attention(q, k, v, valid=valid, **options)
    assert got.isfinite().all()
    for row in range(B):
        own = [x[row : row + 1][:, :, valid[row]] for x in (q, k, v)]
        want = combiner_attention(*own, **options)
        torch.testing.assert_close(got[row : row + 1][:, :, valid[row]], want, atol=1e-9, rtol=0)
    grads = torch.autograd.grad(got[:, :, 10:].sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


def test_the_default_segment_is_the_square_root():
    given = tensors(17)
    torch.testing.assert_close(combiner_attention(*given), combiner_attention(*given, segment=5))


def test_dropout_drops_weights_and_keeps_their_sum():
    q, k, _ = (x.detach() for x in tensors(64))
    # Values that tell weights apart: what comes out are their sums.
    v = torch.ones(B, H, 64, 1, dtype=torch.float64)
    runs = [combiner_attention(q, k, v, segment=8, dropout=0.3, seed=s) for s in range(0, 400, 10)]
    assert torch.equal(runs[0], combiner_attention(q, k, v, segment=8, dropout=0.3, seed=0))
    assert not torch.equal(runs[0], runs[1])
    assert abs(torch.stack(runs).mean() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes_follow_the_input(variant, dtype):
    given = [x.detach().to(dtype) for x in tensors(40)]
    got = combiner_attention(*given, segment=6, variant=variant)
    assert got.dtype == dtype
    want = combiner_attention(*(x.double() for x in given), segment=6, variant=variant)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
@pytest.mark.parametrize("cuts", [[1] * 30, [3, 1, 13, 5, 8], [29, 1], [5, 25], [2, 4, 24]])
def test_step_by_step_equals_parallel(cuts, pool):
    q, k, v = (x.detach() for x in tensors(30))
    state, outs = CombinerLayer(5, pool), []
    for part in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        outs.append(state.attend(*part))
    want = combiner_attention(q, k, v, segment=5, pool=pool)
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=1e-9, rtol=0)


def test_bytes_of_the_state():
    q, k, v = (x.detach().float() for x in tensors(50))
    state = CombinerLayer(8)
    assert state.nbytes() == 0
    for t in range(50):
        state.attend(*(x[:, :, t : t + 1] for x in (q, k, v)))
        f, w = divmod(t + 1, 8)
        want = 4 * B * H * ((w + f) * (D + DV) + (D if w else 0))
        assert state.nbytes() == want
        held = (getattr(state, name) for name in CombinerLayer._FIELDS)
        assert sum(x.untyped_storage().nbytes() for x in held) == want
    whole = CombinerLayer(8)
    whole.attend(q, k, v)
    held = [getattr(whole, name) for name in CombinerLayer._FIELDS]
    assert sum(x.untyped_storage().nbytes() for x in held) == whole.nbytes() == want


def test_peak_is_far_below_dense_attention():
    def extra(attend, n):
        given = [torch.randn(1, 1, n, 16).requires_grad_() for _ in range(3)]
        dout = torch.randn(1, 1, n, 16)
        with Meter(inputs=(given, dout)) as meter:
            torch.autograd.grad(attend(*given), given, dout)
        return meter.peak - meter.base

    def plain(q, k, v):
        return dense(q, k, v, True)

    for variant in VARIANTS:
        found = extra(lambda q, k, v, x=variant: combiner_attention(q, k, v, variant=x), 2048)
        assert found <= 0.25 * extra(plain, 2048)


def llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}  # fmt: skip
    config = hf.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, **config)
    return hf.LlamaForCausalLM(config).eval()


def bert():
    torch.manual_seed(0)
    config = hf.BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4,
                           num_hidden_layers=2, vocab_size=64)  # fmt: skip
    return hf.BertModel(config).eval()


@pytest.mark.parametrize("build", [llama, bert])
def test_one_segment_in_a_stock_model_is_the_model(build):
    model = build()
    ids, valid = torch.randint(64, (2, 20)), torch.ones(2, 20).long()
    valid[1, :7] = 0
    want = model(ids, attention_mask=valid)[0]
    model.config.combiner = {"segment": 20}
    with use(model, "combiner"):
        got = model(ids, attention_mask=valid)[0]
        model.config.combiner = {"segment": 3}
        assert not torch.allclose(model(ids, attention_mask=valid)[0], got, atol=1e-3)
    torch.testing.assert_close(got[valid == 1], want[valid == 1], atol=1e-5, rtol=0)
    assert torch.equal(model(ids, attention_mask=valid)[0], want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_says_how_and_is_saved(variant, tmp_path):
    model = llama()
    ids = torch.randint(64, (1, 20))
    model.config.combiner = {"segment": 3, "variant": variant, "pool": "mean"}
    with use(model, "combiner"):
        want = model(ids).logits
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with use(again, "combiner"):
        assert torch.equal(again(ids).logits, want)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_with_a_state_equals_reading_everything_again(options):
    model = llama()
    model.config.combiner = {"segment": 4}
    ids = torch.randint(1, 64, (2, 11))
    settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **options}
    with use(model, "combiner"):
        want = model.generate(ids, use_cache=False, **settings)
        cache = CombinerCache(model.config)
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), want)
        # The last token is chosen, not read; prompts are repeated for beams.
        rows = 2 * options.get("num_beams", 1)
        assert cache.get_seq_length() == 24
        assert cache.nbytes() == 2 * 4 * rows * 2 * 6 * (8 + 8)
        cache.reset()
        assert cache.nbytes() == cache.get_seq_length() == 0
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), want)


def test_what_a_model_cannot_do_is_refused():
    model, ids = llama(), torch.randint(64, (2, 9))
    valid = torch.ones(2, 9).long()
    valid[1, :2] = 0
    with pytest.raises(UsageError, match=r"config.combiner is \{\}; a state needs"):
        CombinerCache(model.config)
    model.config.combiner = {"segment": 4, "variant": "log"}
    with pytest.raises(UsageError, match="the variant 'fixed'"):
        CombinerCache(model.config)
    model.config.combiner = {"segment": 4}
    with pytest.raises(UsageError, match=r"this model uses another one; switch it by use\(model"):
        model(ids, past_key_values=CombinerCache(model.config))
    with use(model, "combiner"):
        with pytest.raises(UsageError, match=r"pass past_key_values=CombinerCache\(model.config\)"):
            model.generate(ids, max_new_tokens=2)
        with pytest.raises(UsageError, match="this batch has padding"):
            model(ids, attention_mask=valid, past_key_values=CombinerCache(model.config))
        model(ids, past_key_values=CombinerCache(model.config))
    config = hf.MistralConfig(**{**llama().config.to_diff_dict(), "sliding_window": 4})
    mistral = hf.MistralForCausalLM(config)
    with use(mistral, "combiner"), pytest.raises(UsageError, match="hides keys by a window"):
        mistral(ids)


def test_bad_input():
    q, k, v = tensors(9)
    with pytest.raises(UsageError, match="segment=0 holds no token; use 1 or more"):
        combiner_attention(q, k, v, segment=0)
    with pytest.raises(UsageError, match="unknown variant 'fix'; nearest known: fixed"):
        combiner_attention(q, k, v, variant="fix")
    with pytest.raises(UsageError, match="unknown pool 'min'"):
        combiner_attention(q, k, v, pool="min")
    with pytest.raises(UsageError, match=r"expected \(B,Hq,n,d\), \(B,H,n,d\)"):
        combiner_attention(q[:, :, :3], k, v)
    with pytest.raises(UsageError, match=r"valid is torch.bool \(2, 3\); expected bool \(2, 9\)"):
        combiner_attention(q, k, v, valid=torch.ones(2, 3, dtype=torch.bool))
