import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refined_ldm.evaluation.embeddings.vggish import VGGISH_FILE, VGGish
from tests.support import embedding_references as references
from tests.support.peers import noise, randomised


def small():
    """A narrow VGGish with random weights."""
    torch.manual_seed(0)
    return randomised(VGGish(width=2, hidden=8, embedding_dim=4), scale=0.2)


def windows_written_out(samples):
    """The front end as its authors describe it, one frame and one band at a time: (N,) -> (K, 96, 64)."""

    def mel(hz):
        return 1127 * math.log(1 + hz / 700)

    edges = [mel(125) + i * (mel(7500) - mel(125)) / 65 for i in range(66)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)]
    bank = np.zeros((257, 64))
    for k in range(1, 257):
        for band in range(64):
            low, centre, high = edges[band : band + 3]
            at = mel(k * 16_000 / 512)
            bank[k, band] = max(0, min((at - low) / (centre - low), (high - at) / (high - centre)))
    frames = [samples[start : start + 400] * hann for start in range(0, len(samples) - 399, 160)]
    mels = [np.log(np.abs(np.fft.rfft(frame, 512)) @ bank + 0.01) for frame in frames]
    return np.array([mels[k : k + 96] for k in range(0, len(mels) - 95, 96)])


def test_front_end_equals_its_description_written_out():
    waveform = 0.3 * noise(1, 40_000)  # 248 frames: two windows and a half
    network = VGGish(width=2, hidden=8)
    windows = network.windows(network.log_mel(waveform))
    assert windows.shape == (1, 2, 96, 64)
    np.testing.assert_allclose(windows[0], windows_written_out(waveform[0].double().numpy()), atol=1e-4)


def test_equals_its_layers_written_out():
    network, windows = small(), noise(3, 96, 64)
    weights, x = network.state_dict(), windows[:, None]
    for k, pooled in ((0, True), (3, True), (6, False), (8, True), (11, False), (13, True)):
        x = F.relu(F.conv2d(x, weights[f"features.{k}.weight"], weights[f"features.{k}.bias"], padding=1))
        x = F.max_pool2d(x, 2) if pooled else x
    x = torch.stack([torch.cat([x[i, :, t, f] for t in range(6) for f in range(4)]) for i in range(3)])
    for k in (0, 2):
        x = F.relu(F.linear(x, weights[f"embeddings.{k}.weight"], weights[f"embeddings.{k}.bias"]))
    expected = F.linear(x, weights["embeddings.4.weight"], weights["embeddings.4.bias"])
    torch.testing.assert_close(network.embed(windows), expected)
    assert (expected < 0).any()  # no ReLU at the end


def test_equals_the_authors_network_read_from_its_file(tmp_path):
    """As FAD uses it, against numbers of torchvggish 0.2."""
    torch.save(references.vggish_weights(), tmp_path / "vggish.pth")
    expected = torch.tensor(json.loads(references.REFERENCES.read_text())["vggish"])
    embedding = VGGish.load(tmp_path / "vggish.pth")(references.waveforms(references.VGGISH_SAMPLES))
    assert embedding.shape == (2, 2, 8)
    torch.testing.assert_close(embedding, expected, rtol=1e-3, atol=1e-4)


def test_the_published_size():
    with torch.device("meta"):
        network = VGGish()
    sizes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert sizes["features.13.weight"] == (512, 512, 3, 3) and sizes["embeddings.0.weight"] == (4096, 12_288)
    assert sizes["embeddings.4.bias"] == (128,) and len(sizes) == 18


def test_windows_do_not_depend_on_their_batch():
    network, waveform = small(), 0.1 * noise(2, 50_000)
    rows = network(waveform, batch_size=4)
    assert rows.shape == (2, 3, 4) and not rows.requires_grad
    torch.testing.assert_close(network(waveform[1:, 15_360:])[0], rows[1, 1:], rtol=1e-4, atol=1e-5)


def test_short_clips_and_other_files_are_refused_by_name(tmp_path):
    network = small()
    assert network(torch.zeros(1, 15_600)).shape == (1, 1, 4)
    with pytest.raises(ValueError, match="15600 samples, one window of VGGish"):
        network(torch.zeros(1, 15_599))
    torch.save({"conv_pre.weight": torch.zeros(1)}, tmp_path / "vocoder.pth")
    with pytest.raises(ValueError, match="vocoder.pth is not VGGish") as refused:
        VGGish.load(tmp_path / "vocoder.pth")
    assert VGGISH_FILE in str(refused.value)
    state = network.state_dict()
    torch.save({**state, "extra.bias": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="1 unexpected: extra.bias"):
        VGGish.load(tmp_path / "more.pth")
