"""The runner of the GPU: a captured step per batch size, sampling on the device, results a step behind."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.request import SamplingParams
from nybble.engine.runner import Drawn, Row, Table, Ticket
from nybble_kernels.triton.sample import sample
from nybble_kernels.triton.sample_state import SampleState, Settings
from nybble_models.triton_step import TritonStep

log = logging.getLogger("nybble.engine")

PLACES = 2  # steps whose results are not read yet


class GpuRunner:
    """`SamplingRunner` over a `TritonStep`. On a CPU (Triton's interpreter) it launches directly."""

    def __init__(self, step: TritonStep, max_batch: int) -> None:
        self._step, self._max_batch = step, max_batch
        self._device = step.settings.device
        self._cuda = self._device.type == "cuda"
        scratch = step.scratch
        self._weight_bytes = step.weight_bytes
        self._state = SampleState(max_batch, step.spec.vocab_size, max_batch, self._device)
        self._out = torch.zeros(PLACES, max_batch, dtype=torch.int32, device=self._device)
        self._inputs = [self._pinned(*scratch.inputs.shape) for _ in range(PLACES + 1)]
        self._tokens = [self._pinned(max_batch) for _ in range(PLACES)]
        self._logits = [self._pinned(*scratch.logits.shape, dtype=torch.float32) for _ in range(PLACES)]
        self._held: list[tuple[int, ...]] = [()] * max_batch  # tables as the device has them
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._buckets = deque(buckets(max_batch))
        self._pending: deque[tuple[Ticket, Sequence[Row], torch.cuda.Event | None]] = deque()
        self._launched = 0

    def _pinned(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._cuda)

    def prefill(self, tokens: Sequence[int], start: int, table: Table) -> None:
        with torch.inference_mode():
            self._prefill(tokens, start, table)

    def _prefill(self, tokens: Sequence[int], start: int, table: Table) -> Callable[[], NDArray[np.float32]]:
        """Launch the chunk; the result, when called, computes its logits."""
        step, count = self._step, len(tokens)
        positions = range(start, start + count)
        given = self._copied(np.array([tokens, positions], dtype=np.int32))
        step.scratch.inputs[:2, :count] = given
        stream = step.prefill(count, start, self._copied(np.array(table, dtype=np.int32)))
        return lambda: np.concatenate([part.cpu().numpy() for part in step.score(stream, count)])

    def _copied(self, values: NDArray[np.int32]) -> Tensor:
        """On the device, without waiting: the pinned memory lives until the copy is done."""
        host = torch.from_numpy(values)
        return (host.pin_memory() if self._cuda else host).to(self._device, non_blocking=True)

    def score(self, tokens: Sequence[int], start: int, table: Table) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self._prefill(tokens, start, table)()

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Table]
    ) -> NDArray[np.float32]:
        """A step that does not sample: logits to the host."""
        rows = [
            Row(slot, position, table, token, sample=False, logits=True)
            for slot, (token, position, table) in enumerate(zip(tokens, positions, tables, strict=True))
        ]
        logits = self.collect(self.launch(rows)).logits
        return np.stack([logits[row] for row in range(len(rows))])

    def open(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        generated: Sequence[int],
        seed: int,
        stops: frozenset[int],
    ) -> None:
        settings = Settings(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            min_tokens=params.min_tokens,
            seed=seed,
        )
        with torch.inference_mode():
            self._state.open(
                slot, settings, prompt=prompt, generated=generated, stops=stops, bias=params.logit_bias
            )

    def launch(self, rows: Sequence[Row]) -> Ticket:
        with torch.inference_mode():
            return self._launch(rows)

    def _launch(self, rows: Sequence[Row]) -> Ticket:
        ticket, place = Ticket(self._launched), self._launched % PLACES
        self._send(rows, self._inputs[self._launched % len(self._inputs)], place)
        self._launched += 1
        bucket = bucket_of(len(rows), self._max_batch)
        graph = self._graphs.get(bucket)
        if graph is None:
            self._run(bucket)
        else:
            graph.replay()
        self._tokens[place].copy_(self._out[place], non_blocking=True)
        for row, each in enumerate(rows):
            if each.logits:
                self._logits[place][row].copy_(self._step.scratch.logits[row], non_blocking=True)
        event = None
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending.append((ticket, rows, event))
        return ticket

    def _send(self, rows: Sequence[Row], inputs: Tensor, place: int) -> None:
        """This step's tokens (-1: the slot's last), positions and slots (-1: none), and changed tables."""
        scratch = self._step.scratch
        sent = inputs.numpy()
        sent[:3] = -1
        sent[3, 0] = place
        for index, row in enumerate(rows):
            sent[0, index] = -1 if row.token is None else row.token
            sent[1, index] = row.position
            sent[2, index] = row.slot
            table = tuple(row.table)
            if self._held[index] != table:
                scratch.tables[index, : len(table)] = self._copied(np.array(table, dtype=np.int32))
                self._held[index] = table
        for index, row in enumerate(rows):
            if not row.sample:
                sent[2, index] = -1 - row.slot
        scratch.inputs.copy_(inputs, non_blocking=True)

    def _run(self, bucket: int) -> None:
        """The launches of one step: what a graph holds."""
        scratch = self._step.scratch
        self._step.decode(bucket, self._state.tokens)
        sample(
            scratch.logits[:bucket],
            scratch.slots[:bucket],
            self._state,
            self._out,
            scratch.place,
            pdl=self._step.settings.pdl,
        )

    def collect(self, ticket: Ticket) -> Drawn:
        oldest, rows, event = self._pending.popleft()
        assert oldest == ticket, "steps are collected in the order of their launches"
        if event is not None:
            event.synchronize()
        place = ticket % PLACES
        drawn = self._tokens[place].tolist()[: len(rows)]
        logits = {i: self._logits[place][i].numpy() for i, row in enumerate(rows) if row.logits}
        bad = [row.sample and token < 0 for row, token in zip(rows, drawn, strict=True)]
        return Drawn(drawn, bad, logits)

    def idle(self) -> bool:
        """Capture one more bucket, smallest first; whether there are more to capture."""
        if not self._cuda or not self._buckets:
            return False
        bucket = self._buckets.popleft()
        try:
            with torch.inference_mode():
                self._capture(bucket)
        except RuntimeError:  # out of memory, say: what is not captured is launched kernel by kernel
            log.exception("a step of %d could not be captured; it and larger ones run slower", bucket)
            self._buckets.clear()
        return bool(self._buckets)

    def _capture(self, bucket: int) -> None:
        """Launch once for real (kernels compile then), on idle rows, and record the same launches."""
        self._send((), self._inputs[0], 0)
        self._run(bucket)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(bucket)
        self._graphs[bucket] = graph

    @property
    def kinds(self) -> list[str]:
        """The products a step makes, as "w4a16"."""
        return list(dict.fromkeys(linear.kind for linear in self._step.linears()))

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes that one step reads, by kind."""
        return self._weight_bytes

    def decode_bytes(self, positions: Sequence[int]) -> int:
        return sum(self.weight_bytes.values()) + self._step.kv_bytes(positions)

    def used_bytes(self) -> Mapping[str, int]:
        step = self._step
        return {
            "weights": step.held_bytes,
            "kv": step.cache.nbytes,
            "workspace": step.scratch.nbytes + self._state.nbytes,
        }


def buckets(max_batch: int) -> list[int]:
    """1, 2, 4, ..: the batch sizes that get a graph."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], max_batch))
    return sizes


def bucket_of(rows: int, max_batch: int) -> int:
    return next(size for size in buckets(max_batch) if rows <= size)
