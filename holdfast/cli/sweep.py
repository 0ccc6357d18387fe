"""`holdfast plan sweep`: every way to spread a training step over devices, by time and price."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli
from holdfast.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from holdfast.plan.sweep import Priced
    from holdfast.plan.vtrain import TrainConfig, VTrain


def sweep(
    model: Annotated[
        str,
        typer.Argument(
            help="Built-in name, config.json, directory, cached hub id, module:function."
        ),
    ],
    devices: Annotated[int, typer.Option(help="Devices that a plan uses, all of them.")],
    batch: Annotated[int, typer.Option(help="Sequences in one optimizer step.")],
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "float32",
    budget: Annotated[
        str | None, typer.Option(help="Bytes of one device [default: what the hardware has].")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="Preset or file: memory, links and, if not measured, rates."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Measured operations (JSON); what is missing is measured here and kept."),
    ] = None,
    price: Annotated[float, typer.Option(help="Of one device for one hour.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the run.")] = 1,
    top: Annotated[int, typer.Option(help="Plans to print; --json has all.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict the step time, the bytes and the price of every parallel plan; fastest first.

    Times come from operations measured on this machine (--profile) or else from the hardware's
    roofline. Exits 3 where no plan fits.

    Example: holdfast plan sweep gpt2 --devices 8 --batch 64 --hardware a100-80gb --price 2.5
    """
    for name, value in (("--devices", devices), ("--batch", batch), ("--steps", steps)):
        if value < 1:
            raise UsageError(f"{name} {value} is not positive; use 1 or more")
    if price < 0:
        raise UsageError(f"--price {price} is negative; give money per device and hour")
    with cli.stdout_is_json(json):
        from holdfast.plan.sweep import plans
        from holdfast.plan.sweep import sweep as sweep_plans
        from holdfast.plan.vtrain import TrainConfig
        from holdfast.units import parse_bytes

        vtrain, origin = _vtrain(hardware, profile)
        config = TrainConfig(model, batch, sequence, dtype)
        candidates = plans(config, devices)
        if profile is not None:
            _measure(vtrain, config, candidates, profile)
        rows = sweep_plans(
            vtrain,
            config,
            candidates,
            price=price,
            steps=steps,
            budget=None if budget is None else parse_bytes(budget),
            tell=lambda plan: print(f"replaying {plan}", file=sys.stderr),
        )
    fits = any(row.fits for row in rows)
    if json:
        cli.print_json(
            {
                "model": config.source.name,
                "hardware": vtrain.hardware.name,
                "times": origin,
                "fits": fits,
                "plans": [_fields(row, config) for row in rows],
            }
        )
    else:
        _show(rows[:top], config, f"{vtrain.hardware.name}; times by {origin}", price)
    if not fits:
        if json:
            raise typer.Exit(DoesNotFit.exit_code)
        raise _does_not_fit(rows)


def _vtrain(hardware: str | None, profile: Path | None) -> "tuple[VTrain, str]":
    from holdfast.plan.hardware import default_hardware, load_hardware
    from holdfast.plan.profile import Profile
    from holdfast.plan.vtrain import VTrain

    if profile is None:
        machine = load_hardware(hardware) if hardware else default_hardware()
        empty = Profile(device=machine.device.kind)
        return VTrain(empty, machine, missing="roofline"), f"the roofline of {machine.name}"
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    known = Profile.load(profile) if profile.exists() else Profile.of_this_device(here)
    if known.device != here or known.threads != torch.get_num_threads():
        raise UsageError(
            f"--profile {profile} is of {known.device} with {known.threads} threads, this process "
            f"has {here} with {torch.get_num_threads()}; give another file"
        )
    machine = load_hardware(hardware) if hardware else default_hardware(here)
    return VTrain(known, machine), f"operations measured on {known.machine}"


def _measure(vtrain: "VTrain", config: "TrainConfig", candidates: list, path: Path) -> None:
    from holdfast.plan import contention

    for plan in candidates:
        added = vtrain.measure(config, plan)
        if added:
            print(f"measured {added} operations for {plan}", file=sys.stderr)
            vtrain.profile.save(path)
    ranks = candidates[0].devices
    if vtrain.profile.device == "cpu" and ranks > 1 and ranks not in vtrain.profile.slowdown:
        contention.measure(vtrain.profile, ranks)
    vtrain.profile.save(path)


def _fields(row: "Priced", config: "TrainConfig") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(row.plan) | {
        "devices": row.plan.devices,
        "step_seconds": row.prediction.time,
        "breakdown": row.prediction.breakdown,
        "tokens_per_second": row.tokens_per_second(config),
        "flops_per_second": row.prediction.flops / row.prediction.time,
        "peak_bytes": row.prediction.peak_bytes,
        "fits": row.fits,
        "hours": row.hours,
        "cost": row.cost,
    }


def _show(rows: "list[Priced]", config: "TrainConfig", where: str, price: float) -> None:
    from holdfast.units import format_bytes

    print(f"{config.source.name}: batch {config.batch}, sequence {config.sequence}; {where}")
    lines = [["fits", "plan", "s/step", "tokens/s", "bytes/rank", "idle", "hours", "cost"]]
    for row in rows:
        step = row.prediction
        lines.append(
            ["yes" if row.fits else "no", str(row.plan), f"{step.time:.4g}"]
            + [f"{row.tokens_per_second(config):,.0f}", format_bytes(step.peak_bytes)]
            + [f"{step.breakdown['idle'] / step.time:.0%}", f"{row.hours:.4g}"]
            + [f"{row.cost:.2f}" if price else "-"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _does_not_fit(rows: "list[Priced]") -> DoesNotFit:
    from holdfast.units import format_bytes

    least = min(rows, key=lambda row: row.prediction.peak_bytes)
    needed = least.prediction.peak_bytes
    error = DoesNotFit(
        f"no plan fits; the smallest, {least.plan}, holds {format_bytes(needed)} on its fullest "
        f"rank. Ways to fit: --budget {needed}, more --devices, or a smaller --sequence"
    )
    error.details = {"smallest_budget": needed}
    return error
