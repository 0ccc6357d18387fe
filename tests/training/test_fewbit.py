import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from holdfast.errors import HoldfastError, UsageError
from holdfast.training.saved import fewbit, saved_bytes
from holdfast.training.saved.fewbit import FITTED, FewBit, convert, fit, make_tables, slope

NAMES = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "silu": "silu", "swish": "silu", "mish": "mish", "hardswish": "hardswish",
    "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip


def test_gelu_tables_are_the_published_ones():
    three = slope("gelu", 3)
    assert three.bounds == pytest.approx((-2.39, -0.71, -0.32, 0, 0.33, 0.71, 2.39), abs=0.01)
    want = (-0.003, -0.089, 0.126, 0.373, 0.63, 0.877, 1.089, 1.003)
    assert three.levels == pytest.approx(want, abs=0.004)
    table = json.loads(fewbit._TABLES.read_text())["gelu"]["bits"]
    errors = [table[str(bits)]["l2"] for bits in fewbit.BITS]
    assert errors == pytest.approx([0.141, 0.0393, 0.0119, 0.0031], rel=0.01)


def test_no_random_table_is_better():
    torch.manual_seed(0)
    f = torch.randn(60, dtype=torch.float64).cumsum(0)
    for steps, (cuts, levels, error) in enumerate(fit(f, 8), start=1):
        edges = torch.tensor([0, *cuts, 60])
        told = sum(
            (f[i:j] - level).square().sum()
            for i, j, level in zip(edges, edges[1:], levels, strict=False)
        )
        assert told.item() == pytest.approx(error, abs=1e-9)
        for _ in range(1000):
            cut = torch.randperm(59)[: steps - 1].sort().values + 1
            parts = f.tensor_split(cut)
            assert sum((p - p.mean()).square().sum() for p in parts) >= error - 1e-9


def test_tables_are_reproducible():
    coarse, stored = make_tables(400), json.loads(fewbit._TABLES.read_text())
    for name in FITTED:
        for bits, row in coarse[name]["bits"].items():
            kept = stored[name]["bits"][bits]
            assert kept["l2"] == pytest.approx(row["l2"], rel=0.05, abs=2e-3)
            assert len(kept["levels"]) == len(kept["bounds"]) + 1 == 2 ** int(bits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", fewbit.BITS)
def test_forward_is_exact_and_backward_is_the_step_function(name, bits):
    torch.manual_seed(0)
    act = FewBit(ACT2FN[name], bits)
    x = torch.randn(3, 7, 5).mul_(3).requires_grad_()
    y = act(x)
    assert torch.equal(y, ACT2FN[name](x))
    (gx,) = torch.autograd.grad(y, x, torch.full_like(y, 2))
    steps = slope(NAMES[name], bits)
    at = x.detach().abs() if steps.even else x.detach()
    codes = torch.bucketize(at, torch.tensor(steps.bounds))
    torch.testing.assert_close(gx, 2 * torch.tensor(steps.levels)[codes])


@pytest.mark.parametrize("name", NAMES)
def test_steps_come_closer_with_bits(name):
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(ACT2FN[name](x).sum(), x)[0]
    errors = [
        (torch.autograd.grad(FewBit(ACT2FN[name], b)(x).sum(), x)[0] - want).square().mean().item()
        for b in fewbit.BITS
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.005


def test_an_even_slope_gives_all_steps_to_the_absolute_value():
    even, plain = slope("tanh", 2), slope("silu", 2)
    assert even.even and not plain.even
    assert min(even.bounds) > 0


@pytest.mark.parametrize("n", [8, 16, 1000])
@pytest.mark.parametrize("bits", fewbit.BITS)
def test_saved_bytes_are_the_packed_codes(n, bits):
    act = fewbit.GELU(bits)
    x = torch.randn(n, requires_grad=True)
    assert saved_bytes(lambda: act(x * 1), act) == -(-n * bits // 8)
    assert saved_bytes(lambda: nn.GELU()(x * 1), act) == 4 * n
    with torch.no_grad():
        assert saved_bytes(lambda: act(x * 1), act) == 0
    assert saved_bytes(lambda: act(x.detach()), act) == 0


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0)],
    ids=lambda a: type(a).__name__,
)
def test_two_valued_slopes_are_exact_with_one_bit(act):
    torch.manual_seed(0)
    x = torch.randn(40, 25).mul_(4).requires_grad_()
    with torch.no_grad():
        x[0, :6] = torch.tensor([0.0, 6.0, -0.5, 2.0, float("inf"), -float("inf")])
    model = nn.Sequential(copy.deepcopy(act))
    convert(model, 3)
    gy = torch.randn_like(x)
    got, want = (torch.autograd.grad(f(x), x, gy)[0] for f in (model, act))
    assert torch.equal(got, want)
    assert saved_bytes(lambda: model(x * 1), model) == 125


def test_nan_propagates_and_later_in_place_changes_do_not_matter():
    act = fewbit.SiLU(3)
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    assert act(x).isnan().tolist() == [True, False]
    base = torch.tensor([-1.0, 2.0], requires_grad=True)
    want = torch.autograd.grad(act(base * 1).sum(), base)[0]
    h = base * 1
    y = act(h)
    h.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), base)[0], want)
    inplace = FewBit(nn.SiLU(inplace=True), 3)
    h = base * 1
    y = inplace(h)
    assert y.data_ptr() == h.data_ptr()
    assert torch.equal(torch.autograd.grad(y.sum(), base)[0], want)


def test_double_backward_is_refused():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(HoldfastError, match=r"no double backward.*original layer"):
        torch.autograd.grad(fewbit.GELU()(x).sum(), x, create_graph=True)


def test_bad_input():
    with pytest.raises(UsageError, match="bits=5"):
        FewBit(nn.GELU(), 5)
    with pytest.raises(UsageError, match=r"PReLU has no few-bit.*gelu"):
        FewBit(nn.PReLU())
    with pytest.raises(UsageError, match="no parent; use FewBit"):
        convert(nn.GELU())
    assert "no activation" in fewbit.METHOD.applies(nn.Linear(2, 2))


def test_half_precision_checkpoint_and_pickle():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)))
    model = pickle.loads(pickle.dumps(model)).bfloat16()
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    want = torch.autograd.grad(model(x).sum(), x)[0]
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_fake_tensors_predict_the_same_bytes():
    real = fewbit.GELU()
    x = torch.randn(33, 5, requires_grad=True)
    want = saved_bytes(lambda: real(x * 1), real)
    with FakeTensorMode():
        x = torch.randn(33, 5, requires_grad=True)
        assert saved_bytes(lambda: real(x * 1), real) == want
        real(x).sum().backward()
    assert x.grad.shape == x.shape


def hf_model(name):
    import transformers as hf

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = {
        "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
        "llama": lambda: hf.LlamaConfig(**small, intermediate_size=48, vocab_size=64),
        "opt": lambda: hf.OPTConfig(
            **small, ffn_dim=64, vocab_size=64, max_position_embeddings=32, word_embed_proj_dim=32
        ),
        "bert": lambda: hf.BertConfig(**small, intermediate_size=64, vocab_size=64),
        "vit": lambda: hf.ViTConfig(**small, intermediate_size=64, image_size=16, patch_size=4),
        "t5": lambda: hf.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
    }[name]()  # fmt: skip
    torch.manual_seed(0)
    ids = torch.arange(24).view(2, 12)
    x = {"input_ids": ids} if name != "vit" else {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "t5":
        x["decoder_input_ids"] = ids
    return hf.AutoModel.from_config(config).train(False), x


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "vit", "t5"])
def test_hugging_face_models(name, caplog):
    plain, x = hf_model(name)
    lean = copy.deepcopy(plain)
    with caplog.at_level("INFO"):
        convert(lean)
        before = caplog.text
        convert(lean)
    assert caplog.messages[-1] == "fewbit converted nothing"
    said = {
        "gpt2": "2 NewGELUActivation", "llama": "2 LlamaMLP", "opt": "2 ReLU", "t5": "4 NewGELU",
        "bert": "2 GELUActivation, 1 Tanh", "vit": "2 GELUActivation",
    }  # fmt: skip
    assert said[name] in before
    assert list(lean.state_dict()) == list(plain.state_dict())
    grads, kept = [], []
    for model in (lean, plain):
        out = model(**x).last_hidden_state
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        kept.append(saved_bytes(lambda m=model: m(**x).last_hidden_state, model, [*x.values()]))
    cosine = torch.cosine_similarity(*grads, dim=0)
    assert cosine > (0.999999 if name in ("llama", "opt") else 0.99)
    assert kept[0] < kept[1] or name == "opt"


def test_gated_mlp_keeps_two_tensors_of_three_exactly():
    model, _ = hf_model("llama")
    plain = model.layers[0].mlp
    lean = convert(nn.ModuleList([copy.deepcopy(plain)]))[0]
    naive = copy.deepcopy(plain)
    naive.act_fn = FewBit(naive.act_fn, 3)
    x = torch.randn(5, 32, requires_grad=True)
    n, b = 5 * 48, 4
    product = n * b  # the down projection's input, which its weight's gradient needs
    assert saved_bytes(lambda: plain(x), plain, [x]) == 3 * n * b + product
    assert saved_bytes(lambda: lean(x), lean, [x]) == 2 * n * b + product
    assert saved_bytes(lambda: naive(x), naive, [x]) == 2 * n * b + n * 3 // 8 + product
    for a, c in zip(lean.parameters(), plain.parameters(), strict=True):
        want = torch.autograd.grad(plain(x).square().sum(), c)[0]
        torch.testing.assert_close(torch.autograd.grad(lean(x).square().sum(), a)[0], want)
