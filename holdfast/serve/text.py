"""From text to tokens: prompts and chats to ids."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.context.answer import end_tokens
from holdfast.errors import UsageError

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
        self.ends = end_tokens(model, tokenizer)
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
