"""Decoding behind a shared prefix beside caches of each request's own.

    .venv/bin/python benchmarks/relay.py [--rounds 15] [--lengths 1024 4096] [--write]

Sixteen requests decode one token per step; candidates take turns in one process. Times are medians
over rounds, ratios are medians of the ratios within a round to the first candidate of a table. MiB
are keys and values. With `--write` the tables go to RESULTS.md.
"""

import argparse
import statistics

import torch
from bits import take_turns
from results import conditions, write_section
from transformers import DynamicCache

from holdfast.checks.context.relay import OWN, REQUESTS, caches, model
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.stream import read


def dynamic(source: BoundedCache, net) -> DynamicCache:
    """The same keys and values in transformers' own cache."""
    cache = DynamicCache(config=net.config)
    for number, layer in enumerate(source.bounded):
        every = slice(0, layer.length)
        cache.update(layer.stored_keys(every).clone(), layer.stored_values(every).clone(), number)
    return cache


@torch.no_grad()
def table(length: int, rounds: int) -> str:
    net = model(0)
    prefix = torch.randint(256, (length,))
    relay, own, shared = caches(net, prefix)
    stock, plain = dynamic(own, net), model(0)
    ids = torch.randint(256, (REQUESTS, 1))
    kept = {
        "one prefix, relayed": shared + relay.nbytes(),
        "a cache per request": own.nbytes(),
        "DynamicCache, SDPA": own.shape.kv_bytes(length + OWN),
    }
    seconds = take_turns(
        {
            "one prefix, relayed": lambda: read(net, ids, relay),
            "a cache per request": lambda: read(net, ids, own),
            "DynamicCache, SDPA": lambda: plain(ids, past_key_values=stock).logits,
        },
        rounds,
    )
    base = seconds["one prefix, relayed"]
    lines = [f"| prefix of {length:,} | ms | ratio | MiB |", "| --- | ---: | ---: | ---: |"]
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        ms = 1e3 * statistics.median(times)
        lines.append(f"| {name} | {ms:.1f} | {ratio:.2f} | {kept[name] / 2**20:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.rounds + 2 > OWN:
        parser.error(f"each round decodes a token, and there is room for {OWN - 2}")
    found = conditions()
    body = "\n\n".join(table(length, arguments.rounds) for length in arguments.lengths)
    print(body)
    if arguments.write:
        write_section("A prefix that requests share", body, found)


if __name__ == "__main__":
    main()
