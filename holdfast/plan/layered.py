"""Layered hardware files: device, tile, chip, blade and system, each number with its source.

For machines that cannot be probed, and for questions about levels that a hardware file of one
level does not show. Every number is written `{value: ..., source: ...}`; sizes may be 24GiB. A
machine with a source that begins with "illustrative" is illustrative, and no figure of it may be
quoted in seconds or joules.

    name
    stages                    name -> temperature (kelvin) and cooling: watts at the wall for each
                              watt that is dissipated there, that watt included
    device                    clock (Hz), stage; for machines described by gates also
                              joules_per_gate and gates_per_mm2
    tile                      macs_per_cycle (dtype -> number), utilisation (0 to 1), store (bytes
                              of operands beside the arithmetic units); joules_per_mac (dtype ->
                              number), or gates_per_mac to derive them and to check the area
    chip                      tiles, launch (seconds of one operation); with gates also area_mm2
    levels                    list, near to far
      name, per, stage        per is what has one such memory: tile, chip, blade or system
      capacity, bandwidth, latency, joules_per_byte
    blade                     chips, network; the network is needed where there are several
    system                    blades, network
      network                 topology (ring, torus, switch), stage, bandwidth (of one chip, one
                              way), latency, joules_per_byte
"""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from holdfast.errors import UsageError, unknown
from holdfast.plan import hardware
from holdfast.plan.hardware import Hardware, load_hardware
from holdfast.plan.roofline import Level, Machine, Network
from holdfast.units import parse_bytes

SOURCED = "every number is {value: ..., source: ...}"
PRESETS = Path(__file__).with_name("layered_presets")
ROOM = 300.0

_STRICT = ConfigDict(extra="forbid")


def _bytes_or_number(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) and value[-1:] in "Bb" else value


@dataclass(frozen=True, config=_STRICT)
class Number:
    """A positive value, and where it is from."""

    value: Annotated[float, BeforeValidator(_bytes_or_number), Field(gt=0, allow_inf_nan=False)]
    source: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class Share:
    """A fraction in (0, 1]."""

    value: Annotated[float, Field(gt=0, le=1)]
    source: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class Duration:
    """Seconds, which may be 0."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class Count:
    value: Annotated[int, Field(ge=1)]
    source: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class Stage:
    temperature: Number
    cooling: Number


@dataclass(frozen=True, config=_STRICT)
class Device:
    clock: Number
    stage: str
    joules_per_gate: Number | None = None
    gates_per_mm2: Number | None = None


@dataclass(frozen=True, config=_STRICT)
class Tile:
    macs_per_cycle: Annotated[dict[str, Number], Field(min_length=1)]
    utilisation: Share
    store: Number
    joules_per_mac: dict[str, Number] | None = None
    gates_per_mac: dict[str, Number] | None = None


@dataclass(frozen=True, config=_STRICT)
class Chip:
    tiles: Count
    launch: Duration
    area_mm2: Number | None = None


@dataclass(frozen=True, config=_STRICT)
class Memory:
    name: str
    per: Literal["tile", "chip", "blade", "system"]
    stage: str
    capacity: Number
    bandwidth: Number
    latency: Duration
    joules_per_byte: Number


@dataclass(frozen=True, config=_STRICT)
class Wires:
    topology: Literal["ring", "torus", "switch"]
    stage: str
    bandwidth: Number
    latency: Duration
    joules_per_byte: Number


@dataclass(frozen=True, config=_STRICT)
class Blade:
    chips: Count
    network: Wires | None = None


@dataclass(frozen=True, config=_STRICT)
class System:
    blades: Count
    network: Wires | None = None


@dataclass(frozen=True, config=_STRICT)
class Layered:
    """A machine by its layers; see the module for the fields."""

    name: str
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    device: Device
    tile: Tile
    chip: Chip
    levels: Annotated[tuple[Memory, ...], Field(min_length=1)]
    blade: Blade
    system: System

    def __post_init__(self):
        for name, kept in self.stages.items():
            least = max(1.0, ROOM / kept.temperature.value)
            if kept.cooling.value < least * (1 - 1e-9):
                raise ValueError(
                    f"stages.{name}: {kept.cooling.value:g} watts at the wall for each watt at "
                    f"{kept.temperature.value:g} K is less than the {least:.4g} that an ideal "
                    "refrigerator takes; the watt itself is included"
                )
        for where, count, network in (
            ("blade.network", self.blade.chips.value, self.blade.network),
            ("system.network", self.system.blades.value, self.system.network),
        ):
            if count > 1 and network is None:
                raise ValueError(f"{where} is missing, and it joins {count}; add it")
        if (self.tile.joules_per_mac is None) == (self.tile.gates_per_mac is None):
            raise ValueError("tile takes one of joules_per_mac and gates_per_mac")
        networks = [n for n in (self.blade.network, self.system.network) if n is not None]
        stages = [self.device.stage, *(m.stage for m in self.levels), *(n.stage for n in networks)]
        for stage in stages:
            if stage not in self.stages:
                raise ValueError(str(unknown("stage", stage, self.stages)))
        known = self.tile.joules_per_mac or self.tile.gates_per_mac or {}
        if known.keys() != self.tile.macs_per_cycle.keys():
            raise ValueError(
                f"tile has rates for {', '.join(self.tile.macs_per_cycle)} and energies for "
                f"{', '.join(known) or 'nothing'}; give both for the same dtypes"
            )
        if self.tile.gates_per_mac is not None:
            self._check_area(self.tile.gates_per_mac)

    def _check_area(self, gates_per_mac: Mapping[str, Number]) -> None:
        device, area = self.device, self.chip.area_mm2
        if device.joules_per_gate is None or device.gates_per_mm2 is None or area is None:
            raise ValueError(
                "tile.gates_per_mac needs device.joules_per_gate, device.gates_per_mm2 and "
                "chip.area_mm2; add them, or give tile.joules_per_mac instead"
            )
        most = max(
            gates.value * self.tile.macs_per_cycle[dtype].value
            for dtype, gates in gates_per_mac.items()
        )
        needed, there = most * self.chip.tiles.value, area.value * device.gates_per_mm2.value
        if needed > there:
            raise ValueError(
                f"chip.tiles={self.chip.tiles.value} need {needed:.3g} gates, {area.value:g} mm2 "
                f"hold {there:.3g}; use fewer tiles or a larger area"
            )

    @property
    def illustrative(self) -> bool:
        return any(source.lower().startswith("illustrative") for source in sources(self))

    def machine(self) -> Machine:
        """One chip's share of everything: peak = MACs * 2 * clock * utilisation * tiles."""
        tiles, chips = self.chip.tiles.value, self.blade.chips.value
        clock, share = self.device.clock.value, self.tile.utilisation.value
        # How many of a level's memories one chip has.
        owned = {
            "tile": tiles,
            "chip": 1,
            "blade": 1 / chips,
            "system": 1 / (chips * self.system.blades.value),
        }
        energies = self.tile.joules_per_mac
        if energies is None:
            assert self.tile.gates_per_mac and self.device.joules_per_gate
            gate = self.device.joules_per_gate.value
            joules = {t: g.value * gate for t, g in self.tile.gates_per_mac.items()}
        else:
            joules = {dtype: number.value for dtype, number in energies.items()}
        return Machine(
            self.name,
            {
                dtype: macs.value * 2 * clock * share * tiles
                for dtype, macs in self.tile.macs_per_cycle.items()
            },
            tuple(
                Level(
                    m.name,
                    m.capacity.value * owned[m.per],
                    m.bandwidth.value * owned[m.per],
                    m.latency.value,
                    1.0,
                    m.joules_per_byte.value,
                    self.stages[m.stage].cooling.value,
                )
                for m in self.levels
            ),
            1.0,
            self.chip.launch.value,
            self.tile.store.value * tiles,
            joules,
            self.stages[self.device.stage].cooling.value,
            tuple(
                self._network(name, size, wires)
                for name, size, wires in (
                    ("blade network", chips, self.blade.network),
                    ("system network", self.system.blades.value, self.system.network),
                )
                if wires is not None
            ),
            self.illustrative,
        )

    def _network(self, name: str, size: int, wires: Wires) -> Network:
        return Network(
            name,
            size,
            wires.topology,
            wires.bandwidth.value,
            wires.latency.value,
            wires.joules_per_byte.value,
            self.stages[wires.stage].cooling.value,
        )


_ADAPTER = TypeAdapter(Layered)


def sources(node: Any) -> list[str]:
    """Where each number of a layered description is from."""
    if isinstance(node, Mapping):
        return [s for child in node.values() for s in sources(child)]
    if isinstance(node, tuple):
        return [s for child in node for s in sources(child)]
    if not is_dataclass(node):
        return []
    if hasattr(node, "source"):
        return [node.source]
    return [s for each in fields(node) for s in sources(getattr(node, each.name))]


def scaled(layered: Layered, path: str, factor: float) -> Layered:
    """The same machine with one number times `factor`, for example "levels.dram.bandwidth".

    Raises:
        UsageError: no number is there, or the machine refuses what it becomes.
    """
    try:
        return _scaled(layered, path.split("."), factor, path)
    except ValidationError as error:
        reason = hardware.explain(error, SOURCED)
        raise UsageError(f"{layered.name}, {path} times {factor:g}: {reason}") from error


def _scaled(node: Any, parts: list[str], factor: float, path: str) -> Any:
    if not parts:
        if not hasattr(node, "value"):
            raise UsageError(f"{path} is no number but a part; name one of its numbers")
        value = node.value * factor
        return replace(node, value=round(value) if isinstance(node, Count) else value)
    name, *rest = parts
    if isinstance(node, tuple):
        children = {child.name: child for child in node}
    elif isinstance(node, Mapping):
        children = dict(node)
    elif is_dataclass(node) and not hasattr(node, "value"):
        children = {f.name: getattr(node, f.name) for f in fields(node)}
    else:
        children = {}
    if children.get(name) is None:
        raise unknown(f"part of {path!r}", name, [k for k, v in children.items() if v is not None])
    changed = _scaled(children[name], rest, factor, path)
    if isinstance(node, tuple):
        return tuple(changed if child.name == name else child for child in node)
    if isinstance(node, Mapping):
        return {**node, name: changed}
    return replace(node, **{name: changed})


def presets() -> list[str]:
    """Names of the layered machines that come with their sources."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(name_or_path: str | os.PathLike[str]) -> Layered | Hardware:
    """A layered or one-level machine, by the name of a preset or from a file.

    Raises:
        UsageError: neither exists, or a field is unknown, missing or wrong.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name.lower() in presets():
        path = PRESETS / f"{name.lower()}.yaml"
    elif name.lower() in hardware.presets():
        return load_hardware(name)
    elif not path.is_file():
        raise unknown("hardware", name, [*presets(), *hardware.presets()])
    found = hardware.read_fields(path)
    if isinstance(found, Mapping) and "devices" in found:
        return load_hardware(path)
    return parse(found, str(path))


def parse(given: Any, origin: str) -> Layered:
    """`Layered` from the mapping of its file; `origin` is named in errors.

    Raises:
        UsageError: a field is unknown, missing or wrong, or layers contradict each other.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"hardware file {origin} is not a mapping; see holdfast.plan.layered")
    try:
        return _ADAPTER.validate_python(dict(given))
    except ValidationError as error:
        reason = hardware.explain(error, SOURCED)
        raise UsageError(f"hardware file {origin}: {reason}") from error


def as_machine(
    given: "Machine | Layered | Hardware | str | os.PathLike[str]", devices: int | None = None
) -> Machine:
    """What predictions need of any description; of one level, `devices` of it are joined.

    Raises:
        UsageError: an unknown name, or a wrong file.
    """
    if isinstance(given, Machine):
        return given
    found = given if isinstance(given, Layered | Hardware) else load(given)
    if isinstance(found, Layered):
        return found.machine()
    return Machine.from_hardware(found, devices)
