import math
from dataclasses import replace

import pytest
import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from refined_ldm.discriminators import generator_loss
from refined_ldm.hifigan import HiFiGAN, HiFiGANConfig, Snake, fold_weight_norm
from refined_ldm.mel import MelSpectrogram, griffin_lim
from tests.support.weight_norm import add_weight_norm, remove_weight_norm

SMALL = HiFiGANConfig(channels=64)
ISTFT = HiFiGANConfig(channels=32, rates=(5, 4), kernels=(16, 8), istft_n_fft=32, istft_hop=8)
ON_GRIFFIN_LIM = replace(ISTFT, rates=(2,), kernels=(4,), istft_n_fft=320, istft_hop=80, griffin_lim_iterations=4)


def log_mel_like(batch, frames):
    return torch.randn(batch, 1, frames, 64, generator=torch.Generator().manual_seed(0)) * 2 - 5


@pytest.mark.parametrize("config", [SMALL, ISTFT, ON_GRIFFIN_LIM])
@pytest.mark.parametrize("frames", [1, 7, 50])
def test_waveform_has_exactly_one_hop_per_frame(config, frames):
    waveform = HiFiGAN(config).eval()(log_mel_like(2, frames))
    assert waveform.shape == (2, frames * 160) == (2, frames * config.hop_length)
    assert waveform.abs().max() <= 1


def test_published_size_and_a_wrong_mel():
    with torch.device("meta"):
        model = HiFiGAN()
    assert sum(p.numel() for p in model.parameters()) == 55_264_897
    with pytest.raises(ValueError, match=r"\(B, 1, T, 64\)"):
        HiFiGAN(SMALL)(torch.zeros(2, 64, 10))


@pytest.mark.parametrize("channels", [64, 1024])
def test_equals_speecht5_hifigan(channels):
    torch.manual_seed(0)
    config = HiFiGANConfig(channels=channels)
    peer = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            upsample_initial_channel=channels,
            upsample_rates=list(config.rates),
            upsample_kernel_sizes=list(config.kernels),
            normalize_before=False,
        )
    )
    for weight in peer.parameters():
        torch.nn.init.normal_(weight, std=0.05 if weight.ndim == 1 else 1.2 / weight[0].numel() ** 0.5)
    weights = {name.replace("upsampler", "ups"): value for name, value in peer.state_dict().items()}
    weights.pop("mean"), weights.pop("scale")
    model = HiFiGAN(config)
    model.load_state_dict(weights)
    mel = log_mel_like(1, 12)
    with torch.no_grad():
        ours, theirs = model(mel), peer(mel[:, 0])
    assert theirs.shape[1] == 12 * 160 + 32 and theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs[:, : 12 * 160], atol=1e-4, rtol=0)


def test_weight_norm_folds_into_the_published_layout():
    torch.manual_seed(0)
    model, mel = HiFiGAN(SMALL), log_mel_like(1, 5)
    plain = model.state_dict()
    assert {"conv_pre.weight", "ups.4.bias", "resblocks.14.convs2.2.weight", "conv_post.weight"} <= plain.keys()
    with torch.no_grad():
        add_weight_norm(model)
        for name, weight in model.named_parameters():
            if name.endswith("original0"):
                weight.mul_(1.5)  # a length the direction alone does not have
        trained = model(mel)
        normed = model.state_dict()
        folded = fold_weight_norm(normed)
        original = {  # as {"generator": ...} of the HiFi-GAN authors
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): value
            for name, value in normed.items()
        }
        assert "ups.0.weight_g" in original
        for weights in (folded, fold_weight_norm(original), remove_weight_norm(model).state_dict()):
            assert weights.keys() == plain.keys()
            fresh = HiFiGAN(SMALL)
            fresh.load_state_dict(weights)
            torch.testing.assert_close(fresh(mel), trained, atol=1e-5, rtol=0)


def test_inverse_stft_head_can_make_any_waveform():
    """With the STFT of a sound as its features, the head gives that sound back."""
    sound = 0.5 * torch.randn(1, 400, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    spectrum = torch.stft(sound, 32, 8, window=torch.hann_window(32), return_complex=True)  # (1, 17, 51)
    model = HiFiGAN(ISTFT)
    model.conv_post = torch.nn.Identity()
    made = model.inverse_stft(torch.cat([spectrum.abs().log(), spectrum.angle()], dim=1))
    torch.testing.assert_close(made, sound, atol=1e-4, rtol=0)
    doubled = torch.cat([torch.full((1, 17, 51), math.log(2)), torch.zeros(1, 17, 51)], dim=1)
    torch.testing.assert_close(model.inverse_stft(doubled, spectrum / 2), sound, atol=1e-4, rtol=0)


def test_a_vocoder_on_griffin_lim_starts_there_and_learns_from_it():
    torch.manual_seed(0)
    model, mel = HiFiGAN(ON_GRIFFIN_LIM).eval(), log_mel_like(2, 20) - 4
    start = griffin_lim(mel, iterations=4)
    with torch.no_grad():
        torch.testing.assert_close(model(mel), start, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(mel)[1:], model(mel[1:]), atol=1e-5, rtol=0)  # clips are independent
    model(mel).square().mean().backward()
    assert model.conv_post.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="griffin_lim_iterations is for the inverse-STFT head"):
        HiFiGAN(replace(SMALL, griffin_lim_iterations=4))


@pytest.mark.parametrize("config", [HiFiGANConfig(channels=32, rates=(5, 4, 8), kernels=(15, 8, 16)), ISTFT])
def test_overfits_one_batch(config):
    torch.manual_seed(0)
    seconds = torch.arange(3200) / 16_000
    target = 0.4 * torch.sin(2 * torch.pi * torch.tensor([[440.0], [900.0]]) * seconds)
    to_mel = MelSpectrogram()
    mel = to_mel(target)
    model = add_weight_norm(HiFiGAN(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.8, 0.99))
    losses = []
    for _ in range(40):
        loss, terms = generator_loss([], [], mel, to_mel(model(mel)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(terms["mel"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_too_loud_is_turned_down_as_a_whole():
    model = HiFiGAN(ISTFT).eval()
    loud = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))
    loud[1] /= 100
    model.inverse_stft = lambda *_: loud
    made = model(torch.zeros(2, 1, 10, 64))
    assert made[0].abs().max() == 1 and (made[0].abs() == 1).sum() == 1 and made[1].abs().max() < 0.2
    torch.testing.assert_close(made[0], loud[0] / loud[0].abs().max())
    assert torch.equal(model.train()(torch.zeros(2, 1, 10, 64)), loud)  # in training the level itself is learnt


def test_mel_corrections_bring_the_mel_nearer():
    torch.manual_seed(0)
    plain = HiFiGAN(ON_GRIFFIN_LIM).eval()
    corrected = HiFiGAN(replace(ON_GRIFFIN_LIM, mel_corrections=4)).eval()
    corrected.load_state_dict(plain.state_dict())
    to_mel = MelSpectrogram()
    mel = to_mel(0.1 * torch.randn(2, 6400))
    with torch.no_grad():
        before, after = ((to_mel(vocoder(mel)) - mel).abs().mean() for vocoder in (plain, corrected))
    assert after < 0.75 * before
    assert corrected(mel[:, :, :2]).shape == (2, 320)


def test_snake_is_a_line_with_a_ripple():
    snake, x = Snake(2), torch.linspace(-3, 3, 41).expand(1, 2, 41)
    torch.testing.assert_close(snake(x), x + torch.sin(x) ** 2)
    with torch.no_grad():
        snake.alpha[0, 1] = 4.0
    torch.testing.assert_close(snake(x)[0, 1], x[0, 1] + torch.sin(4 * x[0, 1]) ** 2 / 4)
    model = HiFiGAN(replace(ISTFT, snake=True))
    mel = log_mel_like(1, 10)
    model(mel).square().sum().backward()
    alphas = [p for name, p in model.named_parameters() if name.endswith("alpha")]
    assert alphas and all(p.grad.abs().max() > 0 for p in alphas)
    assert HiFiGAN(ISTFT).state_dict().keys() == {k for k in model.state_dict() if not k.endswith("alpha")}
