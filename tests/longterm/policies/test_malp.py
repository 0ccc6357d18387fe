import json

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.longterm.budget import nbytes
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.personal import OWNER, MaLPTrainer
from holdfast.longterm.policies.malp import ARCHIVE, LONG, NOTE, SHORT, WORKING, MaLP, distance
from holdfast.longterm.retrieval.embed import Hash
from holdfast.training import adapters
from tests.longterm.conftest import Clock


def made(llm=None, space=None, **options):
    return Memory(
        ":memory:", embedder=Hash(64), policy=MaLP(**options), clock=Clock(), llm=llm, space=space
    )


def tiers(memory):
    return {n.text: n.data["shelf"] for n in memory.get_all(kind=NOTE, limit=1000)}


def test_a_note_is_in_one_tier_and_rises_with_its_third_use():
    with made() as memory:
        memory.add([{"speaker": "Ann", "content": "I love jazz."}], session="s")
        (note,) = memory.get_all(kind=NOTE)
        assert (note.data["shelf"], note.data["sort"]) == (WORKING, "user")
        for _ in range(4):  # uses in the dialogue count, but do not make it rise
            memory.search("jazz", limit=1)
        assert tiers(memory) == {"Ann loves jazz": WORKING}
        memory.summarise("s")
        assert tiers(memory)["Ann loves jazz"] == SHORT
        memory.search("jazz", limit=1)
        assert tiers(memory)["Ann loves jazz"] == LONG
        after = memory.get(note.id)
        assert (after.text, after.valid_from, after.version) == (
            note.text, note.valid_from, note.version,
        )  # fmt: skip
        assert [e.op for e in memory.history(note.id)] == ["add"] + ["touch"] * 6
        with memory.reading() as view:
            assert view.sources([note.id])[note.id]


def test_what_is_least_recently_used_goes_to_the_archive():
    with made(capacity=3, summary=1) as memory:  # no sentence has one word: no summaries
        for i, word in enumerate(("jazz", "chess", "tea", "soup", "maps")):
            memory.add([{"speaker": "Ann", "content": f"I love {word}."}], session=str(i))
            memory.summarise(str(i))
            memory.search("jazz", limit=1)
        held = tiers(memory)
        assert held.pop("Ann loves jazz") == LONG
        assert held == {
            "Ann loves chess": ARCHIVE, "Ann loves tea": SHORT, "Ann loves soup": SHORT,
            "Ann loves maps": SHORT,
        }  # fmt: skip
        assert not any("chess" in hit.text for hit in memory.search("chess"))
        assert memory.search("jazz", limit=1)[0].text == "Ann loves jazz"


def test_what_a_call_reads_does_not_grow_with_the_archive(fetched):
    counts = []
    with made(capacity=20, summary=1) as memory:
        for first, end in ((0, 200), (200, 2000)):
            for at in range(first, end, 100):
                lines = [f"I like item{number}." for number in range(at, at + 100)]
                memory.add([{"speaker": "Ann", "content": line} for line in lines], session=str(at))
                memory.summarise(str(at))
                for _ in range(3 * (at == 0)):
                    memory.search("item99", limit=1)
            assert memory.search("item99", limit=1)[0].text == "Ann likes item99"

            def add(number=end):
                memory.add(
                    {"speaker": "Ann", "content": f"I saw item{number}."}, session=f"x{number}"
                )

            counts.append(
                (
                    fetched.of(lambda: memory.search("who likes item99?", limit=5)),
                    fetched.of(add),
                    fetched.of(lambda number=end: memory.summarise(f"x{number}")),
                )
            )
        held = [note.data["shelf"] for note in memory.get_all(kind=NOTE, limit=5000)]
    assert {tier: held.count(tier) for tier in (SHORT, LONG, ARCHIVE)} == {
        SHORT: 20, LONG: 1, ARCHIVE: len(held) - 21,
    }  # fmt: skip
    assert len(held) > 2000 and counts[0] == counts[1] and max(counts[0]) < 150, counts


def test_words_are_found_in_spite_of_slips():
    assert distance(["jazz"], ["love", "jazz"]) == 0
    assert distance(["jaz", "tea"], ["jazz", "tea"]) == pytest.approx(0.25 / 2)
    assert distance([], ["jazz"]) == distance(["jazz"], []) == 1
    with made() as memory:
        memory.add(["Ann: I love jazz.", "Ben: I drive a Volvo."])
        assert memory.search("who likes jaz")[0].text == "Ann loves jazz"


def test_a_dialogue_is_summed_up_and_a_correction_noted_anew():
    with made() as memory:
        memory.add(
            [{"speaker": "Ann", "content": "I love jazz."}, {"speaker": "Ben", "content": "Oh!"}],
            session="s",
        )
        memory.summarise("s")
        (summary,) = (n for n in memory.get_all(kind=NOTE) if n.data["sort"] == "summary")
        assert "jazz" in summary.text
        length = memory.stats()["events"]
        memory.summarise("s")
        assert memory.stats()["events"] == length
        turn = memory.get_all(kind="turn")[0]
        memory.update(turn.id, "I love chess.")
        assert "Ann loves chess" in tiers(memory) and "Ann loves jazz" not in tiers(memory)
        memory.delete(turn.id)
        assert "Ann loves chess" not in tiers(memory)


def test_a_model_is_asked_once_for_all_turns():
    notes = [
        {"turn": 0, "note": "Ann loves jazz.", "sort": "user"},
        {"turn": 0, "note": "Jazz began in New Orleans.", "sort": "common"},
        {"turn": 5, "note": "Nothing", "sort": "common"},
    ]
    llm = Scripted([{"notes": notes}])
    with made(llm=llm) as memory:
        memory.add([{"speaker": "Ann", "content": "Jazz!"}, {"content": "Sure."}])
        sorts = {n.text: n.data["sort"] for n in memory.get_all(kind=NOTE)}
        assert sorts == {
            "Ann loves jazz.": "user", "Jazz began in New Orleans.": "common", "Sure.": "common",
        }  # fmt: skip
        assert llm.usage.calls == 1


class Tiny(nn.Module):
    """Embeds, mixes, predicts; what `MaLPTrainer` needs of a causal model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.out = nn.Embedding(16, 8), nn.Linear(8, 12), nn.Linear(12, 16)

    def forward(self, input_ids):
        logits = self.out(torch.tanh(self.mix(self.embed(input_ids))))
        return type("Output", (), {"logits": logits})


def encode(text):
    return [ord(char) % 16 for char in text]


TARGETS = ["mix", "out"]


def trainer(model, memory, user="ann", **options):
    options = {"budget": 10_000, "rank": 2, "targets": TARGETS, **options}
    return MaLPTrainer(model, memory, user, encode, **options)


def test_bytes_of_the_adapter_and_of_the_context_share_a_budget():
    with made(space="ann") as memory:
        memory.add(["Ann: I love jazz.", "Ann: I drive a Volvo."])
        one = trainer(Tiny(), memory, budget=500)
        assert one.nbytes() == 4 * (2 * (8 + 12) + 2 * (12 + 16))
        context = one.context("does Ann love jazz?")
        assert "jazz" in context.text and nbytes(context.text) <= context.budget == 500 - 384
        one.close()
        model = Tiny()
        with pytest.raises(UsageError, match="adapter takes 384 bytes of a budget of 300"):
            trainer(model, memory, budget=300)
        trainer(model, memory).close()  # nothing was left on the model


def test_merging_and_unmerging_restores_the_weights():
    model = Tiny()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with made() as memory:
        one = trainer(model, memory)
        first = one.fit([("ab", "cd"), ("b", "cde")], steps=1)
        assert one.fit([("ab", "cd"), ("b", "cde")], steps=80) < first / 2
        state = adapters.adapter_state_dict(model)
        deltas = {t: state[f"{t}.lora_B"] @ state[f"{t}.lora_A"] for t in TARGETS}
        ids = torch.arange(6)[None]
        adapted = model(ids).logits
        adapters.merge(model)
        torch.testing.assert_close(model(ids).logits, adapted, atol=1e-5, rtol=0)
        for name, tensor in model.state_dict().items():
            target = name.removesuffix(".weight")
            if target in deltas:
                assert (tensor - before[name]).abs().max() > 1e-3
                tensor = tensor - deltas[target]
            torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=0)


def test_an_adapter_is_its_users_alone(tmp_path):
    with made() as memory:
        model = Tiny()
        ann = trainer(model, memory)
        ann.fit([("ab", "cd")], steps=5)
        ann.save(tmp_path)
        want = {k: v.clone() for k, v in adapters.adapter_state_dict(model).items()}
        ann.close()
        ben = trainer(model, memory, "ben")
        with pytest.raises(UsageError, match=r"of space 'ann', this one is for 'ben'"):
            ben.load(tmp_path)
        assert all(
            (v == 0).all() for k, v in adapters.adapter_state_dict(model).items() if "B" in k
        )
        ben.close()
        again = trainer(model, memory)
        again.load(tmp_path)
        got = adapters.adapter_state_dict(model)
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        (tmp_path / OWNER).write_text(json.dumps([]))
        with pytest.raises(UsageError, match="does not say whose adapter it is"):
            again.load(tmp_path)


def test_what_it_refuses():
    for options, message in (
        ({"capacity": 0}, "capacity=0"), ({"uses": 0}, "uses=0"), ({"alike": 1.5}, r"alike=1\.5"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            MaLP(**options)
    with made() as memory:
        one = trainer(Tiny(), memory)
        with pytest.raises(UsageError, match="no dialogue to learn from"):
            one.fit([])
        with pytest.raises(UsageError, match="ends in '' has a side without tokens"):
            one.fit([("ab", "")])
