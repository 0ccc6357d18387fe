"""What the contract tests do with a memory, and an independent reading of its log."""

from datetime import UTC, datetime

SESSIONS = {
    "monday": [
        ("Ann", "I moved to Boston last week and I work at Acme now."),
        ("Ben", "How do you like it there?"),
        ("Ann", "It is cold, but my cat Miso loves the new flat."),
        ("Ben", "I bought a red bicycle yesterday."),
    ],
    "friday": [
        ("Ben", "Do you still work at Acme?"),
        ("Ann", "No, I work at Globex since Tuesday."),
        ("Ann", "Miso is ill, so I could not come to the party."),
        ("Ben", "I sold my bicycle because I moved to Denver."),
    ],
}
DAYS = {
    "monday": datetime(2024, 1, 1, 9, tzinfo=UTC),
    "friday": datetime(2024, 1, 5, 9, tzinfo=UTC),
}


def messages(session):
    return [{"speaker": who, "content": text} for who, text in SESSIONS[session]]


def live(memory, space=None):
    """A few days of use: two conversations, facts, a correction, a deletion, an ending."""
    memory.add(messages("monday"), session="monday", when=DAYS["monday"], space=space)
    memory.summarise("monday", space=space)
    memory.add("Ann likes jazz.", space=space)
    memory.add("The door code is 4711.", metadata={"secret": True}, space=space)
    memory.search("where does Ann work?", space=space)
    memory.add(messages("friday"), session="friday", when=DAYS["friday"], space=space)
    memory.summarise("friday", space=space)
    items = memory.get_all(space=space)
    memory.update(items[0].id, items[0].text + " I like it.", space=space)
    memory.delete(items[1].id, space=space)
    memory.forget(datetime(2024, 1, 6, tzinfo=UTC), space=space)
    memory.context("Tell me about Miso.", 60, space=space)


def replay(events):
    """Current states by id, from the log alone."""
    states = {}
    for event in events:
        if event.op in ("add", "revise"):
            kept = {"sources": states.get(event.id, {}).get("sources")}
            states[event.id] = {**kept, **(event.after or {})}
        elif event.op == "touch" and event.after is not None:
            states[event.id] = {**states[event.id], **event.after}
        elif event.op in ("retire", "purge"):
            states.pop(event.id, None)
    return {i: s for i, s in states.items() if "text" in s}


SPACES = ["ann", "bob", "t/ann", "t/ann/bot", "t/ann/bot/7"]
DEEDS = ["add", "update", "delete", "search", "purge"]


def stay_apart(memory, steps):
    """Do (space, deed, which) one by one; each space must hold what was done to it alone."""
    shadow = {space: {} for space in SPACES}
    for number, (space, op, pick) in enumerate(steps):
        own = sorted(shadow[space])
        if op == "add":
            text = f"{space} says {number} about tea"
            shadow[space][memory.add(text, space=space)[0]] = text
        elif op == "search":
            found = memory.search("tea", limit=50, space=space)
            assert {hit.id: hit.text for hit in found} == shadow[space]
        elif own:
            item = own[pick % len(own)]
            if op == "update":
                shadow[space][item] = f"{space} changed it at {number}"
                memory.update(item, shadow[space][item], space=space)
            else:
                {"delete": memory.delete, "purge": memory.purge}[op](item, space=space)
                del shadow[space][item]
    for space in SPACES:
        held = {item.id: item.text for item in memory.get_all(space=space)}
        assert held == shadow[space]
