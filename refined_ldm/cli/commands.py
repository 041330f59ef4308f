"""The commands of `refined-ldm`: generate, train, infer, … Heavy imports are inside the commands that need them."""

import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

from refined_ldm.cli import edit
from refined_ldm.cli.app import app
from refined_ldm.cli.arguments import parser
from refined_ldm.cli.checkpoints import convert, inspect
from refined_ldm.cli.data import data
from refined_ldm.cli.results import check_result, write_table
from refined_ldm.cli.sounds import open_model, optimized, progress, say_written, write_picture
from refined_ldm.cli.training import resume_command, train, with_conditioner

# Options of `evaluate` that mean nothing with --details, and their defaults
OF_FOLDERS = {
    "embedding": "aisfx",
    "captions": None,
    "tokenizer": None,
    "pca": 64,
    "sample_rate": None,
    "skip_bad": False,
}
NO_MEMORY = "out of memory|can't allocate memory|not enough memory"  # how torch says so


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (None: of the shell) -> exit status: 0; 2 with one line on stderr for bad usage or bad input."""
    options = parser(COMMANDS).parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show is no reason to fail after the work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError) as fault:
        print(f"refined-ldm {options.command}: {fault}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as fault:
        if not (isinstance(fault, MemoryError) or re.search(NO_MEMORY, str(fault))):
            raise
        remedy = "too little memory: ask for fewer or shorter sounds, or for smaller batches"
        print(f"refined-ldm {options.command}: {remedy}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as fault:
        package = (fault.name or "").partition(".")[0]
        if package == "refined_ldm":
            raise
        missing = f'{package} is not installed, which this needs: pip install "refined-audio-ldm[notebooks]"'
        print(f"refined-ldm {options.command}: {missing if package else fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        message = str(stop) or "stopped"
        if options.command == "train":
            message += f"; go on with: {resume_command(sys.argv[1:] if arguments is None else arguments)}"
        from refined_ldm.devices import is_main_process

        if is_main_process():  # of all that accelerate launched
            print(f"\nrefined-ldm {options.command}: {message}", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)


def generate(options: Namespace) -> None:
    """Write one WAV file for each caption."""
    from refined_ldm.audio import is_silent_waveform
    from refined_ldm.base.files import check_folder
    from refined_ldm.data.names import SoundFolder, caption_name
    from refined_ldm.devices import pick_device

    stems = [f"{caption_name(caption.lower())}-{options.seed}" for caption in options.captions]
    check_folder(options.out, [f"{stem}.wav" for stem in stems])
    if options.picture:
        from refined_ldm.display import plot_mels
    device = pick_device(options.device)
    model = optimized(open_model(options, device), options)
    start, written, notes = time.perf_counter(), [], []
    with progress(unit="step") as on_step:
        waveforms = model.generate(
            options.captions, options.seconds, options.steps, options.guidance, options.seed, options.negative,
            "student" if options.student else None, candidates=options.candidates, on_step=on_step,
            on_note=notes.append,
        ).cpu()  # fmt: skip
    sounds, silent = SoundFolder(options.out), is_silent_waveform(waveforms).tolist()
    notes += [f"the sound of {c!r:.60} is silent and was not written" for c in compress(options.captions, silent)]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for caption, stem, waveform, is_silent in zip(options.captions, stems, waveforms, silent, strict=True):
        if is_silent:
            continue
        path = sounds.add(stem, waveform, model.config.mel.sample_rate)
        written.append({"file": str(path), "caption": caption, "seed": options.seed,
                        "seconds": waveform.shape[-1] / model.config.mel.sample_rate})  # fmt: skip
    if options.picture:
        figure = plot_mels(model.mel(waveforms.to(device)).cpu(), options.captions, model.config.mel)
        write_picture(figure, options.out / "spectrograms.png")
    say_written(written, start, options.json, notes)


def infer(options: Namespace) -> None:
    """Write one WAV file for each line of a list of captions."""
    from tqdm import tqdm

    from refined_ldm.base.files import check_folder
    from refined_ldm.config import load_config
    from refined_ldm.data.names import SoundFolder
    from refined_ldm.devices import pick_device
    from refined_ldm.published import caption_list

    left_out = [] if options.skip_bad else None
    config, lines = load_config(options.config_yaml), caption_list.read_list(options.list_inference, left_out)
    for fault in left_out or ():
        print(f"left out: {fault}", file=sys.stderr)
    check_folder(options.out, [line.file for line in lines])
    device = pick_device(options.device)
    model = caption_list.open_model(with_conditioner(config, options), options.reload_from_ckpt, device)
    model = optimized(model, options)
    folder = SoundFolder(options.out)
    start, written, rate = time.perf_counter(), [], model.config.mel.sample_rate
    made = caption_list.sounds(model, lines, options.seed, options.steps, options.guidance, options.candidates)
    try:
        for line, waveform in tqdm(made, total=len(lines), unit="sound", disable=None):
            path = folder.add(line.file.removesuffix(".wav"), waveform, rate)
            written.append({"file": str(path), "caption": line.caption, "seed": options.seed,
                            "seconds": len(waveform) / rate})  # fmt: skip
    finally:  # what is written stays, whatever happens to the rest
        if written:
            say_written(written, start, options.json)


def evaluate(options: Namespace) -> None:
    """Compare two folders of sounds, or check a model's details."""
    if options.details is not None:
        return _evaluate_details(options)
    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.folders import compare_folders

    if options.generated is None or options.reference is None:
        raise ValueError("give two folders, GENERATED and REFERENCE, or --details to measure a model")
    if options.out:
        check_result(options.out, b'{\n "generated": {')
    bars = {}

    def on_clips(stage, done, total):
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, disable=None)
        bars[stage].update(done - bars[stage].n)

    try:
        found = compare_folders(
            options.generated, options.reference, options.embedding, options.checkpoint, options.captions, options.pca,
            options.skip_bad, options.seed, options.sample_rate, options.tokenizer, pick_device(options.device),
            on_clips,
        )  # fmt: skip
    finally:
        for bar in bars.values():
            bar.close()
    if options.out:
        found.save(options.out)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found.table())


def _evaluate_details(options):
    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.detail_classifier import DetailClassifier
    from refined_ldm.evaluation.details import detail_table, select_scenes, show_table
    from refined_ldm.text_to_audio import RefinedAudioLDM

    if options.reference is not None:
        raise ValueError(f"--details measures one model: leave out {options.reference}, or --details to compare")
    if given := [name for name, default in OF_FOLDERS.items() if getattr(options, name) != default]:
        raise ValueError(f"--{given[0].replace('_', '-')} is about two folders: leave it out, or --details")
    if options.out:
        check_result(options.out, b"detail,sound,")
    classifier, device = DetailClassifier.load(options.checkpoint), pick_device(options.device)
    folder = options.generated
    model = RefinedAudioLDM.load(folder, device) if folder else RefinedAudioLDM.from_preset("tiny", device)
    with progress(desc="clips") as on_clips:
        scenes = select_scenes(options.details, seconds=model.config.seconds)
        rows = detail_table(classifier, model, scenes, options.seed, on_clips)
    if options.out:
        write_table(options.out, rows)
    print(json.dumps(rows, indent=1) if options.json else show_table(rows))


def budget(options: Namespace) -> None:
    """Print the error that each stage of a model adds."""
    from dataclasses import asdict, fields

    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.budget import WAYS, Cost, error_budget, read_recordings, table
    from refined_ldm.evaluation.embeddings.aisfx import Aisfx
    from refined_ldm.evaluation.pitch import Crepe

    if options.out:
        check_result(options.out, ",".join(field.name for field in fields(Cost)).encode())
    model = open_model(options, pick_device(options.device))
    recordings = read_recordings(options.recordings, model.config.seconds) if options.recordings else None
    embed, tracker = Aisfx.load(), None if options.recordings else Crepe.load()
    with tqdm(total=len(WAYS), unit="way", disable=None) as bar:
        costs = error_budget(
            model, embed, tracker, options.clips, options.seed, not options.no_whole, recordings,
            lambda way: bar.update(),
        )  # fmt: skip
    rows = [asdict(cost) for cost in costs]
    if options.out:
        write_table(options.out, rows)
    print(json.dumps(rows, indent=1) if options.json else table(costs))


def experiment(options: Namespace) -> None:
    """Train and measure the arms of the experiment, and collect their tables."""
    from tqdm import tqdm

    from refined_ldm.base.files import check_folder
    from refined_ldm.devices import pick_device
    from refined_ldm.experiment.arms import STORED, plan
    from refined_ldm.experiment.conditioners import prepare_conditioners
    from refined_ldm.experiment.protocol import open_experiment
    from refined_ldm.experiment.runs import run_arm
    from refined_ldm.experiment.statistics import collect

    o, runs = options, plan(options.iterations, options.seeds)
    as_stored = all(getattr(o, name) == STORED[name] for name in ("preset", "iterations", "clips"))
    out = o.out or (Path("figures/data/experiment") if as_stored else o.run_dir / "tables")
    if o.list:
        for run in runs:
            print(f"{run.name:40} {run.part:9} {'finished' if (out / f'{run.name}.json').is_file() else ''}")
        return
    if unknown := set(o.names) - {name for run in runs for name in (run.name, run.part)}:
        raise ValueError(f"no run {', '.join(sorted(unknown))}: --list prints those there are")
    runs = [run for run in runs if not o.names or {run.name, run.part} & set(o.names)]
    check_folder(o.run_dir)
    tables = (".json", ".csv", "-steps.csv", "-classes.csv", "-details.csv")
    check_folder(out, [f"{run.name}{ending}" for run in runs for ending in tables])
    collected = out.with_name(f"{out.name}.csv")
    check_result(collected, b"name,label,")
    files = (o.audioldm, o.laion, o.ms, o.tokenizer)
    shared = open_experiment(o.run_dir, o.preset, o.clips, *files, pick_device(o.device))
    prepare_conditioners(shared, runs)
    for run in runs:
        with tqdm(total=run.iterations, desc=run.name, disable=None) as bar:
            record = run_arm(shared, run, out, True, run.part != "rates", lambda step, bar=bar: bar.update())
        print(
            f"{run.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)), flush=True
        )
    write_table(collected, collect(out).to_dict("records"))


def verify(options: Namespace) -> None:
    """Recompute the claimed numbers; ValueError naming those that differ."""
    from dataclasses import asdict

    from refined_ldm.experiment.ledger import verify as check

    def report(claim, numbers):
        if not options.json:
            print(
                f"{'FAULT' if any(n.fault for n in numbers) else claim['verdict']:20} {claim['id']}: "
                f"{' '.join(claim['found'].split())}"
            )

    checked = check(options.ledger, on_claim=report)
    if options.json:
        print(json.dumps([asdict(number) for number in checked], indent=1))
    if faults := [f"{c.claim}: {c.written} {c.fault}" for c in checked if c.fault]:
        raise ValueError("; ".join(faults))
    if not options.json:
        print(f"{len(checked)} values with their intervals computed again, all as they are written")


def notebooks(options: Namespace) -> None:
    """Execute the notebooks with papermill."""
    from refined_ldm.base.files import check_folder
    from refined_ldm.cli.notebooks import (
        NOTEBOOKS,
        PATHS,
        execute_notebooks,
        find_notebooks,
        parameters_for,
        paths_from_here,
    )  # fmt: skip
    from refined_ldm.config import preset

    given = {name: value if name in PATHS else _literal(value) for name, value in options.p}
    wanted = parameters_for(find_notebooks(options.names), options.preset, paths_from_here(given))
    preset(given.get("preset", options.preset))  # an unknown one is refused before anything runs
    if options.out.resolve() == NOTEBOOKS.resolve():
        raise FileExistsError(f"{options.out} holds the notebooks themselves: give another --out for the executed ones")
    check_folder(options.out, [path.name for path in wanted])
    if replaced := [path.name for path in wanted if (options.out / path.name).is_file()]:
        print(f"{', '.join(replaced)} in {options.out} will be replaced", file=sys.stderr)

    def say(path, seconds):
        print(f"{path.stem}: {seconds:.0f} s -> {options.out / path.name}", flush=True)

    execute_notebooks(wanted, options.out, options.jobs, say)


def _literal(text):
    """A parameter as JSON would read it, else as the string it is: 3 -> 3, true and True -> True, rain -> "rain"."""
    try:
        return {"True": True, "False": False}[text] if text in ("True", "False") else json.loads(text)
    except ValueError:
        return text


COMMANDS = {
    run.__name__: run
    for run in (generate, *edit.COMMANDS, app, data, train, inspect, convert, infer, evaluate, budget, experiment,
                verify, notebooks)
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
