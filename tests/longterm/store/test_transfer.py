import json

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.memory import Memory
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock
from tests.longterm.world import DAYS, live, messages


@pytest.fixture
def other(tmp_path):
    with Memory(tmp_path / "other.db", embedder=Hash(64), clock=Clock()) as made:
        yield made


def test_a_copy_catches_up_with_what_happened_since(memory, other, tmp_path):
    file = tmp_path / "m.jsonl"
    ids = memory.add(messages("monday"), session="monday", when=DAYS["monday"])
    memory.export(file)
    other.import_(file)
    memory.update(ids[0], "I moved to Denver.")
    memory.delete(ids[1])
    memory.add("Something new.")
    memory.export(file)
    other.import_(file)
    assert [i.text for i in other.get_all()] == [i.text for i in memory.get_all()]
    assert other.search("Denver")[0].text == "I moved to Denver."
    for item in ids:
        assert [e.op for e in other.history(item)] == [e.op for e in memory.history(item)]


def test_what_was_erased_stays_erased(memory, other, tmp_path):
    """An old export does not bring it back, and a new one takes it away elsewhere."""
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    secret, _ = memory.add(["The Zanzibar code.", "Something else."], session="s")
    memory.export(before)
    other.import_(before)
    memory.purge(secret)
    memory.export(after)
    assert "Zanzibar" not in after.read_text()
    memory.import_(before)
    assert memory.get(secret) is None and memory.history(secret)[-1].op == "purge"
    other.import_(after)
    assert other.get(secret) is None
    for path in tmp_path.glob("*.db*"):
        assert b"Zanzibar" not in path.read_bytes(), path


def test_the_past_is_searched_in_a_copy_too(memory, other, tmp_path):
    (fact,) = memory.add("Ann lives in Boston.")
    then = memory.get(fact).recorded_at
    memory.update(fact, "Ann lives in Denver.")
    memory.export(tmp_path / "m.jsonl")
    other.import_(tmp_path / "m.jsonl")
    assert other.search("Ann", recorded=then)[0].text == "Ann lives in Boston."


def test_another_space_gets_ids_of_its_own(memory, tmp_path):
    live(memory, "ann")
    memory.export(tmp_path / "m.jsonl", space="ann")
    memory.import_(tmp_path / "m.jsonl", space="bob")
    ann, bob = (memory.get_all(space=space) for space in ("ann", "bob"))
    assert [i.text for i in ann] == [i.text for i in bob]
    assert not {i.id for i in ann} & {i.id for i in bob}
    memory.purge(bob[0].id, space="bob")
    assert memory.get(ann[0].id, space="ann").text == ann[0].text


@pytest.mark.parametrize("harm", ["cut", "changed", "newer", "other"])
def test_a_damaged_export_changes_nothing(memory, other, tmp_path, harm):
    file = tmp_path / "m.jsonl"
    memory.add(["one", "two"])
    memory.export(file)
    lines = file.read_text().splitlines()
    if harm == "cut":
        lines = lines[:-1]
    elif harm == "changed":
        lines[1] = lines[1].replace("one", "won")
    elif harm == "newer":
        lines[0] = json.dumps({**json.loads(lines[0]), "version": 99})
    else:
        lines = ['{"messages": []}']
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=r"cut short|export version 99|not an export"):
        other.import_(file)
    assert other.stats()["events"] == 0
