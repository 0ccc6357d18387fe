import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from holdfast.errors import HoldfastError
from holdfast.training.saved import saved_bytes
from holdfast.training.saved.lean import pack_mask, where_set
from holdfast.training.saved.memsave import METHOD, memsave

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 9, 8)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same", bias=False), (2, 4, 7, 8)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d_single": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 4),
    ),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(5), (7, 5)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "batchnorm2d_plain": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 5, 6)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(2), (3, 2, 3, 4, 2)),
    "relu": (nn.ReLU, (3, 7)),
    "relu_inplace": (lambda: nn.Sequential(nn.Hardtanh(), nn.ReLU(inplace=True)), (3, 7)),
    "dropout": (lambda: nn.Dropout(0.1), (3, 70)),
    "dropout_all": (lambda: nn.Dropout(1.0), (3, 7)),
    "maxpool1d": (lambda: nn.MaxPool1d(3), (2, 4, 11)),
    "maxpool2d": (lambda: nn.MaxPool2d(3, 2, padding=1), (2, 4, 9, 8)),
    "maxpool2d_ceil": (lambda: nn.MaxPool2d((3, 2), 2, dilation=2, ceil_mode=True), (2, 4, 9, 8)),
    "maxpool3d": (lambda: nn.MaxPool3d(2, 1), (2, 2, 4, 5, 3)),
    "rmsnorm": (lambda: nn.RMSNorm(12), (3, 5, 12)),
    "rmsnorm_plain": (lambda: nn.RMSNorm(12, eps=1e-5, elementwise_affine=False), (3, 12)),
}


def run(model, x):
    """Output and every gradient of a fixed weighted sum."""
    model.zero_grad()
    torch.manual_seed(1)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    if y.requires_grad:
        (y * weights).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("from_input", [True, False], ids=["dx", "no_dx"])
def test_equals_original(name, trainable, train, from_input):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = build().train(train).requires_grad_(trainable)
    lean = memsave(copy.deepcopy(plain))
    x = torch.randn(shape, requires_grad=from_input)
    for got, want in zip(run(lean, x), run(plain, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in LAYERS if "dropout" not in n])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_gradcheck(name, trainable):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    model = memsave(build().double().eval())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in model.named_parameters()] if trainable else []
    model.requires_grad_(trainable)

    def call(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

    inputs = (x, *model.parameters()) if trainable else (x,)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_weight_alone_needs_a_gradient():
    torch.manual_seed(0)
    conv = memsave(nn.Conv2d(2, 3, 3).double())
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(conv, {"weight": w}, x), conv.weight
    )


@pytest.mark.parametrize("train", [True, False])
def test_saved_bytes_follow_the_rules_per_call(train):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    n, b = x.numel(), 4
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    relu, pool, drop = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1)
    for layer in (conv, norm, relu, pool, drop):
        memsave(layer.train(train))

    def kept(layer):
        return saved_bytes(lambda: layer(x * 1), layer)  # x * 1: not the caller's own tensor

    assert kept(conv) == n * b
    assert kept(conv.requires_grad_(False)) == 0
    assert kept(conv.requires_grad_(True)) == n * b
    assert kept(norm) == n * b + train * 2 * 4 * b  # PyTorch keeps mean and 1/std of the batch
    assert train or kept(norm.requires_grad_(False)) == 0
    assert kept(relu) == n // 8
    assert kept(pool) == n // 4
    assert kept(drop) == train * n // 8
    with torch.no_grad():
        assert sum(kept(layer) for layer in (conv, norm, relu, pool)) == 0


def test_window_index_takes_the_smallest_type():
    x = torch.randn(1, 40, 1200, requires_grad=True)
    for window, size in ((200, 1), (300, 2), (1200, 2)):
        pool = memsave(nn.MaxPool1d(window))
        assert saved_bytes(lambda p=pool: p(x * 1), pool) == 40 * (1200 // window) * size


def resnet_like(trainable_every=2):
    torch.manual_seed(0)

    def unit(i, o):
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    stem = [*unit(3, 8), nn.MaxPool2d(2)]
    blocks = [layer for _ in range(4) for layer in unit(8, 8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = nn.Sequential(*stem, *blocks, *head)
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
    for i, conv in enumerate(m for m in model if isinstance(m, nn.Conv2d)):
        conv.requires_grad_(i % trainable_every == 0)
    return model


def test_resnet_like_keeps_the_needed_inputs_and_30_percent_less():
    plain = resnet_like()
    lean = memsave(copy.deepcopy(plain))
    x = torch.randn(4, 3, 16, 16)
    full, pooled, b = 4 * 8 * 16 * 16, 4 * 8 * 8 * 8, 4
    # Convolutions 0, 2, 4 train: 0 sees the caller's x, 2 and 4 a pooled map each. One mask per
    # ReLU, one byte per pooled element, the head's 32 features.
    want = 2 * pooled * b + (full + 4 * pooled) // 8 + pooled + 32 * b
    got = saved_bytes(lambda: lean(x), lean, [x])
    assert got == want
    assert got <= 0.7 * saved_bytes(lambda: plain(x), plain, [x])
    for a, c in zip(run(lean, x), run(plain, x), strict=True):
        torch.testing.assert_close(a, c, atol=1e-6, rtol=1e-5)


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.ReLU(), nn.MaxPool2d(2))
    lean = memsave(copy.deepcopy(plain))
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    half = [run(m, x.detach().bfloat16().requires_grad_()) for m in map(_bf16, (lean, plain))]
    for a, c in zip(*half, strict=True):
        torch.testing.assert_close(a, c)
    with torch.autocast("cpu", torch.bfloat16):
        for a, c in zip(run(lean, x), run(plain, x), strict=True):
            torch.testing.assert_close(a, c)


def _bf16(model):
    return copy.deepcopy(model).bfloat16()


@pytest.mark.parametrize(
    "name", ["conv2d", "batchnorm2d", "relu", "dropout", "maxpool2d", "rmsnorm"]
)
def test_double_backward_is_refused(name):
    build, shape = LAYERS[name]
    model = memsave(build())
    model.requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    if name == "batchnorm2d":
        model.eval()
    with pytest.raises(HoldfastError, match=r"no double backward.*original layer"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_checkpoint_draws_the_same_dropout():
    torch.manual_seed(0)
    model = memsave(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2)))
    model[0].requires_grad_(False)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    plain = run(model, x)
    again = run(Checkpointed(model), x)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], again[:2], strict=True))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_fake_tensors_predict_the_same_bytes():
    model, x = memsave(resnet_like()), torch.zeros(4, 3, 16, 16)
    real = saved_bytes(lambda: model(x), model, [x])
    with FakeTensorMode():
        fake = memsave(resnet_like())
        x = torch.zeros(4, 3, 16, 16)
        assert saved_bytes(lambda: fake(x), fake, [x]) == real
        fake(x).sum().backward()
    assert fake[0].weight.grad.shape == fake[0].weight.shape


def test_masks_of_any_size_take_one_bit():
    for n in (0, 1, 7, 8, 9, 64, 1001):
        mask = torch.rand(n) < 0.5
        assert pack_mask(mask).numel() == -(-n // 8)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.full((n,), float("inf"), dtype=dtype)
            assert torch.equal(where_set(pack_mask(mask), x), x.where(mask, 0))


def test_relu_passes_nan_like_pytorch():
    x = torch.tensor([float("nan"), -1.0, 0.0, 2.0], requires_grad=True)
    y = memsave(nn.ReLU())(x)
    assert y.isnan().tolist() == [True, False, False, False]
    assert torch.autograd.grad(y, x, torch.ones(4))[0].tolist() == [1, 0, 0, 1]


def test_conversion_keeps_names_and_classes():
    model = resnet_like()
    keys = list(model.state_dict())
    memsave(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], nn.Conv2d) and type(model[0]) is not nn.Conv2d
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is type(model[0])
    first = type(model[0])
    assert type(memsave(model)[0]) is first  # a second conversion changes nothing


def hf_models():
    from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, OPTConfig, ViTConfig

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ids = torch.arange(24).view(2, 12)
    gpt = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    llama = LlamaConfig(**small, intermediate_size=48, vocab_size=64)
    opt = OPTConfig(
        **small, ffn_dim=64, vocab_size=64, max_position_embeddings=32, word_embed_proj_dim=32
    )
    bert = BertConfig(**small, intermediate_size=64, vocab_size=64)
    vit = ViTConfig(**small, intermediate_size=64, image_size=16, patch_size=4)
    vit.hidden_dropout_prob = 0.1
    image = torch.randn(2, 3, 16, 16)
    return {
        "llama": (AutoModel, llama, {"LlamaRMSNorm": 5}, ids),
        "gpt2": (AutoModel, gpt, {"Dropout": 7}, ids),
        "opt": (AutoModel, opt, {"ReLU": 2}, ids),
        "bert": (AutoModel, bert, {"Dropout": 7}, ids),
        "vit": (AutoModel, vit, {"Conv2d": 1, "Dropout": 3}, image),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit"])
def test_hugging_face_models(name, caplog):
    auto, config, changed, x = hf_models()[name]
    torch.manual_seed(0)
    plain = auto.from_config(config).train()
    lean = copy.deepcopy(plain)
    with caplog.at_level("INFO"):
        memsave(lean)
    for kind, count in changed.items():
        assert f"{count} {kind}" in caplog.text
    assert METHOD.applies(plain) is None

    def grads(model):
        torch.manual_seed(1)
        model.zero_grad()
        model(x).last_hidden_state.square().mean().backward()
        return [p.grad for p in model.parameters()]

    for a, c in zip(grads(lean), grads(plain), strict=True):
        torch.testing.assert_close(a, c, atol=1e-6, rtol=1e-4)
    kept = {}
    for which, model in (("lean", lean), ("plain", plain)):
        torch.manual_seed(1)
        kept[which] = saved_bytes(lambda m=model: m(x).last_hidden_state, model, [x])
    # Masks of ReLUs whose output the next layer keeps anyway are the only thing that can be added.
    assert kept["lean"] < kept["plain"] if name != "opt" else kept["lean"] <= 1.02 * kept["plain"]


def test_rms_norms_of_other_models_are_told_apart_by_their_code():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.mt5.modeling_mt5 import MT5LayerNorm

    assert type(memsave(MistralRMSNorm(4))) is not MistralRMSNorm
    assert type(memsave(MT5LayerNorm(4))) is not MT5LayerNorm
    assert type(memsave(GemmaRMSNorm(4))) is GemmaRMSNorm
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    norm = MistralRMSNorm(16).bfloat16()
    want = torch.autograd.grad(norm(x).float().square().sum(), x)[0]
    plain = saved_bytes(lambda: norm(x * 1), norm)
    memsave(norm)
    got = torch.autograd.grad(norm(x).float().square().sum(), x)[0]
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    rows, n = 15, 240
    assert saved_bytes(lambda: norm(x * 1), norm) == 2 * n + 4 * rows
    assert plain >= 4 * n + 2 * n


def test_nothing_to_convert_is_said():
    assert "no layer" in METHOD.applies(nn.Linear(2, 2))


def test_one_byte_of_mask_is_not_a_slice_of_eight():
    packed = pack_mask(torch.tensor([True, False]))
    assert packed.untyped_storage().nbytes() == 1 and packed.stride() == (1,)
