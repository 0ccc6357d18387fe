"""launch: run a function in several local processes joined by `torch.distributed`.

Under torchrun nothing of this is needed: the processes are there. Here a fork server that has
imported torch once makes each further process cheap, so that a test of four ranks costs little
more than a test of one.
"""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from holdfast.errors import HoldfastError, UsageError

# After one rank has failed the others notice by their broken connections; this long they may take.
GRACE_SECONDS = 5.0

# Imported once, by the fork server, because it takes seconds: torch's parts bring its compiler.
PRELOAD = [
    "holdfast.parallel.launch",
    "torch.distributed.pipelining",
    "torch.distributed.fsdp",
    "transformers",
]


class RankFailed(HoldfastError):
    """At least one rank raised, died or hung; `ranks` maps those that did to what they said."""

    def __init__(self, processes: int, ranks: dict[int, str]):
        self.ranks = ranks
        first, *others = ranks
        said = "\n".join(f"--- rank {rank}\n{text.rstrip()}" for rank, text in ranks.items())
        after = f", after it {', '.join(map(str, others))}" if others else ""
        super().__init__(f"rank {first} of {processes} failed{after}\n{said}")


def launch(
    fn: Callable[..., Any],
    processes: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 60.0,
    limit: float | None = None,
    threads: int = 1,
) -> list[Any]:
    """Call `fn(*args)` in `processes` new processes that form one process group.

    In each, `torch.distributed` is initialised, RANK, LOCAL_RANK and WORLD_SIZE are set as
    torchrun sets them, and with nccl the rank's GPU is the current device. Connections stay on
    the loopback interface.

    Args:
        fn: a function of a module's top level; it and `args` are pickled, and so are results.
        timeout: seconds that a rank waits for another inside one collective.
        limit: seconds for the whole run; None means `timeout`, `math.inf` no limit.
        threads: of torch, in each process.

    Returns:
        What `fn` returned, by rank.

    Raises:
        RankFailed: a rank raised, died or exceeded `limit`; the others were stopped.
        UsageError: `processes` is less than 1, or `fn` is not importable.
    """
    if processes < 1:
        raise UsageError(f"processes={processes}: launch needs at least 1")
    module = sys.modules.get(fn.__module__)
    if (
        module is None
        or getattr(module, fn.__name__, None) is not fn
        or module.__name__ == "__main__"
    ):
        raise UsageError(f"launch needs a function of an importable module's top level, not {fn!r}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    job = pickle.dumps((fn, args))
    root = _import_root(module.__name__, module.__file__)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        workers, pipes = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            settings = (rank, processes, f"{folder}/store", backend, timeout, threads)
            target = (job, module.__name__, root, settings, theirs)
            # Daemons end with this process, however it ends.
            worker = context.Process(target=_work, args=target, name=f"rank {rank}", daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        try:
            return _collect(workers, pipes, timeout if limit is None else limit, Path(folder))
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()


def _collect(workers: list, pipes: list[Connection], limit: float, folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    failed: dict[int, str] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline = time.monotonic() + limit
    while waiting:
        ready = cast(list[Connection], wait(list(waiting), timeout=_remaining(deadline)))
        if not ready:
            for rank in waiting.values():
                os.kill(workers[rank].pid, signal.SIGUSR1)
            time.sleep(1.0)  # for them to write where they are
            for rank in waiting.values():
                stack = (folder / f"stack{rank}").read_text()
                failed[rank] = f"no result before its time was over; it was stopped here:\n{stack}"
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                workers[rank].join()
                good, value = False, f"died without a word, exit code {workers[rank].exitcode}"
            if good:
                results[rank] = value
            else:
                if not failed:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failed[rank] = value
    if failed:
        raise RankFailed(len(workers), failed)
    return [results[rank] for rank in range(len(workers))]


def _remaining(deadline: float) -> float | None:
    left = deadline - time.monotonic()
    return None if left == float("inf") else max(left, 0.0)


def _import_root(name: str, path: str | None) -> str | None:
    """The folder from which `name` can be imported, where that is not on the path already."""
    if path is None:
        return None
    folder = Path(path).resolve()
    levels = name.count(".") + (folder.name != "__init__.py")
    for _ in range(levels + (folder.name == "__init__.py")):
        folder = folder.parent
    return str(folder)


def _work(job: bytes, module: str, root: str | None, settings: tuple, pipe: Connection) -> None:
    rank, processes, store, backend, timeout, threads = settings
    try:
        stack = open(Path(store).with_name(f"stack{rank}"), "w")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR1, stack)
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            # A test module, which pytest imports without its folder on the path.
            sys.path.insert(0, str(root))
        fn, args = pickle.loads(job)
        torch.set_num_threads(threads)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=timeout),
        )
        result = pickle.dumps((True, fn(*args)))
        # No rank closes its connections while another still waits for it.
        dist.barrier()
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(result)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
