"""A server in this process, on a free port of the loopback: for checks and tests."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.context.cache.policies import find
from holdfast.training.tokenizers import byte_tokenizer

NAME = "tiny"
# Seconds after which a server that should have started, or ended, is given up.
PATIENCE = 30.0


@dataclass
class Server:
    """Where it listens, and the engine behind it."""

    url: str
    engine: Any
    text: Any

    def idle(self, seconds: float = PATIENCE) -> bool:
        """Wait until nobody runs or waits; False if that takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not (self.engine.running or self.engine.waiting):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(
    model: PreTrainedModel,
    budget: int,
    *,
    policy: str = "full",
    tokenizer: PreTrainedTokenizerBase | None = None,
    token: str | None = None,
    waiting: int = 64,
    body_bytes: int = 1 << 20,
    past: Any = None,
    **sizes: Any,
) -> Iterator[Server]:
    """Serve `model` under the name `NAME`; `sizes` are options of `Sizes`."""
    import uvicorn

    from holdfast.serve.app import create_app
    from holdfast.serve.engine import Engine
    from holdfast.serve.openai_api import Served
    from holdfast.serve.sizes import Sizes
    from holdfast.serve.text import Text

    text = Text(model, tokenizer or byte_tokenizer())
    engine = Engine(model, Sizes(model, budget, find(policy), **sizes), ends=text.ends,
                    waiting=waiting)  # fmt: skip
    app = create_app(
        Served(NAME, engine, text, int(time.time()), past), token=token, body_bytes=body_bytes
    )  # fmt: skip
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", access_log=False, lifespan="on",
                       timeout_graceful_shutdown=5)
    )  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield Server(f"http://127.0.0.1:{port}", engine, text)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listening.close()
        if thread.is_alive():
            raise RuntimeError("the server did not end")
