"""MusicInfuser (arXiv 2503.14505) in one file: Mochi 1 made to listen.

The method comes first: the diffusion transformer; zero-initialised cross-attention to music (ZICA)
and LoRA, with all their zeros; noise and loss; guidance; solvers. What it stands on follows: the
transformer's ends, the video VAE, files, loading, offloading, text, music, video, sound, options.

Shapes in the comments:
    B  batch                T, H, W  latent frames, 1 + (frames - 1) / 6; pixels / 8
    N  visual tokens, T*H/2*W/2       L  text tokens      A  audio tokens, 50 a second
    D  visual width         Dy  text stream's width       nh, hd  heads, width of a head

Mochi is a rectified flow: x = (1 - sigma) z + sigma eps with sigma in [0, 1], and the network's
velocity v estimates z - eps. The paper writes denoisers D(x; sigma) = x + sigma v, so that Eqs. 2,
3 and 4 hold in v as they stand. Tensors keep genmo's and the authors' names; their files just load.
"""

import argparse
import datetime
import difflib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import partial

import imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from imageio_ffmpeg import get_ffmpeg_exe
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------
# The models that exist. Sizes are read off a file's shapes; these tables are for the reader.
# ----------------------------------------------------------------------------------------------

MODELS = {  # 10.03 billion parameters and 20,670 visual tokens; 7.5 million and 208
    "mochi": dict(depth=48, width=3072, text_width=1536, heads=24, t5_width=4096),
    "tiny": dict(depth=12, width=160, text_width=80, heads=4, t5_width=96),
}
MUSICINFUSER_LAYERS = (6, 7, 8, 9, 10, 21, 34, 35, 36, 38, 39, 43, 44, 45, 46, 47)  # the authors'


def option(default, help, **more):
    """A field of an options dataclass; command line and checks follow from it, see add_option."""
    return field(default=default, metadata={"help": help, **more})


# ----------------------------------------------------------------------------------------------
# The diffusion transformer (genmo's dit/joint_model/asymm_models_joint.py): a visual stream and a
# narrower text stream, joined in every attention
# ----------------------------------------------------------------------------------------------

# On an H100 PyTorch may choose cuDNN's attention, which the authors bar: its gradients became NaN
torch.backends.cuda.enable_cudnn_sdp(False)


def rms_norm(x):
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)  # float32


def modulate(x, scale):
    """What enters a branch: x (B, N, D), scale (B, 1, D)."""
    return rms_norm(x).mul_(1 + scale.float()).to(x.dtype)


def residual(x, branch, gate):
    """What a branch adds to its stream: normalised and gated."""
    return x + rms_norm(branch).mul_(torch.tanh(gate.float())).to(x.dtype)


def rope_rotations(frequencies, t, h, w):
    """(N, nh, hd/2, 2): the cosines and sines of each token's rotations, head by head.

    frequencies (3, nh, hd/2), of frames, which count 0, 1, 2, ..., and of rows and columns, centred
    and scaled to an area of 192^2 tokens. Text is not rotated, so positions are absolute.
    """
    device = frequencies.device
    scale = math.sqrt(192**2 / (h * w))
    frames = torch.arange(t, device=device, dtype=torch.float32)
    rows = (torch.arange(h, device=device) + 0.5 - h / 2) * scale
    columns = (torch.arange(w, device=device) + 0.5 - w / 2) * scale
    positions = torch.cartesian_prod(frames, rows, columns)  # (N, 3)
    angles = torch.einsum("np,phf->nhf", positions, frequencies.float())
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x, rope):
    """Pairs (2i, 2i + 1) of x (B, N, nh, hd) turn by their angles; rope (N, nh, hd/2, 2)."""
    pairs = x.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():  # complex numbers take a third of the time, uncompiled
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
        return torch.view_as_real(turned).flatten(-2)
    (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class JointAttention(nn.Module):
    """Visual and text tokens attend to one another; each stream has its own projections."""

    def __init__(self, width, text_width, heads, last):
        super().__init__()
        self.heads = heads
        self.qkv_x = nn.Linear(width, 3 * width, bias=False)
        self.qkv_y = nn.Linear(text_width, 3 * width, bias=False)
        self.q_norm_x = nn.RMSNorm(width // heads, eps=1e-5)
        self.k_norm_x = nn.RMSNorm(width // heads, eps=1e-5)
        self.q_norm_y = nn.RMSNorm(width // heads, eps=1e-5)
        self.k_norm_y = nn.RMSNorm(width // heads, eps=1e-5)
        self.proj_x = nn.Linear(width, width)
        self.proj_y = None if last else nn.Linear(width, text_width)

    def forward(self, x, y, rope, mask):
        """x (B, N, D), y (B, L, Dy); mask (B, 1, 1, N + L), or None where all text is valid."""
        qx, kx, vx = self.qkv_x(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, nh, hd)
        qy, ky, vy = self.qkv_y(y).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, nh, hd)
        q = torch.cat([rotate(self.q_norm_x(qx.float()), rope), self.q_norm_y(qy.float())], 1)
        k = torch.cat([rotate(self.k_norm_x(kx.float()), rope), self.k_norm_y(ky.float())], 1)
        v = torch.cat([vx, vy], 1)
        o = self.attend(q.to(v.dtype), k.to(v.dtype), v, mask)  # (B, N + L, nh, hd)
        ox, oy = o.flatten(2).split([x.shape[1], y.shape[1]], 1)
        if self.proj_y is None:  # text is not used after the last block
            return self.proj_x(ox), None
        return self.proj_x(ox), self.proj_y(oy)

    def attend(self, q, k, v, mask):
        q, k, v = (tokens.transpose(1, 2) for tokens in (q, k, v))  # (B, nh, N + L, hd)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, width, hidden=None):
        super().__init__()
        hidden = hidden or 256 * math.ceil(2 * (4 * width) // 3 / 256)
        self.w1 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        a, b = self.w1(x).chunk(2, -1)
        return self.w2(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, width, text_width, heads, last, hidden_x=None, hidden_y=None):
        super().__init__()
        self.last = last
        self.mod_x = nn.Linear(width, 4 * width)
        self.mod_y = nn.Linear(width, text_width if last else 4 * text_width)
        self.attn = JointAttention(width, text_width, heads, last)
        self.mlp_x = FeedForward(width, hidden_x)
        self.mlp_y = None if last else FeedForward(text_width, hidden_y)

    def forward(self, x, y, c, rope, mask):
        """x (B, N, D), y (B, L, Dy), c (B, 1, D): the noise level and the pooled text."""
        scale_msa_x, gate_msa_x, scale_mlp_x, gate_mlp_x = self.mod_x(c).chunk(4, -1)
        if self.last:
            scale_msa_y = self.mod_y(c)
        else:
            scale_msa_y, gate_msa_y, scale_mlp_y, gate_mlp_y = self.mod_y(c).chunk(4, -1)
        attn_x, attn_y = self.attn(modulate(x, scale_msa_x), modulate(y, scale_msa_y), rope, mask)
        x = residual(x, attn_x, gate_msa_x)
        x = residual(x, self.mlp_x(modulate(x, scale_mlp_x)), gate_mlp_x)
        if not self.last:
            y = residual(y, attn_y, gate_msa_y)
            y = residual(y, self.mlp_y(modulate(y, scale_mlp_y)), gate_mlp_y)
        return x, y


@dataclass
class Conditions:
    """What follows from text, music and size alone, made once for all noise levels of a video
    (of a long one anew for each window of a step: all at once would take memory)."""

    rope: torch.Tensor  # (N, nh, hd/2, 2)
    frames: torch.Tensor  # (N,), the latent frame of each visual token
    y: torch.Tensor  # (B, L, Dy), the text stream
    mask: torch.Tensor | None  # (B, 1, 1, N + L), None where every text token is valid
    pooled: torch.Tensor  # (B, D), the text as one vector
    music: dict  # {layer: the keys and values of its ZICA}; empty without music


class DiT(nn.Module):
    """dit(x, sigma, y_feat, y_mask, audio=None, skip=()) -> velocity, an estimate of z - eps.

    x (B, 12, T, H, W): noised latents in DiT space, H and W even; the velocity is float32 like it
    sigma (B,): noise levels in [0, 1], 1 is all noise
    y_feat (B, L, D_text), y_mask (B, L) bool: T5 tokens; those outside the mask change nothing
    audio (B or 1, A, D_audio): Wav2Vec tokens; None: ZICA is off, LoRA stays on
    skip: indices of blocks to leave out, each with its ZICA (the L without l of Eq. 4)
    """

    def __init__(
        self, depth, width, text_width, heads, t5_width, hidden=(None, None), channels=12, patch=2
    ):
        super().__init__()
        self.width, self.patch, self.config = width, patch, ModelConfig()
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbed(width)
        self.t5_y_embedder = AttentionPool(t5_width, width)
        self.t5_yproj = nn.Linear(t5_width, text_width)
        self.pos_frequencies = nn.Parameter(torch.zeros(3, heads, width // heads // 2))
        blocks = [(width, text_width, heads, i == depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(*sizes, *hidden) for sizes in blocks])
        self.final_layer = FinalLayer(width, patch, channels)
        self.adapter = None  # the AdapterOptions, from infuse or load_adapter
        self.audio_cross_attn_blocks = nn.ModuleList()  # ZICA, one for each of adapter.layers

    def forward(self, x, sigma, y_feat, y_mask, audio=None, skip=()):
        return self.velocity(x, sigma, self.prepare(x.shape, y_feat, y_mask, audio), skip)

    def prepare(self, shape, y_feat, y_mask, audio=None):
        """Conditions for latents of that shape; the arguments are those of the class."""
        t, h, w = shape[2], shape[3] // self.patch, shape[4] // self.patch
        y_feat, y_mask = pack_text(y_feat.to(self.t5_yproj.weight.dtype), y_mask)
        mask = None if y_mask.all() else F.pad(y_mask, (t * h * w, 0), value=True)[:, None, None]
        return Conditions(
            rope=rope_rotations(self.pos_frequencies, t, h, w),
            frames=torch.arange(t, device=y_feat.device).repeat_interleave(h * w),
            y=self.t5_yproj(y_feat),
            mask=mask,
            pooled=self.t5_y_embedder(y_feat, y_mask),
            music={} if audio is None else self.listen(audio.to(y_feat.dtype), t),
        )

    def listen(self, audio, frames):
        """{layer: keys and values} of audio (B or 1, A, D_audio) for that many latent frames."""
        assert self.adapter, "a model without an adapter cannot hear: infuse or load_adapter first"
        fps = None if self.adapter.window is None else self.config.fps
        tokens = self.audio_projection(audio, frames, fps)  # (B or 1, T, D)
        zicas = zip(self.adapter.layers, self.audio_cross_attn_blocks)
        return {layer: zica.keys_and_values(tokens) for layer, zica in zicas}

    def velocity(self, x, sigma, conditions, skip=()):
        """x (B, 12, T, H, W) and sigma (B,) under the Conditions -> (B, 12, T, H, W) float32."""
        shape = x.shape[2], x.shape[3] // self.patch, x.shape[4] // self.patch
        c = F.silu(self.t_embedder(sigma) + conditions.pooled)[:, None]  # (B, 1, D)
        x, y = self.x_embedder(x), conditions.y
        for i in range(len(self.blocks)):
            if i not in skip:
                x, y = self.layer(i, x, y, c, conditions)
        return self.final_layer(x, c, *shape)

    def layer(self, i, x, y, c, conditions):
        """Block i, then its ZICA; Offload and checkpoint_layers wrap this."""
        x, y = self.blocks[i](x, y, c, conditions.rope, conditions.mask)
        if i in conditions.music:
            zica = self.audio_cross_attn_blocks[self.adapter.layers.index(i)]
            x = zica(x, conditions.music[i], conditions.frames)
        return x, y


# ----------------------------------------------------------------------------------------------
# The adapter: ZICA (Eq. 6), LoRA, and the zeros by which a fresh one changes nothing
# ----------------------------------------------------------------------------------------------


@dataclass
class AdapterOptions:
    """What an adapter is, but for its weights; kept in the metadata of its file."""

    layers: list = option(None, "that ZICA follows: 0,3,6, even, first, ..., or a ranking's file")
    rank: int = option(64, "of LoRA; 0: none", low=0, line="adapter")
    alpha: float = option(None, "LoRA counts alpha / rank; default: rank", low=0, line="adapter")
    heads: int = option(8, "of ZICA", low=1)
    window: int = option(
        None, "latent frames either side that a frame hears; none: all", low=0, line="adapter"
    )
    adapter: str = option("zica", "add: features added, no attention", choices=("zica", "add"))
    random_init: bool = option(False, "ZICA's output at random, not zero (the paper's ablation)")


class AudioProjection(nn.Module):
    """Wav2Vec tokens (B, A, D_audio) to one a latent frame, (B, T, D).

    fps None: spread evenly, as the authors do, by which 2.40 s of pictures hear 2.31 s of music.
    Else the token that is heard half-way through a frame's pictures: its own moment.
    """

    def __init__(self, audio_width, width):
        super().__init__()
        self.projection = nn.Sequential(Linear(audio_width, width), nn.SiLU(), Linear(width, width))

    def forward(self, audio, frames, fps=None):
        tokens = self.projection(audio).transpose(1, 2)  # (B, D, A)
        if fps is None:
            return F.interpolate(tokens, size=frames, mode="nearest").transpose(1, 2)
        shown = (6 * torch.arange(frames, device=audio.device) - 2.5).clamp(min=0) / fps  # seconds
        nearest = (50 * (shown - 0.0125)).round().long()  # a token's middle is at 0.02 n + 0.0125 s
        return tokens[:, :, nearest.clamp(0, tokens.shape[2] - 1)].transpose(1, 2)


class ZICA(nn.Module):
    """x + W_O softmax(Q K' / sqrt(hd)) V: queries from video, keys, values from music (Eq. 6)."""

    def __init__(self, width, options):
        super().__init__()
        self.heads, self.window = options.heads, options.window
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = Linear(width, width)

    def keys_and_values(self, music):  # (B or 1, T, D) -> (B or 1, nh, T, hd) twice
        return self.split_heads(self.to_k(music)), self.split_heads(self.to_v(music))

    def forward(self, x, keys_and_values, frames):  # x (B, N, D), frames (N,)
        q = self.split_heads(self.to_q(x))  # (B, nh, N, hd)
        k, v = (tokens.expand(len(x), -1, -1, -1) for tokens in keys_and_values)
        mask = None
        if self.window is not None:  # a token hears the music near its own frame
            music_frames = torch.arange(k.shape[2], device=x.device)
            mask = (frames[:, None] - music_frames).abs() <= self.window  # (N, T)
        o = F.scaled_dot_product_attention(q, k, v, mask)
        return x + self.to_out(o.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank B (A x), around the weights of a Linear."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        self.weight, self.bias, self.alpha = linear.weight, linear.bias, alpha
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank))

    def forward(self, x):
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., rank)
        update = F.linear(low, self.lora_B.to(x.dtype))
        return super().forward(x) + self.alpha / len(self.lora_A) * update


# Which linears of every block get LoRA, by the names that the authors' metadata has for their ranks
LORA_TARGETS = {
    "qkv_proj": ("attn.qkv_x", "attn.qkv_y"),
    "out_proj": ("attn.proj_x", "attn.proj_y"),
}


def infuse(dit, layers, rank=64, window=None, *, audio_width=768, **options):
    """Give a model, in place, a fresh adapter that changes no output until it is trained.

    layers: ZICA follows these blocks. rank, window and the rest: see AdapterOptions. audio_width:
    of the music's tokens. The adapter is float32 and trainable; all else is frozen.
    """
    dit.requires_grad_(False)
    options = AdapterOptions(layers=layers, rank=rank, window=window, **options)
    options.alpha = rank if options.alpha is None else options.alpha
    with dit.pos_frequencies.device:
        attach_music(dit, options, audio_width)
        for kind in LORA_TARGETS:
            attach_lora(dit, kind, rank, options.alpha)
        initialise_adapter(dit)
    return dit


def initialise_adapter(dit):
    """All the zeros: the music enters through ZICA's W_O, the low-rank update through LoRA's B."""
    for block in dit.audio_cross_attn_blocks:
        if not dit.adapter.random_init:
            nn.init.zeros_(block.to_out.weight)
            nn.init.zeros_(block.to_out.bias)
    for module in dit.modules():
        if isinstance(module, LoRALinear):
            nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B)


# ----------------------------------------------------------------------------------------------
# Noise and loss
# ----------------------------------------------------------------------------------------------


def beta_uniform(step, size, beta=3.0, half_life=200, generator=None):
    """Noise levels (size,) ~ Beta(1, 1 + (beta - 1) 2^(-step / half_life)) (Eq. 5).

    Training begins near low noise and tends to uniform; beta=1 is uniform throughout.
    """
    b = 1 + (beta - 1) * 2 ** (-step / half_life)
    u = torch.rand(size, generator=generator, dtype=torch.float64)
    return (1 - (1 - u) ** (1 / b)).float()  # the inverse of its distribution, 1 - (1 - sigma)^b


def flow_matching_loss(dit, z, sigma, eps, y_feat, y_mask, audio=None, **others):
    """|v - (z - eps)|^2 at x = (1 - sigma) z + sigma eps, (B,): the mean of each sample.

    Eq. 1 is sigma^2 times this, on z + n; Mochi's training, and the authors', is unweighted.
    z, eps (B, 12, T, H, W) in DiT space; sigma (B,); the rest: what the model is conditioned on.
    """
    s = sigma[:, None, None, None, None]
    v = dit((1 - s) * z + s * eps, sigma, y_feat, y_mask, audio, **others)
    return (v - (z - eps)).square().mean((1, 2, 3, 4))


# ----------------------------------------------------------------------------------------------
# Guidance and solvers: dx = -v dsigma, from noise at sigma 1 to latents at sigma 0 (Eq. 2)
# ----------------------------------------------------------------------------------------------


@dataclass
class Guidance:
    """The scales of a guided velocity. What is off costs no forward pass."""

    cfg: float = option(6.0, "guidance scale of the text (Eq. 3)", line="solver")
    music_cfg: float = option(0.0, "guidance scale of the music", line="solver")
    music_above: float = option(
        0.0, "... at noise levels from here to 1 (arXiv 2404.07724)", low=0, high=1, line="solver"
    )
    skip: tuple = option((), "layers to leave out (Eq. 4)", parse=int, line="solver")
    skip_scale: float = option(0.0, "guidance scale of what they add", line="solver")


def guided_velocity(dit, shape, text, null, audio, guidance):
    """velocity(x, sigma) for latents of that shape: of Eqs. 3 and 4, and guided by the music.

    text, null: (y_feat, y_mask) of the prompt and of the empty or negative one; both hear `audio`.
    """
    g, full = guidance, conditioned(dit, shape, *text, audio)
    away = []  # (scale, lowest noise level, velocity): from what the guidance leads away, how far
    if g.cfg != 1:
        away.append((g.cfg - 1, 0, conditioned(dit, shape, *null, audio)))
    if g.music_cfg and audio is not None:
        away.append((g.music_cfg, g.music_above, conditioned(dit, shape, *text, None)))
    if g.skip and g.skip_scale:
        away.append((g.skip_scale, 0, partial(full, skip=g.skip)))
    mix = getattr(dit, "mix", mixed)  # BranchParallel has its own

    def velocity(x, sigma):
        here = [(scale, without) for scale, low, without in away if sigma[0] >= low]
        branches = [(1 + sum(scale for scale, _ in here), full)]
        branches += [(-scale, without) for scale, without in here]
        return mix(branches, x, sigma)

    return velocity


def mixed(branches, x, sigma):
    """The sum of velocities by their weights, [(weight, velocity)]."""
    return sum(weight * branch(x, sigma) for weight, branch in branches)


def conditioned(dit, shape, *inputs):
    """velocity(x, sigma, skip=()) under these inputs; any callable in a DiT's form will do."""
    if not hasattr(dit, "prepare"):
        return lambda x, sigma, skip=(): dit(x, sigma, *inputs, skip)
    conditions = dit.prepare(shape, *inputs)
    return lambda x, sigma, skip=(): dit.velocity(x, sigma, conditions, skip)


def euler(velocity, x, steps, past=None):
    """First order, one evaluation a step; Mochi's own. steps: pairs (sigma, the next sigma).

    past: a list, empty at first, in which a solver keeps what its next steps need.
    """
    for sigma, following in steps:
        x = x + (sigma - following) * velocity(x, sigma)
    return x


def ab2(velocity, x, steps, past=None):
    """Adams and Bashforth's second order for steps of any length, one evaluation a step.

    The velocity is extrapolated to the middle of the step, but no further ahead than the last step
    was long: at its bend Mochi's schedule makes a step 1 + 76 / n times as long as the one before
    (of an even number n), and the trend of a tiny step does not hold for so long.
    """
    past = [] if past is None else past
    for sigma, following in steps:
        slope = v = velocity(x, sigma)
        h = sigma - following
        if past:
            last_v, last_h = past
            slope = v + min(h / (2 * last_h), 1) * (v - last_v)
        x = x + h * slope
        past[:] = v, h
    return x


def heun(velocity, x, steps, past=None):
    """Heun's second order, two evaluations a step, one at the last, which ends at sigma 0."""
    for sigma, following in steps:
        v, h = velocity(x, sigma), sigma - following
        if following > 0:
            v = (v + velocity(x + h * v, following)) / 2
        x = x + h * v
    return x


SOLVERS = {"euler": euler, "ab2": ab2, "heun": heun}


@torch.no_grad()
def sample(
    dit, noise, text, null, audio=None, *, sigmas, solver="euler", progress=iter, **guidance
):
    """Noise (B, 12, T, H, W) to latents in DiT space, like it in shape, float32.

    text, null: (y_feat, y_mask) of the prompt and of the empty or negative one
    audio (B or 1, A, D_audio) or None; sigmas: from 1 to 0; solver: of SOLVERS
    progress: wraps the list of steps; guidance: the fields of Guidance
    """
    velocity = guided_velocity(dit, noise.shape, text, null, audio, Guidance(**guidance))
    sigmas = [float(sigma) for sigma in sigmas]
    steps = progress(list(zip(sigmas, sigmas[1:])))

    def at(x, sigma):  # the same noise level for the whole batch
        return velocity(x, torch.full((len(x),), sigma, device=x.device))

    return SOLVERS[solver](at, noise.float(), steps)


# ----------------------------------------------------------------------------------------------
# Whole songs: overlapping windows of a length that the model knows, sampled together. All that
# grows with the song is in host memory; the device holds one window.
# ----------------------------------------------------------------------------------------------

SCENE_SIGMA = 0.9  # above it a video's scene is decided, and shared by all windows


def windows(frames, length):
    """[(first, weights (length,))]: windows over so many latent frames, and how they are averaged.

    At each frame the weights sum to 1. A window's first frame stands for a single frame of video
    (see UpBlock), which only the video's own first does: the others' count nothing.
    """
    stride = max(1, 5 * length // 8)
    count = math.ceil((frames - length) / stride) + 1
    firsts = [min(i * stride, frames - length) for i in range(count)]
    place = torch.arange(length, dtype=torch.float64)
    ramps = torch.minimum(place, length - place).repeat(count, 1)
    ramps[0, 0] = 1
    total = torch.zeros(frames, dtype=torch.float64)
    for first, ramp in zip(firsts, ramps):
        total[first : first + length] += ramp
    shares = [ramp / total[first : first + length] for first, ramp in zip(firsts, ramps)]
    return [(first, share.float()) for first, share in zip(firsts, shares)]


def windowed_velocity(dit, plan, text, null, music, guidance, progress=iter):
    """velocity(x, sigma) of a long x in host memory: its windows' guided velocities, averaged.

    plan: of windows(). music: what each window hears, (1, A, D_audio) or None.
    """
    device = text[0].device

    def velocity(x, sigma):
        averaged = torch.zeros_like(x)
        for (first, weights), audio in progress(list(zip(plan, music))):
            some = slice(first, first + len(weights))
            window = x[:, :, some].to(device)
            audio = None if audio is None else audio.to(device)
            guided = guided_velocity(dit, window.shape, text, null, audio, guidance)
            v = guided(window, sigma.to(device))
            averaged[:, :, some] += weights[:, None, None] * v.to(x.device)
        if sigma[0] <= SCENE_SIGMA:
            return averaged
        return with_one_scene(averaged, len(plan[0][1]))

    return velocity


def with_one_scene(v, length):
    """What changes more slowly than a window, such as the place, becomes the whole video's mean.

    Windows know of one another only through those between them: a park would become a beach.
    """
    ends = 0, 0, 0, 0, length // 2, (length - 1) // 2
    slow = F.avg_pool3d(F.pad(v, ends, mode="replicate"), (length, 1, 1), stride=1)
    return v - slow + v.mean(2, keepdim=True)


def in_every_window(noise, frames):
    """Noise (B, 12, T, H, W) again and again, up to so many latent frames.

    Each window of T frames has the same noise, and so the same mean, in which its scene begins.
    """
    return noise[:, :, torch.arange(frames) % noise.shape[2]]


@torch.no_grad()
def sample_long(
    dit,
    noise,
    text,
    null,
    music,
    *,
    plan,
    sigmas,
    solver="euler",
    state=None,
    progress=(iter, iter),
    **guidance,
):
    """sample() for a video in windows; noise, and the latents returned, are in host memory.

    plan, music: see windowed_velocity. state: a State, from which a killed run goes on.
    progress: wraps the steps, and the windows of each.
    """
    over_steps, over_windows = progress
    inputs = dit, plan, text, null, music, Guidance(**guidance)
    velocity = windowed_velocity(*inputs, over_windows)
    sigmas = [float(sigma) for sigma in sigmas]
    steps = list(zip(sigmas, sigmas[1:]))

    def at(x, sigma):
        return velocity(x, torch.full((len(x),), sigma))

    kept = state.read() if state else None
    done, x, past = kept or (0, noise.float(), [])
    for i in over_steps(range(done, len(steps))):
        x = SOLVERS[solver](at, x, [steps[i]], past)
        if state:
            state.write(i + 1, x, past)
    return x


# ----------------------------------------------------------------------------------------------
# The transformer's ends: how latents, noise levels and text enter it, and velocities leave
# ----------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):  # (B, C, T, H, W) -> (B, N, D)
        frames = x.transpose(1, 2).flatten(0, 1).to(self.proj.weight.dtype)  # (B T, C, H, W)
        tokens = self.proj(frames).flatten(2).transpose(1, 2)  # (B T, H/2 W/2, D)
        return tokens.unflatten(0, (x.shape[0], -1)).flatten(1, 2)


class TimestepEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma):  # (B,) -> (B, D)
        t = 1000 * (1 - sigma.float())  # Mochi's time runs from noise, 0, to data, 1000
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=sigma.device) / 128)
        angles = t[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class AttentionPool(nn.Module):
    """The text as one vector: its mean attends to itself and to the tokens."""

    def __init__(self, t5_width, width, heads=8):
        super().__init__()
        self.heads = heads
        self.to_kv = nn.Linear(t5_width, 2 * t5_width)
        self.to_q = nn.Linear(t5_width, t5_width)
        self.to_out = nn.Linear(t5_width, width)

    def forward(self, y, mask):  # y (B, L, D_text), mask (B, L) -> (B, D)
        count = mask.sum(1).clamp(min=1)[:, None, None]
        mean = (y * mask[..., None]).sum(1, keepdim=True) / count
        tokens = torch.cat([mean.to(y.dtype), y], 1)
        k, v = self.to_kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.to_q(tokens[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        valid = F.pad(mask, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + L)
        o = F.scaled_dot_product_attention(q, k, v, valid)  # (B, nh, 1, hd)
        return self.to_out(o.transpose(1, 2).flatten(1))


class FinalLayer(nn.Module):
    def __init__(self, width, patch, channels):
        super().__init__()
        self.patch = patch
        self.mod = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, patch * patch * channels)

    def forward(self, x, c, t, h, w):  # (B, N, D) -> (B, C, T, H, W)
        shift, scale = self.mod(c).float().chunk(2, -1)
        x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = self.linear(x.to(self.linear.weight.dtype)).float()  # (B, N, p p C)
        x = x.unflatten(1, (t, h, w)).unflatten(-1, (self.patch, self.patch, -1))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def pack_text(y_feat, y_mask):
    """Valid tokens first, the rest cut off; y_feat (B, L, D_text), y_mask (B, L).

    Text has no positions and padding is never attended to, so that nothing changes but the cost.
    """
    longest = int(y_mask.sum(1).max())
    order = y_mask.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    y_feat = y_feat.gather(1, order[..., None].expand(-1, -1, y_feat.shape[-1]))
    return y_feat, y_mask.gather(1, order)


# ----------------------------------------------------------------------------------------------
# Where the adapter goes
# ----------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """Computes in its input's dtype, so that a float32 adapter can train over a bfloat16 model."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class FeatureAddition(nn.Module):
    """The ablation of Table 1: each visual token gets its own frame's music, through a Linear."""

    def __init__(self, width, options):
        super().__init__()
        self.to_out = Linear(width, width)

    def keys_and_values(self, music):  # (B or 1, T, D)
        return self.to_out(music)

    def forward(self, x, music, frames):  # x (B, N, D), frames (N,)
        return x + music[:, frames]


def attach_music(dit, options, audio_width):
    """The audio projector, and ZICA after options.layers, in place of any that were there."""
    layers = sorted(int(layer) for layer in options.layers)
    check_layers(layers, len(dit.blocks))
    if dit.width % options.heads:
        raise InputError(f"{options.heads} audio heads do not divide the model's width {dit.width}")
    kind = ZICA if options.adapter == "zica" else FeatureAddition
    dit.adapter = replace(options, layers=layers)
    dit.audio_projection = AudioProjection(audio_width, dit.width)
    dit.audio_cross_attn_blocks = nn.ModuleList([kind(dit.width, options) for _ in layers])


def attach_lora(dit, kind, rank, alpha):
    """LoRA on the linears of that kind, in place of any that was there; rank 0: none."""
    for block in dit.blocks:
        for name in LORA_TARGETS[kind]:
            owner, _, leaf = name.rpartition(".")
            owner = block.get_submodule(owner)
            linear = getattr(owner, leaf)
            if linear is not None and rank:
                setattr(owner, leaf, LoRALinear(linear, rank, alpha))
            elif isinstance(linear, LoRALinear):
                setattr(owner, leaf, without_lora(linear))


def without_lora(linear):
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, "meta")
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain


def adapter_parameters(dit):
    """{name: parameter} of ZICA, the audio projector and LoRA, in the authors' names."""
    ours = ("audio_projection.", "audio_cross_attn_blocks.")
    return {k: v for k, v in dit.named_parameters() if "lora_" in k or k.startswith(ours)}


def third_of(depth):
    """How many layers the paper's 16 of 48 are in a model of that depth."""
    return max(round(depth / 3), 1)


def choose_layers(choice, depth, count=None):
    """`count` layers (default: a third) by the paper's names: even, first, middle, last; or all."""
    count = depth if choice == "all" else count or third_of(depth)
    if choice == "even":
        return [round((i + 0.5) * depth / count - 0.5) for i in range(count)]
    start = {"all": 0, "first": 0, "middle": (depth - count) // 2, "last": depth - count}[choice]
    return list(range(start, start + count))


def check_layers(layers, depth):
    numbers = [layer for layer in layers if isinstance(layer, int) and 0 <= layer < depth]
    if not layers or len(set(numbers)) < len(layers):
        raise InputError(f"layers must be different numbers from 0 to {depth - 1}, not {layers}")


# ----------------------------------------------------------------------------------------------
# From noise to video: sizes, steps, spaces
# ----------------------------------------------------------------------------------------------

# fmt: off
# Mochi's latents, channel by channel, in the VAE's space (genmo's vae/vae_stats.py)
MOCHI_MEAN = (
    -0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
    0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
    -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285,
)
MOCHI_STD = (
    0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
    0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
    0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041,
)
# fmt: on
MOCHI_LONGEST = 163  # frames: genmo makes up to 5.4 s at once


@dataclass
class ModelConfig:
    """What a transformer's shapes cannot tell, kept in the metadata of dit.safetensors.

    The defaults are Mochi's. sampling, training: what this model prefers to the options' defaults.
    """

    fps: int = 30
    mean: tuple = MOCHI_MEAN
    std: tuple = MOCHI_STD
    sampling: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)


def linear_quadratic_schedule(steps, threshold=0.025):
    """Mochi's steps + 1 sigmas from 1 to 0, float64.

    The first half of the steps falls linearly by `threshold`; the rest goes on with that slope and
    bends down to 0. Raises InputError below 2 steps.
    """
    if steps < 2:
        raise InputError(f"steps must be 2 or more, not {steps}")
    linear, bent = steps // 2, steps - steps // 2
    slope = threshold / linear
    bend = (1 - threshold - slope * bent) / bent**2
    i = torch.arange(steps + 1, dtype=torch.float64)
    sigmas = 1 - slope * i - bend * (i - linear).clamp(min=0) ** 2
    sigmas[-1] = 0  # not a rounding more or less
    return sigmas


@dataclass
class VideoOptions:
    """What is sampled, and how its equation is solved; the defaults are Mochi's."""

    size: tuple = option((480, 848), "height and width, multiples of 16", line="video")
    frames: int = option(73, "6k + 1", high=1_000_000, line="video")
    solver: str = option("euler", "of the equation", choices=tuple(SOLVERS), line="solver")
    steps: int = option(64, "of the solver", low=2, high=100_000, line="solver")


@dataclass
class SamplingOptions(Guidance, VideoOptions):
    """All that sampling takes but for the models, the noise, the text and the music."""


@torch.no_grad()  # as a decorator, so that it ends with each video
def noise_to_video(dit, decoder, noise, text, null, audio, options, progress=iter):
    """Yield the videos (3, T, H, W), about [-1, 1], of noise (B, 12, ...) by SamplingOptions."""
    how = how_to_sample(options)
    z = sample(dit, noise, text, null, audio, progress=progress, **how)
    for latents in for_decoder(z, dit.config).split(1):
        yield decoder(latents)[0]


@torch.no_grad()
def pieces_of_video(decoder, z, config):
    """Yield the video of long latents (1, 12, T, H, W), in DiT space, in pieces (3, t, H, W)."""
    for piece in decoder.stream(for_decoder(z, config)):
        yield piece[0]


def how_to_sample(options):
    """What sample takes from SamplingOptions."""
    guidance = {f.name: getattr(options, f.name) for f in fields(Guidance)}
    sigmas = linear_quadratic_schedule(options.steps)
    return guidance | {"sigmas": sigmas, "solver": options.solver}


def for_decoder(z, config):
    """Latents from DiT space to the VAE's. Raises InputError where they are not finite."""
    if not z.isfinite().all():
        raise InputError("the latents are not finite; lower the scales, or try --dtype float32")
    return to_vae_space(z, config.mean, config.std)


def noise_for(seed, config, frames, size):
    """(1, 12, T, H, W) standard normal, drawn on the CPU, so that every device has the same."""
    shape = 1, len(config.mean), latent_frames(frames), size[0] // 8, size[1] // 8
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_frames(frames):
    return (frames - 1) // 6 + 1


def longest_at_once(config):
    """Frames that a model makes well at once; longer videos are made in windows."""
    frames = config.sampling.get("frames", MOCHI_LONGEST)
    check_number("the weights' preferred frames", frames, int, {"low": 1})
    return frames


def to_dit_space(z, mean=MOCHI_MEAN, std=MOCHI_STD):
    """Latents (B, 12, T, H, W) from the VAE's space to the transformer's: mean 0, deviation 1."""
    return (z - per_channel(mean, z)) / per_channel(std, z)


def to_vae_space(z, mean=MOCHI_MEAN, std=MOCHI_STD):
    """The inverse of to_dit_space."""
    return z * per_channel(std, z) + per_channel(mean, z)


def per_channel(values, z):
    return torch.tensor(values, dtype=z.dtype, device=z.device)[:, None, None, None]


# ----------------------------------------------------------------------------------------------
# The video VAE: causal in time, normalised frame by frame (genmo's vae/models.py). Activations are
# (B, C, T, H, W) in channels_last_3d memory, where moving channels last is only a view.
# ----------------------------------------------------------------------------------------------

PIXELS_AT_ONCE = 480 * 848  # one frame of Mochi's: small videos go through in longer pieces


def pointwise(linear, x):
    """A 1x1x1 convolution, which genmo's files keep as a Linear; x (B, C, T, H, W)."""
    return linear(x.movedim(1, -1).to(linear.weight.dtype)).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """Over each frame by itself: 32 groups as genmo's, where that divides, else up to 8."""

    def __init__(self, channels):
        super().__init__(32 if channels % 32 == 0 else math.gcd(channels, 8), channels, eps=1e-5)

    def forward(self, x):  # (B, C, T, H, W)
        frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        if x.device.type == "cuda":  # a CPU's kernel takes float32 weights over bfloat16
            frames = frames.float()
        frames = super().forward(frames).to(x.dtype)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """Looks only back in time: the first frame is repeated in front, edges are repeated in space.

    `past` is what a network's convolutions remember of the frames that came before, so that a video
    can go through in pieces with the result of the whole; it begins as an empty dict.
    """

    def forward(self, x, past):  # (B, C, T, H, W)
        (kt, kh, kw), (st, sh, _) = self.kernel_size, self.stride
        h, w = (kh // 2, kw // 2) if sh == 1 else (0, 0)  # a down-sampling one's patches lie apart
        first = self not in past
        x = F.pad(x, (w, w, h, h, kt - 1 if first else 0, 0), mode="replicate")
        if not first:
            x = torch.cat([past[self], x], 2)
        past[self] = x[:, :, x.shape[2] - (kt - st) :].clone()
        return super().forward(x.contiguous(memory_format=torch.channels_last_3d))


class TemporalAttention(nn.Module):
    """Each pixel attends to itself in the frames so far; unit queries and keys, head width 32."""

    def __init__(self, channels):
        super().__init__()
        self.hd = math.gcd(channels, 32)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):  # (B, C, T, H, W)
        b, _, _, h, w = x.shape
        pixels = x.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B H W, T, C)
        q, k, v = self.qkv(pixels).unflatten(-1, (3, -1, self.hd)).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)  # (B H W, nh, T, hd)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.hd**-0.5)
        return self.out(o.transpose(1, 2).flatten(2)).unflatten(0, (b, h, w)).permute(0, 4, 3, 1, 2)


class AttentionBlock(nn.Module):
    """x + attention of all frames, a few rows of pixels at a time: keys and values are large."""

    ELEMENTS_AT_ONCE = 2**23
    SEQUENCES_AT_ONCE = 65535  # what CUDA's attention takes in a batch

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.attn = TemporalAttention(channels)

    def forward(self, x):  # (B, C, T, H, W)
        normed = self.norm(x)
        out = torch.empty_like(x) if torch.is_grad_enabled() else normed
        elements, sequences = x[:, :, :, 0].numel(), x.shape[0] * x.shape[4]  # of a row
        rows = min(self.ELEMENTS_AT_ONCE // elements, self.SEQUENCES_AT_ONCE // sequences)
        rows = max(rows, 1)
        for i in range(0, x.shape[3], rows):
            some = slice(i, i + rows)
            out[:, :, :, some] = x[:, :, :, some] + self.attn(normed[:, :, :, some])
        return out


class ResBlock(nn.Module):
    def __init__(self, channels, attention=False):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [GroupNorm(channels), nn.SiLU(), CausalConv3d(channels, channels, 3)]
        self.stack = nn.Sequential(*layers)
        if attention:
            self.attn_block = AttentionBlock(channels)  # a step of its own, see Encoder.steps

    def forward(self, x, past):
        h = x
        for layer in self.stack:
            h = layer(h, past) if isinstance(layer, CausalConv3d) else layer(h)
        return x + h


class DownBlock(nn.Module):
    def __init__(self, channels, to, stride, blocks, attention):
        super().__init__()
        down = CausalConv3d(channels, to, stride, stride=stride)
        self.layers = nn.ModuleList([down] + [ResBlock(to, attention) for _ in range(blocks)])


class Encoder(nn.Module):
    """encoder(video) -> (mean, logvar) of the latents, (B, 12, k+1, H/8, W/8) in the VAE's space.

    video (B, 3, 6k+1, H, W) in [-1, 1]. channels: of every resolution, full to lowest. blocks:
    residual ones at full resolution, after each down-sampling, and at the end. strides: (t, h, w)
    of each down-sampling. attention: where, like blocks.
    """

    def __init__(
        self,
        channels=(64, 128, 256, 384),
        blocks=(3, 3, 4, 6, 3),
        strides=((1, 2, 2), (2, 2, 2), (3, 2, 2)),
        attention=(False, True, True, True, True),
        latent=12,
    ):
        super().__init__()
        downs = zip(channels, channels[1:], strides, blocks[1:-1], attention[1:-1])
        self.layers = nn.ModuleList(
            [nn.Linear(15, channels[0])]
            + [ResBlock(channels[0], attention[0]) for _ in range(blocks[0])]
            + [DownBlock(*sizes) for sizes in downs]
            + [ResBlock(channels[-1], attention[-1]) for _ in range(blocks[-1])]
        )
        self.output_norm = GroupNorm(channels[-1])
        self.output_proj = nn.Linear(channels[-1], 2 * latent, bias=False)

    def forward(self, video, chunk=None):
        """chunk: frames at once; it changes the peak memory, not the result."""
        chunk = chunk or max(4, PIXELS_AT_ONCE // video[:, 0, 0].numel())
        x, causal = video, [self.embed]
        for step in self.steps():
            if isinstance(step, AttentionBlock):  # needs all frames; the steps before it do not
                x, causal = step(in_pieces(causal, x, chunk)), []
            else:
                causal.append(step)
        return in_pieces([*causal, self.project], x, chunk).float().chunk(2, dim=1)

    def steps(self):
        """The layers in order; a residual block and its attention are two."""
        for stage in self.layers[1:]:
            for layer in stage.layers if isinstance(stage, DownBlock) else [stage]:
                yield layer
                if hasattr(layer, "attn_block"):
                    yield layer.attn_block

    def embed(self, video, past):
        """The pixels, their sines and their cosines, (B, 15, T, H, W), through a Linear."""
        video = video.float()  # angles reach 800
        frequencies = 2 * math.pi * torch.tensor([2.0**6, 2.0**7], device=video.device)
        angles = (video[:, :, None] * frequencies[:, None, None, None]).flatten(1, 2)
        x = pointwise(self.layers[0], torch.cat([video, angles.sin(), angles.cos()], 1))
        return x.contiguous(memory_format=torch.channels_last_3d)

    def project(self, x, past):
        return pointwise(self.output_proj, F.silu(self.output_norm(x)))


def in_pieces(layers, x, chunk):
    """What causal layers make of x (B, C, T, H, W) in pieces of 1 + n, n, n, ... frames.

    n is about `chunk`, and a multiple of the layers' stride in time.
    """
    convolutions = [layer for layer in layers if isinstance(layer, CausalConv3d)]
    stride = math.prod(layer.stride[0] for layer in convolutions)
    n = stride * max(1, chunk // stride)
    past, outputs = {}, []
    for piece in x.tensor_split(list(range(1 + n, x.shape[2], n)), 2):
        for layer in layers:
            piece = layer(piece, past)
        outputs.append(piece)
    return torch.cat(outputs, 2)


class UpBlock(nn.Module):
    """Residual blocks, then every position unfolds into (st, sh, sw) ones (depth to space-time)."""

    def __init__(self, channels, to, expand, blocks):
        super().__init__()
        self.expand = expand
        self.blocks = nn.ModuleList([ResBlock(channels) for _ in range(blocks)])
        self.proj = nn.Linear(channels, to * math.prod(expand))

    def forward(self, x, past):
        for block in self.blocks:
            x = block(x, past)
        x = pointwise(self.proj, x).movedim(1, -1).unflatten(-1, (-1, *self.expand))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, T, st, H, sh, W, sw, C)
        x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
        if self not in past:  # the first latent frame stands for one frame
            x = x[:, :, self.expand[0] - 1 :]
        past[self] = True
        return x


class Decoder(nn.Module):
    """decoder(latents) -> video (B, 3, 6k+1, H, W), about [-1, 1].

    latents (B, 12, k+1, H/8, W/8) in the VAE's space. channels: lowest to full resolution.
    blocks: at the start, before each up-sampling, at full resolution. expand: (t, h, w) of each
    up-sampling.
    """

    def __init__(
        self,
        channels=(768, 512, 256, 128),
        blocks=(3, 6, 4, 3, 3),
        expand=((3, 2, 2), (2, 2, 2), (1, 2, 2)),
        latent=12,
    ):
        super().__init__()
        first = [CausalConv3d(latent, channels[0], 1)]
        first += [ResBlock(channels[0]) for _ in range(blocks[0])]
        ups = zip([channels[0], *channels[1:-1]], channels[1:], expand, blocks[1:-1])
        ups = [UpBlock(*sizes) for sizes in ups]
        last = [ResBlock(channels[-1]) for _ in range(blocks[-1])]
        self.blocks = nn.ModuleList([nn.ModuleList(first), *ups, nn.ModuleList(last)])
        self.output_proj = nn.Linear(channels[-1], 3)

    def forward(self, latents, chunk=None):
        return torch.cat(list(self.stream(latents, chunk)), 2)

    def stream(self, latents, chunk=None):
        """Yield the video piece by piece. chunk: latent frames at once; it changes no result."""
        pixels = 6 * 8 * 8 * latents[:, 0, 0].numel()  # of a latent frame
        past = {}
        for piece in latents.split(chunk or max(1, PIXELS_AT_ONCE // pixels), dim=2):
            x = piece.to(self.output_proj.weight)  # its dtype, and its device
            for layer in [*self.blocks[0], *self.blocks[1:-1], *self.blocks[-1]]:
                x = layer(x, past)
            yield pointwise(self.output_proj, F.silu(x)).float()


# ----------------------------------------------------------------------------------------------
# Files. A bad input is an InputError, one line for the user; nothing is left half-written.
# ----------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what to do."""


class SoundEnds(InputError):
    """The file's sound is over at that place."""


RENAMED = []  # files that get their names now: a stop waits until what belongs together is there


@contextmanager
def written_whole(path, recipe=None):
    """A temporary name beside `path` to write to: renamed at the end, removed if anything fails.

    recipe: kept in the .json beside it; then it is an InputError if `path` is there already.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    begin, ending = os.path.splitext(path)
    temporary = os.path.join(folder, f"{mark(os.getpid())}{digest(name)[:12]}{ending[:20]}")
    try:
        os.makedirs(folder, exist_ok=True)
        clear_temporaries(folder)
        yield temporary
        RENAMED.append(path)
        if recipe is not None:
            open(path, "x").close()  # claims the name, or fails; not every disk has hard links
        os.replace(temporary, path)
        if recipe is not None:
            save_json(f"{begin}.json", recipe)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
        if path in RENAMED:
            RENAMED.remove(path)


@functools.cache  # once a process, or many files in one folder would take long
def check_writable(folder):
    """The folder is there, made if need be, and takes a file. Raises InputError."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error.strerror}") from error


def mark(process):
    """How the temporary names of a process begin; its number means nothing on another machine."""
    return f".tmp-{digest(socket.gethostname())[:6]}-{process}-"


@functools.cache  # once a process: a cache has many files
def clear_temporaries(folder):
    """Remove what processes of this machine that are gone left half-written."""
    pattern = re.compile(mark(r"(\d+)"))
    for name in os.listdir(folder):
        match = pattern.match(name)
        if match and not is_running(int(match[1])):
            path = os.path.join(folder, name)
            with suppress(OSError):  # another process clears it too, or it is another user's
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def is_running(process):
    if process == os.getpid():  # writes nothing yet: one that is gone had the same number
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def save_json(path, value):
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")


def save_safetensors(path, tensors, metadata=None):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(str(error)) from error
        if metadata:
            sort_metadata(temporary)
        os.chmod(temporary, 0o644)  # the library keeps its files to their owner


def sort_metadata(path):
    """The library writes metadata in random order; sorted, equal files are equal byte by byte."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


# fmt: off
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on
SMALL_FILE = 1 << 20  # bytes; such files are read, since every mapping keeps a file open


def read_safetensors(path, readonly=False):
    """({name: tensor}, metadata) of a file; its tensors lie in a mapping, read when they are used.

    Linux counts the library's own mapping as memory, and refuses Mochi's 40 GB on a machine with
    less; this one takes memory where it is written to. readonly: no limit counts it at all, and
    writing to it ends the process. Raises InputError.
    """
    header, metadata, begin = read_header(path)
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(f"{path} has {name} as {entry['dtype']}, which is not supported here")
    with open(path, "rb") as file:
        small = os.path.getsize(path) < SMALL_FILE
        data = bytearray(file.read()) if small else mapped(file, readonly)
    return {name: view_of(data, begin, entry) for name, entry in header.items()}, metadata


def read_header(path):
    """({name: {dtype, shape, data_offsets}}, metadata, where the data begins); InputError."""
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    try:
        with safe_open(path, "numpy"):  # offsets in order, no gaps, all there
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=without_twins)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = f"{' '.join(str(error).split())[:200]}; fetch or make it again"
        raise InputError(f"{path} is not a whole safetensors file: {reason}") from error
    return header, header.pop("__metadata__", None) or {}, 8 + size


def without_twins(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def mapped(file, readonly):
    if readonly:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    noreserve = 0x4000 if sys.platform == "linux" else 0  # Python has no name for it
    how = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | noreserve, how)


def view_of(data, begin, entry):
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings(action="ignore"):  # that it is read-only, where it is
        flat = torch.frombuffer(
            data, dtype=dtype, count=count, offset=begin + entry["data_offsets"][0]
        )
    return flat.view(shape)


def read_metadata(path, metadata, key):
    """The JSON object under that key of a file's metadata; {} where there is none."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"the metadata of {path} is damaged at {key}; fetch or make it again")
    return value


class State:
    """Where a long video is: its latents, and what its solver keeps, after the last whole step.

    key: a digest of all that decides them; what is there with another key is not used. writes: by
    this process.
    """

    def __init__(self, path, key, writes=True):
        self.path, self.key, self.writes = path, key, writes

    def begin(self):
        """An empty one, which says that this video is still to be made."""
        if self.writes and not os.path.exists(self.path):
            save_safetensors(self.path, {}, {"key": self.key})

    def read(self):
        """(steps done, latents, the solver's past), or None."""
        if not os.path.exists(self.path):
            return None
        tensors, metadata = read_safetensors(self.path)
        if metadata.get("key") != self.key or not tensors:
            return None
        past = [tensors[f"past.{i}"] for i in range(len(tensors) - 1)]
        past = [kept if kept.ndim else kept.item() for kept in past]
        return int(metadata["done"]), tensors["x"], past

    def write(self, done, x, past):
        if not self.writes:
            return
        tensors = {"x": x}
        for i, kept in enumerate(past):
            exact = kept if torch.is_tensor(kept) else torch.tensor(kept, dtype=torch.float64)
            tensors[f"past.{i}"] = exact
        save_safetensors(self.path, tensors, {"key": self.key, "done": str(done)})

    def remove(self):
        if os.path.exists(self.path):
            os.remove(self.path)


def check_names(path, found, wanted):
    """One line for a missing, unknown or misshapen tensor; found, wanted: {name: shape}."""
    faults = [f"lacks {name}" for name in sorted(wanted.keys() - found)]
    faults += [f"has the unknown {name}" for name in sorted(found.keys() - wanted)]
    for name in sorted(wanted.keys() & found):
        shape, fits = list(found[name]), list(wanted[name])
        if shape != fits:
            faults.append(f"has {name} of shape {shape}, where {fits} fits")
    if faults:
        more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
        raise InputError(f"{path} {faults[0]}{more}")


def digest(value):
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path):
    """Of a file's whole content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(path, begin=0):
    """Of a file's size from byte `begin` on, and of 64 MiB spread over it: all of a small one, a
    second for 40 GB."""
    size = os.path.getsize(path) - begin
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(64):
            file.seek(begin + i * size // 64)
            found.update(file.read(1 << 20))
    return found.hexdigest()


# ----------------------------------------------------------------------------------------------
# Loading and saving models: strict both ways, sizes read off the shapes
# ----------------------------------------------------------------------------------------------


def load_dit(path, device="cpu", dtype=torch.float32, offload=False, shard=False):
    """Mochi's transformer from genmo's dit.safetensors, frozen.

    dtype: of the matrices; norms and rope frequencies stay float32. device="meta" reads shapes
    only. offload: see Offload. shard: the blocks stay in their file until shard_blocks. Raises
    InputError for a file that is missing, damaged or another's.
    """
    needed = "pos_frequencies", "x_embedder.proj.weight", "t5_yproj.weight"
    mlp_x, mlp_y = "blocks.0.mlp_x.w2.weight", "blocks.0.mlp_y.w2.weight"
    shapes, metadata = shapes_of(path, "a Mochi transformer", *needed, mlp_x)
    with torch.device("meta"), sizes_fit(path):
        depth = len(children(shapes, "blocks"))
        _, heads, _ = shapes["pos_frequencies"]
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        text_width, t5_width = shapes["t5_yproj.weight"]
        hidden = shapes[mlp_x][1], shapes.get(mlp_y, (0, None))[1]  # a single block has no mlp_y
        dit = DiT(depth, width, text_width, heads, t5_width, hidden, channels, patch)
        dit.config = read_config(path, metadata, channels)
    fill(dit, path, device, dtype, mapped="blocks." if offload or shard else None)
    if offload:
        Offload(dit, torch.device(device), dtype)
    return dit


def read_config(path, metadata, channels):
    """The ModelConfig of a file; what this code does not know is left out."""
    stored = read_metadata(path, metadata, "config")
    names = [f.name for f in fields(ModelConfig) if f.name in stored]
    config = ModelConfig(**{name: stored[name] for name in names})
    if not all(math.isfinite(n) for n in (config.fps, *config.mean, *config.std)):
        raise ValueError("fps, mean and std are not all numbers")
    if len(config.mean) != channels or len(config.std) != channels or min(config.std) <= 0:
        raise ValueError(f"mean and std do not fit {channels} channels")
    if not 1 <= config.fps <= 1000:
        raise ValueError(f"fps is {config.fps}")
    if not isinstance(config.sampling, dict) or not isinstance(config.training, dict):
        raise ValueError("sampling or training are no options")
    return config


def save_dit(dit, path, dtype=torch.bfloat16):
    """What load_dit reads: matrices as `dtype`, the rest as it is, no adapter; and dit.config."""
    adapter = adapter_parameters(dit)
    tensors = {name: t for name, t in dit.state_dict().items() if name not in adapter}
    save_safetensors(path, shrunk(tensors, dtype), {"config": json.dumps(asdict(dit.config))})


def shrunk(tensors, dtype=torch.bfloat16):
    """Only the matrices: norms, biases and rope frequencies are small."""
    small = {name for name, t in tensors.items() if t.ndim < 2 or name == "pos_frequencies"}
    return {name: t if name in small else t.to(dtype) for name, t in tensors.items()}


def save_adapter(dit, path):
    """The adapter in the authors' names; dit.adapter in the metadata.

    The authors' own metadata, `kwargs`, has no more than LoRA's ranks and alphas.
    """
    kwargs = {}
    for kind, names in LORA_TARGETS.items():
        linear = dit.blocks[0].get_submodule(names[0])
        rank = len(linear.lora_A) if isinstance(linear, LoRALinear) else 0
        kwargs[f"{kind}_lora_rank"] = rank
        kwargs[f"{kind}_lora_alpha"] = linear.alpha if rank else 0
        kwargs[f"{kind}_lora_dropout"] = 0.0
    metadata = {"kwargs": json.dumps(kwargs), "musicinfuser": json.dumps(asdict(dit.adapter))}
    save_safetensors(path, adapter_parameters(dit), metadata)


def load_adapter(dit, path, layers=None, lora_scale=1.0):
    """Put an adapter file, ours or the authors', into a model in place, also on meta; frozen.

    layers: the blocks that its ZICA follows, where the file does not say, as the authors' does not:
    their sixteen for a model of 48 blocks. lora_scale: on top of the file's own alpha / rank.
    Raises InputError for a file that does not fit.
    """
    first = "audio_projection.projection.0.weight"
    shapes, metadata = shapes_of(path, "a MusicInfuser adapter", first)
    options = read_adapter_options(dit, path, metadata, layers)
    kwargs = read_metadata(path, metadata, "kwargs")
    count = len(children(shapes, "audio_cross_attn_blocks"))
    with torch.device("meta"), sizes_fit(path):
        if count != len(options.layers):
            raise InputError(f"{path} has ZICA for {count} layers, not for {len(options.layers)}")
        attach_music(dit, options, shapes[first][1])
        dit.adapter.rank = dit.adapter.alpha = 0
        for kind in LORA_TARGETS:
            rank = lora_rank(shapes, kind)
            alpha = kwargs.get(f"{kind}_lora_alpha", rank)
            attach_lora(dit, kind, rank, lora_scale * alpha)
            if rank:  # a file need not have all kinds
                dit.adapter.rank, dit.adapter.alpha = rank, alpha
    device, dtype = dit.pos_frequencies.device, dit.t5_yproj.weight.dtype
    fill(dit, path, device, dtype, adapter_parameters(dit))
    for name, p in adapter_parameters(dit).items():
        if not p.is_meta and not p.isfinite().all():
            raise InputError(f"{path} has values in {name} that are not numbers; train it again")
    return dit


def read_adapter_options(dit, path, metadata, layers):
    """AdapterOptions of a file; what an older one lacks has its default."""
    stored = read_metadata(path, metadata, "musicinfuser")
    unknown = stored.keys() - {f.name for f in fields(AdapterOptions)}
    if unknown:
        raise InputError(f"{path} has the option {min(unknown)}, which this code does not know")
    options = AdapterOptions(**stored)
    options.layers = options.layers or layers
    if options.layers is None:
        if len(dit.blocks) != MODELS["mochi"]["depth"]:
            raise InputError(f"{path} does not say after which layers its ZICA goes; name them")
        options.layers = MUSICINFUSER_LAYERS
    check_options(options, path)
    return options


def lora_rank(shapes, kind):
    """The rank that a file's shapes tell: one for all of a kind, so that a gap is an error."""
    names = tuple(f"{name}.lora_A" for name in LORA_TARGETS[kind])
    ranks = [shape[0] for name, shape in shapes.items() if name.endswith(names)]
    return ranks[0] if ranks else 0


def load_encoder(path, device="cpu", dtype=torch.float32):
    """Mochi's VAE encoder from genmo's encoder.safetensors. Raises InputError."""
    shapes, _ = shapes_of(path, "a Mochi video encoder", "layers.0.weight", "output_proj.weight")
    layers = children(shapes, "layers")[1:]
    downs = [name for name in layers if f"{name}.layers.0.weight" in shapes]
    first = layers.index(downs[0]) if downs else 0
    blocks = [children(shapes, f"{name}.layers")[1:] for name in downs]
    blocks = [layers[:first], *blocks, layers[first + len(downs) :]]
    convolutions = [shapes[f"{name}.layers.0.weight"] for name in downs]
    attention = [any(f"{name}.attn_block.norm.weight" in shapes for name in b) for b in blocks]
    with torch.device("meta"), sizes_fit(path):
        channels = [shapes["layers.0.weight"][0]] + [shape[0] for shape in convolutions]
        strides = [shape[2:] for shape in convolutions]
        latent = shapes["output_proj.weight"][0] // 2
        encoder = Encoder(channels, [len(names) for names in blocks], strides, attention, latent)
    return fill(encoder, path, device, dtype)


def load_decoder(path, device="cpu", dtype=torch.float32):
    """Mochi's VAE decoder from genmo's decoder.safetensors. Raises InputError."""
    needed = "blocks.0.0.weight", "blocks.1.proj.weight", "output_proj.weight"
    shapes, _ = shapes_of(path, "a Mochi video decoder", *needed)
    first, *rest = children(shapes, "blocks")
    ups = [name for name in rest if f"{name}.proj.weight" in shapes]
    unfolds = [shapes[f"{name}.proj.weight"] for name in ups]  # (out, in) of each
    channels = [width for _, width in unfolds] + [shapes["output_proj.weight"][1]]
    residuals = [len(children(shapes, f"{name}.blocks")) for name in ups]
    last = children(shapes, f"blocks.{len(ups) + 1}")
    with torch.device("meta"), sizes_fit(path):
        blocks = [len(children(shapes, first)) - 1, *residuals, len(last)]
        expand = [(out // (4 * to), 2, 2) for (out, _), to in zip(unfolds, channels[1:])]
        decoder = Decoder(channels, blocks, expand, shapes["blocks.0.0.weight"][1])
    return fill(decoder, path, device, dtype)


def check_decoder(weights, config):
    """Raises InputError where a folder's decoder cannot be read, or takes other latents."""
    path = os.path.join(weights, "decoder.safetensors")
    found, made = load_decoder(path, "meta").blocks[0][0].in_channels, len(config.mean)
    if found != made:
        raise InputError(f"{path} takes latents of {found} channels, the transformer makes {made}")


def children(shapes, prefix):
    """["layers.0", "layers.1", ...]: the numbered members that a file has below a name."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    numbers = {int(match[1]) for match in map(pattern.match, shapes) if match}
    return [f"{prefix}.{i}" for i in sorted(numbers)]


def shapes_of(path, kind="", *needed):
    """({name: shape}, metadata) of a file; without the needed tensors it is not of that kind."""
    header, metadata, _ = read_header(path)
    for name in needed:
        if name not in header:
            raise InputError(f"{path} is not {kind}: it lacks {name}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}, metadata


@contextmanager
def sizes_fit(path):
    """What no model can have makes its constructor fail."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise InputError(f"{path} has what no such model has ({error})") from error


def fill(module, path, device, dtype, names=None, mapped=None):
    """Read a module's parameters, on the meta device, from a file that has no others; frozen.

    dtype: see dtype_in. names: of the parameters; all. What needs no conversion, and all whose name
    begins with `mapped`, stays in the file. device="meta" only checks the shapes.
    """
    names = [name for name, _ in module.named_parameters()] if names is None else names
    check_names(path, shapes_of(path)[0], {n: module.get_parameter(n).shape for n in names})
    module.requires_grad_(False)
    if torch.device(device).type == "meta":
        return module
    tensors, _ = read_safetensors(path, readonly=bool(mapped))
    for name in names:
        tensor = tensors[name]
        if not (mapped and name.startswith(mapped)):
            tensor = tensor.to(device, dtype_in(module, name, dtype))
        put_weights(module, {name: tensor})
    return module


def dtype_in(module, name, dtype):
    """Of a parameter of that name: matrices are `dtype`, norms and rope frequencies float32."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return dtype if isinstance(owner, (nn.Linear, nn.Conv2d, nn.Conv3d)) else torch.float32


def put_weights(module, weights):
    """Frozen parameters in place of those of these names."""
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))


# ----------------------------------------------------------------------------------------------
# A model larger than the GPU, and a faster one: wrapped around DiT.layer, outside of it
# ----------------------------------------------------------------------------------------------


class Offload:
    """Frozen blocks stay in host memory, or in their file, until they are used.

    On a GPU the next block is copied while this one computes; two are there at most. On a CPU a
    block is converted from its file when it is used, and nothing is kept. The outputs are the same,
    bit for bit.
    """

    def __init__(self, dit, device, dtype):
        self.blocks, self.device, self.dtype, self.inner = dit.blocks, device, dtype, dit.layer
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last, self.ahead = 0, {}  # the block used last; {the one fetched ahead: its weights}
        for block in self.blocks if self.stream else ():
            put_weights(block, pinned(converted(block, dtype)))
        dit.layer = self

    def __call__(self, i, *inputs):
        block = self.blocks[i]
        stored = frozen_weights(block)
        put_weights(block, self.fetch(i))
        try:
            return self.inner(i, *inputs)
        finally:
            put_weights(block, stored)

    def fetch(self, i):
        if self.stream is None:
            return converted(self.blocks[i], self.dtype)
        compute = torch.cuda.current_stream(self.device)
        compute.synchronize()  # the block before this one is done with
        weights = self.ahead.pop(i, None)
        self.ahead.clear()  # what was fetched in vain goes first, or there would be three
        with torch.cuda.stream(self.stream):
            weights = weights or self.copied(i)
            compute.wait_stream(self.stream)
            following = self.following(i)
            self.ahead[following] = self.copied(following)
        self.last = i
        for weight in weights.values():
            weight.record_stream(compute)
        return weights

    def following(self, i):
        """The block that is likely next: forward passes count up, backward passes down."""
        forward = i == 0 or i > self.last
        return (i + 1) % len(self.blocks) if forward else i - 1

    def copied(self, i):
        weights = frozen_weights(self.blocks[i])
        return {name: w.to(self.device, non_blocking=True) for name, w in weights.items()}


def frozen_weights(block):
    return {name: p.detach() for name, p in block.named_parameters() if "lora_" not in name}


def converted(block, dtype, device=None):
    weights = frozen_weights(block)
    return {name: w.to(device, dtype_in(block, name, dtype)) for name, w in weights.items()}


def pinned(weights):
    """The same in one page-locked buffer: pinned one by one, each would take a power of two."""
    sizes = [-(-w.nbytes // 16) * 16 for w in weights.values()]
    buffers = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True).split(sizes)
    views = {}
    for (name, weight), buffer in zip(weights.items(), buffers):
        views[name] = buffer[: weight.nbytes].view(weight.dtype).view(weight.shape)
        views[name].copy_(weight)
    return views


def checkpoint_layers(dit):
    """Keep only the inputs of each layer for the backward pass, which computes the rest again.

    Where the blocks are offloaded to a GPU, the inputs wait in host memory too.
    """
    inner = dit.layer
    to_host = isinstance(inner, Offload) and inner.stream

    def layer(*inputs):
        if not torch.is_grad_enabled():
            return inner(*inputs)
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if to_host else nullcontext():
            return checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=False)

    dit.layer = layer


def compile_blocks(dit):
    """Compile each block when it is first used. Raises InputError where a compiler is missing."""
    if dit.pos_frequencies.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("compiling for a CPU takes g++, which is missing; leave out --compile")
    # With text or without, padded or not, with gradients or without, the last block: 16 variants
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for block in dit.blocks:
        block.compile(dynamic=True)


# ----------------------------------------------------------------------------------------------
# Several processes, started by torchrun: one video over all of them, or one model
# ----------------------------------------------------------------------------------------------


def join_processes(options):
    """(rank, count) of this process; its own GPU is the device "cuda", only rank 0 prints."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return 0, 1
    if not count.isdecimal() or not {"LOCAL_RANK", "RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise InputError("WORLD_SIZE is set, but this is not torchrun; unset it")
    backend = "gloo"
    if torch.device(options.device).type == "cuda":
        backend, options.device = "nccl", "cuda"
        take_own_gpu()
    if not dist.is_initialized():
        # Some wait long: the first makes a cache for all
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return dist.get_rank(), dist.get_world_size()


def take_own_gpu():
    """Of several processes here each computes on its own: what "cuda" means from then on. Raises
    InputError where there are more of them than GPUs."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        hint = f"torchrun --nproc_per_node {gpus}"
        raise InputError(f"each process takes a GPU, and {gpus} are here for {here}; {hint}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def leave_processes():
    """End this process, where it is one of several, without the interpreter's own last steps: a
    thread of gloo's that lets go of a tensor during these would abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class TokenParallel:
    """Each process holds a share of the visual tokens, and all of the text.

    Attention trades tokens for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509); all else works
    token by token. Raises InputError where the processes do not divide the heads.
    """

    def __init__(self, dit):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.whole = dit.prepare
        heads = dit.blocks[0].attn.heads
        if heads % self.count:
            raise InputError(f"{self.count} processes do not divide the model's {heads} heads")
        dit.prepare = self.prepare
        dit.x_embedder.register_forward_hook(lambda module, inputs, x: self.own(x))
        dit.final_layer.register_forward_pre_hook(self.gather)
        for block in dit.blocks:
            block.attn.attend = partial(self.attend, block.attn.attend)

    def prepare(self, shape, *inputs):
        conditions = self.whole(shape, *inputs)
        n = len(conditions.rope)
        self.sizes = [len(share) for share in torch.arange(n).tensor_split(self.count)]
        rope, frames = self.own(conditions.rope[None])[0], self.own(conditions.frames[None])[0]
        return replace(conditions, rope=rope, frames=frames)

    def own(self, x):  # (B, N, ...)
        return x.split(self.sizes, 1)[self.rank]

    def gather(self, module, inputs):  # x (B, n, D) -> (B, N, D)
        x, *rest = inputs
        return torch.cat(self.exchange([x] * self.count, 1), 1), *rest

    def attend(self, inner, q, k, v, mask):  # (B, n + L, nh, hd)
        n, total = self.sizes[self.rank], sum(self.sizes)
        qkv = torch.stack([q, k, v])
        visual = self.exchange(qkv[:, :, :n].chunk(self.count, 3), 2)
        text = qkv[:, :, n:].chunk(self.count, 3)[self.rank]
        o = inner(*torch.cat([*visual, text], 2), mask)  # (B, N + L, nh / count, hd)
        visual = self.exchange(o[:, :total].split(self.sizes, 1))
        text = self.exchange([o[:, total:]] * self.count)
        return torch.cat([torch.cat(visual, 2), torch.cat(text, 2)], 1)

    def exchange(self, parts, tokens=None):
        """Part i goes to process i; what comes has as many `tokens` as its sender holds."""
        shapes = [list(parts[self.rank].shape) for _ in parts]
        for shape, size in zip(shapes, self.sizes):
            if tokens is not None:
                shape[tokens] = size
        lengths = [math.prod(shape) for shape in shapes]
        sent = torch.cat([part.flatten() for part in parts])
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, lengths, [part.numel() for part in parts])
        return [flat.view(shape) for flat, shape in zip(received.split(lengths), shapes)]


class BranchParallel:
    """Each process computes some of the guidance's branches; the only exchange is their sum.

    Raises InputError where there are more processes than branches.
    """

    def __init__(self, dit):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        dit.mix = self.mix

    def mix(self, branches, x, sigma):
        n, hint = len(branches), "share its tokens out instead: --split tokens"
        if n < self.count and sigma[0] == 1:  # where every branch guides
            raise InputError(f"the guidance has {n} branches for {self.count} processes; {hint}")
        own = branches[self.rank :: self.count]
        v = mixed(own, x, sigma) if own else torch.zeros_like(x)
        dist.all_reduce(v)
        return v


def shard_blocks(dit, device, dtype):
    """Each process keeps its share of every frozen block, fetched when it is used (FSDP2).

    For load_dit(..., shard=True) with its adapter, which stays whole in every process.
    """
    from torch.distributed.fsdp import fully_shard  # here, because it takes a second

    trained = set(adapter_parameters(dit).values())
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in dit.blocks:
        put_weights(block, converted(block, dtype, device))
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


# ----------------------------------------------------------------------------------------------
# Text and music, through transformers; each encoder is loaded, used and let go
# ----------------------------------------------------------------------------------------------

TEXT_TOKENS = 256  # Mochi's longest prompt
SAMPLE_RATE = 16000  # what Wav2Vec 2.0 hears


def from_pretrained(cls, folder, **more):
    """A class of transformers from a local folder only, strictly, running nobody's code."""
    import transformers  # here, because it takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not os.path.isdir(folder):
        raise InputError(f"no such folder: {folder}")
    more |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return getattr(transformers, cls).from_pretrained(folder, **more)
    except Exception as error:  # transformers raises many kinds for a folder that lacks something
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {cls} from {folder}: {reason}") from error


def load_pretrained_model(cls, folder, device, dtype=torch.float32, **config):
    """A model of transformers. Raises InputError where a tensor is missing or wrong.

    config: what it has in place of the file's.
    """
    how = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = from_pretrained(cls, folder, **how, **config)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:  # they would be random
            raise InputError(f"{folder} is not a whole {cls}: {kind} {min(map(str, info[kind]))}")
    return model.to(device).eval()


def load_text_encoder(folder, device):
    """A T5 that computes in float32, as the official code's.

    In host memory it stays in its file, in the file's own dtype, and only the block that computes
    becomes float32: all of T5-XXL would take 19 GB.
    """
    dtypes = set()
    for path in safetensors_in(folder):
        tensors, _ = read_safetensors(path, readonly=True)
        dtypes |= {t.dtype for t in tensors.values() if t.is_floating_point()}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    t5 = load_pretrained_model("T5EncoderModel", folder, "cpu", widest)
    if torch.device(device).type != "cpu":
        return t5.to(device, torch.float32)
    for name, p in t5.named_parameters():
        if ".block." not in name:
            p.data = p.data.float()
    for block in t5.encoder.block:
        float32_while_computing(block)
    return t5


def float32_while_computing(block):
    stored = frozen_weights(block)

    def before(*_):
        put_weights(block, {name: weight.float() for name, weight in stored.items()})

    def after(*_):
        put_weights(block, stored)

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def safetensors_in(folder):
    """Not those that a killed process left half-written."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if name.endswith(".safetensors")]
    return [os.path.join(folder, name) for name in names if not name.startswith(".tmp")]


def encode_text(weights, prompts, device="cpu"):
    """[(y_feat (1, L, D_text) float32, y_mask (1, L) bool)] of the prompts, by text_encoder/.

    float32 on any device, as the official code; see text_device. At most 256 tokens, with a
    warning where the rest is cut. An empty prompt has no valid token.
    """
    return list(encoded_texts(weights, prompts, device))


@torch.no_grad()
def encoded_texts(weights, prompts, device="cpu"):
    """encode_text, one prompt after another."""
    tokenizer = from_pretrained("AutoTokenizer", os.path.join(weights, "tokenizer"))
    t5 = load_text_encoder(os.path.join(weights, "text_encoder"), device)
    if len(tokenizer) > t5.config.vocab_size:
        raise InputError(f"{weights}/tokenizer has more tokens than {weights}/text_encoder knows")
    for prompt in prompts:
        prompt = prompt.encode(errors="replace").decode()  # half a character, as of bad bytes
        ids = tokenizer(prompt).input_ids if prompt.strip() else [0]
        if len(ids) > TEXT_TOKENS:
            cut = f"the prompt has {len(ids)} tokens, only the first {TEXT_TOKENS} are used"
            print(f"warning: {cut}", file=sys.stderr)
            ids = ids[: TEXT_TOKENS - 1] + ids[-1:]  # the last one ends the sentence
        ids = torch.tensor([ids], device=device)
        mask = torch.full_like(ids, bool(prompt.strip()), dtype=torch.bool)
        yield t5(ids).last_hidden_state.float(), mask


def text_device(weights, device):
    """Where the text encoder goes: the GPU, or host memory where it would not fit there."""
    if torch.device(device).type != "cuda":
        return device
    files = safetensors_in(os.path.join(weights, "text_encoder"))
    size = sum(map(os.path.getsize, files))
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2.2 * size < free else "cpu"  # a file may have two bytes a number


class AudioEncoder:
    """weights/audio_encoder, a Wav2Vec 2.0: waveform (samples,) at 16 kHz -> (1, A, D_audio).

    About 50 tokens a second, float32. version: raise it where the same files give other tokens.
    """

    version = 1

    def __init__(self, weights, device="cpu"):
        folder = os.path.join(weights, "audio_encoder")
        self.normalise = from_pretrained("Wav2Vec2FeatureExtractor", folder)
        if self.normalise.sampling_rate != SAMPLE_RATE:
            rate = self.normalise.sampling_rate
            raise InputError(f"{folder} is for sound at {rate} Hz; Wav2Vec 2.0's is {SAMPLE_RATE}")
        training = {"mask_time_prob": 0, "mask_feature_prob": 0}  # the released file lacks its mask
        self.wav2vec = load_pretrained_model("Wav2Vec2Model", folder, device, **training)

    @torch.no_grad()
    def __call__(self, waveform):
        how = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt"}
        try:
            prepared = self.normalise(waveform.numpy(), **how)
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # of values in its file
            name = "audio_encoder's preprocessor_config.json"
            raise InputError(f"the {name} is not Wav2Vec 2.0's ({error})") from error
        return self.wav2vec(prepared.input_values.to(self.wav2vec.device)).last_hidden_state


# ----------------------------------------------------------------------------------------------
# Video and sound, through the ffmpeg that imageio brings
# ----------------------------------------------------------------------------------------------

# Formats that hold media themselves: a playlist could name other files, or the network
# fmt: off
MEDIA_FORMATS = (
    "mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts,mpegvideo,h264,hevc,m4v,flv,asf,gif,dv,mxf,ivf,"
    "yuv4mpegpipe,nut,rm,ogg,wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr,ape,wv,tta,voc"
)
# fmt: on
STEREO_RATE = 44100  # of the song in a video
DAY = 24 * 3600  # seconds


def ffmpeg_command(path, *arguments):
    """ffmpeg on a local media file, whatever its name; quiet, no questions, no network."""
    ffmpeg = None
    with suppress(RuntimeError):
        ffmpeg = shutil.which(get_ffmpeg_exe())
    if not ffmpeg:
        raise InputError("there is no ffmpeg; pip install imageio[ffmpeg] brings one")
    allowed = ["-protocol_whitelist", "file,pipe", "-format_whitelist", MEDIA_FORMATS]
    source = [*allowed, "-i", "file:" + os.path.abspath(path)]
    return [ffmpeg, "-v", "error", "-nostdin", *source, *map(str, arguments)]


def ffmpeg(path, *arguments, purpose="be converted"):
    """What ffmpeg writes to its standard output. InputError: the path cannot `purpose`."""
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    run = subprocess.run(ffmpeg_command(path, *arguments), capture_output=True)
    if run.returncode:
        raise InputError(f"{path} cannot {purpose} ({first_complaint(run.stderr)})")
    return run.stdout


def first_complaint(stderr):
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[0] if lines else "ffmpeg failed"


def decode_audio(path, start=0.0, seconds=None):
    """(channels, samples) float32 and their rate, from any file that ffmpeg reads. InputError."""
    cut = ["-ss", f"{start:.6f}"] + ([] if seconds is None else ["-t", f"{seconds:.6f}"])
    # Silence where a video's sound begins late or has a gap, so that it stays with the picture
    how = "-map 0:a:0 -af aresample=async=1:first_pts=0 -map_metadata -1 -c:a pcm_f32le".split()
    how += ["-f", "wav", "-"]
    try:
        wav = ffmpeg(path, *cut, *how, purpose="be read as audio")
    except InputError as error:
        if "matches no streams" not in str(error):
            raise
        raise InputError(f"{path} has no sound") from error
    channels, rate = int.from_bytes(wav[22:24], "little"), int.from_bytes(wav[24:28], "little")
    samples = np.frombuffer(wav, "<f4", offset=wav.index(b"data") + 8)  # after the stream's header
    sound = torch.from_numpy(samples.reshape(-1, channels).T.copy())
    if not sound.numel():
        raise SoundEnds(f"{path} has no sound at {start:g} s; choose an earlier start")
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path} has sound at {rate} Hz; convert it, or use another")
    if not sound.isfinite().all():
        raise InputError(f"{path} has samples that are not numbers; convert it, or use another")
    return sound, rate


def played(sound, rate, speed, to):
    """Sound (..., samples) at another speed, its pitch rising with it, and at another rate."""
    ratio = Fraction(rate * speed / to).limit_denominator(1000)
    return torchaudio.functional.resample(sound, ratio.numerator, ratio.denominator)


def load_audio(path, start=0.0, seconds=None, speed=1.0, rate=SAMPLE_RATE):
    """(samples,) float32, the mean of the channels, from any audio or video file.

    start: in the song's own seconds. seconds: of what is returned; fewer come where the song ends.
    speed: 1.25 plays it faster, the pitch rising with it. Raises InputError.
    """
    sound, own_rate = decode_audio(path, start, seconds and seconds * speed)
    samples = played(sound.mean(0), own_rate, speed, rate)
    return samples if seconds is None else samples[: math.ceil(seconds * rate)]


def audio_seconds(frames, fps=30):
    """The music that goes with a clip: the clip and 0.09 s more (the authors' preprocessing)."""
    return frames / fps + 0.09


def music_window(path, frames, fps=30, start=0.0, speed=1.0):
    """(samples,) at 16 kHz for a clip, padded with silence, and the seconds of music in them."""
    seconds = audio_seconds(frames, fps)
    waveform = load_audio(path, start, seconds, speed)
    length = math.ceil(seconds * SAMPLE_RATE)
    return F.pad(waveform, (0, length - len(waveform))), len(waveform) / SAMPLE_RATE


def count_frames(path, fps=30):
    """How many frames a video has at `fps`, without decoding it. Raises InputError."""
    how = "-map 0:v:0 -c copy -f framecrc -".split()
    packets = ffmpeg(path, *how, purpose="be read as video").decode()
    hidden = r"F=0x[0-9a-f]*[4-7c-f]\b"  # by an edit list, as where a video was cut without coding
    visible = rf"^0,\s*\S+\s+(-?\d+),\s*(\d+)(?!.*{hidden})"  # when, and for how long
    times = re.findall(visible, packets, re.M)
    if not times:
        return 0
    unit = Fraction(re.search(r"^#tb 0: (\S+)", packets, re.M)[1])  # seconds
    ends = [int(start) + int(length) for start, length in times]
    seconds = (max(ends) - min(int(start) for start, _ in times)) * unit
    if seconds > DAY:  # a damaged file, whose frames would fill any memory
        raise InputError(f"{path} says that it lasts {float(seconds) / 3600:,.0f} hours; cut it")
    return round(seconds * fps)


def read_frames(path, height, width, fps=30, crop=None):
    """Yield a video's frames, uint8 (height, width, 3), at `fps`. Raises InputError.

    They show the middle at that aspect ratio; crop: (x, y, width, height) as fractions, before it.
    """
    x, y, w, h = crop or (0, 0, 1, 1)
    filters = f"fps={fps},crop=iw*{w}:ih*{h}:iw*{x}:ih*{y}"
    filters += f",crop='min(iw,ih*{width}/{height})':'min(ih,iw*{height}/{width})'"
    filters += f",scale={width}:{height}:flags=area"
    how = ["-map", "0:v:0", "-vf", filters, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    size = height * width * 3
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(ffmpeg_command(path, *how), **pipes) as run:
            while len(frame := run.stdout.read(size)) == size:
                yield np.frombuffer(frame, np.uint8).reshape(height, width, 3).copy()
        if run.returncode:
            errors.seek(0)
            reason = first_complaint(errors.read())
            raise InputError(f"{path} cannot be read as video ({reason})")


def to_pixels(video):
    """(3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3), rounded."""
    pixels = (video.clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(1, 2, 3, 0).cpu().numpy()


def from_pixels(frames):
    """uint8 (T, H, W, 3) -> (3, T, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def save_video(path, video, fps=30, song=None, start=0.0, speed=1.0, recipe=None):
    """H.264 (yuv420p), with the song, cut or silenced to the picture's length, as AAC.

    video: (3, T, H, W) in [-1, 1], or an iterable of such pieces, which are written as they come.
    recipe: what to keep in the .json beside it; then it is written over no other file.
    Written whole or not at all. Raises InputError where it cannot.
    """
    with written_whole(path, recipe) as temporary, folder_beside(temporary) as folder:
        silent = os.path.join(folder, "silent.mp4") if song else temporary
        count = write_frames(silent, [video] if torch.is_tensor(video) else video, fps)
        if song:
            raw = os.path.join(folder, "song.raw")
            stereo_samples(song, start, count / fps, speed).tofile(raw)
            join = ["-f", "s16le", "-ar", STEREO_RATE, "-ac", 2, "-i", raw]
            join += ["-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac"]
            ffmpeg(silent, *join, "-f", "mp4", "-y", temporary)


def folder_beside(temporary):
    """A folder on the same disk, which goes at the end, or with the next run."""
    return tempfile.TemporaryDirectory(prefix=mark(os.getpid()), dir=os.path.dirname(temporary))


def write_frames(path, pieces, fps):
    """Write pieces (3, t, H, W) to a silent mp4; returns the number of frames."""
    options = {"codec": "libx264", "pixelformat": "yuv420p", "quality": None, "macro_block_size": 2}
    options |= {"output_params": ["-crf", "16"], "ffmpeg_log_level": "quiet"}
    count = 0
    with imageio.get_writer(path, format="FFMPEG", fps=fps, **options) as writer:
        for piece in pieces:
            for frame in to_pixels(piece):
                writer.append_data(frame)
                count += 1
    # imageio does not say when its ffmpeg fails at the end, as on a full disk
    if not os.path.exists(path) or count_frames(path, fps) != count:
        raise OSError("the video could not be written whole; is the disk full?")
    return count


def stereo_samples(song, start, seconds, speed):
    """(samples, 2) int16, of exactly that length."""
    sound, rate = decode_audio(song, start, seconds * speed)
    sound = played(sound[:2].expand(2, -1), rate, speed, STEREO_RATE)
    length = round(seconds * STEREO_RATE)
    sound = F.pad(sound, (0, length - sound.shape[1]))  # a negative number cuts
    return sound.clamp_(-1, 1).mul_(32767).round_().short().T.numpy()  # in place: songs are long


# ----------------------------------------------------------------------------------------------
# What every run begins with: its options, from the class, the weights folder and the user
# ----------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OFF = (None, False, (), "")  # values that say nothing


@dataclass
class RunOptions:
    """Which weights, and where they run."""

    weights: str = option(None, "default: weights/ if a model is there, else tiny/", line="weights")
    device: str = option(None, "default: cuda if there is one, else cpu", line="device")
    dtype: str = option(None, "default: bfloat16 on a GPU", choices=tuple(DTYPES), line="device")
    offload: bool = option(False, "keep the blocks in host memory, or in their file", line="device")
    compile: bool = option(False, "compile the blocks: slow at first, then faster", line="device")


def begin(cls, kind, given):
    """The options of a run and its transformer on the meta device. Raises InputError.

    cls: a dataclass on top of RunOptions. kind: "sampling" or "training", what dit.config prefers.
    given: {name: value} by the user.
    """
    weights = given.get("weights") or default_weights()
    dit = load_dit(os.path.join(weights, "dit.safetensors"), "meta")
    options = settle(cls, getattr(dit.config, kind), given | {"weights": os.path.normpath(weights)})
    options.device, options.dtype = choose_device(options.device, options.dtype)
    return options, dit


def settle(cls, preferred, given):
    """Options: the class's defaults, over these what the weights prefer, then what was given."""
    defaults = {f.name: f.default for f in fields(cls)}
    chosen = {name: value for name, value in preferred.items() if name in defaults}
    for name, value in given.items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"there is no option {name}{hint}")
        if value is not None or defaults[name] is None:  # None is a value only where it is one
            chosen[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    for name, value in chosen.items():
        chosen[name] = tuple(value) if isinstance(value, (list, range)) else value
    options = cls(**chosen)
    check_options(options)
    return options


def check_options(options, where=""):
    """Raises InputError for a value that its field's type or limits rule out."""
    for f in fields(options):
        value, limits = getattr(options, f.name), f.metadata
        name = f"{where} {f.name}" if where else flag_of(f)
        if value is None and f.default is None:
            continue
        if f.type in (int, float):
            check_number(name, value, f.type, limits)
        elif "choices" in limits and value not in limits["choices"]:
            raise InputError(f"{name} must be one of {', '.join(limits['choices'])}, not {value}")
        else:
            check_kind(name, value, f.type, limits.get("parse", int))
    if isinstance(options, VideoOptions):
        check_sizes(options.frames, options.size)


def check_kind(name, value, kind, parse):
    """Of anything but a number; parse: of what a tuple holds. Files can hold other kinds."""
    items = ()
    if kind is tuple and isinstance(value, tuple):
        items = value
    elif not isinstance(value, (str, list, tuple) if kind is list else kind):
        raise InputError(f"{name} cannot be {value!r}")
    for item in items:
        number = isinstance(item, (parse, int)) and not isinstance(item, bool)
        if not (isinstance(item, str) if parse is str else number):
            raise InputError(f"{name} cannot hold {item!r}")


def check_number(name, value, kind, limits):
    number = isinstance(value, (kind, int)) and not isinstance(value, bool)
    if not number or not -math.inf < value < math.inf:  # a whole one may be beyond any float
        whole = "whole " if kind is int else ""
        raise InputError(f"{name} must be a {whole}number, not {value!r}")
    low, high = limits.get("low", -math.inf), limits.get("high", 2**63 - 1)
    if value < low:
        raise InputError(f"{name} must be {low} or more, not {value}")
    if value > high:
        raise InputError(f"{name} must be {high} or less, not {value}")
    if "above" in limits and value <= limits["above"]:
        raise InputError(f"{name} must be more than {limits['above']}, not {value}")


def check_sizes(frames, size):
    if frames < 1 or frames % 6 != 1:
        low = max((frames - 1) // 6 * 6 + 1, 1)
        raise InputError(f"frames must be 6k + 1, such as {low} or {low + 6}, not {frames}")
    if len(size) != 2 or any(side % 16 or not 16 <= side <= 8192 for side in size):
        limits = "height and width must be multiples of 16, up to 8192"
        raise InputError(f"{limits}, not {shown('size', size)}")


def flag_of(f):
    return f.metadata.get("flag", "--" + f.name.replace("_", "-"))


def parser_for(cls, description):
    """An argparse parser with a flag for each field; its result has only what was given."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in fields(cls):
        text = f.metadata["help"]
        if f.default not in OFF:
            text += f" (default {shown(f.name, f.default)})"
        how = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if f.metadata.get("positional"):
            parser.add_argument(f.name, nargs="?", **how)
        else:
            parser.add_argument(flag_of(f), dest=f.name, **how, **parsing(f))
    return parser


def parsing(f):
    """How argparse reads a field's value."""
    if f.type is bool:
        return {"action": "store_true"}
    if f.name == "size":
        return {"type": height_by_width, "metavar": "HxW"}
    if f.type is tuple:
        return {"type": f.metadata["parse"], "nargs": "+"}
    if f.type in (int, float):
        return {"type": partial(number, f), "metavar": f.type.__name__.upper()}
    return {"choices": f.metadata.get("choices")}


def number(f, text):
    if f.default is None and text.lower() == "none":
        return None
    try:
        return f.type(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid {f.type.__name__} value: {text}") from error


def height_by_width(text):
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH, such as 480x848")
    return int(match[1]), int(match[2])


def shown(name, value):
    if value is True:
        return ""
    if isinstance(value, (list, tuple)):
        return ("x" if name == "size" else " ").join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_options(options):
    """The first lines of a run: what is on, grouped by the fields' `line`."""
    lines = {}
    for f in fields(options):
        value, line = getattr(options, f.name), f.metadata.get("line")
        if line and (value not in OFF or type(value) in (int, float)):
            name = "" if f.name == line else f.name.replace("_", " ")
            lines.setdefault(line, []).append(f"{name} {shown(f.name, value)}".strip())
    for line, words in lines.items():
        print(f"{line:8} {', '.join(words)}")


def default_weights():
    """weights/ where that holds a dit.safetensors, else tiny/, both beside this file."""
    here = os.path.dirname(os.path.abspath(__file__))
    full = os.path.exists(os.path.join(here, "weights", "dit.safetensors"))
    return os.path.relpath(os.path.join(here, "weights" if full else "tiny"))


def choose_device(device=None, dtype=None):
    """Names: cuda where there is one, else cpu; bfloat16 on a GPU, else float32; unless told."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings(action="ignore"):
        try:
            kind = torch.device(device).type
            if kind == "meta":
                raise RuntimeError("it computes nothing")
            if kind == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
                take_own_gpu()  # before anything is on the first
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"no device {device} here ({reason}); try --device cpu") from error
    if dtype is None:
        dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return device, dtype


class OwnMemory(threading.Thread):
    """Watches the process's own memory, in bytes: a mapped file's pages are not counted."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self):
        while True:
            self.look()
            time.sleep(0.05)

    def look(self):
        with open("/proc/self/status") as file:
            sizes = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", file.read(), re.M)
        self.peak = max(self.peak, 1024 * sum(map(int, sizes)))
        return self.peak


own_memory = OwnMemory() if os.path.exists("/proc/self/status") else None


def peak_memory(device):
    """Gigabytes so far: of the GPU, else of the process itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if own_memory:
        return own_memory.look() / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on a Mac


def main(function):
    """Run a script's function: what the user can mend ends in one line and a non-zero exit."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("error: Python 3.11 or newer is needed")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names of other alphabets
    for name in ("SIGINT", "SIGTERM", "SIGALRM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    sys.unraisablehook = swallowed
    try:
        function()
        leave_processes()
        sys.stdout.flush()
    except InputError as error:
        sys.exit("error: " + " ".join(str(error).split())[:600])
    except (MemoryError, RuntimeError) as error:
        kinds = MemoryError, torch.OutOfMemoryError
        if not isinstance(error, kinds) and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; fewer frames, a smaller size or --offload take less")
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        ring_in(0)
        sys.exit("stopped")


def stop(number, frame):
    """KeyboardInterrupt, and again in five seconds: the clean-up of some libraries swallows it."""
    if RENAMED:
        return ring_in(0.1)
    ring_in(5)
    raise KeyboardInterrupt


def swallowed(raised):
    """What a clean-up raised is printed, but for a KeyboardInterrupt, which comes again."""
    if raised.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(raised)


def ring_in(seconds):
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # 0: never
