"""eval.plot: every figure from what the scripts write."""

import json
import os

import pytest
from conftest import ROOT

import musicinfuser as mi
from eval import plot

pytest.importorskip("matplotlib")


def run_folder(folder, steps=10):
    os.makedirs(folder)
    lines = [{"step": step, "loss": 1 / (step + 1)} for step in range(steps)]
    lines[-1] |= {"right_0.75": 0.4, "wrong_0.75": 0.5}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 99, "lo')  # the last was cut short
    return str(folder)


def ablation_folder(folder):
    for row, layers in (("ours", "0,1"), ("last-layers", "2,3"), ("no-LoRA", "0,1")):
        for seed in (1, 2):
            cell = {"layers": layers, "gap_0.75": 0.01 * seed}
            mi.save_json(folder / f"{row}-{seed}" / "result.json", cell)
    twin = {"layers": "0,1", "gap_0.75": 1, "as": "ours"}
    mi.save_json(folder / "all-layers-1" / "result.json", twin)
    mi.save_json(folder / "prior-1" / "result.json", {"layers": "none", "gap_0.75": 0})
    return str(folder)


def scores_file(path):
    rows = {f"{i}.mp4": {"music_cfg": i % 3, "own": {"r": 0.1 * i}} for i in range(9)}
    mi.save_json(path, {"beats": {"videos": rows}})
    return str(path)


def test_every_figure_is_drawn(tmp_path):
    paths = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    paths += [ablation_folder(tmp_path / "ablate"), scores_file(tmp_path / "scores.json")]
    paths += [os.path.join(ROOT, "tiny", "adaptability.json")]
    pictures = plot.plot(paths, str(tmp_path / "out"))
    names = [os.path.basename(picture) for picture in pictures]
    assert names == ["training.png", "layers.png", "guidance.png", "ranking.png"]
    assert all(open(picture, "rb").read(4) == b"\x89PNG" for picture in pictures)


def test_layers_are_of_the_sets_alone(tmp_path):
    figure = plot.draw_layers(plot.load_pyplot(), [ablation_folder(tmp_path / "ablate")])
    line = figure.axes[0].lines[0]
    assert sorted(line.get_xdata()) == [0, 2]
    assert list(line.get_ydata()) == pytest.approx([0.015, 0.015])


def test_r_by_guidance_is_a_mean_with_its_error():
    rows = {i: {"music_cfg": 2, "own": {"r": r}} for i, r in enumerate((0.1, 0.3))}
    scales, means, errors = plot.r_by_guidance({"beats": {"videos": rows}})
    assert scales == [2] and means == pytest.approx([0.2]) and errors == pytest.approx([0.1])


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"ranking": 3}', '{"beats": []}'])
def test_nothing_to_draw_is_one_line(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    for path in (tmp_path / "a.json", tmp_path / "none", tmp_path):
        with pytest.raises(mi.InputError) as error:
            plot.plot([str(path)], str(tmp_path / "out"))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
