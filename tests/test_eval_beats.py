"""Beats: every published score against numbers worked out by hand, then the toy world's dances."""

import itertools
import math
import os
import struct

import imageio
import numpy as np
import pytest
import torch

import musicinfuser as mi
from eval import beats as bt
from tiny import music


def clicks(path, times, seconds, rate=16000):
    """A sound of short clicks, as a wav."""
    samples = np.zeros(round(seconds * rate), np.float32)
    click = np.random.default_rng(0).standard_normal(400) * np.exp(-np.arange(400) / 60)
    for time in times:
        at = round(time * rate)
        samples[at : at + 400] += click[: len(samples) - at]
    music.save_wav(path, samples / 5, rate)
    return str(path)


def resting_at(rests, count=72, fps=30):
    """(count,) changes of a dance that moves evenly but for its rests, as narrow bells."""
    t = (np.arange(count) + 0.5) / fps
    return (1 - sum(np.exp(-(((t - rest) / 0.05) ** 2)) for rest in rests)).astype(np.float32)


# AIST++ -----------------------------------------------------------------------------------------


def test_aist_by_hand_cuts_the_music_to_the_clip():
    """73 frames at 30 fps last 2.433 s, 146 frames at 60: the beat at 2.45 s, frame 147, is cut.
    The motion beat at 2.42 s, frame 145, is then 28 frames from that at 1.95 s, frame 117."""
    music = bt.music_frames([1.95, 2.45], 146)
    assert music.tolist() == [117]
    assert bt.alignment([145], music) == pytest.approx(math.exp(-28 * 28 / 18), rel=1e-9)
    uncut = math.exp(-2 * 2 / 18)
    assert bt.alignment([145], [117, 147]) == pytest.approx(uncut)


def test_aist_by_hand_is_a_mean_over_the_motion_beats():
    """Distances 0, 3 and 6 frames: exp(0), exp(-9/18), exp(-36/18)."""
    score = bt.alignment([30, 63, 96], [30, 60, 90])
    assert score == pytest.approx((1 + math.exp(-0.5) + math.exp(-2)) / 3)
    assert bt.alignment([], [30]) == bt.alignment([30], []) == 0


def test_aist_motion_beats_are_lowest_within_ten_frames_either_side():
    velocity = np.full(60, 5.0)
    velocity[0] = 0
    velocity[[9, 20, 29, 41]] = 1.0, 2.0, 1.5, 1.0
    # 9 lies within ten frames of the 0 in front, 20 of the lower 29; nobody is near 29 and 41
    assert bt.aist_motion_beats(velocity).tolist() == [29, 41]


@pytest.mark.parametrize("reach", [1, 10])
@pytest.mark.parametrize("seed", range(5))
def test_local_minima_are_scipys(reach, seed):
    signal = pytest.importorskip("scipy.signal")
    values = np.random.default_rng(seed).integers(0, 30, 90).astype(float)  # with ties
    wanted = signal.argrelextrema(values, np.less, order=reach)[0]
    assert bt.local_minima(values, reach).tolist() == wanted.tolist()


def test_smoothing_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    for count in (3, 50):
        values = np.random.default_rng(0).uniform(size=count).astype(np.float32)
        wanted = ndimage.gaussian_filter(values.astype(float), 5)
        np.testing.assert_allclose(bt.smooth(values, 5), wanted, atol=1e-6)


def test_rests_are_found_at_their_time():
    velocity = bt.velocity_at_60_fps(resting_at([0.49, 1.02, 1.72]))
    assert len(velocity) == 146 and velocity[0] == 0
    for found in (bt.aist_motion_beats(velocity), bt.bailando_motion_beats(velocity)):
        assert np.abs(found - [29, 61, 103]).max() <= 1


# Bailando, MBCR ---------------------------------------------------------------------------------


def test_bailando_by_hand_is_a_mean_over_the_music_beats():
    """Of beats at frames 30, 60, 90 with rests at 33 and 60: exp(-9/18), 1, exp(-900/18)."""
    score = bt.alignment([30, 60, 90], [33, 60])
    assert score == pytest.approx((math.exp(-0.5) + 1 + math.exp(-50)) / 3)


def test_beat_coverage_by_hand():
    """Six frames are 100 ms: the beats at 30 and 60 are danced, that at 90 is missed by seven."""
    assert bt.beat_coverage([30, 60, 90], [36, 57, 97]) == pytest.approx(2 / 3)
    assert bt.beat_coverage([], [36]) == bt.beat_coverage([30], []) == 0


def test_one_movement_on_one_of_four_beats():
    """All that rests is on a beat, but three of four beats pass."""
    changes = resting_at([0.49], count=62)
    motion = bt.Motion(changes, bt.smooth(changes, 1), 120.0)
    scores = bt.beat_scores(motion, np.array([0.5, 1.0, 1.5, 2.0]))
    assert scores["bas_aist"] > 0.9
    assert scores["bas_bailando"] == pytest.approx(0.25, abs=0.02) and scores["mbcr"] == 0.25


def test_a_still_picture_follows_nothing():
    changes = np.zeros(72, np.float32)
    motion = bt.Motion(changes, bt.smooth(changes, 1), bt.motion_tempo(changes))
    assert set(bt.beat_scores(motion, np.arange(8) * 0.5).values()) == {0.0}


# Motion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [-0.4, 0.0, 0.25])
def test_lag_and_correlation_of_a_known_dance(lag):
    beats = np.arange(90) / 30 * 2  # 120 BPM
    energy = np.sin(np.pi * (beats - lag)) ** 2 + 0.3
    assert bt.beat_lag(energy, beats) == pytest.approx(lag, abs=0.01)
    assert bt.beat_correlation(energy, beats) == pytest.approx(math.cos(2 * np.pi * lag), abs=0.02)
    assert bt.motion_tempo(energy) == pytest.approx(120, abs=1)


def test_changes_are_of_four_by_four_pixels():
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1, 0, 0] = 255  # 1/16 of a block, which is 1/4 of the picture
    frames[2] = 255
    wanted = [1 / 16 / 4, 1 - 1 / 16 / 4]
    np.testing.assert_allclose(bt.frame_changes(iter(frames)), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "ratio, close", [(1.0, 1), (2.03, 1), (0.49, 1), (1.06, 0), (1.5, 0), (0.0, 0)]
)
def test_octaves_of_the_tempo_are_folded_for_the_share_only(ratio, close):
    changes = np.random.default_rng(0).uniform(size=60).astype(np.float32)
    motion = bt.Motion(changes, changes, 120 * ratio)
    scores = bt.beat_scores(motion, np.arange(8) * 0.5)
    assert scores["tempo"] == pytest.approx(ratio) and scores["tempo_close"] == close


# Music ------------------------------------------------------------------------------------------


def test_beat_position_is_linear_and_goes_on_at_both_ends():
    beats = np.array([1.0, 1.5, 2.5])
    found = bt.beat_position(beats, np.array([0.75, 1.0, 1.25, 1.5, 2.0, 3.0]))
    assert found == pytest.approx([-0.5, 0, 0.5, 1, 1.5, 2.5])


def test_uneven_beats_have_a_tempo():
    assert bt.music_tempo(np.array([0, 0.4, 1.2])) == pytest.approx(100)
    assert bt.music_tempo(np.array([0, 0.5, 1.0, 2.0, 2.5])) == pytest.approx(120)  # one missed


def test_other_places_of_the_song_are_not_the_videos_own():
    beats = np.arange(0, 60, 0.7) - 20  # the video begins 20 s into it
    places = bt.elsewhere(beats, 3.0)
    assert 10 <= len(places) <= 16
    begins = [beats[0] - place[0] for place in places]
    assert min(np.abs(begins)) >= 3
    assert len({round(begin % 0.7, 3) for begin in begins}) > 3  # at several phases


@pytest.mark.parametrize("tempo", [98.63, 100, 112, 123.3, 148])
def test_a_dancer_who_follows_is_not_on_the_beat_elsewhere(tempo):
    """Though a video of 73 frames is four, or five, or six whole beats long."""
    t = np.arange(72) / 30 + 1 / 60
    beats = np.arange(0, 60, 60 / tempo)
    energy = -np.cos(2 * np.pi * bt.beat_position(beats, t))
    assert bt.beat_correlation(energy, bt.beat_position(beats, t)) > 0.9
    places = bt.elsewhere(beats, 73 / 30)
    r = [bt.beat_correlation(energy, bt.beat_position(place, t)) for place in places]
    assert abs(np.mean(r)) < 0.1


def test_a_short_song_has_no_other_places():
    assert bt.elsewhere(np.arange(0, 5, 0.5), 3.0) == []


def test_tracked_beats_are_the_clicks(tmp_path):
    pytest.importorskip("librosa")
    times = np.arange(0.3, 20, 0.6)  # 100 BPM
    beats = bt.track_beats(clicks(tmp_path / "clicks.wav", times, 20))
    late = (beats - 0.3 + 0.3) % 0.6 - 0.3
    assert abs(np.median(late)) < 0.012 and bt.music_tempo(beats) == pytest.approx(100, abs=1)


def test_motion_is_between_two_frames():
    """Half a frame aside, r would be 0.98."""
    energy = np.sin(np.pi * 2 * (np.arange(72) + 0.5) / 30) ** 2  # rests at 0, 0.5, 1, ... s
    motion = bt.Motion(np.ones(72, np.float32), energy, 120.0)
    assert bt.beat_scores(motion, np.arange(6) / 2)["r"] == pytest.approx(1, abs=1e-3)


def test_a_song_of_hours_is_heard_around_the_video(tmp_path, monkeypatch):
    pytest.importorskip("librosa")
    monkeypatch.setattr(bt, "SONG_SECONDS", 10)
    path = clicks(tmp_path / "long.wav", np.arange(0, 40, 0.5), 40)
    beats = bt.track_beats(path, 30.0)
    assert beats.min() > 24 and beats.max() < 36


@pytest.mark.parametrize("sound", ["silent", "not-a-number"])
def test_a_song_without_a_beat_or_of_no_numbers_is_said(sound, tmp_path):
    pytest.importorskip("librosa")
    samples = np.full(64000, 0.0 if sound == "silent" else np.nan, "<f4").tobytes()
    kind = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)  # floats, mono
    chunks = b"fmt " + struct.pack("<I", 16) + kind + b"data" + struct.pack("<I", len(samples))
    riff = b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(samples)) + b"WAVE"
    path = tmp_path / f"{sound}.wav"
    path.write_bytes(riff + chunks + samples)
    with pytest.raises(mi.InputError, match="no beat is heard|not numbers"):
        bt.track_beats(str(path))


# Files ------------------------------------------------------------------------------------------

ODD_NAMES = ["http:127.0.0.1:1.mp4", "<video0>.mp4", "imageio:chelsea.mp4", "a b%03d'.mp4"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_local_files_of_any_name_are_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video = torch.linspace(-1, 1, 40)[None, :, None, None].expand(3, 40, 32, 48)
    mi.save_video(str(tmp_path / "plain.mp4"), video)
    os.rename("plain.mp4", name)
    assert bt.film(name).shape == (40, 32, 48, 3)
    assert bt.film(name, 2, longest=24).shape[1:] == (16, 24, 3)
    assert len(bt.motion_of(name).energy) == 39


def test_a_video_of_less_than_a_second_has_no_score(tmp_path):
    mi.save_video(str(tmp_path / "short.mp4"), torch.zeros(3, 7, 32, 32))
    with pytest.raises(bt.NoScore, match="too short to score: 7 frames"):
        bt.motion_of(str(tmp_path / "short.mp4"))


def test_a_video_without_end_is_seen_as_long_as_a_song_is_heard(monkeypatch):
    frames = itertools.cycle(np.random.default_rng(0).integers(0, 255, (7, 8, 8, 3), np.uint8))
    monkeypatch.setattr(bt, "read_film", lambda path: frames)
    monkeypatch.setattr(bt, "SONG_SECONDS", 2)
    assert len(bt.motion_of("a.mp4").changes) == 59


def test_no_video_and_a_tiny_one_are_one_line(tmp_path):
    (tmp_path / "none.mp4").write_text("not a video")
    red = np.full((2, 2, 3), 200, np.uint8)
    imageio.mimsave(tmp_path / "tiny.gif", [red, red // 2], format="GIF", duration=500)
    for name, words in (("none.mp4", "cannot be read as video"), ("tiny.gif", "fewer than 4")):
        with pytest.raises(mi.InputError, match=words) as error:
            bt.motion_of(str(tmp_path / name))
        assert name in str(error.value)


def test_averages_have_the_standard_error_over_videos():
    rows = [{"r": 1.0}, {"r": 2.0}, {"r": 4.0}]
    mean, error = bt.averages(rows)["r"]
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert bt.averages(rows[:1])["r"] == [1.0, None]
