"""LAION-CLAP as transformers rebuilt it, front end included, beside ours; its HiFi-GAN is in test_hifigan.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.tokenizer import small_roberta_tokenizer
from refined_ldm.weights import load_into
from tests.support.peers import noise, randomised

CLOSE = dict(atol=5e-5, rtol=0)
NAMES = {  # ClapModel's -> ours
    "audio_model.": "audio.", "audio_projection.linear1.": "audio_projection.0.",
    "audio_projection.linear2.": "audio_projection.2.", "text_model.": "text.",
    "text_projection.linear1.": "text_projection.0.", "text_projection.linear2.": "text_projection.2.",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    """ClapModel at the size of laion/clap-htsat-unfused, ours with its weights and without the 16-bit rounding."""
    torch.manual_seed(0)
    audio = dict(spec_size=256, depths=[2, 2, 6, 2], num_attention_heads=[4, 8, 16, 32], patch_embeds_hidden_size=96,
                 hidden_size=768, enable_fusion=False)  # fmt: skip
    text = dict(layer_norm_eps=1e-5)  # RoBERTa's; ClapTextConfig's own default is 1e-12
    sizes = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=512)
    peer = randomised(transformers.ClapModel(sizes), scale=0.02)
    ours = Clap(replace(CLAP_PRESETS["laion-clap"], int16=False)).eval()
    state = {}
    for name, tensor in peer.state_dict().items():
        for theirs, new in NAMES.items():
            if name.startswith(theirs):
                state[new + name.removeprefix(theirs)] = tensor
    state = {name: tensor for name, tensor in state.items() if not name.endswith(("position_ids", "token_type_ids"))}
    state |= {"logit_scale": peer.logit_scale_a, "mel_bank": ours.mel_bank}
    ours._tokenizer = small_roberta_tokenizer()  # both are given the same ids, whatever they spell
    return peer, load_into(ours, state, "ClapModel")


def embedding(output):
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("samples", [12_345, 480_000])
def test_clap_model_embeds_audio_the_same(pair, samples):
    peer, ours = pair
    extractor = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", padding="repeatpad")
    waveform = noise(samples).clamp(-1, 1)
    features = extractor(waveform.numpy().astype(np.float64), sampling_rate=48_000, return_tensors="pt")
    torch.testing.assert_close(ours.log_mel(waveform, 48_000), features["input_features"], atol=1e-3, rtol=0)
    torch.testing.assert_close(
        ours.embed_audio(waveform, 48_000), embedding(peer.get_audio_features(**features)), **CLOSE
    )


@torch.no_grad()
def test_clap_model_reads_the_same(pair):
    peer, ours = pair
    captions = ["rain", "a dog barks!", "雨が降る", " ".join(["thunder"] * 200)]
    ids, mask = small_roberta_tokenizer()(captions)
    expected = embedding(peer.get_text_features(input_ids=ids, attention_mask=mask))
    torch.testing.assert_close(ours.embed_text(captions), expected, **CLOSE)
