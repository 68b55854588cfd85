"""What a converted checkpoint takes over of the one it was made of, beside weights and tokenizer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from nybble_models.checkpoint import REPORT, Checkpoint, read_json, write_json
from nybble_models.errors import BrokenCheckpoint
from nybble_quantizers import canary, card, papers, sums
from nybble_quantizers.contents import Contents
from nybble_quantizers.origin import copy_licence

log = logging.getLogger("nybble.convert")


def write(source: Path, folder: Path, format: str, sizes: Mapping[str, int], parameters: int) -> None:
    """Licence and canary as they are; the report with the sizes of the new files, its card; the sums of all.

    Errors and qualities that the report states are of the weights, which have not changed.
    """
    copy_licence(source, folder)
    if (source / canary.FILE).is_file():
        shutil.copyfile(source / canary.FILE, folder / canary.FILE)
    if (source / REPORT).is_file():
        _report(source, folder, format, sizes, parameters)
    sums.write(folder)


def _report(source: Path, folder: Path, format: str, sizes: Mapping[str, int], parameters: int) -> None:
    report, held = read_json(source / REPORT), Contents(Checkpoint(folder)).linears
    try:
        rows = {row["name"]: row for row in report["layers"]}
        report["layers"] = [row | {"bytes": held[n].nbytes} for n, row in rows.items() if n in held]
        report["skipped"] = [*report["skipped"], *(name for name in rows if name not in held)]
        report["scheme"] = report["scheme"] | {"format": format}
    except (KeyError, TypeError):
        log.warning("%s is not carried over: it is not one that nybble writes", source / REPORT)
        return
    report["bytes"] = dict(sizes)
    report["bits_per_weight"] = 8 * sum(sizes.values()) / parameters
    report["command"] = f"{report.get('command', '')}  # then nybble convert --format {format}".lstrip()
    write_json(folder / REPORT, report)
    try:
        card.write(folder, papers.read(folder))
    except BrokenCheckpoint as error:
        log.warning("no model card is written: %s", error)
