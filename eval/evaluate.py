"""Does it dance to the music? Scores of videos:   python -m eval.evaluate videos/*.mp4

Top to bottom:   the beats' report | the judge's report | the command line
"""

import argparse
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import numpy as np
from tqdm import tqdm

import musicinfuser as mi
from eval import beats as bt
from eval import judge as jd
from eval import quality
from eval.beside import music_of, read_object, recipe_of, without_music
from eval.copies import copy_report
from eval.counterfactual import counterfactual_report
from eval.protocol import protocol

# ----------------------------------------------------------------------------------------------
# Beats: each video with its own song, beside what chance gives
# ----------------------------------------------------------------------------------------------


def score_beats(videos, song=None):
    """{video: {"music", "adapter", "music_cfg", "own", "control"}}; the unscorable are named."""
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
    recipe = recipe_of(video)
    row = {"music": music, **{name: recipe.get(name) for name in ("adapter", "music_cfg")}}
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
    add("--protocol", action="store_true", help="make and score 10 prompts x 10 held-out songs")
    add("--songs", metavar="DIR", help="... of these songs: mLH4.*, ... or any ten files")
    add("--counterfactual", action="store_true", help="make the videos again to changed music")
    add("--out", metavar="DIR", help="of the videos made; what is there is not made again")
    add("--copied-from", metavar="DATA", help="how near is the nearest clip of train.py's --data?")
    add("--wild", metavar="DIR", help="... and of its --wild")
    add("--min-size", nargs=2, type=int, metavar="PIXELS", help="... as it was given there")
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
    if o.judge and not os.path.isdir(o.judge):
        raise mi.InputError(f"no such folder: {o.judge}")
    for file in [*o.videos, *([o.song] if o.song else [])]:
        if not os.path.isfile(file):
            raise mi.InputError(f"no such file: {file}")
    for video in o.videos:
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
        o.device, _ = mi.choose_device(o.device)
        share = mi.join_processes(o)
        where = {"device": o.device, "dtype": o.dtype}
        videos += protocol(o.songs, out, o.weights, o.adapter, o.seed, share, **where)
        if share[0] > 0:  # the first process reports
            return
    if videos:
        report(o, videos)


def report(o, videos):
    out = o.json
    if o.judge and not out:
        out = os.path.join(os.path.dirname(videos[0]), "scores.json")
    scores = read_object(out) if out else {}
    where = {"device": o.device, "dtype": o.dtype}

    def keep(name, found):
        scores[name] = found
        if out:
            mi.save_json(out, scores)

    keep("beats", beat_report(videos, o.song))
    if o.copied_from:
        data = o.copied_from, o.wild, o.weights, o.min_size
        keep("copies", copy_report(videos, *data, **where))
    if o.counterfactual:
        folder = o.out or "outputs/counterfactual"
        keep("counterfactual", counterfactual_report(videos, folder, o.song, **where))
    if o.judge:
        judge_report(videos, o.judge, out, o.device, o.dtype)


if __name__ == "__main__":
    mi.main(main)
