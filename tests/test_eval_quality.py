"""Quality: the Frechet distance against its definition, image quality as VBench has it, copies."""

import os
import sys
import types

import numpy as np
import pytest
import torch

import musicinfuser as mi
from eval import quality

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tiny")


@pytest.fixture(scope="module")
def encoder():
    return mi.load_encoder(os.path.join(TINY, "encoder.safetensors"))


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def clips(count, frames=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, frames, 32, 32, generator=generator) * 2 - 1 for _ in range(count)]


# Frechet distance -------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_that_commute():
    """There the root is of the eigenvalues; both covariances are singular."""
    turn, _ = torch.linalg.qr(randn(5, 5))
    a = torch.tensor([1.0, 4, 9, 0.25, 0]).double()
    b = torch.tensor([4.0, 1, 0, 0.25, 16]).double()
    mean = torch.arange(5.0).double()
    found = quality.frechet_distance(mean, turn * a @ turn.T, mean - 2, turn * b @ turn.T)
    assert found == pytest.approx(5 * 4 + (a.sqrt() - b.sqrt()).square().sum().item())


def test_frechet_distance_by_its_definition():
    x, y = randn(40, 3), randn(50, 3, seed=1) @ randn(3, 3, seed=2) + 1
    (m, cov_x), (n, cov_y) = quality.gaussian([x[:10], x[10:]]), quality.gaussian([y])
    assert np.allclose(cov_x, np.cov(x.T)) and np.allclose(m, x.mean(0))
    values, vectors = np.linalg.eig((cov_x @ cov_y).numpy())
    root = vectors @ np.diag(np.sqrt(values)) @ np.linalg.inv(vectors)
    assert np.allclose(root @ root, cov_x @ cov_y)
    wanted = (m - n).square().sum().item() + np.trace((cov_x + cov_y).numpy() - 2 * root)
    assert quality.frechet_distance(m, cov_x, n, cov_y) == pytest.approx(float(wanted))
    assert quality.frechet_distance(m, cov_x, m, cov_x) == pytest.approx(0, abs=1e-9)


def test_features_are_what_the_encoder_projects(encoder):
    """The projection has no bias, so that it and the mean over space may be swapped."""
    video = clips(1, 13)[0]
    found = quality.features(video, encoder)
    assert found.shape == (3, encoder.output_proj.in_features)
    with torch.no_grad():
        projected = torch.cat(encoder(video[None]), 1)[0].mean((2, 3))
    torch.testing.assert_close(found @ encoder.output_proj.weight.T, projected.T, rtol=0, atol=1e-4)
    assert not encoder.output_proj._forward_pre_hooks


def test_reference_statistics_are_kept_and_read(encoder, tmp_path):
    path = tmp_path / "reference.safetensors"
    tensors, metadata = quality.reference_statistics(iter(clips(3)), encoder)
    mi.save_safetensors(path, tensors, metadata)
    (mean, cov), count = quality.load_reference(path, len(tensors["mean"]))
    assert count == "3" and torch.equal(mean, tensors["mean"]) and torch.equal(cov, tensors["cov"])
    with pytest.raises(mi.InputError, match="no reference clip"):
        quality.reference_statistics([], encoder)


@pytest.mark.parametrize("damage", ["short", "lacking", "not a number", "another feature"])
def test_a_reference_of_something_else_is_one_line(damage, tmp_path):
    tensors = {"mean": torch.zeros(6).double(), "cov": torch.eye(6).double()}
    metadata = {"clips": "3", "feature": quality.FEATURE}
    if damage == "short":
        tensors["mean"] = torch.zeros(5)
    elif damage == "lacking":
        del tensors["cov"]
    elif damage == "not a number":
        tensors["cov"] *= float("nan")
    else:
        metadata["feature"] = "another"
    mi.save_safetensors(tmp_path / "reference.safetensors", tensors, metadata)
    with pytest.raises(mi.InputError, match="reference.safetensors"):
        quality.load_reference(tmp_path / "reference.safetensors", 6)


def test_the_shipped_reference_fits_the_shipped_encoder(encoder):
    path = os.path.join(TINY, quality.REFERENCE)
    (mean, cov), _ = quality.load_reference(path, encoder.output_proj.in_features)
    assert quality.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-6)


def test_reference_clips_are_whole_beginnings(tmp_path):
    for i, frames in enumerate((9, 7, 5)):  # the last is too short
        mi.save_video(str(tmp_path / "deeper" / f"{i}.mp4"), clips(1, frames, seed=i)[0])
    (tmp_path / "folder.mp4").mkdir()  # is no video
    found = list(quality.reference_clips(str(tmp_path), 7, 32, 32, 30))
    assert [clip.shape for clip in found] == [(3, 7, 32, 32)] * 2
    assert all(-1 <= clip.min() and clip.max() <= 1 for clip in found)
    with pytest.raises(mi.InputError, match="no video below"):
        quality.videos_below(str(tmp_path / "folder.mp4"))


# Image quality ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, model, size, seen",
    [
        ("imaging", "musiq-spaq", (600, 1024), (300, 512)),
        ("imaging", "musiq-spaq", (48, 32), (48, 32)),
        ("laion_aes", "laion_aes", (600, 1024), (600, 1024)),
    ],
)
def test_pyiqa_scores_frames_as_vbench_does(monkeypatch, metric, model, size, seen):
    asked, shapes = [], []

    def score(frame):
        shapes.append(tuple(frame.shape))
        return frame.mean()[None, None]

    fake = types.ModuleType("pyiqa")
    fake.create_metric = lambda name, device: asked.append(name) or score
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    video = torch.linspace(0, 1, 5)[None, :, None, None].expand(3, 5, *size)
    measure = quality.image_quality(metric, "cpu")
    assert measure(video) == pytest.approx(0.75)  # of pixels in [0, 1]
    assert shapes == 5 * [(1, 3, *seen)] and asked == [model]


def test_a_missing_pyiqa_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(mi.InputError, match="--metric imaging needs pyiqa .*pip install pyiqa"):
        quality.image_quality("imaging", "cpu")


# Copies -----------------------------------------------------------------------------------------


def test_a_copy_is_found_at_distance_zero(encoder):
    bank = torch.stack([quality.latents_of(clip, encoder) for clip in clips(4)])
    queries = torch.stack([bank[2], bank[1] + 0.5])
    index, distance = quality.nearest(queries, iter(bank))
    assert index.tolist() == [2, 1]
    assert distance.tolist() == pytest.approx([0, 0.5], abs=1e-4)


def test_latents_are_the_encoders_mean(encoder):
    video = clips(1, 13)[0]
    with torch.no_grad():
        mean, _ = encoder(video[None])
    assert torch.equal(quality.latents_of(video, encoder), mean[0])
