"""Recognise what this memory said itself, so that it is not remembered again as something new."""

from holdfast.longterm.budget import handed_out
from holdfast.longterm.records import Turn, text_hash
from holdfast.longterm.store.view import View


def without_echoes(view: View, turn: Turn) -> tuple[str | None, list[str]]:
    """A turn's text without what this memory handed out, and the ids of that."""
    whole = handed_out(turn.text)
    if whole is not None:
        current = view.get_many(item for item, _ in whole)
        if all(item in current and current[item].text == text for item, text in whole):
            return None, [item for item, _ in whole]
    kept, known = [], []
    for row in turn.text.split("\n"):
        echo = handed_out(row)
        item = view.get(echo[0][0]) if echo else None
        if item is not None and echo is not None and text_hash(item.text) == text_hash(echo[0][1]):
            known.append(item.id)
        else:
            kept.append(row)
    rest = "\n".join(kept).strip() if known else turn.text
    return rest or None, known
