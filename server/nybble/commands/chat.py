"""`nybble chat`: one line in, one streamed answer out."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Annotated

import httpx2
from cyclopts import Parameter

from nybble.bench.client import RequestRefused, connect, models
from nybble.chat_client import Conversation, Turn
from nybble.commands.address import ADDRESS_HELP, base_url
from nybble.errors import UsageError
from nybble.terminal import console

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer"


def chat(
    url: Annotated[str | None, Parameter(help=ADDRESS_HELP)] = None,
    /,
    *,
    model: Annotated[str | None, Parameter(help="model to talk to; default: the first one listed")] = None,
    system: Annotated[str | None, Parameter(help="system message")] = None,
    temperature: Annotated[float, Parameter(help="0 is greedy")] = 0.7,
    max_tokens: Annotated[int, Parameter(help="longest answer")] = 512,
    api_key: Annotated[str | None, Parameter(help="key to send; default: OPENAI_API_KEY")] = None,
) -> None:
    """Chat with a running server in the terminal."""
    options = {"temperature": temperature, "max_tokens": max_tokens}
    with asyncio.Runner() as runner:
        client = connect(api_key or os.environ.get("OPENAI_API_KEY"), connections=1)
        address = base_url(url)
        cards = runner.run(models(client, address))
        conversation = Conversation(client, address, model or str(cards[0]["id"]), system, options)
        try:
            _talk(runner, conversation)
        finally:
            runner.run(client.aclose())


def _talk(runner: asyncio.Runner, conversation: Conversation) -> None:
    watched = sys.stdin.isatty()
    if watched:
        import readline  # noqa: F401  gives `input` editing and history

        console().print(f"[bold]{conversation.model}[/bold] at {conversation.url}. [dim]{HELP}[/dim]")
    while (line := _read(watched)) is not None and line != "/exit":
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            console().print(HELP, style="dim")
        elif line:
            _answer(runner, conversation, line, watched)


def _read(watched: bool) -> str | None:
    """The next line, or None at the end of the input."""
    try:
        return input("> " if watched else "").strip()
    except EOFError:
        return None


def _answer(runner: asyncio.Runner, conversation: Conversation, line: str, watched: bool) -> None:
    try:
        turn = runner.run(conversation.ask(line, _say))
    except KeyboardInterrupt:
        if not watched:
            raise
        console().print("\n[dim]stopped; the question is forgotten[/dim]")
        return
    except (RequestRefused, httpx2.TransportError) as error:
        message = str(error) or type(error).__name__
        if not watched:
            raise UsageError(message, hint="see the server's log") from None
        console().print(f"error: {message}", style="red", markup=False)
        return
    print(flush=True)
    console().print(_speed(turn), style="dim")


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _speed(turn: Turn) -> str:
    cut = ", cut at --max-tokens" if turn.finish == "length" else ""
    return f"{turn.tokens} tokens, first after {1000 * turn.first:.0f} ms, {turn.rate:.1f} tokens/s{cut}"
