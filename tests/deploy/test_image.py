"""What the image is built from: the Dockerfile lints, the wheel is whole, the compose file is consistent."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support_process import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PACKAGES = {"nybble", "nybble_kernels", "nybble_models", "nybble_quantizers"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what `.dockerignore` lets through, as the image does."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for folder in ("server", "kernels", "models", "quantizers"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True, timeout=120
    )
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_image_runs_as_nobody_special_and_keeps_everything_in_one_volume() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    assert {stage.split(" AS ")[1].split()[0] for stage in stages[1:]} >= {"cpu", "cuda"}
    assert all(
        stage.rindex("USER 2000:0") > stage.rfind("USER 0:0") for stage in stages if "USER 0:0" in stage
    )
    assert re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.M) == ["/data"]
    assert re.findall(r"(?:HOME|_DIR)=(\S+)", DOCKERFILE)
    assert all(path.startswith("/data") for path in re.findall(r"(?:HOME|_DIR)=(\S+)", DOCKERFILE))
    assert 'ENTRYPOINT ["nybble", "serve"]' in DOCKERFILE


def test_dockerfile_copies_only_what_the_context_holds() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    copied = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--from).*$", DOCKERFILE, re.M)]
    files = {file for words in copied for file in words if file != "."} | {
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert "constraints.txt" in files
    assert all((ROOT / file).exists() and file not in ignored for file in files)


def test_wheel_holds_four_packages_and_nothing_else_at_the_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    sources = {
        path.relative_to(ROOT / folder).as_posix()
        for folder in ("server", "kernels", "models", "quantizers")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sources <= set(wheel.namelist())


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(names["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "LICENSE" in names
    assert wheel.read(names["entry_points.txt"]).decode().split() == [
        "[console_scripts]",
        "nybble",
        "=",
        "nybble.cli:main",
    ]


def test_constraints_name_every_direct_dependency_at_an_allowed_version() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in pinned}
    for each in map(Requirement, wanted):
        version = versions[canonicalize_name(each.name)]
        assert each.specifier.contains(version), each
        assert "+" not in version, "a local version cannot be found on other machines"


def test_compose_mounts_exist_and_the_server_has_time_to_drain() -> None:
    folder = ROOT / "deploy" / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"nybble", "prometheus", "grafana"}
    binds = [mount for each in services.values() for mount in each["volumes"] if mount.startswith("./")]
    assert binds
    assert all((folder / mount.split(":")[0]).exists() for mount in binds)
    assert services["nybble"]["stop_grace_period"] == "45s"
    assert f"{services['nybble']['build']['target']}" == "${NYBBLE_TARGET:-cpu}"


def test_prometheus_scrapes_the_service_that_compose_starts() -> None:
    text = (ROOT / "deploy" / "compose" / "prometheus.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["nybble:8000"]}]
    assert job["metrics_path"] == "/metrics"
