"""The parts of a quantized checkpoint put together: finished blocks, ends, config, tokenizer, licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble_kernels.quantized import dense
from nybble_models.checkpoint import write_json
from nybble_models.formats.form import Form
from nybble_models.loader import Loader
from nybble_models.weights import Linear
from nybble_quantizers.block import Finding
from nybble_quantizers.folding import float_weight
from nybble_quantizers.journal import Journal
from nybble_quantizers.origin import copy_licence
from nybble_quantizers.output import ShardWriter
from nybble_quantizers.report import LayerReport, layer_report
from nybble_quantizers.rounding import naming, nearest
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import Selection
from nybble_quantizers.tokenizing import carry_over
from nybble_quantizers.writer import ModelWriter


def assemble(
    folder: Path,
    source: Path,
    loader: Loader,
    journal: Journal,
    writer: ModelWriter,
    selection: Selection,
    config: dict[str, Any],
) -> tuple[dict[str, int], list[LayerReport]]:
    """Writes all but the papers; returns bytes by kind and a row for each rounded linear."""
    shards, reports = ShardWriter(folder), list[LayerReport]()
    for layer in range(loader.spec.num_layers):
        shards.extend(journal.stored(layer))
        reports += journal.reports(layer)
    ends, found = _ends(loader, selection)
    shards.extend(writer.rest(loader, ends))
    shards.close()
    write_json(folder / "config.json", config)
    carry_over(source, folder)
    copy_licence(source, folder)
    return shards.bytes, reports + found


def config_of(loader: Loader, scheme: Scheme, selection: Selection) -> dict[str, Any]:
    """The source's config with what the container has to say of the linears."""
    config = dict(loader.source.config) | {"torch_dtype": "float16"}
    config.pop("dtype", None)
    form = scheme.form
    if form is not None:
        config["quantization_config"] = scheme.container.codec(form).settings(selection.names)
    return config


def _ends(loader: Loader, selection: Selection) -> tuple[dict[str, tuple[Linear, Form]], list[LayerReport]]:
    """Embedding and head where they are rounded: to nearest, as no text reaches all of a vocabulary."""
    made, reports = dict[str, tuple[Linear, Form]](), list[LayerReport]()
    for name in (loader.family.embed, loader.family.head):
        form = selection.names.get(name)
        if form is None:
            continue
        whole = Linear(dense(loader.embed())) if name == loader.family.embed else loader.head()
        assert whole is not None
        with naming(name):
            rounded = Linear(nearest(float_weight(whole), form))
        made[name] = rounded, form
        reports.append(layer_report(name, whole, rounded, Finding()))
    return made, reports
