"""Films of the toy world by an adapter, and what they are worth: r, tempo, style, Frechet distance.

Top to bottom:   songs and scenes | sampling many films | their scores
"""

import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import musicinfuser as mi
import sample
from dataset.aist import PLAIN
from eval import beats as bt
from eval import quality
from eval.style import style
from tiny import music, world
from tiny.recordings import beat_at

# ----------------------------------------------------------------------------------------------
# Songs that no stage of the toy was trained on, and who dances to them
# ----------------------------------------------------------------------------------------------

KINDS = {  # name: what is fixed of their scenes
    "people": {"subject": "person", "place": "studio"},
    "dogs": {"subject": "dog"},
    "people elsewhere": {"subject": "person"},
    "plain prompt": {"subject": "person", "place": "studio", "count": 1},
}


class Song(NamedTuple):
    """A file, and where in it a film begins."""

    path: str
    start: float  # seconds
    beats: np.ndarray  # (K,), seconds
    genre: str

    def positions(self, frames, speed=1.0):
        """(frames,): where in the song each frame is, in beats."""
        return beat_at(self.beats, self.start + speed * np.arange(frames) / world.FPS)


def unseen_songs(count, folder, make=music.compose, seed=77, first=900_000):
    """[Song], one genre after another, of 80 to 144 BPM: three quarters and five quarters of them
    lie within what was trained on. make(genre, tempo, number, seconds): numbers from `first` on."""
    songs = []
    for i in range(count):
        genre = list(world.GENRES)[i % len(world.GENRES)]
        rng = np.random.default_rng((seed, i))
        tempo = float(np.exp(rng.uniform(np.log(80), np.log(144))))
        path = os.path.join(folder, f"{make.__name__}-{seed}-{first + i}-{genre}.wav")
        if not os.path.exists(path):
            music.save_wav(path, make(genre, tempo, first + i, 20.0))
        songs.append(Song(path, float(rng.uniform(0, 3)), np.arange(0, 20, 60 / tempo), genre))
    return songs


def scenes_of(kind, count, seed):
    """(scenes, prompts): each dances its song's genre; the plain prompt tells nothing of it."""
    rng = np.random.default_rng((seed, list(KINDS).index(kind)))
    genres, scenes, prompts = list(world.GENRES), [], []
    for i in range(count):
        look = {"camera": "01", "genre": genres[i % len(genres)]} | KINDS[kind]
        if kind == "people elsewhere":
            look["place"] = str(rng.choice(world.PLACES[1:]))
        scenes.append(world.draw_scene(rng, **look))
        told = world.caption(scenes[-1], rng)[0]
        prompts.append(PLAIN if kind == "plain prompt" else told)
    return scenes, prompts


# ----------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------


class Studio:
    """A weights folder's models, for many films at once; as sample.py makes them."""

    def __init__(self, weights, adapter=None, device="cpu", dtype=torch.float32, lora_scale=None):
        self.weights, self.device = weights, device
        self.dit = mi.load_dit(os.path.join(weights, "dit.safetensors"), device, dtype)
        self.decoder = mi.load_decoder(os.path.join(weights, "decoder.safetensors"), device, dtype)
        self.encoder = mi.load_encoder(os.path.join(weights, "encoder.safetensors"), device, dtype)
        self.options = mi.settle(mi.SamplingOptions, self.dit.config.sampling, {})
        self.listen = None
        if adapter:
            given = {"lora_scale": lora_scale}
            preferred = mi.settle(sample.Options, self.dit.config.sampling, given)
            mi.load_adapter(self.dit, adapter, lora_scale=preferred.lora_scale)
            self.listen = mi.AudioEncoder(weights, device)

    def film(self, prompts, songs=None, seed=0, speed=1.0, at_once=16, **given):
        """Yield uint8 (T, H, W, 3) for each prompt and its Song; films of a seed have its noise.
        given: fields of musicinfuser.SamplingOptions."""
        o, config = replace(self.options, **given), self.dit.config
        *texts, null = mi.encode_text(self.weights, [*prompts, ""], self.device)
        for first in range(0, len(prompts), at_once):
            rows = range(first, min(first + at_once, len(prompts)))
            noise = [mi.noise_for(seed + i, config, o.frames, o.size) for i in rows]
            inputs = torch.cat(noise).to(self.device), stacked([texts[i] for i in rows])
            inputs += (stacked([null for _ in rows]),)
            audio = None
            if songs and self.listen:
                audio = self.hear([songs[i] for i in rows], o.frames, speed)
            for video in mi.noise_to_video(self.dit, self.decoder, *inputs, audio, o):
                yield mi.to_pixels(video)

    def hear(self, songs, frames, speed):
        """(B, A, D_audio)"""
        how = frames, self.dit.config.fps
        waves = [mi.music_window(song.path, *how, song.start, speed)[0] for song in songs]
        return torch.cat([self.listen(waveform) for waveform in waves])

    def through_vae(self, film):
        """A film as the VAE lets it through."""
        with torch.no_grad():
            mean, _ = self.encoder(mi.from_pixels(film)[None].to(self.device))
            return mi.to_pixels(self.decoder(mean)[0])


def stacked(texts):
    """[(y_feat (1, L, D), y_mask (1, L))] -> one such pair, (B, ...), padded."""
    columns = ([part[0] for part in column] for column in zip(*texts))
    return tuple(torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for column in columns)


# ----------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------


def follow(films, songs, speed=1.0):
    """(r of each film with its own song, with the next one's, how the tempos of motion and music
    correlate over the films)."""
    energies = [bt.motion_energy(film) for film in films]
    beats = [middles(song.positions(len(films[0]), speed)) for song in songs]
    own = np.array([bt.beat_correlation(e, b) for e, b in zip(energies, beats)])
    other = np.array([bt.beat_correlation(e, b) for e, b in zip(energies, beats[1:] + beats[:1])])
    tempos = [bt.motion_tempo(energy) for energy in energies]
    if len(set(tempos)) == 1:
        return own, other, 0.0
    return own, other, np.corrcoef(tempos, [np.diff(b).mean() for b in beats])[0, 1]


def middles(beats):
    """Between each two frames, where the motion is."""
    return (beats[1:] + beats[:-1]) / 2


def film_scores(studio, count, seed, folder, truth=False):
    """{kind: follow()}, style of the plain prompt's films, frechet of all others, to the world's.

    truth: the world's own dances through the VAE, what a perfect model would reach. Only Frechet
    distances of the same number of films compare.
    """
    reference = os.path.join(studio.weights, quality.REFERENCE)
    world_clips, _ = quality.load_reference(reference, studio.encoder.output_proj.in_features)
    songs = unseen_songs(count, folder)
    scores, features = {}, []
    for kind in KINDS:
        scenes, prompts = scenes_of(kind, count, seed)
        beats = [song.positions(studio.options.frames) for song in songs]
        if truth:
            danced = (world.render(scene, torch.from_numpy(b)) for scene, b in zip(scenes, beats))
            films = [studio.through_vae(film) for film in danced]
        else:
            films = list(studio.film(prompts, songs, 1000 * seed))
        own, other, tempo = follow(films, songs)
        scores[kind] = {"r": own.mean(), "other": other.mean(), "tempo": tempo}
        if kind == "plain prompt":
            genres = [scene["genre"] for scene in scenes]
            scores["style"], _ = style(films, beats, genres)
        else:
            features += [quality.features(mi.from_pixels(f), studio.encoder) for f in films]
    scores["frechet"] = quality.frechet_distance(*quality.gaussian(features), *world_clips)
    return scores
