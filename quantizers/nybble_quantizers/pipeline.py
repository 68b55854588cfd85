"""Checkpoint in, quantized checkpoint out: read, fold, round and write, one block in memory at a time."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_models.checkpoint import write_json
from nybble_models.decoder import Decoder
from nybble_models.errors import BrokenCheckpoint, ModelError
from nybble_models.formats.awq import AwqCodec
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm, Weights
from nybble_quantizers import rtn
from nybble_quantizers.block import Finding, Scene, Window, quantize_block
from nybble_quantizers.calibrate import Calibration, Inputs, read_windows
from nybble_quantizers.generate import generate
from nybble_quantizers.output import ShardWriter, appearing
from nybble_quantizers.report import LayerReport, Listener, QuantizeProgress, QuantReport
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.tokenizing import carry_over, load_tokenizer

log = logging.getLogger("nybble.quantize")

CODEC = AwqCodec()
PARTNERS = (("q", "k", "v"), ("gate", "up"))  # engines fuse them, so all or none are quantized
KEPT = 4  # windows on which the halves of a block are run for every candidate
LIBRARIES = ("nybble", "torch", "transformers", "safetensors", "gguf")


@torch.inference_mode()
def quantize(
    source: Path | str,
    out: Path,
    scheme: Scheme,
    *,
    calibration: str | None = None,
    seed: int = 0,
    progress: Listener | None = None,
    command: str | None = None,
) -> QuantReport:
    """Write `source` (a folder or a .gguf file), quantized by `scheme`, as the new folder `out`.

    Without a calibration file the model writes its own text. The same arguments make the same bytes. Raises
    `ModelError` in one line; then, and on Ctrl-C, nothing is left behind.
    """
    run = _Run(Path(source), scheme, calibration, seed, progress or (lambda event: None))
    with appearing(out, run.needed()) as folder:
        report = run.write(folder, " ".join(sys.argv) if command is None else command)
        report.write(folder)
    return report


class _Run:
    """One quantization from start to end."""

    def __init__(
        self, source: Path, scheme: Scheme, calibration: str | None, seed: int, tell: Listener
    ) -> None:
        self.source = source
        self.scheme = scheme
        self.calibration = calibration
        self.seed = seed
        self.tell = tell
        self.loader = Loader(open_source(source))
        self.spec: ModelSpec = self.loader.spec
        if self.loader.codec is not None:
            raise ModelError(f"{source} is quantized already", hint="quantize the original model")
        self.rounded = {i: self._rounded(i) for i in range(self.spec.num_layers)}
        self.skipped = tuple(
            self._name(i, p)
            for i, kept in self.rounded.items()
            for p in self.spec.projections
            if p not in kept
        )

    def _name(self, layer: int, projection: str) -> str:
        return self.loader.family.projections[projection].format(i=layer)

    def _rounded(self, layer: int) -> frozenset[str]:
        """The linears of a layer that the scheme wants and the format can hold, partners together."""
        if self.scheme.method == "none":
            return frozenset()
        fit = {p for p in self.spec.projections if self._fits(layer, p)}
        for partners in PARTNERS:
            present = {p for p in partners if p in self.spec.projections}
            if not present <= fit:
                fit -= present
        return frozenset(fit)

    def _fits(self, layer: int, projection: str) -> bool:
        shape = self.spec.shape(projection)
        held = CODEC.fits(shape, self.scheme.bits, self.scheme.group(shape[1])) is None
        return held and not self.scheme.skips(self._name(layer, projection))

    def needed(self) -> int:
        """About how many bytes the folder will take."""
        codes = sum(
            math.prod(self.spec.shape(p))
            * (self.scheme.bits / 8 + 3 / self.scheme.group(self.spec.shape(p)[1]))
            if p in kept
            else math.prod(self.spec.shape(p)) * 2
            for kept in self.rounded.values()
            for p in self.spec.projections
        )
        blocks = sum(math.prod(self.spec.shape(p)) for p in self.spec.projections) * self.spec.num_layers
        return int(codes + 2 * (self.spec.parameters - blocks)) + (16 << 20)

    def write(self, folder: Path, command: str) -> QuantReport:
        self._refuse_nothing_to_do()
        writer = ShardWriter(folder)
        layers: list[LayerReport] = []
        described = self._quantize_blocks(writer, layers)
        self._write_rest(writer)
        self.tell(QuantizeProgress("write", 0, 1))
        writer.close()
        write_json(folder / "config.json", self._config())
        carry_over(self.source, folder)
        self.tell(QuantizeProgress("write", 1, 1))
        return self._report(layers, described, command, writer.bytes)

    def _refuse_nothing_to_do(self) -> None:
        if self.scheme.method != "none" and not any(self.rounded.values()):
            shape = self.spec.shape("q")
            reason = (
                CODEC.fits(shape, self.scheme.bits, self.scheme.group(shape[1])) or "all layers are skipped"
            )
            raise ModelError(
                f"no linear of {self.source} can be quantized: {reason}", hint="change the scheme"
            )

    def _quantize_blocks(self, writer: ShardWriter, layers: list[LayerReport]) -> dict[str, object] | None:
        started = time.monotonic()
        stream = _Stream(self) if self.scheme.method == "awq" else None
        for layer in range(self.spec.num_layers):
            block = self._block(layer)
            findings: dict[str, Finding] = {}
            if stream is None:
                folded, quantized = block, self._nearest(layer, block)
            else:
                folded, quantized, findings = stream.advance(layer, block)
            self._write_block(writer, layer, quantized)
            layers += self._layer_reports(layer, folded, quantized, findings)
            left = (time.monotonic() - started) / (layer + 1) * (self.spec.num_layers - layer - 1)
            noise = max((f.noise for f in findings.values() if f.noise is not None), default=None)
            self.tell(QuantizeProgress("quantize", layer + 1, self.spec.num_layers, left, noise))
        return stream.calibration.describe() if stream else None

    def _nearest(self, layer: int, block: Block) -> Block:
        linears = dict(block.linears)
        for p in self.rounded[layer]:
            weight = linears[p].weight
            assert isinstance(weight, Tensor)
            group = self.scheme.group(weight.shape[1])
            made = rtn.quantize(weight, self.scheme.bits, group, self.scheme.symmetric)
            linears[p] = Linear(made, linears[p].bias)
        return Block(linears, block.norms)

    def _block(self, layer: int) -> Block:
        """A block in float32. Raises `BrokenCheckpoint` for a number that is none."""
        loaded = self.loader.block(layer)
        names = {role: name.format(i=layer) for role, name in self.loader.family.norms.items()}
        linears = {
            p: Linear(
                _finite(x.weight, f"{self._name(layer, p)}.weight"),
                _finite_bias(x.bias, self._name(layer, p)),
            )
            for p, x in loaded.linears.items()
        }
        norms = {
            role: Norm(_finite(x.weight, f"{names[role]}.weight"), _finite_bias(x.bias, names[role]))
            for role, x in loaded.norms.items()
        }
        return Block(linears, norms)

    def _write_block(self, writer: ShardWriter, layer: int, block: Block) -> None:
        for projection, linear in block.linears.items():
            name = self._name(layer, projection)
            if isinstance(linear.weight, QuantizedTensor):
                for part, tensor in CODEC.encode(linear.weight).items():
                    writer.add(f"{name}.{part}", tensor, "linear")
            else:
                writer.add(f"{name}.weight", _half(linear.weight, name), "linear")
            if linear.bias is not None:
                writer.add(f"{name}.bias", linear.bias, "linear")
        for role, norm in block.norms.items():
            self._write_norm(writer, self.loader.family.norms[role].format(i=layer), norm)

    def _write_norm(self, writer: ShardWriter, name: str, norm: Norm) -> None:
        """Norms stay float32: they are small, and a fold divides them by any number."""
        writer.add(f"{name}.weight", norm.weight.float(), "norm")
        if norm.bias is not None:
            writer.add(f"{name}.bias", norm.bias.float(), "norm")

    def _write_rest(self, writer: ShardWriter) -> None:
        family = self.loader.family
        writer.add(f"{family.embed}.weight", _half(self.loader.embed(), family.embed), "embedding")
        positions = self.loader.positions()
        if positions is not None:
            writer.add(f"{family.positions}.weight", _half(positions, str(family.positions)), "embedding")
        self._write_norm(writer, family.final_norm, self.loader.final_norm())
        head = self.loader.head()
        if head is not None:
            assert isinstance(head.weight, Tensor)
            writer.add(f"{family.head}.weight", _half(head.weight, family.head), "head")

    def _config(self) -> dict[str, Any]:
        config = dict(self.loader.source.config) | {"torch_dtype": "float16"}
        config.pop("dtype", None)
        if self.scheme.method != "none":
            config["quantization_config"] = CODEC.settings(
                self.scheme.bits, self.scheme.group_size, self.scheme.symmetric, self.skipped
            )
        return config

    def _layer_reports(
        self, layer: int, folded: Block, quantized: Block, findings: Mapping[str, Finding]
    ) -> list[LayerReport]:
        reports = []
        for projection in self.spec.projections:
            weight, made = folded.linears[projection].weight, quantized.linears[projection].weight
            if isinstance(made, QuantizedTensor) and isinstance(weight, Tensor):
                found = findings.get(projection, Finding())
                reports.append(_layer_report(self._name(layer, projection), weight, made, found))
        return reports

    def _report(
        self,
        layers: list[LayerReport],
        described: dict[str, object] | None,
        command: str,
        sizes: dict[str, int],
    ) -> QuantReport:
        return QuantReport(
            source=self.source.name,
            scheme=asdict(self.scheme),
            seed=self.seed,
            calibration=described,
            versions=_versions(),
            command=command,
            bytes=sizes,
            bits_per_weight=8 * sum(sizes.values()) / self.spec.parameters,
            skipped=self.skipped,
            layers=tuple(layers),
        )


class _Stream:
    """The calibration text on its way through the model: one state [T, D] per window."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.calibration = self._windows()
        loader, spec = run.loader, run.spec
        weights = Weights(
            loader.embed(), loader.positions(), [Block()] * spec.num_layers, loader.final_norm(), None
        )
        self.decoder = Decoder(spec, weights)
        self.states = [self.decoder.embed(window) for window in self.calibration.tokens]

    def _windows(self) -> Calibration:
        run, scheme = self.run, self.run.scheme
        length = min(scheme.length, run.spec.max_positions)
        if run.calibration is not None:
            tokenizer = load_tokenizer(run.source)
            return read_windows(Path(run.calibration), tokenizer, scheme.samples, length, run.seed)
        started = time.monotonic()

        def advance(done: int) -> None:
            left = (time.monotonic() - started) / done * (length - done)
            run.tell(QuantizeProgress("calibrate", done, length, left))

        tokens = generate(run.spec, run.loader.load(), scheme.samples, length, run.seed, advance)
        return Calibration(tokens, "written by the model")

    def advance(self, layer: int, block: Block) -> tuple[Block, Block, dict[str, Finding]]:
        """Quantize one block; the next one sees what the float block makes of the text."""
        inputs = Inputs(KEPT)
        blocks = self.decoder.weights.blocks
        blocks[layer] = block
        self.states = [
            self.decoder.block(layer, x, Window(self.run.spec), inputs.observe) for x in self.states
        ]
        scene = Scene(self.decoder, self.run.loader.family, layer, inputs)
        done = quantize_block(block, scene, self.run.scheme, self.run.rounded[layer])
        blocks[layer] = Block()
        return done


def _finite(tensor: Any, name: str) -> Tensor:
    assert isinstance(tensor, Tensor)
    value = tensor.float()
    if not bool(value.isfinite().all()):
        raise BrokenCheckpoint(
            f"{name} holds NaN or infinity", hint="the checkpoint is damaged; fetch it again"
        )
    return value


def _finite_bias(bias: Tensor | None, name: str) -> Tensor | None:
    return None if bias is None else _finite(bias, f"{name}.bias")


def _half(tensor: Tensor, name: str) -> Tensor:
    half = tensor.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise BrokenCheckpoint(f"{name} holds NaN or a number past float16", hint="the checkpoint is damaged")
    return half


def _layer_report(name: str, weight: Tensor, made: QuantizedTensor, found: Finding) -> LayerReport:
    missed = made.dequantize() - weight
    error = float(missed.square().mean().sqrt() / weight.square().mean().sqrt().clamp(min=1e-30))
    sqnr = None if found.noise is None else -10 * math.log10(max(found.noise, 1e-30))
    return LayerReport(
        name, made.bits, made.group_size, made.nbytes, error, sqnr, found.ratio, found.duo, found.clip_share
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # run from the source tree
            found[library] = "source"
    return found
