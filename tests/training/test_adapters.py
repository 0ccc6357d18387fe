"""What every adapter must do."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from holdfast.errors import UsageError
from holdfast.forms import Packed
from holdfast.training import adapters
from holdfast.training.adapters import base

# Adapters whose base is rounded start at the rounded model instead of at the given one.
ROUNDED = {"peqa", "apiq"}
PEFT = ("lora", "randlora")


def llama(**config):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, **config)).eval()


def gpt2():
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32)).eval()


MODELS = {"llama": llama, "gpt2": gpt2}
IDS = torch.arange(12).reshape(2, 6)
LR = {"apiq": 1e-2, "lora": 1e-2, "lors": 1e-2, "randlora": 1e-3, "peqa": 1e-2}
KNOBS = {
    "apiq": {"bits": 4, "group": 8, "rank": 4},
    "lora": {"rank": 4},
    "lors": {"rank": 4},
    "peqa": {},
    "randlora": {"rank": 4},
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(params=base.methods())
def method(request):
    return request.param


def attach(model, method, **knobs):
    return adapters.attach(model, method, **{**KNOBS.get(method, {}), **knobs})


def loss_of(model):
    return model(IDS, labels=IDS).loss


def train(model, steps=3):
    """A few steps, so that the adapter is not at its start."""
    lr = LR[base.attached(model).cls.key]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_identity_at_start(model, method):
    before = model(IDS).logits
    attach(model, method)
    if method in ROUNDED:
        torch.testing.assert_close(model(IDS).logits, before, atol=0.2, rtol=0)
    else:
        assert torch.equal(model(IDS).logits, before)


def test_only_the_adapter_trains(model, method):
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, method)
    losses = train(model)
    assert losses[-1] < losses[0]
    state = adapters.adapter_state_dict(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(state)
    for name, p in model.named_parameters():
        if name in frozen and name not in state and not isinstance(p, Packed):
            assert torch.equal(p, frozen[name])
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


def test_gradients_are_the_slope_of_the_loss(model, method):
    if method == "apiq":
        pytest.skip("its packed weights have no float64, in which a slope can be told")
    model = attach(model.double(), method)
    train(model)
    own = [p for p in model.parameters() if p.requires_grad]

    def loss():
        return F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    grads = torch.autograd.grad(loss(), own)
    assert all(g.abs().max() > 0 for g in grads)
    # Along the gradient the slope is its norm; the norm layers compute in fp32, hence the step.
    norm = torch.cat([g.flatten() for g in grads]).norm()
    values = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for p, g in zip(own, grads, strict=True):
                p.add_(g / norm, alpha=step)
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / 2e-4, norm, rtol=5e-3, atol=0)


def test_merge_equals_forward_in_a_plain_model(model, method):
    classes = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    attach(model, method)
    train(model)
    want = model(IDS).logits
    adapters.merge(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=0)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_detach_leaves_no_trace(model, method):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, attributes = dict(model.named_modules()), set(model.__dict__)
    model.get_input_embeddings().weight.requires_grad_(False)
    attach(model, method)
    train(model)
    adapters.detach(model)
    assert dict(model.named_modules()) == modules
    assert set(model.__dict__) == attributes
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 1
    after = model.state_dict()
    assert list(after) == list(before)
    if method not in ROUNDED:
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_state_dict_round_trip(model, method):
    twin = copy.deepcopy(model)
    attach(model, method)
    train(model)
    state = {name: t.clone() for name, t in adapters.adapter_state_dict(model).items()}
    attach(twin, method)
    adapters.load_adapter_state_dict(twin, state)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    state.pop(next(iter(state)))
    with pytest.raises(UsageError, match="lacks"):
        adapters.load_adapter_state_dict(twin, state)


def test_save_and_load(model, method, tmp_path):
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    attach(model, method)
    train(model)
    adapters.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapters.load(twin, tmp_path)
    assert list(base.layers(twin)) == list(base.layers(model))
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    attach(third, method)
    adapters.load(third, tmp_path)
    assert torch.equal(third(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("method", PEFT)
def test_peft_opens_what_we_save(model, method, tmp_path):
    from peft import PeftModel

    twin = copy.deepcopy(model)
    adapters.save(train_and_return(attach(model, method)), tmp_path)
    theirs = PeftModel.from_pretrained(twin, tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", PEFT)
def test_we_open_what_peft_saves(model, method, tmp_path):
    import peft

    twin = copy.deepcopy(model)
    config = {"lora": peft.LoraConfig, "randlora": peft.RandLoraConfig}[method](
        r=4, target_modules="all-linear"
    )
    theirs = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=1e-2)
    theirs.save_pretrained(tmp_path)
    ours = adapters.load(twin, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=0)


def train_and_return(model):
    train(model)
    return model


def test_non_reentrant_recompute_gives_the_same_gradients(method):
    grads = []
    for recompute in (False, True):
        model = attach(llama(), method)
        train(model, steps=1)
        if recompute:
            for layer in model.model.layers:
                inner = layer.forward
                layer.forward = lambda *a, inner=inner, **k: checkpoint(
                    inner, *a, use_reentrant=False, **k
                )
        loss_of(model).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == len(grads[1]) > 0
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_bfloat16(model, method):
    model = attach(model.bfloat16(), method)
    losses = train(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert model(IDS).logits.dtype == torch.bfloat16


def test_float32_master_of_the_adapter(method):
    model = attach(llama().bfloat16(), method, dtype=torch.float32)
    train(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_meta_device_attaches_and_traces(method):
    with torch.device("meta"):
        model = llama()
    attach(model, method)
    loss = model(IDS.to("meta")).logits.float().sum()
    loss.backward()
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def test_fake_tensors_attach_and_trace(method):
    with FakeTensorMode():
        model = attach(llama(), method)
        ids = torch.zeros(IDS.shape, dtype=torch.int64)
        F.cross_entropy(model(ids).logits.mT, ids).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_deep_copy_is_independent(model, method):
    attach(model, method)
    train(model)
    want = model(IDS).logits
    twin = copy.deepcopy(model)
    adapters.detach(twin)
    assert not layers_of_holdfast(twin)
    assert torch.equal(model(IDS).logits, want)


def layers_of_holdfast(model):
    return [m for m in model.modules() if isinstance(m, adapters.Adapter)]


def test_bad_use(model, method, tmp_path):
    with pytest.raises(UsageError, match="no adapter"):
        adapters.merge(model)
    with pytest.raises(UsageError, match="unknown knob"):
        adapters.attach(model, method, rang=3)
    with pytest.raises(UsageError, match="matches no module"):
        attach(model, method, targets=["nowhere"])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match="missing"):
        adapters.load(model, tmp_path)
    attach(model, method)
    with pytest.raises(UsageError, match="already has the adapter"):
        attach(model, method)


def test_unknown_adapter():
    with pytest.raises(UsageError, match=r"unknown adapter 'lara'; nearest known: .*lora"):
        adapters.attach(llama(), "lara")


def test_a_change_of_a_tied_weight_is_refused(method):
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.transformer.wte.weight.clone()
    with pytest.raises(UsageError, match="are one tensor"):
        attach(model, method, targets="head")
        train(model)
        adapters.merge(model)
    assert torch.equal(model.transformer.wte.weight, before)


def test_load_refuses_what_it_does_not_do(method, tmp_path):
    import json

    adapters.save(attach(llama(), method), tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "known here: .*lora"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UsageError, match=message):
            adapters.load(llama(), tmp_path)
    path.write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        adapters.load(llama(), tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="cannot be read"):
        adapters.load(llama(), tmp_path)


@pytest.mark.parametrize("method", ["peqa", "randlora", "lora"])
@pytest.mark.parametrize("kind", ["opt", "vit"])
def test_adapters_need_no_special_case_for_an_architecture(method, kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "opt":
        config = hf.OPTConfig(
            **sizes, ffn_dim=32, word_embed_proj_dim=16, vocab_size=32, dropout=0.0
        )
        model = hf.OPTForCausalLM(config)
        ids = torch.arange(24).view(2, 12)
        batch = {"input_ids": ids, "labels": ids}
    else:
        config = hf.ViTConfig(**sizes, intermediate_size=32, image_size=8, patch_size=4)
        model = hf.ViTForImageClassification(config)
        batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 0, 1])}
    attach(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = model.eval()(**batch).logits
        merged = adapters.merge(model).eval()(**batch).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
