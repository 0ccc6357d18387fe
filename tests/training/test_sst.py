import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, PlanFile, Training
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.plan import Plan
from holdfast.training import adapters
from holdfast.training import checkpoint as files
from holdfast.training.data import DataSource
from holdfast.training.optim.sst import (
    FACTORS,
    SST,
    LorentzSpectralLinear,
    SpectralLinear,
    probabilities,
    spectral,
)
from holdfast.training.run import Run, Settings
from holdfast.training.saved import saved_bytes
from holdfast.training.step import StepInBackward

LLAMA = {
    "model_type": "llama", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
    "max_position_embeddings": 64,
}  # fmt: skip


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(kind, n=12, m=8):
    torch.manual_seed(0)
    return nn.Linear(n, m) if kind == "linear" else Conv1D(m, n)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))


def adamw(model, lr=0.02):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)


def step(model, optimizer, seed=0):
    x = matrix(9, 12, seed=seed)
    optimizer.zero_grad()
    loss = (model(x) - x[:, :6]).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("sides", [(12, 8), (8, 12), (9, 9)])
def test_from_linear_to_linear(kind, sides):
    old = linear(kind, *sides)
    layer = SpectralLinear.from_linear(old, 3)
    x = matrix(2, 5, sides[0])
    torch.testing.assert_close(layer(x), old(x), atol=1e-5, rtol=0)
    back = layer.to_linear()
    assert type(back) is type(old)
    torch.testing.assert_close(back.weight, old.weight, atol=1e-5, rtol=0)
    assert torch.equal(back.bias, old.bias)
    assert layer.sigma.tolist() == sorted(layer.sigma.tolist(), reverse=True)


def test_gradients_are_those_of_the_dense_weight_without_sigma():
    old = linear("linear")
    layer = SpectralLinear.from_linear(old, 3)
    x, gy = matrix(2, 5, 12), matrix(2, 5, 8, seed=1)
    results = []
    for module in (old, layer):
        inner = x.clone().requires_grad_()
        module(inner).backward(gy)
        results.append((inner.grad, module.bias.grad))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    dw = old.weight.grad
    u, v = (torch.cat([getattr(layer, n), getattr(layer, f"{n}_rest")]) for n in "uv")
    torch.testing.assert_close(layer.sigma.grad, (u @ dw @ v.mT).diagonal(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.u.grad, layer.v.detach() @ dw.mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.v.grad, layer.u.detach() @ dw, atol=1e-4, rtol=1e-4)
    assert layer.u_rest.grad is None and layer.v_rest.grad is None


def test_decomposition_and_swaps_leave_the_output():
    layer = SpectralLinear.from_linear(linear("linear"), 3)
    x, want = matrix(5, 12), None
    with torch.no_grad():
        layer.u.add_(matrix(3, 8) / 10)  # as training leaves it: no longer orthogonal
        want = layer(x)
        layer.activate_(torch.tensor([6, 1, 4]))
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=0)
        layer.decompose_()
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=0)
    u = torch.cat([layer.u, layer.u_rest])
    torch.testing.assert_close(u @ u.mT, torch.eye(8), atol=1e-5, rtol=0)


def test_activate_brings_exactly_what_was_chosen():
    layer = SpectralLinear.from_linear(linear("linear"), 3)
    u = torch.cat([layer.u, layer.u_rest]).detach()
    sigma = layer.sigma.detach().clone()
    layer.activate_(torch.tensor([7, 1, 4]))
    active = {tuple(row) for row in layer.u.tolist()}
    assert active == {tuple(u[i].tolist()) for i in (7, 1, 4)}
    assert sorted(layer.sigma[:3].tolist()) == sorted(sigma[[7, 1, 4]].tolist())
    assert sorted(layer.sigma.tolist()) == sorted(sigma.tolist())


def test_bytes_are_the_formula():
    m, n, r, b = 24, 40, 4, 4
    model = spectral(nn.Sequential(nn.Linear(n, m, bias=False)), r)
    optimizer = SST(model, torch.optim.AdamW(model.parameters(), 0.01, fused=True))
    x, q = matrix(10, n), min(m, n)

    def run():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    with Meter(model, optimizer, inputs=x) as meter:
        run()
    cells = meter.ledger.column("device", "step")
    assert cells["parameters"] == b * (q * (m + n) + q)
    assert cells["gradients"] == b * (r * (m + n) + q)
    assert cells["optimizer"] == 2 * b * (r * (m + n) + q) + 3 * 4
    assert cells["buffers"] == 8
    assert meter.end == meter.base
    assert saved_bytes(lambda: model(x * 1), model) == 10 * n * b


def test_a_square_weight_takes_twice_its_bytes():
    model = spectral(nn.Sequential(nn.Linear(64, 64, bias=False)), 8)
    kept = sum(p.numel() for p in model.parameters())
    assert kept == 2 * 64 * 64 + 64


def test_inactive_vectors_stay_bitwise_and_active_ones_have_length_one():
    model = spectral(net(), 2)
    optimizer = SST(model, adamw(model), interval=100, warmup=0)
    layer = model[0]
    rest = layer.u_rest.clone(), layer.v_rest.clone()
    before = layer.u.detach().clone()
    with torch.no_grad():
        layer.sigma[3] = 1e-4  # the step would take it below zero
    for t in range(3):
        step(model, optimizer, t)
    assert torch.equal(layer.u_rest, rest[0]) and torch.equal(layer.v_rest, rest[1])
    assert not torch.equal(layer.u, before)
    for vectors in (layer.u, layer.v):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert (layer.sigma >= 0).all()


def test_a_swap_starts_moments_anew_and_warms_up():
    model = spectral(net(), 2)
    inner = adamw(model)
    optimizer = SST(model, inner, interval=3, warmup=2)
    rates = []
    inner.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    layer = model[0]
    for t in range(3):
        active = layer.u.detach().clone()
        step(model, optimizer, t)
    assert layer.u not in inner.state and layer.sigma not in inner.state
    assert layer.bias in inner.state  # it did not change its meaning
    assert not torch.allclose(layer.u, active, atol=0.3)
    step(model, optimizer, 3)
    assert inner.state[layer.u]["step"] == 1 and inner.state[layer.bias]["step"] == 4
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02 / 3])
    assert inner.param_groups[0]["lr"] == 0.02


def test_every_vector_is_sampled_and_a_round_ends_with_a_decomposition(monkeypatch):
    calls = []
    original = SpectralLinear.decompose_
    monkeypatch.setattr(
        SpectralLinear, "decompose_", lambda self: calls.append(self) or original(self)
    )
    model = spectral(net(), 4)
    optimizer = SST(model, adamw(model), interval=1, warmup=0)
    first, second = model[0], model[2]  # 12 and 6 values: rounds of 3 and 2 intervals
    for t in range(6):
        step(model, optimizer, t)
    assert calls == [second, first, second, first, second]


def test_probabilities_by_hand():
    got = probabilities(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    assert got.tolist() == [0.125 + 0.375, 0.125 + 0.125, 0.125, 0.125]
    assert probabilities(torch.zeros(4)).tolist() == [0.25] * 4


def test_it_learns_what_a_low_rank_change_cannot():
    """A full-rank target: all of it is reached in turns, two vectors at a time."""
    model = spectral(nn.Sequential(nn.Linear(12, 12, bias=False)), 2)
    target = matrix(12, 12, seed=5) / 3
    optimizer = SST(model, adamw(model, 0.05), interval=20, warmup=0)
    for t in range(600):
        x = matrix(32, 12, seed=t)
        loss = (model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    change = torch.linalg.svdvals(target)
    rank_two = change[2:].square().sum() / 12  # what the best change of rank 2 from 0 leaves
    assert loss.item() < 0.1 * rank_two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_over_swaps_and_decompositions(dtype, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        layers = nn.Linear(12, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, 6, dtype=dtype)
        model = spectral(nn.Sequential(*layers), 4)
        return model, SST(model, adamw(model), interval=2, warmup=1)

    def run(model, optimizer, steps):
        for t in steps:
            x = matrix(9, 12, seed=t).to(dtype)
            optimizer.zero_grad()
            (model(x) - x[:, :6]).square().mean().backward()
            optimizer.step()

    model, optimizer = build(0)
    run(model, optimizer, range(3))
    files.save(tmp_path, 3, model, optimizer, {})
    other, resumed = build(1)
    files.load(files.latest(tmp_path), other, resumed)
    assert resumed.steps == 3
    for m, o in ((model, optimizer), (other, resumed)):
        run(m, o, range(3, 12))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.dtype is dtype for p in model.parameters())


def test_lorentz_output_lies_on_the_hyperboloid():
    layer = LorentzSpectralLinear.from_linear(nn.Linear(5, 7), 3)
    space = matrix(6, 4)
    x = torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)
    y = layer(x)
    assert y.shape == (6, 8)
    torch.testing.assert_close(-y[:, 0].square() + y[:, 1:].square().sum(-1), -torch.ones(6))
    y.sum().backward()
    assert layer.u.grad.abs().sum() > 0


def test_models_of_hugging_face_and_merge():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    plain = GPT2LMHeadModel(config).eval()
    model = spectral(copy.deepcopy(plain), 4)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
        want = model(ids).logits
    with pytest.raises(UsageError, match=r"no adapter file; merge"):
        adapters.save(model, "nowhere-to-write")
    with pytest.raises(UsageError, match="use merge"):
        adapters.detach(model)
    adapters.merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)


METHODS = {"adapter": {"sst": {"rank": 4, "interval": 50, "warmup": 0}}}


def test_a_trained_directory_opens_with_transformers(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} squared is {i * i}." for i in range(100)))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    spec = PlanFile(
        model=str(config), task="pretrain", batch=2, micro_batch=2, sequence=32,
        budget={"device": 2**30}, methods=Methods(**METHODS), training=Training(learning_rate=1e-2),
    )  # fmt: skip
    run = Run(Plan(spec), Settings(DataSource((str(text),)), steps=3), tmp_path / "out")
    run.run()
    model = AutoModelForCausalLM.from_pretrained(run.out)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, run.model.eval()(ids).logits)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_prediction_equals_measurement(accumulation):
    planned, source = Methods(**METHODS), resolve(LLAMA)
    family = trace_family(
        lambda: source.build("meta", torch.float32),
        lambda: source.example_inputs(1, 8, "cpu", torch.float32),
        lambda model: apply.prepare(model, planned),
        lambda model, batch: loss_of(model(**batch)),
        {"keep": lambda block: apply.set_option(block, "keep", None)},
        lambda flops, moved, dtype: 0.0,
    )
    costs = UpdateCosts(
        lambda ps: apply.make_optimizer([(str(i), p) for i, p in enumerate(ps)], planned, 1e-3, 0),
        lambda flops, moved, dtype: 0.0,
    )
    composer = Composer(family, Life(False, accumulation), costs)
    predicted = composer.ledger(composer.uniform("keep"))

    model = apply.prepare(source.build("cpu", torch.float32), planned)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = apply.make_optimizer(named, planned, 1e-3, 0.0)
    optimizer = apply.wrap_optimizer(model, inner, planned)
    batches = [source.example_inputs(1, 8, "cpu", torch.float32) for _ in range(accumulation)]

    def run():
        for batch in batches:
            loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    # 24 values at most and 4 at a time: the sixth interval ends every layer's round.
    optimizer.steps, optimizer.interval = 23, 1
    with Meter(model, optimizer, inputs=batches) as meter:
        run()
    for phase in meter.ledger.phases():
        got, want = (ledger.column("device", phase) for ledger in (predicted, meter.ledger))
        assert sum(got.values()) == sum(want.values()), (phase, got, want)
    if accumulation == 1:  # in so short a sequence the decomposition is the peak
        assert meter.ledger.peak_phase() == "step"


def test_gradients_in_backward_are_refused():
    model = spectral(net(), 2)
    with pytest.raises(UsageError, match="gradients: step"):
        SST(model, StepInBackward(adamw(model)))


def test_double_backward_is_refused():
    model, x = spectral(net(), 2), matrix(3, 12).requires_grad_()
    with pytest.raises(HoldfastError, match="no double backward"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_a_copy_is_independent():
    model = spectral(net(), 2)
    other = copy.deepcopy(model)
    step(other, SST(other, adamw(other)))
    assert all(not torch.equal(getattr(model[0], n), getattr(other[0], n)) for n in FACTORS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralLinear.from_linear(nn.Linear(12, 8), 9), "rank=9.*8 singular values"),
        (lambda: SpectralLinear.from_linear(nn.Linear(12, 8), 0), "rank=0"),
        (lambda: spectral(net().requires_grad_(False)), "no linear of Sequential"),
        (lambda: spectral(spectral(net(), 2), 2), "has an adapter already"),
        (lambda: SST(net(), adamw(net())), "no SpectralLinear; use spectral"),
        (lambda: SST(m := spectral(net(), 2), adamw(m), interval=0), "interval=0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UsageError, match=message):
        call()
