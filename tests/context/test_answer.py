"""Answers as they come: whole characters, stop strings."""

import pytest

from holdfast.context.answer import Answer
from holdfast.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def words():
    return byte_tokenizer()


def pieces(words, written, stop=()):
    answer = Answer(words, stop)
    found = []
    for byte in written:
        found.append(answer.add(byte))
        if answer.stopped:
            break
    return [*found, answer.rest()], answer


def test_characters_come_whole(words):
    found, _ = pieces(words, "né €😀!".encode())
    assert found == ["n", "", "é", " ", "", "", "€", "", "", "", "😀", "!", ""]
    # What never becomes a character is not waited for.
    found, _ = pieces(words, b"\xf0" * 6 + b"a")
    assert "".join(found) == "�" * 6 + "a" and found[3] == "�" * 4
    found, _ = pieces(words, "é".encode()[:1])
    assert found == ["", "�"]


@pytest.mark.parametrize(
    "written, stop, want, reads",
    [
        ("one two", ["t"], "one ", 5),
        ("one two", ["two", "e"], "on", 3),
        ("aab aaac", ["aaac"], "aab ", 8),
        ("one", ["e!"], "one", 3),
        ("ababac", ["abac"], "ab", 6),
        ("x€y", ["€"], "x", 4),
    ],
)
def test_stop_strings(words, written, stop, want, reads):
    found, answer = pieces(words, written.encode(), stop)
    assert "".join(found) == want and answer.tokens == reads
    assert answer.stopped == (reads < len(written.encode()) or written.endswith(tuple(stop)))


def test_what_may_be_a_stop_string_is_held_back(words):
    found, _ = pieces(words, b"a STOx", ["STOP"])
    assert found == ["a", " ", "", "", "", "STOx", ""]


def test_text_is_that_of_all_tokens(words):
    text = "naïve 🙂 text, " * 12
    found, _ = pieces(words, text.encode())
    assert "".join(found) == text
