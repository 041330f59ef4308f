"""Point the notebooks and the README at the project's address on GitHub: Colab badges, and the cell that installs.

python notebooks/badges.py owner/name    sets the address in pyproject.toml and rewrites the notebooks and the README
python notebooks/badges.py               rewrites them from the address that is set

Until an address is set there are no badges, because they would lead nowhere.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SETTING = re.compile(r'^(repository = )"([^"]*)"', re.MULTILINE)
UNSET = "owner/name"
BADGE = re.compile(r" ?\[!\[[^]]*\]\([^)]*colab-badge\.svg\)\]\([^)]*\)")
NOTEBOOK_LINK = re.compile(r"\[[^]]+\]\(notebooks/([^)]+\.ipynb)\)")
IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"

BOOTSTRAP = """\
# On Colab this installs the package and keeps Colab's numpy and torch; where the package is there, it does nothing.
import importlib.util
import subprocess
import sys
from importlib.metadata import version

if importlib.util.find_spec("refined_ldm") is None:
    kept = [f"{{name}}=={{version(name)}}\\n" for name in ("numpy", "torch") if importlib.util.find_spec(name)]
    with open("kept.txt", "w") as file:
        file.writelines(kept)
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    package = "refined-audio-ldm @ git+https://github.com/{repository}"
    subprocess.run([*install, "--constraint", "kept.txt", package], check=True)
    subprocess.run([*install, "--no-deps", "aisfx==0.1.2"], check=True)  # it declares versions that it does not need

importlib.import_module("refined_ldm")  # before torch, to whose threads it says that they sleep while they wait"""


def badge(repository: str, notebook: str) -> str:
    address = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab]({IMAGE})]({address})"


def point_readme(text: str, repository: str) -> str:
    """Return the README with a badge behind every link to a notebook, or with none if no address is set."""
    text = BADGE.sub("", text)
    if repository == UNSET:
        return text
    return NOTEBOOK_LINK.sub(lambda found: f"{found[0]} {badge(repository, found[1])}", text)


def point_notebook(notebook: nbformat.NotebookNode, name: str, repository: str) -> None:
    """Rewrite the badge below the title and the cell tagged `bootstrap`; the latter is added after the parameters."""
    first = notebook.cells[0]
    title, _, rest = BADGE.sub("", first.source).partition("\n")
    badges = [] if repository == UNSET else [badge(repository, name)]
    first.source = "\n\n".join(filter(None, [title, *badges, rest.strip()]))

    bootstrap = _tagged(notebook, "bootstrap")
    if bootstrap is None:
        bootstrap = nbformat.v4.new_code_cell(metadata={"tags": ["bootstrap"]})
        parameters = _tagged(notebook, "parameters")
        notebook.cells.insert(notebook.cells.index(parameters) + 1 if parameters else 1, bootstrap)
    bootstrap.source = BOOTSTRAP.format(repository=repository)


def main(arguments: list[str]) -> None:
    project = ROOT / "pyproject.toml"
    text = project.read_text()
    repository = arguments[0] if arguments else SETTING.search(text)[2]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        sys.exit(f"expected the address as owner/name, got {repository!r}")
    project.write_text(SETTING.sub(rf'\1"{repository}"', text))

    readme = ROOT / "README.md"
    readme.write_text(point_readme(readme.read_text(), repository))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        point_notebook(notebook, path.name, repository)
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)} -> {repository}")


def _tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode | None:
    return next((cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])), None)


if __name__ == "__main__":
    main(sys.argv[1:])
