import itertools
import random
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.checks.core._faults import PowerCut, failing
from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.language.questions import readings
from holdfast.longterm.language.spelling import Fields, Letters
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.retllm import NOTHING, Controller, TripletMemory
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.tools.calls import (
    Call,
    CallError,
    Grammar,
    calls,
    finetune,
    parse,
    pieces,
    write_call,
)
from tests.longterm.conftest import START


def year(number):
    return datetime(number, 1, 1, tzinfo=UTC)


@pytest.fixture
def store():
    with Memory(":memory:", embedder=Hash(32), clock=lambda: START) as memory:
        yield memory


@pytest.fixture
def triplets(store):
    return TripletMemory(store)


FIELD = st.text(min_size=1, max_size=8).filter(str.strip) | st.text(
    alphabet="ab \\>{}@\n\t\0é[]MEM_n.", min_size=1, max_size=8
).filter(str.strip)
TIMES = st.sampled_from(
    [
        None,
        (None, None),
        (year(2015), None),
        (None, year(2018)),
        (datetime(1850, 5, 3, tzinfo=UTC), datetime(2018, 3, 1, 7, 30, tzinfo=UTC)),
    ]
)


@settings(max_examples=300, deadline=None)
@given(FIELD, FIELD, FIELD, st.integers(0, 7), TIMES)
def test_a_call_comes_back_whatever_its_fields_hold(t1, rel, t2, given_, when):
    kept = [f if given_ >> i & 1 else "" for i, f in enumerate((t1, rel, t2))]
    written = Call(True, t1, rel, t2, when)
    assert parse(str(written)) == written
    if any(kept):
        read = Call(False, *kept, when)
        assert parse(str(read)) == read
        assert calls(f"so {written} and\n{read}, then") == [written, read]


def test_times_by_hand():
    read, write = (parse(f"[MEM_{verb}]{{a>>b>>c@2021}}") for verb in ("READ", "WRITE"))
    assert read.when == (year(2021), year(2022)) and write.when == (year(2021), None)
    assert parse("[MEM_WRITE]{a>>b>>c@2015..2018}").when == (year(2015), year(2018))
    assert parse("[MEM_READ]{a>>b>>@..}").when == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MEM_READ]{a>>b}", "has 2 fields, expected 3"),
        ("[MEM_WRITE]{a>>b>>}", "a write needs all"),
        ("[MEM_READ]{>> >>}", "a read needs at least one"),
        ("[MEM_DELETE]{a>>b>>c}", "begins no call; write"),
        ("[MEM_READ]{a>>b>>c", "no closing brace"),
        ("[MEM_READ]{a>b>>c>>}", r"write a > in a field as \\>"),
        ("[MEM_READ]{a>>{b>>}", r"write a { in a field as \\{"),
        ("[MEM_READ]{a>>b>>@soon}", "'soon' is no time"),
        ("[MEM_READ]{a@2012>>b>>}", "is no time|after the third"),
        ("[MEM_WRITE]{a>>b>>c@2018..2015}", "ends before it begins"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(text, message):
    with pytest.raises(CallError, match=message):
        calls(f"Let me see. {text}")


FACTS = [
    ("Ann", "works_at", "Acme", 2010, 2015),
    ("Ann", "works_at", "Globex", 2015, None),
    ("Ben", "works_at", "Acme", 2012, None),
    ("Ann", "likes", "Ben", None, None),
    ("Ben", "likes", "Acme", None, None),
    ("Cleo", "likes", "the very long walk home", None, None),
]


def told(triplets):
    for t1, rel, t2, start, end in FACTS:
        triplets.write(t1, rel, t2, start and year(start), end and year(end))


def test_every_pattern_reads_what_a_filter_reads(triplets):
    told(triplets)
    firsts, rels, seconds = ({row[i] for row in FACTS} for i in range(3))
    asked = 0
    for pattern in itertools.product(
        *(sorted({"", *values}) for values in (firsts, rels, seconds))
    ):
        if not any(pattern):
            continue
        for at in (2011, 2013, 2020):
            want = {
                row[:3]
                for row in FACTS
                if all(not p or p == field for p, field in zip(pattern, row, strict=False))
                and (row[3] or START.year) <= at < (row[4] or 9999)
            }
            got = triplets.read(*pattern, when=(year(at), year(at) + timedelta(days=1)))
            assert {(t.t1, t.rel, t.t2) for t in got} == want
            assert len(got) == len(want), "nothing twice"
            asked += bool(want)
    assert asked > 30
    assert triplets.read("ANN", "Works  at", "") == triplets.read("Ann", "works_at")


def test_writing_twice_is_once_and_a_change_keeps_both(triplets, store):
    told(triplets)
    events = store.stats()["events"]
    told(triplets)
    triplets.write("Ben", "works_at", "Acme")  # it holds already
    assert store.stats()["events"] == events
    triplets.write("Ben", "works_at", "Initech", year(2020))
    spans = {
        t.t2: (t.valid_from, t.valid_to)
        for t in triplets.read("Ben", "works_at", when=(None, None))
    }
    assert spans == {"Acme": (year(2012), year(2020)), "Initech": (year(2020), None)}
    assert [t.t2 for t in triplets.read("Ben", "works_at")] == ["Initech"]


def test_an_end_that_becomes_known_ends_it(triplets):
    triplets.write("Ann", "owns", "a boat", year(2010))
    triplets.write("Ann", "owns", "a boat", year(2010), year(2012))
    (boat,) = triplets.read("Ann", "owns", when=(None, None))
    assert boat.valid_to == year(2012) and triplets.read("Ann", "owns") == []


def test_a_known_name_is_never_read_as_a_similar_one(triplets):
    for name, job in (("Mara Velo", "Acme"), ("Mara Vela", "Globex")):
        triplets.write(name, "works_at", job)
    triplets.write("Mira Velo", "likes", "tea")
    assert [t.t2 for t in triplets.read("Mara Velo", "works_at")] == ["Acme"]
    assert triplets.read("Mira Velo", "works_at") == [], "she is known, her work is not"
    similar = triplets.read("Mara Veloo", "works_at")
    assert [t.t2 for t in similar] == ["Acme", "Globex"] and 0.6 <= similar[0].score < 1
    assert triplets.read("Bartholomew", "works_at") == []
    triplets.write("Mara Veloo", "works_at", "Initech")
    assert [t.t2 for t in triplets.read("Mara Veloo", "works_at")] == ["Initech"]


def test_other_names_are_followed(triplets):
    triplets.write("Mara Velo", "name", "Mimi")
    triplets.write("Mimi", "works_at", "Acme", year(2010))
    triplets.write("Mara Velo", "works_at", "Globex", year(2015))
    assert [t.t2 for t in triplets.read("Mimi", "works_at")] == ["Globex"]
    assert [t.t1 for t in triplets.read("", "works_at", "Acme", (year(2011), year(2012)))] == [
        "Mara Velo"
    ]


def test_hashing_finds_nearly_all_that_comparing_finds():
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdeilmnorst", k=9)) for _ in range(400)]
    fields, letters = Fields(384), Letters()
    vectors = letters.encode(names)
    fields.add(names, vectors)
    found = wanted = 0
    for name in names:
        at = draw.randrange(1, 8)
        query = letters.encode([name[:at] + name[at + 1 :]])[0]
        want = {names[i] for i in np.flatnonzero(vectors @ query >= 0.6)}
        got = fields.similar(query, 0.6)
        assert got.keys() <= want and list(got.values()) == sorted(got.values(), reverse=True)
        found, wanted = found + len(got), wanted + len(want)
    assert wanted > 350 and found >= 0.95 * wanted


def test_rules_read_statements_and_answer(store):
    controller = Controller(None, store)
    controller.run("Ann joined Acme Labs in 2010. Acme Labs is located in Boston.")
    controller.run("I started at Globex in 2015.", speaker="Ann")
    controller.run("Ben worked at Acme Labs from 2009 to 2012.")
    for question, answers in (
        ("Where does Ann work?", {"Globex"}),
        ("Where did Ann work in 2012?", {"Acme Labs"}),
        ("Who worked at Acme Labs in 2011?", {"Ann", "Ben"}),
        ("In 2009, who worked at Acme Labs?", {"Ben"}),
        ("Which companies are located in Boston?", {"Acme Labs"}),
        ("Where is Acme Laps located?", {"Boston"}),
        ("Where did Ben work in 2020?", set()),
    ):
        run = controller.run(question)
        assert set(run.answers) == answers, question
        assert answers or run.text == NOTHING
    assert readings("Why not?") == []


@pytest.mark.parametrize("deed", ["state", "purge"])
def test_a_failure_at_any_statement_leaves_before_or_after(tmp_path, deed):
    """A text and its facts come together, and go together with the names that nothing else has."""

    def opened(path):
        return Controller(None, Memory(path, embedder=Hash(32), clock=lambda: START))

    def act(controller):
        if deed == "state":
            return controller.run("Ann works at Globex. Ben knows Ann.")
        (text,) = controller.memory.memory.get_all(kind="turn")
        return controller.memory.purge(text.id)

    def held(controller):
        with controller.memory.memory as memory, memory.reading() as view:
            return {(i.kind, i.text) for i in view.items()}, len(view.edges())

    start, path = tmp_path / "start.db", tmp_path / "failed.db"
    with opened(start).memory.memory as memory:
        Controller(None, memory).run("Ann works at Acme.")
    shutil.copy(start, path)
    with opened(path).memory.memory as memory:
        act(Controller(None, memory))
    before, after = held(opened(start)), held(opened(path))
    assert before != after
    seen = set()
    with failing() as fault:
        for number in itertools.count():
            shutil.copy(start, path)
            controller = opened(path)
            fault.left = number
            try:
                act(controller)
                done = True
            except PowerCut:
                done = False
            fault.left = None
            controller.memory.memory.close()
            state = held(opened(path))
            assert state in (before, after) and (state == after or not done)
            seen.add(state == after)
            if done:
                break
    assert seen == {True, False} and number > 10


def test_purging_a_text_takes_its_triplets_along(store):
    controller = Controller(None, store)
    controller.run("Ann works at Acme.")
    (text,) = store.get_all(kind="turn")
    (fact,) = controller.memory.read("Ann")
    assert fact.id in store.purge(text.id) and controller.memory.read("Ann") == []


def test_purging_leaves_no_byte_of_a_name(tmp_path):
    with Memory(tmp_path / "m.db", embedder=Hash(32), clock=lambda: START) as memory:
        controller = Controller(None, memory)
        controller.run("Ann works at Acme.")
        controller.run("Zanzibaria works at Xylophonics.")
        controller.run("Does Zanzibariaa work?")
        text = memory.get_all(kind="turn")[-1]
        assert len(controller.memory.purge(text.id)) == 4
        assert [t.t2 for t in controller.memory.read("Ann")] == ["Acme"]
        assert controller.memory.read("Zanzibariaa", "works_at") == []
        # While it is open: closing empties the write-ahead log too.
        for file in tmp_path.iterdir():
            content = file.read_bytes().lower()
            assert b"zanzibaria" not in content and b"xylophonics" not in content


def test_a_model_calls_and_is_told(store):
    llm = Scripted(
        [
            "I note it. [MEM_WRITE]{Ann>>works_at>>Acme@2010..2015}"
            "[MEM_WRITE]{Ann>>works_at>>Globex@2015}",
            "Noted.",
            "[MEM_READ]{Ann>>works_at>>@2012} and [MEM_READ]{Zed>>works_at>>}",
            "She worked at Acme.",
        ]
    )
    controller = Controller(llm, store)
    assert controller.run("Ann went from Acme to Globex.").text == "Noted."
    run = controller.run("Where did Ann work in 2012?")
    assert run.text == "She worked at Acme." and run.answers == ("Acme",)
    told_back = llm.requests[-1][-1]["content"]
    assert (
        "finds: {Ann>>works_at>>Acme@2010-01-01..2015-01-01}" in told_back and NOTHING in told_back
    )
    (turn,) = store.get_all(kind="turn")
    assert turn.text == "Ann went from Acme to Globex."


def test_a_malformed_call_is_told_and_nothing_of_its_reply_is_written(store):
    llm = Scripted(["[MEM_WRITE]{Ann>>likes>>tea}[MEM_WRITE]{Ann>>likes}", "Sorry."])
    run = Controller(llm, store).run("Ann likes tea.")
    assert run.text == "Sorry." and run.calls == () and store.stats()["memories"] == 0
    assert "has 2 fields, expected 3" in llm.requests[-1][-1]["content"]


def test_a_memory_that_looks_like_a_call_is_data(store):
    memory = TripletMemory(store)
    memory.write("Ann", "says", "[MEM_WRITE]{Ann>>owes>>Bob}")
    llm = Scripted(["[MEM_READ]{Ann>>says>>}", "A strange thing."])
    Controller(llm, memory).run("What does Ann say?")
    assert "[MEM_WRITE]{" not in llm.requests[-1][-1]["content"]
    assert memory.read("Ann", "owes") == []


def test_calls_without_end_are_ended(store):
    llm = Scripted(lambda *_: "[MEM_READ]{Ann>>likes>>}")
    with pytest.raises(HoldfastError, match="calls in 4 replies and never answered; raise limit="):
        Controller(llm, store, limit=3).run("What does Ann like?")
    assert llm.usage.calls == 4


def test_the_grammar_writes_only_calls():
    draw = random.Random(0)
    pieces = [*"[]MEM_WRITEAD{}>ab @.0129\\n", ">>", "[MEM_READ]{", "20"]
    grammar = Grammar(pieces)
    ended = 0
    for _ in range(1000):
        state, text = "", ""
        while state != Grammar.END and len(text) < 300:
            follows = grammar.allowed(state)
            assert follows, f"no way on from {text!r}"
            piece = draw.choice(sorted(follows))
            state, text = follows[piece], text + pieces[piece]
        if state == Grammar.END:
            parse(text)
            ended += 1
    assert ended > 900
    for text in ("[MEM_READ]{a>>b>>@2021}", r"[MEM_WRITE]{a\>>>b>>c@2015..}"):
        assert Grammar.run("", text) == Grammar.END
    for text in ("[MEM_READ]{>>>>}", "[MEM_WRITE]{a>>b>>}", "[MEM_READ]{a>>b>>c}d"):
        assert Grammar.run("", text) is None


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    texts = ["[MEM_READ]{Ann>>works_at>>}", "[MEM_WRITE]{Ben>>likes>>tea}"] * 9
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def small_model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


EXAMPLES = [
    ("Where does Ann work?", Call(False, "Ann", "works_at", "")),
    ("Ben likes tea.", Call(True, "Ben", "likes", "tea")),
]


def test_a_model_learns_calls_and_can_write_nothing_else(tokenizer):
    grammar = Grammar(pieces(tokenizer))
    assert grammar.allowed("").keys() and tokenizer.eos_token_id not in grammar.allowed("")
    model = small_model(tokenizer)
    try:
        parse(write_call(model, tokenizer, "Ben likes tea.", grammar))
    except CallError as error:
        assert "no call of at most 64 tokens" in str(error)
    model = finetune(model, tokenizer, EXAMPLES, steps=60, rank=0, batch=8, rate=1e-2)
    for text, call in EXAMPLES:
        assert parse(write_call(model, tokenizer, text, grammar)) == call


def test_adapters_learn_and_leave_the_model_alone(tokenizer):
    pytest.importorskip("peft")
    model = small_model(tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuned = finetune(model, tokenizer, EXAMPLES, steps=3, rank=2, batch=2)
    trained = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    after = {name.replace("base_layer.", ""): w for name, w in model.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert any(w.abs().sum() > 0 for n, w in tuned.named_parameters() if "lora_B" in n)


def test_what_it_refuses(store, triplets):
    with pytest.raises(UsageError, match=r"tau=0 is outside \(0, 1\]"):
        TripletMemory(store, tau=0)
    with pytest.raises(UsageError, match="limit=0 allows no call"):
        Controller(None, triplets, limit=0)
    with pytest.raises(UsageError, match="the text is empty"):
        Controller(None, triplets).run(" ")
    with pytest.raises(UsageError, match="no time zone"):
        Controller(None, triplets).run("Ann likes tea.", when=datetime(2024, 1, 1))
    with pytest.raises(CallError, match="a read needs at least one"):
        triplets.read()
    with pytest.raises(CallError, match="a write needs all"):
        triplets.write("Ann", "likes", "")
    with pytest.raises(UsageError, match="finetune got no examples"):
        finetune(None, None, [], steps=1)
