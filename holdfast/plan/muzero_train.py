"""Train MuZero for the mallocGame on generated programs, within a minute on two cores.

Memory holds, from the start, games in which local search shows its placements of training
programs; the network first learns to predict these. Then it plays new programs by search, and
learns from both. Targets are those of MuZero: the search's improved policy, n-step returns of the
search's values, and rewards, along a few steps of the learned model.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.plan.malloc_game import COPY, DROP, NOCOPY, OBSERVATION, MallocGame
from holdfast.plan.muzero import ACTIONS, Agent, Network, Search, advance, digest, views
from holdfast.plan.placement import TwoLevel
from holdfast.plan.placement_greedy import local_search
from holdfast.plan.placement_program import Program

# Weights of the losses beside the policy's cross-entropy: squared shares are small numbers.
_VALUE, _REWARD = 25.0, 100.0


def generated(number: int) -> tuple[Program, TwoLevel]:
    """A program of 6 to 9 layers and a fast memory that holds 8 % to 30 % of its bytes."""
    program = Program.generate(number, layers=6 + number % 4)
    share = np.random.default_rng(number).uniform(0.08, 0.3)
    return program, TwoLevel(int(program.nbytes * share))


@dataclass(frozen=True)
class Settings:
    """How an agent is trained.

    Args:
        shown: games of local search, on training programs, in memory from the start.
        imitation: updates of all `updates` that come before the first game of its own.
        games: side by side.
        simulations: of the learned model per decision.
        batch: positions per update, half of them shown.
        unroll: steps of the learned model per position.
        returned: steps of the n-step return.
    """

    shown: int = 300
    imitation: int = 200
    updates: int = 900
    games: int = 32
    simulations: int = 8
    batch: int = 128
    unroll: int = 4
    returned: int = 12
    rate: float = 2e-3


@dataclass
class Episode:
    """One game: what was seen, played, gained and found by search, step by step."""

    seen: list[np.ndarray] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    policies: list[np.ndarray] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def target(self, at: int, steps: int) -> float:
        """The n-step return: `steps` rewards, then the searched value of where they lead."""
        end = at + steps
        tail = self.values[end] if end < len(self.values) else 0.0
        return sum(self.rewards[at:end]) + tail


def train(
    seconds: float = 60.0,
    *,
    seed: int = 0,
    problems: Callable[[int], tuple[Program, TwoLevel]] = generated,
    settings: Settings | None = None,
    tell: Callable[[str], None] | None = None,
) -> Agent:
    """Learn from shown games, then from its own; ends after `seconds` at the latest.

    Args:
        problems: number -> program and hardware; numbers start at 1,000,000 * (seed + 1), so that
            smaller ones are never trained on.
        tell: called with a line of progress now and then.
    """
    deadline = time.monotonic() + seconds
    settings = settings or Settings()
    trainer = _Trainer(seed, problems, settings)
    while len(trainer.shown) < settings.shown and time.monotonic() < deadline:
        trainer.show()
    for count in range(settings.updates):
        if time.monotonic() > deadline:
            break
        if count >= settings.imitation:
            trainer.play()
        trainer.learn(1 - count / settings.updates)
        if tell is not None and count % 100 == 99:
            tell(f"{count + 1} updates, {trainer.summary()}")
    return Agent(trainer.network, frozenset(trainer.seen))


class _Trainer:
    """Games that go on side by side, what they left behind, and the optimizer."""

    def __init__(self, seed: int, problems, settings: Settings):
        self.draw = np.random.default_rng(seed)
        self.problems, self.next = problems, 1_000_000 * (seed + 1)
        self.settings = settings
        self.seen: set[str] = set()
        # The caller's random numbers stay as they are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Network()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.rate, weight_decay=0.1
        )
        self.search = Search(self.network, settings.simulations)
        self.games = [self._new() for _ in range(settings.games)]
        self.episodes = [Episode() for _ in range(settings.games)]
        self.shown: list[Episode] = []
        self.played: deque[Episode] = deque(maxlen=500)
        self.losses = np.zeros(3)

    def _new(self) -> MallocGame:
        while True:
            program, hardware = self.problems(self.next)
            self.next += 1
            game = MallocGame(program, hardware)
            advance(game)
            if not game.done:
                self.seen.add(digest(program))
                return game

    def summary(self) -> str:
        last = list(self.played)[-64:]
        share = np.mean([sum(e.rewards) for e in last]) if last else 0.0
        policy, value, reward = self.losses
        return f"share {share:.4f}, losses {policy:.3f} {value:.5f} {reward:.5f}"

    def show(self) -> None:
        """Play one new program as local search places it, as far as the game's rules let."""
        game = self._new()
        found = local_search(game.program, game.hardware, 60.0, self.next, rounds=15)
        fast = {u for r in found.residencies for u in r.uses}
        episode = Episode()
        while not game.done:
            legal = game.legal()
            wanted = legal[[COPY, NOCOPY]].any() and (game.at in fast or not legal[DROP])
            action = int(legal[:DROP].argmax()) if wanted else DROP
            episode.seen.append(game.observation())
            episode.policies.append(np.eye(ACTIONS)[action])
            episode.actions.append(action)
            episode.rewards.append(game.step(action)[1] + advance(game))
        episode.values = list(np.cumsum(episode.rewards[::-1])[::-1])
        self.shown.append(episode)

    def play(self) -> None:
        """One decision in every game."""
        seen, legal = views(self.games)
        noise = self.draw.gumbel(size=legal.shape)
        self.network.eval()
        found = self.search(seen, legal, noise)
        for k, (game, episode) in enumerate(zip(self.games, self.episodes, strict=True)):
            action = int(found.action[k])
            episode.seen.append(seen[k])
            episode.policies.append(found.policy[k])
            episode.values.append(float(found.value[k]))
            episode.actions.append(action)
            episode.rewards.append(game.step(action)[1] + advance(game))
            if game.done:
                self.played.append(episode)
                self.games[k], self.episodes[k] = self._new(), Episode()

    def learn(self, rate: float) -> None:
        """One step on positions of past games, unrolled in the learned model."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * max(rate, 0.05)
        self.network.train()
        batch = self._batch()
        state = self.network.represent(batch[0])
        losses = [state.new_zeros(()) for _ in range(3)]
        for k in range(self.settings.unroll + 1):
            logits, value = self.network.predict(state)
            policy, target, alive, reward, action = (part[:, k] for part in batch[1:])
            entropy = -(policy * logits.log_softmax(1)).sum(1)
            losses[0] = losses[0] + (alive * entropy).mean()
            losses[1] = losses[1] + F.mse_loss(value, target)
            if k < self.settings.unroll:
                state, guess = self.network.dynamics(state, action)
                losses[2] = losses[2] + F.mse_loss(guess, reward)
                # As in MuZero: half the gradient, so that long unrolls do not dominate.
                state = state * 0.5 + state.detach() * 0.5
        loss = losses[0] + _VALUE * losses[1] + _REWARD * losses[2]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.losses = self.losses * 0.98 + np.array([part.item() for part in losses]) * 0.02

    def _batch(self) -> list[Tensor]:
        """Observations; per step policy, value, whether the game goes on, reward and action."""
        count, length = self.settings.batch, self.settings.unroll + 1
        seen = np.zeros((count, OBSERVATION), np.float32)
        policy = np.full((count, length, ACTIONS), 1 / ACTIONS, np.float32)
        value, alive, reward = (np.zeros((count, length), np.float32) for _ in range(3))
        action = np.zeros((count, length), np.int64)
        for b, (episode, at) in enumerate(self._positions(count)):
            seen[b] = episode.seen[at]
            for k in range(min(length, len(episode.actions) - at)):
                policy[b, k] = episode.policies[at + k]
                value[b, k] = episode.target(at + k, self.settings.returned)
                alive[b, k] = 1
                reward[b, k] = episode.rewards[at + k]
                action[b, k] = episode.actions[at + k]
        return [torch.from_numpy(a) for a in (seen, policy, value, alive, reward, action)]

    def _positions(self, count: int) -> Iterator[tuple[Episode, int]]:
        """Half from shown games and half from its own, every step of a half equally often."""
        sources = [list(source) for source in (self.shown, self.played) if source]
        for source in sources:
            sizes = np.array([len(e.actions) for e in source], float)
            for which in self.draw.choice(
                len(source), count // len(sources), p=sizes / sizes.sum()
            ):
                episode = source[which]
                yield episode, int(self.draw.integers(len(episode.actions)))
