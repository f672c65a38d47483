"""eval/ablate.py: the command line, what is kept, the tables against numpy, the rows' layers."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # pytest adds only eval/

import adaptability
import musicinfuser as mi
import train
from eval import ablate
from test_musicinfuser import HERE, dance_videos, song, weights  # noqa: F401
from tiny import make

SMALL = ["--steps", "2", "--batch", "1", "--seeds", "1", "2"]


def command(*arguments):
    line = [sys.executable, "-m", "eval.ablate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=HERE)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(weights, dance_videos):  # noqa: F811
    """The options that put the smallest weights in tiny/'s place."""
    mi.save_json(weights / "adaptability.json", {"ranking": [2, 0, 1]})
    return dict(weights=str(weights), data=str(dance_videos), steps=2, batch=1)


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """What the command line did with two rows and two seeds: its result and its folder."""
    out = tmp_path_factory.mktemp("ablate")
    settings = ["--weights", small["weights"], "--data", small["data"], *SMALL, "--out", out]
    return command("ours", "feature-addition", *settings), out, settings


def gaps(out, row, key="gap_0.75"):
    return np.array([json.loads((out / f"{row}-{seed}" / "result.json").read_text())[key] for seed in (1, 2)])


def plus_minus(values, sign=""):
    return f"{values.mean():{sign}.4f} ± {values.std(ddof=1) / math.sqrt(len(values)):.4f}"


def test_rows_and_seeds_of_the_command_line(made, small):
    result, out, _ = made
    assert result.returncode == 0, result.stderr
    assert "4 of 4, about" in result.stdout and "step 0" not in result.stdout  # train.py's own words are elsewhere
    assert "frozen" in (out / "ours-1" / "output.txt").read_text()
    ours, added = gaps(out, "ours"), gaps(out, "feature-addition")
    log = [json.loads(line) for line in (out / "ours-2" / "log.jsonl").read_text().splitlines()]
    assert ours[1] == log[-1]["wrong_0.75"] - log[-1]["right_0.75"] and ours[0] != ours[1]
    right = np.mean([log[-1][f"right_{s}"] for s in (0.25, 0.5, 0.75, 0.9)])
    assert gaps(out, "ours", "held_out")[1] == pytest.approx(right, abs=1e-12)
    first, second, line = (part.splitlines() for part in result.stdout.split("\n\n")[-3:])
    assert line[0].startswith("python -m eval.ablate ours feature-addition --weights ")
    assert f"| {plus_minus(ours)} |" in first[2] and f"| {plus_minus(added)} |" in first[3]
    assert f"| {plus_minus(added - ours, '+')} |" in second[2]  # paired: not the difference of the errors
    config = json.loads((out / "ours-1" / "config.json").read_text())
    dit = mi.load_dit(os.path.join(small["weights"], "dit.safetensors"))
    mi.infuse(dit, config["layers"], rank=config["rank"], audio_width=16)
    trained = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    assert f"| {trained:,} |" in first[2] and gaps(out, "ours", "parameters").tolist() == [trained] * 2


def test_only_what_was_deleted_is_made_again(made):
    result, out, settings = made
    before, kept = files(out), json.loads((out / "feature-addition-1" / "result.json").read_text())
    shutil.rmtree(out / "feature-addition-1")
    again = command("ours", "feature-addition", *settings)
    assert again.returncode == 0, again.stderr
    assert "1 of 4" in again.stdout
    after = files(out)
    assert {p for p in before if after.get(p) != before[p]} == {p for p in before if "feature-addition-1" in str(p)}
    new = json.loads((out / "feature-addition-1" / "result.json").read_text())
    assert {k: v for k, v in new.items() if k != "seconds"} == {k: v for k, v in kept.items() if k != "seconds"}


def test_a_finished_cell_without_its_result_is_not_trained_again(made, small, monkeypatch):
    _, out, _ = made
    os.remove(out / "ours-2" / "result.json")
    log, steps, loss = (out / "ours-2" / "log.jsonl").read_text(), [], mi.flow_matching_loss
    monkeypatch.setattr(mi, "flow_matching_loss", lambda *a: steps.append(1) or loss(*a))
    monkeypatch.setattr(ablate, "commit", lambda: "now")
    results = ablate.ablate(["ours"], out=str(out), seeds=(1, 2), **small)
    assert not steps and (out / "ours-2" / "log.jsonl").read_text() == log
    assert results["ours"][2]["commit"] == "now" != results["ours"][1]["commit"]


def test_dry_run_and_table_change_nothing(made):
    _, out, settings = made
    before = files(out)
    dry = command("ours", "no-LoRA", *settings, "--dry-run")
    assert dry.returncode == 0 and "2 of 4, about 1 minutes" in dry.stdout and "|" not in dry.stdout
    shown = command("--table", "--out", out)
    assert shown.returncode == 0 and "| feature addition |" in shown.stdout and "| less ours |" in shown.stdout
    assert files(out) == before


@pytest.mark.parametrize("change", [["--steps", 3], ["--batch", 2]])
def test_cells_of_other_settings_are_refused_before_anything_is_trained(made, change):
    _, out, settings = made
    before = files(out)
    for row in ("ours", "no-LoRA"):  # one that is there, one that would stand beside it
        refused = command(row, *settings, *change)
        assert refused.returncode != 0 and refused.stderr.startswith("error: ") and "another" in refused.stderr
        assert change[0].strip("-") in refused.stderr and refused.stderr.count("\n") == 1
    assert files(out) == before


def test_a_row_that_fails_stays_in_the_table_and_the_others_go_on(small, tmp_path, monkeypatch, capsys):
    run = train.train

    def breaks(*arguments, **options):
        if options["rank"] == 4:
            raise RuntimeError("no memory\nat all")
        return run(*arguments, **options)

    monkeypatch.setattr(train, "train", breaks)
    rows = ["LoRA rank 4", "no LoRA"]
    results = ablate.ablate(rows, out=str(tmp_path), seeds=(1,), **small)
    assert list(results) == ["no LoRA"]
    assert "| LoRA rank 4 | failed: seed 1: RuntimeError: no memory at all |" in capsys.readouterr().out
    ablate.ablate(table_only=True, out=str(tmp_path))
    assert "| LoRA rank 4 | failed" in capsys.readouterr().out
    monkeypatch.setattr(train, "train", run)
    assert set(ablate.ablate(rows, out=str(tmp_path), seeds=(1,), **small)) == set(rows)
    assert "failed" not in capsys.readouterr().out


def test_rows_do_without_a_ranking_but_for_the_ranked(small, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(small["weights"], bare, ignore=shutil.ignore_patterns("adaptability.json"))
    rows = ["ranked layers", "first layers"]
    results = ablate.ablate(rows, out=str(tmp_path / "out"), seeds=(1,), **small | {"weights": str(bare)})
    assert list(results) == ["first layers"]
    assert "| ranked layers | failed: seed 1: no such file: " in capsys.readouterr().out


def test_a_row_that_is_another_is_not_trained_twice(small, tmp_path, monkeypatch, capsys):
    trained, run = [], train.train
    monkeypatch.setattr(train, "train", lambda *a, **o: trained.append(o["out"]) or run(*a, **o))
    monkeypatch.setattr(make, "ADAPTER", make.ADAPTER | {"layers": "all", "window": 0, "beta": 1.0})
    rows = ["feature addition", "ours", "all layers", "window 0", "uniform noise", "first layers"]
    results = ablate.ablate(rows, out=str(tmp_path), seeds=(1,), **small)
    assert trained == [str(tmp_path / f"{name}-1") for name in ("feature-addition", "ours", "first-layers")]
    printed = capsys.readouterr().out
    for row in rows[2:5]:
        assert results[row][1] == results["ours"][1] | {"as": "ours"} and f"| {row} (as ours) |" in printed
    assert results["feature addition"][1]["held_out"] != results["ours"][1]["held_out"]


def test_every_row_trains(small, tmp_path):
    """Also those whose options no other test uses; at depth 3 some sets of one layer are the same."""
    results = ablate.ablate(out=str(tmp_path), seeds=(1,), **small)
    assert set(results) == set(ablate.ROWS)
    names = ["ours", "no LoRA", "LoRA rank 4", "LoRA rank 64", "feature addition", "first layers"]
    sizes = {name: results[name][1]["parameters"] for name in names}
    assert sizes["no LoRA"] < sizes["LoRA rank 4"] < sizes["ours"] < sizes["LoRA rank 64"]
    assert sizes["first layers"] < results["all layers"][1]["parameters"] and sizes["feature addition"] < sizes["ours"]
    config = json.loads((tmp_path / "Beta-Uniform-noise-1" / "config.json").read_text())
    assert config["beta"] == 3 and config["rank"] == make.ADAPTER["rank"]


def test_the_prior_hears_nothing_and_an_untrained_adapter_is_the_prior(small, tmp_path):
    """At step 0 the learning rate is 0, so that after one step the zeros still stand."""
    results = ablate.ablate(["ours", ablate.PRIOR], out=str(tmp_path), seeds=(1, 2), **small | {"steps": 1})
    for seed in (1, 2):
        ours, prior = results["ours"][seed], results[ablate.PRIOR][seed]
        assert [prior[f"gap_{s}"] for s in ablate.SIGMAS] == [0, 0, 0, 0] and prior["parameters"] == 0
        assert ours["held_out"] == pytest.approx(prior["held_out"], rel=1e-5)
    assert results[ablate.PRIOR][1]["held_out"] != results[ablate.PRIOR][2]["held_out"]  # each seed has its noise


def test_the_untaught_encoder_is_of_the_same_sizes_and_always_the_same(small, tmp_path):
    from transformers import Wav2Vec2Model

    taught = Wav2Vec2Model.from_pretrained(os.path.join(small["weights"], "audio_encoder")).state_dict()
    folders = [ablate.untaught(small["weights"], str(tmp_path / name)) for name in "ab"]
    folders.append(ablate.untaught(small["weights"], str(tmp_path / "a")))  # again: what is there stays
    first, *others = [Wav2Vec2Model.from_pretrained(os.path.join(f, "audio_encoder")).state_dict() for f in folders]
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in taught.items()}
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)
    assert not torch.equal(
        first["encoder.layers.0.attention.k_proj.weight"], taught["encoder.layers.0.attention.k_proj.weight"]
    )
    same = os.path.join(folders[0], "dit.safetensors"), os.path.join(small["weights"], "dit.safetensors")
    assert os.path.samefile(*same)


@pytest.mark.parametrize("depth", [12, 48])
def test_the_rows_choose_valid_layers(depth, tmp_path):
    ranking = sorted(range(depth), key=lambda layer: math.sin(7 * layer + 3))
    mi.save_json(tmp_path / "adaptability.json", {"ranking": ranking})
    sets = {name: ablate.layers_of(ablate.ROWS[name]["layers"], depth, str(tmp_path)) for name in ablate.SETS[1:]}
    assert sets["ranked layers"] == sorted(ranking[: depth // 3])
    assert sets["lowest-ranked layers"] == sorted(ranking[-(depth // 3) :])
    for name, layers in sets.items():
        assert layers == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < depth
        assert len(layers) == (depth if name == "all layers" else depth // 3)
    assert len({tuple(layers) for layers in sets.values()}) == len(sets) == 11  # also the random ones, from each other
    assert ablate.SETS[0] == "ours"
    assert ablate.layers_of(None, depth, str(tmp_path)) == sets["ranked layers"]  # what ours may come to be
    assert ablate.layers_of("0,2", depth, str(tmp_path)) == [0, 2]


def test_rows_have_options_of_train_and_names_of_their_own():
    assert all(option in train.OPTIONS for row in ablate.ROWS.values() for option in row)
    slugs = [ablate.slug(row) for row in ablate.ROWS]
    assert len(set(slugs)) == len(slugs) and not any(" " in name or "/" in name for name in slugs)


def test_the_time_left_is_of_what_is_left(tmp_path):
    config = {"out": str(tmp_path), "steps": 120, "save_every": 50}
    results = {"ours": {1: {"seconds": 2.0}, 2: {"seconds": 4.0}}, "no LoRA": {1: {"seconds": 1.0}}}
    assert ablate.seconds_left([("ours", config)], results, 8)[0] == 30 + 3 * 120
    assert ablate.seconds_left([("window 1", config)], results, 8)[0] == 30 + 2 * 120  # the median of all
    (tmp_path / "log.jsonl").write_text("{}\n" * 70)  # of which 50 are saved
    assert ablate.seconds_left([("no LoRA", config)], results, 8)[0] == 30 + 70


def test_films_of_ours_between_the_prior_and_the_ground_truth(small, weights, tmp_path, monkeypatch, capsys):  # noqa: F811
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    clips = [torch.rand(3, 13, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)]
    mi.save_safetensors(weights / adaptability.REFERENCE, *adaptability.reference_statistics(clips, encoder))
    monkeypatch.setattr(make, "HERE", small["weights"])
    monkeypatch.setattr(make, "WORK", str(tmp_path / "work"))
    monkeypatch.setattr(make, "FRAMES", 37)
    film = make.Studio.film
    monkeypatch.setattr(make.Studio, "film", lambda *a, **o: film(*a, **o | {"frames": 37}))
    options = small | {"out": str(tmp_path / "out"), "seeds": (1, 2)}
    ablate.ablate(["ours"], films=2, **options)
    rows = {row: [json.loads((tmp_path / "out" / "films" / f"{ablate.slug(row)}-{seed}-2.json").read_text())
                  for seed in (1, 2)] for row in ("ours", ablate.PRIOR, ablate.TRUTH)}  # fmt: skip
    frechet = np.array([scores["frechet"] for scores in rows["ours"]])
    printed = capsys.readouterr().out
    assert f"{frechet.mean():.2f} ± {frechet.std(ddof=1) / math.sqrt(2):.2f} | 2 |" in printed
    for kind in ablate.KINDS:  # the toy world dances on its beats; the VAE at random lets that through
        assert {"r", "other", "tempo"} == set(rows[ablate.TRUTH][0][kind])
    assert rows["ours"][0]["people"] != rows[ablate.PRIOR][0]["people"] != rows[ablate.TRUTH][0]["people"]
    before = files(tmp_path / "out" / "films")
    monkeypatch.setattr(ablate, "filmed", None)  # nothing is filmed again
    ablate.ablate(["ours"], films=2, **options)
    assert files(tmp_path / "out" / "films") == before and capsys.readouterr().out.endswith(printed[-300:])


def test_scenes_dance_their_songs_genre_and_the_plain_prompt_tells_nothing():
    for kind in ("people", "people elsewhere", "plain prompt"):
        scenes, prompts, _ = ablate.scenes_of(kind, 4, 1)
        assert [scene["genre"] for scene in scenes] == list(make.GENRES)[:4] and len(prompts) == 4
        assert all((scene["place"] == "studio") == (kind != "people elsewhere") for scene in scenes)
        assert (set(prompts) == {train.PLAIN}) == (kind == "plain prompt")
    assert ablate.scenes_of("people", 4, 1)[0] != ablate.scenes_of("people", 4, 2)[0]


def test_ground_truth_keeps_to_the_beat_and_dances_its_genre(small, weights, tmp_path, monkeypatch):  # noqa: F811
    """Through a VAE that changes nothing; the features are those of the real encoder."""
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    scenes, _, songs = ablate.scenes_of("dogs", 2, 5)
    clips = [make.to_video(make.render(scene, make.steady_beat(np.random.default_rng(0)))[None])[0] for scene in scenes]
    mi.save_safetensors(weights / adaptability.REFERENCE, *adaptability.reference_statistics(clips, encoder))
    monkeypatch.setattr(make, "HERE", small["weights"])
    monkeypatch.setattr(make, "WORK", str(tmp_path / "work"))
    monkeypatch.setattr(make.Studio, "__init__", lambda self, *a, **o: setattr(self, "decoder", lambda video: video))
    monkeypatch.setattr(mi.Encoder, "forward", lambda self, video, *a: (video, None))
    monkeypatch.setattr(
        adaptability, "features", lambda video, encoder: torch.randn(13, encoder.output_proj.in_features)
    )
    found = ablate.filmed(ablate.TRUTH, None, 4, 1)
    for kind in ("people", "people elsewhere", "plain prompt"):
        assert found[kind]["r"] > 0.7 and abs(found[kind]["other"]) < 0.5 and found[kind]["tempo"] > 0.9
    assert found["style"] == 1 and found["frechet"] > 0


BAD = [
    (["nonsense"], "no row nonsense"), (["ours", "--data", "nowhere"], "tiny.make data nowhere"),
    (["--table", "--out", "nowhere"], "no finished cell"), (["ours", "--films", "2"], "leave out --weights"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, words", BAD)
def test_bad_input_is_one_line(small, tmp_path, arguments, words):
    rest = [] if "--table" in arguments else ["--out", tmp_path, "--weights", small["weights"]]
    data = [] if "--data" in arguments or "--table" in arguments else ["--data", small["data"]]
    result = command(*arguments, *rest, *data)
    assert result.returncode != 0 and result.stderr.startswith("error: ") and words in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_ours_may_be_the_twin_of_a_row_that_was_there_before(capsys):
    figures = {f"gap_{s}": 0.25 for s in ablate.SIGMAS} | {"held_out": 0.5, "seconds": 1.0, "parameters": 7, "layers": "0"}
    results = {"ours": {1: figures | {"as": "all layers"}}, "all layers": {1: figures}}
    ablate.print_tables(results, {row: {1: {"steps": 1, "batch": 1}} for row in results}, {})
    said = capsys.readouterr().out
    assert "| ours (as all layers) | 0 | 0.2500 ± ? |" in said and "| all layers | +0.0000 ± ? |" in said
