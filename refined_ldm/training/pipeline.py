"""From a configuration to trained weights: the stages in the order in which they depend on each other.

Clips are rendered or decoded once and train the VAE, the conditioner and the vocoder. The U-Net is trained on latents
and caption embeddings, which the first two compute once. A run writes everything into one folder; a finished stage is a
safetensors file there, which later stages load. A configuration may name published files for parts; a part that the run
has trained itself takes precedence.

Notebook: 03
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from refined_ldm.base.files import JUNK, check_folder, check_place
from refined_ldm.base.integers import whole_seed
from refined_ldm.config import MADE_BY, STAGES, Config, load_config
from refined_ldm.data.batches import loader
from refined_ldm.data.caches import HOLDS
from refined_ldm.data.sources import is_there
from refined_ldm.devices import feeding, pick_accelerator
from refined_ldm.discriminators import Discriminators
from refined_ldm.durable.run_state import (
    SCALE_FILE,
    has_whole_checkpoint,
    last_checkpoint,
    load_scale,
    precision_of,
    refuse_old,
)
from refined_ldm.model_folder import part_path
from refined_ldm.published.hub import CONDITIONERS, fetch
from refined_ldm.published.warm_start import find_named_files, is_model, keep_captions, load_named_parts, names_files
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.contrasts import train_audio_details, train_text_details
from refined_ldm.training.inputs import (
    LEFT_OUT,
    Resampled,
    cached_clips,
    encode_clips,
    fit_caption_map,
    measure_latents,
)
from refined_ldm.training.loop import Step
from refined_ldm.training.stages import stage_settings, train_clap, train_hifigan, train_ldm, train_vae
from refined_ldm.vae import PatchDiscriminator
from refined_ldm.weights import load_into, read_weights, save_weights

DETAILS = {"details-text": train_text_details, "details-audio": train_audio_details}  # of the conditioner, by tower
NEEDED = {  # parts, by stage
    "vae": {"vae"}, "clap": {"clap"}, **dict.fromkeys(DETAILS, {"clap"}), "ldm": {"vae", "clap", "ldm", "hifigan"},
    "hifigan": {"hifigan"},
}  # fmt: skip
FITTED = 2000  # captions on which the new input layer of a published U-Net is fitted
RUN = (  # names of the files in a run's folder
    r"config\.yaml|checkpoints|discriminators|tokenizer|(clips|latents|sounds|embeddings|trajectories|drawn)-.+|"
    r"left-out\.txt|(vae|clap|ldm|hifigan|distill|matcher|refiner)\.csv|.+\.safetensors"
)
# the discriminators of a stage, below the folder of a run
DISCRIMINATOR_FILES = {stage: f"discriminators/{stage}.safetensors" for stage in ("vae", "hifigan")}


def default_stages(config: Config) -> tuple[str, ...]:
    """Return the stages of a run by default: every stage or, if the configuration names files of parts, the U-Net.

    In the second case the VAE comes before it only if no file holds one.
    """
    if not names_files(config):
        return tuple(stage for stage in STAGES if stage not in DETAILS or config.data == "scenes")
    return ("ldm",) if config.vae_checkpoint or config.start_from else ("vae", "ldm")


def check_run(config: Config, stages: Sequence[str], run_dir: str | Path, resume: bool = False) -> None:
    """Check, before any work, that the stages can be trained in a run's folder.

    Raises OSError or ValueError where they would replace a finished part, could not be written, or are to go on
    (`resume`) in a folder without a run.
    """
    run_dir = Path(run_dir)
    parts = [part_path(run_dir, part, config).name for part in STAGES]
    check_folder(run_dir, [*parts, "config.yaml", LEFT_OUT, *(f"{stage}.csv" for stage in stages)])
    check_folder(run_dir / "discriminators", [Path(file).name for file in DISCRIMINATOR_FILES.values()])
    for cache in ("clips-train", "latents-train", "embeddings-train"):
        check_place(run_dir / cache, HOLDS)
    for stage in stages:
        check_folder(run_dir / "checkpoints" / stage)
    _refuse_lone_settings(run_dir)
    if resume:
        _refuse_no_run(run_dir)
    else:
        for stage in stages:
            refuse_old(run_dir / "checkpoints", stage)
            _refuse_finished(run_dir, stage, config)
    _refuse_other_settings(config, stages, run_dir)


def check_run_beside(
    stage: str, files: Sequence[str], config: Config, run_dir: str | Path, resume: bool = False
) -> None:
    """Check, before any work, the data and the folder of a run that trains what stands beside a model.

    files: those it writes at its end, the result first. Raises as `check_files` and `check_run`, and FileExistsError
    for a finished run or, without `resume`, one that was begun.
    """
    run_dir = Path(run_dir)
    check_files(config, (), run_dir)
    check_folder(run_dir, [*files, f"{stage}.csv"])
    check_run(config, (), run_dir, resume)
    if resume:
        return
    refuse_old(run_dir / "checkpoints", stage)
    if (run_dir / files[0]).is_file():
        raise FileExistsError(f"{run_dir / files[0]} is there already: give another --run, or move the file away")


def _refuse_no_run(run_dir):
    """Raise FileNotFoundError if a folder is missing or holds no file of a run; an empty folder is accepted."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else ["nothing"]
    if names and not any(re.fullmatch(f"{RUN}|{JUNK}", name) for name in names):
        raise FileNotFoundError(
            f"no run at {run_dir} that could go on: give its folder with --run, or begin one without --resume"
        )


def _refuse_lone_settings(run_dir):
    """Raise FileExistsError for a config.yaml without a run beside it, which that of a new run would replace."""
    names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    if "config.yaml" in names and not any(re.fullmatch(RUN, name) for name in names - {"config.yaml"}):
        raise FileExistsError(
            f"{run_dir / 'config.yaml'} is there already, and no run beside it: give another --run, or move it away"
        )


def _is_finished(run_dir, stage, config):
    """Return whether a run has finished a stage: its part exists and, for a detail stage, the file lists the stage."""
    path = part_path(run_dir, _part(stage), config)
    return path.is_file() and (stage not in DETAILS or stage in read_weights(path)[1].get("stages", ()))


def _part(stage):
    return "clap" if stage in DETAILS else stage


def _refuse_finished(run_dir, stage, config):
    if _is_finished(run_dir, stage, config):
        path = part_path(run_dir, _part(stage), config)
        by = f" by {stage}" if stage in DETAILS else ""
        raise FileExistsError(
            f"{path} is there already, finished{by}: give another --run, leave this stage out, or move the file away"
        )


def _refuse_other_settings(config, stages, run_dir):
    """Raise ValueError, naming the settings, if finished parts that are kept were trained with other settings."""
    settings = run_dir / "config.yaml"
    stay = [part for part in STAGES if part not in stages and part_path(run_dir, part, config).is_file()]
    if stay and settings.is_file():
        names = dict.fromkeys(name for part in stay for name in MADE_BY[part])
        if differences := config.differences(load_config(settings), names):
            raise ValueError(
                f"the settings are not those of the finished {', '.join(stay)} in {run_dir}: "
                f"{', '.join(differences)}; give another --run"
            )


def check_files(config: Config, stages: Sequence[str], run_dir: str | Path, resume: bool = False) -> None:
    """Check, before any work, that data, named files and the parts that a stage depends on exist.

    Raises FileNotFoundError for the first that is missing, ValueError for a stage that the data cannot train.
    """
    for stage in stages:
        _refuse_details(config, stage)
    if config.data != "scenes" and not is_there(config.data):
        raise FileNotFoundError(f"no recordings at {config.data} (in AudioLDM's YAML metadata_root): give --data PATH")
    for stage in stages:
        find_named_files(config, _missing_parts(config, stage, run_dir, resume))
    there = set(stages) | {part for part in STAGES if part_path(run_dir, part, config).is_file()}
    needs_vae = "ldm" in stages or "hifigan" in stages and config.training["hifigan"].vae_mels
    if needs_vae and "vae" not in there and not (config.vae_checkpoint or config.start_from):
        wanted = " ".join(["vae", *stages])
        raise FileNotFoundError(
            f"no weights at {part_path(run_dir, 'vae', config)} to learn from: train them before "
            f"(--stage {wanted}), or give the --run that has them"
        )
    if "ldm" in stages and "clap" not in there and not (config.clap_checkpoint or config.start_from):
        with _conditioner_needed():
            if config.clap not in CONDITIONERS:
                raise FileNotFoundError(f"no weights at {part_path(run_dir, 'clap', config)}")
            fetch(CONDITIONERS[config.clap])


def _refuse_details(config, stage):
    """Raise ValueError if a detail stage is to be trained on recordings."""
    if stage in DETAILS and config.data != "scenes":
        raise ValueError(
            f"{stage} is trained on the generated captions of data 'scenes' only, got {config.data}: leave it out"
        )


@contextmanager
def _conditioner_needed():
    """Add the remedy to the error for a missing conditioner."""
    try:
        yield
    except FileNotFoundError as fault:
        raise FileNotFoundError(
            "the U-Net needs a conditioner: name its file with --clap-checkpoint, or train one "
            f"before (--stage clap ldm); {fault}"
        ) from fault


def accelerator_of(checkpoints: str | Path, device: torch.device, resume: bool = False) -> Accelerator:
    """Return the Accelerator of a run; on a CPU, where the precision is measured, a resumed run keeps its precision.

    checkpoints: the folder of the run's checkpoints, with one folder for each stage.
    """
    kept = precision_of(checkpoints) if resume and device.type == "cpu" else None
    return pick_accelerator(device, kept)


def train_stage(
    model: RefinedAudioLDM,
    stage: str,
    run_dir: str | Path,
    seed: int = 0,
    resume: bool = False,
    max_steps: int | None = None,
    lr: float | None = None,
    adversarial: bool = True,
    on_clips: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
) -> Iterator[Step]:
    """Train one stage, yield every Step, and write the trained part of the model into run_dir.

    The conditioner has three stages: "clap", then one for the details of each tower (`contrasts`), on scenes only.
    Parts that the stage depends on or starts from come from run_dir, else from the files that the configuration names.
    With `resume`, a finished part without a checkpoint stays unchanged.

    on_clips: called with (clips done, clips in all) while the caches are filled.
    Raises ValueError for an unknown stage, FileNotFoundError for a missing file or if the U-Net is trained before VAE
    and conditioner, FileExistsError for a finished stage.

    Notebook: 03
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}: choose from {', '.join(STAGES)}")
    run_dir, config, seed = Path(run_dir), model.config, whole_seed(seed)
    settings = stage_settings(model.config, stage, max_steps, lr)  # refused before the clips are rendered
    _refuse_details(config, stage)
    _refuse_lone_settings(run_dir)
    if not resume:
        refuse_old(run_dir / "checkpoints", stage)
        _refuse_finished(run_dir, stage, config)
    elif _is_finished(run_dir, stage, config) and not has_whole_checkpoint(run_dir / "checkpoints", stage):
        return
    lacking = _missing_parts(config, stage, run_dir, resume)
    named = load_named_parts(model, lacking)
    if config.start_from and stage == "ldm" and "ldm" in lacking - named:
        warnings.warn(
            f"the U-Net of {config.start_from} was trained with another conditioner than {config.clap}: the layer "
            "that takes the caption embedding is new",
            stacklevel=2,
        )
    if stage == "ldm" or stage in DETAILS:
        _load_frozen_parts(model, NEEDED[stage] & {"vae", "clap"} - named, run_dir)
    accelerator = accelerator_of(Path(run_dir) / "checkpoints", model.device, resume)
    common = {
        "max_steps": max_steps,
        "lr": lr,
        "seed": seed,
        "run_dir": run_dir / "checkpoints",
        "resume": resume,
        "accelerator": accelerator,
    }
    discriminators = _discriminators(model, stage, settings, seed) if adversarial else None
    with accelerator.main_process_first():  # the other processes then find the caches
        clips = cached_clips(model.config, run_dir, on_clips=on_clips, skip_bad=skip_bad)
    if stage == "ldm":
        with accelerator.main_process_first():
            latents = encode_clips(model, clips, run_dir, on_clips)
            known = resume or not accelerator.is_main_process
            if not (known and load_scale(model, run_dir)):
                if "scale" not in named:
                    measure_latents(model, clips, latents)
                save_weights(run_dir / SCALE_FILE, _scale_state(model))
        if "ldm" in named and is_model(config.start_from):
            keep_captions(model, config.start_from, [item["caption"] for item in clips.rest[:FITTED]])
        if config.unet.caption_map and not resume and not model.unet.map_in.weight.any():
            fit_caption_map(model, latents)
        if accelerator.is_main_process:
            _save_parts(model, named, run_dir)
        yield from train_ldm(model, loader(latents, settings.batch_size, seed, **feeding(model.device)), **common)
    elif stage in DETAILS:
        shared = {name: common[name] for name in ("seed", "run_dir", "resume", "accelerator")}
        yield from DETAILS[stage](model.clap, clips, settings, **shared)
        model.clap.stages = (*model.clap.stages, stage)
    else:
        rates = config.mel.sample_rate, model.clap.config.sample_rate
        resampled = stage == "clap" and rates[0] != rates[1]
        batches = loader(
            Resampled(clips, *rates) if resampled else clips, settings.batch_size, seed, **feeding(model.device)
        )
        if stage == "vae":
            yield from train_vae(model, batches, discriminator=discriminators, **common)
        elif stage == "clap":
            yield from train_clap(model, batches, **common)
            if config.clap.startswith("tiny"):  # trained from scratch, so most of its vocabulary is untrained
                model.clap.share_unseen_tokens(c for item in clips.rest for c in item["captions"])
        else:
            if settings.vae_mels and "vae" not in named:
                model.load_part("vae", run_dir)
            yield from train_hifigan(model, batches, discriminators=discriminators, **common)
    if accelerator.is_main_process:
        if discriminators is not None:
            save_weights(run_dir / DISCRIMINATOR_FILES[stage], discriminators, discriminators.config)
        model.save_part(_part(stage), run_dir)
        _save_config(model, run_dir)
    accelerator.wait_for_everyone()  # before the next stage reads the files


def _discriminators(model, stage, settings, seed):
    """Return the discriminators of a stage, or None; a published vocoder brings those stored beside it."""
    config = model.config
    if settings.disc_start >= settings.max_steps or stage not in DISCRIMINATOR_FILES:
        return None
    if stage == "vae" and not settings.adversarial_weight:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if stage == "hifigan":
            discriminators = Discriminators(config.discriminators)
        else:
            discriminators = PatchDiscriminator(config.vae_discriminator)
    beside = Path(config.vocoder_checkpoint).parent / DISCRIMINATOR_FILES[stage]
    if stage == "hifigan" and config.vocoder_checkpoint and beside.is_file():
        load_into(discriminators, read_weights(beside)[0], beside)
    return discriminators.to(model.device)


def _load_frozen_parts(model, parts, run_dir):
    """Load the frozen parts that a stage depends on from the folder of the run."""
    if "vae" in parts:
        model.load_part("vae", run_dir)
    if "clap" in parts:
        with _conditioner_needed():
            model.load_part("clap", run_dir)


def _missing_parts(config, stage, run_dir, resume):
    """Return the parts that a stage needs and the run lacks, both as finished files and as checkpoints of the stage."""
    needed = NEEDED[stage] | ({"vae"} if stage == "hifigan" and config.training[stage].vae_mels else set())
    lacking = {part for part in needed if part == stage or not part_path(run_dir, part, config).is_file()}
    begun = last_checkpoint(Path(run_dir) / "checkpoints", stage) or _is_finished(run_dir, stage, config)
    return lacking - {stage} if resume and begun else lacking


def _save_parts(model, named, run_dir):
    """Write the parts that came from files, and the settings, so that `RefinedAudioLDM.load` finds them in the run.

    A conditioner with its own file (`clap_checkpoint`) is not copied: it is large and shared by many runs.
    """
    for part in sorted(named & {"vae", "hifigan"} | (named & {"clap"} if not model.config.clap_checkpoint else set())):
        model.save_part(part, run_dir)
    _save_config(model, run_dir)


def _save_config(model, run_dir):
    """Write the settings of a run; without a trained vocoder they name Griffin-Lim."""
    config = model.config
    if not part_path(run_dir, "hifigan", config).is_file():
        config = replace(config, vocoder="griffin_lim")
    for setting in ("clap_checkpoint", "tokenizer"):
        if getattr(config, setting):
            config = replace(config, **{setting: str(Path(getattr(config, setting)).absolute())})
    config.save(run_dir / "config.yaml")


def _scale_state(model):
    """Return the state measured before the U-Net is trained: latent scale and, if there is one, linear denoiser."""
    gaussian = {} if model.gaussian is None else model.gaussian.state_dict()
    return {"scale": model.latent_scale} | {f"gaussian.{name}": tensor for name, tensor in gaussian.items()}
