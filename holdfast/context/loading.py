"""A language model with its tokenizer, from a directory or the local hub cache, ready to read."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from holdfast.errors import UsageError
from holdfast.training.tokenizers import load_tokenizer


def load(
    spec: str,
    *,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model in eval mode, and the tokenizer beside it; nothing is downloaded.

    Args:
        spec: a directory, such as `holdfast train` writes, or a hub id in the local cache.
        tokenizer: "bytes", a directory or a hub id; by default the model's.
        device: "cpu", "cuda", ...; by default CUDA where there is any.
        dtype: "float32", "bfloat16", ...; by default that of the weights.

    Raises:
        UsageError: nothing there opens as a causal model, or no tokenizer is known.
    """
    kind = "auto" if dtype is None else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype | str):
        raise UsageError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(spec, dtype=kind, local_files_only=True)
    # Whatever a broken directory makes the loader raise, the user is told the same ways out.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{spec!r} does not open as a causal language model ({reason}). Give a directory with "
            "config.json and weights, such as holdfast train writes, or download the hub id first "
            "(`hf download ID`)"
        ) from error
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return model, load_tokenizer(tokenizer or _tokenizer_of(spec))


def _tokenizer_of(spec: str) -> str:
    """Where a model's tokenizer is; an adapter's directory may leave it with its base."""
    folder = Path(spec)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "tokenizer_config.json").exists():
        return json.loads(adapter.read_text())["base_model_name_or_path"]
    return spec
