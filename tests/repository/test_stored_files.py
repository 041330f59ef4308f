"""Files written by version 0.1.0, before settings and modules were renamed, still load, sound the same and go on."""

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from refined_ldm.config import load_config
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.weights import read_weights
from tests.support import small
from tests.support.accelerators import forget_accelerators
from tests.support.shell import run

STORED = Path(__file__).parents[1] / "support" / "stored_run.zip"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A run of four stages; of the VAE the checkpoint of step 3 of 6 too."""
    small.use_small_clap(monkeypatch)
    with zipfile.ZipFile(STORED) as archive:
        archive.extractall(tmp_path / "run")
    return tmp_path / "run"


def test_settings_of_an_earlier_version_are_read_under_their_new_names(old_run):
    text = (old_run / "config.yaml").read_text()
    assert {"clip_norm", "adversary_start", "inversion", "patches", "weighting", "extra_drop"} <= set(
        line.strip().split(":")[0] for line in text.splitlines()
    )
    config = load_config(old_run / "config.yaml")
    stage = config.training["vae"]
    assert (stage.max_grad_norm, stage.disc_start, stage.loss_weighting) == (1.0, 0, "prediction")
    assert (config.vocoder, config.hifigan.channels, config.vae_discriminator.channels) == ("hifigan", 32, 64)


def test_a_model_of_an_earlier_version_makes_the_sound_it_made(old_run):
    sound = RefinedAudioLDM.load(old_run).generate(["sound 1"], steps=3, seed=0)
    expected = torch.from_numpy(np.load(old_run / "expected" / "sound.npy"))
    torch.testing.assert_close(sound, expected, atol=1e-4, rtol=0)


def test_a_run_of_an_earlier_version_goes_on_where_it_was_stopped(old_run, tmp_path, capsys):
    """Resumed after step 3 of 6, it ends at the weights of the run that was never stopped."""
    forget_accelerators()  # tests before this one may have trained in another precision
    unbroken, _ = read_weights(old_run / "vae.safetensors")
    (old_run / "vae.safetensors").unlink()
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(10):
        soundfile.write(tmp_path / "data" / f"sound {i}.wav", rng.uniform(-0.3, 0.3, 5120), 16_000)
    command = ("train", "-c", old_run / "config.yaml", "--data", tmp_path / "data", "--run", old_run)
    status, printed, errors = run(capsys, *command, "--device", "cpu", "--stage", "vae", "--resume")
    assert status == 0, errors
    with open(old_run / "vae.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]
    resumed, _ = read_weights(old_run / "vae.safetensors")
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
