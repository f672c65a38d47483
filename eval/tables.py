"""Cells and tables in markdown, with the standard error of every mean."""

import numpy as np


def mean_error(values, digits=2, sign=""):
    """The mean and its standard error; one value has no error."""
    values = np.array([value for value in values if value is not None], float)
    if not len(values):
        return "-"
    error = "?"
    if len(values) > 1:
        error = f"{values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"
    return f"{values.mean():{sign}.{digits}f} ± {error}"


def markdown(head, *rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
