"""The `nybble` command: finds the verb, and turns every failure into one line and a hint."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import nybble
from nybble.errors import NybbleError, UsageError

EXAMPLES = """\
Examples:
  nybble serve                                 serve the default model on port 8000
  nybble serve ./my-model --port 9000          quantize a Hugging Face folder, serve it
  nybble quantize ./my-model -o ./my-model-4   quantize only
  nybble chat                                  talk to a running server
  nybble bench --json result.json              measure a running server
"""

VERBS = {
    "serve": "Serve a model over an OpenAI-compatible HTTP API; quantize it first if it is not.",
    "quantize": "Write a quantized copy of a model.",
    "convert": "Write a quantized model in another format, without changing a weight's value.",
    "eval": "Measure a model's perplexity, and how close it is to the unquantized one.",
    "bench": "Measure any OpenAI-compatible server: first token, token to token, tokens per second.",
    "chat": "Chat with a running server in the terminal.",
    "verify": "Check a checkpoint: sums, every tensor, and whether its report is true.",
    "report": "Write one HTML page about quantized checkpoints: quality against size, error by layer.",
    "inspect": "Say what a model folder or file is: method, bits, sizes, memory needed.",
    "tune": "Measure how this GPU cuts a model's products best, and keep it for serve.",
    "health": "Exit 0 if a server is ready, 1 if not.",
    "version": "Print the versions of nybble and of what it runs on.",
}

INTERRUPTED = 130

SPINS = "1000"
"""How often PyTorch's OpenMP threads look for a task before they sleep: a few microseconds. Left alone
they spin for milliseconds, which stalls every matrix product when another process wants a core."""


def build_app() -> App:
    """The verbs by name; a verb's module is imported when it is used."""
    app = App(
        name="nybble",
        help=nybble.__doc__,
        help_epilogue=EXAMPLES,
        help_format="plaintext",
        version=nybble.__version__,
        suppress_keyboard_interrupt=False,
    )
    for verb, help in VERBS.items():
        app.command(f"nybble.commands.{verb}:{verb}", name=verb, help=help, help_epilogue="")
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported, which is later
    app = build_app()
    try:
        result = app(
            list(sys.argv[1:] if argv is None else argv),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("NYBBLE_DEBUG") == "1":
            raise
        return report(error)
    return result if isinstance(result, int) else 0


def report(error: BaseException) -> int:
    """Print `error:` and `hint:`, one line each; returns the exit code."""
    message, hint, code = explain(error)
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[str, str, int]:
    """What happened, what to do about it, and the exit code."""
    if isinstance(error, NybbleError):
        return _one_line(error.message), _one_line(error.hint or ""), error.exit_code
    if isinstance(error, CycloptsError):
        message, _, near = _one_line(str(error)).partition(" Did you mean ")
        hint = f"did you mean {near.split('?')[0]}?" if near else "--help lists what is known"
        return message, hint, UsageError.exit_code
    advice = getattr(error, "hint", None)
    if isinstance(advice, str):  # errors of the floors below, which know nothing of exit codes
        return _one_line(str(error)), _one_line(advice), UsageError.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return where + _one_line(error.strerror or str(error)), "", 1
    return f"{type(error).__name__}: {_one_line(str(error))}", "NYBBLE_DEBUG=1 shows where", 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
