import csv
import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import soundfile
import torch

import refined_ldm
from refined_ldm.cli import commands as cli
from refined_ldm.cli.notebooks import NOTEBOOKS
from refined_ldm.cli.results import check_result
from refined_ldm.config import STAGES
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training import pipeline
from tests.support import small
from tests.support.shell import run

TINY = """
preset: tiny
clips: 12
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


def test_json_lists_the_written_files(checkpoint, tmp_path, capsys):
    status, printed, _ = run(capsys, "generate", "rain", "--checkpoint", checkpoint, "--out", tmp_path / "a", "--json")
    found = json.loads("\n".join(printed))
    assert status == 0 and found["took"] > 0
    file = str(tmp_path / "a" / "rain-0.wav")
    assert found["written"] == [{"file": file, "caption": "rain", "seed": 0, "seconds": 0.32}]


@pytest.mark.parametrize("arguments, message", [
    (["generate", "rain", "--checkpoint", "nowhere", "--out", "o"], "no config.yaml in nowhere"),
    (["generate", "rain", "--preset", "huge", "--out", "o"], "no preset 'huge'"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--seconds", "-1"], "--seconds must be"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--steps", "0"], "--steps must be a whole"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--device", "abacus"], "abacus"),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "CHECKPOINT/config.yaml"], "config.yaml"),
    (["train", "-c", "nowhere.yaml", "--run", "r"], "no configuration at nowhere.yaml"),
    (["train", "--stage", "vae", "unet", "--run", "r"], "no stage unet"),
    (["train", "-c", "SMALL", "--data", "nowhere.csv", "--run", "r", "--stage", "vae"], "nowhere.csv"),
    (["train", "-c", "SMALL", "--stage", "vae", "--run", "r", "--max-steps", "0"], "--max-steps must"),
    (["train", "-c", "SMALL", "--stage", "ldm", "--run", "r"], "vae.safetensors"),
    (["notebooks", "99"], "no notebook 99"),
    (["notebooks", "--preset", "huge"], "no preset 'huge'"),
    (["notebooks", "--jobs", "0"], "--jobs must be a whole number, 1 or more, got 0"),
    (["notebooks", "01", "-p", "colour", "red"], "no notebook has a parameter colour; there are "),
    (["generate", "rain", "--checkpoint", "CHECKPOINT", "--out", "o", "--guidance", "nan"], "--guidance must be"),
])  # fmt: skip
def test_bad_input_is_one_line_on_stderr_and_status_2(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    small.config(seconds=1.28, clips=2).save("small.yaml")
    given = [a.replace("CHECKPOINT", checkpoint).replace("SMALL", "small.yaml") for a in arguments]
    status, printed, errors = run(capsys, *given)
    assert status == 2 and printed == []
    assert len(errors) == 1 and errors[0].startswith(f"refined-ldm {arguments[0]}: ") and message in errors[0]


@pytest.mark.parametrize("command", [
    ["generate", "rain", "--out", "o"], ["train"], ["evaluate", "a", "b"], ["budget"],
    ["infer", "-c", "c", "-l", "l", "--reload_from_ckpt", "r"],
], ids=lambda command: command[0])  # fmt: skip
@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "0.5", "nan", "one", "1e99"])
def test_a_seed_that_is_none_is_one_line_with_its_option(capsys, command, seed):
    status, printed, errors = run(capsys, *command, "--seed", seed)
    assert (status, printed, len(errors)) == (2, [], 1)
    assert f"{command[0]}: --seed must be a whole number between 0 and 9223372036854775807, got" in errors[0]


@pytest.mark.parametrize("arguments", [
    ["generate", "rain", "--out", "o", "--steps", "-3"], ["generate", "rain", "--out", "o", "--steps", "2.5"],
    ["generate", "rain", "--out", "o", "--candidates", "0"], ["generate", "rain", "--out", "o", "--seconds", "0"],
    ["generate", "rain", "--out", "o", "--seconds", "inf"], ["train", "--max-steps", "-1"], ["train", "--lr", "0"],
    ["train", "--lr", "nan"], ["train", "--lr", "-0.001"], ["evaluate", "a", "b", "--pca", "-3"],
    ["evaluate", "a", "b", "--pca", "1.5"], ["evaluate", "a", "b", "--sample-rate", "16"],
    ["evaluate", "a", "b", "--sample-rate", "0"], ["evaluate", "a", "b", "--sample-rate", "-16000"],
    ["budget", "--clips", "1"], ["experiment", "--iterations", "0"], ["experiment", "--seeds", "-1"],
    ["experiment", "--clips", "0"], ["notebooks", "--jobs", "1.5"],
    ["evaluate", "--details", "1"], ["evaluate", "--details", "-5"], ["evaluate", "--details", "2.5"],
])  # fmt: skip
def test_a_number_that_cannot_be_meant_is_one_line_with_its_option(capsys, arguments):
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1)
    assert f"refined-ldm {arguments[0]}: {arguments[-2]} must be" in errors[0] and arguments[-1] in errors[0]


def test_a_whole_number_may_be_written_with_a_point(checkpoint, tmp_path, capsys):
    for folder, steps, seed in (("a", "2", "9007199254740993"), ("b", "2.0", "9007199254740993.0")):  # no float is that
        arguments = ["--checkpoint", checkpoint, "--out", tmp_path / folder, "--seed", seed, "--steps", steps]
        assert run(capsys, "generate", "rain", *arguments)[0] == 0
    (a,), (b,) = ((tmp_path / folder).iterdir() for folder in "ab")
    assert a.name == b.name == "rain-9007199254740993.wav" and a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("arguments", [[], ["sing"], ["generate", "rain"], ["generate", "--out", "o"], ["infer"],
                                       ["generate", "rain", "--out", "o", "--steps", "many"]])  # fmt: skip
def test_bad_usage_is_status_2(capsys, arguments):
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1) and errors[0].startswith("refined-ldm")


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
def test_a_stopped_training_prints_how_to_resume(tmp_path, capsys, monkeypatch, number, status):
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
    assert found == status and errors == [
        "",
        (
            f"refined-ldm train: stopped after step 3 of vae, saved in {tmp_path}/a run/checkpoints/vae/step-0000003; "
            f"go on with: refined-ldm train -c {tmp_path}/small.yaml --run '{tmp_path}/a run' --stage vae --resume"
        ),
    ]
    monkeypatch.undo()
    small.use_small_clap(monkeypatch)
    assert run(capsys, *shlex.split(errors[-1].split("go on with: refined-ldm ")[1]))[0] == 0
    with open(tmp_path / "a run" / "vae.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("number, message", [(errno.ENOSPC, "No space left on device"),
                                          (errno.EROFS, "Read-only file system")])  # fmt: skip
def test_what_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch, number, message):
    small.use_small_clap(monkeypatch)
    small.config(seconds=1.28, clips=4).save(tmp_path / "small.yaml")

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("refined_ldm.durable.run_state.save_file", refused)
    arguments = ["train", "-c", tmp_path / "small.yaml", "--run", tmp_path / "run", "--stage", "vae"]
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1)
    assert errors[0].startswith("refined-ldm train: [") and message in errors[0]
    assert list((tmp_path / "run" / "checkpoints" / "vae").iterdir()) == []


def test_as_a_process():
    for argument, status in (("--help", 0), ("sing", 2)):
        done = subprocess.run([sys.executable, "-m", "refined_ldm", argument], capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert "usage: refined-ldm" in done.stdout if status == 0 else done.stderr.startswith("refined-ldm: ")


# --- what is there stays ---


@pytest.fixture
def place(tmp_path, monkeypatch, checkpoint):
    """A working directory with a folder and a file that are precious."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "keep.txt").write_text("precious")
    for name in ("notes.txt", "notes.csv", "notes.png"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "list.lst").write_text("rain\nwind\n")
    small.config(seconds=1.28, clips=2).save("small.yaml")
    return tmp_path


def contents(folder):
    """{path: bytes, or None of a folder}"""
    return {p: None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


INFER = ["infer", "-c", "checkpoint/config.yaml", "-l", "list.lst", "--reload_from_ckpt", "checkpoint"]


@pytest.mark.parametrize("arguments, message", [
    (["evaluate", "folder", "folder", "--out", "folder"], "folder is a folder, so it is not replaced"),
    (["evaluate", "folder", "folder", "--out", "notes.txt"], "notes.txt is there already and no result"),
    (["evaluate", "folder", "folder", "--out", "notes.txt/x.json"], "notes.txt is a file, where a folder is needed"),
    (["evaluate", "--details", "2", "--out", "folder"], "folder is a folder, so it is not replaced"),
    (["evaluate", "--details", "2", "--out", "notes.txt"], "notes.txt is there already and no result"),
    (["experiment", "--run", "folder", "--out", "notes"], "notes.csv is there already and no result"),
    (["budget", "--out", "folder"], "folder is a folder, so it is not replaced"),
    (["budget", "--recordings", "notes.txt", "--out", "notes.txt"], "notes.txt is there already and no result"),
    (["budget", "--out", "x" * 300], "File name too long"),
    (["generate", "rain", "--out", "notes.txt"], "notes.txt is a file, where a folder is needed"),
    (["generate", "rain", "--out", "notes.txt/deep/er"], "notes.txt is a file, where a folder is needed"),
    (["generate", "rain", "--out", f"new/{'é' * 200}"], "a name may have 255 bytes here, this has 400"),
    ([*INFER, "--out", "notes.txt"], "notes.txt is a file, where a folder is needed"),
    (["convert", "checkpoint/vae.safetensors", "notes.txt/x.safetensors"], "notes.txt is a file"),
    (["convert", "checkpoint/vae.safetensors", "folder", "--force"], "folder is a folder, so it is not replaced"),
    (["convert", "checkpoint/vae.safetensors", "checkpoint/../checkpoint/vae.safetensors", "--force"],
     "vae.safetensors is what is to be converted"),
    (["data", "folder", "--picture", "notes.txt/data.png"], "notes.txt is a file, where a folder is needed"),
    (["evaluate", "folder", "folder", "--details", "2"], "--details measures one model: leave out folder"),
    (["evaluate", "--details", "2", "--captions", "gone.csv"], "--captions is about two folders: leave it out"),
    (["evaluate", "--details", "2", "--skip-bad"], "--skip-bad is about two folders"),
    (["evaluate", "--details", "2", "--pca", "8"], "--pca is about two folders"),
    (["train", "-c", "small.yaml", "--run", "notes.txt"], "notes.txt is a file, where a folder is needed"),
    (["experiment", "--run", "notes.txt"], "notes.txt is a file, where a folder is needed"),
    (["experiment", "--run", "folder", "--out", "notes.txt"], "notes.txt is a file, where a folder is needed"),
    (["notebooks", "01", "--out", "notes.txt"], "notes.txt is a file, where a folder is needed"),
    (["notebooks", "01", "--out", str(NOTEBOOKS)], "holds the notebooks themselves"),
])  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_before_any_work(place, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(cli, "open_model", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr(RefinedAudioLDM, "from_preset", lambda *_: pytest.fail("a model was built"))
    before = contents(place)
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1) and message in errors[0]
    assert contents(place) == before


@pytest.mark.parametrize("name", ["vae.safetensors", "config.yaml", "ldm.csv", "discriminators/hifigan.safetensors"])
def test_a_folder_where_a_run_will_write_a_file_is_seen_before_the_first_stage(place, capsys, name):
    (place / "run" / name).mkdir(parents=True)
    (place / "run" / name / "keep.txt").write_text("precious")
    before = contents(place)
    status, printed, errors = run(capsys, "train", "-c", "small.yaml", "--run", "run")
    assert (status, printed, len(errors)) == (2, [], 1) and f"{name} is a folder, so it is not replaced" in errors[0]
    assert contents(place) == before


@pytest.mark.parametrize("cache", ["clips-train", "latents-train", "embeddings-train"])
def test_a_folder_of_somebodys_where_a_run_keeps_what_it_computed_is_not_replaced(place, capsys, cache):
    (place / "folder").rename(place / cache)
    status, _, errors = run(capsys, "train", "-c", "small.yaml", "--run", ".", "--stage", "vae")
    assert status == 2 and f"{cache} also holds keep.txt, so it is not replaced" in errors[0]
    assert (place / cache / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize("more", [["--stage", "vae"], ["--resume"]])
def test_settings_of_somebodys_do_not_become_those_of_a_run(place, capsys, more):
    """As with `train -c mine/config.yaml --run mine`, whose comments and other keys would be lost."""
    (place / "mine").mkdir()
    (place / "mine" / "config.yaml").write_text(f"# my own\n{(place / 'small.yaml').read_text()}")
    before = contents(place)
    status, printed, errors = run(capsys, "train", "-c", "mine/config.yaml", "--run", "mine", *more)
    assert (status, printed, len(errors)) == (2, [], 1)
    assert "mine/config.yaml is there already, and no run beside it: give another --run" in errors[0]
    with pytest.raises(FileExistsError, match="no run beside it"):
        next(pipeline.train_stage(RefinedAudioLDM(small.config(clips=2)), "vae", place / "mine"))
    assert contents(place) == before


def test_sounds_of_before_stay_and_the_new_ones_are_numbered(place, capsys):
    long = "an engine with muffled speech behind it and then " * 4
    for made in (["-7.wav", "-7-2.wav", "-7-3.wav"], ["-7-4.wav", "-7-5.wav", "-7-6.wav"]):
        before = contents(place)
        captions = (f"{long} a", f"{long} b", f"{long.upper()} c")
        status, printed, _ = run(capsys, "generate", *captions, "--seed", 7, "--out", "o", "--steps", 1, "--picture",
                                 "--checkpoint", "checkpoint", "--device", "cpu")  # fmt: skip
        assert status == 0 and [path[path.rindex("-7") :] for path in printed] == made
        after = contents(place)
        assert all(after[path] == content for path, content in before.items() if content is not None)
    assert {path.name for path in (place / "o").glob("*.png")} == {"spectrograms.png", "spectrograms-2.png"}
    for seed, made in ((1, ["o/rain.wav", "o/wind.wav"]), (2, ["o/rain-2.wav", "o/wind-2.wav"])):
        status, printed, _ = run(capsys, *INFER, "--out", "o", "--seed", seed, "--steps", 1, "--device", "cpu")
        assert (status, printed) == (0, made)
    assert (place / "o/rain.wav").read_bytes() != (place / "o/rain-2.wav").read_bytes()


def test_an_earlier_result_is_replaced_and_that_is_said(place, capsys):
    check_result(place / "new.csv", b"way,")
    assert capsys.readouterr().err == ""
    (place / "old.csv").write_text("way,measure\n")
    check_result(place / "old.csv", b"way,")
    assert capsys.readouterr().err == f"{place}/old.csv will be replaced by the new result\n"


def test_a_run_that_is_not_there_does_not_go_on(place, capsys):
    for run_dir in ("mistyped", "folder"):
        before = contents(place)
        status, printed, errors = run(capsys, "train", "-c", "small.yaml", "--run", run_dir, "--resume")
        assert (status, printed) == (2, []) and f"no run at {run_dir} that could go on" in errors[0]
        assert contents(place) == before


# --- what is said ---


@pytest.mark.parametrize("arguments, module", [
    (["generate", "rain", "--out", "o", "--checkpoint", "checkpoint", "--picture"], "matplotlib"),
    (["edit", "notes.txt", "rain", "--out", "o", "--checkpoint", "checkpoint", "--picture"], "matplotlib"),
    (["notebooks", "01"], "papermill"), (["verify"], "pandas"), (["experiment", "--run", "new"], "pandas"),
], ids=lambda given: given[0])  # fmt: skip
def test_an_optional_package_that_is_missing_is_named_before_any_work(place, monkeypatch, capsys, arguments, module):
    monkeypatch.setattr(refined_ldm, "display", refined_ldm.display)  # imported anew below, and put back afterwards
    users = ("refined_ldm.display", "refined_ldm.experiment.ledger", "refined_ldm.experiment.statistics")
    for name in [name for name in sys.modules if name.split(".")[0] == module or name.startswith(users)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    before = contents(place)
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed, len(errors)) == (2, [], 1) and contents(place) == before
    assert f'{module} is not installed, which this needs: pip install "refined-audio-ldm[notebooks]"' in errors[0]


def test_a_name_that_the_terminal_cannot_show_is_no_fault(place, monkeypatch):
    """Nor found out when the sound is there already."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    arguments = ["generate", "Ω", "--out", "é", "--checkpoint", "checkpoint", "--steps", "1", "--device", "cpu"]
    assert cli.main(arguments) == 0 and (place / "é" / "ω-0.wav").is_file()
    screen.flush()
    assert screen.buffer.getvalue() == b"\\xe9/\\u03c9-0.wav\n"


@pytest.mark.parametrize("fault", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
])  # fmt: skip
def test_too_little_memory_is_one_line(place, monkeypatch, capsys, fault):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(RefinedAudioLDM, "generate", fail)
    arguments = ("generate", "rain", "--out", "o", "--checkpoint", "checkpoint", "--device", "cpu")
    status, printed, errors = run(capsys, *arguments)
    assert (status, printed) == (2, []) and "refined-ldm generate: too little memory: ask for fewer" in errors[-1]
    fault = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        run(capsys, *arguments)


def test_random_weights_are_reported(place, monkeypatch, capsys):
    monkeypatch.setattr(RefinedAudioLDM, "from_preset", lambda *_: RefinedAudioLDM.load("checkpoint"))
    monkeypatch.setattr("refined_ldm.evaluation.budget.error_budget", lambda *_: [])
    for command in (["generate", "rain", "--out", "o", "--steps", 1], ["budget"]):
        for preset, warned in (("colab", True), ("tiny", False)):
            status, _, errors = run(capsys, *command, "--preset", preset, "--device", "cpu")
            assert status == 0
            assert any("colab has random weights, so what it makes is noise" in line for line in errors) == warned


@pytest.mark.parametrize("number", ["-1e1", "-1E+1", "-.5e0", "-10", "-inf"])
def test_negative_numbers_of_any_spelling_are_numbers(place, capsys, number):
    status, _, errors = run(capsys, "generate", "rain", "--out", "o", "--checkpoint", "checkpoint", "--steps", 1,
                            "--guidance", number)  # fmt: skip
    assert "expected one argument" not in " ".join(errors) and status in (0, 2)


def test_a_published_file_where_a_run_is_wanted_is_to_be_converted_first(place, capsys):
    (place / "pipeline").mkdir()
    (place / "pipeline" / "model_index.json").write_text("{}")
    for given in ("notes.txt", "pipeline"):
        status, _, errors = run(capsys, "generate", "rain", "--out", "o", "--checkpoint", given)
        assert status == 2 and f"convert it first (`refined-ldm convert {given} FOLDER`)" in errors[0]
    (place / "folder" / "lora.safetensors").touch()
    for given in ("folder", "folder/lora.safetensors"):
        status, _, errors = run(capsys, "generate", "rain", "--out", "o", "--checkpoint", given)
        assert status == 2 and "folder/lora.safetensors is a LoRA: load the model that it was trained on" in errors[0]
