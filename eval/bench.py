"""Speed and memory, beside diffusers where it is installed:   python -m eval.bench [dit train ...]

Prints tables in markdown, each row as soon as it is measured (on Linux). All weights but those of
tiny/ are random, of Mochi's sizes. Nearly every row is measured in a process of its own, so that
its peak memory is its own: the GPU's where it runs there, else what the process itself takes. What
is compared by time within a row takes turns (matrices, ours, diffusers, matrices, ...), and medians
are shown, as machines are noisy; the VAE runs once.

MFU, model FLOPs utilisation: FLOPs of the model's matrices and attention / seconds / the FLOPs a
second at which the four visual matrices of a block alone pass as many tokens, in the same process.
A step of sampling is two forward passes, with text and without. A step of training counts as two:
the second stands for the gradient of the activations, as most weights are frozen; what
checkpointing computes again does not count.

Top to bottom:   sizes | measuring | models and inputs | the measurements | the tables | printing
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import torch
import torch.nn.functional as F
from tqdm import tqdm

import musicinfuser as mi
from eval.solvers import evaluations

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WHY = "why"  # a row is missing

FULL = SimpleNamespace(
    model=mi.MODELS["mochi"],
    text=30,  # tokens of a prompt
    latents=(60, 106),  # of 480x848: 1,590 tokens a latent frame
    forward_frames=(1, 2, 4),  # latent ones, of a forward pass on a CPU
    vae={},  # Mochi's own
    diffusers_vae={},
    vae_latents=(30, 53),  # of 240x424
    decoded=(7, 19, 43),  # frames
    encoded=25,
    load_depth=5,  # blocks: 4.4 GB in float32
    batch=14,  # of a training step of the model in tiny/
    gpu_frames=(73, 145),
    repeats=5,
)
QUICK = SimpleNamespace(
    model=dict(depth=2, width=96, text_width=96, heads=2, t5_width=32),  # as wide in diffusers
    text=5,
    latents=(4, 6),
    forward_frames=(1,),
    vae=dict(channels=(32,) * 4, blocks=(1,) * 5),
    diffusers_vae=dict(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ),
    vae_latents=(2, 4),
    decoded=(7,),
    encoded=7,
    load_depth=2,
    batch=2,
    gpu_frames=(7,),
    repeats=1,
)


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def now():
    """Seconds, when all that was begun is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, *arguments):
    began = now()
    function(*arguments)
    return now() - began


def medians(repeats, **functions):
    """{name: median seconds}: they take turns, of which the first is not counted."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


class Matrices:
    """The visual matrices of a block and nothing else: the rate that a machine can reach."""

    def __init__(self, dit, tokens):
        block, device = dit.blocks[0], dit.pos_frequencies.device
        linears = block.attn.qkv_x, block.attn.proj_x, block.mlp_x.w1, block.mlp_x.w2
        self.weights = [linear.weight.detach().to(device) for linear in linears]
        dtype = self.weights[0].dtype
        widths = {weight.shape[1] for weight in self.weights}
        self.tokens = {n: torch.randn(tokens, n, device=device).to(dtype) for n in widths}
        self.flops = 2 * tokens * sum(weight.numel() for weight in self.weights)

    def __call__(self):
        for weight in self.weights:
            F.linear(self.tokens[weight.shape[1]], weight)


def flops(dit, tokens, text, frames=0):
    """Of a forward pass with so many visual and text tokens.

    Two for a weight and a token that meet, four for a channel of two tokens that do. frames: latent
    ones of music, 0 for none.
    """
    layers = dit.adapter.layers if frames else []
    attention = len(dit.blocks) * (tokens + text) ** 2 + len(layers) * tokens * frames
    matrices = 0
    for name, p in dit.named_parameters():
        if p.ndim > 1 and "lora_" not in name and name != "pos_frequencies":
            matrices += p.numel() * tokens_through(name, tokens, text, frames)
    return 4 * attention * dit.width + 2 * matrices


def tokens_through(name, tokens, text, frames):
    """How many tokens pass the matrix of that name."""
    if re.match(r"audio_projection|audio.*to_[kv]\.", name):
        return frames
    if name.startswith("audio_cross"):
        return tokens if frames else 0
    if ".mod" in name or "t_embedder" in name:
        return 1
    if "_y" in name or "t5" in name:
        return text
    return tokens


# ------------------------------------------------------------------------------------------------
# Random models and inputs, ours and diffusers'
# ------------------------------------------------------------------------------------------------


def random_dit(size, depth, dtype="float32", device="cpu", offload=False):
    """As load_dit gives it, with every term at work."""
    with torch.device("meta"):
        dit = mi.DiT(**size.model | {"depth": depth})
    for name, p in list(dit.named_parameters()):
        weight = random_weight(name, p.shape, dtype, device)
        if offload and name.startswith("blocks."):
            weight = weight.cpu()
        owner, _, leaf = name.rpartition(".")
        setattr(dit.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    if offload:
        mi.Offload(dit, torch.device(device), mi.DTYPES[dtype])
    return dit


def random_weight(name, shape, dtype, device):
    weight = torch.randn(shape, device=device)
    if "norm" in name:
        return 1 + 0.1 * weight
    if name == "pos_frequencies":
        return weight
    deviation = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
    return (deviation * weight).to(mi.DTYPES[dtype])


def infused(dit, dtype="float32"):
    """With the paper's adapter."""
    layers = [layer for layer in mi.MUSICINFUSER_LAYERS if layer < len(dit.blocks)]
    mi.infuse(dit, layers or [0])
    for p in mi.adapter_parameters(dit).values():
        p.data = p.data.to(mi.DTYPES[dtype])
    return dit


def random_inputs(dit, frames, latents, text, batch=1):
    """x, sigma, y_feat, y_mask, audio at random. frames: latent ones; latents: (height, width)."""
    device, t5_width = dit.pos_frequencies.device, dit.t5_yproj.in_features
    x = torch.randn(batch, len(dit.config.mean), frames, *latents, device=device)
    sigma = torch.full((batch,), 0.7, device=device)
    y_feat = torch.randn(batch, text, t5_width, device=device)
    y_mask = torch.ones(batch, text, dtype=torch.bool, device=device)
    audio = None
    if dit.adapter:
        tokens = round(50 * mi.audio_seconds(6 * frames - 5, dit.config.fps))
        audio_width = dit.audio_projection.projection[0].in_features
        audio = torch.randn(1, tokens, audio_width, device=device)
    return x, sigma, y_feat, y_mask, audio


def diffusers_dit(ours, dtype):
    """diffusers' transformer with the same weights, most of them in the same memory."""
    from diffusers import MochiTransformer3DModel

    with torch.device("meta"):
        theirs = MochiTransformer3DModel(
            num_layers=len(ours.blocks),
            num_attention_heads=ours.pos_frequencies.shape[1],
            attention_head_dim=2 * ours.pos_frequencies.shape[2],
            pooled_projection_dim=ours.t5_yproj.out_features,
            text_embed_dim=ours.t5_yproj.in_features,
        )
    state = {}
    for name, weight in diffusers_state(ours):
        # In bfloat16 rotations would be by other angles, and the outputs could not be compared
        keep = name == "pos_frequencies"
        state[name] = weight if keep else weight.to(mi.DTYPES[dtype])
    theirs.load_state_dict(state, assign=True)
    return theirs.requires_grad_(False)


def diffusers_state(ours):
    """Yield diffusers' (name, tensor); the last block's has a modulation of another name."""
    from test_musicinfuser import to_diffusers  # here, because pytest comes with it

    last = f"transformer_blocks.{len(ours.blocks) - 1}.norm1_context.linear"
    for name, weight in to_diffusers(ours.state_dict()):
        name = name.replace("norm1_context.linear_1.", "norm1_context.linear.")
        yield name.replace(f"{last}.", f"{last}_1."), weight


def random_vae(size, by, what):
    """(the module, what to call) of what="encode" or "decode", ours or diffusers'."""
    if by == "ours":
        kind = {"encode": mi.Encoder, "decode": mi.Decoder}[what]
        model = kind(**size.vae)
        return model, model
    from diffusers import AutoencoderKLMochi

    model = AutoencoderKLMochi(**size.diffusers_vae)
    other = {"encode": "decoder", "decode": "encoder"}[what]
    setattr(model, other, None)  # its memory does not belong to this
    if by == "diffusers, tiled":
        model.enable_tiling()
    return model, getattr(model, what)


# ------------------------------------------------------------------------------------------------
# The measurements: generators of {column: cell}, each run in another process by rows_of
# ------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """Whose code runs, and how."""

    by: str = "ours"  # or "ours, with music", "diffusers", "diffusers, tiled"
    dtype: str = "float32"
    device: str = "cpu"
    offload: bool = False
    compile: bool = False
    processes: int = 1  # that share a video, or the frozen blocks in training
    split: str = "tokens"  # what they share of a video; or "branches"


@torch.inference_mode()
def forward(size, dtype):
    """A row for each number of frames: ours and diffusers' in turns, and how far they are apart."""
    ours = random_dit(size, 2, dtype)
    theirs = diffusers_dit(ours, dtype) if find_spec("diffusers") else None
    for frames in size.forward_frames:
        inputs = random_inputs(ours, frames, size.latents, size.text)[:4]
        tokens = inputs[0][0, 0].numel() // 4
        matrices = Matrices(ours, tokens)
        functions = {"matrices": matrices, "ours": partial(ours, *inputs)}
        if theirs:
            functions["theirs"] = partial(run_diffusers, theirs, dtype, *inputs)
        seconds = medians(size.repeats, **functions)
        rate = matrices.flops / seconds["matrices"]
        ideal = flops(ours, tokens, size.text) / rate  # seconds
        row = {"tokens": f"{tokens:,}", "matrices, TFLOP/s": rate / 1e12}
        row |= {"ours, s": seconds["ours"], "MFU": ideal / seconds["ours"]}
        row["diffusers, s"] = "diffusers is not installed"
        if theirs:
            row["diffusers, s"] = seconds["theirs"]
            row["ours / diffusers"] = seconds["ours"] / seconds["theirs"]
            row["of diffusers"] = ideal / seconds["theirs"]
            outputs = functions["ours"](), functions["theirs"]()
            row["max difference / deviation"] = difference(*outputs, dtype)
        yield row


def run_diffusers(dit, dtype, x, sigma, y_feat, y_mask):
    x, y_feat = x.to(mi.DTYPES[dtype]), y_feat.to(mi.DTYPES[dtype])
    return dit(x, y_feat, 1000 * (1 - sigma), y_mask, return_dict=False)[0].float()


def difference(ours, theirs, dtype):
    apart = ((ours - theirs).abs().max() / ours.std()).item()
    allowed = {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    return f"{apart:.1e}" if apart < allowed else f"**they differ:** {apart:.1e}"


@torch.inference_mode()
def sample_step(size, depth, frames, **way):
    """A step of sampling with guidance by text."""
    way = Way(**way)
    dit = random_dit(size, depth, way.dtype, way.device, way.offload)
    if way.by == "ours, with music":
        infused(dit, way.dtype)
    if way.compile:
        mi.compile_blocks(dit)
    if way.processes > 1:
        {"tokens": mi.TokenParallel, "branches": mi.BranchParallel}[way.split](dit)
    inputs = random_inputs(dit, mi.latent_frames(frames), size.latents, size.text)
    if way.by == "diffusers":
        step = diffusers_step(dit, way, *inputs)
    else:
        step = guided_step(dit, *inputs)
    yield cost(size, dit, inputs[0], (size.text, 0), step, way)


def train_step(size, depth, frames, **way):
    """A step of AdamW on the adapter, with checkpointing; its exchange of gradients is small."""
    way = Way(**way)
    dit = infused(random_dit(size, depth, way.dtype, way.device, way.offload))
    if way.processes > 1:
        mi.shard_blocks(dit, way.device, mi.DTYPES[way.dtype])
    if way.compile:
        mi.compile_blocks(dit)
    mi.checkpoint_layers(dit)
    inputs = random_inputs(dit, mi.latent_frames(frames), size.latents, size.text)
    yield cost(size, dit, inputs[0], (size.text, size.text), adamw_step(dit, *inputs), way)


def guided_step(dit, x, sigma, y_feat, y_mask, audio, **guidance):
    """A function that evaluates the guided velocity."""
    text, null = (y_feat, y_mask), (y_feat, torch.zeros_like(y_mask))
    guidance = mi.Guidance(**guidance)
    velocity = mi.guided_velocity(dit, x.shape, text, null, audio, guidance)
    return partial(velocity, x, sigma)


def diffusers_step(dit, way, x, sigma, y_feat, y_mask, audio):
    theirs = diffusers_dit(dit, way.dtype)
    dit.blocks[1:].to("meta")  # what is not shared would count as theirs
    if way.compile:
        for block in theirs.transformer_blocks:
            block.compile(dynamic=True)

    def step():
        for mask in (y_mask, torch.zeros_like(y_mask)):
            run_diffusers(theirs, way.dtype, x, sigma, y_feat, mask)

    return step


def adamw_step(dit, z, sigma, y_feat, y_mask, audio):
    """A function that takes a step of AdamW on a float32 adapter."""
    parameters = [p.requires_grad_() for p in mi.adapter_parameters(dit).values()]
    for p in parameters:
        p.data = p.data.float()
    optimiser = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0)
    eps = torch.randn_like(z)

    def step():
        loss = mi.flow_matching_loss(dit, z, sigma, eps, y_feat, y_mask, audio)
        loss.mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def cost(size, dit, x, texts, step, way):
    """The cells of a step that passes the model once for each number of text tokens."""
    if way.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # making the weights does not count
    seconds = medians(size.repeats, step=step)["step"]
    cells = {"s": seconds, "peak, GB": mi.peak_memory(way.device)}
    if way.processes == 1:
        tokens, frames = x[0, 0].numel() // 4, x.shape[2] if dit.adapter else 0
        work = sum(flops(dit, tokens, text, frames) for text in texts)
        matrices = Matrices(dit, tokens)
        rate = matrices.flops / medians(size.repeats, alone=matrices)["alone"]
        cells["MFU"] = work / seconds / rate
    return cells


@torch.inference_mode()
def vae(size, what, frames, latents, **way):
    """So many random frames, once, after one frame to warm up."""
    way = Way(**way)
    dtype = mi.DTYPES[way.dtype]
    model, run = random_vae(size, way.by, what)
    for name, p in model.requires_grad_(False).named_parameters():
        ours = way.by == "ours"
        p.data = p.to(way.device, mi.dtype_in(model, name, dtype) if ours else dtype)
    height, width = latents
    if what == "decode":
        shape = (1, 12, mi.latent_frames(frames), height, width)
    else:
        shape = (1, 3, frames, 8 * height, 8 * width)
    x = (2 * torch.rand(shape) - 1).to(way.device, dtype)
    run(x[:, :, :1])
    seconds = timed(run, x)
    yield {"s": seconds, "peak, GB": mi.peak_memory(way.device)}


def make_checkpoint(size, path):
    """No row: the file that `load` loads."""
    mi.save_dit(random_dit(size, size.load_depth), path, torch.float32)
    yield from ()


def load(size, path, dtype):
    """The file was just written, so it may come from the page cache."""
    before, began = mi.peak_memory("cpu"), now()
    dit = mi.load_dit(path, dtype=mi.DTYPES[dtype])
    loaded = now() - began
    for p in dit.parameters():  # what stayed in its file is read only now
        p.sum()
    read = now() - began
    model = sum(p.nbytes for p in dit.parameters()) / 1e9
    peak = mi.peak_memory("cpu") - before
    yield {
        "load, s": loaded,
        "load and read all, s": read,
        "model, GB": model,
        "peak, GB": peak,
        "peak / model": peak / model,
    }


def tiny(size, weights, dtype):
    """A weights folder's own sizes: a step of sampling, a video by every solver, training."""
    path, kind = os.path.join(weights, "{}.safetensors"), mi.DTYPES[dtype]
    dit = mi.load_dit(path.format("dit"), dtype=kind)
    mi.load_adapter(dit, path.format("musicinfuser"))
    decoder = mi.load_decoder(path.format("decoder"), dtype=kind)
    o = mi.settle(mi.SamplingOptions, dit.config.sampling, {})
    shape = mi.latent_frames(o.frames), (o.size[0] // 8, o.size[1] // 8), size.text
    inputs = random_inputs(dit, *shape)
    with torch.inference_mode():
        step = guided_step(dit, *inputs, cfg=o.cfg, music_cfg=o.music_cfg)
        seconds = medians(size.repeats, step=step)["step"]
    yield {"what": "a step of sampling", "s": seconds}
    for name in mi.SOLVERS:
        cells = {"what": f"a video, {name}", "evaluations": evaluations(name, o.steps)}
        yield cells | {"s": timed(video, dit, decoder, inputs, replace(o, solver=name))}
    step = adamw_step(dit, *random_inputs(dit, *shape, size.batch))
    what = f"a step of training, {size.batch} videos"
    yield {"what": what, "s": medians(size.repeats, step=step)["step"]}


def video(dit, decoder, inputs, options):
    noise, _, y_feat, y_mask, audio = inputs
    text, null = (y_feat, y_mask), (y_feat, torch.zeros_like(y_mask))
    list(mi.noise_to_video(dit, decoder, noise, text, null, audio, options))


FUNCTIONS = forward, sample_step, train_step, vae, make_checkpoint, load, tiny
MEASUREMENTS = {function.__name__: function for function in FUNCTIONS}


# ------------------------------------------------------------------------------------------------
# The tables: a title, the columns, and what is run for their rows
# ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One call of a measurement, and the first cells of its rows."""

    cells: dict
    measurement: Callable
    arguments: tuple
    way: dict = field(default_factory=dict)


def dit_table(size, paths):
    title = f"DiT forward, two blocks, {size.text} text tokens, median of {size.repeats}"
    columns = "dtype", "tokens", "matrices, TFLOP/s", "ours, s", "diffusers, s", "ours / diffusers"
    columns += "MFU", "of diffusers", "max difference / deviation"
    return title, columns, [Run({"dtype": dtype}, forward, (dtype,)) for dtype in mi.DTYPES]


def train_table(size, paths):
    title = f"Training step, two blocks, one latent frame, {size.text} text tokens, checkpointing"
    columns = "dtype", "s", "MFU", "peak, GB"
    ways = [{"dtype": dtype} for dtype in mi.DTYPES]
    return title, columns, [Run(way, train_step, (2, 1), way) for way in ways]


def vae_table(size, paths):
    height, width = (8 * n for n in size.vae_latents)
    columns = "what", "frames", "by", "s", "ours / diffusers", "peak, GB"
    runs = []
    for what, frames in [("decode", n) for n in size.decoded] + [("encode", size.encoded)]:
        for by in ("ours", "diffusers"):
            cells = {"what": what, "frames": frames, "by": by}
            runs.append(Run(cells, vae, (what, frames, size.vae_latents), {"by": by}))
    return f"VAE, float32, {height}x{width}", columns, runs


def load_table(size, paths):
    title = f"Loading a float32 checkpoint of {size.load_depth} blocks"
    columns = "dtype", "load, s", "load and read all, s", "model, GB", "peak, GB", "peak / model"
    runs = [Run({}, make_checkpoint, (paths.checkpoint,))]
    runs += [Run({"dtype": dtype}, load, (paths.checkpoint, dtype)) for dtype in mi.DTYPES]
    return title, columns, runs


def tiny_table(size, paths):
    title = f"The model in {os.path.basename(paths.weights)}/, at its own size and steps"
    runs = [Run({"dtype": dtype}, tiny, (paths.weights, dtype)) for dtype in mi.DTYPES]
    return title, ("dtype", "what", "evaluations", "s"), runs


def processes_table(size, paths):
    title = "Several processes on this machine, two blocks, two latent frames, float32"
    runs = [step_run(sample_step, 2, 7)]
    runs += [step_run(sample_step, 2, 7, processes=2, split=s) for s in ("tokens", "branches")]
    runs += [step_run(train_step, 2, 7, processes=processes) for processes in (1, 2)]
    return title, ("what", "frames", "processes", "s", "peak, GB"), runs


GPU = {"dtype": "bfloat16", "device": "cuda"}


def gpu_table(size, paths):
    depth, first = size.model["depth"], size.gpu_frames[0]
    title = f"Mochi of {depth} blocks on a GPU, bfloat16, 480x848: a step, or decoding a video"
    columns = "what", "frames", "by", "blocks", "compiled", "processes", "s", "ours / diffusers"
    runs = []
    for frames in size.gpu_frames:
        for compiled in (False, True):
            for by in ("ours", "diffusers", "ours, with music"):
                way = GPU | {"by": by, "compile": compiled}
                runs.append(step_run(sample_step, depth, frames, **way))
            runs.append(step_run(sample_step, depth, frames, offload=True, **way))
    for offload in (False, True):
        for compiled in (False, True):
            way = GPU | {"offload": offload, "compile": compiled}
            runs.append(step_run(train_step, depth, first, **way))
    for step in (sample_step, train_step):
        for processes in (2, 4, 8):
            runs.append(step_run(step, depth, first, processes=processes, **GPU))
    runs.append(step_run(sample_step, depth, first, processes=2, split="branches", **GPU))
    for frames in size.gpu_frames:
        for by in ("ours", "diffusers", "diffusers, tiled"):
            cells = {"what": "decode", "frames": frames, "by": by}
            runs.append(Run(cells, vae, ("decode", frames, size.latents), GPU | {"by": by}))
    return title, (*columns, "MFU", "peak, GB"), runs


def step_run(measurement, depth, frames, **way):
    shown = Way(**way)
    cells = {"what": measurement.__name__.replace("_", " "), "frames": frames, "by": shown.by}
    cells["blocks"] = ("resident", "offloaded")[shown.offload]
    cells["compiled"] = ("no", "yes")[shown.compile]
    cells["processes"] = shown.processes
    if shown.processes > 1 and measurement is sample_step:
        cells["processes"] = f"{shown.processes}, by {shown.split}"
    return Run(cells, measurement, (depth, frames), way)


TABLES = {
    "dit": dit_table,
    "train": train_table,
    "vae": vae_table,
    "load": load_table,
    "tiny": tiny_table,
    "processes": processes_table,
    "gpu": gpu_table,
}


# ------------------------------------------------------------------------------------------------
# Running and printing
# ------------------------------------------------------------------------------------------------


def rows_of(run, options):
    """[{column: cell}] of a run, in a process of its own; the last may say why it is not there."""
    way = Way(**run.way)
    why = why_not(way)
    if why:
        return [{WHY: why}]
    line = [sys.executable, "-m"]
    if way.processes > 1:
        torchrun = "torch.distributed.run", "--standalone", "--nproc_per_node"
        line += [*torchrun, str(way.processes), "-m"]
    child = json.dumps([run.measurement.__name__, run.arguments, run.way])
    line += ["eval.bench", "--child", child] + ["--quick"] * options.quick
    line += ["--repeats", str(options.repeats)] if options.repeats else []
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    rows = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    return rows + why_failed(done)


def why_not(way):
    """What a run lacks here, if anything."""
    gpus = torch.cuda.device_count()
    if way.device == "cuda" and not gpus:
        return "not measured: there is no GPU here"
    if way.device == "cuda" and gpus < way.processes:
        return f"not measured: there are fewer than {way.processes} GPUs here"
    if "diffusers" in way.by and not find_spec("diffusers"):
        return "diffusers is not installed"


def why_failed(done):
    errors = done.stderr.strip() or "?"
    memory = r"(?i)out of memory|can't allocate memory|MemoryError|bad_alloc"
    if done.returncode == -9 or re.search(memory, errors):
        return [{WHY: "out of memory"}]
    if done.returncode:
        return [{WHY: f"failed: {errors.splitlines()[-1]}"}]
    return []


def run_child(size, name, arguments, way):
    limit_memory()
    mi.join_processes(Way(**way))  # the first prints
    torch.manual_seed(0)
    for row in MEASUREMENTS[name](size, *arguments, **way):
        print(json.dumps(row), flush=True)
    mi.leave_processes()


def limit_memory():
    """To fail by itself before the system ends anything else."""
    if torch.cuda.is_available():
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    free = proc("meminfo", "MemAvailable")
    soft = free if hard < 0 else min(free, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def print_table(title, columns, runs, options):
    print(f"\n### {title}\n", flush=True)
    print_row(columns)
    print_row(["---"] * len(columns))
    ours = {}
    for run in tqdm(runs, leave=False):
        for row in rows_of(run, options):
            row = run.cells | row
            add_ratio(row, ours)
            print_row(cells_of(row, columns))


def chosen(runs, cells):
    """Those among whose first cells all of these are, and what makes files for them."""
    found = [run for run in runs if not run.cells or {*map(str, run.cells.values())} >= {*cells}]
    return found if any(run.cells for run in found) else []


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_ratio(row, ours):
    """Beside diffusers' seconds: what part of them ours take, alike in all else."""
    by = row.get("by")
    alike = tuple(row.get(name) for name in ("what", "frames", "blocks", "compiled", "processes"))
    if by == "ours":
        ours[alike] = row.get("s")
    elif by and "diffusers" in by and ours.get(alike) and "s" in row:
        row["ours / diffusers"] = ours[alike] / row["s"]


def cells_of(row, columns):
    """In the columns' order; why a row is missing stands in the first that is empty."""
    if WHY in row:
        row = {next(name for name in columns if name not in row): row[WHY]} | row
    return [row.get(name, "") for name in columns]


def print_row(cells):
    shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    tqdm.write(f"| {' | '.join(shown)} |")
    sys.stdout.flush()


def proc(file, key):
    """Bytes, by their name in /proc/<file>."""
    with open(f"/proc/{file}") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def print_machine():
    load = os.getloadavg()[0]
    free, total = (proc("meminfo", key) / 1e9 for key in ("MemAvailable", "MemTotal"))
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    diffusers = "no diffusers"
    if find_spec("diffusers"):
        diffusers = f"diffusers {importlib.metadata.version('diffusers')}"
    print(f"date      {time.strftime('%Y-%m-%d %H:%M')}, load average {load:.1f}")
    print(f"cpu       {processor()}")
    print(f"memory    {total:.0f} GB, {free:.0f} free")
    print(f"gpu       {graphics()}")
    print(f"versions  {', '.join([*versions, diffusers])}", flush=True)


def processor():
    with open("/proc/cpuinfo") as file:
        text = file.read()
    model = re.search(r"model name\s*:\s*(.+)", text)
    name = model[1] if model else platform.machine()
    matter = "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "i8mm", "sve"
    flags = " ".join(flag for flag in matter if flag in text.split())
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads, {flags}"


def graphics():
    if not torch.cuda.is_available():
        return "none"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("tables", nargs="*", help=f"of {', '.join(TABLES)}; default: all")
    add("--quick", action="store_true", help="the smallest sizes, only to see that all works")
    add("--repeats", type=positive, help="of which medians are shown; default 5")
    add("--only", nargs="+", default=[], help='rows with these cells, as "sample step" 73 ours')
    add("--weights", default=os.path.join(ROOT, "tiny"), help="folder for `tiny`; default tiny/")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    if options.repeats:
        size = SimpleNamespace(**vars(size) | {"repeats": options.repeats})
    if options.child:
        run_child(size, *options.child)
        return
    for name in options.tables:
        if name not in TABLES:
            raise mi.InputError(f"no table {name}; there are {', '.join(TABLES)}")
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = os.path.join(folder, "dit.safetensors")
        paths = SimpleNamespace(weights=os.path.abspath(options.weights), checkpoint=checkpoint)
        tables = [TABLES[name](size, paths) for name in options.tables or TABLES]
        tables = [(*head, chosen(runs, options.only)) for *head, runs in tables]
        if not any(runs for *_, runs in tables):
            raise mi.InputError(f"no row has the cells {', '.join(options.only)}")
        for title, columns, runs in tables:
            if runs:
                print_table(title, columns, runs, options)


if __name__ == "__main__":
    if "--child" in sys.argv:
        main()  # with its traceback, the last line of which is shown
    else:
        mi.main(main)
