"""The authors' own CLAP models, where their packages are installed: the reference in tests and notebook 02.

Both packages reach for the hub, laion_clap even while it is imported. Here they are imported only when asked for, with
the hub switched off, and their text towers start out random: whatever is compared is in the checkpoint. The rest of
the project needs neither package.
"""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel

from refined_ldm.clap import CLAP_PRESETS, resample
from refined_ldm.published.checkpoints import read_tensors
from refined_ldm.weights import load_into

PACKAGES = {  # name -> what to import, how to get it
    "ms-clap-2023": ("msclap", "pip install --no-deps msclap==1.3.4 torchlibrosa"),
    "laion-clap": ("laion_clap", 'pip install "refined-ldm[laion]"'),
}


class ReferenceClap:
    """The authors' model, and those steps of their wrapper that leave nothing to chance, as `Clap` has them.

    Sounds (B, N) are no longer than the model's window; token ids are those of `Clap.tokenizer`.
    """

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model.eval()

    @classmethod
    def load(cls, name: str, checkpoint: str | Path) -> "ReferenceClap":
        """The authors' model with the weights of their file."""
        published = read_tensors(checkpoint)
        base = len(published.get("audio_branch.patch_embed.proj.weight", ())) == 128
        model = ms_clap_model() if name == "ms-clap-2023" else laion_clap_model("HTSAT-base" if base else "HTSAT-tiny")
        own = model.state_dict().keys()
        old = {k for k in published.keys() - own if k.endswith((".attn.bias", ".attn.masked_bias", "position_ids"))}
        return cls(name, load_into(model, {k: v for k, v in published.items() if k not in old}, checkpoint))

    @torch.no_grad()
    def embed_audio(self, waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
        """waveform (B, N) -> (B, D) unit norm."""
        waveform = resample(waveform, sample_rate, CLAP_PRESETS[self.name].sample_rate)  # librosa's way, as LAION-CLAP
        if self.name == "ms-clap-2023":  # CLAPWrapper.load_audio_into_tensor
            window = waveform.repeat(1, -(-308_700 // waveform.shape[1]))[:, :308_700]
            return F.normalize(self.model.audio_encoder(window)[0], dim=-1)
        from laion_clap.training.data import float32_to_int16, get_audio_features, int16_to_float32

        clips = (torch.from_numpy(int16_to_float32(float32_to_int16(clip.numpy()))).float() for clip in waveform)
        features = [get_audio_features({}, clip, 480_000, "rand_trunc", "repeatpad", {}) for clip in clips]
        return self.model.get_audio_embedding(features)

    @torch.no_grad()
    def embed_tokens(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids (B, L), mask (B, L), both filled up to 77 tokens as their wrappers do -> (B, D) unit norm."""
        missing, pad = 77 - ids.shape[1], 0 if self.name == "ms-clap-2023" else 1
        tokens = {"input_ids": F.pad(ids, (0, missing), value=pad), "attention_mask": F.pad(mask, (0, missing))}
        encode = self.model.caption_encoder if self.name == "ms-clap-2023" else self.model.get_text_embedding
        return F.normalize(encode(tokens), dim=-1)


def is_installed(name: str) -> bool:
    """Whether the authors' package of this conditioner is installed."""
    return find_spec(PACKAGES[name][0]) is not None


def ms_clap_model() -> nn.Module:
    """msclap's `CLAP` at the size of 2023, with random weights."""
    package = types.ModuleType("msclap_models")  # its top level imports torchaudio; its models do without
    package.__path__ = [f"{_found('ms-clap-2023').submodule_search_locations[0]}/models"]
    sys.modules.setdefault("msclap_models", package)
    module = importlib.import_module("msclap_models.clap")
    reader = types.SimpleNamespace(from_pretrained=lambda name: GPT2Model(GPT2Config()))
    with patch.object(module, "AutoModel", reader):
        return module.CLAP("HTSAT", 44_100, 1024, 320, 64, 50, 8000, 527, 768, "gpt2", 768, 1024)


def laion_clap_model(audio_encoder: str = "HTSAT-tiny") -> nn.Module:
    """laion_clap's `CLAP` without feature fusion, "HTSAT-tiny" or "HTSAT-base", with random weights."""
    _found("laion-clap")
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):  # else its import tries to reach the hub for 11 minutes
        module = importlib.import_module("laion_clap.clap_module")
    sizes = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    reader = types.SimpleNamespace(from_pretrained=lambda name: RobertaModel(sizes))
    with patch.object(importlib.import_module("laion_clap.clap_module.model"), "RobertaModel", reader):
        return module.create_model(audio_encoder, "roberta")[0]


def _found(name):
    package, install = PACKAGES[name]
    if not is_installed(name):
        raise ImportError(f"{package} is not installed: {install}")
    return find_spec(package)
