import librosa
import numpy as np
import pytest
import torch

from refined_ldm.mel import (
    LDM_MEL,
    MelConfig,
    MelSpectrogram,
    griffin_lim,
    hz_to_mel,
    match_mel,
    mel_filterbank,
    mel_to_hz,
)


def chirp(samples, rows=1):
    """Tones that glide, one octave apart from row to row, with a little noise."""
    t = torch.arange(samples) / 16_000
    start = 200 * 2.0 ** torch.arange(rows)[:, None]  # Hz
    tone = 0.3 * torch.sin(2 * torch.pi * (start * t + 300 * t**2))
    return tone + 0.003 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings", [(16_000, 1024, 64, 0, 8000), (44_100, 2048, 80, 50, 14_000), (8000, 512, 33, 20, 3999)]
)
def test_filterbank_equals_librosa(settings):
    rate, n_fft, n_mels, fmin, fmax = settings
    expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax)
    np.testing.assert_allclose(mel_filterbank(*settings).numpy(), expected, atol=1e-6 * expected.max())


def test_mel_scale_equals_librosa_and_inverts():
    hz = np.linspace(0, 20_000, 501)
    np.testing.assert_allclose(hz_to_mel(hz).numpy(), librosa.hz_to_mel(hz), rtol=1e-12)
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz)).numpy(), hz, atol=1e-8)


@pytest.mark.parametrize("samples", [480, 160 * 37, 40_960])
def test_log_mel_equals_librosa(samples):
    waveform = chirp(samples, rows=2)
    padded = np.pad(waveform.numpy(), ((0, 0), (432, 432)), mode="reflect")  # AudioLDM's framing
    magnitude = librosa.feature.melspectrogram(
        y=padded, sr=16_000, n_fft=1024, hop_length=160, center=False, power=1.0, n_mels=64, fmin=0, fmax=8000
    )
    expected = np.log(np.maximum(magnitude, 1e-5)).transpose(0, 2, 1)[:, None]
    mel = MelSpectrogram()(waveform)
    assert mel.shape == (2, 1, samples // 160, 64)
    np.testing.assert_allclose(mel.numpy(), expected, atol=1e-4)


def test_a_delay_of_one_hop_shifts_one_frame_and_a_gain_adds_its_logarithm():
    waveform, mel = chirp(160 * 60), MelSpectrogram()
    here, later = mel(waveform), mel(torch.roll(waveform, 160, dims=1))
    torch.testing.assert_close(later[:, :, 11:50], here[:, :, 10:49], atol=1e-4, rtol=0)  # away from the padding
    torch.testing.assert_close(mel(3 * waveform), here + np.log(3), atol=1e-4, rtol=0)


def test_a_tone_is_loudest_in_the_band_centred_nearest():
    centres = mel_to_hz(torch.linspace(0, hz_to_mel(8000).item(), 66))[1:-1]
    for band in (20, 35, 50, 60):
        tone = 0.3 * torch.sin(2 * torch.pi * centres[band] * torch.arange(8000) / 16_000)[None].float()
        assert (MelSpectrogram()(tone)[0, 0, 5:-5].argmax(1) == band).all()


def test_silence_is_the_floor_and_has_a_gradient():
    waveform = torch.zeros(1, 1600, requires_grad=True)
    mel = MelSpectrogram()(waveform)
    torch.testing.assert_close(mel, torch.full_like(mel, np.log(1e-5)))
    mel.sum().backward()
    assert waveform.grad.isfinite().all()


def test_half_precision_around_it_changes_nothing():
    waveform, mel = chirp(1600), MelSpectrogram()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mel(waveform), mel(waveform).float())
        inside = mel(waveform)
    assert torch.equal(inside, mel(waveform))


def test_bad_waveforms_and_settings_are_refused():
    mel = MelSpectrogram()
    with pytest.raises(ValueError, match=r"1601 .* trim the waveform to 1600"):
        mel(torch.zeros(1, 1601))
    with pytest.raises(ValueError, match=r"\(B, N\), got \(1, 1, 1600\)"):
        mel(torch.zeros(1, 1, 1600))
    with pytest.raises(ValueError, match="longer than 432"):
        mel(torch.zeros(1, 320))
    with pytest.raises(ValueError, match="fmin < fmax"):
        MelConfig(fmax=9000)
    with pytest.raises(ValueError, match="even"):
        MelConfig(hop_length=161)
    with pytest.raises(ValueError, match=r"\(B, 1, T, 64\)"):
        griffin_lim(torch.zeros(1, 1, 10, 32))


@torch.no_grad()
def test_griffin_lim_improves_with_iterations_and_beats_random_phase():
    waveform, mel = chirp(160 * 64, rows=2), MelSpectrogram()
    target = mel(waveform)
    errors = []
    for iterations in (0, 4, 32):  # 0: the right magnitudes with random phases
        back = griffin_lim(target, iterations=iterations)
        assert back.shape == waveform.shape and back.isfinite().all()
        errors.append((mel(back) - target).abs().mean().item())
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.35


@torch.no_grad()
def test_griffin_lim_odd_shapes_and_seeds():
    config = MelConfig(n_fft=512, hop_length=128, n_mels=40)
    mel = MelSpectrogram(config)(chirp(128 * 31, rows=3))
    one = griffin_lim(mel, config, iterations=2)
    assert one.shape == (3, 128 * 31)
    assert torch.equal(one, griffin_lim(mel, config, iterations=2))
    assert not torch.equal(one, griffin_lim(mel, config, iterations=2, generator=torch.Generator().manual_seed(1)))
    assert griffin_lim(torch.full((1, 1, 8, 64), np.log(LDM_MEL.floor)), iterations=2).abs().max() < 1e-3


def test_matching_a_mel_brings_it_nearer_and_leaves_what_fits():
    to_mel, generator = MelSpectrogram(), torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(2, 8000, generator=generator)
    target = to_mel(sound)
    torch.testing.assert_close(match_mel(sound, target), sound, atol=1e-4, rtol=0)  # its own mel: nothing to correct
    rough = griffin_lim(target, iterations=4)
    error = [(to_mel(match_mel(rough, target, iterations=k)) - target).abs().mean().item() for k in (0, 1, 4, 16)]
    assert error[0] > 1.3 * error[1] and error == sorted(error, reverse=True) and error[-1] < 0.5 * error[0]
    one = match_mel(rough[:1], target[:1])
    torch.testing.assert_close(one, match_mel(rough, target)[:1], atol=1e-5, rtol=1e-4)  # clips are independent


def test_matching_a_mel_passes_gradients_and_refuses_other_lengths():
    mel = torch.full((1, 1, 10, 64), -4.0)
    rough = (0.1 * torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))).requires_grad_()
    match_mel(rough, mel).square().sum().backward()
    assert rough.grad.isfinite().all() and rough.grad.abs().max() > 0
    with pytest.raises(ValueError, match="a mel of 10 frames belongs to 1600 samples, got waveform .1, 1440."):
        match_mel(torch.zeros(1, 1440), mel)
    assert match_mel(torch.zeros(1, 320), mel[:, :, :2]).shape == (1, 320)  # shorter than half a window
    assert match_mel(torch.zeros(1, 1600), mel).isfinite().all()


def test_whole_floats_are_iterations_and_other_numbers_are_refused():
    mel = MelSpectrogram()(torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0)) * 0.1)
    sound = griffin_lim(mel, iterations=2)
    assert torch.equal(griffin_lim(mel, iterations=2.0), sound)
    assert torch.equal(match_mel(sound, mel, iterations=1.0), match_mel(sound, mel, iterations=1))
    for wrong in (-1, 1.5, True, float("nan"), "2"):
        for call in (lambda n: griffin_lim(mel, iterations=n), lambda n: match_mel(sound, mel, iterations=n)):
            with pytest.raises(ValueError, match="iterations must be a whole number, 0 or more, got"):
                call(wrong)
