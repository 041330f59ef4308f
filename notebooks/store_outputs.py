"""Execute notebooks at their defaults and store in them what reads well on the web: no players, no widgets.

python notebooks/store_outputs.py [notebooks/NAME.ipynb …]    all of them if none is named
"""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
PLAYER = re.compile(r"<audio.*?</audio>", re.DOTALL)
WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT = 500_000  # bytes


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Take out sounds, widgets, warnings and clock times; make pictures small."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            if "bootstrap" in cell.metadata.get("tags", ()):
                cell.outputs = []  # the path of this machine's package
            shown = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [output for output in shown if WIDGET not in output.get("data", {})]
            for data in [output.data for output in cell.outputs if "data" in output]:
                if "text/html" in data:
                    data["text/html"] = PLAYER.sub("<em>Run the cell to listen.</em>", data["text/html"])
                if "image/png" in data:
                    data["image/png"] = shrink(data["image/png"])


def shrink(png: str) -> str:
    """A PNG picture in base64 -> the same with 96 colours, a third of the size."""
    picture, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(96, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(arguments: list[str]) -> None:
    for path in map(Path, arguments or sorted(FOLDER.glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
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
