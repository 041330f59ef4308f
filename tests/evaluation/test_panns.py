import json

import numpy as np
import pytest
import torch

from refined_ldm.evaluation.embeddings.panns import FFT, PANNS_FILES, Cnn14
from refined_ldm.mel import mel_filterbank
from tests.support import embedding_references as references
from tests.support.peers import noise, randomised


def small(n_fft=512):
    """A narrow Cnn14 with random weights -> (network, its tensors by the names of a published file)."""
    torch.manual_seed(0)
    network = randomised(Cnn14(n_fft, width=2, classes=5))
    network.mel_bank.uniform_(0, 0.1)
    state = network.state_dict()
    sines = {f"{FFT}.conv_{part}.weight": torch.zeros(n_fft // 2 + 1, 1, n_fft) for part in ("real", "imag")}
    return network, {**sines, "logmel_extractor.melW": state.pop("mel_bank"), **state}


@pytest.mark.parametrize("samples", references.PANNS_SAMPLES)
def test_equals_the_authors_network_read_from_its_file(samples, tmp_path):
    """Embedding and class probabilities, against numbers of panns_inference 0.1.1."""
    state = references.panns_weights()
    state |= {f"{FFT}.conv_{part}.weight": torch.zeros(257, 1, 512) for part in ("real", "imag")}
    state["logmel_extractor.melW"] = mel_filterbank(16_000, 512, 64, 50, 8000).T
    order = {"indexes": np.arange(4), "pointer": 3}  # the training's sampler is saved beside the weights
    torch.save({"iteration": 7, "model": state, "sampler": order}, tmp_path / "Cnn14_16k.pth")
    network = Cnn14.load(tmp_path / "Cnn14_16k.pth")
    assert network.sample_rate == 16_000 and not any(p.requires_grad for p in network.parameters())
    expected = json.loads(references.REFERENCES.read_text())["panns"][str(samples)]
    embedding, logits = network(references.waveforms(samples))
    torch.testing.assert_close(embedding, torch.tensor(expected["embedding"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits.sigmoid(), torch.tensor(expected["probabilities"]), rtol=1e-3, atol=1e-4)


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
    for name, state in {
        "vocoder.pth": {"conv_pre.weight": torch.zeros(1)},
        "8k.pth": tensors | {f"{FFT}.conv_real.weight": torch.zeros(129, 1, 256)},
    }.items():
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
