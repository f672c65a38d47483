"""Videos longer than a window: how windows are averaged, what a killed run goes on from, ends."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PROMPT, ROOT, close, command, inputs, small_dit, write_wav
from test_processes import torchrun
from test_sample import run, watch  # noqa: F401

import musicinfuser as mi
import sample

GUIDANCE = mi.Guidance(cfg=3.0, music_cfg=2.0, skip=(1,), skip_scale=0.5)


@pytest.fixture
def heard():
    """A model with music, and its inputs: (dit, x, text, null, audio)."""
    dit = mi.infuse(small_dit(), [0, 2], rank=2, audio_width=24)
    for p in mi.adapter_parameters(dit).values():
        torch.nn.init.normal_(p, std=0.1)
    (x, _, y_feat, y_mask), audio = inputs(t=3, h=4, w=4)
    return (
        dit.requires_grad_(False),
        x[:1],
        (y_feat[:1], y_mask[:1]),
        (y_feat[:1], y_mask[:1] & False),
        audio[:1],
    )


# ------------------------------------------------------------------------------------------------
# Windows
# ------------------------------------------------------------------------------------------------

SIZES = [(1, 2), (2, 2), (3, 2), (13, 13), (14, 13), (46, 13), (47, 13), (3000, 13), (50, 28)]


@pytest.mark.parametrize("frames, length", [size for size in SIZES if size[0] >= size[1]])
def test_the_weights_at_each_frame_sum_to_1(frames, length):
    plan = mi.windows(frames, length)
    total = torch.zeros(frames)
    for first, weights in plan:
        assert len(weights) == length and (weights >= 0).all()
        total[first : first + length] += weights
    close(total, torch.ones(frames), 1e-6)


@pytest.mark.parametrize("frames, length", [(14, 13), (46, 13), (9, 4)])
def test_a_window_in_the_middle_does_not_use_its_single_frame(frames, length):
    (first, weights), *others = mi.windows(frames, length)
    assert first == 0 and weights[0] == 1
    assert all(weights[0] == 0 < weights[1] for _, weights in others)


def test_the_plan_of_ten_minutes_is_linear():
    counts = [len(mi.windows(latents, 13)) for latents in (301, 601, 3001)]
    assert counts[1] - counts[0] == 38 and counts[2] <= 10.2 * counts[0]


def test_one_window_over_all_has_the_plain_velocity(heard):
    dit, x, text, null, audio = heard
    plan = mi.windows(3, 3)
    sigma = torch.tensor([0.5])
    wanted = mi.guided_velocity(dit, x.shape, text, null, audio, GUIDANCE)(x, sigma)
    found = mi.windowed_velocity(dit, plan, text, null, [audio], GUIDANCE)(x, sigma)
    close(found, wanted, 1e-6)


def test_each_window_has_its_own_frames_and_music(heard):
    dit, _, text, null, _ = heard
    x, music = torch.randn(1, 12, 4, 4, 4), torch.randn(2, 1, 9, 24)
    plan = [(0, torch.tensor([1.0, 1, 0])), (1, torch.tensor([0.0, 0, 1]))]
    sigma = torch.tensor([0.5])
    found = mi.windowed_velocity(dit, plan, text, null, list(music), GUIDANCE)(x, sigma)
    for first, some, audio in ((0, slice(0, 2), music[0]), (1, slice(3, 4), music[1])):
        window = x[:, :, first : first + 3]
        alone = mi.guided_velocity(dit, window.shape, text, null, audio, GUIDANCE)(window, sigma)
        close(found[:, :, some], alone[:, :, some.start - first : some.stop - first], 1e-6)


@pytest.mark.parametrize("solver", mi.SOLVERS)
def test_a_constant_velocity_leads_exactly_to_its_end(solver):
    noise = torch.randn(1, 12, 20, 4, 4)
    target = torch.randn(1, 12, 1, 4, 4)

    def dit(x, sigma, *inputs):
        return target.expand_as(x)

    how = dict(plan=mi.windows(20, 6), sigmas=mi.linear_quadratic_schedule(6), solver=solver)
    plan_music = [None] * len(how["plan"])
    text = torch.zeros(1, 1, 1), torch.ones(1, 1).bool()
    z = mi.sample_long(dit, noise, text, text, plan_music, cfg=1.0, **how)
    close(z, noise + target, 1e-5)


def test_windows_share_the_scene_at_high_noise():
    """Two halves that ask for different places get the mean of both; what changes fast stays."""
    asked = torch.cat([torch.ones(1, 12, 20, 2, 2), -torch.ones(1, 12, 20, 2, 2)], 2)
    fast = torch.tensor([1.0, -1.0]).repeat(20)[:, None, None].expand_as(asked)
    shared = mi.with_one_scene(asked + fast, 4)
    middle = [*range(3, 17), *range(23, 37)]  # further than a window from ends and the change
    close(shared[:, :, middle], fast[:, :, middle], 1e-6)


def test_a_scene_is_shared_above_its_noise_level_alone():
    def dit(x, sigma, *inputs):
        return x

    x = torch.randn(1, 12, 12, 2, 2).cumsum(2)
    text = torch.zeros(1, 1, 1), torch.ones(1, 1).bool()
    plan = mi.windows(12, 4)
    velocity = mi.windowed_velocity(dit, plan, text, text, [None] * len(plan), mi.Guidance(cfg=1.0))
    close(velocity(x, torch.tensor([mi.SCENE_SIGMA])), x, 1e-5)
    above = velocity(x, torch.tensor([mi.SCENE_SIGMA + 1e-3]))
    close(above, mi.with_one_scene(x, 4), 1e-5)
    assert (above - x).abs().max() > 0.1


def test_every_window_has_the_same_noise():
    noise = torch.randn(1, 12, 5, 2, 2)
    long = mi.in_every_window(noise, 17)
    assert long.shape[2] == 17 and torch.equal(long[:, :, :5], noise)
    for first in range(12):
        close(long[:, :, first : first + 5].mean(2), noise.mean(2), 1e-6)


# ------------------------------------------------------------------------------------------------
# Going on
# ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("solver", mi.SOLVERS)
@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_killed_run_goes_on_from_its_last_whole_step(tmp_path, solver, at):
    """Killed in that evaluation: the same numbers, bit for bit, and no whole step twice."""
    evaluated = []

    def dit(x, sigma, *inputs):
        evaluated.append(sigma)
        if len(evaluated) == at + 1:
            raise Killed
        return x.cos() * sigma

    noise = torch.randn(1, 12, 9, 2, 2)
    text = torch.zeros(1, 1, 1), torch.ones(1, 1).bool()
    plan = mi.windows(9, 6)
    how = dict(plan=plan, sigmas=mi.linear_quadratic_schedule(8), solver=solver, cfg=1.0)
    given = noise, text, text, [None] * len(plan)
    state = mi.State(tmp_path / "state.safetensors", "key")
    with pytest.raises(Killed):
        mi.sample_long(dit, *given, state=state, **how)
    before = len(evaluated)
    found = mi.sample_long(dit, *given, state=state, **how)
    went_on = len(evaluated) - before
    assert torch.equal(found, mi.sample_long(dit, *given, **how))
    whole = len(evaluated) - before - went_on
    step = len(plan) * (2 if solver == "heun" else 1)
    assert went_on == whole - at // step * step


def test_another_recipes_state_is_not_taken(tmp_path):
    path = tmp_path / "state.safetensors"
    x = torch.randn(1, 12, 3, 2, 2)
    mi.State(path, "one").write(3, x, [x + 1, 0.1])
    assert mi.State(path, "two").read() is None
    done, kept, past = mi.State(path, "one").read()
    assert done == 3 and torch.equal(kept, x) and torch.equal(past[0], x + 1) and past[1] == 0.1


def test_a_process_that_does_not_write_leaves_no_state(tmp_path):
    state = mi.State(tmp_path / "state.safetensors", "key", writes=False)
    state.write(1, torch.zeros(1), [])
    assert state.read() is None and not list(tmp_path.iterdir())


CHANGES = [{"cfg": 2.0}, {"seeds": (4,)}, {"start": 0.5}, {"prompt": "a cat"}, {"frames": 37}]
CHANGES += [{"solver": "ab2"}, {"steps": 3}, {"window_frames": 13}, {"negative": "stage"}]


def state_path(weights, song, out, **change):
    given = dict(song=str(song), prompt=PROMPT, weights=str(weights), out=str(out), device="cpu")
    options, dit = mi.begin(sample.Options, "sampling", given | {"frames": 31} | change)
    sample.check(options, dit)
    (state,) = sample.states_of(options, True).values()
    return state.path


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_all_that_decides_a_video_is_in_the_name_of_its_state(weights, song, tmp_path, change):
    same = state_path(weights, song, tmp_path)
    assert same == state_path(weights, song, tmp_path)
    assert same != state_path(weights, song, tmp_path, **change)


def test_nobody_waits_for_processes_that_share_nothing(weights, song, tmp_path, monkeypatch):
    given = dict(song=str(song), prompt=PROMPT, weights=str(weights), out=str(tmp_path), frames=31)
    options, dit = mi.begin(sample.Options, "sampling", given | {"device": "cpu"})
    sample.check(options, dit)
    waited = []
    monkeypatch.setattr(mi, "wait_for_all", lambda: waited.append(1))
    for split, times in (("none", 0), ("tokens", 1)):
        options.split = split
        sample.begin_states(options, False, False)
        assert len(waited) == times


@pytest.mark.parametrize("file", ["musicinfuser", "dit", "decoder"])
def test_other_weights_of_that_name_have_another_state(weights, song, tmp_path, file):
    same = state_path(weights, song, tmp_path)
    copy = tmp_path / "weights"
    shutil.copytree(weights, copy)
    assert same == state_path(copy, song, tmp_path)
    tensors, metadata = mi.read_safetensors(weights / f"{file}.safetensors")
    name = min(tensors)
    mi.save_safetensors(copy / f"{file}.safetensors", tensors | {name: tensors[name] + 1}, metadata)
    assert same != state_path(copy, song, tmp_path)


@pytest.mark.parametrize("change", [{"offload": True}, {"split": "none"}], ids=str)
def test_what_changes_nothing_in_a_video_is_not_in_the_name_of_its_state(
    weights, song, tmp_path, change
):
    same = state_path(weights, song, tmp_path)
    assert same == state_path(weights, song, tmp_path, **change)


def test_another_song_of_that_name_has_another_state(weights, song, tmp_path):
    copy = tmp_path / "song.wav"
    copy.write_bytes(song.read_bytes())
    assert state_path(weights, copy, tmp_path) == state_path(weights, song, tmp_path)
    copy.write_bytes(song.read_bytes()[:-4] + b"\0\1\0\1")
    assert state_path(weights, copy, tmp_path) != state_path(weights, song, tmp_path)


def first_is_done(folder):
    left = [path.name for path in folder.glob("*.unfinished.safetensors")]
    return len(left) == 1 and "-1." in left[0]


def second_is_begun(folder):
    return any(path.stat().st_size > 200 for path in folder.glob("*-1.*.unfinished.safetensors"))


@pytest.mark.parametrize("moment", [first_is_done, second_is_begun])
def test_killed_and_started_again_the_bytes_are_the_same(weights, song, tmp_path, moment):
    """SIGKILL after the first of two seeds, or in the second; the first is not made again."""
    more = [song, PROMPT, "--weights", weights, "--device", "cpu", "--whole-song", "--start", 2]
    more += ["--window-frames", 13, "--seed", 0, 1, "--steps", 40, "--solver", "ab2"]
    line = [sys.executable, "sample.py", *more, "--out", tmp_path / "killed"]
    with subprocess.Popen(list(map(str, line)), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not moment(tmp_path / "killed"):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob("killed/*-1.mp4"))
    again = command("sample.py", *more, "--out", tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    assert "seed 1 goes on from " in again.stdout
    whole = command("sample.py", *more, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    names = sorted(path.name for path in tmp_path.glob("whole/*"))
    assert len(names) == 4 and names == sorted(path.name for path in tmp_path.glob("killed/*"))
    for name in (name for name in names if name.endswith(".mp4")):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ------------------------------------------------------------------------------------------------
# Songs
# ------------------------------------------------------------------------------------------------


def noise_song(path, seconds, rate=8000):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * rate))
    return write_wav(path, sound, rate=rate)


def made_from(folder):
    (path,) = folder.glob("*.mp4")
    return watch(path)


def test_a_whole_song(run, song, tmp_path):  # noqa: F811
    error, output = run(song, PROMPT, "--whole-song")
    assert not error and "frames 85" in output and "windows  14 of 7 frames" in output
    frames, _, sound = made_from(tmp_path / "out")
    assert len(frames) == 85 and abs(len(sound) / 44100 - 85 / 30) < 0.05
    assert not list(tmp_path.glob("out/*unfinished*"))


def test_start_and_speed_of_a_whole_song(run, song):  # noqa: F811
    _, output = run(song, PROMPT, "--whole-song", "--start", 1, "--speed", 2)
    assert "frames 25\n" in output


def test_the_recipe_of_a_whole_song_makes_it_again(run, song, tmp_path):  # noqa: F811
    assert not run(song, PROMPT, "--whole-song", "--start", 2)[0]
    (recipe,) = tmp_path.glob("out/*.json")
    error, _ = run("--from", recipe, "--out", tmp_path / "again.mp4")
    assert not error
    assert np.array_equal(watch(tmp_path / "again.mp4")[0], made_from(tmp_path / "out")[0])


def test_a_recipe_from_before_there_were_windows_is_of_one(tmp_path):
    mi.save_json(tmp_path / "old.json", {"frames": 271, "seed": 3})
    old = sample.read_recipe(tmp_path / "old.json")
    assert (old["window_frames"], old["music_above"], old["seeds"]) == (271, 0.0, [3])


def test_a_song_shorter_than_a_window(run, tmp_path):  # noqa: F811
    song = noise_song(tmp_path / "short.wav", 0.5)
    error, output = run(song, PROMPT, "--whole-song", "--window-frames", 73)
    assert not error and "frames 13" in output and "windows" not in output
    assert len(made_from(tmp_path / "out")[0]) == 13


@pytest.mark.parametrize("more", [[], ["--start", 2.95]])
def test_too_little_of_a_song_is_one_line(run, song, tmp_path, more):  # noqa: F811
    short = song if more else noise_song(tmp_path / "short.wav", 0.1)
    error, _ = run(short, PROMPT, "--whole-song", *more)
    assert error.startswith("error: ") and "--whole-song" in error and "\n" not in error
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("frames", [1, 8, -5])
def test_windows_that_cannot_be_are_one_line(run, song, frames):  # noqa: F811
    error, _ = run(song, PROMPT, "--frames", 31, "--window-frames", frames)
    assert error.startswith("error: ") and "--window-frames must be" in error


def test_silence(run, tmp_path):  # noqa: F811
    song = write_wav(tmp_path / "silence.wav", np.zeros(16000), rate=16000)
    error, output = run(song, PROMPT, "--whole-song", "--window-frames", 13)
    assert not error and "frames 25" in output
    assert made_from(tmp_path / "out")[0].std() > 0


def test_without_an_adapter(run, song):  # noqa: F811
    assert not run(song, PROMPT, "--frames", 25, "--adapter", "none")[0]


def test_what_fits_in_a_window_is_as_it_was(run, song, tmp_path):  # noqa: F811
    for frames in (25, 31):
        out = "--out", tmp_path / f"{frames}.mp4"
        error, output = run(song, PROMPT, "--frames", 25, "--window-frames", frames, *out)
        assert not error and "windows" not in output
    assert np.array_equal(*(watch(tmp_path / f"{frames}.mp4")[0] for frames in (25, 31)))


def test_each_window_hears_its_own_place(song):
    plan = mi.windows(14, 3)
    options = sample.Options(window_frames=13)
    waveform = torch.arange(0, 6 * 13 / 30 + 0.2, 1 / 16000)  # its own time
    sounds = sample.sounds_of(options, 30, waveform, plan)
    assert len(sounds) == len(plan)
    for (first, _), sound in zip(plan, sounds):
        assert abs(sound[0] - 6 * first / 30) < 1e-4
        assert abs(len(sound) / 16000 - mi.audio_seconds(13)) < 0.01


def test_ten_minutes():
    """Only a window of it is on the device: what the model sees is of one length throughout."""
    seen = []

    def dit(x, *inputs):
        seen.append(tuple(x.shape))
        return torch.ones_like(x)

    options = sample.Options(frames=17995, window_frames=73)
    plan = sample.plan_of(options)
    sounds = sample.sounds_of(options, 30, torch.zeros(600 * 16000), plan)
    assert plan[-1][0] + 13 == 3000 and len(plan) == len(sounds) == 375
    assert {len(sound) for sound in sounds} == {len(sounds[0])}
    noise = mi.in_every_window(torch.randn(1, 12, 13, 2, 2), 3000)
    text = torch.zeros(1, 1, 1), torch.ones(1, 1).bool()
    how = dict(plan=plan, sigmas=[1.0, 0.5, 0.0], cfg=1.0)
    z = mi.sample_long(dit, noise, text, text, [None] * len(plan), **how)
    close(z, noise + 1, 1e-5)
    assert set(seen) == {(1, 12, 13, 2, 2)} and len(seen) == 2 * 375


def test_processes_share_the_tokens_of_each_window(weights, song, tmp_path):
    more = ["sample.py", song, PROMPT, "--weights", weights, "--device", "cpu", "--frames", 25]
    together = torchrun(2, *more, "--out", tmp_path / "two.mp4")
    assert together.returncode == 0, together.stderr
    assert command(*more, "--out", tmp_path / "one.mp4").returncode == 0
    frames = [[*mi.read_frames(tmp_path / f"{name}.mp4", 32, 32)] for name in ("one", "two")]
    assert len(frames[0]) == 25
    assert max(abs(a.astype(int) - b).max() for a, b in zip(*frames)) <= 2
    assert not list(tmp_path.glob("*.unfinished.safetensors"))
