"""The ledger of claims: every stated number, and how it is computed from the tables beside the figures.

`figures/claims.yaml` lists claims. Each has an id, the words in which it was made, a status (reproduced, refuted, not
testable here, or measured for a result of our own), the finding, the command that makes its table (a CSV file, or a
folder of runs), and the numbers in that sentence. `verify` computes each number again, rounds it as it is written, and
compares the digits. Notebook: 06
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from refined_ldm.experiment.statistics import collect, interval, paired, rows_where

STATUSES = ("reproduced", "refuted", "not testable here", "measured")


@dataclass(frozen=True)
class Checked:
    """One number of one claim: as written, as computed, and its fault ("" if there is none)."""

    claim: str
    written: str
    computed: float
    fault: str = ""


def compute(how: dict, table: pd.DataFrame) -> float:
    """A number as the ledger describes it: {"take": mean | low | high | count | ratio | difference | …, "column": …}.

    mean, low, high: of a column over rows `where`, with the interval of `interval`; count: of these rows; least, most.
    difference, difference low, difference high: `where` minus `than`, seed by seed. ratio: of the means of `where` and
    `than`. Raises ValueError for another `take`, a missing column, or a selection without rows.
    """
    take, column = how["take"], how.get("column")
    if take.startswith("difference"):
        found = interval(paired(table, column, how["where"], how["than"]))
        return found[("difference", "difference low", "difference high").index(take)]
    rows = rows_where(table, how.get("where", {}))
    if take == "count":
        return len(rows)
    if column not in rows:
        raise ValueError(f"no column {column!r}, there are {', '.join(rows.columns)}")
    if take in ("mean", "low", "high"):
        return interval(rows[column])[("mean", "low", "high").index(take)]
    if take in ("least", "most"):
        return rows[column].min() if take == "least" else rows[column].max()
    if take == "ratio":
        return rows[column].mean() / rows_where(table, how["than"])[column].mean()
    raise ValueError(f"take must be mean, low, high, least, most, count, ratio or difference, got {take!r}")


def read_ledger(path: str | Path) -> list[dict]:
    """The claims in a YAML file. Raises FileNotFoundError, or ValueError naming the claim that is incomplete."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ledger at {path}: the claims are in figures/claims.yaml of the repository")
    try:
        ledger = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ValueError(f"{path} is not plain YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(ledger, list) or not all(isinstance(claim, dict) for claim in ledger):
        raise ValueError(f"{path} is no ledger: it must hold a list of claims, each with its id")
    seen = set()
    for claim in ledger:
        name = claim.get("id", "without id")
        if missing := [k for k in ("id", "words", "status", "found", "command") if k not in claim]:
            raise ValueError(f"{path}: claim {name} lacks {', '.join(missing)}")
        if claim["status"] not in STATUSES:
            found = f"got {claim['status']!r}"
            raise ValueError(f"{path}: the status of {name} must be one of {', '.join(STATUSES)}, {found}")
        if name in seen:
            raise ValueError(f"{path}: there are two claims {name}")
        seen.add(name)
    return ledger


def verify(
    path: str | Path = "figures/claims.yaml",
    root: str | Path | None = None,
    on_claim: Callable[[dict, list[Checked]], None] | None = None,
) -> list[Checked]:
    """Compute every number of the ledger from its table. Paths are relative to the repository.

    A number is at fault if its digits differ from those computed, if it is not in the sentence `found`, if it leaves
    the interval it must lie in, or if a file that states the claim (`stated_in`) does not hold it. Raises
    FileNotFoundError for a missing table, ValueError for an entry that cannot be computed.
    """
    path = Path(path)
    root, tables, checked = Path(root) if root else path.resolve().parent.parent, {}, []
    for claim in read_ledger(path):
        for number in claim.get("numbers", ()):
            checked.append(_check(claim, number, root, tables))
        if on_claim:
            on_claim(claim, [c for c in checked if c.claim == claim["id"]])
    return checked


def _check(claim, number, root, tables):
    written, source = str(number["value"]), number.get("table", claim.get("table"))
    if source not in tables:
        if not (root / source).exists():
            raise FileNotFoundError(f"claim {claim['id']} needs {root / source}: {claim['command']} makes it")
        tables[source] = collect(root / source) if (root / source).is_dir() else pd.read_csv(root / source)
    try:
        computed = compute(number, tables[source])
    except (ValueError, KeyError) as fault:
        raise ValueError(f"claim {claim['id']}, {written}: {fault} in {source}") from fault
    decimals = len(written.partition(".")[2])
    faults = []
    if f"{computed:.{decimals}f}" != written:
        faults.append(f"comes out as {computed:.{decimals + 2}f}")
    if written not in claim["found"]:
        faults.append("is not in what the claim says was found")
    low, high = number.get("within", (-np.inf, np.inf))
    if not low <= computed <= high:
        faults.append(f"must lie within {low} and {high}")
    faults += [f"is not in {file}" for file in claim.get("stated_in", ()) if written not in (root / file).read_text()]
    return Checked(claim["id"], written, float(computed), "; ".join(faults))
