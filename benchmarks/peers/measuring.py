"""One subject from its start to its end: what a round measures of it, and what is measured once."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Process, Worker
from subjects import MODEL, PORT, Library, Server, Subject
from texts import Text, Texts
from wire import Answer, Failed, answers, ask, together

from nybble.bench.summary import quantile

BEFORE = 1 << 20  # stands for a round that no run reaches: its long prompt warms up, and is not asked again
WARM_UP = 4  # tokens asked for before a subject that has rested is measured
TRIALS, TRIAL_TOKENS = 3, 32  # decodings by which a server's setting is chosen
POLL = 0.02  # seconds between two looks whether a server is ready
QUESTION_TOKENS = 12


@dataclass
class Found:
    """Of one subject. `rounds`: one value per round and metric; `once`: start_s and peak_mib."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    once: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)  # seconds between tokens, of all rounds
    setting: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def add(self, values: dict[str, float]) -> None:
        for metric, value in values.items():
            self.rounds.setdefault(metric, []).append(value)


@dataclass
class Amount:
    """How much is asked for: tokens of an answer, and the texts."""

    tokens: int
    texts: Texts


class InProcess:
    """A library behind its worker."""

    def __init__(self, subject: Library, amount: Amount, logs: Path) -> None:
        self.subject, self.amount, self.found = subject, amount, Found()
        self.by_setting: list[list[float]] = [[] for _ in subject.decoding]
        self.process = Worker(subject.command, logs / _log_name(subject), subject.environment)
        self.found.facts = dict(self.process.facts)
        with ending(self.process):
            made = self._decode(0, amount.texts.question, QUESTION_TOKENS)
            self.found.text = amount.texts.decode(made["ids"])
            self._prefill(amount.texts.long(BEFORE))  # the first is slower

    def measure(self, turn: int) -> None:
        self._decode(0, self.amount.texts.story, WARM_UP)
        for place, rates in enumerate(self.by_setting):
            gaps = self._decode(place, self.amount.texts.story, self.amount.tokens)["gaps"]
            rates.append(len(gaps) / sum(gaps))
        long = self.amount.texts.long(turn)
        seconds = self._prefill(long)
        self.found.add({"prefill": len(long.ids) / seconds, "first_token_ms": 1e3 * seconds})

    def finish(self) -> None:
        """The setting with the best median is the subject's."""
        best = max(range(len(self.by_setting)), key=lambda place: statistics.median(self.by_setting[place]))
        self.found.rounds = {"decode": self.by_setting[best]} | self.found.rounds
        self.found.setting = " ".join(f"{k}={v}" for k, v in self.subject.decoding[best].items())
        if self.subject.reports_bytes:
            self.found.facts["step_bytes"] = self.process.ask("step_bytes")

    def _prefill(self, text: Text) -> float:
        """Seconds to the first token."""
        return float(self.process.ask("prefill", prompt=text.ids, **self.subject.prefill))

    def _decode(self, place: int, text: Text, tokens: int) -> dict[str, Any]:
        setting = self.subject.decoding[place]
        made: dict[str, Any] = self.process.ask("decode", prompt=text.ids, tokens=tokens, **setting)
        return made


class OverHttp:
    """A server, asked by a client that only notes when something arrives."""

    def __init__(self, subject: Server, amount: Amount, logs: Path) -> None:
        self.subject, self.amount, self.logs, self.found = subject, amount, logs, Found()
        best = max(subject.commands, key=self._trial)
        self.found.once["start_s"] = self._start(best)
        self.found.setting = differing(best, subject.commands)
        with ending(self.process):
            self.found.text = self._ask([amount.texts.question], QUESTION_TOKENS)[0].text
            self._ask([amount.texts.long(BEFORE)], WARM_UP)  # the first of each kind is slower
            if subject.streams > 1:
                self._ask(amount.texts.streams(subject.streams), WARM_UP)

    def _trial(self, command: tuple[str, ...]) -> float:
        """Tokens a second with a setting; it is also the first start, which leaves everything in caches."""
        self._start(command)
        try:
            self._ask([self.amount.texts.story], WARM_UP)
            return statistics.median(self._story(TRIAL_TOKENS).rate for _ in range(TRIALS))
        finally:
            self.process.end()

    def _start(self, command: tuple[str, ...]) -> float:
        """Seconds until it is ready. Raises `Failed`."""
        self.port = _free_port()
        line = [word.replace(PORT, str(self.port)) for word in command]
        began = time.perf_counter()
        self.process = Process(line, self.logs / _log_name(self.subject), self.subject.environment)
        with ending(self.process):
            while not answers(self.port, self.subject.ready):
                if self.process.popen.poll() is not None:
                    raise Failed(self.process.failure())
                if time.perf_counter() - began > self.subject.patience:
                    raise Failed(f"not ready after {self.subject.patience:.0f} s")
                time.sleep(POLL)
        return time.perf_counter() - began

    def measure(self, turn: int) -> None:
        texts = self.amount.texts
        self._ask([texts.story], WARM_UP)
        story = self._story(self.amount.tokens)
        self.found.gaps += story.gaps
        self.found.add(
            {
                "decode": story.rate,
                "gap_ms": 1e3 * quantile(story.gaps, 0.5),
                "gap_p99_ms": 1e3 * quantile(story.gaps, 0.99),
                "first_token_ms": 1e3 * self._ask([texts.long(turn)], WARM_UP)[0].first,
            }
        )
        if self.subject.streams > 1:
            done = self._ask(texts.streams(self.subject.streams), self.amount.tokens)
            self.found.add({"streams": together(done)})

    def finish(self) -> None:
        """Nothing is left to ask."""

    def _story(self, tokens: int) -> Answer:
        answer = self._ask([self.amount.texts.story], tokens)[0]
        if answer.tokens != tokens:
            raise Failed(f"{answer.tokens} tokens came where {tokens} were asked for")
        return answer

    def _ask(self, texts: list[Text], tokens: int) -> list[Answer]:
        common = {"model": MODEL, "max_tokens": tokens, "temperature": 0, "stream": True}
        bodies = [{**common, "prompt": each.text, **self.subject.body} for each in texts]
        return ask(self.port, "/v1/completions", bodies)


Measured = InProcess | OverHttp


def begin(subject: Subject, amount: Amount, logs: Path) -> Measured:
    """Started, asked a question, and at rest. Raises `Failed`."""
    kind: Callable[..., Measured] = InProcess if isinstance(subject, Library) else OverHttp
    measured = kind(subject, amount, logs)
    measured.process.rest()
    return measured


@contextmanager
def ending(process: Process) -> Iterator[None]:
    """A program that is not going to be measured does not stay."""
    try:
        yield
    except BaseException:
        process.end()
        raise


def differing(command: Sequence[str], commands: Sequence[Sequence[str]]) -> str:
    """The words of a command that the others of its subject do not share, each after its flag."""
    places = [place for place, words in enumerate(zip(*commands, strict=False)) if len(set(words)) > 1]
    places += range(min(map(len, commands)), len(command))
    flags = {place - 1 for place in places if command[place - 1].startswith("-")}
    return " ".join(command[place] for place in sorted({*places, *flags}))


def _log_name(subject: Subject) -> str:
    return f"{subject.name} {subject.way}.log".replace(" ", "-")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
