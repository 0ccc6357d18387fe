"""Stock models under "chunked" equal themselves under their own attention."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from holdfast.checks import tinylm
from holdfast.context.attention import chunked
from holdfast.context.interface import use
from holdfast.errors import UsageError
from holdfast.meter import Meter

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def same(model, inputs, *, of=lambda out: out.logits, at=slice(None)):
    """Outputs, and gradients of their square, with the model's own attention and with ours."""
    found = []
    for name in (None, chunked.NAME):
        switched = None if name is None else use(model, name)
        model.zero_grad()
        out = of(model(**inputs))[at]
        out.square().mean().backward()
        found.append((out, [p.grad for p in model.parameters() if p.grad is not None]))
        if switched is not None:
            switched.remove()
    (want, want_grads), (out, grads) = found
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert len(grads) == len(want_grads) > 0
    for x, y in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def padded(length=37, left=11):
    ids = torch.randint(64, (2, length))
    valid = torch.ones_like(ids)
    valid[0, :left] = 0
    return {"input_ids": ids, "attention_mask": valid}, valid.bool()


@pytest.mark.parametrize("heads", [4, 2])
def test_llama_and_its_gradients(heads):
    model = tinylm.model(num_key_value_heads=heads)
    same(model, {"input_ids": torch.randint(128, (2, 70))})


def test_llama_with_left_padding():
    inputs, valid = padded()
    same(tinylm.model(), inputs, at=valid)
    # Rows of padding see nothing: they must not spoil gradients either.
    model = tinylm.model()
    with use(model, chunked.NAME):
        model(**inputs).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_generate_with_left_padding():
    inputs, _ = padded()
    model = tinylm.model().eval()
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    wants = [model.generate(**inputs, **options, num_beams=beams) for beams in (1, 3)]
    with use(model, chunked.NAME):
        for beams, want in zip((1, 3), wants, strict=True):
            assert torch.equal(model.generate(**inputs, **options, num_beams=beams), want)


@pytest.mark.parametrize("pad", [False, True])
def test_mistral_with_a_sliding_window(pad):
    model = MistralForCausalLM(
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8, attention_dropout=0.0)
    )
    inputs, valid = padded()
    if pad:
        same(model, inputs, at=valid)
    else:
        same(model, {"input_ids": inputs["input_ids"]})
    model.eval()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**inputs, **options)
    with use(model, chunked.NAME):
        assert torch.equal(model.generate(**inputs, **options), want)


def test_bert_with_padding():
    model = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
    inputs, valid = padded()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    same(model, inputs, of=lambda out: out.last_hidden_state, at=valid.flip(1))


def test_t5_whose_scores_have_a_bias():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    inputs, _ = padded()
    same(model, inputs | {"decoder_input_ids": torch.randint(64, (2, 9))})


def test_scores_that_are_capped_are_refused():
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2))
    with use(model, chunked.NAME), pytest.raises(UsageError, match=r"softcap.*its own"):
        model(input_ids=torch.randint(64, (1, 5)))


def test_dropout_follows_torchs_generator():
    model = tinylm.model(attention_dropout=0.3).train()
    ids = torch.randint(128, (2, 40))

    def gradients(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with use(model, chunked.NAME):
        first = gradients(1)
        assert torch.equal(gradients(1), first)
        assert not torch.allclose(gradients(2), first)
        # A block that is recomputed drops what it dropped before.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradients(1), first)
        model.gradient_checkpointing_disable()
        dropped = model(input_ids=ids).logits
        assert not torch.allclose(dropped, model(input_ids=ids).logits)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_training_holds_nothing_of_quadratic_size():
    def extra(n):
        model = tinylm.model(num_hidden_layers=1)
        valid = torch.ones(1, n, dtype=torch.long)
        valid[:, :5] = 0
        ids = torch.randint(128, (1, n))
        with use(model, chunked.NAME):
            for _ in range(2):
                with Meter(model, inputs=(ids, valid)) as meter:
                    model(input_ids=ids, attention_mask=valid, labels=ids).loss.backward()
                model.zero_grad()
        return meter.peak - meter.base

    # The mask exists one chunk of 512 at a time, so that twice the length is twice the bytes.
    assert extra(2048) < 2.1 * extra(1024)
