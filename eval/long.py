"""Whole songs: are there joins, does the scene drift, does the dance keep to the end, what does it
cost?   python -m eval.long

Top to bottom:   scores of a film | the films | the tables
A film is uint8 (T, H, W, 3); differences are of pixel values from 0 to 255. Films and scores are
kept as soon as they are there, under names of all that decides them; the same command goes on.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace

import imageio
import numpy as np
import torch

import musicinfuser as mi
import sample
from eval import beats as bt
from eval.plot import read_json
from eval.quality import features
from eval.tables import markdown, mean_error
from musicinfuser import option
from tiny import music

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPTS = (
    "a person dancing",
    "a woman in a red shirt dancing in the street",
    "a dog dancing in a park",
)
TEMPOS = 100, 130  # BPM of the song's first and second half


@dataclass
class Options(mi.RunOptions):
    prompts: tuple = option(PROMPTS, "of the films beside those all at once", parse=str)
    seed: int = option(0, "of all films", low=0)
    solver: str = option("ab2", "of the equation", choices=tuple(mi.SOLVERS))
    steps: int = option(20, "of the solver", low=2)
    frames: int = option(271, "of the films beside those all at once")
    seconds: int = option(60, "of the song whose tempo changes", low=6)
    lengths: tuple = option((9, 30, 60, 180), "seconds of the films that are timed", parse=int)
    timed_steps: int = option(2, "of the solver, for the films that are timed", low=2)
    quick: bool = option(False, "one prompt, short films, few steps: only to see that it runs")
    out: str = option("outputs/long", "folder; the same command goes on in it")


QUICK = {"prompts": PROMPTS[:1], "steps": 2, "frames": 175, "seconds": 9, "lengths": (5, 10)}

# ----------------------------------------------------------------------------------------------
# Scores of a film
# ----------------------------------------------------------------------------------------------


def joins_of(plan):
    """Frames at which a window begins to count, or has ended; plan: of mi.windows."""
    begins = [6 * first + 1 for first, _ in plan[1:]]  # its first latent frame counts nothing
    ends = [6 * (first + len(weights) - 1) + 1 for first, weights in plan[:-1]]
    return sorted({*begins, *ends})


def z_score(values, places):
    """How far the mean of the values (T,) at those places is from that of the others."""
    there = np.zeros(len(values), bool)
    there[places] = True
    others = values[~there]
    return float((values[there].mean() - others.mean()) / max(others.std(), 1e-9))


def join_scores(film, joins):
    """z of the frame difference, and of the mean jump of each channel, at the joins."""
    film = film.astype(np.float32)
    changes = np.array([np.abs(b - a).mean() for a, b in zip(film, film[1:])])
    jumps = np.abs(np.diff(film.mean((1, 2)), axis=0)).mean(1)
    before = [join - 1 for join in joins]  # value i lies between frames i and i + 1
    return {"join": z_score(changes, before), "jump": z_score(jumps, before)}


def drift_scores(film, encoder, fps):
    """Deviations over the seconds of a film.

    place: of the half of the pixels that move least, each second's median. figure: of the mean
    colour of what differs from that second's median. features: the mean distance of the VAE's
    features of a second to those of the first.
    """
    seconds = [film[i : i + fps].astype(np.float32) for i in range(0, len(film) - fps + 1, fps)]
    medians = np.stack([np.median(second, 0) for second in seconds])
    moving = np.mean([second.std(0).mean(-1) for second in seconds], 0)  # (H, W)
    still = moving <= np.median(moving)
    figures = [figure_colour(*pair) for pair in zip(seconds, medians)]
    looks = [look(second, encoder) for second in seconds]
    return {
        "place": float(medians[:, still].std(0).mean()),
        "figure": float(np.std(figures, 0).mean()),
        "features": float(np.mean([(each - looks[0]).norm() for each in looks[1:]])),
    }


def figure_colour(second, median):
    moved = np.abs(second - median).sum(-1) > 60
    return second[moved].mean(0) if moved.any() else median.mean((0, 1))


@torch.no_grad()
def look(second, encoder):
    """(C,): the mean of the VAE's features."""
    count = (len(second) - 1) // 6 * 6 + 1
    return features(mi.from_pixels(second[:count]), encoder).mean(0)


def beats_by_thirds(film, beats, fps):
    """[(r, tempo of the motion / of the music)] of a film whose frames are at these beats (T,)."""
    energy = bt.motion_energy(film)
    beats, third = (beats[1:] + beats[:-1]) / 2, len(energy) // 3
    scores = []
    for i in range(3):
        some = slice(i * third, (i + 1) * third)
        tempo = 60 * fps * np.diff(beats[some]).mean()
        ratio = bt.motion_tempo(energy[some], fps) / tempo
        scores.append((bt.beat_correlation(energy[some], beats[some]), float(ratio)))
    return scores


# ----------------------------------------------------------------------------------------------
# The films
# ----------------------------------------------------------------------------------------------


def song_of(folder, seconds):
    """A song whose tempo changes in the middle."""
    path = os.path.join(folder, f"song-{seconds}.wav")
    if not os.path.exists(path):
        halves = [music.compose("HO", tempo, 424242, seconds / 2) for tempo in TEMPOS]
        music.save_wav(path, np.concatenate(halves))
    return path


def beats_at(frames, fps, seconds):
    """The position in that song, in beats, of each frame; its second half too begins on a beat."""
    t, half = np.arange(frames) / fps, seconds / 2
    second = math.ceil(half * TEMPOS[0] / 60) + (t - half) * TEMPOS[1] / 60
    return np.where(t < half, t * TEMPOS[0] / 60, second)


class Films:
    """Makes films as sample.py does, and keeps what is measured of them."""

    def __init__(self, options, config):
        self.options, self.fps = options, config.fps
        self.window = mi.longest_at_once(config)
        self.encoder = mi.load_encoder(os.path.join(options.weights, "encoder.safetensors"))
        names = "weights", "device", "dtype", "offload", "compile", "solver", "steps"
        self.given = {name: getattr(options, name) for name in names}
        self.given |= {"song": song_of(options.out, options.seconds), "seeds": (options.seed,)}

    def film(self, **given):
        """(path of a film, path for its scores), made unless it is there."""
        given = self.given | given
        begin = os.path.join(self.options.out, f"film-{key_of(given)}")
        if not os.path.exists(f"{begin}.mp4"):
            sample.generate(**given | {"out": f"{begin}.mp4"})
        return f"{begin}.mp4", f"{begin}.scores.json"

    def scores(self, **given):
        """All scores of a film, and its path."""
        path, kept = self.film(**given)
        if not os.path.exists(kept):
            mi.save_json(kept, self.measure(bt.film(path, self.fps)))
        return read_json(kept), path

    def measure(self, film):
        plan = mi.windows(mi.latent_frames(len(film)), mi.latent_frames(self.window))
        beats = beats_at(len(film), self.fps, self.options.seconds)
        found = join_scores(film, joins_of(plan)) | drift_scores(film, self.encoder, self.fps)
        return found | {"thirds": beats_by_thirds(film, beats, self.fps)}

    def cost(self, seconds):
        """{seconds, memory} of a process of its own, of few steps."""
        frames = seconds * self.fps // 6 * 6 + 1
        how = {"prompt": PROMPTS[0], "frames": frames, "steps": self.options.timed_steps}
        given = self.given | how
        where = "-offloaded" if given["offload"] else ""  # which decides no film, but what it costs
        kept = os.path.join(self.options.out, f"cost-{seconds}-{key_of(given)}{where}.json")
        if not os.path.exists(kept):
            mi.save_json(kept, self.timed(seconds, given))
        return read_json(kept)

    def timed(self, seconds, given):
        line = [sys.executable, os.path.join(ROOT, "sample.py"), given["song"], given["prompt"]]
        for name in ("frames", "steps", "weights", "device", "dtype", "solver"):
            line += [f"--{name}", given[name]]
        for name in ("offload", "compile"):
            if given[name]:
                line.append(f"--{name}")
        with tempfile.TemporaryDirectory() as folder:
            line = [*map(str, line), "--out", folder]
            run = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        told = re.search(r"^([\d.]+) s, peak memory ([\d.]+) GB", run.stdout, re.M)
        if run.returncode or not told:
            raise mi.InputError(f"the film of {seconds} s was not made; see above")
        return {"seconds": float(told[1]), "memory": float(told[2])}


def key_of(given):
    """Of all that decides a film, files by their content."""
    options, dit = mi.begin(sample.Options, "sampling", given)
    sample.check(options, dit)
    (state,) = sample.states_of(options, True).values()
    return state.key[:12]


# ----------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------

JOIN_AND_DRIFT = {
    "join": "z of the frame difference at joins",
    "jump": "z of the colour's jump",
    "place": "drift of the place",
    "figure": "of the figure",
    "features": "of the features",
}


def report(**given):
    """Measure what is missing, print the tables, write the contact sheet. Raises InputError."""
    own = {name: getattr(Options, name) for name in ("solver", "steps", "frames")}  # not theirs
    options, dit = mi.begin(Options, "sampling", own | given)
    if options.quick:
        options = replace(options, **QUICK)
    longest = mi.longest_at_once(dit.config)
    if options.frames < 3 * dit.config.fps or options.frames <= longest:
        raise mi.InputError(f"--frames must be three seconds or more, and more than {longest}")
    os.makedirs(options.out, exist_ok=True)
    films = Films(options, dit.config)
    print_drift(films)
    print_song(films)
    print_cost(films)


def print_drift(films):
    frames, rows = films.options.frames, []
    for name, window in (("all at once", frames), (f"windows of {films.window}", films.window)):
        how = {"frames": frames, "window_frames": window}
        scores = [films.scores(prompt=prompt, **how)[0] for prompt in films.options.prompts]
        rows.append([name] + [mean_error([s[key] for s in scores]) for key in JOIN_AND_DRIFT])
    print(f"\n{frames} frames, {len(films.options.prompts)} prompts\n")
    print(markdown(["", *JOIN_AND_DRIFT.values()], *rows))


def print_song(films):
    scores, path = films.scores(prompt=films.options.prompts[0], whole_song=True)
    sheet = os.path.join(films.options.out, "contact_sheet.jpg")
    contact_sheet(sheet, bt.film(path, films.fps), films.fps)
    print(f"\n{films.options.seconds} s, the tempo changing in the middle: {path}, {sheet}\n")
    print(markdown(list(JOIN_AND_DRIFT.values()), [f"{scores[key]:.2f}" for key in JOIN_AND_DRIFT]))
    rows = zip(("first", "middle", "last"), scores["thirds"])
    rows = [[name, f"{r:.2f}", f"{tempo:.2f}"] for name, (r, tempo) in rows]
    print(
        "\n"
        + markdown(["third", "r", "tempo of motion / of music (of both, in the middle)"], *rows)
    )


def print_cost(films):
    rows = []
    for seconds in films.options.lengths:
        cost = films.cost(seconds)
        rows.append([seconds, f"{cost['seconds']:.0f}", f"{cost['memory']:.2f}"])
    print(f"\n{films.options.timed_steps} steps, {films.given['solver']}\n")
    print(markdown(["seconds of video", "seconds it takes", "peak memory, GB"], *rows))


def contact_sheet(path, film, every, columns=15):
    """A frame a second, row by row."""
    shown = film[::every]
    blank = np.zeros((-len(shown) % columns, *film.shape[1:]), np.uint8)
    shown = np.concatenate([shown, blank])
    rows = [np.concatenate(list(shown[i : i + columns]), 1) for i in range(0, len(shown), columns)]
    with mi.written_whole(path) as temporary:
        imageio.imwrite(temporary, np.concatenate(rows), format="jpg", quality=88)


def main():
    parser = mi.parser_for(Options, "Joins, drift, beat and cost of long videos.")
    report(**vars(parser.parse_args()))


if __name__ == "__main__":
    mi.main(main)
