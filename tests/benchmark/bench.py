"""How long the parts take on this machine, and how much memory: `make bench`.

Every row is measured here and now, stands beside its goal, and says by which command; nothing is remembered.
"""

import ctypes
import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path


def bench(notebooks=False, on_row=print):
    """Measure each row and give it to on_row -> list of dicts: work, measured, unit, goal, met (True or False)."""
    rows = []

    def row(work, measured, unit, goal, at_least=False):
        met = measured >= goal if at_least else measured <= goal
        rows.append({"work": work, "measured": round(measured, 3), "unit": unit, "goal": goal, "met": bool(met)})
        goal = f"{'>=' if at_least else '<='} {goal:g}"
        on_row(f"{work:<58}{measured:9.2f} {unit:<9} {goal}{'' if met else '   not met'}")

    row("import refined_ldm, a whole process less an empty one", _import_seconds(), "s", 0.3)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "refined_ldm", "generate", "a dog barks", "--out", folder]
        seconds, memory = _process(command)
        with _busy_neighbour():
            beside, _ = _process(command)
    row("refined-ldm generate, one 2.56 s clip, a whole process", seconds, "s", 15)
    row("its peak memory", memory, "GB", 4)
    row("beside one busy process, times as long", beside / seconds, "x", 2)

    import torch
    from torch.utils.data import Subset

    from refined_ldm.data.caches import cache_clips, render_workers
    from refined_ldm.scenes.dataset import SoundScenes
    from refined_ldm.text_to_audio import RefinedAudioLDM

    model = RefinedAudioLDM.from_preset("tiny")
    model.generate(["a dog barks"], seconds=2.56)
    row("the same in a warm process", best_of(lambda: model.generate(["a dog barks"], seconds=2.56)), "s", 2)
    alone = rows[-1]["measured"]
    with _busy_neighbour():
        beside = best_of(lambda: model.generate(["a dog barks"], seconds=2.56))
    row("the same beside one busy process, times as long", beside / alone, "x", 2)
    row("one thread, as shipped, times as long as spinning threads", _clip_seconds() / _clip_seconds(True), "x", 1.05)
    row("eight captions in a warm process, seconds each", best_of(lambda: model.generate(["rain"] * 8)) / 8, "s", 2)

    scenes = SoundScenes("train", size=10**6)
    list(map(scenes.__getitem__, range(20)))  # notes of the SoundFont are kept once rendered
    one = 200 / best_of(lambda: list(map(scenes.__getitem__, range(1000, 1200))), 1)
    row("rendering scenes of 2.56 s", one, "a second", 40, at_least=True)
    cores = render_workers(2000)
    if cores > 1:
        with tempfile.TemporaryDirectory() as folder:
            many = Subset(scenes, range(2000, 2000 + 400 * cores))
            all_at_once = len(many) / best_of(lambda: cache_clips(f"{folder}/clips", many, {}), 1)
        row(f"the same on {cores} cores, cached, times as many", all_at_once / one, "x", 0.7 * cores, at_least=True)

    if notebooks:
        from refined_ldm.cli.notebooks import find_notebooks

        total = 0.0
        for path in find_notebooks():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "refined_ldm", "notebooks", path.stem, "--out", folder]
                seconds, memory = _process(command)
            total += seconds
            row(f"notebook {path.stem}", seconds, "s", 120)
            row("its peak memory", memory, "GB", 4)
        row("all notebooks", total, "s", 600)
    on_row(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python "
           f"{platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    return rows


@contextmanager
def _busy_neighbour():
    """One other process that computes all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


def measure_more(peers=True, sizes=False, accuracy=False, few_steps=0, quality=0, out=None, on_row=print):
    """What takes minutes -> rows; with `out`, tables to out/data and pictures to out.

    peers: the same work by other people's code; sizes: cost against size; accuracy: what quick arithmetic and few
    steps change; few_steps: how many clips of each sampler are measured, 0 for none; quality: how many captions name
    each detail, 0 for none.
    """
    rows = []

    def keep(name, found, draw=None):
        rows.extend(found)
        if out is not None:
            from refined_ldm.display import save_figure, save_table

            if draw is None:
                save_table(found, name, Path(out).absolute())
            else:
                save_figure(draw(found), name, found, {}, start, Path(out).absolute())

    start = time.perf_counter()
    if peers:
        from tests.benchmark.against_peers import against_peers
        from tests.benchmark.figures import ratio_dots

        keep("bench", against_peers(on_row), ratio_dots)
    if sizes:
        from tests.benchmark.figures import cost_curves
        from tests.benchmark.sizes import cost_against_size

        keep("bench_sizes", cost_against_size(on_row), cost_curves)
    if accuracy:
        from tests.benchmark.accuracy import measure_accuracy, measure_deep_cache

        keep("bench_accuracy", measure_accuracy(on_row))
        keep("bench_deep_cache", measure_deep_cache(on_row))
    if few_steps:
        from tests.benchmark.accuracy import measure_few_steps

        keep("bench_few_steps", measure_few_steps(on_row, few_steps))
    if quality:
        from tests.benchmark.figures import quality_dots
        from tests.benchmark.quality import measure_quality

        keep("bench_quality", measure_quality(on_row, quality), quality_dots)
    return rows


def _import_seconds():
    def process(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    bare = min(process("pass") for _ in range(3))
    return max(0.0, min(process("import refined_ldm") for _ in range(3)) - bare)


def _clip_seconds(spinning=False):
    """The least seconds for a clip in a warm process of its own, as shipped or with all threads, which spin."""
    code = """
import sys, refined_ldm
from refined_ldm import devices
from tests.benchmark.bench import best_of
if sys.argv[1:]:
    devices.SMALL = 0
model = refined_ldm.RefinedAudioLDM.from_preset("tiny")
model.generate(["a dog barks"])
print(best_of(lambda: model.generate(["a dog barks"])))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    if spinning:
        command, environment = [*command, "spinning"], environment | {"OMP_WAIT_POLICY": "ACTIVE"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _process(command):
    """Run a command to its end -> (seconds, peak memory of its largest process in GB)."""
    measured = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", measured, *command], check=True, capture_output=True, text=True)
    per_gb = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss counts bytes on macOS, KiB on Linux
    return time.perf_counter() - start, int(done.stdout) / per_gb


def best_of(work, runs=3):
    """The least seconds of some runs: whatever disturbs a run only lengthens it."""
    return min(_seconds(work) for _ in range(runs))


def in_turn(works, rounds=2):
    """{name: call} -> {name: the least seconds}: once to warm up, then in turn, what takes long just once."""
    best = {name: _seconds(work) for name, work in works.items()}
    for _ in range(1 if sum(best.values()) > 32 else rounds):
        best = {name: min(best[name], _seconds(work)) for name, work in works.items()}
    return best


def peak_memory(work):
    """GB that a call takes at its peak on top of what the process held before; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():  # Linux has it
        return None
    gc.collect()
    if (library := find_library("c")) and hasattr(ctypes.CDLL(library), "malloc_trim"):
        ctypes.CDLL(library).malloc_trim(0)  # what was freed goes back, else the call would find it for nothing
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return round((_status("VmHWM") - before) / 2**20, 3)


def _status(name):
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
