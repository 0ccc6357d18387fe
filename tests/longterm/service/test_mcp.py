"""The tools through the protocol's own client: in process, over stdio and over HTTP."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from holdfast.longterm.memory import Memory
from holdfast.longterm.retrieval.embed import Hash

mcp = pytest.importorskip("mcp", reason="pip install 'holdfast[memory]' brings mcp")

TOOLS = {"add", "search", "get", "history", "context", "forget"}


def value(result):
    assert not result.is_error, result.content
    found = result.structured_content
    return found["result"] if set(found) == {"result"} else found


async def use(client):
    """What an assistant does with a memory, whatever lies between."""
    assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
    (tea,) = value(await client.call_tool("add", {"text": "Ann likes tea."}))
    said = {"text": "I moved to Boston", "speaker": "Ann", "session": "s", "metadata": {"a": 1}}
    await client.call_tool("add", {**said, "when": "2024-05-08T13:56:00+00:00"})
    hits = value(await client.call_tool("search", {"query": "Who likes tea?"}))
    assert hits[0]["id"] == tea and hits[0]["text"] == "Ann likes tea."
    assert {"score", "metadata", "valid_from", "valid_to", "provenance"} <= set(hits[0])
    made = value(await client.call_tool("context", {"query": "Boston", "budget": 40}))
    assert "I moved to Boston" in made["text"] and made["used"] <= 40
    assert value(await client.call_tool("get", {"memory_id": tea}))["text"] == "Ann likes tea."
    await client.call_tool("forget", {"memory_id": tea, "why": "asked to"})
    events = value(await client.call_tool("history", {"memory_id": tea}))
    assert [(e["op"], e["why"]) for e in events] == [("add", ""), ("retire", "asked to")]
    for tool, arguments, message in (
        ("get", {"memory_id": tea}, "no memory"),
        ("forget", {"memory_id": "m0"}, "cannot retire m0"),
        ("search", {"query": "x", "limit": 0}, "limit=0"),
        ("search", {"query": "x", "limit": 101}, "more than 100"),
        ("search", {"query": "x", "valid": "2024-01-01"}, "no time with a zone"),
        ("context", {"query": "x", "budget": -1}, "budget=-1"),
        ("history", {"memory_id": "m0"}, "never was"),
        ("add", {"text": "x", "when": "soon"}, "when='soon'"),
    ):
        result = await client.call_tool(tool, arguments)
        assert result.is_error and message in result.content[0].text, (tool, result.content)


def test_in_process():
    from holdfast.longterm.service.mcp import server

    async def go(memory):
        async with mcp.Client(server(memory)) as client:
            await use(client)

    with Memory(":memory:", embedder=Hash(32), space="ann") as memory:
        asyncio.run(go(memory))
        assert memory.get_all(space="bob") == [] and memory.get_all(space="ann")


def command(path, *more):
    return [
        sys.executable, "-m", "holdfast", "memory", "mcp", str(path), "--embedder", "hash", *more,
    ]  # fmt: skip


def test_over_stdio(tmp_path):
    first, *rest = command(tmp_path / "m.db", "--user", "ann")

    async def go():
        async with mcp.Client(mcp.StdioServerParameters(command=first, args=rest)) as client:
            await use(client)

    asyncio.run(go())
    with Memory(tmp_path / "m.db") as memory:
        assert [item.text for item in memory.get_all(user_id="ann")] == ["I moved to Boston"]


@contextlib.contextmanager
def served(path, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command(path, "--http", "--port", str(port), *more)])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait(20)


def test_over_http_with_a_token(tmp_path):
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async def go(url, token):
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx2.AsyncClient(headers=headers) as http:
            async with mcp.Client(streamable_http_client(url, http_client=http)) as client:
                await use(client)

    with served(tmp_path / "m.db", "--token", "secret") as url:
        asyncio.run(go(url, "secret"))
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, b"{}"))
        assert refused.value.code == 401
