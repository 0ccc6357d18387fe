"""The server under more clients than its budget holds, some of which break off or send nonsense.

Bytes are those of the storages that caches really have, followed from their making to their end,
whatever the server believes. Answers are compared with what the model says alone.
"""

import json
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from holdfast.checks import Result, check, tinylm
from holdfast.checks.serving import NAME, Server, serving
from holdfast.context.cache.slots import Slots
from holdfast.host import PeakRss

CLIENTS, HELD, WAITING = 32, 8, 16
PROMPT, OUTPUT = 64, 64
SYSTEM = "You finish lines of Python and say nothing else."
TOKEN = "let me in"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
# Seconds within which everything must be free again once the clients are gone.
FREE = 5.0
# Bytes by which the process may grow once everything has been in use: 32 new clients' connections.
GROWTH = 64 << 20
# What is wrong, and the status that says so.
NONSENSE: list[tuple[int, bytes, dict[str, str]]] = [
    (400, b'{"model": "tiny", "prompt":', HEADERS),
    (400, json.dumps({"model": NAME, "prompt": "x" * 100_000}).encode(), HEADERS),
    (413, b"x" * (2 << 20), HEADERS),
    (401, json.dumps({"model": NAME, "prompt": "x"}).encode(), {"Authorization": "Bearer no"}),
    (422, json.dumps({"model": NAME, "prompt": "x", "temperature": -1}).encode(), HEADERS),
    (400, json.dumps({"model": NAME, "prompt": "x", "max_tokens": 2000}).encode(), HEADERS),
]


class Live:
    """Bytes of caches' storages: `now`, and `peak` since the beginning."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.RLock()
        self._refs: dict[int, weakref.ref] = {}
        self._next = 0

    def _change(self, nbytes: int) -> None:
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        self._change(nbytes)
        self._next += 1
        number = self._next

        def gone(_: weakref.ref) -> None:
            del self._refs[number]
            self._change(-nbytes)

        self._refs[number] = weakref.ref(storage, gone)


@contextmanager
def live() -> Iterator[Live]:
    """Follow every storage that a cache makes, in any thread."""
    found, add = Live(), Slots.add

    def followed(slots: Slots, name: str, *rest, **named) -> None:
        known = set(slots.tensors)
        add(slots, name, *rest, **named)
        for part in set(slots.tensors) - known:
            found.follow(slots.tensors[part])

    with patch.object(Slots, "add", followed):
        yield found


class Client:
    """One of many; counts what happens to it."""

    def __init__(self, server: Server, seed: int, want: dict[str, str]):
        import httpx

        self.url, self.want, self.random = server.url, want, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.http = httpx.Client(timeout=120)

    def run(self, until: float) -> None:
        acts: list[Callable[[], None]] = [self.complete, self.chat, self.leave, self.nonsense]
        with self.http:
            while time.monotonic() < until:
                act = self.random.choices(acts, (11, 4, 2, 3))[0]
                try:
                    act()
                except Exception as error:
                    self.wrong.append(f"{act.__name__}: {error!r}")

    def _accept(self, answer, expected: int = 200) -> bool:
        """Whether it is what is expected; where there is no room, wait as told, but not long."""
        if answer.status_code == 429 and expected == 200:
            self.counts["refused"] += 1
            time.sleep(min(0.5, float(answer.headers["Retry-After"])))
            return False
        if answer.status_code != expected:
            answer.read()
            self.wrong.append(f"{answer.status_code} for {expected}: {answer.text[:200]}")
            return False
        return True

    def complete(self) -> None:
        prompt = self.random.choice(list(self.want))
        streamed = self.random.random() < 0.5
        body = {"model": NAME, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0,
                "stream": streamed}  # fmt: skip
        with self.http.stream(
            "POST", f"{self.url}/v1/completions", json=body, headers=HEADERS
        ) as answer:
            if not self._accept(answer):
                return
            if streamed:
                text = "".join(e["choices"][0]["text"] for e in _events(answer))
            else:
                text = json.loads(answer.read())["choices"][0]["text"]
        self.counts["answers"] += 1
        if text != self.want[prompt]:
            self.wrong.append(f"{prompt!r} was answered {text!r}")

    def chat(self) -> None:
        answer = self.http.post(
            f"{self.url}/v1/chat/completions", headers=HEADERS, json=_chat("def f(x):")
        )
        if self._accept(answer):
            self.counts["chats"] += 1

    def leave(self) -> None:
        body = {"model": NAME, "prompt": "import ", "max_tokens": OUTPUT, "stream": True}
        with self.http.stream(
            "POST", f"{self.url}/v1/completions", json=body, headers=HEADERS
        ) as answer:
            if self._accept(answer):
                events = _events(answer)
                for _ in range(self.random.randrange(3)):
                    next(events, None)
                self.counts["broken off"] += 1

    def nonsense(self) -> None:
        status, body, headers = self.random.choice(NONSENSE)
        answer = self.http.post(f"{self.url}/v1/completions", content=body, headers=headers)
        if self._accept(answer, status) and answer.json()["error"]["message"]:
            self.counts["nonsense"] += 1


def _chat(text: str) -> dict:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0}


def _events(answer) -> Iterator[dict]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


@torch.no_grad()
def _alone(net, prompt: str) -> str:
    ids = torch.tensor([list(prompt.encode())])
    out = net.generate(ids, max_new_tokens=OUTPUT, do_sample=False, use_cache=True)
    return bytes(out[0, ids.shape[1] :].tolist()).decode()


def _load(server: Server, seconds: float, seed: int, want: dict[str, str]) -> list[Client]:
    """Let all clients do what they do for so long."""
    clients = [Client(server, seed * CLIENTS + i, want) for i in range(CLIENTS)]
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def _kill(server: Server, bytes_of: Live, start: int) -> tuple[int, float]:
    """Bytes that long answers hold, and seconds until all are free after everybody left."""
    import httpx

    body = {"model": NAME, "prompt": "class ", "max_tokens": 800, "stream": True}
    with httpx.Client(timeout=60) as http:
        answers = []
        for _ in range(2):
            request = http.build_request(
                "POST", f"{server.url}/v1/completions", json=body, headers=HEADERS
            )
            answers.append(http.send(request, stream=True))
            next(answers[-1].iter_lines())
        held = bytes_of.now
        for answer in answers:
            answer.close()
    began = time.monotonic()
    while bytes_of.now != start and time.monotonic() < began + FREE:
        time.sleep(0.01)
    return held, time.monotonic() - began


@check(
    "server",
    claim="32 clients at once under a budget for 8 get their answers, wait or 429, never an "
    "error, and no byte is above the budget or left behind",
)
def run(seed: int, full: bool = False) -> Result:
    import httpx

    seconds = 120.0 if full else 30.0
    net = tinylm.trained(seed)
    lines = [line for line in bytes(tinylm.corpus()[1].tolist()).decode().split("\n") if line]
    prompts = [line[:PROMPT] for line in random.Random(seed).sample(lines, HELD)]
    want = {prompt: _alone(net, prompt) for prompt in prompts}
    unit = 2 * 2 * 64 * 4  # keys and values of two layers of 64 in fp32
    one = (PROMPT + OUTPUT) * unit
    shared, room = 128 * unit, HELD * (one + 24 * unit)
    budget = shared + room
    with (
        live() as storages,
        serving(net, budget, token=TOKEN, waiting=WAITING, prefix_budget=shared) as server,
    ):
        # The shared system prompt is kept from the first chat on; all else must go.
        httpx.post(f"{server.url}/v1/chat/completions", json=_chat("import"), headers=HEADERS,
                   timeout=60).raise_for_status()  # fmt: skip
        server.idle()
        start = storages.now
        # Threads and pools take memory as they start: what still grows later is a leak.
        clients = _load(server, seconds / 2, 2 * seed, want)
        with PeakRss() as rss:
            clients += _load(server, seconds / 2, 2 * seed + 1, want)
        idle = server.idle()
        after, running = storages.now, server.engine.counts
        held, freed = _kill(server, storages, start)
        wrong = [line for client in clients for line in client.wrong]
        counts = sum((client.counts for client in clients), Counter())
        end, peak = storages.now, storages.peak
    passed = (
        not wrong and idle and peak <= budget and start == after == end and held > start
        and freed < FREE and all(counts[kind] > 0 for kind in ("answers", "chats", "refused",
                                                              "broken off", "nonsense"))
        and running["ended_error"] == 0 and peak > 4 * one
        and rss.increase <= GROWTH
    )  # fmt: skip
    return Result(
        measured={
            "seconds": seconds, **{k: counts[k] for k in sorted(counts)},
            "errors": len(wrong), "first error": wrong[0] if wrong else "none",
            "peak bytes": peak, "bytes before": start, "bytes after": end,
            "seconds until bytes of killed clients were free": round(freed, 3),
            "resident set grew in the second half by": rss.increase,
        },
        baseline={"bytes of all clients at once": CLIENTS * one},
        threshold=f"no error but 429; peak bytes <= {budget:,}, above half of it; bytes after = "
        f"bytes before; bytes of killed clients free within {FREE:g} s; in the second half the "
        f"resident set grows by at most {GROWTH:,}; every kind of act occurs",
        passed=passed,
    )  # fmt: skip
