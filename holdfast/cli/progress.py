"""A progress bar on stderr for long work."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(name: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Call what it yields with what has been done since; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done=1: None
        return
    from rich import progress
    from rich.console import Console

    shown = progress.Progress(
        progress.TextColumn(name),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with shown:
        key = shown.add_task(name, total=total, rate="")

        def advance(done: int = 1) -> None:
            task = shown.tasks[0]
            rate = (task.completed + done) / max(task.elapsed or 0.0, 1e-3)
            shown.update(key, advance=done, rate=f"{rate:.1f}/s")

        yield advance
