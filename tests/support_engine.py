"""A model of nothing: an engine that says what a test scripts, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from nybble.engine.request import Delta, Request, RequestTimes, Sink, TokenLogprob
from nybble.engine.stats import EngineInfo, EngineStats

BOS, EOS, START, END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ALPHABET = {
    byte: char
    for char, byte in zip(
        [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
        + [chr(256 + rank) for rank in range(68)],
        [
            *(*range(33, 127), *range(161, 173), *range(174, 256)),
            *(b for b in range(256) if b not in {*range(33, 127), *range(161, 173), *range(174, 256)}),
        ],
        strict=True,
    )
}


def byte_tokenizer(path: Path, template: str | None = TEMPLATE) -> Path:
    """Write a tokenizer whose id n is the byte n; BOS is put in front of every text."""
    core = tokenizers.Tokenizer(models.BPE(vocab={_ALPHABET[byte]: byte for byte in range(256)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS, START, END)])
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    path.mkdir(parents=True, exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": END}, "model_max_length": 512}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


Script = Callable[[Request], Iterator[Delta]]


def says(text: str | bytes, *, at_end: str = "stop", pause: float = 0.0) -> Script:
    """Deltas of the bytes of `text`, then the end of the sequence; `max_tokens` and `ignore_eos` hold."""
    raw = text.encode() if isinstance(text, str) else text

    def deltas(request: Request) -> Iterator[Delta]:
        source: Iterator[int] = itertools.cycle(raw) if request.params.ignore_eos else iter(raw)
        scored = _score_prompt(request)
        for count in range(request.params.max_tokens):
            if pause:
                time.sleep(pause)
            token = next(source, None)
            last = count + 1 == request.params.max_tokens
            if token is None:
                yield Delta(time.monotonic(), finish=at_end, prompt_logprobs=scored)  # type: ignore[arg-type]
                return
            yield Delta(
                time.monotonic(),
                token,
                _score(token, request) if request.params.logprobs is not None else None,
                "length" if last else None,
                scored if count == 0 else None,
            )
        if request.params.max_tokens == 0:
            yield Delta(time.monotonic(), finish="length", prompt_logprobs=scored)

    return deltas


def _score(token: int, request: Request) -> TokenLogprob:
    """Made up but fixed: the token itself is the likeliest, its followers come behind it."""
    top = tuple(((token + i) % 256, -0.5 - i) for i in range(request.params.logprobs or 0))
    return TokenLogprob(token, -0.5, top)


def _score_prompt(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    if not request.params.prompt_logprobs:
        return None
    return (None, *(_score(token, request) for token in request.prompt[1:]))


@dataclass
class FakeEngine:
    """Keeps the contract of `EngineProtocol`; each request runs in a thread of its own."""

    directory: Path
    script: Script = field(default_factory=lambda: says("Hello, world!"))
    refuse: Exception | None = None
    max_model_len: int = 512
    aborted: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    heartbeat_age: float = 0.0
    alive: bool = True

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Sink] = {}
        self._threads: list[threading.Thread] = []
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._generated = 0
        self.stopped = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="tiny",
            directory=str(self.directory),
            family="llama",
            quantization="awq w4a16 g64 asymmetric",
            bits=4.25,
            device="cpu",
            kernels={"decode": "fake", "prefill": "fake"},
            dtype="float32",
            parameters=1000,
            weight_bytes={"linear": 500, "embedding": 100},
            planned_bytes={"weights": 600, "kv": 400},
            max_model_len=self.max_model_len,
            vocab_size=260,
            eos_token_ids=(259,),
            block_size=16,
            num_blocks=64,
            kv_bytes_per_token=4,
            bandwidth=1e9,
            load_seconds={"weights": 0.5},
        )

    def submit(self, request: Request, sink: Sink) -> None:
        if self.refuse is not None:
            raise self.refuse
        thread = threading.Thread(target=self._run, args=(request, sink), daemon=True)
        with self._lock:
            self.seen.append(request)
            self._running[request.id] = sink
            self._prompt_tokens += len(request.prompt)
            self._threads.append(thread)
        thread.start()

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self._running.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        with self._lock:
            live = len(self._running)
            return EngineStats(
                running=live,
                blocks_live=live,
                blocks_free=64 - live,
                blocks_total=64,
                prefix_query_tokens=self._prompt_tokens,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generated,
                requests_finished=dict(self._finished),
                steps=self._generated,
                step_tokens=self._generated,
                decode_steps=self._generated,
                decode_seconds=self._generated * 0.01,
                decode_bytes=self._generated * 5_000_000,
                used_bytes={"weights": 600, "kv": 400},
                alive=self.alive,
                heartbeat=time.monotonic() - self.heartbeat_age,
            )

    def stop(self) -> None:
        self.stopped = True
        with self._lock:
            left = list(self._running.items())
            self._running.clear()
        for _, sink in left:
            sink(Delta(time.monotonic(), finish="abort"))
        for thread in self._threads:
            thread.join(timeout=5)

    def _run(self, request: Request, sink: Sink) -> None:
        times = RequestTimes(0.001, 0.002, 0.003, 0, 0)
        for delta in self.script(request):
            with self._lock:
                if request.id not in self._running:
                    return
                self._generated += delta.token is not None
                if delta.finish is not None:
                    del self._running[request.id]
                    self._finished[delta.finish] += 1
            sink(replace(delta, times=times) if delta.finish else delta)


@contextmanager
def expecting_aborts(engine: FakeEngine, count: int, within: float = 3.0) -> Iterator[None]:
    """The block must lead to so many more aborts, and to nothing left running."""
    before = len(engine.aborted)
    yield
    end = time.monotonic() + within
    while time.monotonic() < end and (len(engine.aborted) < before + count or engine.stats().running):
        time.sleep(0.01)
    assert len(engine.aborted) == before + count
    assert engine.stats().running == 0
