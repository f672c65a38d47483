"""recipes/: each still applies, trains a few steps, samples a video, and does what it promises.

A recipe is tried in a copy of the code and a process of its own, which runs this file as a script.
One without a check here, such as your own, is only applied, trained and sampled.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPT, ROOT, inputs, small_dit

import musicinfuser as mi
import sample
import train

RECIPES = sorted(Path(ROOT, "recipes").glob("*.diff"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, weights, dance_videos, song, tmp_path):
    copy_code(tmp_path)
    error = run(tmp_path, "git", "apply", "--include=*.py", recipe)
    assert not error, f"{recipe.name} no longer applies; make it again:\n{error}"
    check = "tests/test_recipes.py", recipe.stem
    error = run(tmp_path, sys.executable, *check, weights, dance_videos, song)
    assert not error, f"{recipe.name}:\n{error}"


def copy_code(folder):
    for source in [*Path(ROOT).glob("*.py"), *Path(ROOT).glob("*/*.py")]:
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(source, copy)


def test_all_but_the_gate_go_together(tmp_path):
    copy_code(tmp_path)
    recipes = [recipe for recipe in RECIPES if recipe.stem != "gate"]
    assert not run(tmp_path, "git", "apply", "--include=*.py", *recipes)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_table_tells_how_many_lines(recipe):
    lines = recipe.read_text().split("\ndiff --git", 1)[1].splitlines()
    more = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    less = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    table = Path(ROOT, "recipes", "README.md").read_text().splitlines()
    (row,) = [line for line in table if f"]({recipe.name})" in line]
    assert row.endswith(f"| +{more} -{less} |")


def run(folder, *line):
    """What a command wrote, if it failed; a repository around the folder is not looked at."""
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(line, cwd=folder, env=outside, capture_output=True, text=True)
    return (done.stdout + done.stderr)[-4000:] if done.returncode else ""


# ------------------------------------------------------------------------------------------------
# In the process of one recipe
# ------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """The commands that a recipe's head names, at the smallest size."""

    weights: str
    videos: str
    song: str

    def train(self, **options):
        """An adapter file."""
        small = {"layers": "0,2", "rank": 2, "steps": 3, "warmup": 1, "lr": 0.01, "device": "cpu"}
        return train.train(f"{self.videos}/aist", weights=self.weights, **small | options)

    def sample(self, adapter=None, **options):
        """An .mp4; without an adapter, by the random one of the weights folder."""
        how = {"weights": self.weights, "adapter": adapter, "device": "cpu"}
        (path,) = sample.generate(self.song, PROMPT, **how, **options)
        return path

    def frames(self, adapter=None, **options):
        return np.stack(list(mi.read_frames(self.sample(adapter, **options), 32, 32)))


def tensors_of(path):
    return mi.read_safetensors(path)[0]


def trains_and_samples(trial):
    trial.sample(trial.train())


def check_attention_maps(trial):
    """One map a layer is beside the video, and each token hears 1 in all."""
    maps = tensors_of(Path(trial.sample(trial.train())).with_suffix(".safetensors"))
    assert sorted(maps) == ["layer.0", "layer.2"]
    for shares in maps.values():
        assert shares.shape == (2, 2, 2, 2) and shares.min() > 0
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2, 2))


def check_gate(trial):
    """A gate a layer, in the adapter's file, which was closed and has moved."""
    dit, (arguments, audio) = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24), inputs()
    assert torch.equal(dit(*arguments, audio), dit(*arguments))
    adapter = trial.train()
    gates = [t for name, t in tensors_of(adapter).items() if name.endswith(".gate")]
    assert len(gates) == 2 and all(gates)
    trial.sample(adapter)


def check_logit_normal(trial):
    """The logits of the noise levels that the loss sees have that mean and deviation."""
    seen, loss = [], mi.flow_matching_loss

    def watched(dit, z, sigma, eps, **conditions):
        if torch.is_grad_enabled():  # not the losses on held-out clips
            seen.append(sigma)
        return loss(dit, z, sigma, eps, **conditions)

    mi.flow_matching_loss = watched
    trial.sample(trial.train(batch=100, logit_mean=-1.0, logit_std=0.5))
    logits = torch.cat(seen).logit()
    assert len(logits) == 300
    assert abs(logits.mean() + 1) < 0.1 and abs(logits.std() - 0.5) < 0.08


def check_lora_mlp(trial):
    """Both MLPs of a block learn; the last block has only the visual stream's."""
    adapter = trial.train()
    learned = {name for name, t in tensors_of(adapter).items() if "lora_B" in name and t.any()}
    mlps = sorted(name.removesuffix(".lora_B") for name in learned if "mlp" in name)
    both = ["mlp_x.w1", "mlp_x.w2", "mlp_y.w1", "mlp_y.w2"]
    assert mlps == [f"blocks.{i}.{mlp}" for i in range(3) for mlp in both[: 2 if i == 2 else 4]]
    trial.sample(adapter)


def check_mean_pooling(trial):
    """A frame's token is the mean of the projected ones around it; at the ends there are fewer."""
    project, audio = mi.AudioProjection(4, 8), torch.randn(1, 20, 4)
    tokens = project.projection(audio)
    means = torch.stack([tokens[:, :5].mean(1), tokens[:, 6:15].mean(1)], 1)
    torch.testing.assert_close(project(audio, 2), means)
    trains_and_samples(trial)


def check_mel(trial):
    """An onset is heard where it is, whatever the loudness; the adapter takes these features."""
    waveform = torch.cat([torch.zeros(8000), torch.sin(0.3 * torch.arange(8000))])
    audio = mi.AudioEncoder(trial.weights)(waveform)
    assert abs(int(audio[0, :, -1].argmax()) - 25) <= 1  # 50 tokens a second
    adapter = trial.train()
    assert tensors_of(adapter)["audio_projection.projection.0.weight"].shape == (32, audio.shape[2])
    trial.sample(adapter)


def check_motion(trial):
    """The adapter has learned to take it, and another value gives another video."""
    adapter = trial.train()
    learned = {name for name, t in tensors_of(adapter).items() if "motion" in name and t.any()}
    assert len(learned) == 4
    assert (trial.frames(adapter, motion=0.1) != trial.frames(adapter, motion=1.0)).any()


def check_stochastic_solver(trial):
    """Another solver seed is another video of the same noise, and a stopped video draws on; the
    distribution is the right one."""
    videos = [trial.frames(solver="ancestral", solver_seed=seed) for seed in (1, 1, 2)]
    assert (videos[0] == videos[1]).all() and (videos[0] != videos[2]).any()

    def velocity(x, sigma):  # of z ~ N(0, 0.5^2): E[z - eps | x]
        variance = (0.5 * (1 - sigma)) ** 2 + sigma**2
        return (0.25 * (1 - sigma) - sigma) / variance * x

    sigmas = mi.linear_quadratic_schedule(256).tolist()
    noise, steps = torch.randn(20000), list(zip(sigmas, sigmas[1:]))
    z = mi.SOLVERS["ancestral"](velocity, noise, steps)
    assert abs(z.std() - 0.5) < 0.03 and abs((z * noise).mean()) < 0.1
    still = mi.ancestral(velocity, noise, steps, eta=0)
    torch.testing.assert_close(still, mi.euler(velocity, noise, steps))

    in_windows = [trial.frames(solver="ancestral", frames=13, window_frames=7) for _ in range(2)]
    assert (in_windows[0] == in_windows[1]).all()
    torch.manual_seed(0)
    whole, x, past = mi.ancestral(velocity, noise, steps[:9]), noise, []
    torch.manual_seed(0)
    for step in steps[:9]:
        x = mi.ancestral(velocity, x, [step], past)
        torch.rand(1)  # as if another process went on
    assert torch.equal(x, whole)


if __name__ == "__main__":
    name, *files = sys.argv[1:]
    check = globals().get("check_" + name.replace("-", "_"), trains_and_samples)
    check(Trial(*files))
