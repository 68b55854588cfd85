"""One sequence as the client sees it: deltas in, pieces of text out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.api.prompts import Prompt
from nybble.engine.request import Delta, FinishReason, SamplingParams, TokenLogprob
from nybble.errors import EngineStopped, RequestFailed
from nybble.text.detokenizer import Detokenizer
from nybble.text.stops import StopFilter
from nybble.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Mark:
    """A token's probability and the character of the choice's text where the token starts."""

    offset: int
    token: int
    scores: TokenLogprob | None


@dataclass(slots=True)
class Piece:
    """What can be shown now, after so many tokens. `finish` is set in the last piece."""

    text: str
    marks: Sequence[Mark] = ()
    finish: FinishReason | None = None
    tokens: int = 0

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Piece:
        """All of a finished choice; there is at least the last piece."""
        marks = [mark for piece in pieces for mark in piece.marks]
        return cls("".join([piece.text for piece in pieces]), marks, pieces[-1].finish, pieces[-1].tokens)


class Choice:
    """Text that may belong to a stop string is held back, and so are the marks of its tokens."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        echo: bool,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.tokens = 0
        self.finish: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopFilter(stops)
        self._min_tokens = params.min_tokens
        self._scored = params.logprobs is not None
        self._pending: deque[Mark] = deque()
        self._decoded = self._sent = len(prompt.text) if echo else 0
        self._echo = prompt.text if echo else ""

    def feed(self, delta: Delta) -> Piece | None:
        """None if there is nothing to show yet. Raises if the engine gave the request up."""
        text = self._take_echo(delta)
        if delta.token is not None:
            text += self._take_token(delta.token, delta.logprob)
        if self.finish is None and delta.finish is not None:
            text += self._end(delta)
        self._sent += len(text)
        marks = self._release() if self._pending else ()
        return Piece(text, marks, self.finish, self.tokens) if text or marks or self.finish else None

    def _take_echo(self, delta: Delta) -> str:
        if not self._echo:
            return ""
        echoed, self._echo = self._echo, ""
        self._sent = 0
        for offset, token, scores in zip(
            self.prompt.offsets, self.prompt.ids, delta.prompt_logprobs or (), strict=False
        ):
            self._pending.append(Mark(offset, token, scores))
        return echoed

    def _take_token(self, token: int, scores: TokenLogprob | None) -> str:
        self.tokens += 1
        if self._scored:
            self._pending.append(Mark(self._decoded, token, scores))
        fresh = self._detokenizer.push(token)
        self._decoded += len(fresh)
        return self._show(fresh) if self.tokens >= self._min_tokens else fresh

    def _show(self, fresh: str) -> str:
        shown = self._stops.push(fresh)
        if self._stops.stop is not None:
            self.finish = "stop"
        return shown

    def _end(self, delta: Delta) -> str:
        """The rest of the text: the end of a cut character, and what was held back for a stop string."""
        if delta.finish == "error":
            raise RequestFailed(delta.error or "The engine could not finish this request.")
        if delta.finish == "abort":
            raise EngineStopped("The engine stopped before this request was finished.")
        text = self._show(self._detokenizer.flush())
        if self.finish is None:
            self.finish = delta.finish
            text += self._stops.flush()
        return text

    def _release(self) -> list[Mark]:
        """Marks of text that is out; at the end all, but for those of a stop string."""
        everything = self.finish is not None and self._stops.stop is None
        released: list[Mark] = []
        while self._pending and (everything or self._pending[0].offset < self._sent):
            released.append(self._pending.popleft())
        return released
