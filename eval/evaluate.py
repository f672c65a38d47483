"""Does it dance to the music? Scores of videos:   python -m eval.evaluate videos/*.mp4

Top to bottom:   what is beside a video | beats | the judge | the protocol | counterfactuals |
                 copies | the command line
"""

import argparse
import glob
import itertools
import json
import math
import os
import wave
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import musicinfuser as mi
from dataset.aist import TEST_SONGS, find_videos
from dataset.clips import Preprocessor
from eval import beats as bt
from eval import judge as jd
from eval import quality
from eval.tables import markdown, mean_error

# ----------------------------------------------------------------------------------------------
# What is beside a video: the .json that sample.py wrote. Nobody vouches for it.
# ----------------------------------------------------------------------------------------------


def read_object(path):
    """A JSON object, {} where there is no file. Raises InputError."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise mi.InputError(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise mi.InputError(f"{path} is not what sample.py writes: it holds no object")
    return value


def recipe_of(video):
    """How a video was made, {} where nobody wrote it down. Raises InputError."""
    path = os.path.splitext(video)[0] + ".json"
    recipe = read_object(path)
    for name in ("song", "prompt"):
        if not isinstance(recipe.get(name, ""), str):
            raise mi.InputError(f"{path}: {name} is no text")
    check_number(path, recipe, "start", 0, math.inf)
    check_number(path, recipe, "speed", 0.1, 10)
    return recipe


def check_number(path, recipe, name, low, high):
    value = recipe.get(name, low)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or not math.isfinite(value):
        raise mi.InputError(f"{path}: {name} is {value!r}, not a number from {low}")


class Music(NamedTuple):
    """What a video was made to."""

    song: str  # a file
    start: float = 0.0  # in the song's own seconds
    speed: float = 1.0

    def beats(self):
        """In the video's seconds. Raises bt.NoScore."""
        return (bt.track_beats(self.song, self.start) - self.start) / self.speed


def music_of(video, song=None):
    """The Music of a video; of `song` where that is given; its own sound without a recipe."""
    recipe = recipe_of(video)
    song = song or recipe.get("song", video)
    if not os.path.isfile(song):
        raise mi.InputError(f"{video} was made to {song}, which is not there; name it by --song")
    return Music(song, recipe.get("start", 0.0), recipe.get("speed", 1.0))


def without_music(video):
    return recipe_of(video).get("adapter") == "none"


# ----------------------------------------------------------------------------------------------
# Beats: each video with its own song, beside what chance gives
# ----------------------------------------------------------------------------------------------


def score_beats(videos, song=None):
    """{video: {"music", "music_cfg", "own", "control"}}; the unscorable are named."""
    bt.import_librosa()
    heard, motions = {}, {}
    for video in tqdm(videos, "motion and beats", unit="video"):
        music = music_of(video, song)
        try:
            heard[video] = music, music.beats()
            motions[video] = bt.motion_of(video)
        except bt.NoScore as error:
            heard.pop(video, None)
            tqdm.write(f"skipped  {video}: {error}")
    if not heard:
        raise mi.InputError("there is no video with a beat to score")
    return {video: scored(video, motions[video], heard) for video in heard}


def scored(video, motion, heard):
    """heard: {video: (Music, beats)} of all videos."""
    music, beats = heard[video]
    controls = [bt.beat_scores(motion, other) for other in control_beats(motion, music, heard)]
    row = {"music": music, "music_cfg": recipe_of(video).get("music_cfg")}
    row |= {"own": bt.beat_scores(motion, beats), "control": None}
    if controls:
        row["control"] = {name: float(np.mean([c[name] for c in controls])) for name in bt.SCORES}
    return row


def control_beats(motion, music, heard):
    """The other videos' songs; where there is but one song, its other places."""
    others = {other: beats for other, beats in heard.values() if other.song != music.song}
    if others:
        return others.values()
    seconds = (len(motion.changes) + 1) / bt.FPS
    own = next(beats for other, beats in heard.values() if other == music)
    return bt.elsewhere(own, seconds)


def beat_report(videos, song=None):
    """Print and return all beat scores, their means over the videos, and the controls."""
    rows = score_beats(videos, song)
    songs = {row["music"].song for row in rows.values()}
    control = "other songs" if len(songs) > 1 else "the song elsewhere"
    for video, row in rows.items():
        scores = (f"{name} {value:.2f}" for name, value in row["own"].items())
        print(os.path.basename(video), *scores, sep="  ")
    silent = [row for video, row in rows.items() if without_music(video)]
    dancing = [row for video, row in rows.items() if not without_music(video)]
    columns = {
        "own song": [row["own"] for row in dancing],
        control: [row["control"] for row in dancing if row["control"]],
        "made without music": [row["own"] for row in silent],
    }
    means = {name: bt.averages(column) for name, column in columns.items() if column}
    print(f"\n{len(rows)} videos, {len(songs)} songs, beats by librosa\n\n{beat_table(means)}")
    if len(songs) == 1:
        print("one song only: the control is its other places, at the same tempo")
    return {"mean": means, "control": control, "videos": rows}


def beat_table(means):
    """means: {column: {score: [mean, error]}}"""
    lines = [f"{'':46}" + "".join(f"{column:20}" for column in means)]
    for name, label in bt.SCORES.items():
        cells = (plus_minus(*column[name]) for column in means.values())
        lines.append(f"{label:46}" + "".join(f"{cell:20}" for cell in cells))
    return "\n".join(lines)


def plus_minus(mean, error):
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


# ----------------------------------------------------------------------------------------------
# The judge
# ----------------------------------------------------------------------------------------------


def judge_report(videos, folder, out, device=None, dtype=None):
    """Ask what `out` has no answer to yet, keep each answer there, print them as Table 1 does."""
    kept = read_object(out)
    answers = kept.setdefault("judge", {"model": folder, "videos": {}})
    if not isinstance(answers, dict) or not isinstance(answers.get("videos"), dict):
        raise mi.InputError(f"{out} is not what this script wrote; name another --json")
    if answers.get("model") != folder:
        raise mi.InputError(f"{out} has another judge's answers; name another --json")
    prompts = {video: recipe_of(video).get("prompt") for video in videos}
    jd.ask_all(prompts, folder, answers, lambda: mi.save_json(out, kept), device, dtype)
    given = [answers["videos"][video]["answers"] for video in videos]
    answers["mean"], answers["without_number"] = jd.averages(given)
    mi.save_json(out, kept)
    print("\n" + jd.table(answers["mean"], f"{len(videos)} videos"))
    lost, asked = answers["without_number"], sum(map(len, given))
    print(f"{sum(lost.values())} of {asked} answers had no number from 0 to 10", lost or "")


# ----------------------------------------------------------------------------------------------
# The paper's protocol: 10 prompts times the 10 songs that were held out
# ----------------------------------------------------------------------------------------------

PROMPTS = (
    # Figure 13's, as the paper prints it
    "a male dancer dancing in an art gallery with some paintings, captured from a front view",
    # Figure 14's dancer and place, in the words of the one above
    "a male dancer in a suit dancing in the middle of New York City, captured from a front view",
    # The paper's list is not public: these are ours
    "a female dancer in a red dress dancing on a wooden stage, captured from a front view",
    "a female dancer in jeans dancing in a studio with mirrors, captured from a moving front view",
    "a male dancer in a tracksuit dancing on a basketball court, captured from a low angle",
    "a female dancer in a yellow raincoat dancing in a street at night, front-left diagonal view",
    "two dancers in black clothes dancing on a roof at sunset, captured from a front view",
    "an old man in a grey coat dancing in a railway station, captured from a front view",
    "a dancer in silver clothes dancing in a club with coloured lights, front-right diagonal view",
    "a girl in a summer dress dancing on a beach, captured from a front view",
)


def protocol_songs(folder):
    """The files mLH4.*, mKR2.*, ... of a folder, the held-out songs; or all, if ten others."""
    if not os.path.isdir(folder or ""):
        needed = "--protocol needs --songs, a folder with the held-out songs"
        raise mi.InputError(f"{needed}; there is no folder {folder}")
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
    files = [file for file in files if os.path.isfile(file)]
    named = {os.path.splitext(os.path.basename(file))[0]: file for file in files}
    missing = [name for name in TEST_SONGS if name not in named]
    if not missing:
        return [named[name] for name in TEST_SONGS]
    if len(files) != 10 or len(missing) < 10:
        lacks = f"{folder} lacks the held-out {', '.join(missing)}"
        raise mi.InputError(f"{lacks}, and is not a folder of ten others")
    return files


def protocol(songs, out, weights=None, adapter=None, seed=0, **where):
    """The paths of the 100 videos, made where they are not there yet. where: device, dtype."""
    weights = os.path.normpath(weights or mi.default_weights())
    adapter = adapter or os.path.join(weights, "musicinfuser.safetensors")
    videos = []
    for song in protocol_songs(songs):
        name = os.path.splitext(os.path.basename(song))[0]
        for j, prompt in enumerate(PROMPTS):
            wanted = {"song": song, "prompt": prompt, "weights": weights, "adapter": adapter}
            wanted["seeds"] = [seed + len(videos)]  # each video has its own noise
            videos.append(os.path.join(out, f"{name}-{j}.mp4"))
            make_video(videos[-1], wanted, **where)
    return videos


def make_video(video, wanted, **where):
    """Sample a video unless it is there. wanted: options of sample.generate, with one seed.

    Raises InputError where it is there and was made otherwise.
    """
    import sample  # here, because scoring does not need it

    beside = os.path.splitext(video)[0] + ".json"
    if os.path.exists(video) and os.path.exists(beside):
        check_made_so(video, sample.read_recipe(beside), wanted)
        return
    for path in (video, beside):  # stopped between the two
        if os.path.exists(path):
            os.remove(path)
    print(f"making   {video}")
    given = {name: value for name, value in where.items() if value is not None}
    sample.generate(**wanted | given | {"out": video})


def check_made_so(video, made, wanted):
    made, wanted = (json.loads(json.dumps(options)) for options in (made, wanted))
    different = [name for name in wanted if made.get(name) != wanted[name]]
    if different:
        names = ", ".join(different)
        raise mi.InputError(f"{video} was made with another {names}; name another --out")


# ----------------------------------------------------------------------------------------------
# Counterfactuals: the same prompt, noise and model, another music. Does the motion answer?
# ----------------------------------------------------------------------------------------------

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


def counterfactual(video, others, folder, **where):
    """{change: scores} of a video that sample.py made; others: the Music of the other videos."""
    import sample

    beside = os.path.splitext(video)[0] + ".json"
    if not os.path.exists(beside):
        raise mi.InputError(f"{video} has no .json of sample.py beside it, to make it again from")
    recipe, music = sample.read_recipe(beside), music_of(video)
    recipe.pop("device", None)  # of another machine
    stem = os.path.splitext(os.path.basename(video))[0]
    original = bt.film(video)
    rows = {}
    for change, new in changed_music(music, others, folder).items():
        path = video
        if new != music:
            path = os.path.join(folder, f"{stem}-{change.replace(' ', '-')}.mp4")
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


def counterfactual_report(videos, out, **where):
    """Print and return, for each adapter among the videos, a table of the CHANGES."""
    bt.import_librosa()
    musics = {video: music_of(video) for video in videos}
    rows = {}
    for video in videos:
        others = [music for other, music in musics.items() if other != video]
        rows[video] = counterfactual(video, others, out, **where)
    adapters = {}
    for video in videos:
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


# ----------------------------------------------------------------------------------------------
# Copies: does the model dance, or does it replay a clip that it was trained on?
# ----------------------------------------------------------------------------------------------


def copy_report(videos, data, wild=None, weights=None, **where):
    """Print and return how near the nearest training clip is to each video, in the VAE's latents,
    and how near it is to the clips held out, which are nobody's copy.

    data, wild: as train.py takes them, whose cache is used. Distances are in the deviations of the
    latents: 0 is a copy.
    """
    given = {name: value for name, value in where.items() if value is not None}
    options, dit = mi.begin(CopyOptions, "sampling", given | {"weights": weights})
    how = options.size, options.frames, dit.config.fps, options.device, mi.DTYPES[options.dtype]
    clips = Preprocessor(os.path.join(data, ".musicinfuser"), options.weights, *how)
    training = clips.clips(find_videos(data, wild))
    held_out = clips.clips(find_videos(data, split="test"))
    if not training or not held_out:
        raise mi.InputError(f"{data} has no clips to compare with; name train.py's --data")
    made = torch.stack([normalised(encoded(video, options, clips), dit) for video in videos])
    known = torch.stack([normalised(latents_in(clips, clip), dit) for clip in held_out])
    bank = (normalised(latents_in(clips, clip), dit) for clip in training)
    indices, distances = quality.nearest(torch.cat([made, known]), bank)
    rows = {}
    for video, i, distance in zip(videos, indices, distances):
        rows[video] = {"nearest": training[i].name, "distance": distance.item()}
    held = distances[len(videos) :].tolist()
    print_copies(rows, held)
    return {"videos": rows, "held_out": held}


@dataclass
class CopyOptions(mi.VideoOptions, mi.RunOptions):
    """The size and the length of the clips."""


def encoded(video, options, clips):
    frames = itertools.islice(mi.read_frames(video, *options.size, clips.fps), options.frames)
    frames = np.stack(list(frames) or [np.zeros((1, 1, 3), np.uint8)])
    if len(frames) < options.frames:
        raise mi.InputError(f"{video} has {len(frames)} frames, fewer than a clip's")
    return quality.latents_of(mi.from_pixels(frames), clips.encoder)


def latents_in(clips, clip):
    return clips.cache.read(clip.latents)["mean"].float()


def normalised(latents, dit):
    return mi.to_dit_space(latents[None], dit.config.mean, dit.config.std)[0]


def print_copies(rows, held_out):
    closest = min(rows, key=lambda video: rows[video]["distance"])
    lines = {"these videos": [row["distance"] for row in rows.values()], "held out": held_out}
    cells = [[name, mean_error(d, 3), f"{min(d):.3f}", len(d)] for name, d in lines.items()]
    print("\n" + markdown(["distance to the nearest training clip", "mean", "least", "of"], *cells))
    print(f"the nearest to one: {closest} to {rows[closest]['nearest']}")


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(description="Does it dance to the music? Scores of videos.")
    add = parser.add_argument
    add("videos", nargs="*", help="as sample.py writes them; without its .json, of its own sound")
    add("--song", help="score against this song instead of the one that each video was made to")
    add("--json", metavar="OUT", help="write there; with --judge, scores.json beside the videos")
    add("--judge", metavar="MODEL", help="a Qwen-Omni's folder: ask it the paper's 11 questions")
    add("--caption", metavar="DIR", help="let it describe each video in DIR, for train.py --wild")
    add("--protocol", action="store_true", help="make and score the paper's 10 prompts x 10 songs")
    add("--songs", metavar="DIR", help="... of these songs: mLH4.*, ... or any ten files")
    add("--counterfactual", action="store_true", help="make the videos again to changed music")
    add("--out", metavar="DIR", help="of the videos made; what is there is not made again")
    add("--copied-from", metavar="DATA", help="how near is the nearest clip of train.py's --data?")
    add("--wild", metavar="DIR", help="... and of its --wild")
    add("--weights", help="of --protocol and --copied-from (default as in sample.py)")
    add("--adapter", help="of --protocol; a file, or none")
    add("--seed", type=int, default=0, help="of --protocol's first video (default 0)")
    add("--device", help="cuda, cpu, ...; default: cuda if there is one")
    add("--dtype", choices=list(mi.DTYPES), help="default: bfloat16 on a GPU, else float32")
    return parser.parse_args()


def check(o):
    if o.caption and not o.judge:
        raise mi.InputError("--caption needs --judge, the model that describes")
    if not (o.videos or o.protocol or o.caption):
        raise mi.InputError("nothing to do: name videos, --protocol or --caption")
    for video in o.videos:
        if not os.path.isfile(video):
            raise mi.InputError(f"no such file: {video}")
        recipe_of(video)
    if o.videos or o.protocol:
        bt.import_librosa()


def main():
    o = arguments()
    check(o)
    if o.caption:
        jd.caption(quality.videos_below(o.caption), o.judge, o.device, o.dtype)
    videos = list(dict.fromkeys(o.videos))
    if o.protocol:
        out = o.out or "outputs/protocol"
        where = {"device": o.device, "dtype": o.dtype}
        videos += protocol(o.songs, out, o.weights, o.adapter, o.seed, **where)
    if videos:
        report(o, videos)


def report(o, videos):
    out = o.json
    if o.judge and not out:
        out = os.path.join(os.path.dirname(videos[0]), "scores.json")
    scores = read_object(out) if out else {}
    scores["beats"] = beat_report(videos, o.song)
    where = {"device": o.device, "dtype": o.dtype}
    if o.copied_from:
        scores["copies"] = copy_report(videos, o.copied_from, o.wild, o.weights, **where)
    if o.counterfactual:
        folder = o.out or "outputs/counterfactual"
        scores["counterfactual"] = counterfactual_report(videos, folder, **where)
    if out:
        mi.save_json(out, scores)
    if o.judge:
        judge_report(videos, o.judge, out, o.device, o.dtype)


if __name__ == "__main__":
    mi.main(main)
