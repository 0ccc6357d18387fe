import json

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.plan.fit import fit
from holdfast.plan.models import resolve
from holdfast.training import adapters
from holdfast.training.adapters import lors
from holdfast.training.adapters.base import layers
from holdfast.training.adapters.lors import LoRS, gradient_init, places_of
from holdfast.training.adapters.packed import pack_weights
from holdfast.training.saved import saved_bytes


def pruned(linear, share=0.5):
    """Half of the weight set to zero, frozen."""
    linear.requires_grad_(False)
    weight = linear.weight
    weight.masked_fill_(torch.rand(weight.shape) < share, 0)
    return linear


def prune_model(model, share=0.5):
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            with torch.no_grad():
                module.weight.masked_fill_(torch.rand(module.weight.shape) < share, 0)
    return model


def with_b(linear, **knobs):
    layer = LoRS(linear, **knobs)
    nn.init.normal_(layer.lora_B)
    return layer


def dense_ref(layer):
    """The weight (m, n) as autograd would see it, mask and product all at once."""
    weight = layer.weight.mT if layer.transposed else layer.weight
    return (weight + layer.scale * layer.lora_B @ layer.lora_A) * (weight != 0)


def gradients(y, leaves):
    return torch.autograd.grad(y.sin().sum(), leaves)


LINEARS = [nn.Linear(24, 30), nn.Linear(36, 7, bias=False), Conv1D(9, 24)]


@pytest.mark.parametrize("tile", [1 << 22, 60])
@pytest.mark.parametrize("linear", LINEARS)
def test_exact_gradients_equal_autograd_of_the_masked_weight(linear, tile, monkeypatch):
    monkeypatch.setattr(lors, "TILE", tile)
    layer = with_b(pruned(linear), rank=3, alpha=2, exact_grad=True).double()
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    want = F.linear(x, dense_ref(layer), layer.bias)
    got = layer(x)
    torch.testing.assert_close(got, want)
    leaves = [x, layer.lora_A, layer.lora_B]
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("linear", LINEARS)
def test_default_gradients_are_those_without_the_mask(linear):
    layer = with_b(pruned(linear), rank=3, alpha=2).double()
    x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    want = F.linear(x, dense_ref(layer), layer.bias)
    g = torch.randn_like(want)
    leaves = [x, layer.lora_A, layer.lora_B]
    gx, ga, gb = torch.autograd.grad(layer(x), leaves, g)
    torch.testing.assert_close(gx, torch.autograd.grad(want, x, g)[0], atol=1e-6, rtol=1e-6)
    gw = g.mT @ x.detach()
    torch.testing.assert_close(ga, layer.scale * layer.lora_B.mT @ gw)
    torch.testing.assert_close(gb, layer.scale * gw @ layer.lora_A.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [nn.Linear(64, 176), nn.Linear(300, 1000), Conv1D(96, 64)])
def test_output_at_the_start_is_the_base_s_bit_for_bit(linear, dtype, monkeypatch):
    monkeypatch.setattr(lors, "TILE", 64 * 64)
    linear = pruned(linear.to(dtype))
    x = torch.randn(7, LoRS(linear).in_features, dtype=dtype)
    assert torch.equal(LoRS(linear)(x), linear(x))


def sqft(layer, x):
    """The masked product left to autograd, as in sparse LoRA before."""
    weight = layer.weight.mT if layer.transposed else layer.weight
    mask = weight != 0
    return F.linear(x, weight + layer.lora_B @ layer.lora_A * mask, layer.bias)


@pytest.mark.parametrize("exact_grad", [False, True])
def test_keeps_x_alone_and_shares_it(exact_grad):
    model = nn.ModuleList(pruned(nn.Linear(64, 32)) for _ in range(3))
    adapters.attach(model, "lors", exact_grad=exact_grad)
    x = torch.randn(10, 64, requires_grad=True)
    kept = saved_bytes(lambda: sum(layer(x * 1) for layer in model), model)
    assert kept == 3 * x.nbytes
    kept = saved_bytes(lambda: [layer(y) for y in [x * 1] for layer in model], model)
    assert kept == x.nbytes
    mn = model[0].weight.numel()
    theirs = saved_bytes(lambda: [sqft(layer, y) for y in [x * 1] for layer in model], model)
    assert theirs >= kept + 3 * mn


def test_meter_sees_no_dense_weight_at_the_peak(monkeypatch):
    monkeypatch.setattr(lors, "TILE", 64 * 64)
    model = nn.Sequential(pruned(nn.Linear(256, 256)), pruned(nn.Linear(256, 256)))
    adapters.attach(model, "lors", rank=2)
    x = torch.randn(4, 256)
    for _ in range(2):
        with Meter(model, inputs=(x,)) as meter:
            model(x).square().sum().backward()
        model.zero_grad()
    assert meter.at_peak["activations"] + meter.at_peak["temporary"] < 256 * 256 * 4 // 2


HF = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=32,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
            word_embed_proj_dim=16, max_position_embeddings=32,
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4, num_labels=3,
        )
    ),
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6)


def batch_of(name):
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8), "labels": IDS[0, :2]}
    return {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HF)
def test_models_train_and_merge_with_their_zeros(name, dtype):
    torch.manual_seed(0)
    model = prune_model(HF[name]().eval()).to(dtype)
    batch = batch_of(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters.attach(model, "lors", rank=4)
    adapted = list(layers(model))
    gradient_init(model, [batch])
    assert all(layer.watch is None for layer in layers(model).values())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    want = model(**batch).logits
    adapters.merge(model)
    if dtype == torch.float32:
        torch.testing.assert_close(model(**batch).logits, want, atol=1e-5, rtol=0)
    for key in adapted:
        old, new = before[f"{key}.weight"], model.get_submodule(key).weight
        assert torch.equal(new == 0, old == 0)
        assert not torch.equal(new, old)


def test_a_merged_weight_that_cancels_stays_a_place():
    linear = pruned(nn.Linear(8, 4))
    layer = LoRS(linear, rank=4)
    zeros = linear.weight == 0
    with torch.no_grad():  # B A = -W exactly
        layer.lora_B.copy_(torch.eye(4))
        layer.lora_A.copy_(-linear.weight)
    assert torch.equal(layer.merged().weight == 0, zeros)
    assert linear.weight.abs().max() < 1e-30


def test_gradient_init_finds_the_top_directions_of_the_dense_gradient():
    torch.manual_seed(0)
    model = prune_model(HF["llama"]().eval())
    batches = [batch_of("llama"), {"input_ids": IDS + 3, "labels": IDS + 3}]
    for batch in batches:
        model(**batch).loss.backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    adapters.attach(model, "lors", rank=2)
    gradient_init(model, batches)
    for name, layer in layers(model).items():
        a = layer.lora_A.detach()
        torch.testing.assert_close(a @ a.mT, torch.eye(2), atol=1e-5, rtol=0)
        values = torch.linalg.svdvals(dense[f"{name}.weight"])
        caught = (dense[f"{name}.weight"] @ a.mT).norm()
        torch.testing.assert_close(caught, values[:2].norm(), rtol=1e-4, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_places_of_a_pattern_by_hand():
    row = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])
    # The second four have one nonzero: the first zero of them fills the count.
    assert places_of(row, (2, 4)).tolist() == [[0b10010101]]


@pytest.mark.parametrize("conv1d", [False, True])
def test_pattern_survives_a_weight_that_rounds_to_zero(conv1d):
    torch.manual_seed(0)
    linear = Conv1D(6, 16) if conv1d else nn.Linear(16, 6)
    linear.requires_grad_(False)
    weight = linear.weight.mT if conv1d else linear.weight
    weight.unflatten(1, (-1, 4))[..., 1:3] = 0
    weight[0, 0] = 0  # a place of the pattern that W no longer tells
    layer = with_b(linear, rank=2, pattern=(2, 4), exact_grad=True)
    assert layer.places.nbytes == 6 * 16 // 8
    x = torch.randn(3, 16)
    want = layer(x)
    merged = layer.merged()
    torch.testing.assert_close(merged(x), want)
    groups = (weight != 0).unflatten(1, (-1, 4))
    assert groups.sum(2).max() == 2 and weight[0].count_nonzero() == 8


def test_bad_patterns():
    with pytest.raises(UsageError, match=r"some 4 neighbours have 4 nonzeros; prune"):
        LoRS(nn.Linear(8, 2), pattern=(2, 4))
    with pytest.raises(UsageError, match="weight with 6 inputs; expected"):
        LoRS(nn.Linear(6, 2), pattern=(2, 4))


def test_bad_use():
    with pytest.raises(UsageError, match="rank=0 trains nothing"):
        LoRS(nn.Linear(2, 2), rank=0)
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=r"0 \(1 in all\) have no zeros to keep; prune"):
        adapters.attach(model, "lors", rank=2)
    model[0].weight.requires_grad_(True)
    with pytest.raises(UsageError, match="requires a gradient, which LoRS does not compute"):
        model(torch.randn(2, 8))
    packed = pack_weights(nn.Sequential(nn.Linear(64, 4)))
    with pytest.raises(UsageError, match=r"weight of 0 is Affine.*dense pruned model"):
        adapters.attach(packed, "lors")
    model = adapters.attach(prune_model(nn.Sequential(nn.Linear(8, 4))), "lors")
    with pytest.raises(UsageError, match="0 batches; it needs"):
        gradient_init(model, [])
    nn.init.ones_(model[0].lora_B)
    with pytest.raises(UsageError, match="trained already"):
        gradient_init(model, [{"input": torch.ones(1, 8)}])


def test_no_other_program_takes_the_file_for_a_plain_lora(tmp_path):
    from peft import PeftModel

    model = adapters.attach(prune_model(HF["llama"]()), "lors", rank=4, pattern=None)
    adapters.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["places"]) == ("LORS", "nonzero")
    with pytest.raises(Exception, match="LORS"):
        PeftModel.from_pretrained(HF["llama"](), tmp_path)


def test_pattern_and_scale_return_from_a_file(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4).requires_grad_(False))
        model[0].weight.unflatten(1, (-1, 4))[..., 1:3] = 0
        return model

    model = adapters.attach(build(), "lors", rank=2, alpha=3, pattern=(2, 4))
    nn.init.normal_(model[0].lora_B)
    adapters.save(model, tmp_path)
    twin = adapters.load(build(), tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), model(x))
    assert twin[0].places is not None


def test_autocast():
    layer = with_b(pruned(nn.Linear(8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_plan_predicts_to_the_byte():
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    options = {"sequence": 32, "hardware": "cpu-2core", "methods": ("lors", "adamw")}
    plan = fit(config, "1GiB", allow="lossy", **options)
    assert plan.spec.methods.adapter == {"lors": {"rank": 8, "init": "gradient"}}
    source = resolve(config)
    model, optimizer = plan.apply(prune_model(source.build("cpu")))
    batch = source.example_inputs(1, 32, "cpu")
    lors.METHOD.calibrate(model, [batch], **lors.METHOD.defaults())
    for _ in range(2):
        with Meter(model, optimizer, inputs=batch) as meter:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert meter.peak == plan.predicted.peak("device")
