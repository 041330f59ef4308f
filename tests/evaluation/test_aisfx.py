import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from refined_ldm.evaluation.embeddings import aisfx
from refined_ldm.evaluation.embeddings.aisfx import Aisfx, ConvBlock


@pytest.fixture(scope="module")
def published():
    if find_spec("aisfx") is None:
        pytest.skip(f"needs {aisfx.AISFX}")
    return Aisfx.load()


def chirp(seconds, sample_rate):
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    return torch.from_numpy(np.sin(2 * np.pi * (200 * t + 400 * t**2)) * np.exp(-t)).float()[None]


def test_filterbank_equals_librosa():
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(sr=44_100, n_fft=2048, n_mels=96, htk=True, norm=1.0)
    np.testing.assert_allclose(Aisfx().filterbank, expected, atol=1e-6)


def test_log_mel_equals_librosa():
    librosa = pytest.importorskip("librosa")
    waveform = chirp(2.56, 44_100)
    loudest = (waveform[0] / waveform.abs().max()).numpy()
    power = librosa.feature.melspectrogram(y=loudest, sr=44_100, hop_length=1024, n_mels=96, htk=True, norm=1.0)
    mel = Aisfx().log_mel(0.1 * waveform)  # as loud after peak normalisation
    assert mel.shape == (1, 111, 96)
    np.testing.assert_allclose(mel[0].T, np.log10(1 + 1e4 * power) / Aisfx.log_max, atol=1e-4)


@pytest.mark.parametrize("frames, count", [(1, 1), (99, 1), (100, 1), (149, 1), (150, 2), (441, 7)])
def test_blocks_start_half_a_block_apart_and_an_incomplete_one_is_dropped(frames, count):
    mel = torch.arange(1.0, frames + 1)[None, :, None].expand(2, -1, 96)
    blocks = Aisfx().blocks(mel)
    assert blocks.shape == (2, count, 100, 96)
    assert blocks[0, :, 0, 0].tolist() == [1 + 50 * k for k in range(count)]
    assert blocks[1, 0, :, 5].tolist() == [*range(1, min(frames, 100) + 1), *[0] * (100 - min(frames, 100))]


def test_folding_the_batch_norm_changes_nothing():
    torch.manual_seed(0)
    block = ConvBlock(3, 5, pool=2).eval()
    for norm in (block.bn1, block.bn2):
        torch.nn.init.uniform_(norm.running_mean, -1, 1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(2, 3, 8, 6)
    before = block(x)
    block.fold()
    assert isinstance(block.bn2, torch.nn.Identity)
    torch.testing.assert_close(block(x), before)


def test_clips_do_not_depend_on_their_batch():
    torch.manual_seed(0)
    network, waveform = Aisfx().eval(), torch.randn(3, 8000) * torch.tensor([[1.0], [0.1], [0.0]])
    together = network(waveform, 16_000, batch_size=2)
    assert together.shape == (3, 512) and together.isfinite().all() and not together.requires_grad
    torch.testing.assert_close(together[1:2], network(5 * waveform[1:2], 16_000), rtol=1e-3, atol=1e-4)


def test_published_weights_give_the_published_embedding(published):
    """The largest values of the authors' own network on librosa's mel: one block of 2.56 s, seven of 10.24 s."""
    assert "aisfx" not in sys.modules  # read by path: its imports are of 2022
    for seconds, values in ((2.56, {294: 5.6971, 368: 4.2317, 433: 4.2139}), (10.24, {294: 4.1789, 434: 3.5062})):
        embedding = published(chirp(seconds, 16_000), 16_000)[0]
        assert {i: embedding[i].item() for i in values} == pytest.approx(values, abs=1e-3)


def test_the_embedding_does_not_depend_on_the_sample_rate_but_on_the_sound(published):
    def cosine(a, b):
        return torch.cosine_similarity(a, b).item()

    tone = published(chirp(2.56, 16_000), 16_000)
    noise = published(torch.randn(1, 40_960, generator=torch.Generator().manual_seed(0)), 16_000)
    assert cosine(tone, published(chirp(2.56, 48_000), 48_000)) > 0.999
    assert cosine(tone, noise) < 0.9


def test_what_is_not_the_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps aisfx"):
        Aisfx.load(tmp_path / "missing.pth")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not checkpoint.pth of aisfx 0.1.2"):
        Aisfx.load(tmp_path / "other.pth")
    monkeypatch.setattr("refined_ldm.evaluation.wheel_files.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps aisfx"):
        Aisfx.load()
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        Aisfx()(torch.zeros(100), 16_000)
