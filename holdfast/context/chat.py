"""A conversation of any length in a fixed number of bytes.

Only what is new is ever tokenized and read: a chat template is asked once what it puts around
turns, and the past is what the cache kept of it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.context.answer import Answer, end_tokens
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.stream import prefill_chunks, read
from holdfast.errors import UsageError

Message = dict[str, str]


class Turns:
    """What a tokenizer's chat template writes for the first turn and for later ones.

    Without a template, turns are `User: ...` and `Assistant: ...` on lines of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.plain = not tokenizer.chat_template
        if not self.plain:
            self._known: list[Message] = [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two"},
            ]
            text = self._render(self._known, False)
            place = text.rfind("two")
            if place < 0:
                raise UsageError("the chat template drops what the assistant said; use another")
            self.closing = text[place + len("two") :]
        else:
            self.closing = "\n"

    def first(self, text: str, system: str | None) -> str:
        if self.plain:
            return (f"{system}\n" if system else "") + f"User: {text}\nAssistant:"
        messages = [{"role": "system", "content": system}] if system else []
        return self._render([*messages, {"role": "user", "content": text}], True)

    def later(self, text: str) -> str:
        """What follows a reply, its end of turn included."""
        if self.plain:
            return f"{self.closing}User: {text}\nAssistant:"
        messages = [*self._known, {"role": "user", "content": text}]
        before, after = self._render(self._known, False), self._render(messages, True)
        if not after.startswith(before):
            raise UsageError(
                "the chat template changes earlier turns when others follow, so a conversation "
                "cannot be continued from a cache; use another template"
            )
        return self.closing + after[len(before) :]

    def _render(self, messages: list[Message], prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        assert isinstance(text, str)
        return text


class Conversation:
    """A model, its tokenizer and a cache of one row; `say` answers.

    Args:
        sample: logits (1,V) -> ids (1,).
        system: an instruction at the start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: BoundedCache,
        *,
        sample: Callable[[Tensor], Tensor],
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.sample, self.system = sample, system
        self.turns, self.ends = Turns(tokenizer), end_tokens(model, tokenizer)
        self.said = 0

    @torch.no_grad()
    def say(self, text: str, *, limit: int = 512) -> Iterator[str]:
        """Read a message and yield the reply, piece by piece, at most `limit` tokens of it."""
        new = self.turns.later(text) if self.said else self.turns.first(text, self.system)
        # Templates write special tokens, the beginning of the text included.
        plain = self.turns.plain and not self.said
        ids = self.tokenizer(new, add_special_tokens=plain, return_tensors="pt").input_ids
        if self.said:
            self.cache.turn()
        self.said += 1
        logits = prefill_chunks(self.model, ids.to(self.model.device), self.cache)
        answer = Answer(self.tokenizer)
        for _ in range(limit):
            token = self.sample(logits)
            if int(token) in self.ends:
                break
            # What was shown is also read, even if nobody asks for the next piece.
            logits = read(self.model, token[:, None], self.cache, before=logits)
            if piece := answer.add(int(token)):
                yield piece
        if piece := answer.rest():
            yield piece

    def save(self, path: str | Path) -> None:
        """Write what is known so far, compressed as it is; replaced atomically."""
        if not self.said:
            raise UsageError("nothing was said yet, so there is nothing to save")
        self.cache.save(path, notes={"said": self.said})

    def load(self, path: str | Path) -> None:
        """Go on from a saved conversation with the same model, policy and form."""
        notes = self.cache.load(path)
        if "said" not in notes:
            raise UsageError(f"{path} is a saved cache, but not of a conversation")
        self.said = notes["said"]

    def reset(self) -> None:
        """Begin again."""
        self.cache.reset()
        self.said = 0
