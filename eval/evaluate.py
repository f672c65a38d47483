"""Every score of a dancing video. For now the ones that need no libraries: does the motion follow a known beat?"""

import numpy as np
import torch
import torch.nn.functional as F


def motion_energy(frames):
    """uint8 (T, H, W, 3) -> (T - 1,): mean absolute difference of neighbouring frames after 4x4 averaging, smoothed
    with a Gaussian of one frame; value i lies half-way between frames i and i + 1."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    x = F.avg_pool2d(x, 4)
    energy = (x[1:] - x[:-1]).abs().mean((1, 2, 3))
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / 2)
    padded = F.pad(energy[None, None], (3, 3), mode="replicate")
    return F.conv1d(padded, (kernel / kernel.sum())[None, None])[0, 0].numpy()


def beat_correlation(energy, beats):
    """r: Pearson's correlation of the motion energy with sin^2(pi beats), `beats` being the position in the music, in
    beats, at each value; 1 for a dancer who rests on every beat and moves in between."""
    return float(np.corrcoef(energy, np.sin(np.pi * np.asarray(beats)) ** 2)[0, 1])


def motion_tempo(energy, fps=30, low=65, high=215):
    """BPM of the sinusoid that fits the motion energy best."""
    t = np.arange(len(energy)) / fps
    tempos = np.arange(low, high + 0.5, 0.5)
    energy = energy - energy.mean()

    def residual(bpm):
        w = 2 * np.pi * bpm / 60 * t
        basis = np.stack([np.cos(w), np.sin(w), np.ones_like(t)], 1)
        fit, *_ = np.linalg.lstsq(basis, energy, rcond=None)
        return np.square(energy - basis @ fit).sum()

    return float(tempos[np.argmin([residual(bpm) for bpm in tempos])])
