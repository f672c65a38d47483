"""eval.rehearse: a weights folder of Mochi's layout with random values, which everything takes."""

import math
import os
import shutil

import pytest
import torch

import musicinfuser as mi
import sample
from eval import rehearse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("rehearsal") / "weights")
    rehearse.rehearse(folder, small=True, blocks=2, frames=7, size=(32, 48), dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def encoders():
    return rehearse.make_encoders(rehearse.FULL)


def full_size(encoders, **given):
    options = rehearse.Options(folder="x", **given)
    files = rehearse.plan(options, rehearse.FULL, encoders)
    return {os.path.relpath(file.path, "x"): file for file in files}


def content(folder):
    found = {}
    for where, _, names in os.walk(folder):
        for path in (os.path.join(where, name) for name in names):
            found[os.path.relpath(path, folder)] = mi.file_digest(path)
    return found


# Mochi's own sizes, planned but not written


def test_sizes_are_mochis(encoders):
    files = full_size(encoders)
    counts = {}
    for path, file in files.items():
        numbers = sum(tensor.numel() for tensor in file.tensors.values())
        counts[path.split("/")[0]] = counts.get(path.split("/")[0], 0) + numbers
    assert 10.02e9 < counts["dit.safetensors"] < 10.04e9
    assert 4.76e9 < counts["text_encoder"] < 4.77e9  # T5-XXL's encoder
    assert 94.3e6 < counts["audio_encoder"] < 94.4e6  # Wav2Vec 2.0 base
    zicas = [k for k in files["musicinfuser.safetensors"].tensors if k.endswith("to_q.weight")]
    assert len(zicas) == len(mi.MUSICINFUSER_LAYERS)


def test_bfloat16_takes_half(encoders):
    whole, half = (
        sum(file.size() for file in full_size(encoders, dtype=dtype).values())
        for dtype in mi.DTYPES
    )
    assert 62e9 < whole < 66e9
    assert 0.5 < half / whole < 0.501


def test_a_large_encoder_comes_in_shards(encoders):
    files = full_size(encoders, dtype="bfloat16")
    shards = sorted(path for path in files if path.startswith("text_encoder"))
    assert shards == [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(files[path].size() < 5.1e9 for path in shards)


def test_shards_are_found_by_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "SHARD", 10000)
    folder = str(tmp_path / "weights")
    rehearse.rehearse(folder, small=True, blocks=1)
    assert not os.path.exists(os.path.join(folder, "text_encoder", "model.safetensors"))
    [(features, _)] = mi.encode_text(folder, ["a dog dancing"])  # strict: no tensor is missing
    assert features.isfinite().all()


# Written small


def test_everything_loads(folder):
    dit = mi.load_dit(os.path.join(folder, "dit.safetensors"))
    mi.load_adapter(dit, os.path.join(folder, "musicinfuser.safetensors"))
    assert len(dit.blocks) == 2
    assert dit.config.sampling == {"frames": 7, "size": [32, 48]}
    assert dit.config.mean == list(mi.MOCHI_MEAN)
    mi.load_encoder(os.path.join(folder, "encoder.safetensors"))
    mi.load_decoder(os.path.join(folder, "decoder.safetensors"))
    assert mi.AudioEncoder(folder)(torch.randn(16000)).isfinite().all()


def test_values_are_random_and_of_their_scale(folder):
    tensors, _ = mi.read_safetensors(os.path.join(folder, "dit.safetensors"))
    assert tensors["pos_frequencies"].dtype == torch.float32
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.numel() > 1000:
            assert tensor.dtype == torch.bfloat16
            deviation = tensor.float().std() * math.sqrt(tensor.shape[1])
            assert 0.9 < deviation < 1.1, name
        elif "norm" in name:
            assert abs(tensor.mean() - 1) < 0.2, name


def test_a_video_is_sampled_at_the_natural_size(folder, song, tmp_path):
    how = dict(steps=2, offload=True, dtype="bfloat16", out=str(tmp_path))
    [path] = sample.generate(str(song), "a dog dancing", weights=folder, **how)
    assert len(list(mi.read_frames(path, 32, 48))) == 7


def test_without_a_length_the_file_says_none(tmp_path):
    folder = str(tmp_path / "weights")
    rehearse.rehearse(folder, small=True, blocks=1)
    _, metadata = mi.read_safetensors(os.path.join(folder, "dit.safetensors"))
    assert metadata == {}


# Going on, and refusing


def test_it_goes_on_after_a_stop(folder, tmp_path, monkeypatch):
    given = dict(small=True, blocks=2, frames=7, size=(32, 48), dtype="bfloat16")
    other = tmp_path / "weights"
    pieces, made = rehearse.random_pieces, []

    def stopped(name, tensor, generator):
        made.append(name)
        if name.startswith("layers.") and len(made) > 100:  # in the second or third file
            raise KeyboardInterrupt
        return pieces(name, tensor, generator)

    monkeypatch.setattr(rehearse, "random_pieces", stopped)
    with pytest.raises(KeyboardInterrupt):
        rehearse.rehearse(str(other), **given)
    monkeypatch.undo()
    written = content(other)
    assert "dit.safetensors" in written and "encoder.safetensors" not in written
    assert not any(".tmp" in name for name in written)
    stamp = os.stat(other / "dit.safetensors").st_mtime_ns
    rehearse.rehearse(str(other), **given)
    assert content(other) == content(folder)
    assert os.stat(other / "dit.safetensors").st_mtime_ns == stamp


@pytest.mark.parametrize("given", [{"blocks": 3}, {"dtype": "float32"}, {"frames": 13}])
def test_another_file_is_never_overwritten(folder, given):
    before = content(folder)
    options = dict(small=True, blocks=2, frames=7, size=(32, 48), dtype="bfloat16")
    with pytest.raises(mi.InputError, match="dit.safetensors is there, and is another file"):
        rehearse.rehearse(folder, **options | given)
    assert content(folder) == before


@pytest.mark.parametrize("real", ["text_encoder/model-00001-of-00004", "tokenizer/spiece"])
def test_parts_of_a_real_model_are_never_overwritten(tmp_path, real):
    ending = ".model" if "spiece" in real else ".safetensors"
    path = tmp_path / f"{real}{ending}"
    path.parent.mkdir()
    path.write_bytes(b"real")
    with pytest.raises(mi.InputError, match=f"{path.name} is there, and is another file"):
        rehearse.rehearse(str(tmp_path), small=True, blocks=2)
    assert path.read_bytes() == b"real" and len(list(tmp_path.rglob("*"))) == 2


def test_what_a_killed_rehearsal_left_half_written_does_not_stop_the_next(tmp_path):
    part = tmp_path / "text_encoder" / f"{mi.mark(999999999)}abc.safetensors"
    part.parent.mkdir()
    part.write_bytes(b"half")
    rehearse.rehearse(str(tmp_path), small=True, blocks=2)
    assert not part.exists() and (tmp_path / "text_encoder" / "model.safetensors").exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    folder = str(tmp_path / "a" / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e9, 1e9, 1e6))
    with pytest.raises(mi.InputError, match=r"takes 0\.0 GB more, and 0\.0 GB are free"):
        rehearse.rehearse(folder, small=True)  # 48 blocks
    assert not os.path.exists(tmp_path / "a")


@pytest.mark.parametrize("given", [{"frames": 8}, {"size": (30, 32)}, {"blocks": 0}, {"block": 2}])
def test_impossible_options_are_said(tmp_path, given):
    with pytest.raises(mi.InputError):
        rehearse.rehearse(str(tmp_path / "weights"), small=True, **given)
    assert not os.listdir(tmp_path)
