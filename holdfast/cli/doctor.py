"""`holdfast doctor`: what this machine and this installation offer, without network."""

import os
from importlib import metadata
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from holdfast import host
from holdfast.cli import print_json
from holdfast.units import format_bytes


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report what this machine and installation offer.

    Torch, CPU features, native kernels and why they are off, GPUs, extras, data directory.

    \b
    Example:
      holdfast doctor --json
    """
    report = examine()
    if json:
        print_json(report)
        return
    for name, value in _lines(report):
        print(f"{name:<12}{value}")


def examine() -> dict[str, Any]:
    """Everything that `holdfast doctor` says, as JSON-ready values; sizes in bytes."""
    import torch
    import transformers

    from holdfast import __version__, native

    data = host.data_dir()
    return {
        "holdfast": __version__,
        "python": host.machine()["python"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": {
            "model": host.cpu_model(),
            "cores": host.cores(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "features": cpu_features(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "native": native.status(),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ],
        "extras": extras(),
        "data": {"path": str(data), "exists": data.is_dir()},
        "cache": str(host.cache_dir()),
    }


def cpu_features() -> list[str]:
    """The vector extensions that kernels here can use, as Linux names them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return []
    wanted = ("avx2", "fma", "f16c", "avx512", "amx", "avx_vnni", "asimd", "sve", "bf16", "i8mm")
    return sorted(flag for flag in flags.partition(":")[2].split() if flag.startswith(wanted))


def extras() -> dict[str, list[str]]:
    """For each optional extra of the package, the distributions that are missing."""
    if not _version("holdfast"):
        return {}  # run from sources that are not installed
    found: dict[str, list[str]] = {}
    for line in metadata.requires("holdfast") or []:
        requirement = Requirement(line)
        for extra in metadata.metadata("holdfast").get_all("Provides-Extra") or []:
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                absent = [] if _version(requirement.name) else [requirement.name]
                found[extra] = found.get(extra, []) + absent
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, native, data = report["cpu"], report["native"], report["data"]
    gpus = [f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}" for gpu in report["gpus"]]
    state = f"on ({native['variant']})" if native["available"] else f"off: {native['reason']}"
    missing = "" if data["exists"] else " (absent; set HOLDFAST_DATA)"
    return [
        ("holdfast", f"{report['holdfast']}, Python {report['python']}"),
        ("torch", f"{report['torch']}, transformers {report['transformers']}"),
        ("cpu", f"{cpu['model']}, {format_bytes(cpu['memory_bytes'])}"),
        ("threads", f"{cpu['threads']} of torch on {cpu['cores']} cores"),
        ("features", f"{cpu['capability']}: {' '.join(cpu['features']) or 'unknown'}"),
        ("native", state),
        *(("gpu", gpu) for gpu in gpus or ["none: the host's memory counts as device"]),
        *(
            ("extra", f"{name}: " + (f"lacks {', '.join(absent)}" if absent else "installed"))
            for name, absent in report["extras"].items()
        ),
        ("data", f"{data['path']}{missing}"),
        ("cache", report["cache"]),
    ]
