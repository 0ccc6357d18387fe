"""The chunked loss is the model's own loss, in value, gradients and everything but bytes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from holdfast.errors import HoldfastError
from holdfast.meter import Meter
from holdfast.plan.models import resolve
from holdfast.training.loss import (
    IGNORE,
    can_chunk,
    causal_loss,
    chunk_loss_,
    chunked_cross_entropy,
    verify_chunked,
)

TOKENS, FEATURES, VOCABULARY = 37, 16, 50


def plain_ref(hidden, weight, targets, bias=None, softcap=None):
    logits = linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits.float(), targets, ignore_index=IGNORE)


def tensors(dtype=torch.float32, bias=True):
    hidden = torch.randn(TOKENS, FEATURES).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES).to(dtype).requires_grad_()
    offset = torch.randn(VOCABULARY).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[::5] = IGNORE
    return hidden, weight, offset, targets


def compare(hidden, weight, bias, targets, chunk, softcap, **tolerance):
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    want = plain_ref(hidden, weight, targets, bias, softcap)
    # A factor, because a loss is rarely the end of the graph.
    expected = torch.autograd.grad(3 * want, leaves)
    got = chunked_cross_entropy(hidden, weight, targets, chunk=chunk, bias=bias, softcap=softcap)
    assert got.dtype is torch.float32 and got.shape == ()
    torch.testing.assert_close(got, want, **tolerance)
    for ours, theirs in zip(torch.autograd.grad(3 * got, leaves), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 5, 36, 37, 38, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_equals_the_plain_loss(chunk, softcap):
    compare(*tensors(), chunk, softcap, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype, tolerance):
    # The reference also rounds logits to fp32 first: that bounds float64.
    compare(*tensors(dtype), 8, None, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, bias, targets = tensors()
    {"hidden": hidden, "weight": weight, "bias": bias}[frozen].requires_grad_(False)
    compare(hidden, weight, bias, targets, 8, None, atol=1e-6, rtol=1e-5)


def test_without_gradients():
    hidden, weight, bias, targets = (t.detach() for t in tensors())
    got = chunked_cross_entropy(hidden, weight, targets, chunk=8, bias=bias)
    torch.testing.assert_close(got, plain_ref(hidden, weight, targets, bias))
    assert not got.requires_grad


def test_a_batch_without_labels_is_zero_not_nan():
    hidden, weight, _, targets = tensors(bias=False)
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), chunk=8)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets = tensors(bias=False)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=8)
    factor = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss * factor, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_logits_of_one_chunk_exist_at_once():
    tokens, features, vocabulary, chunk = 512, 8, 2000, 64
    hidden = torch.randn(tokens, features, requires_grad=True)
    weight = torch.randn(vocabulary, features)
    targets = torch.randint(vocabulary, (tokens,))

    def peak(loss) -> int:
        loss().backward()
        hidden.grad = None
        with Meter(inputs=(hidden, weight, targets)) as meter:
            loss().backward()
            hidden.grad = None
        assert meter.end == meter.base
        return meter.peak - meter.base

    plain = peak(lambda: plain_ref(hidden, weight, targets))
    chunked = peak(lambda: chunked_cross_entropy(hidden, weight, targets, chunk=chunk))
    logits = 4 * tokens * vocabulary
    assert plain >= 2 * logits
    # Logits become their own gradient; reductions may hold one more copy of a chunk.
    few = 3 * logits * chunk // tokens + 3 * hidden.nbytes
    assert logits * chunk // tokens <= chunked <= few


def decoder(kind: str = "llama", **fields) -> nn.Module:
    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }  # fmt: skip
    return resolve({"model_type": kind, **small, **fields}).build("cpu")


def batch(labels: bool = True) -> dict:
    ids = torch.randint(64, (3, 21))
    targets = ids.clone()
    targets[0, :7] = IGNORE
    return {"input_ids": ids, "labels": targets} if labels else {"input_ids": ids}


MODELS = {
    "llama": lambda: decoder(num_key_value_heads=2),
    "tied": lambda: decoder(tie_word_embeddings=True),
    "gemma2-softcap": lambda: decoder(
        "gemma2", num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
    ),
    "frozen head": lambda: _frozen(decoder()),
    "head with bias": lambda: decoder("phi", partial_rotary_factor=0.5, resid_pdrop=0.0),
}  # fmt: skip


def _frozen(model: nn.Module) -> nn.Module:
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 10, 64])
def test_models_keep_their_loss(name, chunk):
    model, data = MODELS[name](), batch()
    assert can_chunk(model) is None
    want = model(**data).loss
    want.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    torch.testing.assert_close(causal_loss(model, data, chunk), want, atol=1e-6, rtol=1e-6)
    handle = chunk_loss_(model, chunk)
    model(**data).loss.backward()
    for n, p in model.named_parameters():
        if expected[n] is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, expected[n], atol=1e-6, rtol=1e-4)
    verify_chunked(model, data)
    assert model.training
    handle.remove()
    assert model(**data).loss == want


def test_calls_without_labels_return_logits():
    model, data = decoder(), batch(labels=False)
    want = model(**data).logits
    chunk_loss_(model, 8)
    assert torch.equal(model(**data).logits, want)


def test_the_trainer_divides_by_the_tokens_of_all_micro_batches():
    model, data = decoder(), batch()
    want = model(**data, num_items_in_batch=torch.tensor(200)).loss
    chunk_loss_(model, 8)
    got = model(**data, num_items_in_batch=torch.tensor(200)).loss
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_a_model_that_scales_its_logits_is_caught():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model, data = decoder(), batch()
    model.lm_head.__class__ = Scaled
    chunk_loss_(model, 8)
    with pytest.raises(HoldfastError, match=r"differs from the model's own.*set loss_chunk: 0"):
        verify_chunked(model, data)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: decoder("bert"), "only causal language models"),
        (lambda: decoder("cohere", logit_scale=0.5), r"scales its logits \(logit_scale\)"),
        (lambda: decoder("mixtral", num_local_experts=2), "router loss"),
        (lambda: nn.Linear(2, 2), "only causal language models"),
    ],
    ids=["encoder", "scaled", "experts", "module"],
)
def test_models_that_cannot_be_chunked_say_why(model, reason):
    with pytest.raises(AssertionError, match=reason):
        why = can_chunk(model())
        assert why is None, why


def test_a_head_in_half_precision_below_a_backbone_that_ends_in_fp32():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        hidden_size=32, num_heads=2, head_dim=32, n_groups=2, state_size=8, chunk_size=16,
        num_hidden_layers=2, vocab_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(config).to(torch.bfloat16)
    ids = torch.randint(128, (1, 12))
    plain = model(input_ids=ids, labels=ids).loss
    chunk_loss_(model, 4)
    chunked = model(input_ids=ids, labels=ids).loss
    chunked.backward()
    torch.testing.assert_close(chunked, plain, rtol=2e-2, atol=0, check_dtype=False)
