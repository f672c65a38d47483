"""The paper's Table 1, and more, on the toy world:   python -m eval.ablate [ROW ...]

A row is train.py with other options, a cell is a row with a seed. The gap between the losses on
held-out clips with another's song and with their own says how much the adapter listens, and takes
no sampling. Finished cells are kept.

Top to bottom:   cells | which are there | tables | films | the command line (the rows: rows.py)
"""

import contextlib
import functools
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from operator import itemgetter

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import numpy as np
import torch
from tqdm import tqdm

import musicinfuser as mi
import train
from eval import films, quality
from eval.rows import (
    GROUPS,
    OMNIDANCE,
    PRIOR,
    ROWS,
    TRUTH,
    UNTAUGHT,
    growing_with_depth,
    layers_of,
    rows_of,
    slug,
    untaught,
)
from eval.tables import markdown, mean_error
from musicinfuser import option

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.relpath(os.path.join(ROOT, "tiny"))
SIGMAS = (0.25, 0.5, 0.75, 0.9)
HEAD = [*(f"gap at sigma {s}" for s in SIGMAS), "held-out loss"]
KEYS = [*(f"gap_{s}" for s in SIGMAS), "held_out"]

# ----------------------------------------------------------------------------------------------
# A cell: OUT/<row>-<seed>/ as train.py makes it, output.txt, and result.json once it is finished
# ----------------------------------------------------------------------------------------------


@dataclass
class Options(mi.RunOptions):
    data: str = option("toy", "of `python -m tiny.make data`")
    steps: int = option(None, "of a cell; default: as the weights prefer", low=1, line="training")
    batch: int = option(None, "default: as the weights prefer", low=1, line="training")
    seeds: tuple = option((1, 2, 3), "a cell for each", parse=int, line="training")
    films: int = option(0, "also score so many films of each kind, of each row", low=0)
    out: str = option("runs/ablate", "the same command goes on where it stopped")
    dry_run: bool = option(False, "say how long it takes, and stop")
    table: bool = option(False, "of all that is finished in --out; train nothing")


def content(path):
    """A digest of a model with all that it prefers, which decides the films. Raises InputError."""
    mi.read_header(path)
    return mi.model_digest(path)[:16]


class Cell:
    """What is to be trained. Raises InputError where the row cannot be, as without a ranking."""

    def __init__(self, row, seed, o, dit):
        self.row, self.seed = row, seed
        self.folder = os.path.join(o.out, f"{slug(row)}-{seed}")
        depth, given = len(dit.blocks), dict(ROWS[row])
        preferred = dit.config.training
        given["layers"] = layers_of(given.get("layers", preferred.get("layers")), depth, o.weights)
        given |= {name: getattr(o, name) for name in ("steps", "batch", "device", "dtype")}
        given |= {"offload": o.offload, "compile": o.compile, "seed": seed, "out": self.folder}
        given |= {"wild": os.path.join(o.data, "wild"), "eval_clips": 16, "eval_sigmas": SIGMAS}
        given["weights"] = o.weights
        if row == UNTAUGHT:
            given["weights"] = os.path.join(o.out, "untaught")
        self.options = mi.settle(train.Options, preferred, given)
        train.complete(self.options, depth)
        self.options.eval_every = 250
        self.options.save_every = 50
        self.data = os.path.join(o.data, "aist")
        files = "dit.safetensors", os.path.join("audio_encoder", "model.safetensors")
        self.model = [content(os.path.join(o.weights, name)) for name in files]

    def identity(self):
        """What decides its figures; two rows with one identity are the same adapter."""
        free = "out", "weights", "device", "offload", "compile", "save_every", "eval_every"
        options = {k: v for k, v in asdict(self.options).items() if k not in free}
        special = PRIOR, OMNIDANCE, UNTAUGHT  # these differ in more than options
        how = self.row if self.row in special else "trained"
        identity = {"how": how, "data": self.data, "model": self.model} | options
        return json.loads(json.dumps(identity))

    def path(self, name):
        return os.path.join(self.folder, name)

    def finish(self):
        """Train it, or go on with it; returns its figures, kept in result.json."""
        os.makedirs(self.folder, exist_ok=True)
        with open(self.path("output.txt"), "a", encoding="utf-8") as file:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                result = self.prior() if self.row == PRIOR else self.trained()
        result |= {"identity": self.identity(), "commit": commit(), "hardware": hardware()}
        return self.keep(result)

    def keep(self, result):
        mi.save_json(self.path("result.json"), result)
        if os.path.exists(self.path("failed.json")):
            os.remove(self.path("failed.json"))
        return result

    def trained(self):
        with growing_with_depth() if self.row == OMNIDANCE else contextlib.nullcontext():
            adapter = train.train(self.data, **asdict(self.options))
        with open(self.path("log.jsonl"), encoding="utf-8") as log:
            lines = [json.loads(line) for line in log]
        tensors, _ = mi.read_safetensors(adapter)
        return self.figures(lines[-1]) | {
            "layers": ",".join(map(str, self.options.layers)),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "seconds": float(np.median([line["seconds"] for line in lines])),
        }

    def prior(self):
        """The frozen model hears nothing: both songs give the same loss."""
        o = self.options
        path = os.path.join(o.weights, "dit.safetensors")
        dit = mi.load_dit(path, o.device, mi.DTYPES[o.dtype], o.offload)
        samples, clips = train.prepare_data(self.data, o, dit.config, train.Workers(o))
        held_out = samples.held_out(clips, o.eval_clips)
        losses = {}
        if held_out:
            right, wrong = (deaf(batch).to(o.device) for batch in held_out)
            losses = train.listening_gap(dit, right, wrong, SIGMAS, o.batch)
        return self.figures(losses) | {"layers": "none", "parameters": 0, "seconds": None}

    def figures(self, losses):
        if f"right_{SIGMAS[0]}" not in losses:
            raise mi.InputError(f"there are no clips of two test songs below {self.data}")
        gaps = {f"gap_{s}": losses[f"wrong_{s}"] - losses[f"right_{s}"] for s in SIGMAS}
        return gaps | {"held_out": float(np.mean([losses[f"right_{s}"] for s in SIGMAS]))}


def deaf(batch):
    """The batch without its music."""
    conditions = {name: tensor for name, tensor in batch.conditions.items() if name != "audio"}
    return replace(batch, conditions=conditions)


@functools.cache
def commit():
    line = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    if not shutil.which("git"):
        return "no repository"
    run = subprocess.run(line, capture_output=True, text=True)
    return run.stdout.strip() or "no repository"


@functools.cache
def hardware():
    name = platform.processor() or "an unknown CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {name}{gpu}, torch {torch.__version__}"


# ----------------------------------------------------------------------------------------------
# Which cells are there, which are left
# ----------------------------------------------------------------------------------------------


def read_object(path):
    """A JSON object; {} where it is not there, or damaged, to be made again."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def finished(out):
    """({row: {seed: figures}}, {row: why it failed}) of all cells in a run folder."""
    results, failed = {}, {}
    names = os.listdir(out) if os.path.isdir(out) else []
    for row in ROWS:
        stem = slug(row) + "-"
        ends = [name[len(stem) :] for name in names if name.startswith(stem)]
        for seed in sorted(int(end) for end in ends if end.isdecimal()):
            folder = os.path.join(out, f"{stem}{seed}")
            result = read_object(os.path.join(folder, "result.json"))
            why = read_object(os.path.join(folder, "failed.json"))
            if is_result(result):
                results.setdefault(row, {})[seed] = result
            elif why:
                failed[row] = f"seed {seed}: {why.get('error')}"
    return results, failed


def is_result(found):
    """Whether it is what Cell.finish keeps; if not, it is made again."""
    numbers = [found.get(key) for key in ("parameters", *KEYS)]
    if found.get("seconds") is not None:
        numbers.append(found["seconds"])
    numbers = [isinstance(n, (int, float)) and abs(n) < 1e300 for n in numbers]
    identity, words = found.get("identity"), [found.get("layers"), found.get("as", "")]
    known = isinstance(identity, dict) and {"steps", "batch"} <= identity.keys()
    return known and "seconds" in found and all(isinstance(w, str) for w in words) and all(numbers)


def plan(rows, o, dit, results):
    """([Cell] that are left, {(row, seed): why it cannot be}). Raises InputError for a cell that is
    there with other settings."""
    left, broken = [], {}
    for seed in dict.fromkeys(o.seeds):
        for row in rows:
            try:
                cell = Cell(row, seed, o, dit)
            except mi.InputError as error:
                broken[row, seed] = str(error)
                continue
            there = results.get(row, {}).get(seed)
            if there is None:
                left.append(cell)
            else:
                check_same(cell, there["identity"])
    same_table(results, left)
    return left, broken


def differences(wanted, identity):
    """What differs; an older cell's identity may have more in it."""
    return [name for name in wanted if identity.get(name) != wanted[name]]


def check_same(cell, identity):
    changed = differences(cell.identity(), identity)
    if changed:
        others = f"another {', '.join(changed)}; name another --out, or remove it"
        raise mi.InputError(f"{cell.folder} holds a cell with {others}")


def same_table(results, left=()):
    """Raises InputError for cells that cannot stand in one table."""
    identities = [figures["identity"] for cells in results.values() for figures in cells.values()]
    identities += [cell.identity() for cell in left]
    for name in ("data", "steps", "batch", "model"):
        values = {json.dumps(identity.get(name)) for identity in identities}
        if len(values) > 1:
            reason = f"{name} is {' and '.join(sorted(values))}"
            raise mi.InputError(f"cells of different settings, {reason}; they need an --out each")


def run_cells(left, o, results):
    """Finish every cell; one that fails leaves failed.json, and the rest go on."""
    for cell in tqdm(left, "cells", unit="cell"):
        try:
            twin = twin_of(cell, results)
            if twin:
                result = cell.keep(results[twin][cell.seed] | {"as": twin})
            else:
                if cell.row == UNTAUGHT:
                    untaught(o.weights, o.out)
                result = cell.finish()
            results.setdefault(cell.row, {})[cell.seed] = result
        except Exception as error:  # whatever it is, the others go on
            kind = "" if isinstance(error, mi.InputError) else f"{type(error).__name__}: "
            note_failure(cell.folder, kind + str(error))


def note_failure(folder, error):
    mi.save_json(os.path.join(folder, "failed.json"), {"error": " ".join(error.split())[:300]})


def twin_of(cell, results):
    """A row that is the same adapter, such as all layers where that is ours, and its own cell."""
    wanted = cell.identity()
    for row, cells in results.items():
        figures = cells.get(cell.seed, {})
        if figures and "as" not in figures and not differences(wanted, figures["identity"]):
            return row
    return None


def seconds_left(left, results):
    """About how long these cells take, and seconds a step."""
    paces = [f["seconds"] for cells in results.values() for f in cells.values() if f["seconds"]]
    pace = np.median(paces) if paces else None
    total = 0.0
    for cell in left:
        steps = 0 if cell.row == PRIOR else cell.options.steps
        guess = 0.15 * cell.options.batch  # on two cores
        total += 30 + steps * (guess if pace is None else pace)  # reading the cache, evaluating
    return total, pace


# ----------------------------------------------------------------------------------------------
# The tables of the losses
# ----------------------------------------------------------------------------------------------


def table(results, failed):
    """results: {row: {seed: figures}}, failed: {row: why}; a row may be in both."""
    lines = [["row", "layers", *HEAD, "s a step", "parameters", "seeds"]]
    for row, cells in results.items():
        figures = list(cells.values())
        means = [mean_error([f[key] for f in figures], 4) for key in KEYS]
        paces = [f["seconds"] for f in figures if f["seconds"] is not None]
        pace = f"{np.mean(paces):.2f}" if paces else "-"
        ends = [pace, f"{figures[0]['parameters']:,}", str(len(figures))]
        lines.append([name_of(row, figures), figures[0]["layers"], *means, *ends])
    for row, reason in failed.items():
        lines.append([row, f"failed: {reason}".replace("|", "/"), *["-"] * (len(HEAD) + 3)])
    return markdown(*lines)


def name_of(row, figures):
    twins = sorted({f["as"] for f in figures if "as" in f})
    return f"{row} (as {', '.join(twins)})" if twins else row


def print_against(results, columns, digits, base="ours"):
    """Each row less `base` at the same seeds: the noise that the two share cancels.

    results: {row: {seed: figures}}; columns: {heading: the number that figures have there}.
    """
    lines = [[f"less {base}", *columns, "seeds"]]
    for row, cells in results.items():
        pairs = [(cells[seed], own) for seed, own in results.get(base, {}).items() if seed in cells]
        if row != base and pairs:
            less = [[of(cell) - of(own) for cell, own in pairs] for of in columns.values()]
            means = [mean_error(values, digits, "+") for values in less]
            lines.append([row, *means, str(len(pairs))])
    if len(lines) > 1:
        print(f"\n{markdown(*lines)}")


def print_tables(results, failed):
    figures = [f for cells in results.values() for f in cells.values()]
    where = {f"{f.get('commit')}, {f.get('hardware')}" for f in figures}
    where |= {f"{f['identity']['steps']} steps of {f['identity']['batch']}" for f in figures}
    print(f"\n{'; '.join(sorted(where))}\n\n{table(results, failed)}")
    print_against(results, dict(zip(HEAD, map(itemgetter, KEYS))), 4)


# ----------------------------------------------------------------------------------------------
# Films of each row, between the prior and the ground truth
# ----------------------------------------------------------------------------------------------


def film_rows(rows, results, o):
    """Film what is missing, and print the table of what is there. Kept in OUT/films/."""
    scores = {}
    for row, seed, of in films_of(rows, results):
        path = os.path.join(o.out, "films", f"{slug(row)}-{seed}-{o.films}.json")
        found = read_object(path)
        if found.get("of") != of and not o.table:
            found = filmed(row, seed, o) | {"of": of}
            mi.save_json(path, found)
        if found.get("of") == of:
            scores.setdefault(row, {})[seed] = found
    if not scores:
        print("\nno films: there is no finished row to film")
        return
    print(f"\n{o.films} films of each kind and seed\n\n{films_table(scores)}")
    columns = {f"{kind}: r": lambda found, kind=kind: found[kind]["r"] for kind in films.KINDS}
    columns |= {"style": itemgetter("style"), "Frechet": itemgetter("frechet")}
    print_against(scores, columns, 2)  # films of a seed share scenes and noise


def films_of(rows, results):
    """[(row, seed, what its films follow from)]. Not of a row that is another one, or whose sound
    is not in the adapter's file alone."""
    made, ends = [], {}
    for row in rows:
        for seed, figures in results.get(row, {}).items():
            if row not in (PRIOR, OMNIDANCE, UNTAUGHT) and "as" not in figures:
                made.append((row, seed, figures["identity"]))
                ends[seed] = {"model": figures["identity"]["model"]}
    return made + [(row, *end) for row in (PRIOR, TRUTH) for end in sorted(ends.items())]


def filmed(row, seed, o):
    adapter = os.path.join(o.out, f"{slug(row)}-{seed}", "musicinfuser.safetensors")
    if row in (PRIOR, TRUTH):
        adapter = None
    studio = films.Studio(o.weights, adapter, o.device, mi.DTYPES[o.dtype])
    songs = os.path.join(o.out, "films", "songs")
    return films.film_scores(studio, o.films, seed, songs, truth=row == TRUTH)


def films_table(scores):
    """scores: {row: {seed: film_scores}}"""
    kinds = [f"{kind}: r, own song / another / tempo" for kind in films.KINDS]
    lines = [["row", *kinds, "style", "Frechet", "seeds"]]
    for row, by_seed in scores.items():
        seeds = by_seed.values()
        cells = [film_cell([found[kind] for found in seeds]) for kind in films.KINDS]
        ends = [mean_error([found[key] for found in seeds]) for key in ("style", "frechet")]
        lines.append([row, *cells, *ends, str(len(seeds))])
    return markdown(*lines)


def film_cell(found):
    return " / ".join(mean_error([f[key] for f in found]) for key in ("r", "other", "tempo"))


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def ablate(rows=(), **given):
    """Train the cells that are missing and print the tables of all that are there.

    given: fields of Options. Returns ({row: {seed: figures}}, {row: why it failed}), None for a dry
    run. Raises InputError, before anything is trained where it can.
    """
    o, dit = mi.begin(Options, "training", {"weights": TINY} | given)
    rows = rows_of(rows)
    check(o)
    results, _ = finished(o.out)
    if not o.table:
        left, broken = plan(rows, o, dit, results)
        announce(rows, left, broken, o, results)
        if o.dry_run:
            return None
        for (row, seed), error in broken.items():
            note_failure(os.path.join(o.out, f"{slug(row)}-{seed}"), error)
        run_cells(left, o, results)
    results, failed = finished(o.out)
    same_table(results)
    if not results and not failed:
        raise mi.InputError(f"there is no finished cell in {o.out}")
    print_tables(results, failed)
    if o.films:
        film_rows(results if o.table else rows, results, o)
    return results, failed


def check(o):
    if not o.seeds or min(o.seeds) < 0:
        raise mi.InputError("--seeds takes numbers from 0")
    if o.films == 1:
        raise mi.InputError("--films takes 2 or more: the songs of others are the control")
    if o.films and not o.table:
        mi.read_header(os.path.join(o.weights, quality.REFERENCE))
    folders = [os.path.join(o.data, name) for name in ("aist", "wild")]
    if not o.table and not all(map(os.path.isdir, folders)):
        advice = f"make them: python -m tiny.make data {o.data}"
        raise mi.InputError(f"there is no {' and '.join(folders)}; {advice}")


def announce(rows, left, broken, o, results):
    seconds, pace = seconds_left(left, results)
    basis = "a guess for 2 cores" if pace is None else f"{pace:.2f} s a step, as measured here"
    mi.print_options(o)
    print(f"cells    {len(rows)} rows; {hardware()}")
    print(f"left     {len(left)} of {len(rows) * len(set(o.seeds))}, ", end="")
    print(f"about {seconds / 60:.0f} minutes ({basis}); a new audio encoder or new data takes more")
    if o.films:
        kinds = f"{o.films} of each of {len(films.KINDS)} kinds"
        print(f"films    {kinds}, of each row, {PRIOR} and {TRUTH}, each seed")
    for (row, seed), error in broken.items():
        print(f"failed   {row}, seed {seed}: {error}")


def main():
    parser = mi.parser_for(Options, "Train and compare the rows of an ablation on the toy world.")
    names = ", ".join([*map(slug, ROWS), *GROUPS])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {names}")
    given = vars(parser.parse_args())
    asked = given.pop("rows")
    made = ablate(asked, **given)
    if made is None:
        return
    print(f"\npython -m eval.ablate {shlex.join(sys.argv[1:])}")
    failed = [row for row in rows_of(asked) if row in made[1]]
    if failed:
        raise mi.InputError(f"{len(failed)} rows failed, as {failed[0]}: {made[1][failed[0]]}")


if __name__ == "__main__":
    mi.main(main)
