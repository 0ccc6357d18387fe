"""tinylm: a byte-level language model that learns something real in seconds, for checks and tests.

The corpus is 120 files of Python's standard library, so that it is always there; every 20th file is
held out. The model is a two-layer LLaMA; 120 Adam steps bring validation to 2.26, 2.26 and 2.30
nats per byte with seeds 0, 1 and 2.
"""

import functools
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from holdfast.checks.cached import trained_once
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

STEPS, BATCH, LENGTH, LR = 120, 16, 64, 3e-3
VALIDATION_WINDOWS = 256

# Modules that every Python from 3.11 has as one file.
_NAMES = """
    abc argparse ast base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop colorsys
    compileall configparser contextlib copy copyreg csv dataclasses datetime difflib dis doctest
    enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext
    glob graphlib gzip hashlib heapq hmac imaplib inspect io ipaddress keyword linecache locale
    lzma mailbox mimetypes modulefinder netrc ntpath numbers opcode operator os pdb pickle
    pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile
    pyclbr pydoc queue quopri random reprlib rlcompleter runpy sched secrets selectors shelve
    shlex shutil signal site smtplib socket socketserver ssl stat statistics stringprep
    subprocess symtable tabnanny tarfile tempfile textwrap threading timeit token tokenize trace
    traceback tracemalloc turtle types typing uuid warnings wave weakref webbrowser zipapp
    zipimport asyncio/base_events json/decoder unittest/case
"""
FILES = tuple(_NAMES.split())


@functools.cache
def _texts() -> tuple[bytes, bytes]:
    """The training and the validation files' ASCII bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = []
    for name in FILES:
        path = library / f"{name}.py"
        if not path.exists():
            raise UsageError(f"{path} is missing; tinylm needs Python's standard library as source")
        texts.append(path.read_bytes())
    ascii_only = bytes(range(128, 256))
    train = b"".join(text for i, text in enumerate(texts) if i % 20 != 19)
    val = b"".join(texts[19::20])
    return train.translate(None, ascii_only), val.translate(None, ascii_only)


def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation tokens: 1-D int64 below 128, one per byte."""
    train, val = _texts()
    return _tokens(train), _tokens(val)


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def corpus_hash() -> str:
    """SHA-256 of both parts; another Python version has other sources and another hash."""
    return hashlib.sha256(b"\0".join(_texts())).hexdigest()


def model(seed: int = 0, **config_overrides) -> "LlamaForCausalLM":
    """An untrained LLaMA in fp32; overrides are those of `LlamaConfig`, e.g. `num_hidden_layers=4`.

    The global random state is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        # A cache would outlive the forward pass and be counted as activations.
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(options | config_overrides)))


def batches(
    tokens: Tensor, steps: int, seed: int, batch: int = BATCH, length: int = LENGTH
) -> Iterator[Tensor]:
    """`steps` tensors (batch, length) int64: windows of `tokens` at random places."""
    if len(tokens) < length:
        raise UsageError(f"{len(tokens)} tokens are fewer than one window of {length}")
    generator = torch.Generator().manual_seed(seed)
    windows = tokens.unfold(0, length, 1)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (batch,), generator=generator)]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train at the optimizer's own constant rate; returns the loss of each step, in nats per byte.

    `on_step(step, loss)` is called after each optimizer step. Batches go to the model's device.
    """
    device = next(model.parameters()).device
    model.train()
    losses = []
    for step, ids in enumerate(batches(corpus()[0], steps, seed)):
        ids = ids.to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Mean loss in nats per byte over the same evenly spaced validation windows every time."""
    device, was_training = next(model.parameters()).device, model.training
    val = corpus()[1]
    starts = torch.linspace(0, len(val) - LENGTH, VALIDATION_WINDOWS).long()
    model.eval()
    losses = [
        model(input_ids=ids, labels=ids).loss.item()
        for ids in val.unfold(0, LENGTH, 1)[starts].to(device).split(64)
    ]
    model.train(was_training)
    return sum(losses) / len(losses)


def trained(seed: int = 0) -> "LlamaForCausalLM":
    """The model after the standard training, in eval mode; trained once per machine, then cached.

    The cache's name holds the hash of this file, the corpus, torch's and transformers' versions.
    """

    def standard(untrained: nn.Module) -> None:
        train(untrained, torch.optim.Adam(untrained.parameters(), lr=LR), seed=seed)

    recipe = (Path(__file__).read_text(), corpus_hash())
    return trained_once(model(seed), standard, "tinylm", seed, *recipe)
