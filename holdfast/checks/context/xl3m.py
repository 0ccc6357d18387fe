"""One fact in a text of 64 windows: which segment makes the recall model certain of its answer."""

import torch
from torch import Tensor

from holdfast.checks import Result, check, recall
from holdfast.checks.recall import Answerer, Episode
from holdfast.context.attention.xl3m import Report, xl3m_generate

WINDOW, SEGMENT, EPISODES = recall.TRAINED, 62, 20
LENGTH = 64 * WINDOW


def holds(episode: Episode, report: Report, ranked: list[int]) -> bool:
    """Whether the first of `ranked` holds the whole fact that was asked for."""
    start = report.starts[ranked[0]]
    return start <= episode.needle.start and episode.needle.stop <= start + report.segment


@check("xl3m", claim="answers from 64 windows of text with the segment that holds the fact")
def run(seed: int) -> Result:
    model = recall.trained(seed)
    found: dict[str, list[bool]] = {"entropy": [], "gain": []}

    def ours(episode: Episode) -> Tensor:
        ids = torch.cat([episode.document, episode.question])[None]
        asked = len(episode.question)
        out, report = xl3m_generate(
            model, ids, asked, segment=SEGMENT, window=WINDOW, max_new_tokens=1
        )
        for by, hits in found.items():
            hits.append(holds(episode, report, report.ranked(by)))
        return out[0]

    def truncated(episode: Episode) -> Tensor:
        """The end of the text, as much as fits the window."""
        room = WINDOW - len(episode.question)
        cut = Episode(episode.document[-room:], episode.question, episode.answer, slice(0, 0))
        return answer(cut)

    answer: Answerer = recall.plain(model)
    # One fact; and one among sixteen, each of which another question would ask for.
    single = recall.episodes(EPISODES, LENGTH, seed + 1)
    many = recall.episodes(EPISODES, LENGTH, seed + 2, facts=16)
    right = recall.recall(ours, single)
    first, by_gain = (sum(found[by]) / EPISODES for by in ("entropy", "gain"))
    right_of_many = recall.recall(ours, many)
    of_many = sum(found["entropy"][EPISODES:]) / EPISODES
    without = recall.recall(truncated, single)
    return Result(
        measured={
            "needle_ranked_first": first,
            "answered": right,
            "needle_ranked_first_by_gain": by_gain,
            "needle_ranked_first_of_16": of_many,
            "answered_of_16": right_of_many,
        },
        baseline={
            "name": f"the last {WINDOW} tokens",
            "answered": without,
            "chance": recall.value_chance,
        },
        threshold="needle's segment ranked first >= 0.9 and answered >= 0.85; baseline <= 0.2",
        passed=first >= 0.9 and right >= 0.85 and without <= 0.2,
    )
