"""Counterfactuals: the same prompt, noise and model, another music. Does the motion answer?"""

import os
import wave

import numpy as np

import musicinfuser as mi
import sample
from eval import beats as bt
from eval.beside import Music, music_of, recipe_of
from eval.protocol import check_model, make_video
from eval.tables import markdown, mean_error

FASTER = 1.25
CHANGES = ("as it was", "silence", "half a beat later", f"{FASTER:g} times as fast", "another song")


def changed_music(music, others, folder):
    """{name of CHANGES: Music}, without another song where there is none."""
    half_a_beat = float(np.median(np.diff(bt.track_beats(music.song, music.start)))) / 2
    changed = {
        "as it was": music,
        "silence": Music(silent_song(folder)),
        "half a beat later": music._replace(start=music.start + half_a_beat),
        f"{FASTER:g} times as fast": music._replace(speed=min(music.speed * FASTER, 10)),
    }
    swapped = [other for other in others if other.song != music.song]
    return changed | ({"another song": swapped[0]} if swapped else {})


def silent_song(folder, seconds=60, rate=16000):
    path = os.path.join(folder, "silence.wav")
    if not os.path.exists(path):
        with mi.written_whole(path) as temporary, wave.open(temporary, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(bytes(2 * seconds * rate))
    return path


def counterfactual(video, others, folder, song=None, **where):
    """{change: scores} of a video that sample.py made; others: the Music of the other videos."""
    beside = os.path.splitext(video)[0] + ".json"
    if not os.path.exists(beside):
        raise mi.InputError(f"{video} has no .json of sample.py beside it, to make it again from")
    check_model(video)
    recipe, music = sample.read_recipe(beside), music_of(video, song)
    if "prompt" not in recipe:
        raise mi.InputError(f"{beside} names no prompt to make {video} again from")
    recipe.pop("device", None)  # of another machine
    name = os.path.splitext(os.path.basename(video))[0] + f"-{mi.digest(recipe)[:6]}"
    original = bt.film(video)
    rows = {}
    for change, new in changed_music(music, others, folder).items():
        path = video
        if new != music:
            path = os.path.join(folder, f"{name}-{change.replace(' ', '-')}.mp4")
            make_video(path, recipe | new._asdict(), **where)
        rows[change] = answer(path, original, music, new)
    return rows


def answer(path, original, music, new):
    """How a video made to the music `new` differs from `original`, made to `music`."""
    motion, film = bt.motion_of(path), bt.film(path)
    t = (np.arange(len(motion.energy)) + 0.5) / bt.FPS
    before = bt.beat_position(music.beats(), t)
    row = {
        "r_before": bt.beat_correlation(motion.energy, before),
        "lag": bt.beat_lag(motion.energy, before),
        "picture": float(np.abs(film.astype(np.int16) - original).mean() / 255),
    }
    try:
        beats = new.beats()
    except bt.NoScore:  # silence
        return row
    row["r"] = bt.beat_correlation(motion.energy, bt.beat_position(beats, t))
    row["tempo"] = motion.tempo / bt.music_tempo(beats)
    return row


def counterfactual_report(videos, out, song=None, **where):
    """Print and return, for each adapter among the videos, a table of the CHANGES. song: that they
    were made to, where it is elsewhere now."""
    bt.import_librosa()
    musics = {video: music_of(video, song) for video in videos}
    rows = {}
    for i, video in enumerate(videos):  # swapped with the next one's, so that all songs come
        others = [musics[other] for other in [*videos[i + 1 :], *videos[:i]]]
        try:
            rows[video] = counterfactual(video, others, out, song, **where)
        except bt.NoScore as error:
            print(f"skipped  {video}: {error}")
    if not rows:
        raise mi.InputError("there is no video with a beat to change")
    adapters = {}
    for video in rows:
        adapters.setdefault(recipe_of(video).get("adapter", "?"), []).append(rows[video])
    for adapter, group in adapters.items():
        print(f"\nadapter {adapter}, {len(group)} videos\n\n{counterfactual_table(group)}")
    return {"videos": rows}


def counterfactual_table(group):
    """group: [{change: answer()}]"""
    head = ["music", "r, the changed song", "r, the song as it was", "lag, beats (agreement)"]
    lines = []
    for change in CHANGES:
        rows = [row[change] for row in group if change in row]
        if rows:
            lines.append([change, *counterfactual_cells(rows)])
    return markdown([*head, "tempo of motion / of music", "change of the picture"], *lines)


def counterfactual_cells(rows):
    cells = [mean_error([row.get(name) for row in rows]) for name in ("r", "r_before", "tempo")]
    cells.insert(2, circular([row["lag"] for row in rows]))
    return [*cells, mean_error([row["picture"] for row in rows], 3)]


def circular(lags):
    """The mean of lags in beats, which come round after one, and how much they agree, 0 to 1."""
    mean = np.exp(2j * np.pi * np.array(lags)).mean()
    return f"{np.angle(mean) / (2 * np.pi):+.2f} ({abs(mean):.2f})"
