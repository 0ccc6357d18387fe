"""Bytes are parsed exactly and printed for people."""

import pytest

from holdfast.errors import UsageError
from holdfast.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("512 B", 512),
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        ("1.5KiB", 1536),
        ("1.5 MB", 1_500_000),
        ("1_000kb", 1_000_000),
        (" 2TiB ", 2 * 2**40),
        ("3PB", 3 * 10**15),
        ("1.0", 1),
        (7, 7),
    ],
)
def test_parse(text, count):
    assert parse_bytes(text) == count


def test_large_sizes_are_exact():
    # Through a float, the last digits would be lost.
    assert parse_bytes("9007199254740993") == 2**53 + 1
    assert parse_bytes("8388608.000000001GiB") == 2**53 + 1


def test_a_fraction_of_a_byte_is_dropped():
    assert parse_bytes("0.3KiB") == 307


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lots", "size 'lots' is malformed; expected a number and one of B, KB.*24GiB"),
        ("24 GiBs", "malformed"),
        ("24G", "malformed"),
        ("-1GiB", "malformed"),
        ("1e9", "malformed"),
        ("", "malformed"),
        ("1.5", "size '1.5' is not a whole number of bytes"),
        ("0.5B", "not a whole number"),
        (-1, "size -1 is negative; write for example 24GiB"),
        (True, "size True is not a number of bytes"),
        (1.5, "size 1.5 is not a number of bytes"),
        (None, "size None is not a number of bytes"),
    ],
)
def test_malformed_sizes_name_the_remedy(given, message):
    with pytest.raises(UsageError, match=message):
        parse_bytes(given)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (24 * 2**30, "24.00 GiB"),
        (-1536, "-1.50 KiB"),
        (2**60, "1024.00 PiB"),
    ],
)
def test_format(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("count", [0, 1, 1023, 5 * 2**20, 7 * 2**40])
def test_what_is_printed_can_be_read(count):
    assert parse_bytes(format_bytes(count)) == count
