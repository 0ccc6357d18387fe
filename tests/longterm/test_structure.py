import json
import random

import pytest

from holdfast import cli
from holdfast.errors import UsageError
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.evaluation.units import CHUNK, SINGLE, Material, Unit, count, load, units
from holdfast.longterm.language.llm import Prompted, Scripted
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.structure import (
    Shelf,
    coverage,
    evidence,
    iterate,
    measure,
    pack,
    rerank,
    single_step,
)

SAID = {
    1: [
        ("Ann", "I adopted a cat named Miso in Bern."),
        ("Ben", "How lovely! I bought a red bicycle."),
    ],
    2: [
        ("Ann", "Miso broke the blue vase of my aunt Gerda."),
        ("Ben", "My aunt Frida visited the harbour in Oslo."),
    ],
}


def item(name="conv-1", annotated=True):
    talk = {"speaker_a": "Ann", "speaker_b": "Ben"}
    for session, turns in SAID.items():
        talk[f"session_{session}_date_time"] = f"1:56 pm on {session} May, 2023"
        talk[f"session_{session}"] = [
            {"speaker": who, "dia_id": f"D{session}:{n}", "text": text}
            for n, (who, text) in enumerate(turns, 1)
        ]
    found = {
        "sample_id": name,
        "conversation": talk,
        "qa": [
            {"question": "What did Ann adopt?", "answer": "a cat", "evidence": ["D1:1"],
             "category": 1},
            {"question": "What did Ben buy?", "answer": "a bicycle", "evidence": ["D1:2"],
             "category": 4},
            {"question": "What did Ann buy?", "adversarial_answer": "a bicycle",
             "evidence": ["D1:2"], "category": 5},
        ],
    }  # fmt: skip
    if annotated:
        found["observation"] = {
            "session_1_observation": {
                "Ann": [["Ann adopted a cat named Miso in Bern.", "D1:1"]],
                "Ben": [["Ben bought a red bicycle.", ["D1:2"]]],
            },
            "session_2_observation": {"Ann": [["Miso broke the vase of Ann's aunt.", "D2:01"]]},
        }
        found["session_summary"] = {"session_1_summary": "Ann has a cat, Ben has a bicycle."}
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([item("conv-1"), item("conv-2", annotated=False)]))
    return path


@pytest.fixture
def first(file):
    return load(file)[0]


def test_units_name_what_they_are_made_from(first):
    facts = units(first, "facts")
    assert facts[0] == Unit(
        "Ann adopted a cat named Miso in Bern.", "facts", ("conv-1/D1:1",),
        locomo.moment("1:56 pm on 1 May, 2023"),
    )  # fmt: skip
    assert facts[0].line == "1 May 2023: Ann adopted a cat named Miso in Bern."
    assert facts[2].sources == ("conv-1/D2:1",)  # "D2:01" was repaired
    chunks = units(first, "chunks")
    assert [unit.sources for unit in chunks] == [
        ("conv-1/D1:1", "conv-1/D1:2"),
        ("conv-1/D2:1", "conv-1/D2:2"),
    ]
    given, made = units(first, "summaries")
    assert given.text == "Ann has a cat, Ben has a bicycle." and made.sources == chunks[1].sources
    assert "Ben has red bicycle" in [unit.text for unit in units(first, "triples")]


def test_mixed_is_the_exact_union(first):
    assert units(first, "mixed") == [unit for one in SINGLE for unit in units(first, one)]


def test_without_annotation_rules_make_the_units(file):
    plain = load(file)[1]
    assert any("cat" in text for text, _ in plain.facts)
    for name in SINGLE:
        assert units(plain, name) and all(u.sources for u in units(plain, name))


def test_chunks_hold_every_turn_once_and_no_more_than_they_may():
    turns = tuple(
        locomo.Turn(f"D1:{n}", str(n // 20), "Ann", "word " * (1 + n * 7 % 60), when)
        for when in [locomo.moment("1:56 pm on 8 May, 2023")]
        for n in range(40)
    )
    chunks = units(Material.of(locomo.Conversation("c", turns, ())), "chunks")
    assert [s for unit in chunks for s in unit.sources] == [f"c/{turn.id}" for turn in turns]
    assert len(chunks) > 8 and all(count(unit.text) <= CHUNK for unit in chunks)
    assert all(len({int(s.split(":")[1]) // 20 for s in u.sources}) == 1 for u in chunks)


@pytest.fixture
def shelf():
    rng = random.Random(0)
    words = ["cat", "boat", "tea", "bern", "code", "door", "jazz", "snow", "lamp", "vase"]
    made = [
        Unit(" ".join(rng.choices(words, k=6)) + f" {n}", "facts", (str(n),)) for n in range(60)
    ]
    return Shelf(made, Hash(64))


def test_one_turn_of_the_iterative_retriever_is_a_single_step(shelf):
    for question in ("cat tea", "the lamp by the door", "7"):
        assert iterate(shelf, question, turns=1) == single_step(shelf, question)


def test_a_thought_reaches_what_the_question_does_not_name():
    texts = ["Ann adopted Miso.", "Miso broke the vase."]
    filler = [f"Ben saw boat {n}." for n in range(30)]
    made = [Unit(text, "facts", (str(n),)) for n, text in enumerate([*filler, *texts])]
    shelf = Shelf(made, Hash(256))
    question = "What happened after Ann adopted somebody?"
    assert single_step(shelf, question)[0] == 30
    assert iterate(shelf, question).index(31) < single_step(shelf, question).index(31)
    assert iterate(shelf, question)[:2] == [30, 31]


def test_a_model_thinks_and_ranks(shelf):
    judgement = Prompted(Scripted([{"thought": shelf.units[17].text}] * 3))
    shelf.judgement = judgement
    assert 17 in iterate(shelf, "which snow?")[:2]
    worst = [{"scores": [{"number": 9, "score": 10}, {"number": 42, "score": 10}]}]
    shelf.judgement = Prompted(Scripted(worst + [{"scores": []}] * 9))
    found = single_step(shelf, "snow jazz")
    ranked = rerank(shelf, "snow jazz")
    assert ranked[0] == found[9] and ranked[1:10] == found[:9] and sorted(ranked) == sorted(found)


def test_reranking_by_rules_prefers_the_words_of_the_question(shelf):
    ranked = rerank(shelf, "vase snow")
    both = [i for i, u in enumerate(shelf.units) if {"vase", "snow"} <= set(u.text.split())]
    assert both and set(ranked[: len(both)]) == set(both)


def test_a_context_fills_its_budget_and_more_tokens_never_hold_less(shelf, first):
    question = first.conversation.questions[0]
    order = [shelf.units[i] for i in single_step(shelf, "cat tea")] + units(first, "mixed")
    total = sum(count(unit.line) for unit in order)
    last = (-1.0, -1.0)
    for budget in [*range(0, 60), total // 2, total - 1, total, total + 9]:
        packed = pack(order, budget)
        assert count(packed.text) == packed.used == min(budget, total)
        now = (evidence(packed, "conv-1", question), coverage(packed, question))
        assert now[0] >= last[0] and now[1] >= last[1]
        last = now
    assert last == (1.0, 1.0)


def test_measures_by_hand(first):
    question = first.conversation.questions[0]
    cat, bicycle, _ = units(first, "facts")
    assert evidence(pack([cat], 100), "conv-1", question) == 1
    assert evidence(pack([cat], 5), "conv-1", question) == 0  # only a part of it is there
    assert coverage(pack([cat], 7), question) == 0  # it ends before its cat
    assert coverage(pack([cat], 8), question) == 1
    assert coverage(pack([bicycle], 100), question) == 0


def test_rows_and_noise(file):
    materials = load(file)
    done = []
    rows = measure(materials, Hash(64), budgets=(20, 400), noise=(0, 1), progress=done.append)
    assert len(rows) == 5 * 3 * 2 * 2 and sum(done) == 2 * 5 * 3 * 2
    assert {row["questions"] for row in rows} == {4}  # the adversarial ones have no true answer
    by = {(r["structure"], r["retriever"], r["noise"], r["budget"]): r for r in rows}
    assert by["mixed", "iterative", 0, 400]["evidence"] == 100
    sizes = [len(units(one, "facts")) for one in materials]
    assert by["facts", "rerank", 1, 400]["units"] == sum(sizes)
    assert by["mixed", "single-step", 0, 400]["bytes"] > by["facts", "single-step", 0, 400]["bytes"]
    (row,) = measure(
        materials, Hash(64), report=["conv-2"], structures=["chunks"], retrievers=["rerank"],
        budgets=[400],
    )  # fmt: skip
    assert row["questions"] == 2 and row["evidence multi-hop"] == row["answer single-hop"] == 100


def test_errors_name_what_is_known(first):
    with pytest.raises(UsageError, match=r"structure 'fact'.*facts"):
        units(first, "fact")
    with pytest.raises(UsageError, match="'orphan' has no source; name the turns"):
        Unit("orphan", "facts", ())
    lost = Material(first.conversation, (("nobody said so", ()),), ())
    with pytest.raises(UsageError, match="'nobody said so' has no source"):
        units(lost, "facts")
    with pytest.raises(UsageError, match=r"noise=1: .* 0 others"):
        measure([first], Hash(64), noise=(1,))
    with pytest.raises(UsageError, match=r"retriever 'iterate'.*iterative"):
        measure([first], Hash(64), retrievers=["iterate"])
    with pytest.raises(UsageError, match="conversation 'conv-7'"):
        measure([first], Hash(64), report=["conv-7"])
    with pytest.raises(UsageError, match="turns=0"):
        iterate(Shelf(units(first, "facts"), Hash(64)), "cat", turns=0)
    with pytest.raises(UsageError, match="budget=-1"):
        pack([], -1)


def test_the_command(file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["probe", "memory-structure", "--data", str(file), "--embedder", "hash"]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--budget", "20,400", "--noise", "0,1", *extra])
        assert stop.value.code == 0
    table, document = capsys.readouterr().out.split("{", 1)
    rows = json.loads("{" + document)["rows"]
    assert len(rows) == 60 and table.count("iterative") == 20
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--noise", "-1"])
    assert stop.value.code == 2 and "from 0 on" in capsys.readouterr().err


def test_questions_over_documents_are_read(tmp_path):
    hotpot = {
        "_id": "5a", "question": "Who wrote the book on Miso?", "answer": "Ann Roe",
        "type": "bridge",
        "context": [["Miso", ["Miso is a cat.", " A book is about it."]], ["Roe", ["Ann Roe."]]],
        "supporting_facts": [["Roe", 0], ["Miso", 1], ["Gone", 3]],
    }  # fmt: skip
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([hotpot]))
    (one,) = load(path)
    (question,) = one.conversation.questions
    assert question.evidence == ("1:0", "0:1") and question.category == "bridge"
    assert one.conversation.turns[1].line == "Miso: A book is about it."
    chunk, _ = units(one, "chunks")
    assert chunk.line == chunk.text  # documents have no date
    musique = {
        "id": "2hop", "question": "Who owns it?", "answer": "Ben",
        "paragraphs": [
            {"title": "A", "paragraph_text": "Ben owns a boat.", "is_supporting": True},
            {"title": "B", "paragraph_text": "Oslo has snow.", "is_supporting": False},
        ],
    }  # fmt: skip
    path = tmp_path / "musique.jsonl"
    path.write_text(json.dumps(musique) + "\n")
    (row,) = measure(
        load(path), Hash(64), structures=["mixed"], retrievers=["single-step"], budgets=[60]
    )
    assert row["evidence"] == row["answer"] == row["evidence multi-hop"] == 100
    for name, text, message in (
        ("a.json", "[1", "is not JSON"),
        ("b.json", "[]", "not laid out as expected"),
        ("c.json", None, "does not exist"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=message):
            load(tmp_path / name)


@pytest.mark.skipif(not locomo.path().exists(), reason=f"{locomo.path()} is absent")
def test_locomo_has_a_source_for_every_unit():
    materials = load(locomo.path())
    assert sum(len(one.facts) for one in materials) == 1210
    for one in materials:
        known = {f"{one.conversation.id}/{turn.id}" for turn in one.conversation.turns}
        assert all(set(unit.sources) <= known for unit in units(one, "mixed"))
