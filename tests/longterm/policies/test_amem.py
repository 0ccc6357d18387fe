import random
import warnings
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import FallbackWarning, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.amem import LINK, NOTE, AMem
from holdfast.longterm.retrieval.embed import Hash

START = datetime(2024, 5, 8, 13, 56, tzinfo=UTC)


def memory_of(policy=None, path=":memory:", llm=None):
    times = iter(range(1 << 20))
    return Memory(
        path,
        policy=policy or AMem(),
        embedder=Hash(),
        llm=llm,
        durability="process",
        clock=lambda: START + timedelta(seconds=next(times)),
    )


def notes_of(memory):
    return {note.data["turns"][0]: note for note in memory.get_all(kind=NOTE, limit=1000)}


def links_of(memory):
    with memory.reading() as view:
        return [(edge.src, edge.dst) for edge in view.edges(rel=LINK)]


def test_vectors_links_and_history_after_500_random_writes():
    draw = random.Random(0)
    memory = memory_of(AMem(k=3))
    words = [a + b for a in ("kilo", "mega", "nano", "tera", "pico") for b in ("ton", "bar", "lux")]
    turns = []
    for step in range(500):
        if turns and step % 10 == 3:
            memory.update(draw.choice(turns), " ".join(draw.sample(words, 4)))
        elif turns and step % 25 == 7:
            memory.delete(turns.pop(draw.randrange(len(turns))))
        else:
            turns += memory.add(f"{step} " + " ".join(draw.sample(words, 4)))
    notes = notes_of(memory)
    assert notes.keys() == set(turns)
    with memory.reading() as view:
        stored = np.stack([view.vector(note.id) for note in notes.values()])
    fresh = Hash().encode([note.document for note in notes.values()])
    np.testing.assert_allclose(stored, fresh, atol=1e-5)

    ids = {note.id for note in notes.values()}
    links = links_of(memory)
    assert len(links) > 100
    assert all(src in ids and dst in ids and src != dst for src, dst in links)

    evolved = 0
    for note in notes.values():
        added, *revised = memory.history(note.id)
        assert added.op == "add"
        seen = added.after["text"]
        for event in revised:
            if event.op == "revise":
                assert event.before["text"] == seen != event.after["text"]
                seen, evolved = event.after["text"], evolved + event.why.startswith("evolved with")
        assert seen == note.text
    assert evolved > 20


def test_a_note_by_hand():
    memory = memory_of()
    (first,) = memory.add("Violin lessons: violin practice before breakfast")
    (second,) = memory.add("Violin practice went well, the violin is in tune")
    notes = notes_of(memory)
    assert notes[first].data["keywords"][0] == notes[second].data["keywords"][0] == "violin"
    assert links_of(memory) == [(notes[second].id, notes[first].id)]
    # Each takes the other's two tags, and knows whose words they are.
    assert notes[first].data["tags"].keys() == notes[second].data["tags"].keys()
    assert set(notes[first].data["tags"].values()) == {first, second}
    assert notes[second].text.startswith(
        "Violin practice went well, the violin is in tune\nKeywords: "
    )


def test_links_lead_to_what_the_query_does_not_name():
    links, bare = memory_of(AMem(k=1)), memory_of(AMem(k=1, link_k=0))
    for memory in (links, bare):
        memory.add("Ronja is new at Mikado Sternwarte")
        memory.add("Mikado Sternwarte bought forty telescopes")
        for i in range(20):
            memory.add(f"Meal number {i} was soup")
    found = links.search("Who is Ronja?", limit=2)
    assert found[1].text == "Mikado Sternwarte bought forty telescopes"
    assert found[1].terms["link"] == pytest.approx(0.15 * (found[0].score / (1 + 0.15)), rel=0.2)
    other = next(h for h in bare.search("Who is Ronja?", limit=30) if "forty" in h.text)
    assert "link" not in other.terms


def test_one_add_of_many_turns_links_them_too():
    memory = memory_of()
    memory.add(
        [
            "Violin practice before breakfast",
            "Violin practice, then a violin concert and a concert dinner",
            "Rain again",
        ]
    )
    notes = list(notes_of(memory).values())
    assert links_of(memory) == [(notes[1].id, notes[0].id)]
    assert any(event.why.startswith("evolved") for event in memory.history(notes[0].id))


def reply(**changed):
    whole = {
        "keywords": ["violin", "music", "practice"], "context": "About music.",
        "tags": ["hobby", "music", "arts"], "should_evolve": True,
        "actions": ["strengthen", "update_neighbor"], "connections": [0],
        "new_context": ["Part of a musical life."], "new_tags": [["music"]],
    }  # fmt: skip
    return {"notes": [{**whole, **changed}]}


def test_a_model_is_asked_once_per_add_and_obeyed():
    llm = Scripted([reply(should_evolve=False), reply()])
    memory = memory_of(llm=llm)
    (first,) = memory.add("I play the violin")
    (second,) = memory.add("My violin is in tune")
    assert llm.usage.calls == 2
    memory.add("My violin is in tune")  # the same again is no news
    assert llm.usage.calls == 2
    notes = notes_of(memory)
    assert notes[second].data["keywords"] == ["violin", "music", "practice"]
    assert notes[first].data["context"] == "Part of a musical life."
    assert notes[first].data["tags"] == {"music": second}
    assert links_of(memory) == [(notes[second].id, notes[first].id)]


def test_wrong_decisions_are_used_as_far_as_they_are_right():
    wrong = reply(connections=[0, 7, -1], new_context=["Kept."], new_tags=[["a"], ["b"], ["c"]])
    memory = memory_of(llm=Scripted([reply(should_evolve=False), wrong]))
    (first,) = memory.add("I play the violin")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (second,) = memory.add("My violin is in tune")
    said = {str(one.message) for one in caught if one.category is FallbackWarning}
    assert any("connections [0, 7, -1] name more than 1" in text for text in said)
    assert any("new_tags has 3 entries for 1 neighbours" in text for text in said)
    notes = notes_of(memory)
    assert len(links_of(memory)) == 1
    assert notes[first].data["context"] == "Kept."
    assert notes[first].data["tags"] == {"a": second}


def test_a_failing_model_leaves_it_to_the_rules():
    memory = memory_of(llm=Scripted([]))
    with pytest.warns(FallbackWarning, match="the script holds 0 replies"):
        (first,) = memory.add("Violin lessons: violin practice")
    assert notes_of(memory)[first].data["keywords"][0] == "violin"


def test_purge_takes_the_words_out_of_other_notes(tmp_path):
    path = tmp_path / "m.db"
    memory = memory_of(path=path)
    (kept,) = memory.add("The garden party starts at noon in the garden")
    (gone,) = memory.add("garden party garden party quetzalcoatl quetzalcoatl quetzalcoatl")
    (third,) = memory.add("After the garden party we cleaned the garden")
    assert b"quetzalcoatl" in path.read_bytes() + path.with_name("m.db-wal").read_bytes()
    assert "quetzalcoatl" in notes_of(memory)[kept].data["tags"]
    memory.purge(gone)
    for file in tmp_path.iterdir():
        assert b"quetzalcoatl" not in file.read_bytes()
    notes = notes_of(memory)
    assert notes.keys() == {kept, third}
    assert links_of(memory) == [(notes[third].id, notes[kept].id)]
    assert {hit.id for hit in memory.search("garden party")} == {kept, third}


def test_corrections_and_deletions_reach_the_note():
    memory = memory_of()
    (turn,) = memory.add("The meeting is on Monday")
    memory.update(turn, "The meeting is on Friday")
    assert notes_of(memory)[turn].text.startswith("The meeting is on Friday\n")
    assert [hit.text for hit in memory.search("meeting")] == ["The meeting is on Friday"]
    memory.update(notes_of(memory)[turn].id, "The meeting is on Sunday")
    assert memory.get(turn).text == "The meeting is on Sunday"
    memory.delete(turn)
    assert memory.search("meeting") == []


def test_bad_options():
    with pytest.raises(UsageError, match="k=0 leaves a note without neighbours; give at least 1"):
        AMem(k=0)
    with pytest.raises(UsageError, match="link_k=-1 is negative"):
        AMem(link_k=-1)
