import copy
import inspect

import pytest
import torch
import transformers as hf
from torch import nn

from holdfast.attach import add, blocks, find, head, hook, swap, wrap
from holdfast.errors import UsageError

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
FFN = {"intermediate_size": 24}


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **FFN, vocab_size=32))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))


def opt():
    config = hf.OPTConfig(
        **SMALL, ffn_dim=24, vocab_size=32, word_embed_proj_dim=16, max_position_embeddings=16
    )
    return hf.OPTForCausalLM(config)


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **FFN, vocab_size=32))


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **FFN, image_size=8, patch_size=4))


def t5():
    config = hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return hf.T5ForConditionalGeneration(config)


def mixtral():
    config = hf.MixtralConfig(**SMALL, **FFN, vocab_size=32, num_local_experts=2)
    return hf.MixtralForCausalLM(config)


def swin():
    config = hf.SwinConfig(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[1, 2])
    return hf.SwinForImageClassification(config)


# model -> linears outside the head, in attention, outside attention; names of the stacks
MODELS = {
    llama: (14, 8, 6, ["model.layers"]),
    gpt2: (8, 4, 4, ["transformer.h"]),
    opt: (12, 8, 4, ["model.decoder.layers"]),
    bert: (13, 8, 4, ["bert.encoder.layer"]),
    vit: (12, 8, 4, ["vit.layers"]),
    t5: (32, 24, 8, ["encoder.block", "decoder.block"]),
    mixtral: (8, 8, None, ["model.layers"]),
    swin: (25, 16, 8, ["swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"]),
}


@pytest.mark.parametrize("build", MODELS, ids=lambda b: b.__name__)
def test_roles_and_blocks(build):
    model = build()
    everything, attention, mlp, stacks = MODELS[build]
    found = find(model)
    assert len(found) == everything
    assert not set(found) & set(head(model))
    assert len(head(model)) == 1
    assert len(find(model, "attention")) == attention
    if mlp is not None:
        assert len(find(model, "mlp")) == mlp
    got = blocks(model)
    assert [name for name, _ in got] == stacks
    assert all(model.get_submodule(name) is stack for name, stack in got)


def test_targets_mean_what_they_mean_in_peft():
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    for build, targets in [
        (llama, ["q_proj", "v_proj"]),
        (llama, "all-linear"),
        (llama, r".*\.layers\.1\.mlp\..*_proj"),
        (llama, ["layers.0.mlp.up_proj"]),
        (gpt2, "all-linear"),
        (gpt2, ["c_attn"]),
        (bert, ["query", "output.dense"]),
        (t5, ["q", "wo"]),
    ]:
        ours = list(find(build(), targets))
        peft_model = get_peft_model(build(), LoraConfig(target_modules=targets))
        theirs = [
            name.removeprefix("base_model.model.")
            for name, module in peft_model.named_modules()
            if isinstance(module, LoraLayer)
        ]
        assert ours == theirs, (build.__name__, targets)


def test_exclude():
    names = find(llama(), ["q_proj", "v_proj"], exclude=["layers.0.self_attn.q_proj"])
    assert "model.layers.0.self_attn.q_proj" not in names
    assert len(names) == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "'q_prj' matches no module of LlamaForCausalLM; nearest: .*q_proj"),
        (["self_attn"], "'self_attn' is not a linear"),
        ("all-linera", "nearest: .*all-linear"),
        ("q_proj(", "no regular expression"),
        ([], "name nothing"),
    ],
)
def test_unknown_target_names_the_nearest(targets, message):
    with pytest.raises(UsageError, match=message):
        find(llama(), targets)


def test_excluding_everything_is_an_error():
    with pytest.raises(UsageError, match="leave no linear"):
        find(llama(), ["q_proj"], exclude="attention")


def test_modules_read_past_their_forward_are_not_found():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(find(model)) == ["linear1", "linear2"]


def test_swap_and_remove_leave_no_trace():
    model = llama().eval()
    ids = torch.arange(6)[None]
    before, keys, names = model(ids).logits, list(model.state_dict()), dict(model.named_modules())
    old = model.get_submodule("model.layers.0.mlp.up_proj")
    handle = swap(model, "model.layers.0.mlp.up_proj", nn.Linear(16, 24, bias=False))
    assert not torch.equal(model(ids).logits, before)
    handle.remove()
    handle.remove()
    assert model.get_submodule("model.layers.0.mlp.up_proj") is old
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == names
    assert torch.equal(model(ids).logits, before)


def test_swap_reaches_every_place_of_a_shared_module():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with swap(model, "0", nn.Identity()):
        assert isinstance(model[2], nn.Identity)
    assert model[0] is model[2] is shared
    with pytest.raises(UsageError, match="no module '7'"):
        swap(model, "7", shared)


def test_swap_works_inside_the_encoder_layer_of_torch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    state = dict(model.layers[0].__dict__)
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        before = model(x)
        with swap(model, "layers.0.linear2", nn.Linear(16, 8)):
            assert not torch.allclose(model(x), before, atol=1e-3)
        torch.testing.assert_close(model(x), before)
    assert model.layers[0].__dict__ == state


def test_removing_out_of_order_is_refused_and_harmless():
    model = nn.Sequential(nn.Linear(2, 2))
    first = swap(model, "0", nn.Identity())
    second = swap(model, "0", nn.ReLU())
    with pytest.raises(UsageError, match="remove the later handle first"):
        first.remove()
    second.remove()
    first.remove()
    assert isinstance(model[0], nn.Linear)


def test_add_and_remove():
    model = nn.Sequential(nn.Linear(2, 2))
    handle = add(model, "extra", nn.Linear(3, 3))
    assert "extra.weight" in model.state_dict()
    with pytest.raises(UsageError, match="already has an attribute 'extra'"):
        add(model, "extra", nn.ReLU())
    handle.remove()
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert not hasattr(model, "extra")


def test_wrap_keeps_class_state_signature_and_copies():
    model = llama().eval()
    plain = dict(model.__dict__)
    signature = inspect.signature(model.forward)
    ids = torch.arange(5)[None]
    before = model(ids).logits
    handle = wrap(model, lambda forward, *a, **k: forward(*a, **k).logits + 1)
    assert isinstance(model, hf.LlamaForCausalLM)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(ids), before + 1)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(twin(ids), torch.ones_like(before))
    handle.remove()
    assert torch.equal(model(ids).logits, before)
    assert model.__dict__ == plain


def test_hook_sees_outputs_until_removed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen = []
    x = torch.randn(1, 2)
    with hook(model, lambda module, inputs, output: seen.append(output)):
        y = model(x)
    model(x)
    assert len(seen) == 2
    assert seen[1] is y


def test_plain_sequential_stack_and_single_block():
    block = lambda: nn.TransformerEncoderLayer(8, 2, 16)  # noqa: E731
    model = nn.ModuleDict({"body": nn.Sequential(block()), "lm_head": nn.Linear(8, 8)})
    assert [name for name, _ in blocks(model)] == ["body"]
    assert head(model) == ["lm_head"]
    assert blocks(nn.Linear(2, 2)) == []
