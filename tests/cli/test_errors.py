"""Whatever goes wrong on the command line is one line and a hint, with a stable exit code."""

from __future__ import annotations

import sys

import pytest

from nybble import cli
from nybble.errors import NybbleError, UsageError
from nybble_models.errors import BrokenCheckpoint
from support_process import environment


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ("serve --port x", "--port: expected an integer, got 'x'", "port to listen on; 0 takes a free one"),
        ("serve --prot 1", "Unknown option: --prot.", "did you mean --port?"),
        (
            "serve --bits",
            'Command "serve" parameter --bits requires an argument.',
            "--help lists what is known",
        ),
        ("serve a b", "Unused Tokens: ['b'].", "--help lists what is known"),
        ("serv", 'Unknown command "serv".', 'did you mean "serve"?'),
        ("quantize default", 'Command "quantize" parameter --output requires an argument.', "--help lists"),
        ("quantize default -o .", ".: exists already", "name another folder with -o, or remove it"),
        ("inspect no/such", "no/such: no such file or folder", "give a model folder or a .gguf file"),
        ("bench http://127.0.0.1:9", "http://127.0.0.1:9: not reachable: ", "start one with `nybble serve`"),
        (
            "bench --max-tokens 0",
            "bench: numbers of streams and tokens start at 1",
            "see `nybble bench --help`",
        ),
        ("chat http://127.0.0.1:9", "http://127.0.0.1:9: not reachable: ", "start one with `nybble serve`"),
        ("chat ftp://host", "ftp://host: not an address of a server", "for example http://127.0.0.1:8000"),
    ],
)
def test_usage_errors_are_two_lines(
    arguments: str, error: str, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _clean(monkeypatch)
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first.startswith(f"error: {error}")
    assert second.startswith(f"hint: {hint}")
    assert out == ""


@pytest.mark.parametrize(
    ("raised", "printed", "code"),
    [
        pytest.param(UsageError("a\n b", hint="c"), "error: a b\nhint: c\n", 2, id="usage"),
        pytest.param(NybbleError("a"), "error: a\n", 1, id="no hint"),
        pytest.param(
            BrokenCheckpoint("x.safetensors: cut", "again"),
            "error: x.safetensors: cut\nhint: again\n",
            2,
            id="floor",
        ),
        pytest.param(
            OSError(28, "No space left on device", "/x"), "error: /x: No space left on device\n", 1, id="os"
        ),
        pytest.param(
            ZeroDivisionError("by 0"),
            "error: ZeroDivisionError: by 0\nhint: NYBBLE_DEBUG=1 shows where\n",
            1,
            id="bug",
        ),
        pytest.param(KeyboardInterrupt(), "interrupted\n", 130, id="interrupt"),
    ],
)
def test_failures_become_lines_and_exit_codes(
    raised: BaseException,
    printed: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _clean(monkeypatch)
    from nybble.commands import version

    def fail() -> None:
        raise raised

    monkeypatch.setattr(version, "versions", fail)
    assert cli.main(["version"]) == code
    assert capsys.readouterr().err == printed


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _clean(monkeypatch)
    monkeypatch.setenv("NYBBLE_DEBUG", "1")
    with pytest.raises(UsageError):
        cli.main(["inspect", "no/such"])


def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = environment()
    monkeypatch.setattr(sys, "stdin", None)
    for name in ("NYBBLE_DEBUG", "NYBBLE_HOST", "NYBBLE_PORT", "NYBBLE_CONFIG"):
        assert name not in kept
        monkeypatch.delenv(name, raising=False)
