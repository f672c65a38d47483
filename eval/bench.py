"""Speed and memory, beside diffusers where it is installed:   python -m eval.bench [dit train vae load tiny gpu]

Prints tables in markdown, each row as soon as it is measured (on Linux). All weights but tiny/'s are random, of
Mochi's sizes. Every measurement is a process of its own, so its peak memory is its own: the GPU's where it runs there,
else RSS. What is compared by time takes turns (matrices, ours, diffusers, matrices, ...), and medians are shown, as
machines are noisy; the VAE runs once.

MFU, model FLOPs utilisation: FLOPs of the model's matrices and attention / seconds / the FLOPs a second at which the
four visual matrices of a block alone pass as many tokens, in the same process. A step of sampling is two forward
passes, with text and without. A step of training counts as two: the second stands for the gradient of the activations,
as most weights are frozen; what checkpointing computes again does not count.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import musicinfuser as mi

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What is measured, at Mochi's sizes. `latents` are those of 480x848, 1,590 tokens a frame, `vae_latents` of 240x424;
# `channels` and `blocks` are those of the VAE's encoder and decoder; `decoded` counts latent frames; `load_depth`
# blocks are 4.4 GB in float32; `depth` and `frames` are for a GPU.
FULL = SimpleNamespace(
    width=3072, text_width=1536, heads=24, t5_width=4096, text=30, latents=(60, 106), latent_frames=(1, 2, 4),
    channels=((64, 128, 256, 384), (768, 512, 256, 128)), blocks=((3, 3, 4, 6, 3), (3, 6, 4, 3, 3)),
    vae_latents=(30, 53), decoded=(2, 4, 8), encoded=25, load_depth=5, batch=14, depth=48, frames=(73, 145), repeats=5,
)  # fmt: skip
QUICK = SimpleNamespace(
    width=64, text_width=32, heads=2, t5_width=32, text=5, latents=(4, 6), latent_frames=(1,),
    channels=((32,) * 4,) * 2, blocks=((1,) * 5,) * 2,
    vae_latents=(2, 4), decoded=(2,), encoded=7, load_depth=2, batch=2, depth=2, frames=(7,), repeats=1,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------------


def proc(file, key):  # bytes, by their name in /proc/<file>
    with open(f"/proc/{file}") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def peak():  # GB; getrusage's maximum would begin with that of the process that started this one
    on_gpu = torch.cuda.is_initialized()
    return (torch.cuda.max_memory_allocated() if on_gpu else proc("self/status", "VmHWM")) / 1e9


def now():  # seconds, when all that was begun is done
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(runs, repeats):
    """{name: function} -> {name: median seconds}; they take turns, and the first turn does not count."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, function in runs.items():
            began = now()
            function()
            times[name].append(now() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def matrices(dit, tokens):
    """A function that passes tokens through the visual matrices of a block and does nothing else, and its FLOPs."""
    block, device = dit.blocks[0], dit.pos_frequencies.device
    linears = block.attn.qkv_x, block.attn.proj_x, block.mlp_x.w1, block.mlp_x.w2
    weights = [linear.weight.detach().to(device) for linear in linears]
    x = {w.shape[1]: torch.randn(tokens, w.shape[1], device=device).to(w.dtype) for w in weights}
    return lambda: [F.linear(x[w.shape[1]], w) for w in weights], 2 * tokens * sum(w.numel() for w in weights)


def flops(dit, tokens, text, frames=0):
    """Of a forward pass with so many visual and text tokens: two for a weight and a token that meet, four for a channel
    of two tokens that do. frames: latent frames of music, 0 for none."""

    def met(name):  # how many tokens pass this matrix
        if name.startswith("audio_"):
            return frames if re.search(r"projection|to_k\.|to_v\.", name) else tokens * (frames > 0)
        if ".mod" in name or "t_embedder" in name:
            return 1
        return text if "_y" in name or "t5" in name else tokens

    weights = {k: p for k, p in dit.named_parameters() if p.ndim > 1 and "lora_" not in k and k != "pos_frequencies"}
    attention = len(dit.blocks) * (tokens + text) ** 2 + len(dit.audio_layers) * tokens * frames
    return 4 * attention * dit.width + sum(2 * met(name) * p.numel() for name, p in weights.items())


def child(size, name, *arguments):
    """Run one of MEASUREMENTS in a process of its own: its rows, or one that says why there are none."""
    line = [sys.executable, "-m", "eval.bench", "--child", json.dumps([name, *arguments])]
    run = subprocess.run(line + ["--quick"] * (size is QUICK), capture_output=True, text=True, cwd=ROOT)
    yield from (json.loads(text) for text in run.stdout.splitlines() if text.startswith("["))
    if run.returncode == -9 or re.search(r"(?i)out of memory|can't allocate memory|MemoryError|bad_alloc", run.stderr):
        yield ["out of memory"]
    elif run.returncode:
        yield [f"failed: {(run.stderr.strip() or '?').splitlines()[-1]}"]


# ------------------------------------------------------------------------------------------------------------------
# Random models and inputs; ours as diffusers'
# ------------------------------------------------------------------------------------------------------------------


def random_dit(size, depth, dtype=torch.float32, device="cpu", offload=False):
    """As load_dit gives it, with every term at work."""
    with torch.device("meta"):
        hidden = (8 * width // 3 for width in (size.width, size.text_width))  # diffusers does not round these
        dit = mi.DiT(depth, size.width, size.text_width, size.heads, size.t5_width, *hidden)
    for name, p in list(dit.named_parameters()):
        w = torch.randn(p.shape, device=device) * (0.1 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5)
        w = w + 1 if "norm" in name else w if name == "pos_frequencies" else w.to(dtype)
        if offload and device == "cuda" and name.startswith("blocks."):
            w = w.cpu().pin_memory()
        owner, _, leaf = name.rpartition(".")
        setattr(dit.get_submodule(owner), leaf, torch.nn.Parameter(w, requires_grad=False))
    dit.fetch = mi.Offload(dit.blocks, torch.device(device), dtype) if offload else None
    return dit


def infused(dit):  # with the paper's adapter
    return mi.infuse(dit, [i for i in mi.MUSICINFUSER_LAYERS if i < len(dit.blocks)] or [0])


def inputs(dit, frames, latents, text, batch=1):
    """x, sigma, y_feat, y_mask, audio at random, for `frames` latent frames whose (height, width) is `latents`."""
    device, width = dit.pos_frequencies.device, dit.t5_yproj.in_features
    x = torch.randn(batch, len(dit.natural.mean), frames, *latents, device=device)
    y, mask = torch.randn(batch, text, width, device=device), torch.ones(batch, text, dtype=torch.bool, device=device)
    audio = None
    if dit.audio_layers:
        length = round(50 * mi.audio_seconds(6 * frames - 5, dit.natural.fps))
        audio = torch.randn(1, length, dit.audio_projection.projection[0].in_features, device=device)
    return x, torch.full((batch,), 0.7, device=device), y, mask, audio


TO_DIFFUSERS = [  # our names and theirs, replaced in this order
    ("x_embedder", "patch_embed"), ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"), ("t5_y_embedder", "time_embed.pooler"),
    ("t5_yproj", "time_embed.caption_proj"), ("final_layer.linear", "proj_out"), ("final_layer.mod", "norm_out.linear"),
    ("blocks.", "transformer_blocks."), ("mod_x", "norm1.linear"), ("mod_y", "norm1_context.linear"),
    ("attn.", "attn1."), ("q_norm_x", "norm_q"), ("k_norm_x", "norm_k"), ("q_norm_y", "norm_added_q"),
    ("k_norm_y", "norm_added_k"), ("proj_x", "to_out.0"), ("proj_y", "to_add_out"), ("mlp_x.w1", "ff.net.0.proj"),
    ("mlp_x.w2", "ff.net.2"), ("mlp_y.w1", "ff_context.net.0.proj"), ("mlp_y.w2", "ff_context.net.2"),
]  # fmt: skip
THIRDS = {"qkv_x": ("to_q", "to_k", "to_v"), "qkv_y": ("add_q_proj", "add_k_proj", "add_v_proj")}


def to_diffusers(state, depth):
    """Yield diffusers' (name, tensor): it has q, k and v apart, both the feed-forward's gate and the final shift in
    the second half, and a name of its own in the last block."""
    last = f"blocks.{depth - 1}.norm1_context.linear"
    for name, w in state.items():
        if ".w1." in name or "final_layer.mod" in name:
            w = w.roll(len(w) // 2, 0)
        for ours, theirs in TO_DIFFUSERS:
            name = name.replace(ours, theirs)
        name = name.replace(last, f"{last}_1")
        fused = next((part for part in THIRDS if part in name), name)
        for third, part in zip(THIRDS.get(fused, [name]), w.chunk(3) if fused in THIRDS else [w]):
            yield name.replace(fused, third), part


def diffusers_dit(ours, dtype):
    from diffusers import MochiTransformer3DModel

    sizes = dict(num_layers=len(ours.blocks), num_attention_heads=ours.pos_frequencies.shape[1],
                 attention_head_dim=2 * ours.pos_frequencies.shape[2], text_embed_dim=ours.t5_yproj.in_features,
                 pooled_projection_dim=ours.t5_yproj.out_features)  # fmt: skip
    with torch.device("meta"):
        theirs = MochiTransformer3DModel(**sizes)
    state = dict(to_diffusers(ours.state_dict(), len(ours.blocks)))
    # In bfloat16 the rope frequencies would give other angles than ours, and outputs that cannot be compared
    theirs.load_state_dict({k: w if k == "pos_frequencies" else w.to(dtype) for k, w in state.items()}, assign=True)
    return theirs.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# The measurements: generators of rows, each run by `child`
# ------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def forward(size, dtype):
    """[tokens, FLOPs a second of the matrices, seconds of ours, of theirs, ours / theirs, MFU, MFU, difference]"""
    kind = mi.DTYPES[dtype]
    ours = random_dit(size, 2, kind)
    theirs = diffusers_dit(ours, kind) if find_spec("diffusers") else None
    for frames in size.latent_frames:
        x, sigma, y, mask, _ = inputs(ours, frames, size.latents, size.text)
        given, out, tokens = (x.to(kind), y.to(kind), 1000 * (1 - sigma), mask), {}, x[0, 0].numel() // 4
        alone, count = matrices(ours, tokens)
        runs = {"alone": alone, "ours": lambda: out.update(ours=ours(x, sigma, y, mask))}
        if theirs:
            runs["theirs"] = lambda: out.update(theirs=theirs(*given, return_dict=False)[0].float())
        s = medians(runs, size.repeats)
        least = flops(ours, tokens, size.text) * s["alone"] / count  # seconds, at the rate of the matrices
        row = [f"{tokens:,}", count / s["alone"] / 1e12, s["ours"], "diffusers is not installed", "", least / s["ours"]]
        if theirs:
            apart = ((out["ours"] - out["theirs"]).abs().max() / out["ours"].std()).item()
            warning = "**they differ:** " if apart > {"float32": 1e-3, "bfloat16": 0.2}[dtype] else ""
            row[3:5] = s["theirs"], s["ours"] / s["theirs"]
            row += [least / s["theirs"], f"{warning}{apart:.1e}"]
        yield row


def training_step(dit, frames, latents, text, batch=1):
    """A function that takes a step of AdamW on a float32 adapter."""
    parameters = [p.requires_grad_() for p in mi.adapter_parameters(dit).values()]
    for p in parameters:
        p.data = p.data.float()
    optimiser = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0)
    z, sigma, *given = inputs(dit, frames, latents, text, batch)
    eps = torch.randn_like(z)

    def step():
        mi.flow_matching_loss(dit, z, sigma, eps, *given).mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


@torch.inference_mode()
def sampling(dit, frames, latents, text, sigmas):
    """(median seconds of a step of sampling after the first, which may compile; latents)"""
    x, _, y, mask, audio = inputs(dit, frames, latents, text)
    times = []

    def watched(steps):
        for step in steps:
            began = now()
            yield step
            times.append(now() - began)

    z = mi.sample(dit, x, (y, mask), (y.clone(), mask & False), audio, sigmas=sigmas, progress=watched)
    return statistics.median(times[1:]), z


def step(size, what, dtype, depth, frames, offload=False, compiled=False, device="cpu"):
    """[seconds, MFU, peak] of a step of what="train", checkpointing, or "sample", with the paper's adapter."""
    dit, frames = infused(random_dit(size, depth, mi.DTYPES[dtype], device, offload)), (frames - 1) // 6 + 1
    for p in mi.adapter_parameters(dit).values():
        p.data = p.data.to(mi.DTYPES[dtype])
    if compiled:
        mi.compile_blocks(dit)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # making the weights does not count
    given = dit, frames, size.latents, size.text
    dit.checkpointing = what == "train"
    if what == "train":
        seconds = medians({"": training_step(*given)}, size.repeats)[""]
    else:
        seconds, _ = sampling(*given, mi.linear_quadratic_schedule(64)[: size.repeats + 2])
    highest, tokens = peak(), frames * math.prod(size.latents) // 4
    work = sum(flops(dit, tokens, text, frames) for text in (size.text, size.text if what == "train" else 0))
    alone, count = matrices(dit, tokens)
    yield [seconds, work / seconds * medians({"": alone}, size.repeats)[""] / count, highest]


def random_vae(size, whose, what):
    """(the module, what to call) of one half, what="encode" or "decode", ours or diffusers'."""
    part = ("encode", "decode").index(what)
    if whose == "ours":
        model = (mi.Encoder, mi.Decoder)[part](size.channels[part], size.blocks[part])
        return model, model
    from diffusers import AutoencoderKLMochi

    down, up = size.channels  # diffusers names both from full resolution down
    channels = {"encoder_block_out_channels": down, "decoder_block_out_channels": up[::-1]}
    model = AutoencoderKLMochi(**channels, layers_per_block=size.blocks[0])
    setattr(model, ("decoder", "encoder")[part], None)  # its memory does not belong to this
    return model, getattr(model, what)


@torch.inference_mode()
def vae(size, whose, what, frames, latents, dtype="float32", device="cpu"):
    """[seconds, "", peak] of what="encode" or "decode" so many random frames, once, after one frame to warm up."""
    model, run = random_vae(size, whose, what)
    model.to(device, mi.DTYPES[dtype]).requires_grad_(False)
    shape = (1, 12, (frames - 1) // 6 + 1, *latents) if what == "decode" else (1, 3, frames, *(8 * n for n in latents))
    x = (2 * torch.rand(shape) - 1).to(device, mi.DTYPES[dtype])
    run(x[:, :, :1])
    began = now()
    run(x)
    yield [now() - began, "", peak()]


def make_checkpoint(size, path):
    mi.save_dit(random_dit(size, size.load_depth), path, torch.float32)
    yield []


def load(size, path, dtype):
    """[seconds to load, and to read all, GB of the model, peak RSS, peak anonymous, that / model]

    The file was just written, so it may come from the page cache. Anonymous memory is what cannot be dropped when
    memory is short, as a mapped file's can; Linux keeps no peak of it, so it is looked at every 2 ms.
    """
    anonymous = lambda: proc("self/status", "RssAnon")  # noqa: E731
    before, done, seen = anonymous(), threading.Event(), []

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = now()
    dit = mi.load_dit(path, dtype=mi.DTYPES[dtype])
    loaded = now() - began
    for p in dit.parameters():  # what stayed mapped is read only now
        p.sum()
    read = now() - began
    done.set()
    watcher.join()
    highest, model = max(*seen, anonymous()) - before, sum(p.nbytes for p in dit.parameters())
    yield [loaded, read, model / 1e9, peak(), highest / 1e9, highest / model]


def tiny(size, weights, dtype):
    """[which video, seconds of a step, of all steps and decoding, of a training step], from random text and music"""
    kind, path = mi.DTYPES[dtype], lambda name: os.path.join(weights, f"{name}.safetensors")
    dit = mi.load_adapter(mi.load_dit(path("dit"), dtype=kind), path("musicinfuser"))
    decoder, n = mi.load_decoder(path("decoder"), dtype=kind), dit.natural
    of = (n.frames - 1) // 6 + 1, (n.height // 8, n.width // 8), size.text
    began = now()
    one, z = sampling(dit, *of, mi.linear_quadratic_schedule(n.steps))
    with torch.inference_mode():
        decoder(mi.to_vae_space(z, n.mean, n.std))
    video = now() - began
    trained = medians({"": training_step(dit, *of, size.batch)}, size.repeats)[""]
    yield [f"{n.frames} frames of {n.height}x{n.width}, {n.steps} steps", one, video, trained]


MEASUREMENTS = {f.__name__: f for f in (forward, step, vae, make_checkpoint, load, tiny)}

# ------------------------------------------------------------------------------------------------------------------
# The tables: a title, a heading, and [(the first cells of a row or more, rows of the rest)]
# ------------------------------------------------------------------------------------------------------------------


def both_vaes(size, what, frames):
    found = []
    for whose in ("ours", "diffusers"):
        free, need = proc("meminfo", "MemAvailable") / 1e9, 0.0
        if whose == "diffusers" and what == "decode":  # 6.1 GB for 2 latent frames, 9.8 for 4 were measured
            need = 2.4 + 1.85 * ((frames - 1) // 6 + 1) * math.prod(size.vae_latents) / (30 * 53)
        why = f"not run: needs about {need:.0f} GB, {free:.0f} free"
        if whose == "diffusers" and not find_spec("diffusers"):
            why, need = "diffusers is not installed", math.inf
        rows = [[why]] if need > free else child(size, "vae", whose, what, frames, size.vae_latents)
        found.append([*rows][-1])
    (ours, *_, ours_peak), (theirs, *_, theirs_peak) = (row if len(row) > 1 else [*row, ""] for row in found)
    ratio = "" if isinstance(ours, str) or isinstance(theirs, str) else ours / theirs
    yield [ours, theirs, ratio, ours_peak, theirs_peak]


def loads(size):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "dit.safetensors")
        made = list(child(size, "make_checkpoint", path))[-1]
        for dtype in mi.DTYPES:
            yield from ([dtype, *row] for row in ([made] if made else child(size, "load", path, dtype)))


def gpu(size):
    if not torch.cuda.is_available():
        yield ["not measured: there is no GPU here"]
        return
    ways = [(offload, compiled) for offload in (False, True) for compiled in (False, True)]
    runs = [("sample", frames, *way) for frames in size.frames for way in ways]
    runs += [("train", size.frames[0], offload, False) for offload in (False, True)]
    for what, frames, offload, compiled in runs:
        how = ["offloaded" if offload else "resident", "yes" if compiled else "no"]
        rows = child(size, "step", what, "bfloat16", size.depth, frames, offload, compiled, "cuda")
        yield from ([what, frames, *how, *row] for row in rows)
    for frames in size.frames:
        rows = child(size, "vae", "ours", "decode", frames, size.latents, "bfloat16", "cuda")
        yield from (["decode", frames, "", "", *row] for row in rows)


def tables(size, weights):
    dtypes, videos = mi.DTYPES, [*(("decode", 6 * n - 5) for n in size.decoded), ("encode", size.encoded)]
    height, width = (8 * n for n in size.vae_latents)
    two = f"two blocks, {size.text} text tokens, median of {size.repeats}"
    compared = "ours, s | diffusers, s | ours / diffusers"
    return {
        "dit": (f"DiT forward, {two}",
                f"| tokens | matrices, TFLOP/s | {compared} | MFU | of diffusers | max difference / deviation",
                [([d], child(size, "forward", d)) for d in dtypes]),
        "train": (f"Training step, {two}, ZICA on one, LoRA of rank 64, checkpointing", "| s | MFU | peak RSS, GB",
                  [([d], child(size, "step", "train", d, 2, 1)) for d in dtypes]),
        "vae": (f"VAE, float32, {height}x{width}", f"| frames | {compared} | peak RSS of ours, GB | of diffusers, GB",
                [([what, frames], both_vaes(size, what, frames)) for what, frames in videos]),
        "load": (f"Loading a float32 checkpoint of {size.load_depth} blocks",
                 "| load, s | load and read all, s | model, GB | peak RSS, GB | peak anonymous, GB | anonymous / model",
                 [([], loads(size))]),
        "tiny": (f"The model in {os.path.basename(weights)}/, {size.batch} videos in a step of training",
                 "| video | a step of sampling, s | a video, s | a step of training, s",
                 [([d], child(size, "tiny", weights, d)) for d in dtypes]),
        "gpu": (f"Mochi of {size.depth} blocks on a GPU, bfloat16, 480x848: a step of sampling, of training; decoding",
                "| frames | blocks | compiled | s | MFU | peak, GB", [([], gpu(size))]),
    }  # fmt: skip


def print_table(title, heading, parts):
    columns = heading.count("|") + 1
    print(f"\n### {title}\n\n|  {heading} |\n|{'---|' * columns}", flush=True)
    for begin, rows in tqdm(parts, title, leave=False):
        for row in rows:
            cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in begin + row]
            tqdm.write(f"| {' | '.join(cells + [''] * (columns - len(cells)))} |")
            sys.stdout.flush()


def print_machine():
    with open("/proc/cpuinfo") as file:
        text = file.read()
    model = re.search(r"model name\s*:\s*(.+)", text)
    matter = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "i8mm", "sve")
    flags = " ".join(flag for flag in matter if flag in text.split())
    free, total = (proc("meminfo", key) / 1e9 for key in ("MemAvailable", "MemTotal"))
    installed = find_spec("diffusers")
    diffusers = f"diffusers {importlib.metadata.version('diffusers')}" if installed else "no diffusers"
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    print(f"date      {time.strftime('%Y-%m-%d %H:%M')}, load average {os.getloadavg()[0]:.1f}")
    print(f"cpu       {model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
          f"{torch.get_num_threads()} threads, {flags}")  # fmt: skip
    print(f"memory    {total:.0f} GB, {free:.0f} free")
    print(f"gpu       {f'{gpu.name}, {gpu.total_memory / 1e9:.0f} GB' if gpu else 'none'}")
    print(f"versions  python {platform.python_version()}, torch {torch.__version__}, {diffusers}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Speed and memory, beside diffusers where it is installed.")
    add = parser.add_argument
    add("rows", nargs="*", help="of dit, train, vae, load, tiny, gpu; default: all")
    add("--quick", action="store_true", help="the smallest sizes, only to see that all works")
    add("--weights", default=os.path.join(ROOT, "tiny"), help="folder for the rows `tiny`; default tiny/")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    if options.child:
        if not torch.cuda.is_available():  # to fail by itself before the system ends anything else
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            free = proc("meminfo", "MemAvailable")
            resource.setrlimit(resource.RLIMIT_DATA, (free if hard < 0 else min(free, hard), hard))
        name, *arguments = options.child
        for row in MEASUREMENTS[name](size, *arguments):
            print(json.dumps(row), flush=True)
        return
    wanted = tables(size, os.path.abspath(options.weights))
    unknown = [name for name in options.rows if name not in wanted]
    if unknown:
        raise mi.InputError(f"no rows {unknown[0]}; there are {', '.join(wanted)}")
    print_machine()
    for name in options.rows or wanted:
        print_table(*wanted[name])


if __name__ == "__main__":
    main() if "--child" in sys.argv else mi.main(main)  # `child` reads the traceback's last line
