"""What is particular to each form: oracles, layouts, rounding, errors."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from holdfast.errors import UsageError
from holdfast.forms import Affine, Blockwise, Dense, Fp8, Int4, Int8, Packed, Rank1, base
from holdfast.forms.affine import affine_ref
from holdfast.forms.blockwise import blockwise_ref


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=["half", "float"])
def test_dense_keeps_every_bit(dtype):
    kind = torch.bfloat16 if dtype == torch.int16 else torch.float32
    top = torch.iinfo(dtype)
    bits = torch.randint(top.min, top.max, (500,), dtype=dtype)  # NaN payloads among them
    x = torch.cat([bits.view(kind), torch.tensor([-0.0, torch.inf, torch.nan], dtype=kind)])
    assert torch.equal(Dense().encode(x).dequantize().view(dtype), x.view(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_affine_equals_reference(bits, symmetric):
    x = randn(5, 12)
    form = Affine(bits=bits, group=4, symmetric=symmetric, scale_dtype=torch.float32)
    want = [affine_ref(part.tolist(), bits, symmetric) for part in x.view(-1, 4)]
    got = form.encode(x).dequantize()
    torch.testing.assert_close(got, torch.tensor(want).view(5, 12), atol=1e-6, rtol=1e-6)


def test_affine_bytes_by_hand():
    # Three rows of 10: 30 bits are 4 bytes; per row one fp16 scale and one zero point.
    assert Affine(bits=3, group=None).nbytes((3, 10), torch.float32) == 3 * (4 + 2 + 1)
    assert Int8().nbytes((3, 10), torch.bfloat16) == 3 * (10 + 4)
    assert Int4(group=5).nbytes((3, 10), torch.float32) == 3 * (5 + 2 * 3)


def test_affine_group_must_divide():
    with pytest.raises(UsageError, match=r"group=64 does not divide.*\(3, 100\).*divisor of 100"):
        Int4().nbytes((3, 100), torch.float32)


def test_fp16_scale_overflow_names_the_remedy():
    x = torch.tensor([[1e6, -1e6]])
    with pytest.raises(UsageError, match=r"too large.*scale_dtype=torch\.float32"):
        Affine(bits=4, group=None).encode(x)
    got = Affine(bits=8, group=None, scale_dtype=torch.float32).encode(x).dequantize()
    torch.testing.assert_close(got, x, rtol=1e-2, atol=0)


def test_stochastic_rounding_is_unbiased_and_seeded():
    form = Affine(8, None, symmetric=True, scale_dtype=torch.float32, rounding="stochastic")
    x = torch.full((10_000, 4), 0.3)
    x[:, 0] = 1.0  # scale 1/127; 0.3 * 127 = 38.1 rounds up once in ten
    g = torch.Generator().manual_seed(0)
    first = form.encode(x, generator=g)
    mean = first.dequantize()[:, 1:].double().mean().item()
    standard_error = (0.1 * 0.9 / 30_000) ** 0.5 / 127
    assert abs(mean - 0.3) < 4 * standard_error
    again = form.encode(x, generator=g.manual_seed(0))
    assert torch.equal(first.buffers["codes"], again.buffers["codes"])
    nearest = Affine(8, None, symmetric=True, scale_dtype=torch.float32).encode(x).dequantize()
    assert abs(nearest[:, 1:].double().mean().item() - 0.3) > 4 * standard_error


@pytest.mark.parametrize("map", ["dynamic4", "nf4", "dynamic8"])
@pytest.mark.parametrize("numel", [1, 9, 16, 31])
def test_blockwise_equals_reference(map, numel):
    x = randn(numel)
    got = Blockwise(map, 8).encode(x).dequantize()
    want = torch.tensor(blockwise_ref(x.tolist(), map, 8))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_blockwise_layout_by_hand():
    # linear4: k/16 has code k - 1. A block of 4, then a tail of 3 whose second half is one code.
    x = torch.tensor([16.0, 2, 3, 4, 16, 6, 7]) / 16
    packed = Blockwise("linear4", 4).encode(x)
    assert packed.buffers["scale"].tolist() == [1, 1]
    assert packed.buffers["codes"].tolist() == [15 | 2 << 4, 1 | 3 << 4, 15 | 6 << 4, 5]
    assert Blockwise("linear4", 4).nbytes((7,), torch.float32) == 4 + 2 * 4


def test_ties_take_the_smaller_value():
    x = torch.tensor([1.0, 3 / 32])  # halfway between 1/16 and 2/16
    assert Blockwise("linear4", 2).encode(x).dequantize().tolist() == [1, 1 / 16]


def test_subnormal_blocks_decode_without_nan():
    x = torch.full((128,), 1e-41)
    for form in (Blockwise("linear4"), Blockwise("dynamic4"), Int8(), Fp8(scale="block")):
        assert (form.encode(x).dequantize() - x).abs().max() <= 2**-126 * 128


def test_unsigned_maps_refuse_negative_entries():
    for form in (Blockwise("linear4"), Rank1(), Blockwise("dynamic8_unsigned")):
        with pytest.raises(UsageError, match=r"no negative values.*-1"):
            form.encode(torch.tensor([[1.0, -1.0]]))


def test_rank1_scale_is_the_smallest_maximum():
    x = torch.tensor([[8.0, 1.0], [4.0, 0.5]])
    packed = Rank1().encode(x)
    assert packed.buffers["axis0"].tolist() == [8, 4]
    assert packed.buffers["axis1"].tolist() == [8, 1]
    assert packed.dequantize().tolist() == [[8, 1], [4, 0.5]]
    assert Rank1().nbytes((3, 5, 7), torch.float32) == 53 + 4 * (3 + 5 + 7)


def test_rank1_beats_blocks_on_outlying_rows_and_columns():
    v = randn(64, 128).square() * 1e-4
    v[3] *= 1e4
    v[:, 5] *= 1e4

    def error(form):
        keep = torch.ones_like(v, dtype=torch.bool)
        keep[3], keep[:, 5] = False, False
        return (form.encode(v).dequantize() - v)[keep].abs().mean()

    assert error(Rank1()) < 0.5 * error(Blockwise("linear4", 128))


@pytest.mark.parametrize("kind, largest", [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_fp8_keeps_numbers_of_its_format(kind, largest):
    x = torch.tensor([largest, -largest / 2, 1.5, 0.0])
    got = Fp8(kind).encode(x).dequantize()
    assert got[0] == largest and got[3] == 0
    torch.testing.assert_close(got, x, rtol=2**-22, atol=0)  # two fp32 roundings


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Affine(bits=5), "bits=5"),
        (lambda: Affine(rounding="up"), "rounding='up'"),
        (lambda: Affine(group=0), "group=0"),
        (lambda: Blockwise(block=7), "block=7"),
        (lambda: Blockwise("nf5"), "nearest known: nf4"),
        (lambda: Fp8("e3m4"), "kind='e3m4'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("form", [Dense(), Int4(group=32), Blockwise("nf4", 64)], ids=str)
def test_tied_weights_stay_tied_and_copies_are_parameters(form):
    embedding, head = nn.Embedding(16, 64), nn.Linear(64, 16, bias=False)
    weight = nn.Parameter(form.encode(embedding.weight.detach()), requires_grad=False)
    embedding.weight = head.weight = weight
    model = copy.deepcopy(nn.Sequential(embedding, head))
    assert model[0].weight is model[1].weight and len(list(model.parameters())) == 1
    ids = torch.tensor([3, 1])
    assert torch.equal(model(ids), head(embedding(ids)))


class LargestResult(TorchDispatchMode):
    """The largest storage, in bytes, that any operation returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "form", [Int4(group=32), Affine(3, 32), Blockwise("nf4", 64), Rank1("dynamic8"), Fp8()], ids=str
)
def test_scratch_is_bounded_by_tiles(form, monkeypatch):
    """Multiplying, forward and backward, makes nothing larger than one fp32 or int32 tile."""
    monkeypatch.setattr(base, "tile_numel", lambda device: 2048)
    packed = form.encode(randn(128, 256))
    x = randn(2, 256).requires_grad_()
    with LargestResult() as largest:
        F.linear(x, packed).sum().backward()
    stored = max(b.untyped_storage().nbytes() for b in packed.buffers.values())
    assert largest.nbytes <= max(4 * 2048, stored) < 4 * 128 * 256


class LiveBytes(TorchDispatchMode):
    """Peak bytes of storages that operations made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Packed):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(
    "form", [Int4(group=32), Affine(3, 32), Blockwise("nf4", 64), Rank1("nf4"), Fp8()], ids=str
)
def test_prediction_skips_tiles_but_not_bytes_or_operations(form, monkeypatch):
    monkeypatch.setattr(base, "tile_numel", lambda device: 2048)

    def step():
        weight, x = torch.ones(130, 256), torch.ones(2, 256, requires_grad=True)
        packed, peaks = form.encode(weight, check=False), []
        for run in (
            lambda: form.encode(weight, check=False),
            lambda: form.decode(packed),
            lambda: F.linear(x, packed).sum().backward(),
        ):
            with LiveBytes() as live, FlopCounterMode(display=False) as flops:
                run()
            peaks.append((live.peak, flops.get_total_flops()))
        return peaks

    real = step()
    assert 0 < real[2][0] < 4 * 130 * 256 and real[2][1] == 2 * (2 * 2 * 130 * 256)
    with FakeTensorMode():
        assert step() == real


def test_repr_and_missing_buffers():
    packed = Int8().encode(randn(2, 4))
    assert "shape=(2, 4)" in repr(packed) and "nbytes_packed=16" in repr(packed)
    with pytest.raises(UsageError, match=r"has buffers \['codes', 'scale'\], got \['codes'\]"):
        Packed.from_buffers(Int8(), (2, 4), torch.float32, {"codes": packed.to_buffers()["codes"]})
    with pytest.raises(UsageError, match=r"undo \.t"):
        packed.t().to_buffers()
