import importlib
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from refined_ldm.evaluation.embeddings.panns import FFT, PANNS_FILES, Cnn14
from tests.support.peers import noise, randomised

PEERS = {"panns_inference": "models", "msclap": "models.audio"}  # package -> its module with the authors' network


def published_network(package, monkeypatch):
    """The authors' Cnn14 of 16 kHz, without what the package does at its top, and a thirty-second as wide."""
    found = find_spec(package)
    if not found or not find_spec("torchlibrosa"):
        pytest.skip(f"{package} is not here: pip install --no-deps {package} torchlibrosa")
    for name in (package, f"{package}.models"):
        bare = types.ModuleType(name)
        bare.__path__ = [found.submodule_search_locations[0] + name.removeprefix(package).replace(".", "/")]
        if name == package or package == "msclap":
            monkeypatch.setitem(sys.modules, name, bare)
    module = importlib.import_module(f"{package}.{PEERS[package]}")
    narrow = types.SimpleNamespace(**vars(nn))  # each layer a thirty-second as wide
    narrow.Conv2d = lambda in_channels, out_channels, **k: nn.Conv2d(in_channels // 32 or 1, out_channels // 32, **k)
    narrow.BatchNorm2d = lambda channels: nn.BatchNorm2d(channels // 32)
    narrow.Linear = lambda features, out, bias: nn.Linear(features // 32, out // 32)
    monkeypatch.setattr(module, "nn", narrow)
    network = module.Cnn14(16_000, 512, 160, 64, 50, 8000, 527, **({"out_emb": 2048} if package == "msclap" else {}))
    network.bn0 = nn.BatchNorm2d(64)
    return randomised(network, scale=0.1)


def small(n_fft=512):
    """A narrow Cnn14 with random weights -> (network, its tensors by the names of a published file)."""
    torch.manual_seed(0)
    network = randomised(Cnn14(n_fft, width=2, classes=5))
    network.mel_bank.uniform_(0, 0.1)
    state = network.state_dict()
    sines = {f"{FFT}.conv_{part}.weight": torch.zeros(n_fft // 2 + 1, 1, n_fft) for part in ("real", "imag")}
    return network, {**sines, "logmel_extractor.melW": state.pop("mel_bank"), **state}


@pytest.mark.parametrize("package", PEERS)
def test_equals_the_authors_network_read_from_its_file(package, monkeypatch, tmp_path):
    """Embedding and class probabilities; a clip of 1 s is followed by silence up to 2 s, as audioldm_eval does."""
    torch.manual_seed(0)
    peer = published_network(package, monkeypatch)
    order = {"indexes": np.arange(4), "pointer": 3}  # the training's sampler is saved beside the weights
    torch.save({"iteration": 7, "model": peer.state_dict(), "sampler": order}, tmp_path / "Cnn14_16k.pth")
    network = Cnn14.load(tmp_path / "Cnn14_16k.pth")
    assert network.sample_rate == 16_000 and not any(p.requires_grad for p in network.parameters())
    for samples in (16_000, 33_333):
        waveform = 0.1 * noise(2, samples) + 0.05
        heard = nn.functional.pad(waveform - waveform.mean(1, keepdim=True), (0, max(0, 32_000 - samples)))
        with torch.no_grad():
            expected = peer(heard)
        embedding, logits = network(waveform)
        assert embedding.shape == (2, 64) and logits.shape == (2, 16) and embedding.std() > 0.01
        torch.testing.assert_close(embedding, expected["embedding"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits.sigmoid(), expected["clipwise_output"], rtol=1e-4, atol=1e-4)


def test_the_published_size():
    with torch.device("meta"):
        network = Cnn14()
    sizes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sizes["fc1.weight"] == (2048, 2048) and sizes["fc_audioset.weight"] == (527, 2048)
    assert sizes["mel_bank"] == (257, 64) and sizes["conv_block6.conv1.weight"] == (2048, 1024, 3, 3)
    assert sum(p.numel() for p in network.parameters()) == 80_753_615  # as published


@pytest.mark.parametrize("n_fft, fmax", [(512, 8000), (1024, 14_000)])
def test_front_end_equals_librosa_at_both_rates(n_fft, fmax):
    librosa = pytest.importorskip("librosa")
    network, waveform = Cnn14(n_fft, width=2), 0.3 * noise(1, 32_000)
    rate = network.sample_rate
    assert rate == {512: 16_000, 1024: 32_000}[n_fft]
    bank = dict(sr=rate, n_fft=n_fft, n_mels=64, fmin=50, fmax=fmax)
    network.mel_bank.copy_(torch.from_numpy(librosa.filters.mel(**bank).T))
    power = librosa.feature.melspectrogram(y=waveform[0].numpy(), hop_length=rate // 100, pad_mode="reflect", **bank)
    expected = librosa.power_to_db(power, amin=1e-10, top_db=None)
    np.testing.assert_allclose(network.log_mel(waveform)[0, 0].T, expected, atol=1e-3)


def test_a_clip_does_not_depend_on_its_batch_its_offset_or_the_folding_of_batch_norm(tmp_path):
    network, tensors = small()
    torch.save(tensors, tmp_path / "small.pth")
    folded, waveform = Cnn14.load(tmp_path / "small.pth"), 0.1 * noise(3, 33_000)
    torch.testing.assert_close(folded(waveform)[0][1:2], folded(waveform[1:2] + 0.3)[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(folded(waveform), network(waveform), rtol=1e-4, atol=1e-4)
    assert all(part.isfinite().all() for part in network(torch.zeros(1, 100)))  # silence


def test_other_files_are_refused_by_name(tmp_path):
    network, tensors = small()
    for name, state in {"vocoder.pth": {"conv_pre.weight": torch.zeros(1)},
                        "8k.pth": tensors | {f"{FFT}.conv_real.weight": torch.zeros(129, 1, 256)}}.items():  # fmt: skip
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not Cnn14 of PANNs at 16 or 32 kHz") as refused:
            Cnn14.load(tmp_path / name)
        assert PANNS_FILES in str(refused.value)
    del tensors["fc1.bias"]
    torch.save(tensors, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="1 missing: fc1.bias"):
        Cnn14.load(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError):
        Cnn14.load(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        network(torch.zeros(100))
