"""aiSFX: an embedding of sounds that is independent of the models evaluated here.

A model must not be evaluated by its own conditioner. aiSFX was trained by others on libraries of sound effects (Ma &
Lerch, "Representation Learning for the Automatic Indexing of Sound Effects Libraries", ISMIR 2022; CC BY 4.0).

Notebook: 05
"""

from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.audio_utils import mel_filter_bank

from refined_ldm.base.integers import whole, whole_rate
from refined_ldm.evaluation.wheel_files import wheel_file

AISFX_SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"
AISFX = "aisfx==0.1.2"  # installed without its dependencies, which it pins to versions of 2022


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm and ReLU, then max pooling by `pool` in time and frequency."""

    def __init__(self, channels_in: int, channels_out: int, pool: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        return F.max_pool2d(x, self.pool)

    def fold(self) -> None:
        """Fold each batch norm, which is constant at inference, into the convolution before it."""
        self.conv1, self.bn1 = fuse_conv_bn_eval(self.conv1, self.bn1), nn.Identity()
        self.conv2, self.bn2 = fuse_conv_bn_eval(self.conv2, self.bn2), nn.Identity()


class Aisfx(nn.Module):
    """Waveform (B, N), sample rate in Hz -> embedding (B, 512), the mean over blocks of 100 frames, half a block apart.

    Audio is resampled to 44.1 kHz and peak-normalised; a block is 2.3 s or 100 frames x 96 HTK mel bands,
    log10(1 + 1e4 power) / 9.4578. A clip shorter than a block is padded with silence; a last incomplete block is
    dropped, as by its authors. Raises ValueError for another shape.

    Notebook: 05
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
        bank = mel_filter_bank(
            self.n_fft // 2 + 1, self.n_mels, 0, self.sample_rate / 2, self.sample_rate, mel_scale="htk"
        )
        bank = torch.from_numpy((bank / bank.sum(axis=0)).T).float()  # (96, 1025), each triangle of sum 1
        self.register_buffer("filterbank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Aisfx":
        """Read the published weights from `path` or from the installed wheel, which is not imported.

        Raises FileNotFoundError if they are missing, ValueError for another file.
        """
        path = wheel_file(AISFX, "models/checkpoint.pth", AISFX_SHA256, path)
        scalar = np.int64(0)  # the file also holds numpy integers; nothing else is allowed
        allowed = [(scalar.__reduce__()[0], "numpy.core.multiarray.scalar"), np.dtype, type(scalar.dtype)]
        with torch.serialization.safe_globals(allowed):
            weights, _ = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "embedding_net."
        network = cls()
        network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        network.eval().requires_grad_(False)
        for conv_block in (network.conv_block1, network.conv_block2, network.conv_block3, network.conv_block4):
            conv_block.fold()
        return network

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Waveform (B, N) at 44.1 kHz -> (B, T, 96) in about [0, 1], T = 1 + N // 1024."""
        waveform = waveform / waveform.abs().amax(dim=1, keepdim=True).clamp(min=1e-10)
        sizes = self.n_fft, self.hop_length
        spectrum = torch.stft(waveform, *sizes, window=self.window, pad_mode="constant", return_complex=True)
        power = self.filterbank @ (spectrum.real**2 + spectrum.imag**2)  # (B, 96, T)
        return (torch.log10(1 + 1e4 * power) / self.log_max).transpose(1, 2)

    def blocks(self, mel: Tensor) -> Tensor:
        """Mel (B, T, 96) -> (B, K, 100, 96), K blocks that start half a block apart."""
        mel = F.pad(mel, (0, 0, 0, max(0, self.block - mel.shape[1])))
        return mel.unfold(1, self.block, self.block // 2).transpose(2, 3)

    def embed(self, blocks: Tensor) -> Tensor:
        """Blocks (B, 100, 96) -> (B, 512)."""
        x = self.conv_block1(blocks[:, None])  # (B, 64, 50, 48)
        x = self.conv_block2(x)  # (B, 128, 25, 24)
        x = self.conv_block3(x)  # (B, 256, 12, 12)
        x = self.conv_block4(x)  # (B, 512, 12, 12)
        return x.mean(dim=3).amax(dim=2)

    @torch.inference_mode()
    def forward(self, waveform: Tensor, sample_rate: int, batch_size: int = 4) -> Tensor:  # 4 fit a CPU's cache
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise ValueError(f"waveform must be (B, N) with N > 0, got {tuple(waveform.shape)}")
        sample_rate, batch_size = whole_rate(sample_rate), whole("batch_size", batch_size, 1)
        return torch.cat([self._embed_clips(clips, sample_rate) for clips in waveform.split(batch_size)])

    def _embed_clips(self, waveform: Tensor, sample_rate: int) -> Tensor:
        clips = waveform.detach().float().cpu().numpy()
        resampled = soxr.resample(clips.T, sample_rate, self.sample_rate).T  # soxr takes (N, channels)
        mel = self.log_mel(torch.from_numpy(resampled.copy()).to(self.window.device))
        blocks = self.blocks(mel)
        B, K = blocks.shape[:2]
        return self.embed(blocks.flatten(0, 1)).unflatten(0, (B, K)).mean(dim=1)
