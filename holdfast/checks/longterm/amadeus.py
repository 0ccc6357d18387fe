"""Two simulated mice that chase, freeze and visit a corner; behaviours defined long ago."""

import numpy as np

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.longterm.policies.amadeus import Analyst, Definition, SymbolMemory
from holdfast.longterm.tools.pose import Events, Pose, events

FPS, SIZE, ROUNDS = 30, 30.0, 8
CORNER = (600.0, 450.0, 750.0, 550.0)
LEFT, RIGHT = ((50, 50), (350, 550)), ((450, 50), (750, 400))
SYMBOLS, TURNS, WINDOW = 20, 500, 600

SENTENCES = {
    "chase": "mouse 0 chases mouse 1",
    "freeze": "mouse 0 freezes for at least 1 seconds",
    "visit": "mouse 1 is in the corner",
}


class _Mouse:
    """A point that walks to targets in its own part of the arena."""

    def __init__(self, draw: np.random.Generator, home):
        self.draw, self.home = draw, home
        self.at = draw.uniform(*home)
        self.heading, self.target = 0.0, draw.uniform(*home)

    def walk(self, speed: float, target=None) -> None:
        goal = self.target if target is None else target
        step = goal - self.at
        far = float(np.hypot(*step))
        if far > 1e-9:
            # A body turns in some frames, not at once.
            off = (np.arctan2(step[1], step[0]) - self.heading + np.pi) % (2 * np.pi) - np.pi
            self.heading += np.clip(off, -0.35, 0.35)
            self.at = self.at + step / far * min(speed / FPS, far)
        if target is None and far < 2 * speed / FPS:
            self.target = self.draw.uniform(*self.home)


def simulate(seed: int) -> tuple[Pose, dict[str, Events]]:
    """Tracks of three keypoints with noise, and what was planted in them."""
    draw = np.random.default_rng(seed)
    mice = [_Mouse(draw, LEFT), _Mouse(draw, RIGHT)]
    track: list[list] = []
    planted: dict[str, list[bool]] = {"chase": [], "freeze": []}

    def frame(**now: bool) -> None:
        track.append([(*m.at, m.heading) for m in mice])
        for name, found in planted.items():
            found.append(now.get(name, False))

    def wander(seconds: float) -> None:
        for _ in range(round(seconds * FPS)):
            for mouse in mice:
                mouse.walk(70)
            frame()

    def chase() -> None:
        while np.hypot(*(mice[1].at - mice[0].at)) > 2 * SIZE:
            mice[0].walk(300, mice[1].at)
            frame()
        for _ in range(round(draw.uniform(2, 4) * FPS)):
            mice[1].walk(150)
            near = np.hypot(*(mice[1].at - mice[0].at)) < 1.3 * SIZE
            mice[0].walk(90 if near else 170, mice[1].at)
            frame(chase=True)

    def freeze() -> None:
        for _ in range(round(draw.uniform(2, 4) * FPS)):
            mice[1].walk(70)
            frame(freeze=True)

    def visit() -> None:
        goal = draw.uniform((620, 470), (730, 530))
        for _ in range(round(4 * FPS)):
            mice[0].walk(70)
            mice[1].walk(150, goal)
            frame()

    for _ in range(ROUNDS):
        for act in draw.permutation(np.array([chase, freeze, visit], dtype=object)):
            wander(draw.uniform(3, 6))
            act()
    wander(3)
    state = np.array(track)  # (T, mice, x y heading)
    along = np.stack([np.cos(state[..., 2]), np.sin(state[..., 2])], -1)
    points = np.stack([state[..., :2] + k * SIZE / 2 * along for k in (1, 0, -1)], 2)
    x, y = state[:, 1, 0], state[:, 1, 1]
    visits = (x > CORNER[0]) & (x < CORNER[2]) & (y > CORNER[1]) & (y < CORNER[3])
    truth = {name: events(np.array(found)) for name, found in planted.items()}
    pose = Pose(points + draw.normal(0, 0.5, points.shape), FPS, regions={"corner": CORNER})
    return pose, truth | {"visit": events(visits)}


def f1(found: Events, truth: Events) -> float:
    """Of events; one is found if it shares at least half of the frames of both together."""
    left, hits = [tuple(row) for row in found.frames], 0
    for start, stop in truth.frames:
        for one in left:
            shared = min(stop, one[1]) - max(start, one[0])
            if shared >= 0.5 * (max(stop, one[1]) - min(start, one[0])):
                left.remove(one)
                hits += 1
                break
    return 2 * hits / max(len(found) + len(truth), 1)


def lost(long_term: bool) -> float:
    """Share of symbols, defined `TURNS` turns ago, whose definition is not what it was."""
    memory = SymbolMemory(WINDOW)
    texts = {f"act {k}": f"define <|act {k}|> as mouse {k} freezes — été" for k in range(SYMBOLS)}
    for name, text in texts.items():
        memory.read(text)
        if long_term:
            memory.define(Definition(name, text))
    for turn in range(TURNS):
        memory.read(f"turn {turn}: how often does mouse {turn % 3} turn around?")
        assert memory.used == sum(len(m.encode()) for m in memory.window) <= WINDOW
    wrong = 0
    for name, text in texts.items():
        try:
            memory.read(f"when is <|{name}|>?")
        except UsageError:
            wrong += 1
            continue
        wrong += not any(text.encode() in message.encode() for message in memory.window)
    return wrong / SYMBOLS


@check(
    "amadeus",
    claim="from one sentence each, finds planted chases, freezes and visits of two simulated mice "
    "with an event F1 of 0.95 or more; definitions older than the window are never lost",
)
def run(seed: int) -> Result:
    scores: dict[str, list[float]] = {name: [] for name in SENTENCES}
    base: dict[str, list[float]] = {name: [] for name in SENTENCES}
    for one in range(3 * seed, 3 * seed + 3):
        pose, truth = simulate(one)
        analyst = Analyst(pose)
        near = events(pose.distance(0, 1) < 3 * SIZE)
        slow = events(pose.speed(0) < SIZE / 5)
        plain = {"chase": near, "freeze": slow, "visit": events(pose.inside(1, "corner"))}
        for name, sentence in SENTENCES.items():
            analyst.ask(f"define <|{name}|> as {sentence}")
            scores[name].append(f1(analyst.ask(f"when is <|{name}|>").events, truth[name]))
            base[name].append(f1(plain[name], truth[name]))
    ours = {f"{name}_f1": float(np.mean(values)) for name, values in scores.items()}
    ours["lost_definitions"] = lost(True)
    theirs = {f"{name}_f1": float(np.mean(values)) for name, values in base.items()}
    theirs["lost_definitions"] = lost(False)
    return Result(
        measured=ours | {"lowest_f1": min(min(v) for v in scores.values())},
        baseline=theirs,
        threshold="each mean F1 >= 0.95; no definition lost, without symbols all of them",
        passed=all(ours[f"{name}_f1"] >= 0.95 for name in SENTENCES)
        and ours["lost_definitions"] == 0
        and theirs["lost_definitions"] == 1,
    )
