"""AudioLDM's own files and diffusers' copies of them -> the tensors of `UNet`, `MelVAE` and `HiFiGAN`.

The networks are the same and so are the numbers; only the names differ. A name that is not mapped here stays as it is,
and the network refuses it. The sizes of a network are read off its tensors, all but the width of its attention heads.
"""

import re

from refined_ldm.hifigan import fold_weight_norm
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


def audioldm_parts(published, average=True):
    """The `state_dict` of an AudioLDM checkpoint -> {"unet", "vae", "hifigan", "clap", "scale"}, each a dict by name.

    `average` takes the U-Net's running average where the file has one: its names are the U-Net's without the dots.
    "clap" keeps LAION-CLAP's names, for `published_clap`; the one tensor of "scale" has the name "". What the file does
    not hold is left out.
    """
    unet = _below("model.diffusion_model.", published)
    averages = _below("model_ema.diffusion_model", published)
    if average and averages:
        unet = {name: averages[name.replace(".", "")] for name in unet}
    first_stage = _below("first_stage_model.", published)
    vae = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    parts = {
        "unet": unet_from_audioldm(unet),
        "vae": {name: tensor for name, tensor in first_stage.items() if name.startswith(vae)},
        "hifigan": fold_weight_norm(_below("vocoder.", first_stage)),
        "clap": _below("cond_stage_model.model.", published),
        "scale": _below("scale_factor", published),
    }
    return {part: tensors for part, tensors in parts.items() if tensors}


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


def unet_config(state, head_channels=32):
    """The sizes of the U-Net with these tensors (by our names). Its heads are 32 wide in S and M, 64 in L."""
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
        head_channels=head_channels,
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


def _below(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rename(name, rules):
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name
