"""Answers while they are produced: tokens to text, and where they end."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A character of UTF-8 has four bytes at most: what is no character after four tokens never is one.
LONGEST_CHARACTER = 4
BROKEN = "\ufffd"


class Answer:
    """Text of tokens as they come, up to the first of some strings.

    Args:
        tokenizer: not to be used by another thread meanwhile.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
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
        return self._tokenizer.decode(ids, skip_special_tokens=True)

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


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer, of those that the model has."""
    ends: set[int] = set()
    for found in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        ends |= {found} if isinstance(found, int) else set(found or ())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return {token for token in ends if token < vocabulary}
