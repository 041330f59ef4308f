"""The authors' tensors of MS-CLAP 2023 and LAION-CLAP -> those of `Clap`, every name accounted for.

Both carry the same HTS-AT, whose tensors have other names in `transformers`; nothing is computed but the split of
query, key and value. A name that is neither mapped here nor listed as unused stays as it is, and `Clap` refuses it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from refined_ldm.clap import ClapConfig

HTSAT_NAMES = (  # HTS-AT's own name -> the name in transformers.ClapAudioModel
    (r"^bn0\.", "batch_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.(relative_position_\w+)$", r".attention.self.\1"),
)
HTSAT_UNUSED = r"(spectrogram_extractor|tscam_conv|head)\.|layers\.\d+\.blocks\.\d+\.attn_mask$"

MS_NAMES = {
    "audio_encoder.projection.": "audio_projection.",
    "caption_encoder.base.": "text.",
    "caption_encoder.projection.": "text_projection.",
    "logit_scale": "logit_scale",
}
MS_UNUSED = r"caption_encoder\.base\.h\.\d+\.attn\.(bias|masked_bias)$"  # causal masks kept by older transformers

LAION_NAMES = {
    "audio_projection.": "audio_projection.",
    "text_branch.": "text.",
    "text_projection.": "text_projection.",
    "logit_scale_a": "logit_scale",
}
LAION_UNUSED = r"(text|audio)_transform\.|logit_scale_t$|text_branch\.embeddings\.(position|token_type)_ids$"

PIPELINE_NAMES = {  # transformers' ClapTextModelWithProjection: the half of LAION-CLAP that diffusers keeps
    "text_model.": "text.",
    "text_projection.linear1.": "text_projection.0.",
    "text_projection.linear2.": "text_projection.2.",
}
PIPELINE_UNUSED = r"text_model\.embeddings\.(position|token_type)_ids$"
NO_FUSION = "feature fusion is not supported; take 630k-audioset-best.pt"


def shape_of(name: str, tensors: Mapping[str, torch.Tensor], of: str, axes: int) -> tuple[int, ...]:
    """The shape of the tensor `name`; ValueError if it is missing or has another number of axes."""
    if name not in tensors:
        raise ValueError(f"{of} lacks the tensor {name}: fetch or write the file again")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name} of {of} is of shape {shape}: {axes} axes that hold numbers were expected")
    return shape


def ms_clap_state(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `model` dict of CLAP_weights_2023.pth -> tensors by the names of `Clap`."""
    return _rename(published, "audio_encoder.base.htsat.", MS_NAMES, MS_UNUSED)


def laion_clap_state(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `state_dict` of a LAION-CLAP file without feature fusion -> tensors by the names of `Clap`."""
    published = {name.removeprefix("module."): tensor for name, tensor in published.items()}
    return _rename(published, "audio_branch.", LAION_NAMES, LAION_UNUSED)


def pipeline_clap_state(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text encoder of a diffusers pipeline -> tensors by the names of `Clap`, without an audio tower."""
    return _rename(published, "audio_model.", PIPELINE_NAMES, PIPELINE_UNUSED)


def clap_kind(published: Iterable[str]) -> str | None:
    """The conditioner whose tensors have these names: ms-clap-2023, laion-clap, laion-clap fusion, or None."""
    if any(re.match(r"caption_encoder\.base\.(wte|wpe|h|ln_f)\.", name) for name in published):
        return "ms-clap-2023"
    if any(re.search(r"audio_branch\..*(fusion_model|mel_conv[12]d)", name) for name in published):
        return "laion-clap fusion"
    return "laion-clap" if any(re.search(r"text_(branch|model)\.embeddings\.", name) for name in published) else None


def clap_from_published(
    config: ClapConfig, published: Mapping[str, torch.Tensor]
) -> tuple[ClapConfig, dict[str, torch.Tensor]]:
    """The authors' tensors, of either conditioner -> `config` with the sizes they have, tensors by the names of `Clap`.

    The text encoder of a pipeline has no audio tower: `audio_depths` is then empty. Raises ValueError for feature
    fusion, and for tensors that are no conditioner.
    """
    kind = clap_kind(published)
    if kind not in ("ms-clap-2023", "laion-clap"):
        found = ", ".join(sorted(published)[:3]) or "nothing"
        raise ValueError(NO_FUSION if kind else f"no conditioner is among the tensors, which begin with {found}")
    if kind == "ms-clap-2023":
        state = ms_clap_state(published)
    elif any(name.startswith("text_model.") for name in published):
        state = pipeline_clap_state(published)
        return replace(config, audio_depths=(), audio_heads=(), **_text_sizes(state)), state
    else:
        state = laion_clap_state(published)
    return replace(config, **_audio_sizes(state), **_text_sizes(state)), state


def _audio_sizes(state):
    blocks = {}  # stage -> its blocks
    for name in state:
        if found := re.match(r"audio\.audio_encoder\.layers\.(\d+)\.blocks\.(\d+)\.", name):
            blocks.setdefault(int(found[1]), set()).add(found[2])
    if not blocks:
        raise ValueError(f"it holds no HTS-AT, only {', '.join(list(state)[:5])}")
    table = "audio.audio_encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
    patches = shape_of("audio.audio_encoder.patch_embed.proj.weight", state, "HTS-AT", 4)
    return {"audio_width": patches[0], "audio_depths": tuple(len(blocks[stage]) for stage in sorted(blocks)),
            "audio_heads": tuple(shape_of(table.format(stage), state, "HTS-AT", 2)[1] for stage in sorted(blocks)),
            }  # fmt: skip


def _text_sizes(state):
    roberta = any(name.startswith("text.embeddings.") for name in state)
    tokens, positions = ("embeddings.word_embeddings", "embeddings.position_embeddings") if roberta else ("wte", "wpe")
    vocabulary, width = shape_of(f"text.{tokens}.weight", state, "the text tower", 2)
    places = shape_of(f"text.{positions}.weight", state, "the text tower", 2)[0]
    layers = {found[1] for name in state if (found := re.match(r"text\.(?:encoder\.layer|h)\.(\d+)\.", name))}
    heads = max(1, width // 64)  # 64 wide in GPT-2 and in RoBERTa
    return {"vocab_size": vocabulary, "text_width": width, "text_layers": len(layers), "text_heads": heads,
            "text_positions": places}  # fmt: skip


def _rename(published, htsat, names, unused):
    ours = {}
    for name, tensor in published.items():
        if re.match(unused, name):
            continue
        if name.startswith(htsat):
            ours.update(_htsat_tensors(name.removeprefix(htsat), tensor))
            continue
        prefix = next((prefix for prefix in names if name.startswith(prefix)), None)
        ours[names[prefix] + name.removeprefix(prefix) if prefix else name] = tensor
    return ours


def _htsat_tensors(name, tensor):
    """One tensor of HTS-AT -> none, one, or query, key and value in `transformers`' names."""
    if re.match(HTSAT_UNUSED, name):
        return {}
    if name == "logmel_extractor.melW":  # (n_fft // 2 + 1, n_mels): the bank it was trained with
        return {"mel_bank": tensor.T.contiguous()}
    for theirs, transformers in HTSAT_NAMES:
        name = re.sub(theirs, transformers, name)
    name = "audio.audio_encoder." + name
    if ".attn.qkv." in name:
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {name.replace(".attn.qkv.", f".attention.self.{part}."): value for part, value in parts}
    return {name: tensor}
