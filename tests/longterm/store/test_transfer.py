import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Add, Link, Revise, Source, Touch
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.store import maintain
from holdfast.longterm.store.rows import dumps
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


def contents(of, space=None):
    """All rows and the log, without what each store numbers itself."""
    with of.reading(space=space) as view:
        events = [replace(e, after=None) if e.op == "purge" else e for e in view.events()]
        items = {e.id for e in events if e.id[0] == "m"}
        versions = [replace(v, version=0) for i in sorted(items) for v in view.versions(i)]
        return events, versions, view.edges(), view.sources(sorted(items))


def windows(of):
    with of.reading() as view:
        found = of.searcher.vectors(view._sql, [item.version for item in view.items()], 1)
        return np.array([found[item.version] for item in view.items()])


def test_a_copy_goes_on_through_all_that_can_happen(memory, other, tmp_path):
    """Exactly what the origin has, whatever was done between one export and the next."""
    file = tmp_path / "m.jsonl"
    memory.add("This is another space's, so that versions have other numbers.", user_id="ann")
    one, two, three, _ = memory.add(messages("monday"), session="monday", when=DAYS["monday"])

    def synced():
        counts = memory.export(file)
        other.import_(file)
        assert contents(other) == contents(memory) and not maintain.verify(other).problems
        np.testing.assert_allclose(windows(other), windows(memory), atol=1e-6)
        assert other.import_(file) == dict.fromkeys(("memory", "source", "edge", "event"), 0)
        assert other.export(tmp_path / "again.jsonl") == counts

    synced()
    (note,) = memory.transact(
        lambda _: [Add("A note.", "note", sources=[Source(one, 0, 3), Source(one, 0, 5)])]
    )
    memory.transact(lambda _: [Revise(note, data={"n": 1}), Revise(note, data={"n": 2})])
    memory.transact(lambda _: [Link(note, "of", two), Touch(three, strength=2.0)])
    synced()
    memory.delete(two)
    memory.update(three, "It is warm there.")
    synced()
    memory.search("Miso")
    other.search("Miso")  # an image that has to follow
    memory.purge(one)
    (gone,) = memory.add("Here and gone before the next export.")
    memory.purge(gone)
    (last,) = memory.add({"role": "Ann", "content": "Here to stay.", "id": "7"}, session="monday")
    synced()
    assert [h.id for h in other.search("stay warm")] == [h.id for h in memory.search("stay warm")]
    # It is known by the name that its sender gave it.
    again = {"role": "Ann", "content": "Here to stay.", "id": "7"}
    assert other.add(again, session="monday") == [last]


def test_an_older_export_adds_nothing(memory, tmp_path):
    memory.add("one")
    memory.export(tmp_path / "m.jsonl")
    (two,) = memory.add("two")
    memory.update(two, "two and a half")
    before = contents(memory)
    assert not any(memory.import_(tmp_path / "m.jsonl").values())
    assert contents(memory) == before


def test_copies_that_both_went_on_are_not_mixed(memory, other, tmp_path):
    file = tmp_path / "m.jsonl"
    (fact,) = memory.add("Ann lives in Boston.")
    memory.export(file)
    other.import_(file)
    memory.update(fact, "Ann lives in Denver.")
    other.update(fact, "Ann lives in Oslo.")
    memory.export(file)
    before = contents(other)
    message = (
        r"of 2 and 2 changes the first 1 are the same, then here came the revise of "
        rf"{fact} at 2024-01-01.*space=\"copy\"; nothing was changed"
    ).replace('"; nothing', '".*; nothing')
    with pytest.raises(UsageError, match=message):
        other.import_(file)
    assert contents(other) == before
    other.import_(file, space="copy")
    assert [i.text for i in other.get_all(space="copy")] == ["Ann lives in Denver."]
    assert contents(other) == before and len(other.stats()) == len(memory.stats())
    # The copy in its own space goes on with the origin.
    memory.add("Something new.")
    memory.export(file)
    assert other.import_(file, space="copy")["event"] == 1
    with pytest.raises(UsageError, match="of 2 and 3 changes the first 1 are the same"):
        other.import_(file)


def test_a_file_is_not_mixed_into_what_has_nothing_to_do_with_it(memory, tmp_path):
    memory.add("of Ann", user_id="ann")
    memory.add("of Ben", user_id="ben")
    memory.export(tmp_path / "ann.jsonl", user_id="ann")
    with pytest.raises(UsageError, match="of 1 and 1 changes the first 0 are the same"):
        memory.import_(tmp_path / "ann.jsonl", user_id="ben")
    assert [i.text for i in memory.get_all(user_id="ben")] == ["of Ben"]


def test_files_of_the_first_version_are_read(memory, other, tmp_path):
    file = tmp_path / "m.jsonl"
    live(memory)
    memory.export(file)
    header, *rows, end = map(json.loads, file.read_text().splitlines())
    for row in rows:
        row.pop("key_hash", None)
    lines = [dumps(row) for row in rows]
    digest = hashlib.blake2b("".join(f"{line}\n" for line in lines).encode(), digest_size=16)
    ends = dumps({**header, "version": 1}), dumps({**end, "digest": digest.hexdigest()})
    file.write_text("\n".join([ends[0], *lines, ends[1]]) + "\n")
    other.import_(file)
    assert contents(other) == contents(memory)


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
