"""llama.cpp, built for this machine: its library, its Python package's server, and its own llama-server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from environments import Environment, Step, install, pip
from subjects import (
    CONTEXT,
    MODEL,
    PORT,
    STREAMS,
    Files,
    Library,
    Server,
    Subject,
    python,
    threads,
    worker,
)

NAME = "llama.cpp"
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SERVER = Path("build", "bin", "llama-server")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # or the build downloads a web page
    "LLAMA_OPENSSL": "OFF",
}


def environment(home: Path) -> Environment:
    """The package compiles llama.cpp as it installs; llama-server is made from the same source archive."""
    source, build = home / "source", str(home / "build")
    archive = source / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    tree = archive.with_name(archive.name.removesuffix(".tar.gz")) / "vendor" / "llama.cpp"
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    make = ("cmake", "--build", build, "--parallel", str(threads()[-1]), "--target", "llama-server")
    return Environment(
        NAME,
        home,
        (
            pip(
                home,
                "download",
                "--no-deps",
                f"--no-binary={PACKAGE}",
                "-d",
                str(source),
                f"{PACKAGE}=={VERSION}",
            ),
            install(home, f"{archive}[server]"),
            Step((python(home), "-m", "tarfile", "--extract", str(archive), str(source)), optional=True),
            Step(("cmake", "-S", str(tree), "-B", build, *options), optional=True),
            Step(make, optional=True),
        ),
    )


def requantize(home: Path, source: Path, target: Path) -> Step:
    """llama.cpp's own Q4_0 of a file."""
    return Step((*worker(python(home), "worker_llama_cpp.py")[:2], "--requantize", str(source), str(target)))


def subjects(home: Path, files: Files) -> Iterator[Subject]:
    for kind, path in (("Q4_1", files.source), ("Q4_0", files.q4_0)):
        if path is not None:
            yield library(home, kind, path)
            if files.served and (home / SERVER).exists():
                yield own_server(home, kind, path)
    if files.served:
        yield python_server(home, files.source)


def library(home: Path, kind: str, path: Path) -> Library:
    return Library(
        f"llama.cpp {kind}",
        NAME,
        str(path),
        worker(python(home), "worker_llama_cpp.py", path=str(path), context=CONTEXT),
        decoding=tuple({"threads": count} for count in threads()),
        prefill={"threads": threads()[-1]},
    )


def own_server(home: Path, kind: str, path: Path) -> Server:
    """Without its cache of old prompts, which would hold memory and take time between requests."""
    fixed = f"--port {PORT} --alias {MODEL} -c {CONTEXT} -np {STREAMS} -kvu -cram 0 -fa on --no-webui".split()
    command = (str(home / SERVER), "-m", str(path), *fixed, "-tb", str(threads()[-1]))
    commands = tuple((*command, "-t", str(count)) for count in threads())
    body = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    return Server(f"llama-server {kind}", NAME, str(path), commands, body, "/health")


def python_server(home: Path, path: Path) -> Server:
    """It answers one request after the other, and has no way to ignore the end of a text."""
    flags = f"--port {PORT} --model_alias {MODEL} --n_ctx {CONTEXT} --flash_attn true --logits_all false"
    command = (python(home), "-m", "llama_cpp.server", "--model", str(path), *flags.split())
    commands = tuple(
        (*command, "--n_threads", str(count), "--n_threads_batch", str(threads()[-1])) for count in threads()
    )
    return Server("llama-cpp-python server Q4_1", NAME, str(path), commands, {}, streams=1)
