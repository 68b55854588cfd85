from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from nybble_models.decoder import Decoder
from nybble_models.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from nybble_models.formats.gguf import Gguf
from nybble_models.loader import Loader
from support_gguf import interleaved, write_gguf
from support_tiny import tiny_spec, tiny_weights

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def written(path: Path, architecture: str, kind: Kind = Kind.F32) -> Path:
    changes = {"use_sliding_window": False} if architecture == "qwen2" else {}
    spec = tiny_spec(architecture, **changes)
    return write_gguf(path, architecture, spec, tiny_weights(spec, group_size=None), kind=kind)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float_file_gives_the_model_it_was_made_of(tmp_path: Path, architecture: str) -> None:
    changes = {"use_sliding_window": False} if architecture == "qwen2" else {}
    spec = tiny_spec(architecture, **changes)
    weights = tiny_weights(spec, group_size=None)
    loader = Loader(Gguf(write_gguf(tmp_path / "m.gguf", architecture, spec, weights)))
    assert loader.spec == spec
    assert torch.equal(
        Decoder(loader.spec, loader.load()).forward(TOKENS), Decoder(spec, weights).forward(TOKENS)
    )


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stored_levels_mean_what_gguf_says_bit_for_bit(
    tmp_path: Path, architecture: str, kind: Kind
) -> None:
    path = written(tmp_path / "m.gguf", architecture, kind)
    source = Gguf(path)
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    heads = {"q": source.config["num_attention_heads"], "k": source.config["num_key_value_heads"]}
    for projection in ("q", "k", "v", "o"):
        name = f"model.layers.1.self_attn.{projection}_proj.weight"
        stored = raw[f"blk.1.attn_{'output' if projection == 'o' else projection}.weight"]
        theirs = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        levels = source.levels(name)
        assert levels is not None
        ours = levels.dequantize()
        assert torch.equal(ours, source.tensor(name))
        turned = architecture == "llama" and projection in heads
        assert torch.equal(interleaved(ours, heads[projection]) if turned else ours, theirs)


def test_a_q4_1_matrix_has_real_minimums(tmp_path: Path) -> None:
    source = Gguf(written(tmp_path / "m.gguf", "llama", Kind.Q4_1))
    weight = source.levels("model.layers.0.mlp.up_proj.weight")
    assert weight is not None
    assert weight.minimums is not None
    assert weight.zeros is None
    assert (weight.bits, weight.group_size) == (4, 32)


def test_levels_are_only_given_where_they_are_exact(tmp_path: Path) -> None:
    source = Gguf(written(tmp_path / "m.gguf", "llama", Kind.Q4_1))
    assert source.levels("model.norm.weight") is None
    assert source.levels("model.embed_tokens.weight") is None
    assert source.kinds() == ({Kind.Q4_1: 21}, {Kind.F32: 1})
    with pytest.raises(BrokenCheckpoint, match=r"model\.norm\.bias"):
        source.levels("model.norm.bias")


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", "llama", Kind.Q8_0)
    start = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.2.ffn_up.weight").data_offset
    whole = bytearray(path.read_bytes())
    whole[start : start + 2] = np.array([np.nan], np.float16).tobytes()
    path.write_bytes(whole)
    with pytest.raises(BrokenCheckpoint, match=r"layers\.2\.mlp\.up_proj.*NaN"):
        Loader(Gguf(path)).load()


def test_llama_3_frequencies_become_its_scaling(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    spec = tiny_spec("llama", rope_scaling=scaling | {"original_max_position_embeddings": 8192})
    pairs = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    turns = 8192 / (10000.0**pairs * 2 * torch.pi)
    blend = ((turns - 1) / 3).clamp(0, 1)
    weights = tiny_weights(spec, group_size=None)
    path = write_gguf(tmp_path / "m.gguf", "llama", spec, weights)
    _add_tensor(path, tmp_path / "with.gguf", "rope_freqs.weight", (1 / ((1 - blend) / 8 + blend)).numpy())
    assert Loader(Gguf(tmp_path / "with.gguf")).spec == spec
    _add_tensor(path, tmp_path / "other.gguf", "rope_freqs.weight", np.full(len(pairs), 2.5, np.float32))
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        Gguf(tmp_path / "other.gguf")


def _add_tensor(path: Path, out: Path, name: str, values: np.ndarray) -> None:  # type: ignore[type-arg]
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(str(out), "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.9, 0.9999])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path: Path, share: float) -> None:
    whole = written(tmp_path / "m.gguf", "llama").read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BrokenCheckpoint) as caught:
        Gguf(short)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"GGML"), (4, b"\x09\0\0\0"), (8, b"\xff" * 8), (16, b"\xff" * 8), (24, b"\xff" * 8)],
    ids=["magic", "version", "tensor count", "entry count", "key length"],
)
def test_a_damaged_head_is_refused_in_one_line(tmp_path: Path, offset: int, value: bytes) -> None:
    path = written(tmp_path / "m.gguf", "llama")
    damaged = bytearray(path.read_bytes())
    damaged[offset : offset + len(value)] = value
    path.write_bytes(damaged)
    with pytest.raises(BrokenCheckpoint, match="not a whole GGUF file"):
        Gguf(path)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    path = write_gguf(tmp_path / "m.gguf", "falcon", spec, tiny_weights(spec, group_size=None))
    with pytest.raises(UnsupportedModel, match="falcon") as caught:
        Gguf(path)
    assert "qwen3" in caught.value.hint


def test_a_missing_tensor_and_a_missing_file_are_named(tmp_path: Path) -> None:
    source = Gguf(written(tmp_path / "m.gguf", "llama"))
    assert "model.norm.weight" in source
    assert "model.layers.0.self_attn.q_proj.bias" not in source
    with pytest.raises(BrokenCheckpoint, match=r"q_proj\.bias"):
        source.tensor("model.layers.0.self_attn.q_proj.bias")
    with pytest.raises(ModelError, match="missing"):
        Gguf(tmp_path / "nothing.gguf")
