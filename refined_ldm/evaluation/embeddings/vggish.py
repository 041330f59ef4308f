"""VGGish: the embedding of the first Frechet audio distance (Hershey et al. 2017; FAD: Kilgour et al. 2019).

FAD compares all windows of 0.96 s of one set of clips with all of another. The weights are not part of this project
(`VGGISH_FILE`).
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from refined_ldm.base.integers import whole
from refined_ldm.published.checkpoints import read_tensors
from refined_ldm.weights import load_into

VGGISH_FILE = (
    "vggish-10086976.pth (0.3 GB, Apache 2.0) from https://github.com/harritaylor/torchvggish/releases/tag/v0.1"
)


class VGGish(nn.Module):
    """Waveform (B, N) at 16 kHz -> (B, K, 128), one row for each whole window of 0.96 s, without overlap.

    As in FAD, without the last ReLU, and without the whitening and 8-bit rounding of AudioSet's release. As in the
    authors' code an incomplete last window is dropped. Raises ValueError for another shape or less than one window.
    """

    sample_rate = 16_000  # Hz
    n_fft, win_length, hop_length = 512, 400, 160  # samples, samples (25 ms), samples (10 ms)
    window_frames = 96  # 0.96 s
    shortest = win_length + (window_frames - 1) * hop_length  # samples of one window, 0.975 s

    def __init__(self, width: int = 64, hidden: int = 4096, embedding_dim: int = 128):
        super().__init__()
        layers, before = [], 1
        for channels, convolutions in ((width, 1), (2 * width, 1), (4 * width, 2), (8 * width, 2)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(before * 6 * 4, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, embedding_dim),
        )
        bins = self.n_fft // 2 + 1
        bank = mel_filter_bank(
            bins, 64, 125, 7500, self.sample_rate, mel_scale="kaldi", triangularize_in_mel_space=True
        )
        self.register_buffer("mel_bank", torch.from_numpy(bank).float(), persistent=False)  # (257, 64)
        self.register_buffer("window", torch.hann_window(self.win_length), persistent=False)

    @classmethod
    def load(cls, path: str | Path) -> "VGGish":
        """Read the published weights, of the widths in the file -> the network in evaluation mode.

        Raises FileNotFoundError, or ValueError for another file.
        """
        state = read_tensors(path)
        if lacking := ", ".join(sorted({"features.0.bias", "embeddings.0.bias", "embeddings.4.bias"} - state.keys())):
            raise ValueError(f"{path} is not VGGish, it lacks {lacking}: get {VGGISH_FILE}")
        sizes = (len(state[name]) for name in ("features.0.bias", "embeddings.0.bias", "embeddings.4.bias"))
        return load_into(cls(*sizes), state, path).eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Waveform (B, N) -> (B, T, 64) logarithms of magnitudes, T = 1 + (N - 400) // 160."""
        frames = waveform.unfold(1, self.win_length, self.hop_length) * self.window
        return (torch.fft.rfft(frames, self.n_fft).abs() @ self.mel_bank + 0.01).log()

    def windows(self, mel: Tensor) -> Tensor:
        """Mel (B, T, 64) -> (B, K, 96, 64)."""
        return mel.unfold(1, self.window_frames, self.window_frames).transpose(2, 3)

    def embed(self, windows: Tensor) -> Tensor:
        """Windows (B, 96, 64) -> (B, 128)."""
        x = self.features(windows[:, None])  # (B, 512, 6, 4)
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))  # channels last, as TensorFlow counts them

    @torch.inference_mode()
    def forward(self, waveform: Tensor, batch_size: int = 64) -> Tensor:
        if waveform.ndim != 2 or waveform.shape[1] < self.shortest:
            raise ValueError(
                f"waveform must be (B, N) with N >= {self.shortest} samples, one window of VGGish, got "
                f"{tuple(waveform.shape)}"
            )
        windows = self.windows(self.log_mel(waveform.to(self.window)))
        B, K = windows.shape[:2]
        rows = [self.embed(part) for part in windows.flatten(0, 1).split(whole("batch_size", batch_size, 1))]
        return torch.cat(rows).unflatten(0, (B, K))
