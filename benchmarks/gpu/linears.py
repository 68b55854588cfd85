"""Part 3: every linear at the shapes of real models, beside every peer, in the same run.

    python benchmarks/gpu/linears.py
    python benchmarks/gpu/linears.py --models Llama-2-7B --rows 1 16 --only nybble cuBLAS

A case is one matrix shape and one batch M. All subjects of a case are prepared, checked against float64,
captured as CUDA graphs over copies that exceed twice the L2, and then timed in interleaved rounds. A subject
that is wrong or fails is reported and never timed. Cases go by importance; the ones left out are named.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from cases import MODEL_ORDER, ROW_ORDER, Case, cases, inputs_of
from clock import Chain, chain, copies, interleaved
from ours import ours
from part import Part, begin, parser
from peers import peers
from rows import spread
from shapes import MODELS
from subject import Matrix, Prepared, Subject, error, random_matrix
from torch import Tensor
from warm import share, warm

ROUNDS = 7
CHANCES = 3  # failures after which a subject is left out
SHARE = 0.2  # of the part's time that preparing one peer may take


class Bench:
    """Prepares, checks and times. A peer that keeps failing, or takes too much of the time, is left out."""

    def __init__(self, part: Part, subjects: list[Subject]) -> None:
        self.part, self.subjects = part, subjects
        self.failures: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def run(self, case: Case) -> int:
        """The number of batches that were measured."""
        matrix = random_matrix(case.outputs, case.inputs, self.part.device)
        for done, m in enumerate(case.rows):
            if self.part.left() < 0:
                return done
            self.batch(case, matrix, m)
            if self.part.device == "cuda":
                torch.cuda.empty_cache()  # what the graphs of this batch held
        return len(case.rows)

    def batch(self, case: Case, matrix: Matrix, m: int) -> None:
        ready: dict[str, tuple[Subject, Prepared, float, Chain]] = {}
        for subject in list(self.subjects):
            began = time.perf_counter()
            if subject.takes(m) and (prepared := self.prepared(subject, case, matrix, m)):
                ready[subject.name] = subject, *prepared
            self.seconds[subject.name] += time.perf_counter() - began
            self.drop(subject)
        times = interleaved({name: each[3] for name, each in ready.items()}, 1 if self.part.dry else ROUNDS)
        for name, (subject, prepared, wrong, _) in ready.items():
            self.write(case, m, subject, prepared, wrong, times[name])
        self.part.say(summary(case, m, {} if self.part.dry else times))

    def drop(self, subject: Subject) -> None:
        """Leaves a subject out from now on if it has had its chances."""
        spent = self.seconds[subject.name] / float(self.part.arguments.seconds)
        failed = self.failures[subject.name] >= CHANCES
        if failed or (spent > SHARE and not subject.ours and not self.part.dry):
            self.subjects.remove(subject)
            self.part.lacks(
                subject.name,
                f"left out from here on: {CHANCES} failures"
                if failed
                else f"left out from here on: {spent:.0%} of the time went into preparing it",
            )

    def prepared(
        self, subject: Subject, case: Case, matrix: Matrix, m: int
    ) -> tuple[Prepared, float, Chain] | None:
        """None, and a row that says why, if it fails or is wrong."""
        self.part.mark(subject.name)
        try:
            found = subject.prepare(matrix, m)
            x = inputs_of(m, case.inputs, subject.dtype, self.part.device)
            wrong = error(_tensor(found.run(x, *found.tensors)), x, found.means)
            if not wrong < subject.tolerance:
                raise ArithmeticError(f"relative error {wrong:.2e} exceeds {subject.tolerance:.0e}")
            count = copies(found.nbytes, self.part.rows.facts["l2_bytes"])
            calls = [partial(found.run, x, *found.copy()) for _ in range(count)]
            ready = found, wrong, chain(calls, self.part.device)
        except Exception as reason:  # whatever a peer raises must not end the part
            if not self.part.alive():
                raise  # the gate starts again without this subject
            self.failures[subject.name] += 1
            text = f"{type(reason).__name__}: {str(reason).splitlines()[0][:160] if str(reason) else ''}"
            self.part.lacks(f"{subject.name}, {case.model} {case.projection} M={m}", text)
            ready = None
        self.part.mark(None)
        return ready

    def write(
        self, case: Case, m: int, subject: Subject, prepared: Prepared, wrong: float, us: list[float]
    ) -> None:
        moved = prepared.nbytes + m * (case.inputs + case.outputs) * 2
        rate = spread([moved / each / 1e3 for each in us], 1)
        self.part.rows.write(
            model=case.model,
            projection=case.projection,
            shape=[case.outputs, case.inputs],
            m=m,
            subject=subject.name,
            kind=subject.kind,
            ours=subject.ours,
            dtype=str(subject.dtype).removeprefix("torch."),
            us=spread(us, 3),
            rounds=len(us),
            bytes=moved,
            gb_per_s=rate,
            of_read_bandwidth=self.part.share(rate["median"]),
            error=float(f"{wrong:.3g}"),
            tolerance=subject.tolerance,
        )


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def summary(case: Case, m: int, times: dict[str, list[float]]) -> str:
    """One line: microseconds, the fastest first."""
    if not times:
        return f"{case.model} {case.projection} M={m}: checked"
    order = sorted((spread(us)["median"], name) for name, us in times.items())
    return f"{case.model} {case.projection} M={m}: " + " | ".join(f"{name} {us:.1f}" for us, name in order)


def chosen(part: Part) -> list[Subject]:
    """Subjects that can run here; the others are named once."""
    found = []
    for subject in [*ours(), *peers()]:
        wanted = part.arguments.only
        if wanted and not any(subject.name.startswith(name) for name in wanted):
            continue
        if subject.name in part.arguments.without:
            part.lacks(subject.name, "ended the process before: left out")
        elif reason := subject.available():
            part.lacks(subject.name, reason)
        else:
            found.append(subject)
    return found


def compile_ahead(part: Part, which: str) -> None:
    """A worker of `warm`: every subject that compiles something, run once at its share of the cases."""
    subjects = [each for each in chosen(part) if each.compiles]
    for case in share(list(cases(part.arguments)), which):
        matrix = random_matrix(case.outputs, case.inputs, part.device)
        for m, subject in itertools.product(case.rows, subjects):
            with contextlib.suppress(Exception):  # the part itself meets it again and reports it
                prepared = subject.prepare(matrix, m)
                prepared.run(inputs_of(m, case.inputs, subject.dtype, part.device), *prepared.tensors)


def measure(part: Part) -> None:
    bench = Bench(part, chosen(part))
    done = {(r["model"], r["projection"], r["m"]) for r in part.rows.written() if "us" in r}
    left: list[str] = []
    for case in cases(part.arguments):
        rows = tuple(m for m in case.rows if (case.model, case.projection, m) not in done)
        count = bench.run(replace(case, rows=rows)) if rows and part.left() > 0 else 0
        left += [f"{case.model} {case.projection} M={m}" for m in rows[count:]]
    if left:
        part.lacks(f"{len(left)} cases", f"out of time before {left[0]}")


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--models", nargs="+", default=list(MODEL_ORDER), choices=MODELS)
    found.add_argument("--rows", nargs="+", type=int, default=[m for tier in ROW_ORDER for m in tier])
    found.add_argument("--only", nargs="+", help="subjects whose names begin so")
    found.add_argument("--without", nargs="*", default=[], help="subjects to leave out")
    found.add_argument("--warm", help="compile the share i/n of the kernels and measure nothing")
    return found.parse_args()


def main() -> int:
    part = begin("linears", arguments())
    if part.arguments.warm:
        compile_ahead(part, part.arguments.warm)
        return 0
    if not part.dry and not any(True for _ in part.rows.written()):
        flags = ["--models", *part.arguments.models, "--rows", *map(str, part.arguments.rows)]
        warm(part, Path(__file__), len(MODEL_ORDER) * 5, flags, 0.3 * part.left())
    measure(part)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
