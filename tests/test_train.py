"""train.py: the real command line, killed and gone on with; its options; what it refuses."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, inputs, small_dit
from safetensors.torch import load_file

import musicinfuser as mi
import train
from dataset.batches import Batch, Samples
from dataset.runs import RunFolder

SMALL = {"layers": "0,2", "rank": 2, "steps": 8, "save_every": 2, "device": "cpu"}


@pytest.fixture
def fit(weights, dance_videos, tmp_path):
    """fit(**options): train.train at the smallest size; returns the adapter's path."""

    def fit(**options):
        options = {"weights": str(weights), "out": str(tmp_path / "run")} | SMALL | options
        return train.train(str(dance_videos / "aist"), **options)

    return fit


def flags(**options):
    line = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        line += [flag] if value is True else [flag, str(value)]
    return line


def read_log(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same_file(a, b):
    return Path(a).read_bytes() == Path(b).read_bytes()


# ------------------------------------------------------------------------------------------------
# Killed and gone on with
# ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import musicinfuser as mi
import train

left, replace = int(sys.argv.pop(1)), os.replace

def replace_or_die(*names):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

os.replace = replace_or_die
mi.main(train.main)
"""


def killed_at(n, arguments):
    """A run of train.py that dies just before it finishes the n-th file that it writes."""
    line = [sys.executable, "-c", KILLED, str(n), *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_training_killed_at_any_moment_ends_as_if_it_never_was(
    weights, dance_videos, tmp_path, fit
):
    whole = Path(fit(wild=str(dance_videos / "wild"))).parent
    shutil.copytree(dance_videos, tmp_path, dirs_exist_ok=True, ignore=without_cache)
    folders = {"data": tmp_path / "aist", "wild": tmp_path / "wild", "out": tmp_path / "broken"}
    line = flags(**folders, **SMALL, weights=weights)
    # Among the first clips; between the first state and its adapter; before the second state
    for n in (20, 29, 3):
        killed = killed_at(n, line)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = command("train.py", *line)
    assert last.returncode == 0, last.stderr
    assert "skipped  1 of 7 videos" in last.stdout and "6 clips" in last.stdout
    assert "going on from step 2" in last.stdout
    cache = dance_videos / "aist" / ".musicinfuser"
    for one, two in ((whole, tmp_path / "broken"), (cache, tmp_path / "aist" / ".musicinfuser")):
        for path in two.glob("*.safetensors"):
            assert same_file(path, one / path.name)
        assert not list(two.glob(".tmp*"))
    assert [line["step"] for line in read_log(tmp_path / "broken")] == list(range(8))
    before = load_file(weights / "musicinfuser.safetensors")
    assert load_file(whole / "musicinfuser.safetensors").keys() == before.keys()


def without_cache(folder, names):
    return [name for name in names if name == ".musicinfuser"]


def test_the_log_has_losses_by_noise_and_the_listening_gap(fit, tmp_path):
    fit(steps=4, eval_every=2, eval_sigmas=(0.5, 0.75), batch=3)
    log = read_log(tmp_path / "run")
    assert log[0]["lr"] == 0
    assert any(name.startswith("loss_0") for name in log[0])
    assert [line["step"] for line in log if "right_0.75" in line] == [1, 3]
    for name in ("right_0.5", "wrong_0.5", "right_0.75", "wrong_0.75", "eval_seconds"):
        assert name in log[-1]
    assert log[-1]["right_0.75"] != log[-1]["wrong_0.75"]
    for name in ("loss", "grad_norm", "seconds", "memory_gb"):
        assert math.isfinite(log[-1][name])


def test_the_gap_is_of_each_noise_level_and_of_both_songs():
    """Of a model whose velocity is the music times sigma, where it should be 0."""

    def dit(x, sigma, y_feat, y_mask, audio):
        return torch.ones_like(x) * (audio.mean((1, 2)) * sigma)[:, None, None, None, None]

    def batch(loudness):
        z = torch.zeros(3, 12, 1, 2, 2)
        audio = torch.full((3, 5, 4), loudness)
        conditions = {"y_feat": audio, "y_mask": audio, "audio": audio}
        return Batch(z, torch.zeros(3), z, conditions, ["a", "b", "c"])

    losses = train.listening_gap(dit, batch(1.0), batch(2.0), (0.5, 0.75), at_once=2)
    wanted = {"right_0.5": 0.25, "wrong_0.5": 1.0, "right_0.75": 0.5625, "wrong_0.75": 2.25}
    assert losses == pytest.approx(wanted)


def test_the_progress_bar_shows_the_loss_and_the_gap(fit, capsys):
    fit(eval_sigmas=(0.6,))
    shown = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"8/8 .*loss=\d.*gap_0\.6=-?\d", shown), shown


def test_the_progress_bar_smooths_the_loss_and_keeps_the_last_gap():
    first = train.in_short({"loss": 1.0, "right_0.5": 0.25, "wrong_0.5": 1.0}, {})
    assert first == {"loss": 1.0, "gap_0.5": 0.75}
    assert train.in_short({"loss": 3.0}, first) == pytest.approx({"loss": 1.1, "gap_0.5": 0.75})


def test_losses_by_noise():
    losses = [(0.0, 1.0), (0.2, 3.0), (0.75, 5.0), (1.0, 7.0)]
    assert train.by_noise(losses) == {"loss_0.0": 2.0, "loss_0.75": 6.0}


def test_a_damaged_log_does_not_stop_a_run(fit, tmp_path):
    fit(steps=2)
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('[]\n{"step": null}\n{"step": 1')
    fit(steps=2)
    assert [line["step"] for line in read_log(tmp_path / "run")] == [0, 1]


def test_a_finished_adapter_that_is_gone_or_damaged_is_made_again(fit, monkeypatch):
    path = Path(fit())
    good = path.read_bytes()
    monkeypatch.setattr(mi, "flow_matching_loss", None)  # nothing is trained again
    for damage in (path.unlink, lambda: path.write_bytes(good[:-9])):
        damage()
        fit()
        assert path.read_bytes() == good


def test_two_runs_in_one_folder_are_refused(fit, tmp_path):
    with RunFolder(str(tmp_path / "run"), True):
        with pytest.raises(mi.InputError, match="another train.py is at work in"):
            fit()
    fit(steps=1)


def test_an_adapter_without_its_state_is_not_written_over(fit, tmp_path):
    """Such as the authors' in weights/, or one whose large state was deleted."""
    adapter = Path(fit(steps=1))
    (tmp_path / "run" / "state.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in adapter.parent.iterdir()}
    with pytest.raises(mi.InputError, match="is there without a state.safetensors; name another"):
        fit(steps=1)
    assert {path.name: path.read_bytes() for path in adapter.parent.iterdir()} == before


def damaged_states(path):
    tensors, metadata = mi.read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    first = next(name for name in tensors if name.startswith("exp_avg."))
    yield tensors, {}
    yield tensors, {"step": "-1"}
    yield {name: t for name, t in tensors.items() if name != first}, metadata
    yield tensors | {first: tensors[first][:1]}, metadata
    yield tensors | {"more": torch.zeros(1)}, metadata


def test_a_damaged_state_is_one_line(fit, tmp_path):
    fit(steps=2)
    state = tmp_path / "run" / "state.safetensors"
    for tensors, metadata in damaged_states(state):
        mi.save_safetensors(state, tensors, metadata)
        with pytest.raises(mi.InputError, match="state.safetensors"):
            fit(steps=2)


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


def in_two_processes(*arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    line = [*launch, "--standalone", os.path.join(ROOT, "train.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(
    weights, dance_videos, tmp_path, fit, shard
):
    """After two steps, before which nothing changes, AdamW's first moment tells both gradients."""
    options = SMALL | {"steps": 2, "audio_dropout": 0.5, "seed": 5}  # the second is silent
    options |= {"init": weights / "musicinfuser.safetensors", "weights": weights}
    one = fit(**options, batch=2)
    more = {"shard": True, "sample_every": 2} if shard else {}
    in_two_processes(*flags(data=dance_videos / "aist", out=tmp_path / "two", **options, **more))
    logs = read_log(Path(one).parent), read_log(tmp_path / "two")
    for mine, theirs in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    one = load_file(Path(one).parent / "state.safetensors")
    two = load_file(tmp_path / "two" / "state.safetensors")
    assert one.keys() == two.keys()
    gradients = [name for name in one if name.startswith("exp_avg.")]
    largest = max(one[name].abs().max() for name in gradients)
    for name in gradients:
        assert (one[name] - two[name]).abs().max() < 1e-4 * largest
    assert any("lora" in name for name in gradients) and any("audio" in name for name in gradients)
    assert (tmp_path / "two" / "step-2.mp4").exists() == shard


def test_a_run_does_not_go_on_with_another_number_of_processes(fit, tmp_path):
    """They would take other samples."""
    fit(steps=1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["processes"] == 1
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "processes"}))
    fit(steps=1)  # an older run, which did not say
    path.write_text(json.dumps(config | {"processes": 2}))
    with pytest.raises(mi.InputError, match="has a run of processes 2, not 1"):
        fit(steps=1)


def test_sharding_takes_several_processes(fit, tmp_path):
    with pytest.raises(mi.InputError, match="--shard is for several processes"):
        fit(shard=True)
    assert not (tmp_path / "run").exists()


def test_silent_batches_do_not_hang_two_processes(weights, dance_videos, tmp_path):
    options = SMALL | {"rank": 0, "audio_dropout": 0.5, "accumulate": 2}
    folders = {"data": dance_videos / "aist", "weights": weights, "out": tmp_path}
    in_two_processes(*flags(**folders, **options))
    assert len(read_log(tmp_path)) == 8


def test_world_size_without_torchrun_is_one_line(fit, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(mi.InputError, match="not torchrun"):
        fit()


# ------------------------------------------------------------------------------------------------
# Whose run a folder holds
# ------------------------------------------------------------------------------------------------


def test_a_run_folder_of_another_run_is_refused(fit):
    fit(rank=0, steps=2)
    with pytest.raises(mi.InputError, match="has a run of rank 0, not 4"):
        fit(rank=4, steps=2)


def test_what_changes_nothing_does_not_lock_the_folder(fit, weights, dance_videos, tmp_path):
    fit(steps=2)
    fit(steps=2, save_every=1, offload=True, weights=f"{weights}{os.sep}", eval_clips=2)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(weights, elsewhere / "weights")
    shutil.copytree(dance_videos / "aist", elsewhere / "aist")
    options = SMALL | {"weights": elsewhere / "weights", "out": tmp_path / "run", "steps": 2}
    train.train(elsewhere / "aist", **options)  # a second clone goes on
    tensors, metadata = mi.read_safetensors(weights / "dit.safetensors")
    changed = tensors | {"pos_frequencies": tensors["pos_frequencies"] + 1}
    mi.save_safetensors(elsewhere / "weights" / "dit.safetensors", changed, metadata)
    with pytest.raises(mi.InputError, match="has a run of model"):
        train.train(elsewhere / "aist", **options)


def test_other_videos_are_another_run(fit, dance_videos):
    fit(steps=2)
    with pytest.raises(mi.InputError, match="has a run of clips 4 clips, .* not 6 clips"):
        fit(steps=2, wild=str(dance_videos / "wild"))


def test_an_option_that_an_older_run_did_not_know_had_its_default(fit, tmp_path):
    fit(steps=2)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["audio_dropout"]
    path.write_text(json.dumps(config))
    with pytest.raises(mi.InputError, match="has a run of audio_dropout 0.0, not 0.5"):
        fit(steps=2, audio_dropout=0.5)
    fit(steps=2)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000], ids=range(4))
def test_a_damaged_config_is_one_line(fit, tmp_path, text):
    fit(steps=1)
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(mi.InputError, match="config.json cannot be read"):
        fit(steps=1)


def test_a_mistake_leaves_nothing_and_locks_nothing(fit, tmp_path):
    for wrong in ({"wild": "nowhere"}, {"layers": "0,99"}, {"init": "nothing.safetensors"}):
        with pytest.raises(mi.InputError, match="no such|layers must be"):
            fit(**wrong)
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(mi.InputError, match="cannot use"):
        fit()


# ------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------

# fmt: off
IMPOSSIBLE = [
    "steps=0", "batch=0", "accumulate=0", "beta=0", "half_life=0", "rank=-1", "lr=nan", "lr=inf",
    "save_every=0", "eval_every=0", "wild_ratio=-1", "wild_ratio=inf", "caption_dropout=1.5",
    "warmup=-1", "alpha=nan", "audio_dropout=inf", "batch=1e15", "accumulate=1e15", "steps=1e30",
    "rank=33", "rank=1e20", "eval_clips=1",
]
# fmt: on


@pytest.mark.parametrize("option", IMPOSSIBLE)
def test_numbers_that_cannot_be_are_refused_at_once(fit, option, tmp_path):
    name, value = option.split("=")
    with pytest.raises(mi.InputError, match=f"--{name.replace('_', '-')} must"):
        fit(**{name: float(value)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["steps", "save_every", "seed", "warmup"])
def test_huge_numbers_do_not_hang(fit, name, monkeypatch):
    monkeypatch.setattr(RunFolder, "log", lambda self, line: math.nan[0])
    with pytest.raises(TypeError, match="float"):  # of math.nan[0], after a step
        fit(**{name: 2**63 - 1})


def test_a_misspelt_option_raises(fit):
    with pytest.raises(mi.InputError, match="no option learning_rte|no option acumulate"):
        fit(acumulate=2)


def test_the_command_line_is_the_options(weights):
    run = command("train.py", "--help")
    assert run.returncode == 0
    for words in ("AdamW's peak learning rate (default 0.0001)", "--audio-dropout", "--window"):
        assert words in " ".join(run.stdout.split())


def preferring(weights, folder, **training):
    """A weights folder that prefers those options in training."""
    folder.mkdir()
    for name in os.listdir(weights):
        (folder / name).symlink_to(weights / name)
    dit = mi.load_dit(weights / "dit.safetensors")
    dit.config.training = training
    (folder / "dit.safetensors").unlink()
    mi.save_dit(dit, folder / "dit.safetensors")
    return str(folder)


def test_what_the_weights_prefer_is_used_unless_other_is_given(
    weights, dance_videos, tmp_path, monkeypatch
):
    prefers = {"layers": "all", "steps": 2, "lr": 0.01, "window": 0, "rank": 2, "beta": 1.0}
    folder = preferring(weights, tmp_path / "weights", **prefers)
    line = ["train.py", "--data", dance_videos / "aist", "--weights", folder, "--device", "cpu"]
    line += ["--out", tmp_path / "run", "--window", "none", "--lr", "0.02"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    train.main()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["window"] is None and config["lr"] == 0.02
    assert config["layers"] == [0, 1, 2] and config["steps"] == 2 and config["beta"] == 1


def test_the_papers_settings_are_the_defaults():
    options = mi.settle(train.Options, {}, {"weights": "."})
    train.complete(options, 48)
    assert (options.steps, options.lr, options.warmup, options.half_life) == (4000, 1e-4, 200, 200)
    assert (options.rank, options.window, options.beta, options.batch) == (64, None, 3.0, 1)
    assert options.layers == list(mi.MUSICINFUSER_LAYERS)
    assert (options.eval_every, options.eval_clips, len(options.eval_sigmas)) == (500, 4, 2)


def test_split_lists_what_is_held_out(dance_videos, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"train.py --data {dance_videos}/aist --split test".split())
    train.main()
    assert [line.split("_")[-2] for line in capsys.readouterr().out.split()] == ["mBR0", "mHO5"]


def test_layers_are_numbers_a_name_or_a_ranking(tmp_path):
    ranking = tmp_path / "ranking.json"
    ranking.write_text('{"ranking": [5, 3, 1, 0, 2, 4]}')
    for choice, top, layers in (
        ("4,0", None, [0, 4]),
        ((1, 2), None, [1, 2]),
        ("all", None, [0, 1, 2, 3, 4, 5]),
        ("middle", None, [2, 3]),
        ("last", 3, [3, 4, 5]),
        (str(ranking), None, [3, 5]),
        (str(ranking), 3, [1, 3, 5]),
    ):
        assert train.pick_layers(choice, 6, str(tmp_path), top) == layers


# fmt: off
NO_LAYERS = [
    ("0,9", None), ("best", None), ("0,,1", None), ("0,0", None), ("0,1", 2), ("all", 2),
    ("even", 9), (None, None),
]
NO_RANKINGS = [
    "", "[0, 1, 2]", "{}", '{"ranking": [0, 1]}', '{"ranking": 3}', '{"ranking": [0, 1, 1]}',
    "[" * 100_000,
]
# fmt: on


@pytest.mark.parametrize("choice, top", NO_LAYERS)
def test_layers_that_cannot_be_are_refused(tmp_path, choice, top):
    with pytest.raises(mi.InputError, match="layers|--top"):
        train.pick_layers(choice, 6, str(tmp_path), top)


@pytest.mark.parametrize("text", NO_RANKINGS, ids=range(len(NO_RANKINGS)))
def test_a_ranking_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "ranking.json").write_text(text)
    with pytest.raises(mi.InputError, match="is not a ranking of this model's layers"):
        train.read_ranking(str(tmp_path / "ranking.json"), 3)


# ------------------------------------------------------------------------------------------------
# What is trained
# ------------------------------------------------------------------------------------------------

ABLATIONS = (
    {"adapter": "add"},
    {"random_init": True},
    {"window": 0, "audio_dropout": 0.5},
    {"beta": 1.0, "alpha": 4.0},
    {"rank": 0, "audio_dropout": 0.5},
)


@pytest.mark.parametrize("options", ABLATIONS)
def test_the_ablations_train_and_load(weights, fit, options):
    path = fit(**{"layers": "last", "top": 2, "lr": 0.01} | options)
    dit = mi.load_adapter(mi.load_dit(weights / "dit.safetensors"), path)
    assert dit.adapter.layers == [1, 2] and dit.adapter.window == options.get("window")
    arguments, _ = inputs()
    audio = torch.randn(2, 13, 16)
    assert not torch.equal(dit(*arguments, audio), dit(*arguments, None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_blocks_give_the_same_adapter(fit, tmp_path, dtype):
    options = {"steps": 3, "lr": 0.01, "dtype": dtype}
    here = fit(**options, out=str(tmp_path / "here"))
    away = fit(**options, out=str(tmp_path / "away"), offload=True)
    assert same_file(here, away)
    assert {tensor.dtype for tensor in load_file(here).values()} == {torch.float32}


def test_each_step_draws_samples_of_its_own_noised_as_at_that_step(fit, monkeypatch):
    draw, drawn = Samples.batch, []

    def batch(self, numbers, step):
        drawn.append((list(numbers), step))
        return draw(self, numbers, step)

    monkeypatch.setattr(Samples, "batch", batch)
    fit(steps=2, accumulate=2, batch=2)
    taken = [one for one in drawn if one[0] != [0]]  # that one is looked at, for its size
    assert taken == [([0, 1], 0), ([2, 3], 0), ([4, 5], 1), ([6, 7], 1)]


HEARD = {0.0: [1] * 8, 0.5: [0, 0, 0, 1, 0, 1, 0, 1], 1.0: [0] * 8}  # with seed 42


@pytest.mark.parametrize("audio_dropout", HEARD)
def test_batches_are_silent_as_often_as_asked(fit, monkeypatch, audio_dropout):
    loss, found = mi.flow_matching_loss, []

    def listening(*arguments, audio=None, **others):
        if torch.is_grad_enabled():  # not of the held-out clips
            found.append(audio is not None)
        return loss(*arguments, audio=audio, **others)

    monkeypatch.setattr(mi, "flow_matching_loss", listening)
    fit(audio_dropout=audio_dropout)
    assert found == HEARD[audio_dropout]


def test_the_gradient_of_a_step_is_the_mean_of_its_batches(fit, tmp_path):
    """AdamW's first moment after one step."""
    means = []
    for name, options in (("one", {"batch": 4}), ("two", {"batch": 2, "accumulate": 2})):
        fit(steps=1, out=str(tmp_path / name), **options)
        state = load_file(tmp_path / name / "state.safetensors")
        means.append({name: t for name, t in state.items() if "exp_avg." in name})
    for name, moment in means[0].items():
        assert torch.allclose(moment, means[1][name], rtol=1e-3, atol=1e-5 * moment.abs().max())


def test_training_begins_from_an_adapter(fit, weights, tmp_path):
    given = str(weights / "musicinfuser.safetensors")
    wanted = load_file(given)
    made = load_file(fit(init=given, steps=1))  # whose learning rate is 0
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in made.items())
    for other in ({"rank": 3}, {"window": 1}, {"alpha": 9.0}, {"heads": 2}, {"layers": [0, 1]}):
        with pytest.raises(mi.InputError, match=f"is an adapter of {min(other)} .*; name --"):
            fit(init=given, out=str(tmp_path / "other"), **other)


def test_another_condition_reaches_the_model_by_one_place(fit, monkeypatch):
    conditions, loss, seen = Samples.conditions, mi.flow_matching_loss, []

    def with_motion(self, clip, prompt):
        return conditions(self, clip, prompt) | {"motion": torch.tensor(0.5)}

    def with_motion_loss(*arguments, motion, **others):
        seen.append(motion.shape)
        return loss(*arguments, **others)

    monkeypatch.setattr(Samples, "conditions", with_motion)
    monkeypatch.setattr(mi, "flow_matching_loss", with_motion_loss)
    fit(steps=1, batch=2)
    assert seen[0] == (2,)


def test_a_step_is_saved_before_its_video_is_made(fit, tmp_path, monkeypatch):
    def film(*arguments):
        raise mi.InputError("the song is gone")

    monkeypatch.setattr(train.Trainer, "film", film)
    with pytest.raises(mi.InputError, match="the song is gone"):
        fit(steps=4, sample_every=2, save_every=2)
    assert mi.read_safetensors(tmp_path / "run" / "state.safetensors")[1]["step"] == "2"


def test_videos_of_a_held_out_song(fit, tmp_path):
    fit(steps=2, sample_every=1)
    for name in ("step-1.mp4", "step-2.mp4"):
        assert mi.count_frames(tmp_path / "run" / name) == 7


def test_progress_is_filmed_with_the_lora_scale_that_sampling_prefers(fit, tmp_path, monkeypatch):
    load_dit, noise_to_video, seen = mi.load_dit, mi.noise_to_video, []

    def load(*arguments):
        dit = load_dit(*arguments)
        dit.config.sampling["lora_scale"] = 0.75
        return dit

    def film(dit, decoder, noise, text, null, *others):
        seen.extend(m.alpha for m in dit.modules() if isinstance(m, mi.LoRALinear))
        assert text[1].any() and not null[1].any()
        return noise_to_video(dit, decoder, noise, text, null, *others)

    monkeypatch.setattr(mi, "load_dit", load)
    monkeypatch.setattr(mi, "noise_to_video", film)
    adapter = fit(steps=2, sample_every=1, rank=2, alpha=4.0)
    assert set(seen) == {3.0}  # the second time too, so it was put back
    assert json.loads(mi.read_safetensors(adapter)[1]["musicinfuser"])["alpha"] == 4


def test_a_loss_that_is_not_finite_stops_the_run(fit, tmp_path, monkeypatch):
    loss, seen = mi.flow_matching_loss, []

    def breaks(*arguments, **conditions):
        seen.append(1)
        return loss(*arguments, **conditions) * (math.nan if len(seen) == 3 else 1)

    monkeypatch.setattr(mi, "flow_matching_loss", breaks)
    words = r"the loss at step 2, on .*\.mp4 at frame \d+; the last good checkpoint is .*state"
    with pytest.raises(mi.InputError, match=words):
        fit(save_every=1)
    _, metadata = mi.read_safetensors(tmp_path / "run" / "state.safetensors")
    assert metadata["step"] == "2"


@pytest.mark.parametrize("poisoned", ["parameter", "exp_avg_sq"])
def test_a_state_is_saved_only_when_all_of_it_is_finite(fit, tmp_path, monkeypatch, poisoned):
    update = train.Trainer.update

    def poison(self, step):
        line = update(self, step)
        p = next(p for p in self.parameters if p in self.optimiser.state)
        tensor = p.data if poisoned == "parameter" else self.optimiser.state[p][poisoned]
        tensor[0] = math.inf if step == 3 else tensor[0]
        return line

    monkeypatch.setattr(train.Trainer, "update", poison)
    with pytest.raises(mi.InputError, match=f"not finite: {poisoned}.* after step 3; the last"):
        fit()
    tensors, metadata = mi.read_safetensors(tmp_path / "run" / "state.safetensors")
    assert metadata["step"] == "2"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_memory_estimate_knows_about_offloading(weights, fit):
    dit = mi.infuse(mi.load_dit(weights / "dit.safetensors"), [0], rank=2, audio_width=16)
    frozen = [copy.deepcopy(dit.blocks[0]).requires_grad_(False) for _ in range(48)]
    dit.blocks = torch.nn.ModuleList(frozen)
    options = mi.settle(train.Options, {}, {"device": "cpu", "dtype": "bfloat16"})
    example = SimpleNamespace(z=torch.zeros(1, 12, 2, 4, 4))
    whole = train.memory(options, dit, example)
    options.offload = True
    offloaded = train.memory(options, dit, example)
    options.offload, options.shard = False, True
    assert offloaded < train.memory(options, dit, example, processes=2) < whole


def test_only_what_would_not_fit_is_checkpointed():
    options = mi.settle(train.Options, {}, {"device": "cpu", "dtype": "bfloat16"})
    with torch.device("meta"):
        mochi, clip = mi.DiT(**mi.MODELS["mochi"]), torch.zeros(1, 12, 13, 60, 106)
    assert train.checkpoints(options, mochi, SimpleNamespace(z=clip))
    clip = torch.zeros(1, 12, 2, 4, 4)
    assert not train.checkpoints(options, small_dit(), SimpleNamespace(z=clip))


@pytest.mark.parametrize("where", ["offload", "shard"])
def test_the_frozen_blocks_wait_where_the_options_say(monkeypatch, where):
    class Asked(Exception):
        pass

    def load_dit(path, device, dtype, offload, shard):
        raise Asked(*(name for name, on in (("offload", offload), ("shard", shard)) if on))

    monkeypatch.setattr(mi, "load_dit", load_dit)
    given = {"weights": ".", "device": "cpu", "dtype": "float32", where: True}
    with pytest.raises(Asked, match=where):
        train.load_model(mi.settle(train.Options, {}, given), None)


def test_the_learning_rate_warms_up_and_falls():
    rates = [train.learning_rate(step, 4000, 1e-4, 200) for step in (0, 100, 200, 2100, 4000)]
    assert np.allclose(rates, [0, 5e-5, 1e-4, 5e-5, 0])


def test_no_videos_to_train_on_is_one_line(fit, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(mi.InputError, match="no AIST video of cameras c01 and c10"):
        train.train(str(tmp_path / "empty"), weights=str(weights), **SMALL, out=str(tmp_path / "a"))
