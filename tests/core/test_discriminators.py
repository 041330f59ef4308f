import torch

from refined_ldm.discriminators import (
    Discriminators,
    DiscriminatorsConfig,
    discriminator_loss,
    generator_loss,
    stft_loss,
)


def test_discriminators_take_any_length_and_pass_gradients():
    torch.manual_seed(0)
    discriminators = Discriminators(DiscriminatorsConfig(width=4))
    real, fake = torch.randn(2, 2503), torch.randn(2, 2503, requires_grad=True)
    outputs = discriminators(fake)
    assert len(outputs) == 5 + 3
    assert all(logits.ndim == 2 and len(logits) == 2 for logits, _ in outputs)
    assert [len(features) for _, features in outputs] == [6] * 5 + [8] * 3
    loss, terms = generator_loss(discriminators(real), outputs, torch.zeros(2, 1, 4, 64), torch.ones(2, 1, 4, 64))
    assert terms.keys() == {"adversarial", "features", "mel"} and terms["mel"] == 1
    torch.testing.assert_close(loss, terms["adversarial"] + 2 * terms["features"] + 45 * terms["mel"])
    (loss + discriminator_loss(discriminators(real), discriminators(fake.detach()))).backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad.isfinite().all() for p in discriminators.parameters())


def test_published_discriminators_have_the_published_size():
    with torch.device("meta"):
        discriminators = Discriminators()
    assert round(sum(p.numel() for p in discriminators.mpd.parameters()) / 1e6, 1) == 41.1
    assert round(sum(p.numel() for p in discriminators.msd.parameters()) / 1e6, 1) == 29.6


def test_losses_are_zero_at_their_optimum():
    right, wrong = [(torch.ones(2, 3), [])], [(torch.zeros(2, 3), [])]
    assert discriminator_loss(right, wrong) == 0 and discriminator_loss(wrong, right) == 2
    mel = torch.zeros(1, 1, 4, 64)
    assert generator_loss(right, right, mel, mel)[0] == 0 and generator_loss(right, wrong, mel, mel)[0] == 1
    assert generator_loss([], [], mel, mel + 1)[0] == 45
    sound = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    assert stft_loss(sound, sound) == 0 and stft_loss(0.1 * sound, sound) > 1


def test_spectrogram_discriminators_come_last_and_see_every_window():
    torch.manual_seed(0)
    discriminators = Discriminators(DiscriminatorsConfig(width=4, periods=(2,), scales=1, resolutions=(128, 256)))
    quiet, tone = torch.zeros(1, 4000), torch.sin(torch.arange(4000)[None] * 0.3)
    outputs = discriminators(tone)
    assert len(outputs) == 4 and [len(features) for _, features in outputs[2:]] == [6, 6]
    assert [features[0].shape[2] for _, features in outputs[2:]] == [126, 63]  # frames: hops of 32 and 64 samples
    assert all((a - b).abs().max() > 0 for (a, _), (b, _) in zip(outputs, discriminators(quiet), strict=True))
    moved = discriminators(-tone)  # the same magnitudes: the others see the sign, these do not
    torch.testing.assert_close(moved[2][0], outputs[2][0])
    assert (moved[0][0] - outputs[0][0]).abs().max() > 1e-4
