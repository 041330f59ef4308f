import json

import pytest
import soundfile
import torch

from refined_ldm.audio import save_audio
from tests.support import small
from tests.support.shell import run

pytest.importorskip("peft")


@pytest.fixture
def bells(tmp_path, monkeypatch):
    """A model, a folder of recordings and settings of a short distillation, in the working directory."""
    monkeypatch.chdir(tmp_path)
    small.loud_model(monkeypatch).save(tmp_path / "model")  # small differences survive 16 bits
    (tmp_path / "bells").mkdir()
    for i, item in enumerate(small.clips(4)):
        save_audio(tmp_path / "bells" / f"bell_{i}.wav", item["waveform"])
    (tmp_path / "short.yaml").write_text(
        "training:\n  distill: {trajectories: 4, teacher_steps: 4, max_steps: 2, batch_size: 8, lr: 0.01, rank: 2}\n"
    )


def train(capsys, *arguments):
    return run(capsys, "train", "--distill", "-c", "short.yaml", "--from", "model", "--data", "bells", "--run", "run",
               "--device", "cpu", *arguments)  # fmt: skip


def generate(capsys, *arguments):
    return run(capsys, "generate", "a bell", "--checkpoint", "model", "--out", "out", "--device", "cpu", "--json",
               *arguments)  # fmt: skip


def sound(capsys, *arguments):
    status, printed, errors = generate(capsys, *arguments)
    assert status == 0, errors
    return torch.from_numpy(soundfile.read(json.loads(printed[0])["written"][0]["file"])[0])


def test_a_student_is_trained_and_generates(bells, capsys):
    status, printed, errors = train(capsys)
    assert status == 0 and printed[-1] == "distill: 2 steps, the student is in run/student.safetensors", errors
    student = ("--student", "run/student.safetensors")
    four, one = sound(capsys, *student), sound(capsys, *student, "--steps", 1)
    assert not torch.equal(four, one) and torch.equal(sound(capsys, *student, "--steps", 4), four)
    assert train(capsys, "--max-steps", 3, "--resume")[0] == 0
    status, printed, errors = train(capsys)
    assert (status, printed, len(errors)) == (2, [], 1) and "give another --run" in errors[0]
    for arguments, message in (
        (["--negative", "rain"], "negative_caption does not go with the student"),
        (["--guidance", 2], "guidance_scale does not go with the student"),
        (["--steps", 5], "steps of a student must be one of (1, 2, 4), got 5"),
    ):
        status, printed, errors = generate(capsys, *student, *arguments)
        assert (status, printed, len(errors)) == (2, [], 1) and message in errors[0]


@pytest.mark.parametrize("arguments, message", [
    (["--from", "nowhere"], "nowhere is no preset with shipped weights, no run and no checkpoint"),
    (["--data", "gone"], "no recordings at gone"),
    (["--stage", "ldm"], "--stage does not go with --distill"),
    (["--conditioner", "tiny-roberta"], "--conditioner does not go with --distill"),
    (["--keep", "none"], "--keep does not go with --distill"),
    (["--resume"], "no run at run that could go on"),
    (["--lora", "4"], "not allowed with argument --distill"),
    (["--from", "published.ckpt", "--data", ""], "--distill samples the captions of a data set: give it with --data"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(bells, capsys, arguments, message):
    status, printed, errors = train(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1) and message in errors[0]


def test_a_model_without_a_student_is_refused_in_one_line(bells, capsys):
    status, printed, errors = generate(capsys, "--student")
    assert (status, printed, len(errors)) == (2, [], 1) and "has no student" in errors[0]


@pytest.mark.parametrize("arguments, message", [
    (["--student", "gone"], "no student at gone"),
    (["--student", "bells"], "bells is a folder: give the file of a student, as its student.safetensors"),
    (["--student", "model/vae.safetensors"], "is no student of"),
    (["--lora", "model/vae.safetensors"], "is no LoRA of"), (["--lora", "gone:2"], "no LoRA at gone"),
    (["--lora", "a", "--student"], "the model's own student was taught without LoRAs: leave out --lora or --student"),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused_before_the_model_is_loaded(bells, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("refined_ldm.text_to_audio.RefinedAudioLDM.load", None)
    status, printed, errors = generate(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1) and message in errors[0]


def test_a_refiner_is_trained_on_the_same_clips(bells, capsys):
    train = ("train", "--refiner", "--from", "model", "--data", "bells", "--run", "run", "--device", "cpu")
    status, printed, errors = run(capsys, *train, "--max-steps", 2)
    assert status == 0 and printed[-1] == "refiner: 2 steps, it is in run/refiner.safetensors", errors
    status, printed, errors = run(capsys, *train)
    assert (status, printed, len(errors)) == (2, [], 1) and "give another --run" in errors[0]
    status, printed, errors = run(capsys, *train, "--stage", "ldm")
    assert (status, printed, len(errors)) == (2, [], 1) and "--stage does not go with --refiner" in errors[0]
