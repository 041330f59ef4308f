"""Judges from outside: networks that nobody here trained, listening to what our models make.

A model must not be marked by its own conditioner. `Aisfx` was trained by others on sound-effects libraries (Ma & Lerch,
"Representation Learning for the Automatic Indexing of Sound Effects Libraries", ISMIR 2022; CC BY 4.0), so its
embedding knows rain from a siren and nothing about this project.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from refined_ldm.integers import whole, whole_rate

AISFX_SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"
AISFX_INSTALL = "pip install --no-deps aisfx==0.1.2"  # without its dependencies: it pins versions of 2022


def htk_filterbank(sample_rate, n_fft, n_mels):
    """(n_mels, n_fft // 2 + 1) triangles evenly spaced on the HTK mel scale up to Nyquist, each of sum 1 over bins."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, n_mels + 2) / 2595) - 1)  # Hz
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    triangles = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(min=0)
    return torch.from_numpy(triangles / triangles.sum(1, keepdims=True)).float()


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm and ReLU, then max pooling by `pool` in time and frequency."""

    def __init__(self, channels_in, channels_out, pool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.pool = pool

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        return F.max_pool2d(x, self.pool)

    def fold(self):
        """Fold each batch norm, a constant at inference, into the convolution before it."""
        self.conv1, self.bn1 = fuse_conv_bn_eval(self.conv1, self.bn1), nn.Identity()
        self.conv2, self.bn2 = fuse_conv_bn_eval(self.conv2, self.bn2), nn.Identity()


class Aisfx(nn.Module):
    """The aisfx embedding: waveform (B, N) -> (B, 512), the mean over blocks of 100 frames (2.3 s) half a block apart.

    Audio is resampled to 44.1 kHz and peak-normalised; a block is 100 frames x 96 mels, log10(1 + 1e4 power) / 9.4578.
    A clip shorter than a block is padded with silence; a last incomplete block is dropped, as its authors do.
    """

    sample_rate = 44_100  # Hz
    n_fft, hop_length, n_mels = 2048, 1024, 96  # samples, samples (23 ms), bands
    block = 100  # frames
    log_max = 9.457798957824707  # the largest log-mel of the libraries it was trained on
    embedding_dim = 512

    def __init__(self):
        super().__init__()
        self.conv_block1 = ConvBlock(1, 64, pool=2)
        self.conv_block2 = ConvBlock(64, 128, pool=2)
        self.conv_block3 = ConvBlock(128, 256, pool=2)
        self.conv_block4 = ConvBlock(256, 512, pool=1)
        self.register_buffer("filterbank", htk_filterbank(self.sample_rate, self.n_fft, self.n_mels), persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @classmethod
    def load(cls, path=None):
        """Read the published weights, from `path` or from the installed wheel, which is never imported."""
        path = find_aisfx() if path is None else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no aisfx checkpoint at {path}: {AISFX_INSTALL}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != AISFX_SHA256:
            raise ValueError(f"{path} is not the checkpoint of aisfx 0.1.2 (sha256 {digest[:12]}…): {AISFX_INSTALL}")
        scalar = np.int64(0)  # the file also counts its classes in numpy integers, and they are all it may contain
        allowed = [(scalar.__reduce__()[0], "numpy.core.multiarray.scalar"), np.dtype, type(scalar.dtype)]
        with torch.serialization.safe_globals(allowed):
            weights, _ = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "embedding_net."
        judge = cls()
        judge.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        judge.eval().requires_grad_(False)
        for conv_block in (judge.conv_block1, judge.conv_block2, judge.conv_block3, judge.conv_block4):
            conv_block.fold()
        return judge

    def log_mel(self, waveform):
        """waveform (B, N) at 44.1 kHz -> (B, T, 96) in about [0, 1], T = 1 + N // 1024."""
        waveform = waveform / waveform.abs().amax(dim=1, keepdim=True).clamp(min=1e-10)
        spectrum = torch.stft(waveform, self.n_fft, self.hop_length, window=self.window, pad_mode="constant",
                              return_complex=True)  # fmt: skip
        power = self.filterbank @ (spectrum.real**2 + spectrum.imag**2)  # (B, 96, T)
        return (torch.log10(1 + 1e4 * power) / self.log_max).transpose(1, 2)

    def blocks(self, mel):
        """mel (B, T, 96) -> (B, K, 100, 96), K blocks that start half a block apart."""
        mel = F.pad(mel, (0, 0, 0, max(0, self.block - mel.shape[1])))
        return mel.unfold(1, self.block, self.block // 2).transpose(2, 3)

    def embed(self, blocks):
        """blocks (B, 100, 96) -> (B, 512)."""
        x = self.conv_block1(blocks[:, None])  # (B, 64, 50, 48)
        x = self.conv_block2(x)  # (B, 128, 25, 24)
        x = self.conv_block3(x)  # (B, 256, 12, 12)
        x = self.conv_block4(x)  # (B, 512, 12, 12)
        return x.mean(dim=3).amax(dim=2)

    @torch.inference_mode()
    def forward(self, waveform, sample_rate, batch_size=4):  # 4 clips fit a CPU's cache; a GPU likes 64
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise ValueError(f"waveform must be (B, N) with N > 0, got {tuple(waveform.shape)}")
        sample_rate, batch_size = whole_rate(sample_rate), whole("batch_size", batch_size, 1)
        return torch.cat([self._embed_clips(clips, sample_rate) for clips in waveform.split(batch_size)])

    def _embed_clips(self, waveform, sample_rate):
        clips = waveform.detach().float().cpu().numpy()
        resampled = soxr.resample(clips.T, sample_rate, self.sample_rate).T  # soxr wants (N, channels)
        mel = self.log_mel(torch.from_numpy(resampled.copy()).to(self.window.device))
        blocks = self.blocks(mel)
        B, K = blocks.shape[:2]
        return self.embed(blocks.flatten(0, 1)).unflatten(0, (B, K)).mean(dim=1)


def find_aisfx():
    """The path of the checkpoint inside the installed aisfx wheel."""
    spec = find_spec("aisfx")
    if spec is None:
        raise FileNotFoundError(f"the judge is in the wheel of aisfx, which is not installed: {AISFX_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "models" / "checkpoint.pth"
