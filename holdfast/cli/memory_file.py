"""Verbs of `holdfast memory` for a memory as a whole: files, care, numbers."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast import cli
from holdfast.cli.memory_options import DryRun, Json, opens, safe
from holdfast.cli.progress import bar
from holdfast.errors import HoldfastError, UsageError

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory


@opens
def export(
    memory: "Memory",
    target: Annotated[Path, typer.Argument(help="JSON lines file to write.")],
    json: Json = False,
) -> None:
    """Write one space as JSON lines, history included.

    Example: holdfast memory export notes.memory ann.jsonl --user ann
    """
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {target}: no folder {target.parent}; make it")
    done = memory.export(target)
    if json:
        cli.print_json({"file": str(target), **done})
    else:
        print(f"{target}: {done['memory']} versions, {done['edge']} edges, {done['event']} events")


@opens(creates=True)
def import_(
    memory: "Memory",
    source: Annotated[Path, typer.Argument(help="File to read.")],
    format: Annotated[
        str, typer.Option(help="holdfast, or the library that wrote it.")
    ] = "holdfast",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Read what `export` or another library wrote.

    Doing it twice changes nothing. An export goes into an empty space, or into one whose log it
    goes on from; a space that has gone another way refuses it.

    Example: holdfast memory import notes.memory ann.jsonl --user ann
    """
    from holdfast.longterm.store.maintain import rehearsal

    if not source.is_file():
        raise UsageError(f"there is no file {source}")
    with rehearsal(memory) if dry_run else nullcontext() as would:
        done = memory.import_(source, format=format)
    if json:
        cli.print_json({**done, "dry_run": would is not None})
    else:
        counts = ", ".join(f"{name} {count}" for name, count in done.items())
        print(f"{'would import' if dry_run else 'imported'}: {counts}")


@opens
def backup(
    memory: "Memory",
    target: Annotated[Path, typer.Argument(help="File to write.")],
    json: Json = False,
) -> None:
    """Copy the whole memory while others go on writing.

    Example: holdfast memory backup notes.memory notes.backup
    """
    if target.exists():
        raise UsageError(f"{target} is there already; name another file, or remove it")
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {target}: no folder {target.parent}; make it")
    memory.store.backup(target)
    size = target.stat().st_size if target.exists() else 0
    if json:
        cli.print_json({"file": str(target), "bytes": size})
    else:
        print(f"{target}: {size} bytes")


@opens
def verify(memory: "Memory", json: Json = False) -> None:
    """Check the file, rows against the log, and vectors.

    Exit code 1 if anything is wrong; each problem is named.

    Example: holdfast memory verify notes.memory
    """
    from holdfast.longterm.service.plain import plain
    from holdfast.longterm.store import maintain

    with bar("comparing", None) as advance:
        report = maintain.verify(memory, advance)
    if json:
        cli.print_json({"ok": report.ok, **plain(report)})
    else:
        for problem in report.problems:
            where = f" {safe(str(problem.space))!r}" if problem.space is not None else ""
            print(f"{problem.kind}{where} {problem.id or ''}: {safe(problem.message)}")
        print(
            f"{report.memories} memories, {report.edges} edges, {report.events} events compared: "
            f"{'sound' if report.ok else f'{len(report.problems)} problems'}"
        )
    if not report.ok:
        raise typer.Exit(HoldfastError.exit_code)


@opens
def reembed(
    memory: "Memory",
    batch: Annotated[int, typer.Option(min=1, help="Memories that are encoded at once.")] = 64,
    json: Json = False,
) -> None:
    """Change the embedder, or make missing vectors.

    The old vectors answer until all new ones are there. A run that was cut off goes on where it
    was when it is started again.

    Example: holdfast memory reembed notes.memory --embedder minilm
    """
    from holdfast.longterm.service.plain import plain
    from holdfast.longterm.store import reembed as work

    todo = work.left_to_do(memory, memory.embedder)
    with bar("encoding", todo) as advance:
        done = work.reembed(memory, memory.embedder, batch=batch, tell=advance)
    if json:
        cli.print_json(plain(done))
    else:
        print(
            f"{done.embedder}: {done.encoded} versions encoded, vectors of {done.removed} removed"
        )


@opens
def stats(memory: "Memory", json: Json = False) -> None:
    """Counts, bytes and what the language model has cost.

    Example: holdfast memory stats notes.memory
    """
    numbers = memory.stats()
    if json:
        cli.print_json(numbers)
        return
    for name, value in numbers.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {count}" for part, count in value.items())
        if value is not None:
            print(f"{name:<12} {value}")


@opens
def spaces(memory: "Memory", json: Json = False) -> None:
    """List whose memories are here, and how many.

    Example: holdfast memory spaces notes.memory
    """
    from holdfast.longterm.store import maintain

    rows = maintain.spaces(memory)
    if json:
        cli.print_json([{"space": str(space), "memories": count} for _, space, count in rows])
        return
    for _, space, count in rows:
        print(f"{count:>10}  {safe(str(space))}".rstrip())


@opens(creates=True)
def serve(
    memory: "Memory",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8765,
    token: Annotated[
        str | None, typer.Option(envvar="HOLDFAST_TOKEN", help="What clients must send.")
    ] = None,
    rate: Annotated[
        float, typer.Option(help="Requests a second of one client, on the average.")
    ] = 50.0,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may ask, e.g. https://example.org; repeatable."),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Bytes of a request.")] = "4MiB",
) -> None:
    """Serve a memory over HTTP, with a page to browse it.

    Each request names its space; /openapi.json describes the API. The log goes to standard error.

    Example: holdfast memory serve notes.memory --port 8765
    """
    import logging

    from holdfast.cli.serve import refuse_open_doors
    from holdfast.units import parse_bytes

    try:
        import uvicorn

        from holdfast.longterm.service.http import create_app
    except ImportError as error:
        raise UsageError(
            f"serving needs the package {error.name}; install it: pip install 'holdfast[serve]'"
        ) from error
    refuse_open_doors(host, token)
    if not rate > 0:
        raise UsageError(f"--rate {rate:g} lets nobody in; give requests per second")
    app = create_app(
        memory, token=token or None, rate=rate, cors=cors or (), body_bytes=parse_bytes(max_body),
        hosts=None if token else (host,),
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("holdfast.serve").info(
        "serving %s at http://%s:%d", memory.store.url, host, port
    )
    uvicorn.run(
        app, host=host, port=port, access_log=False, log_level="warning",
        timeout_graceful_shutdown=10,
    )  # fmt: skip
