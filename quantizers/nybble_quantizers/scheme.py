"""`Scheme`: how a model is to be quantized, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from nybble_models.errors import ModelError
from nybble_models.formats.container import Container, container
from nybble_models.formats.form import CHANNEL, TENSOR, Form, Inputs, Kind
from nybble_quantizers.gptq import DAMP, Order

Method = Literal["awq", "gptq", "awq+gptq", "smoothquant", "smoothquant+gptq", "rtn", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """`samples` windows of `length` tokens calibrate AWQ and GPTQ; `grid` is how many ratios AWQ tries.

    `skip` holds shell patterns of linears that stay 16-bit ("*.down_proj", "model.layers.0.*"), also where an
    override or a target says otherwise. `format` is a name of `CONTAINERS`, or "auto": AWQ where it can hold
    the form, else compressed-tensors. `overrides` are "PATTERN=FORM" (see `override`). With `target_bits` a
    weight, scales and zeros included, or `target_bytes`, the bits of each linear are chosen among `widths`
    and 16. `ends`: the embedding and the head are rounded too. `kind` "float" is FP8 (E4M3). `inputs`:
    activations are rounded to 8 bits of the same kind, with a scale a "token", or one for the "tensor" that
    calibration finds. `alpha`: how much of their range SmoothQuant moves into the weights; None: searched for
    each fold. `best`: afterwards levels, scales, norms and biases are tuned by gradient in so many `steps`.
    `order`: in which GPTQ takes the inputs (see `gptq.Order`). `damp`: what is added to a Hessian's diagonal
    at first, of its mean. `mse`: round-to-nearest searches the range of every group for the least error.
    Method "none" keeps every weight at 16 bits (a change of container only).
    """

    method: Method = "awq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: bool = True
    samples: int = 16
    length: int = 256
    grid: int = 20
    skip: tuple[str, ...] = ()
    format: str = "auto"
    overrides: tuple[str, ...] = ()
    target_bits: float | None = None
    target_bytes: int | None = None
    widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    ends: bool = False
    kind: Kind = "int"
    inputs: Inputs | None = None
    alpha: float | None = None
    order: Order = "groups"
    damp: float = DAMP
    mse: bool = False
    best: bool = False
    steps: int = 100

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ModelError(
                f"method {self.method!r} is unknown", hint=f"known: {', '.join(get_args(Method))}"
            )
        limits = {
            "bits": (2, 8),
            "samples": (1, 65536),
            "length": (2, 1 << 20),
            "grid": (1, 1000),
            "steps": (1, 100000),
            "damp": (0, 1),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} is {getattr(self, name)}", hint=f"give {low} to {high}")
        if self.group_size < CHANNEL or (self.group_size == TENSOR and self.method != "rtn"):
            raise ModelError(
                f"group size {self.group_size} is not positive",
                hint="-1 means one scale for a row; 0, with method rtn, one for the whole matrix",
            )
        if self.order != "groups" and not self.compensates:
            raise ModelError(f"{self.method} takes the inputs in no order", hint="--method gptq or awq+gptq")
        if self.mse and (self.method != "rtn" or self.kind == "float"):
            raise ModelError("the search for the least error is round-to-nearest's", hint="--method rtn")
        self._named_container()
        self._check_target()
        if self.ends and self.container.name != "compressed-tensors":
            raise ModelError(
                f"{self.container.name} holds no quantized embedding", hint="--format compressed-tensors does"
            )
        if self.format == "awq" and (self.mixes or self.overrides):
            raise ModelError("AWQ has one form for all linears", hint="--format compressed-tensors has many")
        if self.form is not None:
            self.check(self.form)
        if self.smooths and self.inputs is None:
            raise ModelError("SmoothQuant is for rounded inputs", hint="--scheme W8A8")
        if self.alpha is not None and not (self.smooths and 0 <= self.alpha <= 1):
            raise ModelError(f"alpha is {self.alpha}", hint="give 0 to 1, with method smoothquant")
        if self.best:
            self._check_best()

    def _check_target(self) -> None:
        if self.target_bits is not None and self.target_bytes is not None:
            raise ModelError("a target of bits and one of bytes contradict each other", hint="give one")
        if self.target_bits is not None and not 0 < self.target_bits < 16:
            raise ModelError(
                f"{self.target_bits:g} bits a weight is no target",
                hint="give more than 0 and fewer than 16, which is no rounding",
            )
        if not self.widths or not all(2 <= bits <= 8 for bits in self.widths):
            raise ModelError(f"widths are {list(self.widths)}", hint="give some of 2 to 8, as --widths 4 8")
        if self.target_bytes is not None and self.target_bytes < 1:
            raise ModelError(f"{self.target_bytes} bytes are no target", hint="as --target-size 80MB")
        if self.mixes and (self.inputs is not None or self.kind == "float"):
            raise ModelError(
                "a target chooses widths of integers, and rounded inputs and floats have 8 bits only",
                hint="leave out the target, or --scheme W4A16 with it",
            )
        if self.method == "none" and (self.mixes or self.overrides or self.ends):
            raise ModelError(
                "method none rounds nothing: there is nothing to choose a form for",
                hint="leave out target, overrides and embeddings, or choose a method",
            )

    def _check_best(self) -> None:
        tuned = self.method in ("awq", "gptq", "awq+gptq")
        if tuned and self.inputs is None and not self.permutes:
            return
        reason = "rounded inputs" if self.inputs is not None else "act-order" if tuned else self.method
        raise ModelError(
            f"quality best does not tune {reason}",
            hint="--method awq, gptq or awq+gptq is tuned, without act-order and rounded inputs",
        )

    def check(self, form: Form) -> None:
        """Raises `ModelError` for a form that none of this scheme's linears can have."""
        whole = form.bits == 8 and form.symmetric and form.group_size <= 0
        if form.kind == "float" and not whole:
            raise ModelError(
                "floats have 8 bits and no zero points, and one scale a row or a matrix",
                hint="--scheme FP8 says all that",
            )
        if form.inputs is not None and not whole:
            raise ModelError(
                "inputs are rounded where weights have 8 bits, no zero points and one scale a row",
                hint="--scheme W8A8 and FP8 say all that",
            )
        if self.format == "gptq" and not form.symmetric:
            raise ModelError(
                "gptq cannot hold every zero point: it has no 0", hint="--format gptq_v2, or --symmetric"
            )

    def skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.skip)

    @property
    def form(self) -> Form | None:
        """How a linear is stored unless something else is said of it; None: at 16 bits."""
        if self.method == "none":
            return None
        return Form(self.bits, self.group_size, self.symmetric, self.kind, self.inputs)

    @property
    def permutes(self) -> bool:
        """Whether kernels have to undo GPTQ's order."""
        return self.order == "desc_act"

    def _named_container(self) -> Container | None:
        """None where the format follows from the forms."""
        if self.format == "auto" and not self.permutes:
            return None
        return container("gptq_v2" if self.format == "auto" else self.format, self.permutes)

    @property
    def container(self) -> Container:
        named = self._named_container()
        if named is not None:
            return named
        form = self.form
        alike = not (self.overrides or self.mixes or self.ends)
        plain = form is None or (alike and form.bits == 4 and form.group_size != TENSOR)
        return container("awq" if plain else "compressed-tensors")

    @property
    def mixes(self) -> bool:
        """Whether the forms of the linears are chosen by measurement."""
        return self.target_bits is not None or self.target_bytes is not None

    @property
    def folds(self) -> bool:
        """Whether scales are searched and folded (AWQ, SmoothQuant)."""
        return self.smooths or self.method in ("awq", "awq+gptq")

    @property
    def smooths(self) -> bool:
        """Whether those scales are made for inputs that are rounded."""
        return self.method in ("smoothquant", "smoothquant+gptq")

    @property
    def compensates(self) -> bool:
        """Whether the weights still to be rounded make up for those that are (GPTQ)."""
        return self.method in ("gptq", "awq+gptq", "smoothquant+gptq")

    @property
    def reads(self) -> bool:
        """Whether a calibration text is needed."""
        return self.watches or self.mixes

    @property
    def watches(self) -> bool:
        """Whether the text passes the blocks as they are rounded."""
        return self.folds or self.compensates or self.inputs == "tensor"

    @property
    def label(self) -> str:
        """ "awq-w4g64", "rtn-w4g128-sym", "awq-5bit-w4g64": what goes into the name of a folder."""
        if self.form is None:
            return "w16"
        target = ""
        if self.target_bits is not None:
            target = f"{self.target_bits:g}bit-"
        if self.target_bytes is not None:
            target = f"{self.target_bytes / 1e6:g}MB-"
        return f"{self.method}-{target}{self.form.label}" + ("-best" if self.best else "")


PRESETS: Mapping[str, Scheme] = {
    "auto": Scheme(target_bits=5.0),
    "W4A16": Scheme(),
    "W4A16-g32": Scheme(group_size=32),
    "W4A16-g128": Scheme(group_size=128),
    "W4A16-RTN": Scheme(method="rtn"),
    "W8A8": Scheme(method="smoothquant", bits=8, group_size=CHANNEL, symmetric=True, inputs="token"),
    "W8A8-static": Scheme(
        method="smoothquant", bits=8, group_size=CHANNEL, symmetric=True, inputs="tensor", alpha=0.5
    ),
    "FP8": Scheme(method="rtn", bits=8, group_size=CHANNEL, symmetric=True, kind="float", inputs="token"),
    "FP8-static": Scheme(
        method="rtn", bits=8, group_size=CHANNEL, symmetric=True, kind="float", inputs="tensor"
    ),
    "W16": Scheme(method="none"),
}


def preset(name: str, **changes: Any) -> Scheme:
    """A preset with some fields changed. Raises `ModelError` for a name that is not one."""
    if name not in PRESETS:
        raise ModelError(f"scheme {name!r} is unknown", hint=f"presets: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
