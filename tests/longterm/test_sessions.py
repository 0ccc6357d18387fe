from datetime import UTC, datetime

from holdfast.longterm import sessions
from holdfast.longterm.memory import Memory
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import Hash


def is_turn(item):
    return item.kind == "turn"


def test_open_sessions_are_kept_in_one_item_that_is_never_found():
    memory = Memory(
        ":memory:", policy=Policy(), embedder=Hash(16),
        clock=lambda: datetime(2024, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    for number, session in enumerate(("b", "a", None, "b")):
        memory.add({"content": f"{number} said in {session}"}, session=session)
    memory.add("a fact")
    with memory.reading() as view:
        items = [item for item in view.items() if is_turn(item)]
        first = sessions.first(items)
        assert sessions.begun(view) == {}
        assert sessions.noted(view, {}) == []
    assert first == {item.session: item.position for item in reversed(items)}
    memory.transact(lambda view: sessions.noted(view, first))
    with memory.reading() as view:
        assert list(sessions.begun(view)) == ["b", "a", None]
        assert sessions.noted(view, first) == []
        said = sessions.turns(view, first, ["b", None], is_turn)
    assert [turn.text for turn in said] == ["0 said in b", "3 said in b", "2 said in None"]
    events = memory.stats()["events"]
    memory.transact(lambda view: sessions.noted(view, {"a": first["a"]}))
    with memory.reading() as view:
        assert sessions.begun(view) == {"a": first["a"]}
        assert view.count(sessions.STATE) == 1
    assert memory.stats()["events"] == events + 1
    assert sessions.STATE not in {hit.kind for hit in memory.search("open sessions", limit=50)}
