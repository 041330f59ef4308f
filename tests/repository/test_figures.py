"""Each stored figure was drawn from a committed state, by code that is still there, with its notebook's defaults."""

import ast
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = sorted(path.stem for path in (ROOT / "figures").glob("*.png"))
CODE = ("refined_ldm", "tests/benchmark", "docs")  # scripts that draw figures outside the notebooks


@cache
def notebooks() -> dict[str, tuple[str, dict]]:
    """{name: (source of its code cells, its parameters with their defaults)}."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        defaults = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(parameters.source).body}
        found[path.stem] = "\n".join(cell.source for cell in cells), defaults
    return found


@cache
def scripts() -> str:
    return "\n".join(path.read_text() for folder in CODE for path in (ROOT / folder).rglob("*.py"))


def drawn_in(figure: str) -> str | None:
    """The notebook that saves a figure (06_arms: notebook 06, under "06_arms" or "arms"), None if a script does."""
    if re.search(rf"save_figure\(.{{0,80}}[\"']{figure}[\"']", scripts(), re.DOTALL):
        return None
    number, _, name = figure.partition("_")
    sources = {notebook: source for notebook, (source, _) in notebooks().items() if notebook.startswith(f"{number}_")}
    return next(
        (notebook for notebook, source in sources.items() if _names(source, figure) or _names(source, name)), None
    )


def _names(source: str, figure: str) -> bool:
    return re.search(rf"[\"']{figure}[\"']", source) is not None


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def problems(figure: str) -> list[str]:
    """What makes a stored figure stale, in words; [] if nothing does."""
    record = ROOT / "figures" / "data" / f"{figure}.json"
    if not record.exists():
        return [f"{record.name} is missing: save it with display.save_figure"]
    origin = json.loads(record.read_text())
    found, notebook = [], drawn_in(figure)
    if notebook:
        defaults = notebooks()[notebook][1]
        for name, value in origin["parameters"].items():
            if name not in defaults:
                found.append(f"it was drawn with {name} = {value!r}, which is no parameter of {notebook}")
            elif defaults[name] != value:
                found.append(f"it was drawn with {name} = {value!r}, the default of {notebook} is {defaults[name]!r}")
        if not origin["parameters"]:
            found.append("its parameters were not recorded: give them to display.save_figure")
    elif not _names(scripts(), figure):
        found.append("no notebook and no script draws it any more: delete it with its data")
    commit = origin["commit"] or "no commit"
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        found.append(f"it was drawn from uncommitted code ({commit}): commit first, then draw")
    elif git("rev-parse", "--is-shallow-repository").stdout == "false\n":  # else the history is not there to ask
        if git("merge-base", "--is-ancestor", commit, "HEAD").returncode:
            found.append(f"it was drawn from {commit[:10]}, which is not in the history of this branch")
    return found


@pytest.mark.parametrize("figure", FIGURES)
def test_a_stored_figure_is_fresh(figure):
    notebook = drawn_in(figure)
    redraw = f"refined-ldm notebooks {notebook[:2]} -p write_figures true" if notebook else "the command that draws it"
    found = problems(figure)
    assert not found, f"figures/{figure}.png is stale: {'; '.join(found)}. Redraw it: {redraw}"


def test_every_figure_of_a_notebook_is_stored():
    for name, (source, _) in notebooks().items():
        missing = set(re.findall(r"save_figure\([^\n]*?[\"'](\d\d_\w+)[\"']", source)) - set(FIGURES)
        assert not missing, f"{name} draws {', '.join(sorted(missing))}, which figures/ lacks"
