"""The authors' own modules with random weights, saved as they save them, read by ours: equal embeddings."""

import importlib
import math
import pickle
import sys
import types
from importlib.util import find_spec

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel

from refined_ldm.checkpoints import load_into
from refined_ldm.clap import Clap
from refined_ldm.published_clap import ms_clap_state, read_published_clap, unpickle
from refined_ldm.tokenizer import gpt2_tokenizer, small_roberta_tokenizer

CAPTIONS = ["rain", "a dog barks twice, then a bell rings", "雨が降る, ça sonne", " ".join(["thunder and wind"] * 67)]
CLOSE = dict(atol=1e-5, rtol=0)


def randomise(model):
    """Random weights of the size training gives, batch-norm statistics included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # all but the Fourier kernels and mel bank
                parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(-30, 5)
            elif name.endswith("running_var"):
                buffer.uniform_(100, 300)
    return model.eval()


def noise(*shape):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def padded(ids, mask, pad):
    missing = 77 - ids.shape[1]
    return {"input_ids": F.pad(ids, (0, missing), value=pad), "attention_mask": F.pad(mask, (0, missing))}


# --- MS-CLAP 2023 ---


@pytest.fixture(scope="module")
def ms_clap(tmp_path_factory):
    """(msclap's own model, ours read from the file it is saved in)."""
    spec = find_spec("msclap")
    if spec is None:
        pytest.skip("msclap's model module is not here: pip install --no-deps msclap==1.3.4 torchlibrosa")
    package = types.ModuleType("msclap_models")  # its top level imports torchaudio; its models do without
    package.__path__ = [f"{spec.submodule_search_locations[0]}/models"]
    sys.modules["msclap_models"] = package
    module = importlib.import_module("msclap_models.clap")
    module.AutoModel = types.SimpleNamespace(from_pretrained=lambda name: GPT2Model(GPT2Config()))
    peer = randomise(module.CLAP("HTSAT", 44_100, 1024, 320, 64, 50, 8000, 527, 768, "gpt2", 768, 1024))
    path = tmp_path_factory.mktemp("ms") / "CLAP_weights_2023.pth"
    torch.save({"model": peer.state_dict()}, path)
    clap = Clap.load("ms-clap-2023", path)
    path.unlink()
    return peer, clap


@torch.no_grad()
@pytest.mark.parametrize("samples", [12_345, 308_700, 400_001])
def test_ms_clap_hears_the_same(ms_clap, samples):
    peer, clap = ms_clap
    waveform = noise(2, samples)
    window = waveform.repeat(1, math.ceil(308_700 / samples))[:, :308_700]  # CLAPWrapper.load_audio_into_tensor
    expected = F.normalize(peer.audio_encoder(window)[0], dim=1)
    torch.testing.assert_close(clap.embed_audio(waveform, 44_100), expected, **CLOSE)
    assert torch.equal(clap.embed_audio(waveform, 44_100), clap.embed_audio(waveform, 44_100))


@torch.no_grad()
def test_ms_clap_reads_the_same(ms_clap):
    peer, clap = ms_clap
    expected = peer.caption_encoder(padded(*gpt2_tokenizer()(CAPTIONS), pad=0))
    torch.testing.assert_close(clap.embed_text(CAPTIONS), F.normalize(expected, dim=1), **CLOSE)


@torch.no_grad()
def test_ms_clap_pools_behind_an_exclamation_mark_where_the_wrapper_loses_words(ms_clap):
    peer, clap = ms_clap
    caption = ["stop! a dog barks"]
    tokens = padded(*gpt2_tokenizer()(caption), pad=0)
    last = tokens["attention_mask"].sum() - 1
    state = peer.caption_encoder.base(**tokens).last_hidden_state[:, last]
    ours = clap.embed_text(caption)
    torch.testing.assert_close(ours, F.normalize(peer.caption_encoder.projection(state), dim=1), **CLOSE)
    assert (ours - F.normalize(peer.caption_encoder(tokens), dim=1)).abs().max() > 1e-3


def test_ms_clap_temperature_and_mel_bank_are_those_of_the_file(ms_clap):
    peer, clap = ms_clap
    assert clap.logit_scale == peer.logit_scale
    state = peer.state_dict()
    melW = "audio_encoder.base.htsat.logmel_extractor.melW"
    torch.testing.assert_close(clap.mel_bank, state[melW].T, **CLOSE)
    assert torch.equal(ms_clap_state({**state, melW: 2 * state[melW]})["mel_bank"], 2 * state[melW].T)


def test_ms_clap_of_older_versions_is_read_and_other_changes_are_refused_by_name(ms_clap):
    peer, clap = ms_clap
    state = peer.state_dict()
    older = {f"caption_encoder.base.h.0.attn.{name}": torch.zeros(1) for name in ("bias", "masked_bias")}
    changed = {**state, **older, "audio_encoder.base.htsat.stranger": torch.zeros(1)}
    del changed["caption_encoder.projection.linear1.weight"]
    with pytest.raises(ValueError, match=r"1 missing: text_projection.linear1.weight; 1 unexpected: \S*stranger$"):
        load_into(clap, ms_clap_state(changed), "changed.pth")


# --- LAION-CLAP ---


@pytest.fixture(scope="module", params=["HTSAT-tiny", "HTSAT-base"])
def laion_clap(request, tmp_path_factory):
    """(laion_clap's own model, ours read from the file it is saved in)."""
    if find_spec("laion_clap") is None:
        pytest.skip('laion_clap is not here: pip install "refined-ldm[laion]"')
    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else its import waits for a network
    clap_module = importlib.import_module("laion_clap.clap_module")
    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    roberta = types.SimpleNamespace(from_pretrained=lambda name: RobertaModel(config))
    patch.setattr(importlib.import_module("laion_clap.clap_module.model"), "RobertaModel", roberta)
    peer = randomise(clap_module.create_model(request.param, "roberta")[0])
    state = {f"module.{name}": tensor for name, tensor in peer.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    path = tmp_path_factory.mktemp("laion") / "630k-audioset-best.pt"
    torch.save({"epoch": 1, "name": "630k", "best": np.float64(0.5), "state_dict": state}, path)
    clap = Clap.load("laion-clap", path)
    path.unlink()
    patch.undo()
    return peer, clap


@torch.no_grad()
@pytest.mark.parametrize("samples", [12_345, 200_000, 480_000, 500_000])
def test_laion_clap_hears_the_same(laion_clap, samples):
    from laion_clap.training.data import float32_to_int16, get_audio_features, int16_to_float32

    peer, clap = laion_clap
    waveform = noise(samples).clamp(-1.2, 1.2)
    rounded = torch.from_numpy(int16_to_float32(float32_to_int16(waveform.numpy()))).float()
    features = get_audio_features({}, rounded[:480_000], 480_000, "rand_trunc", "repeatpad", {})
    torch.testing.assert_close(clap.embed_audio(waveform, 48_000), peer.get_audio_embedding([features]), **CLOSE)


@torch.no_grad()
def test_laion_clap_reads_the_same(laion_clap):
    peer, clap = laion_clap
    clap._tokenizer = small_roberta_tokenizer()  # both towers are given the same ids, whatever they spell
    expected = peer.get_text_embedding(padded(*small_roberta_tokenizer()([*CAPTIONS, "stop! a dog"]), pad=1))
    torch.testing.assert_close(clap.embed_text([*CAPTIONS, "stop! a dog"]), expected, **CLOSE)


def test_laion_clap_blocks_captions_only_without_its_tokenizer(laion_clap):
    _, clap = laion_clap
    clap._tokenizer = None
    assert clap.embed_audio(noise(48_000), 48_000).isfinite().all()
    with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt"):
        clap.embed_text(["rain"])


# --- files that are not what they should be ---


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Harmful()}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(ValueError, match=rf"{name} was refused: it asks to run (\w+\.)?print"):
            Clap.load("ms-clap-2023", tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


def test_empty_cut_and_foreign_files_get_one_clear_error(tmp_path):
    torch.save({"weights": torch.zeros(1000)}, tmp_path / "foreign.pth")
    whole = (tmp_path / "foreign.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a checkpoint at all")
    torch.save({"model": {"weights": torch.zeros(3)}}, tmp_path / "towerless.pth")
    for name in ("foreign", "cut", "empty", "text", "towerless"):
        with pytest.raises(ValueError, match=f"{name}.pth (was refused|is no ms-clap-2023 checkpoint)"):
            Clap.load("ms-clap-2023", tmp_path / f"{name}.pth")


def test_numbers_of_numpy_in_a_checkpoint_are_harmless(tmp_path):
    torch.save({"loss": np.float64(0.25), "step": np.int64(7), "w": torch.ones(2)}, tmp_path / "numbers.pt")
    contents = unpickle(tmp_path / "numbers.pt")
    assert contents["loss"] == 0.25 and contents["step"] == 7 and contents["w"].tolist() == [1, 1]


def test_a_missing_file_says_which_one_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CLAP_weights_2023.pth .* MS-PL\) from https://\S+msclap"):
        read_published_clap("ms-clap-2023", None, tmp_path / "absent.pth")
