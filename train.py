"""A folder of dance videos in, an adapter out:   python train.py --data aist/

The paper's settings are the defaults. Whatever happens at a step follows from the seed and the
step alone, so a run that was killed goes on by the same command and ends with the same adapter, to
the bit, as one that never was. (On a GPU, long attention adds up gradients in no fixed order.)
"""

import json
import math
import os
import random
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import torch
import torch.distributed as dist
from tqdm import tqdm

import musicinfuser as mi
import sample
from dataset.aist import PLAIN, find_videos
from dataset.batches import Samples
from dataset.clips import Preprocessor
from dataset.runs import RunFolder


@dataclass
class Options(mi.AdapterOptions, mi.RunOptions):
    """All options of a run. The defaults are the paper's, for Mochi; a weights folder may prefer
    others."""

    top: int = mi.option(None, "how many layers of a ranking or a name; default: a third", low=1)
    wild: str = mi.option(None, "folder of other dance videos, a caption in a .txt beside each")
    wild_ratio: float = mi.option(1.0, "of them for each of --data's", low=0)
    min_size: tuple = mi.option(None, "HEIGHT WIDTH a video needs; default: none grows", parse=int)
    out: str = mi.option("runs/musicinfuser", "run folder; the same command goes on in it")
    init: str = mi.option(None, "adapter to begin from; default: a fresh one")
    steps: int = mi.option(4000, "of the optimiser", low=1, line="training")
    batch: int = mi.option(1, "clips at once", low=1, high=4096, line="training")
    accumulate: int = mi.option(1, "batches a step", low=1, high=4096, line="training")
    lr: float = mi.option(1e-4, "AdamW's peak learning rate", above=0, line="training")
    warmup: int = mi.option(None, "steps to the peak; default: a twentieth of all", low=0)
    beta: float = mi.option(3.0, "noise begins at Beta(1, beta); 1: uniform", above=0, line="noise")
    half_life: float = mi.option(
        None, "steps, half-way to uniform; default: a twentieth", above=0, line="noise"
    )
    base_prompt_ratio: float = mi.option(0.2, "how often the plain prompt is used", low=0, high=1)
    caption_dropout: float = mi.option(0.1, "how often there is no prompt", low=0, high=1)
    audio_dropout: float = mi.option(0.0, "how often a batch has no music", low=0, high=1)
    save_every: int = mi.option(500, "steps", low=1)
    eval_every: int = mi.option(500, "steps between losses on held-out clips", low=1)
    eval_clips: int = mi.option(4, "held-out clips, heard with their own song and another", low=2)
    eval_sigmas: tuple = mi.option((0.75, 0.9), "noise levels of those losses", parse=float)
    sample_every: int = mi.option(0, "steps between videos of a held-out song; 0: none", low=0)
    seed: int = mi.option(42, "of everything", low=0)
    shard: bool = mi.option(False, "processes share out the frozen blocks", line="device")


# Options that another start of a run may change: the adapter stays the same
# fmt: off
FREE = {
    "data", "weights", "wild", "out", "min_size", "top", "device", "offload", "compile",
    "shard", "save_every", "eval_every", "eval_clips", "eval_sigmas", "sample_every",
}
# fmt: on


def train(data, **given):
    """Train an adapter on the videos in `data`; returns its path. given: fields of Options.

    Raises musicinfuser.InputError.
    """
    options, outline = mi.begin(Options, "training", given)
    complete(options, len(outline.blocks))
    if options.rank > outline.width:
        raise mi.InputError(f"--rank must be the model's width, {outline.width}, or less")
    if outline.width % options.heads:
        raise mi.InputError(f"--heads must divide the model's width, {outline.width}")
    if options.init:
        check_init(options, outline)
    if options.sample_every:
        mi.settle(sample.Options, outline.config.sampling, {})
        mi.check_decoder(options.weights, outline.config)
    defaults = asdict(mi.settle(Options, outline.config.training, {})) | {"processes": 1}
    with Workers(options) as workers, RunFolder(options.out, workers.first) as run:
        samples, held_out = prepare_data(data, options, outline.config, workers)
        run.begin(identity(data, options, samples, workers), defaults, FREE)
        dit = load_model(options, samples)
        trainer = Trainer(options, dit, samples, held_out, run, workers)
        start = trainer.resume()
        shown, bar = {}, workers.progress(start, options.steps)
        for step in bar:
            shown = in_short(trainer.step(step), shown)
            bar.set_postfix(shown, refresh=False)
    print(f"{run.adapter}: peak memory {mi.peak_memory(options.device):.2f} GB")
    return run.adapter


# ------------------------------------------------------------------------------------------------
# Check: what the dataclass cannot
# ------------------------------------------------------------------------------------------------


def complete(options, depth):
    """Fill in what follows from other options, in place. Raises InputError."""
    twentieth = max(options.steps // 20, 1)
    if options.warmup is None:
        options.warmup = twentieth
    if options.half_life is None:
        options.half_life = twentieth
    if options.offload and options.shard:
        raise mi.InputError("--offload and --shard do not go together")
    if not all(0 <= sigma <= 1 for sigma in options.eval_sigmas):
        raise mi.InputError(f"--eval-sigmas must be from 0 to 1, not {options.eval_sigmas}")
    if options.min_size and len(options.min_size) != 2:
        raise mi.InputError("--min-size takes two numbers, such as 240 426")
    options.layers = pick_layers(options.layers, depth, options.weights, options.top)
    options.top = None  # the layers have it


def check_init(options, outline):
    """--init's tensors do not tell of window, alpha or layers, so its file has to agree."""
    mi.load_adapter(outline, options.init, options.layers)
    wanted = replace(options, alpha=options.rank if options.alpha is None else options.alpha)
    for name in ("layers", "rank", "alpha", "heads", "window", "adapter"):
        found, value = getattr(outline.adapter, name), getattr(wanted, name)
        if found != value:
            reason = f"is an adapter of {name} {found}, not {value}"
            raise mi.InputError(f"{options.init} {reason}; name --{name} as it has it")


def pick_layers(choice, depth, weights, top=None):
    """The blocks that music follows: numbers, a name, a ranking's file; None: the weights' own."""
    if top is not None and top > depth:
        raise mi.InputError(f"--top must be from 1 to {depth}, not {top}")
    if choice is None:
        choice = default_layers(depth, weights)
    if choice in ("even", "first", "middle", "last"):
        return mi.choose_layers(choice, depth, top)
    if isinstance(choice, str) and choice.endswith(".json"):
        return sorted(read_ranking(choice, depth)[: top or mi.third_of(depth)])
    if top is not None:
        raise mi.InputError("--top goes with a ranking, even, first, middle or last")
    if choice == "all":
        return list(range(depth))
    if isinstance(choice, str):
        choice = numbers_in(choice)
    mi.check_layers(list(choice), depth)
    return sorted(choice)


def numbers_in(text):
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        names = "numbers such as 0,3,6, a ranking's file, even, first, middle, last or all"
        raise mi.InputError(f"--layers {text}: give {names}")
    return [int(number) for number in text.split(",")]


def default_layers(depth, weights):
    """A ranking beside the weights, else the authors' sixteen for Mochi."""
    ranking = os.path.join(weights, "adaptability.json")
    if os.path.exists(ranking):
        return ranking
    if depth == mi.MODELS["mochi"]["depth"]:
        return mi.MUSICINFUSER_LAYERS
    raise mi.InputError(f"there is no {ranking}; name --layers, such as all or 0,3,6")


def read_ranking(path, depth):
    """The layers, best first, of a file of adaptability.py. Raises InputError for any other."""
    if not os.path.isfile(path):
        raise mi.InputError(f"no such file: {path}")
    try:
        with open(path, encoding="utf-8") as file:
            ranking = json.load(file)["ranking"]
        if sorted(ranking) != list(range(depth)):
            raise ValueError(f"it does not rank the layers 0 to {depth - 1}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise mi.InputError(f"{path} is not a ranking of this model's layers ({error})") from error
    return ranking


# ------------------------------------------------------------------------------------------------
# Prepare: the processes, the data, the model
# ------------------------------------------------------------------------------------------------


class Workers:
    """The processes that torchrun started, or this one alone."""

    def __init__(self, options):
        self.rank, self.count = mi.join_processes(options)
        self.first = self.rank == 0
        if options.shard and self.count == 1:
            raise mi.InputError("--shard is for several processes of torchrun; one takes --offload")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.count > 1 and kind is None:  # else torchrun ends the others
            dist.barrier()

    def once(self, function, *arguments):
        """The result of a function that the first process calls for all."""
        result = [function(*arguments) if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def begin_alike(self, parameters):
        if self.count > 1:
            for p in parameters:
                dist.broadcast(p.data, 0)

    def average_gradients(self, parameters):
        """Where a parameter has no gradient, it has none in any process: silence is drawn alike."""
        for p in parameters:
            if self.count > 1 and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.count

    def all_of(self, values):
        """A list, and then those of the other processes."""
        found = [values] * self.count
        if self.count > 1:
            dist.all_gather_object(found, values)
        return [value for values in found for value in values]

    def progress(self, start, steps):
        hidden = not self.first
        return tqdm(range(start, steps), "training", steps, initial=start, disable=hidden)


def prepare_data(data, options, config, workers):
    """Samples to train on, and the clips held out; one process computes what is computed once."""
    mi.print_options(options)
    folder = os.path.join(data, ".musicinfuser")
    clips, held_out, texts = workers.once(preprocess, data, folder, options, config)
    if not clips:
        where = f"no AIST video of cameras c01 and c10 to train on below {data}"
        raise mi.InputError(f"{where}, and no --wild video")
    return Samples(folder, clips, texts, config, options), held_out


def identity(data, options, samples, workers):
    """What a run is, by content where it is a file; kept in its config.json."""
    config = {"data": data} | asdict(options) | {"processes": workers.count}
    if options.init:
        config["init"] = content(options.init)
    config["model"] = content(os.path.join(options.weights, "dit.safetensors"))
    config["clips"] = f"{len(samples.clips)} clips, {samples.digest()[:16]}"
    return config


def content(path):
    """A digest of a model, but for what it prefers in sampling and training: options and clips have
    what counts of that. Raises InputError."""
    header, metadata, begin = mi.read_header(path)
    config = json.loads(metadata.pop("config", "{}"))
    config = {name: config[name] for name in config if name not in ("sampling", "training")}
    return mi.digest([header, metadata, config, mi.model_digest(path, begin)])[:16]


def preprocess(data, folder, options, config):
    training, test = find_videos(data, options.wild), find_videos(data, split="test")
    video = mi.settle(mi.SamplingOptions, config.sampling, {})
    shape, dtype = (video.size, video.frames, config.fps), mi.DTYPES[options.dtype]
    where = options.device, dtype, options.min_size
    preprocessor = Preprocessor(folder, options.weights, *shape, *where)
    clips, held_out = preprocessor.clips(training), preprocessor.clips(test)
    texts = preprocessor.texts_of(clips) if clips else {}
    return clips, held_out, texts


def load_model(options, samples):
    """The frozen transformer with a fresh adapter, or that of --init, to train."""
    path, dtype = os.path.join(options.weights, "dit.safetensors"), mi.DTYPES[options.dtype]
    dit = mi.load_dit(path, options.device, dtype, options.offload, options.shard)
    adapter = {f.name: getattr(options, f.name) for f in fields(mi.AdapterOptions)}
    example = samples.batch([0], 0)
    torch.manual_seed(options.seed)
    mi.infuse(dit, **adapter, audio_width=example.conditions["audio"].shape[-1])
    if options.init:
        copy_adapter(dit, options.init)
    if options.shard:
        mi.shard_blocks(dit, options.device, dtype)
    if options.compile:
        mi.compile_blocks(dit)
    if checkpoints(options, dit, example):
        mi.checkpoint_layers(dit)
    return dit


def copy_adapter(dit, path):
    tensors, _ = mi.read_safetensors(path)
    parameters = mi.adapter_parameters(dit)
    shapes = {name: p.shape for name, p in parameters.items()}
    mi.check_names(path, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    for name, p in parameters.items():
        p.data.copy_(tensors[name])


def activations(options, dit, example):
    """Bytes, about, that the backward pass through one block needs."""
    _, _, t, h, w = example.z.shape
    tokens = options.batch * t * h * w // dit.patch**2
    return 40 * tokens * dit.width * mi.DTYPES[options.dtype].itemsize


def checkpoints(options, dit, example):
    """Checkpointing costs a third of the speed, so not where it would save little."""
    if options.offload or options.shard:
        return True
    return len(dit.blocks) * activations(options, dit, example) > 2e9


def memory(options, dit, example, processes=1):
    """Bytes, about, that training takes on its device."""
    depth, block = len(dit.blocks), activations(options, dit, example)
    frozen = sum(p.numel() for p in dit.parameters() if not p.requires_grad)
    in_blocks = sum(p.numel() for p in dit.blocks.parameters() if not p.requires_grad)
    if options.offload:  # a block at a time, or the next one too
        there = 1 if options.device == "cpu" else 2
        frozen -= in_blocks * (depth - there) // depth
    if options.shard:
        frozen -= in_blocks * (processes - 1) // processes
    trained = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    kept = depth * block
    if checkpoints(options, dit, example):
        kept = block + depth * block / 40  # one, and the inputs of all
    if options.offload and options.device != "cpu":
        kept = block  # the inputs wait in host memory
    # A trained number is float32, and so are its gradient and its two moments
    return frozen * mi.DTYPES[options.dtype].itemsize + 16 * trained + kept


# ------------------------------------------------------------------------------------------------
# Step
# ------------------------------------------------------------------------------------------------


class Trainer:
    def __init__(self, options, dit, samples, held_out_clips, run, workers):
        self.options, self.dit, self.samples = options, dit, samples
        self.run, self.workers = run, workers
        self.held_out_clips = held_out_clips
        self.held_out = samples.held_out(held_out_clips, options.eval_clips)
        self.parameters = list(mi.adapter_parameters(dit).values())
        self.optimiser = torch.optim.AdamW(self.parameters, options.lr, weight_decay=0.0)

    def resume(self):
        """The step to go on from: that of the last save, or 0."""
        start = self.run.load(self.dit, self.optimiser)
        if start > self.options.steps:
            raise mi.InputError(f"{self.run.state} says step {start}; delete {self.run.folder}")
        self.workers.begin_alike(self.parameters)
        self.report(start)
        if start == self.options.steps and self.workers.first:
            mi.save_adapter(self.dit, self.run.adapter)  # which may be gone, or damaged
        return start

    def report(self, start):
        clips, fps = self.samples.clips, self.dit.config.fps
        example = self.samples.batch([0], 0)
        _, _, t, h, w = example.z.shape
        frames = 6 * (t - 1) + 1
        songs = len({clip.video.song for clip in clips})
        trained = sum(p.numel() for p in self.parameters)
        size = memory(self.options, self.dit, example, self.workers.count) / 1e9
        print(f"video    {8 * h}x{8 * w}, {frames} frames at {fps} fps")
        hours = len(clips) * frames / fps / 3600
        print(f"data     {len(clips)} clips, {hours:.2f} hours, {songs} songs; ", end="")
        print(f"{len(self.held_out_clips)} clips of test songs held out")
        print(f"layers   {self.options.layers}, {trained:,} parameters to train; ", end="")
        print(f"about {size:.1f} GB in all")
        if start:
            print(f"going on from step {start}")

    def step(self, step):
        """The line of the log. All processes take the same steps, as --shard needs; the first
        keeps what comes of it."""
        began = time.time()
        losses = self.gradients(step)
        line = {"step": step, "loss": mean(loss for _, loss in losses)}
        line |= self.update(step) | by_noise(losses) | {"seconds": time.time() - began}
        if self.held_out and self.is_due(step, self.options.eval_every):
            line |= self.evaluate()
        line["memory_gb"] = mi.peak_memory(self.options.device)
        if self.workers.first:
            self.run.log(line)
        if self.workers.first and self.is_due(step, self.options.save_every):
            self.run.save(self.dit, self.optimiser, step + 1)
        every = self.options.sample_every
        if every and (step + 1) % every == 0 and self.held_out_clips:
            self.film(self.held_out_clips[0], self.run.path(f"step-{step + 1}.mp4"))
        return line

    def is_due(self, step, every):
        return (step + 1) % every == 0 or step + 1 == self.options.steps

    def gradients(self, step):
        """The gradient of a step in the parameters' .grad; returns [(sigma, loss)]."""
        losses = []
        for micro in range(self.options.accumulate):
            batch = self.batch(step, micro)
            noised = batch.z, batch.sigma, batch.eps
            loss = mi.flow_matching_loss(self.dit, *noised, **batch.conditions)
            self.run.check_finite(loss, f"the loss at step {step}, on {'; '.join(batch.names)}")
            if loss.requires_grad:  # else it is silent, and there is no LoRA
                (loss.mean() / self.options.accumulate).backward()
            losses += zip(batch.sigma.tolist(), loss.tolist(), strict=True)
        self.workers.average_gradients(self.parameters)
        return self.workers.all_of(losses)

    def batch(self, step, micro):
        """This process's share of a step; the same samples as one process would take in turn."""
        size, workers = self.options.batch, self.workers
        part = (step * self.options.accumulate + micro) * workers.count + workers.rank
        batch = self.samples.batch(range(part * size, (part + 1) * size), step)
        # Drawn alike in all processes, or one would wait for the gradients of another
        rng = random.Random(f"{self.options.seed} silent {step * self.options.accumulate + micro}")
        if rng.random() < self.options.audio_dropout:
            del batch.conditions["audio"]
        return batch.to(self.options.device)

    def update(self, step):
        lr = learning_rate(step, self.options.steps, self.options.lr, self.options.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.run.check_finite(norm, f"the gradient at step {step}")
        self.optimiser.step()
        self.optimiser.zero_grad()
        return {"lr": lr, "grad_norm": norm.item()}

    def evaluate(self):
        """Does it listen? Losses on held-out clips, and what they cost."""
        began, o = time.time(), self.options
        right, wrong = (batch.to(o.device) for batch in self.held_out)
        losses = listening_gap(self.dit, right, wrong, o.eval_sigmas, o.batch)
        return losses | {"eval_seconds": time.time() - began}

    def film(self, clip, path):
        """A video of the plain prompt, to a held-out clip's music."""
        dit, o = self.dit, self.options
        how = mi.settle(sample.Options, dit.config.sampling, {})
        noise = mi.noise_for(0, dit.config, how.frames, how.size).to(o.device)
        given = self.samples.conditions(clip, PLAIN)
        given = {name: tensor[None].to(o.device) for name, tensor in given.items()}
        text = given["y_feat"], given["y_mask"]
        null = given["y_feat"], torch.zeros_like(given["y_mask"])
        file = os.path.join(o.weights, "decoder.safetensors")
        decoder = mi.load_decoder(file, o.device, mi.DTYPES[o.dtype])
        with lora_scaled(dit, how.lora_scale):
            (video,) = mi.noise_to_video(dit, decoder, noise, text, null, given["audio"], how)
        fps = dit.config.fps
        if self.workers.first:
            mi.save_video(path, video, fps, clip.video.path, clip.start / fps)


@contextmanager
def lora_scaled(dit, scale):
    """Within it LoRA counts so many times what it counts in training."""
    loras = [module for module in dit.modules() if isinstance(module, mi.LoRALinear)]
    alphas = [lora.alpha for lora in loras]
    try:
        for lora in loras:
            lora.alpha *= scale
        yield
    finally:
        for lora, alpha in zip(loras, alphas, strict=True):
            lora.alpha = alpha


def learning_rate(step, steps, peak, warmup):
    """Linear from 0, then a cosine to 0 (the authors' schedule)."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def by_noise(losses):
    """{loss_0.0, loss_0.25, ...}: the mean loss of each quarter of the noise levels."""
    bins = {}
    for sigma, loss in losses:
        low = min(int(4 * sigma), 3) / 4
        bins.setdefault(f"loss_{low}", []).append(loss)
    return {name: mean(values) for name, values in sorted(bins.items())}


def in_short(line, before):
    """For the progress bar: the loss, smoothed, and the gaps, wrong song less right, last seen."""
    shown = before | {"loss": line["loss"]}
    if before:
        shown["loss"] = 0.95 * before["loss"] + 0.05 * line["loss"]
    for name, right in line.items():
        if name.startswith("right_"):
            sigma = name.removeprefix("right_")
            shown[f"gap_{sigma}"] = line[f"wrong_{sigma}"] - right
    return shown


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@torch.no_grad()
def listening_gap(dit, right, wrong, sigmas, at_once=1):
    """{right_0.75, wrong_0.75, ...}: losses with the clips' own songs and with others'.

    right, wrong: of Samples.held_out, the same but for the music.
    """
    losses = {}
    for sigma in sigmas:
        losses[f"right_{sigma}"] = mean_loss(dit, right, sigma, at_once)
        losses[f"wrong_{sigma}"] = mean_loss(dit, wrong, sigma, at_once)
    return losses


def mean_loss(dit, batch, sigma, at_once):
    batch = replace(batch, sigma=torch.full_like(batch.sigma, sigma))
    losses = []
    for i in range(0, len(batch.z), at_once):
        rows = batch.rows(slice(i, i + at_once))
        losses.append(mi.flow_matching_loss(dit, rows.z, rows.sigma, rows.eps, **rows.conditions))
    return torch.cat(losses).mean().item()


def main():
    parser = mi.parser_for(Options, "Train a MusicInfuser adapter on a folder of dance videos.")
    parser.add_argument("--data", required=True, help="folder of AIST's videos; the cache is in it")
    splits = {"choices": ("train", "test"), "default": "train"}
    parser.add_argument("--split", **splits, help="test: list what is held out, and stop")
    given = vars(parser.parse_args())
    data, split = given.pop("data"), given.pop("split")
    if split == "train":
        train(data, **given)
        return
    for video in find_videos(data, split="test"):
        print(video.path)


if __name__ == "__main__":
    mi.main(main)
