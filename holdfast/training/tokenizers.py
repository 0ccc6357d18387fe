"""Tokenizers of a training run: bytes, or any Hugging Face tokenizer; chats with their loss mask.

A loss mask is worked out on characters of the rendered chat and carried to tokens by offsets, so
that the chat is tokenized once, as a whole, exactly as it will be when the model is used.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from holdfast.errors import UsageError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
# The eighth special token is spare: it makes the vocabulary 264, a multiple of 8, without which
# half-precision matrix kernels pad the output layer or fall back to slower ones.
SPECIAL = (BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES), "<|reserved|>")

# A turn ends with the end-of-sequence token, so that plain `generate` stops after a reply.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{ raise_exception('role ' ~ message['role'] ~ ' is not system, user, assistant or tool') }}
{%- endif -%}
{{ '<|' ~ message['role'] ~ '|>' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}
{%- else -%}
{{ message['content'] ~ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""

Span = tuple[int, int]


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 264 tokens: ids 0-255 are the bytes, 256-263 the special tokens.

    It is an ordinary fast tokenizer (byte-level BPE without merges): a saved directory opens with
    `AutoTokenizer.from_pretrained`.
    """
    # Byte-level BPE writes every byte as one visible character: printable Latin-1 stands for
    # itself, the others follow in order from U+0100.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    vocabulary = {chr(byte): byte for byte in visible}
    vocabulary |= {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The byte tokenizer for "bytes", else one from a local directory or the local hub cache.

    Raises:
        UsageError: nothing there opens as a tokenizer; nothing is ever downloaded.
    """
    if spec == "bytes":
        return byte_tokenizer()
    if os.path.isfile(spec):
        raise UsageError(
            f"tokenizer {spec!r} is a file; give the directory that holds it, "
            'or "bytes" for the built-in byte-level tokenizer'
        )
    try:
        return AutoTokenizer.from_pretrained(spec, local_files_only=True)
    # Whatever a broken directory makes the loader raise, the user is told the same three ways out.
    except Exception as error:
        where = "directory" if os.path.isdir(spec) else "hub id in the local cache, or a directory,"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"tokenizer {spec!r} does not open as a {where} ({reason}). Expected tokenizer.json "
            "and tokenizer_config.json there; download the hub id first (`hf download ID`), "
            'or use "bytes", the built-in byte-level tokenizer'
        ) from error


class TextEncoder:
    """Documents to token ids, without Python integers for whole corpora.

    Args:
        tokenizer: must have an end-of-sequence token, which ends every text.

    Raises:
        UsageError: no end-of-sequence token.
    """

    # A tokenizer works in some hundred bytes per character of what it is given at once: longer
    # texts are cut after a line, and a call gets so many pieces (measured on 8 MB in one text:
    # 78 MiB of working memory, against 403 MiB with pieces of a megabyte).
    PIECE, CALL = 1 << 16, 1 << 20

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer has no end-of-sequence token, which separates documents; "
                'set "eos_token" in its tokenizer_config.json'
            )
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if len(tokenizer) < 65536 else np.int32)
        self._special = re.compile("|".join(map(re.escape, SPECIAL)))
        self._bytes = tokenizer.is_fast and (
            tokenizer.backend_tokenizer.to_str() == _byte_backend()
        )
        # A model whose tokenizer opens texts with BOS expects it at the start of every document.
        opening = tokenizer("")["input_ids"][:1]
        bos = tokenizer.bos_token_id
        self._before = np.array([bos] if bos is not None and opening == [bos] else [], self.dtype)
        self._after = np.array([tokenizer.eos_token_id], self.dtype)

    def texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids per text, begun as the tokenizer begins texts and ended by EOS."""
        if self._bytes:
            return [self._join([self._encode_bytes(text)]) for text in texts]
        pieces = [_pieces(text, self.PIECE) for text in texts]
        ids = self._encode([piece for text in pieces for piece in text])
        return [self._join([next(ids) for _ in text]) for text in pieces]

    def chat(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a rendered chat, and a uint8 mask: 1 on tokens that touch a character span."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        start, end = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        # Trimmed offsets leave a token of white space empty, at the end of its characters.
        start = np.minimum(start, end - 1)
        mask = np.zeros(len(start), np.uint8)
        for first, last in spans:
            mask |= (start < last) & (end > first)
        return np.array(encoded["input_ids"], self.dtype), mask

    def _encode(self, pieces: list[str]) -> Iterator[np.ndarray]:
        start = 0
        while start < len(pieces):
            stop, size = start, 0
            while stop < len(pieces) and (size == 0 or size + len(pieces[stop]) <= self.CALL):
                size += len(pieces[stop])
                stop += 1
            encoded = self.tokenizer(
                pieces[start:stop],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            yield from (np.array(ids, self.dtype) for ids in encoded["input_ids"])
            start = stop

    def _encode_bytes(self, text: str) -> np.ndarray:
        if self._special.search(text):
            return np.array(self.tokenizer.encode(text, add_special_tokens=False), self.dtype)
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def _join(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([self._before, *parts, self._after])


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict]
) -> tuple[str, tuple[Span, ...]]:
    """A conversation as text, and the spans of characters that the assistant has to produce.

    Spans come from the template's `{% generation %}` blocks; without them, from what each
    assistant message adds to the rendering of those before it, up to its end-of-turn token.

    Raises:
        UsageError: no chat template, no offsets, malformed messages, a message that the template
            refuses, or a rendering that does not begin with that of its first messages.
    """
    _check_messages(messages)
    template = tokenizer.chat_template
    if not template:
        raise UsageError(
            "chat data needs a chat template and the tokenizer has none; put a "
            "chat_template.jinja into its directory, use the instruction-tuned model's tokenizer, "
            "or render the chats yourself into a text field"
        )
    if not tokenizer.is_fast:
        raise UsageError(
            "chat data needs a fast tokenizer, which knows each token's characters; "
            "convert it (save it with a tokenizer.json)"
        )
    try:
        template = tokenizer.get_chat_template()
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            # Not `apply_chat_template(return_assistant_tokens_mask=True)`: it looks up a span's
            # last token by its last character and so misses the other bytes of an emoji.
            variables: dict[str, Any] = tokenizer.special_tokens_map
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **variables,
            )
            [text], [spans] = rendered
            return text, tuple((first, last) for first, last in spans)
        return _render_by_prefix(tokenizer, messages)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the chat template refuses these messages: {error}") from error


def _render_by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict]
) -> tuple[str, tuple[Span, ...]]:
    def render(count: int, prompt: bool) -> str:
        if count == 0:
            raise UsageError(
                "a chat begins with the assistant, and the chat template does not mark what it "
                "generates; begin with a system or user message"
            )
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    text = render(len(messages), False)
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not (after.startswith(before) and text.startswith(after)):
            raise UsageError(
                f"the chat template renders message {i} differently when others follow or precede "
                "it, so its tokens cannot be told apart; mark what the assistant generates in the "
                "template with {% generation %} ... {% endgeneration %}"
            )
        # White space after the end-of-turn token belongs to the template, not to the reply.
        turn = after.rstrip()
        end = len(turn) if turn.endswith(special) and len(turn) > len(before) else len(after)
        spans.append((len(before), end))
    return text, tuple(spans)


def _check_messages(messages: list[dict]) -> None:
    for i, message in enumerate(messages):
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), str):
            raise UsageError(
                f"message {i} is {json.dumps(message)[:80]}; "
                'expected {"role": "user", "content": "text"}'
            )


@cache
def _byte_backend() -> str:
    return byte_tokenizer().backend_tokenizer.to_str()


def _pieces(text: str, size: int) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > size:
        # Between two words on successive lines nearly every tokenizer has a boundary anyway.
        match = re.compile(r"\S\n(?=\S)").search(text, start + size - 1)
        if match is None:
            break
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]]
