import json
from pathlib import PurePosixPath

import numpy as np
import pytest
import soundfile
import soxr
import torch

from refined_ldm.cli import commands as cli
from refined_ldm.evaluation import folders, scores
from refined_ldm.evaluation.embeddings.registry import Embedding
from refined_ldm.evaluation.folders import compare_folders, read_captions
from refined_ldm.evaluation.metrics import frechet_distance, kernel_distance
from refined_ldm.evaluation.scores import METRICS

RATE = 16_000
SPOILED = ("cut.wav", "empty.wav", "nan.wav", "no-samples.wav", "text.wav")


def embed_audio(waveform):
    """Log-power in 6 bands, and 6 classes: which band is the loudest."""
    power = torch.fft.rfft(waveform[0].double()).abs()[: len(waveform[0]) // 2 // 6 * 6].square().reshape(6, -1).mean(1)
    rows = power.clamp(min=1e-8).log()[None]
    return rows, rows.softmax(1)


def embed_text(captions):
    """Six numbers for each caption: the band that it ends with."""
    return np.stack([np.eye(6)[int(caption.split()[-1]) % 6] - 1 / 6 for caption in captions])


STUB = Embedding("stub 1", "f" * 64, RATE, embed_audio, embed_text)


@pytest.fixture(autouse=True)
def stub_embedding(monkeypatch):
    """Every embedding is a small one, and intervals are of few draws."""
    monkeypatch.setattr(folders, "open_embedding", lambda *_: STUB)
    monkeypatch.setattr(scores, "DRAWS", 20)


def sound(seed, rate=RATE, seconds=0.1, tilt=0.0):
    """Noise, darker with `tilt`."""
    x = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    spectrum = np.fft.rfft(x)
    spectrum *= np.exp(-tilt * np.linspace(0, 1, len(spectrum)))
    x = np.fft.irfft(spectrum, len(x))
    return 0.5 * x / np.abs(x).max()


def folder(path, count, seed=0, tilt=0.0):
    path.mkdir(parents=True)
    for i in range(count):
        clip = sound(seed + i, seconds=0.1 + 0.01 * (i % 3), tilt=tilt + 0.5 * (i % 4))
        soundfile.write(path / f"clip {i:02}.wav", clip, RATE)
    return path


def spoil(path):
    """Put SPOILED beside the good files."""
    soundfile.write(path / "cut.wav", sound(0), RATE)
    (path / "cut.wav").write_bytes((path / "cut.wav").read_bytes()[:1000])
    (path / "empty.wav").touch()
    (path / "text.wav").write_text("a dog barks")
    soundfile.write(path / "nan.wav", np.full(1000, np.nan), RATE, subtype="FLOAT")
    soundfile.write(path / "no-samples.wav", np.zeros(0), RATE)


@pytest.fixture
def two(tmp_path):
    return folder(tmp_path / "made", 8, seed=100), folder(tmp_path / "real", 16)


def run(capsys, *arguments):
    status = cli.main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# Output


def test_the_command_prints_a_table_and_writes_the_same_figures_as_json(two, tmp_path, capsys):
    status, table, _ = run(capsys, *two, "--out", tmp_path / "new" / "figures.json")
    figures = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert status == 0 and [p.name for p in (tmp_path / "new").iterdir()] == ["figures.json"]
    assert list(figures) == ["generated", "reference", "embedding", "pca", "seed", "scores", "left_out", "notes"]
    assert list(figures["generated"]) == ["folder", "clips", "silent", "longest", "sample_rates", "skipped"]
    assert list(figures["embedding"]) == [
        "name",
        "version",
        "sha256",
        "dimensions",
        "sample_rate",
        "read_at",
        "resampler",
        "window_seconds",
    ]
    assert [score["metric"] for score in figures["scores"]] == list(METRICS)[:6]
    for score in figures["scores"]:
        assert list(score) == ["metric", "value", "low", "high", "same_size", "baseline", "baseline_of", "clips"]
        assert score["low"] <= score["value"] <= score["high"] and f"{score['value']:.4g}" in table
    for words in (
        "made: 8 clips",
        "real: 16 clips",
        "stub 1 (sha256 ffffffffffff…), 6 dimensions",
        "at 16000 Hz",
        f"soxr HQ {soxr.__version__}",
        "95 % interval",
        "8 real clips against 8 others",
        "Frechet distances in 6 dimensions",
    ):
        assert words in table
    status, printed, _ = run(capsys, *two, "--json")
    assert status == 0 and json.loads(printed) == figures


def test_the_figures_are_those_of_metrics_and_come_again(two):
    found = compare_folders(*two, pca=3)
    clips = ([torch.from_numpy(soundfile.read(path)[0])[None] for path in sorted(p.iterdir())] for p in two)
    a, b = (np.concatenate([embed_audio(clip)[0] for clip in side]) for side in clips)
    values = {score.metric: score.value for score in found.scores}
    assert values["frechet_distance"] == pytest.approx(frechet_distance(a, b, pca=3), rel=1e-4)
    assert values["kernel_polynomial"] == pytest.approx(kernel_distance(a, b), rel=1e-4)
    assert values["kernel_gaussian"] == pytest.approx(kernel_distance(a, b, "gaussian"), rel=1e-4)
    assert found == compare_folders(*two, pca=3) and found.pca == 3
    assert compare_folders(*two, pca=0).pca is None
    assert found.scores[0].baseline != compare_folders(*two, pca=3, seed=1).scores[0].baseline


def test_like_sounds_score_near_the_baseline_and_others_far_above(two, tmp_path):
    near = {s.metric: s for s in compare_folders(*two).scores}
    far = {s.metric: s for s in compare_folders(folder(tmp_path / "dark", 8, seed=100, tilt=3.0), two[1]).scores}
    for metric in ("frechet_distance", "kernel_gaussian"):
        assert near[metric].same_size < 3 * abs(near[metric].baseline) + 1 < far[metric].low


def test_what_cannot_be_counted_says_what_it_needs(two, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        nameless = Embedding("nameless", "0" * 64, RATE, lambda waveform: (embed_audio(waveform)[0], None))
        patch.setattr(folders, "open_embedding", lambda *_: nameless)
        status, table, _ = run(capsys, *two)
    assert status == 0
    assert "left out: KL divergence, inception score, inception score, 10 parts: needs an embedding with class" in table
    assert "left out: CLAP score, recall at 1, recall at 5, recall at 10: needs captions of 2 clips or more" in table
    few = compare_folders(folder(tmp_path / "two", 2, seed=50), folder(tmp_path / "three", 3))
    assert few.scores[0].baseline is None and "4 clips or more, got 3" in few.scores[0].baseline_of
    assert "2 or more sizes" in few.left_out["frechet_infinity"] and "20 clips" in few.table()


def test_notes_say_what_makes_figures_hard_to_compare(two, tmp_path):
    (same_n,) = compare_folders(*two, pca=3).notes
    assert "the distance of 8 generated clips to 8 real ones" in same_n
    notes = " ".join(compare_folders(folder(tmp_path / "few", 2), folder(tmp_path / "some", 9)).notes)
    assert "of the 64 requested PCA dimensions, a half of the reference has 3" in notes
    assert "the distance of 2 generated clips to 4 real ones" in notes


# Pairs


def test_kl_divergence_pairs_files_by_name_without_ending(two, tmp_path):
    (tmp_path / "copies").mkdir()
    for path in sorted(two[1].iterdir())[:5]:
        soundfile.write(tmp_path / "copies" / f"{path.stem}.flac", *soundfile.read(path))
    soundfile.write(tmp_path / "copies" / "another.flac", sound(1), RATE)
    found = {s.metric: s for s in compare_folders(tmp_path / "copies", two[1]).scores}
    kl = found["kl_divergence"]
    assert kl.clips == 5 and kl.value == pytest.approx(0, abs=1e-4)
    assert kl.baseline > 0.01 and "other clips" in kl.baseline_of
    soundfile.write(tmp_path / "copies" / "another.wav", sound(1), RATE)
    assert "differ in more than their endings" in compare_folders(tmp_path / "copies", two[1]).left_out["kl_divergence"]


def test_captions_are_matched_by_name_and_scored(tmp_path, two, capsys):
    made = tmp_path / "named"
    made.mkdir()
    for i in range(6):  # one band each, which is what its caption says
        tone = np.sin(2 * np.pi * (8000 / 6 * (i + 0.5)) * np.arange(1600) / RATE)
        soundfile.write(made / f"{i}.wav", 0.5 * tone, RATE)
    captions = tmp_path / "captions.csv"
    captions.write_text("\ufefffile,caption\n" + "".join(f"{i}.mp3,band {i}\n" for i in range(5)) + "9.wav,none 9\n")
    found = compare_folders(made, two[1], captions=captions)
    by_metric = {s.metric: s for s in found.scores}
    assert by_metric["recall_at_1"].value == 1 and by_metric["recall_at_1"].baseline == pytest.approx(1 / 5)
    assert by_metric["clap_score"].value > by_metric["clap_score"].baseline and by_metric["clap_score"].clips == 5
    assert "captions of 6 clips" in found.left_out["recall_at_5"]
    assert "1 of 6 generated clips have no caption" in found.notes
    status, _, error = run(capsys, two[0], two[1], "--captions", captions)
    assert status == 2 and "names none of the clips" in error and "'clip 00'" in error


def test_captions_are_the_first_of_a_file_and_need_their_columns(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("caption,file\na dog,x/1.wav\na cat,x/1.wav\n,2.wav\n")
    assert read_captions(path) == {"x/1.wav": "a dog"}
    path.write_text("name,text\n1,2\n")
    with pytest.raises(ValueError, match=r"expected a column 'file', its header is \['name', 'text'\]"):
        read_captions(path)
    path.write_text("file,caption\n1.wav,A dog\n2.wav,A dog, a cat\n")
    with pytest.raises(ValueError, match="c.csv, line 3: more values than columns"):
        read_captions(path)
    with pytest.raises(FileNotFoundError, match="no such CSV file"):
        read_captions(tmp_path / "nowhere.csv")


# Files of all sorts


def test_any_rate_length_and_channels_are_read(two, tmp_path):
    mixed = tmp_path / "mixed"
    (mixed / "below").mkdir(parents=True)
    soundfile.write(mixed / "a.flac", sound(1, 44_100), 44_100)
    soundfile.write(mixed / "below" / "b.ogg", np.stack([sound(2, 48_000, 0.3)] * 2, 1), 48_000)
    soundfile.write(mixed / "c.aiff", sound(3, 8000), 8000)
    (mixed / "notes.txt").write_text("not a sound")
    found = compare_folders(mixed, two[1])
    assert found.generated.clips == 3 and found.generated.sample_rates == (8000, 44_100, 48_000)
    assert found.generated.longest == pytest.approx(0.3, abs=0.01)


def test_a_band_that_one_side_lacks_is_noted_and_can_be_left_out(two, tmp_path):
    low = tmp_path / "low"
    low.mkdir()
    for path in two[1].iterdir():
        soundfile.write(low / path.name, soxr.resample(soundfile.read(path)[0], RATE, 8000), 8000)
    found = compare_folders(low, two[1])
    assert any("8000 Hz and the references 16000 Hz" in note for note in found.notes)
    alike = compare_folders(low, two[1], sample_rate=8000)
    assert alike.scores[0].value < found.scores[0].value / 20 and alike.embedding["read_at"] == 8000
    assert not any("8000 Hz" in note for note in alike.notes)


def test_broken_files_are_all_named_and_left_out_only_on_request(two, capsys):
    for path in two:
        spoil(path)
    status, printed, error = run(capsys, *two)
    assert status == 2 and printed == "" and "10 of 34 files cannot be used; --skip-bad" in error
    for path in two:
        for name in SPOILED:
            assert str(path / name) in error
    status, table, _ = run(capsys, *two, "--skip-bad")
    assert status == 0 and "made: 8 clips, 5 unusable left out" in table
    found = compare_folders(*two, skip_bad=True)
    assert [reason.split(":")[0] for reason in found.reference.skipped] == [str(two[1] / name) for name in SPOILED]


def test_silent_files_are_counted(two):
    soundfile.write(two[0] / "silence.wav", np.zeros(1600), RATE)
    found = compare_folders(*two)
    assert (found.generated.clips, found.generated.silent) == (9, 1)
    assert "made: 9 clips, 1 of them silent" in found.table()


def test_windows_count_one_by_one_and_a_clip_without_one_cannot_be_used(two, monkeypatch):
    def windows(waveform):
        return torch.cat([embed_audio(part)[0] for part in waveform.unfold(1, 800, 800).transpose(0, 1)]), None

    embedder = Embedding("windows", "0" * 64, RATE, windows, shortest=800)
    monkeypatch.setattr(folders, "open_embedding", lambda *_: embedder)
    found = compare_folders(*two)
    assert found.scores[0].clips == 8 and any("between all windows" in note for note in found.notes)
    soundfile.write(two[0] / "short.wav", sound(1, seconds=0.04), RATE)
    with pytest.raises(ValueError, match="short.wav: 0.040 s are less than the embedding's window of 0.050 s"):
        compare_folders(*two)


def test_a_note_says_that_only_the_start_of_a_long_clip_is_used(two, monkeypatch):
    monkeypatch.setattr(
        folders, "open_embedding", lambda *_: Embedding("start", "0" * 64, RATE, embed_audio, seconds=0.11)
    )
    soundfile.write(two[0] / "clip 00.wav", sound(0, seconds=20), RATE)
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, **how: asked.append(n) or read(file, n, **how))
    assert "of clips longer than 0.11 s only the start is used" in compare_folders(*two).notes
    assert max(asked) < 0.25 * RATE  # and no more is read of it


def test_folders_that_cannot_be_compared_are_refused(two, tmp_path, capsys):
    made, real = two
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "one", 1)
    folder(made / "inside", 2)
    (tmp_path / "link").symlink_to(real, target_is_directory=True)
    for pair, words in {
        (tmp_path / "nowhere", real): "no folder",
        (tmp_path / "empty", real): "empty holds 0 usable sound files, expected 2 or more",
        (tmp_path / "one", real): "one holds 1 usable",
        (made, tmp_path / "empty"): "empty holds 0",
        (real, real): "are the same folder",
        (tmp_path / "link", real): "are the same folder",
        (made / "inside", made): "inside the other",
        (made, made / "inside"): "inside the other",
    }.items():
        status, printed, error = run(capsys, *pair)
        assert status == 2 and printed == "" and words in error and error.count("\n") == 1


def test_progress_is_reported_by_stage(two):
    steps = []
    compare_folders(*two, on_clips=lambda *step: steps.append(step))
    assert steps[:24] == [("checking", i, 24) for i in range(1, 25)]
    assert steps[24:48] == [("embedding", i, 24) for i in range(1, 25)]
    assert steps[48:] == [("computing", i, len(METRICS)) for i in range(1, len(METRICS) + 1)]


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert "example: refined-ldm evaluate " in " ".join(capsys.readouterr().out.split())


# What is where


def test_links_to_folders_are_followed_on_both_sides(two, tmp_path):
    for name, target in zip(("a", "b"), two, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(target)
        (target / "circle").symlink_to(tmp_path / name)
    found = compare_folders(tmp_path / "a", tmp_path / "b")
    assert (found.generated.clips, found.reference.clips) == (8, 16)
    (tmp_path / "a" / "other").symlink_to(two[1])
    with pytest.raises(ValueError, match="16 files are in both folders by way of links"):
        compare_folders(tmp_path / "a", tmp_path / "b")


def test_every_ending_is_taken_and_the_rest_is_counted(two):
    for name, form in (("x.aifc", "AIFF"), ("y.wave", "WAV"), ("Z.WAV", "WAV"), ("v.mat", "MAT5")):
        soundfile.write(two[0] / name, sound(1), RATE, format=form, subtype="PCM_16" if form != "MAT5" else "DOUBLE")
    for name in ("notes.md", "a.raw", "table.mat"):
        (two[0] / name).write_text("no sound")
    found = compare_folders(*two)
    assert found.generated.clips == 12 and f"passed over in {two[0]}: 1 .mat, 1 .md, 1 .raw" in found.notes


@pytest.mark.parametrize("files, rows, captions", [
    (["a.wav", "a.flac"], {"a.wav": "band 0", "a.flac": "band 1"}, {"a.wav": "band 0", "a.flac": "band 1"}),
    (["a.wav", "a.flac"], {"a.wav": "band 0"}, {"a.wav": "band 0"}),
    (["a.v1.wav", "a.v2.wav"], {"a.v1": "band 0", "a.v2": "band 1"}, {"a.v1.wav": "band 0", "a.v2.wav": "band 1"}),
    (["a.wav", "a.v2.wav"], {"a.v2": "band 1"}, {"a.v2.wav": "band 1"}),
    (["RAIN.WAV"], {"rain.wav": "band 0"}, {"RAIN.WAV": "band 0"}),
    (["A.wav", "a.wav"], {"a.wav": "band 0", "A.wav": "band 1"}, {"A.wav": "band 1", "a.wav": "band 0"}),
    (["x/a.wav"], {"./x/a.mp3": "band 2"}, {"x/a.wav": "band 2"}),
])  # fmt: skip
def test_a_row_belongs_to_the_file_with_its_whole_name_first(files, rows, captions):
    rows = {str(PurePosixPath(row)): caption for row, caption in rows.items()}
    assert folders.captions_of(files, rows)[0] == captions


def test_two_rows_that_name_a_file_equally_well_are_refused_and_rows_of_none_are_counted(two, tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("file,caption\nclip 00.mp3,band 1\nclip 00.flac,band 2\nclip 01.wav,band 3\n")
    with pytest.raises(ValueError, match="which caption is that of clip 00.wav"):
        compare_folders(*two, captions=path)
    path.write_text("file,caption\nclip 00.mp3,band 1\nclip 01.wav,band 3\nclip 99.wav,band 3\n")
    assert f"1 rows of {path} name no generated clip: clip 99.wav" in compare_folders(*two, captions=path).notes


@pytest.mark.parametrize("how, message", [
    ({"pca": -3}, "pca must be a whole number, 0 or more, got -3"), ({"pca": 2.5}, "pca must be a whole number"),
    ({"sample_rate": 16}, "sample_rate .* between 1000 and 1000000, got 16"), ({"sample_rate": 0}, "sample_rate"),
    ({"seed": -1}, "seed must be a whole number between 0"), ({"seed": True}, "seed must be a whole number"),
])  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(two, how, message):
    with pytest.raises(ValueError, match=message):
        compare_folders(*two, **how)


def test_whole_floats_are_integers(two):
    found = compare_folders(*two, pca=3.0, seed=1.0, sample_rate=8000.0)
    assert found == compare_folders(*two, pca=3, seed=1, sample_rate=8000)
