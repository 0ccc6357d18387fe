"""`holdfast chat`: talk to a model without end, in a fixed number of bytes."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import cli

_HELP = """\
/save FILE   write the compressed context      /load FILE   go on from one
/bytes       what the context takes            /reset       begin again
/help        this                              /exit        leave"""


def chat(
    model: Annotated[str, typer.Argument(help="Model directory, or hub id in the local cache.")],
    context_budget: Annotated[
        str, typer.Option(help="Bytes for everything that is remembered, e.g. 64MiB.")
    ] = "64MiB",
    policy: Annotated[
        str, typer.Option(help="What stays when the budget is full; `holdfast cache policies`.")
    ] = "sinks_recent",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the policy, e.g. sinks=8; repeatable.")
    ] = None,
    form: Annotated[str, typer.Option(help="How it is stored: dense, int8 or int4.")] = "dense",
    place: Annotated[str, typer.Option(help="Where it is stored: device or host.")] = "device",
    system: Annotated[str | None, typer.Option(help="Instruction at the start.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Say this instead of asking; repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in a reply.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same replies every time.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on from a saved context.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the context at the end.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory file or URL: recall from it, keep what is said.")
    ] = None,
    memory_budget: Annotated[
        int, typer.Option(help="Tokens of memories before each message.")
    ] = 256,
    user: Annotated[str, typer.Option(help="Whose memories.")] = "",
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a directory or a cached hub id.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if any].")] = None,
    dtype: Annotated[str | None, typer.Option(help="[default: that of the weights].")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Talk to a model without end, in a fixed number of bytes.

    While the budget holds the whole conversation, replies are those of the plain model; from then
    on the policy decides what stays. Messages come from --prompt, from a pipe, line by line, or
    from the terminal.

    Example: holdfast chat runs/small --context-budget 4MiB --policy sinks_recent
    """
    from holdfast.cli.cache import make_policy
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.cache.forms import stored_form
    from holdfast.context.chat import Conversation
    from holdfast.context.loading import load as load_model
    from holdfast.context.sampling import Sampler
    from holdfast.errors import HoldfastError, UsageError
    from holdfast.units import format_bytes

    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: a reply has 1 token or more")
    sample = Sampler(temperature, top_p, seed)
    with cli.stdout_is_json(json), ExitStack() as stack:
        net, words = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype)
        cache = BoundedCache.for_model(
            net, make_policy(policy, option), budget=context_budget, batch=1,
            form=stored_form(form, net), place=place,
        )  # fmt: skip
        talk = Conversation(net, words, cache, sample=sample, system=system)
        past = None
        if memory is not None:
            from holdfast.cli.memory_options import opened
            from holdfast.longterm.recollection import Recollection

            past = Recollection(
                stack.enter_context(opened(memory, user=user)), memory_budget,
                lambda text: len(words(text, add_special_tokens=False).input_ids),
            )  # fmt: skip
            session = past.memory.now().isoformat(timespec="microseconds")
        if load is not None:
            talk.load(load)
        terminal = not prompt and sys.stdin.isatty()
        if terminal:
            print(
                f"{format_bytes(cache.peak_nbytes())} for {cache.capacity} tokens of context, "
                f"then {policy} decides. /help lists commands.",
                file=sys.stderr,
            )
        turns: list[dict[str, Any]] = []
        for text in prompt or _messages(terminal):
            if text.startswith("/") and not prompt:
                try:
                    if not _command(text, talk):
                        break
                except HoldfastError as error:
                    print(error, file=sys.stderr)
                continue
            reply, said = [], text
            turn: dict[str, Any] = {"prompt": text}
            if past is not None:
                context = past.recall(text, past.memory.space)
                turn["memories"], said = list(context.ids), past.before(context, text)
            try:
                for piece in talk.say(said, limit=max_tokens):
                    reply.append(piece)
                    if not json:
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="", file=sys.stderr)
            if not json:
                print()
            turns.append({**turn, "reply": "".join(reply)})
            if past is not None:
                past.keep(text, "".join(reply), session, past.memory.space)
    if save is not None:
        talk.save(save)
    if json:
        cli.print_json({"turns": turns, "context": _facts(talk)})


def _messages(terminal: bool) -> Iterator[str]:
    """Lines of a pipe, or what is typed."""
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _command(line: str, talk: Any) -> bool:
    """Obey a line that begins with a slash; False to leave."""
    from holdfast.errors import UsageError, unknown

    word, _, argument = line.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    if word in ("/save", "/load"):
        if not argument.strip():
            raise UsageError(f"{word} needs a file name, for example {word} talk.context")
        getattr(talk, word[1:])(Path(argument.strip()))
    elif word == "/bytes":
        for name, value in _facts(talk).items():
            print(f"{name:<16} {value:,}" if isinstance(value, int) else f"{name:<16} {value}")
    elif word == "/reset":
        talk.reset()
    elif word == "/help":
        print(_HELP)
    else:
        known = ["/save", "/load", "/bytes", "/reset", "/help", "/exit"]
        raise unknown("command", word, known)
    return True


def _facts(talk: Any) -> dict[str, Any]:
    """What the context of a conversation takes."""
    cache = talk.cache
    layer = cache.bounded[0]
    return {
        "policy": repr(cache.policy),
        "budget_bytes": cache.budget,
        "peak_bytes": cache.peak_nbytes(),
        "held_bytes": cache.nbytes(),
        "capacity": cache.capacity,
        "kept_tokens": layer.length,
        "read_tokens": max(layer.read, default=0),
    }
