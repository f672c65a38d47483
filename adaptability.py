"""Which layers should listen?   python adaptability.py

The paper's criterion (Sec. 4.1): sample with the pre-trained model, without adapter and music, guided by itself without
layer l (Eq. 4), and score the videos. The better they are than without that guidance, the more adaptable the layer.

What is measured of a video is kept as it ends and never computed again: a run that was killed goes on by the same
command, and several processes may share a run folder, each with its own --layers.
"""

import argparse
import functools
import glob
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import sys

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import musicinfuser as mi

PROMPTS = (
    "a professional dancer dancing in a studio with a white backdrop",
    "a woman in red dancing on a stage",
    "a man in a blue shirt performing House in the street, front view",
    "two people dancing on the beach",
    "a dog dancing in a park",
    "an orange dog dancing to the music in a studio",
    "a rabbit dancing on the grass",
    "three rabbits dancing on a stage, with a moving camera",
)  # general, of people and animals, and within what the toy world knows

# ------------------------------------------------------------------------------------------------------------------
# Metrics: measure(video) of a video (3,T,H,W) in [-1,1], score(measured) of a list of those; higher is better
# ------------------------------------------------------------------------------------------------------------------

REFERENCE = "reference.safetensors"  # of a weights folder, for frechet
PYIQA = {"imaging": "musiq-spaq", "aesthetic": "laion_aes"}
FEATURE = "the encoder's last activations, after norm and SiLU, averaged over space; one vector a latent frame"


def image_quality(metric, device):
    """measure(video): the mean over the frames of pyiqa's score, as VBench computes it: MUSIQ (0 to 100) sees frames of
    at most 512 pixels a side, LAION's aesthetic predictor (0 to 10) resizes by itself. Raises InputError."""
    try:
        import pyiqa  # here, because it is the user's to install

        model = pyiqa.create_metric(PYIQA[metric], device=torch.device(device))
    except Exception as error:  # not there, or its model cannot be fetched; it raises many kinds
        advice = "pip install pyiqa, or choose --metric frechet"
        raise mi.InputError(f"--metric {metric} needs pyiqa and its {PYIQA[metric]} ({error}): {advice}") from error

    def measure(video):
        frames = (video.transpose(0, 1) + 1) / 2  # (T, 3, H, W) in [0, 1]
        scale = 512 / max(frames.shape[2:])
        if metric == "imaging" and scale < 1:
            frames = F.interpolate(frames, size=[int(scale * n) for n in frames.shape[2:]], mode="bilinear")
        return sum(float(model(frame[None].to(device))) for frame in frames) / len(frames)

    return measure


def users_function(metric):
    """The function behind "module:function"; the module may lie in the current folder. Raises InputError."""
    if not re.fullmatch(r"[\w.]+:\w+", metric):
        raise mi.InputError(f"--metric {metric} is not imaging, aesthetic, frechet or some module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, name = metric.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise mi.InputError(f"--metric {metric} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise mi.InputError(f"--metric {metric} is not a function")
    return function


@torch.no_grad()
def features(video, encoder):
    """(T, C) float32 of a video (3,6k+1,H,W): see FEATURE."""
    seen = []  # of the pieces in which the encoder takes the video

    def look(_, inputs):
        seen.append(inputs[0][0].float().mean((1, 2)))  # (1, t, h, w, C) -> (t, C)

    hook = encoder.output_proj.register_forward_pre_hook(look)
    encoder(video[None].to(encoder.output_proj.weight.device))
    hook.remove()
    return torch.cat(seen).cpu()


def gaussian(measured):  # the features of some videos, (T, C) each -> mean (C,), covariance (C, C), float64
    rows = torch.cat(measured).double()
    return rows.mean(0), rows.T.cov()


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians; float64. Covariances may be singular.

    The product's root has the trace of the root of the symmetric A^(1/2) B A^(1/2), whose eigenvalues are real.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def reference_statistics(videos, encoder):
    """({"mean", "cov"}, metadata) of the features of an iterable of videos (3,6k+1,H,W) in [-1,1]: what
    save_safetensors makes a weights folder's reference.safetensors of."""
    measured = [features(video, encoder) for video in videos]
    if not measured:
        raise mi.InputError("there is no reference clip that is long enough")
    mean, cov = gaussian(measured)
    return {"mean": mean, "cov": cov}, {"clips": str(len(measured)), "feature": FEATURE}


def reference_clips(folder, frames, height, width, fps):
    """The beginning of every video below a folder that is long enough, (3,T,H,W) in [-1,1]."""
    for path in tqdm(videos_below(folder), "reference", unit="clip"):
        clip = list(itertools.islice(mi.read_frames(path, height, width, fps), frames))
        if len(clip) == frames:
            yield torch.stack([torch.from_numpy(frame) for frame in clip]).permute(3, 0, 1, 2) / 127.5 - 1


def videos_below(folder):
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True))
    paths = [path for path in paths if path.lower().endswith((".mp4", ".mov", ".webm", ".mkv", ".avi"))]
    if not paths:
        raise mi.InputError(f"there is no video below --reference {folder}")
    return paths


def load_reference(path, width):
    """(mean, cov), how many clips. Raises InputError for what is not the statistics of such an encoder's features."""
    tensors, metadata = mi.read_safetensors(path)
    mi.check_names(path, {name: t.shape for name, t in tensors.items()}, {"mean": (width,), "cov": (width, width)})
    if metadata.get("feature") != FEATURE or not all(t.isfinite().all() for t in tensors.values()):
        raise mi.InputError(f"{path} is not a reference for --metric frechet; make it again")
    return (tensors["mean"].double(), tensors["cov"].double()), metadata["clips"]


def load_metric(settings, weights, reference, out, device, dtype, fps, sampling):
    """measure(video) and score(measured); measure is None where nothing is to be sampled. Raises InputError."""
    metric, mean = settings["metric"], lambda measured: sum(measured) / len(measured)
    if metric in PYIQA:
        return image_quality(metric, device) if sampling else None, mean
    if metric != "frechet":
        return users_function(metric), mean
    encoder = mi.load_encoder(os.path.join(weights, "encoder.safetensors"), device, dtype)
    path = os.path.join(weights, REFERENCE)
    if reference:
        files = [(name, os.path.getsize(name), os.stat(name).st_mtime_ns) for name in videos_below(reference)]
        key = digest([files, *(settings[name] for name in ("weights", "dtype", "frames", "size"))])
        path = os.path.join(out, "kept", f"reference-{key[:12]}.safetensors")
        if not os.path.exists(path):
            clips = reference_clips(reference, settings["frames"], *settings["size"], fps)
            mi.save_safetensors(path, *reference_statistics(clips, encoder))
    wanted, clips = load_reference(path, encoder.output_proj.in_features)
    print(f"reference {clips} clips, {reference or path}")
    return lambda video: features(video, encoder), lambda measured: -frechet_distance(*gaussian(measured), *wanted)


# ------------------------------------------------------------------------------------------------------------------
# What is kept of a video, under a name that depends on everything that determines it
# ------------------------------------------------------------------------------------------------------------------


def file_digest(path):
    """Of a file's size and of 64 MiB spread over it: all of a small one, seconds for Mochi's 40 GB."""
    size = os.path.getsize(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(64):
            file.seek(i * size // 64)
            found.update(file.read(1 << 20))
    return found.hexdigest()


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def folder_digest(weights, metric):
    """Of what makes the videos, and of the encoder where that measures them; wherever the folder lies."""
    files = ["dit.safetensors", "decoder.safetensors"] + ["encoder.safetensors"] * (metric == "frechet")
    for folder in ("text_encoder", "tokenizer"):
        if not os.path.isdir(os.path.join(weights, folder)):
            raise mi.InputError(f"no such folder: {os.path.join(weights, folder)}")
        names = (os.path.join(folder, name) for name in sorted(os.listdir(os.path.join(weights, folder))))
        files += [name for name in names if os.path.isfile(os.path.join(weights, name))]
    return digest([(name, file_digest(os.path.join(weights, name))) for name in files])


def kept_name(settings, layer, prompt, seed):
    """A name to read, and its digest; layer None is the baseline, which the guidance's scale does not change."""
    key = settings | {"layer": layer, "prompt": prompt, "seed": seed}
    key |= {"skip_scale": 0} if layer is None else {}
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
    return f"{'baseline' if layer is None else f'layer-{layer:02d}'}-{words}-{seed}-{digest(key)[:12]}"


def read_kept(path):
    """The number or the features (T, C) that were measured; None where they are not there, or damaged."""
    try:
        if path.endswith(".safetensors"):
            measured = mi.read_safetensors(path)[0]["features"].clone()
            return measured if measured.ndim == 2 and measured.isfinite().all() else None
        with open(path) as file:
            measured = json.load(file)["score"]
        return measured if math.isfinite(measured) else None
    except (OSError, ValueError, KeyError, TypeError):  # an InputError is a ValueError
        return None


def keep_measure(path, measure, video, settings, layer, prompt, seed):
    """Measure a video and keep what was found. Raises InputError where that is no number."""
    name = f'{name_of(layer)}, "{prompt}", seed {seed}'
    if settings["metric"] == "frechet":
        mi.save_safetensors(path, {"features": measure(video)})
        return
    try:
        found = float(measure(video))
    except Exception as error:  # whatever the user's function raises
        raise mi.InputError(f"{settings['metric']} fails on {name} ({type(error).__name__}: {error})") from error
    if not math.isfinite(found):
        raise mi.InputError(f"{settings['metric']} gives {found} for {name}")
    about = {"layer": layer, "prompt": prompt, "seed": seed, "noise_seed": noise_seed(prompt, seed)}
    mi.save_json(path, {"score": found} | about | settings)


def name_of(layer):
    return "the baseline" if layer is None else f"layer {layer}"


def noise_seed(prompt, seed):
    """Of a video's noise: the same for every layer, independent for every prompt, so that videos are independent.
    `sample.py PROMPT --seed THIS --adapter none --skip LAYER --skip-scale 1` makes the same video."""
    return int(digest([prompt, seed])[:15], 16)


# ------------------------------------------------------------------------------------------------------------------
# The ranking
# ------------------------------------------------------------------------------------------------------------------


def leave_one_out(score, measured):
    """(1 + n,) float64: the score of n videos, then that of all but each."""
    less = [measured[:i] + measured[i + 1 :] for i in range(len(measured))] if len(measured) > 1 else []
    return torch.tensor([score(part) for part in (measured, *less)], dtype=torch.float64)


def estimate(difference):
    """A difference of two leave_one_out and its standard error by the jackknife, None for one video. The same videos
    are left out of both: for a mean of scores, this is the standard error of their paired differences."""
    value, less = difference[0].item(), difference[1:]
    return value, ((len(less) - 1) * less.var(correction=0)).sqrt().item() if len(less) else None


def compare(score, baseline, layers):
    """baseline: measured of n videos; layers: that of each layer. Returns the adaptability and its standard error of
    each layer, the ranking, best first, and (difference, standard error) of each rank and the next."""
    base, *scores = (leave_one_out(score, measured) for measured in (baseline, *layers))
    gains, errors = map(list, zip(*(estimate(s - base) for s in scores)))
    ranking = sorted(range(len(layers)), key=lambda layer: -gains[layer])
    steps = [estimate(scores[a] - scores[b]) for a, b in itertools.pairwise(ranking)]
    return {"ranking": ranking, "adaptability": gains, "standard_error": errors, "baseline": base[0].item()}, steps


def report(result, steps, top, videos):
    """The table, the bar chart (the paper's Fig. 15), and which ranks can be told apart."""
    ranking, gains, errors = (result[key] for key in ("ranking", "adaptability", "standard_error"))
    places = max(0, 3 - math.floor(math.log10(max(map(abs, gains)) or 1)))  # four digits of the largest
    plus_minus = lambda value, error: (  # noqa: E731
        f"{value:+.{places}f} ± {'?' if error is None else f'{error:.{places}f}'}"
    )
    print(f"\nrank  layer  adaptability, a gain over the baseline's {result['baseline']:.4g}")
    for place, layer in enumerate(ranking):
        print(f"{place + 1:4}  {layer:5}  {plus_minus(gains[layer], errors[layer])}{'  *' * (place < top)}")
    low, high = min(0.0, *gains), max(0.0, *gains)
    zero, *ends = (round(40 * (value - low) / ((high - low) or 1)) for value in (0.0, *gains))
    print("\nlayer")
    for layer, end in enumerate(ends):
        bar = " " * min(end, zero) + "█" * max(zero - end, 0) + "|" + "█" * max(end - zero, 0)
        print(f"{layer:5}  {bar}{' *' * (layer in ranking[:top])}")
    print(f"\n* the best {top}")
    if errors[0] is None:
        print("one video tells nothing of the error: give more prompts or seeds")
        return
    apart = sum(gap > 2 * error for gap, error in steps)
    print(f"{apart} of {len(steps)} neighbouring ranks are more than two standard errors apart")
    for (gap, error), a, b in list(zip(steps, ranking, ranking[1:]))[top - 1 : top]:
        print(f"rank {top} (layer {a}) against rank {top + 1} (layer {b}): {plus_minus(gap, error)},", end=" ")
        needed = f"about {math.ceil(videos * (2 * error / gap) ** 2):,} videos" if gap else "no number of videos"
        print("told apart" if gap > 2 * error else f"not told apart; {needed} a layer would do, here are {videos}")


def layer_numbers(text, depth):
    """[0, 1, 2, 5] from "0-2,5"; all from None. Raises InputError."""
    if text is None:
        return list(range(depth))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise mi.InputError(f"--layers {text}: give numbers and ranges such as 0-11 or 0,3,6")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    layers = {layer for part in ends for layer in range(part[0], part[-1] + 1)}
    if not layers or max(layers) >= depth:
        raise mi.InputError(f"--layers {text}: the model has layers from 0 to {depth - 1}")
    return sorted(layers)


def load_sampler(weights, prompts, settings, device, dtype):
    """sampler(layer, videos, progress) yields the videos (3,T,H,W) in [-1,1] of these (prompt, seed), guided by layer,
    None: the baseline."""
    dit_path = os.path.join(weights, "dit.safetensors")
    *texts, null = mi.encode_text(weights, [*prompts, ""], device, dtype)
    texts = dict(zip(prompts, texts))
    dit = mi.load_dit(dit_path, device, dtype)
    if null[0].shape[-1] != dit.t5_yproj.in_features:
        wanted = f"{dit_path} takes {dit.t5_yproj.in_features}"
        raise mi.InputError(f"text_encoder gives {null[0].shape[-1]} features a token, but {wanted}: no fit")
    decoder = mi.load_decoder(os.path.join(weights, "decoder.safetensors"), device, dtype)
    natural, sigmas, (height, width) = dit.natural, mi.linear_quadratic_schedule(settings["steps"]), settings["size"]
    shape = len(natural.mean), (settings["frames"] - 1) // 6 + 1, height // 8, width // 8

    @torch.no_grad()
    def sampler(layer, videos, progress):
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed(*video))) for video in videos]
        text = [pad_sequence([texts[prompt][i][0] for prompt, _ in videos], batch_first=True) for i in (0, 1)]
        blank = [part.expand(len(videos), *part.shape[1:]) for part in null]
        skip = () if layer is None else (layer,)
        z = mi.sample(dit, torch.stack(noise).to(device), text, blank, sigmas=sigmas, cfg=settings["cfg"], skip=skip,
                      skip_scale=settings["skip_scale"], progress=progress)  # fmt: skip
        if not z.isfinite().all():
            raise mi.InputError(f"a video of {name_of(layer)} is not finite; try a lower --skip-scale")
        for latents in mi.to_vae_space(z, natural.mean, natural.std).split(1):
            yield decoder(latents)[0].clamp(-1, 1).cpu()

    return sampler


def settle(weights, metric, reference, skip_scale, cfg, steps, frames, size, dtype):
    """All that determines a video and its measure, but for the layer, the prompt and the seed. Raises InputError."""
    dit = mi.load_dit(os.path.join(weights, "dit.safetensors"), "meta")
    mi.load_decoder(os.path.join(weights, "decoder.safetensors"), "meta")
    own = os.path.join(weights, REFERENCE)
    metric = metric or ("frechet" if reference or os.path.exists(own) else "imaging")
    if reference and metric != "frechet":
        raise mi.InputError(f"--reference is for --metric frechet, not for {metric}")
    if metric == "frechet" and not (reference or os.path.exists(own)):
        raise mi.InputError(f"--metric frechet needs --reference FOLDER, as there is no {own}")
    settings = {
        "weights": folder_digest(weights, metric), "metric": metric, "skip_scale": skip_scale,
        "cfg": dit.natural.cfg if cfg is None else cfg, "steps": dit.natural.steps if steps is None else steps,
        "frames": dit.natural.frames if frames is None else frames,
        "size": list(size or (dit.natural.height, dit.natural.width)), "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    mi.check_sizes(settings["frames"], *settings["size"])
    mi.linear_quadratic_schedule(settings["steps"])
    if not math.isfinite(skip_scale):
        raise mi.InputError(f"--skip-scale must be a number, not {skip_scale}")
    if metric not in ("frechet", *PYIQA):  # a function that was changed measures anew
        users_function(metric)
        file = getattr(sys.modules[metric.split(":")[0]], "__file__", None)
        settings["source"] = file and file_digest(file)
    return settings, dit


def rank(*, weights=None, prompts=PROMPTS, seeds=(0, 1), metric=None, reference=None, layers=None, skip_scale=1.0,
         cfg=None, steps=None, frames=None, size=None, batch=None, keep=False, out="runs/adaptability", top=None,
         dry_run=False, device=None, dtype=None):  # fmt: skip
    """Rank the layers of a weights folder; None stands for the folder's own default, (height, width) for size.

    The velocity is uncond + cfg (cond - uncond) + skip_scale (cond - cond without the layer). For the rest see the
    command line. Returns what adaptability.json holds, or None for a dry run and where layers are missing still.
    Raises musicinfuser.InputError, before anything takes long where it can.
    """
    weights = weights or mi.default_weights()
    device, dtype = mi.choose_device(device, dtype)
    settings, dit = settle(weights, metric, reference, skip_scale, cfg, steps, frames, size, dtype)
    metric, depth, (height, width) = settings["metric"], len(dit.blocks), settings["size"]
    layers, top = layer_numbers(layers, depth), round(depth / 3) if top is None else top
    prompts, seeds = list(dict.fromkeys(prompts)), list(dict.fromkeys(seeds))
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise mi.InputError("there are no prompts, or an empty one")
    if not seeds or min(seeds) < 0:
        raise mi.InputError("--seed takes numbers from 0")
    if not 1 <= top <= depth:
        raise mi.InputError(f"--top must be from 1 to {depth}, not {top}")
    tokens = ((settings["frames"] - 1) // 6 + 1) * height * width // 256
    batch = max(1, 4096 // tokens) if batch is None else batch
    if batch < 1:
        raise mi.InputError(f"--batch must be 1 or more, not {batch}")

    def kept(*video):  # the file of a measure
        kind = "safetensors" if metric == "frechet" else "json"
        return os.path.join(out, "kept", f"{kept_name(settings, *video)}.{kind}")

    def film(*video):
        return os.path.join(out, "videos", f"{kept_name(settings, *video)}.mp4")

    def missing(*video):
        return read_kept(kept(*video)) is None or (keep and not os.path.exists(film(*video)))

    def passes(layer):  # of the transformer a step
        return 1 + (settings["cfg"] != 1) + (layer is not None and skip_scale != 0)

    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    videos = [(layer, *pair) for layer in (*layers, None) for pair in pairs]
    todo = [video for video in videos if missing(*video)]
    work, left = (settings["steps"] * sum(passes(layer) for layer, *_ in those) for those in (videos, todo))
    print(f"weights  {weights}, no adapter")
    print(f"device   {device}, {settings['dtype']}")
    print(f"video    {height}x{width}, {settings['frames']} frames at {dit.natural.fps} fps, {batch} at once")
    print(f"solver   {settings['steps']} steps, cfg {settings['cfg']:g}, skip scale {skip_scale:g}")
    print(f"work     {len(layers)} layers and the baseline, {len(prompts)} prompts, {len(seeds)} seeds, {metric}")
    print(f"         {work:,} forward passes for {len(videos)} videos; {len(videos) - len(todo)} videos are there, "
          f"{left:,} passes are left")  # fmt: skip
    if dry_run:
        return None

    mi.save_json(os.path.join(out, "kept", f"settings-{digest(settings)[:12]}.json"), settings)  # or it fails now
    measure, score = load_metric(settings, weights, reference, out, device, dtype, dit.natural.fps, bool(todo))
    sampler = load_sampler(weights, prompts, settings, device, dtype) if todo else None
    with tqdm(total=left, unit="pass", disable=not todo) as bar:
        for layer, start in itertools.product((*layers, None), range(0, len(pairs), batch)):
            bar.set_description(name_of(layer))  # the baseline last: another process may have made it by then
            group = [pair for pair in pairs[start : start + batch] if missing(layer, *pair)]
            progress = functools.partial(counted, bar=bar, amount=len(group) * passes(layer))
            for pair, video in zip(group, sampler(layer, group, progress) if group else ()):
                if keep:
                    mi.save_video(film(layer, *pair), video, dit.natural.fps)
                keep_measure(kept(layer, *pair), measure, video, settings, layer, *pair)

    measured = [[read_kept(kept(layer, *pair)) for pair in pairs] for layer in (None, *range(depth))]
    lacking = [layer for layer in range(depth) if any(found is None for found in measured[layer + 1])]
    if lacking:
        print(f"layers {', '.join(map(str, lacking))} are missing: whoever finds all of them writes the ranking")
        return None
    result, gaps = compare(score, measured[0], measured[1:])
    report(result, gaps, top, len(pairs))
    result |= {"metric": metric, "reference": reference, "prompts": prompts, "seeds": seeds, "settings": settings}
    path = os.path.join(out, "adaptability.json")
    mi.save_json(path, result)
    choice = f"{path}{f' --top {top}' if top != round(depth / 3) else ''}"
    print(f"{path}: train.py --layers {choice}, or copy it into {weights} as the default there")
    return result


def counted(steps, bar, amount):
    for step in steps:
        yield step
        bar.update(amount)


def read_prompts(path):
    """One prompt a line. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise mi.InputError(f"cannot read the prompts of {path}: {error}") from error


def main():
    parser = argparse.ArgumentParser(description="Rank a model's layers by what each lends as guidance.")
    add = parser.add_argument
    add("--weights", help="folder; default: weights/ if it holds a model, else tiny/")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT", help="default: eight dances")
    prompts.add_argument("--prompts-file", metavar="FILE", help="... or one a line")
    add("--seed", type=int, nargs="+", default=[0, 1], help="of each prompt (default 0 1)")
    add("--metric", help="imaging, aesthetic (both through pyiqa), frechet, or module:function, which takes a video "
        "(3,T,H,W) in [-1,1] and returns a number, higher is better; default: frechet if there is a reference, "
        "else imaging")  # fmt: skip
    add("--reference", metavar="FOLDER", help="of videos for frechet; default: the weights' reference.safetensors")
    add("--layers", help="only these, such as 0-11 or 0,3,6; other processes do the rest in the same --out")
    add("--skip-scale", type=float, default=1.0, help="s of the guidance (default 1)")
    add("--cfg", type=float, help="guidance scale of the text; default: the model's own, as for all that follow")
    add("--steps", type=int, help="of the ODE solver (Mochi: 64)")
    add("--frames", type=int, help="6k + 1")
    add("--size", type=mi.height_by_width, metavar="HxW", help="multiples of 16")
    add("--batch", type=int, help="videos sampled at once; default: 4096 tokens of them (Mochi: 1)")
    add("--keep", action="store_true", help="keep the videos as mp4")
    add("--out", default="runs/adaptability", help="run folder; the same command goes on where it stopped")
    add("--top", type=int, help="how many layers to mark; default: a third")
    add("--dry-run", action="store_true", help="say how many forward passes it takes, and stop")
    add("--device", help="cuda, cpu, ...; default: cuda if there is one")
    add("--dtype", choices=list(mi.DTYPES), help="default: bfloat16 on a GPU, else float32")
    options = vars(parser.parse_args())
    if (file := options.pop("prompts_file")) is not None:
        options["prompts"] = read_prompts(file)
    rank(seeds=options.pop("seed"), **options)


if __name__ == "__main__":
    mi.main(main)
