"""What must hold for the repository as a whole."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support_process import environment

ROOT = Path(__file__).parent.parent
COMPONENTS = ("server", "kernels", "models", "quantizers")
SOURCES = sorted(path for folder in COMPONENTS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "deploy").rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
FORBIDDEN_FLAGS = {"trust_remote_code", "shell", "allow_pickle"}
LONGEST_FILE = 400
HELP_SECONDS = 1.5  # the promise is 0.5 on an idle machine; a busy one gets slack


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression that names it; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (stem := dotted(node.value)):
        return f"{stem}.{node.attr}"
    return ""


def hazards(text: str) -> Iterator[str]:
    """What could run code that came with data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.split(".")[0] in FORBIDDEN_MODULES or whole & FORBIDDEN_CALLS:
                yield node.module
        elif isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            yield dotted(node.func)
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_FLAGS and not is_false(node.value):
            yield f"{node.arg}="


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", named([*SOURCES, *SCRIPTS]))
def test_no_code_runs_what_data_says(path: Path) -> None:
    assert list(hazards(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "yaml.load(f)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_hazards_are_seen(text: str) -> None:
    assert list(hazards(text))


@pytest.mark.parametrize("text", ["f(shell=False)", "re.compile(p)", "yaml.safe_load(f)", "model.eval()"])
def test_harmless_code_is_no_hazard(text: str) -> None:
    assert list(hazards(text)) == []


@pytest.mark.parametrize("path", named([*SOURCES, *TESTS, *SCRIPTS]))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_nothing_at_the_root_is_an_import_package() -> None:
    """A package called `kernels` on the path breaks transformers where Hugging Face's is installed."""
    assert list(ROOT.glob("*/__init__.py")) == []


def test_each_component_holds_one_typed_package() -> None:
    for folder in COMPONENTS:
        packages = [path.parent for path in (ROOT / folder).glob("*/__init__.py")]
        assert len(packages) == 1, folder
        assert (packages[0] / "py.typed").exists()


def test_transformers_imports_from_the_checkout() -> None:
    """Its `kernels` integration looks for a package of that name, also in the working directory."""
    result = python("import sys; sys.path.insert(0, ''); import transformers.integrations.hub_kernels")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["serve", "--help"], ["quantize", "--help"], ["eval", "--help"], ["bench", "--help"]],
)
def test_help_is_quick_and_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom nybble.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'numba', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = python(program)
        seconds.append(time.perf_counter() - began)
        assert result.returncode == 0, result.stderr
    assert "Usage: nybble" in result.stdout
    assert statistics.median(seconds) < HELP_SECONDS


def test_ruff_mypy_and_imports_cover_every_component() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert set(tools["mypy"]["files"]) == set(COMPONENTS)
    assert set(COMPONENTS) <= set(tools["ruff"]["src"])
    assert len(tools["importlinter"]["root_packages"]) == len(COMPONENTS)
    assert tools["pytest"]["ini_options"]["filterwarnings"] == ["error"]


def test_ci_runs_what_a_developer_runs() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ntest:")[1].split("\n\n")[0]
    for tool in ("ruff format --check", "ruff check", "mypy", "lint-imports", "pytest"):
        assert tool in recipe


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    result = subprocess.run(
        ["make", "serve", "PYTHON="], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[0]
        == "error: python3 >= 3.11 not found; name one with PYTHON=/path/to/python3"
    )
    assert not (tmp_path / ".venv").exists()


def python(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
