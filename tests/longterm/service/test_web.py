"""The page of `holdfast memory serve`: as served, and in a real browser where there is one."""

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
import uvicorn
from fastapi.testclient import TestClient

from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Link
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.service.http import PAGE, WEB, create_app

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def memory():
    times = (datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=i) for i in range(10_000))
    with Memory(":memory:", embedder=Hash(64), clock=lambda: next(times)) as made:
        made.id = made.add("Ann lives in Bern.", user_id="ann", metadata={"mood": EVIL})[0]
        made.update(made.id, "Ann lives in Basel.", user_id="ann")
        made.add(EVIL, user_id="ann")
        ids = made.add(
            [{"role": "user", "content": f"Message {i} of Ann."} for i in range(120)],
            session="s", user_id="ann",
        )  # fmt: skip
        made.transact(lambda _: [Link(a, "next", b) for a, b in pairwise(ids[:9])], user_id="ann")
        made.add("Eve sails.", user_id="eve", tenant_id=EVIL)
        yield made


def test_assets_are_served_without_a_token_and_ask_no_other_site(memory):
    client = TestClient(create_app(memory, token="secret"))
    for path, name in PAGE.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.text == (WEB / name).read_text()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        addresses = set(re.findall(r"https?://[^\"'\s)]+", answer.text))
        assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, nothing that is fetched
    html = client.get("/").text
    assert set(re.findall(r"(?:src|href)=\"([^\"]+)\"", html)) == {
        "memory.js", "memory.css", "icon.svg",
    }  # fmt: skip
    assert not re.search(r"\son\w+=|style=|<style|<script(?! src=)", html)
    assert client.get("/memory.css").headers["content-type"].startswith("text/css")
    assert "javascript" in client.get("/memory.js").headers["content-type"]


def test_the_script_never_makes_markup_or_code_of_data():
    script = (WEB / "memory.js").read_text()
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(|srcdoc|DOMParser"
    )
    assert not re.search(banned, script)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript():
    subprocess.run(["node", "--check", WEB / "memory.js"], check=True)


def chromium():
    """The path of a Chromium, or None to use Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    given = os.environ.get("HOLDFAST_CHROMIUM")
    return given or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright; `make test-browser` installs it"
    )
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(
                executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
            )
        except sync_api.Error as error:
            pytest.skip(f"no Chromium, `make test-browser` installs it: {error.message[:200]}")
        yield opened
        opened.close()


def shows(page, selector, count):
    """Wait until there are so many; the page's own rules forbid to run code for it."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=10_000)


@contextmanager
def serving(memory, **options):
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    server = uvicorn.Server(
        uvicorn.Config(create_app(memory, **options), log_level="error", access_log=False)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="module")
def url(memory):
    with serving(memory) as address:
        yield address


@pytest.fixture
def page(browser, url):
    """The page, opened; afterwards: no error, nothing run, nobody else was asked."""
    opened = browser.new_page()
    opened.set_default_timeout(10_000)
    asked, errors = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: said.type == "error" and errors.append(said.text))
    opened.goto(url)
    yield opened
    assert opened.title() == "Holdfast memory" and errors == []
    assert all(address.startswith(url) for address in asked)
    opened.close()


def test_memories_are_listed_page_by_page_as_text(page):
    rows = page.locator("#memories .list li")
    shows(page, "#memories .list li", 100)
    assert "Message 119 of Ann." in rows.first.inner_text()
    page.click("#memories .more")
    shows(page, "#memories .list li", 122)
    assert page.locator("#memories .more").is_hidden()
    assert EVIL in rows.nth(120).inner_text() and page.locator("img").count() == 0
    assert page.locator("#counts").inner_text() == "123 memories, 8 edges, Hybrid"


def test_a_search_shows_why_and_a_memory_its_history(page):
    page.click("nav [data-tab=search]")
    page.fill("#query", "Where does Ann live?")
    page.click("#ask button")
    first = page.locator("#search .list li").first
    assert "Ann lives in Basel." in first.inner_text()
    names = first.locator(".terms span").all_inner_texts()
    assert "score" in names and "bm25" in names
    widths = [bar.bounding_box()["width"] for bar in first.locator(".bar").all()]
    assert len(widths) >= 2 and widths == sorted(widths, reverse=True) and widths[0] > 50
    first.locator("button").click()
    detail = page.locator("#detail")
    detail.wait_for()
    assert EVIL.replace('"', '\\"') in detail.locator("dl").inner_text()
    events = detail.locator("ol li").all_inner_texts()
    assert ["add by user" in events[0], "revise by user" in events[1]] == [True, True]
    assert "Bern" in events[0] and "Basel" in events[1]
    detail.locator("button").click()
    assert detail.is_hidden()


def test_the_timeline_goes_back_in_time(page):
    page.click("nav [data-tab=timeline]")
    shows(page, "#timeline .held", 100)
    page.click("#timeline .more")
    shows(page, "#timeline .held", 122)
    assert page.locator("#timeline .known").count() == 122
    page.fill("#recorded", "2024-01-01T12:00:00")
    page.click("#when button")
    shows(page, "#timeline .held", 1)
    assert "Ann lives in Bern." in page.locator("#timeline svg").text_content()


def test_the_graph_shows_edges_and_opens_memories(page):
    page.click("nav [data-tab=graph]")
    shows(page, "#graph .edge", 8)
    assert page.locator("#graph .node").count() == 9
    assert "8 of 8 edges" in page.locator("#graph .note").inner_text()
    places = [c.bounding_box() for c in page.locator("#graph .node").all()]
    assert len({(round(p["x"] / 10), round(p["y"] / 10)) for p in places}) == 9
    page.locator("#graph g[role=button]").first.press("Enter")
    page.locator("#detail").wait_for()
    assert "Message 0 of Ann." in page.locator("#detail").inner_text()


def test_another_space_is_chosen_by_name(page):
    shows(page, "#space option", 2)
    page.select_option("#space", index=1)
    shows(page, "#memories .list li", 1)
    assert "Eve sails." in page.locator("#memories .list").inner_text()


def test_a_token_is_asked_for(browser, memory):
    with serving(memory, token="secret") as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#message:not([hidden])")
        assert "a token is needed" in page.locator("#message").inner_text()
        page.fill("#token", "secret")
        page.click("#whose button")
        shows(page, "#memories .list li", 100)
        assert page.locator("#message").is_hidden()
        page.close()
