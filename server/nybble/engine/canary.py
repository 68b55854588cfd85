"""Replays the prompts that came with a checkpoint: does what is served still answer like the original model?

`canary.json` is written by the quantizer. No torch import: the engine is asked like by any client.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from nybble.engine.protocol import EngineProtocol
from nybble.engine.request import Delta, Request, SamplingParams, TokenLogprob
from nybble.errors import EngineStopped, UsageError

FILE = "canary.json"
FLOOR = 1e-9  # of what is left for tokens that are not listed


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over `positions` tokens: mean divergence in nats, and the share on which first choices are the same."""

    kl_divergence: float
    top1_agreement: float
    positions: int


def replay(engine: EngineProtocol, directory: Path) -> Agreement | None:
    """None where the checkpoint has no canary. Raises `UsageError` for one that cannot be read."""
    path = directory / FILE
    if not path.is_file():
        return None
    limit = engine.info.max_model_len
    divergences: list[float] = []
    same = 0
    for number, row in enumerate(_rows(path)):
        tokens = tuple(row["tokens"])[:limit]
        scored = _score(engine, f"canary-{number}", tokens, len(row["top"][0]))
        for token, top, logprobs in zip(scored, row["top"], row["logprobs"], strict=False):
            served = dict(token.top)
            divergences.append(divergence(dict(zip(top, logprobs, strict=True)), served))
            same += max(served, key=served.__getitem__) == top[0]
    if not divergences:
        raise UsageError(f"{path}: holds no prompts", hint="quantize the model again")
    return Agreement(math.fsum(divergences) / len(divergences), same / len(divergences), len(divergences))


def divergence(reference: Mapping[int, float], served: Mapping[int, float]) -> float:
    """KL(reference || served) in nats over the tokens that both list and, as one, all the others.

    Both map token ids to natural-log probabilities. Joining outcomes never raises a divergence, so this is at
    most the true one; of distributions whose mass lies on the listed tokens it is nearly that.
    """
    shared = [token for token in reference if token in served]
    total = math.fsum(math.exp(reference[t]) * (reference[t] - served[t]) for t in shared)
    rest, left = (
        max(1 - math.fsum(math.exp(each[t]) for t in shared), FLOOR) for each in (reference, served)
    )
    return max(total + rest * math.log(rest / left), 0.0)


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        rows: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf8"))["prompts"]
        for row in rows:
            if not len(row["tokens"]) - 1 == len(row["top"]) == len(row["logprobs"]):
                raise ValueError("a prompt does not have one row of candidates a token")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: {reason}", hint="quantize the model again, or --no-canary") from None
    return rows


def _score(engine: EngineProtocol, name: str, tokens: tuple[int, ...], top: int) -> list[TokenLogprob]:
    """What the engine makes of positions 1 to the last."""
    found: list[TokenLogprob] = []
    failed: list[str] = []
    done = Event()

    def sink(delta: Delta) -> None:
        found.extend(entry for entry in delta.prompt_logprobs or () if entry is not None)
        if delta.finish:
            failed.extend(filter(None, [delta.error]))
            done.set()

    params = SamplingParams(max_tokens=0, prompt_logprobs=True, logprobs=top)
    engine.submit(Request(name, tokens, params), sink)
    done.wait()
    if failed or len(found) != len(tokens) - 1:
        raise EngineStopped(f"the engine could not score the canary: {failed[0] if failed else 'it stopped'}")
    return found
