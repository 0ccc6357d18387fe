"""Reversible 3D U-Net (200): volumes whose activations do not grow with the blocks per level.

Keeps    per level the output of each reversible sequence, one going down and one coming up, which
         the transitions keep anyway; the working set of one mobile inverted bottleneck at a time.
Form     the dtype of the input.
Bytes    saved, with w_i = width * 2^i channels and V_i = V / 8^i voxels at level i:
         b*B*(2*sum(w_i*V_i for i < depth) + w_depth*V_depth), besides the caller's input;
         + 32*b per half of each sequence's input.
Source   Pendse, Thangarasa, Chiley, Holmdahl, Hestness, DeCoste, "Memory Efficient 3D U-Net with
         Reversible Mobile Inverted Bottlenecks for Brain Tumor Segmentation", 2020.
Departs  expansion 4, GroupNorm and ReLU6, which the paper leaves open; skips are added; 1^3
         convolutions run before the upsampling, with which they commute, on an eighth of the
         voxels.

A model of its own, so it has no `METHOD`: `plan_volume` answers what `holdfast fit` would.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import DoesNotFit, UsageError
from holdfast.meter import Meter, predict
from holdfast.training.reversible import MultiSplit, ReversibleSequence
from holdfast.units import format_bytes, parse_bytes

# The nested regions that are scored, as labels of tumour tissue: necrotic core 1, oedema 2,
# enhancing 4, which is 3 in data sets since 2023.
REGIONS = {"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (3, 4)}


def _norm(channels: int) -> nn.GroupNorm:
    """Up to 8 groups of 4 or more channels.

    A group of one channel would divide an empty crop's constant by nearly nothing, and rounding
    that is amplified so cannot be rebuilt.
    """
    return nn.GroupNorm(math.gcd(8, channels, max(1, channels // 4)), channels)


class MBConv3d(nn.Sequential):
    """Mobile inverted bottleneck: (B,c,D,H,W) -> the same, `expansion` times as wide inside."""

    def __init__(self, channels: int, expansion: int = 4):
        inner = expansion * channels
        super().__init__(
            nn.Conv3d(channels, inner, 1, bias=False),
            _norm(inner),
            nn.ReLU6(inplace=True),
            nn.Conv3d(inner, inner, 3, padding=1, groups=inner, bias=False),
            _norm(inner),
            nn.ReLU6(inplace=True),
            nn.Conv3d(inner, channels, 1, bias=False),
            _norm(channels),
        )


class RevMBConv3d(ReversibleSequence):
    """`blocks` times y1 = x1 + F(x2), y2 = x2 + G(y1) on the halves of the channels."""

    def __init__(self, channels: int, blocks: int = 1, *, expansion: int = 4):
        if channels % 2:
            raise UsageError(
                f"{channels} channels do not split into two halves; use {channels + 1}"
            )
        pairs = (
            nn.ModuleList(MBConv3d(channels // 2, expansion) for _ in range(2))
            for _ in range(blocks)
        )
        super().__init__(pairs, MultiSplit(2, dim=1))


class RevUNet3d(nn.Module):
    """U-Net for volumes: (B,in,D,H,W) -> logits (B,out,D,H,W); sizes are multiples of 2^depth.

    Args:
        width: channels at full resolution, even; doubled by each of the `depth` halvings.
        blocks: reversible blocks per sequence.
        reversible: False keeps every activation; the weights and values are the same.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        *,
        width: int = 24,
        depth: int = 3,
        blocks: int = 2,
        expansion: int = 4,
        reversible: bool = True,
    ):
        super().__init__()
        if depth < 1:
            raise UsageError(f"depth {depth} halves nothing; use 1 or more")
        wide = [width * 2**i for i in range(depth + 1)]

        def sequences(channels: Iterable[int]) -> nn.ModuleList:
            return nn.ModuleList(RevMBConv3d(c, blocks, expansion=expansion) for c in channels)

        self.stem = nn.Conv3d(in_channels, width, 3, padding=1)
        self.encoder, self.decoder = sequences(wide), sequences(wide[:-1])
        self.down = nn.ModuleList(nn.Conv3d(c, 2 * c, 3, stride=2, padding=1) for c in wide[:-1])
        self.up = nn.ModuleList(nn.Conv3d(2 * c, c, 1) for c in wide[:-1])
        self.head = nn.Conv3d(width, out_channels, 1)
        self.depth = depth
        self.reversible = reversible

    @property
    def reversible(self) -> bool:
        return self._reversible

    @reversible.setter
    def reversible(self, value: bool) -> None:
        self._reversible = value
        for sequence in (*self.encoder, *self.decoder):
            sequence.reversible = value

    def forward(self, x: Tensor) -> Tensor:
        step = 2**self.depth
        if x.dim() != 5 or any(size % step for size in x.shape[2:]):
            padded = tuple(-(-size // step) * step for size in x.shape[2:])
            raise UsageError(
                f"a volume of {tuple(x.shape)} cannot be halved {self.depth} times; expected "
                f"(B,C,D,H,W) with sizes that are multiples of {step}: pad or crop it, for example "
                f"to {padded}"
            )
        x, skips = self.stem(x), []
        for sequence, down in zip(self.encoder, self.down, strict=False):
            x = sequence(x)
            skips.append(x)
            x = down(x)
        x = self.encoder[-1](x)
        for sequence, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = F.interpolate(up(x), scale_factor=2, mode="trilinear") + skips.pop()
            x = sequence(x)
        return self.head(x)


def regions(labels: Tensor) -> Tensor:
    """Overlapping regions: tissue labels (B,D,H,W) -> (B,3,D,H,W) fp32 of 0 and 1."""
    masks = [torch.isin(labels, torch.tensor(of, device=labels.device)) for of in REGIONS.values()]
    return torch.stack(masks, 1).float()


def dice_bce(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean soft Dice of each volume and region, + binary cross-entropy: a scalar."""
    p = logits.sigmoid()
    overlap = (p * target).sum((2, 3, 4))
    total = p.sum((2, 3, 4)) + target.sum((2, 3, 4))
    # Adding 1 gives an empty region that is predicted empty a Dice of 1.
    soft = (2 * overlap + 1) / (total + 1)
    return 1 - soft.mean() + F.binary_cross_entropy_with_logits(logits, target)


@torch.no_grad()
def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of each region over a batch, cut at probability 1/2: (B,R,D,H,W) -> (R,)."""
    found = (logits > 0).to(target.dtype)
    overlap = (found * target).sum((0, 2, 3, 4))
    return (2 * overlap + 1) / (found.sum((0, 2, 3, 4)) + target.sum((0, 2, 3, 4)) + 1)


@dataclass(frozen=True)
class VolumePlan:
    """What fits: sizes of net and volume, and what a training step holds at its peak."""

    crop: int
    width: int
    depth: int
    blocks: int
    peak: int
    at_peak: dict[str, int]


def predict_step(build: Callable[[], RevUNet3d], crop: int, batch: int = 1) -> Meter:
    """Bytes of one step with Adam on fp32 cubes of side `crop`, without allocating any."""

    def pieces():
        net = build()
        x = torch.zeros(batch, net.stem.in_channels, crop, crop, crop)
        target = torch.zeros(batch, net.head.out_channels, crop, crop, crop)
        return net, torch.optim.Adam(net.parameters()), (x, target)

    def step(net, optimizer, inputs):
        dice_bce(net(inputs[0]), inputs[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return predict(pieces, step)


def plan_volume(
    budget: int | str,
    vary: str = "crop",
    *,
    crop: int = 128,
    width: int = 24,
    depth: int = 3,
    blocks: int = 2,
    batch: int = 1,
    reversible: bool = True,
    margin: float = 0.2,
) -> VolumePlan:
    """The largest `crop`, `width` or `depth` whose training step fits `budget` bytes.

    Args:
        vary: which of the three is sought; the others stay as given, and its own value is the
            first that is tried.
        margin: share of the budget left for the workspaces of convolutions, which no prediction
            sees: on a CPU they added up to 18 % to the steps that were measured.

    Raises:
        UsageError: `vary` is none of the three, or sizes that no net has.
        DoesNotFit: not even the smallest fits.
    """
    sizes = {"crop": crop, "width": width, "depth": depth}
    # Unit, and the power with which bytes grow: a guess that predictions then correct.
    growth = {"crop": (2**depth, 3.0), "width": (2, 1.0), "depth": (1, math.inf)}
    if vary not in growth:
        raise UsageError(f"vary={vary!r} is not a size; use one of {', '.join(growth)}")
    unit, power = growth[vary]
    # A cube cannot be halved more often than its side is even.
    limit = (crop & -crop).bit_length() - 1 if vary == "depth" else math.inf
    whole = parse_bytes(budget)
    usable = int(whole * (1 - margin))

    def plan(n: int) -> VolumePlan:
        chosen = sizes | {vary: n * unit}
        side = chosen.pop("crop")
        meter = predict_step(
            lambda: RevUNet3d(**chosen, blocks=blocks, reversible=reversible), side, batch
        )
        held = {category: held for category, held in meter.at_peak.items() if held}
        return VolumePlan(side, **chosen, blocks=blocks, peak=meter.peak, at_peak=held)

    plans: dict[int, VolumePlan] = {}
    fits, over, n = 0, limit + 1, max(1, min(sizes[vary] // unit, limit))
    while over - fits > 1:
        plans[n] = found = plan(n)
        if found.peak <= usable:
            fits = n
        else:
            over = n
        guess = int(n * (usable / found.peak) ** (1 / power))
        n = int(min(max(guess, fits + 1), over - 1))
    if not fits:
        least = plans[1].peak
        raise DoesNotFit(
            f"{vary} {unit} needs {format_bytes(least)}, and of {format_bytes(whole)} the margin "
            f"leaves {format_bytes(usable)}; raise the budget to "
            f"{format_bytes(math.ceil(least / (1 - margin)))} or reduce another size"
        )
    return plans[fits]
