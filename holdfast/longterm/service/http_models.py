"""What clients of a memory's HTTP API send and get; what is outside these limits is refused."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from holdfast.longterm.records import Space

TEXT, NAME, MESSAGES, LIMIT = 100_000, 256, 1000, 1000
METADATA_BYTES, METADATA_DEPTH = 65_536, 16
POSITION = 2**53  # what JavaScript can count to


def _storable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a pair (a lone surrogate)") from None
    if "\x00" in text:
        raise ValueError("it holds the character NUL, which no store keeps")
    return text


def _worded(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank; say something")
    return _storable(text)


def _common(time: datetime) -> datetime:
    # Times beyond these have no equal in every time zone.
    if not 1 < time.year < 9999:
        raise ValueError("the year must be between 2 and 9998")
    return time.astimezone(UTC)


def _small(value: dict[str, Any]) -> dict[str, Any]:
    open_: list[tuple[Any, int]] = [(value, 1)]
    while open_:
        part, depth = open_.pop()
        if depth > METADATA_DEPTH:
            raise ValueError(f"it is nested deeper than {METADATA_DEPTH} levels")
        if isinstance(part, dict | list):
            below = part.values() if isinstance(part, dict) else part
            open_ += [(each, depth + 1) for each in below]
    try:
        size = len(_storable(json.dumps(value, ensure_ascii=False, allow_nan=False)))
    except ValueError as error:
        raise ValueError(f"it cannot be stored: {error}") from None
    if size > METADATA_BYTES or "\\u0000" in json.dumps(value):
        raise ValueError(f"it is longer than {METADATA_BYTES} characters, or holds NUL")
    return value


Text = Annotated[str, Field(min_length=1, max_length=TEXT), AfterValidator(_worded)]
Name = Annotated[str, Field(max_length=NAME), AfterValidator(_storable)]
When = Annotated[AwareDatetime, AfterValidator(_common)]
Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
Id = Annotated[str, Path(pattern="^[me][0-9a-f]{20}$", description="Id of a memory.")]
Limit = Annotated[int, Query(ge=1, le=LIMIT, description="At most so many.")]
After = Annotated[int, Query(ge=0, le=POSITION, description="Go on after this position.")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Whose(Strict):
    """The space: whose memories are meant."""

    user: Name = ""
    agent: Name = ""
    run: Name = ""
    tenant: Name = ""

    def space(self) -> Space:
        return Space(self.tenant, self.user, self.agent, self.run)


class Message(Strict):
    """One message of a conversation."""

    content: Text
    role: Name | None = None
    name: Name | None = None
    id: Name | None = None
    when: When | None = None
    session: Name | None = None
    metadata: Metadata = {}


class New(Whose):
    """What is to be remembered: a text, or messages."""

    text: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)] | None = None
    when: When | None = None
    session: Name | None = None
    kind: Annotated[str, Field(pattern="^[a-z][a-z_]{0,31}$")] | None = None
    metadata: Metadata = {}

    @model_validator(mode="after")
    def _one(self) -> "New":
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self


class Correction(Whose):
    """What a memory should say."""

    text: Text


class Erasure(Whose):
    """Why a memory is erased."""

    why: Name = ""


class Question(Whose):
    """What is searched for, among what, as of when."""

    query: Text
    limit: Annotated[int, Field(ge=1, le=LIMIT)] = 10
    filters: Metadata = {}
    kinds: Annotated[list[Name], Field(max_length=64)] | None = None
    valid: When | None = None
    recorded: When | None = None


class Prompt(Whose):
    """What a prompt is about, and how many tokens its memories may take."""

    query: Text
    budget: Annotated[int, Field(ge=0, le=1_000_000)] = 1000


class Ids(BaseModel):
    ids: list[str]


class Stored(BaseModel):
    """A memory as it is stored; times are ISO 8601 in UTC."""

    id: str
    space: str
    kind: str
    text: str
    speaker: str | None
    session: str | None
    position: int
    data: dict[str, Any]
    metadata: dict[str, Any]
    valid_from: str | None
    valid_to: str | None
    recorded_at: str
    retired_at: str | None
    strength: float
    uses: int
    used_at: str | None


class Page(BaseModel):
    """Memories, and the position to go on after (null: there are no more)."""

    memories: list[Stored]
    next: int | None


class Found(BaseModel):
    """A memory that was found, and what its score is made of."""

    id: str
    text: str
    score: float
    metadata: dict[str, Any]
    valid_from: str | None
    valid_to: str | None
    provenance: list[dict[str, Any]]
    kind: str
    speaker: str | None
    session: str | None
    position: int
    recorded_at: str | None
    terms: dict[str, float]


class Hits(BaseModel):
    hits: list[Found]


class Happened(BaseModel):
    seq: int
    time: str
    actor: str
    op: str
    id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    why: str


class History(BaseModel):
    events: list[Happened]


class Packed(BaseModel):
    """Memories as one text for a prompt, its tokens, and the memories in it."""

    text: str
    used: int
    budget: int
    ids: list[str]
    left_out: int


class Related(BaseModel):
    id: str
    src: str
    rel: str
    dst: str
    data: dict[str, Any]
    valid_from: str | None
    valid_to: str | None
    recorded_at: str
    retired_at: str | None


class Graph(Page):
    """A page of memories, and all edges that begin at them."""

    edges: list[Related]


class SpaceCount(BaseModel):
    user: str
    agent: str
    run: str
    tenant: str
    memories: int


class Spaces(BaseModel):
    spaces: list[SpaceCount]
    next: int | None


class Wrong(BaseModel):
    """What was wrong, in the form of OpenAI's API."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    error: Wrong
