import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from holdfast.errors import UsageError
from holdfast.forms.bits import unpack
from holdfast.training import adapters
from holdfast.training.adapters import peqa
from holdfast.training.adapters.peqa import METHOD, PEQA, quantize


def dense_ref(layer):
    """The weight (m, n) as autograd would see it: s (1 + c) (q - z), all at once."""
    q = unpack(layer.codes, layer.bits, layer.in_features).float()
    s = layer.scale * (1 + layer.scale_change)
    centred = q.unflatten(1, (s.shape[1], -1)) - layer.zeros[..., None].float()
    return (s[..., None] * centred).flatten(1)


@pytest.mark.parametrize("tile", [1 << 20, 60])
@pytest.mark.parametrize(("bits", "group"), [(4, None), (3, 12), (2, 6), (8, None)])
@pytest.mark.parametrize("linear", [nn.Linear(24, 30), nn.Linear(36, 7, bias=False), Conv1D(9, 24)])
def test_forward_and_gradients_equal_dense(linear, bits, group, tile, monkeypatch):
    monkeypatch.setattr(peqa, "TILE", tile)
    layer = PEQA(_copy(linear), bits=bits, group=group)
    with torch.no_grad():
        layer.scale_change.copy_(torch.rand_like(layer.scale))
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    want = nn.functional.linear(x, dense_ref(layer), layer.bias)
    got = layer(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    leaves = [x, layer.scale_change]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def _copy(linear):
    torch.manual_seed(0)
    new = Conv1D(linear.nf, linear.nx) if isinstance(linear, Conv1D) else None
    bias = getattr(linear, "bias", None) is not None
    return new or nn.Linear(linear.in_features, linear.out_features, bias=bias)


def test_frozen_input_and_no_rows():
    layer = PEQA(nn.Linear(16, 8))
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.scale_change.grad.shape == (8, 1)
    assert layer(torch.randn(0, 16)).shape == (0, 8)


def test_rounding_by_hand():
    w = torch.tensor([[-1.0, 0.0, 0.5, 2.0, 0, 0, 0, 0]])
    codes, zeros, scale = quantize(w, bits=2, group=4)
    assert scale.tolist() == [[1.0, 1.0]]  # (2 - -1) / 3; a group of zeros has no range
    assert zeros.tolist() == [[1, 0]]
    assert codes.tolist() == [[0, 1, 1, 3, 0, 0, 0, 0]]  # 0.5 rounds to the even 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_error_is_at_most_half_a_step(bits):
    w = torch.randn(20, 32)
    codes, zeros, scale = quantize(w, bits, group=8)
    grid = codes.unflatten(1, (4, 8)).float() - zeros[..., None]
    error = (grid * scale[..., None]).flatten(1) - w
    # Half a step, and half a step more at the ends of the range where the zero was rounded.
    assert (error.abs() <= scale.repeat_interleave(8, 1) * 1.001).all()
    assert error.abs().mean() <= scale.mean() * 0.3


def test_integers_never_change_and_tasks_swap_exactly():
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
    adapters.attach(model, "peqa", bits=3, group=8)
    integers = {name: b.clone() for name, b in model.named_buffers()}
    x, y = torch.randn(64, 32), torch.randn(64, 8)
    tasks = []
    for sign in (1, -1):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), sign * y).backward()
            optimizer.step()
        state = {k: v.clone() for k, v in adapters.adapter_state_dict(model).items()}
        tasks.append((state, model(x)))
    assert not torch.equal(tasks[0][1], tasks[1][1])
    for state, output in tasks:
        adapters.load_adapter_state_dict(model, state)
        assert torch.equal(model(x), output)
    assert all(torch.equal(b, integers[name]) for name, b in model.named_buffers())


class LargestFloat(TorchDispatchMode):
    """The largest floating-point storage that an operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.largest = max(self.largest, size)
        return out


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize(("n", "m"), [(256, 192), (192, 256)])
def test_no_dense_float_is_ever_made(n, m, group, monkeypatch):
    monkeypatch.setattr(peqa, "TILE", 4096)
    model = adapters.attach(nn.Sequential(nn.Linear(n, m)), "peqa", group=group)
    x = torch.randn(6, n, requires_grad=True)
    with LargestFloat() as seen:
        model(x).square().sum().backward()
    # A tile is at least one row, or one aligned run of columns.
    assert seen.largest <= max(4096, 32 * m)
    assert seen.largest < n * m // 4


@pytest.mark.parametrize(("n", "m", "group"), [(48, 16, None), (16, 48, None), (48, 16, 16)])
def test_keeps_the_narrow_side_for_one_scale_a_row(n, m, group):
    layer = PEQA(nn.Linear(n, m).requires_grad_(False), group=group)
    x = torch.randn(10, n, requires_grad=True)
    own = {t.data_ptr() for t in layer.buffers()}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    kept = sum(size for pointer, size in saved.items() if pointer not in own)
    scales = layer.scale.numel() * 4
    assert kept == 4 * 10 * (n if group else min(n, m)) + scales


def test_bytes_equal_the_formula_and_the_dense_weight_is_gone():
    linear = nn.Linear(60, 32)
    dense = linear.weight.untyped_storage()._weak_ref()
    model = nn.Sequential(linear)
    del linear
    adapters.attach(model, "peqa", bits=3, group=20)
    gc.collect()
    assert torch.UntypedStorage._expired(dense)
    torch.UntypedStorage._free_weak_ref(dense)
    held = [*model.parameters(), *model.buffers()]
    codes = 32 * -(-60 * 3 // 8) + 32 * 3
    scales = 2 * 4 * 32 * 3
    assert sum(t.untyped_storage().nbytes() for t in held) == codes + scales + 4 * 32


def test_a_scale_that_reaches_zero_is_held_and_reported():
    layer = PEQA(nn.Linear(8, 4))
    with torch.no_grad():
        layer.scale_change[1] = -2
    with pytest.warns(UserWarning, match="a scale reached zero.*lower the learning rate"):
        scales = layer.scales()
    assert torch.allclose(scales[1], layer.scale[1] * 1e-3)
    assert torch.equal(scales[2:], layer.scale[2:])
    scales.sum().backward()
    assert torch.equal(layer.scale_change.grad, layer.scale)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"group": 7}, "group=7 does not divide the 12 inputs of 1;.* example 4"),
        ({"bits": 5}, "bits=5 is not a size"),
    ],
)
def test_bad_knobs_leave_the_model_alone(knobs, message):
    model = nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 7))
    with pytest.raises(UsageError, match=message):
        adapters.attach(model, "peqa", **knobs)
    assert [type(m) for m in model] == [nn.Linear] * 2
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(1, 7))


def test_autocast():
    layer = PEQA(nn.Linear(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.scale_change.grad.dtype == torch.float32


def test_method_attaches():
    model = METHOD.apply(nn.Sequential(nn.Linear(64, 100)), **METHOD.defaults())
    assert model[0].codes.shape == (100, 32)
