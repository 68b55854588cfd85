"""A subject: a program to start, and the settings of which it may take its best."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTEXT = 8192  # tokens that every cache of keys and values holds
STREAMS = 8
MODEL = "bench"  # the name that servers give it
PORT = "{port}"  # in a command: where it is to listen


@dataclass(frozen=True, eq=False)
class Library:
    """A worker that decodes in process. Of the settings of decoding, the one with the best median counts."""

    name: str
    peer: str
    file: str
    command: tuple[str, ...]
    decoding: tuple[Mapping[str, Any], ...] = ({},)
    prefill: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    reports_bytes: bool = False  # whether it knows what a decode step had to read
    way = "library"


@dataclass(frozen=True, eq=False)
class Server:
    """A server with OpenAI's completions. Of its commands, the one that decodes fastest in a trial counts."""

    name: str
    peer: str
    file: str
    commands: tuple[tuple[str, ...], ...]
    body: Mapping[str, Any]
    ready: str = "/v1/models"
    streams: int = STREAMS  # 1: it answers one request after the other
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 60.0  # seconds until it must be ready
    way = "server"


Subject = Library | Server


@dataclass(frozen=True)
class Files:
    """What is decoded. None: nobody made it, and who needs it is left out."""

    source: Path  # a GGUF file, or a folder that ours serves as it is
    q4_0: Path | None = None
    floats: Path | None = None
    awq: Path | None = None
    default: str | None = None  # what ours is to make its own of
    served: bool = True  # whether servers are asked: random weights have no text to stream


def threads() -> tuple[int, ...]:
    """The numbers of threads that a peer is tried with: all, and one less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tuple(sorted({max(cores - 1, 1), cores}))


def python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def worker(interpreter: str, script: str, **options: Any) -> tuple[str, ...]:
    return (interpreter, str(HERE / script), json.dumps(options))
