"""Statistics over runs: tables collected, paired differences between arms, and leads expressed in iterations.

Notebook: 06
"""

import json
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student

from refined_ldm.experiment.arms import EARLIER_LABELS, EARLIER_PARTS, FOOTING, Card


def collect(out: str | Path) -> pd.DataFrame:
    """The records of all finished runs in a folder, one row each, with the fields FOOTING of their cards.

    Noise errors and recalls are computed from the runs' CSV files, not taken from the records.
    """
    rows = []
    for path in sorted(Path(out).glob("*.json")):
        record = json.loads(path.read_text())
        errors = pd.read_csv(path.with_suffix(".csv"))
        row = {k: v for k, v in record.items() if not isinstance(v, dict)}
        row["label"] = EARLIER_LABELS.get(row["label"], row["label"])
        row["part"] = EARLIER_PARTS.get(row["part"], row["part"])
        card = Card.from_record(record)
        row |= {"conditioner": record["arm"]["conditioner"], **{name: getattr(card, name) for name in FOOTING}}
        row |= mean_errors(errors[errors["step"] == errors["step"].max()])
        for ending in ("classes", "heard"):  # "heard" is the earlier name
            predicted = path.with_name(f"{path.stem}-{ending}.csv")
            if not predicted.is_file():
                continue
            table = pd.read_csv(predicted)
            row["recall"] = table["recall"].mean()
            row["recall_one"] = table["recall"][table["kind"] == "event"].mean()
        if (details := path.with_name(f"{path.stem}-details.csv")).is_file():
            row |= pd.read_csv(details).set_index("detail")["value"].to_dict()
        rows.append(row)
    return pd.DataFrame(rows)


def mean_errors(errors: pd.DataFrame) -> dict[str, float]:
    """The mean noise error over all timesteps, and over those from 250, 500 and 750 on. errors: columns t, error."""
    return {f"error_{low}": float(errors["error"][errors["t"] >= low].mean()) for low in (0, 250, 500, 750)}


def unequal(table: pd.DataFrame, but: Container[str] = ()) -> list[str]:
    """In which fields of FOOTING, `but` those named, runs differ: ["precision: bfloat16 and float32", …].

    Runs with one kind of conditioner must have it from one training; two kinds differ by their nature.
    """
    found = []
    for field in (name for name in FOOTING if name not in but):
        groups = table.groupby("conditioner") if field == "conditioner_weights" else [("", table)]
        values = (sorted(own[field].unique()) for _, own in groups)
        found += [f"{field}: {' and '.join(map(str, different))}" for different in values if len(different) > 1]
    return found


def same_machine(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (precision, rows) of the runs of each precision and kind of machine, those with most arms first.

    Of a conditioner that was trained more than once, the runs with the training that most of them have are taken.
    """
    groups = [(precision, rows) for (precision, _), rows in table.groupby(["precision", "machine"])]
    for precision, rows in sorted(groups, key=lambda group: -group[1]["label"].nunique()):
        usual = rows.groupby("conditioner")["conditioner_weights"].transform(lambda weights: weights.mode()[0])
        yield precision, rows[rows["conditioner_weights"] == usual]


def rows_where(table: pd.DataFrame, where: dict) -> pd.DataFrame:
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


def interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of few independent values, by Student's t (1908); of one value, itself three times."""
    values = np.asarray(values, dtype=float)
    mean = values.mean()
    if len(values) < 2:
        return mean, mean, mean
    half = student.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return mean, mean - half, mean + half


def paired(table: pd.DataFrame, column: str, one: dict, other: dict, on: str = "seed") -> np.ndarray:
    """`column` of the rows `one` minus that of the rows `other`, for every seed that both have -> (n,).

    Raises ValueError if a selection is empty or they share no seed.
    """
    a, b = (rows_where(table, where).set_index(on)[column] for where in (one, other))
    seeds = sorted(set(a.index) & set(b.index))
    if not seeds:
        raise ValueError(f"{one} and {other} have no {on} in common")
    return (a[seeds] - b[seeds]).to_numpy(dtype=float)


def iterations_to(table: pd.DataFrame, column: str, value: float) -> float:
    """The number of iterations after which one arm reaches a value of a falling measure, interpolated between runs.

    table: runs of one arm, of any lengths; seeds of one length are averaged. The length of the shortest run if that is
    past the value already; infinity if the longest has not reached it.
    """
    found = table.groupby("iterations")[column].mean().cummin()
    if value < found.iloc[-1]:
        return np.inf
    return float(np.interp(-value, -found.to_numpy(), found.index))


def times_fewer(table: pd.DataFrame, column: str, one: str, other: str, at: int, between: tuple[int, int],
                rises: bool = False) -> np.ndarray:  # fmt: skip
    """Factor by which arm `one` needs fewer iterations to reach the final value of arm `other`, by seed -> (seeds,).

    at: the iterations of both; between: two lengths of `one` that give its power law; rises: more is better. The mean
    over the seeds of `one` changes between them as a power b of the iterations, so a change by a factor f takes
    f ** (1 / b) times as many (a power law of learning, Hestness et al. 2017). Below 1, it takes more; NaN where `one`
    does not get better with more. Raises ValueError where one of these has not been run.
    """
    arms = [{"label": label, "iterations": at} for label in (one, other)]
    ahead = paired(table.assign(log=np.log(table[column])), "log", *arms)
    start, end = (rows_where(table, {"label": one, "iterations": n})[column].mean() for n in between)
    b = np.log(end / start) / np.log(between[1] / between[0])
    return np.exp(ahead / b) if (b > 0 if rises else b < 0) else np.full(len(ahead), np.nan)
