"""Attention Transition: which weights move where, in stock models."""

import types

import pytest
import torch
import transformers as hf

from holdfast.context.attention.attention_transition import (
    NAME,
    AttentionTransition,
    Edit,
    attach,
    attend,
    transition_,
)
from holdfast.context.interface import Visible, use
from holdfast.context.kernels import attention_with_lse
from holdfast.errors import UsageError
from holdfast.meter import Meter

LAYERS = 5
SHORT = AttentionTransition(tail=12)


def module(layer, layers=LAYERS):
    return types.SimpleNamespace(
        layer_idx=layer, config=types.SimpleNamespace(num_hidden_layers=layers)
    )


def tensors(n, batch=2, dtype=torch.float32, heads=(4, 2), d=8):
    q, k = (torch.randn(batch, h, n, d, dtype=dtype) for h in heads)
    return 2 * q, k, torch.randn(batch, heads[1], n, d, dtype=dtype)


def weights_of(q, k, layer, options=SHORT, visible=None, layers=LAYERS, scaling=0.3):
    """(B,Hq,n,m): with the identity for values, the output is the weights."""
    m = k.shape[2]
    eye = torch.eye(m, dtype=k.dtype).expand(*k.shape[:2], m, m)
    visible = visible or Visible(row=m - q.shape[2])
    return attend(module(layer, layers), q, k, eye, visible, scaling=scaling, options=options)[
        0
    ].transpose(1, 2)


def reference(p, layer, options, layers=LAYERS):
    """One head's causal weights (n,n), number by number."""
    n = len(p)
    out = p.clone()
    for (first, last), (left, right), threshold in options.edits(n, layer, layers):
        for i in range(first, last):
            block = [j for j in range(left, right) if j <= i]
            if not any(p[i, j] > threshold for j in block):
                continue
            kept = [float(w) if w >= threshold else 0.0 for w in p[i]]
            moved = float(p[i].sum()) - sum(kept)
            shares = {j: options.strong if p[i, j] >= threshold else options.weak for j in block}
            for j in block:
                kept[j] += moved * options.factor * shares[j] / sum(shares.values())
            out[i] = torch.tensor(kept, dtype=p.dtype)
    return out


def plain_weights(q, k, scaling=0.3):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    n = q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (q @ k.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)


def test_edits_by_hand():
    options = AttentionTransition()
    # 138 - 5 - 3 - 50 = 80 tokens in 4 + 3 blocks of 12; for the tail 85 tokens in blocks of 13.
    assert list(options.edits(138, 0, 4)) == [Edit((44, 56), (8, 20), 0.5 / 39)]
    assert list(options.edits(138, 1, 4)) == [
        Edit((56, 68), (20, 32), 0.5 / 51),
        Edit((88, 138), (42, 55), 0.5 / 88),
    ]
    assert list(options.edits(138, 3, 4)) == []
    assert list(options.edits(58, 1, 4)) == []
    quarter = AttentionTransition(divide=4)
    assert next(iter(quarter.edits(200, 1, 4))) == next(iter(options.edits(200, 1, 4)))


def test_a_row_by_hand():
    p = torch.tensor([0.5, 0.02, 0.3, 0.04, 0.14]).view(1, 1, 1, 5)
    columns, seen = torch.tensor([2, 3]), torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert transition_(p, columns, seen, 0.1, AttentionTransition()).all()
    # 0.06 moves, 100 : 5 to the key above the threshold.
    want = torch.tensor([0.5, 0, 0.3 + 0.06 * 100 / 105, 0.06 * 5 / 105, 0.14])
    torch.testing.assert_close(p.flatten(), want)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("options", [SHORT, AttentionTransition(divide=4, factor=5.0, begin=0)])
def test_equals_the_reference(layer, options):
    q, k, _ = tensors(70, dtype=torch.float64)
    got, plain = weights_of(q, k, layer, options), plain_weights(q, k)
    want = torch.stack([reference(p, layer, options) for p in plain.flatten(0, 1)]).view_as(got)
    torch.testing.assert_close(got, want)
    assert torch.equal(got == 0, want == 0)
    assert (layer == LAYERS - 1) == torch.allclose(got, plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    q, k, v = tensors(70)
    valid = torch.ones(2, 70, dtype=torch.bool)
    real = slice(9, 70) if side == "left" else slice(0, 61)
    valid[1] = False
    valid[1, real] = True
    for layer in range(LAYERS):
        args = {"scaling": 0.3, "options": SHORT}
        out, _ = attend(module(layer), q, k, v, Visible(valid), **args)
        for row, part in ((0, slice(0, 70)), (1, real)):
            alone = (x[row : row + 1, :, part] for x in (q, k, v))
            want, _ = attend(module(layer), *alone, Visible(), **args)
            torch.testing.assert_close(out[row : row + 1, part], want)
        # Queries that are padding are not edited either.
        plain = attention_with_lse(q, k, v, mask=Visible(valid).mask, scale=0.3)[0].transpose(1, 2)
        assert torch.equal(out[~valid], plain[~valid])


def test_nothing_moves_below_a_threshold_of_0_or_in_short_texts():
    for n, options in ((70, AttentionTransition(threshold=0.0)), (20, SHORT)):
        q, k, v = tensors(n)
        plain = attention_with_lse(q, k, v, mask=Visible().mask, scale=0.3)[0].transpose(1, 2)
        for layer in range(LAYERS):
            out, _ = attend(module(layer), q, k, v, Visible(), scaling=0.3, options=options)
            assert torch.equal(out, plain)


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_sums_and_rows_that_stay(factor):
    q, k, v = tensors(70)
    options = AttentionTransition(tail=12, factor=factor)
    got = weights_of(q, k, 2, options)
    plain = attention_with_lse(q, k, v, mask=Visible().mask, scale=0.3)[0].transpose(1, 2)
    out, _ = attend(module(2), q, k, v, Visible(), scaling=0.3, options=options)
    edited = torch.zeros(70, dtype=torch.bool)
    for edit in options.edits(70, 2, LAYERS):
        edited[slice(*edit.rows)] = True
    assert torch.equal(out[:, ~edited], plain[:, ~edited])
    assert (out[:, edited] != plain[:, edited]).any(-1).float().mean() > 0.5
    assert not got.triu(1).any()
    if factor == 1:
        torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, 70))
    else:
        assert (got[:, :, edited].sum(-1) >= 1 - 1e-5).all()
        assert got[:, :, edited].sum(-1).mean() > 1.01


def test_blocks_that_reach_past_the_tail_stay_causal():
    # So many layers that blocks of one token lie among the last rows.
    for layer in range(41):
        q, k, _ = tensors(40, 1)
        got = weights_of(q, k, layer, SHORT, layers=42)
        assert not got.triu(1).any()
        torch.testing.assert_close(got.sum(-1), torch.ones(1, 4, 40))


def test_later_queries_get_the_edits_of_the_tail():
    q, k, v = tensors(70)
    for layer in range(LAYERS):
        args = {"scaling": 0.3, "options": SHORT}
        whole, _ = attend(module(layer), q, k, v, Visible(), **args)
        for count in (1, 5, 12):
            later = Visible(row=70 - count)
            out, _ = attend(module(layer), q[:, :, -count:], k, v, later, **args)
            torch.testing.assert_close(out, whole[:, -count:])
        # More queries than the tail, behind a cached key: blocks are left alone.
        out, _ = attend(module(layer), q[:, :, 1:], k, v, Visible(row=1), **args)
        plain = attention_with_lse(q, k, v, mask=Visible().mask, scale=0.3)[0].transpose(1, 2)
        torch.testing.assert_close(out[:, :57], plain[:, 1:58])
        torch.testing.assert_close(out[:, 57:], whole[:, 58:])


def test_keys_of_a_cache_that_are_still_empty_are_left_out():
    q, k, v = tensors(70)
    for x in (k, v):
        x[:, :, 60:] = torch.nan
    args = {"scaling": 0.3, "options": SHORT}
    want, _ = attend(module(2), q[:, :, :60], k[:, :, :60], v[:, :, :60], Visible(), **args)
    k, v = (x.nan_to_num() for x in (k, v))
    got, _ = attend(module(2), q[:, :, :60], k, v, Visible(), **args)
    torch.testing.assert_close(got, want)


def test_gradients_are_those_of_the_edited_weights():
    given = [x.double().requires_grad_() for x in tensors(70)]
    dout = torch.randn(2, 70, 4, 8, dtype=torch.float64)

    def loss(*given):
        out, _ = attend(module(2), *given, Visible(), scaling=0.3, options=SHORT)
        return (out * dout).sum()

    grads = torch.autograd.grad(loss(*given), given)
    with torch.no_grad():
        step = [1e-6 * torch.randn_like(x) for x in given]
        up, down = (
            loss(*(x + sign * s for x, s in zip(given, step, strict=True))) for sign in (1, -1)
        )
    slope = sum((g * s).sum() for g, s in zip(grads, step, strict=True))
    torch.testing.assert_close((up - down) / 2, slope, rtol=1e-4, atol=0)


def test_half_precision():
    q, k, v = (x.bfloat16() for x in tensors(70))
    out, _ = attend(module(2), q, k, v, Visible(), scaling=0.3, options=SHORT)
    want, _ = attend(
        module(2), q.float(), k.float(), v.float(), Visible(), scaling=0.3, options=SHORT
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, atol=0.03, rtol=0.03)


def test_temporary_bytes():
    n, layer = 600, 2
    given = tensors(n)
    options = AttentionTransition()

    def peak(layer):
        call = lambda: attend(module(layer), *given, Visible(), scaling=0.3, options=options)  # noqa: E731
        call()
        with Meter(inputs=given) as meter:
            call()
        return meter.peak - meter.base

    inner, outer = (e.rows[1] - e.rows[0] for e in options.edits(n, layer, LAYERS))
    formula = 6 * 2 * 4 * max(inner, outer) * n
    assert 0.7 * formula < peak(layer) - peak(LAYERS - 1) <= formula


def llama(layers=LAYERS, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(
        num_hidden_layers=layers, initializer_range=0.5, **sizes, **heads, **options
    )
    return hf.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_in_a_model():
    model = llama()
    ids = torch.randint(32, (2, 70))
    plain = model(ids).logits
    mask = torch.ones(2, 79, dtype=torch.long)
    mask[:, :9] = 0
    padded = torch.nn.functional.pad(ids, (9, 0))
    with attach(model, SHORT):
        edited = model(ids).logits
        behind = model(padded, attention_mask=mask).logits[:, 9:]
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not torch.allclose(edited, plain, atol=1e-3)
    torch.testing.assert_close(behind, edited, atol=1e-4, rtol=1e-4)
    assert generated.shape == (2, 73)
    assert torch.equal(model(ids).logits, plain)
    # By its name the model gets the standard options, which leave texts of 58 tokens alone.
    with use(model, NAME):
        short = model(ids[:, :58]).logits
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
    torch.testing.assert_close(short, plain[:, :58], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_two_models_keep_their_own_options():
    one, other = llama(), llama()
    other.load_state_dict(one.state_dict())
    ids = torch.randint(32, (1, 70))
    with attach(one, SHORT):
        first = one(ids).logits
        with attach(other, AttentionTransition(threshold=0.0)):
            assert torch.equal(one(ids).logits, first)
            torch.testing.assert_close(
                other(ids).logits, llama_logits(one, ids), atol=1e-4, rtol=1e-4
            )


def llama_logits(model, ids):
    plain = llama()
    plain.load_state_dict(model.state_dict())
    return plain(ids).logits


def test_models_that_cannot_be_edited():
    bert = hf.BertModel(
        hf.BertConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    ).eval()
    with attach(bert), pytest.raises(UsageError, match=r"attention to both sides.*causal model"):
        bert(torch.zeros(1, 70, dtype=torch.long))
    model = llama(attention_dropout=0.1)
    with attach(model):
        with pytest.raises(UsageError, match=r"call model.eval\(\)"):
            model.train()(torch.zeros(1, 70, dtype=torch.long))
        given = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
        with pytest.raises(UsageError, match=r"4-D attention mask.*2-D attention_mask"):
            model.eval()(torch.zeros(1, 70, dtype=torch.long), attention_mask=given)
    q, k, v = tensors(70)
    nameless = types.SimpleNamespace(config=module(0).config)
    with pytest.raises(UsageError, match="layer_idx"):
        attend(nameless, q, k, v, Visible(), scaling=0.3)


def test_a_model_with_its_own_attention_alone_is_refused():
    config = hf.GPTNeoConfig(
        vocab_size=32, hidden_size=16, num_layers=2, attention_types=[[["global"], 2]], num_heads=2
    )
    with pytest.raises(UsageError, match="does not let its attention be replaced"):
        attach(hf.GPTNeoForCausalLM(config))


@pytest.mark.parametrize(
    "options",
    [{"begin": -1}, {"tail": 0}, {"divide": 1}, {"threshold": -0.1}, {"factor": -1}, {"weak": 0}],
)
def test_options_out_of_range(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name}={options[name]}.* 0"):
        AttentionTransition(**options)
