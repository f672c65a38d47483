"""eval.long: joins and drift that were put in are found, thirds keep to a song whose tempo changes,
and what is measured is kept."""

import os
import subprocess

import numpy as np
import pytest
import torch

import musicinfuser as mi
import sample
from eval import long


@pytest.fixture(scope="module")
def encoder(weights):
    return mi.load_encoder(weights / "encoder.safetensors")


def film_of(frames=120, size=32, seed=0):
    """A grey place with noise; something bright goes round in it."""
    film = np.full((frames, size, size, 3), 120, np.uint8)
    film += np.random.default_rng(seed).integers(0, 3, film.shape, dtype=np.uint8)
    for i, frame in enumerate(film):
        x = int(10 + 6 * np.sin(i / 3))
        frame[12:20, x : x + 6] = 250
    return film


def test_joins_are_where_a_window_begins_to_count_or_has_ended():
    ones = torch.ones(13)
    assert long.joins_of([(0, ones), (8, ones), (12, ones)]) == [49, 73, 121]


def test_a_join_that_was_put_in_is_found():
    film, joins = film_of(), [30, 60, 90]
    assert abs(long.join_scores(film, joins)["jump"]) < 1
    for join in joins:
        film[join:] += np.uint8(20)
    found = long.join_scores(film, joins)
    assert found["join"] > 3 and found["jump"] > 3


def test_a_place_that_drifts_is_found(encoder):
    film = film_of()
    still = long.drift_scores(film, encoder, 30)
    for i in range(len(film)):
        film[i, :, :8] += np.uint8(i // 30 * 15)
    drifts = long.drift_scores(film, encoder, 30)
    assert still["place"] < 1 and drifts["place"] > 3
    assert drifts["features"] > still["features"]


def test_a_figure_that_changes_colour_is_found(encoder):
    film = film_of()
    still = long.drift_scores(film, encoder, 30)
    film[60:][film[60:].min(-1) == 250] = 250, 20, 20
    changed = long.drift_scores(film, encoder, 30)
    assert still["figure"] < 5 < changed["figure"]


def test_the_beats_of_a_song_whose_tempo_changes():
    beats = long.beats_at(1801, 30, 60)
    slow, fast = np.diff(beats[:900]), np.diff(beats[901:])
    assert np.allclose(slow * 30 * 60, 100) and np.allclose(fast * 30 * 60, 130)


@pytest.mark.parametrize("seconds", [9, 20, 45, 60, 100])
def test_the_second_half_too_begins_on_a_beat(seconds):
    half = round(30 * seconds / 2)
    beats = long.beats_at(2 * half + 1, 30, 2 * half / 30)
    assert abs(beats[half] - round(beats[half])) < 1e-9 and (np.diff(beats) > 0).all()


def test_that_song_has_its_beats_there(tmp_path):
    sound = mi.load_audio(long.song_of(str(tmp_path), 12), rate=16000).numpy()
    rise = np.maximum(np.diff(np.sqrt(np.square(sound).reshape(-1, 160).mean(1))), 0)  # of 10 ms
    beats = long.beats_at(1200, 100, 12)

    def strength(shift, half):
        whole = np.flatnonzero(np.diff(np.floor(beats - shift)) > 0) + 1
        at = [i for i in whole if half * 600 + 10 < i < half * 600 + 590]
        return np.mean([rise[i - 2 : i + 3].max() for i in at])

    for half in (0, 1):
        others = [strength(shift, half) for shift in (0.13, 0.37, 0.63, 0.88)]
        assert strength(0, half) > 1.2 * max(others)


def test_a_dance_on_the_beat_keeps_to_it_in_every_third():
    beats = long.beats_at(901, 30, 30)
    film = np.full((901, 16, 16, 3), 50, np.uint8)
    speed = np.sin(np.pi * beats) ** 2  # it rests on every beat
    bright = np.abs(9 * np.cumsum(speed) % 400 - 200)  # up and down, without a jump
    film[:, 4:12, 4:12] = bright[:, None, None, None].astype(np.uint8)
    first, _, last = long.beats_by_thirds(film, beats, 30)
    for r, tempo in (first, last):
        assert r > 0.5 and abs(tempo - 1) < 0.05


def test_what_is_measured_is_kept(weights, tmp_path, monkeypatch):
    made = []

    def generate(**given):
        made.append(given["prompt"])
        mi.save_video(given["out"], mi.from_pixels(film_of(91)))

    monkeypatch.setattr(sample, "generate", generate)
    own = {"solver": "ab2", "steps": 2, "frames": 91, "seconds": 6}
    given = own | {"weights": str(weights), "device": "cpu", "out": str(tmp_path)}
    options, dit = mi.begin(long.Options, "sampling", given)
    films = long.Films(options, dit.config)
    first = films.scores(prompt="a dog", frames=91)
    assert films.scores(prompt="a dog", frames=91) == first and made == ["a dog"]
    films.scores(prompt="a cat", frames=91)
    assert made == ["a dog", "a cat"]
    scores, path = first
    assert os.path.exists(path) and set(long.JOIN_AND_DRIFT) <= set(scores)


@pytest.mark.parametrize("frames, longest", [(61, 7), (133, 163)])
def test_too_short_films_are_one_line(weights, tmp_path, monkeypatch, frames, longest):
    monkeypatch.setattr(mi, "longest_at_once", lambda config: longest)
    with pytest.raises(mi.InputError, match=f"three seconds or more, and more than {longest}"):
        long.report(weights=str(weights), device="cpu", frames=frames, out=str(tmp_path))


def test_costs_are_of_what_was_asked_for(weights, tmp_path, monkeypatch):
    """Whatever else is asked, they are timed again, by those options."""
    lines = []

    def run(line, **_):
        lines.append(line)
        return subprocess.CompletedProcess(line, 0, "1.5 s, peak memory 0.50 GB\n")

    monkeypatch.setattr(long.subprocess, "run", run)
    given = {"weights": str(weights), "device": "cpu", "out": str(tmp_path), "seconds": 6}
    for change in ({}, {}, {"offload": True}, {"timed_steps": 3}):
        options, dit = mi.begin(long.Options, "sampling", given | {"solver": "ab2"} | change)
        cost = long.Films(options, dit.config).cost(5)
        assert cost == {"seconds": 1.5, "memory": 0.5}
    first, offloaded, longer = lines
    assert "--offload" in offloaded and "--offload" not in first
    assert longer[longer.index("--steps") + 1] == "3"
