"""Flags win over the environment, which wins over the file, which wins over the defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nybble import sources
from nybble.config import ServeConfig
from nybble.errors import UsageError


@pytest.mark.parametrize(
    ("flags", "environ", "file", "port"),
    [
        pytest.param({}, {}, "", 8000, id="default"),
        pytest.param({}, {}, "port: 1001", 1001, id="file"),
        pytest.param({}, {"NYBBLE_PORT": "1002"}, "port: 1001", 1002, id="environment over file"),
        pytest.param({"port": "1003"}, {"NYBBLE_PORT": "1002"}, "port: 1001", 1003, id="flag over all"),
    ],
)
def test_precedence(
    tmp_path: Path, flags: dict[str, object], environ: dict[str, str], file: str, port: int
) -> None:
    path = tmp_path / "nybble.yaml"
    path.write_text(file, encoding="utf-8")
    assert sources.load(flags, environ, str(path)).port == port


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("bits", "3", 3),
        ("keep_alive", "2.5", 2.5),
        ("prefix_cache", "off", False),
        ("symmetric", "True", True),
        ("api_key", "one, two", ("one", "two")),
        ("calibration", "notes.txt", "notes.txt"),
        ("served_model_name", "", ()),
    ],
)
def test_environment_is_parsed_by_type(name: str, text: str, value: object) -> None:
    assert getattr(sources.load({}, {f"NYBBLE_{name.upper()}": text}), name) == value


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "max-model-len: 2048\nprefix_cache: false\napi_key: [a, b]\nheader_timeout: 5\n"),
        (".yml", "max_model_len: 2048\nprefix-cache: no\napi-key: a,b\nheader-timeout: 5.0\n"),
        (".toml", 'max_model_len = 2048\nprefix_cache = false\napi_key = ["a", "b"]\nheader-timeout = 5\n'),
    ],
)
def test_files_of_both_kinds_mean_the_same(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"nybble{suffix}"
    path.write_text(text, encoding="utf-8")
    found = sources.load({}, {"NYBBLE_CONFIG": str(path)})
    assert found == ServeConfig(
        max_model_len=2048, prefix_cache=False, api_key=("a", "b"), header_timeout=5.0
    )


@pytest.mark.parametrize(
    ("flags", "environ", "message", "hint"),
    [
        ({"port": "x"}, {}, "--port: expected an integer, got 'x'", "port to listen on"),
        ({"max_queue": "1.5"}, {}, "--max-queue: expected an integer", "wait"),
        ({"keep_alive": "nan"}, {}, "--keep-alive: expected a number", "seconds"),
        ({"port": "70000"}, {}, "port: 70000 is not from 0 to 65535", "port"),
        ({"max_n": "0"}, {}, "max_n: 0 is not at least 1", "largest n"),
        ({"head_bits": "5"}, {}, "head_bits: 5 is not one of 4, 8, 16", "head"),
        ({"model": ""}, {}, "model: empty", "folder"),
        ({}, {"NYBBLE_PROT": "1"}, "environment: unknown setting NYBBLE_PROT", "did you mean NYBBLE_PORT?"),
        ({}, {"NYBBLE_METRICS_OPEN": "maybe"}, "NYBBLE_METRICS_OPEN: expected true or false", "key"),
        ({}, {"NYBBLE_KERNELS": "cuda"}, "kernels: 'cuda' is not one of auto", "kernels"),
    ],
)
def test_a_wrong_setting_names_itself(
    flags: dict[str, object], environ: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        sources.load(flags, environ)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "prt: 1", "unknown setting 'prt'"),
        ("a.yaml", "port: '1'\nport: [", "expected the node content"),
        ("a.yaml", "- port", "holds no settings"),
        ("a.yaml", "port: true", "expected an integer, got True"),
        ("a.yaml", "port: 1.5", "expected an integer, got 1.5"),
        ("a.yaml", "host: 1", "expected text, got 1"),
        ("a.yaml", "served_model_name: {a: b}", "expected a text or a list of texts"),
        ("a.toml", "port = ", "Invalid value"),
        ("a.ini", "port = 1", "unknown kind of file"),
        ("missing.yaml", None, "No such file"),
    ],
)
def test_a_wrong_file_names_itself(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        sources.load({}, {}, str(path))
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_service_links_of_kubernetes_are_not_settings() -> None:
    linked = {
        "NYBBLE_SERVICE_HOST": "10.0.0.1",
        "NYBBLE_SERVICE_PORT": "8000",
        "NYBBLE_SERVICE_PORT_HTTP": "8000",
        "NYBBLE_PORT": "tcp://10.0.0.1:8000",
        "NYBBLE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "NYBBLE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert sources.load({}, linked) == ServeConfig()


def test_config_is_frozen_and_keeps_keys_out_of_its_text() -> None:
    config = ServeConfig(api_key=("s3cret",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]
    assert "s3cret" not in repr(config)


def test_a_key_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("api_key: [123456]", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        sources.load({}, {}, str(path))
    assert "123456" not in caught.value.message + (caught.value.hint or "")


def test_keys_come_from_the_setting_and_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("two\n\n three \n", encoding="utf-8")
    assert ServeConfig(api_key=("one",), api_key_file=str(path)).keys() == ("one", "two", "three")


@pytest.mark.parametrize("text", [pytest.param(None, id="missing"), pytest.param("\n \n", id="empty")])
def test_a_key_file_without_keys_does_not_open_the_server(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        ServeConfig(api_key_file=str(path)).keys()


def test_cache_path_prefers_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_CACHE_DIR", "/from/environment")
    assert ServeConfig().cache_path == Path("/from/environment")
    assert ServeConfig(cache_dir="/from/flag").cache_path == Path("/from/flag")
    monkeypatch.delenv("NYBBLE_CACHE_DIR")
    assert ServeConfig().cache_path == Path.home() / ".cache" / "nybble"
