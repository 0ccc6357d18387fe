"""Packing of codes and the values of the code maps, against numbers worked out by hand."""

import pytest
import torch

from holdfast.errors import UsageError
from holdfast.forms import maps
from holdfast.forms.bits import BITS, pack, packed_nbytes, unpack


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", [0, 1, 3, 7, 8, 9, 17, 64])
def test_pack_is_a_little_endian_bit_stream(bits, numel):
    g = torch.Generator().manual_seed(numel)
    codes = torch.randint(0, 2**bits, (3, numel), generator=g, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_nbytes(numel, bits)) and packed.dtype == torch.uint8
    for row, want in zip(packed, codes, strict=True):
        stream = sum(code << (bits * i) for i, code in enumerate(want.tolist()))
        assert int.from_bytes(bytes(row.tolist()), "little") == stream
    assert torch.equal(unpack(packed, bits, numel), codes)


def test_three_bits_take_three_bits():
    assert [packed_nbytes(n, 3) for n in (0, 1, 3, 8, 9, 800)] == [0, 1, 2, 3, 4, 300]


def test_pack_errors_name_the_remedy():
    with pytest.raises(UsageError, match=r"bits=5.*expected one of"):
        pack(torch.zeros(4, dtype=torch.uint8), 5)
    with pytest.raises(UsageError, match="2 bytes per row cannot hold 9 codes of 4 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 9)


@pytest.mark.parametrize("name", maps.NAMES)
def test_maps_are_sorted_distinct_and_reach_one(name):
    values = maps.table(name)
    assert values.shape == (2 ** maps.bits(name),) and values.dtype == torch.float32
    assert (values.diff() > 0).all() and values[-1] == 1
    assert torch.equal(torch.bucketize(values, maps.midpoints(name)), torch.arange(values.numel()))


def test_dynamic4_is_the_list_of_the_paper():
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    want = [-v for v in reversed(positive)] + [0.0] + positive + [1.0]
    assert torch.equal(maps.table("dynamic4"), torch.tensor(want))


def test_linear4_has_no_zero():
    assert maps.levels("linear4") == tuple(i / 16 for i in range(1, 17))


def test_nf4_equals_the_published_values():
    want = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    want += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    torch.testing.assert_close(maps.table("nf4"), torch.tensor(want), atol=1e-4, rtol=0)


def test_dynamic8_by_hand():
    signed, unsigned = maps.levels("dynamic8"), maps.levels("dynamic8_unsigned")
    # The smallest decade, 1e-7 .. 1e-6, has one cell (signed) or two (unsigned).
    assert signed[128] == pytest.approx(5.5e-7) and signed[127] == 0
    assert unsigned[:3] == pytest.approx((0, 3.25e-7, 7.75e-7))
    # The largest, 0.1 .. 1, has 64 or 128 cells; its last midpoint lies half a cell below 1.
    assert signed[-2] == pytest.approx(1 - 0.45 / 64)
    assert signed[0] == -signed[-2]
    assert unsigned[-2] == pytest.approx(1 - 0.45 / 128)


def test_unknown_map_lists_the_nearest():
    with pytest.raises(UsageError, match=r"unknown code map 'nf5'; nearest known: nf4"):
        maps.table("nf5")
