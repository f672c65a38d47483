"""How sure is a ranking of layers? Gains with their errors by the jackknife, and the report."""

import itertools
import math

import torch


def leave_one_out(score, measured):
    """(1 + n,) float64: the score of n videos, then that of all but each."""
    scores = [score(measured)]
    if len(measured) > 1:
        scores += [score(measured[:i] + measured[i + 1 :]) for i in range(len(measured))]
    return torch.tensor(scores, dtype=torch.float64)


def estimate(difference):
    """A difference of two leave_one_out, and its standard error by the jackknife, None for one.

    The same videos are left out of both: of a mean of scores, this is the standard error of their
    paired differences.
    """
    value, less = difference[0].item(), difference[1:]
    if not len(less):
        return value, None
    return value, ((len(less) - 1) * less.var(correction=0)).sqrt().item()


def compare(score, baseline, layers):
    """baseline, and each of layers: what was measured of n videos.

    Returns the adaptability and its standard error of each layer with the ranking, best first, and
    (difference, standard error) of each rank and the next.
    """
    base, *scores = (leave_one_out(score, measured) for measured in (baseline, *layers))
    gains, errors = map(list, zip(*(estimate(s - base) for s in scores)))
    ranking = sorted(range(len(layers)), key=lambda layer: -gains[layer])
    gaps = [estimate(scores[a] - scores[b]) for a, b in itertools.pairwise(ranking)]
    result = {"ranking": ranking, "adaptability": gains, "standard_error": errors}
    return result | {"baseline": base[0].item()}, gaps


# ----------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------


def report(result, gaps, top, videos):
    """The table, the bar chart (the paper's Fig. 15), and which ranks can be told apart."""
    largest = max(map(abs, result["adaptability"])) or 1
    places = max(0, 3 - math.floor(math.log10(largest)))  # four digits of the largest
    print_table(result, top, places)
    print_chart(result, top)
    print(f"\n* the best {top}")
    if result["standard_error"][0] is None:
        print("one video tells nothing of the error: give more prompts or seeds")
        return
    apart = sum(gap > 2 * error for gap, error in gaps)
    print(f"{apart} of {len(gaps)} neighbouring ranks are more than two standard errors apart")
    if top <= len(gaps):
        print_edge(result["ranking"], gaps, top, places, videos)


def print_table(result, top, places):
    baseline = f"{result['baseline']:.4g}"
    print(f"\nrank  layer  adaptability, a gain over the baseline's {baseline}")
    for place, layer in enumerate(result["ranking"]):
        gain, error = result["adaptability"][layer], result["standard_error"][layer]
        star = "  *" if place < top else ""
        print(f"{place + 1:4}  {layer:5}  {plus_minus(gain, error, places)}{star}")


def plus_minus(value, error, places):
    error = "?" if error is None else f"{error:.{places}f}"
    return f"{value:+.{places}f} ± {error}"


def print_chart(result, top, width=40):
    gains = result["adaptability"]
    low, high = min(0.0, *gains), max(0.0, *gains)
    zero, *ends = (round(width * (value - low) / ((high - low) or 1)) for value in (0.0, *gains))
    print("\nlayer")
    for layer, end in enumerate(ends):
        below, above = "█" * max(zero - end, 0), "█" * max(end - zero, 0)
        star = " *" if layer in result["ranking"][:top] else ""
        print(f"{layer:5}  {' ' * min(end, zero)}{below}|{above}{star}")


def print_edge(ranking, gaps, top, places, videos):
    """Whether the last layer of the best can be told from the first of the rest."""
    gap, error = gaps[top - 1]
    names = f"rank {top} (layer {ranking[top - 1]}) against rank {top + 1} (layer {ranking[top]})"
    words = "told apart"
    if gap <= 2 * error:
        needed = "no number of videos"
        if gap:
            needed = f"about {math.ceil(videos * (2 * error / gap) ** 2):,} videos"
        words = f"not told apart; {needed} a layer would do, here are {videos}"
    print(f"{names}: {plus_minus(gap, error, places)}, {words}")
