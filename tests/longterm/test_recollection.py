"""A chat and a server that remember: the same memory, another process, another day."""

import json
import subprocess
import sys

import openai
import pytest

from holdfast.checks import tinylm
from holdfast.checks.serving import NAME, serving
from holdfast.context.cache.conformance import model
from holdfast.errors import UsageError
from holdfast.longterm.budget import words
from holdfast.longterm.memory import Memory
from holdfast.longterm.recollection import Recollection
from holdfast.longterm.records import Space
from holdfast.longterm.retrieval.embed import Hash
from holdfast.training.tokenizers import byte_tokenizer

ANN, BOB = Space(user="ann"), Space(user="bob")


@pytest.fixture
def past(tmp_path):
    with Memory(tmp_path / "m.db", embedder=Hash(64)) as memory:
        yield Recollection(memory, 60)


def test_what_was_said_comes_back_before_a_message_within_its_budget(past):
    past.keep("The door code is 4711.", "Noted.", "s", ANN)
    context = past.recall("What is the door code?", ANN)
    message = past.before(context, "What is the door code?")
    assert "4711" in message and message.endswith("\n\nWhat is the door code?")
    assert words(message) - words("What is the door code?") <= past.budget
    assert past.recall("What is the door code?", BOB).ids == ()
    assert past.before(past.recall("x", BOB), "x") == "x"
    assert past.recall("  ", ANN).ids == ()


def test_a_model_that_repeats_memories_does_not_multiply_them(past):
    past.keep("The door code is 4711.", "Noted.", "s", ANN)
    count = past.memory.stats()["memories"]
    past.keep("What is it?", past.recall("door code", ANN).text, "s", ANN)
    assert past.memory.stats()["memories"] == count + 1, "the question alone is new"


def test_a_budget_of_nothing_is_refused(past):
    with pytest.raises(UsageError, match="holds none"):
        Recollection(past.memory, 0)


def test_a_served_model_remembers_each_user(past):
    net = tinylm.trained()
    with (
        serving(net, 2 << 20, past=past) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):

        def ask(text, user, **options):
            return client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": text}], user=user,
                max_tokens=4, temperature=0, **options,
            )  # fmt: skip

        first = ask("The door code is 4711.", "ann")
        assert first.model_extra["memories"] == []
        again = ask("What is the door code?", "ann")
        (code,) = [i.id for i in past.memory.get_all(user_id="ann") if "4711" in i.text]
        assert code in again.model_extra["memories"]
        assert again.usage.prompt_tokens > len("What is the door code?") + 60
        assert ask("What is the door code?", "bob").model_extra["memories"] == []
        events = list(ask("And the window code?", "ann", stream=True))
        assert events[-1].choices[0].finish_reason
    held = {user: past.memory.get_all(user_id=user) for user in ("ann", "bob", "")}
    said = [item.text for item in held["ann"] if item.speaker == "user"]
    assert said == ["The door code is 4711.", "What is the door code?", "And the window code?"]
    assert {item.speaker for item in held["ann"]} <= {"user", "assistant"}
    assert [i.text for i in held["bob"] if i.speaker == "user"] == ["What is the door code?"]
    assert held[""] == []


def test_a_chat_remembers_across_processes(tmp_path):
    model(vocab_size=264).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    def chat(prompt):
        done = subprocess.run(
            [
                sys.executable, "-m", "holdfast", "chat", tmp_path / "model", "--memory",
                tmp_path / "me.db", "--user", "ann", "--prompt", prompt, "--max-tokens", "3",
                "--memory-budget", "400", "--json",
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["turns"][0]["memories"]

    assert chat("The door code is 4711.") == []
    with Memory(tmp_path / "me.db") as memory:
        (code, *_) = [i.id for i in memory.get_all(user_id="ann") if "4711" in i.text]
    assert code in chat("What is the door code?")
