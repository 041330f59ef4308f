"""Execute the notebooks with papermill: some or all, with other parameters, several at once."""

import ast
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from glob import glob
from pathlib import Path
from typing import Any

import refined_ldm
from refined_ldm.base.files import check_folder
from refined_ldm.base.integers import number, whole, whole_seed
from refined_ldm.data.known_sets import named_set

NOTEBOOKS = Path(refined_ldm.__file__).resolve().parent.parent / "notebooks"
PATHS = {  # parameters that name a file or a folder
    "recording", "checkpoint", "data", "checkpoint_ms_clap", "checkpoint_laion", "tokenizer_laion", "esc50",
    "audioldm", "laion", "ms", "tokenizer", "folder", "student",
}  # fmt: skip
WRITTEN = {"folder"}  # those that a notebook creates if missing


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Paths of the notebooks called `names` ("05" or "05_results"), of all if there are none, in their order.

    Raises FileNotFoundError, listing the notebooks there are.
    """
    found = sorted(NOTEBOOKS.glob("0[1-9]_*.ipynb"))
    missing = [name for name in names if not any(name in (path.stem[:2], path.stem) for path in found)]
    if missing or not found:
        raise FileNotFoundError(
            f"no notebook {', '.join(missing) or '0N_*.ipynb'} in {NOTEBOOKS}; there are "
            f"{', '.join(path.stem for path in found) or 'none'}"
        )
    return [path for path in found if not names or path.stem[:2] in names or path.stem in names]


def parameters_for(paths: Sequence[Path], preset: str, given: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """{path: the preset and those of the parameters `given` that the notebook has}.

    A number is of the kind that the notebook's own value has: 5.0 is 5 where that is an integer. Raises ValueError
    naming the parameter if its value is invalid, and listing the parameters there are if no notebook has it.
    """
    import papermill

    known = {path: papermill.inspect_notebook(str(path)) for path in paths}
    if unused := [name for name in given if not any(name in names for names in known.values())]:
        there = sorted({name for names in known.values() for name in names})
        raise ValueError(f"no notebook has a parameter {', '.join(unused)}; there are {', '.join(there)}")
    given = {"preset": preset, **given}
    return {path: {name: _as_meant(name, value, known[path][name]["default"])
                   for name, value in given.items() if name in known[path]} for path in paths}  # fmt: skip


def _as_meant(name, value, default):
    """A parameter of the kind that the notebook's own value, written `default`, has: number, text, true or false."""
    kind = type(ast.literal_eval(default))
    if kind is int:
        return whole_seed(value) if name == "seed" else whole(name, value, 0)
    if kind is float:
        number(name, value)
    if kind is str and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r:.80}")
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return value


def paths_from_here(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters by name -> the same with absolute paths, relative ones from the current folder.

    The notebooks run in their own folder; the folder in "clotho:FOLDER", a known data set, is a path, too. Raises
    FileNotFoundError, naming the parameter, for a missing path or a pattern without a file; NotADirectoryError for a
    file where a notebook is to write a folder.
    """
    found = dict(given)
    for name in PATHS & given.keys():
        if value := str(given[name]):
            known_set, place = named_set(value)
            place = str(Path(place).expanduser().absolute())
            found[name] = f"{known_set}:{place}" if known_set else place
            if name in WRITTEN:
                check_folder(place)
            elif not Path(place).exists() and not glob(place):
                raise FileNotFoundError(f"{name} is {value}, and there is no {place}")
    return found


def execute_notebook(path: Path, parameters: dict[str, Any], out: Path) -> float:
    """Execute a notebook into out/NAME.ipynb -> seconds.

    Raises ValueError with the cell and its error, or if the kernel died.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(path),
            str(out / path.name),
            parameters,
            kernel_name="python3",
            cwd=str(path.parent),
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError as fault:
        raise ValueError(f"{path.stem} stopped at cell {fault.exec_count}, {fault.ename}: {fault.evalue}; "
                         f"see {out / path.name}") from fault  # fmt: skip
    except DeadKernelError as fault:
        message = f"{path.stem}: its kernel died, perhaps of too little memory; see {out / path.name}"
        raise ValueError(message) from fault
    return time.perf_counter() - start


def execute_notebooks(
    parameters: dict[Path, dict[str, Any]], out: Path, jobs: int = 1, on_done: Callable[[Path, float], None] = print
) -> None:
    """Execute {path: parameters} into the folder `out`, `jobs` at once, which share the cores.

    on_done(path, seconds) is called as each ends. Raises ValueError as `execute_notebook` does; no other starts then.
    """
    jobs = whole("jobs", jobs, 1)
    out.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        for path, given in parameters.items():
            on_done(path, execute_notebook(path, given, out))
        return
    threads, context = max(1, (os.cpu_count() or 1) // jobs), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _use_threads, (threads,)) as pool:
        begun = {pool.submit(execute_notebook, path, given, out): path for path, given in parameters.items()}
        try:
            for ended in as_completed(begun):
                on_done(begun[ended], ended.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _use_threads(count):
    """Set the number of threads of kernels started from this process."""
    os.environ["OMP_NUM_THREADS"] = str(count)
