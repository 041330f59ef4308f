"""Steps of every command that makes sounds: open the model, optimize it, say which files were written."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from refined_ldm.text_to_audio import RefinedAudioLDM


def open_model(options: Namespace, device: "torch.device") -> "RefinedAudioLDM":
    """The model that --checkpoint or --preset names, with the LoRAs of --lora merged, and the student of --student."""
    from refined_ldm.adapters.lora import read_lora
    from refined_ldm.adapters.student import read_student
    from refined_ldm.config import preset
    from refined_ldm.model_folder import shipped_folder
    from refined_ldm.text_to_audio import RefinedAudioLDM

    loras, student = getattr(options, "lora", ()), getattr(options, "student", None)
    if loras and student is True:
        raise ValueError("the model's own student was taught without LoRAs: leave out --lora or --student")
    for path, _ in loras:  # what these files are is seen before the model is loaded
        read_lora(path)
    if isinstance(student, Path):
        read_student(student)
    if options.checkpoint:
        return _with_files(RefinedAudioLDM.load(options.checkpoint, device), options)
    preset(options.preset)  # an unknown one is refused before anything is said of its weights
    if not shipped_folder(options.preset):
        print(
            f"the preset {options.preset} has random weights, so what it makes is noise: train it (refined-ldm train "
            f"--preset {options.preset}) and give the run as --checkpoint",
            file=sys.stderr,
        )
    return _with_files(RefinedAudioLDM.from_preset(options.preset, device), options)


def _with_files(model, options):
    if loras := getattr(options, "lora", ()):
        for path, weight in loras:
            model.load_lora(path, weight)
        model.merge_loras()
    if isinstance(file := getattr(options, "student", None), Path):
        model.load_student(file)
    return model


def optimized(model: "RefinedAudioLDM", options: Namespace) -> "RefinedAudioLDM":
    """The model in the precision that was asked for, optimized for its device."""
    from refined_ldm.inference import optimize_for_inference

    optimize_for_inference(model, {"auto": None, "bf16": "bf16", "fp16": "fp16", "fp32": "no"}[options.precision])
    return model


@contextmanager
def progress(**bar: Any) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal, and yield a function of (done, total) that moves it; bar: as for tqdm."""
    from tqdm import tqdm

    with tqdm(disable=None, **bar) as shown:

        def on_progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield on_progress


def say_written(written: list[dict], start: float, as_json: bool, notes: Sequence[str] = ()) -> None:
    """Print the files that were written since `start`, or a report of them as JSON."""
    if as_json:
        report = {"written": written, "took": round(time.perf_counter() - start, 2)}
        print(json.dumps(report | {"notes": list(notes)} if notes else report))
    else:
        print("\n".join(w["file"] for w in written))


def write_picture(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG to `path`, numbered if there is a file already -> its path."""
    from refined_ldm.base.files import atomic_write

    free, number = path, 1
    while True:
        try:
            with atomic_write(free, replace=False) as temporary:
                figure.savefig(temporary, dpi=110, format="png")
            return free
        except (FileExistsError, IsADirectoryError):  # perhaps another process has just written it
            number += 1
            free = path.with_stem(f"{path.stem}-{number}")
