"""VGGish: the listener of the first Frechet audio distance (Hershey et al. 2017; FAD: Kilgour et al. 2019).

Its windows of 0.96 s are counted one by one: FAD compares all windows of one set of clips with all of another. The
weights are not part of this project: `VGGISH_FILE` says where they are.
"""

import numpy as np
import torch
from torch import nn

from refined_ldm.integers import whole
from refined_ldm.published.checkpoints import read_tensors
from refined_ldm.weights import load_into

VGGISH_FILE = (
    "vggish-10086976.pth (0.3 GB, Apache 2.0) from https://github.com/harritaylor/torchvggish/releases/tag/v0.1"
)


def vggish_filterbank(sample_rate, n_fft, n_mels, fmin, fmax):
    """(n_fft // 2 + 1, n_mels) triangles of height 1, straight in mel rather than in Hz; the DC bin counts nowhere."""

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(fmin), mel(fmax), n_mels + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.linspace(0, sample_rate / 2, n_fft // 2 + 1))[:, None]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(min=0)
    triangles[0] = 0
    return torch.from_numpy(triangles).float()


class VGGish(nn.Module):
    """waveform (B, N) at 16 kHz -> (B, K, 128), one row for each whole window of 0.96 s, without overlap.

    As FAD takes it: without the last ReLU, and without the whitening and 8-bit rounding of AudioSet's release. As in
    the authors' code what is left after the last whole window is not heard.
    """

    sample_rate = 16_000  # Hz
    n_fft, win_length, hop_length = 512, 400, 160  # samples, samples (25 ms), samples (10 ms)
    window_frames = 96  # 0.96 s
    shortest = win_length + (window_frames - 1) * hop_length  # samples of one window, 0.975 s

    def __init__(self, width=64, hidden=4096, embedding_dim=128):
        super().__init__()
        layers, before = [], 1
        for channels, convolutions in ((width, 1), (2 * width, 1), (4 * width, 2), (8 * width, 2)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(nn.Linear(before * 6 * 4, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
                                        nn.ReLU(), nn.Linear(hidden, embedding_dim))  # fmt: skip
        bank = vggish_filterbank(self.sample_rate, self.n_fft, 64, 125.0, 7500.0)
        self.register_buffer("mel_bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(self.win_length), persistent=False)

    @classmethod
    def load(cls, path):
        """Read the published weights, of the widths in the file -> the network in evaluation mode."""
        state = read_tensors(path)
        if lacking := ", ".join(sorted({"features.0.bias", "embeddings.0.bias", "embeddings.4.bias"} - state.keys())):
            raise ValueError(f"{path} is not VGGish, it lacks {lacking}: get {VGGISH_FILE}")
        sizes = (len(state[name]) for name in ("features.0.bias", "embeddings.0.bias", "embeddings.4.bias"))
        return load_into(cls(*sizes), state, path).eval().requires_grad_(False)

    def log_mel(self, waveform):
        """waveform (B, N) -> (B, T, 64) logarithms of magnitudes, T = 1 + (N - 400) // 160."""
        frames = waveform.unfold(1, self.win_length, self.hop_length) * self.window
        return (torch.fft.rfft(frames, self.n_fft).abs() @ self.mel_bank + 0.01).log()

    def windows(self, mel):
        """mel (B, T, 64) -> (B, K, 96, 64)."""
        return mel.unfold(1, self.window_frames, self.window_frames).transpose(2, 3)

    def embed(self, windows):
        """windows (B, 96, 64) -> (B, 128)."""
        x = self.features(windows[:, None])  # (B, 512, 6, 4)
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))  # channels last, as TensorFlow counts them

    @torch.inference_mode()
    def forward(self, waveform, batch_size=64):
        if waveform.ndim != 2 or waveform.shape[1] < self.shortest:
            raise ValueError(f"waveform must be (B, N) with N >= {self.shortest} samples, one window of VGGish, got "
                             f"{tuple(waveform.shape)}")  # fmt: skip
        windows = self.windows(self.log_mel(waveform.to(self.window)))
        B, K = windows.shape[:2]
        rows = [self.embed(part) for part in windows.flatten(0, 1).split(whole("batch_size", batch_size, 1))]
        return torch.cat(rows).unflatten(0, (B, K))
