"""Rooflines: the least time that computing, each level of memory and each network allow.

A `Machine` is what all predictions of a whole device reduce to: processors that compute at a peak
rate, levels of memory from near to far, networks from near to far. A `Hardware` file is a machine
of one level; a layered file (`holdfast.plan.layered`) may have any number.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from holdfast.errors import DoesNotFit, UsageError, unknown
from holdfast.plan.hardware import Hardware
from holdfast.plan.ops import Gemm, Op
from holdfast.units import format_bytes

TOPOLOGIES = ("ring", "torus", "switch")
# Nearest first: what is touched most often per byte of its size.
_ORDER = (
    "temporary", "inputs", "buffers", "activations", "cache", "parameters", "gradients",
    "optimizer", "knowledge",
)  # fmt: skip


def gemm_intensity(m: int, k: int, n: int, itemsize: int) -> float:
    """FLOPs per byte of an m x k by k x n product that reads and writes each matrix once."""
    return 2 * m * k * n / (itemsize * (m * k + k * n + m * n))


def attainable(peak: float, bandwidth: float, intensity: float) -> float:
    """FLOP/s at an intensity in FLOPs per byte: the roofline itself."""
    return min(peak, intensity * bandwidth)


@functools.lru_cache(maxsize=4096)  # plans and sweeps ask for the same products again
def gemm_traffic(
    gemm: Gemm, capacity: float, moving: tuple[bool, bool, bool] = (True, True, True)
) -> int:
    """Least bytes that a product moves between a memory and a store of `capacity` bytes inside it.

    A tile of one matrix stays in the store while rows and columns of the others stream past it:
    of the result (written once), or of either factor (the result is then read and written again for
    each slice of k). All tiles and all three choices are tried.

    Args:
        moving: which of left, right and result lie in that memory; others are nearer already.

    Raises:
        UsageError: the store does not hold three elements.
    """
    m, k, n, held = gemm.m, gemm.k, gemm.n, int(min(capacity / gemm.itemsize, 2**62))
    if held < 3:
        raise UsageError(
            f"a store of {capacity} bytes does not hold one element of each of three matrices; "
            f"it needs {3 * gemm.itemsize} bytes"
        )
    left, right, result = (m * k * moving[0], k * n * moving[1], m * n * moving[2])

    def best(rows: int, columns: int, once: int, by_columns: int, by_rows: int) -> int:
        # by_columns is moved once for each tile across the columns, by_rows for each down the rows.
        tall = _tiles(rows)
        tall = tall[2 * tall + 1 <= held]
        wide = np.minimum((held - tall) // (tall + 1), columns)
        moved = once + by_columns * -(-columns // wide) + by_rows * -(-rows // tall)
        return int(moved.min())

    # Where k is the tiled side, the result is read too, but not the first time.
    again = 2 * result
    least = min(
        best(m, n, result, left, right),
        best(k, n, right - result, left, again),
        best(m, k, left - result, again, right),
    )
    return gemm.batch * gemm.itemsize * least


def _tiles(size: int) -> np.ndarray:
    """Every tile that is the shortest for its number of tiles: ceil(size / j), distinct."""
    root = math.isqrt(size)
    few = -(-size // np.arange(1, root + 1, dtype=np.int64))
    return np.unique(np.concatenate([few, np.arange(1, root + 2, dtype=np.int64)]).clip(max=size))


@dataclass(frozen=True)
class Level:
    """One memory of a processor, with what one processor gets of it; energies before cooling."""

    name: str
    capacity: float
    bandwidth: float
    latency: float = 0.0
    efficiency: float = 1.0
    joules_per_byte: float | None = None
    cooling: float = 1.0

    def seconds(self, nbytes: float) -> float:
        return self.latency + nbytes / (self.efficiency * self.bandwidth) if nbytes else 0.0


@dataclass(frozen=True)
class Network:
    """What joins `size` processors, or groups of them; bandwidth is one processor's, one way."""

    name: str
    size: int
    topology: str
    bandwidth: float
    latency: float
    joules_per_byte: float | None = None
    cooling: float = 1.0

    def all_reduce_seconds(self, nbytes: float, members: int) -> float:
        """Reduce-scatter and all-gather of `nbytes` on each of `members`, steps in turn.

        A ring takes 2(n-1) steps; a torus one ring for each of two sides; a switch halves and
        doubles in 2 log2 n steps. Each sends 2(n-1)/n of the bytes.
        """
        if members == 1:
            return 0.0
        if self.topology == "ring":
            steps = members - 1
        elif self.topology == "torus":
            side = next(d for d in range(math.isqrt(members), 0, -1) if members % d == 0)
            steps = side - 1 + members // side - 1
        elif self.topology == "switch":
            steps = math.ceil(math.log2(members))
        else:
            raise unknown("topology", self.topology, TOPOLOGIES)
        sent = 2 * (members - 1) / members * nbytes
        return 2 * steps * self.latency + sent / self.bandwidth


@dataclass(frozen=True)
class Cost:
    """Seconds and wall-plug joules of work; `parts` are seconds by resource before overlapping.

    `bound` shares out `seconds` among the resources that each operation waited for.
    """

    seconds: float = 0.0
    joules: float | None = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    bound: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        alone = self.joules is None or other.joules is None
        return Cost(
            self.seconds + other.seconds,
            None if alone else self.joules + other.joules,  # type: ignore[operator]
            _summed(self.parts, other.parts),
            _summed(self.bound, other.bound),
        )

    def __mul__(self, times: float) -> "Cost":
        return Cost(
            self.seconds * times,
            None if self.joules is None else self.joules * times,
            {name: value * times for name, value in self.parts.items()},
            {name: value * times for name, value in self.bound.items()},
        )

    @property
    def bottleneck(self) -> str:
        """The resource that most of the time is spent waiting for."""
        return max(self.bound, key=lambda name: self.bound[name])


def _summed(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + two.get(name, 0.0) for name in (*one, *two)}


@dataclass(frozen=True)
class Machine:
    """Processors with a hierarchical roofline each, and the networks between them.

    Args:
        peak: dtype name -> FLOP/s of one processor, a multiply-add counting as 2.
        levels: near to far; what a level holds flows through all nearer ones.
        store: bytes of operands beside the arithmetic units, inside the nearest level; infinite
            where bandwidths are those that real kernels see, caches included.
        networks: near to far; their sizes multiply to `processors`.
        illustrative: no figure in seconds or joules may be quoted.
    """

    name: str
    peak: Mapping[str, float]
    levels: tuple[Level, ...]
    efficiency: float = 1.0
    launch: float = 0.0
    store: float = math.inf
    joules_per_mac: Mapping[str, float] | None = None
    cooling: float = 1.0
    networks: tuple[Network, ...] = ()
    illustrative: bool = False

    @classmethod
    def from_hardware(cls, hardware: Hardware, devices: int | None = None) -> "Machine":
        """One level; `devices` like the first, by default as many as the file lists.

        They are joined in a ring by their own link, or else through the host.
        """
        device, count = hardware.device, devices or len(hardware.devices)
        level = Level("memory", device.memory, device.bandwidth, 0.0, device.bandwidth_efficiency)
        networks: tuple[Network, ...] = ()
        if count > 1:
            bandwidth, latency = device_link(hardware)
            networks = (Network("links", count, "ring", bandwidth, latency),)
        return cls(
            hardware.name,
            device.flops,
            (level,),
            device.compute_efficiency,
            device.launch_seconds,
            networks=networks,
        )

    @property
    def processors(self) -> int:
        return math.prod(network.size for network in self.networks)

    def homes(self, resident: Mapping[str, int]) -> dict[str, int]:
        """The level that holds each category of `resident` bytes: the nearest with room.

        Raises:
            DoesNotFit: no level has room for one of them.
        """
        free = [level.capacity for level in self.levels]
        found = {}
        for category in sorted(resident, key=_ORDER.index):
            nbytes = resident[category]
            at = next((i for i, room in enumerate(free) if nbytes <= room), None)
            if at is None:
                rooms = ", ".join(
                    f"{level.name} {format_bytes(room)}"
                    for level, room in zip(self.levels, free, strict=True)
                )
                raise DoesNotFit(
                    f"{category} of {format_bytes(nbytes)} fits no level of {self.name}: free are "
                    f"{rooms}; use a smaller batch or model, or more processors"
                )
            free[at] -= nbytes
            found[category] = at
        return found

    def cost(self, op: Op, homes: Mapping[str, int] | None = None) -> Cost:
        """One occurrence of an operation on one processor; without `homes` all lies far away.

        Raises:
            UsageError: no rate for the operation's dtype.
        """
        far = len(self.levels) - 1
        homes = homes or {}
        parts = {"compute": op.flops / self.rate(op.dtype) if op.flops else 0.0}
        joules = self._mac_joules(op)
        for i, level in enumerate(self.levels):
            inside = self.levels[i - 1].capacity if i else self.store
            moved = sum(n for category, n in op.traffic if homes.get(category, far) >= i)
            if op.gemm is not None and inside < math.inf:
                lies = tuple(homes.get(category, far) >= i for category in op.gemm.categories)
                moved += gemm_traffic(op.gemm, inside, lies) - _once(op.gemm, lies)  # type: ignore[arg-type]
            parts[level.name] = level.seconds(moved)
            if level.joules_per_byte is None:
                joules = None
            elif joules is not None:
                joules += moved * level.joules_per_byte * level.cooling
        longest = max(parts, key=lambda name: parts[name])
        seconds = parts[longest] + self.launch
        bound = {longest: parts[longest]}
        if self.launch:
            parts["launch"] = bound["launch"] = self.launch
        return Cost(seconds, joules, parts, bound)

    def rate(self, dtype: str) -> float:
        """FLOP/s that one processor reaches.

        Raises:
            UsageError: none is known for `dtype`.
        """
        if dtype not in self.peak:
            raise UsageError(
                f"hardware {self.name} has no rate for {dtype}, only for {', '.join(self.peak)}; "
                "add it to the file, or choose a dtype that is there"
            )
        return self.efficiency * self.peak[dtype]

    def _mac_joules(self, op: Op) -> float | None:
        if self.joules_per_mac is None:
            return None
        return op.flops / 2 * self.joules_per_mac[op.dtype] * self.cooling if op.flops else 0.0

    def all_reduce(self, nbytes: float, members: int, inside: int = 1) -> Cost:
        """Sum `nbytes` over `members` processors, each the first of a group of `inside` others.

        Groups fill the nearest network first; each network works on the share that the nearer ones
        left to one processor.

        Raises:
            UsageError: more processors than the machine has, or a number that splits a network.
        """
        total, left, share = Cost(joules=0.0), members, nbytes
        for network in self.networks:
            used = math.gcd(inside, network.size)
            inside //= used
            here = math.gcd(left, network.size // used)
            if here > 1:
                seconds = network.all_reduce_seconds(share, here)
                joules = None
                if network.joules_per_byte is not None:
                    sent = 2 * (here - 1) / here * share * members
                    joules = sent * network.joules_per_byte * network.cooling
                spent = {network.name: seconds}
                total = total + Cost(seconds, joules, spent, spent)
            left //= here
            share /= here
        if left > 1 or inside > 1:
            sizes = " x ".join(str(n.size) for n in self.networks) or "1"
            raise UsageError(
                f"{members} processors do not divide those of {self.name}, {sizes}; "
                "choose degrees that do"
            )
        return total


def _once(gemm: Gemm, moving: tuple[bool, ...]) -> int:
    sizes = (gemm.m * gemm.k, gemm.k * gemm.n, gemm.m * gemm.n)
    moved = sum(size for size, is_moving in zip(sizes, moving, strict=True) if is_moving)
    return gemm.batch * gemm.itemsize * moved


def device_link(hardware: Hardware) -> tuple[float, float]:
    """(bytes/s, seconds) from one device to the next: their own link, or else through the host."""
    for link in hardware.links:
        if (link.source, link.target) == ("device", "device"):
            return link.bandwidth, link.latency_seconds
    if hardware.device.kind == "cpu":
        return hardware.host.bandwidth / 2, 0.0  # a copy reads and writes every byte
    legs = [hardware._link("device", "host"), hardware._link("host", "device")]
    # Pieces follow one another, so both legs run at once.
    return min(bandwidth for bandwidth, _ in legs), sum(latency for _, latency in legs)
