"""sample.py as a user runs it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import imageio
import numpy as np
import pytest
import torch
from conftest import MEAN, PROMPT, ROOT, STD, close, command, small_dit
from imageio_ffmpeg import get_ffmpeg_exe

import musicinfuser as mi
import sample

AAC_FRAME = 1024 / 44100  # seconds


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """sample.py in this process, which saves the imports: -> (error line or "", its output)."""

    def run(*arguments):
        settings = ["--device", "cpu", "--weights", weights, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, settings)])
        error = ""
        try:
            mi.main(sample.main)
        except SystemExit as stop:
            error = stop.code
        captured = capsys.readouterr()
        return captured.err if error == 2 else error, captured.out

    return run


@pytest.fixture
def videos(monkeypatch):
    """What would have been written, in place of writing it."""
    made = []
    monkeypatch.setattr(mi, "save_video", lambda path, video, *_, **__: made.append(video))
    return made


def watch(path):
    """frames (T, H, W, 3), frames a second, sound at 44100 Hz (mean of the channels), decoded."""
    with imageio.get_reader(path, format="FFMPEG") as reader:
        fps, frames = reader.get_meta_data()["fps"], np.stack([*iter(reader)])
    how = ["-map", "0:a", "-f", "f32le", "-ar", "44100", "-"]
    line = [get_ffmpeg_exe(), "-v", "error", "-i", path, *how]
    sound = np.frombuffer(subprocess.run(line, capture_output=True, check=True).stdout, "<f4")
    return frames, fps, sound.reshape(-1, 2).mean(1)


def pitch(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * rate / len(samples)


@pytest.fixture(scope="module")
def made(weights, song, tmp_path_factory):
    """What `python sample.py` did with two seeds: its result and its folder."""
    out = tmp_path_factory.mktemp("made")
    more = "--seed", 0, 1, "--weights", weights, "--out", out, "--device", "cpu"
    return command("sample.py", song, PROMPT, *more), out


def test_the_readmes_first_command(tmp_path):
    tiny = os.path.join(ROOT, "tiny")
    song = os.path.join(tiny, "song.wav")
    run = command("sample.py", song, "a dog dancing", "--weights", tiny, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    path = tmp_path / "song-a-dog-dancing-0.mp4"
    frames, fps, sound = watch(path)
    assert frames.shape == (73, 64, 64, 3) and fps == 30
    assert run.stdout.startswith(f"weights  {tiny}, adapter {tiny}") and str(path) in run.stdout
    assert np.abs(np.diff(frames.astype(float), axis=0)).mean() > 0.3  # something moves, and ...
    assert np.abs(sound).max() > 0.1  # ... there is music


def test_the_defaults_are_mochis():
    o = mi.settle(sample.Options, {}, {"weights": "."})
    assert (o.size, o.frames, o.solver, o.steps) == ((480, 848), 73, "euler", 64)
    assert (o.cfg, o.music_cfg, o.music_above, o.skip, o.lora_scale) == (6.0, 0.0, 0.0, (), 1.0)


def test_weights_are_used_as_soon_as_they_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(mi, "__file__", str(tmp_path / "musicinfuser.py"))
    monkeypatch.chdir(tmp_path)
    assert mi.default_weights() == "tiny"
    (tmp_path / "weights").mkdir()
    assert mi.default_weights() == "tiny"
    (tmp_path / "weights" / "dit.safetensors").touch()
    assert mi.default_weights() == "weights"


def test_a_video_and_its_recipe_for_each_seed(made, weights, song):
    result, out = made
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"weights  {weights}")
    stem = "song-a-dog-dancing-in-the-park"
    wanted = [f"{stem}-{seed}.{kind}" for seed in (0, 1) for kind in ("json", "mp4")]
    assert sorted(os.listdir(out)) == wanted
    recipe = json.loads((out / f"{stem}-1.json").read_text())
    wanted = {"song": str(song), "prompt": PROMPT, "seed": 1, "frames": 7, "size": [32, 32]}
    assert (wanted | {"steps": 2, "cfg": 3.0, "solver": "euler"}).items() <= recipe.items()


def test_picture_and_sound_fit_and_seeds_differ(made):
    videos = [watch(path) for path in sorted(made[1].glob("*.mp4"))]
    for frames, fps, sound in videos:
        assert frames.shape == (7, 32, 32, 3) and fps == 30
        assert abs(len(sound) / 44100 - 7 / 30) <= AAC_FRAME
    assert np.abs(videos[0][0].astype(int) - videos[1][0]).mean() > 1


def test_same_seed_makes_the_same_frames_and_overwrites_nothing(made, run, song):
    before = {path: path.read_bytes() for path in made[1].iterdir()}
    error, output = run(song, PROMPT, "--out", made[1])
    assert not error and all(path.read_bytes() == content for path, content in before.items())
    (new,) = set(made[1].glob("*.mp4")) - set(before)
    assert str(new) in output and new.with_suffix(".json").exists()
    old = made[1] / new.name.replace("-0-2.mp4", "-0.mp4")
    assert np.array_equal(watch(new)[0], watch(old)[0])


def test_from_a_recipe_the_same_video_is_made_again(made, run, song, tmp_path):
    old = made[1] / "song-a-dog-dancing-in-the-park-1.mp4"
    error, _ = run("--from", old.with_suffix(".json"), "--out", tmp_path / "again.mp4")
    assert not error
    assert np.array_equal(watch(tmp_path / "again.mp4")[0], watch(old)[0])
    error, output = run(
        "--from", old.with_suffix(".json"), "--steps", 3, "--out", tmp_path / "3.mp4"
    )
    assert not error and "steps 3" in output  # what is given beside it counts


def test_a_recipe_of_other_weights_is_said(made, run, tmp_path):
    old = next(made[1].glob("*-1.json"))
    recipe = json.loads(old.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(recipe | {"model": "0" * 16}))
    assert "made with" not in run("--from", old)[1]
    assert "made with other files of weights or adapter" in run("--from", other)[1]


def test_options_may_stand_between_the_song_and_the_prompt(run, song, videos):
    error, output = run(song, "--steps", 3, PROMPT, "--seed", 1)
    assert not error and "steps 3" in output and len(videos) == 1


def test_the_parts_are_put_together(run, weights, song, videos):
    options = "--cfg 2 --music-cfg 3 --skip 1 --skip-scale 4 --seed 5 --start 1 --negative stage"
    error, output = run(song, PROMPT, *options.split())
    assert not error and "skip 1, skip scale 4, negative stage" in output
    dit = mi.load_dit(weights / "dit.safetensors")
    mi.load_adapter(dit, weights / "musicinfuser.safetensors")
    noise = torch.randn(1, 12, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    texts = mi.encode_text(weights, [PROMPT, "stage"])
    audio = mi.AudioEncoder(weights)(mi.music_window(song, 7, start=1)[0])
    guidance = dict(cfg=2, music_cfg=3, skip=(1,), skip_scale=4)
    z = mi.sample(dit, noise, *texts, audio, sigmas=[1, 0.975, 0], **guidance)
    decoder = mi.load_decoder(weights / "decoder.safetensors")
    close(videos[0], decoder(mi.to_vae_space(z, MEAN, STD))[0], 1e-4)


def test_options_of_the_weights_give_way_to_those_given(run, weights, song, tmp_path, videos):
    assert "frames 7" in run(song, PROMPT)[1]
    assert "frames 13" in run(song, PROMPT, "--frames", 13, "--window-frames", 13)[1]
    how = {"weights": weights, "out": tmp_path, "device": "cpu"}
    sample.generate(song, PROMPT, steps=None, **how)
    assert [len(video[0]) for video in videos] == [7, 13, 7]


def test_seeds_may_be_a_range(run, song, weights, tmp_path):
    how = {"weights": weights, "out": tmp_path / "out", "device": "cpu"}
    paths = sample.generate(song, PROMPT, seeds=range(3, 5), **how)
    assert [json.load(open(path[:-3] + "json"))["seeds"] for path in paths] == [[3, 4]] * 2


def test_an_option_that_is_misspelt_is_an_error(weights, song):
    with pytest.raises(mi.InputError, match="no option step; did you mean steps"):
        sample.generate(song, PROMPT, weights=weights, step=3)


def test_a_link_to_nothing_is_a_name_that_is_taken(run, song, tmp_path):
    link = tmp_path / f"{sample.stem_of(sample.Options(song=str(song), prompt=PROMPT), 0)}.mp4"
    link.symlink_to("nowhere")
    error, printed = run(song, PROMPT, "--out", tmp_path)
    assert not error and f"{link}"[:-4] + "-2.mp4" in printed
    error, _ = run(song, PROMPT, "--out", link)
    assert error.startswith("error: ") and "exists" in error


@pytest.mark.parametrize("existing", ["a.mp4", "a.json"])
def test_out_that_exists_is_an_error(run, song, tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    error, _ = run(song, PROMPT, "--out", tmp_path / "a.mp4")
    assert error.startswith("error: ") and "exists" in error
    assert (tmp_path / existing).read_text() == "precious"


def test_a_name_that_another_process_takes_meanwhile_is_left_to_it(
    run, song, tmp_path, monkeypatch
):
    save, path = mi.save_video, tmp_path / "a.mp4"

    def late(wanted, *inputs, **options):
        path.write_text("precious")
        save(wanted, *inputs, **options)

    monkeypatch.setattr(mi, "save_video", late)
    error, output = run(song, PROMPT, "--out", path)
    assert not error and "a-2.mp4" in output and path.read_text() == "precious"
    assert mi.count_frames(tmp_path / "a-2.mp4") == 7 and (tmp_path / "a-2.json").exists()


@pytest.mark.parametrize("adapter", [(), ("--adapter", "none")])
def test_music_is_heard_unless_there_is_no_adapter(run, song, tmp_path, videos, adapter):
    for start in (0, 1):
        assert (
            run(song, "", "--start", start, "--out", tmp_path / f"{start}.mp4", *adapter)[0] == ""
        )
    assert torch.equal(*videos) == bool(adapter)


def test_a_song_that_ends_before_the_video(run, song, tmp_path):
    more = "--frames", 145, "--size", "16x32", "--out", tmp_path / "a.mp4"
    error, output = run(song, PROMPT, *more)
    assert not error and "the song ends after 3.0 s of the video; silence follows" in output
    frames, _, sound = watch(tmp_path / "a.mp4")
    assert frames.shape == (145, 16, 32, 3) and abs(len(sound) / 44100 - 145 / 30) <= AAC_FRAME
    assert np.abs(sound[: 2 * 44100]).max() > 0.1
    assert np.abs(sound[int(3.1 * 44100) :]).max() < 1e-3


PLAYED = [(0, 1, 400), (1, 1, 1000), (1, 1.25, 1250), (1.5, 0.5, 500), (0, 2, 800), (1e-5, 1, 400)]


@pytest.mark.parametrize("start, speed, hz", PLAYED)
def test_start_and_speed_of_the_song(run, song, tmp_path, start, speed, hz):
    samples = mi.load_audio(song, start, 13 / 30, speed)
    assert abs(len(samples) / 16000 - 13 / 30) < 1e-4
    assert abs(pitch(samples.numpy(), 16000) - hz) < 5
    more = "--start", start, "--speed", speed, "--frames", 13, "--out", tmp_path / "a.mp4"
    assert run(song, PROMPT, *more)[0] == ""
    _, _, sound = watch(tmp_path / "a.mp4")
    assert abs(len(sound) / 44100 - 13 / 30) <= AAC_FRAME and abs(pitch(sound, 44100) - hz) < 5


NAMES = [("Artist: Song.wav", "a title"), ("歌" * 80 + ".wav", "歌"), (b"\xff song.wav", "bytes")]


@pytest.mark.parametrize("name, title", NAMES, ids=["colon", "long", "bytes"])
def test_songs_of_any_name_and_title(run, song, tmp_path, monkeypatch, name, title):
    name, titled = os.fsdecode(name), tmp_path / "titled.wav"
    line = [get_ffmpeg_exe(), "-v", "error", "-i", song, "-metadata", f"title={title}", titled]
    subprocess.run(line, check=True)
    os.rename(titled, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert run(name, "踊" * 100)[0] == ""  # the name of a file has at most 255 bytes
    (path,) = tmp_path.glob("out/*.json")
    assert json.loads(path.read_text())["song"] == name


@pytest.fixture(scope="module")
def bad(weights, song, tmp_path_factory):
    """What can be wrong: texts, playlists, a silent video, weights and adapters that do not fit."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copy(song, folder)
    for name in ("text.txt", "text.wav"):
        (folder / name).write_text("not a song\n" * 100)
    playlist = f"#EXTM3U\n#EXTINF:3,\n{song}\n#EXT-X-ENDLIST\n"
    (folder / "playlist.wav").write_text(playlist)
    (folder / "concat.wav").write_text(f"ffconcat version 1.0\nfile {song}\n")
    (folder / "recipe.json").write_text("[1]")
    (folder / "nan.wav").write_bytes(float_wav(np.full(44100, np.nan, "<f4")))
    imageio.mimwrite(folder / "silent.mp4", [np.zeros((32, 32, 3), np.uint8)] * 9, fps=30)
    for name in ("lacking", "short", "other", "fast", "random", "narrow", "wordy"):
        shutil.copytree(weights, folder / name)
    (folder / "lacking" / "dit.safetensors").unlink()
    whole = (weights / "dit.safetensors").read_bytes()
    (folder / "short" / "dit.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.copy(weights / "decoder.safetensors", folder / "other" / "dit.safetensors")
    config = folder / "fast" / "audio_encoder" / "preprocessor_config.json"
    config.write_text(config.read_text().replace("16000", "44100"))
    drop_tensor(folder / "random" / "text_encoder" / "model.safetensors")
    decode_eight_channels(folder / "narrow" / "decoder.safetensors")
    dit = mi.load_dit(weights / "dit.safetensors")
    dit.config.sampling["frames"] = "7"
    mi.save_dit(dit, folder / "wordy" / "dit.safetensors")
    tensors, metadata = mi.read_safetensors(weights / "musicinfuser.safetensors")
    tensors = {name: tensor / 0 * 0 for name, tensor in tensors.items()}
    mi.save_safetensors(folder / "nan.safetensors", tensors, metadata)
    wide, shallow, deaf = mi.DiT(3, 48, 16, 2, 16), small_dit(depth=2), small_dit()
    for name, dit, audio_width in (
        ("wide", wide, 16),
        ("shallow", shallow, 16),
        ("deaf", deaf, 20),
    ):
        mi.infuse(dit, [0, 1], rank=2, audio_width=audio_width)
        mi.save_adapter(dit, folder / f"{name}.safetensors")
    return folder


def float_wav(samples):
    """A wav of 32-bit numbers, whatever they are."""
    rate = 44100
    numbers = (16, 3, 1, rate, 4 * rate, 4, 32)
    sizes = (4, 2, 2, 4, 4, 2, 2)
    form = b"".join(number.to_bytes(size, "little") for number, size in zip(numbers, sizes))
    data = b"data" + samples.nbytes.to_bytes(4, "little") + samples.tobytes()
    body = b"WAVEfmt " + form + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def decode_eight_channels(path):
    tensors, metadata = mi.read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["blocks.0.0.weight"] = tensors["blocks.0.0.weight"][:, :8].clone()
    mi.save_safetensors(path, tensors, metadata)


def drop_tensor(path):
    tensors, metadata = mi.read_safetensors(path)
    tensors.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    mi.save_safetensors(path, tensors, metadata)


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
BAD = [
    ("none.wav", "", "no such file"),
    ("silent.mp4", "", "has no sound"),
    ("text.txt", "", "text.txt"),
    ("text.wav", "", "cannot be read as audio"),
    ("playlist.wav", "", "cannot be read as audio"),
    ("concat.wav", "", "cannot be read as audio"),
    ("nan.wav", "", "not numbers"),
    ("song.wav", "--start 5", "no sound at 5 s"),
    ("song.wav", "--start -1", "0 or more"),
    ("song.wav", "--start inf", "must be a number"),
    ("song.wav", "--speed 0.01", "0.1 or more"),
    ("song.wav", "--size 32x40", "multiples of 16"),
    ("song.wav", "--size 32", "HEIGHTxWIDTH"),
    ("song.wav", "--frames 8", "7 or 13"),
    ("song.wav", "--frames 0", "1 or 7"),
    ("song.wav", "--frames 1e3", "invalid int"),
    ("song.wav", "--steps 1", "2 or more"),
    ("song.wav", "--steps 1000000000000000000000", "or less"),
    ("song.wav", "--cfg nan", "must be a number"),
    ("song.wav", "--music-cfg inf", "must be a number"),
    ("song.wav", "--lora-scale nan", "must be a number"),
    ("song.wav", "--solver rk4", "invalid choice"),
    ("song.wav", "--stepz 3", "unrecognized"),
    ("song.wav", "--skip 3", "from 0 to 2"),
    ("song.wav", "--seed 0 1 --out new.mp4", "one file for many seeds"),
    ("song.wav", "--seed 0 0", "different numbers"),
    ("song.wav", "--seed 99999999999999999999", "2^63"),
    ("song.wav", "--out clip.mov", "videos are .mp4"),
    ("song.wav", "--from recipe.json", "recipe"),
    ("song.wav", "--weights lacking", "no such file"),
    ("song.wav", "--weights other", "not a Mochi transformer"),
    ("song.wav", "--weights short", "not a whole safetensors file"),
    ("song.wav", "--weights fast", "44100"),
    ("song.wav", "--weights random", "q.weight"),
    ("song.wav", "--weights narrow", "takes latents of 8 channels, the transformer makes 12"),
    ("song.wav", "--weights wordy", "--frames must be a whole number, not '7'"),
    ("song.wav", "--weights wordy --frames 13", "preferred frames must be a whole number, not '7'"),
    ("song.wav", "--adapter other/decoder.safetensors", "not a MusicInfuser adapter"),
    ("song.wav", "--adapter wide.safetensors", "fits"),
    ("song.wav", "--adapter shallow.safetensors", "lora_"),
    ("song.wav", "--adapter deaf.safetensors", "audio"),
    ("song.wav", "--adapter nan.safetensors", "not numbers"),
    ("song.wav", "--out text.txt/out", "cannot write"),
    ("song.wav", "--device meta", "no device meta"),
    ("song.wav", "--device nonsense", "no device nonsense"),
    pytest.param("song.wav", "--device cuda", "no device cuda", marks=NO_CUDA),
]


@pytest.mark.parametrize("music, options, words", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    run, bad, tmp_path, monkeypatch, music, options, words
):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    error, _ = run(music, PROMPT, *options.split())
    line = error.strip().splitlines()[-1]
    assert "error: " in line and words in line
    assert sorted(bad.rglob("*")) == before and not list(tmp_path.glob("out/*"))


def test_bad_input_on_the_real_command_line(bad, weights, tmp_path):
    more = "--weights", weights, "--out", tmp_path / "out"
    result = command("sample.py", bad / "text.txt", PROMPT, *more)
    assert result.returncode != 0
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_nothing_half_written(weights, song, tmp_path, number):
    """At a random moment of making many videos; KILLS=20 pytest -k killed: of as many runs."""
    rng = random.Random(number)
    for i in range(int(os.environ.get("KILLS", 1))):
        out = tmp_path / str(i)
        line = [sys.executable, "sample.py", song, PROMPT, "--weights", weights, "--out", out]
        line += ["--device", "cpu", "--seed", *range(1000)]
        with subprocess.Popen(list(map(str, line)), cwd=ROOT, stderr=subprocess.PIPE) as run:
            while not list(out.glob("song*.mp4")):  # it has begun; a temporary name ends so too
                time.sleep(0.05)
            time.sleep(rng.random())
            run.send_signal(number)
            error = run.stderr.read().decode()
        assert run.returncode != 0 and "Traceback" not in error
        videos = sorted(out.glob("song*.mp4"))
        assert videos and all(mi.count_frames(video) == 7 for video in videos)
        if number != signal.SIGKILL:
            assert error.strip().endswith("stopped")
            recipes = [video.with_suffix(".json") for video in videos]
            assert sorted(out.iterdir()) == sorted(videos + recipes)
