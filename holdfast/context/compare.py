"""Quality per byte: every cache policy on the same texts, model and budgets.

Perplexity is of texts read through the cache. Recall is of phrases: at the end of a text the first
half of a phrase from far back is said again, and the model predicts the second half, token by
token; what no longer is in the cache cannot be continued.
"""

import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.context.cache.bounded import BoundedCache, fingerprint
from holdfast.context.cache.forms import stored_form
from holdfast.context.cache.policies import find, untrained
from holdfast.context.cache.policies import policies as known_policies
from holdfast.context.cache.policy import CachePolicy
from holdfast.context.stream import surprisals
from holdfast.errors import DoesNotFit, HoldfastError, UsageError, unknown
from holdfast.files import write_text
from holdfast.forms.base import Form
from holdfast.training.sources import DataSource, Reading, documents
from holdfast.units import format_bytes

# Half of a phrase, and phrases per text.
HALF, PHRASES = 12, 4


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str],
    budgets: Sequence[int],
    *,
    policies: Sequence[str] | None,
    forms: Sequence[str],
    tokens: int,
    texts: int,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Measure every policy at every budget and write table, plot and JSON to `out`.

    Raises:
        UsageError: too little text, an unknown policy or form.
        DoesNotFit: no policy fits any budget.
    """
    known = known_policies()
    for name in policies or ():
        if name not in known:
            raise unknown("cache policy", name, known)
    names = list(policies or untrained())
    ids = windows(tokenizer, data, tokens, texts, seed).to(model.device)
    job = {
        "model": fingerprint(model),
        "texts": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16],
        "seed": seed,
    }
    path = out / "compare.json"
    done = _earlier(path, job)
    wanted: list[tuple[str, str, int | None]] = [("full", "dense", None)]
    wanted += [
        (name, form, budget)
        for budget in budgets
        for form in forms
        for name in names
        if known[name].drops or policies
    ]
    rows: list[dict[str, Any]] = []
    for number, (name, form, budget) in enumerate(wanted, 1):
        row = done.get((name, form, budget))
        if row is None:
            size = "no limit" if budget is None else format_bytes(budget)
            print(f"[{number}/{len(wanted)}] {name} {form} {size}", file=sys.stderr)
            row = _measure(model, ids, find(name), stored_form(form, model), budget, seed)
            row = {"policy": name, "form": form, "budget_bytes": budget, **row}
        rows.append(row)
        write_text(path, json.dumps({"job": job, "rows": rows}, indent=2) + "\n")
    if len(rows) > 1 and all("error" in row for row in rows[1:]):
        raise DoesNotFit(f"no policy fits these budgets: {rows[1]['error']}")
    document = {"job": job, "rows": rows}
    write_text(out / "compare.md", "\n".join(table(document)) + "\n")
    draw(document, out / "compare.png")
    return document


def windows(
    tokenizer: PreTrainedTokenizerBase, data: Sequence[str], tokens: int, texts: int, seed: int
) -> Tensor:
    """Texts (texts,tokens) int64 from random places of what the paths hold."""
    least = 4 * HALF * PHRASES
    if tokens < least or texts < 1:
        raise UsageError(f"--tokens {tokens} --texts {texts}: use {least} and 1 or more")
    ids: list[int] = []
    # No more is tokenized than a thousand places to begin at need.
    enough = tokens * max(texts, 1) * 16
    for document in documents(DataSource(tuple(data)), Reading()):
        text = document.content
        if not isinstance(text, str):
            text = "\n".join(str(message.get("content", "")) for message in text)
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= enough:
            break
    if len(ids) < tokens * texts:
        raise UsageError(
            f"the data has {len(ids)} tokens, {texts} texts of {tokens} need {texts * tokens}; "
            "add data, or lower --tokens or --texts"
        )
    g = torch.Generator().manual_seed(seed)
    starts = torch.randperm(len(ids) - tokens + 1, generator=g)[:texts]
    whole = torch.tensor(ids)
    return torch.stack([whole[start : start + tokens] for start in starts.tolist()])


def _measure(
    model: PreTrainedModel, ids: Tensor, policy: CachePolicy, form: Form | None,
    budget: int | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One row: perplexity, recall, bytes of one text's cache, and speed."""
    try:
        if budget is None:
            most = ids.shape[1] + 2 * HALF
            one = BoundedCache.for_model(model, policy, tokens=most, batch=1, form=form)
        else:
            one = BoundedCache.for_model(model, policy, budget=budget, batch=1, form=form)
    except (DoesNotFit, UsageError) as error:
        return {"error": str(error)}
    cache = BoundedCache.for_model(
        model, policy, tokens=one.capacity, batch=len(ids), form=form, chunk=one.chunk
    )
    start = time.perf_counter()
    try:
        nats = surprisals(model, ids, cache)
    except HoldfastError as error:
        return {"error": str(error)}
    seconds = time.perf_counter() - start
    return {
        "peak_bytes": one.peak_nbytes(),
        "capacity": one.capacity,
        "perplexity": math.exp(nats[:, 1:].mean().item()),
        "recall": _recall(model, ids, cache, seed),
        "tokens_per_second": ids.numel() / seconds,
    }


def _recall(model: PreTrainedModel, ids: Tensor, cache: BoundedCache, seed: int) -> float:
    """Fraction of tokens predicted of phrases said before, evenly spread over the first 3/4."""
    g = torch.Generator().manual_seed(seed)
    right = 0
    room = ids.shape[1] * 3 // 4 // PHRASES
    for number in range(PHRASES):
        place = number * room + int(torch.randint(room - 2 * HALF, (), generator=g))
        phrase = ids[:, place : place + 2 * HALF]
        after = copy.deepcopy(cache)
        found = []
        for part in phrase.split(min(after.chunk, HALF), 1):
            logits = model(
                part, past_key_values=after, use_cache=True,
                position_ids=_positions(after, part),
            ).logits  # fmt: skip
            found.append(logits.argmax(-1))
        guess = torch.cat(found, 1)[:, HALF - 1 : -1]
        right += int((guess == phrase[:, HALF:]).sum())
    return right / (PHRASES * HALF * len(ids))


def _positions(cache: BoundedCache, ids: Tensor) -> Tensor:
    first = 0 if cache.policy.rotates else cache.get_seq_length()
    return torch.arange(first, first + ids.shape[1], device=ids.device)[None]


def _earlier(path: Path, job: dict[str, Any]) -> dict[tuple[str, str, int | None], dict[str, Any]]:
    """Rows of the same job that were measured before."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
        if document["job"] != job:
            return {}
        return {(r["policy"], r["form"], r["budget_bytes"]): r for r in document["rows"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no earlier comparison ({error}); move it away") from error


def table(document: dict[str, Any]) -> Iterator[str]:
    """Rows as Markdown, the best recall of each budget first."""
    yield "| budget | policy | form | entries | peak bytes | perplexity | recall | tokens/s |"
    yield "|---|---|---|---|---|---|---|---|"
    rows = document["rows"]
    order = sorted(
        rows,
        key=lambda r: (r["budget_bytes"] or math.inf, "error" in r, -r.get("recall", 0),
                       r.get("perplexity", 0)),
    )  # fmt: skip
    for row in order:
        budget = "none" if row["budget_bytes"] is None else format_bytes(row["budget_bytes"])
        head = f"| {budget} | {row['policy']} | {row['form']} |"
        if "error" in row:
            yield f"{head} | | does not fit | | |"
            continue
        yield (
            f"{head} {row['capacity']} | {row['peak_bytes']:,} | {row['perplexity']:.3f} | "
            f"{row['recall']:.3f} | {row['tokens_per_second']:,.0f} |"
        )


def show(document: dict[str, Any], out: Path) -> None:
    for line in table(document):
        print(line)
    print(f"written: {out / 'compare.md'}, {out / 'compare.png'}, {out / 'compare.json'}")


def draw(document: dict[str, Any], path: Path) -> None:
    """Perplexity and recall over bytes, a line per policy and form."""
    from holdfast.plan.figures import plots, save_figure

    figure = plots().Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    rows = [row for row in document["rows"] if "error" not in row]
    lines = dict.fromkeys((r["policy"], r["form"]) for r in rows if r["budget_bytes"])
    for axis, what in zip(axes, ("perplexity", "recall"), strict=True):
        for name, form in lines:
            points = sorted(
                (r["peak_bytes"], r[what]) for r in rows
                if (r["policy"], r["form"]) == (name, form) and r["budget_bytes"]
            )  # fmt: skip
            label = name if form == "dense" else f"{name}, {form}"
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        for row in rows:
            if row["budget_bytes"] is None:
                axis.axhline(row[what], color="0.5", linestyle="--", label="everything kept")
        axis.set_xlabel("bytes at the peak")
        axis.set_ylabel(what)
        axis.set_xscale("log", base=2)
    axes[0].legend(fontsize=7)
    save_figure(figure, path)
