"""100,000 memories: adding, searching, bytes; beside mem0 and chromadb with the same vectors.

    .venv/bin/python benchmarks/memory.py --venv FOLDER [--count 100000] [--json] [--write]

mem0ai and chromadb live in an environment of their own, FOLDER, made where there is none. Each side
is a process of its own and gets the same texts and vectors: LoCoMo's turns, encoded by MiniLM, some
words replaced and the vectors turned a little, so that no two are equal. Questions are LoCoMo's and
come with their vector.

add           one text at a time, without encoding; beside one fdatasync of 32 KiB in the same run
search        10 results: ours by words, windows and token signs; mem0 and chromadb by vector
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from results import conditions, write_section

from holdfast.errors import HoldfastError
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.evaluation.encoded import encode
from holdfast.longterm.retrieval.embed import MiniLM
from holdfast.units import format_bytes

HERE = Path(__file__).parent
COUNT, SEED, ASKED = 100_000, 0, 300
PEERS = {"mem0": "mem0ai", "chromadb": "chromadb"}
TOKENS = 27  # of a turn, about as many as LoCoMo's have


def environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PEERS.values()], check=True
        )
    return python


def prepare(folder: Path, count: int) -> None:
    """Texts, vectors and questions of all sides."""
    pick = np.random.default_rng(SEED)
    embedder = MiniLM()
    conversations = locomo.load(locomo.path())
    encoded = [encode(embedder, one) for one in conversations]
    lines = [turn.line for one in conversations for turn in one.turns]
    base = np.concatenate([one.own for one in encoded])
    blobs = [blob or b"" for one in encoded for blob in one.tokens]
    vocabulary = np.array(sorted({word for line in lines for word in line.split()}))
    texts, vectors, tokens = [], np.empty((count, base.shape[1]), np.float32), []
    size = TOKENS * base.shape[1] // 8
    for i in range(count):
        source = i % len(lines)
        words = np.array(lines[source].split(), object)
        swapped = pick.random(len(words)) < 0.2
        words[swapped] = pick.choice(vocabulary, int(swapped.sum()))
        texts.append(f"{' '.join(words)} {i}")
        turned = base[source] + 0.02 * pick.standard_normal(base.shape[1])
        vectors[i] = turned / np.linalg.norm(turned)
        tokens.append(np.frombuffer((blobs[source] * TOKENS)[:size].ljust(size, b"\0"), np.uint8))
    queries = [query for one in encoded for query in one.queries]
    chosen = [queries[i] for i in pick.choice(len(queries), ASKED, replace=False)]
    (folder / "texts.json").write_text(json.dumps(texts))
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "tokens.npy", np.stack(tokens))
    (folder / "questions.json").write_text(json.dumps([query.text for query in chosen]))
    np.save(folder / "asked.npy", np.stack([query.vector for query in chosen]))
    held: dict[str, np.ndarray] = {}
    for i, query in enumerate(chosen):
        assert query.states is not None and query.words is not None
        held |= {f"s{i}": query.states, f"w{i}": np.array(query.words)}
    np.savez(folder / "states.npz", **held)


def measure(side: str, python: Path, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), str(HERE / "memory_peer.py"), side, str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise HoldfastError(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| | add p50 ms | add p99 | search p50 ms | search p99 | RSS added | on disk | bulk s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, one in found.items():
        rows.append(
            f"| {side} | {one['add']['p50']:.2f} | {one['add']['p99']:.2f} "
            f"| {one['search']['p50']:.1f} | {one['search']['p99']:.1f} "
            f"| {format_bytes(one['rss_bytes'])} | {format_bytes(one['disk_bytes'])} "
            f"| {one['bulk_seconds']:.0f} |"
        )
    full = found["ours-full"]
    rows += [
        "",
        f"One fdatasync in the same run: p50 {full['fdatasync']['p50']:.2f} ms; an add that waits "
        f"for the disk takes {full['add']['p50'] - full['fdatasync']['p50']:+.2f} ms beside it. "
        f"The first search, which reads the index from the file, took "
        f"{full['first_search_seconds']:.1f} s. mem0 searches one vector store in RAM and on disk, "
        "chromadb an HNSW graph; neither weighs words.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--side", action="append", help="only these; repeatable")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    about = conditions()
    peers = environment(options.venv)
    found = {}
    with tempfile.TemporaryDirectory(dir=HERE) as name:
        folder = Path(name)
        prepare(folder, options.count)
        for side in options.side or ("ours-full", "ours-process", *PEERS):
            python = peers if side in PEERS else Path(sys.executable)
            found[side] = measure(side, python, folder)
            print(side, json.dumps(found[side]), file=sys.stderr)
    if options.json:
        print(json.dumps({"count": options.count, **found}))
    else:
        print(table(found))
    if options.write:
        write_section(f"{options.count:,} memories", table(found), about)


if __name__ == "__main__":
    main()
