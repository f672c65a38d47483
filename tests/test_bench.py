"""eval.bench: every row at the smallest sizes, and the count of FLOPs that its MFU stands on."""

import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import musicinfuser as mi
from eval import bench

QUICK = bench.QUICK
OPTIONS = SimpleNamespace(quick=True, repeats=None)


def table_of(name, weights="", folder=""):
    paths = SimpleNamespace(weights=str(weights), checkpoint=f"{folder}/dit.safetensors")
    return bench.TABLES[name](QUICK, paths)


def here(way):
    """The same on a CPU, in this process, uncompiled."""
    return way | {"device": "cpu", "compile": False, "processes": 1}


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", list(bench.TABLES))
def test_every_measurement_fills_its_columns(name, weights, tmp_path):
    _, columns, runs = table_of(name, weights, tmp_path)
    for run in runs:
        if "diffusers" in run.way.get("by", "") and not find_spec("diffusers"):
            continue
        for row in run.measurement(QUICK, *run.arguments, **here(run.way) if run.way else {}):
            assert not row.keys() & run.cells.keys()
            assert (run.cells | row).keys() <= set(columns) | {"MFU", "by", "blocks", "compiled"}
            numbers = [value for value in row.values() if not isinstance(value, str)]
            assert numbers and all(math.isfinite(n) and n >= 0 for n in numbers)
            assert "they differ" not in str(row)
            assert row.get("s", 1) > 0


def test_offloaded_and_resident_steps_are_the_same():
    velocities = []
    for offload in (False, True):
        torch.manual_seed(0)
        dit = bench.infused(bench.random_dit(QUICK, 2, offload=offload))
        inputs = bench.random_inputs(dit, 2, QUICK.latents, QUICK.text)
        velocities.append(bench.guided_step(dit, *inputs)())
    assert torch.equal(*velocities)


@pytest.mark.parametrize("n, split", [(1, "tokens"), (2, "branches")])
def test_two_processes_share_a_step(n, split):
    run = table_of("processes")[2][n]
    assert run.cells["processes"] == f"2, by {split}"
    [row] = bench.rows_of(run, OPTIONS)
    assert row["s"] > 0, row


def test_command_prints_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "train", "gpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = {"s": 0.25, "MFU": 0.5, "peak, GB": 1.0}
    done = SimpleNamespace(stdout=f"a library's words\n{json.dumps(row)}", stderr="", returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda line, **how: done)
    bench.main()
    out = capsys.readouterr().out
    for line in ("date", "cpu", "memory", "gpu", "versions"):
        assert re.search(rf"^{line} +\S", out, re.M)
    parts = [part.splitlines() for part in out.split("### ")[1:]]
    train, gpu = [[line for line in part if line[:1] == "|"] for part in parts]
    assert train[:2] == ["| dtype | s | MFU | peak, GB |", "| --- | --- | --- | --- |"]
    assert train[2:] == [f"| {dtype} | 0.25 | 0.5 | 1 |" for dtype in mi.DTYPES]
    assert len(gpu) == 2 + 8 + 4 + 7 + 3
    assert all(line.count("|") == gpu[0].count("|") for line in gpu)
    assert all("not measured: there is no GPU here" in line for line in gpu[2:])


def test_rows_and_repeats_can_be_chosen(monkeypatch, capsys):
    lines = []
    only = "gpu --repeats 2 --only".split() + ["sample step", "7", "ours, with music", "no"]
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", *only])
    monkeypatch.setattr(bench, "why_not", lambda way: None)
    done = SimpleNamespace(stdout='{"s": 0.25}', stderr="", returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda line, **how: lines.append(line) or done)
    bench.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| sample")]
    assert [row.split(" | ")[2:6] for row in rows] == [
        ["ours, with music", "resident", "no", "1"],
        ["ours, with music", "offloaded", "no", "1"],
    ]
    assert all(line[-3:] == ["--quick", "--repeats", "2"] for line in lines)


def test_cells_that_no_row_has_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", "bench --quick load --only flaot32".split())
    with pytest.raises(mi.InputError, match="no row has the cells flaot32"):
        bench.main()


def test_command_names_its_tables(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    wanted = "no table speed; there are dit, train, vae, load, tiny, processes, gpu"
    with pytest.raises(mi.InputError, match=wanted):
        bench.main()


def test_a_row_says_why_it_is_missing(tmp_path):
    run = bench.Run({"dtype": "float32"}, bench.tiny, (str(tmp_path), "float32"))
    [row] = bench.rows_of(run, OPTIONS)
    assert row[bench.WHY].startswith("failed: ")
    assert f"no such file: {tmp_path}/dit.safetensors" in row[bench.WHY]
    cells = bench.cells_of(run.cells | row, ("dtype", "what", "s"))
    assert cells == ["float32", row[bench.WHY], ""]


@pytest.mark.parametrize("code, errors", [(-9, ""), (1, "x\ntorch.OutOfMemoryError: CUDA out of")])
def test_out_of_memory_is_said(code, errors):
    errors += " memory"
    done = SimpleNamespace(returncode=code, stderr=errors)
    assert bench.why_failed(done) == [{bench.WHY: "out of memory"}]


def test_diffusers_time_stands_beside_ours_of_the_same_kind():
    ours, rows = {}, []
    for frames, by, seconds in [(7, "ours", 2.0), (13, "ours", 9.0), (7, "ours, with music", 3.0)]:
        bench.add_ratio({"what": "decode", "frames": frames, "by": by, "s": seconds}, ours)
    for by in ("ours, with music", "diffusers", "diffusers, tiled"):
        rows.append({"what": "decode", "frames": 7, "by": by, "s": 4.0})
        bench.add_ratio(rows[-1], ours)
    assert [row.get("ours / diffusers") for row in rows] == [None, 0.5, 0.5]
    failed = {"what": "decode", "frames": 7, "by": "diffusers", bench.WHY: "out of memory"}
    bench.add_ratio(failed, ours)
    assert "ours / diffusers" not in failed


@pytest.mark.parametrize("frames", [0, 3])
def test_flops_are_those_of_torch(frames):
    dit = bench.random_dit(QUICK, 2)
    mi.infuse(dit, [0], rank=0)
    x, sigma, y_feat, y_mask, audio = bench.random_inputs(dit, 3, (16, 24), 5)
    music = audio[:, :3] if frames else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dit(x, sigma, y_feat, y_mask, music)
    counted = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    matrices = sum(n for name, n in counted.items() if re.search("mm|convolution", name))
    # For each two tokens that meet, and each channel, a product and a sum for score and for value
    attention = 4 * 96 * (2 * (288 + 5) ** 2 + 288 * frames)
    assert abs(bench.flops(dit, 288, 5, frames) / (matrices + attention) - 1) < 0.02


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_diffusers_gets_the_same_weights_at_any_depth(depth):
    pytest.importorskip("diffusers")
    ours = bench.random_dit(QUICK, depth)
    theirs = bench.diffusers_dit(ours, "float32")
    inputs = bench.random_inputs(ours, 2, QUICK.latents, QUICK.text)[:4]
    with torch.inference_mode():
        outputs = ours(*inputs), bench.run_diffusers(theirs, "float32", *inputs)
    assert float(bench.difference(*outputs, "float32")) < 1e-4


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_vaes_that_are_compared_are_the_same(what):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        models = [bench.random_vae(bench.FULL, by, what)[0] for by in ("ours", "diffusers")]
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in models)
    assert ours == theirs
