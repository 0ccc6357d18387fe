import random
import sys

import numpy as np
import pytest

from holdfast.checks.longterm.amadeus import f1
from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.policies.amadeus import Analyst, Definition, FileStore, SymbolMemory
from holdfast.longterm.tools.pose import Events, Pose, events
from holdfast.longterm.tools.restricted import Stopped

CHASE = "define <|chase|> as mouse 0 chases mouse 1 — été"


def pose():
    """Both rest for 3 s, then mouse 0 follows mouse 1, 2 lengths of 10 behind; 10 frames a second.

    A speed is measured over 5 frames before and after: at frame i it is 3 * (i - 25) from 25 to 35.
    """
    t = np.arange(60) / 10
    x = np.where(t < 3, 0, (t - 3) * 30)
    data = np.zeros((60, 2, 2, 2))
    for animal, ahead in ((0, 0.0), (1, 20.0)):
        data[:, animal, 0, 0], data[:, animal, 1, 0] = x + ahead + 5, x + ahead - 5
    return Pose(data, 10, regions={"corner": (80, -5, 200, 5)})


@pytest.mark.parametrize("seed", range(5))
def test_the_window_never_exceeds_its_budget_and_symbols_never_change(seed):
    draw = random.Random(seed)
    memory, said = SymbolMemory(200), {}
    for turn in range(500):
        if draw.random() < 0.1:
            name = f"s{draw.randrange(6)}"
            text = f"define <|{name}|> as {'ü' * draw.randrange(40)} {turn}"
            memory.read(text)
            memory.define(Definition(name, text, code=f"return {turn}"))
            said[name] = text
        elif said and draw.random() < 0.3:
            name = draw.choice(sorted(said))
            (found,) = memory.read(f"what of <|{name}|> and <|{name}|>?")
            assert found.text.encode() == said[name].encode()
            held = [m for m in memory.window if said[name] in m]
            assert len(held) == 1, "loaded once"
        else:
            memory.read("x" * draw.randrange(1, 180))
        assert memory.used == sum(len(m.encode()) for m in memory.window) <= 200
    assert {name: memory.get(name).text for name in said} == said


def test_a_symbol_of_500_turns_ago_comes_back_byte_equal(tmp_path):
    memory = SymbolMemory(120, store=FileStore(tmp_path / "symbols"))
    memory.read(CHASE)
    memory.define(Definition("chase", CHASE, "return 1", "3 events"))
    for turn in range(500):
        memory.read(f"turn {turn}")
    assert not any("chase" in message for message in memory.window)
    memory.read("when is <|chase|>?")
    assert memory.window[-2:] == [f"<|chase|>: {CHASE}", "when is <|chase|>?"]
    again = SymbolMemory(120, store=FileStore(tmp_path / "symbols"))
    assert again.get("chase") == Definition("chase", CHASE, "return 1", "3 events")


def test_the_defining_message_is_its_own_entry_and_a_new_one_replaces_it():
    memory = SymbolMemory(500)
    memory.read(CHASE)
    memory.define(Definition("chase", CHASE))
    memory.read("when is <|chase|>?")
    assert memory.window == [CHASE, "when is <|chase|>?"]
    other = "define <|chase|> as mouse 1 chases mouse 0"
    memory.read(other)
    memory.define(Definition("chase", other))
    assert memory.window == ["when is <|chase|>?", other]


def test_symbols_are_matched_exactly_and_the_unknown_names_near_ones():
    memory = SymbolMemory(500)
    with pytest.raises(UsageError, match=r"none is defined; say define <\|chase\|> as"):
        memory.read("<|chase|>")
    memory.define(Definition("chase", CHASE))
    for name in ("Chase", "chases", "chase "):
        with pytest.raises(UsageError, match=f"unknown symbol '{name}'; nearest known: chase"):
            memory.read(f"when is <|{name}|>?")
    assert memory.window == [] and memory.used == 0


def test_what_does_not_fit_is_refused_and_changes_nothing():
    memory = SymbolMemory(60)
    memory.read("short")
    memory.define(Definition("long", "y" * 50))
    with pytest.raises(UsageError, match=r"1 symbols that it names take .* window holds 60"):
        memory.read("what is <|long|>?")
    assert memory.window == ["short"]
    with pytest.raises(UsageError, match="budget=0 holds no message"):
        SymbolMemory(0)


@pytest.mark.parametrize(
    "text, frames",
    [
        ("mouse 0 chases mouse 1", [[29, 60]]),
        ("When is mouse 0 frozen?", [[0, 26]]),
        ("mouse 1 is in the corner for at least 0.5 seconds", [[50, 60]]),
        ("mouse 0 is faster than 20", [[32, 60]]),
        ("mouse 0 faces mouse 1 and mouse 1 is faster than 20", [[32, 60]]),
        ("mouse 0 is slower than 1 or is in the corner", [[0, 26], [57, 60]]),
        ("mouse 0 freezes at most 0.6 seconds before mouse 0 is faster than 20", [[0, 26]]),
        ("mouse 0 freezes at most 0.5 seconds before mouse 0 is faster than 20", []),
        ("mouse 0 is closer than 5 to mouse 1", []),
    ],
)
def test_phrases_without_a_model(text, frames):
    got = Analyst(pose()).ask(text)
    assert got.events.frames.tolist() == frames
    assert got.code.startswith("return ")


def test_symbols_compose_over_programs():
    analyst = Analyst(pose())
    first = analyst.ask("define <|rest|> as mouse 0 freezes")
    analyst.ask("define <|calm start|> as <|rest|> before mouse 0 chases mouse 1")
    assert analyst.ask("<|calm start|>").events == first.events
    assert analyst.memory.get("rest").result == "1 events"
    analyst.memory.define(Definition("loop", "x", 'return symbol("loop")'))
    with pytest.raises(Stopped, match=r"<\|loop\|> is defined by itself: loop"):
        analyst.run('return symbol("loop")')


def test_a_model_writes_a_program_and_is_told_what_stopped_it():
    replies = [
        "```python\nwhile True:\n    pass\n```",
        "open('/etc/passwd')",
        "return speed(7) > 3",
        "Here:\n```python\ndef task():\n    return events(speed(0) > 20, min_len=0.5)\n```",
    ]
    llm = Scripted(replies)
    got = Analyst(pose(), llm=llm).ask("when does it hurry?")
    assert got.repairs == 3 and len(got.events) == 1 and got.code.startswith("def task")
    told = [request[-1]["content"] for request in llm.requests[1:]]
    assert "more than 20000 steps" in told[0]
    assert "there is no function open" in told[1]
    assert "animal 7 is not tracked" in told[2]
    with pytest.raises(Stopped, match="after 3 repairs: line 1: Import is not part"):
        Analyst(pose(), llm=Scripted(["import os"] * 4)).ask("what?")
    with pytest.raises(Stopped, match="returns float, not events or a mask"):
        Analyst(pose()).run("return 1.5")


def test_prompts_hold_the_loaded_symbols_and_only_so_many_functions():
    memory = SymbolMemory(700)
    memory.define(Definition("chase", CHASE))
    llm = Scripted(["return speed(0) > 20"])
    Analyst(pose(), llm=llm, memory=memory).ask("how fast is <|chase|> in speed?")
    system, user = (message["content"] for message in llm.requests[0])
    assert len(system.encode()) <= 700 and CHASE in user
    listed = system.splitlines()[1:]
    assert listed[0].startswith("speed(animal: int) -> array: Length per second")
    assert 1 < len(listed) < 10


def test_a_models_program_reaches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for code in (
        "open('x', 'w')",
        "return speed.__globals__",
        "return symbol('a').frames",
        "exec('import this')",
        "return events(mask=open)",
    ):
        with pytest.raises(Stopped):
            Analyst(pose()).run(code)
    assert list(tmp_path.iterdir()) == [] and "this" not in set(sys.modules) - before


def test_the_figure_shows_every_event():
    pytest.importorskip("matplotlib")
    got = Analyst(pose()).ask("mouse 0 chases mouse 1")
    (bars,) = got.fig.axes[0].collections
    assert len(bars.get_paths()) == len(got.events) == 1


def test_scores_of_events():
    truth = Events(np.array([[0, 10], [20, 30]]), 40)
    assert f1(truth, truth) == 1
    assert f1(Events(np.array([[0, 4], [20, 26]]), 40), truth) == 0.5
    assert f1(events(np.zeros(40, bool)), truth) == 0


def test_errors():
    with pytest.raises(UsageError, match="fps is missing"):
        Analyst(np.zeros((3, 1, 2, 2)))
    message = "none of the phrases that are known without a model: .* Give llm= for others"
    with pytest.raises(UsageError, match=message):
        Analyst(pose()).ask("mouse 0 sings")
