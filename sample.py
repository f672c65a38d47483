"""A song and a prompt in, a dancing video out:   python sample.py song.wav "a dog dancing" """

import argparse
import os
import re
import tempfile
import time

import torch
from tqdm import tqdm

import musicinfuser as mi


def free_name(out, stem):
    """The mp4 to write: `out` itself if it names one that does not exist, else a new one in the folder `out`."""
    if out.endswith(".mp4"):
        for path in (out, out.removesuffix(".mp4") + ".json"):
            if os.path.exists(path):
                raise mi.InputError(f"{path} exists; name another --out")
        return out
    names = (os.path.join(out, f"{stem}{'' if n == 1 else f'-{n}'}.mp4") for n in range(1, 10**9))
    return next(name for name in names if not os.path.exists(name))


def check_width(encoder, found, model, wanted):
    if found != wanted:
        raise mi.InputError(f"{encoder} gives {found} features a token, but {model} takes {wanted}: no fit")


def check_writable(out):
    folder = os.path.dirname(os.path.abspath(out)) if out.endswith(".mp4") else out
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise mi.InputError(f"cannot write in {folder}: {error.strerror}") from error


def slug(text, length=60):
    text = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return text.encode()[:length].decode(errors="ignore").strip("-") or "empty"  # file names end at 255 bytes


def generate(song, prompt, *, weights=None, adapter=None, frames=None, size=None, steps=None, cfg=None, music_cfg=None,
             skip=(), skip_scale=1.0, lora_scale=1.0, negative="", seeds=(0,), start=0.0, speed=1.0, out="outputs",
             device=None, dtype=None, offload=False, compile=False):  # fmt: skip
    """Make a video for each seed; returns their paths. None stands for the weights folder's own default.

    song: an audio or video file. adapter: a file, "none" for the model without music, None for the folder's own.
    size: (height, width). cfg, music_cfg, skip, skip_scale: see musicinfuser.sample. lora_scale: see
    musicinfuser.load_adapter. start: seconds into the song. speed: the song's, for the model and in the file. out: a
    folder or an .mp4. offload, compile: see musicinfuser.Offload and compile_blocks. Raises musicinfuser.InputError.
    """
    began = time.time()
    weights = weights or mi.default_weights()
    device, dtype = mi.choose_device(device, dtype)
    path = lambda name: os.path.join(weights, name)  # noqa: E731
    adapter = adapter or path("musicinfuser.safetensors")
    adapter = None if adapter == "none" else adapter

    # Everything that can be wrong is looked at before anything takes long
    dit = mi.load_dit(path("dit.safetensors"), device="meta")
    natural = dit.natural
    frames = natural.frames if frames is None else frames
    height, width = size or (natural.height, natural.width)
    steps = natural.steps if steps is None else steps
    cfg = natural.cfg if cfg is None else cfg
    music_cfg = (natural.music_cfg if adapter else 0.0) if music_cfg is None else music_cfg
    mi.check_sizes(frames, height, width)
    sigmas = mi.linear_quadratic_schedule(steps)
    if skip and not 0 <= min(skip) <= max(skip) < len(dit.blocks):
        raise mi.InputError(f"--skip takes layers from 0 to {len(dit.blocks) - 1}, not {list(skip)}")
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise mi.InputError("--seed must be from 0 to 2^63 - 1")
    if start < 0 or not 0.1 <= speed <= 10:
        raise mi.InputError("--start must not be negative, and --speed must be from 0.1 to 10")
    if adapter:
        mi.load_adapter(dit, adapter)
    mi.load_decoder(path("decoder.safetensors"), device="meta")
    for name in ("text_encoder", "tokenizer", *(["audio_encoder"] if adapter else [])):
        if not os.path.isdir(path(name)):
            raise mi.InputError(f"no such folder: {path(name)}")
    if out.endswith(".mp4") and len(seeds) > 1:
        raise mi.InputError(f"--out {out} is one file for {len(seeds)} seeds; name a folder")
    free_name(out, "")
    stem = f"{slug(os.path.splitext(os.path.basename(song))[0], 30)}-{slug(prompt)}"
    waveform, heard = mi.music_window(song, frames, natural.fps, start, speed)
    check_writable(out)

    strength = f", LoRA x {lora_scale:g}" if adapter and lora_scale != 1 else ""
    print(f"weights  {weights}, adapter {adapter or 'none'}{strength}")
    how = (", blocks offloaded" if offload else "") + (", compiled" if compile else "")
    print(f"device   {device}, {str(dtype).removeprefix('torch.')}{how}")
    print(f"video    {height}x{width}, {frames} frames at {natural.fps} fps")
    print(f"solver   {steps} steps, cfg {cfg:g}, music cfg {music_cfg:g}")
    print(f"song     {song} from {start:g} s at speed {speed:g}")
    if heard < frames / natural.fps:
        print(f"the song ends after {heard:.1f} s of the video; silence follows")

    text, null = mi.encode_text(weights, [prompt, negative], device, dtype)
    audio = mi.AudioEncoder(weights, device)(waveform) if adapter else None
    check_width("text_encoder", text[0].shape[-1], path("dit.safetensors"), dit.t5_yproj.in_features)
    if adapter:
        check_width("audio_encoder", audio.shape[-1], adapter, dit.audio_projection.projection[0].in_features)
    dit = mi.load_dit(path("dit.safetensors"), device, dtype, offload)
    if adapter:
        mi.load_adapter(dit, adapter, lora_scale=lora_scale)
    if compile:
        mi.compile_blocks(dit)
    decoder = mi.load_decoder(path("decoder.safetensors"), device, dtype)

    paths = []
    for seed in seeds:
        shape = 1, len(natural.mean), (frames - 1) // 6 + 1, height // 8, width // 8
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        with torch.inference_mode():
            z = mi.sample(dit, noise, text, null, audio, sigmas=sigmas, cfg=cfg, music_cfg=music_cfg, skip=tuple(skip),
                          skip_scale=skip_scale, progress=lambda s: tqdm(s, f"seed {seed}", unit="step"))  # fmt: skip
            if not z.isfinite().all():
                raise mi.InputError("the latents are not finite; lower the guidance scales, or try --dtype float32")
            video = decoder(mi.to_vae_space(z, natural.mean, natural.std))[0]
        paths.append(free_name(out, f"{stem}-{seed}"))
        mi.save_video(paths[-1], video, natural.fps, song, start, speed)
        recipe = {
            "song": song, "prompt": prompt, "negative": negative, "seed": seed, "weights": weights,
            "adapter": adapter or "none", "frames": frames, "size": [height, width], "steps": steps, "cfg": cfg,
            "music_cfg": music_cfg, "skip": list(skip), "skip_scale": skip_scale, "lora_scale": lora_scale, "start": start,
            "speed": speed, "offload": offload, "compile": compile, "device": str(device),
            "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        }  # fmt: skip
        mi.save_json(paths[-1][: -len(".mp4")] + ".json", recipe)
        print(paths[-1])
    print(f"{time.time() - began:.1f} s, peak memory {mi.peak_memory(device):.2f} GB")
    return paths


def main():
    parser = argparse.ArgumentParser(description="A song and a prompt in, a dancing video out.")
    add = parser.add_argument
    add("song", help="any audio or video file")
    add("prompt", help='such as "a dog dancing"')
    add("--weights", help="folder; default: weights/ if it holds a model, else tiny/")
    add("--adapter", help="a file, or none; default: the folder's musicinfuser.safetensors")
    add("--frames", type=int, help="6k + 1; default: the model's own, as for all that follow (Mochi: 73)")
    add("--size", type=mi.height_by_width, metavar="HxW", help="multiples of 16 (Mochi: 480x848)")
    add("--steps", type=int, help="of the ODE solver (Mochi: 64)")
    add("--cfg", type=float, help="guidance scale of the text (Mochi: 6)")
    add("--music-cfg", type=float, help="guidance scale of the music (Mochi: 0)")
    add("--skip", type=int, nargs="+", default=(), metavar="LAYER", help="layer-skip guidance: leave these out")
    add("--skip-scale", type=float, default=1.0, help="... with this scale (default 1)")
    add("--lora-scale", type=float, default=1.0, help="how strongly the adapter's LoRA counts (default 1)")
    add("--negative", default="", help="prompt to guide away from")
    add("--seed", type=int, nargs="+", default=[0], help="one video for each")
    add("--start", type=float, default=0.0, help="place in the song, in its own seconds")
    add("--speed", type=float, default=1.0, help="1.25 plays the song faster, pitch rising")
    add("--out", default="outputs", help="a folder, or an .mp4 (default outputs/)")
    add("--device", help="cuda, cpu, ...; default: cuda if there is one")
    add("--dtype", choices=list(mi.DTYPES), help="default: bfloat16 on a GPU, else float32")
    add("--offload", action="store_true", help="keep the blocks in host memory, or in their file: slower, far smaller")
    add("--compile", action="store_true", help="compile the blocks: minutes at first, then faster")
    options = vars(parser.parse_args())
    options["seeds"] = options.pop("seed")
    generate(options.pop("song"), options.pop("prompt"), **options)


if __name__ == "__main__":
    mi.main(main)
