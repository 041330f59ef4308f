import json
import re
import shlex
from pathlib import Path

import pytest
import soundfile
import torch

from refined_ldm.audio import load_audio, save_audio
from refined_ldm.cli import measure_edits
from refined_ldm.cli.sounds import write_picture
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import small
from tests.support.shell import run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small checkpoint, a sound at 16 kHz, one in stereo at 44.1 kHz, one at 8 kHz and bad ones."""
    small.use_small_clap(monkeypatch)
    monkeypatch.chdir(tmp_path)
    RefinedAudioLDM(small.config()).save(tmp_path / "checkpoint")
    noise = small.clips(1)[0]["waveform"]
    save_audio(tmp_path / "sound.wav", noise)
    save_audio(tmp_path / "low.wav", noise, 8000)
    soundfile.write(tmp_path / "stereo.wav", torch.stack([noise, noise], 1).numpy(), 44_100)
    save_audio(tmp_path / "silent.wav", torch.zeros(5120))
    soundfile.write(tmp_path / "empty.wav", torch.zeros(0).numpy(), 16_000)
    (tmp_path / "notes.wav").write_text("no sound")
    return tmp_path


COMMON = ["--checkpoint", "checkpoint", "--out", "o", "--device", "cpu", "--steps", 2, "--seed", 7]
COMMANDS = {
    "sound-edit-7": (["edit", "sound.wav", "rain", "--strength", 0.6], 5120),
    "sound-edit-7, inverted": (["edit", "sound.wav", "rain", "--method", "inversion", "--source", "wind"], 5120),
    "sound-edit-7, localised": (["edit", "sound.wav", "rain", "--method", "diffedit", "--source", "wind"], 5120),
    "sound-inpaint-7": (["inpaint", "sound.wav", "rain", "--start", 0.1, "--end", 0.2, "--candidates", 2], 5120),
    "sound-inpaint-7, in a band": (["inpaint", "sound.wav", "rain", "--band", 2000, 4000], 5120),
    "stereo-inpaint-7": (["inpaint", "stereo.wav", "rain", "--end", 0.05, "--negative", "wind"], 1858),
    "sound-extend-7": (["extend", "sound.wav", "rain", "--seconds", 0.3, "--guidance", 2], 9920),
    "low-upsample-7": (["upsample", "low.wav"], 10_240),
    "sound-upsample-7": (["upsample", "sound.wav", "rain", "--cutoff", 4000], 5120),
    "rain-falls-loop-7": (["loop", "Rain falls!", "--seconds", 0.4], 6400),
    "sound-loop-7": (["loop", "rain", "--input", "sound.wav"], 5120),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_one_sound_and_says_so_in_json(place, capsys, name):
    arguments, samples = COMMANDS[name]
    status, printed, errors = run(capsys, *arguments, *COMMON, "--json")
    assert status == 0, errors
    (written,) = json.loads("\n".join(printed))["written"]
    path = place / written["file"]
    assert path.stem.lower() == name.partition(",")[0] and written["seed"] == 7
    info = soundfile.info(path)
    assert (info.frames, info.samplerate, info.channels) == (samples, 16_000, 1)
    assert written["seconds"] == samples / 16_000


def test_what_stands_beside_audioldms_functions_runs(place, capsys):
    page = Path(__file__).parents[2] / "docs" / "editing.md"
    table = page.read_text(encoding="utf-8").partition("## Coming from AudioLDM")[2]
    sound = torch.cat([small.clips(1)[0]["waveform"]] * 8)
    save_audio(place / "dog.wav", sound)
    names = {"model": RefinedAudioLDM.load("checkpoint"), "sound": sound, "text": "rain falls", "strength": 0.6,
             "start": 1, "end": 2, "cutoff": 3600, "low": 2000, "high": 4000}  # fmt: skip
    calls, commands = (re.findall(rf"`({start}[^`]+)`", table) for start in (r"model\.", "refined-ldm "))
    assert len(calls) == 8 and len(commands) == 6
    for call in calls:
        assert eval(call, names).isfinite().all(), call
    for command in commands:
        status, _, errors = run(capsys, *shlex.split(command)[1:], *COMMON[:2], *COMMON[4:])
        assert status == 0, (command, errors)


def test_what_is_kept_is_kept_and_the_picture_shows_both(place, capsys):
    status, printed, _ = run(capsys, "inpaint", "sound.wav", "rain", "--start", 0.2, *COMMON, "--picture")
    assert status == 0 and printed == ["o/sound-inpaint-7.wav"]
    before, after = load_audio("sound.wav"), load_audio("o/sound-inpaint-7.wav")
    assert (before - after)[:3200].abs().max() < 1.1 / 32_768 < (before - after).abs().max()
    assert (place / "o" / "sound-inpaint-7.png").read_bytes()[:4] == b"\x89PNG"
    run(capsys, "inpaint", "sound.wav", "rain", "--start", 0.2, *COMMON)
    assert (place / "o" / "sound-inpaint-7-2.wav").is_file()  # nothing is replaced


@pytest.mark.parametrize("arguments, message", [
    (["edit", "nowhere.wav", "rain"], "nowhere.wav: no such sound file"),
    (["edit", "notes.wav", "rain"], "notes.wav"), (["edit", "empty.wav", "rain"], "the file holds no samples"),
    (["edit", "silent.wav", "rain"], "waveform is silent"),
    (["edit", "sound.wav", "rain", "--strength", "1.5"], "--strength must be"),
    (["edit", "sound.wav", "rain", "--strength", "nan"], "--strength must be"),
    (["edit", "sound.wav", "rain", "--method", "diffedit", "--source", "rain"], "source_caption must differ"),
    (["inpaint", "sound.wav", "rain"], "say what to redraw"),
    (["inpaint", "sound.wav", "rain", "--start", "1"], "start and end must lie within the sound, 0 to 0.32 s"),
    (["inpaint", "sound.wav", "rain", "--band", "4000", "2000"], "band must be"),
    (["extend", "sound.wav", "rain", "--seconds", "0"], "--seconds must be"),
    (["upsample", "sound.wav"], "give the cutoff"), (["upsample", "nowhere.wav"], "no such sound file"),
    (["loop", "rain", "--input", "sound.wav", "--seconds", "1"], "not both"),
    (["loop", "rain", "--input", "nowhere.wav"], "no such sound file"),
])  # fmt: skip
def test_bad_input_is_one_line_on_stderr_and_status_2(place, capsys, arguments, message):
    status, printed, errors = run(capsys, *arguments, "--out", "o", "--checkpoint", "checkpoint")
    assert status == 2 and printed == []
    assert len(errors) == 1 and errors[0].startswith(f"refined-ldm {arguments[0]}: ") and message in errors[0]


def test_pictures_of_before_stay_also_those_that_another_process_writes_meanwhile(tmp_path):
    class Figure:
        def savefig(self, path, **_):
            path.write_text("ours")
            (tmp_path / "a-2.png").write_text("of another process")

    (tmp_path / "a.png").mkdir()
    assert write_picture(Figure(), tmp_path / "a.png") == tmp_path / "a-3.png"
    assert (tmp_path / "a-2.png").read_text() == "of another process" and (tmp_path / "a-3.png").read_text() == "ours"


@pytest.mark.parametrize("words, message", [
    (["gallery"], "CLIPS: must be a whole number, 1 or more, got 'gallery'"),
    (["24.5"], "got '24.5'"), (["-3"], "got -3"),
])  # fmt: skip
def test_measuring_edits_takes_a_whole_number_of_clips(monkeypatch, capsys, words, message):
    asked = []
    monkeypatch.setattr(measure_edits, "measure", lambda **given: asked.append(given))
    with pytest.raises(SystemExit, match="2"):
        measure_edits.main(words)
    assert message in capsys.readouterr().err and not asked
    for given in (["24.0", "edit", "loop"], []):
        measure_edits.main(given)
    assert asked == [{"clips": 24, "tasks": ["edit", "loop"]}, {"clips": 24, "tasks": []}]


def test_a_task_that_the_figure_does_not_show_is_measured_alone(tmp_path, monkeypatch, capsys):
    """In a folder without a table of before."""
    for module in ("refined_ldm.display", "refined_ldm.display.figures"):
        monkeypatch.setattr(f"{module}.in_project", lambda folder: tmp_path / folder)
    monkeypatch.setattr(RefinedAudioLDM, "from_preset", lambda name: None)  # nothing is generated
    monkeypatch.setattr(measure_edits.DetailClassifier, "load", lambda: None)
    monkeypatch.setattr(measure_edits, "optimize_for_inference", lambda *_: None)
    monkeypatch.setattr(measure_edits, "weights_digest", lambda _: "abc")
    found = {"task": "loop", "method": "loop", "strength": None, "measure": "step", "value": 1.0, "clips": 1}
    monkeypatch.setitem(measure_edits.TASKS, "loop", lambda *_, **__: [found])
    with pytest.raises(SystemExit, match="no table .*edits.csv: measure it first"):
        measure_edits.main(["2", "figure"])
    measure_edits.main(["2", "loop"])
    assert (tmp_path / "figures/data/edits.csv").read_text().splitlines()[1] == "loop,loop,,step,1.0,1,abc"
    assert not (tmp_path / "figures/edits.png").exists()
    monkeypatch.setitem(measure_edits.TASKS, "long", lambda *_, **__: [found | {"task": "long"}])
    measure_edits.main(["2", "long"])  # beside the rows of before, which stay as they are
    lines = (tmp_path / "figures/data/edits.csv").read_text().splitlines()
    assert lines[1:] == ["long,loop,,step,1.0,1,abc", "loop,loop,,step,1.0,1,abc"]


@pytest.mark.parametrize("command", ["edit", "inpaint", "extend", "upsample", "loop"])
def test_help_shows_an_example(capsys, command):
    status, printed, _ = run(capsys, command, "--help")
    assert status == 0 and f"example: refined-ldm {command} " in " ".join(printed)
