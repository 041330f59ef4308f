"""The report before training counts what is there, and names what is silent, clipped, double or unusable."""

import json

import numpy as np
import pytest
import soundfile
import torch

from refined_ldm.cli import main
from refined_ldm.data.report import is_clipped, report_data
from refined_ldm.data.sources import open_recordings
from tests.support import known_trees
from tests.support.known_trees import sounds, write
from tests.support.recordings import record


@pytest.fixture
def folder(tmp_path):
    sounds(tmp_path, "rain.wav", "dog.wav")
    record(tmp_path / "long.flac", seconds=1.5, rate=44_100, seed=5)
    record(tmp_path / "copy.wav", seconds=0.4, seed=0)  # the sound of rain.wav
    soundfile.write(tmp_path / "still.wav", np.zeros(8000), 16_000)
    soundfile.write(tmp_path / "loud.wav", np.clip(3 * np.sin(np.arange(8000) / 20), -1, 1), 16_000)
    (tmp_path / "broken.wav").write_text("no sound")
    write(tmp_path / "captions.csv", "file,caption", "rain.wav,Rain falls", "rain.wav,It pours down", "dog.wav,A dog",
          "long.flac,A dog", "copy.wav,Rain", "still.wav,Silence", "loud.wav,A loud tone", "broken.wav,Broken",
          "gone.wav,Gone")  # fmt: skip
    return tmp_path


def test_the_report_counts_and_names(folder, capsys):
    assert main(["data", str(folder), "--seconds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clips"], found["captions"], found["shorter"], found["longer"]) == (6, 7, 5, 1)
    assert found["hours"] * 3600 == pytest.approx(0.4 * 3 + 1.5 + 2 * 0.5)
    assert found["hours_used"] * 3600 == pytest.approx(0.4 * 3 + 1.0 + 2 * 0.5)
    assert found["seconds"] == {"least": 0.4, "median": 0.45, "most": 1.5}
    assert found["rates"] == {"16000": 5, "44100": 1}
    assert (found["silent"], found["clipped"]) == (["still.wav"], ["loud.wav"])
    assert found["captions_per_clip"]["most"] == 2 and found["words"] == {"least": 1, "median": 2.0, "most": 3}
    assert found["repeated_captions"] == {"A dog": 2}
    assert found["same_sounds"] == [["rain.wav", "copy.wav"]]
    first, second = sorted(found["skipped"])
    assert "broken.wav" in first + second and "gone.wav: no such sound file" in first + second


def test_the_table_and_the_picture_say_the_same(folder, tmp_path, capsys):
    assert main(["data", str(folder), "--seconds", "1", "--picture", str(tmp_path / "data.png")]) == 0
    table = capsys.readouterr().out
    for line in ("clips              6 in", "5 are shorter than 1 s and padded, 1 are longer and cut",
                 "sample rates       16000 Hz: 5, 44100 Hz: 1", "silent             1: still.wav",
                 "clipped            1: loud.wav", "same sounds        1: rain.wav = copy.wav",
                 "repeated captions  1: 'A dog' (2 clips)", "skipped            2\n"):  # fmt: skip
        assert line in table, table
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_is_there_stays(folder, tmp_path, capsys):
    (tmp_path / "data.png").write_bytes(b"\x89PNG: my holiday")
    (tmp_path / "data-2.png").mkdir()
    assert main(["data", str(folder), "--picture", str(tmp_path / "data.png")]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == str(tmp_path / "data-3.png")
    assert (tmp_path / "data.png").read_bytes() == b"\x89PNG: my holiday"
    assert (tmp_path / "data-3.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_known_data_set_shows_its_splits_and_missing_clips(tmp_path, capsys):
    known_trees.audiocaps(tmp_path)
    assert main(["data", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["splits"] == {"train": 3, "val": 1} and len(found["skipped"]) == 1
    assert main(["data", f"audiocaps:{tmp_path}", "--split", "val"]) == 0
    assert "1 in" in capsys.readouterr().out


def test_a_part_of_a_file_counts_for_itself(tmp_path):
    record(tmp_path / "a.wav", seconds=2)
    table = write(tmp_path / "t.csv", "file,caption,start,end", "a.wav,First,0.5,1.25", "a.wav,Rest,1.5,")
    report = report_data(open_recordings(table, seconds=1))
    assert [clip.seconds for clip in report.clips] == [0.75, 0.5]
    assert report.clips[0].digest != report.clips[1].digest


def test_clipping_takes_several_samples_at_one_side():
    quiet = torch.zeros(100)
    assert not is_clipped(quiet) and not is_clipped(torch.ones(2))
    quiet[::10] = 1.0  # single peaks at full scale
    assert not is_clipped(quiet)
    quiet[50:53] = torch.tensor([1.0, -1.0, 1.0])
    assert not is_clipped(quiet)
    quiet[50:53] = -1.0
    assert is_clipped(quiet)


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "no recordings at nowhere: give a table"),
    (["clotho:nowhere"], "no recordings at nowhere"),
    (["{0}", "--picture", "data.jpg"], "--picture writes a PNG file, got data.jpg"),
    (["{0}", "--split", "evaluation"], "has no splits"),
    (["clotho:{0}"], "no list of Clotho below it"),
])  # fmt: skip
def test_bad_use_is_one_line_and_status_2(folder, capsys, arguments, message):
    assert main(["data", *(argument.format(folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
