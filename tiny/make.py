"""`python -m tiny.make`: renders the toy dance world and trains everything in tiny/ from nothing, with fixed seeds.

The world: people, dogs and rabbits, one to three of them, dance ten genres' choreographies. A dance is a row of key
poses that are hit on the beats, with ease in between, so that everything rests on the beat and moves between beats.
"""

import json
import math
import os
import shutil
import sys
import time
import wave

import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import adaptability
import musicinfuser as mi
import train
from eval.evaluate import beat_correlation, motion_energy, motion_tempo

SIZE, FPS, FRAMES = 64, 30, 73
HERE = os.path.dirname(os.path.abspath(__file__))
WORK = os.path.join(HERE, "work")  # unfinished stages

# ------------------------------------------------------------------------------------------------------------------
# The world in pictures
# ------------------------------------------------------------------------------------------------------------------

SUBJECTS = ("person", "dog", "rabbit")
COLOURS = {
    "red": (0.80, 0.22, 0.22), "blue": (0.20, 0.36, 0.80), "green": (0.16, 0.58, 0.28),
    "yellow": (0.90, 0.78, 0.22), "purple": (0.56, 0.26, 0.68), "orange": (0.92, 0.52, 0.16),
}  # fmt: skip
PLACES = ("studio", "park", "beach", "street", "stage")
GENRES = {  # AIST's codes: name, tempo the genre likes (BPM), four key poses of the basic dance, eight of the advanced
    "BR": ("Break", 125, "UDk DUq UDk DUq", "UDk DUq SSs UUn UDq DUk SSs DDj"),
    "PO": ("Pop", 110, "SBn BSn SBn BSn", "SBn BSn SUw USw BBn SSw SBn DDs"),
    "LO": ("Lock", 105, "PHl HPr PHl HPr", "PHl HPr UUs HHn PHr HPl SSs HHj"),
    "MH": ("Middle Hip-hop", 95, "BBs DDn BBs DDn", "BBs DDn SDl DSr BBs UUn DSl SDr"),
    "LH": ("LA style Hip-hop", 90, "SSl XXr SSl XXr", "SSl XXr UXl XUr SSs XXn USl SUr"),
    "HO": ("House", 120, "DDl DDr BBl BBr", "DDl BBr DDl UUr BBk DDq BBk UUq"),
    "WA": ("Waack", 115, "UUn SSn UUn SSn", "UUn SSn UXw XUw SUl USr UUn XXs"),
    "KR": ("Krump", 85, "XXs UUw XXs UUw", "XXs UUw PDk DPq XXs BBw UDk DUq"),
    "JS": ("Street Jazz", 100, "USl SUr USl SUr", "USl SUr XXn SSw UDk DUq USs DDn"),
    "JB": ("Ballet Jazz", 80, "UUj DDn SSj DDn", "UUj DDn USk SUq SSj DDs UUk UUq"),
}
HANDS = {  # from the shoulder, outwards and down, in body heights
    "U": (0.10, -0.38), "S": (0.40, 0.00), "D": (0.10, 0.36), "B": (0.24, -0.20), "H": (0.10, 0.22),
    "X": (-0.14, 0.10), "P": (0.30, -0.32),
}  # fmt: skip
FEET = {  # left (outwards, up), right (outwards, up), sideways shift and crouch of the body
    "n": ((0.08, 0.00), (0.08, 0.00), 0.00, 0.00), "w": ((0.20, 0.00), (0.20, 0.00), 0.00, 0.03),
    "l": ((0.20, 0.00), (0.02, 0.00), -0.12, 0.02), "r": ((0.02, 0.00), (0.20, 0.00), 0.12, 0.02),
    "k": ((0.26, 0.16), (0.04, 0.00), 0.05, 0.00), "q": ((0.04, 0.00), (0.26, 0.16), -0.05, 0.00),
    "s": ((0.17, 0.00), (0.17, 0.00), 0.00, 0.13), "j": ((0.05, 0.05), (0.05, 0.05), 0.00, -0.07),
}  # fmt: skip


def key_pose(code, low):
    """Twelve numbers: body shift, crouch; head tilt, lean; left hand, right hand, left foot, right foot (x, y each)."""
    (lfx, lfy), (rfx, rfy), shift, crouch = FEET[code[2]]
    (lx, ly), (rx, ry) = HANDS[code[0]], HANDS[code[1]]
    lean = 0.25 * (ly - ry) + 0.3 * shift  # towards the lower hand
    return [shift, crouch + (0.07 if low else 0.0), lean, lean, -lx, ly, rx, ry, -lfx, -lfy, rfx, -rfy]


def dance(genre, advanced, beat):
    """Poses (T, 12) at the beat positions `beat` (T,), in beats: at rest on whole numbers, fastest half-way."""
    codes = GENRES[genre][3 if advanced else 2].split()
    keys = torch.tensor([key_pose(code, low=k % 2 == 0) for k, code in enumerate(codes)])
    k, phase = beat.floor().long(), beat - beat.floor()
    ease = (0.5 - 0.5 * torch.cos(math.pi * phase))[:, None]
    return keys[k % len(codes)] * (1 - ease) + keys[(k + 1) % len(codes)] * ease


def joint(a, b, length, side):  # the elbow or knee between a and b, each (T, 2), and b moved within reach
    d = b - a
    distance = d.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    b = a + d / distance * distance.clamp(max=1.98 * length)
    half = (b - a) / 2
    height = (length**2 - half.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    return a + half + side * height * torch.stack([half[:, 1], -half[:, 0]], -1) / half.norm(dim=-1, keepdim=True), b


def at(x, y):  # points (T, 2), from the ground up
    return torch.stack(torch.broadcast_tensors(torch.as_tensor(x), torch.as_tensor(y)), -1)


def person(pose, colour):
    """Capsules (a, b, radius, colour), back to front; x from the middle, y down from the ground, in body heights."""
    shift, crouch, tilt, lean = pose[:, :4].unbind(1)
    lh, rh, lf, rf = pose[:, 4:6], pose[:, 6:8], pose[:, 8:10], pose[:, 10:12]
    skin, dark = torch.tensor([0.86, 0.66, 0.54]), 0.45 * colour + 0.1
    hip = at(shift, -0.44 + crouch)
    neck = hip + at(0.30 * lean.sin(), -0.30 * lean.cos())
    head = neck + at(0.14 * tilt.sin(), -0.14 * tilt.cos())
    parts = []
    for foot, side in ((lf, -1), (rf, 1)):
        top = hip + at(0.06 * side, 0.0)
        knee, foot = joint(top, foot, 0.23, side)
        parts += [(top, knee, 0.055, dark), (knee, foot, 0.050, dark)]
    parts.append((hip, neck, 0.095, colour))
    for hand, side in ((lh, -1), (rh, 1)):
        shoulder = neck + at(0.09 * side, 0.02)
        elbow, hand = joint(shoulder, shoulder + hand, 0.20, -side)
        parts += [(shoulder, elbow, 0.045, 0.8 * colour), (elbow, hand, 0.042, skin)]
    return parts + [(head, head, 0.085, skin)]


def dog(pose, colour):
    """From the side, four legs; the forepaws do what a person's hands do, the tail wags with them."""
    shift, crouch, tilt, lean = pose[:, :4].unbind(1)
    lh, rh, lf, rf = pose[:, 4:6], pose[:, 6:8], pose[:, 8:10], pose[:, 10:12]
    far, dark = 0.7 * colour, 0.5 * colour
    hip = at(shift - 0.20, -0.36 + 1.2 * crouch)
    chest = hip + at(0.42, 0.0) + at(0.0, 0.3 * (lh[:, 1] + rh[:, 1]) / 2 - 0.06)
    head = chest + at(0.17 + 0.1 * tilt, -0.17 + 0.3 * crouch)
    tail = hip + at(-0.18, -0.10 + 0.4 * (lh[:, 1] - rh[:, 1]))
    parts = [(hip, tail, 0.035, colour)]
    for hand, foot, shade, dx in ((lh, lf, far, 0.06), (rh, rf, colour, -0.02)):
        lift = (0.36 - hand[:, 1]) * 0.40  # a raised hand is a raised paw
        forepaw = at(0.20 + dx + 0.4 * hand[:, 0].abs(), -lift)
        hindpaw = at(-0.24 + dx + 0.5 * foot[:, 0], foot[:, 1])
        for top, paw, side in ((chest, forepaw, -1), (hip, hindpaw, 1)):
            knee, paw = joint(top, paw, 0.19, side)
            parts += [(top, knee, 0.050, shade), (knee, paw, 0.045, shade)]
    parts.append((hip, chest, 0.115, colour))
    parts += [(head, head, 0.105, colour), (head + at(0.06, 0.04), head + at(0.15, 0.05), 0.050, colour)]
    return parts + [(head + at(-0.07, -0.06), head + at(-0.11, 0.05), 0.040, dark)]


def rabbit(pose, colour):
    """Upright, round, short limbs; the long ears do what a person's hands do."""
    shift, crouch, tilt, lean = pose[:, :4].unbind(1)
    lh, rh, lf, rf = pose[:, 4:6], pose[:, 6:8], pose[:, 8:10], pose[:, 10:12]
    pale = 0.5 * colour + 0.45
    hip = at(shift, -0.24 + crouch)
    neck = hip + at(0.22 * lean.sin(), -0.22 * lean.cos())
    head = neck + at(0.15 * tilt.sin(), -0.15 * tilt.cos())
    parts = []
    for foot, side in ((lf, -1), (rf, 1)):
        paw = at(0.03 * side + 0.9 * foot[:, 0], foot[:, 1] - 0.03)
        parts += [
            (hip + at(0.08 * side, 0.0), paw, 0.060, 0.7 * colour),
            (paw, paw + at(0.06 * side, 0.0), 0.045, pale),
        ]
    for hand, side in ((lh, -1), (rh, 1)):  # ears
        root = head + at(0.045 * side, -0.06)
        parts.append((root, root + at(0.45 * hand[:, 0], -0.20 + 0.22 * hand[:, 1]), 0.045, 0.8 * colour))
    parts += [(hip, neck, 0.15, colour), (hip + at(0.0, 0.02), neck + at(0.0, 0.06), 0.085, pale)]
    for hand, side in ((lh, -1), (rh, 1)):
        shoulder = neck + at(0.11 * side, 0.05)
        parts.append((shoulder, shoulder + 0.45 * hand, 0.045, 0.7 * colour))
    return parts + [(head, head, 0.115, colour)]


FIGURES = {"person": person, "dog": dog, "rabbit": rabbit}


def backdrop(place, rng, dx, zoom):
    """(T, 3, SIZE, SIZE) for camera offsets dx (T,) and zooms (T,)."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    y = (axis / zoom[:, None] + 0.5)[:, None, :, None]  # 0 the top, 1 the bottom
    x = (axis / zoom[:, None] + 0.5 + dx[:, None])[:, None, None, :]
    light = rng.uniform(0.92, 1.05)

    def mix(a, b, amount):
        return torch.tensor(a)[:, None, None] * (1 - amount) + torch.tensor(b)[:, None, None] * amount

    def edge(z, softness=0.02):
        return (z / softness + 0.5).clamp(0, 1)

    def disc(cx, cy, rx, ry):
        return edge(1 - (((x - cx) / rx).square() + ((y - cy) / ry).square()).sqrt(), 0.15)

    def over(picture, colour, amount):
        return picture * (1 - amount) + torch.tensor(colour)[:, None, None] * amount

    floor = edge(y - 0.80)
    a, b = rng.uniform(0.1, 0.9, 2)
    if place == "studio":
        picture = over(mix((0.84, 0.84, 0.86), (0.92, 0.92, 0.93), y), (0.72, 0.72, 0.74), floor)
    elif place == "park":
        picture = over(mix((0.62, 0.78, 0.92), (0.80, 0.88, 0.94), y), (0.46, 0.64, 0.36), edge(y - 0.70))
        for cx in (a, b):
            picture = over(picture, (0.44, 0.36, 0.28), edge(0.03 - (x - cx).abs()) * edge(y - 0.4) * edge(0.72 - y))
            picture = over(picture, (0.34, 0.54, 0.32), disc(cx, 0.36, 0.14, 0.18))
    elif place == "beach":
        picture = over(mix((0.66, 0.84, 0.96), (0.84, 0.92, 0.96), y), (0.36, 0.62, 0.76), edge(y - 0.50))
        picture = over(picture, (0.88, 0.80, 0.60), edge(y - 0.72 - 0.02 * torch.sin(9 * x)))
        picture = over(picture, (0.98, 0.90, 0.62), disc(a, 0.16, 0.09, 0.09))
    elif place == "street":
        picture = over(mix((0.74, 0.76, 0.80), (0.82, 0.82, 0.84), y), (0.46, 0.46, 0.48), edge(y - 0.78))
        for cx, tall, shade in ((a, 0.30, 0.60), (b, 0.15, 0.54), ((a + b) / 2 + 0.45, 0.22, 0.64)):
            picture = over(
                picture,
                (shade, shade - 0.06, shade - 0.10),
                edge(0.13 - (x - cx).abs()) * edge(y - tall) * edge(0.78 - y),
            )
    else:  # stage
        picture = over(mix((0.16, 0.14, 0.22), (0.24, 0.20, 0.32), y), (0.34, 0.26, 0.28), floor)
        picture = over(picture, (0.58, 0.52, 0.52), 0.8 * disc(0.5, 0.93, 0.44, 0.12))
        picture = over(picture, (0.36, 0.34, 0.52), 0.5 * edge(0.10 + 0.25 * y - (x - 0.5).abs(), 0.1))
    return (picture * light).clamp(0, 1).expand(len(dx), 3, SIZE, SIZE)


def render(scene, beat):
    """scene: a dict from draw_scene; beat (T,) in beats. Returns uint8 (T, SIZE, SIZE, 3)."""
    rng, T = np.random.default_rng(scene["seed"]), len(beat)
    t = torch.arange(T) / FPS
    moving = scene["camera"] == "10"
    dx = moving * 0.05 * torch.sin(0.9 * t + rng.uniform(0, 6))
    zoom = 1 + moving * 0.06 * torch.sin(0.7 * t + rng.uniform(0, 6))
    picture = backdrop(scene["place"], rng, dx, zoom).clone()
    count = scene["count"]
    height = {1: 0.70, 2: 0.56, 3: 0.46}[count] * rng.uniform(0.92, 1.08)
    pose = (
        dance(scene["genre"], scene["advanced"], beat.float() + rng.integers(8))
        * torch.tensor(rng.uniform(0.9, 1.1, 12)).float()
    )
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    centres = (np.arange(count) - (count - 1) / 2) * {1: 0, 2: 0.44, 3: 0.31}[count] + rng.uniform(-0.05, 0.05)
    axis = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (y, x, 2)
    colour = (torch.tensor(COLOURS[scene["colour"]]) * rng.uniform(0.92, 1.06)).clamp(0, 1)
    for centre in centres:
        for a, b, radius, shade in FIGURES[scene["subject"]](pose, colour):
            a, b = (p * torch.tensor([mirror, 1.0]) * height + torch.tensor([centre, 0.37]).float() for p in (a, b))
            a, b = ((p - torch.stack([dx, 0 * dx], -1)) * zoom[:, None] for p in (a, b))
            low, high = torch.minimum(a, b).amin(0) - 0.1, torch.maximum(a, b).amax(0) + 0.1  # only where it can be
            x0, y0 = ((low + 0.5) * SIZE).floor().clamp(0, SIZE).int().tolist()
            x1, y1 = ((high + 0.5) * SIZE).ceil().clamp(0, SIZE).int().tolist()
            if x0 >= x1 or y0 >= y1:
                continue
            p = grid[None, y0:y1, x0:x1] - a[:, None, None]  # (T, h, w, 2)
            d = (b - a)[:, None, None]
            along = ((p * d).sum(-1) / d.square().sum(-1).clamp(min=1e-9)).clamp(0, 1)
            distance = (p - along[..., None] * d).norm(dim=-1)
            cover = ((radius * height - distance) * SIZE / 1.4 + 0.5).clamp(0, 1)[:, None]
            region = picture[:, :, y0:y1, x0:x1]
            region += (shade.clamp(0, 1)[:, None, None] - region) * cover
    return (picture * 255).round().byte().permute(0, 2, 3, 1).numpy()


def draw_scene(rng, **fixed):
    """A scene at random: subject, count, colour, place, genre, advanced, camera, seed; any of them may be given."""
    scene = {
        "subject": str(rng.choice(SUBJECTS)),
        "count": int(rng.choice([1, 2, 3], p=[0.7, 0.18, 0.12])),
        "colour": str(rng.choice(list(COLOURS))),
        "place": str(rng.choice(PLACES, p=[0.4, 0.15, 0.15, 0.15, 0.15])),
        "genre": str(rng.choice(list(GENRES))),
        "advanced": bool(rng.random() < 0.5),
        "camera": str(rng.choice(["01", "10"], p=[0.8, 0.2])),
        "seed": int(rng.integers(2**31)),
    }
    return scene | fixed


def steady_beat(rng, frames=FRAMES):  # beats (T,) of a tempo from 60 to 180 BPM and any phase
    return rng.uniform(0, 8) + torch.arange(frames) / FPS * math.exp(rng.uniform(math.log(60), math.log(180))) / 60


# ------------------------------------------------------------------------------------------------------------------
# The world in sound
# ------------------------------------------------------------------------------------------------------------------

RHYTHMS = {  # sixteenths of a bar: kick, snare, hat, bass; loudness of chords and melody
    "BR": ("x.x.......x.....", "....x.......x...", "x.x.x.x.x.x.x.x.", "x.x...x...x..x..", 0.3, 0.3),
    "PO": ("x.....x.x.......", "....x.......x...", "xxxxxxxxxxxxxxxx", "x..x..x.x..x..x.", 0.4, 0.4),
    "LO": ("x......x..x.....", "....x.......x..x", "x.x.x.x.x.x.x.x.", "x...x..x..x.x...", 0.6, 0.3),
    "MH": ("x......x.xx.....", "....x.......x...", "x..xx..xx..xx..x", "x.......x.......", 0.4, 0.2),
    "LH": ("x..x......x.....", "....x.......x...", "x.xxx.x.x.xxx.x.", "x..x......x.....", 0.5, 0.5),
    "HO": ("x...x...x...x...", "....x.......x...", "..x...x...x...x.", "..x...x...x...x.", 0.7, 0.3),
    "WA": ("x...x...x...x...", "....x.......x...", "x.xxx.xxx.xxx.xx", "x.x.x.x.x.x.x.x.", 0.6, 0.6),
    "KR": ("x..x..x.x.......", "....x.......x...", "x...x...x...x...", "x..x..x.x.......", 0.2, 0.3),
    "JS": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x.", "x...x...x...x...", 0.6, 0.7),
    "JB": ("x...............", "................", "....x.......x...", "x.......x.......", 0.9, 0.8),
}


def compose(genre, tempo, seed, seconds, rate=16000):
    """A song, float32 (samples,): drums, bass, chords and a melody whose sounds and notes follow from the seed.
    The first beat is at 0 s, the next ones 60 / tempo s apart."""
    rng = np.random.default_rng(seed)
    song = np.zeros(int(seconds * rate) + 2 * rate, np.float32)
    sixteenth = 15 / tempo
    swing = rng.choice([0, 0, 0.12, 0.25]) * sixteenth  # late off-beats

    def times(count):
        t = np.arange(count + 1)
        return t / rate

    def add(sound, step, gain):
        at = int((step * sixteenth + (swing if step % 2 else 0)) * rate)
        if at < int(seconds * rate):
            song[at : at + len(sound)] += (gain * sound)[: len(song) - at]

    def noise(decay, low, high):  # filtered by differences and sums, enough for a snare or a hat
        t = times(int(6 * decay * rate))
        x = rng.standard_normal(len(t)) * np.exp(-t / decay)
        spectrum = np.fft.rfft(x)
        f = np.fft.rfftfreq(len(x), 1 / rate)
        return np.fft.irfft(spectrum * ((f > low) & (f < high)), len(x)).astype(np.float32)

    harmonics = {k: rng.uniform(0.2, 1, 6) * np.arange(1, 7) ** -rng.uniform(0.6, 2.2) for k in "bcm"}
    sharp = {k: rng.uniform(0.002, 0.02) for k in "bcm"}

    def tone(kind, pitch, length):  # additive, with an attack and a decay
        t = times(int(length * rate))
        f = 440 * 2 ** ((pitch - 69) / 12)
        partials = [
            a * np.sin(2 * np.pi * f * (n + 1) * t) for n, a in enumerate(harmonics[kind]) if f * (n + 1) < rate / 2
        ]
        fade = np.minimum(1, (length - t) / 0.01).clip(0)
        return (
            sum(partials)
            / sum(harmonics[kind])
            * np.exp(-t / (0.5 * length + 0.05))
            * np.minimum(1, t / sharp[kind])
            * fade
        ).astype(np.float32)

    t = times(int(0.4 * rate))
    low, sweep, decay = rng.uniform(45, 65), rng.uniform(60, 160), rng.uniform(0.06, 0.16)
    kick = (np.sin(2 * np.pi * (low * t + sweep * 0.03 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / decay)).astype(
        np.float32
    )
    snare = noise(rng.uniform(0.04, 0.12), rng.uniform(200, 900), rng.uniform(4000, 7900))
    hat = noise(rng.uniform(0.01, 0.05), rng.uniform(4000, 6000), 7900)
    kicks, snares, hats, basses, chords, melody = RHYTHMS[genre]
    level = {
        k: rng.uniform(*v)
        for k, v in {"kick": (0.6, 1.1), "snare": (0.2, 0.6), "hat": (0.05, 0.3), "bass": (0.2, 0.6)}.items()
    }
    level = {k: v * (rng.random() > 0.07) for k, v in level.items()}  # now and then an instrument is missing
    level["hat"] *= genre != "JB" or 0.5
    key, scale = (
        rng.integers(36, 48),
        np.array([0, 2, 3, 5, 7, 8, 10] if rng.random() < 0.5 else [0, 2, 4, 5, 7, 9, 11]),
    )
    progression = rng.choice([0, 3, 4, 5], 4)
    note = lambda degree, octave: key + 12 * (octave + degree // 7) + scale[degree % 7]  # noqa: E731
    motif = np.where(rng.random(16) < [0.9, 0.1, 0.3, 0.1] * 4, rng.integers(0, 8, 16), -1)
    stab = rng.choice([4, 4, 8, 16])  # sixteenths between chords
    for step in range(int(seconds / sixteenth) + 1):
        s, bar = step % 16, step // 16
        accent = rng.uniform(0.8, 1.0)
        fill = bar % 4 == 3 and s >= 12 and rng.random() < 0.3
        if kicks[s] == "x":
            add(kick, step, level["kick"] * accent)
        if snares[s] == "x" or fill:
            add(snare, step, level["snare"] * accent)
        if hats[s] == "x":
            add(hat, step, level["hat"] * accent * (1 if s % 4 == 0 else 0.7))
        degree = int(progression[bar % 4])
        if basses[s] == "x":
            add(tone("b", note(degree, 0), 1.6 * sixteenth), step, level["bass"] * accent)
        if s % stab == 0:
            for third in (0, 2, 4):
                add(tone("c", note(degree + third, 1), 0.9 * stab * sixteenth), step, 0.16 * chords)
        if motif[s] >= 0:
            add(tone("m", note(degree + int(motif[s]), 2), 2 * sixteenth), step, 0.25 * melody * accent)
    if rng.random() < 0.5:  # a room
        t = times(int(rng.uniform(0.1, 0.5) * rate))
        echo = rng.standard_normal(len(t)) * np.exp(-6 * t / t[-1])
        size = len(song) + len(echo)
        wet = np.fft.irfft(np.fft.rfft(song, size) * np.fft.rfft(echo, size), size)[: len(song)]
        song = song + rng.uniform(0.05, 0.3) * wet / (np.abs(wet).max() + 1e-6) * np.abs(song).max()
    song = song + rng.standard_normal(len(song)) * np.abs(song).max() * 10 ** rng.uniform(-4, -2)
    return (song[: int(seconds * rate)] / np.abs(song).max() * rng.uniform(0.5, 0.95)).astype(np.float32)


def draw_song(rng, genre=None, seconds=10.0):
    """(samples at 16 kHz, genre, tempo in BPM, 60 to 180, around what the genre likes)."""
    genre = genre or str(rng.choice(list(GENRES)))
    tempo = np.exp(rng.uniform(np.log(60), np.log(180)))
    if rng.random() < 0.4:
        tempo = float(np.clip(GENRES[genre][1] * np.exp(rng.normal(0, 0.12)), 60, 180))
    return compose(genre, tempo, int(rng.integers(2**31)), seconds), genre, float(tempo)


# ------------------------------------------------------------------------------------------------------------------
# Training, common to all stages
# ------------------------------------------------------------------------------------------------------------------


def fit(name, parameters, loss, steps, lr, decay=0.998, warmup=50, every=60):
    """Muon for the matrices, AdamW for the rest, with a cosine schedule; ends with the moving average of the weights in
    `parameters`, a {name: tensor}.

    The optimiser holds float32 copies, so bfloat16 parameters (four times as fast where the CPU has AMX) lose nothing.
    loss(step) -> (loss, {name: number to show}); its randomness must follow from the step alone, so that a run that
    was stopped goes on as if it had not been: every `every` seconds all is saved below work/.
    """
    masters = {
        k: p.detach().float().flatten(1 if p.ndim > 1 else 0).clone().requires_grad_() for k, p in parameters.items()
    }
    average = {k: m.detach().clone() for k, m in masters.items()}
    hidden = [m for m in masters.values() if m.ndim > 1 and min(m.shape) > 16]
    others = [m for m in masters.values() if not any(m is h for h in hidden)]
    optimisers = [
        torch.optim.Muon(hidden, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0, fused=True),
    ]
    rate = lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(i / steps, 1)))  # noqa: E731
    path, start = os.path.join(WORK, f"{name}.safetensors"), 0
    if os.path.exists(path):
        tensors, metadata = mi.read_safetensors(path)
        start = int(metadata["step"])
        for k, m in masters.items():
            m.data.copy_(tensors[f"master.{k}"])
            average[k].copy_(tensors[f"average.{k}"])
            keys = ["momentum_buffer"] if any(m is h for h in hidden) else ["exp_avg", "exp_avg_sq"]
            if f"{keys[0]}.{k}" in tensors:  # absent for a parameter that never had a gradient
                moments = {key: tensors[f"{key}.{k}"].clone() for key in keys}
                if len(keys) > 1:
                    moments["step"] = torch.tensor(float(start))
                optimisers[len(keys) - 1].state[m] = moments
    shown, saved = {}, time.time()
    bar = tqdm(range(start, steps), name, initial=start, total=steps, mininterval=10)
    for step in bar:
        for k, p in parameters.items():
            p.data.copy_(masters[k].view_as(p))
        value, numbers = loss(step)
        value.backward()
        for k, p in parameters.items():
            masters[k].grad = None if p.grad is None else p.grad.float().view_as(masters[k])
            p.grad = None
        nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * rate(step)
            optimiser.step()
        keep = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [m.detach() for m in masters.values()], 1 - keep)
        for k, number in numbers.items():
            shown[k] = shown.get(k, float(number)) * 0.95 + 0.05 * float(number)
        bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in shown.items()), refresh=False)
        if time.time() - saved > every or step == steps - 1:
            state = {f"master.{k}": m for k, m in masters.items()} | {f"average.{k}": a for k, a in average.items()}
            for k, m in masters.items():
                for optimiser in optimisers:
                    state |= {f"{key}.{k}": v for key, v in optimiser.state.get(m, {}).items() if key != "step"}
            mi.save_safetensors(path, state, {"step": str(step + 1)})
            saved = time.time()
    for k, p in parameters.items():
        p.data.copy_(average[k].view_as(p))


def named(**modules):  # {name: parameter} of several modules
    return {f"{m}.{k}": p for m, module in modules.items() for k, p in module.named_parameters()}


def as_bfloat16(module):  # the matrices, as load_dit does
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            layer.to(torch.bfloat16)
    return module.requires_grad_(True)


def rng_of(*numbers):  # numpy's and torch's generators for a step
    return np.random.default_rng(numbers), torch.Generator().manual_seed(hash(numbers) % 2**31)


# ------------------------------------------------------------------------------------------------------------------
# Stage 1: the video VAE
# ------------------------------------------------------------------------------------------------------------------


def pool(count, seed, frames=FRAMES, **fixed):
    """Silent clips, uint8 (count, frames, SIZE, SIZE, 3), and their scenes."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, **fixed) for _ in range(count)]
    clips = np.empty((count, frames, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(count), "rendering", mininterval=10):
        clips[i] = render(scenes[i], steady_beat(rng, frames))
    return clips, scenes


def to_video(clips):  # uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) in [-1, 1]
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(encoder, decoder, clips):  # of clips through the VAE, dB
    errors = []
    with torch.no_grad():
        for clip in clips:
            video = to_video(clip[None])
            errors.append(((decoder(encoder(video)[0], chunk=99).clamp(-1, 1) - video) / 2).square().mean().item())
    return -10 * math.log10(np.mean(errors)), [-10 * math.log10(e) for e in errors]


def make_vae(steps=2000, seed=1):
    torch.manual_seed(seed)
    encoder = as_bfloat16(mi.Encoder((24, 40, 72, 88), (0, 1, 2, 2, 1), attention=(False, False, False, True, True)))
    decoder = as_bfloat16(mi.Decoder((88, 72, 56, 24), (2, 2, 2, 2, 0)))
    clips, _ = pool(1600, seed)
    unseen, _ = pool(16, seed + 1000)

    def loss(step):
        rng, generator = rng_of(seed, step)
        frames, batch = (13, 6) if step < 0.75 * steps else (25, 3)
        picked = [
            (int(i), int(f))
            for i, f in zip(rng.integers(len(clips), size=batch), rng.integers(FRAMES - frames + 1, size=batch))
        ]
        video = to_video(np.stack([clips[i, f : f + frames] for i, f in picked]))
        mean, logvar = encoder(video)
        logvar = logvar.clamp(-12, 4)
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
        error = decoder(z, chunk=99) - video
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = error.square().mean()
        total = error.abs().mean() + 3 * mse + 3e-4 * kl
        return total, {"dB": -10 * math.log10(mse.item() / 4), "kl": kl.item()}

    fit("vae", named(encoder=encoder, decoder=decoder), loss, steps, 2e-3)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        mi.save_safetensors(f"{HERE}/{name}.safetensors", mi.shrunk(module.state_dict()))
    encoder, decoder = mi.load_encoder(f"{HERE}/encoder.safetensors"), mi.load_decoder(f"{HERE}/decoder.safetensors")
    print(f"VAE: PSNR {psnr(encoder, decoder, unseen)[0]:.2f} dB on 16 unseen clips")


# ------------------------------------------------------------------------------------------------------------------
# Stage 2: the text encoder. A small T5 learns to tell from a caption what it says of the scene.
# ------------------------------------------------------------------------------------------------------------------

WHO = {
    "person": (("person", "dancer", "man", "woman", "professional dancer", "male dancer", "female dancer",
                "professional female dancer", "professional male dancer"),
               ("people", "dancers", "men", "women", "professional dancers", "persons")),
    "dog": (("dog", "puppy", "dog", "hound"), ("dogs", "puppies", "hounds")),
    "rabbit": (("rabbit", "bunny", "hare"), ("rabbits", "bunnies", "hares")),
}  # fmt: skip
WHERE = {
    "studio": ("in a studio with a white backdrop", "in a studio", "in the white studio", "indoors"),
    "park": ("in a park", "in the park with trees", "on the grass", "in a garden"),
    "beach": ("on the beach", "on a beach", "by the sea", "on the sand by the ocean"),
    "street": ("in the street", "on a street", "in the middle of a city", "in New York City"),
    "stage": ("on a stage", "on stage at night", "in a dark club", "under the spotlights"),
}
VIEW = {"01": ("front view", "captured from the front", "from a front view"),
        "10": ("moving front view", "captured from a moving front view", "with a moving camera")}  # fmt: skip


def caption(scene, rng):
    """A caption in few or many words, and what it tells: {attribute: value or None}."""
    if scene["subject"] == "person" and scene["place"] == "studio" and rng.random() < 0.4:  # as train.py words it
        told = {"colour": None} | {key: scene[key] for key in ("place", "genre", "advanced", "camera")}
        return str(rng.choice(train.aist_prompts(aist_name(scene, "BR0", rng)))), {
            "subject": "person",
            "count": scene["count"],
        } | told
    told = {key: bool(rng.random() < p) for key, p in
            dict(colour=0.65, place=0.65, genre=0.5, advanced=0.3, camera=0.3).items()}  # fmt: skip
    one, many = WHO[scene["subject"]]
    pick = lambda options: str(rng.choice(options))  # noqa: E731
    who = pick(one) if scene["count"] == 1 else pick(many)
    colour = scene["colour"]
    if told["colour"]:
        if scene["subject"] == "person":
            who += " " + pick([f"in {colour}", f"wearing {colour}", f"in a {colour} shirt", f"dressed in {colour}"])
        else:
            who = f"{colour} {who}"
    article = "an" if who.startswith("orange") else pick(["a", "a", "one"])
    who = {1: article, 2: "two", 3: "three"}[scene["count"]] + " " + who
    name, place = GENRES[scene["genre"]][0], pick(WHERE[scene["place"]])
    if told["genre"]:
        does = pick([f"dancing {name}", f"dancing {name}", f"performing {name}", f"doing a {name} dance"])
    else:
        does = pick(["dancing", "dancing", "dancing to the music", "performing a dance"])
    setting = pick(["an advanced dance" if scene["advanced"] else "a basic dance"])
    parts = [f"{who} {does}"]
    if told["advanced"]:
        parts.append(f"in {setting} setting")
    if told["place"]:
        parts.append(place)
    text = " ".join(parts)
    if told["camera"]:
        text += ", " + pick(VIEW[scene["camera"]])
    if rng.random() < 0.2:
        text = pick(["a video of ", "a dance video of ", "this is "]) + text
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    values = {"subject": scene["subject"], "count": scene["count"]}
    return text, values | {key: scene[key] if told[key] else None for key in told}


def aist_name(scene, song, rng):  # the dancers' numbers are drawn, they wear what they like
    dancers = "".join(f"_d{d:02d}" for d in rng.choice(np.arange(1, 36), scene["count"], replace=False))
    return f"g{scene['genre']}_s{'FM' if scene['advanced'] else 'BM'}_c{scene['camera']}{dancers}_m{song}_ch{rng.integers(1, 99):02d}"


LABELS = {
    "subject": list(SUBJECTS), "count": [1, 2, 3], "colour": [*COLOURS, None], "place": [*PLACES, None],
    "genre": [*GENRES, None], "advanced": [False, True, None], "camera": ["01", "10", None],
}  # fmt: skip


def make_text(steps=500, batch=48, seed=2):
    import sentencepiece
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    lines = [caption(draw_scene(rng), rng)[0] for _ in range(20000)]
    folder = f"{HERE}/tokenizer"
    os.makedirs(folder, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=f"{folder}/spiece", vocab_size=300, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, normalization_rule_name="nmt_nfkc_cf",
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-", minloglevel=2,
    )  # fmt: skip
    os.remove(f"{folder}/spiece.vocab")
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = T5Config(vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=192, num_layers=3, num_heads=4, dropout_rate=0.0,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
    t5 = T5EncoderModel(config)
    heads = nn.ModuleDict({k: nn.Linear(96, len(v)) for k, v in LABELS.items()})

    def loss(step, seed=seed):
        rng, _ = rng_of(seed, step)
        texts, told = zip(*(caption(draw_scene(rng), rng) for _ in range(batch)))
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        y = t5(**tokens).last_hidden_state  # (B, L, 96); every token is to know the whole caption
        valid = tokens.attention_mask.float() / tokens.attention_mask.sum(1, keepdim=True)
        total, right = 0, 0
        for key, head in heads.items():
            logits = head(y).transpose(1, 2)  # (B, values, L)
            target = torch.tensor([LABELS[key].index(values[key]) for values in told])
            total = (
                total
                + (F.cross_entropy(logits, target[:, None].expand(-1, y.shape[1]), reduction="none") * valid)
                .sum(1)
                .mean()
            )
            right += ((logits * valid[:, None]).sum(2).argmax(1) == target).float().mean().item() / len(heads)
        return total, {"loss": total.item(), "right": right}

    fit("text", named(t5=t5, heads=heads), loss, steps, 2e-3)
    t5.bfloat16().save_pretrained(f"{HERE}/text_encoder")
    t5.float()
    with torch.no_grad():
        print(
            f"text encoder: {np.mean([loss(i, seed + 1000)[1]['right'] for i in range(10)]):.3f} of what captions say is told right"
        )


# ------------------------------------------------------------------------------------------------------------------
# Stage 3: the music encoder. A small Wav2Vec 2.0 is taught the beat: each token is to tell phase, tempo and genre.
# ------------------------------------------------------------------------------------------------------------------


def rough(samples, rng):
    """A crop as a recording might have it: another loudness, tilt, hiss."""
    spectrum, f = np.fft.rfft(samples), np.linspace(0, 1, len(samples) // 2 + 1)
    if rng.random() < 0.5:
        tilt = rng.normal(0, 1.5) * f + sum(rng.normal(0, 0.4) * np.cos(np.pi * n * f) for n in range(1, 6))
        samples = np.fft.irfft(spectrum * np.exp(tilt), len(samples))
    if rng.random() < 0.3:
        samples = samples + rng.standard_normal(len(samples)) * samples.std() * 10 ** rng.uniform(-2, -0.5)
    return samples


def make_audio(steps=700, batch=24, seed=3, songs=500):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(seed)
    config = Wav2Vec2Config(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, conv_dim=(40,) * 7,
                            num_conv_pos_embeddings=64, num_conv_pos_embedding_groups=8, hidden_dropout=0.0, attention_dropout=0.0,
                            activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, vocab_size=32)  # fmt: skip
    wav2vec = Wav2Vec2Model(config)
    head = nn.Linear(96, 3 + len(GENRES))
    rng = np.random.default_rng(seed)
    pieces = [draw_song(rng) for _ in tqdm(range(songs), "composing", mininterval=10)]
    unseen = [draw_song(np.random.default_rng((seed, 1000, i))) for i in range(48)]

    def loss(step, pieces=pieces, seed=seed):
        rng, _ = rng_of(seed, step)
        seconds = float(rng.choice([2.5233, 2.5233, 2.5233, 6.0])) if pieces is not unseen else 2.5233
        crops, phases, tempos, genres = [], [], [], []
        for i in rng.integers(len(pieces), size=batch if seconds < 3 else batch // 2):
            samples, genre, tempo = pieces[i]
            start = rng.uniform(0, len(samples) / 16000 - seconds - 0.01)
            crops.append(rough(samples[int(start * 16000) :][: math.ceil(seconds * 16000)], rng))
            (
                phases.append((start * tempo / 60, tempo / 60)),
                tempos.append(math.log2(tempo / 104)),
                genres.append(list(GENRES).index(genre)),
            )
        x = torch.from_numpy(np.stack(crops)).float()
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-7).sqrt()
        out = head(wav2vec(x).last_hidden_state)  # (B, A, 3 + genres)
        phase = torch.tensor(phases, dtype=torch.float64)
        beat = 2 * math.pi * (phase[:, :1] + phase[:, 1:] * (torch.arange(out.shape[1]) * 0.02 + 0.0125))
        beat = torch.stack([beat.cos(), beat.sin()], -1).float()
        tempo = torch.tensor(tempos)[:, None].expand(-1, out.shape[1]).float()
        genre = F.cross_entropy(out[..., 3:].mean(1), torch.tensor(genres))
        at_beat = (out[..., :2] - beat).square().sum(-1).mean()
        total = at_beat + (out[..., 2] - tempo).square().mean() + 0.1 * genre
        cosine = F.cosine_similarity(out[..., :2], beat, dim=-1).mean()
        return total, {
            "loss": total.item(),
            "cos": cosine.item(),
            "tempo": (out[..., 2] - tempo).abs().mean().item(),
            "genre": genre.item(),
        }

    fit("audio", named(wav2vec=wav2vec, head=head), loss, steps, 1.5e-3)
    wav2vec.bfloat16().save_pretrained(f"{HERE}/audio_encoder")
    wav2vec.float()
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(f"{HERE}/audio_encoder")
    with torch.no_grad():
        numbers = [loss(i, unseen, seed + 1000)[1] for i in range(10)]
    print("audio encoder: on unseen songs", {k: round(float(np.mean([n[k] for n in numbers])), 3) for k in numbers[0]})


# ------------------------------------------------------------------------------------------------------------------
# Stage 4: the prior, text to silent video, on all subjects
# ------------------------------------------------------------------------------------------------------------------


def latents_of(count, frames, seed):
    """Latents (count, 12, T, 8, 8), VAE space, of silent clips, and their scenes; kept in work/."""
    path = os.path.join(WORK, f"latents-{frames}.safetensors")
    if os.path.exists(path):
        tensors, metadata = mi.read_safetensors(path)
        return tensors["latents"], json.loads(metadata["scenes"])
    encoder = mi.load_encoder(f"{HERE}/encoder.safetensors", dtype=torch.bfloat16)
    rng = np.random.default_rng(seed)
    latents, scenes = [], []
    for _ in tqdm(range(0, count, 4), f"latents of {frames} frames", mininterval=10):
        four = [draw_scene(rng) for _ in range(4)]
        clips = np.stack([render(scene, steady_beat(rng, frames)) for scene in four])
        with torch.no_grad():
            latents.append(encoder(to_video(clips))[0])
        scenes += four
    latents = torch.cat(latents)
    mi.save_safetensors(path, {"latents": latents}, {"scenes": json.dumps(scenes)})
    return latents, scenes


def fresh_dit(seed):
    torch.manual_seed(seed)
    dit = mi.DiT(depth=12, width=160, text_width=80, heads=4, t5_width=96)
    with torch.no_grad():
        octaves = lambda high, low, n: high * (low / high) ** (torch.arange(n) / (n - 1))  # noqa: E731
        for axis, (part, speeds) in enumerate(((slice(0, 8), octaves(1.5, 0.03, 8)), (slice(8, 14), octaves(0.06, 0.006, 6)),
                                               (slice(14, 20), octaves(0.06, 0.006, 6)))):  # fmt: skip
            dit.pos_frequencies[axis, :, part] = speeds  # a third of the angles for each of time, height and width
        for block in dit.blocks:  # every block begins as the identity
            for mod in (block.mod_x, block.mod_y):
                nn.init.zeros_(mod.weight), nn.init.zeros_(mod.bias)
        nn.init.zeros_(dit.final_layer.linear.weight), nn.init.zeros_(dit.final_layer.linear.bias)
    return dit


def spread(size, generator):  # sigmas (size,), uniform, one in each of `size` bins
    return (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size


class Captions:
    """Captions to T5 features, as sampling makes them, but for many at once."""

    def __init__(self):
        self.tokenizer = mi.from_pretrained("AutoTokenizer", f"{HERE}/tokenizer")
        self.t5 = mi.from_pretrained("T5EncoderModel", f"{HERE}/text_encoder", dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, texts):
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return self.t5(**tokens).last_hidden_state, tokens.attention_mask.bool()


def make_young_prior():
    """What the shipped adapter is trained over: one trained over the finished prior follows the beat less, see README."""
    make_prior(1300, name="young-prior")


def make_prior(steps=3000, seed=4, name="prior"):
    begun, young = (os.path.join(WORK, f"{n}.safetensors") for n in ("prior", "young-prior"))
    if name == "prior" and os.path.exists(young) and not os.path.exists(begun):
        shutil.copyfile(young, begun)  # it goes on from there
    short, scenes = latents_of(5000, FRAMES, seed)
    long, long_scenes = latents_of(240, 271, seed + 100)
    mean, std = short.mean((0, 2, 3, 4)), short.std((0, 2, 3, 4))
    short, long = mi.to_dit_space(short, mean, std), mi.to_dit_space(long, mean, std)
    captions = Captions()
    dit = as_bfloat16(fresh_dit(seed))
    dit.pos_frequencies.requires_grad_(False)
    if shutil.which("g++"):  # a third faster
        print("compiling the blocks, which takes a minute")
        for block in dit.blocks:
            block.compile(dynamic=True)
    dit.natural = mi.Natural(SIZE, SIZE, FRAMES, FPS, 40, 2.5, 4.0, tuple(mean.tolist()), tuple(std.tolist()))

    def loss(step):
        rng, generator = rng_of(seed, step)
        T, batch, z, described = 13, 32, short, scenes
        if step % 5 == 4:
            T, batch, z, described = *((25, 16) if step % 10 == 4 else (46, 9)), long, long_scenes
        picked = rng.integers(len(z), size=batch)
        y, mask = captions(caption(described[i], rng)[0] for i in picked)
        mask = mask & torch.from_numpy(rng.random(batch) > 0.1)[:, None]
        z = z[picked, :, :T]
        eps = torch.randn(z.shape, generator=generator)
        losses = mi.flow_matching_loss(dit, z, spread(batch, generator), eps, y, mask)
        return losses.mean(), {f"loss{T}": losses.mean().item()}

    fit(name, {k: p for k, p in dit.named_parameters() if p.requires_grad}, loss, steps, 2e-3, warmup=100)
    mi.save_dit(dit, f"{HERE}/dit.safetensors")


# ------------------------------------------------------------------------------------------------------------------
# Stage 5: which layers should listen, by the Frechet distance to the world's own clips
# ------------------------------------------------------------------------------------------------------------------


def make_layers(clips=200, seeds=2):
    """reference.safetensors, the statistics of the world's clips, and adaptability.json, the ranking by them."""
    encoder, rng = mi.load_encoder(f"{HERE}/encoder.safetensors", dtype=torch.bfloat16), np.random.default_rng(88)
    world = (to_video(render(draw_scene(rng), steady_beat(rng))[None])[0] for _ in range(clips))
    statistics = adaptability.reference_statistics(tqdm(world, "reference", clips, mininterval=10), encoder)
    mi.save_safetensors(f"{HERE}/reference.safetensors", *statistics)
    adaptability.rank(weights=HERE, seeds=range(seeds), out=f"{WORK}/adaptability", dtype="bfloat16")
    shutil.copyfile(f"{WORK}/adaptability/adaptability.json", f"{HERE}/adaptability.json")


# ------------------------------------------------------------------------------------------------------------------
# The toy AIST set, as mp4s with sound, for train.py; and the adapter, trained by it on people only
# ------------------------------------------------------------------------------------------------------------------

SONGS = 24  # of each genre, as mBR0, mBR1, ...: AIST has six


def toy_song(genre, number, seconds=20.0):
    """(samples, tempo) of the world's song m<genre><number>; from 100 on they are in no data set."""
    seed = 10_000 * (list(GENRES).index(genre) + 1) + number
    rng = np.random.default_rng(seed)
    tempo = float(np.exp(rng.uniform(np.log(60), np.log(180))))
    return compose(genre, tempo, seed, seconds), tempo


def save_wav(path, samples, rate=16000):
    with mi.written_whole(path) as temporary, open(temporary, "wb") as file, wave.open(file) as wav:
        wav.setnchannels(1), wav.setsampwidth(2), wav.setframerate(rate)
        wav.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def make_data(folder="toy", aist=320, wild=320, seed=5):
    """folder/aist: people in the studio, framed as AIST's are; folder/wild: people elsewhere, with captions."""
    folder = os.path.abspath(folder)
    rng = np.random.default_rng(seed)
    songs = {}
    for i in tqdm(range(aist + wild), "toy data", mininterval=10):
        kind = "aist" if i < aist else "wild"
        place = "studio" if kind == "aist" else str(rng.choice(PLACES[1:]))
        scene = draw_scene(rng, subject="person", place=place)
        genre, number = scene["genre"], int(rng.integers(SONGS))
        if i < 20:  # two videos of each test song
            genre = scene["genre"] = list(GENRES)[i // 2]
            number = next(int(name[3:]) for name in train.TEST_SONGS if name[1:3] == genre)
        if (genre, number) not in songs:
            samples, tempo = toy_song(genre, number)
            songs[genre, number] = os.path.join(folder, "songs", f"m{genre}{number}.wav"), tempo
            save_wav(songs[genre, number][0], samples)
        song, tempo = songs[genre, number]
        start, frames = rng.uniform(0, 14), int(rng.integers(86, 130))
        beat = (start + torch.arange(frames) / FPS) * tempo / 60
        video = to_video(render(scene, beat)[None])[0]  # (3, T, 64, 64)
        if kind == "aist":  # of 172x96, where AIST's crop finds the 64x64
            video = F.pad(video, (54, 54, 24, 8), mode="replicate")
            name = aist_name(scene, f"{genre}{number}", rng)
        else:
            name = f"wild-{i - aist:04d}"
            os.makedirs(f"{folder}/wild", exist_ok=True)
            with open(f"{folder}/wild/{name}.txt", "w") as file:
                file.write(caption(scene, rng)[0] + "\n")
        mi.save_video(f"{folder}/{kind}/{name}.mp4", video, FPS, song, start)


ADAPTER = dict(
    steps=400, batch=14, lr=2e-3, rank=16, layers="all", window=0, beta=1.0, audio_dropout=0.1, dtype="bfloat16"
)
LORA_SCALE = 1.5  # with its LoRA half as strong again it follows the beat better, see README


def make_adapter(folder="toy", **options):
    """By train.py; shipped as bfloat16, with the LoRA scaled."""
    options = dict(ADAPTER, weights=HERE, out=f"{WORK}/adapter") | options
    path = train.train(f"{folder}/aist", wild=f"{folder}/wild", **options)
    tensors, metadata = mi.read_safetensors(path)
    tensors = {name: LORA_SCALE * t if name.endswith("lora_B") else t for name, t in tensors.items()}
    mi.save_safetensors(f"{HERE}/musicinfuser.safetensors", mi.shrunk(tensors), metadata)


def make_song(tempo=112, seconds=24, rate=22050):
    """tiny/song.wav: disco at 112 BPM, the first beat at 0 s."""
    save_wav(f"{HERE}/song.wav", compose("WA", tempo, 12345, seconds, rate), rate)


# ------------------------------------------------------------------------------------------------------------------
# What came of it
# ------------------------------------------------------------------------------------------------------------------


class Studio:
    """The folder's models, for many clips at once; as sample.py makes them."""

    def __init__(self, adapter=f"{HERE}/musicinfuser.safetensors", dtype=torch.float32, lora_scale=1.0):
        self.dit, self.decoder = (
            mi.load_dit(f"{HERE}/dit.safetensors", dtype=dtype),
            mi.load_decoder(f"{HERE}/decoder.safetensors", dtype=dtype),
        )
        if adapter:
            mi.load_adapter(self.dit, adapter, lora_scale=lora_scale)
        self.captions, self.listen = Captions(), mi.AudioEncoder(HERE)

    @torch.no_grad()
    def film(self, prompts, songs=None, seed=0, frames=FRAMES, cfg=None, music_cfg=None, together=16):
        """uint8 (len(prompts), frames, SIZE, SIZE, 3); songs: [(file, start, speed)] or None, for silence."""
        n, films = self.dit.natural, []
        for i in range(0, len(prompts), together):
            some = prompts[i : i + together]
            y, mask = self.captions(some)
            audio = None
            if songs:
                audio = torch.cat(
                    [
                        self.listen(mi.music_window(file, frames, FPS, start, speed)[0])
                        for file, start, speed in songs[i : i + together]
                    ]
                )
            noise = torch.randn(
                (len(some), 12, (frames - 1) // 6 + 1, SIZE // 8, SIZE // 8),
                generator=torch.Generator().manual_seed(seed + i),
            )
            z = mi.sample(self.dit, noise, (y, mask), (y, mask & False), audio, sigmas=mi.linear_quadratic_schedule(n.steps),
                          cfg=n.cfg if cfg is None else cfg, music_cfg=n.music_cfg if music_cfg is None else music_cfg)  # fmt: skip
            for one in mi.to_vae_space(z, n.mean, n.std).split(1):
                video = self.decoder(one)[0].clamp(-1, 1)
                films.append(((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())
        return np.stack(films)


def contact_sheet(path, films, every=6):
    """A row a film, a column every so many frames."""
    rows = [np.concatenate(list(film[::every]), 1) for film in films]
    with mi.written_whole(path) as temporary:
        imageio.imwrite(temporary, np.concatenate(rows, 0), format="jpg", quality=88)


def moving_picture(path, films, columns=4):
    """A GIF of films side by side, 15 frames a second."""
    rows = [np.concatenate(list(films[i : i + columns]), 2) for i in range(0, len(films), columns)]
    frames = np.concatenate(rows, 1)[::2]
    with mi.written_whole(path) as temporary:
        imageio.mimsave(temporary, list(frames), format="GIF", duration=1000 * 2 / FPS, loop=0)


def unseen_songs(count):
    """[(file, tempo, start)] of songs that no stage was trained on, one genre after another, tempos 72 to 150 BPM, so
    that three quarters and five quarters of them lie within what was seen."""
    songs = []
    for i in range(count):
        genre = list(GENRES)[i % 10]
        rng = np.random.default_rng((77, i))
        tempo = float(np.exp(rng.uniform(np.log(80), np.log(144))))
        path = f"{WORK}/songs/{genre}{i}.wav"
        if not os.path.exists(path):
            save_wav(path, compose(genre, tempo, 900_000 + i, 20.0))
        songs.append((path, tempo, float(rng.uniform(0, 3))))
    return songs


def follows(films, songs, speed=1.0):
    """Mean r with the own and with the neighbour's song, their standard errors, and the correlation of tempos."""
    energies = [motion_energy(film) for film in films]
    t = (np.arange(len(energies[0])) + 0.5) / FPS
    beats = [(start + speed * t) * tempo / 60 for _, tempo, start in songs]
    own = [beat_correlation(e, b) for e, b in zip(energies, beats)]
    other = [beat_correlation(e, b) for e, b in zip(energies, beats[1:] + beats[:1])]
    tempos = np.corrcoef([motion_tempo(e) for e in energies], [tempo * speed for _, tempo, _ in songs])[0, 1]
    error = lambda r: np.std(r) / math.sqrt(len(r))  # noqa: E731
    return {"r": np.mean(own), "se": error(own), "other": np.mean(other), "se_other": error(other), "tempo": tempos}


def make_report(adapter=None, count=32):
    """The figures of README's table, and its pictures; of another adapter, its LoRA scaled as the shipped one's, only
    those of people and dogs."""
    shipped = f"{HERE}/musicinfuser.safetensors"
    studio = Studio(adapter or shipped, torch.bfloat16, LORA_SCALE if adapter else 1.0)
    songs = unseen_songs(count)
    rng = np.random.default_rng(7)
    described = lambda subject: [  # noqa: E731
        caption(draw_scene(rng, subject=subject, camera="01"), rng)[0] for _ in range(count)
    ]
    people, dogs = described("person"), described("dog")
    n = studio.dit.natural

    def row(name, prompts, speed=1.0, films=None, **kwargs):
        heard = [(path, start, speed) for path, _, start in songs] if not kwargs.pop("silent", False) else None
        films = studio.film(prompts, heard, **kwargs) if films is None else films
        f = follows(films, songs, speed)
        print(
            f"{name:44} r {f['r']:.2f} ± {f['se']:.2f}   other song {f['other']:.2f} ± {f['se_other']:.2f}   tempo {f['tempo']:.2f}",
            flush=True,
        )
        return films

    for subject in ("person", "dog"):
        rng = np.random.default_rng(8)
        scenes = [draw_scene(rng, subject=subject, camera="01") for _ in songs]
        beats = [(start + torch.arange(FRAMES) / FPS) * tempo / 60 for _, tempo, start in songs]
        row(f"ground truth, {subject}", None, films=np.stack([render(s, b) for s, b in zip(scenes, beats)]))
    films = row(f"people (cfg {n.cfg:g}, music cfg {n.music_cfg:g})", people)
    more = row("dogs", dogs)
    if adapter:
        return
    contact_sheet(f"{HERE}/contact_sheet.jpg", [*films[2:7], *more[:5]])
    moving_picture(f"{HERE}/dancing.gif", [*films[:4], *more[:4]])
    row("people, no music: the adapter without ZICA", people, silent=True)
    for m in (0.0, 2.0, 4.0):
        if m != n.music_cfg:
            row(f"people, music cfg {m:g}", people, music_cfg=m)
    for speed in (0.75, 1.25):
        row(f"people, speed {speed}", people, speed=speed)
        row(f"dogs, speed {speed}", dogs, speed=speed)


STAGES = ("vae", "text", "audio", "young_prior", "data", "adapter", "prior", "layers", "song", "report")
DONE = {  # stages that a run of all leaves out, once a later one has begun
    "young_prior": f"{WORK}/adapter", "data": f"{WORK}/adapter", "adapter": f"{WORK}/prior.safetensors",
}  # fmt: skip


def main():
    asked = sys.argv[1:]
    if asked[:1] == ["data"]:
        return make_data(*asked[1:2])
    if asked[:1] == ["report"]:
        return make_report(*asked[1:2])
    if unknown := [stage for stage in asked if stage not in STAGES]:
        raise mi.InputError(f"no stage {unknown[0]}; there are {', '.join(STAGES)}")
    for stage in asked or [stage for stage in STAGES if not os.path.exists(DONE.get(stage, ""))]:
        globals()[f"make_{stage}"]()


if __name__ == "__main__":
    mi.main(main)
