"""First the command line as a user runs it, then every formula against official outputs, diffusers or a second way.

Everything is made here, small and at random: nothing is fetched, and no trained weights are needed.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
import wave

import imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imageio_ffmpeg import get_ffmpeg_exe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptability
import musicinfuser as mi
import sample
import train

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "eval", "golden.safetensors")
PROMPT = "a dog dancing in the park"
AAC_FRAME = 1024 / 44100  # seconds


def randomize(module, seed=0):
    """Every parameter at random, also the norms and what starts at zero, so that no term can hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        w = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5)
        p.data.copy_(1 + w if p.ndim == 1 and name.endswith("weight") else w)
    return module


def small_dit(depth=3, seed=0, **sizes):
    return randomize(mi.DiT(depth, 32, 16, 2, 16, **sizes), seed)


def inputs(seed=0, t=3, h=4, w=6):
    """(x, sigma, y_feat, y_mask), audio; the two texts have 4 and 2 of 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.arange(5) < torch.tensor([[4], [2]])
    return (randn(2, 12, t, h, w), torch.tensor([0.9, 0.3]), randn(2, 5, 16), mask), randn(2, 13, 24)


@pytest.fixture(autouse=True)
def seeded():  # not as inputs(), or a test's noise would be its latents
    torch.manual_seed(1234)


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


# ------------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights folder of the smallest sizes; its tokenizer is a SentencePiece file and a config, as Mochi's is."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    dit = small_dit()
    dit.natural = mi.Natural(height=32, width=32, frames=7, steps=2, cfg=3.0)
    mi.save_dit(dit, folder / "dit.safetensors")
    mi.infuse(dit, [0, 2], rank=2, audio_width=16, zero_init=False)
    mi.save_adapter(dit, folder / "musicinfuser.safetensors")
    for name, part in (("encoder", mi.Encoder((8,) * 4, (1,) * 5)), ("decoder", mi.Decoder((8,) * 4, (1,) * 5))):
        mi.save_safetensors(folder / f"{name}.safetensors", randomize(part).state_dict())

    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "the person dances on a stage"] * 20), vocab_size=40, hard_vocab_limit=False,
        model_prefix=folder / "tokenizer" / "spiece", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer" / "spiece.vocab").unlink()
    mi.save_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    t5 = T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    randomize(t5).save_pretrained(folder / "text_encoder")
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                            conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(folder / "audio_encoder")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "audio_encoder")
    return folder


def write_wav(path, *channels, rate=44100):
    samples = (np.stack(channels, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels)), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """3 s, stereo, sound on the left only: 400 Hz for a second, then 1000 Hz."""
    t = np.arange(3 * 44100) / 44100
    left = 0.5 * np.sin(2 * np.pi * np.where(t < 1, 400, 1000) * t)
    return write_wav(tmp_path_factory.mktemp("songs") / "song.wav", left, 0 * left)


def command(*arguments):
    line = [sys.executable, os.path.join(HERE, "sample.py"), "--device", "cpu", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """sample.py in this process, which saves the imports: run(*arguments) -> (error line or "", standard output)."""

    def run(*arguments):
        settings = ["--device", "cpu", "--weights", weights, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, settings)])
        error = ""
        try:
            mi.main(sample.main)
        except SystemExit as stop:
            error = stop.code
        return error, capsys.readouterr().out

    return run


def watch(path):
    """frames (T, H, W, 3), frames a second, sound at 44100 Hz (the mean of the channels), all as decoded."""
    with imageio.get_reader(path, format="FFMPEG") as reader:
        fps, frames = reader.get_meta_data()["fps"], np.stack([*iter(reader)])
    line = [get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a", "-f", "f32le", "-ar", "44100", "-"]
    sound = np.frombuffer(subprocess.run(line, capture_output=True, check=True).stdout, "<f4")
    return frames, fps, sound.reshape(-1, 2).mean(1)


def pitch(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * rate / len(samples)


@pytest.fixture(scope="module")
def made(weights, song, tmp_path_factory):
    """What `python sample.py` did with two seeds: its result and its folder."""
    out = tmp_path_factory.mktemp("made")
    return command(song, PROMPT, "--seed", 0, 1, "--weights", weights, "--out", out), out


def test_the_readmes_first_command(tmp_path):
    tiny = os.path.join(HERE, "tiny")
    run = command(os.path.join(tiny, "song.wav"), "a dog dancing", "--weights", tiny, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    path = tmp_path / "song-a-dog-dancing-0.mp4"
    frames, fps, sound = watch(path)
    assert frames.shape == (73, 64, 64, 3) and fps == 30
    assert f"weights  {tiny}" in run.stdout and str(path) in run.stdout
    assert np.abs(np.diff(frames.astype(float), axis=0)).mean() > 0.3  # of 255: something moves, and ...
    assert np.abs(sound).max() > 0.1  # ... there is music


def test_command_line_writes_a_video_and_its_recipe_for_each_seed(made, weights, song):
    result, out = made
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"weights  {weights}")
    stem = "song-a-dog-dancing-in-the-park"
    assert sorted(os.listdir(out)) == [f"{stem}-{seed}.{kind}" for seed in (0, 1) for kind in ("json", "mp4")]
    recipe = json.loads((out / f"{stem}-1.json").read_text())
    wanted = {"song": str(song), "prompt": PROMPT, "seed": 1, "frames": 7, "size": [32, 32], "steps": 2, "cfg": 3.0}
    assert wanted.items() <= recipe.items()


def test_picture_and_sound_fit_and_seeds_differ(made):
    videos = [watch(path) for path in sorted(made[1].glob("*.mp4"))]
    for frames, fps, sound in videos:
        assert frames.shape == (7, 32, 32, 3) and fps == 30
        assert abs(len(sound) / 44100 - 7 / 30) <= AAC_FRAME
    assert np.abs(videos[0][0].astype(int) - videos[1][0]).mean() > 1


def test_same_seed_makes_the_same_frames_and_overwrites_nothing(made, run, song):
    before = {path: path.read_bytes() for path in made[1].iterdir()}
    error, stdout = run(song, PROMPT, "--out", made[1])
    assert not error and all(path.read_bytes() == content for path, content in before.items())
    (new,) = set(made[1].glob("*.mp4")) - set(before)
    assert str(new) in stdout and new.with_suffix(".json").exists()
    old = made[1] / new.name.replace("-0-2.mp4", "-0.mp4")
    assert np.array_equal(watch(new)[0], watch(old)[0])


def test_the_parts_are_put_together(run, weights, song, monkeypatch):
    videos = []
    monkeypatch.setattr(mi, "save_video", lambda path, video, *_: videos.append(video))
    options = "--cfg 2 --music-cfg 3 --skip 1 --skip-scale 4 --seed 5 --start 1 --negative stage"
    assert run(song, PROMPT, *options.split())[0] == ""
    dit = mi.load_adapter(mi.load_dit(weights / "dit.safetensors"), weights / "musicinfuser.safetensors")
    noise = torch.randn(1, 12, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    texts = mi.encode_text(weights, [PROMPT, "stage"])
    audio = mi.AudioEncoder(weights)(mi.music_window(song, 7, start=1)[0])
    z = mi.sample(dit, noise, *texts, audio, sigmas=[1, 0.975, 0], cfg=2, music_cfg=3, skip=(1,), skip_scale=4)
    close(videos[0], mi.load_decoder(weights / "decoder.safetensors")(mi.to_vae_space(z))[0], 1e-4)


def test_lora_scale_multiplies_the_update(run, weights, song, tmp_path, monkeypatch):
    videos, tensors = [], mi.read_safetensors(weights / "musicinfuser.safetensors")
    monkeypatch.setattr(mi, "save_video", lambda path, video, *_: videos.append(video))
    twice = {name: 2 * t if name.endswith("lora_B") else t for name, t in tensors[0].items()}
    mi.save_safetensors(tmp_path / "twice.safetensors", twice, tensors[1])
    said = run(song, PROMPT, "--lora-scale", 2)[1]
    assert "LoRA x 2" in said and "LoRA x" not in run(song, PROMPT, "--adapter", tmp_path / "twice.safetensors")[1]
    run(song, PROMPT)
    scaled, doubled, plain = videos
    assert torch.equal(scaled, doubled) and not torch.equal(scaled, plain)


@pytest.mark.parametrize("existing", ["a.mp4", "a.json"])
def test_out_that_exists_is_an_error(run, song, tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    error, _ = run(song, PROMPT, "--out", tmp_path / "a.mp4")
    assert error.startswith("error: ") and "exists" in error
    assert (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("adapter", [(), ("--adapter", "none")])
def test_music_is_heard_unless_there_is_no_adapter(run, song, tmp_path, adapter):
    frames = []
    for start in (0, 1):
        assert run(song, "", "--start", start, "--out", tmp_path / f"{start}.mp4", *adapter)[0] == ""
        frames.append(watch(tmp_path / f"{start}.mp4")[0])
    assert np.array_equal(*frames) == bool(adapter)
    assert ("none" in json.loads((tmp_path / "1.json").read_text())["adapter"]) == bool(adapter)


def test_145_frames_and_a_song_that_ends_before(run, song, tmp_path):
    error, stdout = run(song, PROMPT, "--frames", 145, "--size", "16x32", "--out", tmp_path / "a.mp4")
    assert not error and "the song ends after 3.0 s of the video; silence follows" in stdout
    frames, _, sound = watch(tmp_path / "a.mp4")
    assert frames.shape == (145, 16, 32, 3) and abs(len(sound) / 44100 - 145 / 30) <= AAC_FRAME
    assert np.abs(sound[: 2 * 44100]).max() > 0.1 and np.abs(sound[int(3.1 * 44100) :]).max() < 1e-3


@pytest.mark.parametrize("start, speed, hz", [(0, 1, 400), (1, 1, 1000), (1, 1.25, 1250), (1.5, 0.5, 500), (0, 2, 800)])
def test_start_and_speed_of_the_song(run, song, tmp_path, start, speed, hz):
    heard = mi.load_audio(song, start, 13 / 30, speed)
    assert abs(len(heard) / 16000 - 13 / 30) < 1e-4 and abs(pitch(heard.numpy(), 16000) - hz) < 5
    assert run(song, PROMPT, "--start", start, "--speed", speed, "--frames", 13, "--out", tmp_path / "a.mp4")[0] == ""
    _, _, sound = watch(tmp_path / "a.mp4")
    assert abs(len(sound) / 44100 - 13 / 30) <= AAC_FRAME and abs(pitch(sound, 44100) - hz) < 5


NAMES = [("Artist: Song.wav", "a title"), ("song.wav", "my data"), ("歌" * 40 + ".wav", "歌")]


@pytest.mark.parametrize("name, title", NAMES, ids=["colon", "data", "long"])
def test_songs_of_any_name_and_title(run, song, tmp_path, monkeypatch, name, title):
    line = [get_ffmpeg_exe(), "-v", "error", "-i", song, "-metadata", f"title={title}", f"file:{tmp_path / name}"]
    subprocess.run(line, check=True)
    monkeypatch.chdir(tmp_path)
    assert run(name, "踊" * 100)[0] == ""  # the name of a file has at most 255 bytes
    assert len(list(tmp_path.glob("out/*.mp4"))) == 1


@pytest.fixture(scope="module")
def bad(weights, song, tmp_path_factory):
    """What can be wrong: a text, a video without sound, and weights folders and adapters that do not fit."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copy(song, folder)
    for name in ("text.txt", "text.wav"):
        (folder / name).write_text("not a song\n" * 100)
    imageio.mimwrite(folder / "silent.mp4", [np.zeros((32, 32, 3), np.uint8)] * 9, fps=30)
    for name in ("lacking", "short", "other"):
        shutil.copytree(weights, folder / name)
    (folder / "lacking" / "dit.safetensors").unlink()
    whole = (weights / "dit.safetensors").read_bytes()
    (folder / "short" / "dit.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.copy(weights / "decoder.safetensors", folder / "other" / "dit.safetensors")
    wide, shallow, deaf = mi.DiT(3, 48, 16, 2, 16), small_dit(depth=2), small_dit()
    for name, dit, audio_width in (("wide", wide, 16), ("shallow", shallow, 16), ("deaf", deaf, 20)):
        mi.save_adapter(mi.infuse(dit, [0, 1], rank=2, audio_width=audio_width), folder / f"{name}.safetensors")
    return folder


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
BAD = [
    ("none.wav", "", "no such file"), ("silent.mp4", "", "has no sound"), ("text.txt", "", "text.txt"),
    ("text.wav", "", "cannot be read as audio"), ("song.wav", "--start 5", "no sound at 5 s"),
    ("song.wav", "--size 32x40", "multiples of 16"), ("song.wav", "--frames 8", "7 or 13"),
    ("song.wav", "--frames 0", "1 or 7"), ("song.wav", "--steps 1", "2 or more"),
    ("song.wav", "--steps 0", "2 or more"), ("song.wav", "--skip 3", "from 0 to 2"),
    ("song.wav", "--seed 0 1 --out new.mp4", "one file for 2 seeds"),
    ("song.wav", "--weights lacking", "no such file"), ("song.wav", "--weights other", "not a Mochi transformer"),
    ("song.wav", "--weights short", "not a whole safetensors file"),
    ("song.wav", "--adapter other/decoder.safetensors", "not a MusicInfuser adapter"),
    ("song.wav", "--adapter wide.safetensors", "fits"), ("song.wav", "--adapter shallow.safetensors", "lora_"),
    ("song.wav", "--adapter deaf.safetensors", "audio"), ("song.wav", "--out text.txt/out", "cannot write"),
    pytest.param("song.wav", "--device cuda", "no device cuda", marks=NO_CUDA),
]  # fmt: skip


@pytest.mark.parametrize("music, options, words", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(run, bad, tmp_path, monkeypatch, music, options, words):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    error, _ = run(music, PROMPT, *options.split())
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert sorted(bad.rglob("*")) == before and not list(tmp_path.glob("out/*"))


def test_bad_input_on_the_real_command_line(bad, weights, tmp_path):
    result = command(bad / "text.txt", PROMPT, "--weights", weights, "--out", tmp_path / "out")
    assert result.returncode != 0
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------
# Against official outputs, for weights that a formula makes, and against diffusers, on the same random weights
# ------------------------------------------------------------------------------------------------------------------


def formula_weights(shapes):
    for k, name in enumerate(sorted(shapes)):
        i = np.arange(math.prod(shapes[name]), dtype=np.float64)
        u = 43758.5453 * np.sin(12.9898 * i + 78.233 * (k + 1))
        w = (2 * (u - np.floor(u)) - 1).reshape(shapes[name])
        w = 0.3 * w + name.endswith("weight") if w.ndim == 1 else w * math.sqrt(3 / math.prod(w.shape[1:]))
        yield name, torch.from_numpy(w).float()


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The stored inputs and outputs, and the modules as loaded from files: encoder, decoder, dit, adapted."""
    folder, stored = tmp_path_factory.mktemp("golden"), load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        shapes, adapter = (json.loads(file.metadata()[key]) for key in ("shapes", "adapter"))
    for kind in shapes:
        metadata = {"kwargs": json.dumps(adapter["kwargs"])} if kind == "adapter" else None
        save_file(dict(formula_weights(shapes[kind])), folder / f"{kind}.safetensors", metadata)
    stored["encoder"] = mi.load_encoder(folder / "encoder.safetensors")
    stored["decoder"] = mi.load_decoder(folder / "decoder.safetensors")
    stored["dit"], adapted = (mi.load_dit(folder / "dit.safetensors") for _ in range(2))
    stored["adapted"] = mi.load_adapter(adapted, folder / "adapter.safetensors", adapter["layers"])
    return stored


@pytest.mark.parametrize("out, skip", [("base", ()), ("skip_1", (1,)), ("adapted", ())])
def test_transformer_is_the_official_one(golden, out, skip):
    dit, audio = (golden["adapted"], golden["in.audio"]) if out == "adapted" else (golden["dit"], None)
    v = dit(*(golden[f"in.{name}"] for name in ("x", "sigma", "y_feat", "y_mask")), audio, skip)
    close(v, golden[f"out.{out}"], 3e-4)


def test_sampler_is_the_official_one(golden):
    text, null = ((golden["in.y_feat"][i : i + 1], golden["in.y_mask"][i : i + 1]) for i in (0, 1))
    sigmas = mi.linear_quadratic_schedule(4)
    z = mi.sample(golden["adapted"], golden["in.x"][:1], text, null, golden["in.audio"], sigmas=sigmas, cfg=6.0)
    close(z, golden["out.sampled"], 2e-3)


def test_vae_is_the_official_one(golden):
    mean, logvar = golden["encoder"](golden["in.video"])
    close(mean, golden["out.mean"], 5e-4)
    close(logvar, golden["out.logvar"], 5e-4)
    close(golden["decoder"](golden["in.latents"]), golden["out.decoded"], 5e-4)


@pytest.mark.parametrize("chunk, frames", [(1, 25), (2, 13), (3, 19), (4, 25), (7, 7), (6, 1)])
def test_encoding_in_pieces_changes_nothing(golden, chunk, frames, monkeypatch):
    video = torch.rand(2, 3, frames, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = golden["encoder"](video, chunk=99)
    attend = mi.AttentionBlock.forward
    monkeypatch.setattr(mi.AttentionBlock, "forward", lambda block, x: attend(block, x, numbers=1))  # row by row
    for one, other in zip(golden["encoder"](video, chunk=chunk), wanted):
        assert one.shape == (2, 12, (frames - 1) // 6 + 1, 4, 6)
        close(one, other, 1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_decoding_in_pieces_changes_nothing(golden, chunk):
    latents = torch.randn(1, 12, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    whole = golden["decoder"](latents, chunk=99)
    assert whole.shape == (1, 3, 25, 16, 32)
    close(golden["decoder"](latents, chunk=chunk), whole, 1e-5)
    close(golden["decoder"](latents[:, :, :1]), whole[:, :, :1], 1e-5)  # the first frame is the first latent's alone


DIT_NAMES = [
    ("x_embedder", "patch_embed"), ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"), ("t5_y_embedder", "time_embed.pooler"),
    ("t5_yproj", "time_embed.caption_proj"), ("final_layer.linear", "proj_out"), ("final_layer.mod", "norm_out.linear"),
    ("blocks.", "transformer_blocks."), ("mod_x", "norm1.linear"), ("mod_y", "norm1_context.linear"),
    ("attn.", "attn1."), ("q_norm_x", "norm_q"), ("k_norm_x", "norm_k"), ("q_norm_y", "norm_added_q"),
    ("k_norm_y", "norm_added_k"), ("proj_x", "to_out.0"), ("proj_y", "to_add_out"), ("mlp_x.w1", "ff.net.0.proj"),
    ("mlp_x.w2", "ff.net.2"), ("mlp_y.w1", "ff_context.net.0.proj"), ("mlp_y.w2", "ff_context.net.2"),
    ("blocks.2.norm1_context.linear", "blocks.2.norm1_context.linear_1"),  # the last of three
]  # fmt: skip
THIRDS = {"qkv_x": ("to_q", "to_k", "to_v"), "qkv_y": ("add_q_proj", "add_k_proj", "add_v_proj")}


def to_diffusers(state):
    """diffusers has q, k and v apart, and both the feed-forward's gate and the final shift in the second half."""
    for name, w in state.items():
        if ".w1." in name or "final_layer.mod" in name:
            w = w.roll(len(w) // 2, 0)
        for ours, theirs in DIT_NAMES:
            name = name.replace(ours, theirs)
        fused = next((part for part in THIRDS if part in name), name)
        for third, part in zip(THIRDS.get(fused, [name]), w.chunk(3) if fused in THIRDS else [w]):
            yield name.replace(fused, third), part


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("seed, t, h, w", [(1, 3, 4, 6), (2, 1, 8, 2)])
def test_transformer_is_that_of_diffusers(seed, t, h, w):
    diffusers = pytest.importorskip("diffusers")
    ours = small_dit(seed=seed, hidden_x=85, hidden_y=42).requires_grad_(False)  # diffusers does not round these
    theirs = diffusers.MochiTransformer3DModel(num_layers=3, num_attention_heads=2, attention_head_dim=16,
                                               pooled_projection_dim=16, text_embed_dim=16)  # fmt: skip
    theirs.load_state_dict(dict(to_diffusers(ours.state_dict())))
    (x, sigma, y_feat, y_mask), _ = inputs(seed, t, h, w)
    wanted = theirs.requires_grad_(False)(x, y_feat, 1000 * (1 - sigma), y_mask, return_dict=False)[0]
    close(ours(x, sigma, y_feat, y_mask), wanted, 1e-4)
    cut = ours(x[1:], sigma[1:], y_feat[1:, :2], y_mask[1:, :2])  # padding changes nothing
    close(cut, wanted[1:], 1e-4)


@pytest.mark.parametrize("seed, frames, height", [(1, 13, 16), (2, 1, 32)])
def test_encoder_is_that_of_diffusers(seed, frames, height):
    diffusers = pytest.importorskip("diffusers")
    sizes = (32, 64, 96, 64), (1, 1, 1, 1, 1)  # with one block a stage, both list their tensors in the same order
    ours = randomize(mi.Encoder(*sizes), seed).requires_grad_(False)
    vae = diffusers.AutoencoderKLMochi(encoder_block_out_channels=sizes[0], layers_per_block=sizes[1],
                                       decoder_block_out_channels=(32,) * 4)  # fmt: skip
    split = [part for name, w in ours.state_dict().items() for part in w.chunk(3 if ".qkv." in name else 1)]
    vae.encoder.load_state_dict(dict(zip(vae.encoder.state_dict(), split, strict=True)))
    video = torch.rand(1, 3, frames, height, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    close(torch.cat(ours(video), 1), vae.encoder.requires_grad_(False)(video)[0], 1e-4)


# ------------------------------------------------------------------------------------------------------------------
# The formulas, written a second time; the adapter
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 0, 1])
def test_zica_is_equation_6(window):
    zica = randomize(mi.ZICA(32, heads=8), seed=3).requires_grad_(False)
    x, music = torch.randn(2, 4 * 6, 32), torch.randn(1, 4, 32)  # four latent frames of six tokens
    q, k, v = zica.to_q(x), zica.to_k(music), zica.to_v(music)
    heard = torch.zeros_like(x)
    for token in range(24):
        frames = [t for t in range(4) if window is None or abs(t - token // 6) <= window]
        for head in (slice(4 * h, 4 * h + 4) for h in range(8)):
            weight = (k[0, frames, head] @ q[:, token, head].T / math.sqrt(4)).softmax(0)  # (frames, B)
            heard[:, token, head] = weight.T @ v[0, frames, head]
    close(zica(x, zica.listen(music), window), x + heard @ zica.to_out.weight.T + zica.to_out.bias, 1e-5)


@pytest.mark.parametrize("tokens, frames", [(31, 3), (27, 4), (125, 13), (3, 5), (4, 4)])
def test_music_is_resized_to_the_nearest_token(tokens, frames):
    project = randomize(mi.AudioProjection(24, 32)).requires_grad_(False)
    audio = torch.randn(2, tokens, 24)
    first, _, second = project.projection
    wanted = F.linear(F.silu(F.linear(audio, first.weight, first.bias)), second.weight, second.bias)
    close(project(audio, frames), wanted[:, [i * tokens // frames for i in range(frames)]], 1e-6)


def test_lora_is_scaled_by_alpha_over_rank():
    linear = mi.LoRALinear(6, 9)
    mi.attach_lora(linear, rank=3, alpha=5)
    randomize(linear).requires_grad_(False)
    x = torch.randn(4, 6)
    wanted = x @ linear.weight.T + linear.bias + 5 / 3 * (x @ linear.lora_A.T) @ linear.lora_B.T
    close(linear(x), wanted, 1e-5)


@pytest.mark.parametrize("step, b", [(0, 3), (200, 2), (400, 1.5), (100_000, 1)])
def test_beta_uniform_is_a_beta_distribution(step, b):
    n = 20_000
    sigma = mi.beta_uniform(step, n, generator=torch.Generator().manual_seed(step)).double().sort().values
    assert sigma.shape == (n,) and 0 <= sigma[0] and sigma[-1] <= 1
    distance = (1 - (1 - sigma) ** b - (torch.arange(n) + 0.5) / n).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / math.sqrt(n)  # exceeded by chance once in a thousand


def test_beta_uniform_halves_and_is_seeded():
    draw = lambda *args, **kwargs: mi.beta_uniform(*args, **kwargs, generator=torch.Generator().manual_seed(1))  # noqa
    assert torch.equal(draw(50, 9, half_life=50), draw(200, 9)) and torch.equal(draw(200, 9), draw(0, 9, beta=2))
    assert torch.equal(draw(0, 9, beta=1), draw(700, 9, beta=1))  # uniform throughout
    assert not torch.equal(draw(0, 9), draw(200, 9))


@pytest.mark.parametrize("steps", [2, 3, 7, 8, 64, 65])
def test_schedule_is_linear_then_quadratic(steps):
    close(mi.linear_quadratic_schedule(4), torch.tensor([1, 0.9875, 0.975, 0.725, 0]).double(), 1e-7)
    sigmas, half = mi.linear_quadratic_schedule(steps), steps // 2
    assert len(sigmas) == steps + 1 and sigmas[0] == 1 and abs(sigmas[-1]) < 1e-9 and (sigmas.diff() < 0).all()
    close(sigmas[: half + 1], torch.linspace(1, 0.975, half + 1, dtype=torch.float64), 1e-9)
    i = torch.arange(steps - half + 1).double()
    bend = (sigmas[half] - 0.025 / half * i - sigmas[half:])[1:] / i[1:] ** 2  # smooth at the joint, then one square
    close(bend, bend[:1].expand_as(bend), 1e-9)


def fake_dit(x, sigma, y_feat, y_mask, audio=None, skip=()):
    """A velocity that tells its branches apart: proportional to x, and to a number for each of the inputs."""
    return x * (y_feat.sum() + (0 if audio is None else audio.sum()) - sum(0.01 * layer for layer in skip))


@pytest.mark.parametrize("settings, factor", [
    ({"cfg": 1}, 0.5), ({"cfg": 6.0}, 0.3 + 6 * 0.2), ({"cfg": 0}, 0.3), ({"cfg": 1, "music_cfg": 2}, 0.5 + 2 * 0.2),
    ({"cfg": 1, "skip": (1, 2), "skip_scale": 4}, 0.5 + 4 * 0.03), ({"cfg": 1, "skip": (1,)}, 0.5),
    ({"cfg": 3, "music_cfg": 2, "skip": (2,), "skip_scale": 5}, 0.3 + 3 * 0.2 + 2 * 0.2 + 5 * 0.02),
])  # fmt: skip
def test_sample_guides_and_takes_euler_steps(settings, factor):
    noise, mask = torch.randn(2, 12, 1, 2, 2), torch.ones(1, 1, dtype=torch.bool)
    text, null, audio = (torch.full((1, 1, 1), value) for value in (0.3, 0.1, 0.2))
    z = mi.sample(fake_dit, noise, (text, mask), (null, mask), audio, sigmas=[1, 0.7, 0.2, 0], **settings)
    close(z, noise * math.prod(1 + step * factor for step in (0.3, 0.5, 0.2)), 1e-4)


def test_constant_velocity_is_solved_exactly():
    noise, z = torch.randn(2, 1, 12, 1, 2, 2)
    seen = []
    still = lambda x, sigma, *_: seen.append(float(sigma)) or z - noise  # noqa: E731
    close(mi.sample(still, noise, (), (), sigmas=mi.linear_quadratic_schedule(5), cfg=1), z, 1e-6)
    assert seen == mi.linear_quadratic_schedule(5)[:-1].float().tolist()


def test_loss_is_the_squared_error_of_the_velocity():
    (z, sigma, y_feat, y_mask), _ = inputs()
    eps = torch.randn_like(z)
    double = lambda x, sigma, *_: 2 * x  # noqa: E731
    loss = mi.flow_matching_loss(double, z, sigma, eps, y_feat, y_mask)
    for b, s in enumerate((0.9, 0.3)):
        x = (1 - s) * z[b] + s * eps[b]
        assert loss[b].item() == pytest.approx((2 * x - z[b] + eps[b]).pow(2).mean().item(), rel=1e-5)


def test_latents_are_normalised_channel_by_channel():
    z = torch.randn(2, 12, 2, 3, 4)
    normal = mi.to_dit_space(z)
    close(normal[:, 7], (z[:, 7] + 0.09346305707025976) / 1.3720942357788521, 1e-6)
    close(mi.to_vae_space(normal), z, 1e-6)
    close(mi.to_dit_space(z, range(12), [2.0] * 12)[:, 11], (z[:, 11] - 11) / 2, 1e-6)


@pytest.mark.parametrize("channels, groups", [(8, 8), (20, 4), (48, 8), (7, 1), (64, 32), (96, 32)])
def test_group_norm_is_frame_by_frame(channels, groups):
    norm = randomize(mi.GroupNorm(channels)).requires_grad_(False)
    x = torch.randn(2, channels, 3, 4, 5) * torch.tensor([1, 9, 0.1])[:, None, None]
    wanted = [F.group_norm(x[:, :, t], groups, norm.weight, norm.bias, 1e-5) for t in range(3)]
    close(norm(x), torch.stack(wanted, 2), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers, rank, window, heads", [([0, 2], 4, None, 8), ([1], 0, 1, 4), ([0, 1, 2], 2, 0, 0)])
def test_a_fresh_adapter_changes_no_bit(weights, layers, rank, window, heads, dtype):
    dit = mi.load_dit(weights / "dit.safetensors", dtype=dtype)
    arguments, audio = inputs()
    before = dit(*arguments)
    mi.infuse(dit, layers, rank, window, heads=heads, audio_width=24)
    assert torch.equal(dit(*arguments, audio), before) and torch.equal(dit(*arguments), before)
    mi.infuse(dit, layers, rank, window, heads=heads, audio_width=24, zero_init=False)
    assert not torch.allclose(dit(*arguments, audio), before, atol=1e-3)


def test_only_the_adapter_is_trained_and_music_reaches_it():
    dit = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24, zero_init=False)
    arguments, audio = inputs()
    dit(*arguments, audio).square().mean().backward()
    trained = {name for name, p in dit.named_parameters() if p.requires_grad}
    reached = {name for name, p in dit.named_parameters() if p.grad is not None}
    assert trained == reached == set(mi.adapter_parameters(dit))
    assert len(trained) == 4 + 2 * 8 + 2 * (3 * 4 - 1)  # projector, ZICA, LoRA: the last block has no proj_y


@pytest.mark.parametrize("skip", [(0,), (1,), (0, 2)])
def test_layers_left_out_take_their_zica_along(skip):
    dit, idle = (randomize(mi.infuse(small_dit(), [1], rank=0, audio_width=24)) for _ in range(2))
    for i in skip:
        idle.blocks[i].forward = lambda x, y, *_: (x, y)
    arguments, audio = inputs()
    assert torch.equal(dit(*arguments, audio, skip), idle(*arguments, None if 1 in skip else audio))


@pytest.mark.parametrize("layers, rank, window, heads, alpha", [([2, 0], 2, 1, 4, 7), ([1], 0, None, 0, None)])
def test_adapter_file_round_trip(tmp_path, layers, rank, window, heads, alpha):
    dit = randomize(mi.infuse(small_dit(), layers, rank, window, alpha, heads, audio_width=24))
    mi.save_dit(dit, tmp_path / "dit.safetensors", torch.float32)
    mi.save_adapter(dit, tmp_path / "a.safetensors")
    again = mi.load_adapter(mi.load_dit(tmp_path / "dit.safetensors"), tmp_path / "a.safetensors")
    saved, loaded = mi.adapter_parameters(dit), mi.adapter_parameters(again)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert again.audio_layers == sorted(layers) and again.window == window
    arguments, audio = inputs()
    close(again(*arguments, audio), dit(*arguments, audio), 1e-5)  # heads and alpha


def test_sizes_are_those_of_the_released_files():
    count = lambda tensors: (len(tensors), sum(p.numel() for p in tensors.values()))  # noqa: E731
    with torch.device("meta"):
        dit, encoder, decoder = mi.DiT(48, 3072, 1536, 24, 4096), mi.Encoder(), mi.Decoder()
        assert count(dit.state_dict()) == (879, 10_027_677_744)
        assert count(encoder.state_dict()) == (243, 97_222_016)
        assert count(decoder.state_dict()) == (162, 362_526_595)
        mi.infuse(dit, (6, 7, 8, 9, 10, 21, 34, 35, 36, 38, 39, 43, 44, 45, 46, 47))
    assert count(mi.adapter_parameters(dit)) == (514, 719_493_120)
    assert mi.FeedForward(100).w2.in_features == 512  # 8/3 of the width, up to a multiple of 256


# ------------------------------------------------------------------------------------------------------------------
# Files, text, music
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "blocks.1.mlp_y.w1.weight", "pos_frequencies", "final_layer.mod.bias", "blocks.1.attn.proj_x.lora_A",
    "blocks.2.attn.qkv_y.lora_B", "audio_cross_attn_blocks.1.to_v.bias", "audio_projection.projection.2.weight",
])  # fmt: skip
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_is_strict(weights, tmp_path, name, change, device):
    adapter = "lora" in name or name.startswith("audio")
    source = weights / ("musicinfuser.safetensors" if adapter else "dit.safetensors")
    with safe_open(source, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensor = tensors[name] if change == "extra" else tensors.pop(name)
    if change != "missing":
        tensors[name + "x" * (change == "extra")] = torch.cat([tensor, tensor], -1)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(mi.InputError, match=name):
        if adapter:
            mi.load_adapter(mi.load_dit(weights / "dit.safetensors", device), tmp_path / "changed.safetensors")
        else:
            mi.load_dit(tmp_path / "changed.safetensors", device)


def test_meta_device_reads_shapes_only(weights):
    dit = mi.load_adapter(mi.load_dit(weights / "dit.safetensors", "meta"), weights / "musicinfuser.safetensors")
    assert all(p.is_meta for p in dit.parameters())
    assert (len(dit.blocks), dit.width, dit.audio_layers) == (3, 32, [0, 2])


def test_matrices_take_the_dtype_and_the_rest_stays_float32(tmp_path):
    saved = small_dit()
    mi.save_dit(saved, tmp_path / "dit.safetensors", torch.float32)
    dit = mi.load_dit(tmp_path / "dit.safetensors", dtype=torch.bfloat16)
    for name, p in dit.named_parameters():
        assert p.dtype == (torch.float32 if "norm" in name or name == "pos_frequencies" else torch.bfloat16), name
        assert torch.equal(p, saved.get_parameter(name).to(p.dtype))


LOAD = """
import sys, threading, time, torch
import musicinfuser as mi

def anonymous():  # memory that no file backs
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.001)

mi.load_dit(sys.argv[1], "meta")  # what the first use of everything costs
seen = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
dit = mi.load_dit(sys.argv[1], dtype=torch.bfloat16)
seen.append(anonymous())
print(max(seen) - seen[0], sum(p.nbytes for p in dit.parameters()))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloading_changes_no_bit(tmp_path, dtype):
    mi.save_dit(small_dit(), tmp_path / "dit.safetensors", torch.float32)
    arguments, audio = inputs()
    results = []
    for offload in (False, True):
        dit = mi.load_dit(tmp_path / "dit.safetensors", dtype=dtype, offload=offload)
        torch.manual_seed(0)
        mi.infuse(dit, [0, 2], rank=2, audio_width=24, zero_init=False)
        dit.checkpointing = True
        velocity = dit(*arguments, audio)
        velocity.square().sum().backward()
        results.append([velocity.detach(), *(p.grad for p in mi.adapter_parameters(dit).values())])
    assert len(results[0]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*results))


WITHIN = """
import resource, sys, torch, musicinfuser as mi
path, offload, room = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
mi.load_dit(path, "meta")
text = torch.ones(1, 2, 64), torch.ones(1, 2).bool()
data = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
dit = mi.load_dit(path, offload=offload)
print(mi.sample(dit, torch.ones(1, 12, 2, 4, 4), text, text, sigmas=[1, 0.5, 0]).sum().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells")
def test_offloading_samples_with_a_model_larger_than_memory(tmp_path):
    path = tmp_path / "dit.safetensors"  # all zeros, a hole in the disk
    with torch.device("meta"):
        dit = mi.DiT(16, 1024, 512, 8, 64)
    header, size = {}, 0
    for name, tensor in dit.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, size + 2 * tensor.numel()]}
        size += 2 * tensor.numel()
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    room = 300_000_000
    assert 2 * size > 4 * room  # as float32
    run = lambda offload: subprocess.run([sys.executable, "-c", WITHIN, path, str(offload), str(room)], cwd=HERE,  # noqa: E731
                                         capture_output=True, text=True)  # fmt: skip
    assert run(True).stdout == "384.0\n"
    assert run(False).returncode != 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells")
def test_loading_as_bfloat16_needs_little_more_than_the_model(tmp_path):
    with torch.device("meta"):
        dit = mi.DiT(5, 768, 256, 6, 256)
    mi.save_dit(dit.to_empty(device="cpu"), tmp_path / "dit.safetensors", torch.float32)
    assert os.path.getsize(tmp_path / "dit.safetensors") > 180e6
    line = [sys.executable, "-c", LOAD, tmp_path / "dit.safetensors"]
    peak, model = map(int, subprocess.run(line, cwd=HERE, capture_output=True, check=True).stdout.split())
    assert 0.8 * model < peak < 1.15 * model + 10e6


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_video_that_ffmpeg_says_a_lot_about_is_read_to_its_end(tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nhead -c 300000 /dev/zero >&2; head -c 12 /dev/zero\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr(mi, "get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    frames = mi.read_frames("a.mp4", 2, 2)
    assert next(frames).shape == (2, 2, 3)
    with pytest.raises(mi.InputError, match="a.mp4 cannot be read as video"):
        next(frames)


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(mi.InputError, match="cannot write"), mi.written_whole(tmp_path / "a") as temporary:
        open(temporary, "w").close()
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_text_tokens_are_those_of_sentencepiece(weights, capsys):
    import sentencepiece
    from transformers import T5EncoderModel

    ids = sentencepiece.SentencePieceProcessor(model_file=str(weights / "tokenizer" / "spiece.model")).encode
    t5 = T5EncoderModel.from_pretrained(weights / "text_encoder").requires_grad_(False)
    short, none = mi.encode_text(weights, [PROMPT, " "])
    assert short[1].all() and not none[1].any() and "warning" not in capsys.readouterr().err
    close(short[0], t5(torch.tensor([ids(PROMPT) + [1]])).last_hidden_state, 1e-5)  # 1 ends the sentence
    ((y_feat, y_mask),) = mi.encode_text(weights, ["dog " * 300])
    assert "only the first 256 are used" in capsys.readouterr().err
    assert y_feat.shape == (1, 256, 16) and y_mask.shape == (1, 256) and y_mask.all()
    close(y_feat, t5(torch.tensor([ids("dog " * 300)[:255] + [1]])).last_hidden_state, 1e-5)


def test_music_tokens(weights, song):
    waveform, _ = mi.music_window(song, 73)
    encode = mi.AudioEncoder(weights)
    assert encode(waveform).shape == (1, 125, 16)  # 50 a second
    close(encode(0.1 * waveform + 0.2), encode(waveform), 1e-3)  # loudness is normalised away


def test_audio_is_the_mean_of_the_channels(tmp_path):
    path = write_wav(tmp_path / "song.wav", np.ones(44100), np.zeros(44100))
    samples = mi.load_audio(path)
    assert samples.shape == (16000,) and samples.dtype == torch.float32
    close(samples[100:-100], torch.full((15800,), 0.5), 2e-3)  # resampling rings at the ends


@pytest.mark.parametrize("frames, start, speed, heard", [(73, 0, 1, None), (145, 0, 1, 3), (73, 2, 1.25, 0.8)])
def test_music_window_is_padded_to_the_clip(song, frames, start, speed, heard):
    waveform, seconds = mi.music_window(song, frames, start=start, speed=speed)
    assert len(waveform) == math.ceil((frames / 30 + 0.09) * 16000)
    assert seconds == pytest.approx(heard or frames / 30 + 0.09, abs=1e-3)
    assert waveform[: int(seconds * 16000)].abs().max() > 0.2 and not waveform[math.ceil(seconds * 16000) :].any()


# ------------------------------------------------------------------------------------------------------------------
# train.py
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dance_videos(song, tmp_path_factory):
    """aist/: four clips to train on, two of test songs, one of another camera, one broken; wild/: two, one described."""
    folder = tmp_path_factory.mktemp("videos")
    names = ["gBR_sBM_c01_d01_mBR1_ch01", "gHO_sFM_c10_d04_d02_mHO2_ch02", "gPO_sGR_c01_d07_mPO0_ch03",
             "gKR_sBM_c01_d30_mKR1_ch04", "gBR_sBM_c01_d05_mBR0_ch05", "gHO_sBM_c10_d06_mHO5_ch06",
             "gBR_sBM_c05_d01_mBR1_ch01"]  # fmt: skip
    for i, name in enumerate([f"aist/{name}" for name in names] + ["wild/a", "wild/b"]):
        video = torch.rand(3, 20, 48, 96, generator=torch.Generator().manual_seed(i)) * 2 - 1
        mi.save_video(folder / f"{name}.mp4", video, song=song, start=0.1 * i)
    (folder / "aist" / "gBR_sBM_c01_d02_mBR2_ch09.mp4").write_bytes(b"not a video")
    (folder / "wild" / "a.txt").write_text("a dog on a stage\n")
    return folder


def train_command(weights, videos, out, *arguments, launch=()):
    line = [*launch, os.path.join(HERE, "train.py"), "--data", videos / "aist", "--wild", videos / "wild", "--weights", weights,
            "--device", "cpu", "--layers", "0,2", "--rank", "2", "--steps", "8", "--save-every", "2", "--out", out]  # fmt: skip
    return [sys.executable, *map(str, line), *map(str, arguments)]


def same_file(a, b):
    return a.read_bytes() == b.read_bytes()


def test_training_killed_at_any_moment_ends_as_if_it_never_was(weights, dance_videos, tmp_path):
    whole = subprocess.run(train_command(weights, dance_videos, tmp_path / "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert "skipped  1 of 7 videos" in whole.stdout and "6 clips" in whole.stdout
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(8)) and log[0]["lr"] == 0
    assert log[-1]["right_0.75"] != log[-1]["wrong_0.75"]

    broken = tmp_path / "broken"
    for lines in (1, 4, 7):  # of the log, when it is killed
        process = subprocess.Popen(train_command(weights, dance_videos, broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            (broken / "log.jsonl").exists() and len((broken / "log.jsonl").read_text().splitlines()) >= lines
        ):
            time.sleep(0.02)
        process.kill(), process.wait()
    last = subprocess.run(train_command(weights, dance_videos, broken), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    for name in ("musicinfuser.safetensors", "state.safetensors"):
        assert same_file(tmp_path / "whole" / name, broken / name)
    assert len((broken / "log.jsonl").read_text().splitlines()) == 8
    before = load_file(weights / "musicinfuser.safetensors")
    assert load_file(broken / "musicinfuser.safetensors").keys() == before.keys()


def test_two_processes_train_as_one_with_twice_the_accumulation(weights, dance_videos, tmp_path):
    one = train_command(weights, dance_videos, tmp_path / "one", "--accumulate", 2, "--lr", 0.01)
    two = train_command(weights, dance_videos, tmp_path / "two", "--lr", 0.01, launch=["-m", "torch.distributed.run", "--nproc_per_node", "2"])
    for line in (one, two):
        run = subprocess.run(line, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    one, two = (load_file(tmp_path / name / "musicinfuser.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_a_run_folder_of_another_run_is_refused(weights, dance_videos, tmp_path):
    options = dict(weights=str(weights), device="cpu", steps=2, layers="all", out=str(tmp_path / "run"))
    train.train(str(dance_videos / "aist"), **options, rank=0)
    with pytest.raises(mi.InputError, match="another rank"):
        train.train(str(dance_videos / "aist"), **options, rank=4)
    assert not any("lora" in name for name in load_file(tmp_path / "run" / "musicinfuser.safetensors"))


def test_a_mistake_or_an_option_that_changes_nothing_does_not_lock_the_run_folder(weights, dance_videos, tmp_path):
    options = dict(weights=str(weights), device="cpu", steps=2, rank=2, out=str(tmp_path / "run"))
    for wrong in (dict(data="nowhere"), dict(layers="0,99"), dict(init="nothing.safetensors")):
        with pytest.raises(mi.InputError, match="no such|layers must be"):
            train.train(**{"data": str(dance_videos / "aist"), "layers": "all"} | options | wrong)
    train.train(str(dance_videos / "aist"), layers="all", **options)
    train.train(str(dance_videos / "aist"), layers="all", **options, save_every=1, offload=True)


@pytest.mark.parametrize("option", ["steps=0", "batch=0", "accumulate=0", "beta=0", "half_life=0", "rank=-1", "lr=nan",
                                    "save_every=0", "eval_every=0", "wild_ratio=-1", "caption_dropout=1.5"])  # fmt: skip
def test_numbers_that_cannot_be_are_refused_at_once(option, tmp_path):
    name, value = option.split("=")
    with pytest.raises(mi.InputError, match=f"--{name.replace('_', '-')} must"):
        train.train("nowhere", **{name: float(value), "out": str(tmp_path / "run")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [dict(adapter="add"), dict(random_init=True), dict(window=0, audio_dropout=0.5), dict(beta=1.0),
                                     dict(rank=0, audio_dropout=0.5)])  # fmt: skip
def test_the_ablations_train_and_load(weights, dance_videos, tmp_path, options):
    path = train.train(str(dance_videos / "aist"), weights=str(weights), device="cpu", steps=8, layers="last", top=2,
                       lr=0.01, out=str(tmp_path / "run"), **dict(rank=2) | options)  # fmt: skip
    dit = mi.load_adapter(mi.load_dit(weights / "dit.safetensors"), path)
    assert dit.audio_layers == [1, 2] and dit.window == options.get("window")
    arguments, _ = inputs()
    audio = torch.randn(2, 13, 16)
    assert not torch.equal(dit(*arguments, audio), dit(*arguments, None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_with_offloaded_blocks_gives_the_same_adapter(weights, dance_videos, tmp_path, dtype):
    options = dict(weights=str(weights), device="cpu", steps=3, layers="all", rank=2, lr=0.01, dtype=dtype)
    paths = [train.train(str(dance_videos / "aist"), **options, out=str(tmp_path / f"{o}"), offload=o) for o in (False, True)]
    assert open(paths[0], "rb").read() == open(paths[1], "rb").read()


def test_training_begins_from_an_adapter(weights, dance_videos, tmp_path):
    options = dict(weights=str(weights), device="cpu", layers="0,2", rank=2, steps=1)  # whose learning rate is 0
    given = str(weights / "musicinfuser.safetensors")
    path = train.train(str(dance_videos / "aist"), init=given, out=str(tmp_path / "a"), **options)
    wanted = load_file(given)
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in load_file(path).items())
    with pytest.raises(mi.InputError, match="of shape"):
        train.train(str(dance_videos / "aist"), init=given, out=str(tmp_path / "b"), **options | {"rank": 3})


def test_a_loss_that_is_not_finite_stops_the_run(weights, dance_videos, tmp_path, monkeypatch):
    loss, seen = mi.flow_matching_loss, []

    def breaks(*arguments):
        seen.append(arguments)
        return loss(*arguments) * (math.nan if len(seen) == 3 else 1)

    monkeypatch.setattr(mi, "flow_matching_loss", breaks)
    words = r"not finite at step 2, on .*\.mp4 at frame \d+; the last good checkpoint is .*state\.safetensors"
    with pytest.raises(mi.InputError, match=words):
        train.train(str(dance_videos / "aist"), weights=str(weights), device="cpu", steps=4, layers="all", rank=2,
                    save_every=1, out=str(tmp_path))  # fmt: skip
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"


def test_aist_names_splits_and_prompts(dance_videos):
    training, test = (train.find_videos(dance_videos / "aist", dance_videos / "wild", split) for split in ("train", "test"))
    assert sorted(video["song"] for video in training if video["kind"] == "aist") == ["mBR1", "mBR2", "mHO2", "mKR1", "mPO0"]
    assert sorted(video["song"] for video in test) == ["mBR0", "mHO5"]
    assert [video["prompts"] for video in training if video["kind"] == "wild"] == [["a dog on a stage"], ["a dance video"]]
    first, *_ = train.aist_prompts("gHO_sFM_c10_d04_d02_mHO2_ch02")
    assert first == ("a professional male dancer and a professional female dancer dancing House in an advanced dance setting "
                     "in a studio with a white backdrop, moving front view")  # fmt: skip


def test_a_caption_that_is_empty_or_in_another_encoding(tmp_path):
    for name, text in (("a", b" \n"), ("b", "caf\xe9".encode("latin-1"))):
        (tmp_path / f"{name}.mp4").touch(), (tmp_path / f"{name}.txt").write_bytes(text)
    (tmp_path / "aist").mkdir()
    assert [v["prompts"] for v in train.find_videos(tmp_path / "aist", tmp_path)] == [["a dance video"], ["caf\ufffd"]]


@pytest.mark.parametrize("counts", [(2, 2), (9, 1), (5, 1, 1), (3, 3, 3, 3, 3, 3, 3)])
def test_the_wrong_song_of_a_held_out_clip_is_never_its_own(counts, tmp_path):
    clips = [{"song": song, "entry": tmp_path / f"{song}-{i}"} for song, n in enumerate(counts) for i in range(n)]
    for clip in clips:
        tensors = {"mean": torch.zeros(12, 2, 4, 4), "audio": torch.full((5, 3), float(clip["song"]))}
        mi.save_safetensors(clip["entry"], tensors)
    texts = {train.PLAIN: {"y_feat": torch.zeros(2, 4), "y_mask": torch.ones(2, dtype=torch.bool)}}
    *_, audio, other = train.held_out_rows(clips, texts, mi.Natural(), 0)
    assert audio.shape == other.shape == (min(sum(counts), 16), 5, 3)
    assert (audio != other).all() and {*other.flatten().tolist()} <= {*map(float, range(len(counts)))}
    assert train.held_out_rows(clips[: counts[0]], texts, mi.Natural(), 0) is None


def test_the_hidden_folder_of_a_download_is_no_part_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = train.folder_digest(tmp_path, {})
    (tmp_path / ".cache").mkdir()
    assert train.folder_digest(tmp_path, {}) == before


def test_clips_are_five_a_minute_within_the_middle():
    starts = train.clip_starts(3600, 73, "key")  # two minutes
    assert 8 <= len(starts) <= 10 and starts == train.clip_starts(3600, 73, "key") != train.clip_starts(3600, 73, "other")
    assert min(starts) >= 180 and max(starts) + 73 <= 3420
    assert train.clip_starts(75, 73, "key") == [1] and train.clip_starts(72, 73, "key") == []


def test_a_damaged_cache_entry_is_made_again(weights, dance_videos):
    arguments = str(dance_videos / "cache"), str(weights), (32, 32), 7, 30, "cpu", torch.float32
    videos = train.find_videos(dance_videos / "aist", None)[:1]
    (clip,) = train.cached_clips(videos, *arguments)
    listing = clip["entry"].rpartition("-")[0] + ".json"
    for path in (clip["entry"], listing, str(dance_videos / "cache" / "index.json")):
        good = open(path, "rb").read()
        for bad in (b"", good[: len(good) // 2], b"7"):
            open(path, "wb").write(bad)
            assert train.cached_clips(videos, *arguments) == [clip]
            assert open(path, "rb").read() == good


def test_cuts_of_one_pass_are_the_clips():
    frames = (np.full((2, 2, 3), i, np.uint8) for i in range(20))
    clips = dict(train.cut(frames, [3, 5, 12], 7))
    assert {start: clip[0, 0, :, 0, 0].add(1).mul(127.5).round().tolist() for start, clip in clips.items()} == {
        start: list(range(start, start + 7)) for start in (3, 5, 12)
    }


def test_the_learning_rate_warms_up_and_falls():
    rates = [train.learning_rate(step, 4000, 1e-4, 200) for step in (0, 100, 200, 2100, 4000)]
    assert np.allclose(rates, [0, 5e-5, 1e-4, 5e-5, 0])


def test_the_papers_choices_of_layers():
    assert mi.choose_layers("even", 48, 4) == [6, 18, 30, 42]
    assert mi.choose_layers("first", 6, 2) == [0, 1] and mi.choose_layers("middle", 6, 2) == [2, 3]
    assert mi.choose_layers("last", 6, 2) == [4, 5] and mi.choose_layers("all", 6) == list(range(6))


# ------------------------------------------------------------------------------------------------------------------
# adaptability.py: the command line, then the formulas
# ------------------------------------------------------------------------------------------------------------------

ADAPT_PROMPTS = (PROMPT, "the person dances")
ADAPT_METRIC = "def score(video):\n    return 100 * float(video[0].square().mean())\n"


def adapt_command(weights, folder, *arguments, out="run"):
    """Run adaptability.py in `folder`, which holds a metric, measured:score, for two prompts and two seeds."""
    (folder / "measured.py").write_text(ADAPT_METRIC)
    line = [sys.executable, os.path.join(HERE, "adaptability.py"), "--weights", weights, "--device", "cpu",
            "--out", out, "--metric", "measured:score", "--prompts", *ADAPT_PROMPTS, "--seed", 0, 1, *arguments]  # fmt: skip
    return subprocess.run(list(map(str, line)), cwd=folder, capture_output=True, text=True)


def frames_of(path):  # (T, H, W, 3)
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack([*iter(reader)])


@pytest.fixture(scope="module")
def ranked(weights, tmp_path_factory):
    """What `python adaptability.py --keep` did: its result and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("ranked")
    return adapt_command(weights, folder, "--keep"), folder


@pytest.fixture
def spy(monkeypatch):
    """--metric spy:score, which notes the videos that it sees."""
    module = types.ModuleType("spy")
    module.seen = []
    module.score = lambda video: module.seen.append(video) or video.mean()
    monkeypatch.setitem(sys.modules, "spy", module)
    return module


def adapt(weights, out, **options):
    settings = dict(weights=str(weights), out=str(out), prompts=ADAPT_PROMPTS, seeds=(0, 1), metric="spy:score", device="cpu")
    return adaptability.rank(**settings | options)


def test_the_ranking_of_the_command_line(ranked, weights):
    result, folder = ranked
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"weights  {weights}, no adapter\ndevice   cpu, float32\nvideo    32x32, 7 frames")
    found = json.loads((folder / "run" / "adaptability.json").read_text())
    kept = [json.loads(path.read_text()) for path in (folder / "run" / "kept").glob("[bl]*.json")]
    scores = {(k["layer"], k["prompt"], k["seed"]): k["score"] for k in kept}
    pairs = [(prompt, seed) for prompt in ADAPT_PROMPTS for seed in (0, 1)]
    assert len(kept) == 16 and set(scores) == {(layer, *pair) for layer in (None, 0, 1, 2) for pair in pairs}
    gains = np.array([[scores[layer, *pair] - scores[None, *pair] for pair in pairs] for layer in range(3)])
    assert found["adaptability"] == pytest.approx(gains.mean(1))
    assert found["standard_error"] == pytest.approx(gains.std(1, ddof=1) / 2)  # of paired differences
    assert found["baseline"] == pytest.approx(np.mean([scores[None, *pair] for pair in pairs]))
    assert found["ranking"] == gains.mean(1).argsort()[::-1].tolist() and len(set(gains.mean(1))) == 3
    assert found["prompts"] == list(ADAPT_PROMPTS) and found["seeds"] == [0, 1] and found["metric"] == "measured:score"
    best, second, _ = found["ranking"]
    assert train.pick_layers(str(folder / "run" / "adaptability.json"), 3, weights, None) == [best]
    assert train.pick_layers(str(folder / "run" / "adaptability.json"), 3, weights, 2) == sorted([best, second])
    assert f"rank 1 (layer {best}) against rank 2 (layer {second})" in result.stdout
    assert sum(line.endswith(" *") for line in result.stdout.splitlines()) == 2  # in the table and in the chart


def test_kept_videos_are_those_that_were_scored_and_silent(ranked):
    names = sorted(path.stem for path in (ranked[1] / "run" / "videos").iterdir())
    kept = sorted((ranked[1] / "run" / "kept").glob("[bl]*.json"))
    assert names == [path.stem for path in kept] and len(names) == 16
    path = ranked[1] / "run" / "videos" / f"{names[0]}.mp4"
    frames = frames_of(path)
    assert frames.shape == (7, 32, 32, 3)
    with pytest.raises(mi.InputError, match="has no sound"):
        mi.load_audio(path)
    red = frames[..., 0] / 127.5 - 1
    assert 100 * np.square(red).mean() == pytest.approx(json.loads(kept[0].read_text())["score"], rel=0.3)


def test_a_video_that_is_there_is_never_made_again(ranked, weights, tmp_path):
    kept = sorted((ranked[1] / "run" / "kept").glob("[bl]*.json"))
    whole = (ranked[1] / "run" / "adaptability.json").read_bytes()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept}
    lost, damaged = kept[3], kept[8]
    content = damaged.read_text()
    lost.unlink(), damaged.write_text(content[: len(content) // 2])
    dry = adapt_command(weights, ranked[1], "--dry-run")
    again = adapt_command(weights, ranked[1])
    assert dry.returncode == again.returncode == 0, dry.stderr + again.stderr
    made = {path for path in kept if (path.stat().st_mtime_ns, path.stat().st_ino) != before[path]}
    assert made == {lost, damaged} and lost.name.startswith("baseline") and damaged.name.startswith("layer-")
    assert (
        "88 forward passes for 16 videos; 14 videos are there, 10 passes are left" in dry.stdout
    )  # 2 steps of 2 and 3
    left, right = json.loads(whole), json.loads((ranked[1] / "run" / "adaptability.json").read_text())
    assert left["adaptability"] == pytest.approx(right["adaptability"]) and left["ranking"] == right["ranking"]
    (ranked[1] / "run" / "adaptability.json").write_bytes(whole)


def test_processes_that_share_the_layers_end_with_the_same_file(ranked, weights):
    for layers, ends in (("2", False), ("0-1", True)):
        result = adapt_command(weights, ranked[1], "--layers", layers, out="split")
        assert result.returncode == 0, result.stderr
        assert ("layers 0, 1 are missing" in result.stdout) != ends
        assert (ranked[1] / "split" / "adaptability.json").exists() == ends
    paths = [ranked[1] / name / "adaptability.json" for name in ("run", "split")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "4 videos are there" in result.stdout  # the baseline's


def test_a_dry_run_leaves_nothing(weights, tmp_path, capsys):
    assert adapt(weights, tmp_path / "run", metric="imaging", cfg=1, layers="1", steps=5, dry_run=True) is None
    assert "60 forward passes for 8 videos; 0 videos are there, 60 passes are left" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_videos_are_those_of_a_second_solver(spy, weights, tmp_path):
    adapt(weights, tmp_path, skip_scale=0.7, cfg=2.5, steps=4, batch=3)
    dit, decoder = mi.load_dit(weights / "dit.safetensors"), mi.load_decoder(weights / "decoder.safetensors")
    *texts, null = mi.encode_text(weights, [*ADAPT_PROMPTS, ""])
    sigmas = mi.linear_quadratic_schedule(4).tolist()
    wanted = []
    for layer in (0, 1, 2, None):
        for prompt, text in zip(ADAPT_PROMPTS, texts):
            for seed in (0, 1):
                generator = torch.Generator().manual_seed(adaptability.noise_seed(prompt, seed))
                x = torch.randn(1, 12, 2, 4, 4, generator=generator)
                for now, then in zip(sigmas, sigmas[1:]):
                    cond, uncond = (dit(x, torch.tensor([now]), *t) for t in (text, null))
                    without = cond if layer is None else dit(x, torch.tensor([now]), *text, skip=(layer,))
                    x = x + (now - then) * (uncond + 2.5 * (cond - uncond) + 0.7 * (cond - without))
                wanted.append(decoder(mi.to_vae_space(x))[0].clamp(-1, 1))
    close(torch.stack(spy.seen), torch.stack(wanted), 1e-3)
    assert min((a - b).abs().mean() for i, a in enumerate(wanted) for b in wanted[:i]) > 0.01


def test_without_guidance_every_layer_is_the_baseline(spy, weights, tmp_path, capsys):
    result = adapt(weights, tmp_path, skip_scale=0.0)
    layers, baseline = spy.seen[:12], spy.seen[12:]
    assert all(torch.equal(video, baseline[i % 4]) for i, video in enumerate(layers)) and len(baseline) == 4
    assert not any(result["adaptability"]) and not any(result["standard_error"])
    assert "no number of videos a layer would do" in capsys.readouterr().out


def test_what_is_kept_depends_on_all_that_makes_a_video(spy, weights, tmp_path):
    few = dict(prompts=ADAPT_PROMPTS[:1], seeds=(0,), layers="1", steps=2)
    adapt(weights, tmp_path, **few)
    changes = [dict(steps=3), dict(cfg=2.0), dict(size=(16, 32)), dict(frames=13), dict(dtype="bfloat16"),
               dict(seeds=(1,)), dict(prompts=ADAPT_PROMPTS[1:]), dict(skip_scale=2.0), dict(layers="2"), {}]  # fmt: skip
    for change in changes:
        spy.seen.clear()
        adapt(weights, tmp_path, **few | change)
        layer_only = {"skip_scale", "layers"} & change.keys()  # the baseline stays
        assert len(spy.seen) == (1 if layer_only else 2 if change else 0), change


def test_the_noise_is_that_of_sample_py(spy, weights, tmp_path, monkeypatch):
    import sample

    song = tmp_path / "song.wav"
    mi.ffmpeg("-f", "lavfi", "-i", "sine=440:duration=1", song)
    adapt(weights, tmp_path / "run", prompts=ADAPT_PROMPTS[:1], seeds=(3,), layers="1")
    monkeypatch.setattr(mi, "save_video", lambda path, video, *_: spy.seen.append(video.clamp(-1, 1)))
    sample.generate(str(song), PROMPT, weights=str(weights), adapter="none", skip=[1], device="cpu", out=str(tmp_path),
                    seeds=[adaptability.noise_seed(PROMPT, 3)])  # fmt: skip
    close(spy.seen[0], spy.seen[2], 1e-5)


# ------------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------------


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_known_gaussians():
    turn, _ = torch.linalg.qr(randn(5, 5))
    a, b = torch.tensor([1.0, 4, 9, 0.25, 0]).double(), torch.tensor([4.0, 1, 0, 0.25, 16]).double()  # both singular
    mean = torch.arange(5.0).double()
    found = adaptability.frechet_distance(mean, turn * a @ turn.T, mean - 2, turn * b @ turn.T)
    assert found == pytest.approx(20 + (a.sqrt() - b.sqrt()).square().sum().item())  # they commute
    x, y = randn(40, 3), randn(50, 3, seed=1) @ randn(3, 3, seed=2) + 1  # these do not: the root by its definition
    (m, cov_x), (n, cov_y) = adaptability.gaussian([x[:10], x[10:]]), adaptability.gaussian([y])
    assert np.allclose(cov_x, np.cov(x.T)) and np.allclose(m, x.mean(0))
    values, vectors = np.linalg.eig((cov_x @ cov_y).numpy())
    root = vectors @ np.diag(np.sqrt(values)) @ np.linalg.inv(vectors)
    assert np.allclose(root @ root, cov_x @ cov_y)
    wanted = (m - n).square().sum().item() + np.trace((cov_x + cov_y).numpy() - 2 * root)
    assert adaptability.frechet_distance(m, cov_x, n, cov_y) == pytest.approx(float(wanted))
    assert adaptability.frechet_distance(m, cov_x, m, cov_x) == pytest.approx(0, abs=1e-9)


def test_features_are_what_the_encoder_projects(weights):
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    video = randn(3, 13, 32, 48).float().clamp(-1, 1)
    found = adaptability.features(video, encoder)
    assert found.shape == (3, 8)
    projected = torch.cat(encoder(video[None]), 1)[0].mean(
        (2, 3)
    )  # the projection has no bias, so it and the mean swap
    close(found @ encoder.output_proj.weight.T, projected.T, 1e-4)
    assert not encoder.output_proj._forward_pre_hooks


def brute(score, baseline, layer):
    n = len(layer)
    left = [score(np.delete(layer, i, 0)) - score(np.delete(baseline, i, 0)) for i in range(n)]
    return score(layer) - score(baseline), math.sqrt((n - 1) / n * np.square(np.array(left) - np.mean(left)).sum())


@pytest.mark.parametrize("kind", ["mean", "frechet"])
def test_standard_errors_are_the_jackknifes(kind):
    data = randn(4, 7, 6, 3) * torch.tensor([1.0, 1.2, 0.6, 0.8])[:, None, None, None] + 0.3 * randn(1, 7, 6, 3, seed=1)
    if kind == "mean":
        numbers = data.mean((2, 3))
        measured, brute_score = numbers.tolist(), np.mean
        data, score = numbers.numpy(), lambda videos: sum(videos) / len(videos)
    else:
        wanted = torch.zeros(3).double(), torch.eye(3).double()
        score = lambda videos: -adaptability.frechet_distance(*adaptability.gaussian(videos), *wanted)  # noqa: E731
        measured = [list(layer) for layer in data]

        def brute_score(videos):
            rows = videos.reshape(-1, 3)
            values = np.linalg.eigvalsh(np.cov(rows.T))
            return -np.square(rows.mean(0)).sum() - np.square(np.sqrt(values) - 1).sum()

        data = data.numpy()
    result, gaps = adaptability.compare(score, measured[0], measured[1:])
    for layer in range(3):
        wanted_gain, wanted_error = brute(brute_score, data[0], data[layer + 1])
        assert result["adaptability"][layer] == pytest.approx(wanted_gain)
        assert result["standard_error"][layer] == pytest.approx(wanted_error)
    best, second, _ = result["ranking"]
    assert gaps[0] == pytest.approx(brute(brute_score, data[second + 1], data[best + 1]))
    if kind == "mean":
        difference = data[1] - data[0]
        assert result["standard_error"][0] == pytest.approx(difference.std(ddof=1) / math.sqrt(7))


def test_one_video_has_no_error(spy, weights, tmp_path, capsys):
    result = adapt(weights, tmp_path, prompts=ADAPT_PROMPTS[:1], seeds=(0,))
    assert result["standard_error"] == [None] * 3 and "± ?" in (out := capsys.readouterr().out)
    assert "one video tells nothing of the error" in out
    assert json.loads((tmp_path / "adaptability.json").read_text())["standard_error"] == [None] * 3


@pytest.mark.parametrize("spread, words", [(0.01, "told apart"), (2.0, "not told apart; about 36 videos a layer")])
def test_the_report_says_whether_ranks_can_be_told_apart(capsys, spread, words):
    result = {"ranking": [2, 0, 1], "adaptability": (0.5, -1.0, 1.5), "standard_error": (0.1,) * 3, "baseline": 7.0}
    adaptability.report(result, [(1.0, spread / 2), (1.5, 0.1)], 1, 9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["2", "0", "1"] and "+1.500 ± 0.100  *" in lines[2]
    chart = lines[lines.index("layer") + 1 :][:3]
    bars = [line[7:] for line in chart]  # a cell is 2.5 / 40
    assert (
        bars[0] == " " * 16 + "|" + 8 * "█"
        and bars[1] == 16 * "█" + "|"
        and bars[2] == " " * 16 + "|" + 24 * "█" + " *"
    )
    assert f"rank 1 (layer 2) against rank 2 (layer 0): +1.000 ± {spread / 2:.3f}, {words}" in lines[-1]
    assert lines[-2].startswith("2 of 2" if spread < 1 else "1 of 2")


def clips(seed, frames=7):  # three videos
    return [torch.rand(3, frames, 32, 32, generator=torch.Generator().manual_seed(seed + i)) * 2 - 1 for i in range(3)]


def test_frechet_with_a_folder_of_clips_and_with_the_weights_own(weights, tmp_path):
    for i, clip in enumerate(clips(0, 9) + clips(9, 5)):  # the last three are too short
        mi.save_video(tmp_path / "clips" / "deeper" / f"{i}.mp4", clip)
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    found = adapt(weights, tmp_path / "run", metric=None, reference=str(tmp_path / "clips"))
    assert found["metric"] == "frechet"
    seen = [
        torch.from_numpy(frames_of(p)[:7]).permute(3, 0, 1, 2) / 127.5 - 1 for p in sorted(tmp_path.rglob("[012].mp4"))
    ]
    tensors, metadata = adaptability.reference_statistics(seen, encoder)
    assert metadata["clips"] == "3"

    own = tmp_path / "own"
    own.mkdir()
    for path in weights.iterdir():
        (own / path.name).symlink_to(path)
    mi.save_safetensors(own / "reference.safetensors", tensors, metadata)
    again = adapt(own, tmp_path / "run", metric=None)  # scores are of the same kept features
    assert again["metric"] == "frechet" and again["reference"] is None
    assert again["adaptability"] == pytest.approx(
        found["adaptability"], abs=1e-3 * max(map(abs, found["adaptability"]))
    )
    kept = {}
    for path in (tmp_path / "run" / "kept").glob("[bl]*.safetensors"):
        kept.setdefault(path.name[:8], []).append(mi.read_safetensors(path)[0]["features"])
    distances = {key: adaptability.frechet_distance(*adaptability.gaussian(value), tensors["mean"], tensors["cov"])
                 for key, value in kept.items()}  # fmt: skip
    baseline = distances["baseline"]
    assert again["baseline"] == pytest.approx(-baseline)
    assert again["adaptability"] == pytest.approx(
        [baseline - distances[f"layer-{layer:02d}"] for layer in range(3)], abs=1e-9
    )


@pytest.mark.parametrize("metric, size, seen", [("imaging", (600, 1024), (300, 512)), ("imaging", (48, 32), (48, 32)),
                                                ("aesthetic", (600, 1024), (600, 1024))])  # fmt: skip
def test_pyiqa_scores_frames_as_vbench_does(monkeypatch, metric, size, seen):
    asked, shapes = [], []

    def model(frame):
        shapes.append(tuple(frame.shape))
        return frame.mean()[None, None]

    fake = types.ModuleType("pyiqa")
    fake.create_metric = lambda name, device: asked.append(name) or model
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    video = torch.linspace(-1, 1, 5)[None, :, None, None].expand(3, 5, *size)
    assert adaptability.image_quality(metric, "cpu")(video * 0.5 + 0.5) == pytest.approx(0.75)  # of pixels in [0, 1]
    assert shapes == 5 * [(1, 3, *seen)] and asked == [{"imaging": "musiq-spaq", "aesthetic": "laion_aes"}[metric]]


# ------------------------------------------------------------------------------------------------------------------
# Bad inputs
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    (dict(layers="0-3"), "layers from 0 to 2"), (dict(layers="2-1"), "layers"), (dict(layers="even"), "ranges such as"),
    (dict(prompts=()), "no prompts"), (dict(prompts=("a", " ")), "an empty one"), (dict(seeds=(-1,)), "numbers from 0"),
    (dict(seeds=()), "numbers from 0"), (dict(top=4), "from 1 to 3"), (dict(top=0), "from 1 to 3"),
    (dict(batch=0), "1 or more"),
    (dict(metric="musiq"), "not imaging, aesthetic, frechet or some module:function"),
    (dict(metric="no_such_module:f"), "cannot be imported .ModuleNotFoundError"),
    (dict(metric="spy:nothing"), "cannot be imported .AttributeError"), (dict(metric="spy:seen"), "not a function"),
    (dict(metric="frechet"), "needs --reference"), (dict(reference="."), "is for --metric frechet"),
    (dict(metric="frechet", reference="none"), "no video below"), (dict(weights="none"), "no such file"),
    (dict(frames=8), "7 or 13"), (dict(size=(32, 40)), "multiples of 16"), (dict(steps=1), "2 or more"),
    (dict(skip_scale=math.nan), "must be a number"),
])  # fmt: skip
def test_bad_input_is_said_before_anything_is_sampled(spy, weights, tmp_path, options, words):
    with pytest.raises(mi.InputError, match=words):
        adapt(**dict(weights=weights, out=tmp_path / "run") | options)
    assert not spy.seen


@pytest.mark.parametrize("metric", ["imaging", "aesthetic"])
def test_a_missing_pyiqa_is_one_line_before_anything_is_sampled(weights, tmp_path, monkeypatch, metric):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setattr(
        mi, "load_dit", lambda path, device="cpu", *_, load=mi.load_dit: load(path, {"meta": "meta"}[device])
    )
    with pytest.raises(mi.InputError, match=f"--metric {metric} needs pyiqa .*pip install pyiqa"):
        adapt(weights, tmp_path, metric=metric)


@pytest.mark.parametrize("value", ["high", None, math.nan, [1, 2]])
def test_a_metric_that_gives_no_number_is_one_line(spy, weights, tmp_path, value):
    spy.score = lambda video: value
    with pytest.raises(mi.InputError, match=r'(fails on|gives nan for) layer 0, "a dog dancing in the park", seed 0'):
        adapt(weights, tmp_path)
    assert not list(tmp_path.rglob("layer-*"))


@pytest.mark.parametrize("damage", [
    lambda t, m: ({"mean": t["mean"][:5], "cov": t["cov"]}, m), lambda t, m: ({"mean": t["mean"]}, m),
    lambda t, m: ({k: v * math.nan for k, v in t.items()}, m), lambda t, m: (t, m | {"feature": "another"}),
])  # fmt: skip
def test_a_reference_that_does_not_fit_is_one_line(weights, tmp_path, damage):
    for path in weights.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors, metadata = adaptability.reference_statistics(clips(0), mi.load_encoder(weights / "encoder.safetensors"))
    mi.save_safetensors(tmp_path / "reference.safetensors", *damage(tensors, metadata))
    with pytest.raises(mi.InputError, match="reference.safetensors"):
        adapt(tmp_path, tmp_path / "run", metric=None)
    assert not list(tmp_path.rglob("layer-*"))


def test_bad_input_of_the_command_line_is_one_line(weights, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    for arguments in (["--prompts-file", "none.txt"], ["--prompts-file", "blank.txt"], ["--out", "blank.txt/out"]):
        line = [sys.executable, os.path.join(HERE, "adaptability.py"), "--weights", weights, "--metric", "math:fsum"]
        result = subprocess.run([*line, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode != 0 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["blank.txt"]


@pytest.mark.parametrize("text", ["", "[0, 1, 2]", "{}", '{"ranking": [0, 1]}', '{"ranking": [0, 1, 1]}',
                                  '{"ranking": 3}', '{"ranking": ["a", 1, 2]}', '{"ranking": [0, 1, 2, 3]}',
                                  "\0"])  # fmt: skip
def test_a_ranking_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "ranking.json"
    path.write_text(text)
    with pytest.raises(mi.InputError, match="is not a ranking of this model's layers"):
        train.pick_layers(str(path), 3, str(tmp_path), None)


def test_the_default_layers_are_the_folders_ranking(tmp_path):
    assert train.pick_layers(None, 48, str(tmp_path), None) == list(mi.MUSICINFUSER_LAYERS)
    with pytest.raises(mi.InputError, match="name --layers"):
        train.pick_layers(None, 3, str(tmp_path), None)
    for depth in (48, 6):
        mi.save_json(tmp_path / "adaptability.json", {"ranking": list(range(depth))[::-1]})
        third = depth // 3
        assert train.pick_layers(None, depth, str(tmp_path), None) == list(range(depth - third, depth))
        assert train.pick_layers(None, depth, str(tmp_path), 2) == [depth - 2, depth - 1]
    for top in (0, -1, 7):
        with pytest.raises(mi.InputError, match="from 1 to 6"):
            train.pick_layers(None, 6, str(tmp_path), top)
