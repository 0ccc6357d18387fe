import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from holdfast.errors import UsageError
from holdfast.forms import base as forms
from holdfast.forms.packed import Packed
from holdfast.meter import StorageLog
from holdfast.training import adapters
from holdfast.training.adapters.packed import METHODS, form_of, pack_weights


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(128, 96), nn.Tanh(), Conv1D(48, 96), nn.Tanh(), nn.Linear(48, 7)
    ).to(dtype)


def held(module):
    return sum(
        t.nbytes_packed if isinstance(t.data, Packed) else t.nbytes for t in module.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_lora_beside_packed_weights_trains_merges_and_detaches(bits, dtype):
    model, x = model_of(dtype), torch.randn(16, 128).to(dtype)
    dense = model(x)
    classes = [type(m) for m in model]
    pack_weights(model, bits)
    rounded = model(x)
    assert (rounded - dense).abs().max() < {4: 0.2, 8: 0.05}[bits]
    adapters.attach(model, "lora", rank=4)
    assert torch.equal(model(x), rounded)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(x)
    adapters.merge(model)
    assert [type(m) for m in model] == classes
    assert not any(isinstance(p.data, Packed) for p in model.parameters())
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(model(x), trained, atol=close, rtol=0)


def test_detach_gives_the_packed_model_back():
    model, x = pack_weights(model_of()), torch.randn(3, 128)
    before, weights = model(x), [m.weight for m in model if hasattr(m, "weight")]
    adapters.detach(adapters.attach(model, "lora"))
    assert torch.equal(model(x), before)
    assert all(a is b for a, b in zip(weights, (model[i].weight for i in (0, 2, 4)), strict=True))


def test_bytes_equal_the_formula_and_dense_weights_are_gone():
    model = model_of()
    dense = [model[i].weight.untyped_storage()._weak_ref() for i in (0, 2, 4)]
    formula = sum(
        # codes, fp16 scale and byte of zero per group, fp32 bias
        rows * (columns * 4 // 8) + rows * columns // group * 3 + rows * 4
        for rows, columns, group in ((96, 128, 64), (48, 96, 32), (7, 48, 16))
    )
    pack_weights(model)
    gc.collect()
    assert held(model) == formula
    for reference in dense:
        assert torch.UntypedStorage._expired(reference)
        torch.UntypedStorage._free_weak_ref(reference)


def test_no_dense_weight_lives_in_a_step_but_one_tile(monkeypatch):
    monkeypatch.setattr(forms, "tile_numel", lambda device: 512)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    adapters.attach(pack_weights(model), "lora", rank=2)
    x = torch.randn(2, 256)
    with StorageLog() as log:
        model(x).sum().backward()
    assert max(storage.nbytes for storage in log.log.storages) < 4 * 256 * 256 // 8


def test_fake_tensors():
    with FakeTensorMode():
        model = pack_weights(nn.Sequential(nn.Linear(128, 96), Conv1D(48, 96)))
        adapters.attach(model, "lora")
        model(torch.randn(2, 128)).sum().backward()
        assert held(model[1]) == 48 * 48 + 48 * 3 * 3 + 48 * 4 + 4 * 8 * (96 + 48)


def test_small_inputs_share_one_scale_a_row():
    assert form_of(nn.Linear(7, 4), 4).group is None
    assert form_of(nn.Linear(176, 4), 4).group == 16


def test_bad_use():
    tied = nn.ModuleDict({"embed": nn.Embedding(8, 4), "out": nn.Linear(4, 8)})
    tied["out"].weight = tied["embed"].weight
    with pytest.raises(UsageError, match="are one tensor"):
        pack_weights(tied)
    assert "one tensor" in METHODS[0].applies(tied)
    model = pack_weights(model_of())
    with pytest.raises(UsageError, match=r"0 is .* already"):
        pack_weights(model)
    with pytest.raises(UsageError, match="bits=5"):
        pack_weights(model_of(), bits=5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
def test_method(method):
    model = model_of()
    assert method.applies(model) is None
    method.apply(model)
    assert isinstance(model[0].weight.data, Packed)
    assert method.quality().kind == "lossy"
