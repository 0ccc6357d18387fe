"""Between text and tokens: prompts and chats to ids, ids back to text while they are produced."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.errors import UsageError

# A character of UTF-8 has four bytes at most: what is no character after four tokens never is one.
LONGEST_CHARACTER = 4
BROKEN = "�"

Message = dict[str, str]


class Text:
    """A model's tokenizer.

    Attributes:
        ends: tokens that end an answer.
        worker: a thread for encoding, which takes time. There is one: a fast tokenizer must not be
            used by two at once, and each thread would keep the memory that a long prompt took.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        # For the engine's thread, which decodes meanwhile.
        self.decoder = copy.deepcopy(tokenizer)
        self.worker = ThreadPoolExecutor(1, "holdfast-tokenizer")
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        named = getattr(model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named, tokenizer.eos_token_id]
        self.ends = {token for token in named if token is not None and token < self.vocabulary}
        # A template writes special tokens, which this model may not have.
        self._templated = bool(tokenizer.chat_template) and len(tokenizer) <= self.vocabulary

    def prompt(self, text: str) -> list[int]:
        """Ids of a text, begun as the tokenizer begins texts.

        Raises:
            UsageError: an empty text, or one with tokens that the model does not have.
        """
        return self._ids(text, special=True)

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Ids of a chat up to the answer, and how many of them its system messages begin it with.

        Raises:
            UsageError: messages that the model's chat template refuses.
        """
        ids = self._ids(self._render(messages), special=not self._templated)
        system = 0
        while system < len(messages) and messages[system]["role"] == "system":
            system += 1
        if not 0 < system < len(messages):
            return ids, 0
        # What does not depend on what follows is the system's: two other chats tell.
        shared = len(ids) - 1
        for probe in ("0", "A"):
            after = {**messages[system], "content": probe}
            other = self._ids(self._render([*messages[:system], after]), not self._templated)
            same = (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
            shared = min(shared, next(same, len(other)))
        return ids, shared

    def _render(self, messages: Sequence[Message]) -> str:
        if not self._templated:
            turns = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
            return f"{turns}assistant:"
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"character {error.start} of the prompt is half of a surrogate pair, which is no "
                "text; send both halves, or neither"
            ) from error
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        self.check(ids)
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Refuse an empty prompt, and ids that the model does not have."""
        if not ids:
            raise UsageError("the prompt is empty; send at least one token")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(i for i in ids if not 0 <= i < self.vocabulary)
            raise UsageError(
                f"the prompt has token {wrong}, the model has tokens 0 to {self.vocabulary - 1}; "
                "use characters that it knows"
            )


class Answer:
    """Text of tokens as they come, up to the first of some strings.

    Args:
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, text: Text, stop: Sequence[str] = ()):
        self._decoder, self._stop = text.decoder, [s for s in stop if s]
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.tokens = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; sets `stopped` at a stop string."""
        self.tokens += 1
        self._ids.append(token)
        # Some tokenizers write a token differently at the beginning of a text, so each is decoded
        # with those before it.
        before = self._decode(self._ids[self._start : self._read])
        whole = self._decode(self._ids[self._start :])
        if whole.endswith(BROKEN) and len(self._ids) - self._read < LONGEST_CHARACTER:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._certain(whole[len(before) :])

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        more = self._certain(self._decode(self._ids[self._start :])[len(before) :])
        held, self._held = self._held, ""
        return more if self.stopped else more + held

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=True)

    def _certain(self, more: str) -> str:
        text = self._held + more
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` a stop string may begin with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
