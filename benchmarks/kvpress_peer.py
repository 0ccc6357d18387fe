"""kvpress's side of benchmarks/kvpress.py: reads one JSON request, writes one JSON answer.

It runs in kvpress's own environment, with `python -P`: this folder has a kvpress.py too.

A document is read as kvpress's text-generation pipeline reads it: a dense pass over the context
under a press, then the question over what the press left, at the positions that the pipeline gives
it. What the question's end selects by gets the question at the context's end too, as kvpress's
evaluation does it (`query_aware`), Finch behind its delimiter. The pipeline would leave it in the
cache, where the same key twice misleads a small model: its entries are taken out again.
"""

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from kvpress import FinchPress, KeyRerotationPress, SnapKVPress, StreamingLLMPress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast


class Counted(DynamicCache):
    """Knows the most bytes of keys and values that it ever held at once."""

    peak = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        found = super().update(*args, **kwargs)
        self.peak = max(self.peak, nbytes(self))
        return found


def nbytes(cache: DynamicCache) -> int:
    held = [layer for layer in cache.layers if layer.keys is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held)


def presses(question: int) -> dict[str, Any]:
    # SnapKV's window is what selects: the question. Its default of 64 tokens is more than is kept.
    return {
        "snapkv": SnapKVPress(window_size=question),
        "snapkv_rerotated": KeyRerotationPress(SnapKVPress(window_size=question)),
        "streaming_llm": KeyRerotationPress(StreamingLLMPress()),
        "finch": FinchPress(),
    }


@torch.no_grad()
def answer(model: Any, name: str, keep: int, document: Tensor, question: Tensor) -> dict[str, int]:
    """The answer's first token from `keep` entries of the document, "full" from all; and bytes."""
    n, asked = len(document), len(question)
    press = presses(asked).get(name)
    aware = press is not None and name != "streaming_llm"
    context = torch.cat([document, question]) if aware else document
    kept = keep + asked * aware
    if press:
        # Half an entry more, so that rounding never takes one.
        press.compression_ratio = 1 - (kept + 0.5) / len(context)
    if name == "finch":
        # The delimiter costs nothing: the press takes it out again, behind the embedding.
        press.update_model_and_tokenizer(model, tokenizer(model))
        context = torch.cat([document, torch.tensor([press.delimiter_token_id]), question])
    cache = Counted()
    with press(model) if press else contextlib.nullcontext():
        model.model(input_ids=context[None], past_key_values=cache)
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    assert lengths == {kept}, f"{name} left {lengths} entries, {kept} were asked for"
    if aware:
        # topk puts the window first; rotating anew sorts by position.
        document_part = slice(asked, None) if name == "snapkv" else slice(keep)
        for layer in cache.layers:
            layer.keys, layer.values = (x[:, :, document_part] for x in (layer.keys, layer.values))
    held = nbytes(cache)
    first = n if name in ("full", "snapkv") else keep
    positions = torch.arange(first, first + asked)[None]
    logits = model(
        input_ids=question[None], past_key_values=cache, position_ids=positions, logits_to_keep=1
    ).logits
    return {"token": int(logits[0, -1].argmax()), "kept": held, "peak": cache.peak}


def tokenizer(model: Any) -> PreTrainedTokenizerFast:
    """Of a model that has none, because Finch's press gets its delimiter from one."""
    words = {f"<{i}>": i for i in range(model.config.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<0>")))


def runs(request: dict) -> Iterator[dict]:
    episodes = [
        (torch.tensor(one["document"]), torch.tensor(one["question"]))
        for one in request["episodes"]
    ]
    for name in request["presses"]:
        # Finch's press gives the model a token more.
        model = LlamaForCausalLM.from_pretrained(request["model"]).eval()
        for keep in request["keeps"] if name != "full" else [len(episodes[0][0])]:
            found = [answer(model, name, keep, *one) for one in episodes]
            yield {
                "press": name,
                "keep": keep,
                "tokens": [one["token"] for one in found],
                "kept": max(one["kept"] for one in found),
                "peak": max(one["peak"] for one in found),
            }


def main() -> None:
    torch.set_num_threads(1)
    request = json.load(sys.stdin)
    # Whatever else is printed is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = list(runs(request))
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers")}
    json.dump({"versions": versions, "runs": found}, sys.stdout)


if __name__ == "__main__":
    main()
