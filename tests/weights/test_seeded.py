"""Weights made from a seed: the same bits however they are made, nothing kept, exact gradients."""

import pytest
import torch
import torch.nn.functional as F

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.weights.seeded import CHUNK, SeededLinear, hashed, mixed_ref, normal

GOLDEN = 0x9E3779B97F4A7C15


@pytest.mark.parametrize("seed, stream", [(0, 0), (7, 1), (-1, 2), (2**64 - 1, 2), (2**63, 0)])
def test_hashes_equal_the_reference_in_python_integers(seed, stream):
    positions = [0, 1, 2, 12345, 2**40]
    start = mixed_ref(seed + GOLDEN * (2 * stream + 1))
    want = [mixed_ref((p + 1) * GOLDEN + start) for p in positions]
    got = hashed(seed, torch.tensor(positions), stream)
    assert [value % 2**64 for value in got.tolist()] == want


def test_scrambling_is_splitmix64():
    # The first output of SplitMix64 seeded with 0, as its author publishes it.
    assert mixed_ref(GOLDEN) == 0xE220A8397B1DCDAF


def test_normal_by_hand():
    words = [value % 2**64 for value in hashed(3, torch.arange(3, 6)).tolist()]
    parts = [word >> 16 * i & 0xFFFF for word in words for i in range(4)]
    assert normal(3, 1, 2).item() == (sum(parts) - 6 * 65535) / 65536


def test_any_part_made_alone_has_the_bits_of_the_whole():
    whole = normal(5, 0, CHUNK + 500)
    for start, stop in ((0, 1), (17, 900), (CHUNK - 3, CHUNK + 4), (400, CHUNK + 500), (9, 9)):
        assert torch.equal(normal(5, start, stop), whole[start:stop])


def test_numbers_are_nearly_normal_and_streams_and_seeds_independent():
    rows = torch.stack([normal(s, 0, 200_000, stream) for s, stream in ((0, 0), (0, 1), (1, 0))])
    assert rows.mean(1).abs().max() < 0.01 and rows.abs().max() < 6
    torch.testing.assert_close(rows.var(1), torch.ones(3), atol=0.015, rtol=0)
    # Twelve uniform numbers: 3 - 1.2 / 12.
    torch.testing.assert_close((rows**4).mean(1), torch.full((3,), 2.9), atol=0.08, rtol=0)
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 0.01
    lagged = torch.corrcoef(torch.stack([rows[0, :-1], rows[0, 1:]]))[0, 1]
    assert abs(lagged) < 0.01


@pytest.mark.parametrize("tile", [1, 5, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_linear_map_of_its_weight(tile, dtype):
    linear = SeededLinear(6, 11, seed=3, tile=tile, dtype=dtype)
    weight = linear.weight()
    assert weight.dtype == dtype and torch.equal(
        weight, SeededLinear(6, 11, 3, dtype=dtype).weight()
    )
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    y = linear(x)
    assert y.dtype == dtype
    grad = torch.randn_like(y)
    y.backward(grad)
    same = {"atol": 0.06, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, F.linear(x, weight), **same)
    torch.testing.assert_close(x.grad, grad @ weight, **same)


def test_the_state_is_eight_bytes_and_brings_the_weight_back():
    linear = SeededLinear(5, 4, seed=-9)
    assert not list(linear.parameters())
    assert sum(t.nbytes for t in linear.state_dict().values()) == 8
    other = SeededLinear(5, 4, seed=1)
    assert not torch.equal(other.weight(), linear.weight())
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight(), linear.weight())
    assert torch.equal(other.to(torch.bfloat16).weight(), linear.weight())


def test_autograd_saves_nothing_and_no_more_than_a_tile_is_held():
    x = torch.randn(2, 1024, requires_grad=True)
    peaks, saved = [], []
    for tile in (32, 1024):
        linear = SeededLinear(1024, 1024, seed=0, tile=tile)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            linear(x)
        assert not saved
        with Meter(linear, inputs={"x": x}) as meter:
            linear(x).sum().backward()
        peaks.append(meter.peak)
        x.grad = None
    weight, tile = 4 * 1024**2, 4 * 32 * 1024
    # In the first all but one tile is not there; what a chunk of numbers takes is in both.
    assert peaks[1] - peaks[0] >= weight - 2 * tile


def test_scale_is_the_deviation():
    assert SeededLinear(100, 300, 0).weight().std().item() == pytest.approx(0.1, rel=0.02)
    assert SeededLinear(100, 300, 0, scale=3.0).weight().std().item() == pytest.approx(3, rel=0.02)


def test_empty_weights_are_refused():
    with pytest.raises(UsageError, match=r"4 x 0 in tiles of 256 rows is empty"):
        SeededLinear(0, 4, 0)
