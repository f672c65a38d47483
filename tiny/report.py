"""What came of it: the figures of eval/RESULTS.md, and README's pictures."""

import itertools
import os
from functools import cache

import imageio
import numpy as np
import torch

import musicinfuser as mi
from dataset.aist import PLAIN
from eval import films as fl
from eval.beats import beat_correlation, beat_lag, motion_energy
from eval.films import Song, Studio, follow, middles
from eval.quality import features, frechet_distance, gaussian, load_reference
from eval.style import consistency, style
from eval.tables import mean_error
from tiny import music, recordings, world
from tiny.studio import HERE, WORK, frozen_encoder, in_folder
from tiny.world import FPS, FRAMES

SONGS = os.path.join(WORK, "songs")
CHOICES = (  # of `choose`: lora scale, cfg, music cfg, music above
    (1.0, 2.5, 4.0, 0.0),
    (1.0, 2.5, 4.0, 0.6),
    (1.0, 1.5, 4.0, 0.6),
    (1.0, 2.5, 7.0, 0.6),
    (0.75, 2.5, 4.0, 0.6),
    (0.75, 2.0, 4.0, 0.6),
    (0.75, 1.5, 4.0, 0.6),
    (0.75, 2.5, 7.0, 0.6),
    (0.5, 2.5, 4.0, 0.6),
    (0.5, 1.5, 4.0, 0.6),
    (0.5, 2.5, 7.0, 0.6),
)


def report(adapter=None, count=32, sounds=None):
    """Print the figures of the shipped adapter, or of another; only the shipped one's pictures
    are kept."""
    studio = studio_of(adapter)
    songs = unseen_songs(count)
    people, dogs = prompts_of("person", count), prompts_of("dog", count)
    for subject in ("person", "dog"):
        looks = [{"subject": subject}] * count
        line(f"ground truth, {subject}", ground_truth(songs, looks), songs)
    first = filmed(studio, "people", people, songs)
    second = filmed(studio, "dogs", dogs, songs)
    print_lag(first, songs)
    for subject in ("person", "dog"):
        prompt = f"a {subject} dancing"
        print_likeness(filmed(studio, prompt, [prompt] * count, songs), subject)
    for speed in (0.75, 1.25):
        filmed(studio, f"people, speed {speed}", people, songs, speed)
        filmed(studio, f"dogs, speed {speed}", dogs, songs, speed)
    filmed(studio, "people, music cfg 0", people, songs, music_cfg=0.0)
    for name, find in (("sampled instruments", sampled_songs), ("recordings", recorded_songs)):
        try:
            found = find(count, sounds)
        except mi.InputError as error:  # they are the user's to install
            print(f"not measured: {error}")
            continue
        plain = ["a person dancing"] * count
        for kind, prompts in (("people", people), ("a person dancing", plain)):
            print_pulse(filmed(studio, f"{kind}, {name}", prompts[: len(found)], found), found)
    alone = {"subject": "person", "count": 1, "place": "studio"}
    looks = [alone | {"genre": song.genre} for song in songs]
    print_style("style, ground truth", ground_truth(songs, looks), songs)
    print_style("style", list(studio.film([PLAIN] * count, songs)), songs)
    print_long(studio, people[:8], songs[:8])
    print(f"Frechet distance of the prior's clips: {to_the_world(of_the_prior()):.3f}")
    if not adapter and count >= 8:
        contact_sheet(in_folder("contact_sheet.jpg"), [*first[2:7], *second[:5]])
        moving_picture(in_folder("dancing.gif"), [*first[:4], *second[:4]])


def of_prompts(prompts, adapter=None, count=32):
    """Print the figures of some prompts alone."""
    studio, songs = studio_of(adapter), unseen_songs(count)
    for prompt in prompts:
        filmed(studio, prompt, [prompt] * count, songs)


def choose(adapter=None, count=32):
    """Print what guidance does, on other songs than the report's: the folder's defaults are chosen
    here."""
    songs = unseen_songs(count, seed=78)
    for lora, cfg, music_cfg, above in CHOICES:
        given = {"cfg": cfg, "music_cfg": music_cfg, "music_above": above}
        studio = studio_of(adapter, lora)
        name, films = f"LoRA x {lora}, cfg {cfg}, music cfg {music_cfg} above {above}", []
        for subject in ("person", "dog"):
            prompts = prompts_of(subject, count, 78)
            films += filmed(studio, f"{subject}, {name}", prompts, songs, **given)
            prompt = f"a {subject} dancing"
            print_likeness(filmed(studio, prompt, [prompt] * count, songs, **given), subject)
        print(f"Frechet distance of the captions' films: {to_the_world(films):.3f}", flush=True)


def studio_of(adapter, lora_scale=None):
    adapter = adapter or in_folder("musicinfuser.safetensors")
    return Studio(HERE, adapter, lora_scale=lora_scale)


def prompts_of(subject, count, seed=7):
    rng = np.random.default_rng((seed, world.SUBJECTS.index(subject)))
    scenes = [world.draw_scene(rng, subject=subject, camera="01") for _ in range(count)]
    return [world.caption(scene, rng)[0] for scene in scenes]


# --------------------------------------------------------------------------------------------------
# Songs
# --------------------------------------------------------------------------------------------------


def unseen_songs(count, seed=77):
    return fl.unseen_songs(count, SONGS, seed=seed, first=10_000 * seed)


def sampled_songs(count, sounds):
    fonts, kits = music.find_sounds(sounds)
    kits = [music.load_kit(kit) for kit in kits]

    def play(genre, tempo, seed, seconds):
        return music.play_sampled(genre, tempo, seed, seconds, fonts, kits)

    return fl.unseen_songs(count, SONGS, play, first=770_000)


def recorded_songs(count, sounds):
    """Parts of recordings of the packages that were kept back, at most two of each, and only with
    so many beats that the trackers hardly agree by chance."""
    by_source = {}
    for piece in recordings.pieces_of(sounds, recordings.VALIDATION):
        if len(piece.beats) >= 16:
            by_source.setdefault(piece.source, []).append(piece)
    turns = itertools.zip_longest(*(pieces[:2] for pieces in by_source.values()))
    # One of each, then the others: the next one, whose beats are the control, is another's
    pieces = [piece for turn in turns for piece in turn if piece][:count]
    rng, songs = np.random.default_rng(7), []
    for i, piece in enumerate(pieces):
        path = os.path.join(SONGS, f"recording-{i}.wav")
        music.save_wav(path, music.level(piece.samples.astype(np.float32)))
        songs.append(Song(path, rng.uniform(0.6, 1.6), piece.beats, ""))  # anywhere in a beat
    return songs


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def ground_truth(songs, looks):
    """The world's own dances to songs, in the studio's camera; looks: what draw_scene is told."""
    rng, films = np.random.default_rng(8), []
    for song, look in zip(songs, looks, strict=True):
        scene = world.draw_scene(rng, camera="01", **look)
        films.append(world.render(scene, torch.from_numpy(song.positions(FRAMES))))
    return films


def filmed(studio, name, prompts, songs, speed=1.0, **given):
    films = list(studio.film(prompts, songs, speed=speed, **given))
    line(name, films, songs, speed)
    return films


def line(name, films, songs, speed=1.0):
    """r with the own and with another's song, ± the standard error over videos; the correlation
    of the tempos."""
    own, other, tempos = follow(films, songs, speed)
    values = f"r {mean_error(own)}   another song {mean_error(other)}   tempo {tempos:.2f}"
    print(f"{name:30} {values}", flush=True)


def print_likeness(films, subject):
    """Is it still what the prompt asks for? Nothing in r asks what it is that moves."""
    own, prior = to_the_world(films, subject), likeness_of_the_prior(subject, len(films))
    print(f"Frechet distance to the world's {subject}: {own:.3f}, the prior's: {prior:.3f}")


@cache
def likeness_of_the_prior(subject, count):
    return to_the_world(Studio(HERE).film([f"a {subject} dancing"] * count), subject)


def print_pulse(films, songs):
    """What a dance half a beat off has in common with one on the beat: r but for its sign."""
    own, other = (np.abs(r) for r in follow(films, songs)[:2])
    values = f"r {mean_error(own)}   another song {mean_error(other)}"
    print(f"{'  on the beat or half-way':30} {values}", flush=True)


def print_lag(films, songs, thirds=3):
    """By how much the rests come after the beats: a dance that runs slow is late in the end."""
    lags = []
    for film, song in zip(films, songs):
        beats = middles(song.positions(len(film)))
        parts = zip(np.array_split(motion_energy(film), thirds), np.array_split(beats, thirds))
        lags.append([beat_lag(*part) for part in parts])
    turned = np.angle(np.exp(2j * np.pi * np.array(lags)).mean(0)) / (2 * np.pi)
    print("people, late by", ", ".join(f"{lag:+.2f}" for lag in turned), "beats, by thirds")


def print_style(name, films, songs):
    """Does the music choose the dance: its genre's own, or at least the same for all its songs?"""
    beats, genres = [song.positions(FRAMES) for song in songs], [song.genre for song in songs]
    share = style(films, beats, genres)[0]
    same, chance, deviation = consistency(films, beats, genres)
    print(
        f"{name:30} its genre's dance {share:.2f} (chance 0.10)   most like its genre's other "
        f"videos {same:.2f} (chance {chance:.2f} ± {deviation:.2f})",
        flush=True,
    )


def print_long(studio, prompts, songs, frames=271):
    films = list(studio.film(prompts, songs, frames=frames))
    third = frames // 3
    for name, part in (("first", slice(0, third)), ("last", slice(frames - third, frames))):
        beats = [middles(song.positions(frames)[part]) for song in songs]
        r = [beat_correlation(motion_energy(film[part]), b) for film, b in zip(films, beats)]
        print(f"{frames} frames, {name} third: r {mean_error(r)}", flush=True)


def of_the_prior(count=128, seed=9):
    """Silent films, of all subjects."""
    rng = np.random.default_rng(seed)
    return Studio(HERE).film([world.caption(world.draw_scene(rng), rng)[0] for _ in range(count)])


def to_the_world(films, subject=None):
    """The Frechet distance to the world's clips: those of reference.safetensors, or of one such
    subject in the studio."""
    encoder = frozen_encoder()
    found = gaussian([features(mi.from_pixels(film), encoder) for film in films])
    if subject:
        return frechet_distance(*found, *world_of(subject))
    width = encoder.output_proj.in_features
    (mean, cov), _ = load_reference(in_folder("reference.safetensors"), width)
    return frechet_distance(*found, mean, cov)


@cache
def world_of(subject, count=64):
    """(mean, cov) of the features of what "a person dancing" means in the world."""
    rng = np.random.default_rng(10)
    usual = {"subject": subject, "count": 1, "place": "studio", "camera": "01"}
    usual["colour"] = world.USUAL[subject]
    films = [
        world.render(world.draw_scene(rng, **usual), world.steady_beat(rng)) for _ in range(count)
    ]
    return gaussian([features(mi.from_pixels(film), frozen_encoder()) for film in films])


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def contact_sheet(path, films, every=6):
    """A row a film, a column every so many frames."""
    rows = [np.concatenate(list(film[::every]), 1) for film in films]
    with mi.written_whole(path) as temporary:
        imageio.imwrite(temporary, np.concatenate(rows, 0), format="jpg", quality=88)


def moving_picture(path, films, columns=4):
    """A GIF of films side by side, 15 frames a second."""
    rows = [np.concatenate(films[i : i + columns], 2) for i in range(0, len(films), columns)]
    frames = np.concatenate(rows, 1)[::2]
    with mi.written_whole(path) as temporary:
        imageio.mimsave(temporary, list(frames), format="GIF", duration=1000 * 2 / FPS, loop=0)
