import pytest
import torch
from torch.distributions import Normal, kl_divergence

from refined_ldm.vae import (
    Attention,
    Gaussian,
    MelVAE,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    VAEConfig,
    latent_scale,
    patch_loss,
    vae_loss,
)

SMALL = VAEConfig(latent_channels=3, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return MelVAE(SMALL)


def mels(*shape, seed=0):
    """Smooth random log-mels: what neighbours share can be compressed."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return 3 * torch.nn.functional.avg_pool2d(noise, 5, 1, 2) - 4


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 1, 20, 12), (2, 1, 100, 64)])
def test_shapes(vae, shape):
    B, _, T, F = shape
    posterior = vae.encode(mels(*shape))
    assert posterior.mean.shape == posterior.log_var.shape == (B, 3, T // 4, F // 4)
    assert vae.decode(posterior.mean).shape == shape


def test_published_size():
    with torch.device("meta"):
        vae = MelVAE()
    assert sum(p.numel() for p in vae.parameters()) == 55_376_873
    assert vae.encode(torch.zeros(1, 1, 1024, 64, device="meta")).mean.shape == (1, 8, 256, 16)


def test_bad_inputs_are_refused(vae):
    for shape in ((1, 4, 4), (1, 2, 4, 4)):
        with pytest.raises(ValueError, match=r"mel must be \(B, 1, T, F\)"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"multiples of 4, got .*\(1, 1, 6, 4\)"):
        vae.encode(torch.zeros(1, 1, 6, 4))
    with pytest.raises(ValueError, match=r"\(B, 3, T, F\)"):
        vae.decode(torch.zeros(1, 8, 4, 4))


@torch.no_grad()
def test_clips_of_a_batch_do_not_affect_each_other(vae):
    mel = mels(3, 1, 16, 8)
    together, alone = vae.encode(mel), vae.encode(mel[1:2])
    torch.testing.assert_close(together.mean[1:2], alone.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(together.mean)[1:2], vae.decode(alone.mean), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_equals_the_formula():
    torch.manual_seed(0)
    attention, h = Attention(8, 4), torch.randn(2, 8, 5, 3)
    q, k, v = (to(attention.norm(h)).flatten(2) for to in (attention.q, attention.k, attention.v))  # (B, C, L)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 8**0.5, dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view(h.shape)
    torch.testing.assert_close(attention(h), h + attention.proj_out(mixed), atol=1e-5, rtol=1e-5)


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mean, log_var = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    expected = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(mean, log_var).kl(), expected)
    assert Gaussian(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).kl() == 0


def test_samples_have_mean_and_variance_and_follow_the_generator():
    posterior = Gaussian(torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), 0.25).log())
    one = posterior.sample(torch.Generator().manual_seed(0))
    assert abs(one.mean() - 2) < 0.02 and abs(one.std() - 0.5) < 0.02
    assert torch.equal(one, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(one, posterior.sample(torch.Generator().manual_seed(1)))
    extreme = Gaussian(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e4))
    assert extreme.sample().isfinite() and extreme.kl().isfinite()


def test_loss_is_the_sum_of_its_parts():
    mel, posterior = mels(2, 1, 8, 8), Gaussian(torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2))
    losses = vae_loss(mel, mel + 0.5, posterior, kl_weight=0.1)
    torch.testing.assert_close(losses["l1"], torch.tensor(0.5))
    torch.testing.assert_close(losses["kl"], torch.tensor(0.5))  # (1 + 1 - 1 - 0) / 2 nats for each number
    torch.testing.assert_close(losses["loss"], torch.tensor(0.55))


@torch.no_grad()
def test_scaled_latents_have_unit_variance(vae):
    sets = [mels(2, 1, 16, 8, seed=s) for s in range(3)] + [mels(1, 1, 8, 8, seed=9)]
    scale = latent_scale(vae, iter(sets))
    latents = torch.cat([vae.encode(m).mean.flatten() for m in sets])
    assert abs((scale * latents).std(correction=0) - 1) < 1e-3
    with pytest.raises(ValueError, match="at least one"):
        latent_scale(vae, [])


def test_it_overfits_one_batch(vae):
    mel = mels(2, 1, 16, 8)
    optimizer, generator, history = torch.optim.Adam(vae.parameters(), 5e-3), torch.Generator().manual_seed(0), []
    for _ in range(120):
        reconstruction, posterior = vae(mel, generator)
        losses = vae_loss(mel, reconstruction, posterior)
        optimizer.zero_grad(), losses["loss"].backward(), optimizer.step()
        history.append(losses["l1"].item())
    flat = (mel - mel.mean()).abs().mean()  # what a constant would reach
    assert history[-1] < 0.35 * flat < history[0]


def test_patches_are_classified_where_they_are():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(channels=8))
    mel = mels(1, 1, 128, 64)
    logits, features = discriminator(mel)
    assert logits.shape == (1, 1, 14, 6) and len(features) == 4
    with torch.device("meta"):
        published = PatchDiscriminator()
    assert round(sum(p.numel() for p in published.parameters()) / 1e6, 1) == 2.8


def test_the_discriminator_adds_two_terms_and_no_gradient_to_itself_or_to_a_settled_encoder(vae):
    torch.manual_seed(0)
    discriminator, mel = PatchDiscriminator(PatchDiscriminatorConfig(channels=8)), mels(2, 1, 32, 64)
    copy, posterior = vae(mel, freeze_encoder=True)
    real, fake = discriminator(mel), discriminator(copy)
    terms = vae_loss(mel, copy, posterior, real=real, fake=fake, adversarial_weight=0.5)
    plain = vae_loss(mel, copy, posterior)
    expected = plain["loss"] + 0.5 * (terms["adversarial"] + terms["perceptual"])
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None for p in vae.decoder.parameters())
    same = vae_loss(mel, mel, posterior, real=real, fake=discriminator(mel))
    assert same["perceptual"] == 0 and same["l1"] == 0
    vae(mel)[0].sum().backward()
    assert all(p.grad is not None for p in vae.encoder.parameters())


def test_patch_loss_is_a_hinge():
    def said(x):
        return torch.full((1, 1, 2, 2), x), []

    assert patch_loss(said(1.0), said(-1.0)) == 0 and patch_loss(said(3.0), said(-2.0)) == 0
    assert patch_loss(said(0.0), said(0.0)) == 2 and patch_loss(said(-1.0), said(1.0)) == 4
