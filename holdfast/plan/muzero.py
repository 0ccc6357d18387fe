"""MuZero for the mallocGame: an agent that plans in a learned model; `muzero_train` trains it.

Three networks: representation (an image of bytes over time through a small ResNet, the next uses
through a transformer) -> latent state; dynamics (state, action) -> next state and reward;
prediction state -> policy and value. Search is Gumbel MuZero's: at the root a sample of actions
and sequential halving, below it the deterministic choice that follows the improved policy.

Sources: Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned
Model", Nature 2020; Danihelka, Guez, Schrittwieser, Silver, "Policy Improvement by Planning with
Gumbel", ICLR 2022. Values need no rescaling: a game's rewards are shares of what it can save.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.plan.malloc_game import (
    BINS,
    CHANNELS,
    GLOBALS,
    PER_USE,
    STEPS,
    WINDOW,
    MallocGame,
)
from holdfast.plan.placement import Placement, TwoLevel
from holdfast.plan.placement_program import Program

ACTIONS = 3
_IMAGE = CHANNELS * STEPS * BINS
# An improved policy adds (_VISIT + visits) * _SCALE nats per unit of value. A value is a share of
# all that can be saved: more weight would give its error, about 0.1, the say over the policy.
_VISIT, _SCALE = 50.0, 0.1


class Network(nn.Module):
    """The three networks; S is the width of a latent state."""

    def __init__(self, width: int = 96, token: int = 32):
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, 8, 3, stride=2, padding=1)
        self.block = nn.Sequential(
            nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.image = nn.Linear(8 * (STEPS // 2) * (BINS // 2), 64)
        self.token = nn.Linear(PER_USE, token)
        self.place = nn.Parameter(torch.zeros(WINDOW, token))
        self.attention = nn.TransformerEncoderLayer(
            token, 2, 2 * token, dropout=0.0, batch_first=True, norm_first=True
        )
        self.join = nn.Sequential(
            nn.Linear(64 + WINDOW * token + PER_USE + GLOBALS, 128),
            nn.ReLU(),
            nn.Linear(128, width),
            nn.LayerNorm(width),
        )
        self.move = nn.Sequential(
            nn.Linear(width + ACTIONS, 128), nn.ReLU(), nn.Linear(128, width + 1)
        )
        self.settle = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, ACTIONS + 1))

    def represent(self, seen: Tensor) -> Tensor:
        """Observations (B,OBSERVATION) -> states (B,S)."""
        image = self.first(seen[:, :_IMAGE].unflatten(1, (CHANNELS, STEPS, BINS)))
        image = (image + self.block(image)).relu()
        window = seen[:, _IMAGE:-GLOBALS].unflatten(1, (WINDOW, PER_USE))
        tokens = self.attention(self.token(window) + self.place)
        parts = (
            self.image(image.flatten(1)).relu(),
            tokens.flatten(1),
            window[:, 0],
            seen[:, -GLOBALS:],
        )
        return self.join(torch.cat(parts, 1))

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """States (B,S), actions (B,) int64 -> next states (B,S), rewards (B,)."""
        moved = self.move(torch.cat([state, F.one_hot(action, ACTIONS).to(state.dtype)], 1))
        return self.settle(state + moved[:, 1:]), moved[:, 0]

    def predict(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """States (B,S) -> logits (B,ACTIONS), values (B,)."""
        out = self.head(state)
        return out[:, :ACTIONS], out[:, ACTIONS]


def schedule(actions: int, simulations: int) -> list[int]:
    """Sequential halving: how often an action must have been visited to be next, per simulation."""
    if actions <= 1:
        return list(range(simulations))
    phases, left, visits = math.ceil(math.log2(actions)), actions, 0
    found: list[int] = []
    while len(found) < simulations:
        for _ in range(max(1, simulations // (phases * left))):
            found += [visits] * left
            visits += 1
        left = max(2, left // 2)
    return found[:simulations]


@dataclass
class Searched:
    """Of B searches: the action to play, the improved policy (B,ACTIONS), the root's value."""

    action: np.ndarray
    policy: np.ndarray
    value: np.ndarray


class Search:
    """Gumbel MuZero's tree search for B games at once.

    Args:
        simulations: visits of the learned model per decision.
    """

    def __init__(self, network: Network, simulations: int):
        self.network, self.simulations = network, simulations
        self.schedules = np.array([schedule(k, simulations) for k in range(ACTIONS + 1)])

    @torch.no_grad()
    def __call__(self, seen: np.ndarray, legal: np.ndarray, noise: np.ndarray) -> Searched:
        """Search from observations (B,OBSERVATION).

        Args:
            legal: (B,ACTIONS) bool; the model below the root knows no rules.
            noise: (B,ACTIONS), Gumbel's to explore, zeros to play the best.
        """
        games, nodes = len(seen), self.simulations + 1
        every = np.arange(games)
        state = self.network.represent(torch.from_numpy(seen))
        logits, value = self.network.predict(state)
        self.states = state.new_zeros(nodes, *state.shape)
        self.states[0] = state
        self.child = np.full((games, nodes, ACTIONS), -1)
        self.visits = np.zeros((games, nodes, ACTIONS))
        self.q = np.zeros((games, nodes, ACTIONS))
        self.reward = np.zeros((games, nodes, ACTIONS))
        self.logits = np.zeros((games, nodes, ACTIONS))
        self.value = np.zeros((games, nodes))
        self.logits[:, 0] = np.where(legal, logits.numpy(), -np.inf)
        self.value[:, 0] = value.numpy()
        choices = legal.sum(1)
        for n in range(self.simulations):
            score = noise + self._improved(every, np.zeros(games, int))
            wanted = self.schedules[choices, n][:, None]
            score = np.where(self.visits[:, 0] == wanted, score, -np.inf)
            self._simulate(n + 1, score.argmax(1))
        score = noise + self._improved(every, np.zeros(games, int))
        most = self.visits[:, 0].max(1, keepdims=True)
        action = np.where(self.visits[:, 0] == most, score, -np.inf).argmax(1)
        policy = _softmax(self._improved(every, np.zeros(games, int)))
        best = (policy * np.where(legal, self._completed(every, np.zeros(games, int)), 0)).sum(1)
        return Searched(action, policy, best)

    def _simulate(self, new: int, action: np.ndarray) -> None:
        """Walk from the root down by `action` first, add node `new` and its value to the path."""
        games = len(action)
        every = np.arange(games)
        node = np.zeros(games, int)
        path: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        walking = every
        while len(walking):
            if path:
                weight = _softmax(self._improved(walking, node[walking]))
                counts = self.visits[walking, node[walking]]
                taken = (weight - counts / (1 + counts.sum(1, keepdims=True))).argmax(1)
                action[walking] = taken
            path.append((walking, node[walking].copy(), action[walking].copy()))
            following = self.child[walking, node[walking], action[walking]]
            inner = following >= 0
            walking = walking[inner]
            node[walking] = following[inner]
        # Every game stops at a node and an action without a child.
        parent, last = node.copy(), action.copy()
        moved, reward = self.network.dynamics(self.states[parent, every], torch.from_numpy(last))
        logits, value = self.network.predict(moved)
        self.states[new] = moved
        self.child[every, parent, last] = new
        self.reward[every, parent, last] = reward.numpy()
        self.logits[:, new], self.value[:, new] = logits.numpy(), value.numpy()
        gained = value.numpy().astype(float)
        for those, at, chosen in reversed(path):
            gained[those] += self.reward[those, at, chosen]
            count = self.visits[those, at, chosen]
            self.q[those, at, chosen] += (gained[those] - self.q[those, at, chosen]) / (count + 1)
            self.visits[those, at, chosen] += 1

    def _completed(self, games: np.ndarray, node: np.ndarray) -> np.ndarray:
        """Values of actions (n,ACTIONS); of those never visited, a mix of what is known."""
        visits, q = self.visits[games, node], self.q[games, node]
        seen = visits > 0
        weight = np.where(seen, _softmax(self.logits[games, node]), 0)
        total = visits.sum(1)
        mean = (weight * q).sum(1) / np.maximum(weight.sum(1), 1e-12)
        mixed = (self.value[games, node] + total * mean) / (1 + total)
        return np.where(seen, q, mixed[:, None])

    def _improved(self, games: np.ndarray, node: np.ndarray) -> np.ndarray:
        """Logits of the improved policy (n,ACTIONS)."""
        most = self.visits[games, node].max(1, keepdims=True)
        return self.logits[games, node] + (_VISIT + most) * _SCALE * self._completed(games, node)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits - logits.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


class Agent:
    """A trained network that plays; `seen` holds digests of the programs it was trained on."""

    def __init__(self, network: Network, seen: frozenset[str] = frozenset()):
        self.network, self.seen = network.eval(), seen

    def place(
        self,
        program: Program,
        hardware: TwoLevel,
        *,
        episodes: int = 32,
        simulations: int = 16,
        seed: int = 0,
    ) -> Placement:
        """The best of `episodes` games, from one without noise to one with all of Gumbel's."""
        draw = np.random.default_rng(seed)
        games = [MallocGame(program, hardware) for _ in range(episodes)]
        search = Search(self.network, simulations)
        boldness = np.linspace(0, 1, episodes)
        for game in games:
            advance(game)
        while playing := [k for k, game in enumerate(games) if not game.done]:
            noise = draw.gumbel(size=(len(playing), ACTIONS)) * boldness[playing, None]
            found = search(*views([games[k] for k in playing]), noise)
            for k, action in zip(playing, found.action, strict=True):
                games[k].step(int(action))
                advance(games[k])
        best = min(games, key=lambda game: game.layout.total)
        return best.placement("muzero")


def advance(game: MallocGame) -> float:
    """Play on where there is one legal action; returns the rewards."""
    gained = 0.0
    while (legal := np.flatnonzero(game.legal())).size == 1:
        gained += game.step(int(legal[0]))[1]
    return gained


def digest(program: Program) -> str:
    """Names a program by its contents."""
    return hashlib.sha256(program.to_csv().encode()).hexdigest()


def views(games: Sequence[MallocGame]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([g.observation() for g in games]), np.stack([g.legal() for g in games])
