"""Does the model dance, or does it replay a clip that it was trained on?"""

import itertools
import os
from dataclasses import dataclass

import numpy as np
import torch

import musicinfuser as mi
from dataset.aist import find_videos
from dataset.clips import Preprocessor
from eval import quality
from eval.tables import markdown, mean_error


@dataclass
class Options(mi.VideoOptions, mi.RunOptions):
    """The size and the length of the clips."""


def copy_report(videos, data, wild=None, weights=None, min_size=None, **where):
    """Print and return how near the nearest training clip is to each video, in the VAE's latents,
    and how near it is to the clips held out, which are nobody's copy.

    data, wild, min_size: as train.py takes them, whose cache is used. Distances are in the
    deviations of the latents: 0 is a copy.
    """
    given = {name: value for name, value in where.items() if value is not None}
    options, dit = mi.begin(Options, "sampling", given | {"weights": weights})
    how = options.size, options.frames, dit.config.fps, options.device, mi.DTYPES[options.dtype]
    clips = Preprocessor(os.path.join(data, ".musicinfuser"), options.weights, *how, min_size)
    training = clips.clips(find_videos(data, wild))
    held_out = clips.clips(find_videos(data, split="test"))
    if not training or not held_out:
        same = "name --data, --wild and --min-size as train.py had them"
        raise mi.InputError(f"{data} has no clips to compare with; {same}")
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
