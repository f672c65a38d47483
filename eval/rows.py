"""The rows of eval.ablate: what differs from ours, as the weights folder prefers to be trained.

Top to bottom:   the table | names | sets of layers | rows that are more than options
"""

import contextlib
import functools
import os
import random
import shutil

import torch

import musicinfuser as mi
import train

PRIOR, TRUTH = "prior without music", "ground truth through the VAE"
OMNIDANCE = "weights grow with depth (OmniDance)"  # ((l + 1) / L)^1.5, arXiv 2606.30019
WAN_DANCER = "every fourth layer (Wan-Dancer)"  # arXiv 2607.09581
UNTAUGHT = "audio encoder not taught beats"
ROWS = {
    "ours": {},
    PRIOR: {},
    "all layers": {"layers": "all"},
    "ranked layers": {"layers": "ranked"},
    "lowest-ranked layers": {"layers": "lowest"},
    "evenly distributed layers": {"layers": "even"},
    "first layers": {"layers": "first"},
    "middle layers": {"layers": "middle"},
    "last layers": {"layers": "last"},
    WAN_DANCER: {"layers": "fourth"},
    OMNIDANCE: {"layers": "all"},
    **{f"random layers {i}": {"layers": f"random {i}"} for i in range(4)},
    "feature addition": {"adapter": "add"},
    "uniform noise": {"beta": 1.0},
    "Beta-Uniform noise": {"beta": 3.0, "half_life": None},
    "noise nearer to 1": {"beta": 0.5, "half_life": 1e9},
    "no in-the-wild data": {"wild_ratio": 0.0},
    "no zero initialisation": {"random_init": True},  # of ZICA's W_O alone, as in the paper
    "LoRA rank 4": {"rank": 4},
    "LoRA rank 64": {"rank": 64},
    "no LoRA": {"rank": 0},
    "base prompt never": {"base_prompt_ratio": 0.0},
    "base prompt always": {"base_prompt_ratio": 1.0},
    "plain ZICA, no window": {"window": None},
    "window 0": {"window": 0},
    "window 1": {"window": 1},
    UNTAUGHT: {},
}
GROUPS = {  # names for several rows
    "sets": ["ours", *(row for row in ROWS if "layers" in ROWS[row] and row != OMNIDANCE)],
    "main": [
        "ours",
        PRIOR,
        "plain ZICA, no window",
        "feature addition",
        "Beta-Uniform noise",
        "no LoRA",
        "ranked layers",
        "first layers",
        "last layers",
        "evenly distributed layers",
        "random layers 0",
    ],
}


def slug(row):
    """A row as its folder is called, and as it may be given on the command line."""
    words = "".join(c for c in row if c.isalnum() or c in " -")
    return words.replace(" ", "-")


def rows_of(names):
    """Rows by their names, their slugs or a group's. Raises InputError."""
    known = {slug(row): [row] for row in ROWS} | GROUPS
    chosen = []
    for name in names or [slug(row) for row in ROWS]:
        key = name if name in known else slug(name)
        if key not in known:
            raise mi.InputError(f"no row {name}; there are: {', '.join(known)}")
        chosen += known[key]
    return list(dict.fromkeys(chosen))


def layers_of(choice, depth, weights):
    """The layers of a row: what train.py takes, and a third of all for ranked, lowest and random N,
    whose set follows from N and the depth alone. Raises InputError."""
    kind, _, number = str(choice or "").partition(" ")
    third = mi.third_of(depth)
    if kind == "random":
        return tuple(sorted(random.Random(number).sample(range(depth), third)))
    if kind == "fourth":
        return tuple(range(0, depth, 4))
    if kind in ("ranked", "lowest"):
        ranking = train.read_ranking(os.path.join(weights, "adaptability.json"), depth)
        return tuple(sorted(ranking[:third] if kind == "ranked" else ranking[-third:]))
    return tuple(train.pick_layers(choice, depth, weights))


def untaught(weights, out):
    """The weights folder with an audio encoder at random: what is it worth to teach it beats?"""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    folder, taught = os.path.join(out, "untaught"), os.path.join(weights, "audio_encoder")
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(weights):
        model = name.endswith(".safetensors") or name in ("text_encoder", "tokenizer")
        if model and not os.path.lexists(os.path.join(folder, name)):
            os.symlink(os.path.abspath(os.path.join(weights, name)), os.path.join(folder, name))
    if not os.path.exists(os.path.join(folder, "audio_encoder")):
        torch.manual_seed(0)
        fresh = os.path.join(folder, ".tmp-audio")
        Wav2Vec2Model(Wav2Vec2Config.from_pretrained(taught)).save_pretrained(fresh)
        shutil.copy(os.path.join(taught, "preprocessor_config.json"), fresh)
        os.rename(fresh, os.path.join(folder, "audio_encoder"))
    return folder


@contextlib.contextmanager
def growing_with_depth(power=1.5):
    """Within it, train.py's models weigh what the ZICA of layer l of L adds by ((l + 1) / L)^power,
    as OmniDance does."""
    load_model = train.load_model

    def load_weighted(*arguments):
        dit = load_model(*arguments)
        for layer, zica in zip(dit.adapter.layers, dit.audio_cross_attn_blocks):
            weight = ((layer + 1) / len(dit.blocks)) ** power
            zica.to_out.register_forward_hook(functools.partial(scaled, weight))
        return dit

    train.load_model = load_weighted
    try:
        yield
    finally:
        train.load_model = load_model


def scaled(weight, module, inputs, output):
    return weight * output
