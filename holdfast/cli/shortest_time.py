"""`holdfast plan shortest-time`: how soon a training could end, and with which degrees."""

from typing import Annotated

import typer

from holdfast import cli


def shortest_time(
    model: Annotated[
        str,
        typer.Argument(
            help="Built-in name, config.json, directory, cached hub id, module:function."
        ),
    ],
    tokens: Annotated[float, typer.Option(help="Tokens of the whole training.")] = 300e9,
    devices: Annotated[int, typer.Option(help="Most devices at once.")] = 4096,
    hardware: Annotated[str, typer.Option(help="Preset or hardware file.")] = "a100-80gb",
    network: Annotated[
        str, typer.Option(help="What a device sends to others in a second, for example 25GB.")
    ] = "25GB",
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 2048,
    loss: Annotated[
        float, typer.Option(help="Nats per token at which the batch is to be critical.")
    ] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Shortest training time at the critical batch, layered and modular or the usual way.

    The usual way finishes one micro-batch before the next, in contiguous pipeline stages, with
    ZeRO's stage 1. Both recompute activations and train in bfloat16.

    Example: holdfast plan shortest-time gpt2-xl --devices 1024
    """
    from holdfast.errors import UsageError

    for name, value in (("tokens", tokens), ("devices", devices), ("sequence", sequence)):
        if value < 1:
            raise UsageError(f"--{name} {value:g} is not positive; use 1 or more")
    with cli.stdout_is_json(json):
        document = _find(model, tokens, devices, hardware, network, sequence, loss)
    if json:
        cli.print_json(document)
        return
    _show(document)


def _find(model, tokens, devices, hardware, network, sequence, loss) -> dict:
    from dataclasses import asdict

    from holdfast import attach
    from holdfast.errors import UsageError
    from holdfast.plan.formulas.layered import Training, critical_batch, shortest
    from holdfast.plan.hardware import load_hardware
    from holdfast.plan.models import resolve
    from holdfast.units import parse_bytes

    source, machine = resolve(model), load_hardware(hardware)
    built = source.build("meta")
    layers = sum(len(stack) for _, stack in attach.blocks(built))
    width = getattr(source.config, "hidden_size", None)
    if not layers or width is None:
        raise UsageError(f"{model} has no stack of layers of one width; name a transformer")
    device = machine.device
    if "bfloat16" not in device.flops:
        raise UsageError(f"hardware {machine.name} has no flops for bfloat16; choose another")
    sent = parse_bytes(network)
    if not sent:
        raise UsageError("--network 0 sends nothing; write for example 25GB")
    job = Training(
        parameters=sum(p.numel() for p in built.parameters()),
        layers=layers,
        width=width,
        tokens=tokens,
        sequence=sequence,
        batch=critical_batch(loss),
        flops=device.compute_efficiency * device.flops["bfloat16"],
        network=sent,
        memory=device.memory,
        devices=devices,
    )
    ways = {"layered": shortest(job, layered=True), "usual": shortest(job, layered=False)}
    found = {name: asdict(way) | {"devices": way.devices} for name, way in ways.items()}
    return {"model": source.name, "hardware": machine.name, "training": asdict(job), **found}


def _show(document: dict) -> None:
    from holdfast.units import format_bytes

    job = document["training"]
    print(
        f"{document['model']}: {job['parameters'] / 1e9:.3g} billion parameters, "
        f"{job['tokens']:.3g} tokens, batch {job['batch']:.3g} tokens; {document['hardware']}"
    )
    heads = [
        "",
        "days",
        "devices",
        "replicas",
        "stages",
        "micros",
        "bubble",
        "states",
        "boundaries",
    ]
    lines = [heads]
    for name in ("layered", "usual"):
        way = document[name]
        lines.append(
            [name, f"{way['seconds'] / 86400:.3g}"]
            + [str(way[key]) for key in ("devices", "replicas", "stages", "micros")]
            + [f"{way['bubble']:.1%}"]
            + [format_bytes(way[key]) for key in ("state_bytes", "boundary_bytes")]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    ratio = document["usual"]["seconds"] / document["layered"]["seconds"]
    print(f"the usual way takes {ratio:.2f} x as long")
