"""The names of tensors in AudioLDM's and diffusers' files -> those in `UNet`, `MelVAE` and `HiFiGAN`.

The networks are the same and so are the numbers; only the names differ. A name that is not mapped here stays as it is,
and the network refuses it.
"""

import re
from collections.abc import Iterable

import torch

from refined_ldm.hifigan import fold_weight_norm

Tensors = dict[str, torch.Tensor]

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
AVERAGE_NAMES = (  # of the running average, which have lost their dots -> AudioLDM's own
    (r"(weight|bias)$", r".\1"),
    (r"^(input_blocks|output_blocks)(\d+)(\d)", r"\1.\2.\3"),  # no block holds more than ten layers
    (r"^(middle_block|time_embed|out)(\d)", r"\1.\2"),
    (r"(in_layers|emb_layers|out_layers)(\d)", r".\1.\2"),
    (r"(?<=\d)(skip_connection|op|conv|norm|proj_in|proj_out)(?=\.)", r".\1"),
    (r"transformer_blocks(\d)(attn\d|norm\d|ff)", r".transformer_blocks.\1.\2"),
    (r"(attn\d)(to_[qkv])", r"\1.\2"),
    (r"(attn\d)to_out(\d)", r"\1.to_out.\2"),
    (r"ffnet(\d)", r"ff.net.\1"),
    (r"(net\.\d)proj", r"\1.proj"),
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


def unet_from_audioldm(published: Tensors) -> Tensors:
    """Tensors of AudioLDM's `UNetModel` -> those of `UNet`."""
    return {rename_tensor(name, AUDIOLDM_UNET_NAMES): tensor for name, tensor in published.items()}


def unet_from_diffusers(published: Tensors) -> Tensors:
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
    return {rename_tensor(name, ((blocks, place), *DIFFUSERS_UNET_NAMES)): tensor for name, tensor in published.items()}


def vae_from_diffusers(published: Tensors) -> Tensors:
    """Tensors of diffusers' `AutoencoderKL` -> those of `MelVAE`, whose decoder is numbered from fine to coarse."""
    levels = [int(found[1]) for name in published if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name))]
    last = max(levels, default=0)
    names = (
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d+)\.resnets\.", lambda found: f".up.{last - int(found[1])}.block."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f".up.{last - int(found[1])}.upsample."),
        *DIFFUSERS_VAE_NAMES,
    )
    ours = {}
    for name, tensor in published.items():
        name = rename_tensor(name, names)
        linear = ".attn_1." in name and tensor.ndim == 2  # the attention's 1 x 1 convolutions are matrices there
        ours[name] = tensor[:, :, None, None] if linear else tensor
    return ours


def hifigan_from_transformers(published: Tensors) -> Tensors:
    """Tensors of transformers' `SpeechT5HifiGan`, or of HiFi-GAN's own generator -> those of `HiFiGAN`."""
    named = {re.sub(r"^upsampler\.", "ups.", name): tensor for name, tensor in published.items()}
    return fold_weight_norm({name: tensor for name, tensor in named.items() if name not in ("mean", "scale")})


def rename_tensor(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """The name after every rule (pattern, replacement) was applied in turn."""
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name
