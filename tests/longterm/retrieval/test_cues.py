from datetime import UTC, datetime, timedelta

import pytest

from holdfast.longterm.retrieval import cues, terms


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("Really?", True),
        ('She said "why?"', True),
        ("Ann: Seen this? [a photo of a dog]", True),
        ("Really? I had no idea.", False),
        ("[who? me]", False),
        ("", False),
    ],
)
def test_a_turn_asks_if_its_end_does(text, asks):
    assert cues.asks(text) == asks


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("When did Ann move?", True),
        ("since when does she paint", True),
        ("How long has Ann been married?", True),
        ("In which month is the race?", True),
        ("What does Ann do when she is sad?", False),
        ("What did Ann paint last year?", False),
        ("Wann?", False),
    ],
)
def test_a_question_asks_for_a_time(question, asks):
    assert cues.asks_when(question) == asks


def test_times_are_words_of_times():
    said = ["Yesterday I ran", "two weeks ago", "on Friday", "in 2019", "last night"]
    assert all(not set(terms.stems(text)).isdisjoint(cues.TIMES) for text in said)
    said = ["I may run", "it was fun", "room 12", "a long run"]
    assert all(set(terms.stems(text)).isdisjoint(cues.TIMES) for text in said)


def test_a_day_is_told_of_until_a_week_after_it():
    day, now = datetime(2023, 10, 13, tzinfo=UTC), datetime(2023, 12, 1, tzinfo=UTC)

    def micros(when):
        return int(1e6 * when.timestamp())

    want = [(micros(day), micros(day + timedelta(days=8)))]
    assert cues.periods("What was shown on October 13, 2023?", None) == want
    assert cues.periods("What was shown on October 13?", micros(now)) == want
    # Without a now nothing says which October.
    assert cues.periods("What was shown on October 13?", None) == []
    assert cues.periods("What was shown?", micros(now)) == []
    june = cues.periods("Who ran in June?", micros(now))
    assert june == [(micros(day.replace(month=6, day=1)), micros(day.replace(month=7, day=8)))]


def test_a_long_question_is_read_to_where_embedders_stop():
    assert 0 < len(cues.periods("2023 " * 100_000, None)) <= 1200 / len("2023 ")
