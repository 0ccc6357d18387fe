"""Shopping lists, and opponents at rock, paper, scissors, told in turns over a long chat."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.checks import Result, check
from holdfast.checks.context._recall import bounded_recall, bytes_of, truncated_recall
from holdfast.checks.recall import ASK, BEGIN, KEYS, VALUES, Episode, episodes, filler, trained
from holdfast.context.cache.baselines import Random, SinksRecent, Window
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.sirllm import SirLLM
from holdfast.context.stream import prefill_chunks, read

LENGTH, TURN, ITEMS, ROUNDS = 1024, 64, 8, 24
CAPACITY, CHUNK = 80, 32
SEEDS, EPISODES = 3, 80


def opponents(count: int, length: int, seed: int) -> list[Episode]:
    """Chats in which one opponent plays `ROUNDS` times, the answer in half of them.

    A round is the opponent's key and a move; two other moves share the rest, and the question is
    what the opponent plays.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_opponent(length, generator) for _ in range(count)]


def _opponent(length: int, generator: torch.Generator) -> Episode:
    slots = torch.randperm(length - 1 - ROUNDS, generator=generator)[:ROUNDS].sort().values
    start = 1 + slots + torch.arange(ROUNDS)
    key = KEYS[0] + int(torch.randint(len(KEYS), (), generator=generator))
    moves = VALUES[0] + torch.randperm(len(VALUES), generator=generator)[:3]
    chance = torch.tensor([0.5, 0.25, 0.25])
    free = torch.ones(length, dtype=torch.bool)
    free[0] = free[start] = free[start + 1] = False
    document = torch.full((length,), BEGIN)
    document[free] = filler(length - 1 - 2 * ROUNDS, generator)
    document[start] = key
    document[start + 1] = moves[torch.multinomial(chance, ROUNDS, True, generator=generator)]
    return Episode(document, torch.tensor([ASK, key]), moves[:1], slice(start[0], start[0] + 2))


def in_turns(
    model: PreTrainedModel, documents: Tensor, questions: Tensor, cache: BoundedCache
) -> Tensor:
    before = None
    for turn in documents.split(TURN, 1):
        cache.turn()
        before = prefill_chunks(model, turn, cache, before=before)
    return read(model, questions, cache, before=before)


@check(
    "sirllm",
    claim="at equal bytes, recalls at least 1.5 times as many rare tokens of a long chat as sinks "
    "and recent tokens do, and knows an opponent's favourite move more often",
)
def run(seed: int) -> Result:
    model = trained()
    seeds = range(SEEDS * seed, SEEDS * (seed + 1))
    lists = [one for s in seeds for one in episodes(EPISODES, LENGTH, s, ITEMS)]
    games = [one for s in seeds for one in opponents(EPISODES, LENGTH, s)]
    budget = bytes_of(model, SirLLM(), CAPACITY, CHUNK)
    recall = partial(bounded_recall, model, budget=budget, chunk=CHUNK, reader=in_turns)
    ours = {
        "recall": recall(SirLLM(decay=1.0), lists),
        "favourite": recall(SirLLM(decay=0.9), games),
    }
    base = {
        "recall": recall(SinksRecent(), lists),
        "favourite": recall(SinksRecent(), games),
        "random_recall": recall(Random(), lists),
        "window_recall": recall(Window(), lists),
        "whole_chat_recall": truncated_recall(model, lists, LENGTH),
        "whole_chat_favourite": truncated_recall(model, games, LENGTH),
    }
    return Result(
        measured=ours | {"bytes": budget},
        baseline=base | {"bytes": budget},
        threshold="recall >= 1.5 x sinks + recent and >= 0.5, favourite >= 1.1 x sinks + recent",
        passed=ours["recall"] >= max(0.5, 1.5 * base["recall"])
        and ours["favourite"] >= 1.1 * base["favourite"],
    )
