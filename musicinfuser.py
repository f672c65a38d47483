"""MusicInfuser (arXiv 2503.14505) in one file: Mochi 1 made to listen.

Mochi's diffusion transformer and video VAE, the zero-initialised cross-attention to music (ZICA) and the LoRA
that adapt it, the noise schedules, guidance and ODE solver, the text and music encoders, and the files.
Top to bottom:   files | device and sizes | video VAE | diffusion transformer | ZICA and LoRA |
                 noise, loss, guidance, solver | text and music | video and sound

Shapes in the comments:
    B batch     T latent frames, 1 + (frames - 1) / 6     H, W latent height and width, pixels / 8     C channels
    N visual tokens, T * H/2 * W/2, T slowest     L text tokens     A audio tokens, 50 a second
    D visual width     Dy text stream's width     nh heads     hd head width

Mochi is a rectified flow: x = (1 - sigma) z + sigma eps with sigma in [0, 1], and the network's velocity v
estimates z - eps. The paper writes denoisers D(x; sigma) = x + sigma v, so its Eqs. 2, 3 and 4 hold in v as they
stand. Tensors keep genmo's names and the authors', so that their files load as they are.
"""

import argparse
import json
import math
import mmap
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from imageio_ffmpeg import count_frames_and_secs, get_ffmpeg_exe
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------------
# Files: a bad input is an InputError, which the scripts print as one line; nothing is ever left half-written
# ------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what to do."""


def main(function):
    """Run a script's `function()`: an InputError, a full disk or Ctrl-C end it with one line and a non-zero exit."""
    try:
        function()
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if type(error) is RuntimeError and not out_of_memory:
            raise
        hint = "; fewer frames, a smaller size, or --offload where there is one, take less" if out_of_memory else ""
        sys.exit("error: " + " ".join(str(error).split())[:600] + hint)
    except KeyboardInterrupt:
        sys.exit("stopped")


@contextmanager
def written_whole(path):
    """A temporary name beside `path` to write to; renamed to `path` at the end, removed if anything goes wrong."""
    path = os.path.abspath(path)
    temporary = os.path.join(os.path.dirname(path), f".tmp{os.getpid()}-{os.path.basename(path)}")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_safetensors(path, tensors, metadata=None):
    with written_whole(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(str(error)) from error
        with open(temporary, "r+b") as file:  # the library's order of metadata is random
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted((metadata or {}).items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if metadata and len(text) <= size:
                file.seek(8)
                file.write(text.ljust(size))
        os.chmod(temporary, 0o644)  # the library keeps its files to their owner


def save_json(path, value):
    with written_whole(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
# A mapping that is written to only in memory, and takes none before it is (Python has no name for Linux's number)
READ_AND_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_PRIVATE_NORESERVE = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)


def read_safetensors(path, readonly=False):
    """({name: tensor}, metadata); the tensors lie in a mapping of the file, so nothing is read before it is used and no
    memory is taken before it is written to. (Linux counts the library's own mapping as memory at once, and refuses
    Mochi's 40 GB on a machine with less.) readonly: no limit counts the mapping, and writing to it ends the process.
    Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            how = (mmap.MAP_SHARED, mmap.PROT_READ) if readonly else (MAP_PRIVATE_NORESERVE, READ_AND_WRITE)
            data = mmap.mmap(file.fileno(), 0, *how)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            dtype, (first, last) = SAFETENSORS_DTYPES[entry["dtype"]], entry["data_offsets"]
            if begin + last > len(data) or last - first != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{name} is not all there")
            count = math.prod(entry["shape"])
            with warnings.catch_warnings(action="ignore"):  # that it is read-only, where it is
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin + first) if count else torch.empty(0)
            tensors[name] = flat.to(dtype).view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); fetch or make it again") from error
    return tensors, metadata


def check_names(path, found, wanted):
    """One line for a missing, extra or misshapen tensor. found, wanted: {name: shape}."""
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has the unknown", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path} {what} {sorted(names)[0]}{more}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError(f"{path} has {name} of shape {list(found[name])}, where {list(shape)} fits")


def fill(module, path, names, device, dtype, host=()):
    """Read `names` from `path` into a module on the meta device, one tensor at a time, frozen.

    The weights of Linear and Conv layers and the adapter's become `dtype`; norms and rope frequencies stay float32.
    A tensor that needs no conversion stays mapped in its file. device="meta" reads the shapes only. Names that begin
    with `host` stay where Offload takes them from: pinned memory for a GPU, else the file.
    """
    tensors, _ = read_safetensors(path, readonly=bool(host))
    wanted = {name: module.get_parameter(name).shape for name in names}
    check_names(path, {name: tensor.shape for name, tensor in tensors.items()}, wanted)
    for name in names if torch.device(device).type != "meta" else ():
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        kind = dtype if isinstance(owner, (nn.Linear, nn.Conv2d, nn.Conv3d)) else torch.float32
        if not name.startswith(host):
            tensor = tensors[name].to(device, kind)
        else:
            tensor = tensors[name].to(kind).pin_memory() if torch.device(device).type == "cuda" else tensors[name]
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    return module.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# What every run begins with: which weights, which device, which sizes
# ------------------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_weights():
    """weights/ where that holds a dit.safetensors, else tiny/, both beside this file."""
    here = os.path.dirname(os.path.abspath(__file__))
    folder = os.path.join(here, "weights")
    folder = folder if os.path.exists(os.path.join(folder, "dit.safetensors")) else os.path.join(here, "tiny")
    return os.path.relpath(folder)


def choose_device(device=None, dtype=None):
    """("cuda" where there is one, else "cpu"; bfloat16 on a GPU, else float32), unless told otherwise."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"no device {device} here ({str(error).splitlines()[0]}); try --device cpu") from error
    if dtype is None:
        dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return device, DTYPES[dtype]


def check_sizes(frames, height, width):
    if frames < 1 or frames % 6 != 1:
        low = max((frames - 1) // 6 * 6 + 1, 1)
        raise InputError(f"frames must be 6k + 1, such as {low} or {low + 6}, not {frames}")
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise InputError(f"height and width must be multiples of 16, not {height}x{width}")


def height_by_width(text):  # for argparse
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH, such as 480x848")
    return int(match[1]), int(match[2])


def peak_memory(device):
    """Gigabytes: of the GPU, else of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ------------------------------------------------------------------------------------------------------------------
# The video VAE: causal in time, normalised frame by frame (genmo's vae/models.py). Activations are (B, C, T, H, W)
# in channels_last_3d memory, where moving channels last or folding time into the batch is only a view.
# ------------------------------------------------------------------------------------------------------------------


AT_ONCE = 480 * 848  # pixels, one frame of Mochi's: small videos take longer pieces than large ones, up to so many


def pointwise(linear, x):
    """A 1x1x1 convolution, kept as a Linear in genmo's files. x (B,C,T,H,W)"""
    return linear(x.movedim(1, -1).to(linear.weight.dtype)).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """Over each frame by itself. Groups follow from the channels: 32 as in genmo's where they divide, else up to 8."""

    def __init__(self, channels):
        super().__init__(32 if channels % 32 == 0 else math.gcd(channels, 8), channels, eps=1e-5)

    def forward(self, x):  # (B, C, T, H, W)
        frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        frames = F.group_norm(frames, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """Looks only back in time: the first frame is repeated in front, edges are repeated in space.

    `past` is what the convolutions of a network remember of the frames that came before, so that a video can be
    passed in pieces with exactly the result of the whole; it starts as an empty dict, None remembers nothing.
    """

    def forward(self, x, past=None):  # (B, C, T, H, W)
        (kt, kh, kw), (st, sh, _) = self.kernel_size, self.stride
        h, w = (kh // 2, kw // 2) if sh == 1 else (0, 0)  # a down-sampling convolution's patches lie side by side
        first = past is None or self not in past
        x = F.pad(x, (w, w, h, h, kt - 1 if first else 0, 0), mode="replicate")
        if not first:
            x = torch.cat([past[self], x], 2)
        if past is not None:
            past[self] = x[:, :, x.shape[2] - (kt - st) :].clone()
        return super().forward(x.contiguous(memory_format=torch.channels_last_3d))


class TemporalAttention(nn.Module):
    """Each pixel attends to itself in the frames so far; unit queries and keys. Head width 32."""

    def __init__(self, channels):
        super().__init__()
        self.hd = math.gcd(channels, 32)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):  # (B, C, T, H, W)
        b, c, t, h, w = x.shape
        pixels = x.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B H W, T, C)
        q, k, v = self.qkv(pixels).unflatten(-1, (3, -1, self.hd)).permute(2, 0, 3, 1, 4)  # (BHW, nh, T, hd) each
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.hd**-0.5)
        return self.out(o.transpose(1, 2).flatten(2)).unflatten(0, (b, h, w)).permute(0, 4, 3, 1, 2)


class AttentionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.attn = TemporalAttention(channels)

    def forward(self, x, numbers=2**23):  # all frames of a few rows of pixels at a time: keys and values are large
        normed, out = self.norm(x), torch.empty_like(x) if torch.is_grad_enabled() else x  # in place where it can be
        rows = max(1, numbers // x[:, :, :, 0].numel())
        for i in range(0, x.shape[3], rows):
            out[:, :, :, i : i + rows] = x[:, :, :, i : i + rows] + self.attn(normed[:, :, :, i : i + rows])
        return out


class ResBlock(nn.Module):
    def __init__(self, channels, attention=False):
        super().__init__()
        conv = lambda: CausalConv3d(channels, channels, 3)  # noqa: E731
        self.stack = nn.Sequential(GroupNorm(channels), nn.SiLU(), conv(), GroupNorm(channels), nn.SiLU(), conv())
        if attention:
            self.attn_block = AttentionBlock(channels)  # the encoder applies it, to all frames

    def forward(self, x, past=None):
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
    """encoder(video) -> (mean, logvar); video (B,3,T,H,W) in [-1,1] with T = 6k+1; both (B,12,k+1,H/8,W/8), VAE space.

    channels: of every resolution, full to lowest. blocks: residual blocks at full resolution, after each
    down-sampling, and at the end. strides: (t, h, w) of each down-sampling. attention: like blocks.
    """

    def __init__(self, channels=(64, 128, 256, 384), blocks=(3, 3, 4, 6, 3), strides=((1, 2, 2), (2, 2, 2), (3, 2, 2)),
                 attention=(False, True, True, True, True), latent=12):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(15, channels[0])]
            + [ResBlock(channels[0], attention[0]) for _ in range(blocks[0])]
            + [DownBlock(*args) for args in zip(channels, channels[1:], strides, blocks[1:-1], attention[1:-1])]
            + [ResBlock(channels[-1], attention[-1]) for _ in range(blocks[-1])]
        )
        self.output_norm = GroupNorm(channels[-1])
        self.output_proj = nn.Linear(channels[-1], 2 * latent, bias=False)

    def forward(self, video, chunk=None):
        """chunk: frames at once; the result does not depend on it, the peak memory does. None: as many as have AT_ONCE
        pixels, at least 4."""
        chunk = chunk or max(4, AT_ONCE // video[:, 0, 0].numel())
        x, stretch = video, [self.embed]
        for layer in self.layers[1:]:
            for layer in getattr(layer, "layers", [layer]):
                stretch.append(layer)
                if hasattr(layer, "attn_block"):  # up to here frames can come in pieces, attention needs them all
                    x, stretch = layer.attn_block(in_pieces(stretch, x, chunk)), []
        x = in_pieces([*stretch, self.project], x, chunk)
        return x.float().chunk(2, dim=1)

    def embed(self, video, past):
        return pointwise(self.layers[0], fourier_features(video)).contiguous(memory_format=torch.channels_last_3d)

    def project(self, x, past):
        return pointwise(self.output_proj, F.silu(self.output_norm(x)))


def in_pieces(layers, x, chunk):
    """The layers' output for x (B,C,T,H,W), with T = 6k+1 at first, that goes through them in pieces of 1 + n, n, n, ...
    frames; n is about `chunk`, and a multiple of the stride in time."""
    stride = math.prod(layer.stride[0] for layer in layers if isinstance(layer, CausalConv3d))
    n, past, outputs = stride * max(1, chunk // stride), {}, []
    for piece in x.tensor_split(list(range(1 + n, x.shape[2], n)), 2):
        for layer in layers:
            piece = layer(piece, past)
        outputs.append(piece)
    return torch.cat(outputs, 2)


def fourier_features(video):  # (B, 3, T, H, W) -> (B, 15, T, H, W): the pixels, their sines, their cosines
    frequencies = 2 * math.pi * torch.tensor([2.0**6, 2.0**7], device=video.device)
    angles = (video.float()[:, :, None] * frequencies[:, None, None, None]).flatten(1, 2)  # c0 f6, c0 f7, c1 f6, ...
    return torch.cat([video.float(), angles.sin(), angles.cos()], 1)  # angles reach 800: float32 only


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
        b, _, t, h, w = x.shape
        st, sh, sw = self.expand
        x = pointwise(self.proj, x).movedim(1, -1).unflatten(-1, (-1, st, sh, sw))  # (B, T, H, W, C, st, sh, sw)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * st, h * sh, w * sw, -1).movedim(-1, 1)
        first = past.setdefault(self, True)  # the first latent frame stands for one frame, so its first st - 1 go
        past[self] = False
        return x[:, :, st - 1 :] if first else x


class Decoder(nn.Module):
    """decoder(latents) -> video; latents (B,12,k+1,H/8,W/8) in VAE space; video (B,3,6k+1,H,W), about [-1,1].

    channels: lowest to full resolution. blocks: at the start, before each up-sampling, and at full resolution.
    expand: (t, h, w) of each up-sampling.
    """

    def __init__(self, channels=(768, 512, 256, 128), blocks=(3, 6, 4, 3, 3),
                 expand=((3, 2, 2), (2, 2, 2), (1, 2, 2)), latent=12):
        super().__init__()
        first = [CausalConv3d(latent, channels[0], 1)] + [ResBlock(channels[0]) for _ in range(blocks[0])]
        ups = [UpBlock(*args) for args in zip([channels[0], *channels[1:-1]], channels[1:], expand, blocks[1:-1])]
        last = [ResBlock(channels[-1]) for _ in range(blocks[-1])]
        self.blocks = nn.ModuleList([nn.ModuleList(first), *ups, nn.ModuleList(last)])
        self.output_proj = nn.Linear(channels[-1], 3)

    def forward(self, latents, chunk=None):
        """chunk: latent frames decoded at once; the result does not depend on it, the peak memory does. None: as
        many as have AT_ONCE pixels, at least 1."""
        chunk, past = chunk or max(1, AT_ONCE // (6 * 8 * 8 * latents[:, 0, 0].numel())), {}
        return torch.cat([self.decode_next(z, past) for z in latents.split(chunk, dim=2)], 2)

    def decode_next(self, latents, past):  # the frames of the next latent frames of a video
        x = latents.to(self.output_proj.weight.dtype)
        for layer in [*self.blocks[0], *self.blocks[1:-1], *self.blocks[-1]]:
            x = layer(x, past)
        return pointwise(self.output_proj, F.silu(x)).float()


def children(shapes, prefix):  # ["layers.0", "layers.1", ...]: the numbered members that a file has below a name
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return [f"{prefix}.{i}" for i in sorted(found)]


def shapes_of(path, kind, *needed):  # ({name: shape}, metadata) of a file that is of that kind
    tensors, metadata = read_safetensors(path, readonly=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in needed:
        if name not in shapes:
            raise InputError(f"{path} is not {kind}: it lacks {name}")
    return shapes, metadata


def load_encoder(path, device="cpu", dtype=torch.float32):
    """Mochi's VAE encoder from genmo's encoder.safetensors, sizes read off the shapes. Raises InputError."""
    shapes, _ = shapes_of(path, "a Mochi video encoder", "layers.0.weight", "output_proj.weight")
    layers = children(shapes, "layers")[1:]
    downs = [name for name in layers if f"{name}.layers.0.weight" in shapes]
    first = layers.index(downs[0]) if downs else 0
    blocks = [layers[:first], *(children(shapes, f"{name}.layers")[1:] for name in downs), layers[first + len(downs) :]]
    convs = [shapes[f"{name}.layers.0.weight"] for name in downs]
    with torch.device("meta"):
        encoder = Encoder(
            channels=(shapes["layers.0.weight"][0], *(conv[0] for conv in convs)),
            blocks=tuple(len(names) for names in blocks),
            strides=tuple(conv[2:] for conv in convs),
            attention=tuple(any(f"{name}.attn_block.norm.weight" in shapes for name in names) for names in blocks),
            latent=shapes["output_proj.weight"][0] // 2,
        )
    return fill(encoder, path, list(encoder.state_dict()), device, dtype)


def load_decoder(path, device="cpu", dtype=torch.float32):
    """Mochi's VAE decoder from genmo's decoder.safetensors, sizes read off the shapes. Raises InputError."""
    needed = "blocks.0.0.weight", "blocks.1.proj.weight", "output_proj.weight"
    shapes, _ = shapes_of(path, "a Mochi video decoder", *needed)
    first, *rest = children(shapes, "blocks")
    ups = [name for name in rest if f"{name}.proj.weight" in shapes]
    linears = [shapes[f"{name}.proj.weight"] for name in ups] + [shapes["output_proj.weight"]]  # (out, in) each
    channels = [width for _, width in linears]
    last = children(shapes, f"blocks.{len(ups) + 1}")
    with torch.device("meta"):
        decoder = Decoder(
            channels=channels,
            blocks=[
                len(children(shapes, first)) - 1,
                *(len(children(shapes, f"{up}.blocks")) for up in ups),
                len(last),
            ],
            expand=tuple((out // (4 * to), 2, 2) for (out, _), to in zip(linears, channels[1:])),
            latent=shapes["blocks.0.0.weight"][1],
        )
    return fill(decoder, path, list(decoder.state_dict()), device, dtype)


# Mochi's latents channel by channel, in VAE space (genmo's vae/vae_stats.py)
MOCHI_MEAN = (-0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
              0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
              -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285)  # fmt: skip
MOCHI_STD = (0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592, 0.8244560132752793,
             0.917259975397747, 0.9294154431013696, 1.3720942358788521, 0.881393668867029, 0.9168315692124348,
             0.9185249279345552, 0.9274757570805041)  # fmt: skip


def to_dit_space(z, mean=MOCHI_MEAN, std=MOCHI_STD):
    """Latents (B,12,T,H,W) from the VAE's space to the transformer's, where every channel has mean 0, deviation 1."""
    mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device)[:, None, None, None] for v in (mean, std))
    return (z - mean) / std


def to_vae_space(z, mean=MOCHI_MEAN, std=MOCHI_STD):
    """The inverse of to_dit_space."""
    mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device)[:, None, None, None] for v in (mean, std))
    return z * std + mean


# ------------------------------------------------------------------------------------------------------------------
# The diffusion transformer (genmo's dit/joint_model/asymm_models_joint.py): a visual and a narrower text stream,
# joined in every attention
# ------------------------------------------------------------------------------------------------------------------


def rms(x, weight=None, eps=1e-6):  # in float32
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps)


def scaled(x, scale):  # the adaptive norm before a branch; x (B, N, D), scale (B, 1, D)
    return rms(x).mul_(1 + scale.float()).to(x.dtype)


def gated(x, branch, gate):  # the residual: the branch's output is normalised and gated
    return x + rms(branch).mul_(torch.tanh(gate.float())).to(x.dtype)


def rotate(x, turns):  # x (B, N, nh, hd); turns (N, nh, hd/2, 2), cos and sin: pairs (2i, 2i + 1) turn by their angle
    pairs = x.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():  # a third of the time as complex numbers, which compiling does not know
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2)
    (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class RMSNorm(nn.Module):  # of queries and keys, head by head
    def __init__(self, hd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hd))

    def forward(self, x):
        return rms(x, self.weight, eps=1e-5)  # float32


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank B (A x); A and B are absent (None) until infuse or load_adapter bring them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_parameter("lora_A", None)  # (rank, in)
        self.register_parameter("lora_B", None)  # (out, rank)
        self.alpha = 1.0

    def forward(self, x):
        y = super().forward(x)
        if self.lora_A is None:
            return y
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y + self.alpha / len(self.lora_A) * low


class JointAttention(nn.Module):
    def __init__(self, width, text_width, heads, last):
        super().__init__()
        self.heads = heads
        self.qkv_x = LoRALinear(width, 3 * width, bias=False)
        self.qkv_y = LoRALinear(text_width, 3 * width, bias=False)
        for name in ("q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"):
            setattr(self, name, RMSNorm(width // heads))
        self.proj_x = LoRALinear(width, width)
        self.proj_y = None if last else LoRALinear(width, text_width)

    def forward(self, x, y, rope, mask):  # x (B, N, D), y (B, L, Dy), mask None or (B, 1, 1, N + L)
        qx, kx, vx = self.qkv_x(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, nh, hd) each
        qy, ky, vy = self.qkv_y(y).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, nh, hd) each
        q = torch.cat([rotate(self.q_norm_x(qx), rope), self.q_norm_y(qy)], 1).to(vx.dtype).transpose(1, 2)
        k = torch.cat([rotate(self.k_norm_x(kx), rope), self.k_norm_y(ky)], 1).to(vx.dtype).transpose(1, 2)
        v = torch.cat([vx, vy], 1).transpose(1, 2)  # (B, nh, N + L, hd)
        o = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, N + L, D)
        ox, oy = o.split([x.shape[1], y.shape[1]], 1)
        return self.proj_x(ox), None if self.proj_y is None else self.proj_y(oy)


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
        self.mod_x = nn.Linear(width, 4 * width)
        self.mod_y = nn.Linear(width, text_width if last else 4 * text_width)
        self.attn = JointAttention(width, text_width, heads, last)
        self.mlp_x = FeedForward(width, hidden_x)
        self.mlp_y = None if last else FeedForward(text_width, hidden_y)

    def forward(self, x, y, c, rope, mask):  # c (B, 1, D), after its SiLU
        scale_x, gate_x, scale_mlp_x, gate_mlp_x = self.mod_x(c).chunk(4, -1)
        scale_y, *rest_y = self.mod_y(c).split(y.shape[-1], -1)
        branch_x, branch_y = self.attn(scaled(x, scale_x), scaled(y, scale_y), rope, mask)
        x = gated(x, branch_x, gate_x)
        x = gated(x, self.mlp_x(scaled(x, scale_mlp_x)), gate_mlp_x)
        if rest_y:  # the last block leaves the text as it is
            gate_y, scale_mlp_y, gate_mlp_y = rest_y
            y = gated(y, branch_y, gate_y)
            y = gated(y, self.mlp_y(scaled(y, scale_mlp_y)), gate_mlp_y)
        return x, y


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):  # (B, C, T, H, W) -> (B, N, D)
        tokens = self.proj(x.transpose(1, 2).flatten(0, 1).to(self.proj.weight.dtype))  # (B T, D, H/2, W/2)
        return tokens.flatten(2).transpose(1, 2).unflatten(0, (x.shape[0], -1)).flatten(1, 2)


class TimestepEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma):  # (B,) -> (B, D); Mochi's time runs from noise, 0, to data, 1000
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=sigma.device) / 128)
        angles = 1000 * (1 - sigma.float())[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class AttentionPool(nn.Module):
    """The text as one vector: its mean attends to itself and to the tokens."""

    def __init__(self, t5_width, width, heads=8):
        super().__init__()
        self.heads = heads
        self.to_kv = nn.Linear(t5_width, 2 * t5_width)
        self.to_q = nn.Linear(t5_width, t5_width)
        self.to_out = nn.Linear(t5_width, width)

    def forward(self, y, mask):  # y (B, L, D_text), mask (B, L) -> (B, D)
        mean = (y * mask[..., None]).sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
        tokens = torch.cat([mean.to(y.dtype), y], 1)
        k, v = self.to_kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, 1 + L, hd)
        q = self.to_q(tokens[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, nh, 1, hd)
        o = F.scaled_dot_product_attention(q, k, v, F.pad(mask, (1, 0), value=True)[:, None, None])
        return self.to_out(o.transpose(1, 2).flatten(1))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.mod = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, x, c):
        shift, scale = self.mod(c).float().chunk(2, -1)
        x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(x.to(self.linear.weight.dtype))


def rope_turns(frequencies, t, h, w):
    """frequencies (3, nh, hd/2) -> (N, nh, hd/2, 2), cos and sin of the angles. Rows and columns are centred and scaled
    to Mochi's area of 192^2 tokens; frames count 0, 1, 2, ... (the text is not rotated: absolute positions matter)."""
    device, s = frequencies.device, math.sqrt(192**2 / (h * w))
    rows, columns = ((torch.arange(n, device=device) + 0.5 - n / 2) * s for n in (h, w))
    positions = torch.cartesian_prod(torch.arange(t, device=device, dtype=torch.float32), rows, columns)  # (N, 3)
    angles = torch.einsum("np,phf->nhf", positions, frequencies.float())
    return torch.stack([angles.cos(), angles.sin()], -1)


@dataclass
class Natural:
    """What the shapes of a transformer cannot tell; the defaults are Mochi's. Kept in dit.safetensors' metadata."""

    height: int = 480
    width: int = 848
    frames: int = 73
    fps: int = 30
    steps: int = 64
    cfg: float = 6.0
    music_cfg: float = 0.0
    mean: tuple = MOCHI_MEAN
    std: tuple = MOCHI_STD


class DiT(nn.Module):
    """dit(x, sigma, y_feat, y_mask, audio=None, skip=()) -> velocity, an estimate of z - eps; like x, in float32.

    x (B,12,T,H,W) noised latents in DiT space, H and W even; sigma (B,) in [0, 1], 1 is all noise
    y_feat (B,L,D_text) T5 tokens, y_mask (B,L) bool; the tokens outside the mask change nothing, and it may be empty
    audio (B or 1, A, D_audio) Wav2Vec tokens; None: ZICA is off, LoRA stays on
    skip: indices of blocks to leave out, each with its ZICA (the L without l of Eq. 4)
    """

    def __init__(self, depth, width, text_width, heads, t5_width, hidden_x=None, hidden_y=None, channels=12, patch=2):
        super().__init__()
        self.width, self.patch, self.natural, self.checkpointing = width, patch, Natural(), False
        self.memory = self.fetch = None  # see one_video and Offload
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbed(width)
        self.t5_y_embedder = AttentionPool(t5_width, width)
        self.t5_yproj = nn.Linear(t5_width, text_width)
        self.pos_frequencies = nn.Parameter(torch.zeros(3, heads, width // heads // 2))
        self.blocks = nn.ModuleList(
            [Block(width, text_width, heads, i == depth - 1, hidden_x, hidden_y) for i in range(depth)]
        )
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.audio_layers, self.window = [], None  # set by infuse and load_adapter, as is audio_projection
        self.audio_cross_attn_blocks = nn.ModuleList()  # one for each of audio_layers

    def forward(self, x, sigma, y_feat, y_mask, audio=None, skip=()):
        t, h, w = x.shape[2], x.shape[3] // self.patch, x.shape[4] // self.patch
        rope = self.once((t, h, w), lambda: rope_turns(self.pos_frequencies, t, h, w))
        given = lambda: self.given(t, y_feat, y_mask, audio)  # noqa: E731
        y, mask, pooled, heard = self.once((t, id(y_feat), id(y_mask), id(audio)), given)
        c = F.silu(self.t_embedder(sigma) + pooled)[:, None]  # (B, 1, D)
        x = self.x_embedder(x)  # (B, N, D)
        mask = None if mask.all() else F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
        for i in range(len(self.blocks)):
            if i not in skip:
                layer = lambda x, y, i=i: self.layer(i, x, y, c, rope, mask, heard.get(i))  # noqa: E731
                x, y = self.again(layer, x, y) if self.checkpointing and torch.is_grad_enabled() else layer(x, y)
        x = self.final_layer(x, c).float()
        x = x.unflatten(1, (t, h, w)).unflatten(-1, (self.patch, self.patch, -1))  # (B, T, h, w, p1, p2, C)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def given(self, t, y_feat, y_mask, audio):
        """What follows from text and music alone: (B, L, Dy), (B, L), (B, D), {layer: what its ZICA hears}."""
        assert audio is None or self.audio_layers, "nothing to hear with: call infuse or load_adapter first"
        y_feat, y_mask = pack_text(y_feat.to(self.t5_yproj.weight.dtype), y_mask)
        heard = {}
        if audio is not None:
            audio = self.audio_projection(audio.to(y_feat.dtype), t)  # (B or 1, T, D)
            heard = {i: block.listen(audio) for i, block in zip(self.audio_layers, self.audio_cross_attn_blocks)}
        return self.t5_yproj(y_feat), y_mask, self.t5_y_embedder(y_feat, y_mask), heard

    def once(self, key, function):  # in one_video, which is when there is a memory
        if self.memory is None:
            return function()
        if key not in self.memory:
            self.memory[key] = function()
        return self.memory[key]

    def layer(self, i, x, y, c, rope, mask, heard):
        block, arguments = self.blocks[i], (x, y, c, rope, mask)
        x, y = functional_call(block, self.fetch(i), arguments) if self.fetch else block(*arguments)
        if heard is not None:
            x = self.audio_cross_attn_blocks[self.audio_layers.index(i)](x, heard, self.window)
        return x, y

    def again(self, layer, x, y):  # computed anew in the backward pass, so that only its input is kept
        offload = self.fetch and self.fetch.stream
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext():
            return checkpoint(layer, x, y, use_reentrant=False)


def compile_blocks(dit):
    """Each block compiled when it is first used. Raises InputError where there is no C++ compiler for a CPU's."""
    if dit.pos_frequencies.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("compiling for the CPU takes g++, which is not installed; leave out --compile")
    for block in dit.blocks:
        block.compile(dynamic=True)


def pack_text(y_feat, y_mask):
    """Valid tokens first, the rest cut off. The text has no positions and padding is never attended to, so nothing
    changes but the cost: an empty prompt has no text tokens at all."""
    length = int(y_mask.sum(1).max())
    order = y_mask.int().argsort(dim=1, descending=True, stable=True)[:, :length]
    return y_feat.gather(1, order[..., None].expand(-1, -1, y_feat.shape[-1])), y_mask.gather(1, order)


def load_dit(path, device="cpu", dtype=torch.float32, offload=False):
    """Mochi's transformer from genmo's dit.safetensors, sizes read off the shapes; frozen, strict both ways.

    dtype is that of the matrices; norms and rope frequencies stay float32. device="meta" reads shapes only.
    offload: the blocks stay in host memory or in the file, see Offload; the outputs are the same bit for bit.
    Raises InputError for a file that is missing, cut short or not such a model.
    """
    needed = ("pos_frequencies", "x_embedder.proj.weight", "t5_yproj.weight", "blocks.0.mlp_x.w2.weight")
    shapes, metadata = shapes_of(path, "a Mochi transformer", *needed)
    text_width, t5_width = shapes["t5_yproj.weight"]
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    with torch.device("meta"):
        dit = DiT(
            depth=len(children(shapes, "blocks")),
            width=width,
            text_width=text_width,
            heads=shapes["pos_frequencies"][1],
            t5_width=t5_width,
            hidden_x=shapes["blocks.0.mlp_x.w2.weight"][1],
            hidden_y=shapes.get("blocks.0.mlp_y.w2.weight", (0, None))[1],
            channels=channels,
            patch=patch,
        )
    dit.natural = Natural(**json.loads(metadata.get("natural", "{}")))
    if offload:
        dit.fetch = Offload(dit.blocks, torch.device(device), dtype)
    return fill(dit, path, list(dit.state_dict()), device, dtype, ("blocks.",) if offload else ())


class Offload:
    """Frozen blocks whose weights stay in (pinned) host memory, or in their file; fetch(i) -> {name: weight} for use.

    On a GPU the next block is copied while this one computes, on a stream of its own; two are there at a time. On a
    CPU a block is converted from the file when it is used, and nothing is kept.
    """

    def __init__(self, blocks, device, dtype):
        self.blocks, self.device, self.dtype = blocks, device, dtype
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last, self.ahead = 0, {}  # the block fetched last; {the one after it: its weights}

    def copy(self, i):
        weights = {k: p for k, p in self.blocks[i].named_parameters() if "lora_" not in k}
        kind = lambda k: torch.float32 if "norm" in k else self.dtype  # noqa: E731
        return {k: p.detach().to(self.device, kind(k), non_blocking=True) for k, p in weights.items()}

    def __call__(self, i):
        if self.stream is None:
            return self.copy(i)
        n, compute = len(self.blocks), torch.cuda.current_stream(self.device)
        compute.synchronize()  # so the weights before these are free, and no more than two blocks are ever there
        with torch.cuda.stream(self.stream):
            weights = self.ahead.get(i) or self.copy(i)
            compute.wait_stream(self.stream)
            after = (i + 1 if (i - self.last) % n == 1 else i - 1) % n  # backward goes from the last to the first
            self.last, self.ahead = i, {after: self.copy(after)}
        for weight in weights.values():
            weight.record_stream(compute)
        return weights


def save_dit(dit, path, dtype=torch.bfloat16):
    """What load_dit reads: matrices as `dtype`, the rest as it is, without any adapter; dit.natural as metadata."""
    adapter = adapter_parameters(dit)
    tensors = {k: v for k, v in dit.state_dict().items() if k not in adapter}
    save_safetensors(path, shrunk(tensors, dtype), {"natural": json.dumps(asdict(dit.natural))})


def shrunk(tensors, dtype=torch.bfloat16):  # matrices only: norms, biases and rope frequencies are small
    return {k: v.to(dtype) if v.ndim > 1 and k != "pos_frequencies" else v for k, v in tensors.items()}


# ------------------------------------------------------------------------------------------------------------------
# The adapter: ZICA (Eq. 6), the audio projector, LoRA. The zeros that make a fresh one inaudible are all in infuse.
# ------------------------------------------------------------------------------------------------------------------

MUSICINFUSER_LAYERS = (6, 7, 8, 9, 10, 21, 34, 35, 36, 38, 39, 43, 44, 45, 46, 47)  # the authors', of Mochi's 48


class Linear(nn.Linear):
    """Computes in its input's dtype, so that a float32 adapter can train over a bfloat16 model."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class AudioProjection(nn.Module):
    """Wav2Vec tokens (B,A,D_audio) to one token a latent frame, (B,T,D): the nearest in time."""

    def __init__(self, audio_width, width):
        super().__init__()
        self.projection = nn.Sequential(Linear(audio_width, width), nn.SiLU(), Linear(width, width))

    def forward(self, audio, frames):
        return F.interpolate(self.projection(audio).transpose(1, 2), size=frames, mode="nearest").transpose(1, 2)


class ZICA(nn.Module):
    """x + W_O softmax(Q K' / sqrt(hd)) V, queries from the video, keys and values from the music (Eq. 6)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width) for _ in range(4))

    def split(self, x):  # (B, tokens, D) -> (B, nh, tokens, hd)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def listen(self, audio):  # (B or 1, T, D) -> keys and values
        return self.split(self.to_k(audio)), self.split(self.to_v(audio))

    def forward(self, x, heard, window=None):  # x (B, N, D), heard: of self.listen
        k, v = (tokens.expand(len(x), -1, -1, -1) for tokens in heard)
        mask = None
        if window is not None:  # a latent frame hears only the music within `window` latent frames of it
            t = torch.arange(k.shape[2], device=x.device)
            mask = ((t[:, None] - t).abs() <= window).repeat_interleave(x.shape[1] // len(t), 0)  # (N, T)
        o = F.scaled_dot_product_attention(self.split(self.to_q(x)), k, v, mask)
        return x + self.to_out(o.transpose(1, 2).flatten(2))


class FeatureAddition(nn.Module):
    """The ablation of Table 1: each visual token gets its own frame's audio token, through a Linear."""

    def __init__(self, width):
        super().__init__()
        self.to_out = Linear(width, width)

    def listen(self, audio):  # (B or 1, T, D)
        return self.to_out(audio)

    def forward(self, x, heard, window=None):  # x (B, N, D)
        return x + heard.repeat_interleave(x.shape[1] // heard.shape[1], 1)


def choose_layers(choice, depth, count=None):
    """The paper's other choices of `count` layers, by default a third: even, first, middle, last; and all."""
    count = depth if choice == "all" else count or round(depth / 3)
    start = {"all": 0, "first": 0, "middle": (depth - count) // 2, "last": depth - count}
    if choice == "even":
        return [round((i + 0.5) * depth / count - 0.5) for i in range(count)]
    return list(range(start[choice], start[choice] + count))


def check_layers(layers, depth):
    if not layers or len(set(layers)) < len(layers) or min(layers) < 0 or max(layers) >= depth:
        raise InputError(f"layers must be different numbers from 0 to {depth - 1}, not {layers}")


def attach(dit, layers, audio_width, heads, window):
    """The audio projector, and ZICA after those layers, in place of any that were there; heads=0: FeatureAddition."""
    layers = [int(layer) for layer in layers]
    check_layers(layers, len(dit.blocks))
    if heads and dit.width % heads:
        raise InputError(f"{heads} audio heads do not divide the model's width of {dit.width}")
    dit.audio_layers, dit.window = sorted(layers), window
    dit.audio_projection = AudioProjection(audio_width, dit.width)
    dit.audio_cross_attn_blocks = nn.ModuleList(
        [ZICA(dit.width, heads) if heads else FeatureAddition(dit.width) for _ in layers]
    )


def lora_linears(dit):  # {name: module}: the attention's four projections in every block
    return {name: module for name, module in dit.named_modules() if isinstance(module, LoRALinear)}


def attach_lora(linear, rank, alpha):  # rank 0: none
    linear.alpha = alpha
    linear.lora_A = nn.Parameter(torch.empty(rank, linear.in_features)) if rank else None
    linear.lora_B = nn.Parameter(torch.empty(linear.out_features, rank)) if rank else None


def infuse(dit, layers, rank=64, window=None, alpha=None, heads=8, audio_width=768, zero_init=True):
    """Give a model, in place, a fresh adapter that changes no output until it is trained; freezes all the rest.

    layers: ZICA follows these blocks. rank: of the LoRA on every attention projection, 0 for none; its scale is
    alpha / rank, 1 by default. window: latent frames either side that a frame hears, None for all (the paper's).
    heads=0 adds features instead of attending, zero_init=False leaves W_O and B at random (the paper's ablations).
    The adapter is float32 and trainable.
    """
    dit.requires_grad_(False)
    with dit.pos_frequencies.device:
        attach(dit, layers, audio_width, heads, window)
        for linear in lora_linears(dit).values():
            attach_lora(linear, rank, rank if alpha is None else alpha)
            for matrix in (linear.lora_A, linear.lora_B) if rank else ():
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    # The zeros: music enters through W_O, the low-rank update through B
    if zero_init:
        for block in dit.audio_cross_attn_blocks:
            nn.init.zeros_(block.to_out.weight)
            nn.init.zeros_(block.to_out.bias)
        for linear in lora_linears(dit).values() if rank else ():
            nn.init.zeros_(linear.lora_B)
    return dit


def adapter_parameters(dit):
    """{name: parameter} of ZICA, the projector and LoRA, in the authors' names."""
    return {k: v for k, v in dit.named_parameters() if "lora_" in k or k.startswith("audio_")}


def save_adapter(dit, path, dtype=None):
    """The adapter in the authors' names, as `dtype` if given. Metadata: their `kwargs`, and of our own what theirs
    leaves out, the layers, the audio heads and the window."""
    tensors = {k: v if dtype is None else v.to(dtype) for k, v in adapter_parameters(dit).items()}
    kwargs = {}
    for kind, linear in (("qkv", dit.blocks[0].attn.qkv_x), ("out", dit.blocks[0].attn.proj_x)):
        rank = 0 if linear.lora_A is None else len(linear.lora_A)
        kwargs |= {f"{kind}_proj_lora_rank": rank, f"{kind}_proj_lora_alpha": linear.alpha}
        kwargs[f"{kind}_proj_lora_dropout"] = 0.0
    heads = getattr(dit.audio_cross_attn_blocks[0], "heads", 0)
    ours = {"layers": dit.audio_layers, "heads": heads, "window": dit.window}
    save_safetensors(path, tensors, {"kwargs": json.dumps(kwargs), "musicinfuser": json.dumps(ours)})


def load_adapter(dit, path, layers=None, lora_scale=1.0):
    """Put an adapter file, ours or the authors', into a model in place (also on meta); strict, frozen, in the dtype
    of the model's matrices.

    layers: the blocks that ZICA follows, where the file does not say; the authors' sixteen for a model of 48 blocks.
    lora_scale: on top of the file's own alpha / rank. Raises InputError for a file that does not fit.
    """
    shapes, metadata = shapes_of(path, "a MusicInfuser adapter", "audio_projection.projection.0.weight")
    ours, kwargs = (json.loads(metadata.get(key, "{}")) for key in ("musicinfuser", "kwargs"))
    layers = layers or ours.get("layers") or (MUSICINFUSER_LAYERS if len(dit.blocks) == 48 else None)
    count = len(children(shapes, "audio_cross_attn_blocks"))
    if layers is None:
        raise InputError(f"{path} does not say after which {count} layers its ZICA goes; name them")
    if len(layers) != count:
        raise InputError(f"{path} has ZICA for {count} layers, not for the {len(layers)} named")
    with torch.device("meta"):
        attach(dit, layers, shapes["audio_projection.projection.0.weight"][1], ours.get("heads", 8), ours.get("window"))
        for kind, names in (("qkv", ("qkv_x", "qkv_y")), ("out", ("proj_x", "proj_y"))):
            ranks = [shape[0] for name, shape in shapes.items() if name.endswith(tuple(f"{n}.lora_A" for n in names))]
            rank = ranks[0] if ranks else 0  # one for all of a kind, so that a file that lacks some does not fit
            for name, linear in lora_linears(dit).items():
                if name.endswith(names):
                    attach_lora(linear, rank, lora_scale * kwargs.get(f"{kind}_proj_lora_alpha", rank))
    fill(dit, path, list(adapter_parameters(dit)), dit.pos_frequencies.device, dit.t5_yproj.weight.dtype)
    return dit


# ------------------------------------------------------------------------------------------------------------------
# Noise, loss, guidance, solver
# ------------------------------------------------------------------------------------------------------------------


def beta_uniform(step, size, beta=3.0, half_life=200, generator=None):
    """The Beta-Uniform noise schedule (Eq. 5): (size,) sigmas ~ Beta(1, 1 + (beta - 1) 2^(-step / half_life)).

    Training begins near low noise and tends to uniform. beta=1 is uniform throughout.
    """
    b = 1 + (beta - 1) * 2 ** (-step / half_life)
    u = torch.rand(size, generator=generator, dtype=torch.float64)
    return (1 - (1 - u) ** (1 / b)).float()  # the inverse of Beta(1, b)'s distribution, 1 - (1 - sigma)^b


def flow_matching_loss(dit, z, sigma, eps, y_feat, y_mask, audio=None):
    """|v - (z - eps)|^2 at x = (1 - sigma) z + sigma eps, the mean for each of the batch: (B,).

    Eq. 1 is sigma^2 times this on z + n; Mochi's training, and the authors', is unweighted. z, eps (B,12,T,H,W) in
    DiT space; sigma (B,).
    """
    s = sigma[:, None, None, None, None]
    v = dit((1 - s) * z + s * eps, sigma, y_feat, y_mask, audio)
    return (v - (z - eps)).square().mean((1, 2, 3, 4))


def linear_quadratic_schedule(steps, threshold=0.025):
    """Mochi's steps + 1 sigmas from 1 to 0, float64: the first half of the steps falls linearly by `threshold`, the
    rest goes on with that slope and bends down to 0. Raises InputError below 2 steps."""
    if steps < 2:
        raise InputError(f"steps must be 2 or more, not {steps}")
    linear, bent = steps // 2, steps - steps // 2
    slope = threshold / linear
    bend = (1 - threshold - slope * bent) / bent**2
    i = torch.arange(steps + 1, dtype=torch.float64)
    return 1 - slope * i - bend * (i - linear).clamp(min=0) ** 2


@torch.no_grad()
def sample(dit, noise, text, null, audio=None, *, sigmas, cfg=6.0, music_cfg=0.0, skip=(), skip_scale=0.0,
           progress=lambda steps: steps):
    """Solve dx = -v dsigma from noise to latents (Eq. 2) with Euler steps; latents (B,12,T,H,W) in DiT space.

    noise like the latents; text and null: (y_feat, y_mask) of the prompt and of the empty or negative one
    audio (B or 1, A, D_audio) or None: both branches of the guidance hear it
    cfg: v_null + cfg (v_text - v_null)  (Eq. 3)     music_cfg: + music_cfg (v - v without music)
    skip, skip_scale: + skip_scale (v - v without those layers)  (Eq. 4)     progress: wraps the list of steps
    """
    x = noise.float()
    sigmas = [float(s) for s in sigmas]
    with one_video(dit):
        for s, s_next in progress(list(zip(sigmas, sigmas[1:]))):
            sigma = torch.full((len(x),), s, device=x.device)
            v = guided = dit(x, sigma, *text, audio)
            if cfg != 1:
                v_null = dit(x, sigma, *null, audio)
                guided = v_null + cfg * (v - v_null)
            if music_cfg and audio is not None:
                guided = guided + music_cfg * (v - dit(x, sigma, *text, None))
            if skip and skip_scale:
                guided = guided + skip_scale * (v - dit(x, sigma, *text, audio, skip))
            x = x + (s - s_next) * guided
    return x


@contextmanager
def one_video(dit):
    """Within it `dit` computes what follows from text, music and size alone only once (the tensors must stay)."""
    dit.memory = {}
    try:
        yield
    finally:
        dit.memory = None


# ------------------------------------------------------------------------------------------------------------------
# Text and music, through transformers; each encoder is loaded, used and let go
# ------------------------------------------------------------------------------------------------------------------

TEXT_TOKENS = 256  # Mochi's longest prompt
SAMPLE_RATE = 16000  # what Wav2Vec 2.0 hears


def from_pretrained(cls, folder, **kwargs):  # of transformers, from a local folder only
    import transformers  # here, because it takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not os.path.isdir(folder):
        raise InputError(f"no such folder: {folder}")
    try:
        return getattr(transformers, cls).from_pretrained(folder, local_files_only=True, **kwargs)
    except Exception as error:  # transformers raises many kinds for a folder that lacks or breaks something
        raise InputError(f"cannot load {cls} from {folder}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def encode_text(weights, prompts, device="cpu", dtype=torch.float32):
    """[(y_feat (1,L,D_text) float32, y_mask (1,L) bool)] for each prompt by weights/text_encoder; at most 256 tokens,
    with a warning where the rest is cut. An empty prompt has no valid token."""
    tokenizer = from_pretrained("AutoTokenizer", os.path.join(weights, "tokenizer"))
    t5 = from_pretrained("T5EncoderModel", os.path.join(weights, "text_encoder"), dtype=dtype, use_safetensors=True)
    t5 = t5.to(device).eval()
    features = []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids if prompt.strip() else [0]
        if len(ids) > TEXT_TOKENS:
            print(f"warning: the prompt has {len(ids)} tokens, only the first {TEXT_TOKENS} are used", file=sys.stderr)
            ids = ids[: TEXT_TOKENS - 1] + ids[-1:]  # the last one ends the sentence
        ids = torch.tensor([ids], device=device)
        mask = torch.full_like(ids, bool(prompt.strip()), dtype=torch.bool)
        features.append((t5(ids).last_hidden_state.float(), mask))
    return features


class AudioEncoder:
    """weights/audio_encoder, a Wav2Vec 2.0: waveform (samples,) at 16 kHz -> (1, A, D_audio) float32, about 50 tokens
    a second."""

    def __init__(self, weights, device="cpu"):
        folder = os.path.join(weights, "audio_encoder")
        self.prepare = from_pretrained("Wav2Vec2FeatureExtractor", folder)  # zero mean, unit variance
        wav2vec = from_pretrained("Wav2Vec2Model", folder, dtype=torch.float32, use_safetensors=True)
        self.wav2vec = wav2vec.to(device).eval()

    @torch.no_grad()
    def __call__(self, waveform):
        values = self.prepare(waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        return self.wav2vec(values.to(self.wav2vec.device)).last_hidden_state


def audio_seconds(frames, fps=30):
    """The length of music that goes with a clip: the clip and 0.09 s more (the authors' preprocessing)."""
    return frames / fps + 0.09


# ------------------------------------------------------------------------------------------------------------------
# Video and sound, through the ffmpeg that imageio brings
# ------------------------------------------------------------------------------------------------------------------


def ffmpeg(*arguments):
    """Run ffmpeg, return what it writes to standard output."""
    run = subprocess.run([get_ffmpeg_exe(), "-v", "error", "-nostdin", *map(str, arguments)], capture_output=True)
    if run.returncode:
        lines = run.stderr.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"]
        raise InputError(lines[0])
    return run.stdout


def load_audio(path, start=0.0, seconds=None, speed=1.0, rate=SAMPLE_RATE):
    """(samples,) float32, mono (the mean of the channels), from any audio or video file that ffmpeg reads.

    start: in the song's own seconds. seconds: of what is returned; fewer come where the song ends before. speed:
    1.25 plays it faster, the pitch rising with it. Raises InputError.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    cut = ["-ss", start] if seconds is None else ["-ss", start, "-t", seconds * speed]
    try:
        sound = "-map", "0:a:0", "-map_metadata", -1, "-ar", round(rate / speed)
        wav = ffmpeg("-i", os.path.abspath(path), *cut, *sound, *"-c:a pcm_f32le -f wav -".split())
    except InputError as error:
        what = "has no sound" if "matches no streams" in str(error) else f"cannot be read as audio ({error})"
        raise InputError(f"{path} {what}") from error
    channels = int.from_bytes(wav[22:24], "little")
    samples = np.frombuffer(wav, "<f4", offset=wav.index(b"data") + 8)  # after the header of the WAV stream
    samples = torch.from_numpy(samples.reshape(-1, channels).mean(1))
    if not len(samples):
        raise InputError(f"{path} has no sound at {start:g} s; choose an earlier start")
    return samples if seconds is None else samples[: math.ceil(seconds * rate)]


def music_window(path, frames, fps=30, start=0.0, speed=1.0):
    """The waveform at 16 kHz that goes with a clip, padded with silence, and the seconds of music in it."""
    seconds = audio_seconds(frames, fps)
    waveform = load_audio(path, start, seconds, speed)
    length = math.ceil(seconds * SAMPLE_RATE)
    return F.pad(waveform, (0, length - len(waveform))), len(waveform) / SAMPLE_RATE


def count_frames(path, fps=30):
    """How many frames a video has at `fps`, without decoding it. Raises InputError."""
    try:
        return round(count_frames_and_secs(path)[1] * fps)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as video") from error


def read_frames(path, height, width, fps=30, crop=None):
    """Yield a video's frames, uint8 (height, width, 3), at `fps`; the middle at that aspect ratio, after `crop`, if
    given: (x, y, width, height) as fractions of the frame. Raises InputError."""
    x, y, w, h = crop or (0, 0, 1, 1)
    filters = f"fps={fps},crop=iw*{w}:ih*{h}:iw*{x}:ih*{y}"
    filters += f",crop='min(iw,ih*{width}/{height})':'min(ih,iw*{height}/{width})'"
    command = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", os.path.abspath(path), "-map", "0:v:0", "-vf",
               f"{filters},scale={width}:{height}:flags=area", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]  # fmt: skip
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as run:
        while len(frame := run.stdout.read(height * width * 3)) == height * width * 3:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3).copy()
        if run.wait():
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or ["ffmpeg failed"]
            raise InputError(f"{path} cannot be read as video ({lines[-1]})")


def save_video(path, video, fps=30, song=None, start=0.0, speed=1.0):
    """video (3,T,H,W) in [-1,1] to H.264 (yuv420p), with the song, cut or silenced to the picture's length, as AAC.

    Written whole or not at all. Raises InputError where it cannot be written.
    """
    frames = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    with written_whole(path) as temporary, tempfile.TemporaryDirectory() as folder:
        sound = {}
        if song is not None:
            wav, seconds = os.path.join(folder, "song.wav"), len(frames) / fps
            play = f"aresample=44100,atrim={start}:{start + seconds * speed},asetpts=N/SR/TB"
            play += f",asetrate={round(44100 * speed)},aresample=44100,apad,atrim=0:{seconds}"
            ffmpeg("-i", os.path.abspath(song), "-map", "0:a:0", "-af", play, "-ac", 2, wav)
            sound = {"audio_path": wav, "audio_codec": "aac"}
        options = {"codec": "libx264", "pixelformat": "yuv420p", "quality": None, "macro_block_size": 2}
        options |= {"output_params": ["-crf", "16"], "ffmpeg_log_level": "quiet"} | sound
        with imageio.get_writer(temporary, format="FFMPEG", fps=fps, **options) as writer:
            for frame in frames:
                writer.append_data(frame)
        # imageio does not say when its ffmpeg fails at the end, as on a full disk
        if not os.path.exists(temporary) or count_frames_and_secs(temporary)[0] != len(frames):
            raise OSError("the video could not be written whole; is the disk full?")
