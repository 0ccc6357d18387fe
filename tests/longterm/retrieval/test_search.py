from datetime import UTC, datetime

from holdfast.longterm import Memory
from holdfast.longterm.retrieval.embed import Hash


def test_a_question_that_names_a_day_finds_what_was_said_then(tmp_path):
    days = [datetime(2023, month, 13, tzinfo=UTC) for month in (3, 6, 10)]
    with Memory(tmp_path / "memory.db", embedder=Hash(64)) as memory:
        ids = [memory.add("I showed a painting.", when=day, session=str(day))[0] for day in days]
        now = datetime.now(UTC)
        for day, id in zip(days, ids, strict=True):
            asked = f"Which painting was shown on {day:%d %B, %Y}?"
            # The image of a space, and one made for a search in the past.
            for hits in (memory.search(asked), memory.search(asked, recorded=now)):
                assert [hit.id for hit in hits if hit.terms["date"] > 0] == [id]
                assert hits[0].id == id and len(hits) == 3
