"""The ledger of claims: each with its words, a verdict, what was found, and its evidence, which is computed again.

`figures/claims.yaml` lists them. A piece of evidence is one value with its interval, and says of which runs (or of
which rows of another table) it is. `verify` computes it again and compares every digit. It also refuses a difference
between runs whose cards differ in a field that the evidence does not name. Notebook: 06
"""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from refined_ldm.experiment.statistics import collect, interval, paired, rows_where, unequal

VERDICTS = ("reproduced", "refuted", "not testable here", "not run yet")
RUNS = "figures/data/experiment"  # the table of evidence that names none


@dataclass(frozen=True)
class Checked:
    """One piece of evidence of one claim: as written, as computed, and its fault ("" if there is none)."""

    claim: str
    written: str
    computed: str
    fault: str = ""


def compute(evidence: dict, table: pd.DataFrame) -> str:
    """Evidence {"column", "of", "is"} and, for a difference, "minus" -> its value as text, with the decimals of "is".

    of: a selection of rows. Its mean, and least and most over seeds; of a table with the columns low and high, its row.
    minus: another selection, which is subtracted seed by seed -> mean and 95 % interval. differ: fields of the runs'
    cards in which the two may differ. Raises ValueError for a missing column, a selection without rows, or cards that
    differ in another field.
    """
    column, of = evidence["column"], evidence["of"]
    rows = rows_where(table, of)
    if column not in rows:
        raise ValueError(f"no column {column!r}, there are {', '.join(rows.columns)}")
    decimals = len(str(evidence["is"]).split()[0].partition(".")[2])
    if "minus" in evidence:
        both = pd.concat([rows, rows_where(table, evidence["minus"])])
        if different := unequal(both, evidence.get("differ", ())):
            raise ValueError(f"the runs do not compare, they differ in {'; '.join(different)}")
        mean, low, high = interval(paired(table, column, of, evidence["minus"]))
        return f"{mean:+.{decimals}f} ({low:+.{decimals}f} to {high:+.{decimals}f})"
    if {"low", "high"} <= set(rows) and len(rows) == 1:
        low, high = rows["low"].iloc[0], rows["high"].iloc[0]
    else:
        low, high = rows[column].min(), rows[column].max()
        if "precision" in rows and (different := unequal(rows)):
            raise ValueError(f"these are no seeds of one run, they differ in {'; '.join(different)}")
    mean = f"{rows[column].mean():.{decimals}f}"
    return mean if low == high else f"{mean} ({low:.{decimals}f} to {high:.{decimals}f})"


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
        if missing := [k for k in ("id", "words", "verdict", "found") if k not in claim]:
            raise ValueError(f"{path}: claim {name} lacks {', '.join(missing)}")
        if claim["verdict"] not in VERDICTS:
            found = f"got {claim['verdict']!r}"
            raise ValueError(f"{path}: the verdict of {name} must be one of {', '.join(VERDICTS)}, {found}")
        if claim["verdict"] == "not run yet" and "refuted_if" not in claim:
            raise ValueError(f"{path}: {name} is a hypothesis, it must say what would refute it (refuted_if)")
        for evidence in claim.get("evidence", ()):
            if missing := [k for k in ("what", "is", "column", "of") if k not in evidence]:
                raise ValueError(f"{path}: evidence of {name} lacks {', '.join(missing)}")
        if name in seen:
            raise ValueError(f"{path}: there are two claims {name}")
        seen.add(name)
    return ledger


def verify(
    path: str | Path = "figures/claims.yaml",
    root: str | Path | None = None,
    on_claim: Callable[[dict, list[Checked]], None] | None = None,
) -> list[Checked]:
    """Compute every piece of evidence of the ledger again, and compare the documents with their generator.

    Paths are relative to the repository, `root`; a package without the documents has the ledger alone. Raises
    FileNotFoundError for a missing table, ValueError for evidence that cannot be computed or compares unequal cards.
    """
    path = Path(path)
    root, tables, checked = Path(root) if root else path.resolve().parent.parent, {}, []
    for claim in read_ledger(path):
        for evidence in claim.get("evidence", ()):
            checked.append(_check(claim["id"], evidence, root, tables))
        if on_claim:
            on_claim(claim, [c for c in checked if c.claim == claim["id"]])
    generator = root / "docs" / "tables.py"
    if generator.is_file():
        checked += [Checked(document, line, "", "is not what docs/tables.py writes: run `make tables`")
                    for document, line in runpy.run_path(str(generator))["stale"]()]  # fmt: skip
    return checked


def _check(claim, evidence, root, tables):
    written, source = str(evidence["is"]), evidence.get("table", RUNS)
    if source not in tables:
        if not (root / source).exists():
            raise FileNotFoundError(f"claim {claim} needs {root / source}: `refined-ldm experiment` makes it")
        tables[source] = collect(root / source) if (root / source).is_dir() else pd.read_csv(root / source)
    try:
        computed = compute(evidence, tables[source])
    except (ValueError, KeyError) as fault:
        raise ValueError(f"claim {claim}, {evidence['what']}: {fault} in {source}") from fault
    return Checked(claim, written, computed, "" if computed == written else f"comes out as {computed}")
