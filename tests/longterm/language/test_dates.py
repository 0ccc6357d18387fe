from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language import dates

MONDAY = datetime(2023, 5, 8, 13, 56, tzinfo=UTC)


def found(text, when=MONDAY):
    period = dates.parse(text, when)
    return period and tuple(m and m.strftime("%Y-%m-%d") for m in (period.lo, period.hi))


@pytest.mark.parametrize(
    "text, lo, hi",
    [
        ("yesterday", "2023-05-07", "2023-05-08"),
        ("the day before yesterday", "2023-05-06", "2023-05-07"),
        ("last night", "2023-05-07", "2023-05-08"),
        ("this morning", "2023-05-08", "2023-05-09"),
        ("tomorrow", "2023-05-09", "2023-05-10"),
        ("last Friday", "2023-05-05", "2023-05-06"),
        ("last Monday", "2023-05-01", "2023-05-02"),
        ("next Tuesday", "2023-05-16", "2023-05-17"),
        ("this Friday", "2023-05-12", "2023-05-13"),
        ("on Tuesday", "2023-05-02", "2023-05-03"),
        ("last weekend", "2023-05-06", "2023-05-08"),
        ("last week", "2023-05-01", "2023-05-08"),
        ("next month", "2023-06-01", "2023-07-01"),
        ("last year", "2022-01-01", "2023-01-01"),
        ("last summer", "2022-06-01", "2022-09-01"),
        ("last May", "2022-05-01", "2022-06-01"),
        ("two weeks ago", "2023-04-21", "2023-04-28"),
        ("a month ago", "2023-04-01", "2023-05-01"),
        ("3 days ago", "2023-05-05", "2023-05-06"),
        ("a few years ago", "2018-01-01", "2022-01-01"),
        ("in two weeks", "2023-05-19", "2023-05-26"),
        ("in May 2021", "2021-05-01", "2021-06-01"),
        ("in December", "2022-12-01", "2023-01-01"),
        ("since 2019", "2019-01-01", None),
        ("until 2020", None, "2021-01-01"),
        ("before 2020", None, "2020-01-01"),
        ("after May 2020", "2020-06-01", None),
        ("from 2015 to 2019", "2015-01-01", "2020-01-01"),
        ("between March 2020 and May 2020", "2020-03-01", "2020-06-01"),
        ("for 4 years", "2019-05-08", None),
        ("8 May, 2023", "2023-05-08", "2023-05-09"),
        ("May 8th, 2023", "2023-05-08", "2023-05-09"),
        ("the 8th of May 2023", "2023-05-08", "2023-05-09"),
        ("2023-05-08", "2023-05-08", "2023-05-09"),
        ("1:56 pm on 8 May, 2023", "2023-05-08", "2023-05-09"),
        ("on December 30", "2022-12-30", "2022-12-31"),
    ],
)
def test_periods(text, lo, hi):
    assert found(f"I went there {text}, with Ann.") == (lo, hi)


@pytest.mark.parametrize(
    "text",
    ["It cost $2000 or 1,999", "we may 40 go", "31 June 2020", "the second day", "room 2023-A", ""],
)
def test_what_is_no_date(text):
    period = dates.parse(text, MONDAY)
    assert period is None or period.text in ("June 2020", "2023")


def test_spans_are_disjoint_and_in_order():
    text = "Last May I moved; since 2020-01-02 I work, and yesterday I went home for 2 days."
    periods = dates.find(text, MONDAY)
    assert [p.text for p in periods] == ["Last May", "since 2020-01-02", "yesterday", "for 2 days"]
    for one, two in pairwise(periods):
        assert one.end <= two.start
    assert all(text[p.start : p.end] == p.text for p in periods)


def test_a_day_is_one_of_the_zone_of_the_reference():
    zone = timezone(timedelta(hours=9))
    period = dates.parse("yesterday", datetime(2023, 5, 8, 3, 0, tzinfo=zone))
    assert period.lo == datetime(2023, 5, 6, 15, tzinfo=UTC)
    assert period.hi - period.lo == timedelta(days=1)


def test_without_reference_only_what_names_its_year():
    assert found("yesterday, last May, in June, 3 days ago, on Friday", None) is None
    assert found("in May 2021", None) == ("2021-05-01", "2021-06-01")


def test_naive_reference_is_refused():
    with pytest.raises(UsageError, match=r"no time zone.*stored in UTC"):
        dates.find("yesterday", datetime(2023, 5, 8))


def test_a_plan_is_ahead():
    when = datetime(2024, 5, 8, 3, 0, tzinfo=timezone(timedelta(hours=9)))
    for text, lo in [
        ("in March", "2025-02-28"),  # 1 March in the speaker's zone
        ("on Monday", "2024-05-12"),
        ("last March", "2024-02-29"),
        ("next week", "2024-05-12"),
    ]:
        period = dates.ahead(dates.parse(f"I plan it {text}", when), when)
        assert period.lo.strftime("%Y-%m-%d") == lo
