"""HiFi-GAN: the generator that turns a log-mel spectrogram into a waveform.

Kong et al., "HiFi-GAN", 2020 (arXiv 2010.05646), in the 16 kHz / 64-bin layout AudioLDM uses. The optional inverse-STFT
head is Kaneko et al., "iSTFTNet", 2022 (arXiv 2203.02395); starting it from Griffin-Lim's phases is in the spirit of
Masuyama et al., "Deep Griffin-Lim iteration", 2019 (arXiv 1903.03971). Snake is Ziyin et al. 2020, as BigVGAN uses it.
Parameter names are the published checkpoints'.

Notebook: 04
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refined_ldm.base.integers import cast_numbers
from refined_ldm.mel import LDM_MEL, MelConfig, griffin_lim, match_mel


@dataclass(frozen=True)
class HiFiGANConfig:
    """Size of the generator; the defaults are AudioLDM's published 16 kHz / 64-bin one (55 M parameters)."""

    n_mels: int = 64
    channels: int = 1024  # after the first convolution; halved by every upsampling
    rates: tuple[int, ...] = (5, 4, 2, 2, 2)  # upsampling factors, 160 together
    kernels: tuple[int, ...] = (16, 16, 8, 4, 4)  # of the transposed convolutions
    res_kernels: tuple[int, ...] = (3, 7, 11)  # three receptive fields are averaged after each upsampling
    res_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    leaky_slope: float = 0.1
    snake: bool = False  # in residual blocks x + sin^2(a x) / a: each channel learns a period; else leaky ReLU
    istft_n_fft: int | None = None  # samples; None: the convolutions go all the way up to the waveform
    istft_hop: int = 1  # samples a frame of the inverse STFT stands for
    griffin_lim_iterations: int = 0  # more: the inverse-STFT head corrects Griffin-Lim's estimate from the mel
    mel_corrections: int = 0  # iterations of `match_mel`, which bring the output's mel nearer to the input

    def __post_init__(self):
        cast_numbers(self)

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.rates) * self.istft_hop


class Snake(nn.Module):
    """x + sin^2(a x) / a: a rising line with a ripple, whose rate `a` each channel learns: (B, C, L) -> (B, C, L).

    Notebook: 04
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


class ResBlock(nn.Module):
    """Residual pairs of convolutions, the first of each pair dilated (paper, fig. 1): (B, C, L) -> (B, C, L).

    Notebook: 04
    """

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], leaky_slope: float, snake: bool = False):
        super().__init__()
        self.activations = nn.ModuleList(
            Snake(channels) if snake else nn.LeakyReLU(leaky_slope) for _ in range(2 * len(dilations))
        )
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        activation = iter(self.activations)
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            h = conv1(next(activation)(x))
            x = x + conv2(next(activation)(h))
        return x


class HiFiGAN(nn.Module):
    """Generator: mel (B, 1, T, F), natural log -> waveform (B, T * hop), in evaluation mode scaled into [-1, 1].

    A transposed convolution gives `rate * L` samples only when `kernel - rate` is even. The published first layer
    (kernel 16, rate 5) gives 5L + 1, so 50 frames come out as 8,032 samples instead of 8,000: the end is trimmed.

    Convolutions turn equal mel frames into equal samples, so a steady tone can only have a period that divides the hop:
    multiples of 100 Hz. With `griffin_lim_iterations` the phases come from Griffin-Lim, where a tone of any pitch
    continues from frame to frame, and the network corrects magnitude and phase of every bin. With `mel_corrections`
    the magnitudes are corrected until the output has the mel of the input. `mel` holds the settings for these two.
    Raises ValueError for inconsistent settings or a mel of another shape.

    Notebook: 04
    """

    def __init__(self, config: HiFiGANConfig = HiFiGANConfig(), mel: MelConfig = LDM_MEL):
        super().__init__()
        if any(kernel < rate for kernel, rate in zip(config.kernels, config.rates, strict=True)):
            raise ValueError(f"every kernel must be at least its rate, got {config.kernels} for {config.rates}")
        if (config.istft_n_fft is None) != (config.istft_hop == 1):
            raise ValueError(
                f"istft_n_fft and istft_hop go together, got {config.istft_n_fft} and {config.istft_hop}; "
                "leave both out for the published generator"
            )
        if config.griffin_lim_iterations and config.istft_n_fft is None:
            raise ValueError("griffin_lim_iterations is for the inverse-STFT head: give istft_n_fft and istft_hop")
        self.config, self.mel_config = config, mel
        widths = [config.channels // 2**i for i in range(len(config.rates) + 1)]
        self.conv_pre = nn.Conv1d(config.n_mels, widths[0], 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(c_in, c_out, kernel, rate, padding=(kernel - rate) // 2)
            for (c_in, c_out), kernel, rate in zip(pairwise(widths), config.kernels, config.rates, strict=True)
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width, kernel, dilations, config.leaky_slope, config.snake)
            for width in widths[1:]
            for kernel, dilations in zip(config.res_kernels, config.res_dilations, strict=True)
        )
        outputs = 1 if config.istft_n_fft is None else config.istft_n_fft + 2  # log magnitude and phase of each bin
        self.conv_post = nn.Conv1d(widths[-1], outputs, 7, padding=3)
        if config.istft_n_fft is not None:
            self.register_buffer("window", torch.hann_window(config.istft_n_fft), persistent=False)
        if config.griffin_lim_iterations:
            self.conv_estimate = nn.Conv1d(3 * outputs // 2, widths[-1], 1)
            nn.init.zeros_(self.conv_post.weight)  # no correction yet: training starts at Griffin-Lim
            nn.init.zeros_(self.conv_post.bias)

    def forward(self, mel: Tensor) -> Tensor:
        if mel.ndim != 4 or mel.shape[1] != 1 or mel.shape[3] != self.config.n_mels:
            raise ValueError(f"mel must be (B, 1, T, {self.config.n_mels}), got {tuple(mel.shape)}")
        samples = mel.shape[2] * self.config.hop_length
        x = self.conv_pre(mel.squeeze(1).transpose(1, 2))  # (B, C, T)
        spectral = self.config.istft_n_fft is not None
        estimate = self.griffin_lim_estimate(mel) if self.config.griffin_lim_iterations else None
        blocks = len(self.config.res_kernels)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.leaky_slope))  # (B, C / 2, rate * T)
            if spectral and i + 1 == len(self.ups):
                x = F.pad(x, (1, 0), mode="reflect")  # L + 1 centred frames of the inverse STFT span L hops
            if estimate is not None and i + 1 == len(self.ups):
                x = x + self.conv_estimate(_features(estimate))
            x = sum(block(x) for block in self.resblocks[i * blocks : (i + 1) * blocks]) / blocks
        x = F.leaky_relu(x)  # slope .01 here, as published
        if not spectral:
            waveform = torch.tanh(self.conv_post(x)).squeeze(1)[:, :samples]
        else:
            waveform = self.inverse_stft(self.conv_post(x).float(), estimate)[:, :samples]
        if self.config.mel_corrections:
            waveform = match_mel(waveform, mel, self.mel_config, self.config.mel_corrections)
        if self.training:
            return waveform
        return waveform / waveform.abs().amax(1, keepdim=True).clamp(min=1)  # scaled, not clipped

    @torch.no_grad()
    def griffin_lim_estimate(self, mel: Tensor) -> Tensor:
        """Mel (B, 1, T, F) -> complex STFT (B, n_fft / 2 + 1, L + 1) of Griffin-Lim's waveform."""
        waveform = griffin_lim(mel, self.mel_config, self.config.griffin_lim_iterations)
        sizes = self.config.istft_n_fft, self.config.istft_hop
        return torch.stft(waveform, *sizes, window=self.window, pad_mode="constant", return_complex=True)

    def inverse_stft(self, x: Tensor, estimate: Tensor | None = None) -> Tensor:
        """Log magnitude and phase (B, n_fft + 2, L + 1) -> waveform (B, L * istft_hop) (iSTFTNet, fig. 1).

        estimate: a complex STFT (B, n_fft / 2 + 1, L + 1) whose log magnitude and phase are added to those of x.
        """
        log_magnitude, phase = x.chunk(2, dim=1)  # (B, n_fft / 2 + 1, L + 1)
        if estimate is not None:
            log_magnitude, phase = log_magnitude + _log_magnitude(estimate), phase + estimate.angle()
        limit = math.log(self.config.istft_n_fft / 2)  # a Hann window's sum: no waveform in [-1, 1] exceeds it
        excess = (log_magnitude - limit).clamp(min=0).detach()  # straight-through clamp: the gradient passes
        spectrum = torch.polar((log_magnitude - excess).exp(), phase)
        return torch.istft(spectrum, self.config.istft_n_fft, self.config.istft_hop, window=self.window)


def _log_magnitude(spectrum: Tensor) -> Tensor:
    return spectrum.abs().clamp(min=1e-5).log()


def _features(spectrum: Tensor) -> Tensor:
    """Complex (B, K, L) -> (B, 3 K, L): log magnitude, and cosine and sine of the phase."""
    direction = spectrum / spectrum.abs().clamp(min=1e-5)
    return torch.cat([_log_magnitude(spectrum), direction.real, direction.imag], dim=1)


def fold_weight_norm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn weight-normalised pairs, old torch names or new, into plain weights: w = g v / |v| over each first axis.

    Raises ValueError naming the half that a pair lacks.
    """
    folded = {}
    pairs = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}
    halves = pairs | {v: g for g, v in pairs.items()}
    for name, value in state_dict.items():
        half = next((half for half in halves if name.endswith(half)), None)
        if half is None:
            folded[name] = value
            continue
        prefix = name.removesuffix(half)
        if (other := prefix + halves[half]) not in state_dict:
            raise ValueError(f"the vocoder lacks the tensor {other}, which belongs to {name}")
        if half in pairs:
            v = state_dict[other]
            folded[prefix + "weight"] = v * value / v.flatten(1).norm(dim=1).view_as(value)
    return folded
