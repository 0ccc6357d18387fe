"""`holdfast serve`: a model behind an OpenAI-compatible API, within one budget."""

from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="Model directory, or hub id in the local cache.")],
    context_budget: Annotated[
        str, typer.Option(help="Bytes of keys and values of all requests, e.g. 256MiB.")
    ],
    policy: Annotated[
        str,
        typer.Option(help="What stays of a long request; full keeps all it may produce."),
    ] = "full",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the policy, e.g. sinks=8; repeatable.")
    ] = None,
    tokens_per_request: Annotated[
        int | None,
        typer.Option(help="Entries per request, if tokens are dropped [default: 8 requests fit]."),
    ] = None,
    prefix_budget: Annotated[
        str | None,
        typer.Option(help="Part for system prompts, stored once [default: an eighth]."),
    ] = None,
    form: Annotated[str, typer.Option(help="How it is stored: dense, int8 or int4.")] = "dense",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer [default: the model's].")
    ] = None,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; others get 429.")] = 64,
    max_body: Annotated[str, typer.Option(help="Bytes of a request.")] = "4MiB",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="HOLDFAST_TOKEN", help="What clients must send."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients [default: its last part].")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory file or URL: a space for each `user` that requests name."),
    ] = None,
    memory_budget: Annotated[
        int, typer.Option(help="Words of memories before each message.")
    ] = 256,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a directory or a cached hub id.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if any].")] = None,
    dtype: Annotated[str | None, typer.Option(help="[default: that of the weights].")] = None,
) -> None:
    """Serve a model behind OpenAI's API within one budget of bytes.

    Every request reserves what its context takes before it runs; until then it waits, and where
    too many wait it is refused with 429. The log goes to standard error.

    Example: holdfast serve runs/small --context-budget 256MiB --port 8000
    """
    import logging
    import time
    from contextlib import ExitStack
    from pathlib import Path

    from holdfast.cli.cache import make_policy
    from holdfast.context.cache.forms import stored_form
    from holdfast.context.loading import load
    from holdfast.errors import UsageError
    from holdfast.units import format_bytes, parse_bytes

    try:
        import uvicorn

        from holdfast.serve.app import create_app
        from holdfast.serve.engine import Engine
        from holdfast.serve.openai_api import Served
        from holdfast.serve.sizes import Sizes
        from holdfast.serve.text import Text
    except ImportError as error:
        raise UsageError(
            f"serving needs the package {error.name}; install it: pip install 'holdfast[serve]'"
        ) from error
    refuse_open_doors(host, token)
    if waiting < 0:
        raise UsageError(f"--waiting {waiting}: 0 or more requests may wait")
    net, words = load(model, tokenizer=tokenizer, device=device, dtype=dtype)
    sizes = Sizes(
        net, parse_bytes(context_budget), make_policy(policy, option),
        tokens_per_request=tokens_per_request, longest=max_length, form=stored_form(form, net),
        prefix_budget=None if prefix_budget is None else parse_bytes(prefix_budget),
    )  # fmt: skip
    text = Text(net, words)
    engine = Engine(net, sizes, ends=text.ends, waiting=waiting)
    with ExitStack() as stack:
        past = None
        if memory is not None:
            from holdfast.cli.memory_options import opened
            from holdfast.longterm.recollection import Recollection

            past = Recollection(stack.enter_context(opened(memory)), memory_budget)
        served = Served(name or Path(model).name, engine, text, int(time.time()), past)
        app = create_app(served, token=token or None, body_bytes=parse_bytes(max_body))
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("holdfast.serve").info(
            "serving %s at http://%s:%d/v1 with %s of context, policy %s",
            served.name, host, port, format_bytes(sizes.budget), policy,
        )  # fmt: skip
        uvicorn.run(
            app, host=host, port=port, access_log=False, log_level="warning", lifespan="on",
            timeout_graceful_shutdown=10,
        )  # fmt: skip


def refuse_open_doors(host: str, token: str | None) -> None:
    """A server that other machines reach needs a token.

    Raises:
        UsageError: `host` is not this machine alone, and there is no token.
    """
    import ipaddress

    from holdfast.errors import UsageError

    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not token:
        raise UsageError(
            f"--host {host} lets other machines in; set a token: HOLDFAST_TOKEN=... or --token"
        )
