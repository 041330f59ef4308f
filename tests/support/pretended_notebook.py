"""Runs a notebook's code on a pretended device: `python -m tests.support.pretended_notebook cuda NOTEBOOK`."""

import json
import sys
from pathlib import Path


def run(kind: str, notebook: Path, **parameters) -> list[str]:
    """Run all code cells -> what the device would have refused. Raises the first error of a cell.

    parameters: replace those of the notebook's parameters cell.
    """
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell

    from tests.support.pretended_device import pretend

    matplotlib.use("Agg")
    shell = InteractiveShell.instance()
    with pretend(kind, strict=False, tf32=kind == "cuda") as device:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                shell.run_cell("".join(cell["source"])).raise_error()
            if "parameters" in cell["metadata"].get("tags", ()):
                shell.push(parameters)
    print(device.report())
    return list(device.faults)


if __name__ == "__main__":
    faults = run(sys.argv[1], Path(sys.argv[2]), **json.loads((sys.argv[3:] or ["{}"])[0]))
    sys.exit("\n".join(faults) if faults else 0)
