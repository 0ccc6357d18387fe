from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.longterm.records import Space, Turn, micros, moment, text_hash, turns_of


@given(st.tuples(*[st.text(max_size=6)] * 4))
def test_a_space_survives_its_text(parts):
    space = Space(*parts)
    assert Space.of(str(space)) == space


def test_spaces_from_what_users_write():
    assert Space.of("ann") == Space(user="ann") == Space.of(user="ann") == Space.of({"user": "ann"})
    assert Space.of("acme/ann/bot/7") == Space("acme", "ann", "bot", "7")
    assert Space.of(None) == Space()
    with pytest.raises(ValueError, match="has 5 parts"):
        Space.of("a/b/c/d/e")
    with pytest.raises(ValueError, match="were both given"):
        Space.of("ann", user="bob")
    with pytest.raises(ValueError, match="space field group='x'"):
        Space.of({"group": "x"})


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_are_exact(time):
    assert moment(micros(time, "when")) == time


def test_times_of_any_zone_and_of_none():
    cet = datetime(2024, 5, 8, 13, 56, tzinfo=timezone(timedelta(hours=2)))
    assert moment(micros(cet, "when")) == datetime(2024, 5, 8, 11, 56, tzinfo=UTC)
    with pytest.raises(ValueError, match=r"when=2024-05-08 13:56:00 has no time zone; facts are"):
        micros(datetime(2024, 5, 8, 13, 56), "when")
    with pytest.raises(ValueError, match="is a str"):
        micros("2024", "when")


def test_texts_that_differ_in_case_and_space_alone_are_one():
    assert text_hash(" Ann\n likes  TEA ") == text_hash("ann likes tea")
    assert text_hash("ann likes tea") != text_hash("ann likes tea.")


def test_messages_as_chat_programs_write_them():
    when = datetime(2024, 1, 1, tzinfo=UTC)
    turns = turns_of(
        [
            {"role": "user", "content": "hello"},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "hi"}, {"x": 1}]},
            {"speaker": "Ben", "text": "hey", "when": "2024-02-02T00:00:00+00:00", "id": 7},
            "bare",
        ],
        when=when,
        session="s",
        metadata={"a": 1},
    )
    assert [(t.speaker, t.text, t.kind) for t in turns] == [
        ("user", "hello", "turn"), ("Ann", "hi", "turn"), ("Ben", "hey", "turn"),
        (None, "bare", "turn"),
    ]  # fmt: skip
    assert turns[2].when == datetime(2024, 2, 2, tzinfo=UTC) and turns[2].id == "7"
    assert {t.session for t in turns} == {"s"} and turns[0].metadata == {"a": 1}
    assert turns_of("a fact")[0].kind == "fact"


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("  ", "message 0 has no text"),
        ([{"role": "user"}], 'no text under "content"'),
        ([3], "message 0 is a int"),
        ([{"text": "x", "when": "soon"}], "when='soon'"),
        ([Turn("x", when=datetime(2024, 1, 1))], "no time zone"),
    ],
)
def test_messages_that_cannot_be_remembered(given_, message):
    with pytest.raises(ValueError, match=message):
        turns_of(given_)
