"""The engine one step behind its device: order, late ends, and any mixture of events, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.engine import Engine
from nybble.engine.request import Request
from nybble.engine.runner import Runner, SamplingRunner
from nybble.engine.sampler import Sampler
from nybble.engine.sequence import Sequence
from support_runner import EOS, VOCABULARY, Collector, TokenRunner, make_engine, request
from support_sampling_runner import SamplingTokenRunner

Kind = type[TokenRunner]


def expected(asked: Request) -> list[int]:
    """The answer by definition: logits of all tokens so far, one draw after another."""
    runner, tokens, params = TokenRunner(1, 4096), list(asked.prompt), asked.params
    runner.prefill(tokens, 0, [0])
    sampler = Sampler(params, asked.prompt, (EOS,))
    while len(tokens) - len(asked.prompt) < params.max_tokens:
        logits = runner._logits(len(tokens) - 1, [0])
        token = sampler.sample(logits, len(tokens) - len(asked.prompt))
        if token in sampler.stops:
            break
        sampler.record(token)
        runner.prefill([token], len(tokens), [0])
        tokens.append(token)
    return tokens[len(asked.prompt) :]


@dataclass
class Drive:
    """An engine whose turns are taken by hand."""

    engine: Engine
    runner: SamplingTokenRunner

    @classmethod
    def of(cls, blocks: int = 64, *, delay: float = 0, **options: Any) -> Drive:
        runner = SamplingTokenRunner(blocks, 4, delay=delay)
        return cls(make_engine(blocks, runner=runner, **options), runner)

    def submit(self, asked: Request) -> Collector:
        sink = Collector()
        self.engine._inbox.append(Sequence(asked, sink, list(asked.prompt)))
        return sink

    @property
    def working(self) -> bool:
        engine = self.engine
        return bool(engine._inbox or engine._answers.sequences or engine._decoder.busy)

    def finish(self, turns: int = 2000) -> None:
        while self.working and turns:
            self.engine.step()
            turns -= 1
        assert not self.working, "the engine does not come to an end"
        assert self.runner.complaints == []
        assert self.runner.launched == self.runner.collected
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.blocks_live) == (0, 0, 0)
        assert stats.blocks_cached + stats.blocks_free == stats.blocks_total
        scheduler = self.engine._scheduler
        assert sorted(scheduler._slots) == list(range(scheduler.max_sequences))


@pytest.fixture
def drive() -> Iterator[Drive]:
    yield Drive.of()


def test_who_samples_is_told_by_the_type() -> None:
    assert isinstance(SamplingTokenRunner(1, 4), SamplingRunner)
    assert not isinstance(TokenRunner(1, 4), SamplingRunner)
    plain: Runner = SamplingTokenRunner(1, 4)
    assert plain.used_bytes()


def test_a_step_is_launched_before_the_one_before_is_read(drive: Drive) -> None:
    sink = drive.submit(request("a", [1, 2, 3], 20))
    drive.finish()
    assert sink.tokens == expected(request("a", [1, 2, 3], 20))
    assert drive.runner.overlapped == 19


def test_the_last_token_by_length_costs_no_further_step(drive: Drive) -> None:
    drive.submit(request("a", [1, 2, 3], 7))
    drive.finish()
    assert drive.runner.launched == 7


def test_a_stop_costs_one_step_whose_token_is_dropped(drive: Drive) -> None:
    answer = expected(request("a", [9, 9], 20))
    stop = answer[4]
    sink = drive.submit(request("a", [9, 9], 20, stop_token_ids=frozenset({stop})))
    drive.finish()
    assert sink.finish == "stop"
    assert sink.tokens == answer[: answer.index(stop)]
    assert drive.runner.launched == answer.index(stop) + 2
    assert drive.engine.stats().generation_tokens == answer.index(stop) + 1


def test_scoring_alone_launches_nothing(drive: Drive) -> None:
    sinks = [drive.submit(request(str(n), range(n), 0, prompt_logprobs=True)) for n in (1, 5)]
    drive.finish()
    assert [s.finish for s in sinks] == ["length", "length"]
    assert drive.runner.launched == 0


def test_ids_may_be_used_again_while_the_old_token_is_in_flight(drive: Drive) -> None:
    first = drive.submit(request("a", [1, 2], 50))
    for _ in range(6):
        drive.engine.step()
    seen = len(first.deltas)
    drive.engine._inbox.append("a")
    second = drive.submit(request("a", [3, 4], 8))
    drive.finish()
    assert (first.finish, len(first.deltas)) == (None, seen)
    assert second.tokens == expected(request("a", [3, 4], 8))


def test_a_preempted_sequence_keeps_the_token_in_flight() -> None:
    drive = Drive.of(12)
    asked = [request(str(i), [i, i + 1], 30, temperature=1.0, seed=i) for i in range(4)]
    sinks = [drive.submit(each) for each in asked]
    drive.finish()
    assert drive.engine.stats().preemptions > 0
    assert [sink.tokens for sink in sinks] == [expected(each) for each in asked]


def test_nothing_is_admitted_with_a_token_in_flight() -> None:
    """A sequence that gives its blocks back in one turn would fit again in the same one."""
    drive = Drive.of(4)
    drive.submit(request("a", [1, 2, 3], 20))
    scheduler = drive.engine._scheduler
    for _ in range(4):
        drive.engine.step()
    (sequence,) = scheduler.running
    assert sequence.in_flight == 1
    scheduler._preempt(sequence)
    assert scheduler.plan().tokens == 0
    drive.engine.step()
    assert sequence.in_flight == 0
    assert scheduler.plan().tokens > 0


@pytest.mark.parametrize("fault", ["launch", "open"])
def test_a_fault_of_one_row_ends_that_request_only(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Drive.of()
    real = getattr(drive.runner, fault)

    def faulty(given: Any, *rest: Any) -> Any:
        slots = [given] if isinstance(given, int) else [row.slot for row in given]
        if 1 in slots:
            raise RuntimeError("planted failure")
        return real(given, *rest)

    monkeypatch.setattr(drive.runner, fault, faulty)
    asked = [request(str(i), [i, i], 9) for i in range(3)]
    sinks = [drive.submit(each) for each in asked]
    drive.finish()
    assert [sink.finish for sink in sinks] == ["length", "error", "length"]
    assert [sinks[i].tokens for i in (0, 2)] == [expected(asked[i]) for i in (0, 2)]


def test_a_lost_device_ends_the_engine() -> None:
    drive = Drive.of()
    drive.runner.collect = lambda ticket: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    drive.engine.start()
    sink = Collector()
    drive.engine.submit(request("a", [1]), sink)
    assert sink.wait().finish == "abort"
    drive.engine.stop()
    assert not drive.engine.stats().alive


def test_stopping_leaves_no_step_uncollected() -> None:
    drive = Drive.of(delay=0.002)
    drive.engine.start()
    sink = Collector()
    drive.engine.submit(request("a", [1], 100), sink)
    while len(sink.tokens) < 5:
        pass
    drive.engine.stop()
    assert drive.runner.launched == drive.runner.collected


def test_steps_are_timed_once_and_only_beside_no_prompt() -> None:
    delay, count = 0.003, 10
    drive = Drive.of(delay=delay)
    drive.submit(request("a", [1], count))  # one token: nothing to prefill
    drive.finish()
    stats = drive.engine.stats()
    assert stats.decode_steps == count
    assert count * delay <= stats.decode_seconds < 2 * count * delay
    assert stats.decode_bytes == sum(1000 + position for position in range(count))
    drive.submit(request("b", range(20), 1))
    drive.finish()
    assert drive.engine.stats().decode_steps == count, "a step behind a prompt's chunk was measured"


def test_idle_time_is_the_runners_until_it_has_no_use_for_it() -> None:
    drive = Drive.of()
    drive.engine.step()
    drive.engine.step()
    assert drive.runner.idled == 2
    drive.submit(request("a", [1, 2], 4))
    drive.finish()
    assert drive.runner.idled == 2
    began = time.monotonic()
    drive.engine.step()
    assert drive.runner.idled == 3
    assert time.monotonic() - began > 0.1, "a loop without work does not wait"


def test_logits_come_back_for_those_who_asked(drive: Drive) -> None:
    asked = [request("a", [5, 6], 8, logprobs=2), request("b", [7], 8)]
    scored, plain = [drive.submit(each) for each in asked]
    drive.finish()
    assert [d.logprob.token for d in scored.deltas if d.logprob] == scored.tokens
    assert all(d.logprob is None for d in plain.deltas)


tokens = st.integers(0, VOCABULARY - 2)
params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "seed": st.integers(0, 2**64 - 1),
        "top_k": st.sampled_from([0, 3]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 4]),
        "logprobs": st.sampled_from([None, 1]),
        "stop_token_ids": st.frozensets(tokens, max_size=12),
        "ignore_eos": st.booleans(),
    }
)
requests = st.tuples(st.lists(tokens, min_size=1, max_size=24), st.integers(1, 20), params, st.booleans())
options = st.fixed_dictionaries(
    {
        "max_sequences": st.integers(1, 6),
        "max_tokens": st.sampled_from([3, 7, 40, 512]),
        "prefix_cache": st.booleans(),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.integers(14, 40),  # the longest, 11 + 24 + 20 tokens, fits: what does not is refused earlier
    options=options,
    asked=st.lists(requests, min_size=1, max_size=10),
    turns=st.lists(st.integers(0, 40), min_size=10, max_size=10),
    aborts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=4),
)
def test_any_mixture_gives_every_request_its_own_answer(
    blocks: int, options: dict[str, Any], asked: list[Any], turns: list[int], aborts: list[tuple[int, int]]
) -> None:
    drive = Drive.of(blocks, **options)
    shared = list(range(11))
    made = [
        request(str(i), shared + p if together else p, count, **sampling)
        for i, (p, count, sampling, together) in enumerate(asked)
    ]
    sinks: dict[int, Collector] = {}
    for turn in range(62):
        for index, arrival in enumerate(turns[: len(made)]):
            if arrival == turn:
                sinks[index] = drive.submit(made[index])
        for at, index in aborts:
            if at == turn and index in sinks:
                drive.engine._inbox.append(str(index))
        if drive.working:
            drive.engine.step()
    drive.finish()
    aborted = {index for _, index in aborts}
    for index, sink in sinks.items():
        answer = expected(made[index])
        if sink.finish is None:
            assert index in aborted
            assert sink.tokens == answer[: len(sink.tokens)]
        else:
            assert sink.tokens == answer
            assert sink.finish == ("length" if len(answer) == made[index].params.max_tokens else "stop")


def test_the_fake_device_notices_a_block_given_to_two() -> None:
    """A check of the check: two sequences that share blocks by mistake."""
    drive = Drive.of()
    pool = drive.engine._pool
    allocate = pool.allocate
    pool.allocate = lambda count: [allocate(count), list(range(count))][1]  # type: ignore[method-assign]
    pool.release = lambda blocks: None  # type: ignore[method-assign]
    for i in range(2):
        drive.submit(request(str(i), [i, 5, 6], 6))
    with pytest.raises(AssertionError):
        drive.finish()
    assert any("another sequence" in complaint for complaint in drive.runner.complaints)


def test_expected_is_what_the_plain_engine_says() -> None:
    engine = make_engine()
    asked = request("a", [4, 4], 12, temperature=0.9, seed=3, frequency_penalty=0.3)
    sink = Collector()
    engine.start()
    engine.submit(asked, sink)
    assert sink.wait().tokens == expected(asked)
    engine.stop()
    assert np.isfinite(sink.deltas[-1].at)
