"""Whatever else happens in the engine, an answer is the one the request gets alone.

Every test runs with a runner that returns logits, and with one that samples on its own; `solo` answers come
from the first kind.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from nybble.engine.engine import Engine
from nybble.errors import ContextLengthExceeded, EngineStopped, InvalidRequest, QueueFull
from support_runner import EOS, Collector, TokenRunner, make_engine, request, solo
from support_sampling_runner import SamplingTokenRunner

Kind = type[TokenRunner]


@pytest.fixture(params=[TokenRunner, SamplingTokenRunner], ids=["logits", "sampling"])
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


def run_all(engine: Engine, requests: list[Any]) -> list[Collector]:
    sinks = [Collector() for _ in requests]
    engine.start()
    try:
        for each, sink in zip(requests, sinks, strict=True):
            engine.submit(each, sink)
        return [sink.wait() for sink in sinks]
    finally:
        engine.stop()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts, a third of which share a beginning."""
    chance = random.Random(seed)
    shared = [chance.randrange(60) for _ in range(17)]
    made = []
    for i in range(count):
        own = [chance.randrange(60) for _ in range(chance.randrange(1, 30))]
        made.append(shared[: chance.randrange(1, 17)] + own if i % 3 == 0 else own)
    return made


def assert_idle(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.blocks_live, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.blocks_cached + stats.blocks_free == stats.blocks_total


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 64),
        ({"prefix_cache": False}, 64),
        ({"max_sequences": 1}, 64),
        ({"max_tokens": 3}, 64),
        ({}, 33),
        ({"max_tokens": 40}, 40),
    ],
    ids=["default", "no-prefix-cache", "one-at-a-time", "tiny-chunks", "starved", "starved-large-chunks"],
)
def test_answers_equal_solo_answers(kind: Kind, options: dict[str, Any], blocks: int) -> None:
    engine = make_engine(blocks, **options, kind=kind)
    inputs = prompts(40)
    sinks = run_all(engine, [request(str(i), p, 6 + i % 20) for i, p in enumerate(inputs)])
    for i, (prompt, sink) in enumerate(zip(inputs, sinks, strict=True)):
        assert sink.tokens == solo(prompt, 6 + i % 20)
        assert sink.finish == "length"
    assert_idle(engine)


def test_starved_engines_preempt_and_still_agree(kind: Kind) -> None:
    engine = make_engine(33, kind=kind)
    inputs = [[i, i + 1, i + 2] for i in range(12)]
    sinks = run_all(engine, [request(str(i), p, 60) for i, p in enumerate(inputs)])
    assert engine.stats().preemptions > 0
    assert [s.tokens for s in sinks] == [solo(p, 60) for p in inputs]


def test_a_repeated_prompt_comes_from_the_cache(kind: Kind) -> None:
    runner = kind(64, 4)
    engine = make_engine(runner=runner)
    prompt = list(range(30))
    run = [request("a", prompt), request("b", prompt)]
    engine.start()
    first, second = Collector(), Collector()
    engine.submit(run[0], first)
    first.wait()
    engine.submit(run[1], second)
    second.wait()
    engine.stop()
    assert second.tokens == first.tokens
    assert (first.deltas[0].cached_tokens, second.deltas[0].cached_tokens) == (0, 28)
    assert runner.prefilled == 29 + 1
    assert engine.stats().prefix_hit_tokens == 28


def test_a_salt_keeps_caches_apart(kind: Kind) -> None:
    engine = make_engine(kind=kind)
    plain, salted = request("a", range(30)), request("b", range(30))
    salted = type(salted)(salted.id, salted.prompt, salted.params, cache_salt="tenant")
    sinks = []
    engine.start()
    for each in (plain, salted):
        sinks.append(Collector())
        engine.submit(each, sinks[-1])
        sinks[-1].wait()
    engine.stop()
    assert sinks[1].deltas[0].cached_tokens == 0


def test_generated_tokens_are_not_shared(kind: Kind) -> None:
    """Only what a prefill computed may serve another prefill: the two may differ in the last bits."""
    engine = make_engine(kind=kind)
    engine.start()
    first, second = Collector(), Collector()
    engine.submit(request("a", [1, 2, 3], 20), first)
    longer = [1, 2, 3, *first.wait().tokens]
    engine.submit(request("b", longer), second)
    second.wait()
    engine.stop()
    assert second.deltas[0].cached_tokens == 0


def test_a_failing_request_fails_alone(kind: Kind) -> None:
    runner = kind(64, 4, fail_on=61)
    engine = make_engine(runner=runner)
    inputs = [[1, 2], [5, 61], [7, 8, 9]]
    sinks = run_all(engine, [request(str(i), p, logit_bias={61: -1e9}) for i, p in enumerate(inputs)])
    assert [s.finish for s in sinks] == ["length", "error", "length"]
    assert sinks[1].deltas[-1].error
    assert sinks[0].tokens == solo([1, 2], logit_bias={61: -1e9})
    assert sinks[2].tokens == solo([7, 8, 9], logit_bias={61: -1e9})
    assert_idle(engine)


def test_nan_logits_fail_their_request_only(kind: Kind) -> None:
    runner = kind(64, 4, nan_on=61)
    engine = make_engine(runner=runner)
    sinks = run_all(engine, [request("a", [1, 61], 4), request("b", [2, 3], 4, logit_bias={61: -1e9})])
    assert [s.finish for s in sinks] == ["error", "length"]
    assert engine.stats().nan_logits == 1


def test_abort_frees_blocks_and_silences(kind: Kind) -> None:
    engine = make_engine(runner=kind(64, 4, delay=0.005))
    engine.start()
    sink = Collector()
    engine.submit(request("a", range(20), 100), sink)
    while len(sink.tokens) < 3:
        time.sleep(0.001)
    engine.abort("a")
    deadline = time.monotonic() + 5
    while engine.stats().blocks_live and time.monotonic() < deadline:
        time.sleep(0.001)
    seen = len(sink.deltas)
    time.sleep(0.05)
    assert len(sink.deltas) == seen
    assert sink.finish is None
    assert engine.stats().requests_finished == {"abort": 1}
    assert_idle(engine)
    engine.stop()


def test_abort_right_after_submit_leaves_nothing(kind: Kind) -> None:
    engine = make_engine(kind=kind)
    engine.start()
    for i in range(50):
        engine.submit(request(str(i), range(20), 50), Collector())
        engine.abort(str(i))
    engine.abort("never heard of")
    deadline = time.monotonic() + 5
    while engine.stats().requests_finished.get("abort") != 50 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert_idle(engine)
    engine.stop()


def test_churn_leaves_nothing_behind(kind: Kind) -> None:
    """Random aborts among sequences that share prefixes, in an engine short of blocks."""
    chance = random.Random(3)
    engine = make_engine(40, runner=kind(40, 4, delay=0.0005))
    engine.start()
    inputs = prompts(120, seed=5)
    sinks = [Collector() for _ in inputs]
    for i, (prompt, sink) in enumerate(zip(inputs, sinks, strict=True)):
        engine.submit(request(str(i), prompt, 12), sink)
        if chance.random() < 0.3:
            engine.abort(str(chance.randrange(i + 1)))
    deadline = time.monotonic() + 20
    while sum(engine.stats().requests_finished.values()) < len(inputs) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert_idle(engine)
    engine.stop()
    completed = [(p, s) for p, s in zip(inputs, sinks, strict=True) if s.finish == "length"]
    assert len(completed) > 60
    for prompt, sink in completed:
        assert sink.tokens == solo(prompt, 12)


def test_stop_tokens_end_an_answer_unseen(kind: Kind) -> None:
    expected = solo([9, 9], 20)
    stop = expected[4]
    sink = Collector()
    engine = make_engine(kind=kind)
    engine.start()
    engine.submit(request("a", [9, 9], 20, stop_token_ids=frozenset({stop})), sink)
    sink.wait()
    engine.stop()
    assert sink.finish == "stop"
    assert sink.tokens == expected[: expected.index(stop)]


def test_eos_ends_unless_ignored(kind: Kind) -> None:
    (sink,) = run_all(
        make_engine(kind=kind), [request("a", [1], 50, ignore_eos=False, logit_bias={EOS: 1e9})]
    )
    assert (sink.finish, sink.tokens) == ("stop", [])
    (sink,) = run_all(make_engine(kind=kind), [request("a", [1], 3, logit_bias={EOS: 1e9})])
    assert (sink.finish, sink.tokens) == ("length", [EOS] * 3)


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("budget", [512, 5], ids=["whole", "chunked"])
def test_prompt_logprobs_cover_every_prompt_token(kind: Kind, max_tokens: int, budget: int) -> None:
    prompt = list(range(1, 14))
    (sink,) = run_all(
        make_engine(max_tokens=budget, kind=kind),
        [request("a", prompt, max_tokens, prompt_logprobs=True, logprobs=2)],
    )
    scored = sink.deltas[0].prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    assert [s.token for s in scored[1:] if s] == prompt[1:]
    assert all(len(s.top) == 2 for s in scored[1:] if s)
    assert len(sink.tokens) == max_tokens
    assert all(d.prompt_logprobs is None for d in sink.deltas[1:])


def test_scores_of_a_prompt_match_those_of_generation(kind: Kind) -> None:
    made = Collector()
    engine = make_engine(kind=kind)
    engine.start()
    engine.submit(request("a", [4, 5, 6], 10, logprobs=0), made)
    tokens = [4, 5, 6, *made.wait().tokens]
    scored = Collector()
    engine.submit(request("b", tokens, 0, prompt_logprobs=True), scored)
    prompt_logprobs = scored.wait().deltas[0].prompt_logprobs
    engine.stop()
    assert prompt_logprobs is not None
    assert [d.logprob for d in made.deltas] == list(prompt_logprobs[3:])


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], {}, InvalidRequest),
        ([64], {}, InvalidRequest),
        ([-1], {}, InvalidRequest),
        ([1], {"logit_bias": {64: 1.0}}, InvalidRequest),
        ([1], {"stop_token_ids": frozenset({2**40})}, InvalidRequest),
        ([1] * 129, {}, ContextLengthExceeded),
        ([1], {"max_tokens": 2**63}, ContextLengthExceeded),
    ],
    ids=["empty", "past-vocabulary", "negative", "bias", "stop-id", "long", "absurd"],
)
def test_bad_requests_are_refused_before_they_queue(
    kind: Kind, prompt: list[int], params: dict[str, Any], error: type[Exception]
) -> None:
    engine = make_engine(kind=kind)
    engine.start()
    with pytest.raises(error):
        engine.submit(request("a", prompt, **params), Collector())
    assert_idle(engine)
    engine.stop()


def test_a_full_queue_refuses(kind: Kind) -> None:
    engine = make_engine(runner=kind(64, 4, delay=0.05), max_sequences=1, max_queue=2)
    engine.start()
    with pytest.raises(QueueFull):
        for i in range(10):
            engine.submit(request(str(i), [1], 20), Collector())
    engine.stop()


def test_stopping_ends_every_request_and_refuses_more(kind: Kind) -> None:
    engine = make_engine(runner=kind(64, 4, delay=0.01))
    engine.start()
    sink = Collector()
    engine.submit(request("a", [1], 100), sink)
    engine.stop()
    assert sink.wait().finish == "abort"
    with pytest.raises(EngineStopped):
        engine.submit(request("b", [1]), Collector())


def test_an_id_in_use_is_refused(kind: Kind) -> None:
    engine = make_engine(runner=kind(64, 4, delay=0.01))
    engine.start()
    first, second = Collector(), Collector()
    engine.submit(request("a", [1], 30), first)
    engine.submit(request("a", [2], 30), second)
    assert second.wait().finish == "error"
    assert first.wait().finish == "length"
    engine.stop()


def test_seeds_give_equal_text_in_any_company(kind: Kind) -> None:
    params = {"temperature": 1.0, "seed": 11, "top_p": 0.9}
    alone = solo([3, 4, 5], 20, **params)
    crowd = [request(str(i), [i, i], 20, temperature=1.0) for i in range(6)]
    sinks = run_all(make_engine(kind=kind), [*crowd, request("x", [3, 4, 5], 20, **params)])
    assert sinks[-1].tokens == alone


def test_counters_tell_what_was_done(kind: Kind) -> None:
    engine = make_engine(kind=kind)
    run_all(engine, [request("a", range(10), 5), request("b", range(20, 26), 7)])
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (16, 12)
    assert stats.requests_finished == {"length": 2}
    assert stats.decode_bytes >= 1000 * stats.decode_steps > 0
    assert stats.decode_seconds > 0


def test_times_add_up(kind: Kind) -> None:
    (sink,) = run_all(make_engine(runner=kind(64, 4, delay=0.002)), [request("a", range(10), 6)])
    times = sink.deltas[-1].times
    assert times is not None
    assert min(times.queue, times.prefill, times.decode) >= 0
    assert times.decode >= 5 * 0.002


def test_a_broken_loop_ends_its_requests_and_says_so(kind: Kind) -> None:
    """An error outside any one request: nobody waits for ever, and the engine counts as dead."""
    engine = make_engine(kind=kind)
    engine._scheduler.plan = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    engine.start()
    sink = Collector()
    engine.submit(request("a", [1]), sink)
    assert sink.wait().finish == "abort"
    deadline = time.monotonic() + 5
    while engine.stats().alive and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not engine.stats().alive
    with pytest.raises(EngineStopped):
        engine.submit(request("b", [1]), Collector())
