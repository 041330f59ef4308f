"""Execute the notebooks with papermill: those that are named, with other parameters, several at once."""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import refined_ldm

NOTEBOOKS = Path(refined_ldm.__file__).resolve().parent.parent / "notebooks"


def find_notebooks(names=()):
    """Paths of the notebooks called `names` ("05" or "05_results"), of all if there are none, in their order.

    Raises FileNotFoundError, saying which there are.
    """
    found = sorted(NOTEBOOKS.glob("0[1-9]_*.ipynb"))
    missing = [name for name in names if not any(name in (path.stem[:2], path.stem) for path in found)]
    if missing or not found:
        raise FileNotFoundError(f"no notebook {', '.join(missing) or '0N_*.ipynb'} in {NOTEBOOKS}; there are "
                                f"{', '.join(path.stem for path in found) or 'none'}")  # fmt: skip
    return [path for path in found if not names or path.stem[:2] in names or path.stem in names]


def parameters_for(paths, preset, given):
    """{path: the preset and those of the parameters `given` that the notebook has}.

    Raises ValueError, naming those there are, if no notebook has one of them.
    """
    import papermill

    known = {path: papermill.inspect_notebook(str(path)) for path in paths}
    if unused := [name for name in given if not any(name in names for names in known.values())]:
        there = sorted({name for names in known.values() for name in names})
        raise ValueError(f"no notebook has a parameter {', '.join(unused)}; there are {', '.join(there)}")
    given = {"preset": preset, **given}
    return {path: {name: value for name, value in given.items() if name in known[path]} for path in paths}


def execute_notebook(path, parameters, out):
    """Execute one into out/NAME.ipynb -> seconds. Raises ValueError with the cell and the error that stopped it."""
    import papermill

    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(path), str(out / path.name), parameters, kernel_name="python3", cwd=str(path.parent),
            progress_bar=sys.stderr.isatty(), extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as fault:
        raise ValueError(f"{path.stem} stopped at cell {fault.exec_count}, {fault.ename}: {fault.evalue}; "
                         f"see {out / path.name}") from fault  # fmt: skip
    return time.perf_counter() - start


def execute_notebooks(parameters, out, jobs=1, on_done=print):
    """Execute {path: parameters} into the folder `out`, `jobs` at once, which share the cores.

    on_done(path, seconds) is called as each ends. Raises ValueError as `execute_notebook` does; then no other begins.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
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
    """What kernels started from this process compute with."""
    os.environ["OMP_NUM_THREADS"] = str(count)
