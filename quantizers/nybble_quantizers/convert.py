"""Another format for the same weights: levels are moved, never rounded, and every value is compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.checkpoint import Checkpoint, write_json
from nybble_models.errors import ModelError
from nybble_models.formats.container import container
from nybble_models.formats.form import Form, rule
from nybble_models.formats.gptq import GptqCodec
from nybble_models.formats.overrides import for_linear
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.weights import Block, Linear, order_inner
from nybble_quantizers import carried
from nybble_quantizers.holding import form_held, lost
from nybble_quantizers.journal import key_of
from nybble_quantizers.output import ShardWriter, appearing
from nybble_quantizers.tokenizing import carry_over
from nybble_quantizers.units import partners
from nybble_quantizers.writer import ModelWriter

log = logging.getLogger("nybble.convert")

Format = Literal["awq", "gptq", "gptq_v2", "compressed-tensors"]
Tell = Callable[[str, float], None]
"""`tell(phase, fraction)`: "convert", then "compare"."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written. `folded`: act-orders of `down` that went into the rows of what feeds it."""

    forms: Mapping[str, Form | None]  # of every linear, in order, and of a packed end; None: a float matrix
    folded: int
    bytes: Mapping[str, int]

    @property
    def packed(self) -> int:
        return sum(form is not None for form in self.forms.values())

    @property
    def loose(self) -> tuple[str, ...]:
        """Linears that are float matrices."""
        return tuple(name for name, form in self.forms.items() if form is None)


@torch.inference_mode()
def convert(source: Path, out: Path, format: Format, tell: Tell = lambda phase, part: None) -> Conversion:
    """Write the quantized checkpoint `source` (a folder or a .gguf file) in another format as folder `out`.

    Act-order of `down` becomes the order of the rows of `gate` and `up`. That of other linears has no rows to
    go to (their inputs are the stream, or heads of attention): GPTQ keeps it as g_idx, other formats cannot.
    A linear whose width a format's words do not divide becomes a float matrix, its partners with it, and so
    does a rounded embedding or head but between files of compressed-tensors. How inputs are rounded, with
    their stored scales, is kept like the weights. Raises `ModelError` in one line, naming the linear, where a
    value would change; then nothing is left behind.
    """
    run = _Run(source, format, tell)
    with appearing(out, run.needed(), key_of(source, "convert", format)) as folder:
        return run.write(folder)


class _Run:
    """One conversion from start to end."""

    def __init__(self, source: Path, format: Format, tell: Tell) -> None:
        self.source, self.format, self.tell = source, format, tell
        self.loader = Loader(open_source(source))
        self.names: dict[str, Form | None] = {}
        self.folded = 0
        self.ordered = False  # whether a g_idx is left that is not static
        self.target = container(format, act_order="gptq" in format)

    def needed(self) -> int:
        """Bytes that are about enough: a GGUF file's embedding may become float32."""
        files = [self.source] if self.source.is_file() else self.source.glob("*.safetensors")
        spec = self.loader.spec
        return sum(file.stat().st_size for file in files) + 4 * spec.vocab_size * spec.hidden_size

    def write(self, folder: Path) -> Conversion:
        writer, shards = ModelWriter(self.loader.family, self.target, exact=True), ShardWriter(folder)
        for loss in lost(self.loader.settings):
            log.warning("%s", loss)
        for layer in self._layers("convert"):
            block, forms = self._block(layer)
            shards.extend(writer.block(layer, block, forms))
        shards.extend(writer.rest(self.loader, self._ends()))
        shards.close()
        write_json(folder / "config.json", self._config())
        carry_over(self.source, folder)
        self._compare(Loader(Checkpoint(folder)))
        done = Conversion(self.names, self.folded, shards.bytes)
        if done.loose:
            log.warning("%d linears are stored as floats: %s", len(done.loose), _listed(done.loose))
        carried.write(self.source, folder, self.format, done.bytes, self.loader.spec.parameters)
        return done

    def _layers(self, phase: str) -> Iterator[int]:
        total = self.loader.spec.num_layers
        for layer in range(total):
            self.tell(phase, layer / total)
            yield layer
        self.tell(phase, 1.0)

    def _block(self, layer: int) -> tuple[Block, dict[str, Form]]:
        """A block as it will be stored, and the forms of what is packed in it."""
        block, spec = self.loader.block(layer), self.loader.spec
        linears = dict(block.linears)
        self.folded += _order(linears["down"]) is not None
        order_inner(linears, spec.mlp)
        names = {p: self.loader.family.projections[p].format(i=layer) for p in spec.projections}
        forms = {p: form for p in spec.projections if (form := self._form(names[p], linears[p])) is not None}
        for unit in partners(spec):
            if not forms.keys() >= set(unit):
                forms = {p: form for p, form in forms.items() if p not in unit}
        for p, name in names.items():
            self.names[name] = forms.get(p)
            if p not in forms:
                linears[p] = replace(linears[p], weight=dense(linears[p].weight))
            self.ordered |= _order(linears[p]) is not None
        return Block(linears, block.norms), forms

    def _ends(self) -> dict[str, tuple[Linear, Form]]:
        """Embedding and head as they will be stored, where they are packed. Names those that lose it."""
        family, packed = self.loader.family, dict[str, tuple[Linear, Form]]()
        for name, end in ((family.embed, Linear(self.loader.embed())), (family.head, self.loader.head())):
            rounded = self.loader.codec_of(name) is not None
            if end is None or not (rounded or isinstance(end.weight, QuantizedTensor)):
                continue
            form = self._end_form(name, end) if rounded else None
            if form is None:
                log.warning("%s is stored as floats, which take more room: its levels do not move", name)
            else:
                packed[name] = end, form
        self.names |= {name: form for name, (_, form) in packed.items()}
        return packed

    def _end_form(self, name: str, end: Linear) -> Form | None:
        """None for what becomes a float matrix. Raises `ModelError`: such a one rounds no inputs."""
        if self.format != "compressed-tensors" and end.inputs is None:
            return None
        try:
            return self._form(name, end)
        except ModelError:
            if end.inputs is not None:
                raise
            return None

    def _form(self, name: str, linear: Linear) -> Form | None:
        """None for what is, or has to become, a float matrix. Raises `ModelError`."""
        weight = linear.weight
        if isinstance(weight, Tensor):
            return None
        try:
            form = form_held(linear, weight, for_linear(self.loader.settings, name), self.target)
        except ModelError as error:
            raise ModelError(f"{name}: {error}", hint=error.hint) from None
        return form if self.target.fits(weight.shape, form) is None else None

    def _config(self) -> dict[str, Any]:
        """Raises `ModelError` when nothing is packed."""
        if not any(self.names.values()):
            known = "no linear of it is quantized in a way that can be moved"
            raise ModelError(f"{self.source}: {known}", hint="`nybble quantize` quantizes")
        codec = self.target.codec(rule(self.names.values()))
        if isinstance(codec, GptqCodec):
            codec = replace(codec, act_order=self.ordered)
        return dict(self.loader.source.config) | {"quantization_config": codec.settings(self.names)}

    def _compare(self, written: Loader) -> None:
        """Read everything back. Raises `ModelError` for the first value that is another."""
        for layer in self._layers("compare"):
            block, copy = self.loader.block(layer), written.block(layer)
            inner = _order(block.linears["down"])
            for p, linear in block.linears.items():
                rows = inner if p in self.loader.spec.mlp[:-1] else None
                meant = _meant(linear, rows, inner if p == "down" else None)
                name = self.loader.family.projections[p].format(i=layer)
                _same(name, meant, _meant(copy.linears[p]))
                _same_inputs(name, linear, copy.linears[p])
            for role, norm in block.norms.items():
                found = copy.norms[role]
                _same(f"{role} of layer {layer}", (norm.weight, norm.bias), (found.weight, found.bias))
        heads = self.loader.head(), written.head()
        if heads[0] is not None and heads[1] is not None:
            _same(self.loader.family.head, _meant(heads[0]), _meant(heads[1]))
            _same_inputs(self.loader.family.head, heads[0], heads[1])
        embeddings = dense(self.loader.embed()), dense(written.embed())
        _same(
            self.loader.family.embed,
            (embeddings[0], self.loader.positions()),
            (embeddings[1], written.positions()),
        )


def _order(linear: Linear) -> Tensor | None:
    return linear.weight.permutation if isinstance(linear.weight, QuantizedTensor) else None


def _meant(
    linear: Linear, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as floats, outputs and inputs in these orders."""
    weight, bias = dense(linear.weight), linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return weight if columns is None else weight[:, columns], bias


def _same(name: str, meant: tuple[Tensor, Tensor | None], found: tuple[Tensor, Tensor | None]) -> None:
    for one, other in zip(meant, found, strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None or not torch.equal(one.float(), other.float()):
            raise _changed(f"{name} would not hold the same values")


def _same_inputs(name: str, linear: Linear, copy: Linear) -> None:
    if linear.inputs != copy.inputs:
        raise _changed(f"{name} would not round its inputs alike")


def _changed(what: str) -> ModelError:
    return ModelError(what, hint="this is a mistake of nybble: please report it")


def _listed(names: tuple[str, ...], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
