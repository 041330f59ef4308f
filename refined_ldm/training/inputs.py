"""Training data of the stages: the clips of a configuration and their latents, computed once into a run's folder.

Notebook: 03
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset

from refined_ldm.clap import resample
from refined_ldm.config import Config
from refined_ldm.data.caches import CACHED_KEYS, Cached, cache_clips, cache_latents, encoded_at_once, of_before
from refined_ldm.data.sources import open_recordings
from refined_ldm.scenes.dataset import SoundScenes
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.contrasts import WrittenClips
from refined_ldm.vae import latent_scale
from refined_ldm.weights import weights_digest

MAPPED = 8000  # clips to which the caption map is fitted
LEFT_OUT = "left-out.txt"  # of a run: the recordings that could not be used, and why


def open_data(config: Config, split: str = "train", size: int | None = None, skip_bad: bool = False) -> Dataset:
    """Open the data set of a configuration: SoundScenes, or recordings as `data.sources.open_recordings` finds them.

    size: number of scenes, `config.clips` if None. skip_bad: leave out unusable recordings.
    Raises ValueError or FileNotFoundError for unusable recordings without `skip_bad`.

    Notebook: 03
    """
    if config.data == "scenes":
        return SoundScenes(split, config.clips if size is None else size, config.seconds)
    return open_recordings(
        config.data,
        config.data_split or split,
        config.seconds,
        config.data_sets,
        config.file_column,
        config.caption_column,
        skip_bad,
    )


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
    folder, made_of = Path(run_dir) / f"clips-{split}", {"data": data.fingerprint(), "kept": list(CACHED_KEYS)}
    if made_of["data"] != of_before(folder).get("data", made_of["data"]):
        warnings.warn(f"{folder} holds the clips of other data than {config.data}: they are replaced", stacklevel=3)
    return cache_clips(folder, data, made_of, on_clips)


@torch.no_grad()
def prepare_latents(
    model: RefinedAudioLDM, clips: Dataset, run_dir: str | Path, on_clips: Callable[[int, int], None] | None = None
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
    model: RefinedAudioLDM, clips: Dataset, run_dir: str | Path, on_clips: Callable[[int, int], None] | None = None
) -> Dataset:
    """Encode clips and captions once, into run_dir, with the model's VAE and conditioner.

    With `more_captions`, which a grammar writes for scenes, they are embedded during training instead. With an
    `audio_share` the clips themselves are embedded too. Returns items as `prepare_latents` does.
    """
    model.eval()

    def embed_audio(waveform):
        return model.clap.embed_audio(waveform.to(model.device), model.config.mel.sample_rate)

    latents = encode_latents(model, clips, run_dir, on_clips)
    parts, made_of = [latents], {**clips.made_of, "clap": weights_digest(model.clap)}
    if model.config.training["ldm"].audio_share:
        folder = Path(run_dir) / "sounds-train"
        parts.append(cache_latents(folder, clips, None, None, made_of, on_clips, embed_audio))
    if model.config.more_captions and model.config.data == "scenes":  # too many for a cache
        return Joined(*parts, WrittenClips(clips, model.config.more_captions))
    folder = Path(run_dir) / "embeddings-train"
    return Joined(*parts, cache_latents(folder, clips, None, model.clap.embed_text, made_of))


@torch.no_grad()
def encode_latents(
    model: RefinedAudioLDM, clips: Dataset, run_dir: str | Path, on_clips: Callable[[int, int], None] | None = None
) -> Cached:
    """Encode clips once, into run_dir -> items with "latent" (C, T, F), unscaled."""

    def encode(waveform):
        return model.vae.encode(model.mel(waveform.to(model.device))).mean

    made_of = {**clips.made_of, "vae": weights_digest(model.vae)}
    return cache_latents(Path(run_dir) / "latents-train", clips, encode, None, made_of, on_clips)


class Resampled(Dataset):
    """Clips at another sample rate, `sample_rate` of each item, so that a training step need not resample them."""

    def __init__(self, clips: Dataset, sample_rate: int, wanted: int):
        self.clips, self.sample_rate, self.wanted = clips, sample_rate, wanted

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        item = self.clips[index]
        waveform = resample(item["waveform"][None], self.sample_rate, self.wanted)[0]
        return {**item, "waveform": waveform, "sample_rate": self.wanted}


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


@torch.no_grad()
def fit_caption_map(model: RefinedAudioLDM, latents: Dataset) -> None:
    """Fit the caption map of the U-Net to the first MAPPED items of `latents`, with the last caption of each."""
    model.eval()
    items = [latents[i] for i in range(min(MAPPED, len(latents)))]
    if "embeddings" in items[0]:
        embeddings = torch.stack([item["embeddings"][-1] for item in items])[:, : model.config.unet.embedding_dim]
    else:
        captions = [item["captions"][-1] for item in items]
        parts = [captions[start : start + 64] for start in range(0, len(captions), 64)]
        embeddings = torch.cat([model.clap.embed_text(part).cpu() for part in parts])
    scaled = torch.stack([item["latent"] for item in items]) * model.latent_scale.cpu()
    model.unet.caption_map.cpu().fit(scaled, embeddings)
    model.unet.caption_map.to(model.device)
