"""adaptability.py: the command line, what it keeps, the videos against a second solver, errors."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import PROMPT, ROOT

import adaptability
import musicinfuser as mi
import train
from eval import quality, ranking

PROMPTS = (PROMPT, "the person dances")
METRIC = "def score(video):\n    return 100 * float(video[0].square().mean())\n"


def command(weights, folder, *arguments, out="run", launch=()):
    """Run adaptability.py in `folder`, with a metric of its own, two prompts and two seeds."""
    (folder / "measured.py").write_text(METRIC)
    line = [sys.executable, *launch, os.path.join(ROOT, "adaptability.py"), "--weights", weights]
    line += ["--device", "cpu", "--out", out, "--metric", "measured:score"]
    line += ["--prompts", *PROMPTS, "--seed", 0, 1, *arguments]
    return subprocess.run(list(map(str, line)), cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ranked(weights, tmp_path_factory):
    """What `python adaptability.py --keep` did: its result and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("ranked")
    return command(weights, folder, "--keep"), folder


@pytest.fixture
def spy(monkeypatch):
    """--metric spy:score, which notes the videos that it sees."""
    module = types.ModuleType("spy")
    module.seen = []
    module.score = lambda video: module.seen.append(video) or video.mean()
    monkeypatch.setitem(sys.modules, "spy", module)
    return module


def rank(weights, out, **options):
    settings = {"weights": str(weights), "out": str(out), "device": "cpu", "metric": "spy:score"}
    return adaptability.rank(**settings | {"prompts": PROMPTS, "seeds": (0, 1)} | options)


def scores_in(folder):
    """{(layer, prompt, seed): score} of what is kept."""
    kept = [json.loads(path.read_text()) for path in folder.glob("kept/[bl]*.json")]
    return {(k["layer"], k["prompt"], k["seed"]): k["score"] for k in kept}


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def test_ranking_of_the_command_line(ranked, weights):
    result, folder = ranked
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"weights  {weights}\n")
    found = json.loads((folder / "run" / "adaptability.json").read_text())
    scores = scores_in(folder / "run")
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    assert set(scores) == {(layer, *pair) for layer in (None, 0, 1, 2) for pair in pairs}
    table = np.array([[scores[layer, *pair] for pair in pairs] for layer in (0, 1, 2, None)])
    gains = table[:3] - table[3]
    assert found["adaptability"] == pytest.approx(gains.mean(1))
    assert found["standard_error"] == pytest.approx(
        gains.std(1, ddof=1) / 2
    )  # of paired differences
    assert found["baseline"] == pytest.approx(table[3].mean())
    assert found["ranking"] == gains.mean(1).argsort()[::-1].tolist()
    assert len(set(gains.mean(1))) == 3
    assert found["prompts"] == list(PROMPTS) and found["seeds"] == [0, 1]
    assert sum(line.endswith(" *") for line in result.stdout.splitlines()) == 2  # table and chart


def test_ranking_is_what_training_reads(ranked, weights):
    result, folder = ranked
    path = str(folder / "run" / "adaptability.json")
    best, second, _ = json.loads(open(path).read())["ranking"]
    assert list(train.pick_layers(path, 3, str(weights))) == [best]
    assert list(train.pick_layers(path, 3, str(weights), 2)) == sorted([best, second])
    assert f"rank 1 (layer {best}) against rank 2 (layer {second})" in result.stdout


def test_kept_videos_are_those_that_were_scored_and_silent(ranked):
    run = ranked[1] / "run"
    names = sorted(path.stem for path in (run / "videos").iterdir())
    kept = sorted(run.glob("kept/[bl]*.json"))
    assert names == [path.stem for path in kept] and len(names) == 16
    video = run / "videos" / f"{names[0]}.mp4"
    frames = np.stack(list(mi.read_frames(video, 32, 32)))
    assert frames.shape == (7, 32, 32, 3)
    with pytest.raises(mi.InputError, match="has no sound"):
        mi.load_audio(video)
    score = 100 * np.square(frames[..., 0] / 127.5 - 1).mean()
    assert score == pytest.approx(json.loads(kept[0].read_text())["score"], rel=0.3)


def test_a_video_that_is_there_is_never_made_again(ranked, weights, monkeypatch, capsys):
    monkeypatch.chdir(ranked[1])
    run = ranked[1] / "run"
    kept = sorted(run.glob("kept/[bl]*.json"))
    whole = (run / "adaptability.json").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in kept}
    lost, damaged = kept[3], kept[8]
    lost.unlink()
    damaged.write_text(damaged.read_text()[:20])
    rank(weights, "run", metric="measured:score", dry_run=True)
    printed = capsys.readouterr().out
    rank(weights, "run", metric="measured:score")
    made = {path for path in kept if path.stat().st_mtime_ns != before[path]}
    assert made == {lost, damaged}
    words = (
        "88 forward passes for 16 videos; 14 videos are there, 10 are left"  # 2 steps of 2 and 3
    )
    assert words in printed
    left, right = json.loads(whole), json.loads((run / "adaptability.json").read_text())
    assert left["adaptability"] == pytest.approx(right["adaptability"], rel=1e-4)  # another batch
    (run / "adaptability.json").write_bytes(whole)


def test_processes_that_share_the_layers_end_with_the_same_file(
    ranked, weights, monkeypatch, capsys
):
    monkeypatch.chdir(ranked[1])
    for layers, ends in (("2", False), ("0-1", True)):
        rank(weights, "split", metric="measured:score", layers=layers)
        printed = capsys.readouterr().out
        assert ("layers 0, 1 are missing" in printed) != ends
        assert (ranked[1] / "split" / "adaptability.json").exists() == ends
    paths = [ranked[1] / name / "adaptability.json" for name in ("run", "split")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "4 videos are there" in printed  # the baseline's


def test_torchruns_processes_share_the_videos(ranked, weights):
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    run = command(weights, ranked[1], out="two", launch=launch)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("neighbouring ranks") == 1  # the first process alone reports
    one, two = (
        json.loads((ranked[1] / name / "adaptability.json").read_text()) for name in ("run", "two")
    )
    assert one["adaptability"] == pytest.approx(two["adaptability"], rel=1e-4)
    totals = re.findall(r"100%.*\| (\d+)/(\d+) ", run.stderr)
    assert {total for pair in totals for total in pair} == {"16"}  # 8 videos each, of 2 steps


def test_a_dry_run_leaves_nothing(weights, tmp_path, capsys):
    options = {"metric": "imaging", "cfg": 1.0, "layers": "1", "steps": 5, "dry_run": True}
    assert rank(weights, tmp_path / "run", **options) is None
    printed = capsys.readouterr().out
    assert "60 forward passes for 8 videos; 0 videos are there, 60 are left" in printed
    assert not list(tmp_path.iterdir())


def test_prompts_come_from_a_file_and_twins_count_once(spy, weights, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa dog\n\n a dog \na cat\n", encoding="utf-8")
    file = str(tmp_path / "prompts.txt")
    result = rank(weights, tmp_path, prompts=None, prompts_file=file, seeds=(3, 3))
    assert result["prompts"] == ("a dog", "a cat") and result["seeds"] == (3,)
    assert len(spy.seen) == 8


# ----------------------------------------------------------------------------------------------
# The videos
# ----------------------------------------------------------------------------------------------


def test_videos_are_those_of_a_second_solver(spy, weights, tmp_path):
    rank(weights, tmp_path, skip_scale=0.7, cfg=2.5, steps=4, batch=3)
    dit = mi.load_dit(weights / "dit.safetensors")
    decoder = mi.load_decoder(weights / "decoder.safetensors")
    *texts, null = mi.encode_text(weights, [*PROMPTS, ""])
    wanted = []
    with torch.no_grad():
        for layer in (0, 1, 2, None):
            for prompt, text in zip(PROMPTS, texts):
                for seed in (0, 1):
                    noise_seed = adaptability.Video(layer, prompt, seed).noise_seed
                    x = second_solver(dit, noise_seed, text, null, layer)
                    config = dit.config
                    latents = mi.to_vae_space(x, config.mean, config.std)
                    wanted.append(decoder(latents)[0].clamp(-1, 1))
    torch.testing.assert_close(torch.stack(spy.seen), torch.stack(wanted), atol=1e-3, rtol=0)
    differences = [(a - b).abs().mean() for i, a in enumerate(wanted) for b in wanted[:i]]
    assert min(differences) > 0.01


def second_solver(dit, seed, text, null, layer):
    """Eq. 4 with cfg 2.5 and skip scale 0.7, in four Euler steps."""
    sigmas = mi.linear_quadratic_schedule(4).tolist()
    x = torch.randn(1, 12, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for now, then in zip(sigmas, sigmas[1:]):
        sigma = torch.tensor([now])
        cond, uncond = dit(x, sigma, *text), dit(x, sigma, *null)
        without = cond if layer is None else dit(x, sigma, *text, skip=(layer,))
        x = x + (now - then) * (uncond + 2.5 * (cond - uncond) + 0.7 * (cond - without))
    return x


def test_without_guidance_every_layer_is_the_baseline(spy, weights, tmp_path, capsys):
    result = rank(weights, tmp_path, skip_scale=0.0)
    layers, baseline = spy.seen[:12], spy.seen[12:]
    assert all(torch.equal(video, baseline[i % 4]) for i, video in enumerate(layers))
    assert not any(result["adaptability"]) and not any(result["standard_error"])
    assert "no number of videos a layer would do" in capsys.readouterr().out


CHANGES = [
    {"steps": 3},
    {"cfg": 2.0},
    {"size": (16, 32)},
    {"frames": 13},
    {"solver": "ab2"},
    {"dtype": "bfloat16"},
    {"seeds": (1,)},
    {"prompts": PROMPTS[1:]},
    {"skip_scale": 2.0},
    {"layers": "2"},
    {},
]


def test_what_is_kept_depends_on_all_that_makes_a_video(spy, weights, tmp_path):
    few = {"prompts": PROMPTS[:1], "seeds": (0,), "layers": "1", "steps": 2}
    rank(weights, tmp_path, **few)
    for change in CHANGES:
        spy.seen.clear()
        rank(weights, tmp_path, **few | change)
        layer_only = {"skip_scale", "layers"} & change.keys()  # the baseline stays
        assert len(spy.seen) == (1 if layer_only else 2 if change else 0), change


def test_what_is_kept_depends_on_the_weights_content(spy, weights, tmp_path):
    few = {"prompts": PROMPTS[:1], "seeds": (0,), "layers": "1", "steps": 2}
    rank(weights, tmp_path / "run", **few)
    copy = tmp_path / "weights"
    shutil.copytree(weights, copy)
    tensors, metadata = mi.read_safetensors(weights / "dit.safetensors")
    changed = tensors | {"pos_frequencies": tensors["pos_frequencies"] + 1}
    for written, made in ((tensors, 0), (changed, 2)):
        mi.save_safetensors(copy / "dit.safetensors", written, metadata)
        spy.seen.clear()
        rank(copy, tmp_path / "run", **few)
        assert len(spy.seen) == made


def test_a_videos_noise_is_that_of_sample_py(spy, song, weights, tmp_path, monkeypatch):
    import sample

    rank(weights, tmp_path / "run", prompts=PROMPTS[:1], seeds=(3,), layers="1")

    def keep(path, video, *_, **options):
        spy.seen.append(video.clamp(-1, 1))

    monkeypatch.setattr(mi, "save_video", keep)
    video = adaptability.Video(1, PROMPT, 3)
    how = {"weights": str(weights), "adapter": "none", "skip": (1,), "device": "cpu"}
    sample.generate(str(song), PROMPT, **how, seeds=(video.noise_seed,), out=str(tmp_path))
    torch.testing.assert_close(spy.seen[0], spy.seen[2], atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------
# The errors of a ranking, and its report
# ----------------------------------------------------------------------------------------------


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def jackknife(score, baseline, layer):
    n = len(layer)
    less = [score(np.delete(layer, i, 0)) - score(np.delete(baseline, i, 0)) for i in range(n)]
    error = math.sqrt((n - 1) / n * np.square(np.array(less) - np.mean(less)).sum())
    return score(layer) - score(baseline), error


def check_errors(score, measured, second_score, data):
    result, gaps = ranking.compare(score, measured[0], measured[1:])
    for layer in range(3):
        gain, error = jackknife(second_score, data[0], data[layer + 1])
        assert result["adaptability"][layer] == pytest.approx(gain)
        assert result["standard_error"][layer] == pytest.approx(error)
    best, second, _ = result["ranking"]
    assert gaps[0] == pytest.approx(jackknife(second_score, data[second + 1], data[best + 1]))
    return result


def test_errors_of_a_mean_are_those_of_paired_differences():
    data = randn(4, 7).numpy() + randn(1, 7, seed=1).numpy()
    result = check_errors(statistics.mean, data.tolist(), np.mean, data)
    paired = data[1] - data[0]
    assert result["standard_error"][0] == pytest.approx(paired.std(ddof=1) / math.sqrt(7))


def test_errors_of_a_frechet_distance_are_the_jackknifes():
    scale = torch.tensor([1.0, 1.2, 0.6, 0.8])[:, None, None, None]
    data = randn(4, 7, 6, 3) * scale + 0.3 * randn(1, 7, 6, 3, seed=1)
    wanted = torch.zeros(3).double(), torch.eye(3).double()

    def score(videos):
        return -quality.frechet_distance(*quality.gaussian(videos), *wanted)

    def second_score(videos):
        rows = videos.reshape(-1, 3)
        deviations = np.sqrt(np.linalg.eigvalsh(np.cov(rows.T)))
        return -np.square(rows.mean(0)).sum() - np.square(deviations - 1).sum()

    check_errors(score, [list(layer) for layer in data], second_score, data.numpy())


def test_one_video_has_no_error(spy, weights, tmp_path, capsys):
    result = rank(weights, tmp_path, prompts=PROMPTS[:1], seeds=(0,))
    printed = capsys.readouterr().out
    assert result["standard_error"] == [None] * 3 and "± ?" in printed
    assert "one video tells nothing of the error" in printed


@pytest.mark.parametrize(
    "spread, words", [(0.01, "told apart"), (2.0, "not told apart; about 36 videos a layer")]
)
def test_the_report_says_whether_ranks_can_be_told_apart(capsys, spread, words):
    result = {"ranking": [2, 0, 1], "adaptability": (0.5, -1.0, 1.5), "baseline": 7.0}
    result["standard_error"] = (0.1,) * 3
    ranking.report(result, [(1.0, spread / 2), (1.5, 0.1)], 1, 9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["2", "0", "1"]
    assert "+1.500 ± 0.100  *" in lines[2]
    bars = [line[7:] for line in lines[lines.index("layer") + 1 :][:3]]  # a cell is 2.5 / 40
    assert bars == [" " * 16 + "|" + 8 * "█", 16 * "█" + "|", " " * 16 + "|" + 24 * "█" + " *"]
    edge = f"rank 1 (layer 2) against rank 2 (layer 0): +1.000 ± {spread / 2:.3f}, {words}"
    assert edge in lines[-1]
    assert lines[-2].startswith("2 of 2" if spread < 1 else "1 of 2")


# ----------------------------------------------------------------------------------------------
# Frechet
# ----------------------------------------------------------------------------------------------


def clips(seed, frames=7):
    """Three videos."""
    generators = (torch.Generator().manual_seed(seed + i) for i in range(3))
    return [torch.rand(3, frames, 32, 32, generator=generator) * 2 - 1 for generator in generators]


def linked(weights, folder):
    """A folder with the same weights, to add to."""
    folder.mkdir(exist_ok=True)
    for path in weights.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_frechet_with_a_folder_of_clips_and_with_the_weights_own(weights, tmp_path):
    for i, clip in enumerate(clips(0, 9) + clips(9, 5)):  # the last three are too short
        mi.save_video(tmp_path / "clips" / "deeper" / f"{i}.mp4", clip)
    folder = str(tmp_path / "clips")
    found = rank(weights, tmp_path / "run", metric=None, reference=folder)
    assert found["metric"] == "frechet"
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    seen = list(quality.reference_clips(folder, 7, 32, 32, 30))
    tensors, metadata = quality.reference_statistics(seen, encoder)
    assert metadata["clips"] == "3"

    own = linked(weights, tmp_path / "own")
    mi.save_safetensors(own / "reference.safetensors", tensors, metadata)
    again = rank(own, tmp_path / "run", metric=None)  # scores of the same kept features
    assert again["metric"] == "frechet" and again["reference"] is None
    tolerance = 1e-3 * max(map(abs, found["adaptability"]))
    assert again["adaptability"] == pytest.approx(found["adaptability"], abs=tolerance)
    check_distances(again, tmp_path / "run", tensors)


def check_distances(found, run, reference):
    """A layer's adaptability is by how much its videos are nearer than the baseline's."""
    kept = {}
    for path in run.glob("kept/[bl]*.safetensors"):
        features = mi.read_safetensors(path)[0]["features"]
        kept.setdefault(path.name[:8], []).append(features)
    distances = {}
    for name, features in kept.items():
        mean_and_cov = quality.gaussian(features)
        distance = quality.frechet_distance(*mean_and_cov, reference["mean"], reference["cov"])
        distances[name] = distance
    assert found["baseline"] == pytest.approx(-distances["baseline"])
    gains = [distances["baseline"] - distances[f"layer-{layer:02d}"] for layer in range(3)]
    assert found["adaptability"] == pytest.approx(gains, abs=1e-9)


def test_kept_features_of_another_shape_are_made_again(weights, tmp_path):
    own = linked(weights, tmp_path / "own")
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    mi.save_safetensors(
        own / "reference.safetensors", *quality.reference_statistics(clips(0), encoder)
    )
    first = rank(own, tmp_path / "run", metric=None)
    kept = next((tmp_path / "run" / "kept").glob("layer*"))
    for damage in (torch.zeros(2, 3), torch.zeros(5), torch.full((2, 8), math.nan)):
        mi.save_safetensors(kept, {"features": damage})
        again = rank(own, tmp_path / "run", metric=None)
        assert again["adaptability"] == pytest.approx(first["adaptability"], abs=1e-4)


def test_a_reference_that_does_not_fit_is_one_line(weights, tmp_path):
    own = linked(weights, tmp_path / "own")
    wrong = {"mean": torch.zeros(5).double(), "cov": torch.eye(5).double()}
    mi.save_safetensors(own / "reference.safetensors", wrong, {"feature": quality.FEATURE})
    with pytest.raises(mi.InputError, match="reference.safetensors"):
        rank(own, tmp_path / "run", metric=None)
    assert not list(tmp_path.rglob("layer-*"))


# ----------------------------------------------------------------------------------------------
# Bad inputs
# ----------------------------------------------------------------------------------------------

BAD = [
    ({"layers": "0-3"}, "layers from 0 to 2"),
    ({"layers": "0-9999999999999"}, "layers from 0 to 2"),
    ({"layers": "2-1"}, "layers"),
    ({"layers": "9" * 5000}, "ranges such as"),
    ({"layers": "even"}, "ranges such as"),
    ({"prompts": ()}, "no prompts"),
    ({"prompts_file": __file__}, "--prompts and --prompts-file do not go together"),
    ({"prompts": ("a", " ")}, "an empty one"),
    ({"seeds": (-1,)}, "numbers from 0"),
    ({"seeds": ()}, "numbers from 0"),
    ({"top": 4}, "from 1 to 3"),
    ({"top": 0}, "--top must be 1 or more"),
    ({"batch": 0}, "--batch must be 1 or more"),
    ({"metric": "musiq"}, "not imaging, laion_aes, frechet or some module:function"),
    ({"metric": "aesthetic"}, "not imaging, laion_aes, frechet or some module:function"),
    ({"metric": "no_such_module:f"}, "cannot be imported .ModuleNotFoundError"),
    ({"metric": "spy:nothing"}, "cannot be imported .AttributeError"),
    ({"metric": "spy:seen"}, "not a function"),
    ({"metric": "frechet"}, "needs --reference"),
    ({"reference": "."}, "is for frechet"),
    ({"metric": "frechet", "reference": ".", "frames": 1, "prompts": ("a",)}, "more --frames, or"),
    ({"metric": "frechet", "reference": "none"}, "no such folder: none"),
    ({"weights": "none"}, "no such file"),
    ({"frames": 8}, "7 or 13"),
    ({"size": (32, 40)}, "multiples of 16"),
    ({"steps": 1}, "2 or more"),
    ({"skip_scale": math.nan}, "must be a number"),
    ({"skip_scales": 1}, "no option skip_scales; did you mean skip_scale"),
]


@pytest.mark.parametrize("options, words", BAD)
def test_bad_input_is_said_before_anything_is_sampled(spy, weights, tmp_path, options, words):
    with pytest.raises(mi.InputError, match=words):
        rank(**{"weights": weights, "out": tmp_path / "run"} | options)
    assert not spy.seen


@pytest.mark.parametrize("metric", quality.PYIQA)
def test_a_missing_pyiqa_is_said_before_anything_is_sampled(weights, tmp_path, monkeypatch, metric):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setattr(adaptability, "make_videos", None)
    with pytest.raises(mi.InputError, match=f"--metric {metric} needs pyiqa .*pip install pyiqa"):
        rank(weights, tmp_path, metric=metric)


@pytest.mark.parametrize("value", ["high", None, math.nan, [1, 2]])
def test_a_metric_that_gives_no_number_is_one_line(spy, weights, tmp_path, value):
    spy.score = lambda video: value
    with pytest.raises(mi.InputError, match=r'(fails on|gives nan for) layer 0, "a dog dancing in'):
        rank(weights, tmp_path)
    assert not list(tmp_path.rglob("layer-*"))


def test_bad_input_of_the_command_line_is_one_line(weights, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    line = [sys.executable, os.path.join(ROOT, "adaptability.py"), "--weights", str(weights)]
    out = ["--metric", "math:fsum", "--out", "blank.txt/out"]
    for arguments in (["--prompts-file", "blank.txt"], out):
        result = subprocess.run([*line, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode != 0 and "error: " in result.stderr
        assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["blank.txt"]
