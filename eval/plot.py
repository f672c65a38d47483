"""Figures of what was measured:   python -m eval.plot runs/musicinfuser tiny/adaptability.json ...

Each path is drawn by what it holds:
    a run of train.py, or several       loss and listening gap over the steps    training.png
    adaptability.json                   the ranking with its errors              ranking.png
    a folder of eval.ablate             gap over the earliest listening layer    layers.png
    the --json of eval.evaluate         r over the guidance by music             guidance.png
"""

import argparse
import json
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import numpy as np

import musicinfuser as mi
from eval.rows import GROUPS, slug

SIGMA = 0.75  # of the noise, where the gap is the clearest
SMOOTHING = 0.95  # of the loss from step to step


def load_pyplot():
    try:
        import matplotlib  # here, because only figures need it
    except ImportError as error:
        raise mi.InputError(f"{error}; pip install -r eval/requirements.txt") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise mi.InputError(f"{path} cannot be read as JSON ({error})") from error


def read_log(folder):
    """[{}]: the lines of a run's log.jsonl, but for one that was cut short."""
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("}\n")]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise mi.InputError(f"{folder}/log.jsonl is not a log of train.py ({error})") from error


# ----------------------------------------------------------------------------------------------
# What to draw, by what a path holds
# ----------------------------------------------------------------------------------------------


def kind_of(path):
    """training, layers, ranking or guidance. Raises InputError for anything else."""
    if os.path.isfile(os.path.join(path, "log.jsonl")):
        return "training"
    if os.path.isdir(path) and cells_of(path):
        return "layers"
    if os.path.isfile(path):
        content = read_json(path)
        if isinstance(content, dict) and "ranking" in content:
            return "ranking"
        if isinstance(content, dict) and "beats" in content:
            return "guidance"
    wanted = (
        "a run of train.py, an adaptability.json, a folder of eval.ablate or a --json of evaluate"
    )
    raise mi.InputError(f"{path} is nothing to draw: name {wanted}")


def cells_of(folder):
    """{row's slug: [result.json of its seeds]} of an ablation, but for rows that are another."""
    cells = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name, "result.json")
        result = read_json(path) if os.path.isfile(path) else {"as": "nothing"}
        if "as" not in result:
            cells.setdefault(name.rpartition("-")[0], []).append(result)
    return cells


# ----------------------------------------------------------------------------------------------
# The figures; each takes pyplot and the paths, and returns one
# ----------------------------------------------------------------------------------------------


def draw_training(plt, folders):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for folder in folders:
        log, name = read_log(folder), os.path.basename(os.path.normpath(folder))
        steps = [line["step"] for line in log]
        left.plot(steps, smoothed([line["loss"] for line in log]), label=name)
        held_out = [line for line in log if f"right_{SIGMA}" in line]
        gaps = [line[f"wrong_{SIGMA}"] - line[f"right_{SIGMA}"] for line in held_out]
        right.plot([line["step"] for line in held_out], gaps, marker=".", label=name)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel=f"gap at sigma {SIGMA}")
    right.axhline(0, color="grey", linewidth=0.5)
    right.legend(frameon=False)
    return figure


def smoothed(values):
    """A moving average."""
    found, last = [], None
    for value in values:
        last = value if last is None else SMOOTHING * last + (1 - SMOOTHING) * value
        found.append(last)
    return found


def draw_ranking(plt, paths):
    figure, axes = plt.subplots(len(paths), 1, figsize=(7, 3 * len(paths)), squeeze=False)
    for axis, path in zip(axes[:, 0], paths, strict=True):
        result = read_json(path)
        gains, best = result["adaptability"], result["ranking"][: round(len(result["ranking"]) / 3)]
        errors = [error or 0 for error in result["standard_error"]]
        colours = ["tab:orange" if layer in best else "tab:blue" for layer in range(len(gains))]
        axis.bar(range(len(gains)), gains, yerr=errors, color=colours, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(xlabel="layer (orange: the best third)", ylabel="adaptability")
        axis.set_title(f"{result.get('metric', '')} {path}", fontsize=8)
    return figure


def draw_layers(plt, folders):
    figure, axis = plt.subplots(figsize=(5, 3.2))
    sets = {slug(row) for row in GROUPS["sets"]}
    for folder in folders:
        rows = [cells for row, cells in cells_of(folder).items() if row in sets]
        earliest = [min(map(int, cells[0]["layers"].split(","))) for cells in rows]
        gaps = [[cell[f"gap_{SIGMA}"] for cell in cells] for cells in rows]
        means, errors = [np.mean(gap) for gap in gaps], [error_of(gap) for gap in gaps]
        name = os.path.basename(os.path.normpath(folder))
        axis.errorbar(earliest, means, errors, fmt=".", capsize=2, label=name)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set(xlabel="earliest layer that listens", ylabel=f"gap at sigma {SIGMA}")
    axis.legend(frameon=False)
    return figure


def error_of(values):
    """The standard error of a mean; of one value it is not known, and none is drawn."""
    return np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0


def draw_guidance(plt, paths):
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for path in paths:
        scales, means, errors = r_by_guidance(read_json(path))
        axis.errorbar(scales, means, errors, marker=".", capsize=2, label=path)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set(xlabel="guidance by music", ylabel="r, motion with the beat's phase")
    axis.legend(frameon=False)
    return figure


def r_by_guidance(scores):
    """(scales, means of r, their standard errors) over the videos of a --json."""
    groups = {}
    for row in scores["beats"]["videos"].values():
        if row.get("music_cfg") is not None and row.get("adapter") != "none":
            groups.setdefault(row["music_cfg"], []).append(row["own"]["r"])
    scales = sorted(groups)
    if not scales:
        raise mi.InputError("no video in it has a .json that tells its guidance by music")
    means = [float(np.mean(groups[scale])) for scale in scales]
    return scales, means, [error_of(groups[scale]) for scale in scales]


FIGURES = {
    "training": draw_training,
    "ranking": draw_ranking,
    "layers": draw_layers,
    "guidance": draw_guidance,
}


def plot(paths, out="outputs/figures"):
    """Draw everything; returns the pictures' paths. Raises InputError."""
    plt, groups, pictures = load_pyplot(), {}, []
    for path in paths:
        groups.setdefault(kind_of(path), []).append(path)
    for kind, members in groups.items():
        figure = draw(plt, kind, members)
        picture = os.path.join(out, f"{kind}.png")
        with mi.written_whole(picture) as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
        plt.close(figure)
        pictures.append(picture)
    return pictures


def draw(plt, kind, members):
    try:
        return FIGURES[kind](plt, members)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, mi.InputError):
            raise
        raise mi.InputError(f"{', '.join(members)}: not what was written ({error!r})") from error


def main():
    parser = argparse.ArgumentParser(description="Figures of what was measured.")
    parser.add_argument("paths", nargs="+", help="runs, rankings, ablations, scores")
    parser.add_argument("--out", default="outputs/figures", help="folder (default outputs/figures)")
    o = parser.parse_args()
    print("\n".join(plot(o.paths, o.out)))


if __name__ == "__main__":
    mi.main(main)
