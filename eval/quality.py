"""How good do videos look, how like real ones, and are they copies?

Top to bottom:   image quality (pyiqa) | Frechet distance over the VAE's features | not copied |
                 the metrics that adaptability.py offers
Videos are (3,T,H,W) in [-1,1], T = 6k + 1 where an encoder sees them.
"""

import importlib
import itertools
import json
import math
import os
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import musicinfuser as mi
from dataset.aist import list_videos

# ----------------------------------------------------------------------------------------------
# Image quality
# ----------------------------------------------------------------------------------------------

# imaging is VBench's imaging quality: MUSIQ trained on SPAQ, 0 to 100. laion_aes is pyiqa's MLP of
# that name, about 0 to 10; VBench's aesthetic quality is LAION's older linear head, another scale.
PYIQA = {"imaging": "musiq-spaq", "laion_aes": "laion_aes"}
LONGEST = 512  # pixels a side that MUSIQ sees, as in VBench


def image_quality(metric, device):
    """measure(video) -> the mean over the frames of pyiqa's score. Raises InputError."""
    try:
        import pyiqa  # here, because it is the user's to install

        model = pyiqa.create_metric(PYIQA[metric], device=torch.device(device))
    except Exception as error:  # not there, or its model cannot be fetched; it raises many kinds
        advice = "pip install pyiqa, or choose --metric frechet"
        needed = f"--metric {metric} needs pyiqa and its {PYIQA[metric]}"
        raise mi.InputError(f"{needed} ({error}): {advice}") from error

    def measure(video):
        scores = [float(model(frame.to(device))) for frame in frames_to_score(video, metric)]
        return sum(scores) / len(scores)

    return measure


def frames_to_score(video, metric):
    """Yield (1,3,H,W) in [0,1]."""
    for frame in ((video + 1) / 2).split(1, dim=1):
        frame = frame.transpose(0, 1)
        scale = LONGEST / max(frame.shape[2:])
        if metric == "imaging" and scale < 1:  # laion_aes resizes by itself
            size = [int(scale * side) for side in frame.shape[2:]]
            frame = F.interpolate(frame, size=size, mode="bilinear")
        yield frame


# ----------------------------------------------------------------------------------------------
# Frechet distance
# ----------------------------------------------------------------------------------------------

REFERENCE = "reference.safetensors"  # of a weights folder: mean and covariance of real clips
FEATURE = (
    "the encoder's last activations, after norm and SiLU, averaged over space; "
    "one vector a latent frame"
)


@torch.no_grad()
def features(video, encoder):
    """(latent frames, C) float32: see FEATURE."""
    seen = []  # of the pieces in which the encoder takes the video

    def look(_, inputs):
        seen.append(inputs[0][0].float().mean((1, 2)))  # (1, t, h, w, C) -> (t, C)

    hook = encoder.output_proj.register_forward_pre_hook(look)
    encoder(video[None].to(encoder.output_proj.weight.device))
    hook.remove()
    return torch.cat(seen).cpu()


def gaussian(measured):
    """Features of some videos, (T, C) each -> mean (C,), covariance (C, C), float64."""
    rows = torch.cat(measured).double()
    return rows.mean(0), rows.T.cov()


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians; float64, covariances may be
    singular.

    The product's root has the trace of the root of the symmetric A^(1/2) B A^(1/2), whose
    eigenvalues are real.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * shared)


def reference_statistics(videos, encoder):
    """({"mean", "cov"}, metadata) of the features of an iterable of videos: what save_safetensors
    makes a weights folder's reference.safetensors of. Raises InputError for none."""
    measured = [features(video, encoder) for video in videos]
    if not measured:
        raise mi.InputError("there is no reference clip that is long enough")
    mean, cov = gaussian(measured)
    return {"mean": mean, "cov": cov}, {"clips": str(len(measured)), "feature": FEATURE}


def load_reference(path, width):
    """(mean, cov), how many clips. Raises InputError for what is not such statistics."""
    tensors, metadata = mi.read_safetensors(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    mi.check_names(path, shapes, {"mean": (width,), "cov": (width, width)})
    finite = all(tensor.isfinite().all() for tensor in tensors.values())
    if metadata.get("feature") != FEATURE or not finite:
        raise mi.InputError(f"{path} is not a reference for --metric frechet; make it again")
    return (tensors["mean"].double(), tensors["cov"].double()), metadata.get("clips", "?")


def videos_below(folder):
    """All videos below a folder, sorted. Raises InputError for none."""
    videos = [path for path in list_videos(folder) if os.path.isfile(path)]
    if not videos:
        raise mi.InputError(f"there is no video below {folder}")
    return videos


def reference_clips(folder, frames, height, width, fps):
    """Yield the beginning of every video below a folder that is long enough."""
    for path in tqdm(videos_below(folder), "reference", unit="clip"):
        clip = list(itertools.islice(mi.read_frames(path, height, width, fps), frames))
        if len(clip) == frames:
            yield mi.from_pixels(np.stack(clip))


# ----------------------------------------------------------------------------------------------
# Not copied: how near is the nearest training clip?
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def latents_of(video, encoder):
    """(12, T, H, W): the mean that the VAE encodes a video to. A copy would have the same."""
    device = encoder.output_proj.weight.device
    return encoder(video[None].to(device))[0][0].float().cpu()


def nearest(queries, bank):
    """(indices (Q,), distances (Q,)) of the nearest of `bank` to each of `queries`, stacked.

    bank: yields one after another, of a query's shape, so that a large set needs no memory. The
    distance is the root of the mean squared difference, in the features' own unit; 0 for a copy.
    """
    indices = torch.full((len(queries),), -1)
    distances = torch.full((len(queries),), math.inf)
    for i, features in enumerate(bank):
        found = (queries - features).flatten(1).square().mean(1).sqrt()
        closer = found < distances
        indices[closer], distances[closer] = i, found[closer]
    return indices, distances


# ----------------------------------------------------------------------------------------------
# Metrics of adaptability.py: what is measured of a video, how that is kept, and the score of
# several; higher is better
# ----------------------------------------------------------------------------------------------


def choose_metric(options):
    """Number or Frechet, not loaded yet. options: of adaptability.py. Raises InputError."""
    own = os.path.join(options.weights, REFERENCE)
    has_reference = options.reference or os.path.exists(own)
    if options.metric is None:
        options.metric = "frechet" if has_reference else "imaging"
    if options.metric != "frechet":
        if options.reference:
            raise mi.InputError(f"--reference is for frechet, not for --metric {options.metric}")
        return Number(options.metric)
    if not has_reference:
        raise mi.InputError(f"--metric frechet needs --reference FOLDER, as there is no {own}")
    return Frechet(options)


class Number:
    """A number a video, pyiqa's or the user's, and their mean."""

    def __init__(self, name):
        self.name, self.source, self.function = name, None, None
        if name not in PYIQA:
            self.function = users_function(name)
            file = getattr(sys.modules[name.split(":")[0]], "__file__", None)
            self.source = file and mi.file_digest(file)  # one that was changed measures anew

    def load(self, options, fps, sampling):
        if sampling and self.name in PYIQA:
            self.function = image_quality(self.name, options.device)

    def write(self, path, pixels, about):
        """Raises InputError where the function fails, or gives no number."""
        video = about["video"]
        try:
            found = float(self.function(pixels))
        except Exception as error:  # whatever the user's function raises
            reason = f"{type(error).__name__}: {error}"
            raise mi.InputError(f"{self.name} fails on {video} ({reason})") from error
        if not math.isfinite(found):
            raise mi.InputError(f"{self.name} gives {found} for {video}")
        mi.save_json(path + ".json", {"score": found} | about)

    def read(self, path):
        """None where it is not there, or damaged."""
        try:
            with open(path + ".json", encoding="utf-8") as file:
                found = json.load(file)["score"]
            return found if math.isfinite(found) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return None

    def score(self, measured):
        return sum(measured) / len(measured)


class Frechet:
    """The VAE encoder's features of each video; minus the distance of all to real clips'."""

    source = None

    def __init__(self, options):
        self.path = os.path.join(options.weights, "encoder.safetensors")
        self.width = mi.load_encoder(self.path, "meta").output_proj.in_features
        self.frames = mi.latent_frames(options.frames)

    def load(self, options, fps, sampling):
        self.encoder = mi.load_encoder(self.path, options.device, mi.DTYPES[options.dtype])
        file = os.path.join(options.weights, REFERENCE)
        if options.reference:
            file = self.reference_of_folder(options, fps)
        self.wanted, count = load_reference(file, self.width)
        print(f"reference {count} clips, {options.reference or file}")

    def reference_of_folder(self, options, fps):
        """The statistics of a folder's videos, made once for each content of it."""
        contents = [mi.file_digest(path) for path in videos_below(options.reference)]
        how = [mi.model_digest(self.path), options.dtype, options.frames, options.size]
        key = mi.digest([contents, how])[:12]
        file = os.path.join(options.out, "kept", f"reference-{key}.safetensors")
        if not os.path.exists(file):
            clips = reference_clips(options.reference, options.frames, *options.size, fps)
            mi.save_safetensors(file, *reference_statistics(clips, self.encoder))
        return file

    def write(self, path, pixels, about):
        found = features(pixels, self.encoder)
        mi.save_safetensors(path + ".safetensors", {"features": found})

    def read(self, path):
        try:
            found = mi.read_safetensors(path + ".safetensors")[0]["features"].clone()
        except (mi.InputError, KeyError):
            return None
        fits = found.shape == (self.frames, self.width) and found.isfinite().all()
        return found if fits else None

    def score(self, measured):
        return -frechet_distance(*gaussian(measured), *self.wanted)


def users_function(metric):
    """The function behind "module:function"; the module may lie in the current folder."""
    if not re.fullmatch(r"[\w.]+:\w+", metric):
        names = ", ".join([*PYIQA, "frechet"])
        raise mi.InputError(f"--metric {metric} is not {names} or some module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, name = metric.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {error}"
        raise mi.InputError(f"--metric {metric} cannot be imported ({reason})") from error
    if not callable(function):
        raise mi.InputError(f"--metric {metric} is not a function")
    return function
