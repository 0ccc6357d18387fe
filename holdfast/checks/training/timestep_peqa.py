"""Timestep PEQA: a 4-bit digit painter learns a slanted 7 better with scales for each interval.

A small class-conditional DDPM of 8x8 digits is trained, rounded to 4 bits and then personalised
with five images by training scales alone, as in DreamBooth: a rare token beside the class, and
samples of the rounded model that keep the class what it was.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.training.adapters.timestep_peqa import TimestepScales, quantize_denoiser

T, SUBJECT, SHEAR = 100, 7, 0.6
BASE_STEPS, STEPS, LR, PRIOR = 1000, 120, 1e-2, 1.0
METHODS = {
    "one_set": ([0, T], None),
    "s1_noisy": ([0, T // 2, T], [1]),
    "s1_clean": ([0, T // 2, T], [0]),
    "s2_2": ([0, T // 2, T], None),
    "s2_4": ([0, T // 4, T // 2, 3 * T // 4, T], None),
}


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) in -1..1 and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("this check reads digits; pip install scikit-learn") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def sheared(images: Tensor) -> Tensor:
    matrix = torch.tensor([[1.0, SHEAR, 0], [0, 1, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int = 64):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Painter(nn.Module):
    """Noise in images (B, 1, 8, 8) at timesteps t (B,), given classes (B,) and the rare token."""

    def __init__(self, width: int = 16, embedding: int = 64):
        super().__init__()
        self.classes = nn.Embedding(10, embedding)
        self.register_buffer("rare", torch.randn(embedding))
        self.embed = nn.Sequential(nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, 64))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = Residual(width, width)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = Residual(2 * width, 2 * width)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up = Residual(2 * width, width)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t, label, rare):
        rates = torch.exp(torch.arange(32) * (-math.log(1000) / 31))
        angles = t[:, None] * rates
        emb = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        emb = F.silu(emb + self.classes(label) + rare[:, None] * self.rare)
        fine = self.down(self.enter(x), emb)
        coarse = self.middle(self.shrink(fine), emb)
        wide = self.grow(F.interpolate(coarse, scale_factor=2))
        return self.leave(self.up(torch.cat([wide, fine], 1), emb))


_STEPS = torch.arange(T + 1) / T
_KEPT = torch.cos((_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
ALPHA = (_KEPT[1:] / _KEPT[:-1]).clamp(min=0.01)
BAR = ALPHA.cumprod(0)


def noised(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    bar = BAR[t][:, None, None, None]
    return bar.sqrt() * x + (1 - bar).sqrt() * noise


def error(model: nn.Module, x: Tensor, t: Tensor, noise: Tensor, label: Tensor, rare: Tensor):
    return F.mse_loss(model(noised(x, t, noise), t, label, rare), noise)


@torch.no_grad()
def sample(model: nn.Module, label: Tensor, rare: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(label), 1, 8, 8, generator=generator)
    for step in reversed(range(T)):
        t = torch.full((len(label),), step)
        eps = model(x, t, label, rare)
        clean = ((x - (1 - BAR[step]).sqrt() * eps) / BAR[step].sqrt()).clamp(-1, 1)
        before = BAR[step - 1] if step else torch.tensor(1.0)
        mean = before.sqrt() * (1 - ALPHA[step]) * clean + ALPHA[step].sqrt() * (1 - before) * x
        x = mean / (1 - BAR[step])
        if step:
            spread = ((1 - before) / (1 - BAR[step]) * (1 - ALPHA[step])).sqrt()
            x = x + spread * torch.randn(x.shape, generator=generator)
    return x


def painter(images: Tensor, labels: Tensor) -> Painter:
    """Trained on all digits; it has met the rare token, which means nothing yet."""
    model = Painter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=BASE_STEPS)
    for _ in range(BASE_STEPS):
        at = torch.randint(len(images), (64,))
        x, t = images[at], torch.randint(T, (64,))
        rare = (torch.rand(64) < 0.3).float()
        optimizer.zero_grad()
        error(model, x, t, torch.randn_like(x), labels[at], rare).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def classifier(images: Tensor, labels: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@dataclass
class World:
    rounded: nn.Module
    judge: nn.Module
    subject: Tensor
    unseen: Tensor
    prior: Tensor
    seed: int

    def personalised(self, edges: list[int], trained: list[int] | None) -> nn.Module:
        """The rounded model after `STEPS` on the five images and the prior."""
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.rounded)
        scales = TimestepScales(model, edges, trained=trained)
        own = [p for p in scales.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(own, lr=LR)
        label = torch.full((80,), SUBJECT)
        rare = (torch.arange(80) < 40).float()
        for _ in range(STEPS):
            x = torch.cat([self.subject.repeat(8, 1, 1, 1), self.prior[torch.randperm(200)[:40]]])
            t, noise = torch.randint(T, (80,)), torch.randn_like(x)
            guess = model(noised(x, t, noise), t, label, rare)
            off = (guess - noise).square().mean((1, 2, 3))
            optimizer.zero_grad()
            (off[:40].mean() + PRIOR * off[40:].mean()).backward()
            optimizer.step()
        return model

    @torch.no_grad()
    def subject_error(self, model: nn.Module) -> float:
        """Mean error of the guessed noise on slanted 7s that no training saw."""
        generator = torch.Generator().manual_seed(11)
        x = self.unseen.repeat(10, 1, 1, 1)
        t = torch.arange(len(x)) % T
        noise = torch.randn(x.shape, generator=generator)
        label, rare = torch.full((len(x),), SUBJECT), torch.ones(len(x))
        return error(model, x, t, noise, label, rare).item()

    def fidelity(self, model: nn.Module) -> float:
        """How many samples of the other classes the judge takes for what they should be."""
        others = torch.tensor([c for c in range(10) if c != SUBJECT]).repeat_interleave(20)
        images = sample(model, others, torch.zeros(len(others)), seed=12)
        return (self.judge(images).argmax(1) == others).float().mean().item()


def world(seed: int) -> World:
    torch.manual_seed(seed)
    images, labels = digits()
    model = painter(images, labels)
    judge = classifier(images, labels)
    slanted = sheared(images[labels == SUBJECT])
    slanted = slanted[torch.randperm(len(slanted))]
    rounded = quantize_denoiser(model, 4, exclude=["enter", "leave"])
    # From the rounded model before any training, or the prior would follow what it should hold.
    prior = sample(rounded, torch.full((200,), SUBJECT), torch.zeros(200), seed=13)
    return World(rounded, judge, slanted[:5], slanted[5:], prior, seed)


@check(
    "timestep_peqa", claim="sets per interval learn a subject better than one, and forget no more"
)
def run(seed: int) -> Result:
    it = world(seed)
    start = {"subject_error": it.subject_error(it.rounded), "fidelity": it.fidelity(it.rounded)}
    found: dict[str, dict[str, float]] = {}
    for name, (edges, trained) in METHODS.items():
        model = it.personalised(edges, trained)
        found[name] = {"subject_error": it.subject_error(model), "fidelity": it.fidelity(model)}
    one, sets = found["one_set"], (found["s2_2"], found["s2_4"])

    def named(*methods: str) -> dict[str, float]:
        return {f"{m}_{what}": value for m in methods for what, value in found[m].items()}

    found["rounded"] = start
    return Result(
        measured=named("s2_2", "s2_4", "s1_noisy", "s1_clean"),
        baseline=named("one_set", "rounded"),
        threshold="s2_2 and s2_4: subject_error <= one_set, fidelity >= one_set - 0.02; "
        "one_set_subject_error <= 0.9 x rounded",
        passed=one["subject_error"] <= 0.9 * start["subject_error"]
        and all(f["subject_error"] <= one["subject_error"] for f in sets)
        # Of 180 samples: at a rate of 4e-3 a set lost two more of them than one set did.
        and all(f["fidelity"] >= one["fidelity"] - 0.02 for f in sets),
    )
