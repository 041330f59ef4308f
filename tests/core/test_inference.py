import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm import inference as fast
from refined_ldm.hifigan import HiFiGANConfig
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.unet import DeepFeatures
from tests.support import small

CAPTIONS = ["a dog barks", "rain falls"]


@pytest.fixture
def model(monkeypatch):
    return small.awake_model(monkeypatch)


def test_in_float32_the_sounds_stay_the_same(model):
    quick = copy.deepcopy(model)
    done = optimize_for_inference(quick, "no")
    assert done.precision == "no" and not done.compiled
    torch.testing.assert_close(quick.generate(CAPTIONS), model.generate(CAPTIONS), atol=1e-4, rtol=1e-4)
    weights = [layer.weight for layer in quick.unet.modules() if isinstance(layer, nn.Conv2d)]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("layer", [
    nn.Conv1d(6, 10, 7, padding=9, dilation=3), nn.Conv1d(6, 10, 3), nn.ConvTranspose1d(6, 10, 16, 5, padding=5),
])  # fmt: skip
def test_a_convolution_in_time_is_one_of_a_picture_one_pixel_high(layer):
    x = torch.randn(2, 6, 50)
    with torch.no_grad():
        found = fast._as_image(layer)(x)
        torch.testing.assert_close(found, layer(x))
    assert found[:, :, None].is_contiguous(memory_format=torch.channels_last)  # the next one need not turn it


def test_large_maps_go_by_winograd(monkeypatch):
    if not torch.backends.nnpack.is_available():
        pytest.skip("torch was built without NNPACK")
    layer, calls = nn.Conv2d(64, 70, 3, padding=1), []
    winograd = torch._nnpack_spatial_convolution
    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", lambda *given: calls.append(1) or winograd(*given))
    large, narrow = torch.randn(2, 64, 80, 64), torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        for x in (large, narrow, large.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(fast._by_winograd(layer, x), layer(x), atol=1e-4, rtol=1e-4)
    assert len(calls) == 2
    assert torch.equal(fast._by_winograd(layer, large), layer(large)) and len(calls) == 2  # training takes no shortcut


@pytest.mark.parametrize("layer, suits", [
    (nn.Conv2d(64, 64, 3, padding=1), True), (nn.Conv2d(64, 64, 1), False), (nn.Conv2d(8, 64, 3, padding=1), False),
    (nn.Conv2d(64, 64, 3, stride=2, padding=1), False), (nn.Conv2d(64, 64, 3), False), (nn.Linear(64, 64), False),
])  # fmt: skip
def test_which_layers_suit_winograd(layer, suits):
    assert fast._suits_winograd(layer) == suits


@pytest.mark.parametrize("precision, half, most", [("bf16", torch.bfloat16, 0.03), ("fp16", torch.float16, 0.005)])
def test_half_precision_is_near_and_norms_and_ends_stay_exact(model, precision, half, most):
    quick = copy.deepcopy(model)
    assert optimize_for_inference(quick, precision).precision == precision
    dtypes = {name: weight.dtype for name, weight in quick.unet.named_parameters()}
    for name, dtype in dtypes.items():
        exact = "norm" in name or any(part in name.split(".") for part in fast.EXACT)
        assert dtype == (torch.float32 if exact else half), name
    shape = quick.latent_shape(model.config.seconds)
    inputs = torch.randn(2, *shape), torch.tensor([100, 900]), torch.randn(2, model.config.unet.embedding_dim)
    with torch.no_grad():
        plain, found = model.unet(*inputs), quick.unet(*inputs)
    assert found.dtype == torch.float32 and 0 < (found - plain).norm() / plain.norm() < most
    sounds = quick.generate(CAPTIONS)
    assert sounds.dtype == torch.float32 and sounds.isfinite().all() and sounds.abs().max() <= 1


def test_the_vocoder_with_an_inverse_stft_too(monkeypatch):
    small.use_small_clap(monkeypatch)
    head = HiFiGANConfig(
        n_mels=16,
        channels=16,
        rates=(2,),
        kernels=(4,),
        res_kernels=(3,),
        res_dilations=((1, 3),),
        istft_n_fft=320,
        istft_hop=80,
    )
    model = RefinedAudioLDM(small.config(hifigan=head), seed=3).eval()
    mel = F.pad(torch.randn(1, 1, 12, 16), (0, 0, 2, 2), value=-8.0)
    with torch.no_grad():
        plain = model.vocoder(mel)
        optimize_for_inference(model, "no")
        torch.testing.assert_close(model.vocoder(mel), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_compiled_the_sounds_stay_the_same(model):
    quick = copy.deepcopy(model)
    assert optimize_for_inference(quick, "no", compile=True).compiled
    torch.testing.assert_close(quick.generate(CAPTIONS), model.generate(CAPTIONS), atol=1e-4, rtol=1e-4)


def test_another_precision_is_refused(model):
    with pytest.raises(ValueError, match='"bf16", "fp16", "no" or None, got \'fp8\''):
        optimize_for_inference(model, "fp8")


def test_deep_features_are_computed_at_every_few_steps(model):
    deep, evaluated, found = [], [], []
    c = model.clap.embed_text(CAPTIONS)
    noise = torch.randn(2, *model.latent_shape(0.64), generator=torch.Generator().manual_seed(0))
    model.unet.middle[0].register_forward_hook(lambda block, given, h: deep.append(len(h)))
    model.unet.conv_in.register_forward_hook(lambda block, given, h: evaluated.append(len(h)))
    for interval, complete in ((1, 5), (2, 3), (9, 1)):
        assert optimize_for_inference(model, "no", cache_interval=interval).cache_interval == interval
        deep.clear(), evaluated.clear()
        found.append(model.sample_latent(c, noise, steps=5))
        assert deep == [4] * complete and evaluated == [4] * 5
    exact, two, nine = found
    assert 0 < (two - exact).norm() < (nine - exact).norm()
    assert torch.equal(model.sample_latent(c, noise, steps=5), nine)  # nothing is left of the sampling before
    deep.clear()
    model.sample_latent(c, noise, steps=4, guidance_interval=(0, 600))
    assert deep == [2, 4]  # where guidance begins, the batch is another
    with pytest.raises(ValueError, match="cache_interval must be"):
        optimize_for_inference(model, "no", cache_interval=0)
    with pytest.raises(ValueError, match="leave one out"):
        optimize_for_inference(model, "no", compile=True, cache_interval=2)


@torch.no_grad()
def test_with_the_same_input_reused_features_change_nothing(model):
    latent, t, c = torch.randn(2, *model.latent_shape(0.64)), torch.tensor([500, 20]), model.clap.embed_text(CAPTIONS)
    deep = DeepFeatures(2)
    expected = model.unet(latent, t, c)
    for _ in range(2):  # complete, then reused
        torch.testing.assert_close(model.unet(latent, t, c, deep=deep), expected)
    assert deep.calls == 2
    later = model.unet(latent, t, c, deep=deep), model.unet(latent + 0.1, t, c, deep=deep)
    assert torch.equal(later[0], expected) and not torch.equal(later[1], model.unet(latent + 0.1, t, c))
