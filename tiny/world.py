"""The toy dance world in pictures: people, dogs and rabbits, one to three of them, dance ten
genres' choreographies.

A dance is a row of key poses that are hit on the beats, with ease in between, so that everything
rests on the beat and moves between beats. A figure is a list of capsules: limbs are drawn by
their distance to a segment."""

import math
from typing import NamedTuple

import numpy as np
import torch

from dataset.aist import prompts as aist_prompts

SIZE, FPS, FRAMES = 64, 30, 73

# fmt: off
SUBJECTS = ("person", "dog", "rabbit")
COLOURS = {
    "red": (0.80, 0.22, 0.22), "blue": (0.20, 0.36, 0.80), "green": (0.16, 0.58, 0.28),
    "yellow": (0.90, 0.78, 0.22), "purple": (0.56, 0.26, 0.68), "orange": (0.92, 0.52, 0.16),
}
USUAL = {"person": "blue", "dog": "orange", "rabbit": "purple"}  # where a caption names none
PLACES = ("studio", "park", "beach", "street", "stage")  # the first where a caption names none
# AIST's codes: name, tempo the genre likes (BPM), four key poses of the basic dance, eight of the
# advanced
GENRES = {
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
    "U": (0.10, -0.38), "S": (0.40, 0.00), "D": (0.10, 0.36), "B": (0.24, -0.20),
    "H": (0.10, 0.22), "X": (-0.14, 0.10), "P": (0.30, -0.32),
}
FEET = {  # left (outwards, up), right (outwards, up), sideways shift and crouch of the body
    "n": ((0.08, 0.00), (0.08, 0.00), 0.00, 0.00), "w": ((0.20, 0.00), (0.20, 0.00), 0.00, 0.03),
    "l": ((0.20, 0.00), (0.02, 0.00), -0.12, 0.02), "r": ((0.02, 0.00), (0.20, 0.00), 0.12, 0.02),
    "k": ((0.26, 0.16), (0.04, 0.00), 0.05, 0.00), "q": ((0.04, 0.00), (0.26, 0.16), -0.05, 0.00),
    "s": ((0.17, 0.00), (0.17, 0.00), 0.00, 0.13), "j": ((0.05, 0.05), (0.05, 0.05), 0.00, -0.07),
}
# So that two are two and three are three: of one, two and three dancers
HEIGHT = {"person": (0.70, 0.52, 0.41), "dog": (0.62, 0.44, 0.31), "rabbit": (0.70, 0.56, 0.46)}
SPACING = (0.0, 0.47, 0.315)  # from one's middle to the next one's, in picture widths
REACH = (1.0, 0.80, 0.66)  # how far hands and feet go sideways
STOUTNESS = (1.0, 1.1, 1.25)  # small limbs are drawn thicker
SKIN = (0.86, 0.66, 0.54)
# fmt: on

# --------------------------------------------------------------------------------------------------
# The dance
# --------------------------------------------------------------------------------------------------


class Pose(NamedTuple):
    """Over T frames, in body heights. Hands are seen from their shoulders, feet from the ground."""

    shift: torch.Tensor  # (T,), as are the next three
    crouch: torch.Tensor
    tilt: torch.Tensor  # of the head, radians
    lean: torch.Tensor  # of the body, radians
    left_hand: torch.Tensor  # (T, 2), as are the next three
    right_hand: torch.Tensor
    left_foot: torch.Tensor
    right_foot: torch.Tensor


def key_pose(code, low):
    """Twelve numbers, in the order of Pose."""
    left, right, shift, crouch = FEET[code[2]]
    (lx, ly), (rx, ry) = HANDS[code[0]], HANDS[code[1]]
    lean = 0.25 * (ly - ry) + 0.3 * shift  # towards the lower hand
    crouch += 0.07 * low
    return [shift, crouch, lean, lean, -lx, ly, rx, ry, -left[0], -left[1], right[0], -right[1]]


def dance(genre, advanced, beat):
    """Poses (T, 12) at the positions `beat` (T,): at rest on whole beats, fastest half-way."""
    codes = GENRES[genre][3 if advanced else 2].split()
    keys = torch.tensor([key_pose(code, low=i % 2 == 0) for i, code in enumerate(codes)])
    i, phase = beat.floor().long(), beat - beat.floor()
    ease = (0.5 - 0.5 * torch.cos(math.pi * phase))[:, None]
    return keys[i % len(codes)] * (1 - ease) + keys[(i + 1) % len(codes)] * ease


def steady_beat(rng, frames=FRAMES):
    """The positions (T,) of the frames in a song of 60 to 180 BPM, in beats, from any phase."""
    tempo = math.exp(rng.uniform(math.log(60), math.log(180)))
    return rng.uniform(0, 8) + torch.arange(frames) / FPS * tempo / 60


# --------------------------------------------------------------------------------------------------
# The figures: capsules (from, to, radius, colour), back to front. Points are (T, 2), x from the
# middle of the dancer, y down from the ground, in body heights.
# --------------------------------------------------------------------------------------------------


def at(x, y):
    return torch.stack(torch.broadcast_tensors(torch.as_tensor(x), torch.as_tensor(y)), -1)


def joint(a, b, length, side):
    """The elbow or knee between a and b, two limbs of this length, and b moved within reach."""
    d = b - a
    distance = d.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    b = a + d / distance * distance.clamp(max=1.98 * length)
    half = (b - a) / 2
    height = (length**2 - half.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    across = torch.stack([half[:, 1], -half[:, 0]], -1) / half.norm(dim=-1, keepdim=True)
    return a + half + side * height * across, b


def person(pose, colour):
    skin, trousers = torch.tensor(SKIN), 0.45 * colour + 0.1
    hip = at(pose.shift, -0.44 + pose.crouch)
    neck = hip + at(0.30 * pose.lean.sin(), -0.30 * pose.lean.cos())
    head = neck + at(0.14 * pose.tilt.sin(), -0.14 * pose.tilt.cos())
    parts = []
    for foot, side in ((pose.left_foot, -1), (pose.right_foot, 1)):
        top = hip + at(0.06 * side, 0.0)
        knee, foot = joint(top, foot, 0.23, side)
        parts += [(top, knee, 0.058, trousers), (knee, foot, 0.054, trousers)]
    parts.append((hip, neck, 0.095, colour))
    for hand, side in ((pose.left_hand, -1), (pose.right_hand, 1)):
        shoulder = neck + at(0.09 * side, 0.02)
        elbow, hand = joint(shoulder, shoulder + hand, 0.20, -side)
        sleeve = 0.85 * colour
        parts += [(shoulder, elbow, 0.048, sleeve), (elbow, hand, 0.046, sleeve)]
        parts.append((hand, hand, 0.062, skin))
    return parts + [(head, head, 0.088, skin)]


def dog(pose, colour):
    """From the side, four legs; the forepaws do what a person's hands do, the tail wags with
    them."""
    raised = (pose.left_hand[:, 1] + pose.right_hand[:, 1]) / 2
    hip = at(pose.shift - 0.24, -0.36 + 1.2 * pose.crouch)
    chest = hip + at(0.42, 0.0) + at(0.0, 0.3 * raised - 0.06)
    head = chest + at(0.15 + 0.1 * pose.tilt, -0.17 + 0.3 * pose.crouch)
    tail = hip + at(-0.15, -0.12 + 0.4 * (pose.left_hand[:, 1] - pose.right_hand[:, 1]))
    parts = [(hip, tail, 0.040, colour)]
    far_legs = (pose.left_hand, pose.left_foot, 0.7 * colour, 0.06)
    near_legs = (pose.right_hand, pose.right_foot, colour, -0.02)
    for hand, foot, shade, dx in (far_legs, near_legs):
        lift = (0.36 - hand[:, 1]) * 0.40  # a raised hand is a raised paw
        forepaw = at(0.16 + dx + 0.4 * hand[:, 0].abs(), -lift)
        hindpaw = at(-0.28 + dx + 0.5 * foot[:, 0], foot[:, 1])
        for top, paw, side in ((chest, forepaw, -1), (hip, hindpaw, 1)):
            knee, paw = joint(top, paw, 0.19, side)
            parts += [(top, knee, 0.055, shade), (knee, paw, 0.050, shade)]
    parts.append((hip, chest, 0.115, colour))
    snout, ear = (head + at(0.06, 0.04), head + at(0.15, 0.05)), head + at(-0.07, -0.06)
    parts += [(head, head, 0.105, colour), (*snout, 0.050, colour)]
    return parts + [(ear, ear + at(-0.04, 0.11), 0.045, 0.5 * colour)]


def rabbit(pose, colour):
    """Upright, round, short limbs; the long ears do what a person's hands do."""
    pale, limbs = 0.5 * colour + 0.45, 0.75 * colour
    hip = at(pose.shift, -0.24 + pose.crouch)
    neck = hip + at(0.22 * pose.lean.sin(), -0.22 * pose.lean.cos())
    head = neck + at(0.15 * pose.tilt.sin(), -0.15 * pose.tilt.cos())
    parts = []
    for foot, side in ((pose.left_foot, -1), (pose.right_foot, 1)):
        paw = at(0.03 * side + 0.9 * foot[:, 0], foot[:, 1] - 0.03)
        parts.append((hip + at(0.08 * side, 0.0), paw, 0.062, limbs))
        parts.append((paw, paw + at(0.06 * side, 0.0), 0.050, pale))
    for hand, side in ((pose.left_hand, -1), (pose.right_hand, 1)):
        root = head + at(0.045 * side, -0.06)
        tip = root + at(0.45 * hand[:, 0], -0.20 + 0.22 * hand[:, 1])
        parts.append((root, tip, 0.050, 0.85 * colour))
    parts.append((hip, neck, 0.15, colour))
    parts.append((hip + at(0.0, 0.02), neck + at(0.0, 0.06), 0.085, pale))
    for hand, side in ((pose.left_hand, -1), (pose.right_hand, 1)):
        shoulder = neck + at(0.11 * side, 0.05)
        parts.append((shoulder, shoulder + 0.45 * hand, 0.050, limbs))
    return parts + [(head, head, 0.115, colour)]


FIGURES = {"person": person, "dog": dog, "rabbit": rabbit}

# --------------------------------------------------------------------------------------------------
# The places: pictures (T, 3, SIZE, SIZE). x and y are the coordinates of the pixels, 0 to 1 where
# the camera is still; a and b say where things stand.
# --------------------------------------------------------------------------------------------------


def edge(z, softness=0.02):
    """0 where z is negative, 1 where it is positive."""
    return (z / softness + 0.5).clamp(0, 1)


def disc(x, y, cx, cy, rx, ry):
    return edge(1 - (((x - cx) / rx).square() + ((y - cy) / ry).square()).sqrt(), 0.15)


def over(picture, colour, amount):
    return picture * (1 - amount) + torch.tensor(colour)[:, None, None] * amount


def sky(above, below, y):
    return over(torch.tensor(above)[:, None, None], below, y)


def studio(x, y, a, b):
    wall = sky((0.84, 0.84, 0.86), (0.92, 0.92, 0.93), y)
    return over(wall, (0.72, 0.72, 0.74), edge(y - 0.80))


def park(x, y, a, b):
    picture = sky((0.62, 0.78, 0.92), (0.80, 0.88, 0.94), y)
    picture = over(picture, (0.46, 0.64, 0.36), edge(y - 0.70))
    for cx in (a, b):
        trunk = edge(0.03 - (x - cx).abs()) * edge(y - 0.4) * edge(0.72 - y)
        picture = over(picture, (0.44, 0.36, 0.28), trunk)
        picture = over(picture, (0.34, 0.54, 0.32), disc(x, y, cx, 0.36, 0.14, 0.18))
    return picture


def beach(x, y, a, b):
    picture = sky((0.66, 0.84, 0.96), (0.84, 0.92, 0.96), y)
    picture = over(picture, (0.36, 0.62, 0.76), edge(y - 0.50))
    picture = over(picture, (0.88, 0.80, 0.60), edge(y - 0.72 - 0.02 * torch.sin(9 * x)))
    return over(picture, (0.98, 0.90, 0.62), disc(x, y, a, 0.16, 0.09, 0.09))


def street(x, y, a, b):
    picture = sky((0.74, 0.76, 0.80), (0.82, 0.82, 0.84), y)
    picture = over(picture, (0.46, 0.46, 0.48), edge(y - 0.78))
    for cx, top, shade in ((a, 0.30, 0.60), (b, 0.15, 0.54), ((a + b) / 2 + 0.45, 0.22, 0.64)):
        house = edge(0.13 - (x - cx).abs()) * edge(y - top) * edge(0.78 - y)
        picture = over(picture, (shade, shade - 0.06, shade - 0.10), house)
    return picture


def stage(x, y, a, b):
    picture = sky((0.16, 0.14, 0.22), (0.24, 0.20, 0.32), y)
    picture = over(picture, (0.34, 0.26, 0.28), edge(y - 0.80))
    picture = over(picture, (0.58, 0.52, 0.52), 0.8 * disc(x, y, 0.5, 0.93, 0.44, 0.12))
    beam = edge(0.10 + 0.25 * y - (x - 0.5).abs(), 0.1)
    return over(picture, (0.36, 0.34, 0.52), 0.5 * beam)


BACKDROPS = {"studio": studio, "park": park, "beach": beach, "street": street, "stage": stage}


def backdrop(place, rng, dx, zoom):
    """(T, 3, SIZE, SIZE) for camera offsets dx (T,) and zooms (T,)."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    y = (axis / zoom[:, None] + 0.5)[:, None, :, None]  # 0 the top, 1 the bottom
    x = (axis / zoom[:, None] + 0.5 + dx[:, None])[:, None, None, :]
    light = rng.uniform(0.92, 1.05)
    picture = BACKDROPS[place](x, y, *rng.uniform(0.1, 0.9, 2)) * light
    return picture.clamp(0, 1).expand(len(dx), 3, SIZE, SIZE).clone()


# --------------------------------------------------------------------------------------------------
# Scenes and their pictures
# --------------------------------------------------------------------------------------------------


def draw_scene(rng, **fixed):
    """A scene at random: subject, count, colour, place, genre, advanced, camera, seed; any of
    them may be given."""
    subject = fixed.get("subject") or str(rng.choice(SUBJECTS, p=[0.5, 0.25, 0.25]))
    scene = {
        "subject": subject,
        "count": int(rng.choice([1, 2, 3], p=[0.7, 0.18, 0.12])),
        "colour": str(rng.choice(list(COLOURS))),
        "place": str(rng.choice(PLACES, p=[0.4, 0.15, 0.15, 0.15, 0.15])),
        "genre": str(rng.choice(list(GENRES))),
        "advanced": bool(rng.random() < 0.5),
        "camera": str(rng.choice(["01", "10"], p=[0.85, 0.15])),
        "seed": int(rng.integers(2**31)),
    }
    if rng.random() < 0.2:
        scene["colour"] = USUAL[subject]
    return scene | fixed


def cover(a, b, radius, grid):
    """How much of each pixel a capsule covers, (T, h, w), anti-aliased. a, b (T, 2), grid (h, w,
    2)."""
    p, d = grid - a[:, None, None], (b - a)[:, None, None]
    along = ((p * d).sum(-1) / d.square().sum(-1).clamp(min=1e-9)).clamp(0, 1)
    distance = (p - along[..., None] * d).norm(dim=-1)
    return ((radius - distance) * SIZE / 1.4 + 0.5).clamp(0, 1)


def paint(picture, a, b, radius, colour):
    """A capsule over the picture, in place, only where it can be."""
    low = torch.minimum(a, b).amin(0) - 0.1
    high = torch.maximum(a, b).amax(0) + 0.1
    x0, y0 = ((low + 0.5) * SIZE).floor().clamp(0, SIZE).int().tolist()
    x1, y1 = ((high + 0.5) * SIZE).ceil().clamp(0, SIZE).int().tolist()
    if x0 >= x1 or y0 >= y1:
        return
    axis = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    grid = torch.stack(torch.meshgrid(axis[x0:x1], axis[y0:y1], indexing="xy"), -1)
    region = picture[:, :, y0:y1, x0:x1]
    region += (colour.clamp(0, 1)[:, None, None] - region) * cover(a, b, radius, grid)[:, None]


def render(scene, beat):
    """The scene, danced: uint8 (T, SIZE, SIZE, 3). scene: of draw_scene; beat (T,): of each
    frame, in beats."""
    rng = np.random.default_rng(scene["seed"])
    size = scene["count"] - 1
    dx, zoom = camera(scene["camera"], rng, len(beat))
    picture = backdrop(scene["place"], rng, dx, zoom)
    height = HEIGHT[scene["subject"]][size] * rng.uniform(0.94, 1.06)
    steps = dance(scene["genre"], scene["advanced"], beat.float() + rng.integers(8))
    steps = steps * torch.tensor(rng.uniform(0.9, 1.1, 12)).float()  # each dancer's own way
    steps[:, 4::2] *= REACH[size]
    pose = Pose(*steps[:, :4].unbind(1), *steps[:, 4:].unflatten(1, (4, 2)).unbind(1))
    mirror = torch.tensor([rng.choice([-1.0, 1.0]), 1.0]).float()
    colour = torch.tensor(COLOURS[scene["colour"]]) * rng.uniform(0.94, 1.05)
    figure = FIGURES[scene["subject"]](pose, colour.clamp(0, 1))
    centres = (np.arange(size + 1) - size / 2) * SPACING[size] + rng.uniform(-0.03, 0.03)
    for centre in centres:
        ground = torch.stack([centre - dx, torch.full_like(dx, 0.37)], -1)  # (T, 2)
        for a, b, radius, shade in figure:
            a, b = ((p * mirror * height + ground) * zoom[:, None] for p in (a, b))
            paint(picture, a, b, radius * STOUTNESS[size] * height, shade)
    return (picture * 255).round().byte().permute(0, 2, 3, 1).numpy()


def camera(code, rng, frames):
    """Offsets and zooms (T,): still ("01") or moving ("10")."""
    t, phases = torch.arange(frames) / FPS, rng.uniform(0, 6, 2)
    moving = float(code == "10")
    dx = 0.05 * moving * torch.sin(0.9 * t + phases[0])
    return dx.float(), (1 + 0.06 * moving * torch.sin(0.7 * t + phases[1])).float()


# --------------------------------------------------------------------------------------------------
# Captions. What they leave out, but for the dance, is the usual: its colour, the studio, a camera
# that stands still.
# --------------------------------------------------------------------------------------------------

# fmt: off
WHO = {
    "person": (("person", "dancer", "man", "woman", "professional dancer", "male dancer",
                "female dancer", "professional female dancer", "professional male dancer"),
               ("people", "dancers", "men", "women", "professional dancers", "persons")),
    "dog": (("dog", "puppy", "dog", "hound"), ("dogs", "puppies", "hounds")),
    "rabbit": (("rabbit", "bunny", "hare"), ("rabbits", "bunnies", "hares")),
}
WEARING = ("in {}", "wearing {}", "in a {} shirt", "dressed in {}")
WHERE = {
    "studio": ("in a studio with a white backdrop", "in a studio", "in the white studio",
               "indoors"),
    "park": ("in a park", "in the park with trees", "on the grass", "in a garden"),
    "beach": ("on the beach", "on a beach", "by the sea", "on the sand by the ocean"),
    "street": ("in the street", "on a street", "in the middle of a city", "in New York City"),
    "stage": ("on a stage", "on stage at night", "in a dark club", "under the spotlights"),
}
VIEW = {
    "01": ("front view", "captured from the front", "from a front view"),
    "10": ("moving front view", "captured from a moving front view", "with a moving camera"),
}
DOES = ("dancing", "dancing", "dancing to the music", "performing a dance")
DOES_GENRE = ("dancing {}", "dancing {}", "performing {}", "doing a {} dance")
# fmt: on


def caption(scene, rng, genre=0.5):
    """A caption in few or many words, and what it tells: {attribute: value or None}.

    genre: how often it is named; at 0 no caption is as AIST's, which always name it."""
    usual = scene["colour"] == USUAL[scene["subject"]]
    told = {
        "colour": not usual or rng.random() < 0.4,
        "place": scene["place"] != PLACES[0] or rng.random() < 0.5,
        "genre": rng.random() < genre,
        "advanced": rng.random() < 0.3,
        "camera": scene["camera"] != "01" or rng.random() < 0.2,
    }
    like_aist = genre and scene["subject"] == "person" and scene["place"] == "studio" and usual
    if like_aist and rng.random() < 0.6:
        told = dict.fromkeys(told, True) | {"colour": False}
        text = pick(rng, aist_prompts(aist_name(scene, "BR0", rng)))
    else:
        text = in_words(scene, told, rng)
    values = {"subject": scene["subject"], "count": scene["count"]}
    return text, values | {key: scene[key] if told[key] else None for key in told}


def pick(rng, options):
    return str(rng.choice(options))


def in_words(scene, told, rng):
    words = [who(scene, told["colour"], rng)]
    does = pick(rng, DOES_GENRE if told["genre"] else DOES)
    words.append(does.format(GENRES[scene["genre"]][0]))
    if told["advanced"]:
        words.append(f"in {'an advanced' if scene['advanced'] else 'a basic'} dance setting")
    if told["place"]:
        words.append(pick(rng, WHERE[scene["place"]]))
    text = " ".join(words)
    if told["camera"]:
        text += ", " + pick(rng, VIEW[scene["camera"]])
    if rng.random() < 0.2:
        text = pick(rng, ["a video of ", "a dance video of ", "this is "]) + text
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def who(scene, with_colour, rng):
    """'a person wearing red', 'two blue dogs', ..."""
    one, many = WHO[scene["subject"]]
    name = pick(rng, one if scene["count"] == 1 else many)
    if with_colour and scene["subject"] == "person":
        name += " " + pick(rng, WEARING).format(scene["colour"])
    elif with_colour:
        name = f"{scene['colour']} {name}"
    article = "an" if name.startswith("orange") else pick(rng, ["a", "a", "one"])
    return {1: article, 2: "two", 3: "three"}[scene["count"]] + " " + name


def aist_name(scene, song, rng):
    """A file name as AIST's; the dancers' numbers are drawn."""
    dancers = rng.choice(np.arange(1, 36), scene["count"], replace=False)
    dancers = "".join(f"_d{number:02d}" for number in dancers)
    situation = "sFM" if scene["advanced"] else "sBM"
    dance_number = rng.integers(1, 99)
    return f"g{scene['genre']}_{situation}_c{scene['camera']}{dancers}_m{song}_ch{dance_number:02d}"
