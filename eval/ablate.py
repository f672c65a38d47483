"""The paper's Table 1, and more, on the toy world:   python -m eval.ablate [ROW ...]

A row is train.py with other options, a cell is a row with a seed: the gap between the losses on held-out clips with
another's song and with their own says how much the adapter listens, and takes no sampling. Finished cells are kept.

Top to bottom:   rows | a cell | tables of the losses | films | what is there, what is left
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import adaptability
import musicinfuser as mi
import train
from eval.evaluate import style
from tiny import make

SIGMAS = (0.25, 0.5, 0.75, 0.9)
PRIOR, TRUTH = "prior without music", "ground truth through the VAE"
ROWS = {  # name: what differs from the shipped adapter's settings (tiny.make.ADAPTER)
    "ours": {},
    PRIOR: {"adapter": "none"},
    "all layers": {"layers": "all"},
    "ranked layers": {"layers": "ranked"},
    "lowest-ranked layers": {"layers": "lowest"},
    "evenly distributed layers": {"layers": "even"},
    "first layers": {"layers": "first"},
    "middle layers": {"layers": "middle"},
    "last layers": {"layers": "last"},
    **{f"random layers {i}": {"layers": f"random {i}"} for i in range(4)},
    "feature addition": {"adapter": "add"},
    "uniform noise": {"beta": 1.0},
    "Beta-Uniform noise": {"beta": 3.0},
    "noise nearer to 1": {"beta": 0.5, "half_life": 1e9},
    "no in-the-wild data": {"wild_ratio": 0.0},
    "no zero initialisation": {"random_init": True},
    "LoRA rank 4": {"rank": 4},
    "LoRA rank 64": {"rank": 64},
    "no LoRA": {"rank": 0},
    "base prompt never": {"base_prompt_ratio": 0.0},
    "base prompt always": {"base_prompt_ratio": 1.0},
    "plain ZICA, no window": {"window": None},
    "window 0": {"window": 0},
    "window 1": {"window": 1},
    "audio encoder not taught beats": {"weights": "untaught"},
}
SETS = ["ours", *(name for name in ROWS if "layers" in name)]


def slug(row):  # as its folder is called, and as it may be given on the command line
    return row.replace(" ", "-").replace(",", "")


def layers_of(choice, depth, weights, top=None):
    """The layers that a choice names: train.py's, and a third of all for ranked, lowest and random N, whose set follows
    from N and the depth alone. Raises InputError."""
    kind, _, number = (choice or "").partition(" ")
    if kind == "random":
        chosen = random.Random(number).sample(range(depth), round(depth / 3))
    elif kind in ("ranked", "lowest"):
        ranking = train.read_ranking(os.path.join(weights, "adaptability.json"), depth)
        chosen = ranking[: round(depth / 3)] if kind == "ranked" else ranking[-round(depth / 3) :]
    else:
        chosen = train.pick_layers(choice, depth, weights, top)
    return sorted(chosen)


def untaught(weights, out):
    """The weights folder with an audio encoder of random weights: what is it worth to teach it beats?"""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    folder, taught = os.path.join(out, "untaught"), os.path.join(weights, "audio_encoder")
    os.makedirs(folder, exist_ok=True)
    for name in ("dit.safetensors", "encoder.safetensors", "decoder.safetensors", "text_encoder", "tokenizer"):
        if not os.path.lexists(os.path.join(folder, name)):
            os.symlink(os.path.abspath(os.path.join(weights, name)), os.path.join(folder, name))
    if not os.path.exists(os.path.join(folder, "audio_encoder")):
        torch.manual_seed(0)
        fresh = os.path.join(folder, ".tmp-audio")
        Wav2Vec2Model(Wav2Vec2Config.from_pretrained(taught)).save_pretrained(fresh)
        shutil.copy(os.path.join(taught, "preprocessor_config.json"), fresh)
        os.rename(fresh, os.path.join(folder, "audio_encoder"))
    return folder


def configuration(row, seed, out, data, weights, common):
    """All of train.py's options for a cell and the frozen model's size and date, as in train.py's config.json. Raises
    InputError."""
    defaults = {name: default for name, (default, *_) in train.OPTIONS.items() if name not in ("warmup", "half_life")}
    options = defaults | make.ADAPTER | {"weights": weights} | common | ROWS[row]  # those two follow from the steps
    dit = os.path.join(weights, "dit.safetensors")
    depth, state = len(mi.load_dit(dit, "meta").blocks), os.stat(dit)
    options["layers"] = layers_of(options["layers"], depth, weights, options["top"])
    options["top"] = None
    if options["weights"] == "untaught":
        options["weights"] = os.path.join(out, "untaught")
    return options | {
        "data": f"{data}/aist", "wild": f"{data}/wild", "seed": seed, "out": os.path.join(out, f"{slug(row)}-{seed}"),
        "save_every": 50, "eval_every": options["steps"], "dit.safetensors": [state.st_size, state.st_mtime_ns],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# A cell: OUT/<row>-<seed>/ as train.py makes it, output.txt, and result.json once it is finished
# ------------------------------------------------------------------------------------------------------------------


def losses_of_prior(config):
    """listening_gap of the frozen model, which hears nothing: both songs give the same loss."""
    device, dtype = mi.choose_device(config.get("device"), config["dtype"])
    weights, cache = config["weights"], os.path.join(config["data"], ".musicinfuser")
    dit = mi.load_dit(os.path.join(weights, "dit.safetensors"), device, dtype)
    n, videos = dit.natural, train.find_videos(config["data"], None, "test")
    clips = train.cached_clips(videos, cache, weights, (n.height, n.width), n.frames, n.fps, device, dtype)
    texts = train.cached_texts([train.PLAIN], cache, weights, device, dtype)
    held_out = train.held_out_rows(clips, texts, n, config["seed"])
    deaf = lambda x, sigma, y_feat, y_mask, audio: dit(x, sigma, y_feat, y_mask)  # noqa: E731
    return train.listening_gap(deaf, held_out, device, config["batch"], SIGMAS) if held_out else {}


def cell(row, config):
    """Train a cell, or go on with it; returns its figures, which result.json keeps. Raises what train.py raises."""
    folder = config["out"]
    os.makedirs(folder, exist_ok=True)
    parameters, seconds = 0, None
    with open(os.path.join(folder, "output.txt"), "a") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            if config["adapter"] == "none":
                last = losses_of_prior(config)
                mi.save_json(os.path.join(folder, "config.json"), config)
            else:
                options = {key: value for key, value in config.items() if key not in ("data", "dit.safetensors")}
                options["layers"] = ",".join(map(str, options["layers"]))
                adapter = train.train(config["data"], **options)
                with open(os.path.join(folder, "log.jsonl")) as log:
                    *lines, last = map(json.loads, log)
                seconds = float(np.median([line["seconds"] for line in lines or [last]]))  # the last evaluates too
                parameters = sum(t.numel() for t in mi.read_safetensors(adapter)[0].values())
    if f"right_{SIGMAS[0]}" not in last:
        raise mi.InputError(f"there are no clips of two test songs below {config['data']}")
    result = {f"gap_{s}": last[f"wrong_{s}"] - last[f"right_{s}"] for s in SIGMAS}
    result["held_out"] = float(np.mean([last[f"right_{s}"] for s in SIGMAS]))
    result |= {"seconds": seconds, "parameters": parameters, "commit": commit(), "hardware": hardware()}
    result["layers"] = ",".join(map(str, config["layers"])) if parameters else "none"
    mi.save_json(os.path.join(folder, "result.json"), result)
    return result


@functools.cache
def commit():
    line = ["git", "-C", make.HERE, "rev-parse", "--short", "HEAD"]
    run = subprocess.run(line, capture_output=True, text=True) if shutil.which("git") else None
    return (run.stdout.strip() if run else "") or "no repository"


@functools.cache
def hardware():
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {name or 'an unknown CPU'}{gpu}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------------------------
# The tables of the losses
# ------------------------------------------------------------------------------------------------------------------


def mean_error(values, digits=4, signed=False):
    """Text: the mean and its standard error over seeds; one seed has no error."""
    if not len(values):
        return "-"
    error = f"{np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else "?"
    return f"{np.mean(values):{'+' if signed else ''}.{digits}f} ± {error}"


def markdown(*rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def table(results, failed):
    """results: {row: {seed: figures}}, failed: {row: reason}; a row may be in both."""
    lines = [
        ["row", "layers", *(f"gap at sigma {s}" for s in SIGMAS), "held-out loss", "s a step", "parameters", "seeds"]
    ]
    for row, cells in results.items():
        of = lambda key: [figures[key] for figures in cells.values()]  # noqa: E731
        gaps, pace = [mean_error(of(f"gap_{s}")) for s in SIGMAS], [s for s in of("seconds") if s is not None]
        lines.append([row, of("layers")[0], *gaps, mean_error(of("held_out")), f"{np.mean(pace):.2f}" if pace else "-",
                      f"{of('parameters')[0]:,}", str(len(cells))])  # fmt: skip
    lines += [[row, f"failed: {reason}".replace("|", "/"), *["-"] * 7] for row, reason in failed.items()]
    return markdown(*lines)


def against(results, base="ours"):
    """Each row less `base` at the same seeds: the noise that the two share cancels."""
    keys = [f"gap_{s}" for s in SIGMAS] + ["held_out"]
    lines = [[f"less {base}", *(f"gap at sigma {s}" for s in SIGMAS), "held-out loss", "seeds"]]
    for row, cells in results.items():
        both = [seed for seed in cells if seed in results[base]]
        less = [mean_error([cells[s][key] - results[base][s][key] for s in both], signed=True) for key in keys]
        lines += [[row, *less, str(len(both))]] * (row != base and len(both) > 0)
    return markdown(*lines)


# ------------------------------------------------------------------------------------------------------------------
# Films of ours, between the prior and the ground truth
# ------------------------------------------------------------------------------------------------------------------

KINDS = {  # name: what is fixed of their scenes
    "people": {"subject": "person", "place": "studio"},
    "dogs": {"subject": "dog"},
    "people elsewhere": {"subject": "person"},
    "plain prompt": {"subject": "person", "place": "studio", "count": 1},
}


def scenes_of(kind, count, seed):
    """(scenes, prompts, songs): each dances its song's genre; the plain prompt tells nothing of it."""
    songs, rng = make.unseen_songs(count), np.random.default_rng((seed, list(KINDS).index(kind)))
    look, places = {"camera": "01"} | KINDS[kind], make.PLACES[1:]
    scenes, prompts = [], []
    for i in range(count):
        where = {"place": str(rng.choice(places))} if kind == "people elsewhere" else {}
        scenes.append(make.draw_scene(rng, genre=list(make.GENRES)[i % len(make.GENRES)], **look, **where))
        prompts.append(train.PLAIN if kind == "plain prompt" else make.caption(scenes[-1], rng)[0])
    return scenes, prompts, songs


@torch.no_grad()
def filmed(row, adapter, count, seed):
    """The scores of `count` films of each kind: {kind: {r, other, tempo}}, style (of the plain prompt's), frechet
    (of all others', to the world's own clips: only counts that are equal compare). The noise follows from the seed."""
    encoder = mi.load_encoder(os.path.join(make.HERE, "encoder.safetensors"), dtype=torch.bfloat16)
    reference = os.path.join(make.HERE, adaptability.REFERENCE)
    world, _ = adaptability.load_reference(reference, encoder.output_proj.in_features)
    studio, began = make.Studio(adapter, dtype=torch.bfloat16), time.time()
    scores, features = {}, []
    for kind in tqdm(KINDS, f"films, {row}, seed {seed}", leave=False):
        scenes, prompts, songs = scenes_of(kind, count, seed)
        beats = [(start + torch.arange(make.FRAMES) / make.FPS) * tempo / 60 for _, tempo, start in songs]
        if row == TRUTH:
            danced = [make.to_video(make.render(scene, beat)[None]) for scene, beat in zip(scenes, beats)]
            seen = [studio.decoder(encoder(video)[0])[0].clamp(-1, 1) for video in danced]
            films = np.stack([((v + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy() for v in seen])
        else:
            films = studio.film(
                prompts, [(path, start, 1.0) for path, _, start in songs] if adapter else None, 1000 * seed
            )
        found = make.follows(films, songs)
        scores[kind] = {key: float(found[key]) for key in ("r", "other", "tempo")}
        if kind == "plain prompt":
            scores["style"] = style(films, [beat.numpy() for beat in beats], [scene["genre"] for scene in scenes])[0]
        else:
            features += [adaptability.features(make.to_video(film[None])[0], encoder) for film in films]
    scores["frechet"] = adaptability.frechet_distance(*adaptability.gaussian(features), *world)
    return scores | {"seconds": (time.time() - began) / (len(KINDS) * count)}


def films_table(filmed, count):
    """filmed: {row: [scores of a seed, ...]}."""
    lines = [["row", *(f"{kind}: r, own song / another / tempo" for kind in KINDS), "style", "Frechet", "seeds"]]
    for row, seeds in filmed.items():
        cells = [
            " / ".join(mean_error([s[kind][key] for s in seeds], 2) for key in ("r", "other", "tempo"))
            for kind in KINDS
        ]
        ends = [mean_error([s[key] for s in seeds], 2) for key in ("style", "frechet")]
        lines.append([row, *cells, *ends, str(len(seeds))])
    return f"{count} films of each kind and seed\n\n" + markdown(*lines)


# ------------------------------------------------------------------------------------------------------------------
# What is there, and what is left
# ------------------------------------------------------------------------------------------------------------------

SHARED = ("data", "steps", "batch", "dit.safetensors")  # that all rows of a table have in common


def finished(out):
    """({row: {seed: figures}}, {row: {seed: config}}, {row: why it failed}) of all cells in a run folder."""
    results, configs, failed = {}, {}, {}
    names = os.listdir(out) if os.path.isdir(out) else []
    for row in ROWS:
        stem = slug(row) + "-"
        for seed in sorted(int(n[len(stem) :]) for n in names if n.startswith(stem) and n[len(stem) :].isdecimal()):
            folder = os.path.join(out, f"{stem}{seed}")
            result, config, why = (train.read_json(os.path.join(folder, f"{name}.json"), dict)
                                   for name in ("result", "config", "failed"))  # fmt: skip
            if result and config:
                results.setdefault(row, {})[seed], configs.setdefault(row, {})[seed] = result, config
            elif why:
                failed[row] = f"seed {seed}: {why['error']}"
    return results, configs, failed


def differs(config, wanted):  # names of what another cell has otherwise, but for its folder
    return [key for key in wanted if key != "out" and config.get(key) != wanted[key]]


def twin_of(config, configs):
    """The row that has these settings already, such as all layers where that is ours; or None."""
    return next((row for row, seeds in configs.items() if not differs(seeds.get(config["seed"], {}), config)), None)


def same_table(configs):
    """Raises InputError for cells that cannot stand in one table."""
    cells = [(f"{slug(row)}-{seed}", config) for row, seeds in configs.items() for seed, config in seeds.items()]
    for key in SHARED:
        values = {json.dumps(config.get(key)): name for name, config in cells}
        if len(values) > 1:
            raise mi.InputError(f"{' and '.join([*values.values()][:2])} have another {key}; they need an --out each")


def seconds_left(todo, results, batch):
    """About how long these cells take, and what that is based on; todo: [(row, config)]."""
    known = {row: [c["seconds"] for c in cells.values() if c["seconds"]] for row, cells in results.items()}
    measured = [s for pace in known.values() for s in pace]
    general = np.median(measured) if measured else 0.15 * batch
    total = 0.0
    for row, config in todo:
        log = os.path.join(config["out"], "log.jsonl")
        done = sum(1 for _ in open(log)) // config["save_every"] * config["save_every"] if os.path.exists(log) else 0
        pace = 0 if row == PRIOR else np.median(known.get(row) or [general])
        total += 30 + pace * max(config["steps"] - done, 0)  # reading the cache and evaluating
    return total, f"{general:.2f} s a step, {'as measured here' if measured else 'a guess for 2 cores'}"


def ablate(rows=None, *, data="toy", weights=None, seeds=(1, 2, 3), out="runs/ablate", films=0, dry_run=False,
           table_only=False, **common):  # fmt: skip
    """Train the cells that are missing and print the tables of all that are there; common: options of train.py for all
    rows. Returns {row: {seed: figures}}, None for a dry run. Raises InputError."""
    rows, weights = list(dict.fromkeys(rows or ROWS)), weights or make.HERE
    common = {key: value for key, value in common.items() if value is not None}
    if unknown := [row for row in rows if row not in ROWS]:
        raise mi.InputError(f"no row {unknown[0]}; there are: {', '.join(map(slug, ROWS))}")
    if not table_only and not (os.path.isdir(f"{data}/aist") and os.path.isdir(f"{data}/wild")):
        raise mi.InputError(f"there is no {data}/aist and {data}/wild; make them: python -m tiny.make data {data}")
    if films and os.path.abspath(weights) != os.path.abspath(make.HERE):
        raise mi.InputError("--films films with the models of tiny/; leave out --weights")
    results, configs, failed = finished(out)
    if not table_only:
        run_cells(rows, seeds, out, data, weights, common, results, configs, dry_run, films)
        if dry_run:
            return None
        results, configs, failed = finished(out)
    same_table(configs)
    if not results and not failed:
        raise mi.InputError(f"there is no finished cell in {out}")
    print_tables(results, configs, failed)
    if films:
        film_rows(results, configs, out, films, table_only)
    return results


def run_cells(rows, seeds, out, data, weights, common, results, configs, dry_run, films):
    """Say how long it takes, then make every cell that is not there; one that fails leaves failed.json, and the rest
    go on. Raises InputError for cells of other settings, before anything is trained."""
    todo, broken, planned, new = [], {}, {row: dict(cells) for row, cells in configs.items()}, []
    for seed in dict.fromkeys(seeds):
        for row in rows:
            try:
                wanted = configuration(row, seed, out, data, weights, common)
            except mi.InputError as error:  # such as no ranking, which the other rows do without
                broken[row, seed] = str(error)
                continue
            config = configs.get(row, {}).get(seed)
            if config is None:
                todo.append((row, wanted))
                new += [] if twin_of(wanted, planned) else [(row, wanted)]
                planned.setdefault(row, {})[seed] = wanted
            elif changed := differs(config, wanted):
                folder, names = os.path.join(out, f"{slug(row)}-{seed}"), ", ".join(changed)
                raise mi.InputError(f"{folder} holds a cell with another {names}; name another --out, or remove it")
    same_table(planned)
    options = make.ADAPTER | common
    left, pace = seconds_left(new, results, options["batch"])
    print(f"weights  {os.path.relpath(weights)}, {options['dtype']}; {hardware()}")
    print(
        f"cells    {len(rows)} rows, seeds {' '.join(map(str, seeds))}, {options['steps']} steps of {options['batch']}"
    )
    print(f"left     {len(todo)} of {len(rows) * len(set(seeds))}, about {left / 60:.0f} minutes ({pace}); "
          "a new audio encoder or new data takes some minutes more, once")  # fmt: skip
    if films:
        print(f"films    {films} of each of {len(KINDS)} kinds, for ours, {PRIOR} and {TRUTH}, each seed of ours")
    for (row, seed), error in broken.items():
        print(f"failed   {row}: {error}")
    if dry_run:
        return
    for (row, seed), error in broken.items():
        mi.save_json(os.path.join(out, f"{slug(row)}-{seed}", "failed.json"), {"error": error})
    for row, config in tqdm(todo, "cells", unit="cell"):
        seed, failure = config["seed"], os.path.join(config["out"], "failed.json")
        try:
            if twin := twin_of(config, configs):  # the same seed makes the same adapter
                result = results[twin][seed] | {"as": twin}
                mi.save_json(os.path.join(config["out"], "config.json"), config)
                mi.save_json(os.path.join(config["out"], "result.json"), result)
            else:
                if config["weights"] == os.path.join(out, "untaught"):
                    untaught(weights, out)
                result = cell(row, config)
            results.setdefault(row, {})[seed], configs.setdefault(row, {})[seed] = result, config
            if os.path.exists(failure):
                os.remove(failure)
        except Exception as error:  # whatever it is, the others go on
            text = f"{'' if isinstance(error, mi.InputError) else type(error).__name__ + ': '}{error}"
            mi.save_json(failure, {"error": " ".join(text.split())[:300]})


def print_tables(results, configs, failed):
    shown = {}
    for row, cells in results.items():
        twins = {figures.get("as") for figures in cells.values()} - {None}
        shown[row + (f" (as {', '.join(sorted(twins))})" if twins else "")] = cells
    cells = [figures for row in results.values() for figures in row.values()]
    steps = {f"{c['steps']} steps of {c['batch']}" for row in configs.values() for c in row.values()}
    where = {f"{c.get('commit', 'commit not kept')}, {c.get('hardware', 'hardware not kept')}" for c in cells}
    print(f"\n{'; '.join(sorted(where | steps))}\n\n{table(shown, failed)}")
    if "ours" in results and len(results) > 1:
        print(f"\n{against(results)}")


def film_rows(results, configs, out, count, table_only):
    """Film what is missing, and print the table of what is there. Kept in OUT/films/."""
    scores = {}
    for row in ("ours", PRIOR, TRUTH):
        for seed in results.get("ours", {}):
            path = os.path.join(out, "films", f"{slug(row)}-{seed}-{count}.json")
            key = (
                {"config": configs["ours"][seed]}
                if row == "ours"
                else {"dit": configs["ours"][seed]["dit.safetensors"]}
            )
            found = train.read_json(path, dict)
            if not table_only and ((found or {}).get("of") != key):
                made = slug(results["ours"][seed].get("as", "ours"))  # a twin's adapter lies in the other's folder
                adapter = os.path.join(out, f"{made}-{seed}", "musicinfuser.safetensors") if row == "ours" else None
                found = filmed(row, adapter, count, seed) | {"of": key}
                mi.save_json(path, found)
            if (found or {}).get("of") == key:
                scores.setdefault(row, []).append(found)
    print("\n" + (films_table(scores, count) if scores else "no films: they are of the row ours, which is not there"))


def main():
    parser = argparse.ArgumentParser(description="Train and compare the rows of an ablation on the toy world.")
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(map(slug, ROWS))}; sets: those of layers")
    add("--data", default="toy", help="of `python -m tiny.make data` (default toy)")
    add("--weights", help="folder (default tiny/)")
    add("--steps", type=int, help=f"a cell (default {make.ADAPTER['steps']}, the shipped adapter's)")
    add("--batch", type=int, help=f"(default {make.ADAPTER['batch']})")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default 1 2 3)")
    add("--films", type=int, default=0, help="also score so many films of people, dogs, other places and the plain "
        "prompt, of ours, the prior and the ground truth (default 0)")  # fmt: skip
    add("--out", default="runs/ablate", help="the same command goes on where it stopped (default runs/ablate)")
    add("--dry-run", action="store_true", help="say how long it takes, and stop")
    add("--table", action="store_true", dest="table_only", help="of all that is finished in --out; train nothing")
    options = vars(parser.parse_args())
    names = {slug(row): row for row in ROWS}
    given = [name for row in options.pop("rows") for name in (SETS if row == "sets" else [row])]
    if ablate([names.get(slug(row), row) for row in given], **options):
        print(f"\npython -m eval.ablate {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    mi.main(main)
