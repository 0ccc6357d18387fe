"""One side of `benchmarks/memory.py`, in a process of its own: ours, mem0 or chromadb.

    python benchmarks/memory_peer.py SIDE FOLDER

FOLDER has `texts.json`, `vectors.npy`, `questions.json` and `asked.npy`; for ours also `tokens.npy`
and `states.npz`. Prints one JSON document.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SINGLE = 300  # adds that are timed one by one
LIMIT = 10


def rss() -> int:
    """Bytes resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmRSS")


def disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return {
        "p50": 1e3 * float(np.percentile(seconds, 50)),
        "p99": 1e3 * float(np.percentile(seconds, 99)),
    }


def timed(call: Callable[..., Any], arguments: list[Any]) -> list[float]:
    seconds = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        seconds.append(time.perf_counter() - start)
    return seconds


class Data:
    """Texts and vectors of all sides; the last `SINGLE` texts are added one by one."""

    def __init__(self, folder: Path):
        self.texts: list[str] = json.loads((folder / "texts.json").read_text())
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self.questions: list[str] = json.loads((folder / "questions.json").read_text())
        self.asked = np.load(folder / "asked.npy")
        self.many = len(self.texts) - SINGLE
        self.by_text = {text: i for i, text in enumerate(self.texts)}


def sync_seconds(folder: Path) -> list[float]:
    """One fdatasync of as many bytes as an add writes, over and over."""
    file = os.open(folder / "synced", os.O_CREAT | os.O_WRONLY)
    seconds = []
    for _ in range(SINGLE):
        os.write(file, bytes(32 * 1024))
        start = time.perf_counter()
        os.fdatasync(file)
        seconds.append(time.perf_counter() - start)
    os.close(file)
    os.unlink(folder / "synced")
    return seconds


def ours(folder: Path, data: Data, durability: str) -> dict[str, Any]:
    from holdfast.longterm.memory import Memory
    from holdfast.longterm.retrieval.vectors import InContext, Query

    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    states = np.load(folder / "states.npz")

    class Given:
        """Vectors that were encoded before."""

        id, dim = "given", data.vectors.shape[1]

        def encode(self, texts):
            return np.stack([data.vectors[data.by_text[text]] for text in texts])

        def encode_in_context(self, texts, at):
            found = [data.by_text[texts[i]] for i in at]
            return [InContext(data.vectors[i], tokens[i].tobytes()) for i in found]

        def encode_query(self, text):
            raise AssertionError("the question is given with its vector")

    queries = [
        Query(text, vector, states[f"s{i}"], states[f"w{i}"].tolist())
        for i, (text, vector) in enumerate(zip(data.questions, data.asked, strict=True))
    ]
    place = folder / f"ours-{durability}"
    place.mkdir(exist_ok=True)
    with Memory(place / "memory.db", embedder=Given(), durability=durability) as memory:
        start = time.perf_counter()
        for first in range(0, data.many, 2000):
            some = data.texts[first : min(first + 2000, data.many)]
            messages = [{"content": text, "session": f"s{(first + i) // 30}"} for i, text in
                        enumerate(some)]  # fmt: skip
            memory.add(messages)
        bulk = time.perf_counter() - start
    with Memory(place / "memory.db", embedder=Given(), durability=durability) as memory:
        before = rss()
        start = time.perf_counter()
        memory.search(queries[0].text, limit=LIMIT, encoded=queries[0])
        cold = time.perf_counter() - start
        searches = timed(lambda q: memory.search(q.text, limit=LIMIT, encoded=q), queries)
        grown = rss() - before
        syncs = sync_seconds(folder)
        adds = timed(lambda text: memory.add(text, session="live"), data.texts[data.many :])
        return {
            "bulk_seconds": bulk, "first_search_seconds": cold, "rss_bytes": grown,
            "index_bytes": memory.searcher.nbytes(), "disk_bytes": disk(place),
            "search": milliseconds(searches), "add": milliseconds(adds),
            "fdatasync": milliseconds(syncs),
        }  # fmt: skip


def mem0(folder: Path, data: Data) -> dict[str, Any]:
    os.environ.setdefault("OPENAI_API_KEY", "none: no model is asked with infer=False")
    os.environ["MEM0_TELEMETRY"] = "False"
    os.environ["MEM0_DIR"] = str(folder / "mem0-home")
    from mem0 import Memory

    place = folder / "mem0"
    memory = Memory.from_config({
        "vector_store": {
            "provider": "qdrant",
            "config": {
                "path": str(place),
                "embedding_model_dims": int(data.vectors.shape[1]),
            },
        },
        "history_db_path": str(place / "history.db"),
    })  # fmt: skip

    class Given:
        config = memory.embedding_model.config
        asked = {text: vector for text, vector in zip(data.questions, data.asked, strict=True)}

        def embed(self, text, memory_action=None):
            vector = self.asked.get(text)
            return (data.vectors[data.by_text[text]] if vector is None else vector).tolist()

        def embed_batch(self, texts, memory_action=None):
            return [self.embed(text) for text in texts]

    memory.embedding_model = Given()
    before = rss()
    start = time.perf_counter()
    # Its own bulk path: one vector store call per thousand, as `add` has none for many texts.
    for first in range(0, data.many, 1000):
        chosen = range(first, min(first + 1000, data.many))
        memory.vector_store.insert(
            vectors=[data.vectors[i].tolist() for i in chosen],
            ids=[f"00000000-0000-4000-8000-{i:012d}" for i in chosen],
            payloads=[{"data": data.texts[i], "user_id": "u", "hash": str(i)} for i in chosen],
        )
    bulk = time.perf_counter() - start
    adds = timed(lambda text: memory.add(text, user_id="u", infer=False), data.texts[data.many :])
    searches = timed(
        lambda text: memory.search(text, filters={"user_id": "u"}, top_k=LIMIT), data.questions
    )
    return {
        "bulk_seconds": bulk, "rss_bytes": rss() - before, "disk_bytes": disk(place),
        "search": milliseconds(searches), "add": milliseconds(adds),
    }  # fmt: skip


def chroma(folder: Path, data: Data) -> dict[str, Any]:
    import chromadb
    from chromadb.config import Settings

    place = folder / "chroma"
    client = chromadb.PersistentClient(str(place), settings=Settings(anonymized_telemetry=False))
    collection = client.create_collection("memories", configuration={"hnsw": {"space": "cosine"}})
    before = rss()
    start = time.perf_counter()
    for first in range(0, data.many, 2000):
        chosen = range(first, min(first + 2000, data.many))
        collection.add(
            ids=[str(i) for i in chosen], embeddings=np.stack([data.vectors[i] for i in chosen]),
            documents=[data.texts[i] for i in chosen],
        )  # fmt: skip
    bulk = time.perf_counter() - start
    adds = timed(
        lambda i: collection.add(
            ids=[str(i)], embeddings=data.vectors[i][None], documents=[data.texts[i]]
        ),
        list(range(data.many, len(data.texts))),
    )
    searches = timed(
        lambda i: collection.query(query_embeddings=data.asked[i][None], n_results=LIMIT),
        list(range(len(data.questions))),
    )
    return {
        "bulk_seconds": bulk, "rss_bytes": rss() - before, "disk_bytes": disk(place),
        "search": milliseconds(searches), "add": milliseconds(adds),
    }  # fmt: skip


SIDES: dict[str, Callable[[Path, Data], dict[str, Any]]] = {
    "ours-full": lambda folder, data: ours(folder, data, "full"),
    "ours-process": lambda folder, data: ours(folder, data, "process"),
    "mem0": mem0,
    "chromadb": chroma,
}

if __name__ == "__main__":
    side, where = sys.argv[1], Path(sys.argv[2])
    found = SIDES[side](where, Data(where))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
