"""The command `train`: the stages of a configuration, with progress bars, a log of losses and a safe stop."""

import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from refined_ldm.cli.sounds import progress

if TYPE_CHECKING:
    from refined_ldm.config import Config


def train(options: Namespace) -> None:
    """Train the stages of a configuration in a run folder."""
    from refined_ldm.durable.signals import defer_signals

    with defer_signals() as signals:  # until there is something to save, or until it is saved
        if options.lora:
            _train_lora(options, signals)
        elif options.distill:
            _train_student(options, signals)
        elif options.matcher:
            _train_matcher(options, signals)
        elif options.refiner:
            _train_refiner(options, signals)
        else:
            _train(options, signals)


def _train(options, signals):
    from dataclasses import replace

    from tqdm import tqdm

    from refined_ldm.config import STAGES
    from refined_ldm.devices import pick_device
    from refined_ldm.durable.csv_log import CsvLogger
    from refined_ldm.durable.signals import Stopped
    from refined_ldm.text_to_audio import RefinedAudioLDM
    from refined_ldm.training.pipeline import accelerator_of, check_files, check_run, default_stages, train_stage
    from refined_ldm.training.stages import stage_settings

    if options.keep:
        raise ValueError("--keep goes with --lora")
    config = replace(_configuration(options), **_data_settings(options))
    if config.data == "scenes" and (config.data_split or config.file_column or config.caption_column):
        raise ValueError("--split, --file-column and --caption-column are about recordings: give them with --data")
    if options.conditioner:
        config = replace(config, clap=options.conditioner)
    config = with_conditioner(config, options)
    if options.reload_from_ckpt:
        config = replace(config, start_from=str(_shipped_folder(options.reload_from_ckpt)))
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
                model, stage, run_dir, options.seed, options.resume, options.max_steps, options.lr,
                not options.no_discriminators, on_clips, options.skip_bad,
            )  # fmt: skip
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
    if accelerator.is_main_process:
        _say_left_out(run_dir)


def _say_left_out(run_dir):
    """Print how many recordings a run left out, if any."""
    from refined_ldm.training.inputs import LEFT_OUT

    if (run_dir / LEFT_OUT).is_file():
        left_out = len((run_dir / LEFT_OUT).read_text(encoding="utf-8").splitlines())
        print(f"{left_out} recordings or rows were left out: {run_dir / LEFT_OUT} says which and why")


def _configuration(options):
    """The configuration of -c or --preset, else that of the model of ours that --from names, else tiny's."""
    from refined_ldm.config import load_config, preset
    from refined_ldm.published.warm_start import is_model

    if options.config:
        return load_config(options.config)
    if options.reload_from_ckpt and not options.preset:
        base = _shipped_folder(options.reload_from_ckpt)
        if is_model(base):
            return load_config(base / "config.yaml")
    return preset(options.preset or "tiny")


def _train_lora(options, signals):
    """Train a LoRA beside the U-Net of a trained model."""
    from dataclasses import replace

    from refined_ldm.adapters.lora import read_lora
    from refined_ldm.training.lora import LORA_FILE, LoraTraining, check_lora_run, train_lora

    if not options.data:
        raise ValueError("--lora learns from recordings: give their folder or table with --data")
    _refuse_with(options, "lora", "stage", "config", "conditioner")
    training = replace(LoraTraining(), **_given(options))

    def steps(model, run_dir, on_clips):
        kept = _kept_clips(options, model.config.seconds)
        return train_lora(
            model, run_dir, options.lora, training, options.seed, options.resume, on_clips, options.skip_bad, kept
        )

    if run_dir := _train_beside(options, signals, "lora", training.max_steps, check_lora_run, steps):
        print(_lora_summary(run_dir / LORA_FILE, read_lora(run_dir / LORA_FILE)[1]))
        _say_left_out(run_dir)


def _train_student(options, signals):
    """Distill a student of a trained model."""
    from dataclasses import replace

    from refined_ldm.adapters.student import STUDENT_FILE
    from refined_ldm.config import load_config, preset
    from refined_ldm.published.warm_start import is_model
    from refined_ldm.training.distillation import STAGE, check_student_run, distill_config, train_student

    _refuse_with(options, "distill", "stage", "conditioner", "keep")
    config = load_config(options.config) if options.config else preset(options.preset or "tiny")
    options.reload_from_ckpt = options.reload_from_ckpt or config.start_from
    if not options.data and not is_model(_base_path(options)):
        raise ValueError("--distill samples the captions of a data set: give it with --data")
    settings = replace(distill_config(config), **_given(options))

    def steps(model, run_dir, on_clips):
        with progress(desc="trajectories") as sampled:

            def on_trajectories(done, total):
                on_clips()
                sampled(done, total)

            yield from train_student(
                model, run_dir, settings, options.seed, options.resume, on_clips, on_trajectories, options.skip_bad
            )

    if run_dir := _train_beside(options, signals, STAGE, settings.max_steps, check_student_run, steps):
        print(f"distill: {settings.max_steps} steps, the student is in {run_dir / STUDENT_FILE}")
        _say_left_out(run_dir)


def _train_matcher(options, signals):
    """Train a matcher for a trained model."""
    from dataclasses import replace

    from refined_ldm.adapters.matcher import MATCHER_FILE
    from refined_ldm.training.matching import MATCHING, STAGE, check_matcher_run, train_matcher

    _refuse_with(options, "matcher", "stage", "config", "conditioner", "keep")
    settings = replace(MATCHING, **_given(options))

    def steps(model, run_dir, on_clips):
        return train_matcher(model, run_dir, settings, options.seed, options.resume, on_clips)

    if run_dir := _train_beside(options, signals, STAGE, settings.max_steps, check_matcher_run, steps):
        print(f"matcher: {settings.max_steps} steps, it is in {run_dir / MATCHER_FILE}")


def _train_refiner(options, signals):
    """Train a refiner for a trained model."""
    from dataclasses import replace

    from refined_ldm.adapters.refiner import REFINER_FILE
    from refined_ldm.training.refining import REFINING, STAGE, check_refiner_run, train_refiner

    _refuse_with(options, "refiner", "stage", "config", "conditioner", "keep")
    settings = replace(REFINING, **_given(options))

    def steps(model, run_dir, on_clips):
        return train_refiner(model, run_dir, settings, options.seed, options.resume, on_clips, options.skip_bad)

    if run_dir := _train_beside(options, signals, STAGE, settings.max_steps, check_refiner_run, steps):
        print(f"refiner: {settings.max_steps} steps, it is in {run_dir / REFINER_FILE}")
        _say_left_out(run_dir)


def _refuse_with(options, this, *others):
    """Raise ValueError if an option is given that does not go with the option `this`."""
    for name in others:
        if getattr(options, name):
            raise ValueError(f"--{name} does not go with --{this}, which changes the model of --from alone")


def _given(options):
    """The settings of a training that replace its own."""
    return {name: value for name in ("max_steps", "lr") if (value := getattr(options, name))}


def _train_beside(options, signals, name, max_steps, check, train):
    """Train what stands beside the U-Net of a trained model -> the folder of the run, None in all but one process.

    check(config, run_dir, resume) raises before any work; train(model, run_dir, on_clips) yields every Step.
    """
    from tqdm import tqdm

    from refined_ldm.devices import pick_device
    from refined_ldm.durable.csv_log import CsvLogger
    from refined_ldm.durable.signals import Stopped
    from refined_ldm.training.pipeline import accelerator_of

    run_dir = options.run_dir or Path("runs") / name
    device = pick_device(options.device)
    accelerator = accelerator_of(run_dir / "checkpoints", device, options.resume)
    model = _open_base(options, accelerator.device if accelerator.num_processes > 1 else device)
    main = accelerator.is_main_process
    if main:
        check(model.config, run_dir, options.resume)
        run_dir.mkdir(parents=True, exist_ok=True)  # from now on --resume finds it

    def stop_if_asked(*_):
        if signals:
            raise Stopped(signals[0], f"stopped before the first step of {name}")

    bar = tqdm(total=max_steps, desc=name, disable=None if main else True)
    with bar, CsvLogger(run_dir / f"{name}.csv", options.resume) as write:
        with closing(train(model, run_dir, stop_if_asked)) as steps:
            for step in steps:
                bar.update(step.index - bar.n)
                bar.set_postfix(loss=f"{step.loss:.4f}")
                if main:
                    write(step)
    return run_dir if main else None


def _lora_summary(file, metadata):
    """A line on a finished LoRA: its step, its clips and the held-out loss beside that of the model without it."""
    line = f"lora: step {metadata['step']} of {metadata['clips']} clips, "
    if metadata["held_out_loss"] is None:
        return f"{line}no clips held out (too few), written to {file}"
    before, after = metadata["held_out_loss_before"], metadata["held_out_loss"]
    note = "" if after < before else ": no better than the model without it"
    return f"{line}held-out loss {before:.4f} -> {after:.4f}{note}, written to {file}"


def _base_path(options):
    """The trained model that --from or --preset names: a folder, or a published file."""
    return _shipped_folder(options.reload_from_ckpt or options.preset or "tiny")


def _open_base(options, device):
    """The trained model that --from or --preset names, on the recordings of --data."""
    from refined_ldm.published.warm_start import is_model
    from refined_ldm.text_to_audio import RefinedAudioLDM

    changes, path = _data_settings(options), _base_path(options)
    if is_model(path):
        return RefinedAudioLDM.load(path, device, **changes)
    if not path.exists():
        raise ValueError(f"{path} is no preset with shipped weights, no run and no checkpoint: give one with --from")
    return RefinedAudioLDM.from_audioldm(
        path, clap_checkpoint=options.clap_checkpoint, tokenizer=options.tokenizer, device=device, **changes
    )


def _kept_clips(options, seconds):
    """The clips of --keep; by default the embedded scenes if the model was trained on them, else None."""
    from refined_ldm.config import load_config
    from refined_ldm.data.sources import is_there, open_recordings
    from refined_ldm.published.warm_start import is_model
    from refined_ldm.scenes.dataset import SoundScenes
    from refined_ldm.training.lora import KEPT

    path = _base_path(options)
    trained_on_scenes = is_model(path) and load_config(path / "config.yaml").data == "scenes"
    keep = options.keep or ("scenes" if trained_on_scenes else "none")
    if keep == "none":
        return None
    if keep == "scenes":
        return SoundScenes("train", KEPT, seconds)
    if not is_there(keep):
        raise FileNotFoundError(f"no recordings at {keep}: give --keep PATH, scenes or none")
    return open_recordings(keep, "", seconds, skip_bad=options.skip_bad)


def _data_settings(options):
    """The settings of a configuration that --data and its columns replace; all of them if --data is given."""
    given = {"data_split": options.split, "file_column": options.file_column, "caption_column": options.caption_column}
    if options.data:
        return {"data": options.data, "data_sets": (), **given}
    return {name: value for name, value in given.items() if value}


def _shipped_folder(name):
    """The folder of the shipped weights of a preset; any other name is a path."""
    from refined_ldm.model_folder import shipped_folder

    return Path(name) if Path(name).exists() else shipped_folder(name) or Path(name)


def resume_command(arguments: Sequence[str]) -> str:
    """Return the command that resumes a training."""
    return shlex.join(["refined-ldm", *map(str, arguments), *([] if "--resume" in arguments else ["--resume"])])


def with_conditioner(config: "Config", options: Namespace) -> "Config":
    """The configuration with the conditioner's file and vocabulary that were given, if any were."""
    from dataclasses import replace

    given = {"clap_checkpoint": options.clap_checkpoint, "tokenizer": options.tokenizer}
    return replace(config, **{setting: path for setting, path in given.items() if path})
