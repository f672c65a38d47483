"""Text, music, video and sound."""

import math
import os
import shutil
import signal
import subprocess

import imageio
import numpy as np
import pytest
import torch
from conftest import PROMPT, close, write_wav
from imageio_ffmpeg import get_ffmpeg_exe

import musicinfuser as mi
from dataset import clips


def test_text_tokens_are_those_of_sentencepiece(weights, capsys):
    import sentencepiece
    from transformers import T5EncoderModel

    model = str(weights / "tokenizer" / "spiece.model")
    ids = sentencepiece.SentencePieceProcessor(model_file=model).encode
    t5 = T5EncoderModel.from_pretrained(weights / "text_encoder").requires_grad_(False)
    short, none = mi.encode_text(weights, [PROMPT, " "])
    assert short[1].all() and not none[1].any()
    assert "warning" not in capsys.readouterr().err
    wanted = t5(torch.tensor([ids(PROMPT) + [1]])).last_hidden_state  # 1 ends the sentence
    close(short[0], wanted, 1e-5)
    ((y_feat, y_mask),) = mi.encode_text(weights, ["dog " * 300])
    assert "only the first 256 are used" in capsys.readouterr().err
    assert y_feat.shape == (1, 256, 16) and y_mask.shape == (1, 256) and y_mask.all()
    wanted = t5(torch.tensor([ids("dog " * 300)[:255] + [1]])).last_hidden_state
    close(y_feat, wanted, 1e-5)


def test_text_is_encoded_in_float32_whatever_the_files_dtype(weights, tmp_path):
    from transformers import T5EncoderModel

    shutil.copytree(weights, tmp_path / "weights")
    folder = tmp_path / "weights" / "text_encoder"
    shutil.rmtree(folder)
    t5 = T5EncoderModel.from_pretrained(weights / "text_encoder").bfloat16()
    t5.save_pretrained(folder)
    encoder = mi.load_text_encoder(str(folder), "cpu")
    matrix = encoder.encoder.block[0].layer[0].SelfAttention.q
    assert matrix.weight.dtype == torch.bfloat16  # until it is used
    found, _ = mi.encode_text(tmp_path / "weights", [PROMPT])[0]
    t5.float().save_pretrained(folder)
    wanted, _ = mi.encode_text(tmp_path / "weights", [PROMPT])[0]
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_music_tokens(weights, song):
    waveform, _ = mi.music_window(song, 73)
    encode = mi.AudioEncoder(weights)
    assert encode(waveform).shape == (1, 125, 16)  # 50 a second
    close(encode(0.1 * waveform + 0.2), encode(waveform), 1e-3)  # loudness is normalised away


def test_the_released_wav2vec_loads(weights, song, tmp_path):
    """It was trained with a head, its weight norm has older names, and it lacks the mask that only
    training uses. Anything else that is missing is an error."""
    folder = tmp_path / "audio_encoder"
    shutil.copytree(weights / "audio_encoder", folder)
    tensors, metadata = mi.read_safetensors(folder / "model.safetensors")
    conv, released = "encoder.pos_conv_embed.conv.", {"lm_head.bias": torch.zeros(3)}
    older = {conv + "parametrizations.weight.original0": conv + "weight_g"}
    older |= {conv + "parametrizations.weight.original1": conv + "weight_v"}
    assert older.keys() <= tensors.keys() and "masked_spec_embed" in tensors
    for name in tensors.keys() - {"masked_spec_embed"}:
        released[f"wav2vec2.{older.get(name, name)}"] = tensors[name].clone()
    mi.save_safetensors(folder / "model.safetensors", released, metadata)
    waveform, _ = mi.music_window(song, 73)
    close(mi.AudioEncoder(tmp_path)(waveform), mi.AudioEncoder(weights)(waveform), 1e-6)
    del released["wav2vec2.encoder.layer_norm.bias"]
    mi.save_safetensors(folder / "model.safetensors", released, metadata)
    with pytest.raises(mi.InputError, match="not a whole Wav2Vec2Model: .*encoder.layer_norm.bias"):
        mi.AudioEncoder(tmp_path)


def test_t5_is_float32_whatever_its_file_is(weights, tmp_path):
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors, metadata = mi.read_safetensors(path)
    mi.save_safetensors(path, {k: t.bfloat16() for k, t in tensors.items()}, metadata)
    t5 = mi.load_pretrained_model("T5EncoderModel", str(path.parent), "cpu")
    assert {p.dtype for p in t5.parameters()} == {torch.float32}


def test_audio_is_the_mean_of_the_channels(tmp_path):
    path = write_wav(tmp_path / "song.wav", np.ones(44100), np.zeros(44100))
    samples = mi.load_audio(path)
    assert samples.shape == (16000,) and samples.dtype == torch.float32
    close(samples[100:-100], torch.full((15800,), 0.5), 2e-3)  # resampling rings at the ends


WINDOWS = [(73, 0, 1, None), (145, 0, 1, 3), (73, 2, 1.25, 0.8)]


@pytest.mark.parametrize("frames, start, speed, music", WINDOWS)
def test_music_window_is_padded_to_the_clip(song, frames, start, speed, music):
    waveform, seconds = mi.music_window(song, frames, start=start, speed=speed)
    assert len(waveform) == math.ceil((frames / 30 + 0.09) * 16000)
    assert seconds == pytest.approx(music or frames / 30 + 0.09, abs=1e-3)
    assert waveform[: int(seconds * 16000)].abs().max() > 0.2
    assert not waveform[math.ceil(seconds * 16000) :].any()


@pytest.mark.parametrize("speed", [1.0, 1.25, 0.9973, 3.14159])
def test_resampling_at_any_speed_is_quick_and_of_the_right_length(speed):
    sound = torch.randn(10 * 44100)
    samples = mi.played(sound, 44100, speed, 16000)
    assert len(samples) == pytest.approx(160000 / speed, rel=1e-4)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_video_that_ffmpeg_says_a_lot_about_is_read_to_its_end(tmp_path, monkeypatch):
    script = "#!/bin/sh\nhead -c 300000 /dev/zero >&2; head -c 12 /dev/zero\nexit 1\n"
    (tmp_path / "ffmpeg").write_text(script)
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr(mi, "get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    frames = mi.read_frames("a.mp4", 2, 2)
    assert next(frames).shape == (2, 2, 3)
    with pytest.raises(mi.InputError, match="a.mp4 cannot be read as video"):
        next(frames)


def cut_without_coding(video, start, path):
    line = [get_ffmpeg_exe(), "-v", "error", "-ss", start, "-i", video, "-c", "copy", path]
    subprocess.run(list(map(str, line)), check=True)
    return str(path)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    """As where a video was cut without coding: what is before the cut stays in the file."""
    whole = str(tmp_path / "whole.mp4")
    mi.save_video(whole, torch.rand(3, 30, 32, 32) * 2 - 1)
    for start, left in ((0.5, 15), (0.8, 6), (2, 0)):
        path = cut_without_coding(whole, start, tmp_path / f"{start}.mp4")
        assert mi.count_frames(path) == len(list(mi.read_frames(path, 32, 32))) == left
    with pytest.raises(mi.InputError, match="2.mp4 shows no picture"):
        clips.video_size(path)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_sound_that_begins_late_stays_with_the_picture(tmp_path, ending):
    click = np.zeros(32000)
    click[16000:16100] = 0.9  # a second into the sound, which begins half a second late
    sound, path = write_wav(tmp_path / "click.wav", click, rate=16000), str(tmp_path / "late.")
    mi.save_video(path + "mp4", torch.rand(3, 60, 32, 32) * 2 - 1)
    late = ["-itsoffset", 0.5, "-i", sound, "-map", "0:v", "-map", "1:a", "-c:v", "copy"]
    mi.ffmpeg(path + "mp4", *late, "-c:a", "flac", "-strict", -2, path + f"late.{ending}")
    for start in (0, 0.3, 0.7):
        heard = mi.load_audio(path + f"late.{ending}", start)
        assert abs(int(heard.abs().argmax()) / 16000 + start - 1.5) < 0.01


def test_video_round_trip(tmp_path):
    wide = torch.linspace(-1, 1, 13)[None, :, None, None].expand(3, 13, 32, 48)
    mi.save_video(tmp_path / "a.mp4", wide)
    mi.save_video(tmp_path / "b.mp4", iter(wide.split(5, dim=1)))
    for name in ("a.mp4", "b.mp4"):
        frames = np.stack([*mi.read_frames(tmp_path / name, 32, 48)])
        assert mi.count_frames(tmp_path / name) == 13
        close(mi.from_pixels(frames), wide, 0.06)
    assert (mi.to_pixels(mi.from_pixels(frames)) == frames).all()


def test_frames_are_those_of_the_wanted_rate(tmp_path):
    rising = torch.linspace(-1, 1, 40)[None, :, None, None].expand(3, 40, 32, 32)
    mi.save_video(tmp_path / "a.mp4", rising, 60)
    for fps, count in ((30, 20), (60, 40)):
        frames = np.stack([*mi.read_frames(tmp_path / "a.mp4", 32, 32, fps)])
        assert mi.count_frames(tmp_path / "a.mp4", fps) == len(frames) == count
        close(mi.from_pixels(frames)[0, :, 9, 9], torch.linspace(-1, 1, count), 0.1)


def test_names_that_mean_something_to_ffmpeg_are_local_files(tmp_path, monkeypatch):
    imageio.mimwrite(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)] * 9, fps=30)
    monkeypatch.chdir(tmp_path)
    for name in ("http:127.0.0.1:1.mp4", "concat:a.mp4|a.mp4", "-i.mp4", "<video0>.mp4"):
        os.link("a.mp4", name)
        assert mi.count_frames(name) == 9
        assert len([*mi.read_frames(name, 32, 32)]) == 9


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(mi.InputError, match="cannot write"):
        with mi.written_whole(tmp_path / "a") as temporary:
            open(temporary, "w").close()
            raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_a_stop_waits_until_video_and_recipe_are_there(tmp_path, monkeypatch):
    def stopped_before(path, value, save=mi.save_json):
        mi.stop(signal.SIGINT, None)
        save(path, value)

    rings = []
    monkeypatch.setattr(mi, "ring_in", rings.append)
    monkeypatch.setattr(mi, "save_json", stopped_before)
    with mi.written_whole(tmp_path / "a.mp4", recipe={"seed": 1}) as temporary:
        open(temporary, "w").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    assert rings == [0.1]  # to be stopped again
    with pytest.raises(KeyboardInterrupt):
        mi.stop(signal.SIGALRM, None)


def test_a_recipe_that_cannot_be_written_is_no_name_that_is_taken(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(mi.InputError, match="a.json") as raised:
        with mi.written_whole(tmp_path / "a.mp4", recipe={}) as temporary:
            open(temporary, "w").close()
    assert not isinstance(raised.value.__cause__, FileExistsError)
    with pytest.raises(mi.InputError) as raised:  # as a.mp4 is now
        with mi.written_whole(tmp_path / "a.mp4", recipe={}) as temporary:
            open(temporary, "w").close()
    assert isinstance(raised.value.__cause__, FileExistsError)


def test_names_of_255_bytes_can_be_written(tmp_path):
    mi.save_json(tmp_path / ("x" * 250 + ".json"), {})
    assert len(list(tmp_path.iterdir())) == 1
