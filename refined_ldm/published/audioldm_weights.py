"""AudioLDM's own files and diffusers' copies of them -> the parts of a model and their configuration.

The sizes of a network are read off its tensors, all but the width of its attention heads.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from refined_ldm.config import Config, preset
from refined_ldm.hifigan import HiFiGANConfig, fold_weight_norm
from refined_ldm.mel import MelConfig
from refined_ldm.published.audioldm_names import (
    AVERAGE_NAMES,
    Tensors,
    hifigan_from_transformers,
    rename_tensor,
    unet_from_audioldm,
    unet_from_diffusers,
    vae_from_diffusers,
)
from refined_ldm.published.audioldm_yaml import checked
from refined_ldm.published.clap_weights import shape_of
from refined_ldm.unet import UNetConfig
from refined_ldm.vae import VAEConfig

CONDITIONER = r"cond_stage_models?\.(0\.)?(model\.)?"  # where a checkpoint keeps it, AudioLDM's or its training code's
PIPELINE_PARTS = ("unet", "vae", "vocoder", "text_encoder", "scheduler")
PIPELINE_SETTINGS = {  # part of diffusers' AudioLDMPipeline -> settings without which it is another network
    "unet": {"class_embed_type": "simple_projection", "class_embeddings_concat": True},
    "vocoder": {"sampling_rate": 16_000},
    "scheduler": {"beta_schedule": "scaled_linear"},
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def audioldm_parts(published: Mapping[str, torch.Tensor], average: bool = True) -> dict[str, Tensors]:
    """The `state_dict` of an AudioLDM checkpoint -> {"unet", "vae", "hifigan", "clap", "scale"}, each a dict by name.

    `average` takes the U-Net's running average where the file has one: its names are the U-Net's without the dots.
    "clap" keeps the conditioner's names, for `clap_from_published`; the one tensor of "scale" has the name "". Parts
    that the file lacks are left out. Raises ValueError for an incomplete running average.
    """
    unet = _below("model.diffusion_model.", published)
    averages = _below("model_ema.diffusion_model", published)
    if averages and not unet:
        if not average:
            raise ValueError("it holds the U-Net's running average alone: take average=True")
        unet = {rename_tensor(name, AVERAGE_NAMES): tensor for name, tensor in averages.items()}
    elif average and averages:
        if lacking := [name for name in unet if name.replace(".", "") not in averages]:
            raise ValueError(f"the running average of the U-Net lacks {', '.join(lacking[:5])}: take average=False")
        unet = {name: averages[name.replace(".", "")] for name in unet}
    first_stage = _below("first_stage_model.", published)
    vae = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    parts = {
        "unet": unet_from_audioldm(unet),
        "vae": {name: tensor for name, tensor in first_stage.items() if name.startswith(vae)},
        "hifigan": fold_weight_norm(_below("vocoder.", first_stage)),
        "clap": {name[at.end() :]: tensor for name, tensor in published.items() if (at := re.match(CONDITIONER, name))},
        "scale": {name: scalar(tensor, "scale_factor") for name, tensor in _below("scale_factor", published).items()},
    }
    return {part: tensors for part, tensors in parts.items() if tensors}


def scalar(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor of one number with any axes -> (); ValueError naming it if it has more."""
    if tensor.numel() != 1:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}: one number was expected")
    return tensor.reshape(())


def single_component(kind: str, published: Tensors) -> dict[str, Tensors]:
    """A single U-Net, first stage ("vae") or vocoder ("hifigan") in any known naming -> parts as `audioldm_parts`."""
    if kind == "unet":
        diffusers = any(name.startswith("down_blocks.") for name in published)
        named = unet_from_diffusers if diffusers else unet_from_audioldm
        return {"unet": named(published)}
    if kind == "hifigan":
        return {"hifigan": hifigan_from_transformers(published)}
    if any(name.startswith("encoder.down_blocks.") for name in published):
        return {"vae": vae_from_diffusers(published)}
    return audioldm_parts({f"first_stage_model.{name}": tensor for name, tensor in published.items()})


def audioldm_config(parts: dict[str, Tensors], betas: torch.Tensor | None = None) -> Config:
    """The configuration of an AudioLDM checkpoint, from its parts' shapes and its noise schedule `betas` (steps,).

    Raises ValueError for another noise schedule, or naming a tensor that is missing.
    """
    noise = {}
    if betas is not None:
        precision = next(kind for kind in (torch.bfloat16, torch.float16, torch.float32) if _survives(betas, kind))
        noise = {"diffusion_steps": len(betas), "beta_start": _shortest(betas[0], precision),
                 "beta_end": _shortest(betas[-1], precision)}  # fmt: skip
        even = torch.linspace(noise["beta_start"] ** 0.5, noise["beta_end"] ** 0.5, len(betas)) ** 2
        if not torch.allclose(betas, even, rtol=max(1e-3, torch.finfo(precision).eps), atol=0):
            raise ValueError(
                f"the noise schedule from {noise['beta_start']} to {noise['beta_end']} is not AudioLDM's, "
                "in which the square roots of betas are even"
            )
    vocoder = hifigan_config(parts["hifigan"])
    return preset(
        "baseline",
        unet=unet_config(parts["unet"]),
        vae=vae_config(parts["vae"]),
        hifigan=vocoder,
        mel=MelConfig(n_mels=vocoder.n_mels),
        **noise,
    )


def _survives(numbers, precision):
    """Whether numbers are the same in `precision`, so that the file may have held them in it."""
    return torch.equal(numbers.to(precision).float(), numbers.float())


def _shortest(beta, precision):
    """The decimal that was chosen: the shortest, of seven digits at most, which is `beta` in this precision."""
    decimals = (float(f"{float(beta):.{digits}g}") for digits in range(1, 8))
    return next((short for short in decimals if torch.tensor(short).to(precision) == beta), float(f"{beta:.7g}"))


def pipeline_parts(settings: dict[str, dict], tensors: dict[str, Tensors]) -> dict[str, Tensors]:
    """The files of diffusers' `AudioLDMPipeline`, by part, -> parts as `audioldm_parts` gives them."""
    mean, scale = (tensors["vocoder"].get(name, torch.tensor(rest)) for name, rest in (("mean", 0), ("scale", 1)))
    if settings["vocoder"].get("normalize_before") and (mean.any() or (scale != 1).any()):
        raise ValueError("vocoder/config.json: normalize_before changes the mel, which AudioLDM's vocoder does not")
    return {
        "unet": unet_from_diffusers(tensors["unet"]),
        "vae": vae_from_diffusers(tensors["vae"]),
        "hifigan": hifigan_from_transformers(tensors["vocoder"]),
        "clap": tensors["text_encoder"],
        "scale": {"": torch.tensor(_setting(settings, "vae", "scaling_factor", float))},
    }


def pipeline_config(settings: dict[str, dict], tensors: dict[str, Tensors]) -> Config:
    """The configuration of an `AudioLDMPipeline`, from its config.json files and the shapes of its tensors.

    Raises ValueError naming the setting or tensor that is missing or that AudioLDM does not have.
    """
    for part, expected in PIPELINE_SETTINGS.items():
        for key, value in expected.items():
            if settings[part].get(key) != value:
                raise ValueError(f"{part}/config.json: {key} is {settings[part].get(key)!r}, AudioLDM has {value!r}")
    unet, vae = unet_from_diffusers(tensors["unet"]), vae_from_diffusers(tensors["vae"])
    vocoder = hifigan_from_transformers(tensors["vocoder"])
    unet_sizes, vae_sizes = unet_config(unet), vae_config(vae)
    groups = _setting(settings, "vae", "norm_num_groups", int, 32)
    if vae_sizes.channels % groups:
        raise ValueError(f"vae/config.json: norm_num_groups is {groups}, no divisor of {vae_sizes.channels} channels")
    return preset(
        "baseline",
        unet=replace(unet_sizes, head_channels=_head_channels(settings, unet_sizes)),
        vae=replace(vae_sizes, norm_groups=groups),
        hifigan=_vocoder_config(settings, vocoder),
        mel=MelConfig(n_mels=vocoder_sizes(vocoder)["n_mels"]),
        diffusion_steps=_setting(settings, "scheduler", "num_train_timesteps", int, most=100_000),
        beta_start=_setting(settings, "scheduler", "beta_start", float),
        beta_end=_setting(settings, "scheduler", "beta_end", float),
        parameterization=PREDICTIONS[
            _setting(settings, "scheduler", "prediction_type", str, "epsilon", among=PREDICTIONS)
        ],
    )


def _setting(settings, part, key, kind, default=None, least=1, most=None, among=None):
    """A setting of one part of a pipeline, of this kind; ValueError naming it if it is missing or another."""
    place, value = f"{part}/config.json: {key}", settings[part].get(key)
    if value is None and default is None:
        raise ValueError(f"{place} is missing")
    value = default if value is None else checked(place, value, kind, least)
    if among and value not in among:
        raise ValueError(f"{place} is {value!r}: known are {', '.join(among)}")
    if most and value > most:
        raise ValueError(f"{place} is {value}: {most} is the most")
    return value


def _vocoder_config(settings, state):
    """The vocoder's configuration; settings and tensors must agree on the sizes."""
    sizes = vocoder_sizes(state)
    keys = {"n_mels": ("model_in_dim", int), "channels": ("upsample_initial_channel", int),
            "kernels": ("upsample_kernel_sizes", list), "res_kernels": ("resblock_kernel_sizes", list)}  # fmt: skip
    for size, (key, kind) in keys.items():
        value = _setting(settings, "vocoder", key, kind)
        if (tuple(value) if kind is list else value) != sizes[size]:
            raise ValueError(f"vocoder/config.json: {key} is {value}, but the weights have {sizes[size]}")
    rates = _setting(settings, "vocoder", "upsample_rates", list)
    key, dilations = "vocoder/config.json: resblock_dilation_sizes", settings["vocoder"].get("resblock_dilation_sizes")
    dilations = [checked(key, row, list, 1) for row in dilations] if isinstance(dilations, list) else []
    if len(rates) != len(sizes["kernels"]) or len(dilations) != len(sizes["res_kernels"]):
        raise ValueError(
            f"vocoder/config.json: there must be one of upsample_rates for each of {sizes['kernels']} "
            f"and a list of resblock_dilation_sizes for each of {sizes['res_kernels']}, got {rates} and "
            f"{dilations}"
        )
    slope = _setting(settings, "vocoder", "leaky_relu_slope", float, 0.1)
    return HiFiGANConfig(**sizes, rates=tuple(rates), res_dilations=tuple(map(tuple, dilations)), leaky_slope=slope)


def _head_channels(settings, sizes):
    """The width of the heads of diffusers' U-Net of these sizes, whose `attention_head_dim` is the number of them."""
    widths = _setting(settings, "unet", "block_out_channels", list)
    ours = [mult * sizes.model_channels for mult in sizes.channel_mult]
    if widths != ours:
        raise ValueError(f"unet/config.json: block_out_channels is {widths}, but the weights have {ours}")
    key = "num_attention_heads" if settings["unet"].get("num_attention_heads") else "attention_head_dim"
    kind = list if isinstance(settings["unet"].get(key), list) else int
    heads = _setting(settings, "unet", key, kind)
    per_level = heads if kind is list else [heads] * len(widths)
    blocks = settings["unet"].get("down_block_types")
    if not isinstance(blocks, list) or not len(blocks) == len(per_level) == len(widths):
        raise ValueError(
            f"unet/config.json: there must be one of down_block_types and of {key} for each of "
            f"block_out_channels, got {blocks} and {heads} for {widths}"
        )
    attended = ["CrossAttn" in str(kind) for kind in blocks[:-1]] + [True]  # the middle always is
    found = [width / count for width, count, there in zip(widths, per_level, attended, strict=True) if there]
    if len(set(found)) == 1 and found[0].is_integer():
        return int(found[0])
    if kind is list:
        raise ValueError(f"unet/config.json: heads of {found} channels; all levels of AudioLDM's have the same width")
    warnings.warn(
        f"unet/config.json gives every level {heads} heads, diffusers' default, so {found} channels wide; AudioLDM was "
        f"trained with heads of {sizes.head_channels}, which are taken here",
        stacklevel=2,
    )
    return sizes.head_channels


def unet_config(state: Tensors, head_channels: int | None = None) -> UNetConfig:
    """The sizes of the U-Net with these tensors (by our names); ValueError naming the one that is missing.

    No tensor shows the width of the attention heads: as published if not given, which is 64 in AudioLDM-L, whose first
    layer has 256 channels, and 32 in S and M.
    """
    if not any(name.startswith("film_embed.") for name in state):
        raise ValueError(
            "the U-Net has no input for a caption embedding (film_emb): only AudioLDM's first version does"
        )
    shape_of("film_embed.bias", state, "the U-Net", 1)
    first, latent_channels, *_ = shape_of("conv_in.weight", state, "the U-Net", 4)
    levels, attended = [[]], []  # width of every block, level by level
    for place in sorted({int(found[1]) for name in state if (found := re.match(r"down\.(\d+)\.", name))}):
        if any(name.startswith(f"down.{place}.0.conv.") for name in state):
            levels.append([])
            continue
        levels[-1].append(shape_of(f"down.{place}.0.conv1.weight", state, "the U-Net", 4)[0])
        if any(name.startswith(f"down.{place}.1.") for name in state) and 2 ** (len(levels) - 1) not in attended:
            attended.append(2 ** (len(levels) - 1))
    if not all(levels):
        raise ValueError("a level of the U-Net holds no block: the file is not whole")
    attention = r"middle\.1\.attention(?:_norm)?\.(\d+)\."
    return UNetConfig(
        latent_channels=latent_channels,
        model_channels=first,
        channel_mult=tuple(level[0] // first for level in levels),
        num_res_blocks=len(levels[0]),
        attention_resolutions=tuple(reversed(attended)),
        head_channels=head_channels or (64 if first >= 256 else 32),
        attention_layers=len({found[1] for name in state if (found := re.match(attention, name))}),
        embedding_dim=shape_of("film_embed.weight", state, "the U-Net", 2)[1],
    )


def vae_config(state: Tensors) -> VAEConfig:
    """The sizes of the VAE with these tensors (by our names); ValueError naming the one that is missing."""
    first = shape_of("encoder.conv_in.weight", state, "the first stage", 4)[0]
    latent_channels = shape_of("post_quant_conv.weight", state, "the first stage", 4)[0]
    blocks = {}  # level -> its blocks
    for name in state:
        if found := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name):
            blocks.setdefault(int(found[1]), set()).add(found[2])
    convs = (f"encoder.down.{level}.block.0.conv1.weight" for level in sorted(blocks) or [0])
    widths = [shape_of(conv, state, "the first stage", 4)[0] for conv in convs]
    return VAEConfig(latent_channels, first, tuple(width // first for width in widths), max(map(len, blocks.values())))


def vocoder_sizes(state: Tensors) -> dict[str, Any]:
    """The settings of a `HiFiGANConfig` that a vocoder's tensors determine; ValueError naming one that is missing."""
    channels, n_mels, _ = shape_of("conv_pre.weight", state, "the vocoder", 3)
    ups, blocks = (
        len({found[1] for name in state if (found := re.match(pattern, name))})
        for pattern in (r"ups\.(\d+)\.", r"resblocks\.(\d+)\.")
    )
    kernels = tuple(shape_of(f"ups.{i}.weight", state, "the vocoder", 3)[2] for i in range(ups))
    if not ups or blocks % ups:
        raise ValueError(f"the vocoder holds {blocks} residual blocks for {ups} upsamplings: the file is not whole")
    each = (f"resblocks.{i}.convs1.0.weight" for i in range(blocks // ups))
    res_kernels = tuple(shape_of(name, state, "the vocoder", 3)[2] for name in each)
    return {"n_mels": n_mels, "channels": channels, "kernels": kernels, "res_kernels": res_kernels}


def hifigan_config(state: Tensors) -> HiFiGANConfig:
    """The configuration of the vocoder with these tensors; the rest is as in AudioLDM's at 16 kHz and 64 mel bins.

    Raises ValueError for other kernels, or naming the tensor that is missing.
    """
    published, sizes = HiFiGANConfig(), vocoder_sizes(state)
    if sizes["kernels"] != published.kernels:
        raise ValueError(
            f"the vocoder's kernels are {sizes['kernels']}, those of 16 kHz and 64 bins are {published.kernels}"
        )
    return replace(published, **sizes)


def _below(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
