"""SPANN beside hnswlib and faiss's IVF-flat: recall, memory and queries per second of one process.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/spann.py [--rows 1000000] [--json] [--write]

Vectors of 96 components in 2,000 overlapping Gaussian clusters of log-normal size, 8 % noise, with
a falling spectrum, seeded; once with clusters of log-normal width, as real densities differ, once
all of one width. Each index is built and searched in a process of its own, ours in one each, with
the vectors in a memory map. Queries per second: median over rounds of 1,000 queries, page cache
warm. What is promised of speed is promised for unequal widths: where all are equal, a graph in
memory is faster.

RAM         growth of the resident set by the index, opened and searched, over its process without
            it; `stats` is what SPANN says of itself
MB/query    what was read from files
peak        of building and searching, over the process after its imports
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results import conditions, write_section

from holdfast.checks.longterm.spann import EQUAL, UNEQUAL, World, recall

K, QUERIES, CLUSTERS = 10, 1000, 2000
PROBES, NPROBES = (24, 40, 64, 80, 96, 128, 192), (8, 16, 32, 48, 64)
EFS = (80, 160, 320, 640, 960, 1120, 1280)
WORLDS = {"unequal": UNEQUAL, "equal": EQUAL}


def resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(li.split()[1]) * 1024 for li in lines if li.startswith(f"{field}:"))


def blocks(X: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(X), 50_000):
        yield np.arange(start, min(len(X), start + 50_000)), np.array(X[start : start + 50_000])


def in_a_process(work: Callable, *args: Any) -> Any:
    """What `work` sends first, run in a fresh process.

    Raises:
        EOFError: it ended and sent nothing.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs, *args))
    child.start()
    theirs.close()
    try:
        return mine.recv()
    finally:
        child.join()


def build(pipe, folder: Path) -> None:
    """Build ours in this process: seconds, and bytes at the peak."""
    import torch

    from holdfast.longterm.spann import SPANN

    torch.ones(256, 256) @ torch.ones(256, 256)
    imported, start = resident(), time.perf_counter()
    SPANN.build(np.load(folder / "x.npy", mmap_mode="r"), folder / "spann")
    pipe.send((time.perf_counter() - start, resident("VmHWM") - imported))
    SPANN.build(np.load(folder / "q.npy"), folder / "small")


def ours(X: np.ndarray, Q: np.ndarray, folder: Path, threads: int, direct: bool = False) -> tuple:
    from holdfast.longterm.spann import SPANN

    path = folder / "spann"
    seconds, peak = (0.0, 0) if direct else in_a_process(build, folder)

    def searching(index: SPANN) -> Callable[[int], tuple[np.ndarray, dict]]:
        def search(probe: int) -> tuple[np.ndarray, dict]:
            read = index.stats().bytes_read
            ids, _ = index.search(Q, K, probe)
            stats = index.stats()
            return ids, {
                "mb_per_query": (stats.bytes_read - read) / len(Q) / 1e6,
                "stats_bytes": stats.ram,
            }

        return search

    # What a search makes of its own accord, such as threads and results, is no index's.
    searching(SPANN.open(folder / "small", direct=direct))(PROBES[-1])
    before = resident()
    return searching(SPANN.open(path, direct=direct)), PROBES, seconds, before, peak


def ours_direct(X: np.ndarray, Q: np.ndarray, folder: Path, threads: int) -> tuple:
    return ours(X, Q[:200], folder, threads, direct=True)


def hnsw(X: np.ndarray, Q: np.ndarray, folder: Path, threads: int) -> tuple:
    import hnswlib

    before, start = resident(), time.perf_counter()
    index = hnswlib.Index("l2", X.shape[1])
    index.init_index(len(X), M=16, ef_construction=200, random_seed=0)
    for ids, rows in blocks(X):
        index.add_items(rows, ids, num_threads=-1)
    seconds = time.perf_counter() - start

    def search(ef: int) -> tuple[np.ndarray, dict]:
        index.set_ef(ef)
        return index.knn_query(Q, K, num_threads=threads)[0].astype(np.int64), {}

    return search, EFS, seconds, before, 0


def ivf(X: np.ndarray, Q: np.ndarray, folder: Path, threads: int) -> tuple:
    import faiss

    before, start = resident(), time.perf_counter()
    lists = max(16, round(4.096 * len(X) ** 0.5))
    index = faiss.index_factory(X.shape[1], f"IVF{lists},Flat")
    index.train(np.array(X[:: max(1, len(X) // (64 * lists))]))
    for _, rows in blocks(X):
        index.add(rows)
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(threads)

    def search(nprobe: int) -> tuple[np.ndarray, dict]:
        index.nprobe = nprobe
        return index.search(Q, K)[1], {}

    return search, NPROBES, seconds, before, 0


PEERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "SPANN": (ours, ()),
    "SPANN, O_DIRECT": (ours_direct, ()),
    "hnswlib M=16": (hnsw, ("hnswlib",)),
    "faiss IVF-flat": (ivf, ("faiss",)),
}


def serve(pipe, name: str, folder: Path, threads: int, rounds: int) -> None:
    """Measure one index in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.ones(256, 256) @ torch.ones(256, 256)
    imported = resident()
    X, Q = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "q.npy")
    want = np.load(folder / "want.npy")
    try:
        search, options, seconds, before, peak = PEERS[name][0](X, Q, folder, threads)
    except OSError as error:
        pipe.send({"error": str(error)})
        return
    rows, used = [], 0
    for option in options:  # before anything is made of what was found
        search(option)
        used = max(used, resident() - before)
    for option in options:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            ids, more = search(option)
            times.append(time.perf_counter() - start)
        rate = len(ids) / statistics.median(times)
        rows.append(
            {"option": option, "recall": recall(ids, want[: len(ids)]), "qps": rate, **more}
        )
    pipe.send(
        {
            "rows": rows,
            "build_seconds": seconds,
            "ram": used,
            "peak": max(peak, resident("VmHWM") - imported),
        }
    )


def truth(X: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """The K nearest, exactly: block by block, then in double precision."""
    names, far = np.empty((len(Q), 0), np.int64), np.empty((len(Q), 0), np.float32)
    for ids, rows in blocks(X):
        mine = (rows * rows).sum(1) - 2 * Q @ rows.T
        best = np.argpartition(mine, 2 * K, 1)[:, : 2 * K]
        names = np.concatenate([names, ids[best]], 1)
        far = np.concatenate([far, np.take_along_axis(mine, best, 1)], 1)
        keep = np.argpartition(far, 2 * K - 1, 1)[:, : 2 * K]
        names, far = (np.take_along_axis(a, keep, 1) for a in (names, far))
    exact = ((X[names].astype(np.float64) - Q[:, None]) ** 2).sum(2)
    return np.take_along_axis(names, exact.argsort(1)[:, :K], 1)


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def compare(world: World, rows: int, threads: int, rounds: int, target: float) -> dict:
    found: dict = {"rows": rows, "threads": threads, "target": target}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = world.vectors(rows + QUERIES, 0, max(20, CLUSTERS * rows // 1_000_000))
        np.save(folder / "x.npy", every[:rows])
        np.save(folder / "q.npy", every[rows:])
        np.save(folder / "want.npy", truth(every[:rows], every[rows:]))
        found["raw"] = every[:rows].nbytes
        del every
        found["indexes"] = {}
        for peer, (_, needs) in PEERS.items():
            if absent := missing(needs):
                found["indexes"][peer] = {"error": f"needs {', '.join(absent)}: not installed"}
                continue
            print(peer, file=sys.stderr)
            try:
                found["indexes"][peer] = in_a_process(serve, peer, folder, threads, rounds)
            except EOFError:
                found["indexes"][peer] = {"error": "its process ended"}
    found["verdict"] = verdict(found)
    return found


def verdict(found: dict) -> dict:
    """What was promised, and whether it held."""
    index = found["indexes"]["SPANN"]

    def at(name: str, level: float) -> float | None:
        rows = found["indexes"][name].get("rows", [])
        return max((r["qps"] for r in rows if r["recall"] >= level), default=None)

    fast = at("SPANN", found["target"])
    peer = at("hnswlib M=16", found["target"])
    said = index["rows"][-1]["stats_bytes"]
    return {
        "recall": fast is not None,
        "ram_share": index["ram"] / found["raw"],
        "stats_to_rss": said / index["ram"],
        "peak_share": index["peak"] / found["raw"],
        "ratio_to_hnswlib": fast / peer if fast and peer else None,
        "held": fast is not None
        and index["ram"] <= 0.06 * found["raw"]
        and abs(said / index["ram"] - 1) <= 0.1
        and index["peak"] <= 0.5 * found["raw"],
        "fast": bool(fast) and (peer is None or fast >= 2 * peer),
    }


def table(found: dict) -> str:
    lines = [
        "| index | option | recall@10 | queries/s | MB/query | RAM MB | peak MB | build s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, index in found["indexes"].items():
        if "error" in index:
            lines.append(f"| {name} | {index['error']} |" + " |" * 6)
            continue
        for row in index["rows"]:
            read = f"{row['mb_per_query']:.2f}" if "mb_per_query" in row else ""
            lines.append(
                f"| {name} | {row['option']} | {row['recall']:.3f} | {row['qps']:.0f} | {read} | "
                f"{index['ram'] / 1e6:.0f} | {index['peak'] / 1e6:.0f} | "
                f"{index['build_seconds']:.0f} |"
            )
    v = found["verdict"]
    ratio = "not known" if v["ratio_to_hnswlib"] is None else f"{v['ratio_to_hnswlib']:.2f}"
    return "\n".join(lines) + (
        f"\n\n{found['rows']:,} vectors, {found['raw'] / 1e6:.0f} MB; {found['threads']} "
        f"thread(s). At recall {found['target']}: {ratio} times the queries per second of "
        f"hnswlib. RAM {v['ram_share']:.1%} of the vectors, of which `stats` says "
        f"{v['stats_to_rss']:.0%}; peak of build and search {v['peak_share']:.0%}. "
        f"Recall and memory as promised: {'yes' if v['held'] else 'NO'}; twice as fast: "
        f"{'yes' if v['fast'] else 'no'}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1, help="of a search")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recall", type=float, default=0.95, help="at which speeds are compared")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()
    found: dict = {"conditions": conditions()}
    parts = []
    for name, world in WORLDS.items():
        print(f"clusters of {name} width", file=sys.stderr)
        one = compare(world, options.rows, options.threads, options.rounds, options.recall)
        found[name] = one
        parts.append(f"Clusters of {name} width:\n\n{table(one)}")
    text = "\n\n".join(parts)
    print(json.dumps(found, indent=1) if options.json else text)
    if options.write:
        write_section("SPANN", text, found["conditions"])
    if not all(found[name]["verdict"]["held"] for name in WORLDS):
        sys.exit("recall or memory are not as promised")
    if not found["unequal"]["verdict"]["fast"]:
        sys.exit("less than twice hnswlib's queries per second")


if __name__ == "__main__":
    main()
