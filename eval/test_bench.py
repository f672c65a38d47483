"""eval/bench.py: its command line at the smallest sizes, and the count of FLOPs that its MFU stands on."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval import bench
from test_musicinfuser import HERE, weights  # noqa: F401


def run(*arguments):
    line = [sys.executable, "-m", "eval.bench", "--quick", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=HERE)


def test_bench_prints_every_row(weights):  # noqa: F811
    done = run("--weights", weights)
    assert done.returncode == 0, done.stderr
    for line in ("date", "cpu", "memory", "gpu", "versions"):
        assert re.search(rf"^{line} +\S", done.stdout, re.M)
    assert (
        "failed" not in done.stdout
        and "out of memory" not in done.stdout
        and "they differ" not in done.stdout
    )
    parts = [part.splitlines() for part in done.stdout.split("### ")[1:]]
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part if line[:1] == "|"]
        for part in parts
    ]
    assert all(len(row) == len(table[0]) for table in tables for row in table)
    dit, train, vae, load, tiny, gpu = (table[2:] for table in tables)
    for table in (dit, train, load, tiny):
        assert [row[0] for row in table] == ["float32", "bfloat16"]
    assert [row[:2] for row in vae] == [["decode", "7"], ["encode", "7"]]
    assert len(gpu) == (7 if torch.cuda.is_available() else 1)
    for row in train + load + tiny + vae + dit:
        numbers = [
            cell for cell in row[1:] if cell and not cell[0].isalpha() and "frames" not in cell
        ]
        assert numbers and all(float(cell.replace(",", "")) > 0 for cell in numbers)
    for row in dit + vae:
        assert find_spec("diffusers") is None or "" not in row
        assert find_spec("diffusers") is not None or "diffusers is not installed" in row


def test_bench_names_its_rows():
    done = run("speed")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.strip() == "error: no rows speed; there are dit, train, vae, load, tiny, gpu"


def test_bench_says_why_a_row_is_missing(tmp_path):
    done = run("tiny", "--weights", tmp_path)
    assert done.returncode == 0
    assert done.stdout.count(f"no such file: {tmp_path}/dit.safetensors") == 2


@pytest.mark.parametrize("frames", [0, 3])
def test_flops_are_those_of_torch(frames):
    dit = bench.random_dit(bench.QUICK, 2)
    bench.mi.infuse(dit, [0], rank=0)
    x, sigma, y, mask, audio = bench.inputs(dit, 3, (16, 24), 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dit(x, sigma, y, mask, audio[:, :3] if frames else None)
    counted = {str(operation): n for operation, n in counter.get_flop_counts()["Global"].items()}
    matrices = sum(n for operation, n in counted.items() if re.search("mm|convolution", operation))
    # For each two tokens that meet, and each channel, a product and a sum for the score, and for the value
    attention = 4 * 64 * (2 * (288 + 5) ** 2 + 288 * frames)
    assert abs(bench.flops(dit, 288, 5, frames) / (matrices + attention) - 1) < 0.02


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_vaes_that_are_compared_are_the_same(what):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        models = [bench.random_vae(bench.FULL, whose, what)[0] for whose in ("ours", "diffusers")]
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in models)
    assert ours == theirs
