"""The same from a shell: `refined-ldm generate | train | infer | …`. Heavy imports wait for who needs them."""

import argparse
import csv
import json
import re
import sys
import time
from pathlib import Path

EXAMPLES = {
    "generate": 'refined-ldm generate "rain falls while a bell rings" --out runs/first --seed 1',
    "train": "refined-ldm train --preset tiny --stage vae clap ldm hifigan --run runs/tiny",
    "inspect": "refined-ldm inspect audioldm-s-full-v2.ckpt",
    "convert": "refined-ldm convert audioldm-s-full-v2.ckpt runs/audioldm-s --tokenizer roberta-base",
    "infer": "refined-ldm infer --config_yaml audioldm_custom.yaml --list_inference captions.lst "
             "--reload_from_ckpt runs/audioldm_custom",
    "evaluate": "refined-ldm evaluate runs/infer recordings --captions captions.csv --embedding tiny-gpt2",
    "budget": "refined-ldm budget --clips 50 --recordings captions.csv",
    "notebooks": "refined-ldm notebooks --preset tiny -p steps 10",
    "bench": "refined-ldm bench --notebooks --json",
}
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def main(arguments=None):
    """Run one command -> exit status: 0, or 2 with one line on stderr for bad usage or bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError) as fault:
        print(f"refined-ldm {options.command}: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrefined-ldm {options.command}: stopped", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(prog="refined-ldm", description="Captions become sound, and how that is trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")
        sub.set_defaults(run=run)
        return sub

    sub = command("generate", generate, "Write one WAV file for each caption.")
    sub.add_argument("captions", nargs="+", metavar="CAPTION")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the WAV files")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--preset", default="tiny", help="tiny (shipped weights) or another preset (random weights)")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run folder with all parts trained")
    sub.add_argument("--steps", type=int, help="sampling steps of DPM-Solver++ (the preset's if not given)")
    sub.add_argument("--guidance", type=float, metavar="SCALE", help="1 is none; more follows the caption harder")
    sub.add_argument("--seconds", type=float, help="length of the sound (the preset's if not given)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--negative", default="", metavar="CAPTION", help="what to move away from")
    sub.add_argument("--candidates", type=int, metavar="K", help="draw K, keep the nearest to its caption")
    sub.add_argument("--picture", action="store_true", help="also write spectrograms.png")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")

    sub = command("train", train, "Train the stages of a preset or a YAML file; what is finished is kept in --run.")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("-c", "--config", "--config_yaml", type=Path, metavar="YAML",
                        help="ours, or a training configuration of AudioLDM as published")  # fmt: skip
    source.add_argument("--preset", default="tiny")
    sub.add_argument("--stage", nargs="+", metavar="STAGE",
                     help="vae clap ldm hifigan; if not given all in this order or, when the configuration names files "
                          "of trained parts, ldm (after vae, if no file holds one)")  # fmt: skip
    sub.add_argument("--run", type=Path, metavar="DIR", dest="run_dir",
                     help="folder of this run (runs/NAME, as the YAML file or the preset is called)")  # fmt: skip
    sub.add_argument("--data", metavar="PATH",
                     help="CSV file or folder of captioned recordings, AudioLDM's dataset_root.json, or WebDataset "
                          "shards: a folder of .tar files or a pattern")  # fmt: skip
    sub.add_argument("--skip-bad", action="store_true",
                     help="leave out recordings that cannot be used; the run's left-out.txt lists them")  # fmt: skip
    sub.add_argument("--clap-checkpoint", metavar="PATH", help="the published conditioner's file")
    sub.add_argument("--tokenizer", metavar="DIR", help="roberta-base's vocabulary, for LAION-CLAP's captions")
    sub.add_argument("--reload_from_ckpt", metavar="PATH", help="an AudioLDM checkpoint to start the U-Net from")
    sub.add_argument("--conditioner", metavar="NAME", help="another of CLAP_PRESETS than the configuration's")
    sub.add_argument("--max-steps", type=int, help="of each stage (the configuration's if not given)")
    sub.add_argument("--lr", type=float, help="learning rate of each stage (the configuration's if not given)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run")
    sub.add_argument("--no-adversary", action="store_true", help="hifigan: train on spectral distances alone")
    sub.add_argument("--device", default="auto")

    sub = command("inspect", inspect, "Show what a published file, a pipeline or a run holds, without running it.")
    sub.add_argument("checkpoint", type=Path, metavar="CKPT")
    sub.add_argument("--json", action="store_true", help="print what was found as JSON")

    sub = command("convert", convert, "Write a published file as safetensors that the other commands read.")
    sub.add_argument("checkpoint", type=Path, metavar="CKPT")
    sub.add_argument("out", type=Path, metavar="OUT", help="a folder for a whole AudioLDM, else a .safetensors file")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="roberta-base's vocabulary, to go beside LAION-CLAP")
    sub.add_argument("--force", action="store_true", help="replace what is there")

    sub = command("infer", infer, "Write one WAV file for each line of a list: `caption` or `filename|caption`.")
    sub.add_argument("-c", "--config_yaml", required=True, type=Path, metavar="YAML",
                     help="the configuration of the training, AudioLDM's or ours")  # fmt: skip
    sub.add_argument("-l", "--list_inference", required=True, type=Path, metavar="LIST", help="text in UTF-8")
    sub.add_argument("--reload_from_ckpt", required=True, type=Path, metavar="CKPT",
                     help="a published checkpoint, a run folder, or a step-… below its checkpoints/ldm")  # fmt: skip
    sub.add_argument("--out", type=Path, default=Path("runs/infer"), metavar="DIR", help="folder for the WAV files")
    sub.add_argument("--clap-checkpoint", metavar="PATH", help="the published conditioner's file")
    sub.add_argument("--tokenizer", metavar="DIR", help="roberta-base's vocabulary, for LAION-CLAP's captions")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, help="sampling steps of DPM-Solver++ (the configuration's if not given)")
    sub.add_argument("--guidance", type=float, metavar="SCALE", help="(the configuration's if not given)")
    sub.add_argument("--candidates", type=int, metavar="K", help="draw K, keep the nearest to its caption")
    sub.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be followed, and name them")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")

    sub = command("evaluate", evaluate, "Compare a folder of generated sounds with a folder of real ones.")
    sub.add_argument("generated", type=Path, metavar="GENERATED", help="sound files, here or in folders below")
    sub.add_argument("reference", type=Path, metavar="REFERENCE", help="what they should be like, best twice as many")
    sub.add_argument("--embedding", default="aisfx", help="aisfx, tiny-gpt2, ms-clap-2023, laion-clap, panns, vggish")
    sub.add_argument("--checkpoint", type=Path, metavar="PATH", help="the embedding's published file")
    sub.add_argument("--captions", type=Path, metavar="CSV", help="columns file and caption, named like GENERATED's")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="laion-clap: roberta-base's vocabulary")
    sub.add_argument("--pca", type=int, default=64, metavar="K", help="of Frechet distances: dimensions (64); 0: all")
    sub.add_argument("--sample-rate", type=int, metavar="HZ", help="read both at this rate (the embedding's)")
    sub.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")

    sub = command("budget", budget, "Measure what each stage costs: mel, VAE, vocoder and the whole model.")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--preset", default="tiny", help="tiny (shipped weights) or another preset (random weights)")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run folder with all parts trained")
    sub.add_argument("--clips", type=int, default=250, metavar="N", help="scenes of the split test (250)")
    sub.add_argument("--recordings", type=Path, metavar="PATH", help="in place of scenes: a CSV file or a folder")
    sub.add_argument("--no-whole", action="store_true", help="leave out generating from the captions")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as CSV")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")

    sub = command("notebooks", notebooks, "Execute the five notebooks with papermill into runs/notebooks.")
    sub.add_argument("names", nargs="*", metavar="NAME", help="01 … 05; all if not given")
    sub.add_argument("--preset", default="tiny")
    sub.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    sub.add_argument("--out", type=Path, default=Path("runs/notebooks"), metavar="DIR")

    sub = command("bench", bench, "Measure speed and memory on this machine.")
    sub.add_argument("--notebooks", action="store_true", help="the notebooks too (minutes)")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def generate(options):
    from tqdm import tqdm

    from refined_ldm.audio import save_audio
    from refined_ldm.devices import pick_device

    device = pick_device(options.device)
    model = _open(options, device)
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
    from dataclasses import replace

    from tqdm import tqdm

    from refined_ldm.config import load_config, preset
    from refined_ldm.devices import pick_device
    from refined_ldm.pipeline import LEFT_OUT, STAGES, check_files, default_stages, train_stage
    from refined_ldm.text_to_audio import RefinedAudioLDM

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
    model = RefinedAudioLDM(config, options.seed).to(pick_device(options.device))

    for stage in [s for s in STAGES if s in wanted]:
        settings = config.training[stage]
        bar, clips = tqdm(total=options.max_steps or settings.max_steps, desc=stage, disable=None), tqdm(
            desc="clips", disable=None)  # fmt: skip

        def on_clips(done, total, clips=clips):
            clips.total = total
            clips.update(done - clips.n)

        steps = train_stage(model, stage, run_dir, options.seed, options.resume, options.max_steps,
                            options.lr, not options.no_adversary, on_clips, options.skip_bad)  # fmt: skip
        with bar, _curve(run_dir / f"{stage}.csv", options.resume) as write:
            step = None
            for step in steps:
                bar.update(step.index - bar.n)
                bar.set_postfix(loss=f"{step.loss:.4f}")
                write(step)
        clips.close()
        told = f"{step.index} steps, loss {step.loss:.4f}" if step else "it was finished before"
        print(f"{stage}: {told}, written to {run_dir}")
    if (run_dir / LEFT_OUT).is_file():
        left_out = len((run_dir / LEFT_OUT).read_text(encoding="utf-8").splitlines())
        print(f"{left_out} recordings or rows were left out: {run_dir / LEFT_OUT} says which and why")


class _curve:
    """Append every step's figures to a CSV file; a resumed run goes on with the lines it had."""

    def __init__(self, path, resume):
        self.path, self.resume, self.file = path, resume, None

    def __enter__(self):
        return self.write

    def write(self, step):
        if self.file is None:  # not before the first step, lest a refused run empties the file of the one before
            kept = self._lines_before(step.index) if self.resume else []
            self.file = open(self.path, "w", newline="")
            self.file.writelines(kept)
            self.rows = csv.writer(self.file)
        if self.file.tell() == 0:
            self.rows.writerow(["step", "lr", "seconds", *step.losses])
        losses = (f"{value:.6g}" for value in step.losses.values())
        self.rows.writerow([step.index, f"{step.lr:.6g}", f"{step.seconds:.4f}", *losses])
        if step.index % 20 == 0:
            self.file.flush()

    def _lines_before(self, index):
        """The header and the lines of earlier steps: those after the checkpoint that is resumed are trained again."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        return lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) < index]

    def __exit__(self, *_):
        if self.file:
            self.file.close()


def inspect(options):
    from dataclasses import asdict

    from refined_ldm.checkpoints import inspect_checkpoint

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
    from refined_ldm.checkpoints import convert_checkpoint

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
    from refined_ldm.infer import open_model, read_list, sounds

    left_out = [] if options.skip_bad else None
    config, lines = load_config(options.config_yaml), read_list(options.list_inference, left_out)
    for fault in left_out or ():
        print(f"left out: {fault}", file=sys.stderr)
    model = open_model(_with_conditioner(config, options), options.reload_from_ckpt, pick_device(options.device))
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
    from refined_ldm.folders import compare_folders

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

    from refined_ldm.budget import WAYS, error_budget, read_recordings, table
    from refined_ldm.devices import pick_device
    from refined_ldm.judges import Aisfx
    from refined_ldm.pitch import Crepe

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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    temporary.replace(path)


def notebooks(options):
    import papermill

    from refined_ldm.config import preset

    preset(options.preset)  # an unknown one is refused before anything runs
    found = sorted(NOTEBOOKS.glob("0[1-9]_*.ipynb"))
    chosen = [p for p in found if not options.names or p.stem[:2] in options.names or p.stem in options.names]
    missing = [n for n in options.names if not any(p.stem[:2] == n or p.stem == n for p in found)]
    if missing or not chosen:
        raise FileNotFoundError(f"no notebook {', '.join(missing) or '0N_*.ipynb'} in {NOTEBOOKS}; there are "
                                f"{', '.join(p.stem for p in found) or 'none'}")  # fmt: skip
    parameters = {"preset": options.preset, **{name: _literal(value) for name, value in options.p}}
    options.out.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        start, known = time.perf_counter(), papermill.inspect_notebook(str(path))
        papermill.execute_notebook(
            str(path), str(options.out / path.name), {k: v for k, v in parameters.items() if k in known},
            kernel_name="python3", cwd=str(NOTEBOOKS), progress_bar=sys.stderr.isatty(),
        )  # fmt: skip
        print(f"{path.stem}: {time.perf_counter() - start:.0f} s -> {options.out / path.name}", flush=True)
    unused = [n for n, _ in options.p if all(n not in papermill.inspect_notebook(str(p)) for p in chosen)]
    if unused:
        raise ValueError(f"no notebook has a parameter {', '.join(unused)}")


def bench(options):
    from refined_ldm.bench import bench as measure

    rows = measure(options.notebooks, on_row=(lambda line: None) if options.json else print)
    if options.json:
        print(json.dumps(rows, indent=1))


def _literal(text):
    """A parameter as JSON would read it, else as the string it is: 3 -> 3, true -> True, rain -> "rain"."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    raise SystemExit(main())
