"""The paper's Table 1, and more, on the toy world:   python -m eval.ablate [ROW ...]

A row is train.py with other options, a cell is a row with a seed: the gap between the losses on held-out clips with
another's song and with their own says how much the adapter listens, and takes no sampling. Finished cells are kept.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import shutil
import subprocess
import time

import numpy as np
import torch
from tqdm import tqdm

import musicinfuser as mi
import train
from tiny import make

DEPTH, COUNT = 12, 4  # the tiny model's layers, and a third of them
SIGMAS = (0.5, 0.75, 0.9)
ROWS = {  # name: what differs from the shipped adapter's settings (tiny.make.ADAPTER)
    "ours": {},  # the layers that adaptability.py ranks first
    "all layers": {"layers": "all"},
    "lowest-ranked layers": {"layers": "lowest"},
    "evenly distributed layers": {"layers": "even"},
    "first layers": {"layers": "first"},
    "middle layers": {"layers": "middle"},
    "last layers": {"layers": "last"},
    **{f"random layers {i}": {"layers": f"random {i}"} for i in range(4)},
    "feature addition": {"adapter": "add"},
    "Beta-Uniform noise": {"beta": 3.0},
    "no in-the-wild data": {"wild_ratio": 0.0},
    "no zero initialisation": {"random_init": True},
    "LoRA rank 4": {"rank": 4},
    "LoRA rank 64": {"rank": 64},
    "no LoRA": {"rank": 0},
    "base prompt never": {"base_prompt_ratio": 0.0},
    "base prompt always": {"base_prompt_ratio": 1.0},
    "plain ZICA, no window": {"window": None},
    "window 1": {"window": 1},
    "audio encoder not taught beats": {"weights": "untaught"},
}
SETS = ["ours", *(name for name in ROWS if "layers" in name)]


def layers_of(choice, ranking):
    """The layers that a row names, as train.py takes them; ranking: all layers, best first."""
    kind, *number = choice.split()
    if kind == "random":
        chosen = random.Random(number[0]).sample(range(DEPTH), COUNT)
    else:
        named = {"ranked": ranking[:COUNT], "lowest": ranking[-COUNT:]}
        chosen = named.get(kind) or mi.choose_layers(kind, DEPTH)
    return ",".join(map(str, sorted(chosen)))


def untaught(out):
    """tiny/ with an audio encoder of random weights: the row for what teaching it beats is worth."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    folder = os.path.join(out, "untaught")
    for name in ("dit.safetensors", "encoder.safetensors", "decoder.safetensors", "text_encoder", "tokenizer"):
        if not os.path.lexists(os.path.join(folder, name)):
            os.makedirs(folder, exist_ok=True)
            os.symlink(os.path.join(make.HERE, name), os.path.join(folder, name))
    if not os.path.exists(os.path.join(folder, "audio_encoder")):
        torch.manual_seed(0)
        taught, fresh = f"{make.HERE}/audio_encoder", os.path.join(folder, ".tmp-audio")
        Wav2Vec2Model(Wav2Vec2Config.from_pretrained(taught)).save_pretrained(fresh)
        shutil.copy(f"{taught}/preprocessor_config.json", fresh)
        os.rename(fresh, os.path.join(folder, "audio_encoder"))
    return folder


def folder_of(row, seed, out):
    return os.path.join(out, f"{row.replace(' ', '-').replace(',', '')}-{seed}")


def cell(row, seed, out, data, ranking, common):
    """Train a row with a seed, or go on with it; returns its figures. Kept in OUT/<row>-<seed>/result.json."""
    folder = folder_of(row, seed, out)
    path = os.path.join(folder, "result.json")
    options = make.ADAPTER | {"weights": make.HERE} | common | ROWS[row]
    if options["weights"] == "untaught":
        options["weights"] = untaught(out)
    options["layers"] = layers_of(options["layers"] or "ranked", ranking)
    if result := train.read_json(path, dict):
        if changed := [key for key in ("steps", "batch", "layers") if result[key] != options[key]]:
            raise mi.InputError(f"{folder} holds a cell with another {', '.join(changed)}; name another --out")
        return result
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "output.txt"), "a") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            adapter = train.train(f"{data}/aist", wild=f"{data}/wild", seed=seed, out=folder, save_every=50,
                                  eval_every=options["steps"], **options)  # fmt: skip
    with open(os.path.join(folder, "log.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    result = {f"gap_{s}": lines[-1][f"wrong_{s}"] - lines[-1][f"right_{s}"] for s in SIGMAS}
    result["held_out"] = float(np.mean([lines[-1][f"right_{s}"] for s in SIGMAS]))
    result["seconds"] = float(np.median([line["seconds"] for line in lines[:-1]]))  # the last one has the evaluation
    result["parameters"] = sum(t.numel() for t in mi.read_safetensors(adapter)[0].values())
    result |= {key: options[key] for key in ("steps", "batch", "layers")}
    mi.save_json(path, result)
    return result


# ------------------------------------------------------------------------------------------------------------------
# The tables
# ------------------------------------------------------------------------------------------------------------------


def mean_error(values, digits=4, signed=False):  # of numbers over seeds
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean:{'+' if signed else ''}.{digits}f} ± {error:.{digits}f}"


def table(results, seeds):
    """Markdown; results: {row: {seed: figures}}. The last column is the gap at 0.75 less that of the first row with
    the same seeds."""
    base = next(iter(results.values()))
    lines = ["| row | layers | gap at sigma 0.5 | 0.75 | 0.9 | held-out loss | s a step | parameters | 0.75, paired |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row, cells in results.items():
        of = lambda key: [cells[s][key] for s in seeds if s in cells]  # noqa: E731
        both = [s for s in seeds if s in cells and s in base]
        paired = mean_error([cells[s]["gap_0.75"] - base[s]["gap_0.75"] for s in both], signed=True)
        first = cells[next(iter(cells))]
        gaps = " | ".join(mean_error(of(f"gap_{s}")) for s in SIGMAS)
        lines.append(f"| {row} | {first['layers']} | {gaps} | {mean_error(of('held_out'))} | {np.mean(of('seconds')):.2f} "
                     f"| {first['parameters']:,} | {'' if cells is base else paired} |")  # fmt: skip
    return "\n".join(lines)


def filmed(adapters, count):
    """Markdown: r with the own and another's song and the tempo, of `count` clips; adapters: {row: path}."""
    songs, rng = make.unseen_songs(count), np.random.default_rng(9)
    lines = ["| row | who | r, its own song | another song | tempo |", "|---|---|---|---|---|"]
    for row, path in adapters.items():
        studio = make.Studio(path, dtype=torch.bfloat16)
        for subject in ("person", "dog"):
            prompts = [make.caption(make.draw_scene(rng, subject=subject, camera="01"), rng)[0] for _ in songs]
            f = make.follows(studio.film(prompts, [(p, start, 1.0) for p, _, start in songs] if path else None), songs)
            lines.append(f"| {row} | {subject} | {f['r']:.2f} ± {f['se']:.2f} | {f['other']:.2f} ± {f['se_other']:.2f} "
                         f"| {f['tempo']:.2f} |")  # fmt: skip
    return "\n".join(lines)


def hardware():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {(names or [platform.processor()])[0]}"


def commit():
    run = subprocess.run(["git", "-C", make.HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "no repository"


def ablate(
    rows=None, data="toy", seeds=(1, 2, 3), out="runs/ablate", films=0, dry_run=False, table_only=False, **common
):
    """Train what is missing and print the tables. common: options of train.py for all rows. Raises InputError."""
    rows = rows or list(ROWS)
    if unknown := set(rows) - set(ROWS):
        raise mi.InputError(f"no row {sorted(unknown)[0]}; there are: {', '.join(ROWS)}")
    if not os.path.isdir(f"{data}/aist"):
        raise mi.InputError(f"there is no {data}/aist; make it: python -m tiny.make data {data}")
    ranking = train.read_ranking(f"{make.HERE}/adaptability.json", DEPTH)
    common = {key: value for key, value in common.items() if value is not None}
    cells = [(row, seed) for seed in seeds for row in rows]
    done = [train.read_json(os.path.join(folder_of(*c, out), "result.json"), dict) for c in cells]
    pace = np.median([result["seconds"] for result in done if result] or [1.0])
    steps = common.get("steps", make.ADAPTER["steps"])
    left = sum(result is None for result in done)
    print(f"{len(rows)} rows, {len(seeds)} seeds, {steps} steps: {left} of {len(cells)} cells are left, "
          f"about {left * (pace * steps + 30) / 60:.0f} minutes at {pace:.1f} s a step")  # fmt: skip
    if dry_run:
        return None
    results, failed, began = {row: {} for row in rows}, {}, time.time()
    for row, seed in tqdm(cells, "cells", disable=table_only):
        try:
            if not table_only or os.path.exists(os.path.join(folder_of(row, seed, out), "result.json")):
                results[row][seed] = cell(row, seed, out, data, ranking, common)
        except mi.InputError as error:  # the others go on
            failed[row] = str(error)
    results = {row: cells for row, cells in results.items() if cells}
    if results:
        print(f"\n{commit()}, {hardware()}, torch {torch.__version__}, {steps} steps, seeds {list(seeds)}\n")
        print(table(results, seeds))
    for row, error in failed.items():
        print(f"failed   {row}: {error}")
    if films:
        adapters = {row: os.path.join(folder_of(row, seeds[0], out), "musicinfuser.safetensors") for row in results}
        print("\n" + filmed(adapters | {"the prior, without music": None}, films))
    print(f"\n{(time.time() - began) / 60:.0f} minutes")
    return results


def main():
    parser = argparse.ArgumentParser(description="Train and compare the rows of an ablation on the toy world.")
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}; sets stands for those of layers")
    add("--data", default="toy", help="of `python -m tiny.make data` (default toy)")
    add("--steps", type=int, help=f"a cell (default {make.ADAPTER['steps']}, the shipped adapter's)")
    add("--batch", type=int, help=f"(default {make.ADAPTER['batch']})")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--films", type=int, default=0, help="also score so many videos of people and dogs, of each row's first seed")
    add("--out", default="runs/ablate", help="finished cells are kept there")
    add("--dry-run", action="store_true", help="say how long it takes, and stop")
    add("--table", action="store_true", dest="table_only", help="of the finished cells; train nothing")
    options = vars(parser.parse_args())
    rows = [name for row in options.pop("rows") for name in (SETS if row == "sets" else [row])]
    ablate(rows, **options)


if __name__ == "__main__":
    mi.main(main)
