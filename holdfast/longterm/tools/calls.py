"""The calls with which a model reads and writes triplets: syntax, constrained decoding, training.

A call is `[MEM_WRITE]{t1>>rel>>t2}` or `[MEM_READ]{t1>>rel>>}`, where a read leaves at least one
field empty or asks whether all three hold. A time may follow the last field: `@2021`, or `@2015..`
and `@2015..2018`, half-open, where each bound is the beginning of what is named; `@..` is any time.
A backslash takes `>`, `{`, `}`, `@`, itself and outer spaces literally, `\\n` is a line's end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError
from holdfast.longterm.language import dates

if TYPE_CHECKING:
    import torch

_HEADS = {"[MEM_WRITE]{": True, "[MEM_READ]{": False}
_START = "[MEM_"
_SPECIAL = re.compile(r"[\\>{}@\n]|\A\s|\s\Z")
_BLANK = (" ", "\t", "\r", "\n")
_YEAR = re.compile(r"@(?:19|20)\d\d(?:\.\.)?\}")
IGNORED = -100  # the label that transformers leave out of the loss

When = tuple[datetime | None, datetime | None]


class CallError(UsageError):
    """A call that does not follow the syntax."""


@dataclass(frozen=True)
class Call:
    """One call; an empty field of a read is what is asked for.

    Attributes:
        when: from and to, half-open, None is unbounded; without `when`, a read means now and a
            write from now on.
    """

    write: bool
    t1: str
    rel: str
    t2: str
    when: When | None = None

    def __post_init__(self) -> None:
        given = sum(bool(field.strip()) for field in (self.t1, self.rel, self.t2))
        if self.write and given < 3:
            raise CallError("a write needs all of t1>>rel>>t2; fill the empty field")
        if not given:
            raise CallError("a read needs at least one of t1>>rel>>t2; fill in what is known")
        if self.when and None not in self.when and self.when[1] <= self.when[0]:  # type: ignore
            raise CallError(f"@{_time(self.when[0])}..{_time(self.when[1])} ends before it begins")

    def __str__(self) -> str:
        head = "[MEM_WRITE]{" if self.write else "[MEM_READ]{"
        return f"{head}{triple(self.t1, self.rel, self.t2, self.when)}}}"


def triple(t1: str, rel: str, t2: str, when: When | None = None) -> str:
    """The inside of a call."""
    span = "" if when is None else f"@{_time(when[0])}..{_time(when[1])}"
    return ">>".join(map(_escaped, (t1, rel, t2))) + span


def _escaped(field: str) -> str:
    return _SPECIAL.sub(lambda m: "\\n" if m[0] == "\n" else "\\" + m[0], field)


def _time(moment: datetime | None) -> str:
    if moment is None:
        return ""
    whole = moment.timetz().replace(tzinfo=None) == time() and not moment.utcoffset()
    return moment.date().isoformat() if whole else moment.isoformat()


def parse(text: str) -> Call:
    """The call that a text is.

    Raises:
        CallError: it is none, or more than one.
    """
    found = calls(text)
    if len(found) != 1 or text.strip()[: len(_START)] != _START or text.strip()[-1] != "}":
        raise CallError(f"{text!r:.80} is not one call; write [MEM_READ]{{t1>>rel>>}}")
    return found[0]


def calls(text: str) -> list[Call]:
    """All calls in a text, in order.

    Raises:
        CallError: one of them is malformed; it says which and how.
    """
    found, at = [], 0
    while (at := text.find(_START, at)) >= 0:
        head = next((h for h in _HEADS if text.startswith(h, at)), None)
        if head is None:
            raise CallError(
                f"{text[at : at + 30]!r} begins no call; write [MEM_WRITE]{{t1>>rel>>t2}} or "
                "[MEM_READ]{t1>>rel>>}"
            )
        fields, span, end = _body(text, at, at + len(head))
        if len(fields) != 3:
            raise CallError(
                f"{text[at:end]!r:.80} has {len(fields)} fields, expected 3 with >> between them"
            )
        t1, rel, t2 = fields
        write = _HEADS[head]
        found.append(Call(write, t1, rel, t2, _when(span, write)))
        at = end
    return found


def _body(text: str, start: int, at: int) -> tuple[list[str], str | None, int]:
    """Fields, time, and where the call ends."""
    fields: list[list[str]] = [[]]
    span: list[str] | None = None
    while at < len(text) and text[at] != "}":
        char, here = text[at], fields[-1] if span is None else span
        if char == "\\" and at + 1 < len(text):
            here.append("\\" + ("\n" if text[at + 1] == "n" else text[at + 1]))
            at += 2
            continue
        if char == "{" or (char == ">" and text[at : at + 2] != ">>"):
            raise CallError(f"{text[start : at + 1]!r:.80}: write a {char} in a field as \\{char}")
        if char == ">":
            fields.append([])
            at += 1
        elif char == "@" and span is None:
            span = []
        else:
            here.append(char)
        at += 1
    if at == len(text):
        raise CallError(f"{text[start:]!r:.80} has no closing brace")
    if span is not None and len(fields) < 3:
        raise CallError(f"{text[start : at + 1]!r:.80}: a time stands after the third field")
    return list(map(_plain, fields)), None if span is None else _plain(span), at + 1


def _plain(chars: Sequence[str]) -> str:
    """Without outer spaces, unless these are escaped."""
    kept = [i for i, char in enumerate(chars) if char not in _BLANK]
    return "".join(char[-1] for char in chars[kept[0] : kept[-1] + 1]) if kept else ""


def _when(span: str | None, write: bool) -> When | None:
    if span is None:
        return None
    if ".." in span:
        first, last = (part.strip() for part in span.split("..", 1))
        return _moment(first)[0], _moment(last)[0]
    lo, hi = _moment(span)
    if lo is None:
        raise CallError("the time after @ is empty; write @2021 or @2015..2018")
    return (lo, None) if write else (lo, hi)


def _moment(text: str) -> When:
    """Beginning and end of what a text names."""
    if not text:
        return None, None
    if (period := dates.parse(text, None)) is not None:
        return period.lo, period.hi
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is not None and len(text) == len("1850-05-03"):
        moment = moment.replace(tzinfo=UTC)
        return moment, moment + timedelta(days=1)
    if moment is None or moment.utcoffset() is None:
        raise CallError(
            f"@{text!r:.40} is no time; write @2021, @2021-05, @2021-05-03, or ISO 8601 with a zone"
        )
    return moment, moment


class Grammar:
    """The calls as an automaton over characters, so that a model can write nothing else.

    Times are `@2015` or `@2015..`. A state is a text; "" is the beginning and `END` the end.
    """

    END = "}"

    def __init__(self, pieces: Sequence[str]):
        """`pieces` are the texts of a tokenizer's tokens by id; empty ones are never written."""
        self._pieces = pieces
        self._allowed: dict[str, dict[int, str]] = {}

    def allowed(self, state: str) -> dict[int, str]:
        """Tokens that may follow, each with the state that it leads to."""
        if state not in self._allowed:
            ends = ((i, self.run(state, piece)) for i, piece in enumerate(self._pieces))
            self._allowed[state] = {i: end for i, end in ends if end}
        return self._allowed[state]

    @classmethod
    def run(cls, state: str, piece: str) -> str | None:
        """The state after a text; None if no call goes on so, or the text is empty."""
        following: str | None = state if piece else None
        for char in piece:
            if following is None:
                return None
            following = cls._step(following, char)
        return following

    @classmethod
    def _step(cls, state: str, char: str) -> str | None:
        # A state within a call is the head's letter, the number of the field, whether any field
        # and this one have text, and what was begun: an escape, an arrow or a time.
        if state == cls.END:
            return None
        if state[:1] not in ("W", "R"):
            head = state + char
            if head in _HEADS:
                return ("W" if _HEADS[head] else "R") + "000"
            return head if any(h.startswith(head) for h in _HEADS) else None
        kind, number, some, full, begun = state[0], int(state[1]), state[2], state[3], state[4:]
        if begun.startswith("@"):
            return cls._timed(state, begun + char)
        if begun == "\\":
            # A line's end alone would be an empty field.
            return f"{kind}{number}11" if not char.isspace() and char != "n" else None
        if begun == ">":
            return f"{kind}{number + 1}{some}0" if char == ">" else None
        if char == ">" and (number == 2 or (kind == "W" and full == "0")):
            return None
        if char in ">\\":
            return state + char
        if char in "}@":
            ends = number == 2 and (full if kind == "W" else some) == "1"
            return None if not ends else cls.END if char == "}" else f"{state}@"
        if char == "{":
            return None
        return state if char.isspace() else f"{kind}{number}11"

    @classmethod
    def _timed(cls, state: str, text: str) -> str | None:
        if _YEAR.fullmatch(text):
            return cls.END
        whole = ("@1999..}", "@2099..}", "@1999}", "@2099}")
        viable = any(_YEAR.fullmatch(text + form[len(text) :]) for form in whole)
        return state[:4] + text if viable else None


def pieces(tokenizer: Any) -> list[str]:
    """The text that each token of a HF tokenizer adds; empty for special and partial ones."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = tokenizer.decode(anchor)
    special = set(tokenizer.all_special_ids)
    found = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([*anchor, token])
        good = token not in special and text.startswith(before) and "\ufffd" not in text
        found.append(text[len(before) :] if good else "")
    return found


def write_call(model: Any, tokenizer: Any, text: str, grammar: Grammar, limit: int = 64) -> str:
    """The call that a model makes of a text, the likeliest allowed token after another.

    Raises:
        CallError: it is not closed after `limit` tokens.
    """
    import torch

    ids = tokenizer.encode(text + "\n", add_special_tokens=False)
    made: list[int] = []
    past, fed, state = None, ids, ""
    model.eval()
    with torch.no_grad():
        while state != Grammar.END:
            if len(made) == limit:
                raise CallError(f"no call of at most {limit} tokens: {tokenizer.decode(made)!r}")
            out = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
            past, scores = out.past_key_values, out.logits[0, -1]
            follows = grammar.allowed(state)
            token = max(follows, key=lambda i: (float(scores[i]), -i))
            made, fed, state = [*made, token], [token], follows[token]
    return tokenizer.decode(made)


def finetune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[tuple[str, Call]],
    *,
    steps: int,
    rank: int = 8,
    batch: int = 32,
    rate: float = 3e-3,
    seed: int = 0,
) -> Any:
    """Train a HF causal model to answer a text with its call; returns the trained model.

    Args:
        rank: of the LoRA adapters that are trained (with `peft`); 0 trains all weights.
        rate: the learning rate's maximum; it falls to zero in a half cosine.

    Raises:
        UsageError: no examples, or a tokenizer without an end token.
    """
    import torch

    if not examples:
        raise UsageError("finetune got no examples; pass (text, call) pairs")
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no eos_token; set one, it pads and ends examples")
    if rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    rows = [_row(tokenizer, text, call) for text, call in examples]
    draw = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(rows), (batch,), generator=draw).tolist()
        loss = model(**_padded([rows[i] for i in picked], tokenizer.eos_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def _row(tokenizer: Any, text: str, call: Call) -> tuple[list[int], int]:
    """Token ids of an example, and how many of them are only read."""
    read = tokenizer.encode(text + "\n", add_special_tokens=False)
    told = tokenizer.encode(str(call), add_special_tokens=False)
    return [*read, *told, tokenizer.eos_token_id], len(read)


def _padded(rows: Sequence[tuple[list[int], int]], pad: int) -> "dict[str, torch.Tensor]":
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    labels = torch.where(mask.bool(), ids, IGNORED)
    for label, (_, read) in zip(labels, rows, strict=True):
        label[:read] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
