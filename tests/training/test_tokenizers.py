import os

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from holdfast.errors import UsageError
from holdfast.training.tokenizers import TextEncoder, load_tokenizer, render_chat

TEXTS = [
    "",
    "plain",
    "hé 😀\r\n\t\x00 end  ",
    "<|eos|> in text",
    "\ufeff日本語 \U0001f468\u200d\U0001f469",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "  Oh 😀"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "日本\n"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def trained():
    """A BPE with GPT-2's settings, whose offsets leave out white space, opening texts with BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(alphabet),
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    with open(os.__file__) as file:
        backend.train_from_iterator(file.read().splitlines(keepends=True), trainer)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )


def test_bytes_are_their_own_ids(byte):
    assert len(byte) == 264
    assert byte("é\x00", add_special_tokens=False)["input_ids"] == [0xC3, 0xA9, 0]
    assert (byte.bos_token_id, byte.eos_token_id, byte.pad_token_id) == (256, 257, 258)
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert byte.decode(byte.encode(every)) == every


def test_saved_directory_opens_with_auto_tokenizer(byte, tmp_path):
    byte.save_pretrained(tmp_path)
    # A model's config beside it must not make the loader choose that model's own tokenizer.
    LlamaConfig(vocab_size=264).save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert [again.decode(again.encode(text)) for text in TEXTS] == TEXTS
        assert [again.encode(text) for text in TEXTS] == [byte.encode(text) for text in TEXTS]
        assert again.all_special_ids == byte.all_special_ids
        assert again.apply_chat_template(CHAT) == byte.apply_chat_template(CHAT)
        assert TextEncoder(again)._bytes


def test_fast_path_equals_the_tokenizer(byte):
    with open(os.__file__, encoding="utf-8") as file:
        texts = [*TEXTS, file.read()]
    want = [[*byte.encode(text), byte.eos_token_id] for text in texts]
    assert [ids.tolist() for ids in TextEncoder(byte).texts(texts)] == want


def test_texts_open_as_the_tokenizer_opens_them(trained):
    assert trained.encode("a b")[0] == trained.bos_token_id
    [ids] = TextEncoder(trained).texts(["a b"])
    assert ids.tolist() == [*trained.encode("a b"), trained.eos_token_id]
    assert ids.dtype == np.uint16


def test_long_texts_are_cut_without_changing_their_tokens(trained, monkeypatch):
    with open(os.__file__) as file:
        text = file.read()
    whole = TextEncoder(trained).texts([text])[0]
    monkeypatch.setattr(TextEncoder, "PIECE", 1000)
    assert np.array_equal(TextEncoder(trained).texts([text])[0], whole)


def test_byte_chat_mask_token_by_token(byte):
    ids, mask = TextEncoder(byte).chat(*render_chat(byte, CHAT))
    want_ids, want_mask = [], []
    for message in CHAT:
        role = byte.convert_tokens_to_ids(f"<|{message['role']}|>")
        body = [*message["content"].encode(), byte.eos_token_id]
        want_ids += [role, *body]
        want_mask += [0, *[int(message["role"] == "assistant")] * len(body)]
    assert ids.tolist() == want_ids
    assert mask.tolist() == want_mask
    assert ids.tolist() == byte.apply_chat_template(CHAT)["input_ids"]


def prefix_mask_ref(tokenizer, messages):
    """Tokens that each assistant message adds to the tokens before it, cut after <|im_end|>."""
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
            first = len(before["input_ids"])
            assert ids[:first] == before["input_ids"]
            last = ids.index(tokenizer.eos_token_id, first)
            mask[first : last + 1] = [1] * (last + 1 - first)
    return ids, mask


def test_template_without_generation_marks(trained):
    ids, mask = TextEncoder(trained).chat(*render_chat(trained, CHAT))
    want_ids, want_mask = prefix_mask_ref(trained, CHAT)
    assert ids.tolist() == want_ids
    assert mask.tolist() == want_mask
    assert 0 < sum(want_mask) < len(want_mask)


@pytest.mark.parametrize("reply", ["  Oh 😀", " Oh\n", "Oh", " "])
def test_marked_template_with_trimmed_offsets(trained, monkeypatch, reply):
    monkeypatch.setattr(trained, "chat_template", BARE)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": reply}]
    ids, mask = TextEncoder(trained).chat(*render_chat(trained, [*chat, chat[0]]))
    assert trained.decode(ids[mask == 1]) == reply
    assert trained.decode(ids[mask == 0]) == "U:xA:U:x"


def test_marked_template_agrees_with_transformers(byte):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    want = byte.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = TextEncoder(byte).chat(*render_chat(byte, chat))
    assert ids.tolist() == want["input_ids"]
    assert mask.tolist() == want["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (None, CHAT, "needs a chat template and the tokenizer has none; put a chat_template.jinja"),
        (CHATML, [{"role": "user"}], r"message 0 is .* expected \{\"role\": \"user\""),
        (CHATML, ["hello"], 'message 0 is "hello"; expected'),
        (CHATML, CHAT[2:], "begins with the assistant.*begin with a system or user message"),
        (
            "{{ messages[-1]['content'] }}",
            CHAT,
            "renders message 2 differently.*{% generation %}",
        ),
        ("{{ raise_exception('no tools') }}", CHAT, "template refuses these messages: no tools"),
        ("{% if %}", CHAT, "template refuses these messages"),
    ],
)
def test_chat_errors(trained, monkeypatch, template, messages, error):
    monkeypatch.setattr(trained, "chat_template", template)
    with pytest.raises(UsageError, match=error):
        render_chat(trained, messages)


def test_byte_template_refuses_unknown_roles(byte):
    with pytest.raises(UsageError, match="role wizard is not system, user, assistant or tool"):
        render_chat(byte, [{"role": "wizard", "content": "x"}])


def test_missing_end_of_sequence_token():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UsageError, match=r'no end-of-sequence token.*set "eos_token"'):
        TextEncoder(tokenizer)


def test_load_errors(tmp_path):
    with pytest.raises(UsageError, match=r"does not open as a directory.*tokenizer.json.*bytes"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match=r"nobody/nothing.*hub id in the local cache.*hf download"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is a file; give the directory"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="does not open as a directory"):
        load_tokenizer(str(tmp_path))
