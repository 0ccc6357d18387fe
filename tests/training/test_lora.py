import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from holdfast.errors import UsageError
from holdfast.training.adapters import attach, merge
from holdfast.training.adapters.lora import METHOD, LoRA


def lora_ref(x, linear, layer):
    """LoRA as in the paper, with a weight of its own."""
    return linear(x) + layer.scale * (x @ layer.lora_A.T @ layer.lora_B.T)


def with_b(linear, **knobs):
    layer = LoRA(linear, **knobs)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("linear", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), Conv1D(5, 6)])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_equals_reference(linear, shape):
    layer = with_b(linear, rank=3, alpha=6)
    assert layer.scale == 2
    x = torch.randn(shape, requires_grad=True)
    want = lora_ref(x.unsqueeze(0), linear, layer).squeeze(0)
    got = layer(x)
    torch.testing.assert_close(got, want)
    leaves = [x, layer.lora_A, layer.lora_B]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_keeps_x_once_and_its_projection():
    linears = nn.ModuleList(nn.Linear(64, 32) for _ in range(3))
    attach(linears, "lora", rank=4)
    x = torch.randn(10, 64, requires_grad=True)
    frozen = {p.untyped_storage().data_ptr() for p in linears.parameters()}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = sum(linear(x) for linear in linears)
    kept = sum(size for pointer, size in saved.items() if pointer not in frozen)
    assert kept == 4 * (10 * 64 + 3 * 10 * 4)
    y.sum().backward()


def test_dropout_only_while_training():
    torch.manual_seed(0)
    layer = with_b(nn.Linear(8, 8), dropout=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_autocast():
    layer = with_b(nn.Linear(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_plain_module_of_torch_in_evaluation():
    # torch's encoder has a fast path that would read the weights past the adapter.
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    attach(model.eval(), "lora")
    nn.init.normal_(model.layers[0].linear1.lora_B)
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(merge(model)(x), want)


@pytest.mark.parametrize(
    ("knobs", "message"), [({"rank": 0}, "rank=0 trains nothing"), ({"dropout": 1.0}, "outside")]
)
def test_bad_knobs(knobs, message):
    with pytest.raises(UsageError, match=message):
        LoRA(nn.Linear(2, 2), **knobs)


def test_method_attaches():
    model = METHOD.apply(nn.Sequential(nn.Linear(4, 6)), **METHOD.defaults())
    assert model[0].lora_A.shape == (8, 4)
    assert model[0].lora_B.shape == (6, 8)
