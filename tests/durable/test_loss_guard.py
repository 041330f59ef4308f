import math

import pytest
import torch

from refined_ldm.audio import are_finite, check_finite, is_constant, is_silent_waveform, warn_of_silence
from refined_ldm.durable.loss_guard import SpikeWatch
from refined_ldm.mel import is_silent_mel


def test_a_loss_that_jumps_is_reported_by_how_much():
    spike = SpikeWatch(factor=3, least=20)
    assert [spike(1.0) for _ in range(20)] == [None] * 20
    assert spike(2.9) is None and spike(5.0) == 5.0
    assert spike(1.0) is None and spike(100.0) == 100.0  # one jump does not make the next one usual


def test_the_first_losses_are_no_jumps_and_what_lasts_becomes_usual():
    assert not any(SpikeWatch()(loss) for loss in (0.1, 5.0, 40.0))
    spike = SpikeWatch()
    found = [spike(loss) for loss in [1.0] * 20 + [10.0] * 40]
    assert found[20] == 10.0 and not any(found[21:])  # reported once, then usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_name_stage_caption_and_type(dtype, odd):
    batch = torch.ones(3, 2, 4, dtype=dtype)
    check_finite("mel", are_finite(batch), ["a", "b", "c"], dtype)
    batch[1, 0, 3] = odd
    with pytest.raises(FloatingPointError, match=f"the mel of 'b' holds NaN or infinite numbers .{dtype}"):
        check_finite("mel", are_finite(batch), ["a", "b", "c"], dtype)


def test_silence_is_reported(recwarn):
    warn_of_silence("waveform", torch.tensor([False, False]), ["a", "b"])
    assert not recwarn
    with pytest.warns(UserWarning, match="the waveform of 'b' is silent"):
        warn_of_silence("waveform", torch.tensor([False, True]), ["a", "b"])
    with pytest.warns(UserWarning, match="of 'a', 'b', 'c' and 2 more is silent"):
        warn_of_silence("waveform", torch.ones(5).bool(), list("abcde"))


def test_what_is_silent():
    quiet, loud = torch.full((2, 100), 0.4 / 32767), torch.full((1, 100), 0.6 / 32767)
    assert is_silent_waveform(torch.cat([quiet, -loud])).tolist() == [True, True, False]
    mel = torch.full((2, 1, 4, 3), math.log(1e-5))
    mel[1, 0, 2, 1] = math.log(2e-4)
    assert is_silent_mel(mel, 1e-5).tolist() == [True, False]
    latent = torch.zeros(2, 8, 4, 4)
    latent[1, 3, 2, 1] = 0.01
    assert is_constant(latent).tolist() == [True, False] and is_constant(latent + 3).tolist() == [True, False]
