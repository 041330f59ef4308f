"""What the repository promises of itself: its dependencies, its tested set, notebooks that know where it lives."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIRED = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
OPTIONAL = [Requirement(line) for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
badges = load_script("notebooks/badges.py")


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_the_package_lives_with_the_numpy_and_torch_that_are_there(requirement):
    assert requirement.name not in {"librosa", "numba", "laion-clap", "matplotlib", "ipywidgets", "torchvision"}
    if requirement.name in ("numpy", "torch"):
        assert {part.operator for part in requirement.specifier} == {">="}


def test_a_tested_version_meets_every_range():
    pins = pinned()
    for requirement in REQUIRED + OPTIONAL:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_conda_environment_lists_what_was_asked_for():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (from_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    asked = "torch jupyterlab transformers laion-clap librosa ipywidgets matplotlib seaborn papermill nbval".split()
    assert set(asked) <= set(from_pip) and {"-c constraints.txt", "-e .[notebooks,laion,test]"} <= set(from_pip)
    assert set(asked) <= set(pinned())


def test_importing_the_package_is_quick_and_silent():
    code = "import sys, refined_ldm; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == ("[]\n", "")


def test_badges_point_a_new_notebook_at_the_repository():
    parameters = nbformat.v4.new_code_cell("steps = 25", metadata={"tags": ["parameters"]})
    title, last = nbformat.v4.new_markdown_cell("# Title\nA question."), nbformat.v4.new_code_cell("steps")
    notebook = nbformat.v4.new_notebook(cells=[title, parameters, last])
    for repository in ("some/one", "someone/else.where"):
        badges.point_notebook(notebook, "01_a.ipynb", repository)
        assert notebook.cells[0].source.startswith("# Title\n\n[![Open in Colab]")
        assert notebook.cells[0].source.endswith(f"github/{repository}/blob/main/notebooks/01_a.ipynb)\n\nA question.")
        assert f"github.com/{repository}" in notebook.cells[2].source and len(notebook.cells) == 4
        exec(notebook.cells[2].source, {})  # the package is there, so nothing is installed
    badges.point_notebook(notebook, "01_a.ipynb", badges.UNSET)
    assert notebook.cells[0].source == "# Title\n\nA question."


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_the_badge_and_bootstrap_of_the_one_setting(path):
    notebook = nbformat.read(path, as_version=4)
    before = [cell.source for cell in notebook.cells]
    badges.point_notebook(notebook, path.name, PROJECT["tool"]["refined-ldm"]["repository"])
    assert [cell.source for cell in notebook.cells] == before, "run `make badges`"


def test_the_first_code_cell_on_colab_installs_the_package_and_keeps_numpy_and_torch(tmp_path, monkeypatch):
    """On an image with numpy and torch, a build for its own CUDA, and without the package."""
    versions, done, there = {"numpy": "2.0.2", "torch": "2.9.0+cu126"}, [], importlib.util.find_spec
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "refined_ldm" else there(name))
    monkeypatch.setattr(subprocess, "run", lambda command, check: done.append(command[1:]))
    exec(badges.BOOTSTRAP.format(repository="owner/name"), {})
    kept = (tmp_path / "kept.txt").read_text().splitlines()
    assert kept == ["numpy==2.0.2", "torch==2.9.0+cu126"]
    pip = ["-m", "pip", "install", "--quiet"]
    package = "refined-audio-ldm @ git+https://github.com/owner/name"
    assert done == [[*pip, "--constraint", "kept.txt", package], [*pip, "--no-deps", "aisfx==0.1.2"]]
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        if requirement.name in versions:  # pip would refuse the package if what is kept did not do
            assert requirement.specifier.contains(versions[requirement.name])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_keeps_to_the_house_rules(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 500_000
    assert max(len(cell.source.splitlines()) for cell in code) <= 30
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    for assignment in ast.parse(parameters.source).body:
        ast.literal_eval(assignment.value)


def test_a_wheel_holds_what_notebooks_read_of_the_figures():
    """Where the package came as a wheel, notebook 06 finds its tables and claims in it (`display.stored_figures`)."""
    forced = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert forced == {f"figures/{name}": f"refined_ldm/figures/{name}" for name in ("data", "claims.yaml")}
    assert all((ROOT / source).exists() for source in forced)
    for path in NOTEBOOKS:
        code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        assert "display.ROOT" not in code and "REPOSITORY" not in code  # all go through `display`
