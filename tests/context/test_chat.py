"""Conversations: incremental turns equal whole renderings, saved ones go on, text comes whole."""

import pytest
import torch

from holdfast.context.answer import end_tokens
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import model as tiny
from holdfast.context.chat import Conversation, Turns
from holdfast.context.sampling import Sampler
from holdfast.errors import UsageError
from holdfast.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def words():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def net():
    return tiny(vocab_size=264)


def conversation(net, words, tokens=400, policy="sinks_recent", **options):
    cache = BoundedCache.for_model(net, policy, tokens=tokens, batch=1)
    return Conversation(net, words, cache, sample=Sampler(0), **options)


def test_turns_read_one_by_one_are_the_whole_chat(words):
    turns = Turns(words)
    messages = [{"role": "system", "content": "be brief"}]
    text = ""
    for number, (said, reply) in enumerate([("hi", "hello"), ("how?", "fine"), ("bye", "bye")]):
        text += turns.later(said) if number else turns.first(said, "be brief")
        messages.append({"role": "user", "content": said})
        assert text == words.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        text += reply
        messages.append({"role": "assistant", "content": reply})


def test_a_template_that_rewrites_earlier_turns_is_refused(words):
    other = byte_tokenizer()
    other.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UsageError, match="changes earlier turns"):
        Turns(other).later("hi")
    other.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UsageError, match="drops what the assistant said"):
        Turns(other)


def test_without_a_template_turns_are_lines(words):
    other = byte_tokenizer()
    other.chat_template = None
    turns = Turns(other)
    assert turns.first("hi", "be brief") == "be brief\nUser: hi\nAssistant:"
    assert turns.later("bye") == "\nUser: bye\nAssistant:"


def test_the_second_reply_is_that_of_the_whole_text(net, words):
    talk = conversation(net, words)
    first = "".join(talk.say("one", limit=5))
    second = "".join(talk.say("two", limit=5))
    ids = talk.turns.first("one", None) + first + talk.turns.later("two")
    ids = words(ids, add_special_tokens=False, return_tensors="pt").input_ids
    want = net.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=words.eos_token_id)
    # Untrained, it says bytes that are no characters: compare what was read.
    assert talk.cache.bounded[0].read[0] in range(ids.shape[1], want.shape[1] + 1)
    assert words.decode(want[0, ids.shape[1] :], skip_special_tokens=True) == second


def test_a_saved_conversation_goes_on_as_if_never_left(net, words, tmp_path):
    talk, again = (conversation(net, words, tokens=48) for _ in range(2))
    "".join(talk.say("a long first message, longer than fits", limit=20))
    talk.save(tmp_path / "talk")
    again.load(tmp_path / "talk")
    assert again.said == 1 and again.cache.bounded[0].length <= 48
    assert "".join(again.say("and now?", limit=8)) == "".join(talk.say("and now?", limit=8))


def test_loading_what_does_not_belong_is_refused(net, words, tmp_path):
    talk = conversation(net, words)
    with pytest.raises(UsageError, match="nothing was said yet"):
        talk.save(tmp_path / "talk")
    "".join(talk.say("hello", limit=2))
    talk.save(tmp_path / "talk")
    with pytest.raises(UsageError, match=r"saved with policy 'SinksRecent.*this cache has 'Window"):
        conversation(net, words, policy="window").load(tmp_path / "talk")
    with pytest.raises(UsageError, match="was saved with model"):
        conversation(tiny(vocab_size=264, num_hidden_layers=1), words).load(tmp_path / "talk")
    with pytest.raises(UsageError, match="room for 8 in 1; raise the budget"):
        conversation(net, words, tokens=8).load(tmp_path / "talk")
    (tmp_path / "other").write_bytes(b"not a cache")
    with pytest.raises(UsageError, match="is not a saved cache"):
        talk.load(tmp_path / "other")
    with pytest.raises(UsageError, match="does not exist"):
        talk.load(tmp_path / "nowhere")


def test_a_reply_ends_at_its_end_token(net, words):
    end = words.eos_token_id
    assert end in end_tokens(net, words)
    talk = conversation(net, words)
    talk.sample = lambda logits: torch.tensor([end])
    assert "".join(talk.say("hi")) == ""
