"""The commands of `refined-ldm`: generate, train, infer, … Heavy imports are inside the commands that need them."""

import json
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from itertools import compress
from pathlib import Path

from refined_ldm.cli.arguments import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (None: of the shell) -> exit status: 0; 2 with one line on stderr for bad usage or bad input."""
    options = parser(COMMANDS).parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError) as fault:
        print(f"refined-ldm {options.command}: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        message = str(stop) or "stopped"
        if options.command == "train":
            message += f"; go on with: {_resuming(sys.argv[1:] if arguments is None else arguments)}"
        from refined_ldm.devices import is_main_process

        if is_main_process():  # of all that accelerate launched
            print(f"\nrefined-ldm {options.command}: {message}", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)


def _resuming(arguments):
    """The command that resumes a training."""
    return shlex.join(["refined-ldm", *map(str, arguments), *([] if "--resume" in arguments else ["--resume"])])


def generate(options: Namespace) -> None:
    """Write one WAV file for each caption."""
    from tqdm import tqdm

    from refined_ldm.audio import is_silent_waveform
    from refined_ldm.data.names import SoundFolder, caption_name
    from refined_ldm.devices import pick_device
    from refined_ldm.files import atomic_write, check_folder

    stems = [f"{caption_name(caption.lower())}-{options.seed}" for caption in options.captions]
    check_folder(options.out, [f"{stem}.wav" for stem in stems])
    device = pick_device(options.device)
    model = _quick(_open(options, device), options)
    start, written, notes = time.perf_counter(), [], []
    with tqdm(total=options.steps or model.config.steps, unit="step", disable=None) as bar:
        waveforms = model.generate(
            options.captions,
            options.seconds,
            options.steps,
            options.guidance,
            options.seed,
            options.negative,
            candidates=options.candidates,
            on_step=lambda *_: bar.update(),
            on_note=notes.append,
        ).cpu()
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
        from refined_ldm.display import plot_mels

        figure = plot_mels(model.mel(waveforms.to(device)).cpu(), options.captions, model.config.mel)
        with atomic_write(_free(options.out / "spectrograms.png")) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    _say_written(written, start, options.json, notes)


def _open(options, device):
    """The model that --checkpoint or --preset names."""
    from refined_ldm.config import preset
    from refined_ldm.text_to_audio import RefinedAudioLDM, is_shipped

    if options.checkpoint:
        return RefinedAudioLDM.load(options.checkpoint, device)
    preset(options.preset)  # an unknown one is refused before anything is said of its weights
    if not is_shipped(options.preset):
        print(
            f"the preset {options.preset} has random weights, so what it makes is noise: train it (refined-ldm train "
            f"--preset {options.preset}) and give the run as --checkpoint",
            file=sys.stderr,
        )
    return RefinedAudioLDM.from_preset(options.preset, device)


def _quick(model, options):
    """The model in the precision that was asked for, optimized for its device."""
    from refined_ldm.inference import optimize_for_inference

    optimize_for_inference(model, {"auto": None, "bf16": "bf16", "fp16": "fp16", "fp32": "no"}[options.precision])
    return model


def _say_written(written, start, as_json, notes=()):
    """Print the files that were written since `start`, or a report of them as JSON."""
    if as_json:
        report = {"written": written, "took": round(time.perf_counter() - start, 2)}
        print(json.dumps(report | {"notes": list(notes)} if notes else report))
    else:
        print("\n".join(w["file"] for w in written))


def _check_result(path, begins):
    """Raise OSError if a result cannot be written to `path`, or if another kind of file is there.

    begins: the bytes that results begin with. Prints that an earlier one will be replaced.
    """
    from refined_ldm.files import check_file

    check_file(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(begins)) != begins:
                raise FileExistsError(f"{path} is there already and no result of this command: give another --out")
        print(f"{path} will be replaced by the new result", file=sys.stderr)


def _free(path):
    """A path, numbered if there is a file already."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def train(options: Namespace) -> None:
    """Train the stages of a configuration in a run folder."""
    from refined_ldm.durable.signals import defer_signals

    with defer_signals() as signals:  # until there is something to save, or until it is saved
        _train(options, signals)


def _train(options, signals):
    from dataclasses import replace

    from tqdm import tqdm

    from refined_ldm.config import load_config, preset
    from refined_ldm.devices import pick_device
    from refined_ldm.durable.csv_log import CsvLogger
    from refined_ldm.durable.signals import Stopped
    from refined_ldm.text_to_audio import RefinedAudioLDM
    from refined_ldm.training.pipeline import (
        LEFT_OUT,
        STAGES,
        accelerator_of,
        check_files,
        check_run,
        default_stages,
        train_stage,
    )
    from refined_ldm.training.stages import stage_settings

    config = load_config(options.config) if options.config else preset(options.preset)
    if options.data:
        config = replace(config, data=options.data, data_sets=())
    if options.conditioner:
        config = replace(config, clap=options.conditioner)
    config = _with_conditioner(config, options)
    if options.reload_from_ckpt:
        config = replace(config, start_from=options.reload_from_ckpt)
    wanted = options.stage or default_stages(config)
    run_dir = options.run_dir or Path("runs") / config.name
    unknown = set(wanted) - set(STAGES)
    if unknown:
        raise ValueError(f"no stage {', '.join(sorted(unknown))}: choose from {', '.join(STAGES)}")
    check_files(config, wanted, run_dir, options.resume)
    for stage in wanted:
        stage_settings(config, stage, options.max_steps, options.lr)
    if os.environ.get("RANK", "0") == "0":  # of the processes that accelerate launched, one writes to the folder
        check_run(config, wanted, run_dir, options.resume)
        run_dir.mkdir(parents=True, exist_ok=True)  # from now on --resume finds it
    device = pick_device(options.device)
    accelerator = accelerator_of(Path(run_dir) / "checkpoints", device, options.resume)
    if accelerator.num_processes > 1:
        device = accelerator.device  # this process's own
    model = RefinedAudioLDM(config, options.seed).to(device)

    def stop_if_asked(message):
        if signals:
            raise Stopped(signals[0], message)

    hidden = None if accelerator.is_main_process else True  # progress bars: None shows them on a terminal

    for stage in [s for s in STAGES if s in wanted]:
        settings = config.training[stage]
        bar, clips = (
            tqdm(total=options.max_steps or settings.max_steps, desc=stage, disable=hidden),
            tqdm(desc="clips", disable=hidden),
        )

        def on_clips(done, total, stage=stage, clips=clips):
            stop_if_asked(f"stopped before the first step of {stage}")
            clips.total = total
            clips.update(done - clips.n)

        with bar, clips, CsvLogger(run_dir / f"{stage}.csv", options.resume) as write:
            steps = train_stage(
                model,
                stage,
                run_dir,
                options.seed,
                options.resume,
                options.max_steps,
                options.lr,
                not options.no_discriminators,
                on_clips,
                options.skip_bad,
            )
            step, waited, spent = None, 0.0, 0.0
            with closing(steps):
                for step in steps:
                    waited, spent = waited + step.waited, spent + step.seconds
                    bar.update(step.index - bar.n)
                    bar.set_postfix(loss=f"{step.loss:.4f}")
                    if accelerator.is_main_process:
                        write(step)
        stop_if_asked(f"stopped after {stage}, which is finished")
        if accelerator.is_main_process:
            summary = "it was finished before"
            if step:
                summary = f"{step.index} steps, loss {step.loss:.4f}, {waited / spent:.0%} of the time waiting for data"
            print(f"{stage}: {summary}, written to {run_dir}")
    if accelerator.is_main_process and (run_dir / LEFT_OUT).is_file():
        left_out = len((run_dir / LEFT_OUT).read_text(encoding="utf-8").splitlines())
        print(f"{left_out} recordings or rows were left out: {run_dir / LEFT_OUT} says which and why")


def inspect(options: Namespace) -> None:
    """Print what a checkpoint, pipeline or run holds; ValueError if a file asks to run something."""
    from dataclasses import asdict

    from refined_ldm.published.checkpoints import inspect_checkpoint

    found = inspect_checkpoint(options.checkpoint)
    if options.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        for file in (found, *found.files):
            print("\n".join(_lines(file)), end="\n\n" if found.files else "\n")
    refused = [file for file in (found, *found.files) if file.forbidden]
    if refused:
        raise ValueError("; ".join(f"{f.path} was refused: it asks to run {', '.join(f.forbidden)}" for f in refused))


def _lines(file):
    """What was found in a file, as lines of a table."""
    yield f"{file.path}: {file.kind}, {file.bytes / 1e6:,.1f} MB"
    if file.sha256:
        yield f"sha256 {file.sha256}" + (f", tensors under {file.wrapper!r}" if file.wrapper else "")
    width = max((len(group.prefix) for group in file.groups), default=0)
    for g in file.groups:
        yield (
            f"  {g.prefix:{width}} {g.tensors:6,} tensors {g.parameters:14,} numbers {g.bytes / 1e6:10,.1f} MB  "
            f"{', '.join(g.dtypes)}"
        )
    yield from (f"{what}: {call}" for what, call in (("Python", file.python), ("shell", file.command)) if call)


def convert(options: Namespace) -> None:
    """Write a published file as safetensors."""
    from refined_ldm.published.checkpoints import convert_checkpoint

    print(convert_checkpoint(options.checkpoint, options.out, options.force, options.tokenizer))


def _with_conditioner(config, options):
    """The configuration with the conditioner's file and vocabulary that were given, if any were."""
    from dataclasses import replace

    given = {"clap_checkpoint": options.clap_checkpoint, "tokenizer": options.tokenizer}
    return replace(config, **{setting: path for setting, path in given.items() if path})


def infer(options: Namespace) -> None:
    """Write one WAV file for each line of a list of captions."""
    from tqdm import tqdm

    from refined_ldm.config import load_config
    from refined_ldm.data.names import SoundFolder
    from refined_ldm.devices import pick_device
    from refined_ldm.files import check_folder
    from refined_ldm.published.caption_list import open_model, read_list, sounds

    left_out = [] if options.skip_bad else None
    config, lines = load_config(options.config_yaml), read_list(options.list_inference, left_out)
    for fault in left_out or ():
        print(f"left out: {fault}", file=sys.stderr)
    check_folder(options.out, [line.file for line in lines])
    model = open_model(_with_conditioner(config, options), options.reload_from_ckpt, pick_device(options.device))
    model = _quick(model, options)
    folder = SoundFolder(options.out)
    start, written, rate = time.perf_counter(), [], model.config.mel.sample_rate
    made = sounds(model, lines, options.seed, options.steps, options.guidance, options.candidates)
    try:
        for line, waveform in tqdm(made, total=len(lines), unit="sound", disable=None):
            path = folder.add(line.file.removesuffix(".wav"), waveform, rate)
            written.append({"file": str(path), "caption": line.caption, "seed": options.seed,
                            "seconds": len(waveform) / rate})  # fmt: skip
    finally:  # what is written stays, whatever happens to the rest
        if written:
            _say_written(written, start, options.json)


def evaluate(options: Namespace) -> None:
    """Compare two folders of sounds, or check a model's details."""
    if options.details is not None:
        return _evaluate_details(options)
    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.folders import compare_folders

    if options.generated is None or options.reference is None:
        raise ValueError("give two folders, GENERATED and REFERENCE, or --details to judge a model")
    if options.out:
        _check_result(options.out, b'{\n "generated": {')
    bars = {}

    def on_clips(stage, done, total):
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, disable=None)
        bars[stage].update(done - bars[stage].n)

    try:
        found = compare_folders(
            options.generated,
            options.reference,
            options.embedding,
            options.checkpoint,
            options.captions,
            options.pca,
            options.skip_bad,
            options.seed,
            options.sample_rate,
            options.tokenizer,
            pick_device(options.device),
            on_clips,
        )
    finally:
        for bar in bars.values():
            bar.close()
    if options.out:
        found.save(options.out)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found.table())


def _evaluate_details(options):
    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.details import DetailJudge, ask_details, detail_table, show_table
    from refined_ldm.text_to_audio import RefinedAudioLDM

    if options.details < 2:
        raise ValueError(f"--details must be 2 or more, got {options.details}: chance needs another caption")
    judge, device = DetailJudge.load(options.checkpoint), pick_device(options.device)
    folder = options.generated
    model = RefinedAudioLDM.load(folder, device) if folder else RefinedAudioLDM.from_preset("tiny", device)
    with tqdm(desc="clips", disable=None) as bar:

        def on_clips(done, total):
            bar.total = total
            bar.update(done - bar.n)

        asked = ask_details(options.details, seconds=model.config.seconds)
        rows = detail_table(judge, model, asked, options.seed, on_clips)
    if options.out:
        _write_table(options.out, rows)
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
        _check_result(options.out, ",".join(field.name for field in fields(Cost)).encode())
    model = _open(options, pick_device(options.device))
    recordings = read_recordings(options.recordings, model.config.seconds) if options.recordings else None
    judge, tracker = Aisfx.load(), None if options.recordings else Crepe.load()
    with tqdm(total=len(WAYS), unit="way", disable=None) as bar:
        costs = error_budget(
            model,
            judge,
            tracker,
            options.clips,
            options.seed,
            not options.no_whole,
            recordings,
            lambda way: bar.update(),
        )
    rows = [asdict(cost) for cost in costs]
    if options.out:
        _write_table(options.out, rows)
    print(json.dumps(rows, indent=1) if options.json else table(costs))


def _write_table(path, rows):
    """Rows as CSV, whole or not at all."""
    import csv

    from refined_ldm.files import atomic_write

    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def experiment(options: Namespace) -> None:
    """Train and measure the arms of the experiment, and collect their tables."""
    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.experiment.arms import STORED, plan
    from refined_ldm.experiment.conditioners import prepare_conditioners
    from refined_ldm.experiment.protocol import open_experiment
    from refined_ldm.experiment.runs import run_arm
    from refined_ldm.experiment.statistics import collect
    from refined_ldm.files import check_file, check_folder

    o, runs = options, plan(options.iterations, options.seeds)
    as_stored = all(getattr(o, name) == STORED[name] for name in ("preset", "iterations", "clips"))
    out = o.out or (Path("figures/data/experiment") if as_stored else o.run_dir / "tables")
    if o.list:
        for run in runs:
            print(f"{run.name:40} {run.part:9} {'finished' if (out / f'{run.name}.json').is_file() else ''}")
        return
    named = {run.name: run for run in runs}
    if unknown := set(o.names) - named.keys():
        raise ValueError(f"no run {', '.join(sorted(unknown))}: --list prints those there are")
    runs = [named[name] for name in o.names] or runs
    check_folder(o.run_dir)
    tables = (".json", ".csv", "-steps.csv", "-heard.csv")
    check_folder(out, [f"{run.name}{ending}" for run in runs for ending in tables])
    collected = out.with_name(f"{out.name}.csv")
    check_file(collected)
    files = (o.audioldm, o.laion, o.ms, o.tokenizer)
    shared = open_experiment(o.run_dir, o.preset, o.clips, *files, pick_device(o.device))
    prepare_conditioners(shared, runs)
    for run in runs:
        with tqdm(total=run.iterations, desc=run.name, disable=None) as bar:
            record = run_arm(shared, run, out, True, run.part != "rates", lambda step, bar=bar: bar.update())
        print(
            f"{run.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)), flush=True
        )
    _write_table(collected, collect(out).to_dict("records"))


def verify(options: Namespace) -> None:
    """Recompute the claimed numbers; ValueError naming those that differ."""
    from dataclasses import asdict

    from refined_ldm.experiment.ledger import verify as check

    def tell(claim, numbers):
        if not options.json:
            print(
                f"{'FAULT' if any(n.fault for n in numbers) else claim['status']:20} {claim['id']}: "
                f"{' '.join(claim['found'].split())}"
            )

    checked = check(options.ledger, on_claim=tell)
    if options.json:
        print(json.dumps([asdict(number) for number in checked], indent=1))
    if faults := [f"{c.claim}: {c.written} {c.fault}" for c in checked if c.fault]:
        raise ValueError("; ".join(faults))
    if not options.json:
        print(f"{len(checked)} numbers computed again, all as they are written")


def notebooks(options: Namespace) -> None:
    """Execute the notebooks with papermill."""
    from refined_ldm.cli.notebooks import (
        NOTEBOOKS,
        PATHS,
        execute_notebooks,
        find_notebooks,
        parameters_for,
        paths_from_here,
    )
    from refined_ldm.config import preset
    from refined_ldm.files import check_folder

    preset(options.preset)  # an unknown one is refused before anything runs
    given = {name: value if name in PATHS else _literal(value) for name, value in options.p}
    wanted = parameters_for(find_notebooks(options.names), options.preset, paths_from_here(given))
    if options.out.resolve() == NOTEBOOKS.resolve():
        raise FileExistsError(f"{options.out} holds the notebooks themselves: give another --out for the executed ones")
    check_folder(options.out, [path.name for path in wanted])
    if replaced := [path.name for path in wanted if (options.out / path.name).is_file()]:
        print(f"{', '.join(replaced)} in {options.out} will be replaced as they are executed anew", file=sys.stderr)

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
    for run in (generate, train, inspect, convert, infer, evaluate, budget, experiment, verify, notebooks)
}


if __name__ == "__main__":
    raise SystemExit(main())
