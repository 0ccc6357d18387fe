"""Digits as an event camera and as a line of sensors see them; three of ten are never trained on.

The mirror images of the seven others are seven more classes to train on: with seven alone the
projections learn too few directions.
"""

from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.weights.liquid import (
    ContrastiveHead,
    LiquidStateMachine,
    saccade_events,
    scanline_spikes,
)

NEURONS, SHARED, NOISE = 256, 64, 0.05
SPLITS, UNSEEN = 8, 3
STEPS, BATCH, LR = 300, 128, 1e-3
TRAIN = 1347


def probe(features: Tensor, y: Tensor) -> float:
    """Test accuracy of ridge regression on standardised features, trained on the first `TRAIN`."""
    x = ((features - features[:TRAIN].mean(0)) / (features[:TRAIN].std(0) + 1e-6)).double()
    x = F.pad(x, (0, 1), value=1.0)
    seen = x[:TRAIN]
    gram = seen.mT @ seen + 0.01 * TRAIN * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, seen.mT @ F.one_hot(y[:TRAIN]).to(x.dtype))
    return ((x[TRAIN:] @ weight).argmax(1) == y[TRAIN:]).double().mean().item()


def zero_shot(first: Tensor, second: Tensor, y: Tensor, split: int) -> float:
    """Accuracy on classes that training never saw, in either modality.

    One half of the samples is only seen by the camera, the other only by the line, so that pairs
    share their class alone. Rows beyond len(y) are mirror images, in the same order.
    """
    random = torch.Generator().manual_seed(split)
    torch.manual_seed(split)
    count = len(y)
    labels = torch.cat([y, y + 10])
    half = (torch.rand(count, generator=random) < 0.5).repeat(2)
    unseen = torch.isin(labels % 10, torch.randperm(10, generator=random)[:UNSEEN])
    cameras = (~unseen & half).nonzero().flatten()
    lines = (~unseen & ~half).nonzero().flatten()
    lines = lines[labels[lines].argsort()]
    sizes = labels[lines].bincount(minlength=20)
    starts = sizes.cumsum(0) - sizes
    head = ContrastiveHead(first.shape[1], second.shape[1], SHARED)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR)
    for _ in range(STEPS):
        one = cameras[torch.randint(len(cameras), (BATCH,), generator=random)]
        of = labels[one]
        two = lines[starts[of] + (torch.rand(BATCH, generator=random) * sizes[of]).long()]
        loss = head(first[one], second[two])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = torch.arange(2 * count) < count
    asked, known = unseen & half & plain, unseen & ~half & plain
    found = head.classify(first[asked], second[known], labels[known])
    return (found == labels[asked]).double().mean().item()


@check(
    "liquid",
    claim="features of a liquid kept as 16 bytes match raw events, and name unseen digits",
)
def run(seed: int) -> Result:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order].float().view(-1, 8, 8) / 16, y[order]
    both = torch.cat([x, x.flip(2)])
    events, spikes = saccade_events(both), scanline_spikes(both)
    channels = events.shape[2]

    def liquids(noise: float) -> tuple[LiquidStateMachine, LiquidStateMachine]:
        return (
            LiquidStateMachine(channels, NEURONS, 2 * seed, noise, gain=0.1),
            LiquidStateMachine(8, NEURONS, 2 * seed + 1, noise, gain=0.5, gamma=0.98),
        )

    def scores(first: Tensor, second: Tensor) -> tuple[float, float]:
        splits = range(seed * SPLITS, (seed + 1) * SPLITS)
        return probe(first[: len(y)], y), mean(zero_shot(first, second, y, s) for s in splits)

    camera, line = liquids(0.0)
    features = camera(events)[0], line(spikes)[0]
    accuracy, unseen = scores(*features)
    torch.manual_seed(seed)
    noisy_camera, noisy_line = liquids(NOISE)
    noisy_accuracy, noisy_unseen = scores(noisy_camera(events)[0], noisy_line(spikes)[0])
    raw_accuracy, raw_unseen = scores(events.float().sum(1), spikes.float().sum(1))
    rates = camera.firing_rate(events[:100]), line.firing_rate(spikes[:100])
    repeated = liquids(0.0)[0](events)[0]
    head = ContrastiveHead(NEURONS, NEURONS, SHARED)
    trained = sum(p.nbytes for p in head.parameters())
    measured = {
        "accuracy": accuracy,
        "accuracy, 5% noise": noisy_accuracy,
        "unseen": unseen,
        "unseen, 5% noise": noisy_unseen,
        "firing rate of camera": rates[0],
        "firing rate of line": rates[1],
        "bytes of a liquid": sum(b.nbytes for b in camera.buffers()),
        "bytes trained": trained,
    }
    baseline = {
        "accuracy of summed events": raw_accuracy,
        "unseen of summed events": raw_unseen,
        "unseen by chance": 1 / UNSEEN,
        # Input and recurrent weights of both encoders, in fp32.
        "bytes of trained encoders": 4 * NEURONS * (channels + 8 + 2 * NEURONS),
    }
    passed = (
        accuracy >= max(0.9, raw_accuracy - 0.03)
        and unseen >= 0.6
        and noisy_accuracy >= accuracy - 0.03
        and noisy_unseen >= unseen - 0.03
        and all(0.05 <= rate <= 0.2 for rate in rates)
        and trained == 4 * 2 * NEURONS * SHARED
        and not any(True for liquid in (camera, line) for _ in liquid.parameters())
        and torch.equal(repeated, features[0])
    )
    return Result(
        measured,
        baseline,
        "accuracy >= 0.9 and >= summed events - 0.03; unseen >= 0.6, the mean over 8 choices of "
        "three classes; 5% conductance noise costs <= 0.03 of either; firing rates in [0.05, 0.2]; "
        "only the head trains",
        passed,
    )
