import json
from pathlib import Path

import pytest
import soundfile
import torch

from refined_ldm.adapters.lora import read_lora
from refined_ldm.audio import save_audio
from refined_ldm.cli.parser import lora
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.lora import LoraTraining
from tests.support import small
from tests.support.shell import run

pytest.importorskip("peft")


@pytest.fixture
def bells(tmp_path, monkeypatch):
    """A model and a folder of recordings, in the working directory."""
    monkeypatch.chdir(tmp_path)
    small.awake_model(monkeypatch).save(tmp_path / "model")
    (tmp_path / "bells").mkdir()
    for i, item in enumerate(small.clips(6)):
        save_audio(tmp_path / "bells" / f"bell_{i}.wav", item["waveform"])


def train(capsys, *arguments):
    usual = ("--lora", 2, "--from", "model", "--data", "bells", "--run", "run", "--keep", "none")
    return run(capsys, "train", *usual, *arguments)


def sound(capsys, out, *arguments):
    status, printed, errors = run(
        capsys, "generate", "a bell", "--checkpoint", "model", "--out", out, "--device", "cpu", "--json", *arguments
    )
    assert status == 0, errors
    return torch.from_numpy(soundfile.read(json.loads(printed[0])["written"][0]["file"])[0])


def test_a_lora_is_trained_and_generates(bells, capsys):
    status, printed, errors = train(capsys, "--max-steps", 4, "--lr", 0.05, "--device", "cpu")
    assert status == 0 and "lora: step 4 of 5 clips, held-out loss" in printed[-1], errors
    base, changed = sound(capsys, "a"), sound(capsys, "b", "--lora", "run/lora.safetensors")
    assert not torch.equal(base, changed)
    assert torch.equal(sound(capsys, "c", "--lora", "run/lora.safetensors:0"), base)
    twice = ["--lora", "run/lora.safetensors:0.5", "run/lora.safetensors:0.5"]
    assert (sound(capsys, "d", *twice) - changed).abs().max() < 1e-2
    assert train(capsys, "--max-steps", 4, "--lr", 0.05, "--device", "cpu", "--resume")[0] == 0


def test_recordings_that_are_left_out_are_counted(bells, capsys):
    Path("bells/broken.wav").write_text("no sound")
    status, printed, errors = train(capsys, "--max-steps", 1, "--device", "cpu", "--skip-bad")
    assert status == 0 and printed[-1].startswith("1 recordings or rows were left out: run/left-out.txt"), errors


@pytest.mark.parametrize("arguments, message", [
    (["--from", "nowhere"], "nowhere is no preset with shipped weights, no run and no checkpoint"),
    (["--from", "paper"], "paper is no preset with shipped weights"),
    (["--data", "gone"], "no recordings at gone"),
    (["--stage", "ldm"], "--stage does not go with --lora"),
    (["--data", ""], "--lora learns from recordings: give their folder or table with --data"),
    (["--resume"], "no run at run that could go on"),
    (["--keep", "gone"], "no recordings at gone"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(bells, capsys, arguments, message):
    status, printed, errors = train(capsys, *arguments, "--device", "cpu")
    assert (status, printed, len(errors)) == (2, [], 1) and message in errors[0]


def test_old_recordings_are_kept(bells, capsys):
    assert train(capsys, "--max-steps", 1, "--device", "cpu", "--keep", "bells")[0] == 0
    assert read_lora("run/lora.safetensors")[1]["kept"] == 6


def test_the_unet_is_trained_as_a_whole_from_a_run_and_a_lora_of_that_belongs_to_it_alone(bells, capsys):
    """The run's own configuration is used; the other parts stay as they are."""
    arguments = ["--from", "model", "--data", "bells", "--max-steps", 2, "--device", "cpu"]
    status, printed, errors = run(capsys, "train", *arguments, "--run", "whole", "--keep", "bells")
    assert (status, printed, errors) == (2, [], ["refined-ldm train: --keep goes with --lora"])
    status, printed, errors = run(capsys, "train", *arguments, "--run", "whole")
    assert status == 0 and printed[-1].startswith("ldm: 2 steps"), errors
    before, after = RefinedAudioLDM.load("model"), RefinedAudioLDM.load("whole")
    assert after.config.unet == before.config.unet and after.config.data == "bells"
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)
    assert torch.equal(before.vae.decoder.conv_in.weight, after.vae.decoder.conv_in.weight)
    assert train(capsys, "--from", "whole", "--max-steps", 1, "--device", "cpu")[0] == 0  # the last --from counts
    after.load_lora("run/lora.safetensors")
    with pytest.raises(ValueError, match="is a LoRA of another model"):
        before.load_lora("run/lora.safetensors")


def test_a_lora_of_another_model_is_refused_in_one_line(bells, capsys):
    assert train(capsys, "--max-steps", 1, "--device", "cpu")[0] == 0
    status, printed, errors = run(capsys, "generate", "a bell", "--out", "x", "--lora", "run/lora.safetensors")
    assert (status, printed, len(errors)) == (2, [], 1) and "is a LoRA of another model: of small" in errors[0]


def test_a_weight_follows_the_last_colon(tmp_path):
    assert [lora(text)[1] for text in ("a.safetensors", "a.safetensors:0.5", "b:c:-1")] == [1, 0.5, -1]
    odd = tmp_path / "a:2"
    odd.touch()
    assert lora(str(odd)) == (odd, 1) and lora(f"{odd}:3") == (odd, 3)


def test_the_settings_of_the_loop_are_those_of_the_unet_but_for_the_schedule():
    stage = LoraTraining().stage(small.config())
    assert (stage.optimizer, stage.lr_schedule, stage.save_every, stage.max_steps) == ("adamw", "constant", 20, 400)
    assert stage.timesteps == small.STAGE.timesteps
