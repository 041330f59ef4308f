"""The same from a shell: `refined-ldm generate | train | infer | …`. Heavy imports wait for who needs them."""

import json
import re
import shlex
import sys
import time
from contextlib import closing
from pathlib import Path

from refined_ldm.cli.arguments import parser


def main(arguments=None):
    """Run one command -> exit status: 0, or 2 with one line on stderr for bad usage or bad input."""
    options = parser(COMMANDS).parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError) as fault:
        print(f"refined-ldm {options.command}: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        told = str(stop) or "stopped"
        if options.command == "train":
            told += f"; go on with: {_resuming(sys.argv[1:] if arguments is None else arguments)}"
        from refined_ldm.devices import is_main_process

        if is_main_process():  # of all that accelerate launched
            print(f"\nrefined-ldm {options.command}: {told}", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)


def _resuming(arguments):
    """The command that goes on with a training."""
    return shlex.join(["refined-ldm", *map(str, arguments), *([] if "--resume" in arguments else ["--resume"])])


def generate(options):
    from tqdm import tqdm

    from refined_ldm.audio import save_audio
    from refined_ldm.devices import pick_device

    device = pick_device(options.device)
    model = _quick(_open(options, device), options)
    options.out.mkdir(parents=True, exist_ok=True)
    start, written = time.perf_counter(), []
    with tqdm(total=options.steps or model.config.steps, unit="step", disable=None) as bar:
        waveforms = model.generate(
            options.captions, options.seconds, options.steps, options.guidance, options.seed, options.negative,
            candidates=options.candidates, on_step=lambda *_: bar.update(),
        ).cpu()  # fmt: skip
    for caption, waveform in zip(options.captions, waveforms, strict=True):
        path = _free_name(options.out, caption, options.seed, taken={w["file"] for w in written})
        save_audio(path, waveform, model.config.mel.sample_rate)
        written.append({"file": str(path), "caption": caption, "seed": options.seed,
                        "seconds": waveform.shape[-1] / model.config.mel.sample_rate})  # fmt: skip
    if options.picture:
        from refined_ldm.display import plot_mels

        figure = plot_mels(model.mel(waveforms.to(device)).cpu(), options.captions, model.config.mel)
        figure.savefig(options.out / "spectrograms.png", dpi=110)
    _say_written(written, start, options.json)


def _open(options, device):
    """The model that --checkpoint or --preset names."""
    from refined_ldm.text_to_audio import RefinedAudioLDM

    if options.checkpoint:
        return RefinedAudioLDM.load(options.checkpoint, device)
    return RefinedAudioLDM.from_preset(options.preset, device)


def _quick(model, options):
    """The model in the precision that was asked for, as quick as its device allows."""
    from refined_ldm.inference import optimize_for_inference

    optimize_for_inference(model, {"auto": None, "bf16": "bf16", "fp32": "no"}[options.precision])
    return model


def _say_written(written, start, as_json):
    """Print the files that were written since `start`, or all there is to say of them as JSON."""
    if as_json:
        print(json.dumps({"written": written, "took": round(time.perf_counter() - start, 2)}))
    else:
        print("\n".join(w["file"] for w in written))


def _free_name(folder, caption, seed, taken):
    """A file name a person can read: the caption's words and the seed; a caption given twice is numbered."""
    words = "-".join(re.findall(r"\w+", caption.lower()))[:60] or "untitled"
    path, number = folder / f"{words}-{seed}.wav", 2
    while str(path) in taken:
        path, number = folder / f"{words}-{seed}-{number}.wav", number + 1
    return path


def train(options):
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
    from refined_ldm.training.pipeline import LEFT_OUT, STAGES, accelerator_of, check_files, default_stages, train_stage

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
    device = pick_device(options.device)
    accelerator = accelerator_of(Path(run_dir) / "checkpoints", device.type, options.resume)
    if accelerator.num_processes > 1:
        device = accelerator.device  # this process's own
    model = RefinedAudioLDM(config, options.seed).to(device)

    def stop_if_asked(told):
        if signals:
            raise Stopped(signals[0], told)

    hidden = None if accelerator.is_main_process else True  # progress bars: None shows them on a terminal

    for stage in [s for s in STAGES if s in wanted]:
        settings = config.training[stage]
        bar, clips = tqdm(total=options.max_steps or settings.max_steps, desc=stage, disable=hidden), tqdm(
            desc="clips", disable=hidden)  # fmt: skip

        def on_clips(done, total, stage=stage, clips=clips):
            stop_if_asked(f"stopped before the first step of {stage}")
            clips.total = total
            clips.update(done - clips.n)

        with bar, clips, CsvLogger(run_dir / f"{stage}.csv", options.resume) as write:
            steps = train_stage(model, stage, run_dir, options.seed, options.resume, options.max_steps,
                                options.lr, not options.no_discriminators, on_clips, options.skip_bad)  # fmt: skip
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
            told = "it was finished before"
            if step:
                told = f"{step.index} steps, loss {step.loss:.4f}, {waited / spent:.0%} of the time waiting for data"
            print(f"{stage}: {told}, written to {run_dir}")
    if accelerator.is_main_process and (run_dir / LEFT_OUT).is_file():
        left_out = len((run_dir / LEFT_OUT).read_text(encoding="utf-8").splitlines())
        print(f"{left_out} recordings or rows were left out: {run_dir / LEFT_OUT} says which and why")


def inspect(options):
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
        yield (f"  {g.prefix:{width}} {g.tensors:6,} tensors {g.parameters:14,} numbers {g.bytes / 1e6:10,.1f} MB  "
               f"{', '.join(g.dtypes)}")  # fmt: skip
    yield from (f"{what}: {call}" for what, call in (("Python", file.python), ("shell", file.command)) if call)


def convert(options):
    from refined_ldm.published.checkpoints import convert_checkpoint

    print(convert_checkpoint(options.checkpoint, options.out, options.force, options.tokenizer))


def _with_conditioner(config, options):
    """The configuration with the conditioner's file and vocabulary that were given, if any were."""
    from dataclasses import replace

    given = {"clap_checkpoint": options.clap_checkpoint, "tokenizer": options.tokenizer}
    return replace(config, **{setting: path for setting, path in given.items() if path})


def infer(options):
    from tqdm import tqdm

    from refined_ldm.audio import save_audio
    from refined_ldm.config import load_config
    from refined_ldm.devices import pick_device
    from refined_ldm.published.caption_list import open_model, read_list, sounds

    left_out = [] if options.skip_bad else None
    config, lines = load_config(options.config_yaml), read_list(options.list_inference, left_out)
    for fault in left_out or ():
        print(f"left out: {fault}", file=sys.stderr)
    model = open_model(_with_conditioner(config, options), options.reload_from_ckpt, pick_device(options.device))
    model = _quick(model, options)
    options.out.mkdir(parents=True, exist_ok=True)
    start, written, rate = time.perf_counter(), [], model.config.mel.sample_rate
    made = sounds(model, lines, options.seed, options.steps, options.guidance, options.candidates)
    try:
        for line, waveform in tqdm(made, total=len(lines), unit="sound", disable=None):
            save_audio(options.out / line.file, waveform, rate)
            written.append({"file": str(options.out / line.file), "caption": line.caption, "seed": options.seed,
                            "seconds": len(waveform) / rate})  # fmt: skip
    finally:  # what is written stays, whatever happens to the rest
        if written:
            _say_written(written, start, options.json)


def evaluate(options):
    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.folders import compare_folders

    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour
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


def budget(options):
    from dataclasses import asdict

    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.evaluation.budget import WAYS, error_budget, read_recordings, table
    from refined_ldm.evaluation.embeddings.aisfx import Aisfx
    from refined_ldm.evaluation.pitch import Crepe

    if options.clips < 2:
        raise ValueError(f"--clips must be 2 or more, got {options.clips}: a distance between sets needs a set")
    model = _open(options, pick_device(options.device))
    recordings = read_recordings(options.recordings, model.config.seconds) if options.recordings else None
    judge, tracker = Aisfx.load(), None if options.recordings else Crepe.load()
    with tqdm(total=len(WAYS), unit="way", disable=None) as bar:
        costs = error_budget(model, judge, tracker, options.clips, options.seed, not options.no_whole, recordings,
                             lambda way: bar.update())  # fmt: skip
    told = [asdict(cost) for cost in costs]
    if options.out:
        _write_table(options.out, told)
    print(json.dumps(told, indent=1) if options.json else table(costs))


def _write_table(path, rows):
    """Rows as CSV, whole or not at all."""
    import csv

    from refined_ldm.files import atomic_write

    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def experiment(options):
    from tqdm import tqdm

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
    named = {run.name: run for run in runs}
    if unknown := set(o.names) - named.keys():
        raise ValueError(f"no run {', '.join(sorted(unknown))}: --list prints those there are")
    runs = [named[name] for name in o.names] or runs
    files = (o.audioldm, o.laion, o.ms, o.tokenizer)
    shared = open_experiment(o.run_dir, o.preset, o.clips, *files, pick_device(o.device))
    prepare_conditioners(shared, runs)
    for run in runs:
        with tqdm(total=run.iterations, desc=run.name, disable=None) as bar:
            record = run_arm(shared, run, out, True, run.part != "rates", lambda step, bar=bar: bar.update())
        print(
            f"{run.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)), flush=True
        )
    _write_table(out.with_suffix(".csv"), collect(out).to_dict("records"))


def verify(options):
    from dataclasses import asdict

    from refined_ldm.experiment.ledger import verify as check

    def tell(claim, numbers):
        if not options.json:
            print(f"{'FAULT' if any(n.fault for n in numbers) else claim['status']:20} {claim['id']}: "
                  f"{' '.join(claim['found'].split())}")  # fmt: skip

    checked = check(options.ledger, on_claim=tell)
    if options.json:
        print(json.dumps([asdict(number) for number in checked], indent=1))
    if faults := [f"{c.claim}: {c.written} {c.fault}" for c in checked if c.fault]:
        raise ValueError("; ".join(faults))
    if not options.json:
        print(f"{len(checked)} numbers computed again, all as they are written")


def notebooks(options):
    from refined_ldm.cli.notebooks import execute_notebooks, find_notebooks, parameters_for
    from refined_ldm.config import preset

    preset(options.preset)  # an unknown one is refused before anything runs
    given = {name: _literal(value) for name, value in options.p}
    wanted = parameters_for(find_notebooks(options.names), options.preset, given)

    def say(path, seconds):
        print(f"{path.stem}: {seconds:.0f} s -> {options.out / path.name}", flush=True)

    execute_notebooks(wanted, options.out, options.jobs, say)


def _literal(text):
    """A parameter as JSON would read it, else as the string it is: 3 -> 3, true -> True, rain -> "rain"."""
    try:
        return json.loads(text)
    except ValueError:
        return text


COMMANDS = {
    run.__name__: run
    for run in (generate, train, inspect, convert, infer, evaluate, budget, experiment, verify, notebooks)
}


if __name__ == "__main__":
    raise SystemExit(main())
