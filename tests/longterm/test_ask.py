import asyncio
import json

import pytest

from holdfast.cli import main
from holdfast.errors import UsageError
from holdfast.longterm import AsyncMemory, Memory
from holdfast.longterm.ground import NOT_IN_MEMORY, resolve
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

TALK = [
    ("Ben", "What is new, Ann?"),
    ("Ann", "I adopted a cat in Bern."),
    ("Ben", "Lovely! What is its name?"),
    ("Ann", "Miso, after the soup."),
    ("Ben", "I bought a red bicycle."),
]


def talked(**options):
    memory = Memory(":memory:", embedder=Hash(64), clock=Clock(), **options)
    memory.add([{"speaker": who, "content": text} for who, text in TALK], session="s")
    return memory


def quote(memory, citation):
    def read(uri):
        item = memory.get(uri)
        return None if item is None else item.text

    return resolve(citation, read)


def test_an_answer_cites_the_bytes_that_say_so():
    with talked() as memory:
        answer = memory.ask("What did Ben buy?")
        assert answer.text == "I bought a red bicycle." and not answer.abstained
        (citation,) = answer.grounding.citations
        assert quote(memory, citation).text == "I bought a red bicycle."
        memory.update(citation.uri, "I bought a red car.")
        assert quote(memory, citation).state == "changed"
        memory.purge(citation.uri)
        assert quote(memory, citation).state == "gone"


def test_hits_are_read_with_the_turns_around_them_each_once():
    with talked() as memory:
        answer = memory.ask("Which cat did Ann adopt in Bern?", limit=1)
        texts = [passage.text for passage in answer.passages]
        assert texts[0] == TALK[1][1]
        assert sorted(texts[1:]) == sorted(text for _, text in (TALK[0], TALK[2], TALK[3]))
        whole = memory.ask("Which cat did Ann adopt in Bern?", limit=5)
        assert len({p.uri for p in whole.passages}) == len(whole.passages) == 5


def test_it_abstains_where_nothing_covers_the_question():
    with talked() as memory:
        question = "Which opera did Zoe sing in Vienna?"
        answer = memory.ask(question)
        assert answer.abstained and answer.text == NOT_IN_MEMORY and answer.grounding is None
        assert memory.ask(question, abstain=False).text != NOT_IN_MEMORY
        nobody = memory.ask(question, user_id="nobody", abstain=False)
        assert nobody.text == NOT_IN_MEMORY and nobody.passages == ()


def test_a_model_answers_and_is_checked():
    said = ["Ben bought a red bicycle.", "Ben bought seven green boats."]
    with talked(llm=Scripted(said)) as memory:
        good, bad = (memory.ask("What did Ben buy?") for _ in said)
        assert good.text == said[0] and good.grounding.coverage == 1
        assert bad.abstained and not bad.grounding.coverage
        assert memory.llm.usage.calls == 2


def test_asking_writes_nothing_and_wants_a_question():
    with talked() as memory:
        before = memory.stats()["events"]
        memory.ask("What did Ben buy?")
        assert memory.stats()["events"] == before
        with pytest.raises(UsageError, match="query is empty"):
            memory.ask(" ")
        with pytest.raises(UsageError, match="limit=0"):
            memory.ask("What?", limit=0)


def test_it_can_be_awaited():
    async def run():
        async with AsyncMemory(":memory:", embedder=Hash(64), clock=Clock()) as memory:
            await memory.add("Ann lives in Bern.")
            return await memory.ask("Where does Ann live?")

    assert asyncio.run(run()).text == "Ann lives in Bern."


def test_the_command(tmp_path, capsys):
    file = str(tmp_path / "a.memory")

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            main(["memory", *args])
        assert stop.value.code == 0
        return capsys.readouterr().out

    call("add", file, "Ann lives in Bern.", "--embedder", "hash")
    shown = call("ask", file, "Where does Ann live?")
    assert shown.startswith("Ann lives in Bern.\n") and "bytes 0-18" in shown
    found = json.loads(call("ask", file, "Where does Ann live?", "--json"))
    assert found["abstained"] is False and found["grounding"]["claims"][0]["reason"] is None
    assert call("ask", file, "Who is the emperor of Mars?") == "not in memory\n"
    forced = call("ask", file, "Who is the emperor of Mars?", "--no-abstain")
    assert forced.startswith("Ann lives in Bern.")
