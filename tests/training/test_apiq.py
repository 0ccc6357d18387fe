import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from holdfast.attach import blocks
from holdfast.errors import UsageError
from holdfast.forms import Affine, Packed
from holdfast.meter import Meter
from holdfast.places import DiskArena
from holdfast.plan import apply
from holdfast.plan.file import Methods
from holdfast.plan.fit import fit
from holdfast.plan.models import resolve
from holdfast.plan.records import refusal
from holdfast.training import adapters
from holdfast.training.adapters.apiq import METHOD, apiq, optimise, save_peft
from holdfast.training.adapters.apiq_fit import clipped
from holdfast.training.adapters.base import layers

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
HF = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, intermediate_size=24, vocab_size=32)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **SIZES, ffn_dim=24, vocab_size=32, word_embed_proj_dim=16, max_position_embeddings=32
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, intermediate_size=24, image_size=8, patch_size=4, num_labels=3)
    ),
}
SHAPE = {"bits": 2, "group": 8, "rank": 4}


def build(name):
    torch.manual_seed(0)
    model = HF[name]().eval()
    with torch.no_grad():  # transformers starts so small that every output is nearly the input
        for p in model.parameters():
            p.mul_(5)
    return model


def calib(name, count=2):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        draws = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]
        return [{"pixel_values": x} for x in draws]
    draws = [torch.randint(32, (2, 6), generator=generator) for _ in range(count)]
    return [{"input_ids": ids} for ids in draws]


def streams(model, batches):
    """Output of the last block for each batch."""
    ((_, stack),) = blocks(model)
    seen = []

    def hook(module, inputs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = stack[-1].register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


@pytest.mark.parametrize("level", ["block", "layer"])
@pytest.mark.parametrize("name", HF)
def test_models_come_nearer_than_by_rounding(name, level):
    given, batches = build(name), calib(name)
    wanted = streams(given, batches)
    rounded = adapters.attach(copy.deepcopy(given), "apiq", **SHAPE)
    model = apiq(copy.deepcopy(given), batches, **SHAPE, level=level, epochs=10)
    errors = [F.mse_loss(streams(m, batches), wanted) for m in (rounded, model)]
    assert errors[1] < 0.9 * errors[0]
    for layer in layers(model).values():
        values = layer.packed.dequantize().unflatten(1, (-1, 8))
        assert max(len(g.unique()) for g in values.flatten(0, 1)) <= 4
        assert layer.lora_B.abs().max() > 0
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        adapters.adapter_state_dict(model)
    )
    want = model(**batches[0]).logits
    adapters.merge(model)
    torch.testing.assert_close(model(**batches[0]).logits, want, atol=1e-4, rtol=1e-4)


def test_bytes_equal_the_formula_and_nothing_else_is_left():
    model = build("llama")
    names = {n for n, _ in model.named_parameters()}
    apiq(model, calib("llama"), **SHAPE, epochs=1)
    for layer in layers(model).values():
        m, n = layer.out_features, layer.in_features
        assert layer.packed.nbytes_packed == m * (n * 2 // 8) + 3 * m * n // 8
    added = {n for n, _ in model.named_parameters()} - names
    assert added == set(adapters.adapter_state_dict(model))
    # Nor does a module hold a tensor, clipping or dense, outside of its registers.
    held = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    assert all(t.numel() <= 16 for t in held)


def test_one_block_at_a_time_is_dense():
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    adapters.attach(model, "apiq", rank=4)
    batch = {"input_ids": torch.arange(16).view(1, 16)}
    with Meter(model, inputs=batch) as meter:
        optimise(model, [batch], epochs=1)
    assert meter.peak - meter.base < 3 * block
    assert meter.end == meter.base


def test_clipping_by_hand():
    w = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    full = torch.full((1, 1), 40.0)  # sigmoid is 1: the whole range
    codes, zero, scale = clipped(w, full, full, 2, 4)
    assert (codes.tolist(), zero.item()) == ([[[0, 1, 1, 3]]], 1)  # 0.5 rounds to the even 0
    assert scale.item() == pytest.approx(1, rel=2**-10) and scale.item() >= 1
    half = torch.zeros(1, 1)  # sigmoid is 1/2: from -0.5 to 1
    codes, zero, scale = clipped(w, half, half, 2, 4)
    assert scale.item() == pytest.approx(0.5, rel=2**-10)
    assert (codes.tolist(), zero.item()) == ([[[0, 1, 2, 3]]], 1)


def test_many_bits_over_the_whole_range_reproduce_the_output():
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 24), torch.randn(50, 32)
    full = torch.full((24, 2), 40.0)
    codes, zero, scale = clipped(linear.weight, full, full, 16, 16, torch.float32)
    same = ((codes - zero) * scale).flatten(1)
    assert (F.linear(x, same, linear.bias) - linear(x)).square().mean().sqrt() < 1e-5


def test_gradients_reach_the_clipping_through_the_scale():
    w = torch.randn(3, 16)
    low, high = (torch.full((3, 2), 4.0, requires_grad=True) for _ in "lh")
    codes, zero, scale = clipped(w, low, high, 3, 8)
    for tensor in (codes, zero):
        assert torch.equal(tensor, tensor.round()) and tensor.min() >= 0 and tensor.max() <= 7
    ((codes - zero) * scale).square().sum().backward()
    assert (low.grad != 0).all() and (high.grad != 0).all()


def test_what_is_kept_is_what_was_optimised(monkeypatch):
    """The codes give the very outputs that the imitation gave at the end."""
    from holdfast.training.adapters import apiq_fit

    seen = {}
    packed = apiq_fit.Fitted.packed

    def spy(part, like):
        found = packed(part, like)
        x = torch.randn(3, part.dense.shape[1])
        codes, zero, scale = clipped(part.dense, part.low, part.high, part.bits, part.group)
        assert torch.equal(found.dequantize(), ((codes - zero) * scale).flatten(1))
        seen[len(seen)] = (part(x), x, found)
        return found

    monkeypatch.setattr(apiq_fit.Fitted, "packed", spy)
    model = apiq(build("gpt2"), calib("gpt2"), **SHAPE, epochs=1)
    assert len(seen) == len(layers(model)) == 8
    for (y, x, found), layer in zip(seen.values(), layers(model).values(), strict=True):
        assert layer.packed.buffers["codes"] is found.buffers["codes"]
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_given_stream_is_exact_and_coded_stream_is_what_the_model_does(monkeypatch):
    from holdfast.training.adapters import apiq as module

    inputs = []
    whole = module.BlockFit.whole

    def spy(self, given, coded, aug_loss):
        inputs.append((given[0], coded[0]))
        return whole(self, given, coded, aug_loss)

    monkeypatch.setattr(module.BlockFit, "whole", spy)
    model, batches = build("llama"), calib("llama", 1)
    with torch.no_grad():
        before = model(**batches[0], output_hidden_states=True).hidden_states
        apiq(model, batches, **SHAPE, epochs=2, aug_loss=True)
        after = model(**batches[0], output_hidden_states=True).hidden_states
    assert torch.equal(inputs[0][0], inputs[0][1])
    torch.testing.assert_close(inputs[1][0], before[1])
    torch.testing.assert_close(inputs[1][1], after[1])
    assert not torch.equal(inputs[1][0], inputs[1][1])


def test_two_runs_give_the_same_codes_and_leave_the_model_as_it_was():
    states = []
    for _ in range(2):
        model = build("gpt2").train()
        model.config.use_cache = True
        torch.manual_seed(3)
        apiq(model, calib("gpt2"), **SHAPE, epochs=2)
        assert model.training and model.config.use_cache
        states.append(model)
    for a, b in zip(*(layers(m).values() for m in states), strict=True):
        for key, buffer in a.packed.buffers.items():
            assert torch.equal(buffer, b.packed.buffers[key])
        assert torch.equal(a.lora_B, b.lora_B)


def test_codes_do_not_train():
    model = apiq(build("llama"), calib("llama"), **SHAPE, epochs=1)
    codes = {n: layer.packed.dequantize() for n, layer in layers(model).items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = calib("llama")[0]["input_ids"]
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, layer in layers(model).items():
        assert torch.equal(layer.packed.dequantize(), codes[name])


def test_bfloat16():
    model = apiq(build("llama").bfloat16(), calib("llama"), **SHAPE, epochs=2)
    assert model(**calib("llama")[0]).logits.dtype == torch.bfloat16
    assert all(layer.lora_B.any() for layer in layers(model).values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_opens_what_save_peft_writes(name, tmp_path):
    from peft import PeftModel

    model = apiq(build(name), calib(name), **SHAPE, epochs=2)
    save_peft(model, tmp_path)
    base = type(model).from_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = calib(name)[0]
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    assert isinstance(next(iter(layers(model).values())).weight.data, Packed)
    adapters.save(model, tmp_path / "own")
    with pytest.raises(Exception, match="APIQ"):
        PeftModel.from_pretrained(build(name), tmp_path / "own")


def test_a_file_brings_the_codes_along(tmp_path):
    model = apiq(build("gpt2"), calib("gpt2"), **SHAPE, epochs=2)
    adapters.save(model, tmp_path)
    twin = adapters.load(build("gpt2"), tmp_path)
    batch = calib("gpt2")[0]
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    with pytest.raises(UsageError, match="optimised already"):
        optimise(twin, [batch])


def test_bad_use():
    model = build("llama")
    with pytest.raises(UsageError, match=r"group=16 does not .* 24 inputs of .*0\.mlp\.down_proj"):
        apiq(model, calib("llama"), group=16)
    assert all(type(m) is not Packed for m in model.parameters())
    with pytest.raises(UsageError, match="bits=8 is not a size"):
        apiq(model, calib("llama"), bits=8, group=8)
    with pytest.raises(UsageError, match="'block' or 'layer'"):
        optimise(model, [], level="model")
    adapters.attach(model, "apiq", **SHAPE)
    with pytest.raises(UsageError, match="0 batches"):
        optimise(model, [])
    optimise(model, calib("llama"), epochs=1)
    with pytest.raises(UsageError, match="optimised already"):
        optimise(model, calib("llama"))
    flat = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert "has 0 stacks" in METHOD.applies(flat, bits=2, group=8, rank=4)
    with pytest.raises(UsageError, match="save_peft got Sequential"):
        save_peft(adapters.attach(flat, "apiq", **SHAPE), "nowhere")
    with pytest.raises(UsageError, match="packed already"):
        adapters.attach(adapters.detach(model) and pack(model), "apiq", **SHAPE)


def pack(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(Affine(4, 8).encode(linear.weight), requires_grad=False)
    return model


@pytest.mark.parametrize("blocks", ["recompute*2", "disk*1 keep*1"])
def test_optimises_under_a_plan_s_blocks(blocks):
    found = []
    for options in ("keep*2", blocks):
        model = build("llama").train()
        methods = Methods(
            adapter={"apiq": {"group": 8, "rank": 4}}, blocks={"model.layers": options}
        )
        torch.manual_seed(0)
        apply.prepare(model, methods)
        apply.set_blocks(model, methods.blocks, {"disk": DiskArena(2**24)})
        apply.calibrate(model, calib("llama", 1), methods)
        found.append([layer.packed.dequantize() for layer in layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_plans_with_other_packed_weights_are_refused():
    assert refusal(["apiq", "int8"]).startswith("apiq excludes int8: ApiQ writes the weights")
    with pytest.raises(UsageError, match="do not go together"):
        apply.prepare(build("llama"), Methods(weights={"int4": {}}, adapter={"apiq": {}}))
    with pytest.raises(UsageError, match=r"group=64 does not divide the 16 inputs of model"):
        apply.prepare(build("llama"), Methods(adapter={"apiq": {}}))


def test_plan_predicts_to_the_byte():
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    options = {"sequence": 32, "hardware": "cpu-2core", "methods": ("apiq", "adamw")}
    plan = fit(config, "1GiB", allow="lossy", **options)
    assert plan.spec.methods.adapter == {"apiq": {"bits": 2, "group": 64, "rank": 64}}
    source = resolve(config)
    model, optimizer = plan.apply(source.build("cpu"))
    batch = source.example_inputs(1, 32, "cpu")
    METHOD.calibrate(model, [batch], **METHOD.defaults())
    for _ in range(2):
        with Meter(model, optimizer, inputs=batch) as meter:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert meter.peak == plan.predicted.peak("device")
