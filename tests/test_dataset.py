"""AIST's names and split, clips, the cache, and what a batch is."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MEAN, ROOT, STD, write_wav

import musicinfuser as mi
from dataset import aist, clips
from dataset.batches import Batch, Samples, stack
from dataset.cache import Cache, Index
from dataset.clips import Preprocessor, clip_starts, cut, video_size

# ------------------------------------------------------------------------------------------------
# Names, split, prompts
# ------------------------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_the_split_is_by_camera_and_song(dance_videos):
    folders = dance_videos / "aist", dance_videos / "wild"
    training = aist.find_videos(*folders)
    test = aist.find_videos(*folders, "test")
    songs = [video.song for video in training if video.kind == "aist"]
    assert sorted(songs) == ["mBR1", "mBR2", "mHO2", "mKR1", "mPO0"]
    assert sorted(video.song for video in test) == ["mBR0", "mHO5"]


def test_no_wild_video_is_one_of_the_others_or_of_a_song_that_is_held_out(tmp_path):
    held_out = [f"gBR_sBM_c05_d01_{song}_ch01.mp4" for song in aist.TEST_SONGS]
    others = "gBR_sBM_c01_d01_mBR1_ch01.mp4", "gBR_sBM_c02_d01_mBR1_ch01.mp4"
    touch(tmp_path, *(f"aist/{name}" for name in others), "wild/a.mp4")
    touch(tmp_path, *(f"elsewhere/{name}" for name in (*held_out, others[1])))
    (tmp_path / "wild" / "link.mp4").symlink_to(tmp_path / "aist" / others[0])
    found = aist.find_videos(tmp_path / "aist", tmp_path)
    names = [(video.kind, os.path.relpath(video.path, tmp_path)) for video in found]
    wild = [("wild", f"elsewhere/{others[1]}"), ("wild", "wild/a.mp4")]
    assert names == [("aist", f"aist/{others[0]}"), *wild]
    touch(tmp_path, "aist/wild/b.mp4")
    found = aist.find_videos(tmp_path / "aist", tmp_path / "aist")
    assert [video.kind for video in found] == ["aist", "wild"]


def test_one_song_of_each_genre_is_held_out():
    songs = "mLH4 mKR2 mBR0 mLO2 mJB5 mWA0 mJS3 mMH3 mHO5 mPO1"  # of the authors' scripts
    assert sorted(aist.TEST_SONGS) == sorted(songs.split())
    assert {song[1:3] for song in aist.TEST_SONGS} == set(aist.GENRES)


def test_prompts_say_who_dances_what_where_and_seen_from_where():
    first, *others = aist.prompts("gHO_sFM_c10_d04_d02_mHO2_ch02")
    assert first == (
        "a professional male dancer and a professional female dancer dancing House "
        "in an advanced dance setting in a studio with a white backdrop, moving front view"
    )
    for prompt in others:
        for words in ("House", "advanced dance setting", "white backdrop", "moving front view"):
            assert words in prompt


def test_an_unknown_dancer_is_named_as_the_authors_do():
    prompt = aist.prompts("gBR_sGR_c01_d36_d01_d30_mBR1_ch01")[0]
    who = "a professional unknown dancer, a professional female dancer and a professional male"
    assert prompt.startswith(who)


def test_captions_of_other_videos(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4")
    (tmp_path / "a.txt").write_bytes(b" \n")
    (tmp_path / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfa dog dances\r\n")
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "e.txt").symlink_to("nowhere")
    videos = aist.find_videos(tmp_path / "none", tmp_path)
    nothing = ("a YouTube dance video",)
    wanted = [nothing, ("caf\ufffd",), ("a dog dances",), nothing, nothing]
    assert [video.prompts for video in videos] == wanted
    assert {video.plain for video in videos} == {"a dance video"}


def test_folders_that_are_called_videos_and_missing_folders(tmp_path):
    touch(tmp_path, "folder.mp4/inside.mp4", "notes.txt", "UPPER.MP4")
    found = [os.path.relpath(path, tmp_path) for path in aist.list_videos(tmp_path)]
    assert found == ["UPPER.MP4", "folder.mp4/inside.mp4"]
    with pytest.raises(mi.InputError, match="no such folder"):
        aist.list_videos(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------
# Clips
# ------------------------------------------------------------------------------------------------


def test_clips_are_five_a_minute_within_the_middle():
    starts = clip_starts(3600, 73, 30, "content")  # two minutes
    assert 8 <= len(starts) <= 10
    assert starts == clip_starts(3600, 73, 30, "content") != clip_starts(3600, 73, 30, "other")
    assert min(starts) >= 180 and max(starts) + 73 <= 3420
    assert clip_starts(75, 73, 30, "content") == [1]
    assert clip_starts(72, 73, 30, "content") == []


def test_the_minutes_are_counted_at_the_callers_fps():
    at_30, at_10 = (
        len(clip_starts(18000, 7, fps, "content")) for fps in (30, 10)
    )  # 10, 30 minutes
    assert 45 <= at_30 <= 50 and 140 <= at_10 <= 150


def test_cuts_of_one_pass_are_the_clips():
    frames = (np.full((2, 2, 3), i, np.uint8) for i in range(20))
    found = dict(cut(frames, [3, 5, 12], 7))
    for start, clip in found.items():
        numbers = clip[0, 0, :, 0, 0].add(1).mul(127.5).round().tolist()
        assert numbers == list(range(start, start + 7))
    assert list(found) == [3, 5, 12]
    assert next(frames)[0, 0, 0] == 19  # it does not read on


CLIPS = {"size": (32, 32), "frames": 7, "fps": 30}


def preprocessor(folder, weights, **given):
    return Preprocessor(str(folder), str(weights), **CLIPS | given)


@pytest.fixture
def videos(dance_videos):
    """Those that can be read."""
    found = aist.find_videos(dance_videos / "aist", dance_videos / "wild")
    return [video for video in found if "ch09" not in video.path]


def test_clips_of_all_videos_and_what_is_skipped(weights, videos, tmp_path, capsys):
    touch(tmp_path, "broken.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "link.mp4").symlink_to("nowhere")
    (tmp_path / "folder.mp4").mkdir()
    bad = [aist.Video(str(path), "wild", "", ()) for path in sorted(tmp_path.glob("*.mp4"))]
    prep = preprocessor(tmp_path / "cache", weights)
    found = prep.clips(videos + bad)
    assert len(found) == 6
    assert [clip.video for clip in found] == videos
    said = capsys.readouterr().out
    assert "skipped  4 of 10 videos" in said
    for name in ("broken.mp4", "link.mp4", "folder.mp4", "text.mp4"):
        assert name in said
    latents, music = prep.cache.read(found[0].latents), prep.cache.read(found[0].music)
    assert latents["mean"].shape == latents["logvar"].shape == (12, 2, 4, 4)
    assert music["audio"].ndim == 2 and music["audio"].shape[1] == 16


def test_small_videos_are_left_out_unless_allowed(weights, videos, tmp_path, capsys):
    assert video_size(videos[0].path) == (48, 96)
    assert preprocessor(tmp_path, weights, size=(64, 64)).clips(videos[:2]) == []
    said = capsys.readouterr().out
    # Of which AIST's crop shows two thirds: 64x64 of a picture of 96x97
    assert "is 48x96, smaller than 96x97 (see --min-size)" in said
    assert "skipped  2 of 2 videos" in said
    allowed = preprocessor(tmp_path, weights, size=(64, 64), min_size=(48, 96))
    assert len(allowed.clips(videos[:2])) == 2


def ramps_and_chirp(folder, seconds=4):
    """The path of an AIST video of 96x48, of 60 fps as those are, in whose picture red rises to the
    right, green downwards and blue with time, and in whose song the pitch rises: 200 Hz and 200
    more each second."""
    t = np.arange(44100 * seconds) / 44100
    song = write_wav(folder / "chirp.wav", 0.5 * np.sin(2 * np.pi * (200 + 100 * t) * t))
    blue, green, red = torch.meshgrid(
        torch.linspace(-1, 1, 60 * seconds),
        torch.linspace(-1, 1, 48),
        torch.linspace(-1, 1, 96),
        indexing="ij",
    )
    path = folder / "gBR_sBM_c01_d01_mBR1_ch01.mp4"
    mi.save_video(path, torch.stack([red, green, blue]), 60, song)
    return str(path)


# Left, right, top and bottom of what is shown, in a picture from -1 to 1: AIST's crop and then its
# middle, or the middle alone
SHOWN = {"aist": (-1 / 3, 1 / 3, -1 / 2, 5 / 6), "wild": (-1 / 2, 1 / 2, -1, 1)}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_clip_has_the_pictures_and_the_sound_of_its_own_place(
    weights, tmp_path, monkeypatch, kind
):
    video = aist.Video(ramps_and_chirp(tmp_path), kind, "", ("",))
    forward, listen, seen, heard = mi.Encoder.forward, mi.AudioEncoder.__call__, [], []

    def encode_video(self, pixels):
        seen.append(pixels[0])
        return forward(self, pixels)

    def encode_music(self, waveform):
        heard.append(waveform)
        return listen(self, waveform)

    monkeypatch.setattr(mi.Encoder, "forward", encode_video)
    monkeypatch.setattr(mi.AudioEncoder, "__call__", encode_music)
    monkeypatch.setattr(clips, "clip_starts", lambda *_: [15, 75])
    preprocessor(tmp_path / "cache", weights).clips([video])
    left, right, top, bottom = SHOWN[kind]
    for start, pixels, waveform in zip((15, 75), seen, heard, strict=True):
        red, green, blue = pixels[0, 3, 16], pixels[1, 3, :, 16], pixels[2, :, 16, 16]
        assert abs(red[0] - left) < 0.1 and abs(red[-1] - right) < 0.1
        assert abs(green[0] - top) < 0.1 and abs(green[-1] - bottom) < 0.1
        times = torch.arange(start, start + 7) / 119 * 2 - 1
        assert (blue - times).abs().max() < 0.06  # 0.12 s; colours are coded roughly
        length = len(waveform) / 16000
        pitch = ((waveform[1:] > 0) != (waveform[:-1] > 0)).sum().item() / 2 / length
        assert abs(length - (7 / 30 + 0.09)) < 1e-3
        assert abs(pitch - (200 + 200 * (start / 30 + length / 2))) < 10  # 0.05 s


def with_sound(folder, seconds):
    """A video of 4 s whose sound lasts so long; 0: none."""
    silent, path = folder / "silent.mp4", folder / f"{seconds}.mp4"
    noise = torch.rand(3, 120, 48, 96, generator=torch.Generator().manual_seed(9))
    mi.save_video(silent, noise * 2 - 1)
    if not seconds:
        return str(silent)
    song = write_wav(folder / "song.wav", 0.5 * np.sin(np.arange(int(44100 * seconds)) / 20))
    with open(path, "wb") as file:
        how = "-map 0:v -map 1:a -c:v copy -c:a aac -f mp4 -movflags frag_keyframe -"
        file.write(mi.ffmpeg(silent, "-i", song, *how.split()))
    return str(path)


def test_clips_that_begin_after_the_sound_are_left_out_alone(weights, tmp_path, monkeypatch):
    work = count_work(monkeypatch)
    monkeypatch.setattr(clips, "clip_starts", lambda *_: [0, 20, 90])
    video = aist.Video(with_sound(tmp_path, 2), "wild", "", ("",))
    for _ in range(2):
        found = preprocessor(tmp_path / "cache", weights).clips([video])
        assert [clip.start for clip in found] == [0, 20]
    assert work == {"video": 2, "music": 2}


def test_a_silent_video_is_not_encoded(weights, tmp_path, monkeypatch, capsys):
    work = count_work(monkeypatch)
    video = aist.Video(with_sound(tmp_path, 0), "wild", "", ("",))
    assert preprocessor(tmp_path / "cache", weights).clips([video]) == []
    assert "has no sound" in capsys.readouterr().out and not work


def count_work(monkeypatch):
    """Counter of how often the encoders are asked."""
    work = Counter()
    forward, listen, encode = mi.Encoder.forward, mi.AudioEncoder.__call__, mi.encoded_texts

    def encode_video(self, *arguments):
        work["video"] += 1
        return forward(self, *arguments)

    def encode_music(self, waveform):
        work["music"] += 1
        return listen(self, waveform)

    def encode_texts(*arguments):
        for features in encode(*arguments):
            work["text"] += 1
            yield features

    monkeypatch.setattr(mi.Encoder, "forward", encode_video)
    monkeypatch.setattr(mi.AudioEncoder, "__call__", encode_music)
    monkeypatch.setattr(mi, "encoded_texts", encode_texts)
    return work


def another(weights, folder, change):
    """A copy of the weights folder in which one file's first tensor is another."""
    os.makedirs(folder)
    for name in os.listdir(weights):
        os.symlink(weights / name, folder / name)
    path = folder / change
    top = folder / change.split("/")[0]
    if top != path:
        top.unlink()
        top.mkdir()
        for name in os.listdir(weights / top.name):
            os.symlink(weights / top.name / name, top / name)
    tensors, metadata = mi.read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(tensors.values())).add_(1)
    path.unlink()
    mi.save_safetensors(path, tensors, metadata)
    return folder


def test_another_audio_encoder_neither_moves_a_clip_nor_runs_the_vae(
    weights, videos, tmp_path, monkeypatch
):
    work = count_work(monkeypatch)
    before = preprocessor(tmp_path / "cache", weights).clips(videos[:2])
    assert work == {"video": 2, "music": 2}
    other = another(weights, tmp_path / "other", "audio_encoder/model.safetensors")
    after = preprocessor(tmp_path / "cache", other).clips(videos[:2])
    assert work == {"video": 2, "music": 4}
    for old, new in zip(before, after, strict=True):
        assert old.start == new.start and old.latents == new.latents and old.music != new.music


@pytest.mark.parametrize("given", [{"size": (16, 32)}, {"frames": 13}])
def test_another_size_or_length_is_encoded_anew(weights, videos, tmp_path, given):
    (before,) = preprocessor(tmp_path, weights).clips(videos[:1])
    (after,) = preprocessor(tmp_path, weights, **given).clips(videos[:1])
    assert before.latents != after.latents
    assert (before.music == after.music) == ("size" in given)


def test_another_vae_moves_no_clip_and_keeps_the_music(weights, videos, tmp_path, monkeypatch):
    work = count_work(monkeypatch)
    before = preprocessor(tmp_path / "cache", weights).clips(videos[:2])
    other = another(weights, tmp_path / "other", "encoder.safetensors")
    after = preprocessor(tmp_path / "cache", other).clips(videos[:2])
    assert work == {"video": 4, "music": 2}
    for old, new in zip(before, after, strict=True):
        assert old.start == new.start and old.latents != new.latents and old.music == new.music


def test_an_encoder_that_declares_another_version_is_asked_again(
    weights, videos, tmp_path, monkeypatch
):
    work = count_work(monkeypatch)
    preprocessor(tmp_path, weights).clips(videos[:1])
    monkeypatch.setattr(mi.AudioEncoder, "version", "2", raising=False)
    preprocessor(tmp_path, weights).clips(videos[:1])
    assert work == {"video": 1, "music": 2}


def test_clips_follow_from_content_not_from_name_or_place(weights, videos, tmp_path, monkeypatch):
    work = count_work(monkeypatch)
    preprocessor(tmp_path / "cache", weights).clips(videos[:1])
    copy = tmp_path / "elsewhere.mp4"
    with open(videos[0].path, "rb") as file:
        copy.write_bytes(file.read())
    copy = aist.Video(str(copy), "aist", "", ("",))
    assert preprocessor(tmp_path / "cache", weights).clips([copy])
    assert work == {"video": 1, "music": 1}


def test_a_video_that_ends_before_it_says(weights, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "clip_starts", lambda *_: [2, 40])
    work = count_work(monkeypatch)
    for _ in range(2):
        (clip,) = preprocessor(tmp_path, weights).clips(videos[:1])
        assert clip.start == 2
    assert work == {"video": 1, "music": 1}


def test_features_that_are_not_finite_are_never_kept(
    weights, videos, tmp_path, monkeypatch, capsys
):
    nothing = torch.full((1, 5, 16), math.nan)
    monkeypatch.setattr(mi.AudioEncoder, "__call__", lambda self, waveform: nothing)
    assert preprocessor(tmp_path, weights).clips(videos[:1]) == []
    assert "the encoder's audio is not finite" in capsys.readouterr().out


def test_what_no_video_can_help_is_said_once(weights, videos, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(mi.InputError, match="encoder.safetensors cannot be read"):
        preprocessor(tmp_path / "cache", tmp_path / "empty").clips(videos)
    (tmp_path / "file").touch()
    with pytest.raises(mi.InputError, match="File exists"):
        preprocessor(tmp_path / "file", weights)

    def full(path, *_):
        raise mi.InputError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr(mi, "save_safetensors", full)
    with pytest.raises(mi.InputError, match="no space left"):
        preprocessor(tmp_path / "cache", weights).clips(videos)
    assert "skipped" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------


def test_texts_are_encoded_once_and_again_where_the_tokenizer_changes(
    weights, tmp_path, monkeypatch
):
    work = count_work(monkeypatch)
    prompts = ["a dog dancing", "the person dances", ""]
    prep = preprocessor(tmp_path / "cache", weights)
    entries = prep.texts(prompts)
    assert preprocessor(tmp_path / "cache", weights).texts(prompts) == entries
    assert work["text"] == 3
    for prompt, entry in entries.items():
        ((y_feat, y_mask),) = mi.encode_text(weights, [prompt])
        kept = prep.cache.read(entry)
        assert torch.equal(kept["y_feat"], y_feat[0]) and torch.equal(kept["y_mask"], y_mask[0])


LOW_LIMIT = """
import resource, sys
import torch, transformers
from dataset.clips import Preprocessor
prep = Preprocessor(sys.argv[1], sys.argv[2], (32, 32), 7, 30)
prep.texts(["the first"])  # whatever is imported late
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
entries = prep.texts([f"a dog dancing {i}" for i in range(120)])
assert len({prep.cache.read(entry)["y_feat"] for entry in entries.values()}) == 120
"""


def test_thousands_of_captions_do_not_need_thousands_of_files(weights, tmp_path):
    line = [sys.executable, "-c", LOW_LIMIT, str(tmp_path), str(weights)]
    run = subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_encoding_goes_on_where_it_was_stopped(weights, tmp_path, monkeypatch):
    work = count_work(monkeypatch)
    prep, write = preprocessor(tmp_path, weights), Cache.write
    prompts = [f"a dog {i}" for i in range(5)]

    def stops(self, name, tensors):
        if len(list(tmp_path.glob("text-*"))) == 3:
            raise KeyboardInterrupt
        write(self, name, tensors)

    monkeypatch.setattr(Cache, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        prep.texts(prompts)
    monkeypatch.setattr(Cache, "write", write)
    preprocessor(tmp_path, weights).texts(prompts)
    assert work["text"] == 4 + 2  # one at a time, each kept before the next


# ------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------


def damages(good, other):
    """What disks and people do to a file."""
    middle = len(good) // 2
    yield b""
    yield b"7"
    yield good[:middle]
    yield good[: middle + 40] + bytes([good[middle + 40] ^ 1]) + good[middle + 41 :]  # one bit
    yield good[:-64] + bytes(64)
    yield other  # a whole entry, but of something else


def test_a_damaged_entry_is_made_again(weights, videos, tmp_path):
    folder = tmp_path / "cache"
    before = preprocessor(folder, weights).clips(videos[:2])
    texts = preprocessor(folder, weights).texts(["a dog", "a cat"])
    other = (folder / before[1].music).read_bytes()
    (listing,) = {p.name for p in folder.glob("video-*")} - {
        preprocessor(folder, weights).listing(Cache(folder).digest_of(videos[1].path))
    }
    for name in (before[0].latents, before[0].music, listing, texts["a dog"]):
        good = (folder / name).read_bytes()
        for bad in damages(good, other):
            (folder / name).write_bytes(bad)
            assert preprocessor(folder, weights).clips(videos[:2]) == before
            preprocessor(folder, weights).texts(["a dog", "a cat"])
            assert (folder / name).read_bytes() == good


def test_a_damaged_index_is_only_slower(weights, videos, tmp_path, monkeypatch):
    folder, work = tmp_path / "cache", count_work(monkeypatch)
    before = preprocessor(folder, weights).clips(videos[:1])
    good = (folder / "index.jsonl").read_bytes()
    for bad in damages(good, b"00000000 [1, 2]\nnull\n[]\n\xff\n"):
        (folder / "index.jsonl").write_bytes(bad)
        assert preprocessor(folder, weights).clips(videos[:1]) == before
    assert work == {"video": 1, "music": 1}


def test_an_entry_damaged_while_it_is_used_is_said_and_then_made_again(weights, videos, tmp_path):
    prep = preprocessor(tmp_path, weights)
    (clip,) = prep.clips(videos[:1])
    path = tmp_path / clip.latents
    good, state = path.read_bytes(), os.stat(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if the disk had done it
    with pytest.raises(mi.InputError, match="damaged and is gone; the same command makes it again"):
        prep.cache.read(clip.latents)
    assert preprocessor(tmp_path, weights).clips(videos[:1]) == [clip]
    assert path.read_bytes() == good


def test_the_index_notices_a_changed_file(tmp_path):
    path, index = tmp_path / "file", Index(str(tmp_path / "index"))
    path.write_text("one")
    one = index.recall("digest", str(path), mi.file_digest)
    assert Index(index.path).recall("digest", str(path), None) == one
    path.write_text("three")
    assert index.recall("digest", str(path), mi.file_digest) != one


def test_what_killed_processes_left_is_cleared(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = [mi.mark(gone.pid) + "a.safetensors", mi.mark(10**20) + "b"]
    live = [mi.mark(os.getppid()) + "c", "d.safetensors", ".tmp-e"]
    elsewhere = f".tmp-another-{gone.pid}-f"  # another machine's process, which may be at work
    touch(tmp_path, *stale, *live, elsewhere)
    mi.clear_temporaries(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*live, elsewhere}


def test_what_another_user_left_stops_nobody(tmp_path, monkeypatch):
    touch(tmp_path, mi.mark(10**20) + "a")

    def remove(path):
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(os, "remove", remove)
    mi.save_json(tmp_path / "b.json", {})
    assert (tmp_path / "b.json").exists()


def test_what_a_download_brings_beside_a_model_is_no_part_of_it(weights, tmp_path):
    cache, folder = Cache(tmp_path / "cache"), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = cache.digest_of_model(folder)
    (folder / ".cache").mkdir()
    (folder / "README.md").write_text("a model")
    assert cache.digest_of_model(folder) == before
    (folder / "config.json").write_text("[]")
    assert cache.digest_of_model(folder) != before


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


OPTIONS = {
    "seed": 42,
    "wild_ratio": 1.0,
    "base_prompt_ratio": 0.2,
    "caption_dropout": 0.1,
    "beta": 3.0,
    "half_life": 200,
}
CONFIG = SimpleNamespace(mean=MEAN, std=STD)


@pytest.fixture
def make_samples(tmp_path):
    """make_samples(songs of aist, of wild, **options): of clips whose tensors tell them apart."""
    cache = Cache(tmp_path)

    def make(aist_songs, wild_songs=(), **options):
        found = []
        for i, (kind, song) in enumerate(
            [("aist", song) for song in aist_songs] + [("wild", song) for song in wild_songs]
        ):
            mean = torch.full((12, 2, 4, 4), float(i))
            cache.write(f"latents-{i}", {"mean": mean, "logvar": torch.full_like(mean, -6)})
            cache.write(f"music-{i}", {"audio": torch.full((5, 3), float(song))})
            video = aist.Video(f"{i}.mp4", kind, song, (f"prompt {i}",))
            found.append(clips.Clip(video, i, f"latents-{i}", f"music-{i}"))
        texts = {}
        for i, prompt in enumerate(
            [aist.PLAIN, aist.WILD_PLAIN, *(c.video.prompts[0] for c in found)]
        ):
            texts[prompt] = f"text-{i}"
            y_mask = torch.ones(2 + i, dtype=torch.bool)
            cache.write(
                texts[prompt], {"y_feat": torch.full((2 + i, 4), float(i)), "y_mask": y_mask}
            )
        settings = SimpleNamespace(**OPTIONS | options)
        return Samples(tmp_path, found, texts, CONFIG, settings), found

    return make


def test_a_sample_follows_from_the_seed_and_its_number_alone(make_samples):
    samples, _ = make_samples([1, 2, 3], [4, 5])
    one, two = samples.batch([7, 8], 3), samples.batch([8, 9], 3)
    for name in ("z", "sigma", "eps"):
        assert torch.equal(getattr(one, name)[1], getattr(two, name)[0])
    assert one.names[1] == two.names[0]
    assert torch.equal(one.conditions["audio"][1], two.conditions["audio"][0])
    other, _ = make_samples([1, 2, 3], [4, 5], seed=43)
    assert not torch.equal(other.batch([8], 3).eps, two.eps[:1])


def test_no_clip_comes_twice_before_all_came_once(make_samples):
    samples, found = make_samples(range(5))
    names = [samples.choose(n)[0].name for n in range(10)]
    assert sorted(names[:5]) == sorted(names[5:]) == sorted(clip.name for clip in found)
    assert names[:5] != names[5:]


def test_kinds_prompts_and_captions_are_mixed_as_asked(make_samples):
    samples, _ = make_samples(range(4), range(4), wild_ratio=3.0)
    chosen = [samples.choose(n)[:2] for n in range(4000)]
    wild = sum(clip.video.kind == "wild" for clip, _ in chosen) / 4000
    none = sum(prompt is None for _, prompt in chosen) / 4000
    plain = sum(prompt == clip.video.plain for clip, prompt in chosen) / 4000
    assert abs(wild - 0.75) < 0.03 and abs(none - 0.1) < 0.02 and abs(plain - 0.18) < 0.03
    assert all(prompt in (None, clip.video.plain, *clip.video.prompts) for clip, prompt in chosen)


def test_the_mixture_is_that_of_the_first_version(make_samples):
    """The arithmetic of a run's randomness, written out."""
    samples, found = make_samples([1, 2, 3], [4, 5])
    for n in range(50):
        rng = random.Random(f"42 {n}")
        wild = rng.random() < 0.5
        kind = found[3:] if wild else found[:3]
        order = list(range(len(kind)))
        random.Random(f"42 epoch {n // len(kind)}").shuffle(order)
        clip = kind[order[n % len(kind)]]
        prompt = clip.video.plain if rng.random() < 0.2 else rng.choice(clip.video.prompts)
        prompt = None if rng.random() < 0.1 else prompt
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        assert samples.choose(n)[:2] == (clip, prompt)
        noise = torch.randn(12, 2, 4, 4, generator=generator)
        sigma = mi.beta_uniform(n, 1, 3.0, 200, generator)
        batch = samples.batch([n], n)
        assert torch.equal(batch.sigma, sigma)
        assert torch.equal(batch.eps[0], torch.randn(12, 2, 4, 4, generator=generator))
        z = found.index(clip) + math.exp(-3) * noise[None]
        assert torch.allclose(batch.z, mi.to_dit_space(z, MEAN, STD), atol=1e-5)


def test_a_dropped_caption_has_no_valid_token(make_samples):
    samples, _ = make_samples([1, 2], caption_dropout=1.0)
    conditions = samples.batch(range(3), 0).conditions
    assert not conditions["y_mask"].any()
    assert conditions["audio"].shape == (3, 5, 3)


def test_texts_of_different_lengths_are_padded():
    masks = stack([torch.ones(n, dtype=torch.bool) for n in (2, 4)])
    assert masks.tolist() == [[True, True, False, False], [True] * 4]
    assert stack([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1, 2]  # another condition


def test_parts_of_a_batch(make_samples):
    samples, _ = make_samples([1, 2, 3])
    batch = samples.batch(range(3), 0)
    part = batch.rows(slice(1, 3)).to("cpu")
    assert isinstance(part, Batch) and len(part.z) == 2 == len(part.conditions["y_feat"])
    assert torch.equal(part.z, batch.z[1:])


@pytest.mark.parametrize("counts", [(2, 2), (9, 1), (5, 1, 1), (3, 3, 3, 3, 3, 3, 3)])
def test_the_wrong_song_of_a_held_out_clip_is_never_its_own(make_samples, counts):
    songs = [song for song, count in enumerate(counts) for _ in range(count)]
    samples, found = make_samples(songs)
    right, wrong = samples.held_out(found, 16)
    assert (
        right.conditions["audio"].shape
        == wrong.conditions["audio"].shape
        == (min(len(songs), 16), 5, 3)
    )
    own = {clip.name: clip.video.song for clip in found}
    assert right.conditions["audio"][:, 0, 0].tolist() == [own[name] for name in right.names]
    assert (right.conditions["audio"] != wrong.conditions["audio"]).all()
    assert {*wrong.conditions["audio"].flatten().tolist()} <= {*map(float, songs)}
    assert samples.held_out(found[: counts[0]], 16) is None
    again, _ = samples.held_out(found, 16)
    assert torch.equal(right.eps, again.eps) and len(samples.held_out(found, 2)[0].z) == 2
