"""Attention functions plugged into stock models: masks, padding, switching back."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from holdfast.context.interface import Visible, register, use
from holdfast.context.kernels import attention_with_lse
from holdfast.errors import UsageError

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def attend(module, q, k, v, visible, *, scaling, dropout=0.0, **_):
    out, _ = attention_with_lse(q, k, v, mask=visible.mask, scale=scaling)
    return out.transpose(1, 2), None


def dense(module, q, k, v, visible, *, scaling, dropout=0.0, **_):
    mask = visible.dense(q.shape[0], q.shape[2], k.shape[2])
    out, _ = attention_with_lse(q, k, v, mask=mask, scale=scaling)
    return out.transpose(1, 2), None


register("test_attend", attend)
register("test_dense", dense)


def build(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)
        return LlamaForCausalLM(config).eval()
    if kind == "mistral":
        config = MistralConfig(
            **SIZES, intermediate_size=64, num_key_value_heads=2, sliding_window=5
        )
        return MistralForCausalLM(config).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    return BertModel(BertConfig(**SIZES, intermediate_size=64), add_pooling_layer=False).eval()


@pytest.mark.parametrize("name", ["test_attend", "test_dense"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "bert"])
def test_a_stock_model_computes_the_same(kind, name):
    model = build(kind)
    ids = torch.randint(64, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if kind != "bert":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    want = model(**given)[0][mask.bool()]
    with use(model, name):
        got = model(**given)[0][mask.bool()]
        assert model.config._attn_implementation == name
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_pieces_after_a_cache_equal_one_pass(kind):
    model = build(kind)
    ids = torch.randint(64, (2, 12))
    want = model(ids).logits
    with use(model, "test_attend"), torch.no_grad():
        cache = DynamicCache(config=model.config)
        got = [model(part, past_key_values=cache).logits for part in ids.split([7, 4, 1], 1)]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)


def test_generate_with_a_static_cache():
    model = build("llama")
    ids = torch.randint(1, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    options |= {"eos_token_id": None, "disable_compile": True}
    want = model.generate(ids, **options)
    with use(model, "test_attend"):
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)


def test_a_given_four_dimensional_mask_is_honoured():
    model = build("llama")
    ids = torch.randint(64, (1, 6))
    mask = torch.ones(6, 6).tril().bool()
    mask[4, 1:3] = False
    want = model(ids, attention_mask=mask[None, None]).logits
    added = torch.zeros(6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    with use(model, "test_attend"):
        for given in (mask, added):
            got = model(ids, attention_mask=given[None, None]).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        with pytest.raises(UsageError, match="is a bias; pass a bool mask"):
            model(ids, attention_mask=0.5 * mask[None, None].float())


def test_a_decoder_without_a_mask_is_causal_and_an_encoder_is_not():
    decoder, encoder = Visible(), Visible(sees=lambda b, h, i, j: j < 2)
    assert torch.equal(decoder.dense(1, 3, 3)[0, 0], torch.ones(3, 3).tril().bool())
    assert encoder.dense(1, 2, 3).tolist() == [[[[True, True, False]] * 2]]


def test_refusals_name_the_remedy():
    model = build("llama")
    with pytest.raises(UsageError, match=r"unknown attention 'test_atend'.*test_attend"):
        use(model, "test_atend")
    layer = model.model.layers[0].self_attn
    from transformers import AttentionInterface

    call = AttentionInterface()["test_attend"]
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(UsageError, match="LlamaAttention attends with softcap"):
        call(layer, q, q, q, None, softcap=30.0)
    with pytest.raises(UsageError, match=r"expected .B,m. with 1 for real tokens"):
        call(layer, q, q, q, torch.ones(2, 2))
