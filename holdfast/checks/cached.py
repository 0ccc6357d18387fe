"""Small models that checks share: trained once per machine, read back from then on."""

import hashlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from holdfast import host

Model = TypeVar("Model", bound=nn.Module)


def trained_once(
    model: Model, train: Callable[[Model], object], name: str, seed: int, *recipe: str
) -> Model:
    """Give `model` the weights of `train(model)`, trained or read back, and put it in eval mode.

    The file is called by `name`, `seed` and the hash of `recipe` and of torch's and transformers'
    versions; `recipe` is what else the weights depend on, such as source code and a corpus hash.
    """
    from safetensors.torch import load_file

    path = _path(name, seed, recipe)
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        train(model)
        _save(model.state_dict(), path)
    return model.eval()


def _path(name: str, seed: int, recipe: tuple[str, ...]) -> Path:
    import transformers

    parts = (*recipe, torch.__version__, transformers.__version__)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return host.cache_dir() / f"{name}-{digest}-{seed}.safetensors"


def _save(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(state, Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        warnings.warn(f"{path.name} is not cached and will be trained again: {error}", stacklevel=4)
