"""Numbers of a server in Prometheus' text format."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper ends of the buckets of request durations, in seconds.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Requests:
    """Finished HTTP requests by path and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, path: str, status: int, seconds: float) -> None:
        with self._lock:
            self._counts[path, status] += 1
            place = next((i for i, end in enumerate(BUCKETS) if seconds <= end), len(BUCKETS))
            self._buckets[place] += 1
            self._seconds += seconds

    def lines(self) -> Iterator[str]:
        with self._lock:
            counts, buckets, seconds = dict(self._counts), list(self._buckets), self._seconds
        yield from _head("holdfast_http_requests_total", "counter", "HTTP requests answered.")
        for (path, status), count in sorted(counts.items()):
            yield f'holdfast_http_requests_total{{path="{path}",status="{status}"}} {count}'
        name = "holdfast_http_request_seconds"
        yield from _head(name, "histogram", "From the request to the end of its answer.")
        total = 0
        for end, count in zip((*BUCKETS, "+Inf"), buckets, strict=True):
            total += count
            yield f'{name}_bucket{{le="{end}"}} {total}'
        yield f"{name}_sum {seconds:.6f}"
        yield f"{name}_count {total}"


def exposition(engine: "Engine", requests: Requests) -> str:
    """The document that Prometheus reads."""
    counts = engine.counts
    gauges = {
        "context_budget_bytes": ("Bytes of keys and values at most.", engine.sizes.budget),
        "context_held_bytes": ("Bytes of keys and values now.", engine.held_bytes),
        "context_peak_bytes": ("Bytes of keys and values at most so far.", engine.peak_bytes),
        "context_reserved_bytes": ("Bytes granted to running requests.", engine.reserved_bytes),
        "shared_prefix_bytes": ("Bytes of shared prefixes.", engine.shared_bytes),
        "requests_running": ("Requests that hold keys and values.", engine.running),
        "requests_waiting": ("Requests that wait for room.", engine.waiting),
    }  # fmt: skip
    totals = {
        "requests_refused_total": ("Requests refused because too many wait.", counts["refused"]),
        "prompt_tokens_total": ("Tokens of prompts.", counts["prompt_tokens"]),
        "shared_prompt_tokens_total": (
            "Tokens of prompts that were not read again.", counts["shared_prompt_tokens"]
        ),
        "generated_tokens_total": ("Tokens produced.", counts["generated_tokens"]),
        "preemptions_total": (
            "Requests that outgrew what was predicted.", engine.scheduler.preemptions
        ),
    }  # fmt: skip
    lines = [*numbers("gauge", gauges), *numbers("counter", totals)]
    lines += _head("holdfast_requests_ended_total", "counter", "Requests by how they ended.")
    for reason in ("stop", "length", "cancelled", "error", "shutdown"):
        count = counts[f"ended_{reason}"]
        lines.append(f'holdfast_requests_ended_total{{reason="{reason}"}} {count}')
    return "\n".join([*lines, *requests.lines()]) + "\n"


def numbers(kind: str, values: Mapping[str, tuple[str, float]]) -> Iterator[str]:
    """Lines of gauges or counters: what each is, and its value, by name."""
    for name, (help, value) in values.items():
        yield from _head(f"holdfast_{name}", kind, help)
        yield f"holdfast_{name} {value}"


def _head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
