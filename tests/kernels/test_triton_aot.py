"""Every kernel compiles for three architectures, with the newer Triton for one, and keeps its limits."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from support_aot import (
    ARCHS,
    DEVICE_TRITON,
    ROOT,
    Case,
    CompileError,
    Compiler,
    Figures,
    Limits,
    breaches,
    cases,
)

CASES = cases("aot_cases")
LAUNCH = re.compile(r"^ +\w+\[\(", re.MULTILINE)  # kernel[(grid)](..)
Example = Callable[..., Figures]
FOLDERS = {"3.6.0": DEVICE_TRITON, version("triton"): None}
NEWER_ON = 90  # compiling takes minutes, and versions differ less than architectures


def versions(arch: int) -> list[str]:
    return [name for name in FOLDERS if name == "3.6.0" or arch == NEWER_ON]


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[str, Compiler]]:
    made = {name: Compiler(folder) for name, folder in FOLDERS.items()}
    yield made
    for each in made.values():
        each.close()


def figures(compilers: dict[str, Compiler], triton: str, table: str, case: str, arch: int) -> Figures:
    """Both versions compile at once: the other one, if it runs, is asked for what the next test wants."""
    for name in versions(arch):
        if compilers[name].process is not None:
            compilers[name].ask(table, case, arch)
    try:
        return compilers[triton].figures(table, case, arch)
    except (FileNotFoundError, CompileError) as error:
        pytest.fail(str(error), pytrace=False)


@pytest.mark.parametrize(
    ("case", "arch", "triton"),
    [
        pytest.param(case, arch, triton, id=f"{case.name}-sm_{arch}-triton_{triton}")
        for case in CASES.values()
        for arch in case.archs
        for triton in versions(arch)
    ],
)
def test_launch_keeps_its_limits(compilers: dict[str, Compiler], case: Case, arch: int, triton: str) -> None:
    found = figures(compilers, triton, "aot_cases", case.name, arch)
    broken = breaches(found, case.limits_on(arch))
    if broken:
        pytest.fail("\n".join([*broken, found.summary]), pytrace=False)


def test_every_module_that_launches_has_a_case() -> None:
    folder = ROOT / "kernels" / "nybble_kernels" / "triton"
    launching = {path.stem for path in folder.glob("*.py") if LAUNCH.search(path.read_text(encoding="utf-8"))}
    assert launching == {name.split("-")[0] for name in CASES}


def test_table_in_the_docs_is_current(compilers: dict[str, Compiler]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "aot.py"))
    table = list(script["rows"](compilers["3.6.0"], list(CASES.values()), ARCHS))
    made = "\n".join(script["markdown"]("3.6.0", table)) + "\n"
    if (ROOT / "docs" / "kernels_aot.md").read_text(encoding="utf-8") != made:
        command = "python benchmarks/aot.py --markdown > docs/kernels_aot.md"
        pytest.fail(f"docs/kernels_aot.md is not current; make it anew: {command}", pytrace=False)


@pytest.fixture(params=list(FOLDERS))
def example(request: pytest.FixtureRequest, compilers: dict[str, Compiler]) -> Example:
    def compiled(case: str, arch: int = 90) -> Figures:
        return figures(compilers, request.param, "aot_examples", case, arch)

    return compiled


def test_wide_loads_and_a_short_loop_pass(example: Example) -> None:
    found = example("rows")
    assert breaches(found, Limits(per_weight=5, forbids=("HMMA", "HGMMA"))) == []
    assert set(found.streamed) == {"16"}


@pytest.mark.parametrize("arch", [80, 90])
def test_instructions_per_weight_are_those_of_one_turn(example: Example, arch: int) -> None:
    """A turn loads 8 rows of 512 bytes with 128 threads, however often the compiler unrolled it."""
    found = example("rows", arch)
    assert found.weights % 32 == 0
    assert found.per_weight == found.hot / found.weights
    assert found.hot < found.instructions
    assert breaches(found, Limits(per_weight=found.per_weight - 0.1)) == [
        f"instructions per weight: {found.per_weight:.2f}, at most {found.per_weight - 0.1}"
    ]


@pytest.mark.parametrize("case", ["unaligned", "strided"])
def test_narrow_loads_are_seen(example: Example, case: str) -> None:
    assert breaches(example(case), Limits()) == ["bytes of a streamed load: 1, at least 16"]


def test_a_stream_that_is_never_read_is_named(example: Example) -> None:
    assert breaches(example("misnamed"), Limits()) == ["no load of weights is found"]


def test_loads_that_every_warp_repeats_count_once(example: Example) -> None:
    assert example("repeated").weights == example("alone").weights / 4


def test_spills_are_seen(example: Example) -> None:
    found = example("hoard")
    assert found.spills > 10
    assert breaches(found, Limits())[0].startswith("spills: ")


@pytest.mark.parametrize(("arch", "name"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_matrix_instructions_are_told_apart(example: Example, arch: int, name: str) -> None:
    found = example("matmul", arch)
    assert list(found.matmuls) == [name]
    assert breaches(found, Limits(needs=(name,))) == []
    assert breaches(found, Limits(needs=("IGMMA",), forbids=(name,))) == ["no IGMMA", f"has {name}"]


def test_shared_memory_registers_and_residency_have_limits(example: Example) -> None:
    found = example("matmul")
    tight = Limits(registers=found.registers - 1, shared=found.shared - 1, resident=found.resident + 1)
    assert [line.split(":")[0] for line in breaches(found, tight)] == [
        "registers",
        "shared",
        "programs on a multiprocessor",
    ]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("good", None),
        ("ends", "a program can end without waiting"),
        ("writes", "can run before the wait"),
        ("reads", "reads x before the wait"),
    ],
)
def test_chained_launches_keep_their_protocol(example: Example, case: str, fault: str | None) -> None:
    found = example(f"chain-{case}")
    assert found.chained
    broken = breaches(found, Limits(early=1))
    assert broken == [] if fault is None else len(broken) == 1 and fault in broken[0]


def test_weights_behind_the_wait_are_seen(example: Example) -> None:
    assert breaches(example("chain-late"), Limits(early=1)) == [
        "streamed loads before the wait: 0, at least 1"
    ]


def test_a_call_with_two_launches_must_say_which(example: Example) -> None:
    with pytest.raises(pytest.fail.Exception, match="the case must name the one it means"):
        example("two")


def test_a_missing_triton_is_one_clear_line(tmp_path: Path) -> None:
    with Compiler(tmp_path) as compiler, pytest.raises(FileNotFoundError, match=r"no Triton in .*make test"):
        compiler.figures("aot_examples", "rows", 90)
