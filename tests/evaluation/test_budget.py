import json

import numpy as np
import pytest
import torch

from refined_ldm.audio import save_audio
from refined_ldm.cli import commands as cli
from refined_ldm.evaluation import budget
from refined_ldm.evaluation.budget import WAYS, Cost, copies, error_budget, faults, read_recordings, table
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import small


@pytest.fixture
def model(monkeypatch):
    small.use_small_clap(monkeypatch)
    return RefinedAudioLDM(small.config()).eval()


def embed(waveform, rate):
    """Levels of 8 pieces of a clip: an embedding of loudness alone."""
    assert rate == 16_000
    return waveform.unflatten(1, (8, -1)).square().mean(2).sqrt()


def tracker(waveform):
    """The frequency of a tone, from its zero crossings."""
    hz = (waveform.sign().diff() != 0).float().mean().item() * 8000
    return np.full(3, 1200 * np.log2(max(hz, 20) / 10)), np.ones(3)


@pytest.fixture
def few(monkeypatch):
    """Clips of noise in place of rendered scenes."""

    def clips(count, split="test", seed=0, seconds=0.32, **_):
        generator = torch.Generator().manual_seed(len(split) + seed)
        level = torch.rand(min(count, 40), 1, generator=generator)
        noise = 0.2 * level * torch.randn(min(count, 40), 5120, generator=generator)
        return [{"waveform": w, "caption": f"noise {i}"} for i, w in enumerate(noise)]

    def notes(count, seconds, seed):
        hz = torch.linspace(200, 800, 4)[:, None]
        return 0.3 * torch.sin(2 * torch.pi * hz / 16_000 * torch.arange(5120)), 1200 * np.log2(hz[:, 0].numpy() / 10)

    monkeypatch.setattr(budget, "rendered_clips", clips)
    monkeypatch.setattr(budget, "played_notes", notes)


def test_every_way_is_measured_and_the_original_clips_are_the_baseline(model, few):
    ways = []
    costs = error_budget(model, embed, tracker, clips=12, on_way=ways.append)
    assert ways == list(WAYS)
    by = {(cost.way, cost.measure): cost for cost in costs}
    assert len(by) == len(costs) == 6 * 5 + 2  # from captions there is no clip to be near, and no note
    for (way, measure), cost in by.items():
        assert cost.baseline == by["original", measure].value and cost.low <= cost.value <= cost.high, (way, measure)
    assert by["original", "log-mel L1"].value == by["original", "STFT distance"].value == 0
    assert by["original", "pitch error"].value < 20
    assert 0 < by["griffin_lim_32", "log-mel L1"].value < by["vocoder", "log-mel L1"].value  # random weights
    assert by["vae_vocoder", "log-mel L1"].clips == 12 and by["original", "pitch error"].clips == 4
    lines = table(costs).splitlines()
    assert len(lines) == 1 + len(WAYS) and lines[-1].startswith(WAYS["generated"]) and lines[-1].count(" - ") == 3


def test_copies_go_the_way_they_are_named(model):
    sound = 0.1 * torch.randn(3, 5120, generator=torch.Generator().manual_seed(0))
    made = copies(model, sound, batch_size=2)
    assert list(made) == list(WAYS)[:-1] and all(y.shape == (3, 5120) for y in made.values())
    assert torch.equal(made["original"], sound)
    with torch.no_grad():
        mel = model.mel(sound)
        torch.testing.assert_close(made["vocoder"], model.vocoder(mel), atol=1e-5, rtol=1e-4)
        through = model.vocoder(model.vae.decode(model.vae.encode(mel).mean))
    torch.testing.assert_close(made["vae_vocoder"], through, atol=1e-5, rtol=1e-4)


def test_faults_are_separated_from_sounds():
    good = 0.1 * torch.randn(5, 4000, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[1] = 0
    bad[2, 7] = torch.nan
    bad[3, 100:300] = 1.0
    bad[4, 100] = -1.0  # one peak at full scale is no fault
    assert faults(bad, good).tolist() == [False, True, True, True, False]
    assert not faults(bad[1:2], torch.zeros(1, 4000)).any()  # silence for silence


def test_recordings_are_their_own_reference(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        save_audio(tmp_path / f"noise-{i}.wav", (0.1 * torch.randn(3000 + 900 * i, generator=generator)), 16_000)
    recordings = read_recordings(tmp_path, 0.32)
    assert recordings.shape == (6, 5120)
    costs = error_budget(model, embed, tracker, recordings=recordings)
    assert {cost.way for cost in costs} == set(WAYS) - {"generated"}
    assert {cost.measure for cost in costs} == {"log-mel L1", "STFT distance", "Fréchet distance", "kernel distance"}
    own = next(cost for cost in costs if (cost.way, cost.measure) == ("original", "Fréchet distance"))
    assert own.value == pytest.approx(0, abs=1e-6) and own.clips == 6


def test_the_command_writes_its_table(monkeypatch, tmp_path, capsys):
    costs = [Cost("vocoder", "log-mel L1", 0.1, 0.08, 0.12, 0.0, 5, 1)]
    monkeypatch.setattr("refined_ldm.evaluation.budget.error_budget", lambda *_: costs)
    monkeypatch.setattr("refined_ldm.evaluation.embeddings.aisfx.Aisfx.load", lambda: None)
    monkeypatch.setattr("refined_ldm.evaluation.pitch.Crepe.load", lambda: None)
    assert cli.main(["budget", "--clips", "5", "--out", str(tmp_path / "a" / "budget.csv")]) == 0
    assert "0.1 (0.08 … 0.12)" in capsys.readouterr().out
    header, row = (tmp_path / "a" / "budget.csv").read_text().splitlines()
    assert header == "way,measure,value,low,high,baseline,clips,faulty"
    assert row == "vocoder,log-mel L1,0.1,0.08,0.12,0.0,5,1"
    assert cli.main(["budget", "--clips", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["faulty"] == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["budget", "--clips", "1"])
    assert "--clips must be a whole number, 2 or more, got 1" in capsys.readouterr().err
