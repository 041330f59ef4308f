import csv
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import soundfile

from refined_ldm.cli import commands as cli
from refined_ldm.config import STAGES
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training import pipeline
from tests.support import small
from tests.support.shell import run

TINY = """
preset: tiny
clips: 40
steps: 2
training:
  vae: {max_steps: 2, batch_size: 2}
  clap: {max_steps: 2, batch_size: 2}
  details-text: {max_steps: 2, batch_size: 2}
  details-audio: {max_steps: 2, batch_size: 2}
  ldm: {max_steps: 2, batch_size: 2}
  hifigan: {max_steps: 2, batch_size: 2}
"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    small.use_small_clap(monkeypatch)
    RefinedAudioLDM(small.config()).save(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_generate_writes_one_wav_of_the_asked_length_for_each_caption(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "sounds"
    status, printed, _ = run(
        capsys, "generate", "A dog barks!", "rain", "rain", "../../é", "--checkpoint", checkpoint, "--out", out,
        "--seconds", 0.5, "--seed", 7, "--steps", 2, "--guidance", 2, "--device", "cpu",
    )  # fmt: skip
    names = ["a-dog-barks-7.wav", "rain-7.wav", "rain-7-2.wav", "é-7.wav"]
    assert status == 0 and printed == [str(out / name) for name in names]
    for name in names:
        info = soundfile.info(out / name)
        assert (info.frames, info.samplerate, info.channels) == (8000, 16_000, 1)


def test_the_same_command_writes_the_same_file_and_another_seed_another(checkpoint, tmp_path, capsys):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ["--checkpoint", checkpoint, "--out", tmp_path / folder, "--seed", seed]
        assert run(capsys, "generate", "rain", *arguments)[0] == 0
    a, b, c = (next((tmp_path / folder).iterdir()).read_bytes() for folder in "abc")
    assert a == b != c


def test_json_tells_what_was_written(checkpoint, tmp_path, capsys):
    status, printed, _ = run(capsys, "generate", "rain", "--checkpoint", checkpoint, "--out", tmp_path / "a", "--json")
    told = json.loads("\n".join(printed))
    assert status == 0 and told["took"] > 0
    file = str(tmp_path / "a" / "rain-0.wav")
    assert told["written"] == [{"file": file, "caption": "rain", "seed": 0, "seconds": 0.32}]


@pytest.mark.parametrize("arguments, told", [
    (["generate", "rain", "--checkpoint", "nowhere", "--out", "o"], "no config.yaml in nowhere"),
    (["generate", "rain", "--preset", "huge", "--out", "o"], "no preset 'huge'"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--seconds", "-1"], "seconds must be between"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--steps", "0"], "steps must be between 1"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--device", "abacus"], "abacus"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "CHECKPOINT/config.yaml"], "config.yaml"),
    (["train", "-c", "nowhere.yaml", "--run", "r"], "no configuration at nowhere.yaml"),
    (["train", "--stage", "vae", "unet", "--run", "r"], "no stage unet"),
    (["train", "-c", "SMALL", "--data", "nowhere.csv", "--run", "r", "--stage", "vae"], "nowhere.csv"),
    (["train", "-c", "SMALL", "--stage", "vae", "--run", "r", "--max-steps", "0"], "max_steps"),
    (["train", "-c", "SMALL", "--stage", "ldm", "--run", "r"], "vae.safetensors"),
    (["notebooks", "99"], "no notebook 99"),
    (["notebooks", "--preset", "huge"], "no preset 'huge'"),
    (["notebooks", "--jobs", "0"], "jobs must be 1 or more, got 0"),
    (["notebooks", "01", "-p", "colour", "red"], "no notebook has a parameter colour; there are "),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--guidance", "nan"], "guidance_scale must be a"),
])  # fmt: skip
def test_bad_input_is_one_line_on_stderr_and_status_2(checkpoint, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    small.config(seconds=1.28, clips=2).save("small.yaml")
    given = [a.replace("CHECKPOINT", checkpoint).replace("SMALL", "small.yaml") for a in arguments]
    status, printed, errors = run(capsys, *given)
    assert status == 2 and printed == []
    assert len(errors) == 1 and errors[0].startswith(f"refined-ldm {arguments[0]}: ") and told in errors[0]


@pytest.mark.parametrize("arguments", [[], ["sing"], ["generate", "rain"], ["generate", "--out", "o"], ["infer"],
                                       ["generate", "rain", "--out", "o", "--steps", "many"]])  # fmt: skip
def test_bad_usage_is_status_2(capsys, arguments):
    status, printed, errors = run(capsys, *arguments)
    assert status == 2 and printed == [] and errors[0].startswith("usage: refined-ldm")


def test_help_shows_an_example_of_every_command(capsys):
    for command in ("generate", "train", "infer", "notebooks"):
        status, printed, _ = run(capsys, command, "--help")
        assert status == 0 and f"example: refined-ldm {command} " in " ".join(printed)


def test_an_interrupted_command_is_status_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "verify", interrupted)
    status, _, errors = run(capsys, "verify")
    assert status == 130 and errors[-1] == "refined-ldm verify: stopped"


def test_train_then_generate_from_a_yaml_file(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    run_dir = tmp_path / "run"
    status, printed, _ = run(capsys, "train", "-c", tmp_path / "tiny.yaml", "--run", run_dir, "--device", "cpu")
    assert status == 0
    assert [line.split(",")[0] for line in printed] == [f"{s}: 2 steps" for s in STAGES]
    with open(run_dir / "ldm.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["1", "2"] and all(float(r["loss"]) > 0 for r in rows)
    status, printed, _ = run(capsys, "generate", "a dog barks", "--checkpoint", run_dir, "--out", tmp_path / "o")
    assert status == 0 and soundfile.info(printed[0]).frames == 40_960

    arguments = ["train", "-c", tmp_path / "tiny.yaml", "--run", run_dir, "--stage", "vae"]
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and "is there already: resume that run" in errors[0]
    assert run(capsys, *arguments, "--resume", "--max-steps", 3)[0] == 0
    with open(run_dir / "vae.csv", newline="") as file:
        assert [r["step"] for r in csv.DictReader(file)] == ["1", "2", "3"]
    status, printed, _ = run(capsys, *arguments, "--resume")
    assert (status, printed) == (0, [f"vae: it was finished before, written to {run_dir}"])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_stopped_tells_how_to_go_on(tmp_path, capsys, monkeypatch, number, status):
    small.use_small_clap(monkeypatch)
    stage = replace(small.STAGE, max_steps=4, save_every=100)
    small.config(seconds=1.28, clips=4, training={"vae": stage}).save(tmp_path / "small.yaml")
    train_stage = pipeline.train_stage

    def stopped(*arguments):
        for step in train_stage(*arguments):
            yield step
            if step.index == 2:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(pipeline, "train_stage", stopped)
    arguments = ["train", "-c", tmp_path / "small.yaml", "--run", tmp_path / "a run", "--stage", "vae"]
    found, _, errors = run(capsys, *arguments)
    assert found == status and errors == ["", (
        f"refined-ldm train: stopped after step 3 of vae, saved in {tmp_path}/a run/checkpoints/vae/step-0000003; "
        f"go on with: refined-ldm train -c {tmp_path}/small.yaml --run '{tmp_path}/a run' --stage vae --resume")]
    monkeypatch.undo()
    small.use_small_clap(monkeypatch)
    assert run(capsys, *shlex.split(errors[-1].split("go on with: refined-ldm ")[1]))[0] == 0
    with open(tmp_path / "a run" / "vae.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("number, told", [(errno.ENOSPC, "No space left on device"),
                                          (errno.EROFS, "Read-only file system")])  # fmt: skip
def test_what_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch, number, told):
    small.use_small_clap(monkeypatch)
    small.config(seconds=1.28, clips=4).save(tmp_path / "small.yaml")

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("refined_ldm.durable.run_state.save_file", refused)
    arguments = ["train", "-c", tmp_path / "small.yaml", "--run", tmp_path / "run", "--stage", "vae"]
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1)
    assert errors[0].startswith("refined-ldm train: [") and told in errors[0]
    assert list((tmp_path / "run" / "checkpoints" / "vae").iterdir()) == []


def test_as_a_process():
    for argument, status in (("--help", 0), ("sing", 2)):
        done = subprocess.run([sys.executable, "-m", "refined_ldm", argument], capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert "usage: refined-ldm" in (done.stdout if status == 0 else done.stderr)
