"""From a configuration to trained weights: the stages in the order their results feed each other.

Clips are rendered or decoded once, then the VAE, the conditioner and the vocoder learn from them; the U-Net learns from
latents and caption embeddings that the first two compute once. Everything is written below one run folder, and a
finished stage is a safetensors file there which later stages read. Parts that a configuration names published files
for come from these; what the run itself has trained goes before them.
"""

import hashlib
import re
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from refined_ldm.config import MADE_BY, STAGES, load_config
from refined_ldm.data.caches import CACHED_KEYS, HOLDS, cache_clips, cache_latents, encoded_at_once
from refined_ldm.data.captioned_audio import CaptionedAudio, loader
from refined_ldm.data.listing import captions_table
from refined_ldm.data.shards import find_shards
from refined_ldm.devices import pick_accelerator
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
from refined_ldm.text_to_audio import part_path
from refined_ldm.training.contrasts import WrittenClips, train_audio_details, train_text_details
from refined_ldm.training.stages import stage_settings, train_clap, train_hifigan, train_ldm, train_vae
from refined_ldm.vae import PatchDiscriminator, latent_scale
from refined_ldm.weights import load_into, read_weights, save_weights

DETAILS = {"details-text": train_text_details, "details-audio": train_audio_details}  # of the conditioner, by tower
NEEDED = {  # parts, by stage
    "vae": {"vae"}, "clap": {"clap"}, **dict.fromkeys(DETAILS, {"clap"}), "ldm": {"vae", "clap", "ldm", "hifigan"},
    "hifigan": {"hifigan"},
}  # fmt: skip
FITTED = 2000  # captions that a U-Net from elsewhere is to understand as before
RUN = (  # what a run's folder holds
    r"config\.yaml|checkpoints|discriminators|tokenizer|(clips|latents)-.+|left-out\.txt|"
    r"(vae|clap|ldm|hifigan)\.csv|.+\.safetensors"
)
LEFT_OUT = "left-out.txt"  # of a run: the recordings that could not be used, and why
DISCRIMINATOR_FILES = {stage: f"discriminators/{stage}.safetensors" for stage in ("vae", "hifigan")}  # what a stage was judged by


def open_data(config, split="train", size=None, skip_bad=False):
    """The data set a configuration names: SoundScenes, or recordings of a folder, a CSV file, AudioLDM's JSON, shards.

    skip_bad: leave out recordings that cannot be used, instead of refusing the data set.
    """
    if config.data == "scenes":
        return SoundScenes(split, config.clips if size is None else size, config.seconds)
    path = Path(config.data)
    if path.suffix == ".json":
        return CaptionedAudio.from_audioldm(path, split, config.seconds, config.data_sets, skip_bad=skip_bad)
    if find_shards(path) and not (path.is_dir() and captions_table(path)):  # archives may lie beside what was in them
        return CaptionedAudio.from_shards(path, config.seconds, skip_bad=skip_bad)
    reader = CaptionedAudio.from_folder if path.is_dir() else CaptionedAudio.from_csv
    return reader(path, config.seconds, skip_bad=skip_bad)


def default_stages(config):
    """What is trained if nobody says: every stage or, if files of trained parts are named, the U-Net.

    Then the VAE is trained before it only if no file holds one; conditioner and vocoder only when asked for.
    """
    if not names_files(config):
        return tuple(stage for stage in STAGES if stage not in DETAILS or config.data == "scenes")
    return ("ldm",) if config.vae_checkpoint or config.start_from else ("vae", "ldm")


def check_run(config, stages, run_dir, resume=False):
    """Raise OSError or ValueError, before any work, where these stages would replace what a run has finished, could not
    be written, or are to go on (`resume`) in a folder that holds no run.
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
    """Raise FileNotFoundError if a folder is not there or holds other things than a run's; one of an earlier attempt
    that saved nothing may be empty.
    """
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else ["nothing"]
    if names and not any(re.fullmatch(f"{RUN}|{JUNK}", name) for name in names):
        raise FileNotFoundError(f"no run at {run_dir} that could go on: give its folder with --run, or begin one "
                                "without --resume")  # fmt: skip


def _is_finished(run_dir, stage, config):
    """Whether a run holds what a stage makes: a part or, of a stage that trains one further, what its file says."""
    path = part_path(run_dir, _part(stage), config)
    return path.is_file() and (stage not in DETAILS or stage in read_weights(path)[1].get("stages", ()))


def _part(stage):
    return "clap" if stage in DETAILS else stage


def _refuse_finished(run_dir, stage, config):
    if _is_finished(run_dir, stage, config):
        path = part_path(run_dir, _part(stage), config)
        by = f" by {stage}" if stage in DETAILS else ""
        raise FileExistsError(f"{path} is there already, finished{by}: give another --run, leave this stage out, or "
                              "move the file away")  # fmt: skip


def _refuse_other_settings(config, stages, run_dir):
    """Raise ValueError, naming the settings, if finished parts of a run that stay were made with others."""
    settings = run_dir / "config.yaml"
    stay = [part for part in STAGES if part not in stages and part_path(run_dir, part, config).is_file()]
    if stay and settings.is_file():
        names = dict.fromkeys(name for part in stay for name in MADE_BY[part])
        if unlike := config.unlike(load_config(settings), names):
            raise ValueError(f"the settings are not those of the finished {', '.join(stay)} in {run_dir}: "
                             f"{', '.join(unlike)}; give another --run")  # fmt: skip


def check_files(config, stages, run_dir, resume=False):
    """Raise FileNotFoundError if data, a named file, or what a stage learns from are missing, before a large model is
    built, or a stage before it trained, in vain.
    """
    if config.data != "scenes" and not (Path(config.data).exists() or find_shards(config.data)):
        raise FileNotFoundError(f"no recordings at {config.data} (in AudioLDM's YAML metadata_root): give --data PATH")
    for stage in stages:
        find_named_files(config, _missing_parts(config, stage, run_dir, resume))
    there = set(stages) | {part for part in STAGES if part_path(run_dir, part, config).is_file()}
    needs_vae = "ldm" in stages or "hifigan" in stages and config.training["hifigan"].vae_mels
    if needs_vae and "vae" not in there and not (config.vae_checkpoint or config.start_from):
        wanted = " ".join(["vae", *stages])
        raise FileNotFoundError(f"no weights at {part_path(run_dir, 'vae', config)} to learn from: train them before "
                                f"(--stage {wanted}), or give the --run that has them")  # fmt: skip
    if "ldm" in stages and "clap" not in there and not (config.clap_checkpoint or config.start_from):
        with _conditioner_needed():
            if config.clap not in CONDITIONERS:
                raise FileNotFoundError(f"no weights at {part_path(run_dir, 'clap', config)}")
            fetch(CONDITIONERS[config.clap])


@contextmanager
def _conditioner_needed():
    """Say what to do where a conditioner is not found."""
    try:
        yield
    except FileNotFoundError as fault:
        raise FileNotFoundError("the U-Net needs a conditioner: name its file with --clap-checkpoint, or train one "
                                f"before (--stage clap ldm); {fault}") from fault  # fmt: skip


def accelerator_of(checkpoints, device_type, resume=False):
    """The Accelerator of a run; on a CPU, where the precision is measured, a run that goes on keeps the one it had.

    checkpoints: the folder that those of the run are in, a folder for each stage.
    """
    kept = precision_of(checkpoints) if resume and device_type == "cpu" else None
    return pick_accelerator(device_type, kept)


def train_stage(model, stage, run_dir, seed=0, resume=False, max_steps=None, lr=None, adversarial=True, on_clips=None,
                skip_bad=False):  # fmt: skip
    """Train one stage, write its part of the model into run_dir, and yield every Step on the way.

    The conditioner learns three times: "clap", then details (`contrasts`), one tower after the other, of scenes only.

    What feeds this stage, and what it starts from, is read from run_dir if it is there, else from the files that the
    configuration names. With `resume` a part that is finished and has no checkpoint to go on from stays as it is.
    Raises ValueError for an unknown stage, FileNotFoundError if the U-Net is to be trained before VAE and conditioner,
    or for a named file that is not there, FileExistsError rather than train anew what is finished.
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
        raise ValueError(f"details are learnt from captions that a grammar writes, of data 'scenes': got {config.data}")
    if config.start_from and stage == "ldm" and "ldm" in lacking - named:
        warnings.warn(f"the U-Net of {config.start_from} listened to another conditioner than {config.clap}: the layer "
                      "that captions enter by is new", stacklevel=2)  # fmt: skip
    if stage == "ldm" or stage in DETAILS:
        _load_frozen_parts(model, NEEDED[stage] & {"vae", "clap"} - named, run_dir)
    accelerator = accelerator_of(Path(run_dir) / "checkpoints", model.device.type, resume)
    common = {"max_steps": max_steps, "lr": lr, "seed": seed, "run_dir": run_dir / "checkpoints", "resume": resume,
              "accelerator": accelerator}  # fmt: skip
    judges = _judges(model, stage, settings, seed) if adversarial else None
    with accelerator.main_process_first():  # the others find the caches made
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
        yield from train_ldm(model, loader(latents, settings.batch_size, seed), **common)
    elif stage in DETAILS:
        shared = {name: common[name] for name in ("seed", "run_dir", "resume", "accelerator")}
        yield from DETAILS[stage](model.clap, clips, settings, **shared)
        model.clap.stages = (*model.clap.stages, stage)
    else:
        batches = loader(clips, settings.batch_size, seed)
        if stage == "vae":
            yield from train_vae(model, batches, discriminator=judges, **common)
        elif stage == "clap":
            yield from train_clap(model, batches, **common)
            if config.clap.startswith("tiny"):  # trained from nothing, so most of its vocabulary was never seen
                model.clap.share_unseen_tokens(c for item in clips.rest for c in item["captions"])
        else:
            if settings.vae_mels and "vae" not in named:
                model.load_part("vae", run_dir)
            yield from train_hifigan(model, batches, discriminators=judges, **common)
    if accelerator.is_main_process:
        if judges is not None:
            save_weights(run_dir / DISCRIMINATOR_FILES[stage], judges, judges.config)
        model.save_part(_part(stage), run_dir)
        _save_config(model, run_dir)
    accelerator.wait_for_everyone()  # before the next stage reads what was written


def _judges(model, stage, settings, seed):
    """The discriminators of a stage, if it has some that would ever join; those beside a vocoder go on with it."""
    config = model.config
    if settings.disc_start >= settings.max_steps or stage not in DISCRIMINATOR_FILES:
        return None
    if stage == "vae" and not settings.adversarial_weight:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judges = Discriminators(config.discriminators) if stage == "hifigan" else PatchDiscriminator(config.vae_discriminator)
    beside = Path(config.vocoder_checkpoint).parent / DISCRIMINATOR_FILES[stage]
    if stage == "hifigan" and config.vocoder_checkpoint and beside.is_file():
        load_into(judges, read_weights(beside)[0], beside)
    return judges.to(model.device)


def _load_frozen_parts(model, parts, run_dir):
    """What the U-Net learns from, as far as no file is named for it."""
    if "vae" in parts:
        model.load_part("vae", run_dir)
    if "clap" in parts:
        with _conditioner_needed():
            model.load_part("clap", run_dir)


def _missing_parts(config, stage, run_dir, resume):
    """The parts that a stage starts from and the run does not hold: finished or, its own, in a checkpoint."""
    needed = NEEDED[stage] | ({"vae"} if stage == "hifigan" and config.training[stage].vae_mels else set())
    lacking = {part for part in needed if part == stage or not part_path(run_dir, part, config).is_file()}
    begun = last_checkpoint(Path(run_dir) / "checkpoints", stage) or _is_finished(run_dir, stage, config)
    goes_on = resume and begun
    return lacking - {stage} if goes_on else lacking


def _save_parts(model, named, run_dir):
    """Write what `RefinedAudioLDM.load` will need beside the U-Net, once: parts from files, and the settings.

    A conditioner with a file of its own (`clap_checkpoint`) stays there: it is large, and the same for many runs.
    """
    for part in sorted(named & {"vae", "hifigan"} | (named & {"clap"} if not model.config.clap_checkpoint else set())):
        model.save_part(part, run_dir)
    _save_config(model, run_dir)


def _save_config(model, run_dir):
    """Write the settings of a run; sounds come from Griffin-Lim as long as it has no vocoder."""
    config = model.config
    if not part_path(run_dir, "hifigan", config).is_file():
        config = replace(config, vocoder="griffin_lim")
    for setting in ("clap_checkpoint", "tokenizer"):
        if getattr(config, setting):
            config = replace(config, **{setting: str(Path(getattr(config, setting)).absolute())})
    config.save(run_dir / "config.yaml")


def cached_clips(config, run_dir, split="train", size=None, on_clips=None, skip_bad=False):
    """The clips of a configuration, rendered or decoded once into run_dir; what is left out is listed in LEFT_OUT."""
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
def prepare_latents(model, clips, run_dir, on_clips=None):
    """Encode clips and captions once, measure the latent scale on the first 512 and fit the linear denoiser."""
    latents = encode_clips(model, clips, run_dir, on_clips)
    measure_latents(model, clips, latents)
    return latents


@torch.no_grad()
def encode_clips(model, clips, run_dir, on_clips=None):
    """Encode clips and captions once, into run_dir, by the model's VAE and conditioner.

    Where scenes are written many captions, these are embedded as they come.
    """
    model.eval()

    def encode(waveform):
        return model.vae.encode(model.mel(waveform.to(model.device))).mean

    latents = cache_latents(Path(run_dir) / "latents-train", clips, encode, None,
                            {**clips.made_of, "vae": weights_digest(model.vae)}, on_clips)  # fmt: skip
    if model.config.more_captions:  # too many to be worth a cache
        return Joined(latents, WrittenClips(clips, model.config.more_captions))
    made_of = {**clips.made_of, "clap": weights_digest(model.clap)}
    folder = Path(run_dir) / "embeddings-train"
    return Joined(latents, cache_latents(folder, clips, None, model.clap.embed_text, made_of))


class Joined(Dataset):
    """Data sets of the same clips, side by side."""

    def __init__(self, *parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        return {key: value for part in self.parts for key, value in part[index].items()}


@torch.no_grad()
def measure_latents(model, clips, latents):
    """Measure the latent scale on the first 512 clips and fit the linear denoiser to the first 4000 latents."""
    model.eval()
    fixed = torch.stack([clips[i]["waveform"] for i in range(min(512, len(clips)))])
    sets = fixed.split(encoded_at_once(fixed.shape[1]))
    model.scale.fill_(latent_scale(model.vae, (model.mel(w.to(model.device)) for w in sets)))
    if model.gaussian is not None:
        known = [latents[i] for i in range(min(4000, len(latents)))]
        embeddings = [item.get("embeddings", None) for item in known]
        if embeddings[0] is None:
            embeddings = [model.clap.embed_text(list(item["captions"])).cpu() for item in known]
        fit_gaussian(model, torch.stack([item["latent"] for item in known]), torch.stack(embeddings))


def fit_gaussian(model, latents, embeddings):
    """Fit the linear denoiser to unscaled latents (N, C, T, F) and the embeddings (N, K, D) of their captions."""
    scaled, embeddings = latents * model.scale.cpu(), embeddings[..., : model.config.unet.embedding_dim]
    heard = (embeddings,) if model.config.parameterization == "caption-gaussian" else ()
    model.gaussian.cpu().fit(scaled, *heard)
    model.gaussian.to(model.device)


def _scale_state(model):
    """What is measured before the U-Net is trained: the latent scale, and the linear denoiser if there is one."""
    gaussian = {} if model.gaussian is None else model.gaussian.state_dict()
    return {"scale": model.scale} | {f"gaussian.{name}": tensor for name, tensor in gaussian.items()}


def weights_digest(module):
    """A short name of a module's weights, by content."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
