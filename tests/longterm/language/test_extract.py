from datetime import UTC, datetime

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.language.extract import facts, triples
from holdfast.longterm.language.llm import Rules
from holdfast.longterm.language.slots import lemma
from holdfast.longterm.language.tokens import sentences
from holdfast.longterm.retrieval.embed import Hash

NOW = datetime(2023, 5, 8, 13, 56, tzinfo=UTC)


def said(text, speaker="Zoe"):
    return [
        f"{'not ' * f.negated}{f.subject} {f.relation} {f.object}"
        for f in facts(text, NOW, speaker)
    ]


@pytest.mark.parametrize(
    "text, want",
    [
        ("I moved to Boston last May.", ["Zoe lives_in Boston"]),
        ("I moved from Paris to Boston.", ["Zoe lives_in Boston"]),
        ("My sister Ann works at Acme.", ["Zoe sister Ann", "Ann works_at Acme"]),
        ("I don't like jazz any more.", ["not Zoe likes jazz"]),
        ("We adopted a cat named Miso!", ["Zoe has cat named Miso", "Zoe cat Miso"]),
        ("I like jazz, pizza and hiking.", [f"Zoe likes {x}" for x in ("jazz", "pizza", "hiking")]),
        ("I can't stand mushrooms", ["Zoe dislikes mushrooms"]),
        ("I prefer tea to coffee", ["Zoe prefers tea"]),
        ("I'm a nurse and I live in Rome.", ["Zoe works_as nurse", "Zoe lives_in Rome"]),
        ("I work as a nurse at Mercy", ["Zoe works_at Mercy", "Zoe works_as nurse"]),
        ("I got a new job at Mercy.", ["Zoe works_at Mercy"]),
        ("I left Acme and joined Initech.", ["not Zoe works_at Acme", "Zoe works_at Initech"]),
        ("I quit my job at Acme last week.", ["not Zoe works_at Acme"]),
        ("I no longer work at Acme", ["not Zoe works_at Acme"]),
        ("I stopped playing chess", ["not Zoe plays chess"]),
        ("My birthday is 5 May.", ["Zoe birthday 5 May"]),
        ("I was born on 3 May 1990", ["Zoe birthday 3 May 1990"]),
        ("I'm 32 years old", ["Zoe age 32"]),
        ("My name's Bob and I'm from Oslo.", ["Zoe name Bob", "Zoe from Oslo"]),
        ("My favorite color is blue.", ["Zoe favourite_colour blue"]),
        ("My dog's name is Rex.", ["Zoe dog Rex"]),
        ("I’m allergic to nuts", ["Zoe allergic_to nuts"]),
        ("I want to visit Japan next year", ["Zoe plans visit Japan"]),
        ("I'm getting married next month!", ["Zoe status married"]),
        ("I've been working at Google since 2019.", ["Zoe works_at Google"]),
        ("Went camping with Tim!", ["Zoe go camping with Tim"]),
        ("My sister is a nurse. She lives in Oslo.",
         ["Zoe's sister works_as nurse", "Zoe's sister lives_in Oslo"]),
        ("Ann's moving to Oslo next month.", ["Ann lives_in Oslo"]),
        ("Ann and Bob live in Rome", ["Ann lives_in Rome", "Bob lives_in Rome"]),
        ("Bob told me that Ann likes opera", ["Ann likes opera"]),
        ("Maria Silva has been the CEO of Acme since 2020", ["Maria Silva is_a CEO of Acme"]),
        ("Melanie painted a lake sunrise last year.", ["Melanie paint lake sunrise"]),
        ("Person_12 works at Org_7.", ["Person_12 works_at Org_7"]),
    ],
)  # fmt: skip
def test_statements(text, want):
    assert said(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "Do you like jazz?",
        "If I move to Rome, I will learn Italian.",
        "You should try it!",
        "It was great.",
        "I would live in Rome",
        "Thanks!",
        "I", "my", "I'm", "Ann's", "my sister", "???", "", "I like", " \n ",
    ],
)  # fmt: skip
def test_what_states_nothing_of_anybody(text):
    assert said(text) == []


@pytest.mark.parametrize(
    "text, lo, hi",
    [
        ("I moved to Boston in May 2021.", "2021-05-01", None),
        ("I went to Rome yesterday.", "2023-05-07", "2023-05-08"),
        ("I live in Rome.", "2023-05-08", None),
        ("I used to live in Paris.", None, "2023-05-08"),
        ("I lived in Paris from 2015 to 2019.", "2015-01-01", "2020-01-01"),
        ("I work at Acme until 2025.", "2023-05-08", "2026-01-01"),
        ("I left Acme in March 2021.", "2021-03-01", None),
        ("I'm planning a trip to Japan in July", "2023-07-01", "2023-08-01"),
    ],
)
def test_validity(text, lo, hi):
    (fact,) = facts(text, NOW, "Zoe")
    got = [m and m.strftime("%Y-%m-%d") for m in (fact.valid_from, fact.valid_to)]
    assert got == [lo, hi]


def test_retold_in_the_third_person():
    told = [f.text for f in facts("I don't like my job. I have a dog. We've moved.", NOW, "Zoe")]
    assert told[:2] == ["Zoe doesn't like Zoe's job", "Zoe has a dog"]


@pytest.mark.parametrize(
    "text", ["Café owner Zoë said hi. I moved to Zürich — finally! I like tea."]
)
def test_spans_are_bytes_of_the_source(text):
    found = facts(text, NOW, "Zoë")
    spans = [text.encode()[f.start : f.end].decode() for f in found]
    assert any("moved to Zürich" in s for s in spans)
    for fact, span in zip(found, spans, strict=True):
        assert all(word in span for word in fact.object.split())


def test_every_fact_of_a_long_conversation_is_grounded():
    if not locomo.path().exists():
        pytest.skip(f"no LoCoMo at {locomo.path()}")
    (conversation,) = locomo.load(locomo.path(), ["conv-26"])
    count = 0
    for turn in conversation.turns:
        for fact in facts(turn.text, turn.when, turn.speaker):
            span = turn.text.encode()[fact.start : fact.end].decode()
            said = fact.object.replace(f"{turn.speaker}'s", "").replace(turn.speaker, "")
            assert all(word in span for word in said.split()), (fact, span)
            assert fact.subject and fact.relation and fact.text
            count += 1
    assert count > 300


def test_the_speaker():
    assert said("Caroline: I live in Rome.", None) == ["Caroline lives_in Rome"]
    assert said("I live in Rome.", None) == ["I lives_in Rome"]
    assert facts("Ann lives in Rome") == facts("Ann lives in Rome", speaker="Zoe")
    head, *_ = triples("Ann lives in Rome. Bob doesn't live in Oslo.")
    assert (head.head, head.relation, head.tail) == ("Ann", "lives_in", "Rome")
    assert len(triples("Ann lives in Rome. Bob doesn't live in Oslo.")) == 1


def test_naive_time_is_refused():
    with pytest.raises(UsageError, match="no time zone"):
        facts("I live in Rome", datetime(2023, 5, 8))


def test_lemmas_and_sentences():
    forms = "went hoping hopping exploring adopted goes decided watches tries was"
    want = "go hope hop explore adopt go decide watch try be"
    assert [lemma(w) for w in forms.split()] == want.split()
    text = "Dr. Smith is in. E.g. now? Yes!\nOk"
    assert [text[a:b] for a, b in sentences(text)] == [
        "Dr. Smith is in.",
        "E.g. now?",
        "Yes!",
        "Ok",
    ]


PAIRS = [
    # older, newer, same, contradicts, update
    ("Ann lives in Boston", "Ann lives in Paris", False, True, "REPLACE"),
    ("Ann lives in Boston", "Ann moved to Paris", False, True, "REPLACE"),
    ("Ann lives in Boston", "Bob lives in Paris", False, False, "APPEND"),
    ("Ann lives in Boston", "Ann resides in Boston", True, False, "PASS"),
    ("Ann likes jazz", "Ann likes jazz.", True, False, "PASS"),
    ("Ann likes tea", "Ann is fond of tea", True, False, "PASS"),
    ("Ann likes jazz", "Ann likes rock", False, False, "APPEND"),
    ("Ann likes jazz", "Ann hates jazz", False, True, "REPLACE"),
    ("Ann likes jazz", "Ann doesn't like jazz any more", False, True, "REPLACE"),
    ("Ann works at Acme", "Ann left Acme", False, True, "DELETE"),
    ("Ann works at Acme", "Ann no longer works at Acme", False, True, "DELETE"),
    ("Ann has a cold", "Ann has recovered from the cold", False, False, "DELETE"),
    ("Ann has a dog", "Ann has a cat", False, False, "APPEND"),
    ("Ann has 2 dogs", "Ann has 3 dogs", False, True, "REPLACE"),
    ("Ann has two dogs", "Ann has 2 dogs", True, False, "PASS"),
    ("Ann is single", "Ann is married", False, True, "REPLACE"),
    ("Ann's favourite colour is red", "Ann's favorite color is blue", False, True, "REPLACE"),
    ("Ann plays chess", "Ann stopped playing chess", False, True, "DELETE"),
    ("The shop is open", "The shop is closed", False, True, "REPLACE"),
    ("I live in Rome", "I moved to Oslo", False, True, "REPLACE"),
]


@pytest.mark.parametrize("embedder", [None, Hash()])
@pytest.mark.parametrize("old, new, same, contradicts, update", PAIRS)
def test_comparing(old, new, same, contradicts, update, embedder):
    rules = Rules(embedder)
    assert rules.same(old, new) == rules.same(new, old) == same
    assert rules.contradicts(old, new) == rules.contradicts(new, old) == contradicts
    assert rules.update(old, new) == update
    a, b = rules.facts(old), rules.facts(new)
    if len(a) == len(b) == 1:
        assert rules.contradicts(a[0], b[0]) == contradicts


def test_facts_of_different_times_do_not_contradict():
    (old,) = facts("Ann lived in Rome from 2010 to 2012.")
    (new,) = facts("Ann lives in Oslo.", NOW)
    assert not Rules().contradicts(old, new)


@pytest.mark.parametrize(
    "a, b, relation",
    [
        ("Ann lives in Rome", "Ann moved to Oslo", "Changes"),
        ("Ann lost her old job", "Ann opened a studio because she lost her job", "Reason"),
        ("Ann trained for the marathon", "Ann couldn't run the marathon", "HinderedBy"),
        ("Ann adopted a puppy", "Ann is happy with the puppy Ann adopted", "React"),
        ("Ann visited Japan", "Ann hopes to see Japan again", "Want"),
        ("Ann runs marathons", "Ann ran a marathon in Rome", "SameTopic"),
        ("Ann runs marathons", "Bob bakes bread", None),
        ("Ann runs marathons", "Ann bakes bread", None),
    ],
)
def test_relate(a, b, relation):
    assert Rules().relate(a, b) == relation


def test_judge():
    rules = Rules()
    assert rules.judge("Where does Ann work?", "Ann works at Acme") == 1.0
    assert rules.judge("Where does Ann work?", "Bob likes tea") == 0.0
    assert rules.judge("Where does Ann work?", ["Bob likes tea", "Ann works at Acme"]).endswith(
        "Acme"
    )
    rare = Rules(background=["Ann said so", "Ann went", "the opera"])
    assert rare.judge("Ann opera", "opera") > rare.judge("Ann opera", "Ann")
    mixed = Rules(Hash()).judge("Where does Ann work?", "Ann works at Acme")
    assert 0.5 <= mixed <= 1.0
    with pytest.raises(UsageError, match="no options"):
        rules.judge("x", [])


def test_keywords():
    rules = Rules(background=["mountains and lakes", "mountains", "mountains too"])
    assert rules.keywords("Mountains, opera, opera and mountains", 1) == ["opera"]
    assert Rules().keywords(["hiking trips", "hiked again", "a trip"], 2) == ["hiking", "trips"]
    assert Rules().keywords("the of and", 3) == []


@pytest.mark.parametrize("budget", range(1, 40, 3))
def test_summary_is_made_of_sentences_within_the_budget(budget):
    texts = ["Ann has a dog. The dog is old. How are you?", "Ann moved to Oslo. The dog came too."]
    summary = Rules().summarise(texts, budget)
    assert len(summary.split()) <= budget
    whole = " ".join(texts)
    places = [whole.index(summary[a:b]) for a, b in sentences(summary)]
    assert places == sorted(places)
    assert Rules().summarise(texts, 10**6, len) == whole.replace("How are you? ", "")


def test_summary_needs_a_budget():
    with pytest.raises(UsageError, match="budget=0"):
        Rules().summarise(["a b"], 0)
