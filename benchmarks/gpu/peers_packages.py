"""Peers in packages of their own: torchao, gemlite, humming-kernels, bitsandbytes. Absent ones are reported.

Written against torchao 0.18.0, gemlite 0.6.0.post2, humming-kernels 0.1.19 and bitsandbytes 0.50.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from subject import Matrix, Prepared, Subject, rows8
from tinygemm import pack_tinygemm
from torch import Tensor
from torch.nn import functional as F

GROUP = 128


class TorchAo4(Subject):
    """Its tile-packed int4 tensor in F.linear: the tinygemm kernel behind a tensor subclass."""

    name = "torchao int4"
    kind = "W4A16"
    modules = ("torchao",)
    tolerance = 2e-2

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        from torchao.quantization import Int4TilePackedTo4dTensor

        shape = torch.Size(matrix.shape)
        words, scales_and_zeros, means = pack_tinygemm(matrix.codes, multiple=1024)

        def run(x: Tensor, words: Tensor, scales_and_zeros: Tensor) -> Tensor:
            return F.linear(x, Int4TilePackedTo4dTensor(words, scales_and_zeros, [1, GROUP], shape))

        return Prepared((words, scales_and_zeros), run, means)


class TorchAo8(Subject):
    """Dynamic int8 activations, eager: without a compiler its quantization of x is several kernels."""

    name = "torchao int8 dynamic"
    kind = "W8A8"
    modules = ("torchao",)
    on_cpu = True
    tolerance = 3e-2

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        outputs, inputs = matrix.shape
        layer = torch.nn.Linear(inputs, outputs, bias=False, device=matrix.dense.device, dtype=self.dtype)
        layer.weight.data = matrix.dense.to(self.dtype)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        kept: Any = layer.weight.data
        scale = kept.scale

        def run(x: Tensor, codes: Tensor) -> Tensor:
            weight = type(kept)(
                codes, scale, kept.block_size, kept.dtype, act_quant_kwargs=kept.act_quant_kwargs
            )
            return F.linear(x, weight)

        return Prepared((kept.qdata,), run, kept.qdata.float() * scale.float())


class Gemlite(Subject):
    modules = ("gemlite", "tqdm")
    compiles = True
    dtype = torch.float16  # the type its shipped tile choices are keyed by

    def __init__(self) -> None:
        self.loaded = False

    def package(self) -> Any:
        """Imported late: the import itself asks the CUDA device for its name."""
        import gemlite

        if not self.loaded and "h200" in torch.cuda.get_device_name().lower():
            configs = Path(gemlite.__file__).parent / "configs"
            gemlite.load_config(str(configs / "h100.json"))  # it ships none for the H200, the same chip
        self.loaded = True
        return gemlite

    def wrapped(self, layer: Any, means: Tensor) -> Prepared:
        meta, forward = layer.get_meta_args(), self.package().forward_functional

        def run(x: Tensor, *tensors: Tensor) -> Tensor:
            return forward(x, None, list(tensors), meta)

        return Prepared(tuple(layer.get_tensor_args()), run, means)


class Gemlite4(Gemlite):
    name = "gemlite A16W4"
    kind = "W4A16"

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        self.package()
        from gemlite.helper import A16W4_HQQ_INT

        codes = matrix.codes
        assert codes.zeros is not None
        groups = (codes.scales.numel(), 1)
        layer = A16W4_HQQ_INT(device=str(codes.codes.device), dtype=self.dtype).from_weights(
            codes.codes, codes.scales.reshape(groups), codes.zeros.float().reshape(groups)
        )
        return self.wrapped(layer, matrix.dense)


class Gemlite8(Gemlite):
    name = "gemlite A8W8 dynamic"
    kind = "W8A8"
    tolerance = 2e-2

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        self.package()
        from gemlite.helper import A8W8_INT8_dynamic

        codes, scales = rows8(matrix.dense)
        maker = A8W8_INT8_dynamic(device=str(codes.device), dtype=self.dtype)
        return self.wrapped(maker.from_weights(codes, scales=scales), codes * scales)


class Humming(Subject):
    """Compiles its kernel for each shape when it is first used."""

    modules = ("humming", "cuda", "jinja2")
    compiles = True
    weight: ClassVar[dict[str, Any]]
    input: ClassVar[dict[str, Any]] = {}

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        from humming.forward import humming_forward
        from humming.layer import HummingLayer
        from humming.schema import HummingWeightSchema

        outputs, inputs = matrix.shape
        layer = HummingLayer(
            outputs, inputs, dict(self.weight), dict(self.input), torch_dtype=self.dtype
        ).cuda()
        kept = HummingWeightSchema.quant_tensor(matrix.dense.to(self.dtype), layer.weight_schema, self.dtype)
        means = layer.weight_schema.dequant_tensors(kept).float().reshape(outputs, inputs)
        layer.load_from_tensors(kept)
        layer.transform()

        def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            return humming_forward(
                layer.humming_config, x, weight=weight, weight_scale=scale, locks=layer.locks
            )

        return Prepared((layer.weight.data, layer.weight_scale.data), run, means)


class Humming4(Humming):
    name = "humming W4A16"
    kind = "W4A16"
    weight: ClassVar[dict[str, Any]] = {"dtype": "int4", "group_size": GROUP}


class Humming8(Humming):
    name = "humming W8A8"
    kind = "W8A8"
    weight: ClassVar[dict[str, Any]] = {"dtype": "int8"}
    input: ClassVar[dict[str, Any]] = {"dtype": "int8"}
    tolerance = 2e-2


class BitsAndBytesNf4(Subject):
    """Its 4-bit normal-float codebook with a float32 scale to 64 weights."""

    name = "bitsandbytes nf4"
    kind = "W4A16"
    modules = ("bitsandbytes",)

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        from bitsandbytes import functional as bf

        codes, state = bf.quantize_4bit(matrix.dense.to(self.dtype), blocksize=64, quant_type="nf4")
        shape, size = state.shape, state.blocksize

        def run(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
            return torch.ops.bitsandbytes.gemm_4bit.default(x, codes.view(-1, 1), shape, absmax, size, "nf4")

        return Prepared((codes, state.absmax), run, bf.dequantize_4bit(codes, state).float())


class BitsAndBytes8(Subject):
    """LLM.int8() without outlier columns."""

    name = "bitsandbytes int8"
    kind = "W8A8"
    dtype = torch.float16
    modules = ("bitsandbytes",)
    tolerance = 2e-2

    def prepare(self, matrix: Matrix, m: int) -> Prepared:
        from bitsandbytes import functional as bf

        codes, absmax, _ = bf.int8_vectorwise_quant(matrix.dense.to(self.dtype))

        def run(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
            rows, steps, _ = bf.int8_vectorwise_quant(x)
            return torch.ops.bitsandbytes.int8_scaled_mm.default(rows, codes, steps, absmax, dtype=x.dtype)

        return Prepared((codes, absmax), run, codes.float() * absmax.float()[:, None] / 127)
