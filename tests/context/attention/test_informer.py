"""Informer: ProbSparse attention against its reference, and the forecaster's shapes and errors."""

import math

import pytest
import torch
import transformers as hf

from holdfast.context.attention import probsparse
from holdfast.context.attention.informer import InformerForecaster
from holdfast.context.attention.probsparse import (
    logarithmic,
    probsparse_attention,
    probsparse_attention_ref,
)
from holdfast.context.interface import use
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal
from holdfast.errors import UsageError
from holdfast.meter import Meter

SMALL = {"d_model": 16, "heads": 2, "d_ff": 32, "factor": 1}


def tensors(n, m=None, *, heads=(4, 2), d=8, dtype=torch.float32, grad=False):
    shapes = (2, heads[0], n, d), (2, heads[1], m or n, d), (2, heads[1], m or n, d + 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def forecaster(columns=3, **options):
    sizes = {"seq_len": 24, "label_len": 8, "pred_len": 6}
    return InformerForecaster(columns, 2, **{**sizes, **SMALL, **options})


def inputs(model, batch=2):
    return (
        torch.randn(batch, model.seq_len, model.columns),
        torch.rand(batch, model.seq_len, 2),
        torch.rand(batch, model.pred_len, 2),
    )


@pytest.mark.parametrize("n,m", [(150, 150), (37, 61), (1, 5)])
@pytest.mark.parametrize("norm", ["sample", "L_K"])
def test_equals_the_reference(n, m, norm):
    q, k, v = tensors(n, m, dtype=torch.float64)
    for seed in range(3):
        got = probsparse_attention(q, k, v, factor=2, norm=norm, seed=seed)
        want = probsparse_attention_ref(q, k, v, factor=2, norm=norm, seed=seed)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lazy", ["mean", "sum"])
@pytest.mark.parametrize("n", [2, 140])
def test_causal_equals_the_reference(n, lazy):
    q, k, v = tensors(n, dtype=torch.float64)
    got = probsparse_attention(q, k, v, factor=2, causal=True, lazy=lazy, scale=0.5)
    want = probsparse_attention_ref(q, k, v, factor=2, causal=True, lazy=lazy, scale=0.5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_the_reference(causal):
    given = tensors(30, dtype=torch.float64, grad=True)
    weight = torch.randn(2, 4, 30, 10, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((f(*given, factor=2, causal=causal) * weight).sum(), given)
        for f in (probsparse_attention, probsparse_attention_ref)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask", [None, Causal()])
def test_enough_queries_are_dense_attention(mask):
    q, k, v = tensors(40)
    got = probsparse_attention(q, k, v, factor=10, causal=mask is not None)
    assert torch.equal(got, attention_with_lse(q, k, v, mask=mask)[0])


def test_idle_queries_read_the_mean_and_the_others_attend():
    q, k, v = tensors(200)
    out, dense = probsparse_attention(q, k, v), attention_with_lse(q, k, v)[0]
    mean = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out)
    idle = (out == mean).all(-1)
    assert (idle.sum(-1) == 200 - 5 * math.ceil(math.log(200))).all()
    torch.testing.assert_close(out[~idle], dense[~idle])


def test_a_planted_query_is_chosen():
    q, k, v = torch.zeros(3, 1, 1, 64, 4).unbind()
    k[..., 0], v[..., 1] = torch.arange(64.0), torch.arange(64.0)
    q[0, 0, 17, 0] = 100.0
    out = probsparse_attention(q, k, v, factor=1)
    assert out[0, 0, 17, 1] == 63  # all others score alike: their output is the mean anyway


def test_scores_are_those_of_the_chosen_queries(monkeypatch):
    seen = []

    def spy(q, k, *args, **options):
        seen.append((q.shape[2], k.shape[2]))
        return attention_with_lse(q, k, *args, **options)

    monkeypatch.setattr(probsparse, "attention_with_lse", spy)
    probsparse_attention(*tensors(300, 200))
    assert seen == [(5 * 6, 200)]


def test_a_seed_decides_the_sample():
    q, k, v = tensors(120)
    a, b, c = (probsparse_attention(q, k, v, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_padding_is_neither_sampled_nor_read_nor_chosen():
    q, k, v = tensors(90)
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[0, :30] = valid[1, 50:] = False
    for x in (q, k, v):
        x.mT.masked_fill_(~valid[:, None, None], 1e4)
    out = probsparse_attention(q, k, v, valid=valid)
    dense = attention_with_lse(q, k, v, mask=valid[:, None, None])[0]
    for row in range(2):
        mean = v[row][:, valid[row]].mean(1, keepdim=True).repeat_interleave(2, 0)
        own, full = out[row][:, valid[row]], dense[row][:, valid[row]]
        idle = torch.isclose(own, mean, rtol=1e-4, atol=1e-4).all(-1)
        assert (idle.sum(-1) == valid[row].sum() - logarithmic(5, 90)).all()
        torch.testing.assert_close(own[~idle], full[~idle])


def test_half_precision_keeps_its_dtype():
    q, k, v = tensors(100, dtype=torch.bfloat16)
    for causal in (False, True):
        out = probsparse_attention(q, k, v, causal=causal)
        want = probsparse_attention_ref(q.float(), k.float(), v.float(), causal=causal)
        assert out.dtype == torch.bfloat16
        # Rounded scores may choose another query where two are close.
        assert (out - want).abs().amax(-1).lt(0.05).float().mean() > 0.95


def extra(n, call, d=32):
    given = [torch.randn(1, 2, n, d, requires_grad=True) for _ in range(3)]
    call(*given).sum().backward()
    for x in given:
        x.grad = None
    with Meter(inputs=given) as meter:
        call(*given).sum().backward()
    return meter.peak - meter.base


def test_memory_while_choosing_is_the_formula():
    n, d, h = 2048, 32, 2
    q, k = (torch.randn(1, h, n, d) for _ in range(2))
    sample = logarithmic(5, n)
    args = (q, k, 5, "sample", False, None, 0)
    probsparse._sparsity(*args)
    with Meter(inputs=(q, k)) as meter:
        probsparse._sparsity(*args)
    want = 4 * n * sample + 4 * h * n + 128 * sample * h * (4 * d + 8 + 4)
    # The chunk's queries, its places before they are told apart by head, and where heads begin.
    small = 4 * h * 128 * d + 8 * 128 * sample + 8 * (h + 1)
    assert meter.peak - meter.base == want + small


def test_saved_for_backward_is_the_formula():
    n, d, h = 1024, 32, 2
    given = [torch.randn(1, h, n, d, requires_grad=True) for _ in range(3)]
    u, saved = logarithmic(5, n), {}

    def keep(x):
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        probsparse_attention(*given)
    for x in given:
        saved.pop(x.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) == 4 * h * u * 2 * d + 4 * h * u + 8 * h * u


def test_memory_grows_as_n_log_n():
    small, large = extra(1024, probsparse_attention), extra(4096, probsparse_attention)
    assert large <= 4 * small * math.log(4096) / math.log(1024)


def test_shapes_that_do_not_go_together():
    q, k, v = tensors(8, heads=(3, 2))
    with pytest.raises(UsageError, match=r"\(2, 3, 8, 8\).*Hq a multiple of H"):
        probsparse_attention(q, k, v)


@pytest.mark.parametrize(
    "message,shape,options",
    [
        ("chooses no query", (8, 8), {"factor": 0}),
        ("norm='max'", (8, 8), {"norm": "max"}),
        ("lazy='zero'", (8, 8), {"lazy": "zero"}),
        ("8 queries to 9 keys: it is for whole", (8, 9), {"causal": True}),
        ("at least one of each", (0, 3), {}),
        (r"expected bool \(2, 8\)", (8, 8), {"valid": torch.ones(8, 8)}),
    ],
)
def test_errors_of_attention(message, shape, options):
    q, k = torch.zeros(2, 1, shape[0], 4), torch.zeros(2, 1, shape[1], 4)
    with pytest.raises(UsageError, match=message):
        probsparse_attention(q, k, k, **options)


def bert(**options):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights so large that attention is not almost uniform, as it is in a new model.
    config = hf.BertConfig(
        vocab_size=40, num_hidden_layers=2, initializer_range=0.5, **sizes, **options
    )
    return hf.BertModel(config, add_pooling_layer=False).eval()


def test_in_an_encoder():
    model = bert()
    short, long = torch.randint(40, (2, 15)), torch.randint(40, (2, 100))
    mask = torch.ones_like(short)
    mask[0, 10:] = 0
    want = model(short, attention_mask=mask).last_hidden_state
    plain = model(long).last_hidden_state
    with use(model, "probsparse"):
        got = model(short, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
        once, again = (model(long).last_hidden_state for _ in range(2))
    assert torch.equal(once, again) and not torch.allclose(once, plain, atol=1e-4)


def test_a_decoder_is_refused():
    model = bert(is_decoder=True)
    with use(model, "probsparse"), pytest.raises(UsageError, match="for encoders alone"):
        model(torch.randint(40, (1, 20)))


@pytest.mark.parametrize("attention", ["prob", "full"])
@pytest.mark.parametrize("stacks", [(1,), (3, 2, 1)])
def test_forecast_in_one_pass(attention, stacks):
    model = forecaster(stacks=stacks, attention=attention)
    lengths = []
    for encoder in model.encoders:
        encoder.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    out = model(*inputs(model))
    assert out.shape == (2, 6, 3)
    # Two, one and no distilling steps on 24, 12 and 6 steps.
    assert lengths == ([6, 6, 6] if len(stacks) == 3 else [24])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_odd_lengths_and_no_label():
    model = forecaster(seq_len=17, label_len=0, pred_len=5, stacks=(2,))
    assert model(*inputs(model)).shape == (2, 5, 3)


def test_evaluation_repeats_and_training_samples_anew():
    model = forecaster(seq_len=60, stacks=(1,), dropout=0.0)
    given = inputs(model)
    assert not torch.equal(model(*given), model(*given))
    torch.manual_seed(5)
    first = model(*given)
    torch.manual_seed(5)
    assert torch.equal(model(*given), first)
    model.eval()
    assert torch.equal(model(*given), model(*given))


def test_dense_where_every_query_is_chosen():
    model = forecaster(factor=50).eval()
    twin = forecaster(attention="full").eval()
    twin.load_state_dict(model.state_dict())
    given = inputs(model)
    assert torch.equal(model(*given), twin(*given))


def test_a_training_step_takes_n_log_n():
    def peak(n):
        model = forecaster(seq_len=n, label_len=n // 2, pred_len=n // 2, stacks=(3,))
        given = inputs(model, 1)
        model(*given).sum().backward()
        model.zero_grad()
        with Meter(model, inputs=given) as meter:
            model(*given).sum().backward()
        return meter.peak - meter.base

    assert peak(1024) <= 4 * peak(256) * math.log(1024) / math.log(256)


def test_forecast_in_half_precision():
    model = forecaster(seq_len=60).bfloat16().eval()
    given = [x.bfloat16() for x in inputs(model)]
    out = model(*given)
    want = model.float()(*(x.float() for x in given))
    assert out.dtype == torch.bfloat16 and (out - want).abs().mean() < 0.1 * want.abs().mean()


def test_a_constant_series_gives_numbers():
    model = forecaster()
    past, past_marks, future_marks = inputs(model)
    loss = model(torch.full_like(past, 3.0), past_marks, future_marks).square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_forecast_knows_no_future_value_but_all_marks():
    model = forecaster().eval()
    past, past_marks, future_marks = inputs(model)
    base = model(past, past_marks, future_marks)
    other = future_marks.clone()
    other[:, -1] += 1
    assert not torch.equal(model(past, past_marks, other), base)


@pytest.mark.parametrize(
    "message,options",
    [
        ("label_len=30, seq_len=24", {"label_len": 30}),
        ("pred_len=0", {"pred_len": 0}),
        ("d_model=15", {"d_model": 15}),
        ("multiple of heads=3", {"heads": 3}),
        ("each needs a layer", {"stacks": (2, 0)}),
        ("each needs a layer", {"stacks": (1,) * 6}),
        ("attention='sparse'", {"attention": "sparse"}),
    ],
)
def test_errors_of_the_forecaster(message, options):
    with pytest.raises(UsageError, match=message):
        forecaster(**options)


def test_wrong_shapes_name_what_was_expected():
    model = forecaster()
    past, past_marks, future_marks = inputs(model)
    with pytest.raises(UsageError, match=r"\(23, 3\).*expected \(24, 3\), \(24, 2\), \(6, 2\)"):
        model(past[:, 1:], past_marks, future_marks)
