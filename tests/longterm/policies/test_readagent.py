import random
import re

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.budget import words
from holdfast.longterm.language.llm import FallbackWarning, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.readagent import ReadAgent
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

SUBJECTS = {
    "boats": "sail mast keel wind harbour rope anchor deck tide oar",
    "tea": "leaf pot cup kettle brew steam sugar lemon milk spoon",
    "chess": "king rook pawn bishop queen knight castle check mate board",
}


def make(llm=None):
    return Memory(":memory:", embedder=Hash(128), policy=Policy(), clock=Clock(), llm=llm)


def book(paragraphs=60, seed=0):
    pick, out = random.Random(seed), []
    for number in range(paragraphs):
        subject = list(SUBJECTS)[number * len(SUBJECTS) // paragraphs]
        told = [" ".join(pick.choices(SUBJECTS[subject].split(), k=9)) + "." for _ in range(3)]
        told.insert(1, f"Fact {number} says that code{number} opens the {subject} room.")
        out.append(" ".join(told) + pick.choice(["\n\n", "\n \n", "\n\n\n  "]))
    return "".join(out)


@pytest.fixture
def read():
    with make() as memory:
        reader = ReadAgent(memory, low=60, high=150)
        yield reader, reader.read(book(), "a book")


@pytest.mark.parametrize(
    "text", [book(), "one", "\n\n a \n\n", "word " * 400 + "\n\nlast", "é\r\n"]
)
def test_joined_pages_are_the_text(text):
    with make() as memory:
        reader = ReadAgent(memory, low=60, high=150)
        pages = reader.pages(text)
        assert "".join(pages) == text
        for page in pages:
            assert len(page.split()) <= 150 or not re.search(r"\n\s*\n\s*\S", page)
        if text == book():
            assert all(len(page.split()) >= 60 for page in pages[:-1])


def test_a_page_ends_where_the_subject_changes():
    with make() as memory:
        pages = ReadAgent(memory, low=100, high=900).pages(book())
    assert pages[0].count("boats room") == 20 and "tea room" not in pages[0]


def test_gists_are_short_and_made_before_any_question(read):
    _, document = read
    pages, (gists, *above) = document.pages(), document.gists()
    assert "".join(page.text for page in pages) == book()
    for page, gist in zip(pages, gists, strict=True):
        assert len(gist.text.split()) <= 0.2 * len(page.text.split())
        places = [page.text.find(sentence) for sentence in re.findall(r"[^.]+\.", gist.text)]
        assert -1 not in places and places == sorted(places)
    assert [len(level) for level in above][-1] == 1
    ranges = [(gist.data["first"], gist.data["last"]) for gist in above[0]]
    assert ranges[0] == (0, 7) and [a for a, _ in ranges[1:]] == [b + 1 for _, b in ranges[:-1]]


@pytest.mark.parametrize("mode", ["P", "S"])
@pytest.mark.parametrize("budget", [300, 900, 2000])
def test_pages_are_opened_in_their_place(read, mode, budget):
    _, document = read
    context = document.context("What does code33 open?", budget, mode)
    assert words(context.text) == context.used <= budget
    numbers = [int(n) for n in re.findall(r"<Pages? (\d+)", context.text)]
    assert numbers == sorted(numbers) and numbers[0] == 0
    if budget > 300:
        assert "Fact 33 says that code33 opens the tea room." in context.text
    whole = len(book().split())
    saved = 100 * (1 - len(context.text.split()) / whole)
    assert document.compression(context) == pytest.approx(saved)
    assert document.context("What does code33 open?", budget, mode, pages=0).used < context.used


def test_a_text_is_read_once_and_purged_whole(read):
    reader, document = read
    memory = reader.memory
    count = memory.stats()["memories"]
    assert reader.read(book()).id == document.id and memory.stats()["memories"] == count
    reader.read("Another text.")
    memory.purge(document.id)
    assert memory.stats()["memories"] == 3  # the other document, its page and its gist


def test_a_model_breaks_shortens_and_looks_up():
    def answer(messages, schema):
        asked = messages[0]["content"]
        if "break the text" in asked:
            return {"number": 0}
        if "Summarise" in asked:
            return {"summary": "A short gist."}
        seen.append(messages[1]["content"])
        return {"pages": [2, 99, 0, 2] if len(seen) == 1 else []}

    seen = []
    with make(Scripted(answer)) as memory:
        document = ReadAgent(memory, low=60, high=150).read(book())
        with pytest.warns(FallbackWarning, match=r"no pages \[99\], only 0 to"):
            context = document.context("Which?", 5000)
        opened = [p for p in document.pages() if p.text.strip() in context.text]
        assert [page.data["number"] for page in opened] == [0, 2]
        assert context.text.count("A short gist.") == len(document.pages()) - 2
        assert "Which?" in seen[0]
        document.context("Which?", 5000, "S")
        assert len(seen) == 2, "a model may stop"


def test_what_it_refuses(read):
    reader, document = read
    for options, message in (
        ({"low": 9, "high": 3}, "low=9 and high=3"),
        ({"share": 0.5}, r"share=0\.5 is outside"),
    ):
        with pytest.raises(UsageError, match=message):
            ReadAgent(reader.memory, **options)
    with pytest.raises(UsageError, match="no text"):
        reader.read(" \n")
    with pytest.raises(UsageError, match="unknown mode of looking up 'X'"):
        document.context("Why?", 500, "X")
    with pytest.raises(UsageError, match="question='' is empty"):
        document.context("", 500)
    with pytest.raises(UsageError, match=r"shortest gists.*which take [0-9]+; raise it") as refused:
        document.context("Why?", 3)
    needed = int(re.search(r"take (\d+)", str(refused.value))[1])
    assert document.context("Why?", needed).used <= needed
