"""eval.ablate: the command line, what is kept, the tables against numpy, the rows' layers."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import musicinfuser as mi
import train
from eval import ablate, films, quality, rows
from tiny import world

SMALL = ["--steps", "2", "--batch", "1", "--seeds", "1", "2"]


def command(*arguments):
    line = [sys.executable, "-m", "eval.ablate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(weights, dance_videos, tmp_path_factory):
    """The options that put the smallest weights in tiny/'s place."""
    folder = tmp_path_factory.mktemp("ranked")
    for path in weights.iterdir():
        (folder / path.name).symlink_to(path)
    mi.save_json(folder / "adaptability.json", {"ranking": [2, 0, 1]})
    dit = mi.load_dit(weights / "dit.safetensors")
    dit.config.training["rank"] = 8  # at most the width, which is 32
    os.remove(folder / "dit.safetensors")
    mi.save_dit(dit, folder / "dit.safetensors", torch.float32)
    return {"weights": str(folder), "data": str(dance_videos), "steps": 2, "batch": 1}


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """What the command line did with two rows and two seeds: its result and its folder."""
    out = tmp_path_factory.mktemp("ablate")
    options = ["--weights", small["weights"], "--data", small["data"], *SMALL, "--out", out]
    return command("ours", "feature-addition", *options), out, options


def figures(out, row, key="gap_0.75"):
    paths = [out / f"{row}-{seed}" / "result.json" for seed in (1, 2)]
    return np.array([json.loads(path.read_text())[key] for path in paths])


def plus_minus(values, sign=""):
    return f"{values.mean():{sign}.4f} ± {values.std(ddof=1) / math.sqrt(len(values)):.4f}"


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def test_cells_are_trained_and_kept(made, small):
    result, out, _ = made
    assert result.returncode == 0, result.stderr
    assert "left     4 of 4, about" in result.stdout
    assert "step 0" not in result.stdout and "adapter" in (out / "ours-1/output.txt").read_text()
    log = [json.loads(line) for line in (out / "ours-2" / "log.jsonl").read_text().splitlines()]
    ours = figures(out, "ours")
    assert ours[1] == log[-1]["wrong_0.75"] - log[-1]["right_0.75"] and ours[0] != ours[1]
    right = np.mean([log[-1][f"right_{s}"] for s in (0.25, 0.5, 0.75, 0.9)])
    assert figures(out, "ours", "held_out")[1] == pytest.approx(right, abs=1e-12)
    tensors, _ = mi.read_safetensors(out / "ours-1" / "musicinfuser.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    assert figures(out, "ours", "parameters").tolist() == [count] * 2


def test_tables_have_paired_differences(made):
    result, out, _ = made
    ours, added = figures(out, "ours"), figures(out, "feature-addition")
    first, second, line = (part.splitlines() for part in result.stdout.split("\n\n")[-3:])
    assert line[0].startswith("python -m eval.ablate ours feature-addition --weights ")
    assert f"| {plus_minus(ours)} |" in first[2] and f"| {plus_minus(added)} |" in first[3]
    assert f"| {plus_minus(added - ours, '+')} |" in second[2]


def test_only_what_was_deleted_is_made_again(made, small, capsys):
    _, out, _ = made
    before = files(out)
    kept = json.loads((out / "feature-addition-1" / "result.json").read_text())
    shutil.rmtree(out / "feature-addition-1")
    names = ["ours", "feature-addition"]
    ablate.ablate(names, out=str(out), seeds=(1, 2), **small)
    assert "left     1 of 4" in capsys.readouterr().out
    after = files(out)
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed == {path for path in before if "feature-addition-1" in str(path)}
    new = json.loads((out / "feature-addition-1" / "result.json").read_text())
    assert kept.pop("seconds") and new.pop("seconds") and new == kept


def test_a_finished_cell_without_its_result_is_not_trained_again(made, small, monkeypatch):
    _, out, _ = made
    os.remove(out / "ours-2" / "result.json")
    log = (out / "ours-2" / "log.jsonl").read_text()
    monkeypatch.setattr(train.Trainer, "step", None)
    monkeypatch.setattr(ablate, "commit", lambda: "now")
    results, _ = ablate.ablate(["ours"], out=str(out), seeds=(1, 2), **small)
    assert (out / "ours-2" / "log.jsonl").read_text() == log
    assert results["ours"][2]["commit"] == "now" != results["ours"][1]["commit"]


def test_dry_run_and_table_change_nothing(made, small, capsys):
    _, out, _ = made
    before, options = files(out), small | {"out": str(out), "seeds": (1, 2)}
    assert ablate.ablate(["ours", "no-LoRA"], dry_run=True, **options) is None
    printed = capsys.readouterr().out
    assert "left     2 of 4, about 1 minutes" in printed and "|" not in printed
    ablate.ablate(table=True, **options)
    printed = capsys.readouterr().out
    assert "| feature addition |" in printed and "| less ours |" in printed
    assert files(out) == before


@pytest.mark.parametrize("change", [{"steps": 3}, {"batch": 2}])
def test_cells_of_other_settings_are_refused_before_anything_is_trained(made, small, change):
    _, out, _ = made
    before, options = files(out), small | {"out": str(out), "seeds": (1, 2)} | change
    for row in ("ours", "no-LoRA"):  # one that is there, one that would stand beside it
        with pytest.raises(mi.InputError, match=next(iter(change))):
            ablate.ablate([row], **options)
    assert files(out) == before


BAD = {
    "--steps must be 1 or more": {"steps": 0},
    "--batch must be 1 or more": {"batch": 0},
    "--films must be 0 or more": {"films": -1},
    "--films takes 2 or more": {"films": 1},
    "--seeds takes numbers from 0": {"seeds": (-1,)},
    "there is no option film; did you mean films": {"film": 1},
    "make them: python -m tiny.make data none": {"data": "none"},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_numbers_are_refused_in_a_dry_run(words, small, tmp_path):
    with pytest.raises(mi.InputError) as error:
        ablate.ablate(**small | {"out": str(tmp_path), "dry_run": True} | BAD[words])
    assert words in str(error.value) and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# Failures
# ----------------------------------------------------------------------------------------------


def breaks_at_rank_4(run):
    def train(data, **options):
        if options["rank"] == 4:
            raise RuntimeError("no memory\nat all")
        return run(data, **options)

    return train


def test_a_row_that_fails_stays_in_the_table_and_the_others_go_on(
    small, tmp_path, monkeypatch, capsys
):
    run, names, options = train.train, ["LoRA rank 4", "no LoRA"], {"out": str(tmp_path)}
    monkeypatch.setattr(train, "train", breaks_at_rank_4(run))
    results, failed = ablate.ablate(names, seeds=(1,), **small | options)
    assert list(results) == ["no LoRA"] and list(failed) == ["LoRA rank 4"]
    words = "| LoRA rank 4 | failed: seed 1: RuntimeError: no memory at all |"
    assert words in capsys.readouterr().out
    ablate.ablate(table=True, weights=small["weights"], **options)
    assert "| LoRA rank 4 | failed" in capsys.readouterr().out
    monkeypatch.setattr(train, "train", run)
    results, failed = ablate.ablate(names, seeds=(1,), **small | options)
    assert set(results) == set(names) and not failed


def test_a_failure_ends_with_an_error_after_the_table(small, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(small["weights"], bare, ignore=shutil.ignore_patterns("adaptability.json"))
    options = ["--data", small["data"], *SMALL[:4], "--seeds", 1, "--out", tmp_path / "out"]
    made = command("ranked-layers", "first-layers", "--weights", bare, *options)
    assert made.returncode == 1 and "| first layers | 0 |" in made.stdout
    assert made.stderr.splitlines()[-1].startswith("error: 1 rows failed, as ranked layers: seed 1")
    assert "| ranked layers | failed: seed 1: no such file: " in made.stdout


# ----------------------------------------------------------------------------------------------
# The rows
# ----------------------------------------------------------------------------------------------


def test_every_row_trains(small, tmp_path, monkeypatch):
    """Also those whose options no other test uses; at depth 3 some sets are the same."""
    monkeypatch.setitem(rows.ROWS, "LoRA rank 64", {"rank": 32})
    results, failed = ablate.ablate(out=str(tmp_path), seeds=(1,), **small)
    assert set(results) == set(rows.ROWS) and not failed
    sizes = {name: cells[1]["parameters"] for name, cells in results.items()}
    assert sizes["no LoRA"] < sizes["LoRA rank 4"] < sizes["LoRA rank 64"]
    assert sizes["first layers"] < sizes["all layers"]
    assert sizes["feature addition"] < sizes["ours"]
    identities = {name: cells[1]["identity"] for name, cells in results.items()}
    noise = identities["Beta-Uniform noise"]
    assert noise["beta"] == 3 and noise["half_life"] == 1
    assert identities["no zero initialisation"]["random_init"] is True
    assert results[rows.OMNIDANCE][1]["held_out"] != results["all layers"][1]["held_out"]


def test_a_row_that_is_another_is_not_trained_twice(small, tmp_path, monkeypatch, capsys):
    trained, run = [], train.train

    def note(data, **options):
        trained.append(options["out"])
        return run(data, **options)

    monkeypatch.setattr(train, "train", note)
    monkeypatch.setitem(rows.ROWS, "window 0", {"beta": 3.0})
    names = ["ours", "Beta-Uniform noise", "window 0", "first layers", "ranked layers"]
    results, _ = ablate.ablate(names, out=str(tmp_path), seeds=(1,), **small)
    assert trained == [str(tmp_path / f"{name}-1") for name in ("ours", "first-layers")]
    printed = capsys.readouterr().out
    for row in ("Beta-Uniform noise", "window 0", "ranked layers"):
        assert results[row][1] == results["ours"][1] | {"as": "ours"}
        assert f"| {row} (as ours) |" in printed


def test_a_twin_may_be_older(small, tmp_path, monkeypatch):
    """Its identity has what is free by now."""
    given = {"out": str(tmp_path), "seeds": (1,), **small}
    ablate.ablate(["ours"], **given)
    path = tmp_path / "ours-1" / "result.json"
    kept = json.loads(path.read_text())
    kept["identity"]["eval_every"] = 77
    path.write_text(json.dumps(kept))
    monkeypatch.setitem(rows.ROWS, "window 0", {})
    results, _ = ablate.ablate(["ours", "window 0"], **given)
    assert results["window 0"][1]["as"] == "ours"


def test_the_prior_hears_nothing_and_an_untrained_adapter_is_the_prior(small, tmp_path):
    """At step 0 the learning rate is 0, so that after one step the zeros still stand."""
    options = small | {"steps": 1, "seeds": (1, 2), "out": str(tmp_path)}
    results, _ = ablate.ablate(["ours", rows.PRIOR], **options)
    for seed in (1, 2):
        ours, prior = results["ours"][seed], results[rows.PRIOR][seed]
        assert [prior[f"gap_{s}"] for s in ablate.SIGMAS] == [0, 0, 0, 0]
        assert prior["parameters"] == 0
        assert ours["held_out"] == pytest.approx(prior["held_out"], rel=1e-5)
    first, second = (results[rows.PRIOR][seed]["held_out"] for seed in (1, 2))
    assert first != second  # each seed has its noise


def test_zica_grows_with_depth_within_its_row_only(small):
    options = mi.settle(train.Options, {}, {"layers": (0, 1, 2), "weights": small["weights"]})
    options.device, options.dtype = "cpu", "float32"

    class Example:
        def batch(self, numbers, step):
            z, audio = torch.zeros(1, 12, 2, 4, 4), torch.zeros(1, 9, 16)
            return train.Batch(z, torch.zeros(1), z, {"audio": audio}, [])

    train.Batch = sys.modules["dataset.batches"].Batch
    plain = train.load_model(options, Example())
    with rows.growing_with_depth():
        weighted = train.load_model(options, Example())
    x = torch.randn(1, 4, 32)
    for layer in range(3):
        for dit in (plain, weighted):
            torch.nn.init.ones_(dit.audio_cross_attn_blocks[layer].to_out.bias)
        outs = [dit.audio_cross_attn_blocks[layer].to_out(x) for dit in (plain, weighted)]
        torch.testing.assert_close(outs[1], ((layer + 1) / 3) ** 1.5 * outs[0])
    after = train.load_model(options, Example())
    assert not after.audio_cross_attn_blocks[0].to_out._forward_hooks


def test_the_untaught_encoder_is_of_the_same_sizes_and_always_the_same(small, tmp_path):
    from transformers import Wav2Vec2Model

    def load(folder):
        return Wav2Vec2Model.from_pretrained(os.path.join(folder, "audio_encoder")).state_dict()

    taught = load(small["weights"])
    folders = [rows.untaught(small["weights"], str(tmp_path / name)) for name in "aba"]
    first, *others = map(load, folders)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in taught.items()}
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)
    name = "encoder.layers.0.attention.k_proj.weight"
    assert not torch.equal(first[name], taught[name])
    same = [os.path.join(folder, "dit.safetensors") for folder in (folders[0], small["weights"])]
    assert os.path.samefile(*same)


@pytest.mark.parametrize("depth", [12, 48])
def test_the_rows_choose_valid_layers(depth, tmp_path):
    ranking = sorted(range(depth), key=lambda layer: math.sin(7 * layer + 3))
    mi.save_json(tmp_path / "adaptability.json", {"ranking": ranking})
    names = rows.GROUPS["sets"][1:]
    choices = {row: rows.ROWS[row]["layers"] for row in names}
    sets = {row: rows.layers_of(choices[row], depth, str(tmp_path)) for row in names}
    assert sets["ranked layers"] == tuple(sorted(ranking[: depth // 3]))
    assert sets["lowest-ranked layers"] == tuple(sorted(ranking[-(depth // 3) :]))
    assert sets[rows.WAN_DANCER] == tuple(range(0, depth, 4))
    for row, layers in sets.items():
        assert list(layers) == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < depth
        if row not in ("all layers", rows.WAN_DANCER):
            assert len(layers) == depth // 3
    assert len(set(sets.values())) == len(sets) == 12  # the random ones too, from each other
    assert rows.layers_of(None, depth, str(tmp_path)) == sets["ranked layers"]
    assert rows.layers_of("0,2", depth, str(tmp_path)) == (0, 2)
    assert rows.layers_of([0, 2], depth, str(tmp_path)) == (0, 2)


def test_rows_have_options_of_train_and_names_of_their_own():
    names = {f.name for f in train.fields(train.Options)}
    assert all(option in names for row in rows.ROWS.values() for option in row)
    slugs = [rows.slug(row) for row in rows.ROWS]
    assert len(set(slugs)) == len(slugs) and not any(set(" /()") & set(name) for name in slugs)
    assert all(row in rows.ROWS for group in rows.GROUPS.values() for row in group)
    assert rows.rows_of(["plain ZICA, no window", "no-LoRA", "no-LoRA"])[1:] == ["no LoRA"]
    with pytest.raises(mi.InputError, match="no row none; there are: ours, "):
        rows.rows_of(["none"])


# ----------------------------------------------------------------------------------------------
# Films
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def longer(small, weights, tmp_path, monkeypatch):
    """The smallest weights with a reference; their films have 37 frames of 64x64."""
    folder = tmp_path / "weights"
    shutil.copytree(small["weights"], folder, symlinks=True)
    encoder = mi.load_encoder(weights / "encoder.safetensors")
    generator = torch.Generator().manual_seed(0)
    clips = [torch.rand(3, 13, 64, 64, generator=generator) * 2 - 1 for _ in range(3)]
    statistics = quality.reference_statistics(clips, encoder)
    mi.save_safetensors(folder / quality.REFERENCE, *statistics)
    plain = films.Studio

    def studio(*arguments):
        studio = plain(*arguments)
        studio.options.size, studio.options.frames = (64, 64), 37
        return studio

    monkeypatch.setattr(films, "Studio", studio)
    return small | {"weights": str(folder)}


def test_films_of_each_row_between_the_prior_and_the_ground_truth(
    longer, tmp_path, monkeypatch, capsys
):
    options = longer | {"out": str(tmp_path / "out"), "seeds": (1, 2), "films": 2}
    asked = ["ours", "feature addition", "Beta-Uniform noise"]  # the last is ours again
    ablate.ablate(asked, **options)
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / "films"
    scores = {
        row: [
            json.loads((folder / f"{rows.slug(row)}-{seed}-2.json").read_text()) for seed in (1, 2)
        ]
        for row in ("ours", "feature addition", rows.PRIOR, rows.TRUTH)
    }
    assert len(list(folder.glob("*.json"))) == 8
    frechet = np.array([found["frechet"] for found in scores["ours"]])
    error = frechet.std(ddof=1) / math.sqrt(2)
    assert f"{frechet.mean():.2f} ± {error:.2f} | 2 |" in printed
    pairs = zip(scores["feature addition"], scores["ours"])
    less = np.array([found["people"]["r"] - own["people"]["r"] for found, own in pairs])
    error = less.std(ddof=1) / math.sqrt(2)
    assert f"| feature addition | {less.mean():+.2f} ± {error:.2f} |" in printed
    for kind in films.KINDS:
        assert set(scores[rows.TRUTH][0][kind]) == {"r", "other", "tempo"}
    people = [found[0]["people"] for found in scores.values()]
    assert all(one != other for one, other in itertools.combinations(people, 2))
    before = files(folder)
    monkeypatch.setattr(ablate, "filmed", None)  # nothing is filmed again
    ablate.ablate(asked, **options)
    assert files(folder) == before and capsys.readouterr().out.endswith(printed[-300:])


def test_each_score_of_films_has_its_place():
    assert (
        ablate.film_cell([{"r": 0.5, "other": -0.1, "tempo": 0.9}])
        == "0.50 ± ? / -0.10 ± ? / 0.90 ± ?"
    )


def test_scenes_dance_their_songs_genre_and_the_plain_prompt_tells_nothing():
    for kind in ("people", "people elsewhere", "plain prompt"):
        scenes, prompts = films.scenes_of(kind, 4, 1)
        assert [scene["genre"] for scene in scenes] == list(world.GENRES)[:4]
        studio = kind != "people elsewhere"
        assert all((scene["place"] == "studio") == studio for scene in scenes)
        assert (set(prompts) == {films.PLAIN}) == (kind == "plain prompt")
    assert films.scenes_of("people", 4, 1)[0] != films.scenes_of("people", 4, 2)[0]


def test_ground_truth_keeps_to_the_beat_and_dances_its_genre(longer, tmp_path, monkeypatch):
    """Through a VAE that changes nothing; the features are those of the real encoder."""
    studio = films.Studio(longer["weights"], None)
    studio.options.frames = 73
    monkeypatch.setattr(studio, "through_vae", lambda film: film)
    scores = films.film_scores(studio, 4, 1, str(tmp_path / "songs"), truth=True)
    assert scores["people"]["r"] > 0.8 and scores["dogs"]["r"] > 0.8
    assert abs(scores["people"]["other"]) < 0.5 and scores["people"]["tempo"] > 0.9
    assert scores["style"] >= 0.75 and math.isfinite(scores["frechet"])
