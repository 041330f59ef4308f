"""Execute notebooks at their defaults and store in them what reads well on the web: no players, no widgets.

python .ci/store_outputs.py [notebooks/NAME.ipynb …]    all of them if none is named
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PLAYER = re.compile(r"<audio.*?</audio>", re.DOTALL)
WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT = 500_000  # bytes


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Take out sounds, widgets, warnings and clock times; pictures, tables and text stay."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if WIDGET not in output.get("data", {}) and output.get("name") != "stderr"
            ]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = PLAYER.sub("<em>Run the cell to listen.</em>", output.data["text/html"])


def main(arguments: list[str]) -> None:
    for path in map(Path, arguments or sorted(FOLDER.glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=600, resources=resources, store_widget_state=False).execute()
        tidy(notebook)
        temporary = path.with_suffix(".tmp")
        nbformat.write(notebook, temporary)
        size = temporary.stat().st_size
        if size >= LIMIT:
            sys.exit(f"{path.name} would be {size} bytes, {LIMIT} is the limit: make its pictures fewer or smaller")
        temporary.replace(path)
        print(f"{path.name}: {size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
