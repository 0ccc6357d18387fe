import json
from datetime import UTC, datetime

import pytest

from holdfast.errors import UsageError
from holdfast.longterm import Memory
from holdfast.longterm.policies.zep import Zep
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.store.importers import FORMATS
from holdfast.longterm.store.maintain import verify
from tests.longterm.conftest import ENGINES, Clock

MEM0 = {
    "results": [
        {
            "id": "892db2ae-06d9-49e5-8b3e-585ef9b85b8e",
            "memory": "Ann lives in Denver",
            "hash": "c8a3c1b2",
            "metadata": {"category": "home"},
            "created_at": "2024-07-20T01:30:36.275141-07:00",
            "updated_at": "2024-08-01T10:00:00-07:00",
            "user_id": "ann",
            "agent_id": "helper",
            "run_id": None,
            "score": 0.3,
        },
        {
            "id": "1",
            "memory": "Ann likes tea",
            "created_at": "2024-07-21T00:00:00",
            "updated_at": None,
            "user_id": "ann",
        },
    ],
    "history": [
        {
            "id": "b", "memory_id": "892db2ae-06d9-49e5-8b3e-585ef9b85b8e", "event": "UPDATE",
            "old_memory": "Ann lives in Boston", "new_memory": "Ann lives in Denver",
            "created_at": "2024-07-20T01:30:36-07:00", "updated_at": "2024-08-01T10:00:00-07:00",
            "is_deleted": False, "actor_id": None, "role": None,
        },
        {
            "id": "a", "memory_id": "892db2ae-06d9-49e5-8b3e-585ef9b85b8e", "event": "ADD",
            "old_memory": None, "new_memory": "Ann lives in Boston",
            "created_at": "2024-07-20T01:30:36-07:00", "updated_at": None,
        },
        {
            "id": "c", "memory_id": "gone", "event": "DELETE",
            "old_memory": "A secret", "new_memory": None, "created_at": "2024-07-20T00:00:00Z",
        },
    ],
    "relations": [{"source": "ann", "relationship": "likes_to_drink", "target": "tea"}],
}  # fmt: skip
ZEP = {
    "episodes": [
        {
            "uuid": "e1", "content": "I work at Acme now.", "role": "Ann", "role_type": "user",
            "source": "message", "thread_id": "monday", "created_at": "2024-01-01T09:00:00Z",
            "metadata": {"channel": "web"},
        },
        {
            "uuid": "e2", "content": "I work at Globex since Tuesday.", "role": "Ann",
            "source": "message", "source_description": "chat", "group_id": "g",
            "created_at": "2024-05-01T09:00:01Z", "valid_at": "2024-05-01T09:00:00Z",
        },
    ],
    "nodes": [
        {
            "uuid": "n1", "name": "Ann", "labels": ["Entity", "Person"], "group_id": "g",
            "summary": "Ann is an engineer who changes employers.", "attributes": {"age": 30},
            "name_embedding": [0.1, 0.2], "created_at": "2024-01-01T09:00:02Z",
        },
        {"uuid": "n2", "name": "Acme", "summary": "", "created_at": "2024-01-01T09:00:02Z"},
        {"uuid": "n3", "name": "Globex", "created_at": "2024-05-01T09:00:02Z"},
    ],
    "edges": [
        {
            "uuid": "r1", "name": "WORKS_AT", "fact": "Ann works at Acme",
            "source_node_uuid": "n1", "target_node_uuid": "n2", "episodes": ["e1", "elsewhere"],
            "created_at": "2024-01-01T09:00:02Z", "valid_at": "2024-01-01T09:00:00Z",
            "invalid_at": "2024-04-30T00:00:00Z", "expired_at": "2024-05-01T09:00:03Z",
            "fact_embedding": [0.3],
        },
        {
            "uuid": "r2", "name": "WORKS_AT", "fact": "Ann works at Globex",
            "source_node_uuid": "n1", "target_node_uuid": "n3", "episodes": ["e2"],
            "created_at": "2024-05-01T09:00:02Z", "valid_at": "2024-04-30T00:00:00Z",
        },
    ],
}  # fmt: skip
SENT = {"function": {"name": "send_message", "arguments": json.dumps({"message": "Hello Ann."})}}
LETTA = {
    "agents": [
        {
            "id": "agent-0", "name": "helper", "agent_type": "memgpt_agent",
            "system": "You are Letta.", "block_ids": ["block-0"],
            "messages": [
                {"id": "message-0", "role": "system", "content": [{"type": "text", "text": "S"}]},
                {
                    "id": "message-1", "role": "user", "created_at": "2025-03-01T10:00:00+00:00",
                    "content": [{"type": "text", "text": json.dumps(
                        {"type": "user_message", "message": "I am Ann.", "time": "10:00"})}],
                },
                {
                    "id": "message-2", "role": "assistant", "tool_calls": [SENT],
                    "content": [{"type": "text", "text": "She is new."}], "model": "gpt-4.1",
                    "created_at": "2025-03-01T10:00:01+00:00",
                },
                {"id": "message-3", "role": "tool", "content": [{"type": "text", "text": "OK"}]},
                {"id": "message-4", "role": "user", "content": json.dumps({"type": "heartbeat"})},
                {"id": "message-5", "role": "user", "content": "42"},
            ],
        }
    ],
    "groups": [],
    "blocks": [
        {"id": "block-0", "label": "human", "value": "Name: Ann", "limit": 5000,
         "description": "What is known of the user", "metadata": {"source": "form"}},
        {"id": "block-1", "label": "persona", "value": "", "limit": 5000},
    ],
    "files": [], "sources": [], "tools": [], "mcp_servers": [],
}  # fmt: skip
OLD_LETTA = {
    "agent_type": "letta_v1_agent",
    "name": "old",
    "version": "0.6",
    "core_memory": [
        {"label": "human", "value": "Name: Ben", "created_at": "2025-03-01T10:00:00+00:00"}
    ],
    "messages": [
        {
            "role": "assistant", "content": [{"type": "text", "text": "Hello Ben."}],
            "tool_calls": [{"function": {"name": "search", "arguments": "{}"}}],
            "created_at": "2025-03-01T10:00:01+00:00",
        },
    ],
}  # fmt: skip
PASSAGES = [
    {
        "id": "passage-1", "text": "Ann plays the cello.", "tags": ["music"],
        "created_at": "2025-03-02T10:00:00Z", "metadata": {}, "embedding": None,
    },
]  # fmt: skip
SAMPLES = {"mem0": MEM0, "zep": ZEP, "graphiti": ZEP, "letta": LETTA}


@pytest.fixture
def write(tmp_path):
    def write(content, name="export.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


def texts(memory, **options):
    return [item.text for item in memory.get_all(**options)]


def at(*parts):
    return datetime(*parts, tzinfo=UTC)


def test_mem0(memory, write):
    assert memory.import_(write(MEM0), format="mem0") == {"read": 4, "memory": 3}
    assert texts(memory) == ["Ann lives in Denver", "Ann likes tea", "ann likes to drink tea"]
    home, tea, _ = memory.get_all()
    assert home.metadata == {
        "category": "home",
        "mem0": {
            "id": "892db2ae-06d9-49e5-8b3e-585ef9b85b8e", "hash": "c8a3c1b2",
            "created_at": "2024-07-20T01:30:36.275141-07:00",
            "updated_at": "2024-08-01T10:00:00-07:00",
            "user_id": "ann", "agent_id": "helper", "score": 0.3,
        },
    }  # fmt: skip
    assert home.valid_from == at(2024, 7, 20, 8, 30, 36, 275141)
    assert tea.valid_from == at(2024, 7, 21), "a time without a zone is in UTC"
    events = [(e.op, e.after["text"], e.why) for e in memory.history(home.id)]
    assert events == [
        ("add", "Ann lives in Boston", ""),
        ("revise", "Ann lives in Denver", "mem0 updated it at 2024-08-01 10:00:00-07:00"),
    ]
    assert memory.search("Where does Ann live?", filters={"category": "home"})[0].id == home.id


def test_a_plain_list_of_mem0_and_a_text_newer_than_its_history(memory, write):
    (record, *_) = MEM0["results"]
    memory.import_(write([{**record, "memory": "Ann is fine"}]), format="mem0")
    memory.import_(
        write({**MEM0, "results": [{**record, "memory": "Ann moved to Utah"}]}), format="mem0"
    )
    assert texts(memory) == ["Ann is fine", "Ann moved to Utah", "ann likes to drink tea"]
    moved = memory.get_all()[1]
    assert [e.after["text"] for e in memory.history(moved.id)] == [
        "Ann lives in Boston", "Ann lives in Denver", "Ann moved to Utah",
    ]  # fmt: skip


def test_a_graph_of_zep_is_one_for_the_policy_zep(place, write):
    policy = Zep()
    with Memory(
        place("m"), embedder=Hash(64), clock=Clock(at(2024, 6, 1)), policy=policy
    ) as memory:
        memory.import_(write(ZEP), format="zep")
        with memory.reading() as view:
            now = policy.facts(view, "Ann", "works_at")
            march = policy.facts(view, "Ann", "works_at", valid=at(2024, 3, 1), recorded=view.now)
            assert [fact.text for fact in now] == ["Ann works at Globex"]
            assert [fact.text for fact in march] == ["Ann works at Acme"]
            said = view.get(view.sources([march[0].id])[march[0].id][0].id)
            assert (said.text, said.speaker, said.session) == (
                "I work at Acme now.", "Ann", "monday",
            )  # fmt: skip
            assert said.metadata["channel"] == "web" and "content" not in said.metadata["zep"]
            assert march[0].metadata["zep"]["episodes"] == ["e1", "elsewhere"]
            assert "fact_embedding" not in march[0].metadata["zep"]
            (ann,) = (i for i in view.items(kind="entity") if i.text == "Ann")
            assert ann.metadata["zep"]["attributes"] == {"age": 30}
            assert {e.rel for e in view.edges(src=ann.id)} == {"works_at", "summary"}
        assert "engineer" in memory.search("Who is an engineer?")[0].text
        # The graph goes on from there.
        memory.transact(lambda view: policy.add_fact(view, "Ann", "works_at", "Initech"))
        with memory.reading() as view:
            assert [f.text for f in policy.facts(view, "Ann")] == ["Ann works at Initech"]
        memory.purge(said.id)
        assert "Ann works at Acme" not in texts(memory, kind="relation")


def test_a_fact_that_would_end_before_it_begins_holds_at_no_time(memory, write):
    edge = {**ZEP["edges"][0], "invalid_at": "2023-01-01T00:00:00Z"}
    memory.import_(write({**ZEP, "edges": [edge]}), format="graphiti")
    (fact,) = memory.get_all(kind="relation")
    assert fact.valid_to == fact.valid_from == at(2024, 1, 1, 9)


def test_letta(memory, write):
    memory.import_(write(LETTA, "helper.af"), format="letta")
    said = [(i.kind, i.speaker, i.text) for i in memory.get_all()]
    assert said == [
        ("block", None, "Name: Ann"),
        ("turn", "user", "I am Ann."),
        ("turn", "assistant", "Hello Ann."),
        ("turn", "user", "42"),
    ]
    block, user, *_ = memory.get_all()
    assert block.metadata == {
        "source": "form",
        "letta": {
            "id": "block-0", "label": "human", "limit": 5000,
            "description": "What is known of the user",
        },
    }  # fmt: skip
    assert user.session == "agent-0" and user.valid_from == at(2025, 3, 1, 10)
    memory.import_(write(OLD_LETTA), format="letta")
    memory.import_(write(PASSAGES), format="letta")
    assert texts(memory)[4:] == ["Name: Ben", "Hello Ben.", "Ann plays the cello."]
    (cello,) = memory.get_all(kind="passage")
    assert cello.metadata == {
        "letta": {"id": "passage-1", "tags": ["music"], "created_at": "2025-03-02T10:00:00Z"}
    }


@pytest.mark.parametrize("place", ENGINES, indirect=True)
@pytest.mark.parametrize("format", sorted(SAMPLES))
def test_importing_twice_changes_nothing_whatever_became_of_it(memory, write, format):
    def state():
        with memory.reading() as view:
            return view.events(), view.edges(), view.items()

    file = write(SAMPLES[format])
    first = memory.import_(file, format=format)
    assert first["memory"] > 0 and verify(memory).ok
    items = memory.get_all()
    memory.update(items[0].id, "Something else.")
    memory.delete(items[-1].id)
    before = state()
    assert memory.import_(file, format=format) == {"read": first["read"], "memory": 0}
    assert state() == before
    assert not memory.get_all(space="bob")


def test_what_is_new_in_a_second_export_joins_what_is_known(memory, write):
    memory.import_(write({**ZEP, "edges": ZEP["edges"][:1]}), format="zep")
    count = memory.stats()["memories"]
    assert memory.import_(write(ZEP), format="zep")["memory"] == 1
    with memory.reading() as view:
        (fact,) = (i for i in view.items(kind="relation") if "Globex" in i.text)
        assert len(view.edges(dst=fact.id)) == 2 and len(view.edges(src=fact.id)) == 1
        assert len(view.sources([fact.id])[fact.id]) == 1
    assert memory.stats()["memories"] == count + 1


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("mem0", "not json", "cannot be read as JSON"),
        ("mem0", '["\\ud800"]', "cannot be read as JSON"),
        ("mem0", {"memories": []}, r'not mem0\'s get_all: expected "results", found memories'),
        ("mem0", {"results": {}}, r"the file has results=\{\}, expected a list"),
        ("mem0", [MEM0["results"][0], 7], "memory 1 is 7, expected an object"),
        ("mem0", [{"id": "1", "text": "x"}], "memory 0 has memory=None, expected a text"),
        ("mem0", [{"memory": "x", "created_at": "soon"}], "memory 0 has created_at='soon'.*time"),
        ("mem0", [{"memory": "x", "metadata": []}, {"memory": " "}], "memory 1 has memory=' '"),
        ("mem0", [{"memory": "x", "metadata": [1]}], r"metadata=\[1\], expected an object"),
        (
            "mem0",
            [{"memory": "x", "user_id": "ann"}, {"memory": "y", "user_id": "bob"}],
            r"memories of 2 users \(ann, bob",
        ),
        ("zep", [], "not a graph of Zep or Graphiti"),
        ("zep", {**ZEP, "nodes": ZEP["nodes"][:2]}, "edge 1 has target_node_uuid=n3.*no node"),
        ("zep", {**ZEP, "episodes": [{"uuid": "x"}]}, "episode 0 has content=None"),
        ("zep", {"nodes": [{"uuid": "a", "name": "A", "group_id": g} for g in "gh"]}, "2 graphs"),
        ("letta", {"name": "x"}, "not an agent file.*found name"),
        ("letta", [{"id": "p"}], "passage 0 has text=None"),
        ("letta", {"agents": [{"id": "a", "messages": [{}]}]}, "agent 0: message 0 has role=None"),
    ],
)
def test_bad_files_say_what_is_wrong_and_leave_nothing(memory, write, format, content, message):
    with pytest.raises(UsageError, match=message):
        memory.import_(write(content), format=format)
    assert memory.stats()["events"] == memory.stats()["spaces"] == 0


def test_names_of_formats(memory, tmp_path):
    assert sorted(FORMATS) == sorted(SAMPLES)
    with pytest.raises(UsageError, match="unknown import format 'mem1'; nearest known: mem0"):
        memory.import_(tmp_path / "x", format="mem1")
    with pytest.raises(UsageError, match=r"cannot be read as JSON.*No such file"):
        memory.import_(tmp_path / "x", format="mem0")
