import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter
from holdfast.plan import apply
from holdfast.plan.blocks import stacks_of
from holdfast.plan.compose import Composer, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods
from holdfast.plan.models import loss_of, resolve
from holdfast.training import checkpoint as checkpoint_files
from holdfast.training.saved import rmm, saved_bytes
from holdfast.training.saved.rmm import (
    METHOD,
    SKETCHES,
    RandomizedLinear,
    VarianceProbe,
    batch_variance,
    convert,
    sketch,
    variance,
)

B, N, M, ROWS = 24, 5, 4, 6


def pair():
    torch.manual_seed(0)
    x = torch.randn(B, N, dtype=torch.float64) + 0.5
    gy = torch.randn(B, M, dtype=torch.float64) * torch.linspace(0.1, 2, B)[:, None]
    return x, gy


def draws(kind, count, rows=ROWS):
    """(count, M, N) sketched gradients of the weight."""
    x, gy = pair()
    both = torch.cat([x, gy], 1)
    sketched = torch.stack([sketch(both, rows, kind, seed) for seed in range(count)])
    return sketched[:, :, N:].mT @ sketched[:, :, :N] / rows


@pytest.mark.parametrize("kind", SKETCHES)
def test_gradient_is_unbiased_and_its_variance_as_told(kind):
    x, gy = pair()
    exact, got = gy.mT @ x, draws(kind, 5000)
    error = got.std(0) / 5000**0.5
    assert ((got.mean(0) - exact).abs() <= 4 * error).all()
    told = variance(x, gy, ROWS, kind)
    measured = (got - exact).square().sum((1, 2)).mean().item()
    # One draw of the signs is an estimate only.
    assert measured == pytest.approx(told, rel=0.05 if kind != "dct" else 0.3)


def test_variance_by_hand():
    x, gy = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-1.0]])
    # |X|^2 = 5, |Y|^2 = 10, |X^T Y|^2 = 1, the rows' products 9 and 4
    assert variance(x, gy, 1, "gaussian") == 51
    assert variance(x, gy, 1, "rademacher") == 51 - 2 * 13
    assert batch_variance(x, gy) == 2 * 13 - 1
    assert variance(x, gy, 2, "dct") == 0


def test_batch_variance_is_that_of_drawing_examples():
    x, gy = pair()
    products = torch.einsum("bm,bn->bmn", gy, x) * B
    # The sum over a batch of B independent draws, each 1/B of the law's B rows.
    spread = products.sub(products.mean(0)).square().sum() / (B - 1) / B
    assert batch_variance(x, gy) == pytest.approx(spread.item(), rel=1e-9)


def test_all_rows_of_the_cosine_transform_are_exact():
    torch.manual_seed(0)
    plain = nn.Linear(7, 3)
    model = convert(nn.Sequential(copy.deepcopy(plain)), 1.0, "dct", targets="0")
    x = torch.randn(2, 33, 7, requires_grad=True)
    gy = torch.randn(2, 33, 3)
    model(x).backward(gy)
    plain(x).backward(gy)
    torch.testing.assert_close(model[0].weight.grad, plain.weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SKETCHES)
def test_tiles_change_nothing_but_the_order_of_sums(kind, monkeypatch):
    x = torch.randn(50, 3, dtype=torch.float64)
    monkeypatch.setattr(rmm, "TILE", 7 * 10)
    tiled = sketch(x, 10, kind, 3)
    again = sketch(x, 10, kind, 3)
    assert torch.equal(tiled, again)
    # S itself, column by column, in the same tiles.
    S = sketch(torch.eye(50, dtype=torch.float64), 10, kind, 3)
    torch.testing.assert_close(tiled, S @ x)
    if kind == "dct":
        monkeypatch.setattr(rmm, "TILE", 1 << 18)
        torch.testing.assert_close(sketch(x, 10, kind, 3), tiled)
        torch.testing.assert_close(S @ S.mT, 50 * torch.eye(10, dtype=torch.float64))


def test_no_tile_holds_the_whole_sketch(monkeypatch):
    monkeypatch.setattr(rmm, "TILE", 64)
    x = torch.randn(4096, 2)
    with Meter(inputs=[x]) as meter:
        sketch(x, 8, "gaussian", 0)
    assert meter.peak - meter.base < 8 * 4096 * 4 / 16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", SKETCHES)
def test_all_but_the_weights_gradient_is_exact(kind, bias):
    torch.manual_seed(0)
    lean = RandomizedLinear(6, 4, bias, ratio=0.5, sketch=kind)
    x = torch.randn(5, 6, 8).transpose(1, 2).requires_grad_()  # not contiguous
    gy = torch.randn(*x.shape[:-1], 4)
    y = lean(x)
    assert torch.equal(y, nn.functional.linear(x, lean.weight, lean.bias))
    y.backward(gy)
    torch.testing.assert_close(x.grad, gy @ lean.weight)
    if bias:
        torch.testing.assert_close(lean.bias.grad, gy.sum((0, 1)))
    assert lean.weight.grad.shape == (4, 6)


def test_saved_bytes_are_the_sketch_and_its_seed():
    for dtype, b in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        layer = RandomizedLinear(12, 7, ratio=0.2, dtype=dtype)
        x = torch.randn(3, 50, 12, dtype=dtype, requires_grad=True)
        assert saved_bytes(lambda: layer(x * 1), layer) == b * 30 * 12 + 8  # noqa: B023
        layer.weight.requires_grad_(False)
        assert saved_bytes(lambda: layer(x * 1), layer) == 0  # noqa: B023
        layer.requires_grad_(True)
        with torch.no_grad():
            assert saved_bytes(lambda: layer(x * 1), layer) == 0  # noqa: B023


def gradient(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return layer.weight.grad.clone()


def test_seeds_differ_between_steps_and_layers_and_repeat_between_runs():
    torch.manual_seed(0)
    one = nn.Linear(6, 6)
    model = convert(nn.Sequential(one, copy.deepcopy(one)), 0.3, targets="all-linear")
    x = torch.randn(40, 6)
    before = torch.get_rng_state()
    first, second = gradient(model[0], x), gradient(model[0], x)
    assert not torch.equal(first, second)
    assert not torch.equal(first, gradient(model[1], x))
    assert torch.equal(before, torch.get_rng_state())
    again = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 0.3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(gradient(again[0], x), first) and torch.equal(gradient(again[0], x), second)
    convert(again, 0.3, seed=1)
    assert not torch.equal(gradient(again[0], x), first)


def test_many_steps_average_to_the_exact_gradient():
    torch.manual_seed(0)
    layer = RandomizedLinear(3, 2, ratio=0.25)
    x, gy = torch.randn(16, 3), torch.randn(16, 2)
    for _ in range(2000):
        layer(x).backward(gy)
    torch.testing.assert_close(layer.weight.grad / 2000, gy.mT @ x, atol=1.0, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_uses_the_same_sketch(reentrant):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(2)]
    plain = convert(nn.Sequential(*layers), 0.4)
    again = copy.deepcopy(plain)
    x = torch.randn(30, 5, requires_grad=True)
    for _ in range(2):
        plain(x).square().sum().backward()
        h = x
        for block in again:
            h = checkpoint(block, h, use_reentrant=reentrant)
        h.square().sum().backward()
    for got, want in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


def test_recomputing_a_shared_layer_stays_consistent():
    """Two calls of one layer, recomputed in the other order, still pair Z with its own seed."""
    torch.manual_seed(0)
    layer = RandomizedLinear(4, 4, bias=False, ratio=1.0, sketch="dct")
    plain = nn.Linear(4, 4, bias=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(9, 4)
    for module in (layer, plain):
        h = checkpoint(module, checkpoint(module, x, use_reentrant=False), use_reentrant=False)
        h.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, atol=1e-4, rtol=1e-4)


def test_autocast_keeps_the_sketch_in_its_dtype():
    layer = RandomizedLinear(8, 4, ratio=0.5)
    x = torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        kept = saved_bytes(lambda: layer(x), layer, [x])
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert kept == 2 * 10 * 8 + 8


def test_variance_probe_reports_each_layer():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 0.25)
    x = torch.randn(40, 6)
    with VarianceProbe(model) as probe:
        model(x).square().sum().backward()
    assert list(probe.ratios) == ["2", "0"]
    hidden = model[1](model[0](x)).detach().double()
    gy = 2 * model(x).detach().double()
    want = variance(hidden, gy, 10, "gaussian") / batch_variance(hidden, gy)
    assert probe.ratios["2"] == pytest.approx(want, rel=1e-4)
    before = dict(probe.ratios)
    model(x).square().sum().backward()
    assert probe.ratios == before


def test_errors():
    layer = RandomizedLinear(4, 4, ratio=0.2)
    with pytest.raises(UsageError, match=r"ratio=0.2 of 2 rows keeps none.*at least 0.5"):
        layer(torch.randn(2, 4))
    for ratio in (0, 1.5, -1):
        with pytest.raises(UsageError, match=f"ratio={ratio} is outside"):
            RandomizedLinear(4, 4, ratio=ratio)
    with pytest.raises(UsageError, match=r"unknown sketch 'gauss'.*gaussian"):
        RandomizedLinear(4, 4, sketch="gauss")
    x = torch.randn(9, 4, requires_grad=True)
    with pytest.raises(HoldfastError, match="no double backward"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert "no linear" in METHOD.applies(nn.Sequential(nn.ReLU()))
    frozen = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    assert "no linear" in METHOD.applies(frozen)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def models():
    quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, **quiet)
    opt = OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32)
    opt.dropout = 0.0
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    vit = ViTConfig(**small, intermediate_size=64, image_size=16, patch_size=4)
    ids = torch.arange(24).view(2, 12)
    text = {"input_ids": ids, "labels": ids}
    image = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return {
        "gpt2": (GPT2LMHeadModel, gpt2, text),
        "opt": (OPTForCausalLM, opt, text),
        "vit": (ViTForImageClassification, vit, image),
    }


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit"])
def test_hugging_face_models(name):
    kind, config, batch = models()[name]
    torch.manual_seed(0)
    plain = kind(config)
    lean = convert(copy.deepcopy(plain), 1.0, "dct")
    assert list(lean.state_dict()) == list(plain.state_dict())
    changed = sum(isinstance(m, rmm._Randomized) for m in lean.modules())
    assert changed == {"gpt2": 8, "opt": 12, "vit": 12}[name]
    for model in (lean, plain):
        model(**batch).loss.backward()
    for got, want in zip(lean.parameters(), plain.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-4, rtol=1e-3)


LLAMA = LlamaConfig(
    **SMALL, intermediate_size=88, num_key_value_heads=2, use_cache=False, tie_word_embeddings=False
).to_dict() | {"num_hidden_layers": 5}


@pytest.mark.parametrize(
    ("kind", "option"), [("gaussian", "keep"), ("rademacher", "recompute"), ("dct", "recompute")]
)
def test_prediction_equals_measurement(kind, option):
    planned = Methods(
        saved=[{"rmm": {"ratio": 0.2, "sketch": kind}}], blocks={"model.layers": f"{option}*5"}
    )
    source = resolve(LLAMA)

    def example(device):
        return source.example_inputs(2, 64, device, torch.float32)

    assert len(stacks_of(source.build())[0].kept) <= 3
    family = trace_family(
        lambda: source.build("meta", torch.float32),
        lambda: example("cpu"),
        lambda model: apply.prepare(model, planned),
        lambda model, batch: loss_of(model(**batch)),
        {option: lambda block: apply.set_option(block, option, None)},
        lambda *cost: 0.0,
    )

    def make(parameters):
        named = [(str(i), p) for i, p in enumerate(parameters)]
        return apply.make_optimizer(named, planned, 1e-3, 0.0)

    composer = Composer(family, Life(False, 1), UpdateCosts(make, lambda *cost: 0.0))
    predicted = composer.ledger(composer.uniform(option))

    model = apply.prepare(source.build("cpu", torch.float32), planned)
    apply.set_blocks(model, planned.blocks, {})
    optimizer = apply.make_optimizer(list(model.named_parameters()), planned, 1e-3, 0.0)
    batch = example("cpu")

    def step():
        loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(model, optimizer, inputs=[batch]) as meter:
        step()
    for phase in ("forward", "backward", "step"):
        assert predicted.column("device", phase) == meter.ledger.column("device", phase), phase


def test_a_planned_run_resumes_to_the_bit_and_exports_the_plain_model(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = METHOD.apply(LlamaForCausalLM(LlamaConfig(**LLAMA)), ratio=0.3, sketch="gaussian")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model, optimizer, steps):
        for i in steps:
            ids = (torch.arange(24).view(2, 12) + i) % 64
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = fresh()
    train(whole, optimizer, range(2))
    path = checkpoint_files.save(tmp_path / "run", 2, whole, optimizer, {})
    train(whole, optimizer, range(2, 4))
    again, optimizer = fresh()
    checkpoint_files.load(path, again, optimizer)
    train(again, optimizer, range(2, 4))
    for got, want in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)
    again.save_pretrained(tmp_path / "export")
    plain, told = LlamaForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["missing_keys"]
    assert torch.equal(plain.model.norm.weight, again.model.norm.weight)


def test_same_seed_same_run():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), 0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x = torch.randn(64, 8)
        y = x[:, :1] * 2
        for _ in range(30):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1] < 1.0
