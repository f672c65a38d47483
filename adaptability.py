"""Which layers should listen?   python adaptability.py

The paper's criterion (Sec. 4.1): sample with the pre-trained model, without adapter and music,
guided by itself without layer l (Eq. 4), and score the videos. The better they are than without
that guidance, the more adaptable the layer.

What is measured of a video is kept as it ends and never computed again: a run that was killed goes
on by the same command. Several processes share the videos out, if torchrun starts them, or each has
its own --layers and all the same run folder.
"""

import itertools
import os
import re
import signal
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import musicinfuser as mi
from eval import quality, ranking
from musicinfuser import option

PROMPTS = (  # general, of people and animals, and within what the toy world knows
    "a professional dancer dancing in a studio with a white backdrop",
    "a woman in red dancing on a stage",
    "a man in a blue shirt performing House in the street, front view",
    "two people dancing on the beach",
    "a dog dancing in a park",
    "an orange dog dancing to the music in a studio",
    "a rabbit dancing on the grass",
    "three rabbits dancing on a stage, with a moving camera",
)
TOKENS_AT_ONCE = 4096  # visual tokens of the videos that are sampled together, unless told


@dataclass
class Options(mi.VideoOptions, mi.RunOptions):
    """All that a ranking takes."""

    cfg: float = option(6.0, "guidance scale of the text (Eq. 3)", line="solver")
    skip_scale: float = option(1.0, "guidance scale of what a layer adds (Eq. 4)", line="solver")
    prompts: tuple = option(None, "default: eight dances", parse=str)
    prompts_file: str = option(None, "... or one a line")
    seeds: tuple = option((0, 1), "of each prompt", parse=int, flag="--seed")
    metric: str = option(
        None,
        "imaging or laion_aes (by pyiqa), frechet, or module:function, which takes a video "
        "(3,T,H,W) in [-1,1] and returns a number, higher is better; default: frechet if there is "
        "a reference, else imaging",
        line="metric",
    )
    reference: str = option(
        None, "folder of videos for frechet; default: the weights' own statistics", line="metric"
    )
    layers: str = option(None, "only these, as 0-11 or 0,3,6; other processes do the rest")
    batch: int = option(None, "videos at once; default: 4096 tokens of them", low=1, high=4096)
    keep: bool = option(False, "keep the videos as mp4")
    out: str = option("runs/adaptability", "run folder; the same command goes on in it")
    top: int = option(None, "how many layers to mark; default: a third", low=1)
    dry_run: bool = option(False, "say how many forward passes it takes, and stop")


class Video(NamedTuple):
    layer: int | None  # None: the baseline
    prompt: str
    seed: int

    @property
    def guide(self):
        return "the baseline" if self.layer is None else f"layer {self.layer}"

    @property
    def noise_seed(self):
        """The same for every layer, another for every prompt, so that videos are independent.
        `sample.py SONG PROMPT --adapter none --skip LAYER --seed THIS` makes the same video."""
        return int(mi.digest([self.prompt, self.seed])[:15], 16)

    def __str__(self):
        return f'{self.guide}, "{self.prompt}", seed {self.seed}'


def rank(**given):
    """Rank the layers of a weights folder. given: fields of Options.

    The velocity is uncond + cfg (cond - uncond) + skip_scale (cond - cond without the layer).
    Returns what adaptability.json holds, or None for a dry run and where layers are missing still.
    Raises musicinfuser.InputError, before anything takes long where it can.
    """
    options, dit = mi.begin(Options, "sampling", given)
    process, processes = mi.join_processes(options)
    depth = len(dit.blocks)
    layers = check(options, depth)
    mi.check_decoder(options.weights, dit.config)
    metric = quality.choose_metric(options)
    check_amount(options)
    kept = Kept(options, metric)
    videos = videos_of(options, (*layers, None))  # the baseline last: others may have made it
    todo = [video for video in videos if kept.lacks(video)]
    announce(options, layers, videos, todo)
    if options.dry_run:
        return None
    kept.write_settings()
    metric.load(options, dit.config.fps, sampling=bool(todo))
    mi.wait_for_all()  # until all have seen the same to do
    share = batches_of(todo, options.batch)[process::processes]
    if share:
        make_videos(share, options, kept)
    mi.wait_for_all()
    measured = [kept.read_layer(layer) for layer in (None, *range(depth))]
    lacking = [layer for layer in range(depth) if measured[layer + 1] is None]
    if lacking:
        words = ", ".join(map(str, lacking))
        print(f"layers {words} are missing: whoever finds all of them writes the ranking")
        return None
    result, gaps = ranking.compare(metric.score, measured[0], measured[1:])
    ranking.report(result, gaps, options.top, len(measured[0]))
    return save(result, options, kept.settings, depth)


# ----------------------------------------------------------------------------------------------
# Check and plan
# ----------------------------------------------------------------------------------------------


def check(options, depth):
    """What the dataclass cannot; fills in what follows. Returns the layers. Raises InputError."""
    layers = layer_numbers(options.layers, depth)
    options.top = mi.third_of(depth) if options.top is None else options.top
    if options.top > depth:
        raise mi.InputError(f"--top must be from 1 to {depth}, not {options.top}")
    if options.prompts_file is not None:
        lines = read_prompts(options.prompts_file)
        if options.prompts:
            raise mi.InputError("--prompts and --prompts-file do not go together")
        options.prompts = lines
    options.prompts = PROMPTS if options.prompts is None else options.prompts
    options.prompts = tuple(dict.fromkeys(options.prompts))
    if not options.prompts or not all(prompt.strip() for prompt in options.prompts):
        raise mi.InputError("there are no prompts, or an empty one")
    options.seeds = tuple(dict.fromkeys(options.seeds))
    if not options.seeds or min(options.seeds) < 0:
        raise mi.InputError("--seed takes numbers from 0")
    if options.batch is None:
        height, width = options.size
        tokens = mi.latent_frames(options.frames) * height * width // 256
        options.batch = max(1, TOKENS_AT_ONCE // tokens)
    return layers


def check_amount(options):
    """Raises InputError where a Gaussian has no two latent frames, with a video left out."""
    videos = len(options.prompts) * len(options.seeds)
    frames = mi.latent_frames(options.frames) * max(videos - 1, 1)
    if options.metric == "frechet" and frames < 2:
        raise mi.InputError("too little to compare by frechet; give more --frames, or more --seed")


def layer_numbers(text, depth):
    """[0, 1, 2, 5] from "0-2,5"; all from None. Raises InputError."""
    if text is None:
        return list(range(depth))
    if not re.fullmatch(r"[0-9]{1,18}(-[0-9]{1,18})?(,[0-9]{1,18}(-[0-9]{1,18})?)*", text):
        raise mi.InputError(f"--layers {text}: give numbers and ranges such as 0-11 or 0,3,6")
    layers = set()
    for part in text.split(","):
        first, last = int(part.split("-")[0]), int(part.split("-")[-1])
        if not first <= last < depth:
            raise mi.InputError(f"--layers {text}: the model has layers from 0 to {depth - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def read_prompts(path):
    """One prompt a line. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise mi.InputError(f"cannot read the prompts of {path}: {error}") from error


def videos_of(options, layers):
    combinations = itertools.product(layers, options.prompts, options.seeds)
    return [Video(*combination) for combination in combinations]


def passes(video, options):
    """Forward passes of the transformer."""
    velocities = 2 * options.steps - 1 if options.solver == "heun" else options.steps
    skipping = video.layer is not None and options.skip_scale != 0
    return velocities * (1 + (options.cfg != 1) + skipping)


def announce(options, layers, videos, todo):
    mi.print_options(options)
    total, left = (sum(passes(video, options) for video in some) for some in (videos, todo))
    pairs = f"{len(options.prompts)} prompts, {len(options.seeds)} seeds"
    print(f"work     {len(layers)} layers and the baseline, {pairs}, {options.batch} at once")
    there = f"{len(videos) - len(todo)} videos are there"
    print(f"         {total:,} forward passes for {len(videos)} videos; {there}, {left:,} are left")


# ----------------------------------------------------------------------------------------------
# What is kept of a video, under a name that depends on everything that determines it
# ----------------------------------------------------------------------------------------------


class Kept:
    def __init__(self, options, metric):
        self.options, self.metric = options, metric
        names = "metric", "skip_scale", "cfg", "solver", "steps", "frames", "size", "dtype"
        self.settings = {name: getattr(options, name) for name in names}
        self.settings |= {"weights": folder_digest(options), "source": metric.source}

    def name(self, video):
        """To read, with a digest; the baseline is the same at every scale of the guidance."""
        key = self.settings | video._asdict()
        if video.layer is None:
            key["skip_scale"] = 0
        who = "baseline" if video.layer is None else f"layer-{video.layer:02d}"
        words = re.sub(r"[^a-z0-9]+", "-", video.prompt.lower())[:40].strip("-")
        return f"{who}-{words}-{video.seed}-{mi.digest(key)[:12]}"

    def path(self, video):
        return os.path.join(self.options.out, "kept", self.name(video))

    def film(self, video):
        return os.path.join(self.options.out, "videos", f"{self.name(video)}.mp4")

    def lacks(self, video):
        if self.options.keep and not os.path.exists(self.film(video)):
            return True
        return self.metric.read(self.path(video)) is None

    def write(self, video, pixels, fps):
        if self.options.keep:
            mi.save_video(self.film(video), pixels, fps)
        about = video._asdict() | {"video": str(video), "noise_seed": video.noise_seed}
        self.metric.write(self.path(video), pixels, about | self.settings)

    def write_settings(self):
        name = f"settings-{mi.digest(self.settings)[:12]}.json"
        mi.save_json(os.path.join(self.options.out, "kept", name), self.settings)

    def read_layer(self, layer):
        """What was measured of all its videos; None where one is missing."""
        videos = videos_of(self.options, (layer,))
        measured = [self.metric.read(self.path(video)) for video in videos]
        return None if any(found is None for found in measured) else measured


def folder_digest(options):
    """Of what makes the videos, and of the encoder where that measures them, wherever they lie."""
    files = ["dit.safetensors", "decoder.safetensors"]
    if options.metric == "frechet":
        files.append("encoder.safetensors")
    for folder in ("text_encoder", "tokenizer"):
        path = os.path.join(options.weights, folder)
        if not os.path.isdir(path):
            raise mi.InputError(f"no such folder: {path}")
        files += [os.path.join(folder, name) for name in sorted(os.listdir(path))]
    paths = {name: os.path.join(options.weights, name) for name in files}
    files = [(name, path) for name, path in paths.items() if os.path.isfile(path)]
    return mi.digest([(name, mi.model_digest(path)) for name, path in files])


# ----------------------------------------------------------------------------------------------
# Sample
# ----------------------------------------------------------------------------------------------


def batches_of(todo, size):
    """[[Video]]: up to so many of a layer, to be sampled at once."""
    batches = []
    for _, group in itertools.groupby(todo, lambda video: video.layer):
        group = list(group)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def make_videos(batches, options, kept):
    """Sample and measure the videos of batches."""
    sampler = Sampler(options)
    with tqdm(total=options.steps * sum(map(len, batches)), unit="step") as bar:
        for batch in batches:
            layer = batch[0].layer
            bar.set_description(batch[0].guide)
            batch = [video for video in batch if kept.lacks(video)]
            progress = partial(counted, bar=bar, amount=len(batch))
            videos = sampler.videos(layer, batch, progress) if batch else ()
            for video, pixels in zip(batch, videos):
                kept.write(video, pixels, sampler.dit.config.fps)


def counted(steps, bar, amount):
    for step in steps:
        yield step
        bar.update(amount)


class Sampler:
    """The models, without adapter and music, and the texts."""

    def __init__(self, options):
        self.options, weights = options, options.weights
        where = mi.text_device(weights, options.device)
        *texts, self.null = mi.encode_text(weights, [*options.prompts, ""], where)
        self.texts = dict(zip(options.prompts, texts))
        how = options.device, mi.DTYPES[options.dtype]
        self.dit = mi.load_dit(os.path.join(weights, "dit.safetensors"), *how, options.offload)
        found, wanted = self.null[0].shape[-1], self.dit.t5_yproj.in_features
        if found != wanted:
            reason = f"{found} features a token, {weights}'s transformer takes {wanted}"
            raise mi.InputError(f"text_encoder gives {reason}: no fit")
        self.decoder = mi.load_decoder(os.path.join(weights, "decoder.safetensors"), *how)
        if options.compile:
            mi.compile_blocks(self.dit)

    def videos(self, layer, batch, progress):
        """Yield the videos (3,T,H,W) in [-1,1] of a batch guided by a layer, None: by none."""
        o = self.options
        noise = [mi.noise_for(v.noise_seed, self.dit.config, o.frames, o.size) for v in batch]
        noise = torch.cat(noise).to(o.device)
        text = self.stacked([self.texts[video.prompt] for video in batch])
        null = self.stacked([self.null] * len(batch))
        how = {f.name: getattr(o, f.name) for f in fields(mi.VideoOptions)} | {"cfg": o.cfg}
        if layer is not None:
            how |= {"skip": (layer,), "skip_scale": o.skip_scale}
        how = mi.SamplingOptions(**how)
        inputs = self.dit, self.decoder, noise, text, null, None
        for video in mi.noise_to_video(*inputs, how, progress):
            yield video.clamp(-1, 1).cpu()

    def stacked(self, texts):
        """[(y_feat (1,L,D_text), y_mask (1,L))] -> one such pair, (B,...), padded at the end."""
        columns = ([part[0] for part in column] for column in zip(*texts))
        device = self.options.device
        return [pad_sequence(column, batch_first=True).to(device) for column in columns]


def save(result, options, settings, depth):
    """Write adaptability.json, and say what to do with it."""
    names = "metric", "reference", "prompts", "seeds"
    result |= {name: getattr(options, name) for name in names} | {"settings": settings}
    path = os.path.join(options.out, "adaptability.json")
    mi.save_json(path, result)
    top = "" if options.top == mi.third_of(depth) else f" --top {options.top}"
    print(f"{path}: train.py --layers {path}{top}")
    return result


def main():
    parser = mi.parser_for(Options, "Rank a model's layers by what each lends as guidance.")
    rank(**vars(parser.parse_args()))


if __name__ == "__main__":
    mi.main(main)
