"""AudioLDM's training YAML (`audioldm_original.yaml`, `audioldm_custom.yaml`) -> the settings of a `Config`.

Every key is accounted for. It is honoured, or it has the one value there is here (ONLY), or it says nothing to us
(UNUSED); any other key is refused by its dotted path. A `target` is never imported: its name selects a known part.
"""

import re
from contextlib import suppress
from typing import Any

from refined_ldm.base.plain_yaml import LARGEST_NUMBER, leaves

AUDIOLDM_TARGETS = {  # place -> how the name of the only part there ends
    "model": "ddpm.LatentDiffusion",
    "model.params.first_stage_config": "autoencoder.AutoencoderKL",
    "model.params.unet_config": "openaimodel.UNetModel",
}
CONDITIONERS = {  # how its name ends -> our name of it, width of its embedding, length of an embedding there
    r"CLAPAudioEmbeddingClassifierFreev2": ("laion-clap", 512, 1.0),
    r"msclap\.models\.clap\d?\.CLAP": ("ms-clap-2023", 1024, 32.0),  # fed as its last layer norm leaves it: sqrt(1024)
}
FIRST, DD = "model.params.first_stage_config.params.", "model.params.first_stage_config.params.ddconfig."
UNET = "model.params.unet_config.params."

ONLY = {  # key -> the value that it may have, should it be there
    "augmentation.mixup": 0,  # training on sums of recordings was switched off in every published configuration
    "augmentation.freqm": 0, "augmentation.timem": 0,  # masks in the spectrogram, likewise
    "preprocessing.mel.freqm": 0, "preprocessing.mel.timem": 0,
    "model.params.first_stage_key": "fbank",  # log-mels
    "model.params.num_timesteps_cond": 1,
    "model.params.beta_schedule": "linear",  # linear in the square root of beta
    "model.params.loss_type": "l2",
    "model.params.optimize_ddpm_parameter": True,
    "model.params.scale_by_std": True,  # latents are scaled to unit variance
    "model.params.use_ema": True,
    FIRST + "image_key": "fbank",
    FIRST + "subband": 1, FIRST + "time_shuffle": 1,  # the mel is encoded as it is
    DD + "double_z": True,  # mean and variance
    DD + "in_channels": 1, DD + "out_ch": 1,
    DD + "downsample_time": False,  # no further than frequency
    DD + "attn_resolutions": [],  # attention in the middle alone
    DD + "dropout": 0,
    UNET + "context_dim": None,  # no cross-attention: captions enter through FiLM
    UNET + "use_spatial_transformer": True, UNET + "transformer_depth": 1,
    UNET + "extra_sa_layer": False,  # none in the released AudioLDM, whose configuration leaves this key out
    UNET + "dropout": 0,
}  # fmt: skip
UNUSED = (  # patterns of whole keys
    r"variables\..*",  # a place for anchors: what refers to them is read
    r"(log_directory|project)",  # `--run` names the folder; figures go to CSV files there
    r"(precision|seed)",  # the device decides; `--seed`
    r"data\.(val|test)",  # only training data are opened; `evaluate` compares folders
    r"data\.class_label_indices",  # labels are no condition
    r"step\.(validation_every_n_epochs|limit_val_batches|save_top_k)",  # the last two checkpoints are kept
    r"preprocessing\.audio\.max_wav_value",  # not used: samples are in [-1, 1]
    r"model\.params\.(monitor|log_every_t|clip_denoised)",  # what its trainer logs
    r"model\.params\.scheduler_config\..*",  # not used since warm-up is `warmup_steps`
    re.escape(FIRST) + r"(monitor|batchsize|lossconfig\..*)",  # of its own trainer; our stages share one batch size
    re.escape(DD) + r"resolution",  # of images; convolutions take any length
    re.escape(UNET) + r"image_size",  # likewise
)
CONDITIONER_ONLY = {
    "cond_stage_key": "text", "conditioning_key": "film",  # captions, through FiLM
    "params.embed_mode": "text",  # its training puts in the sound's own embedding three times in ten; ours does not
    "params.text_model": "gpt2", "params.transformer_embed_dim": 768, "params.out_emb": 768,
    "params.audioenc_name": "HTSAT",
}  # fmt: skip
CONDITIONER_UNUSED = (
    r"params\.amodel",  # HTSAT-tiny or -base: read off the file
    # Both conditioners keep the mel settings that they were trained with, 44.1 or 48 kHz and the mel bank in their
    # file; the published wrappers overwrite these too.
    r"params\.(sampling_rate|sample_rate|fmin|fmax|hop_size|window_size|mel_bins|classes_num)",
)


def is_published(written: dict) -> bool:
    """Whether a configuration is AudioLDM's: ours has neither of its sections."""
    return not {"model", "preprocessing"}.isdisjoint(written)


def convert_config(written: dict) -> dict[str, Any]:
    """AudioLDM's tree of settings -> ours by the names of `Config`; ValueError naming a key that cannot be followed."""
    keys = _Keys(written)
    for place, part in AUDIOLDM_TARGETS.items():
        target = keys.take(f"{place}.target", str)
        if not f".{target}".endswith(f".{part}"):
            raise ValueError(f"{place}.target is {target!r}: the only one known is …{part}")
    clap, embedding_gain, clap_checkpoint = _conditioner(keys)
    keys.take_only(ONLY)
    settings = {
        "clap": clap,
        "clap_checkpoint": clap_checkpoint,
        "start_from": keys.take("reload_from_ckpt", str, default=""),
        "vae_checkpoint": keys.take(FIRST + "reload_from_ckpt", str, default=""),
        **_networks(keys, embedding_gain),
        "diffusion_steps": keys.take("model.params.timesteps", int),
        "beta_start": keys.take("model.params.linear_start", float),
        "beta_end": keys.take("model.params.linear_end", float),
        "parameterization": keys.take("model.params.parameterization", str, default="eps"),
        "unconditional_probability": keys.take("model.params.unconditional_prob_cfg", float, default=0.1),
        "data": keys.take("metadata_root", str),
        "data_sets": _data_sets(keys),
        "steps": keys.take("model.params.evaluation_params.ddim_sampling_steps", int, default=200),
        "guidance_scale": keys.take("model.params.evaluation_params.unconditional_guidance_scale", float, default=3.5),
        "candidates": keys.take("model.params.evaluation_params.n_candidates_per_samples", int, default=1),
        "training": _training(keys),
    }
    keys.finish()
    return settings


def _conditioner(keys):
    """-> our name of it, the length its embeddings had in training, and the path of its file ("" if none is named)."""
    section = "model.params.cond_stage_config."
    names = sorted({key.removeprefix(section).split(".")[0] for key in keys.left if key.startswith(section)})
    if len(names) != 1:
        raise ValueError(f"{section[:-1]} must name one conditioner, got {', '.join(names) or 'none'}")
    place = f"{section}{names[0]}."
    target = keys.take(place + "target", str)
    known = [part for ending, part in CONDITIONERS.items() if re.search(rf"(^|\.){ending}$", target)]
    if not known:
        raise ValueError(
            f"{place}target is {target!r}: known are …CLAPAudioEmbeddingClassifierFreev2 (LAION-CLAP) and "
            "…msclap.models.clap3.CLAP (MS-CLAP 2023)"
        )
    name, width, gain = known[0]
    keys.take_only({place + key: value for key, value in CONDITIONER_ONLY.items()})
    keys.drop([re.escape(place) + pattern for pattern in CONDITIONER_UNUSED])
    film = UNET + "extra_film_condition_dim"
    projection = place + "params.d_proj"
    for key, found in ((film, keys.left.get(film)), (projection, keys.left.pop(projection, None))):
        if found not in (None, width):
            raise ValueError(f"{key} is {found}, but {name} embeds in {width} numbers")
    return name, gain, keys.take(place + "params.pretrained_path", str, default="")


def _networks(keys, embedding_gain):
    """Sizes of mel, VAE, U-Net and vocoder, and how long a clip is."""
    rate = keys.same(int, "preprocessing.audio.sampling_rate", "model.params.sampling_rate", FIRST + "sampling_rate")
    if rate != 16_000:
        raise ValueError(f"preprocessing.audio.sampling_rate is {rate}: recordings are read at 16000 Hz")
    hop = keys.take("preprocessing.stft.hop_length", int)
    bins = keys.same(int, "preprocessing.mel.n_mel_channels", DD + "mel_bins")
    channels = keys.same(
        int,
        "model.params.channels",
        FIRST + "embed_dim",
        DD + "z_channels",
        UNET + "in_channels",
        UNET + "out_channels",
    )
    vae_mult, unet_mult = keys.take(DD + "ch_mult", list), keys.take(UNET + "channel_mult", list)
    for key, levels in ((DD + "ch_mult", vae_mult), (UNET + "channel_mult", unet_mult)):
        if not levels:
            raise ValueError(f"{key} is empty: there must be a level at least")
    width = keys.take(DD + "ch", int)
    if width % 32:
        raise ValueError(f"{DD}ch is {width}: it must be a multiple of 32, for its norms have 32 groups")
    seconds = _seconds(keys, rate, hop, bins, 2 ** (len(vae_mult) - 1), 2 ** (len(unet_mult) - 1))
    return {
        "mel": {"sample_rate": rate, "n_fft": keys.same(int, "preprocessing.stft.filter_length",
                                                        "preprocessing.stft.win_length"),
                "hop_length": hop, "n_mels": bins, "fmin": keys.take("preprocessing.mel.mel_fmin", float),
                "fmax": keys.take("preprocessing.mel.mel_fmax", float)},
        "vae": {"latent_channels": channels, "channels": width, "channel_mult": vae_mult,
                "num_res_blocks": keys.take(DD + "num_res_blocks", int)},
        "unet": {"latent_channels": channels, "model_channels": keys.take(UNET + "model_channels", int),
                 "channel_mult": unet_mult, "num_res_blocks": keys.take(UNET + "num_res_blocks", int),
                 "attention_resolutions": keys.take(UNET + "attention_resolutions", list),
                 "head_channels": keys.take(UNET + "num_head_channels", int),
                 "embedding_dim": keys.take(UNET + "extra_film_condition_dim", int), "embedding_gain": embedding_gain},
        "hifigan": {"n_mels": bins},
        "seconds": seconds,
    }  # fmt: skip


def _seconds(keys, rate, hop, bins, vae_factor, unet_factor):
    """Length of a clip: what `latent_t_size` latent frames hold. The mel's bins must fill `latent_f_size`."""
    frames, places = keys.take("model.params.latent_t_size", int), keys.take("model.params.latent_f_size", int)
    if places * vae_factor != bins:
        raise ValueError(
            f"model.params.latent_f_size is {places}, but preprocessing.mel.n_mel_channels {bins} / "
            f"{vae_factor} by the first stage is {bins / vae_factor:g}"
        )
    for name, size in (("latent_t_size", frames), ("latent_f_size", places)):
        if size % unet_factor:
            raise ValueError(
                f"model.params.{name} is {size}: it must be a multiple of {unet_factor}, which the levels "
                f"of {UNET}channel_mult halve away"
            )
    seconds, duration = frames * vae_factor * hop / rate, keys.take("preprocessing.audio.duration", float)
    if round(duration * rate) < round(seconds * rate):
        raise ValueError(
            f"preprocessing.audio.duration is {duration:g} s, shorter than the {seconds:g} s of "
            f"model.params.latent_t_size {frames} x {vae_factor} x hop {hop} / {rate} Hz"
        )
    return seconds


def _data_sets(keys):
    """The names of the data sets to train on, together."""
    names = keys.left.pop("data.train", None)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"data.train must be a name or a list of names, got {names!r}")
    add_ons = keys.left.pop("data.dataloader_add_ons", None) or []
    if add_ons not in ([], ["waveform_rs_48k"]):  # a copy for LAION-CLAP; conditioners here resample
        raise ValueError(f"data.dataloader_add_ons may be [] or [waveform_rs_48k], got {add_ons}")
    return names


def _training(keys):
    """The settings of every stage. What the file says of the U-Net's training is kept; AudioLDM's own code adds
    constant steps after a linear warm-up, AdamW as torch has it, no clipping, and an average over 10,000 steps.
    """
    common = {
        "max_steps": keys.take("step.max_steps", int),
        "save_every": keys.take("step.save_checkpoint_every_n_steps", int),
        "batch_size": keys.take("model.params.batchsize", int),
        "warmup_steps": keys.take("model.params.warmup_steps", int, default=10_000, least=0),
        "lr_schedule": "constant",
    }
    lr = keys.take("model.params.base_learning_rate", float)
    vae_lr = keys.take("model.params.first_stage_config.base_learning_rate", float, default=lr)
    return {
        "vae": {**common, "lr": vae_lr},
        "clap": {**common, "lr": 1e-5},  # MS-CLAP's
        "ldm": {
            **common,
            "lr": lr,
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "max_grad_norm": 0,
            "ema_decay": 0.9999,
        },
        "hifigan": {**common, "lr": 2e-4, "betas": [0.8, 0.99], "crop_frames": 52},  # HiFi-GAN's
    }


class _Keys:
    """The settings of a tree by dotted path; each is taken once, and what is left at the end was not understood."""

    def __init__(self, tree):
        self.left = dict(leaves(tree))

    def take(self, key, kind, default=None, least=1):
        """The value of `key`; `default` if it is missing or null, ValueError if there is no default."""
        value = self.left.pop(key, None)
        if value is None:
            if default is None:
                raise ValueError(f"{key} is missing")
            return default
        return checked(key, value, kind, least)

    def same(self, kind, first, *others):
        """The value of the key `first`, which others repeat."""
        value = self.take(first, kind)
        for key in others:
            if (again := self.take(key, kind, default=value)) != value:
                raise ValueError(f"{first} is {value}, but {key} is {again}: they must be equal")
        return value

    def take_only(self, allowed):
        """Drop the keys of `allowed`; ValueError if one has another value than there."""
        for key, value in allowed.items():
            if key in self.left and self.left[key] != value:
                raise ValueError(f"{key} is {self.left[key]!r:.80}: here it can only be {value!r}")
            self.left.pop(key, None)

    def drop(self, patterns):
        self.left = {key: value for key, value in self.left.items()
                     if not any(re.fullmatch(pattern, key) for pattern in patterns)}  # fmt: skip

    def finish(self):
        """Raise ValueError if a key is left that was not used."""
        self.drop(UNUSED)
        if self.left:
            raise ValueError(f"unknown key {', '.join(self.left)}")


def checked(key: str, value: Any, kind: type, least: int) -> Any:
    """`value` as `kind`: int from `least` on, float (which may be written 1e-4), str, or list of ints from 1 on."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_NUMBER:
        value = int(value)
    whole = [value] if kind is int else value if kind is list and isinstance(value, list) else []
    beyond = type(value) in (int, float) and not abs(value) < LARGEST_NUMBER
    if type(value) is not kind or beyond or any(type(n) is not int or n < least for n in whole):
        expected = {
            int: f"a whole number from {least} on",
            float: "a number",
            str: "text",
            list: "a list of whole numbers",
        }
        raise ValueError(f"{key} must be {expected[kind]}, got {value!r:.80}")
    return value
