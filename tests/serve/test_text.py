import pytest

from holdfast.checks import tinylm
from holdfast.context.cache.conformance import model
from holdfast.errors import UsageError
from holdfast.serve.text import Answer, Text
from holdfast.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def text():
    return Text(model(vocab_size=264), byte_tokenizer())


def pieces(text, written, stop=()):
    answer = Answer(text, stop)
    found = []
    for byte in written:
        found.append(answer.add(byte))
        if answer.stopped:
            break
    return [*found, answer.rest()], answer


def test_characters_come_whole(text):
    found, _ = pieces(text, "né €😀!".encode())
    assert found == ["n", "", "é", " ", "", "", "€", "", "", "", "😀", "!", ""]
    # What never becomes a character is not waited for.
    found, _ = pieces(text, b"\xf0" * 6 + b"a")
    assert "".join(found) == "�" * 6 + "a" and found[3] == "�" * 4
    found, _ = pieces(text, "é".encode()[:1])
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
def test_stop_strings(text, written, stop, want, reads):
    found, answer = pieces(text, written.encode(), stop)
    assert "".join(found) == want and answer.tokens == reads
    assert answer.stopped == (reads < len(written.encode()) or written.endswith(tuple(stop)))


def test_what_may_be_a_stop_string_is_held_back(text):
    found, _ = pieces(text, b"a STOx", ["STOP"])
    assert found == ["a", " ", "", "", "", "STOx", ""]


def test_chats_without_a_template_and_their_shared_beginning():
    plain = Text(tinylm.model(), byte_tokenizer())
    system = {"role": "system", "content": "Be brief."}
    ids, shared = plain.chat([system, {"role": "user", "content": "A b"}])
    assert bytes(ids).decode() == "system: Be brief.\nuser: A b\nassistant:"
    assert bytes(ids[:shared]).decode() == "system: Be brief.\nuser: "
    assert plain.chat([{"role": "user", "content": "hi"}])[1] == 0
    assert plain.chat([system])[1] == 0


def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match="character 2 of the prompt is half of a surrogate pair"):
        text.prompt("ab\udc00")
    with pytest.raises(UsageError, match="the chat template refuses these messages: role clown"):
        text.chat([{"role": "clown", "content": ""}])
