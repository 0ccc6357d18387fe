import pytest

from holdfast.checks import tinylm
from holdfast.context.cache.conformance import model
from holdfast.errors import UsageError
from holdfast.serve.text import Text
from holdfast.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def text():
    return Text(model(vocab_size=264), byte_tokenizer())


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
