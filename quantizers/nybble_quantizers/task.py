"""`Task`: one quantization as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nybble_models.errors import ModelError
from nybble_models.loader import CPU
from nybble_quantizers.device import facts
from nybble_quantizers.journal import fingerprint, key_of
from nybble_quantizers.scheme import Scheme

LAST_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The arguments of `quantize` that decide what is done."""

    source: Path
    scheme: Scheme
    calibration: str | None = None
    evaluation: Path | None = None
    seed: int = 0
    memory: int | None = None
    device: torch.device = CPU
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LAST_SEED:
            raise ModelError(f"seed is {self.seed}", hint=f"give 0 to {LAST_SEED}")
        if self.base_model is not None:
            _check_id(self.base_model)

    @property
    def key(self) -> str:
        """The same task gives the same, whatever the memory: that changes no byte."""
        device = facts(self.device)
        return key_of(self.source, self.scheme, fingerprint(self.calibration), self.seed, device)


def _check_id(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(f"{name!r} is no id of the hub", hint="as meta-llama/Llama-3.2-1B") from None
