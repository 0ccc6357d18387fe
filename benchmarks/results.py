"""RESULTS.md: one section for each benchmark, replaced when it is run with `--write`."""

import datetime
import importlib.metadata
import os
import re
import sys
from pathlib import Path

from holdfast import host, native
from holdfast.files import write_text

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "pulp",
    "peft",
    "torchao",
    "galore-torch",
    "bitsandbytes",
    "faiss-cpu",
    "hnswlib",
)
HEAD = "# Results\n\nEach section is written by its benchmark, run with `--write`.\n"


def versions() -> dict[str, str]:
    """Of the packages that take part and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def conditions() -> dict:
    """Where and how this process runs: a figure means little without it."""
    threads = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OMP_")]
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join([*threads, command]),
        "machine": f"{host.cpu_model()}, {host.cores()} cores",
        "python": host.machine()["python"],
        "versions": versions(),
        "native": native.status()["variant"] or "off",
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


def write_section(title: str, body: str, found: dict) -> None:
    """Replace the section `title`, or add it; `found` is what `conditions()` gave."""
    known = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    section = (
        f"## {title}\n\n"
        f"{found['date']}, {found['machine']}, Python {found['python']}, {known}, "
        f"native kernels: {found['native']}; load average {found['load_average'][0]}.\n\n"
        f"    {found['command']}\n\n{body.strip()}\n"
    )
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    parts = re.split(r"(?m)^(?=## )", text)
    kept = [part for part in parts if not part.startswith(f"## {title}\n")]
    write_text(RESULTS, "\n".join(part.strip() + "\n" for part in [*kept, section]))
