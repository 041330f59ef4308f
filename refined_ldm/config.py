"""Configurations: every setting of a model and of its training, in one frozen dataclass that is stored as YAML.

Notebook: 03
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import yaml

from refined_ldm.base.files import atomic_write, errors_at
from refined_ldm.base.integers import cast_numbers
from refined_ldm.base.plain_yaml import cast, leaves, plain, read_yaml
from refined_ldm.discriminators import DiscriminatorsConfig
from refined_ldm.hifigan import HiFiGANConfig
from refined_ldm.mel import MelConfig
from refined_ldm.unet import UNetConfig
from refined_ldm.vae import PatchDiscriminatorConfig, VAEConfig

PARAMETERIZATIONS = ("eps", "v", "x0", "gaussian", "caption-gaussian")
VOCODERS = ("hifigan", "griffin_lim")
SAMPLERS = ("dpmpp", "ddim", "student")
OPTIMIZERS = ("adamw", "muon")
STAGES = ("vae", "clap", "details-text", "details-audio", "ldm", "hifigan")
LR_SCHEDULES = ("cosine", "wsd", "constant")
TIMESTEPS = ("stratified", "uniform", "noisy")
LOSS_WEIGHTINGS = ("prediction", "eps")

MADE_BY = {  # the settings that the weights of a finished part depend on
    "vae": ("mel", "vae"),
    "clap": (),
    "ldm": ("clap", "mel", "vae", "unet", "diffusion_steps", "beta_start", "beta_end", "parameterization"),
    "hifigan": ("mel", "hifigan"),
}


@dataclass(frozen=True)
class StageConfig:
    """Settings of the training of one stage."""

    max_steps: int = 1000
    batch_size: int = 16  # clips
    lr: float = 1e-3
    optimizer: str = "adamw"  # or "muon": orthogonalised updates for the matrices, AdamW for the rest
    lr_schedule: str = "cosine"  # to zero at max_steps; "wsd": constant, then to zero in the last fifth; "constant"
    warmup_steps: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.0  # 0: the last weights; .999: an average over about a thousand steps
    max_grad_norm: float = 1.0  # gradients of a larger norm are clipped to it; 0: no clipping
    disc_start: int = 0  # VAE and vocoder: steps before their discriminators join
    disc_lr: float = 0.0  # learning rate after disc_start, with its own warm-up and schedule; 0: lr
    adversarial_weight: float = 0.0  # VAE: weight of the adversarial loss; 0: no discriminator
    stft_weight: float = 0.0  # vocoder: weight of the STFT distance; published: 0
    timesteps: str = "stratified"  # U-Net: all noise levels in each batch; "uniform": drawn independently; "noisy": as
    # stratified, with a density that grows with the noise level
    loss_weighting: str = "prediction"  # U-Net: squared error of the network's own target, or "eps": of the noise
    audio_share: float = 0.0  # U-Net: share of clips conditioned on their audio embedding instead of a caption
    conditioner_dropout: float = 0.0  # U-Net: share of captions blanked in addition to those for guidance
    gradient_checkpointing: bool = False  # U-Net: activations computed twice instead of kept, for larger batches
    vae_mels: bool = False  # vocoder: train on the VAE's reconstructions of the mels, its inputs in generation
    crop_frames: int = 0  # VAE and vocoder: mel frames of the random training crops; 0: whole clips
    save_every: int = 500  # steps

    def __post_init__(self):
        cast_numbers(self)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _one_of("timesteps", self.timesteps, TIMESTEPS)
        _one_of("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        for name in ("audio_share", "conditioner_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.max_steps < 1 or not 0 < self.lr < math.inf:
            raise ValueError(f"max_steps and lr must be positive, got {self.max_steps} and {self.lr}")
        if self.batch_size < 1 or self.save_every < 1:
            raise ValueError(f"batch_size and save_every must be positive, got {self.batch_size} and {self.save_every}")
        for name in (
            "warmup_steps",
            "disc_start",
            "crop_frames",
            "weight_decay",
            "disc_lr",
            "adversarial_weight",
            "stft_weight",
            "max_grad_norm",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not all(0 <= decay < 1 for decay in (self.ema_decay, *self.betas)):
            raise ValueError(f"ema_decay and betas must be from 0 to below 1, got {self.ema_decay} and {self.betas}")


@dataclass(frozen=True)
class DistillConfig(StageConfig):
    """Settings of the training of a student, below `training: distill:`; it is no stage of a run by default."""

    max_steps: int = 2000
    rank: int = 8  # of the LoRA
    trajectories: int = 4000  # sampled from the teacher, once
    teacher_steps: int = 12  # of DPM-Solver++ in a trajectory, a multiple of 4

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.rank <= 256:
            raise ValueError(f"rank must be from 1 to 256, got {self.rank}")
        if self.trajectories < 1:
            raise ValueError(f"trajectories must be positive, got {self.trajectories}")
        if self.teacher_steps < 4 or self.teacher_steps % 4:
            raise ValueError(f"teacher_steps must be a multiple of 4, got {self.teacher_steps}")


@dataclass(frozen=True)
class Config:
    """All settings of one experiment. `preset` returns the named ones, `load_config` reads a file.

    Raises ValueError for settings that are impossible or do not fit each other.

    Notebook: 03
    """

    name: str = "paper"
    clap: str = "ms-clap-2023"  # a name in CLAP_PRESETS
    mel: MelConfig = MelConfig()
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    hifigan: HiFiGANConfig = HiFiGANConfig()
    discriminators: DiscriminatorsConfig = DiscriminatorsConfig()
    vae_discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig()

    diffusion_steps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    parameterization: str = (
        "eps"  # target of the U-Net: one of PARAMETERIZATIONS; the last two: the residual of a linear denoiser
    )
    unconditional_probability: float = 0.1  # share of captions blanked in training, for guidance

    data: str = "scenes"  # the built-in SoundScenes, or a table, a folder, a dataset_root.json, "clotho:FOLDER"
    data_sets: tuple[str, ...] = ()  # names in AudioLDM's dataset_root.json; empty: all
    data_split: str = ""  # split or fold of a known data set, or several with commas; "": those for training
    file_column: str = ""  # column of a table with the names of files; "": "file"
    caption_column: str = ""  # column of a table with the captions; "": "caption"
    clips: int = 4000  # scenes of the training split
    more_captions: int = 0  # additional captions of a scene, which name every possible detail; none of recordings
    seconds: float = 10.24  # s, length of one clip

    sampler: str = "dpmpp"  # or "ddim", or "student": then for all that it was taught, and "dpmpp" for the rest
    steps: int = 25  # of DPM-Solver++ or DDIM
    guidance_scale: float = 3.0
    guidance_interval: tuple[int, int] = (0, 1000)  # first and last timestep with guidance
    candidates: int = 1  # sounds generated per caption, of which the matcher or the conditioner keeps one
    vocoder: str = "hifigan"  # mel -> waveform; or "griffin_lim", which needs no training

    # Published files from which parts are loaded (`published.warm_start`); "": none.
    start_from: str = ""  # an AudioLDM checkpoint: U-Net, and any other parts in it
    vae_checkpoint: str = ""  # the VAE, and its vocoder if the file has one
    vocoder_checkpoint: str = ""
    clap_checkpoint: str = ""  # the conditioner
    tokenizer: str = ""  # directory of its vocabulary: roberta-base's for LAION-CLAP; GPT-2's is installed

    training: dict[str, StageConfig] = field(
        default_factory=lambda: {stage: StageConfig() for stage in STAGES} | {"distill": DistillConfig()}
    )

    def __post_init__(self):
        cast_numbers(self)
        _one_of("parameterization", self.parameterization, PARAMETERIZATIONS)
        _one_of("vocoder", self.vocoder, VOCODERS)
        _one_of("sampler", self.sampler, SAMPLERS)
        _refuse_impossible(self)
        samples = round(self.seconds * self.mel.sample_rate)
        unit = self.mel.hop_length * self.vae.downsampling * self.unet.downsampling  # samples per coarsest U-Net frame
        if samples % unit:
            raise ValueError(
                f"seconds={self.seconds} is {samples} samples, not a whole number of {unit} = hop {self.mel.hop_length}"
                f" x VAE {self.vae.downsampling} x U-Net {self.unet.downsampling}: "
                f"take {max(1, round(samples / unit)) * unit / self.mel.sample_rate}"
            )
        if self.mel.n_mels % (bins := self.vae.downsampling * self.unet.downsampling):
            raise ValueError(
                f"mel.n_mels={self.mel.n_mels} is not a whole number of {bins} = VAE "
                f"{self.vae.downsampling} x U-Net {self.unet.downsampling}"
            )
        for mult in self.vae.channel_mult:
            if (width := mult * self.vae.channels) % self.vae.norm_groups:
                raise ValueError(
                    f"vae: level width {width} = {mult} x channels {self.vae.channels} must divide by "
                    f"norm_groups {self.vae.norm_groups}"
                )
        if self.hifigan.channels % 2 ** len(self.hifigan.rates):
            raise ValueError(
                f"hifigan.channels={self.hifigan.channels} must divide by {2 ** len(self.hifigan.rates)}: "
                f"each of the {len(self.hifigan.rates)} rates halves them"
            )
        if self.hifigan.n_mels != self.mel.n_mels:
            raise ValueError(f"vocoder reads {self.hifigan.n_mels} mel bands, mel has {self.mel.n_mels}")
        if self.hifigan.hop_length != self.mel.hop_length:
            raise ValueError(f"vocoder makes {self.hifigan.hop_length} samples a frame, mel hops {self.mel.hop_length}")
        if self.vae.latent_channels != self.unet.latent_channels:
            raise ValueError(f"vae has {self.vae.latent_channels} latent channels, unet {self.unet.latent_channels}")

    @property
    def samples(self) -> int:
        """Samples of one clip."""
        return round(self.seconds * self.mel.sample_rate)

    def changed(self, **changes) -> "Config":
        """Return a copy with some fields replaced; raises ValueError for an unknown field or an impossible value."""
        names = [f.name for f in fields(self)]
        unknown = sorted(changes.keys() - set(names))
        if unknown:
            raise ValueError(f"no setting {', '.join(unknown)}: a Config has {', '.join(names)}")
        return replace(self, **changes)

    def differences(self, other: "Config", names: Iterable[str]) -> list[str]:
        """Return how another Config differs in the settings `names` and their fields: ["name ours (the run: …)"]."""
        ours, theirs = (dict(leaves({name: asdict(c)[name] for name in names})) for c in (self, other))
        return [f"{name} {ours[name]} (the run: {theirs[name]})" for name in ours if ours[name] != theirs[name]]

    def save(self, path: str | Path) -> None:
        """Write all fields as YAML; `load_config` returns an equal Config."""
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(plain(asdict(self)), sort_keys=False))


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")


MAY_BE_ZERO = {"guidance_interval", "griffin_lim_iterations", "mel_corrections", "attention_layers", "scales", "tokens",
               "token_width", "caption_map", "more_captions"}  # fmt: skip


def _refuse_impossible(config):
    """Raise ValueError for a size below 1, an empty pyramid, an impossible length, or a name that is a path."""
    if config.name != Path(config.name).name or config.name in ("", ".", ".."):  # runs/NAME is written
        raise ValueError(f"name must be a plain name, without folders, got {config.name!r}")
    if not 0 < config.seconds < 3600:
        raise ValueError(f"seconds must be between 0 and 3600, got {config.seconds}")
    if not 0 < config.beta_start < config.beta_end < 1:
        raise ValueError(f"0 < beta_start < beta_end < 1, got {config.beta_start} and {config.beta_end}")
    if not 0 <= config.guidance_interval[0] <= config.guidance_interval[1]:
        raise ValueError(f"guidance_interval must be two timesteps, the lower first, got {config.guidance_interval}")
    if not 0 <= config.unconditional_probability <= 1:
        raise ValueError(f"unconditional_probability must be between 0 and 1, got {config.unconditional_probability}")
    for part in (None, "mel", "vae", "unet", "hifigan", "discriminators", "vae_discriminator"):
        sizes = config if part is None else getattr(config, part)
        for size in fields(sizes):
            value, name = getattr(sizes, size.name), size.name if part is None else f"{part}.{size.name}"
            least = 0 if size.name in MAY_BE_ZERO else 1
            if any(type(n) is int and n < least for n in _numbers(value)):
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if size.name == "channel_mult" and not value:
                raise ValueError(f"{name} is empty: there must be a level at least")


def _numbers(value):
    return [n for inner in value for n in _numbers(inner)] if isinstance(value, tuple) else [value]


PRESETS = ("tiny", "colab", "paper", "baseline")  # each a file in presets/
FOLDER = Path(__file__).parent / "presets"


def preset(name: str, **changes) -> Config:
    """Return a named configuration, with some fields changed: preset("tiny", steps=50).

    tiny: a laptop's CPU, shipped weights, synthetic scenes; colab: one free GPU; paper: AudioLDM-S with MS-CLAP 2023;
    baseline: AudioLDM-S as published, with LAION-CLAP. Raises ValueError for an unknown name or field.

    Notebook: 03
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r:.80}: choose one of {', '.join(PRESETS)}")
    return replace(load_config(FOLDER / f"{name}.yaml"), name=name).changed(**changes)


def load_config(path: str | Path) -> Config:
    """Load a YAML file: all or some fields of a Config, or `preset: NAME` and the fields to change.

    The published training configurations of AudioLDM (`audioldm_original.yaml`, `audioldm_custom.yaml`) load as well.
    Raises FileNotFoundError, or ValueError naming the unknown key, the wrong type or the impossible size.

    Notebook: 03
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    written = read_yaml(path)
    from refined_ldm.published.audioldm_yaml import convert_config, is_published

    if is_published(written):
        with errors_at(path):
            written = convert_config(written)
        return _merge(Config(name=path.stem), written, str(path))
    with errors_at(path):
        base = preset(written.pop("preset")) if "preset" in written else Config()
    return _merge(base, written, str(path))


def _merge(base, written, where):
    """Return the dataclass instance `base` with the fields in `written` replaced, nested ones too."""
    if not isinstance(written, dict):
        raise ValueError(f"{where} must hold settings by name, got {written!r:.80}")
    kinds, changes = get_type_hints(type(base)), {}
    for key, value in _renamed(written, kinds).items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r:.80}; there are {', '.join(kinds)}")
        now, at = getattr(base, key), f"{where}: {key}"
        if is_dataclass(now):
            changes[key] = _merge(now, value, at)
        elif key == "training":
            if not isinstance(value, dict):
                raise ValueError(f"{at} must hold settings by name, got {value!r:.80}")
            unknown = value.keys() - now.keys()
            if unknown:
                raise ValueError(f"{at}: unknown stage {', '.join(map(str, unknown))}; there are {', '.join(now)}")
            changes[key] = {**now, **{stage: _merge(now[stage], v, f"{at}.{stage}") for stage, v in value.items()}}
        else:
            changes[key] = cast(value, kinds[key], at)
    with errors_at(where):
        return dataclasses.replace(base, **changes)


RENAMED = {  # earlier names of settings, so that files with them still load
    "adversary_start": "disc_start", "adversary_lr": "disc_lr", "clip_norm": "max_grad_norm",
    "extra_drop": "conditioner_dropout", "inversion": "vocoder", "patches": "vae_discriminator",
    "weighting": "loss_weighting",
}  # fmt: skip


def _renamed(written, known):
    """Return the settings under their present names."""
    now = {}
    for key, value in written.items():
        if key == "vocoder" and isinstance(value, dict):
            key = "hifigan"
        elif key in RENAMED and key not in known:
            key, value = RENAMED[key], "prediction" if (key, value) == ("weighting", "own") else value
        now[key] = value
    return now
