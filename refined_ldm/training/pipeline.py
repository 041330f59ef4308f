"""From a configuration to trained weights: the stages in the order in which they depend on each other.

Clips are rendered or decoded once and train the VAE, the conditioner and the vocoder. The U-Net is trained on latents
and caption embeddings, which the first two compute once. A run writes everything into one folder; a finished stage is a
safetensors file there, which later stages load. A configuration may name published files for parts; a part that the run
has trained itself takes precedence.

Notebook: 03
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from refined_ldm.config import MADE_BY, STAGES, Config, load_config
from refined_ldm.data.caches import CACHED_KEYS, HOLDS, cache_clips, cache_latents, encoded_at_once
from refined_ldm.data.captioned_audio import CaptionedAudio, loader
from refined_ldm.data.listing import captions_table
from refined_ldm.data.shards import find_shards
from refined_ldm.devices import copy_to_cpu, feeding, pick_accelerator
from refined_ldm.discriminators import Discriminators
from refined_ldm.durable.run_state import (
    SCALE_FILE,
    has_whole_checkpoint,
    last_checkpoint,
    load_scale,
    precision_of,
    refuse_old,
)
from refined_ldm.files import JUNK, check_folder, check_place
from refined_ldm.integers import whole_seed
from refined_ldm.published.hub import CONDITIONERS, fetch
from refined_ldm.published.warm_start import find_named_files, is_model, keep_captions, load_named_parts, names_files
from refined_ldm.scenes.dataset import SoundScenes
from refined_ldm.text_to_audio import RefinedAudioLDM, part_path
from refined_ldm.training.contrasts import WrittenClips, train_audio_details, train_text_details
from refined_ldm.training.loop import Step
from refined_ldm.training.stages import stage_settings, train_clap, train_hifigan, train_ldm, train_vae
from refined_ldm.vae import PatchDiscriminator, latent_scale
from refined_ldm.weights import load_into, read_weights, save_weights

DETAILS = {"details-text": train_text_details, "details-audio": train_audio_details}  # of the conditioner, by tower
NEEDED = {  # parts, by stage
    "vae": {"vae"}, "clap": {"clap"}, **dict.fromkeys(DETAILS, {"clap"}), "ldm": {"vae", "clap", "ldm", "hifigan"},
    "hifigan": {"hifigan"},
}  # fmt: skip
FITTED = 2000  # captions on which the new input layer of a published U-Net is fitted
RUN = (  # names of the files in a run's folder
    r"config\.yaml|checkpoints|discriminators|tokenizer|(clips|latents|sounds|embeddings)-.+|left-out\.txt|"
    r"(vae|clap|ldm|hifigan)\.csv|.+\.safetensors"
)
LEFT_OUT = "left-out.txt"  # of a run: the recordings that could not be used, and why
# the discriminators of a stage, below the folder of a run
DISCRIMINATOR_FILES = {stage: f"discriminators/{stage}.safetensors" for stage in ("vae", "hifigan")}


def open_data(config: Config, split: str = "train", size: int | None = None, skip_bad: bool = False) -> Dataset:
    """Open the data set of a configuration: SoundScenes, a folder of recordings, a CSV file, AudioLDM's JSON or shards.

    size: number of scenes, `config.clips` if None. skip_bad: leave out unusable recordings.
    Raises ValueError or FileNotFoundError for unusable recordings without `skip_bad`.

    Notebook: 03
    """
    if config.data == "scenes":
        return SoundScenes(split, config.clips if size is None else size, config.seconds)
    path = Path(config.data)
    if path.suffix == ".json":
        return CaptionedAudio.from_audioldm(path, split, config.seconds, config.data_sets, skip_bad=skip_bad)
    extracted = path.is_dir() and captions_table(path)  # archives may lie beside their extracted files
    if find_shards(path) and not extracted:
        return CaptionedAudio.from_shards(path, config.seconds, skip_bad=skip_bad)
    reader = CaptionedAudio.from_folder if path.is_dir() else CaptionedAudio.from_csv
    return reader(path, config.seconds, skip_bad=skip_bad)


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
    for cache in ("clips-train", "latents-train"):
        check_place(run_dir / cache, HOLDS)
    for stage in stages:
        check_folder(run_dir / "checkpoints" / stage)
    if resume:
        _refuse_no_run(run_dir)
    else:
        for stage in stages:
            refuse_old(run_dir / "checkpoints", stage)
            _refuse_finished(run_dir, stage, config)
    _refuse_other_settings(config, stages, run_dir)


def _refuse_no_run(run_dir):
    """Raise FileNotFoundError if a folder is missing or holds no file of a run; an empty folder is accepted."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else ["nothing"]
    if names and not any(re.fullmatch(f"{RUN}|{JUNK}", name) for name in names):
        raise FileNotFoundError(
            f"no run at {run_dir} that could go on: give its folder with --run, or begin one without --resume"
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
        if unlike := config.unlike(load_config(settings), names):
            raise ValueError(
                f"the settings are not those of the finished {', '.join(stay)} in {run_dir}: "
                f"{', '.join(unlike)}; give another --run"
            )


def check_files(config: Config, stages: Sequence[str], run_dir: str | Path, resume: bool = False) -> None:
    """Check, before any work, that data, named files and the parts that a stage depends on exist.

    Raises FileNotFoundError for the first that is missing.
    """
    if config.data != "scenes" and not (Path(config.data).exists() or find_shards(config.data)):
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
    if not resume:
        refuse_old(run_dir / "checkpoints", stage)
        _refuse_finished(run_dir, stage, config)
    elif _is_finished(run_dir, stage, config) and not has_whole_checkpoint(run_dir / "checkpoints", stage):
        return
    lacking = _missing_parts(config, stage, run_dir, resume)
    named = load_named_parts(model, lacking)
    if stage in DETAILS and config.data != "scenes":
        raise ValueError(f"details are trained on the generated captions of data 'scenes' only: got {config.data}")
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
        if accelerator.is_main_process:
            _save_parts(model, named, run_dir)
        yield from train_ldm(model, loader(latents, settings.batch_size, seed, **feeding(model.device)), **common)
    elif stage in DETAILS:
        shared = {name: common[name] for name in ("seed", "run_dir", "resume", "accelerator")}
        yield from DETAILS[stage](model.clap, clips, settings, **shared)
        model.clap.stages = (*model.clap.stages, stage)
    else:
        batches = loader(clips, settings.batch_size, seed, **feeding(model.device))
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


def cached_clips(
    config: Config,
    run_dir: str | Path,
    split: str = "train",
    size: int | None = None,
    on_clips: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Return the clips of a configuration, rendered or decoded once into run_dir; LEFT_OUT lists unusable recordings.

    Arguments and Raises as for `open_data` and `train_stage`.
    """
    data = open_data(config, split, size, skip_bad)
    listed = Path(run_dir) / LEFT_OUT
    listed.unlink(missing_ok=True)
    if left_out := getattr(data, "left_out", ()):
        listed.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{' '.join(fault.split())}\n" for fault in left_out)
        listed.write_text(lines, encoding="utf-8", errors="backslashreplace")
    return cache_clips(
        Path(run_dir) / f"clips-{split}", data, {"data": data.fingerprint(), "kept": list(CACHED_KEYS)}, on_clips
    )


@torch.no_grad()
def prepare_latents(
    model: RefinedAudioLDM,
    clips: Dataset,
    run_dir: str | Path,
    on_clips: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Encode clips and captions once, measure the latent scale on the first 512 and fit the linear denoiser.

    Returns items with "latent" (C, T, F), unscaled, and "embeddings" (K, D) or "captions".

    Notebook: 03
    """
    latents = encode_clips(model, clips, run_dir, on_clips)
    measure_latents(model, clips, latents)
    return latents


@torch.no_grad()
def encode_clips(
    model: RefinedAudioLDM,
    clips: Dataset,
    run_dir: str | Path,
    on_clips: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Encode clips and captions once, into run_dir, with the model's VAE and conditioner.

    With `more_captions`, which a grammar writes for scenes, they are embedded during training instead. With an
    `audio_share` the clips themselves are embedded too. Returns items as `prepare_latents` does.
    """
    model.eval()

    def encode(waveform):
        return model.vae.encode(model.mel(waveform.to(model.device))).mean

    def embed_audio(waveform):
        return model.clap.embed_audio(waveform.to(model.device), model.config.mel.sample_rate)

    latents = cache_latents(
        Path(run_dir) / "latents-train",
        clips,
        encode,
        None,
        {**clips.made_of, "vae": weights_digest(model.vae)},
        on_clips,
    )
    parts, made_of = [latents], {**clips.made_of, "clap": weights_digest(model.clap)}
    if model.config.training["ldm"].audio_share:
        folder = Path(run_dir) / "sounds-train"
        parts.append(cache_latents(folder, clips, None, None, made_of, on_clips, embed_audio))
    if model.config.more_captions and model.config.data == "scenes":  # too many for a cache
        return Joined(*parts, WrittenClips(clips, model.config.more_captions))
    folder = Path(run_dir) / "embeddings-train"
    return Joined(*parts, cache_latents(folder, clips, None, model.clap.embed_text, made_of))


class Joined(Dataset):
    """Data sets of the same clips, joined item by item."""

    def __init__(self, *parts: Dataset):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        return {key: value for part in self.parts for key, value in part[index].items()}


@torch.no_grad()
def measure_latents(model: RefinedAudioLDM, clips: Dataset, latents: Dataset) -> None:
    """Measure the latent scale on the first 512 clips and fit the linear denoiser to the first 4000 latents."""
    model.eval()
    fixed = torch.stack([clips[i]["waveform"] for i in range(min(512, len(clips)))])
    sets = fixed.split(encoded_at_once(fixed.shape[1]))
    model.latent_scale.fill_(latent_scale(model.vae, (model.mel(w.to(model.device)) for w in sets)))
    if model.gaussian is not None:
        known = [latents[i] for i in range(min(4000, len(latents)))]
        embeddings = [item.get("embeddings", None) for item in known]
        if embeddings[0] is None:
            embeddings = [model.clap.embed_text(list(item["captions"])).cpu() for item in known]
        fit_gaussian(model, torch.stack([item["latent"] for item in known]), torch.stack(embeddings))


def fit_gaussian(model: RefinedAudioLDM, latents: torch.Tensor, embeddings: torch.Tensor) -> None:
    """Fit the linear denoiser to unscaled latents (N, C, T, F) and the embeddings (N, K, D) of their captions."""
    scaled, embeddings = latents * model.latent_scale.cpu(), embeddings[..., : model.config.unet.embedding_dim]
    conditions = (embeddings,) if model.config.parameterization == "caption-gaussian" else ()
    model.gaussian.fit(scaled, *conditions)


def _scale_state(model):
    """Return the state measured before the U-Net is trained: latent scale and, if there is one, linear denoiser."""
    gaussian = {} if model.gaussian is None else model.gaussian.state_dict()
    return {"scale": model.latent_scale} | {f"gaussian.{name}": tensor for name, tensor in gaussian.items()}


def weights_digest(module: nn.Module) -> str:
    """Return a digest of a module's weights, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(copy_to_cpu(module.state_dict()).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]
