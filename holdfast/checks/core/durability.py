"""Durability of a memory: killed writers, a failing current, many processes at one file."""

import contextlib
import functools
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.checks import Result, check
from holdfast.checks.core._faults import PowerCut, failing
from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Add, Revise
from holdfast.longterm.retrieval.embed import Hash

WRITERS, BATCH, PROCESSES = 3, 3, 8
_DIM = 32


@check(
    "durability",
    claim="no acknowledged write is lost, none is half done, and nobody meets a lock",
)
def run(seed: int, full: bool = False) -> Result:
    """200 kills and a minute of eight processes with `full`, 40 kills and 8 seconds without."""
    kills, seconds = (200, 60.0) if full else (40, 8.0)
    with tempfile.TemporaryDirectory() as folder:
        ours = _killed(Path(folder) / "ours.db", kills, seed, together=True)
        # The same writes, one transaction for each message: what a store without batches does.
        apart = _killed(Path(folder) / "apart.db", kills, seed, together=False)
        faults = _faults(Path(folder))
        crowd = _crowd(Path(folder) / "crowd.db", seconds, seed)
    measured: dict[str, Any] = {"kills": kills, **ours, **faults, **crowd}
    bad = ("lost", "half_done", "damaged", "unfound", "wrong_states", "errors", "lost_updates")
    passed = (
        not any(measured[name] for name in bad)
        and measured["acknowledged"] >= kills
        and measured["statements"] >= 20
        and measured["updates"] >= PROCESSES
        and apart["half_done"] > 0
    )
    return Result(
        measured=measured,
        baseline={"half_done_one_by_one": apart["half_done"]},
        threshold=f"{', '.join(bad)} all 0; one by one some batches are half done",
        passed=passed,
    )


def _open(path: Path) -> Memory:
    return Memory(path, embedder=Hash(_DIM))


def _write(path: Path, writer: int, round_: int, together: bool, out: int) -> None:
    """Batches without end; each is reported once `add` has returned."""
    memory, number = _open(path), 0
    while True:
        name = f"r{round_}w{writer}n{number}"
        batch = [{"speaker": "w", "content": f"{name} part {i}"} for i in range(BATCH)]
        for messages in [batch] if together else [[one] for one in batch]:
            memory.add(messages, session=name)
        os.write(out, f"{name}\n".encode())
        number += 1


def _spawn(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def _killed(path: Path, kills: int, seed: int, *, together: bool) -> dict[str, int]:
    """Kill all writers at a random instant, again and again, and count what is wrong after it."""
    pick = random.Random(seed)
    acknowledged: set[str] = set()
    counts = dict.fromkeys(("lost", "half_done", "damaged", "unfound"), 0)
    for round_ in range(kills):
        reader, out = os.pipe()
        pids = [
            _spawn(functools.partial(_write, path, writer, round_, together, out))
            for writer in range(WRITERS)
        ]
        os.close(out)
        # Long enough, after the first write, for any statement to be the last one.
        said = os.read(reader, 65536)
        time.sleep(pick.uniform(0, 0.05))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        while more := os.read(reader, 65536):
            said += more
        os.close(reader)
        fresh = [name for name in said.decode().split("\n")[:-1] if name]
        acknowledged.update(fresh)
        with _open(path) as memory:
            parts: dict[str, int] = {}
            with memory.reading() as view:
                for item in view.items():
                    parts[item.session or ""] = parts.get(item.session or "", 0) + 1
            counts["damaged"] += len(memory.store.damage())
            counts["lost"] += sum(parts.get(name, 0) < BATCH for name in fresh)
            counts["half_done"] += sum(
                count != BATCH for name, count in parts.items() if name.startswith(f"r{round_}w")
            )
            if fresh:
                asked = f"{fresh[-1]} part 1"
                found = {hit.text for hit in memory.search(asked, limit=BATCH)}
                counts["unfound"] += asked not in found
    return {"acknowledged": len(acknowledged), **counts}


def _faults(folder: Path) -> dict[str, int]:
    """Each kind of write, with a failing current at each of its statements."""
    start, path = folder / "start.db", folder / "failed.db"
    with _open(start) as memory:
        first, second, *_ = memory.add(
            [{"role": "user", "content": f"message {i} of the start"} for i in range(4)],
            session="start",
        )
        memory.export(folder / "start.jsonl")
        memory.add("something that the export does not have")
    writes: dict[str, Callable[[Memory], Any]] = {
        "add": lambda m: m.add(["one", "two"], session="start"),
        "update": lambda m: m.update(first, "message 0 was corrected"),
        "delete": lambda m: m.delete(second),
        "purge": lambda m: m.purge(first),
        "import": lambda m: m.import_(folder / "start.jsonl", space="elsewhere"),
    }
    statements = wrong = 0
    with failing() as fault:
        for write in writes.values():
            before = _digest(start)
            _copy(start, path)
            with _open(path) as memory:
                write(memory)
            after = _digest(path)
            done = False
            number = 0
            while not done:
                for fault.after in (False, True):
                    _copy(start, path)
                    memory = _open(path)
                    fault.left = number
                    done = False
                    with contextlib.suppress(PowerCut):
                        write(memory)
                        done = True
                    fault.left = None
                    memory.close()
                    statements += not done
                    found = _digest(path)
                    wrong += found != after if done else found not in (before, after)
                number += 1
    return {"statements": statements, "wrong_states": wrong}


def _copy(start: Path, path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.copy(start, path)


def _digest(path: Path) -> str:
    """The texts of all spaces, times left out: two runs have two clocks."""
    with _open(path) as memory:
        lines = []
        for space in ("", "elsewhere"):
            with memory.reading(space=space) as view:
                lines += [f"{space}|{item.text}" for item in view.items()]
                lines += [f"{space}|{event.op}" for event in view.events()]
        return "\n".join([*lines, *memory.store.damage()])


def _crowd(path: Path, seconds: float, seed: int) -> dict[str, int]:
    """Processes that add, search and count up one number, at one file."""
    with _open(path) as memory:
        (counter,) = memory.transact(
            lambda _: [Add("a number that all count up", data={"count": 0})]
        )
    reader, out = os.pipe()
    pids = [
        _spawn(functools.partial(_work, path, counter, seconds, seed + worker, worker, out))
        for worker in range(PROCESSES)
    ]
    os.close(out)
    said = b""
    while more := os.read(reader, 65536):
        said += more
    errors = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    updates = adds = searches = 0
    for line in said.decode().split():
        a, b, c = map(int, line.split(","))
        updates, adds, searches = updates + a, adds + b, searches + c
    with _open(path) as memory:
        item = memory.get(counter)
        held = memory.stats()["memories"] - 1
    count = item.data["count"] if item is not None else -1
    return {
        "updates": updates, "adds": adds, "searches": searches, "errors": errors,
        "lost_updates": (updates - count) + (adds - held),
    }  # fmt: skip


def _work(path: Path, counter: str, seconds: float, seed: int, worker: int, out: int) -> None:
    memory, pick = _open(path), random.Random(seed)
    updates = adds = searches = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        kind = pick.random()
        if kind < 0.4:
            memory.transact(
                lambda view: [Revise(counter, data={"count": view.get(counter).data["count"] + 1})]
            )
            updates += 1
        elif kind < 0.8:
            memory.add(f"worker {worker} adds its {adds}. memory")
            adds += 1
        else:
            memory.search(f"worker {worker}")
            searches += 1
    os.write(out, f"{updates},{adds},{searches}\n".encode())
