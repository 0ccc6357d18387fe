import math
import random

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.sweet_sour import Reflector, SweetSour, generalised
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

TASKS = {"red": "doors", "blue": "doors", "soup": "kitchen"}


def agent(path=":memory:", llm=None, tasks=TASKS, **options):
    memory = Memory(path, embedder=Hash(32), policy=SweetSour(**options), llm=llm, clock=Clock())
    return Reflector(memory, tasks)


def play(reflector, task, *steps):
    """An episode of (action, reward) with a numbered observation after each."""
    reflector.start(task, "You see a door.")
    for number, (action, reward) in enumerate(steps, 1):
        reflector.step(f"It is {number} o'clock.", action, reward, number == len(steps))


def kept(reflector):
    return reflector.memory.get_all(kind="reflection")


def test_a_reflection_is_the_situation_the_actions_and_what_they_earned():
    reflector = agent()
    play(reflector, "red", ("take red key", 0), ("open door with red key", 1), ("hit door", -2))
    sweet, sour = kept(reflector)
    assert sweet.text == (
        "You see a door.\ntake red key; open door with red key: earned +1. "
        "In general: take A; open B with A."
    )
    assert sour.text.startswith("It is 2 o'clock.\nhit door: earned -2 and ended it.")
    assert (sweet.metadata["polarity"], sour.metadata["polarity"]) == ("sweet", "sour")
    assert [item.data["gain"] for item in (sweet, sour)] == [1, 2]


def test_every_reflection_traces_to_its_steps_and_nothing_else_stays():
    reflector = agent(stall=3)
    play(reflector, "red", *[("wait", 0)] * 4, ("open door", 1), ("sing", 0))
    with reflector.memory.reading() as view:
        items = {item.id: item for item in view.items()}
        sources = view.sources([item.id for item in kept(reflector)])
        steps = {source.id for found in sources.values() for source in found}
        for item in kept(reflector):
            said = [items[source.id].data["action"] for source in sources[item.id]]
            assert sorted(said) == sorted(item.metadata["actions"]) and said
    assert {i.id for i in items.values() if i.kind == "step"} == steps
    assert {i.kind for i in items.values()} == {"step", "reflection", "task"}
    polarities = [item.metadata["polarity"] for item in kept(reflector)]
    assert polarities == ["sour", "sweet", "sour"], "a stall, the door, and an end without success"
    gone = reflector.memory.purge(next(iter(steps)))
    assert len(gone) >= 2, "what is made of a step goes with it"


def test_a_sweet_reflection_stays_if_its_episode_was_no_worse_than_the_mean():
    reflector = agent()
    play(reflector, "red", ("open door", 4), ("rest", 0))
    play(reflector, "red", ("climb wall", 1), ("fall", -1))  # 0 < 4
    play(reflector, "red", ("dig hole", 2), ("rest now", 0))  # 2 = (4 + 0) / 2
    found = [(i.metadata["polarity"], i.metadata["actions"][-1]) for i in kept(reflector)]
    assert ("sweet", "climb wall") not in found and ("sour", "fall") in found
    assert ("sweet", "open door") in found and ("sweet", "dig hole") in found
    (task,) = reflector.memory.get_all(kind="task")
    assert (task.data["ended"], task.data["mean"]) == (3, 2)


def test_what_is_said_again_is_one_reflection():
    reflector = agent()
    for _ in range(3):
        play(reflector, "red", ("open door", 1))
    (only,) = kept(reflector)
    assert only.data["episode"] == 3 and only.uses == 2
    assert len(reflector.memory.get_all(kind="step")) == 1


@pytest.mark.parametrize("seed", range(2))
def test_caps_hold_and_the_least_useful_leaves(seed):
    pick, reflector = random.Random(seed), agent(cap=4, k=2)
    for episode in range(10):
        task = pick.choice(list(TASKS))
        reflector.start(task, "You see a door.")
        for number in range(4):
            hits = [hit for hit in reflector.recall("door") if hit.kind == "reflection"]
            for polarity in ("sweet", "sour"):
                assert sum(hit.metadata["polarity"] == polarity for hit in hits) <= 2
            action = f"try {pick.choice('abcdefgh')} {episode}"
            reflector.step("A door.", action, pick.choice([-1, 0, 1]), number == 3)
        for family in TASKS.values():
            assert sum(i.metadata["family"] == family for i in kept(reflector)) <= 4
    reflector = agent(cap=2, k=1)
    play(reflector, "red", ("open door", 1), ("open window", 1))
    reflector.start("red", "You see a door.")
    (hit,) = reflector.recall("open window")
    reflector.step("Dark.", "wait for rain", -1, True)
    texts = {item.metadata["actions"][0] for item in kept(reflector)}
    assert hit.id in {item.id for item in kept(reflector)} and "wait for rain" in texts


def test_recall_mixes_polarities_this_episode_and_this_family_first():
    reflector = agent(k=1)
    play(reflector, "soup", ("open the blue door", 1), ("burn soup", -1))
    play(reflector, "red", ("open door", 1), ("kick door", -1))
    reflector.start("blue", "You see a door.")
    reflector.step("A wall.", "walk", -1, False)
    hits = reflector.recall("open the blue door")
    assert [hit.kind for hit in hits] == ["draft", "reflection", "reflection"]
    assert {hit.metadata["family"] for hit in hits} == {"doors"}
    assert {hit.metadata["polarity"] for hit in hits[1:]} == {"sweet", "sour"}
    reflector.recall("open the blue door")
    uses = {i.metadata["actions"][0]: i.uses for i in kept(reflector)}
    assert uses == {"open door": 1, "kick door": 1, "open the blue door": 0, "burn soup": 0}
    for budget in (0, 30, 500):
        made = reflector.context("door", budget)
        assert made.used <= budget and (made.ids or budget < 100)


def test_replays_are_the_same_and_survive_a_new_process(tmp_path):
    digests = set()
    for name in ("a", "b"):
        reflector = agent(tmp_path / f"{name}.db")
        for episode in range(3):
            play(reflector, "red", ("open door", 1), (f"eat {episode}", -1))
        digests.add(reflector.memory.export(tmp_path / name)["digest"])
        reflector.memory.close()
    assert len(digests) == 1
    assert len(kept(agent(tmp_path / "a.db"))) == 4


def test_a_broken_off_episode_keeps_what_it_taught():
    reflector = agent()
    reflector.start("red", "You see a door.")
    reflector.step("A hall.", "open door", 1, False)
    reflector.stop()
    assert [item.kind for item in kept(reflector)] == ["reflection"]
    assert not reflector.memory.summarise("elsewhere") and not reflector.memory.summarise()
    reflector.start("red", "You see a door.")


def test_purging_a_step_takes_what_was_learnt_from_it_while_the_episode_runs():
    reflector = agent()
    reflector.start("red", "You see a door.")
    reflector.step("A hall.", "open the Xanadu door", 1, False)
    (step,) = reflector.memory.get_all(kind="step")
    assert len(reflector.memory.purge(step.id)) == 2 and not reflector.recall("door")
    (task,) = reflector.memory.get_all(kind="task")
    reflector.memory.delete(task.id)
    reflector.step("A garden.", "go out", 1, True)
    (only,) = kept(reflector)
    assert only.metadata["actions"] == ["go out"]


def test_a_model_may_say_why_but_never_instead_of_the_actions():
    reflector = agent(llm=Scripted([{"why": "Doors want keys."}]))
    play(reflector, "red", ("open door", 1))
    (only,) = kept(reflector)
    assert only.text.endswith("Doors want keys.") and "open door: earned +1" in only.text


def test_arguments_are_generalised():
    assert generalised(["take Oak key.", "go", "put oak key in big box", "push big box"]) == [
        "take A", "go", "put A in B", "push B",
    ]  # fmt: skip


def test_what_it_refuses():
    reflector = agent()
    with pytest.raises(UsageError, match="unknown task 'bleu'; nearest known: blue"):
        reflector.start("bleu", "A door.")
    with pytest.raises(UsageError, match="no episode is running"):
        reflector.step("A hall.", "open door", 1, False)
    reflector.start("red", "A door.")
    with pytest.raises(UsageError, match="still running"):
        reflector.start("red", "A door.")
    for reward in (math.nan, math.inf):
        with pytest.raises(UsageError, match=f"reward={reward} of 'open door' is not finite"):
            reflector.step("A hall.", "open door", reward, False)
    with pytest.raises(UsageError, match="needs the action"):
        reflector.step("A hall.", " ", 1, False)
    with pytest.raises(UsageError, match="cap=0 must be at least 1"):
        SweetSour(cap=0)
