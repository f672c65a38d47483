"""Several processes, by torchrun on the CPU: the same numbers as one."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import PROMPT, PYTHONPATH, ROOT, inputs, randomize
from safetensors.torch import load_file, save_file

import musicinfuser as mi
import sample

JOIN = """
import sys, types, torch, torch.distributed as dist
import musicinfuser as mi
from safetensors.torch import load_file, save_file
rank, count = mi.join_processes(types.SimpleNamespace(device="cpu"))
folder, stored = sys.argv[1], load_file(sys.argv[1] + "/inputs.safetensors")
arguments = [stored[name] for name in ("x", "sigma", "y_feat", "y_mask")]
dit = mi.load_dit(folder + "/dit.safetensors", shard="shard" in sys.argv)
"""

TOKENS = """
mi.load_adapter(dit, folder + "/adapter.safetensors")
mi.TokenParallel(dit)
with torch.no_grad():
    velocities = {"music": dit(*arguments, stored["audio"]), "silent": dit(*arguments)}
    text, null = arguments[2:], [arguments[2], arguments[3] & False]
    options = {"sigmas": [1, 0.5, 0], "cfg": 3.0, "solver": "ab2"}
    velocities["sampled"] = mi.sample(dit, arguments[0], text, null, stored["audio"], **options)
save_file(velocities, f"{folder}/out-{rank}.safetensors")
mi.leave_processes()
"""


BRANCHES = """
mi.load_adapter(dit, folder + "/adapter.safetensors")
mi.BranchParallel(dit)
text, null = arguments[2:], [arguments[2], arguments[3] & False]
options = {"sigmas": [1, 0.5, 0], "cfg": 3.0, "music_above": 0.6}
options["music_cfg"] = 2.0 * ("music" in sys.argv)

def main():
    z = mi.sample(dit, arguments[0], text, null, stored["audio"], **options)
    save_file({"sampled": z}, f"{folder}/out-{rank}.safetensors")

mi.main(main)
"""


def torchrun(count, *command, **environment):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc_per_node", str(count), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH} | environment
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def stored(folder, heads):
    """A model of that many heads, its adapter and inputs, as files."""
    dit = randomize(mi.DiT(3, 24 * heads, 16, heads, 16))
    mi.save_dit(dit, folder / "dit.safetensors", torch.float32)
    (x, sigma, y_feat, y_mask), audio = inputs(t=3, h=6, w=6)  # 27 tokens: uneven shares
    tensors = {"x": x, "sigma": sigma, "y_feat": y_feat, "y_mask": y_mask, "audio": audio}
    save_file(tensors, folder / "inputs.safetensors")
    mi.infuse(dit, [0, 2], rank=2, window=1, audio_width=24)
    randomize(torch.nn.ParameterList(mi.adapter_parameters(dit).values()))
    mi.save_adapter(dit, folder / "adapter.safetensors")
    return dit.requires_grad_(False), (x, sigma, y_feat, y_mask), audio


@pytest.mark.parametrize("count, heads", [(2, 4), (3, 3)])
def test_tokens_shared_by_processes_give_the_same_velocity(tmp_path, count, heads):
    dit, arguments, audio = stored(tmp_path, heads)
    (tmp_path / "run.py").write_text(JOIN + TOKENS)
    run = torchrun(count, tmp_path / "run.py", tmp_path)
    assert run.returncode == 0, run.stderr
    text, null = arguments[2:], (arguments[2], arguments[3] & False)
    options = {"sigmas": [1, 0.5, 0], "cfg": 3.0, "solver": "ab2"}
    sampled = mi.sample(dit, arguments[0], text, null, audio, **options)
    wanted = {"music": dit(*arguments, audio), "silent": dit(*arguments), "sampled": sampled}
    for rank in range(count):
        found = load_file(tmp_path / f"out-{rank}.safetensors")
        for name, velocity in wanted.items():
            assert (found[name] - velocity).abs().max() < 1e-5 * velocity.abs().max()


@pytest.mark.parametrize("count", [2, 3])
def test_branches_shared_by_processes_give_the_same_latents(tmp_path, count):
    dit, arguments, audio = stored(tmp_path, 2)
    (tmp_path / "run.py").write_text(JOIN + BRANCHES)
    run = torchrun(count, tmp_path / "run.py", tmp_path, "music")
    assert run.returncode == 0, run.stderr
    text, null = arguments[2:], (arguments[2], arguments[3] & False)
    options = {"sigmas": [1, 0.5, 0], "cfg": 3.0, "music_cfg": 2.0, "music_above": 0.6}
    wanted = mi.sample(dit, arguments[0], text, null, audio, **options)
    for rank in range(count):
        found = load_file(tmp_path / f"out-{rank}.safetensors")["sampled"]
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_more_processes_than_branches_are_one_line(tmp_path):
    stored(tmp_path, 2)
    (tmp_path / "run.py").write_text(JOIN + BRANCHES)
    run = torchrun(3, tmp_path / "run.py", tmp_path)
    assert run.returncode == 1
    assert "error: the guidance has 2 branches for 3 processes; " in run.stderr


def test_processes_that_do_not_divide_the_heads_are_one_line(tmp_path):
    stored(tmp_path, 3)
    main = "def main():\n    pass\n"
    (tmp_path / "run.py").write_text(JOIN + "mi.main(lambda: mi.TokenParallel(dit))\n" + main)
    run = torchrun(2, tmp_path / "run.py", tmp_path)
    assert run.returncode != 0
    assert "error: 2 processes do not divide the model's 3 heads" in run.stderr


SHARD = """
torch.manual_seed(0)
mi.infuse(dit, [0, 2], rank=2, audio_width=24)
for p in mi.adapter_parameters(dit).values():
    torch.nn.init.normal_(p, std=0.1)
mi.shard_blocks(dit, "cpu", torch.float32)
mi.checkpoint_layers(dit)
dit(*arguments, stored["audio"]).square().sum().backward()
gradients = {k: p.grad for k, p in mi.adapter_parameters(dit).items()}
held = sum(p.to_local().numel() for p in dit.blocks.parameters() if hasattr(p, "to_local"))
save_file(gradients | {"held": torch.tensor(held)}, f"{folder}/out-{rank}.safetensors")
mi.leave_processes()
"""


def test_sharded_blocks_give_the_same_gradients(tmp_path):
    dit, arguments, audio = stored(tmp_path, 2)
    (tmp_path / "run.py").write_text(JOIN + SHARD)
    run = torchrun(2, tmp_path / "run.py", tmp_path, "shard")
    assert run.returncode == 0, run.stderr
    dit = mi.load_dit(tmp_path / "dit.safetensors")
    frozen = sum(p.numel() for p in dit.blocks.parameters())
    torch.manual_seed(0)
    mi.infuse(dit, [0, 2], rank=2, audio_width=24)
    for p in mi.adapter_parameters(dit).values():
        torch.nn.init.normal_(p, std=0.1)
    dit(*arguments, audio).square().sum().backward()
    wanted = {name: p.grad for name, p in mi.adapter_parameters(dit).items()}
    # Of the keys' bias it is zero but for rounding: softmax takes out what all keys have alike
    rounding = 1e-6 * max(gradient.abs().max() for gradient in wanted.values())
    for rank in range(2):
        found = load_file(tmp_path / f"out-{rank}.safetensors")
        assert found.pop("held") < 0.6 * frozen
        for name, gradient in wanted.items():
            error = (found[name] - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max() + rounding, name


def two_seeds(weights, song):
    return ["sample.py", song, PROMPT, "--weights", weights, "--device", "cpu", "--seed", 0, 1]


@pytest.fixture(scope="module")
def alone(weights, song, tmp_path_factory):
    """A folder of two videos that one process made."""
    out = tmp_path_factory.mktemp("alone") / "one"
    line = [sys.executable, *two_seeds(weights, song), "--out", out]
    subprocess.run(list(map(str, line)), check=True, cwd=ROOT, capture_output=True)
    return out


@pytest.mark.parametrize("split", ["tokens", "branches", "seeds"])
def test_sampling_over_processes_makes_the_same_videos(weights, song, alone, tmp_path, split):
    run = torchrun(2, *two_seeds(weights, song), "--split", split, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    names = sorted(path.name for path in alone.iterdir())
    assert len(names) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in (name for name in names if name.endswith(".mp4")):
        frames = [[*mi.read_frames(folder / name, 32, 32)] for folder in (alone, tmp_path)]
        apart = max(abs(a.astype(int) - b).max() for a, b in zip(*frames))
        assert len(frames[0]) == 7 and apart <= 2


def test_a_finished_seed_is_not_made_again_by_its_process(weights, song, tmp_path):
    """Of a killed run in windows that shared out its seeds, seed 1 alone is left."""
    given = {"song": str(song), "prompt": PROMPT, "weights": str(weights), "device": "cpu"}
    given |= {"frames": 31, "seeds": (0, 1), "split": "seeds", "out": str(tmp_path)}
    options, dit = mi.begin(sample.Options, "sampling", given)
    sample.check(options, dit)
    sample.states_of(options, True)[1].begin()
    more = ["--weights", weights, "--device", "cpu", "--seed", 0, 1, "--frames", 31]
    run = torchrun(2, "sample.py", song, PROMPT, *more, "--split", "seeds", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "seed 1 goes on from " in run.stdout
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["seed"] == 1 and len(list(tmp_path.iterdir())) == 2


def test_each_process_has_its_own_gpu_under_one_name(monkeypatch):
    """The name is in recipes, and in the key of a state that more GPUs may go on from."""
    chosen, options = [], types.SimpleNamespace(device="cuda:0")
    torchruns = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    for name, value in (torchruns | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(mi.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mi.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(mi.dist, "get_world_size", lambda: 2)
    assert mi.join_processes(options) == (1, 2)
    assert chosen == [1] and options.device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: chosen.append(device))
    assert mi.choose_device() == ("cuda", "bfloat16")
    assert chosen == [1, 1, "cuda"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(mi.InputError, match="1 are here for 2; torchrun --nproc_per_node 1"):
        mi.join_processes(options)


PROTOCOL = """
import os, sample
from eval import protocol

def generate(song, prompt, *, out, split, seeds, **options):
    assert split == "none"
    made = {"song": song, "prompt": prompt, "seed": seeds[0], "by": rank}
    mi.save_json(os.path.splitext(out)[0] + ".json", made | options)
    open(out, "x").close()

sample.generate, protocol.PROMPTS = generate, protocol.PROMPTS[:2]
videos = protocol.protocol(folder, folder + "/out", "some", share=(rank, count))
assert len(videos) == 20 and all(map(os.path.exists, videos))
mi.leave_processes()
"""


def test_protocols_videos_are_shared_out(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.wav").write_bytes(b"")
    (tmp_path / "run").mkdir()
    join, _, _ = JOIN.partition("folder, stored")
    (tmp_path / "run" / "run.py").write_text(join + "folder = sys.argv[1]\n" + PROTOCOL)
    for _ in range(2):  # the second time they are there
        run = torchrun(2, tmp_path / "run" / "run.py", tmp_path)
        assert run.returncode == 0, run.stderr
    recipes = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert sorted(recipe["seed"] for recipe in recipes) == list(range(20))
    assert {recipe["seed"] % 2 == recipe["by"] for recipe in recipes} == {True}
