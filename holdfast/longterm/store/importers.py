"""Read what other memory libraries export: a file becomes changes, whole or not at all.

What a library says of a memory besides its text and times stays in `metadata`, under the library's
name; a memory's own metadata stays at the top, where `filters` looks. Vectors are left out: the
importing memory makes its own. Times without a zone are in UTC, as all three libraries keep them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from holdfast.errors import UsageError
from holdfast.longterm.records import Add, Change, Link, Revise
from holdfast.longterm.retrieval.kg import ENTITY, FACT, MENTIONS, OBJECT
from holdfast.longterm.store.foreign import FIRST, Record, load, one_owner, unlike

_SAID = ("user", "assistant")  # roles of a conversation; the others are the machinery's


def mem0(file: Path) -> list[Change]:
    """Memories as mem0's `get_all` returns them, a list or `{"results": [...]}`.

    `history`, a list of rows of `history(memory_id)` beside `results`, gives the earlier texts of a
    memory; what was deleted there stays away. Fields: `id, memory, hash, metadata, created_at,
    updated_at, user_id, agent_id, run_id`; of history `memory_id, old_memory, new_memory, event,
    created_at, updated_at`; of graph memory `relations: source, relationship, target`.

    Source: docs.mem0.ai/api-reference/memory/get-memory and .../memory/history-memory;
    mem0/memory/storage.py of mem0ai/mem0.
    """
    given = load(file)
    whole = Record(file, "the file", {"results": given} if isinstance(given, list) else given)
    if "results" not in whole.fields:
        raise unlike(file, "mem0's get_all", '"results"', given)
    records = list(whole.many("results", "memory"))
    one_owner(file, (record.fields.get("user_id") for record in records), "users")
    history: dict[str, list[Record]] = {}
    for row in whole.many("history", "history row"):
        history.setdefault(row.text("memory_id"), []).append(row)
    changes: list[Change] = []
    for record in records:
        now = record.text("memory")
        rows = [
            row
            for row in history.get(str(record.fields.get("id")), ())
            if row.fields.get("event") in ("ADD", "UPDATE") and row.fields.get("new_memory")
        ]
        rows.sort(key=lambda row: row.time("updated_at", "created_at") or FIRST)
        texts = [(row.text("new_memory"), row) for row in rows]
        first = texts[0][0] if texts else now
        made = Add(
            first,
            metadata=record.kept("mem0", "memory"),
            valid_from=record.time("created_at"),
            key=f"mem0\x1f{record.fields.get('id')}",
        )
        changes.append(made)
        for text, row in texts[1:]:
            time = row.time("updated_at", "created_at")
            changes.append(Revise(made, text=text, why=f"mem0 updated it at {time}"))
        if texts and texts[-1][0] != now:
            time = record.time("updated_at")
            changes.append(Revise(made, text=now, why=f"mem0 updated it at {time}"))
    for relation in whole.many("relations", "relation"):
        end = "target" if "target" in relation.fields else "destination"
        parts = [relation.text(name) for name in ("source", "relationship", end)]
        changes.append(
            Add(
                " ".join(parts).replace("_", " "),
                metadata=relation.kept("mem0"),
                key="\x1f".join(("mem0", *parts)),
            )
        )
    return changes


def zep(file: Path) -> list[Change]:
    """A graph of Zep or Graphiti: `{"episodes": [...], "nodes": [...], "edges": [...]}`.

    These are what `graph.episode`, `graph.node` and `graph.edge` list, or a dump of Graphiti's
    EpisodicNode, EntityNode and EntityEdge. Fields: of episodes `uuid, content, valid_at,
    created_at, role, thread_id`; of nodes `uuid, name, summary`; of edges `uuid, name, fact,
    source_node_uuid, target_node_uuid, episodes, valid_at, invalid_at, expired_at, created_at`.
    A fact holds from `valid_at` to `invalid_at` (or `expired_at`, where only that is known). The
    graph is as the policy `zep` keeps it.

    Source: help.getzep.com/v3/reading-data-from-the-graph and the types of its sdk-reference;
    graphiti_core/nodes.py and edges.py of getzep/graphiti.
    """
    given = load(file)
    if not isinstance(given, Mapping) or not {"episodes", "nodes", "edges"} & given.keys():
        raise unlike(file, "a graph of Zep or Graphiti", '"episodes", "nodes", "edges"', given)
    whole = Record(file, "the file", given)
    episodes, nodes, edges = (
        list(whole.many(name, name.removesuffix("s"))) for name in ("episodes", "nodes", "edges")
    )
    for name in ("group_id", "graph_uuid", "graph_id"):
        one_owner(file, (r.fields.get(name) for r in [*episodes, *nodes, *edges]), "graphs")
    changes: list[Change] = []
    said: dict[str, Add] = {}
    for episode in episodes:
        uuid = episode.text("uuid")
        said[uuid] = Add(
            episode.text("content"),
            kind="turn",
            speaker=episode.fields.get("role") or None,
            session=episode.fields.get("thread_id") or episode.fields.get("session_id") or None,
            metadata=episode.kept("zep", "content"),
            valid_from=episode.time("valid_at", "created_at"),
            key=f"zep\x1f{uuid}",
        )
    changes += said.values()
    entities: dict[str, Add] = {}
    for node in nodes:
        uuid = node.text("uuid")
        entities[uuid] = Add(
            node.text("name"),
            kind=ENTITY,
            searchable=False,
            metadata=node.kept("zep", "name", "summary"),
            key=f"zep\x1f{uuid}",
        )
        changes.append(entities[uuid])
        if node.fields.get("summary"):
            summary = Add(
                node.text("summary"),
                kind="note",
                metadata={"zep": {"node": uuid}},
                valid_from=node.time("created_at"),
                key=f"zep\x1f{uuid}",
            )
            changes += [summary, Link(entities[uuid], "summary", summary)]
    for edge in edges:
        changes += _fact(edge, said, entities)
    return changes


def _fact(edge: Record, said: Mapping[str, Add], entities: Mapping[str, Add]) -> list[Change]:
    ends = []
    for name in ("source_node_uuid", "target_node_uuid"):
        uuid = edge.text(name)
        if uuid not in entities:
            raise UsageError(
                f"{edge.where} has {name}={uuid}, which is no node of this file; export all nodes"
            )
        ends.append(entities[uuid])
    relation = edge.text("name").lower()
    mentions = edge.fields.get("episodes") or edge.fields.get("episode_uuids") or []
    sources = [said[uuid] for uuid in mentions if uuid in said]
    start, end = edge.time("valid_at"), edge.time("invalid_at", "expired_at")
    if start is not None and end is not None:
        end = max(start, end)  # dates that a model has read may contradict each other
    known = edge.time("created_at") or start or FIRST
    fact = Add(
        edge.text("fact"),
        kind=FACT,
        data={
            "subject": ends[0].text, "relation": relation, "object": ends[1].text,
            "negated": False, "said": known.isoformat(),
        },
        metadata=edge.kept("zep", "fact"),
        valid_from=start,
        valid_to=end,
        sources=sources,
        key=f"zep\x1f{edge.text('uuid')}",
    )  # fmt: skip
    return [
        fact,
        Link(ends[0], relation, fact),
        Link(fact, OBJECT, ends[1]),
        *(Link(episode, MENTIONS, fact) for episode in sources),
    ]


def letta(file: Path) -> list[Change]:
    """An agent file of Letta (`.af`), or the JSON list of passages that its export script writes.

    Memory blocks (`label, value`), messages of users and assistants (`role, content, created_at`;
    what an agent said by `send_message` is what it said) and archival passages (`text, created_at,
    tags`) are memories; prompts, tools, their calls and returns, and thoughts are not. An agent
    file holds no passages. Both layouts of it are read: `agents` and `blocks`, and the older one
    of a single agent with `core_memory`.

    Source: docs.letta.com/guides/core-concepts/agent-file, docs.letta.com/guides/agents/
    archival-export; letta/schemas/agent_file.py of letta-ai/letta.
    """
    given = load(file)
    if isinstance(given, list):
        whole = Record(file, "the file", {"passages": given})
        return [_passage(passage) for passage in whole.many("passages", "passage")]
    whole = Record(file, "the file", given)
    if "agents" in whole.fields:
        agents, blocks = list(whole.many("agents", "agent")), whole.many("blocks", "block")
    elif "core_memory" in whole.fields:
        agents, blocks = [whole], whole.many("core_memory", "block")
    else:
        raise unlike(file, "an agent file", '"agents" or "core_memory"', given)
    changes: list[Change] = []
    for block in blocks:
        if block.fields.get("value"):
            changes.append(
                Add(
                    block.text("value"),
                    kind="block",
                    metadata=block.kept("letta", "value"),
                    valid_from=block.time("created_at"),
                    key=f"letta\x1f{block.fields.get('id') or block.text('label')}",
                )
            )
    for agent in agents:
        session = str(agent.fields.get("id") or agent.text("name"))
        for number, message in enumerate(agent.many("messages", "message")):
            changes += _message(agent, message, session, number)
    return changes


def _passage(passage: Record) -> Add:
    return Add(
        passage.text("text"),
        kind="passage",
        metadata=passage.kept("letta", "text"),
        valid_from=passage.time("created_at"),
        key=f"letta\x1f{passage.fields.get('id')}",
    )


def _message(agent: Record, message: Record, session: str, number: int) -> Iterator[Add]:
    role = message.text("role")
    text = _said_by_user(message) if role == "user" else _said_by_agent(agent, message)
    if role in _SAID and text and text.strip():
        yield Add(
            text,
            kind="turn",
            speaker=message.fields.get("name") or role,
            session=session,
            metadata=message.kept("letta", "content", "tool_calls", "tool_returns"),
            valid_from=message.time("created_at"),
            key=f"letta\x1f{session}\x1f{message.fields.get('id', number)}",
        )


def _said_by_user(message: Record) -> str | None:
    """The text; Letta packs it into JSON, with the time, as it does events that nobody said."""
    text = _content(message)
    try:
        packed = json.loads(text)
    except ValueError:
        return text
    if not isinstance(packed, Mapping) or "type" not in packed:
        return text
    said = packed.get("message")
    return said if packed["type"] == "user_message" and isinstance(said, str) else None


def _said_by_agent(agent: Record, message: Record) -> str | None:
    calls = [call.fields.get("function") or {} for call in message.many("tool_calls", "tool call")]
    for call in calls:
        if call.get("name") == "send_message":
            try:
                return str(json.loads(call["arguments"])["message"])
            except (ValueError, KeyError, TypeError):
                return None
    # Beside its calls, an agent of the MemGPT kind writes what it thinks.
    thinks = str(agent.fields.get("agent_type")).startswith("memgpt")
    return None if calls and thinks else _content(message)


def _content(message: Record) -> str:
    content = message.fields.get("content") or message.fields.get("text") or ""
    if isinstance(content, str):
        return content
    parts = message.many("content", "part")
    return "\n".join(part.text("text") for part in parts if part.fields.get("type") == "text")


FORMATS: dict[str, Callable[[Path], list[Change]]] = {
    "mem0": mem0, "zep": zep, "graphiti": zep, "letta": letta,
}  # fmt: skip
