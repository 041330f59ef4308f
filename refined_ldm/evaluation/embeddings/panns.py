"""PANNs: the classifier behind most published figures of text-to-audio models (Kong et al. 2020).

audioldm_eval computes its Frechet distance from the 2048 features before Cnn14's last layer, KL divergence and
inception score from the 527 AudioSet classes after it. The weights are not part of this project (`PANNS_FILES`).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.evaluation.embeddings.aisfx import ConvBlock
from refined_ldm.published.checkpoints import read_tensors
from refined_ldm.weights import load_into

PANNS_FILES = (
    "Cnn14_16k_mAP=0.438.pth (16 kHz, as AudioLDM's figures) or Cnn14_mAP=0.431.pth (32 kHz), each 0.3 GB, CC BY 4.0, "
    "from https://zenodo.org/records/3987831"
)
SAMPLE_RATES = {512: 16_000, 1024: 32_000}  # Hz, by the FFT size that the published network is trained with
FFT = "spectrogram_extractor.stft"  # as a convolution, by sines and cosines under a Hann window
_CORE = np.core if np.__version__ < "2" else np._core
NUMPY_ARRAYS = [  # the files also hold the order that the training drew its clips in
    *((_CORE.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (np.ndarray, "numpy.ndarray"),
]


class Cnn14(nn.Module):
    """Waveform (B, N) at `sample_rate` Hz -> embedding (B, 2048), logits (B, 527), of the whole clip.

    As in audioldm_eval, the mean is subtracted and clips shorter than 32,000 samples are padded with silence. Raises
    ValueError for another shape.
    """

    n_mels = 64
    shortest = 32_000  # samples

    def __init__(self, n_fft: int = 512, width: int = 64, classes: int = 527):
        super().__init__()
        self.sample_rate, self.n_fft = SAMPLE_RATES[n_fft], n_fft
        self.bn0 = nn.BatchNorm2d(self.n_mels)
        self.conv_block1 = ConvBlock(1, width, pool=1)  # no max pooling: Cnn14 pools by the mean
        self.conv_block2 = ConvBlock(width, 2 * width, pool=1)
        self.conv_block3 = ConvBlock(2 * width, 4 * width, pool=1)
        self.conv_block4 = ConvBlock(4 * width, 8 * width, pool=1)
        self.conv_block5 = ConvBlock(8 * width, 16 * width, pool=1)
        self.conv_block6 = ConvBlock(16 * width, 32 * width, pool=1)
        self.fc1 = nn.Linear(32 * width, 32 * width)
        self.fc_audioset = nn.Linear(32 * width, classes)
        self.register_buffer("mel_bank", torch.zeros(n_fft // 2 + 1, self.n_mels))  # the published file has it
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    @classmethod
    def load(cls, path: str | Path) -> "Cnn14":
        """Read a published Cnn14, of 16 or 32 kHz and of the widths in the file -> the network in evaluation mode.

        Raises FileNotFoundError, or ValueError for another file.
        """
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            state = read_tensors(path)
        sines, _ = (state.pop(f"{FFT}.conv_{part}.weight", torch.empty(0)) for part in ("real", "imag"))
        n_fft, names = sines.shape[-1], {"conv_block1.conv1.weight", "fc_audioset.bias", "logmel_extractor.melW"}
        if n_fft not in SAMPLE_RATES or not names <= state.keys():
            lacking = ", ".join(sorted(names - state.keys())) or f"{FFT}.conv_real.weight of such a rate"
            raise ValueError(f"{path} is not Cnn14 of PANNs at 16 or 32 kHz, it lacks {lacking}: get {PANNS_FILES}")
        state["mel_bank"] = state.pop("logmel_extractor.melW")
        network = cls(n_fft, len(state["conv_block1.conv1.weight"]), len(state["fc_audioset.bias"]))
        for block in load_into(network, state, path).eval().blocks:
            block.fold()
        return network.requires_grad_(False)

    @property
    def blocks(self) -> list[ConvBlock]:
        """The six blocks, each two convolutions."""
        return [getattr(self, f"conv_block{k}") for k in range(1, 7)]

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Waveform (B, N) -> decibels (B, 1, T, 64), T = 1 + N // hop, 100 frames a second."""
        spectrum = torch.stft(
            waveform, self.n_fft, self.sample_rate // 100, window=self.window, pad_mode="reflect", return_complex=True
        )  # (B, n_fft // 2 + 1, T)
        power = (spectrum.real**2 + spectrum.imag**2).transpose(1, 2) @ self.mel_bank
        return 10 * power.clamp(min=1e-10).log10()[:, None]

    @torch.inference_mode()
    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise ValueError(f"waveform must be (B, N) with N > 0, got {tuple(waveform.shape)}")
        waveform = waveform.to(self.window) - waveform.to(self.window).mean(dim=1, keepdim=True)
        waveform = F.pad(waveform, (0, max(0, self.shortest - waveform.shape[1])))
        x = self.bn0(self.log_mel(waveform).transpose(1, 3)).transpose(1, 3)  # each mel band has its own mean
        *halving, last = self.blocks
        for block in halving:
            x = F.avg_pool2d(block(x), 2)  # at the end (B, 1024, T / 32, 2)
        x = last(x).mean(dim=3)  # (B, 2048, T / 32)
        x = x.amax(dim=2) + x.mean(dim=2)
        embedding = F.relu(self.fc1(x))
        return embedding, self.fc_audioset(embedding)
