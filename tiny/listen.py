"""The music encoder: a small Wav2Vec 2.0 that is taught the beat's phase, the tempo and the genre.

First on the world's own songs alone (`teach`), then on sampled instruments and recordings too
(`hear_more`).
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import musicinfuser as mi
from tiny import music, recordings, world
from tiny.fit import fit, named
from tiny.recordings import Piece
from tiny.studio import DTYPE, in_folder
from tiny.world import FPS, FRAMES

TOKEN = 0.02  # seconds between Wav2Vec's tokens; the middle of the first is at 0.0125 s
CLIP = mi.audio_seconds(FRAMES, FPS)
WIDTH = 96
# Of the synthesiser's songs, of the sampled instruments', of MMA's, of recordings
SHARES = (0.25, 0.2, 0.25, 0.3)


def teach(steps=700, seed=3):
    """audio_encoder/, on the world's own songs alone."""
    torch.manual_seed(seed)
    wav2vec, head = fresh_wav2vec(), fresh_head()

    def kinds():
        return [synthesised_pieces(500, seed)]

    if learn("audio", wav2vec, head, kinds, (1,), steps, 1.5e-3, seed):
        unseen = synthesised_pieces(64, seed + 1000)
        print_accuracy("the world's songs", wav2vec, head, unseen, seed)


def hear_more(sounds, steps=6000, seed=13):
    """audio_encoder/ goes on with every kind of music.

    sounds: the folder with sound fonts, drum kits and games.
    """
    torch.manual_seed(seed)
    folder = in_folder("audio_encoder")
    wav2vec = mi.load_pretrained_model("Wav2Vec2Model", folder, "cpu").requires_grad_()
    head, kinds = fresh_head(), partial(training_pieces, sounds, seed)
    if learn("hear", wav2vec, head, kinds, SHARES, steps, 1e-3, seed):
        for name, pieces in unseen_pieces(sounds, seed).items():
            print_accuracy(name, wav2vec, head, pieces, seed)


def learn(name, wav2vec, head, kinds, shares, steps, lr, seed, batch=24):
    """Train both on crops of kinds() of pieces, by their shares, and keep the encoder. Returns
    whether any step was left to take: if not, no piece is made."""
    kinds = cache(kinds)

    def loss(step):
        rng = np.random.default_rng((seed, step))
        return beat_loss(wav2vec, head, draw_crops(kinds(), shares, *crop_sizes(step, batch), rng))

    more = fit(name, named(wav2vec=wav2vec, head=head), loss, steps, lr)
    save(wav2vec, in_folder("audio_encoder"))
    return more


def check_sounds(folder):
    """Raises InputError for what is missing, before anything takes long."""
    music.find_sounds(folder)
    music.find_styles(folder)
    recordings.check_trackers()
    for packages in (recordings.TRAINING, recordings.SCORES, recordings.VALIDATION):
        recordings.find_recordings(folder, packages)


def crop_sizes(step, batch):
    """(seconds, crops): one step in four has longer ones."""
    return (6.0, batch // 2) if step % 4 == 3 else (CLIP, batch)


def save(wav2vec, folder):
    from transformers import Wav2Vec2FeatureExtractor

    wav2vec.bfloat16().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    wav2vec.float()


def fresh_wav2vec(layers=4, conv=40, hidden=256):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "intermediate_size": hidden}
    sizes |= {"num_attention_heads": 4, "conv_dim": (conv,) * 7, "vocab_size": 32}
    sizes |= {"num_conv_pos_embeddings": 64, "num_conv_pos_embedding_groups": 8}
    dropouts = "hidden attention activation feat_proj".split()
    rates = {f"{name}_dropout": 0.0 for name in dropouts} | {"layerdrop": 0.0}
    return Wav2Vec2Model(Wav2Vec2Config(mask_time_prob=0.0, **sizes, **rates))


def fresh_head():
    return nn.Linear(WIDTH, 3 + len(world.GENRES))  # cosine and sine of the phase, tempo, genres


# --------------------------------------------------------------------------------------------------
# Songs and recordings
# --------------------------------------------------------------------------------------------------


def training_pieces(sounds, seed):
    """Four lists of Pieces, one for each of SHARES."""
    return (
        synthesised_pieces(448, seed),
        sampled_pieces(560, seed, sounds),
        accompanied_pieces(1000, seed, sounds),
        recordings.pieces_of(sounds, recordings.TRAINING) + played_scores(sounds),
    )


def unseen_pieces(sounds, seed):
    """{name: [Piece]} of songs drawn anew and of the packages that were kept back."""
    return {
        "the world's songs": synthesised_pieces(64, seed + 1000),
        "sampled instruments": sampled_pieces(64, seed + 1000, sounds),
        "accompaniments": accompanied_pieces(64, seed + 1000, sounds),
        "recordings": recordings.pieces_of(sounds, recordings.VALIDATION),
    }


def synthesised_pieces(count, seed):
    return in_parallel("composing", synthesised_piece, [(seed, i) for i in range(count)])


def synthesised_piece(seed, i):
    rng = np.random.default_rng((seed, 1, i))
    song, genre, tempo = music.draw_song(rng)
    return as_piece(song, genre, tempo, "synthesiser")


def sampled_pieces(count, seed, sounds):
    return in_parallel("playing", sampled_piece, [(seed, i, sounds) for i in range(count)])


def sampled_piece(seed, i, sounds):
    rng = np.random.default_rng((seed, 2, i))
    genre = str(rng.choice(list(world.GENRES)))
    tempo, number = music.draw_tempo(rng, genre), int(rng.integers(2**31))
    song = music.play_sampled(genre, tempo, number, 16.0, *sampled_instruments(sounds))
    return as_piece(music.recorded(song, rng), genre, tempo, "sampled")


def accompanied_pieces(count, seed, sounds):
    return in_parallel("accompanying", accompanied_piece, [(seed, i, sounds) for i in range(count)])


def accompanied_piece(seed, i, sounds):
    rng = np.random.default_rng((seed, 3, i))
    styles = styles_of(sounds)
    style, tempo = styles[rng.integers(len(styles))], music.draw_tempo(rng)
    groove, number = str(rng.choice(style)), int(rng.integers(2**31))
    song = music.accompany(groove, tempo, number, 16.0, sampled_instruments(sounds)[0])
    beats = np.arange(0, len(song) / music.RATE, 60 / tempo)
    return Piece(music.recorded(song, rng).astype(np.float16), beats, -1, groove)


def played_scores(sounds):
    """MIDI files, each played with every sound font."""
    fonts = sampled_instruments(sounds)[0]
    found = recordings.find_recordings(sounds, recordings.SCORES)
    jobs = [(path, font) for _, path in found for font in fonts]
    return in_parallel("scores", played_score, jobs)


def played_score(path, font, seconds=recordings.LONGEST):
    with open(path, "rb") as file:
        song = music.level(music.fluidsynth(file.read(), font, seconds))
    end = np.flatnonzero(np.abs(song) > 0.02)[-1] / music.RATE
    return recordings.cut_out(song, recordings.chart_beats(path, end), path)


def in_parallel(name, function, arguments):
    # A fork that computes with several threads waits for its parent's for ever
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(os.cpu_count(), **one_thread) as pool:
        found = pool.map(function, *zip(*arguments), chunksize=4)
        return list(tqdm(found, name, len(arguments), mininterval=10))


@cache
def sampled_instruments(sounds):
    fonts, kits = music.find_sounds(sounds)
    return fonts, [music.load_kit(kit) for kit in kits]


def as_piece(song, genre, tempo, source):
    beats = np.arange(0, len(song) / music.RATE, 60 / tempo)
    return Piece(song.astype(np.float16), beats, list(world.GENRES).index(genre), source)


@cache
def styles_of(sounds):
    return music.find_styles(sounds)


class Crop(NamedTuple):
    sound: np.ndarray  # 16 kHz
    beat: np.ndarray  # the position of each token, in beats
    genre: int  # or -1


def draw_crops(kinds, shares, seconds, count, rng):
    chosen = rng.choice(len(kinds), count, p=shares)
    pieces = [kinds[kind][rng.integers(len(kinds[kind]))] for kind in chosen]
    return [crop_of(piece, seconds, rng) for piece in pieces]


def crop_of(piece, seconds, rng, rougher=True):
    """rougher: at another speed, so that tempos are many, and as recordings are."""
    speed = float(np.exp(rng.uniform(-0.25, 0.25))) if rougher else 1.0
    last = len(piece.samples) / music.RATE - seconds * speed - 0.02
    first, size = int(rng.uniform(0, max(last, 0)) * music.RATE), math.ceil(seconds * music.RATE)
    sound = played_at(speed, piece.samples[first:], size)
    times = first / music.RATE + speed * (TOKEN * np.arange(int(seconds / TOKEN)) + TOKEN / 1.6)
    beat = recordings.beat_at(piece.beats, times)
    sound = music.rough(sound, rng) if rougher else sound
    if rougher and piece.source == "synthesiser" and rng.random() < 0.3:
        sound = music.disturbed(sound, rng)
    return Crop(sound, beat, piece.genre)


def played_at(speed, samples, size):
    samples = samples[: int(size * speed) + 2].astype(np.float32)
    return np.interp(speed * np.arange(size), np.arange(len(samples)), samples)


def waves(samples):
    """(B, samples), normalised as Wav2Vec's feature extractor does it."""
    x = torch.from_numpy(np.stack(samples)).float()
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-7).sqrt()


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def beat_loss(wav2vec, head, crops):
    """(loss, numbers): phase, tempo and genre as the head reads them off the encoder's tokens."""
    with torch.autocast("cpu", DTYPE, enabled=DTYPE == torch.bfloat16):
        y = wav2vec(waves([crop.sound for crop in crops])).last_hidden_state
    y = y.float()  # (B, A, WIDTH)
    out = head(y)
    beat = torch.from_numpy(np.stack([crop.beat for crop in crops])[:, : y.shape[1]])
    tempo = 60 / TOKEN * beat.diff(dim=1).mean(1)  # BPM
    off = out[..., 2] - torch.log2(tempo / 104).float()[:, None]
    turn = torch.stack([(2 * math.pi * beat).cos(), (2 * math.pi * beat).sin()], -1).float()
    phase = (out[..., :2] - turn).square().sum(-1).mean()
    genres, logits = torch.tensor([crop.genre for crop in crops]), out[..., 3:].mean(1)
    known = genres >= 0
    genre, right = logits.sum() * 0, math.nan
    if known.any():
        genre = F.cross_entropy(logits[known], genres[known])
        right = (logits.argmax(1) == genres)[known].float().mean().item()
    numbers = {
        "cosine": F.cosine_similarity(out[..., :2], turn, dim=-1).mean().item(),
        "octaves off": off.abs().mean().item(),
        "genre right": right,
    }
    return phase + 2 * F.smooth_l1_loss(off, torch.zeros_like(off), beta=0.3) + 0.5 * genre, numbers


@torch.no_grad()
def print_accuracy(name, wav2vec, head, pieces, seed, count=192):
    rng = np.random.default_rng((seed, 10**6))
    crops = [crop_of(pieces[i % len(pieces)], CLIP, rng, False) for i in range(count)]
    numbers = beat_loss(wav2vec, head, crops)[1]
    words = " ".join(f"{key} {value:.3f}" for key, value in numbers.items())
    print(f"audio encoder, {name}: {words}")
