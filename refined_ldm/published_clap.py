"""The authors' files of MS-CLAP 2023 and LAION-CLAP -> the tensors of `Clap`, every name accounted for.

Both carry the same HTS-AT, whose tensors have other names in `transformers`; nothing is computed but the split of
query, key and value. A name that is neither mapped here nor listed as unused stays as it is, and `Clap` refuses it.
"""

import re
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch

WHERE = {  # name -> what to fetch, should it not be here
    "ms-clap-2023": "CLAP_weights_2023.pth (about 0.7 GB, MS-PL) from https://huggingface.co/microsoft/msclap",
    "laion-clap": "630k-audioset-best.pt (1.9 GB, CC0) from https://huggingface.co/lukewys/laion_clap",
}

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


def ms_clap_state(published):
    """The `model` dict of CLAP_weights_2023.pth -> tensors by the names of `Clap`."""
    return _rename(published, "audio_encoder.base.htsat.", MS_NAMES, MS_UNUSED)


def laion_clap_state(published):
    """The `state_dict` of a LAION-CLAP file without feature fusion -> tensors by the names of `Clap`."""
    published = {name.removeprefix("module."): tensor for name, tensor in published.items()}
    return _rename(published, "audio_branch.", LAION_NAMES, LAION_UNUSED)


def read_published_clap(name, config, path):
    """The authors' file -> `config` with HTS-AT's size as found (LAION has two), tensors by the names of `Clap`."""
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: download {WHERE[name]} and give its path as checkpoint=")
    key, to_ours = ("model", ms_clap_state) if name == "ms-clap-2023" else ("state_dict", laion_clap_state)
    contents = unpickle(path)
    if not isinstance(contents, dict) or key not in contents:
        found = ", ".join(map(str, list(contents)[:5])) if isinstance(contents, dict) else type(contents).__name__
        raise ValueError(f"{path} is no {name} checkpoint: expected a dict with {key!r}, got {found}")
    state = to_ours(contents[key])
    heads = {}  # stage -> heads of each of its blocks
    for tensor_name, tensor in state.items():
        if block := re.search(r"layers\.(\d+)\.blocks\.\d+\..*relative_position_bias_table$", tensor_name):
            heads.setdefault(int(block[1]), []).append(tensor.shape[1])
    patches = state.get("audio.audio_encoder.patch_embed.proj.weight")
    if not heads or patches is None:
        raise ValueError(f"{path} is no {name} checkpoint: it holds no HTS-AT, only {', '.join(list(state)[:5])}")
    stages = [heads[stage] for stage in sorted(heads)]
    depths, per_stage = tuple(map(len, stages)), tuple(stage[0] for stage in stages)
    return replace(config, audio_width=len(patches), audio_depths=depths, audio_heads=per_stage), state


def unpickle(path):
    """Read a .pth, .pt or .ckpt file without executing it: tensors, plain containers and numpy numbers only."""
    scalar = np.core.multiarray.scalar if np.__version__ < "2" else np._core.multiarray.scalar
    numbers = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    harmless = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *numbers]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as fault:
        blocked = re.search(r"GLOBAL (\S+)", str(fault))
        reason = f"it asks to run {blocked[1]}" if blocked else "it is cut, damaged or no checkpoint: fetch it again"
        raise ValueError(f"{path} was refused: {reason}") from fault


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
