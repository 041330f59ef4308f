"""What runs say beside each other: their tables collected, an arm minus another seed by seed, a lead in iterations."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student


def collect(out):
    """The records of all finished runs as a table, one row each, with what their CSV files say -> DataFrame.

    Noise errors and recalls are computed from the files, not taken from the record.
    """
    rows = []
    for path in sorted(Path(out).glob("*.json")):
        record = json.loads(path.read_text())
        errors = pd.read_csv(path.with_suffix(".csv"))
        last = errors[errors["step"] == errors["step"].max()]
        row = {k: v for k, v in record.items() if not isinstance(v, dict)}
        row["conditioner"] = record["arm"]["conditioner"]
        row |= bins(last.to_dict("records"))
        heard = path.with_name(f"{path.stem}-heard.csv")
        if heard.is_file():
            table = pd.read_csv(heard)
            row["recall"] = table["recall"].mean()
            row["recall_one"] = table["recall"][table["kind"] == "event"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def bins(rows):
    """The mean noise error over timesteps, and over those from 250, 500 and 750 on."""
    found = {}
    for low in (0, 250, 500, 750):
        found[f"error_{low}"] = float(np.mean([row["error"] for row in rows if row["t"] >= low]))
    return found


def rows_where(table, where):
    """The rows of a table in which every named column has the given value, or one of the given values.

    Raises ValueError if a column is missing or no row is left.
    """
    for column, value in where.items():
        if column not in table:
            raise ValueError(f"no column {column!r}, there are {', '.join(table.columns)}")
        table = table[table[column].isin(value if isinstance(value, list) else [value])]
    if table.empty:
        raise ValueError(f"no row has {where}")
    return table


def interval(values, confidence=0.95):
    """(mean, low, high) of few independent values, by Student's t (1908); of one value, itself three times."""
    values = np.asarray(values, dtype=float)
    mean = values.mean()
    if len(values) < 2:
        return mean, mean, mean
    half = student.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return mean, mean - half, mean + half


def paired(table, column, one, other, on="seed"):
    """column of the rows `one` minus that of the rows `other`, for every seed both have -> (n,)."""
    a, b = (rows_where(table, where).set_index(on)[column] for where in (one, other))
    seeds = sorted(set(a.index) & set(b.index))
    if not seeds:
        raise ValueError(f"{one} and {other} have no {on} in common")
    return (a[seeds] - b[seeds]).to_numpy(dtype=float)


def iterations_to(table, column, value):
    """After how many iterations the runs of one arm have a value of a measure that falls: interpolated between them.

    table: runs of one arm, of any lengths; seeds of one length are averaged. Where the shortest is past it already, its
    length; infinity where the longest is not there yet.
    """
    found = table.groupby("iterations")[column].mean().cummin()
    if value < found.iloc[-1]:
        return np.inf
    return float(np.interp(-value, -found.to_numpy(), found.index))


def times_fewer(table, column, one, other, at, paced, rises=False):
    """How many times fewer iterations arm `one` takes to be where arm `other` ends, seed by seed -> (seeds,).

    table: runs; at: iterations that both were trained for; paced: two lengths of `one` between which its pace is taken;
    rises: more is better. The mean over the seeds of `one` changes between them as a power b of the iterations, so a
    change by a factor f takes f ** (1 / b) times as many (a power law of learning, Hestness et al. 2017). Below 1, it
    takes more; NaN where `one` does not get better with more. Raises ValueError where one of these has not been run.
    """
    arms = [{"label": label, "iterations": at} for label in (one, other)]
    ahead = paired(table.assign(log=np.log(table[column])), "log", *arms)
    start, end = (rows_where(table, {"label": one, "iterations": n})[column].mean() for n in paced)
    b = np.log(end / start) / np.log(paced[1] / paced[0])
    return np.exp(ahead / b) if (b > 0 if rises else b < 0) else np.full(len(ahead), np.nan)
