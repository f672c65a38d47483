"""eval.solvers: errors against a fine solution, over evaluations; what is measured is kept."""

import json
import os
import sys

import pytest
import torch
from conftest import close

import musicinfuser as mi
import sample
from eval import solvers


@pytest.fixture(scope="module")
def given(weights, song):
    return dict(song=str(song), prompt="a dog", weights=str(weights), fine=24, steps=(4, 16))


@pytest.fixture(scope="module")
def measured(given, tmp_path_factory):
    """A folder, and the curves of its first run."""
    out = str(tmp_path_factory.mktemp("solvers") / "errors")
    return out, solvers.compare(**given, seeds=(0, 1), out=out)


@pytest.mark.parametrize("solver, wanted", [("euler", 7), ("ab2", 7), ("heun", 13)])
def test_evaluations_are_counted(solver, wanted):
    assert solvers.evaluations(solver, 7) == wanted


def test_psnr():
    video = torch.rand(1, 3, 7, 8, 8) - 1
    assert abs(solvers.psnr(video + 0.2, video) - 20) < 1e-3  # a tenth of the range
    assert solvers.psnr(video, video) == pytest.approx(120)


def test_more_steps_err_less(measured):
    _, curves = measured
    assert list(curves) == list(mi.SOLVERS)
    for points in curves.values():
        few, many = points
        assert [few["steps"], many["steps"]] == [4, 16]
        assert many["evaluations"] > few["evaluations"]
        assert 0 < many["rms"] < few["rms"]
        assert many["psnr"] > few["psnr"]


def test_the_equation_is_that_of_sample_py(given, tmp_path, monkeypatch):
    """Guided by text and music, to the song from its start; and the error is a root of a mean."""
    made = []
    monkeypatch.setattr(sample, "finish", lambda options, seed, film, dit: made.append(film))
    options = {name: given[name] for name in ("song", "prompt", "weights")}
    options |= {"cfg": 2.0, "music_cfg": 4.0, "music_above": 0.5, "start": 0.2, "solver": "ab2"}
    sample.generate(**options, steps=4, seeds=(3,), out=str(tmp_path), device="cpu")
    kept, equations = [], []

    class Kept(solvers.Equation):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            equations.append(self)

        def solve(self, *case):
            kept.append(super().solve(*case))
            return kept[-1]

    monkeypatch.setattr(solvers, "Equation", Kept)
    how = options | {"solver": ("ab2",), "steps": (4,), "fine": 9, "device": "cpu"}
    curves = solvers.compare(**how, seeds=(3,), out=str(tmp_path / "errors"))
    fine, coarse = kept
    close(equations[0].decode(coarse)[0], made[0].clamp(-1, 1), 1e-4)
    assert curves["ab2"][0]["rms"] == pytest.approx((coarse - fine).square().mean().item() ** 0.5)


def test_what_is_measured_is_kept(measured, given, monkeypatch):
    out, curves = measured
    monkeypatch.setattr(solvers, "Equation", None)
    assert solvers.compare(**given, seeds=(0, 1), out=out) == curves
    one = solvers.compare(**given | {"steps": (16,)}, seeds=(1,), solver=("ab2",), out=out)
    with open(os.path.join(out, "errors.json")) as file:
        errors = json.load(file)["errors"]["seed 1, ab2, 16 steps"]
    assert one == {"ab2": [errors | {"steps": 16}]}


def test_only_what_is_missing_is_measured(measured, given, monkeypatch):
    out, _ = measured
    solve, solved = solvers.Equation.solve, []

    def watched(equation, seed, solver, steps):
        solved.append((seed, solver, steps))
        return solve(equation, seed, solver, steps)

    monkeypatch.setattr(solvers.Equation, "solve", watched)
    more = given | {"steps": (4, 8)}
    solvers.compare(**more, seeds=(0,), solver=("euler",), out=out)
    assert solved == [(0, "euler", 8)]  # and not the fine solution again


def test_the_fine_solution_has_no_error_against_itself(given, tmp_path):
    how = given | {"steps": (6,), "fine": 6, "fine_solver": "euler"}
    curves = solvers.compare(**how, seeds=(0,), solver=("euler", "heun"), out=str(tmp_path))
    assert curves["euler"][0]["rms"] == 0
    assert curves["heun"][0]["rms"] > 0


@pytest.mark.parametrize("change", [{"cfg": 2.0}, {"prompt": "a cat"}, {"fine": 25}])
def test_another_equation_needs_another_folder(measured, given, change):
    out, _ = measured
    with pytest.raises(mi.InputError, match=f"with another {next(iter(change))}; name another"):
        solvers.compare(**given | change, seeds=(0, 1), out=out)


def test_what_is_made_in_windows_is_not_solved_at_once(given, tmp_path):
    for more in ({"whole_song": True}, {"frames": 13, "window_frames": 7}):
        with pytest.raises(mi.InputError, match="films are made at once here, of up to"):
            solvers.compare(**given | more, out=str(tmp_path))


@pytest.mark.parametrize("wrong", [{"solver": ("rk4",)}, {"steps": (1, 4)}, {"seeds": (0, 0)}])
def test_impossible_options_are_said(given, tmp_path, wrong):
    with pytest.raises(mi.InputError, match="--(solver|steps|seed) takes"):
        solvers.compare(**given | wrong, out=str(tmp_path))
    assert not os.path.exists(tmp_path / "errors.json")


def test_table_is_printed_and_matplotlib_may_be_missing(measured, given, monkeypatch, capsys):
    out, _ = measured
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    solvers.compare(**given, seeds=(0, 1), out=out)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3 * 2
    assert table[2].startswith("| euler | 4 | 4 | ")
    assert sum(line.startswith("no picture: ") for line in lines) == 1


def test_equal_errors_lie_between_the_measured_ones(capsys):
    euler = [{"evaluations": n, "rms": 1 / n} for n in (10, 40)]
    ab2 = [{"evaluations": n, "rms": 10 / n**2} for n in (10, 40)]
    solvers.print_equals("euler", "ab2", {"euler": euler, "ab2": ab2})
    assert capsys.readouterr().out == "\nab2 errs like 40 of euler after 20\n"  # 10 / 20^2 = 1 / 40
    solvers.print_equals("euler", "ab2", {"euler": euler, "ab2": ab2[:1]})  # never so exact
    assert capsys.readouterr().out == ""


def test_picture_is_drawn(measured, given):
    pytest.importorskip("matplotlib")
    out, _ = measured
    solvers.compare(**given, seeds=(0, 1), out=out)
    with open(os.path.join(out, "errors.png"), "rb") as file:
        assert file.read(4) == b"\x89PNG"
