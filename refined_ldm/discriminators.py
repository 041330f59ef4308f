"""The discriminators that HiFi-GAN is trained against, on periods, scales and spectrograms, and the losses.

Kong et al., "HiFi-GAN", 2020 (arXiv 2010.05646); discriminators of spectrograms are Jang et al., "UnivNet", 2021.

Notebook: 04
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from refined_ldm.base.integers import cast_numbers

Output = tuple[Tensor, list[Tensor]]  # logits (B, L), feature maps of every layer


@dataclass(frozen=True)
class DiscriminatorsConfig:
    """Kinds and sizes of the discriminators; the defaults are the published ones (71 M parameters)."""

    width: int = 32  # channels of a period discriminator's first layer, a multiple of 4; every other follows from it
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)  # samples; primes overlap least
    scales: int = 3  # the waveform, and its averages over 2 and 4 samples
    resolutions: tuple[int, ...] = ()  # samples; windows of the spectrogram discriminators, which HiFi-GAN lacks

    def __post_init__(self):
        cast_numbers(self)


def _logits_and_features(convs: nn.ModuleList, conv_post: nn.Module, x: Tensor) -> Output:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), 0.1)
        features.append(x)
    logits = conv_post(x)
    return logits.flatten(1), [*features, logits]


class PeriodDiscriminator(nn.Module):
    """Classify the waveform folded into rows of `period` samples: (B, N) -> logits (B, L), list of feature maps.

    Notebook: 04
    """

    def __init__(self, period: int, width: int):
        super().__init__()
        self.period = period
        channels = [1, width, 4 * width, 16 * width, 32 * width, 32 * width]
        self.convs = nn.ModuleList(
            parametrizations.weight_norm(nn.Conv2d(c_in, c_out, (5, 1), (stride, 1), padding=(2, 0)))
            for (c_in, c_out), stride in zip(pairwise(channels), (3, 3, 3, 3, 1), strict=True)
        )
        self.conv_post = parametrizations.weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform: Tensor) -> Output:
        x = F.pad(waveform.unsqueeze(1), (0, -waveform.shape[1] % self.period), mode="reflect")
        x = x.unflatten(2, (-1, self.period))  # (B, 1, N / period, period)
        return _logits_and_features(self.convs, self.conv_post, x)


class ScaleDiscriminator(nn.Module):
    """Classify the waveform with grouped strided convolutions: (B, N) -> logits (B, L), list of feature maps.

    Notebook: 04
    """

    def __init__(self, width: int, norm: Callable[[nn.Module], nn.Module]):
        super().__init__()
        channels = [1, *(4 * width * m for m in (1, 1, 2, 4, 8, 8, 8))]
        kernels, strides, groups = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, 16, 16, 16, 16, 1)
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=group))
            for (c_in, c_out), kernel, stride, group in zip(pairwise(channels), kernels, strides, groups, strict=True)
        )
        self.conv_post = norm(nn.Conv1d(channels[-1], 1, 3, padding=1))

    def forward(self, waveform: Tensor) -> Output:
        x = waveform.unsqueeze(1)
        return _logits_and_features(self.convs, self.conv_post, x)


class ResolutionDiscriminator(nn.Module):
    """Classify STFT magnitudes with 2-D convolutions (UnivNet, sec. 2.2): (B, N) -> logits (B, L), feature maps.

    Notebook: 04
    """

    def __init__(self, n_fft: int, width: int):
        super().__init__()
        self.n_fft = n_fft
        channels, strides = [1, *(width,) * 5], (1, 2, 2, 2, 1)  # over frequencies only
        kernels = ((3, 9), (3, 9), (3, 9), (3, 9), (3, 3))
        self.convs = nn.ModuleList(
            parametrizations.weight_norm(
                nn.Conv2d(c_in, c_out, kernel, (1, stride), padding=(kernel[0] // 2, kernel[1] // 2))
            )
            for (c_in, c_out), stride, kernel in zip(pairwise(channels), strides, kernels, strict=True)
        )
        self.conv_post = parametrizations.weight_norm(nn.Conv2d(width, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, waveform: Tensor) -> Output:
        spectrum = torch.stft(waveform, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        x = spectrum.abs().transpose(1, 2)[:, None]  # (B, 1, frames, n_fft / 2 + 1)
        return _logits_and_features(self.convs, self.conv_post, x)


class Discriminators(nn.Module):
    """Multi-period and multi-scale discriminators (paper, sec. 2.3): (B, N) -> [(logits (B, L), feature maps), ...].

    The spectrogram discriminators (`resolutions`) come last. Raises ValueError unless `width` is a multiple of 4.

    Notebook: 04
    """

    def __init__(self, config: DiscriminatorsConfig = DiscriminatorsConfig()):
        super().__init__()
        if config.width % 4:
            raise ValueError(f"width must be a multiple of 4 (16 groups share 4 * width channels), got {config.width}")
        self.config = config
        self.mpd = nn.ModuleList(PeriodDiscriminator(period, config.width) for period in config.periods)
        norms = [parametrizations.spectral_norm] + [parametrizations.weight_norm] * (config.scales - 1)
        self.msd = nn.ModuleList(ScaleDiscriminator(config.width, norm) for norm in norms[: config.scales])
        self.mrd = nn.ModuleList(ResolutionDiscriminator(n_fft, config.width) for n_fft in config.resolutions)

    def forward(self, waveform: Tensor) -> list[Output]:
        outputs, averaged = [discriminator(waveform) for discriminator in self.mpd], waveform
        for discriminator in self.msd:
            outputs.append(discriminator(averaged))
            averaged = F.avg_pool1d(averaged, 4, 2, padding=2)  # half the rate for the next scale
        return outputs + [discriminator(waveform) for discriminator in self.mrd]


def discriminator_loss(real: list[Output], fake: list[Output]) -> Tensor:
    """Least-squares loss of the discriminators, real towards 1 and generated towards 0 (eq. 1, summed as in eq. 8).

    real, fake: outputs of `Discriminators` for recorded and for (detached) generated waveforms.

    Notebook: 04
    """
    return sum((1 - r).square().mean() + f.square().mean() for (r, _), (f, _) in zip(real, fake, strict=True))


def generator_loss(
    real: list[Output], fake: list[Output], real_mel: Tensor, fake_mel: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adversarial (eq. 2) + 2 feature matching (eq. 4) + 45 mel L1 (eq. 3), summed as in eq. 7.

    real, fake: outputs of `Discriminators`, or two empty lists to train on the mel loss alone; real_mel, fake_mel:
    (B, 1, T, F). Returns the total and its unweighted terms {"adversarial", "features", "mel"}.

    Notebook: 04
    """
    zero = fake_mel.new_zeros(())
    maps = [
        (r.detach(), f)
        for (_, real_maps), (_, fake_maps) in zip(real, fake, strict=True)
        for r, f in zip(real_maps, fake_maps, strict=True)
    ]
    terms = {
        "adversarial": sum(((1 - f).square().mean() for f, _ in fake), zero),
        "features": sum((F.l1_loss(f, r) for r, f in maps), zero),
        "mel": F.l1_loss(fake_mel, real_mel),
    }
    return terms["adversarial"] + 2 * terms["features"] + 45 * terms["mel"], terms


def stft_loss(waveform: Tensor, target: Tensor, n_ffts: tuple[int, ...] = (512, 1024, 2048)) -> Tensor:
    """Multi-resolution STFT loss (Yamamoto et al. 2020, eq. 3-6): spectral convergence + log-magnitude L1, averaged.

    waveform, target: (B, N). It covers every frequency bin, as a mel loss does not.

    Notebook: 04
    """
    total = 0
    for n_fft in n_ffts:
        window = torch.hann_window(n_fft, device=waveform.device)
        magnitude, reference = (
            torch.stft(x, n_fft, n_fft // 4, window=window, return_complex=True).abs().clamp(min=1e-5)
            for x in (waveform, target)
        )
        convergence = (reference - magnitude).norm() / reference.norm()  # of the batch: a silent crop has no scale
        total = total + convergence + F.l1_loss(magnitude.log(), reference.log())
    return total / len(n_ffts)
