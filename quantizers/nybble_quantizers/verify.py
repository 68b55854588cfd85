"""Whether a quantized checkpoint is whole: sums, JSON, every tensor, and what its report says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nybble_models.checkpoint import REPORT, Checkpoint, read_json
from nybble_models.errors import BrokenCheckpoint, ModelError
from nybble_models.families import family_of, spec_of
from nybble_quantizers import sums
from nybble_quantizers.contents import Contents, Stored, expected
from nybble_quantizers.quality_report.record import Record, Row, record


@dataclass
class Verification:
    """What holds, what could not be checked for want of a file, and what does not hold; a line each."""

    checked: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def conclude(self, problems: list[str], otherwise: str) -> None:
        """Note new problems, or what holds in their absence."""
        self.problems += [problem for problem in problems if problem not in self.problems]
        if not problems:
            self.checked.append(otherwise)


@torch.inference_mode()
def verify(folder: Path) -> Verification:
    """Reads every byte, one linear in memory. Whatever is wrong with the checkpoint is in the result."""
    found = Verification()
    _check_sums(folder, found)
    report = _report(folder, found)
    try:
        checkpoint = Checkpoint(folder)
        contents = Contents(checkpoint)
    except ModelError as error:
        found.problems.append(str(error))
        return found
    kinds = Counter((held.bits, held.group_size) for held in contents.linears.values()).most_common()
    said = "; ".join(f"{count} of {bits} bits in groups of {group}" for (bits, group), count in kinds)
    found.conclude(
        contents.problems,
        f"{len(contents.linears)} quantized linears decode ({said or 'none'}), "
        f"{len(contents.others)} other tensors are finite",
    )
    _check_family(checkpoint, contents, found)
    if report is not None:
        _check_report(report, contents, found)
    return found


def _check_sums(folder: Path, found: Verification) -> None:
    """A folder without a report is another tool's, which owes no sums."""
    if not (folder / sums.FILE).is_file() and not (folder / REPORT).is_file():
        found.missing.append(f"no {sums.FILE}: whether a file has changed cannot be told")
        return
    problems = sums.check(folder)
    found.conclude(problems, "" if problems else f"{len(sums.read(folder))} files match {sums.FILE}")


def _report(folder: Path, found: Verification) -> Record | None:
    if not (folder / REPORT).is_file():
        found.missing.append(f"no {REPORT}: what was made, and of what, cannot be compared")
        return None
    try:
        return record(folder.name, read_json(folder / REPORT), {})
    except BrokenCheckpoint as error:
        found.problems.append(str(error))
        return None


def _check_family(checkpoint: Checkpoint, contents: Contents, found: Verification) -> None:
    """Whether the tensors are those that the config asks for."""
    try:
        spec, family = spec_of(checkpoint.config), family_of(checkpoint.config)
    except ModelError as error:
        found.missing.append(f"{error}: whether tensors are missing cannot be told")
        return
    problems = []
    for name, shape in expected(spec, family).items():
        held = contents.shape(name)
        if held is not None and held != shape:
            problems.append(f"{name} is {list(held)}; config.json asks for {list(shape)}")
        elif held is None and name.removesuffix(".weight") not in contents.broken:
            problems.append(f"{name} {list(shape)} is missing; config.json asks for it")
    found.conclude(
        problems, f"config.json: {family.name}, {spec.num_layers} layers, and their tensors are there"
    )


def _check_report(report: Record, contents: Contents, found: Verification) -> None:
    """Every linear of the report is stored as it says, no other is quantized, and the bytes add up."""
    listed = {row.name for row in report.rows}
    problems = [problem for row in report.rows for problem in _lies(row, contents)]
    problems += [f"{name} is quantized and not listed" for name in contents.linears if name not in listed]
    problems += [f"{name} is skipped and quantized" for name in report.skipped if name in contents.linears]
    if contents.nbytes is not None and contents.nbytes != report.nbytes:
        problems.append(f"{report.nbytes:,} bytes of tensors, found {contents.nbytes:,}")
    found.conclude(
        [f"{REPORT} lies: {problem}" for problem in problems],
        f"{REPORT}: {len(report.rows)} linears and {report.nbytes:,} bytes are as stated",
    )


def _lies(row: Row, contents: Contents) -> Iterator[str]:
    held: Stored | None = contents.linears.get(row.name)
    if held is None:
        if row.name not in contents.broken:
            yield f"{row.name} is not quantized"
        return
    group = row.group_size if row.group_size is not None and row.group_size > 0 else held.group_size
    for what, stated, stored in (
        ("bits", row.bits, held.bits),
        ("group size", group, held.group_size),
        ("bytes", row.nbytes, held.nbytes),
    ):
        if stated != stored:
            yield f"{row.name}: {what} {stated}, found {stored}"
