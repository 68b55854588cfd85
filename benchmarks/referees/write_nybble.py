"""nybble quantizes a model by each recipe, as the others do: same arguments, same windows, same report."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

from peer import arguments, each
from recipe import Recipe
from tokenizers import Tokenizer
from torch import Tensor

from nybble_models.formats.form import CHANNEL
from nybble_quantizers.pipeline import quantize as run
from nybble_quantizers.scheme import Scheme


def scheme(recipe: Recipe, windows: Tensor, widths: list[int]) -> Scheme:
    """Our defaults, apart from what the recipe names; "gptq+best" is GPTQ and then `--quality best`.

    widths: inputs of the model's linears. Where one ends in a short group, only GPTQ's format holds all.
    """
    short = recipe.group is not None and any(width % recipe.group for width in widths)
    return Scheme(
        format="gptq_v2" if short else "auto",
        method=recipe.method.removesuffix("+best"),  # type: ignore[arg-type]
        best=recipe.method.endswith("+best"),
        bits=recipe.bits,
        group_size=recipe.group or CHANNEL,
        symmetric=recipe.symmetric,
        kind="float" if recipe.floats else "int",
        inputs="token" if recipe.rounded else None,
        samples=windows.shape[0],
        length=windows.shape[1],
    )


def quantize(model: Path, calibration: Tensor, folder: Path, recipe: Recipe) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf8"))
    widths = [config[k] for k in ("hidden_size", "intermediate_size", "ffn_dim") if k in config]
    by_scheme(model, calibration, folder, scheme(recipe, calibration, widths))


def by_scheme(model: Path, calibration: Tensor, folder: Path, scheme: Scheme) -> None:
    """The windows as one document each: packed end to end, they are the same windows again."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = folder.with_suffix(".jsonl")
    documents = [tokenizer.decode(window.tolist()) for window in calibration]
    if [tokenizer.encode(text).ids for text in documents] != calibration.tolist():
        raise ValueError("the windows are not what their text is tokenized to")
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf8")
    run(model, folder, scheme, calibration=str(texts))


if __name__ == "__main__":
    each(arguments(__doc__), quantize, None, {name: version(name) for name in ("nybble", "transformers")})
