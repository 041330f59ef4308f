"""The caption as a map in time and frequency, beside FiLM."""

import numpy as np
import pytest
import torch
from scipy.fft import dct
from torch import nn

from refined_ldm.conditioning import CaptionMap, cosines
from refined_ldm.unet import UNet, UNetConfig
from tests.support.small import UNET, awake, unet_inputs


def test_cosines_are_those_of_the_dct():
    expected = dct(np.eye(12), type=2, axis=0)[:5].T / 2
    np.testing.assert_allclose(cosines(12, 5, torch.zeros(())), expected, atol=1e-6)


@torch.no_grad()
def test_the_map_stretches_with_its_size():
    drawn = awake(CaptionMap(6, 2, 3))
    c = nn.functional.normalize(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    small, large = drawn(c, 32, 16), drawn(c, 96, 16)
    assert small.shape == (2, 2, 32, 16) and large.shape == (2, 2, 96, 16)
    torch.testing.assert_close(large[:, :, 1::3], small)  # every third position is the centre of a small one


@torch.no_grad()
def test_a_fit_finds_the_map_that_made_the_latents():
    generator = torch.Generator().manual_seed(0)
    c = nn.functional.normalize(torch.randn(2000, 12, generator=generator))
    true = CaptionMap(12, 3, 4)
    nn.init.normal_(true.draw.weight, generator=generator)
    clean = true(c, 32, 16)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=generator)
    found = CaptionMap(12, 3, 4).fit(noisy, c, ridge=1e-3)(c, 32, 16)
    assert (found - clean).abs().max() < 0.01 * clean.std()


@torch.no_grad()
def test_a_smaller_rank_keeps_most_of_the_map():
    generator = torch.Generator().manual_seed(0)
    c = nn.functional.normalize(torch.randn(2000, 12, generator=generator))
    strength = torch.tensor([5.0, 5.0, 5.0, 1.0])
    true = CaptionMap(12, 3, 4)
    nn.init.normal_(true.draw.weight, generator=generator)
    true.read.weight.mul_(strength[:, None])
    clean = true(c, 32, 16)
    found = CaptionMap(12, 3, 3).fit(clean, c, ridge=1e-3)(c, 32, 16)
    explained = 1 - (found - clean).square().mean() / (clean - clean.mean(0)).square().mean()
    assert 0.9 < explained < 0.9999


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_the_unet_takes_order_from_the_map(patch):
    """Two captions with equal FiLM vectors differ through the map alone."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**UNET | {"patch_size": patch, "caption_map": 3}))
    latent, t, c = unet_inputs(T=12, F=8)
    unet.film_embed.weight.zero_()
    awake(unet)
    unet.film_embed.weight.zero_()
    assert not torch.allclose(unet(latent, t, c), unet(latent, t, c.flip(0)), atol=1e-4)
    unet.map_in.weight.zero_()
    torch.testing.assert_close(unet(latent, t, c), unet(latent, t, c.flip(0)))
