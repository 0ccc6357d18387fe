"""Hardware files: what a machine can compute and move per second, for predicting time.

A file is YAML with these fields; an unknown or missing one is an error, because a prediction
without a bandwidth is a guess. Sizes are bytes and may be written as 24GiB; rates are per second.

    name, source              what it is called, and where its numbers come from
    devices                   list, at least one; the first is the one predicted for
      kind                    cpu or cuda
      flops                   dtype name -> FLOP/s, a multiply-add counting as 2
      memory, bandwidth       bytes, bytes/s
      launch_seconds          what one kernel costs before it does any work
      compute_efficiency      fraction of flops, and
      bandwidth_efficiency    fraction of bandwidth, that real kernels reach
    host                      memory, bandwidth
    disk                      read_bandwidth, write_bandwidth
    links                     list; empty where device and host are the same RAM
      from, to                places, device and host
      bandwidth               bytes/s in one direction
      latency_seconds         per transfer
      duplex                  true: the way back has the same bandwidth, at the same time
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from holdfast.errors import UsageError, unknown
from holdfast.units import format_bytes, parse_bytes

PRESETS = Path(__file__).with_name("presets")
DEFAULT = "rtx-4090-24gb"

_STRICT = ConfigDict(extra="forbid")
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class Device:
    """One accelerator, or the processors of a machine without one."""

    kind: Literal["cpu", "cuda"]
    flops: dict[str, Rate]
    memory: Size
    bandwidth: Rate
    launch_seconds: Seconds
    compute_efficiency: Fraction
    bandwidth_efficiency: Fraction


@dataclass(frozen=True, config=_STRICT)
class Host:
    memory: Size
    bandwidth: Rate


@dataclass(frozen=True, config=_STRICT)
class Disk:
    read_bandwidth: Rate
    write_bandwidth: Rate


@dataclass(frozen=True, config=_STRICT)
class Link:
    """A way between two places; `source` and `target` are `from` and `to` in the file."""

    source: Annotated[Literal["device", "host"], Field(alias="from")]
    target: Annotated[Literal["device", "host"], Field(alias="to")]
    bandwidth: Rate
    latency_seconds: Seconds
    duplex: bool


@dataclass(frozen=True, config=_STRICT)
class Hardware:
    """A machine: its devices, host, disk and links; see the module for the fields."""

    name: str
    source: Annotated[str, Field(min_length=1)]
    devices: Annotated[tuple[Device, ...], Field(min_length=1)]
    host: Host
    disk: Disk
    links: tuple[Link, ...]

    @property
    def device(self) -> Device:
        return self.devices[0]

    def seconds(self, flops: float, nbytes: float, dtype: torch.dtype | str) -> float:
        """Roofline time of one kernel: its longer side, computing or moving, plus its launch.

        Raises:
            UsageError: the file has no rate for `dtype`.
        """
        device, name = self.device, str(dtype).removeprefix("torch.")
        if flops and name not in device.flops:
            raise UsageError(
                f"hardware {self.name} has no flops for {name}, only for "
                f"{', '.join(device.flops)}; add devices.0.flops.{name} in FLOP/s to a copy of it"
            )
        compute = flops / (device.compute_efficiency * device.flops[name]) if flops else 0.0
        move = nbytes / (device.bandwidth_efficiency * device.bandwidth)
        return max(compute, move) + device.launch_seconds

    def transfer_seconds(self, nbytes: float, source: str, target: str) -> float:
        """Time to copy `nbytes` from one place to another: device, host or disk.

        A copy between device and disk streams through the host at the pace of its slower leg.

        Raises:
            UsageError: the file has no link in that direction.
        """
        for place in (source, target):
            if place not in ("device", "host", "disk"):
                raise unknown("place", place, ("device", "host", "disk"))
        if source == target:
            return 0.0
        if source == "disk":
            legs = [(self.disk.read_bandwidth, 0.0)]
        elif target == "disk":
            legs = [(self.disk.write_bandwidth, 0.0)]
        else:
            legs = []
        if "device" in (source, target):
            legs.append(
                self._link(*("host" if place == "disk" else place for place in (source, target)))
            )
        return max(latency + nbytes / bandwidth for bandwidth, latency in legs)

    @property
    def _copy(self) -> tuple[float, float]:
        return self.host.bandwidth / 2, 0.0  # a copy reads and writes every byte

    def _link(self, source: str, target: str) -> tuple[float, float]:
        if self.device.kind == "cpu":
            return self._copy
        for link in self.links:
            ends = (link.source, link.target)
            if ends == (source, target) or (link.duplex and ends == (target, source)):
                return link.bandwidth, link.latency_seconds
        raise UsageError(
            f"hardware {self.name} has no link from {source} to {target}; add to links "
            f"{{from: {source}, to: {target}, bandwidth: 25e9, latency_seconds: 10e-6, "
            "duplex: true}"
        )


_ADAPTER = TypeAdapter(Hardware)


def presets() -> list[str]:
    """Names of the machines that come with their sources."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def default_hardware(device: str = "auto") -> Hardware:
    """The machine to predict for where none is named; output shows its name.

    `device` "cpu" is the small CPU preset. "auto" and "cuda" are the preset of this machine's GPU
    if there is one, else an RTX 4090: the 24 GB card that a budget of 24GiB is mostly about.
    """
    if device == "cpu":
        return load_hardware("cpu-2core")
    if device not in ("auto", "cuda"):
        raise unknown("device", device, ("auto", "cuda", "cpu"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return load_hardware(preset_of(gpu) or DEFAULT)


def preset_of(gpu: str) -> str | None:
    """The preset for what CUDA calls a GPU: "NVIDIA A100-SXM4-80GB" -> "a100-80gb"."""
    words = set(gpu.lower().replace("-", " ").split())
    for name in presets():
        if name.removeprefix("rtx-").split("-")[0] in words:
            return name
    return None


def load_hardware(name_or_path: str | os.PathLike[str]) -> Hardware:
    """A preset by name, or a file.

    Raises:
        UsageError: neither exists, or a field is unknown, missing or wrong.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name.lower() in presets():
        path = PRESETS / f"{name.lower()}.yaml"
    elif not path.is_file():
        error = unknown("hardware", name, presets())
        raise UsageError(
            f"{error}; or give a file: `holdfast hw probe --out FILE` measures this machine"
        )
    return parse_hardware(read_fields(path), str(path))


def read_fields(path: Path) -> Any:
    """What a hardware file holds, not yet validated.

    Raises:
        UsageError: it is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"hardware file {path} is not YAML: {error}") from error


def parse_hardware(fields: Any, origin: str) -> Hardware:
    """`Hardware` from the mapping of its file; `origin` is named in errors.

    Raises:
        UsageError: a field is unknown, missing or wrong.
    """
    if not isinstance(fields, Mapping):
        raise UsageError(f"hardware file {origin} is not a mapping; see `holdfast hw probe`")
    try:
        return _ADAPTER.validate_python(dict(fields))
    except ValidationError as error:
        hint = "add it, `holdfast hw probe --out FILE` shows every field"
        raise UsageError(f"hardware file {origin}: {explain(error, hint)}") from error


def explain(error: ValidationError, hint: str) -> str:
    """The first thing that is wrong with a file; `hint` is what to do about a missing field."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("missing", "missing_argument"):
        return f"{where} is missing; {hint}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}={first['input']!r} is not a known field; remove it or check its spelling"
    if first["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{where}={first['input']!r} is wrong; {hint}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r} is wrong: {reason}" if where else reason


def hardware_fields(hardware: Hardware) -> dict[str, Any]:
    """The mapping that a hardware file holds."""
    fields = asdict(hardware)
    fields["devices"] = list(fields["devices"])
    fields["links"] = [
        {"from": link.pop("source"), "to": link.pop("target"), **link} for link in fields["links"]
    ]
    return fields


def save_hardware(hardware: Hardware, path: str | os.PathLike[str]) -> None:
    """Write a file that `load_hardware` reads back equal; a crash leaves the old file or the new.

    Raises:
        UsageError: the folder cannot be written.
    """
    path = Path(path)
    text = yaml.safe_dump(hardware_fields(hardware), sort_keys=False)
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)  # temporary files are made private
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def describe(hardware: Hardware) -> list[tuple[str, str]]:
    """(quantity, value) rows for people."""
    device = hardware.device
    rows = [("name", hardware.name), ("device", f"{device.kind}, {format_bytes(device.memory)}")]
    rows += [(name, f"{rate / 1e9:,.1f} GFLOP/s") for name, rate in device.flops.items()]
    rows += [
        ("device memory", f"{device.bandwidth / 1e9:,.1f} GB/s"),
        ("kernel launch", f"{device.launch_seconds * 1e6:.1f} us"),
        ("host memory", f"{hardware.host.bandwidth / 1e9:,.1f} GB/s"),
        ("disk read", f"{hardware.disk.read_bandwidth / 1e6:,.0f} MB/s"),
        ("disk write", f"{hardware.disk.write_bandwidth / 1e6:,.0f} MB/s"),
    ]
    rows += [
        (f"{k.source} to {k.target}", f"{k.bandwidth / 1e9:,.1f} GB/s") for k in hardware.links
    ]
    return [*rows, ("source", hardware.source)]
