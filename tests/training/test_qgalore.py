import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from holdfast.errors import HoldfastError, UsageError
from holdfast.forms import Dense, Packed
from holdfast.training.optim import qgalore
from holdfast.training.optim.projector import Projector, leading, leading_ref
from holdfast.training.optim.qgalore import (
    METHOD,
    Int8Linear,
    Int8Weight,
    QGaLoreAdamW,
    group_of,
    int8_linear,
    state_bytes,
    trainable,
)


def matrix(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=g)


def low_rank(m, n, seed=0):
    """A matrix whose singular values halve from one to the next."""
    u, _ = torch.linalg.qr(matrix(m, min(m, n), seed))
    v, _ = torch.linalg.qr(matrix(n, min(m, n), seed + 1))
    return u @ torch.diag(0.5 ** torch.arange(min(m, n))) @ v.mT


@pytest.mark.parametrize("shape", [(50, 7), (3000, 33), (20, 20)])
def test_leading_subspace_is_the_svd_s(shape):
    g = low_rank(*shape)
    ours, svd = leading(g, 5), leading_ref(g, 5)
    torch.testing.assert_close((ours * svd).sum(1).abs(), torch.ones(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours @ ours.mT, torch.eye(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_projector_takes_the_smaller_side(shape):
    g = low_rank(*shape)
    low = Projector.fit(g, 3)
    assert low.basis.shape == (3, min(shape))
    assert sorted(low.down(g).shape) == sorted((3, max(shape)))
    # What three of the halving singular values leave over is about the fourth.
    assert (low.up(low.down(g)) - g).norm() == pytest.approx(0.125 * (4 / 3) ** 0.5, rel=0.05)


def test_a_gradient_that_is_not_finite_spreads_instead_of_raising():
    p = nn.Parameter(matrix(40, 33))
    optimizer = QGaLoreAdamW([p], rank=4)
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert p.isnan().all()


def galore_ref(weight, grads, lr, rank, gap, scale, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """GaLore with moments that follow the basis, everything dense, by the definition."""
    w, tall = weight.double(), weight.shape[0] >= weight.shape[1]
    w = w if tall else w.mT.clone()
    m = v = old = None
    for t, g in enumerate(grads):
        g = g.double() if tall else g.double().mT
        if t % gap == 0:
            basis = leading_ref(g, rank)
            if old is None:
                m, v = torch.zeros(len(w), rank).double(), torch.zeros(len(w), rank).double()
            else:
                m, v = m @ (old @ basis.T), v @ (old @ basis.T) ** 2
            old = basis
        h = g @ old.T
        m = betas[0] * m + (1 - betas[0]) * h
        v = betas[1] * v + (1 - betas[1]) * h * h
        mh, vh = m / (1 - betas[0] ** (t + 1)), v / (1 - betas[1] ** (t + 1))
        w = w * (1 - lr * decay) - lr * scale * (mh / (vh.sqrt() + eps)) @ old
    return (w if tall else w.mT).float()


class DenseGaLore(QGaLoreAdamW):
    @classmethod
    def basis_form(cls, columns):
        return Dense()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_equals_the_dense_reference(shape, monkeypatch):
    monkeypatch.setattr(qgalore, "MOMENTS", {"m": Dense(), "v": Dense()})
    grads = [low_rank(*shape, seed=3 * t) for t in range(7)]
    p = nn.Parameter(matrix(*shape))
    want = galore_ref(p.detach().clone(), grads, 0.1, 3, 2, 0.25, decay=0.1)
    optimizer = DenseGaLore([p], 0.1, rank=3, gap=2, cos=2, weight_decay=0.1)
    for g in grads:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), want, atol=1e-5, rtol=1e-4)
    assert optimizer.refreshes() == 4


@pytest.mark.parametrize("shape", [(5,), (3, 4, 6), (4, 9), (1, 1)])
def test_what_has_no_subspace_is_plain_adamw(shape):
    a, b = (
        nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)) for _ in "ab"
    )
    ours = QGaLoreAdamW([a], 0.01, rank=4, weight_decay=0.1)
    torchs = torch.optim.AdamW([b], 0.01, weight_decay=0.1)
    for t in range(5):
        a.grad = b.grad = torch.cos(torch.arange(a.numel()) + t).view(shape)
        ours.step()
        torchs.step()
    torch.testing.assert_close(a, b)


def test_a_group_without_rank_is_plain_adamw():
    p, q = nn.Parameter(matrix(40, 33)), nn.Parameter(matrix(40, 33))
    optimizer = QGaLoreAdamW([{"params": [p]}, {"params": [q], "rank": None}], rank=4)
    for x in (p, q):
        x.grad = matrix(40, 33, 1)
    optimizer.step()
    assert "schedule" in optimizer.state[p] and "exp_avg" in optimizer.state[q]


def test_weight_decay_acts_on_the_whole_weight():
    p = nn.Parameter(matrix(40, 33))
    want = p.detach() * (1 - 0.1 * 0.5)
    optimizer = QGaLoreAdamW([p], 0.1, rank=4, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), want)


@pytest.mark.parametrize(
    ("shape", "bytes_"),
    [
        # basis 16x64: 512 + 16 groups * 3; moments 96x16: 2 * (1536 + 6 * 4); schedule, step
        ((96, 64), 560 + 3120 + 32 + 4),
        # basis 16x37: 19 bytes a row + 16 groups * 3; moments 16x101: 2 * (1616 + 7 * 4)
        ((37, 101), 16 * 19 + 48 + 2 * (1616 + 28) + 32 + 4),
        ((101,), 2 * 404 + 4),
    ],
)
def test_state_bytes_are_the_formula(shape, bytes_):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = QGaLoreAdamW([p], rank=16)
    p.grad = torch.ones(shape)
    optimizer.step()
    state = optimizer.state[p].values()
    assert sum(t.untyped_storage().nbytes() for t in state) == bytes_
    assert state_bytes(shape, torch.float32, rank=16, gap=50) == bytes_


def refreshes_at(optimizer, p, grads):
    steps = []
    for t, g in enumerate(grads, start=1):
        before = optimizer.refreshes()
        p.grad = g
        optimizer.step()
        if optimizer.refreshes() > before:
            steps.append(t)
    return steps


def test_a_subspace_that_stays_is_refreshed_ever_less_often():
    planted = low_rank(40, 33)
    grads = [planted * (1 + 0.01 * t) for t in range(40)]
    ours, galore = (
        refreshes_at(QGaLoreAdamW([p], rank=4, gap=2, cos=cos), p, grads)
        for p, cos in ((nn.Parameter(matrix(40, 33)), 0.4), (nn.Parameter(matrix(40, 33)), 2))
    )
    assert galore == list(range(1, 41, 2))
    # Five cosines exist after the sixth refresh; from then on the gap doubles each time.
    assert ours == [1, 3, 5, 7, 9, 11, 15, 23, 39]


def test_subspaces_that_change_keep_their_gap():
    grads = [matrix(60, 50, seed=t) for t in range(20)]
    p = nn.Parameter(matrix(60, 50))
    assert refreshes_at(QGaLoreAdamW([p], rank=4, gap=2), p, grads) == list(range(1, 21, 2))


def test_flipped_signs_of_singular_vectors_do_not_matter(monkeypatch):
    planted = low_rank(40, 33)
    runs = []
    for flip in (False, True):
        p = nn.Parameter(matrix(40, 33))
        optimizer = DenseGaLore([p], rank=4, gap=2)
        monkeypatch.setattr(qgalore, "MOMENTS", {"m": Dense(), "v": Dense()})
        calls = iter(range(100))

        def flipping(g, rank, calls=calls, flip=flip):
            return leading(g, rank) * (-1) ** (next(calls) * flip)

        with monkeypatch.context() as patch:
            patch.setattr("holdfast.training.optim.projector.leading", flipping)
            steps = refreshes_at(optimizer, p, [planted] * 20)
        runs.append((steps, p.detach().clone()))
    assert runs[0][0] == runs[1][0] == [1, 3, 5, 7, 9, 11, 15]
    torch.testing.assert_close(runs[0][1], runs[1][1])


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 40))


def train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        x = matrix(16, 64, seed=t)
        optimizer.zero_grad()
        (model(x) - x[:, :40]).square().mean().backward()
        optimizer.step()


def everything(model, optimizer):
    found = [t for s in optimizer.state.values() for t in s.values()]
    for p in model.parameters():
        found += p.buffers.values() if isinstance(p, Packed) else [p.detach()]
    return [t.clone() for t in found]


def test_resume_is_bitwise_with_gaps_queue_and_rounding():
    def build():
        model = int8_linear(small_model())
        return model, QGaLoreAdamW(model.parameters(), 0.01, rank=8, gap=1, cos=0.0)

    model, optimizer = build()
    train(model, optimizer, 8)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 9, start=8)
    want = everything(model, optimizer)
    assert max(s["schedule"][0] for s in optimizer.state.values() if "schedule" in s) > 1

    file.seek(0)
    again, resumed = build()
    again.load_state_dict(weights)
    resumed.load_state_dict(torch.load(file))
    torch.rand(7)  # another global random state
    train(again, resumed, 9, start=8)
    got = everything(again, resumed)
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_step_param_is_step():
    one, two = small_model(), small_model()
    a = QGaLoreAdamW(one.parameters(), rank=8)
    b = QGaLoreAdamW(two.parameters(), rank=8)

    def consume(p):
        b.step_param(p)
        p.grad = None

    for p in two.parameters():
        p.register_post_accumulate_grad_hook(consume)
    train(one, a, 3)
    for t in range(3):
        x = matrix(16, 64, seed=t)
        (two(x) - x[:, :40]).square().mean().backward()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("pack", [False, True])
def test_fake_tensors_trace_the_step_with_the_same_bytes(pack):
    model = int8_linear(small_model()) if pack else small_model()
    optimizer = QGaLoreAdamW(model.parameters(), rank=8)
    train(model, optimizer, 2)
    want = [(t.shape, t.dtype) for s in optimizer.state.values() for t in s.values()]
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 40))
        fake = int8_linear(fake) if pack else fake
        traced = QGaLoreAdamW(fake.parameters(), rank=8)
        for _ in range(2):
            fake(torch.zeros(16, 64)).sum().backward()
            traced.step()
    assert [(t.shape, t.dtype) for s in traced.state.values() for t in s.values()] == want


@pytest.mark.parametrize("group", [None, 32])
def test_stochastic_rounding_is_unbiased_to_the_ends_of_a_group(group):
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    form, draws = Int8Weight(group=group), 10_000
    g = torch.Generator().manual_seed(1)
    # Rows are rounded independently, so that many copies are as many draws.
    packed = form.encode(w.repeat(draws, 1), generator=g)
    got = packed.dequantize().view(draws, 4, 64)
    error = got.double().std(0) / draws**0.5
    assert ((got.double().mean(0) - w).abs() <= 4 * error + 1e-6).all()
    step = packed.buffers["scale"].max()
    assert (got - w).abs().max() <= step * 1.0001
    assert error.max() > 0  # it does draw


def test_small_updates_stall_with_nearest_rounding_only():
    def moved(rounding):
        linear = nn.Linear(64, 48, bias=False)
        with torch.no_grad():
            linear.weight.copy_(matrix(48, 64))
        form = Int8Weight(group=64, rounding=rounding)
        start = form.encode(linear.weight.detach(), generator=torch.Generator().manual_seed(0))
        before = start.dequantize()
        p = trainable(start)
        optimizer = QGaLoreAdamW([p], lr=1e-3, rank=4)  # steps of 2.5e-4; codes are 2e-2 apart
        g = low_rank(48, 64)
        for _ in range(80):
            p.grad = g
            optimizer.step()
        change = p.dequantize() - before
        return torch.cosine_similarity(change.flatten(), -g.flatten(), dim=0), change.norm()

    near, stochastic = moved("nearest"), moved("stochastic")
    assert stochastic[0] > 0.2 and stochastic[1] > 2 * near[1]


def test_int8_linear_computes_with_the_rounded_weight_and_gives_it_a_gradient():
    model = small_model().requires_grad_(True)
    dense = copy.deepcopy(model)
    int8_linear(model)
    assert type(model[0]) is Int8Linear and model[0].weight.requires_grad
    with torch.no_grad():
        for lean, plain in ((model[0], dense[0]), (model[2], dense[2])):
            rounded = lean.weight.dequantize()
            step = lean.weight.buffers["scale"].max()
            assert (rounded - plain.weight).abs().max() <= step / 2 * 1.001
            plain.weight.copy_(rounded)
    x = matrix(3, 64).view(1, 3, 64).requires_grad_()
    results = []
    for net in (model, dense):
        y = net(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    kept = model[0].weight.nbytes_packed
    assert kept == 64 * 96 + 96 * 5  # one group of 64 per row
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
    with pytest.raises(HoldfastError, match="no double backward"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_int8_conv1d_computes_with_the_rounded_weight_and_gives_it_a_gradient():
    torch.manual_seed(0)
    dense = nn.Sequential(Conv1D(96, 64), nn.GELU(), Conv1D(40, 96))
    model = int8_linear(copy.deepcopy(dense))
    with torch.no_grad():
        for lean, plain in ((model[0], dense[0]), (model[2], dense[2])):
            assert lean.weight.shape == plain.weight.shape
            plain.weight.copy_(lean.weight.dequantize())
    x = matrix(6, 64).view(2, 3, 64).requires_grad_()
    results = []
    for net in (model, dense):
        y = net(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0),
        OPTConfig(**_SMALL, ffn_dim=64, word_embed_proj_dim=32, vocab_size=64, dropout=0.0),
        LlamaConfig(**_SMALL, intermediate_size=64, vocab_size=64),
        ViTConfig(**_SMALL, intermediate_size=64, image_size=16, patch_size=8),
    ],
    ids=lambda config: config.model_type,
)
def test_int8_weights_in_a_subspace_train_any_architecture(config):
    torch.manual_seed(0)
    if config.model_type == "vit":
        model = ViTForImageClassification(config)
        batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 0, 1])}
    else:
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.arange(48).view(3, 16)
        batch = {"input_ids": ids, "labels": ids}
    model = int8_linear(model)
    packed = sum(isinstance(p, Packed) for p in model.parameters())
    assert packed >= 8
    optimizer = QGaLoreAdamW(model.parameters(), 4e-2, rank=4)
    losses = []
    for _ in range(16):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert sum(isinstance(p, Packed) for p in model.parameters()) == packed


def test_int8_linear_leaves_the_head_and_shared_weights():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = int8_linear(LlamaForCausalLM(config))
    packed = [n for n, p in model.named_parameters() if isinstance(p, Packed)]
    assert len(packed) == 7 and not any("head" in n or "embed" in n for n in packed)
    optimizer = QGaLoreAdamW(model.parameters(), 1e-2, rank=4)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(UsageError, match=r"no nn\.Linear or Conv1D"):
        int8_linear(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_groups_divide_any_row():
    assert [group_of(n) for n in (4096, 176, 257, 7, 1000)] == [256, 176, None, None, 250]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"gap": 0}, "gap=0 must be >= 1"),
        ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
        ({"betas": (0.9, 1.0)}, "betas="),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(UsageError, match=message):
        QGaLoreAdamW([nn.Parameter(torch.zeros(3))], **bad)


def test_method_steps():
    model = small_model()
    optimizer = METHOD.apply(list(model.named_parameters()), 1e-2, rank=8)
    train(model, optimizer, 2)
    for p in model.parameters():
        kept = sum(t.untyped_storage().nbytes() for t in optimizer.state[p].values())
        assert kept == METHOD.state_bytes(tuple(p.shape), p.dtype, rank=8)
