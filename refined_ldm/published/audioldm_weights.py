"""AudioLDM's own files and diffusers' copies of them -> the tensors of `UNet`, `MelVAE` and `HiFiGAN`.

The networks are the same and so are the numbers; only the names differ. A name that is not mapped here stays as it is,
and the network refuses it. The sizes of a network are read off its tensors, all but the width of its attention heads.
"""

import re
import warnings
from dataclasses import replace

import torch

from refined_ldm.config import preset
from refined_ldm.hifigan import HiFiGANConfig, fold_weight_norm
from refined_ldm.mel import MelConfig
from refined_ldm.unet import UNetConfig
from refined_ldm.vae import VAEConfig

TRANSFORMER_NAMES = (  # the same in AudioLDM and in diffusers
    (r"\.transformer_blocks\.0\.attn1\.to_out\.0\.", ".attention.0.to_out."),
    (r"\.transformer_blocks\.0\.attn2\.to_out\.0\.", ".attention.1.to_out."),
    (r"\.transformer_blocks\.0\.attn1\.", ".attention.0."),
    (r"\.transformer_blocks\.0\.attn2\.", ".attention.1."),
    (r"\.transformer_blocks\.0\.norm1\.", ".attention_norm.0."),
    (r"\.transformer_blocks\.0\.norm2\.", ".attention_norm.1."),
    (r"\.transformer_blocks\.0\.norm3\.", ".feed_forward_norm."),
    (r"\.transformer_blocks\.0\.ff\.net\.0\.proj\.", ".feed_forward.proj."),
    (r"\.transformer_blocks\.0\.ff\.net\.2\.", ".feed_forward.out."),
)
AUDIOLDM_UNET_NAMES = (
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.", lambda found: f"down.{int(found[1]) - 1}."),
    (r"^middle_block\.", "middle."),
    (r"^output_blocks\.", "up."),
    (r"^out\.0\.", "norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^film_emb\.", "film_embed."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".film.project."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".shortcut."),
    (r"\.op\.", ".conv."),
    *TRANSFORMER_NAMES,
)
DIFFUSERS_UNET_NAMES = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^class_embedding\.", "film_embed."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "middle.0."),
    (r"^mid_block\.attentions\.0\.", "middle.1."),
    (r"^mid_block\.resnets\.1\.", "middle.2."),
    (r"\.time_emb_proj\.", ".film.project."),
    (r"\.conv_shortcut\.", ".shortcut."),
    *TRANSFORMER_NAMES,
)
DIFFUSERS_VAE_NAMES = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.(?:to_q|query)\.", ".mid.attn_1.q."),
    (r"\.mid_block\.attentions\.0\.(?:to_k|key)\.", ".mid.attn_1.k."),
    (r"\.mid_block\.attentions\.0\.(?:to_v|value)\.", ".mid.attn_1.v."),
    (r"\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)

CONDITIONER = r"cond_stage_models?\.(0\.)?(model\.)?"  # where a checkpoint keeps it, AudioLDM's or its training code's
PIPELINE_PARTS = ("unet", "vae", "vocoder", "text_encoder", "scheduler")
PIPELINE_SETTINGS = {  # part of diffusers' AudioLDMPipeline -> settings without which it is another network
    "unet": {"class_embed_type": "simple_projection", "class_embeddings_concat": True},
    "vocoder": {"sampling_rate": 16_000},
    "scheduler": {"beta_schedule": "scaled_linear"},
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def audioldm_parts(published, average=True):
    """The `state_dict` of an AudioLDM checkpoint -> {"unet", "vae", "hifigan", "clap", "scale"}, each a dict by name.

    `average` takes the U-Net's running average where the file has one: its names are the U-Net's without the dots.
    "clap" keeps the conditioner's names, for `published_clap`; the one tensor of "scale" has the name "". What the file
    does not hold is left out.
    """
    unet = _below("model.diffusion_model.", published)
    averages = _below("model_ema.diffusion_model", published)
    if average and averages:
        if lacking := [name for name in unet if name.replace(".", "") not in averages]:
            raise ValueError(f"the running average of the U-Net lacks {', '.join(lacking[:5])}: take average=False")
        unet = {name: averages[name.replace(".", "")] for name in unet}
    first_stage = _below("first_stage_model.", published)
    vae = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    parts = {
        "unet": unet_from_audioldm(unet),
        "vae": {name: tensor for name, tensor in first_stage.items() if name.startswith(vae)},
        "hifigan": fold_weight_norm(_below("vocoder.", first_stage)),
        "clap": {name[at.end():]: tensor for name, tensor in published.items() if (at := re.match(CONDITIONER, name))},
        "scale": _below("scale_factor", published),
    }
    return {part: tensors for part, tensors in parts.items() if tensors}


def single_component(kind, published):
    """A U-Net, first stage ("vae") or vocoder ("hifigan") on its own, whoever named it -> parts as `audioldm_parts`."""
    if kind == "unet":
        named = unet_from_diffusers if "class_embedding.weight" in published else unet_from_audioldm
        return {"unet": named(published)}
    if kind == "hifigan":
        return {"hifigan": hifigan_from_transformers(published)}
    if any(name.startswith("encoder.down_blocks.") for name in published):
        return {"vae": vae_from_diffusers(published)}
    return audioldm_parts({f"first_stage_model.{name}": tensor for name, tensor in published.items()})


def audioldm_config(parts, betas=None):
    """The experiment that an AudioLDM checkpoint is, its sizes read off its parts, its noise off `betas` (steps,)."""
    noise = {}
    if betas is not None:
        noise = {"diffusion_steps": len(betas), "beta_start": _seven_digits(betas[0]),
                 "beta_end": _seven_digits(betas[-1])}  # fmt: skip
        even = torch.linspace(noise["beta_start"] ** 0.5, noise["beta_end"] ** 0.5, len(betas)) ** 2
        if not torch.allclose(betas, even, rtol=1e-3, atol=0):
            raise ValueError(f"the noise schedule from {noise['beta_start']} to {noise['beta_end']} is not AudioLDM's, "
                             "in which the square roots of betas are even")  # fmt: skip
    vocoder = hifigan_config(parts["hifigan"])
    return preset("baseline", unet=unet_config(parts["unet"]), vae=vae_config(parts["vae"]), hifigan=vocoder,
                  mel=MelConfig(n_mels=vocoder.n_mels), **noise)  # fmt: skip


def _seven_digits(beta):
    return float(f"{float(beta):.7g}")  # float32 in the file; decimal, and short, when it was chosen


def pipeline_parts(settings, tensors):
    """The files of diffusers' `AudioLDMPipeline`, by part, -> parts as `audioldm_parts` gives them."""
    mean, scale = (tensors["vocoder"].get(name, torch.tensor(rest)) for name, rest in (("mean", 0), ("scale", 1)))
    if settings["vocoder"].get("normalize_before") and (mean.any() or (scale != 1).any()):
        raise ValueError("vocoder/config.json: normalize_before changes the mel, which AudioLDM's vocoder does not")
    return {
        "unet": unet_from_diffusers(tensors["unet"]),
        "vae": vae_from_diffusers(tensors["vae"]),
        "hifigan": hifigan_from_transformers(tensors["vocoder"]),
        "clap": tensors["text_encoder"],
        "scale": {"": torch.tensor(float(settings["vae"]["scaling_factor"]))},
    }


def pipeline_config(settings, tensors):
    """The experiment that an `AudioLDMPipeline` is, from its config.json files and the shapes of its tensors."""
    for part, expected in PIPELINE_SETTINGS.items():
        for key, value in expected.items():
            if settings[part].get(key) != value:
                raise ValueError(f"{part}/config.json: {key} is {settings[part].get(key)!r}, AudioLDM has {value!r}")
    unet, vae = unet_from_diffusers(tensors["unet"]), vae_from_diffusers(tensors["vae"])
    vocoder, scheduler = settings["vocoder"], settings["scheduler"]
    return preset(
        "baseline",
        unet=unet_config(unet, _head_channels(settings["unet"], published_head_channels(unet))),
        vae=replace(vae_config(vae), norm_groups=settings["vae"].get("norm_num_groups", 32)),
        hifigan=HiFiGANConfig(
            n_mels=vocoder["model_in_dim"], channels=vocoder["upsample_initial_channel"],
            rates=tuple(vocoder["upsample_rates"]), kernels=tuple(vocoder["upsample_kernel_sizes"]),
            res_kernels=tuple(vocoder["resblock_kernel_sizes"]),
            res_dilations=tuple(map(tuple, vocoder["resblock_dilation_sizes"])),
            leaky_slope=vocoder.get("leaky_relu_slope", 0.1),
        ),
        mel=MelConfig(n_mels=vocoder["model_in_dim"]),
        diffusion_steps=scheduler["num_train_timesteps"], beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        parameterization=PREDICTIONS[scheduler.get("prediction_type", "epsilon")],
    )  # fmt: skip


def _head_channels(settings, published):
    """The width of the heads of diffusers' U-Net, whose `attention_head_dim` is the number of them."""
    widths = settings["block_out_channels"]
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]
    per_level = heads if isinstance(heads, list) else [heads] * len(widths)
    attended = ["CrossAttn" in kind for kind in settings["down_block_types"][:-1]] + [True]  # the middle always is
    found = [width / count for width, count, there in zip(widths, per_level, attended, strict=True) if there]
    if len(set(found)) == 1:
        return int(found[0])
    if isinstance(heads, list):
        raise ValueError(f"unet/config.json: heads of {found} channels; all levels of AudioLDM's have the same width")
    warnings.warn(
        f"unet/config.json gives every level {heads} heads, diffusers' default, so {found} channels wide; AudioLDM was "
        f"trained with heads of {published}, which are taken here",
        stacklevel=2,
    )
    return published


def unet_from_audioldm(published):
    """Tensors of AudioLDM's `UNetModel` -> those of `UNet`."""
    return {_rename(name, AUDIOLDM_UNET_NAMES): tensor for name, tensor in published.items()}


def unet_from_diffusers(published):
    """Tensors of diffusers' `UNet2DConditionModel` -> those of `UNet`, whose blocks are numbered through all levels."""
    per_level = 1 + len({name.split(".")[3] for name in published if name.startswith("down_blocks.0.resnets.")})
    attended = {name.split(".")[1] for name in published if re.match(r"up_blocks\.\d+\.attentions\.", name)}

    def place(found):
        side, level, kind, block = found.groups()
        first = int(level) * per_level
        if kind == "downsamplers":
            return f"down.{first + per_level - 1}.0."
        if kind == "upsamplers":
            return f"up.{first + per_level - 1}.{1 + (level in attended)}."
        return f"{side}.{first + int(block)}.{int(kind == 'attentions')}."

    blocks = r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
    return {_rename(name, ((blocks, place), *DIFFUSERS_UNET_NAMES)): tensor for name, tensor in published.items()}


def vae_from_diffusers(published):
    """Tensors of diffusers' `AutoencoderKL` -> those of `MelVAE`, whose decoder is numbered from fine to coarse."""
    last = max(int(name.split(".")[2]) for name in published if name.startswith("decoder.up_blocks."))
    names = (
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d+)\.resnets\.", lambda found: f".up.{last - int(found[1])}.block."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f".up.{last - int(found[1])}.upsample."),
        *DIFFUSERS_VAE_NAMES,
    )
    ours = {}
    for name, tensor in published.items():
        name = _rename(name, names)
        linear = ".attn_1." in name and tensor.ndim == 2  # the attention's 1 x 1 convolutions are matrices there
        ours[name] = tensor[:, :, None, None] if linear else tensor
    return ours


def hifigan_from_transformers(published):
    """Tensors of transformers' `SpeechT5HifiGan`, or of HiFi-GAN's own generator -> those of `HiFiGAN`."""
    named = {re.sub(r"^upsampler\.", "ups.", name): tensor for name, tensor in published.items()}
    return fold_weight_norm({name: tensor for name, tensor in named.items() if name not in ("mean", "scale")})


def published_head_channels(state):
    """The width of the attention heads: 64 in AudioLDM-L, which begins with 256 channels, 32 in S and M."""
    return 64 if len(state["conv_in.weight"]) >= 256 else 32


def unet_config(state, head_channels=None):
    """The sizes of the U-Net with these tensors (by our names); heads as wide as published if not given."""
    if "film_embed.weight" not in state:
        raise ValueError("the U-Net hears no caption vector (film_emb): only AudioLDM's first version does")
    first, latent_channels = state["conv_in.weight"].shape[:2]
    levels, attended = [[]], []  # width of every block, level by level
    for place in sorted({int(name.split(".")[1]) for name in state if name.startswith("down.")}):
        if f"down.{place}.0.conv.weight" in state:
            levels.append([])
            continue
        levels[-1].append(len(state[f"down.{place}.0.conv1.weight"]))
        if f"down.{place}.1.norm.weight" in state and 2 ** (len(levels) - 1) not in attended:
            attended.append(2 ** (len(levels) - 1))
    return UNetConfig(
        latent_channels=latent_channels,
        model_channels=first,
        channel_mult=tuple(level[0] // first for level in levels),
        num_res_blocks=len(levels[0]),
        attention_resolutions=tuple(reversed(attended)),
        head_channels=head_channels or published_head_channels(state),
        attention_layers=sum(1 for name in state if re.match(r"middle\.1\.attention_norm\.\d+\.weight$", name)),
        embedding_dim=state["film_embed.weight"].shape[1],
    )


def vae_config(state):
    """The sizes of the VAE with these tensors (by our names)."""
    first, latent_channels = len(state["encoder.conv_in.weight"]), state["post_quant_conv.weight"].shape[0]
    levels = sorted({int(name.split(".")[2]) for name in state if name.startswith("encoder.down.")})
    widths = [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in levels]
    blocks = {name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}
    return VAEConfig(latent_channels, first, tuple(width // first for width in widths), len(blocks))


def hifigan_config(state):
    """The sizes of the vocoder with these tensors; what they do not tell is as in AudioLDM's 16 kHz / 64-bin one."""
    published = HiFiGANConfig()
    kernels = tuple(state[name].shape[2] for name in sorted(state) if re.match(r"ups\.\d\.weight$", name))
    if kernels != published.kernels:
        raise ValueError(f"the vocoder's kernels are {kernels}, those of 16 kHz and 64 bins are {published.kernels}")
    blocks = len([name for name in state if name.endswith(".convs1.0.weight")])
    res_kernels = tuple(state[f"resblocks.{i}.convs1.0.weight"].shape[2] for i in range(blocks // len(kernels)))
    return replace(published, n_mels=state["conv_pre.weight"].shape[1], channels=len(state["conv_pre.weight"]),
                   res_kernels=res_kernels)  # fmt: skip


def _below(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rename(name, rules):
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name
