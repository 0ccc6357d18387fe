"""`holdfast memory mcp`: a memory as tools of the Model Context Protocol."""

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.memory_options import opens

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory


@opens(creates=True)
def mcp(
    memory: "Memory",
    http: Annotated[bool, typer.Option("--http", help="Serve HTTP instead of stdio.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen at, with --http.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at, with --http.")] = 8766,
    token: Annotated[
        str | None, typer.Option(envvar="HOLDFAST_TOKEN", help="What HTTP clients must send.")
    ] = None,
) -> None:
    """Offer the memories of one space as tools to any assistant that speaks MCP.

    Over stdio, an assistant starts this command itself; with --http it listens at /mcp.

    Example: holdfast memory mcp notes.memory --user ann
    """
    from holdfast.errors import UsageError

    try:
        from holdfast.longterm.service.mcp import http_app, server
    except ImportError as error:
        raise UsageError(
            f"MCP needs the package {error.name}; install it: pip install 'holdfast[memory]'"
        ) from error
    tools = server(memory)
    if not http:
        tools.run("stdio")
        return
    import uvicorn

    from holdfast.cli.serve import refuse_open_doors

    refuse_open_doors(host, token)
    app = http_app(tools, host=host, token=token or None)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
