"""Folders, CSV files and JSON become data sets, and faulty rows are named."""

import json
import os
import re
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.data.tables import CONTROL, caption_lines
from tests.support.recordings import audioldm_tree, record


def write_csv(folder, *rows: str):
    path = folder / "captions.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_items_have_the_fixed_length_and_level(tmp_path):
    record(tmp_path / "short.wav", seconds=0.1, rate=44_100)
    record(tmp_path / "long.flac", seconds=0.7, rate=22_050)
    for item in CaptionedAudio.from_folder(tmp_path, seconds=0.25):
        assert item["waveform"].shape == (4_000,) and item["waveform"].dtype == torch.float32
        assert item["waveform"].abs().max() == pytest.approx(0.5)
        assert item["waveform"][1_600:].any() == (item["id"] == "long.flac")  # the short one ends in zeros


def test_a_folder_takes_captions_from_texts_and_names(tmp_path):
    record(tmp_path / "a" / "rain.wav")
    (tmp_path / "a" / "rain.txt").write_text("Rain falls.\n\nIt pours.\n")
    record(tmp_path / "dog_barks-twice.wav")
    (tmp_path / "notes.md").write_text("no sound")
    items = list(CaptionedAudio.from_folder(tmp_path))
    assert [item["id"] for item in items] == ["a/rain.wav", "dog_barks-twice.wav"]
    assert [item["captions"] for item in items] == [("Rain falls.", "It pours."), ("dog barks twice",)]
    assert items[0]["caption"] == "Rain falls."


def test_a_csv_file_gives_captions_and_labels(tmp_path):
    record(tmp_path / "rain.wav")
    record(tmp_path / "sub" / "dog.wav")
    path = write_csv(
        tmp_path,
        "\ufefffile,caption,label",
        'rain.wav,"Rain, heavy",weather',
        "sub/dog.wav,A dog,animal",
        "sub/../rain.wav,It pours,weather",
    )
    dataset = CaptionedAudio.from_csv(path)
    assert [(r.id, r.captions, r.label) for r in dataset.recordings] == [
        ("rain.wav", ("Rain, heavy", "It pours"), "weather"),
        ("sub/dog.wav", ("A dog",), "animal"),
    ]
    assert [r.captions for r in CaptionedAudio.from_folder(tmp_path).recordings] == [
        r.captions for r in dataset.recordings
    ]


def test_faulty_rows_are_named_or_left_out(tmp_path):
    (tmp_path / "set").mkdir()
    record(tmp_path / "secret.wav")
    record(tmp_path / "set" / "good.wav")
    (tmp_path / "set" / "broken.wav").write_text("no sound")
    rows = [
        "good.wav,Fine",
        "../secret.wav,Out",
        f"{tmp_path}/secret.wav,Out",
        "gone.wav,Gone",
        "good.wav,",
        "good.wav,A,B",
    ]
    path = write_csv(tmp_path / "set", "file,caption", *rows)
    with pytest.raises(ValueError) as caught:
        CaptionedAudio.from_csv(path)
    for fault in (
        "line 3: .*leads out",
        "line 4: .*leads out",
        "line 5: .*gone.wav",
        "line 6: .*'caption' is empty",
        "line 7: .*comma",
    ):
        assert re.search(fault, str(caught.value)), fault

    path = write_csv(tmp_path / "set", "file,caption", *rows, "broken.wav,Broken")
    with pytest.warns(UserWarning, match="line 8: .*broken.wav"):
        dataset = CaptionedAudio.from_csv(path, skip_bad=True)
    assert [recording.id for recording in dataset.recordings] == ["good.wav"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,text\na,b\n", "expected a column 'file', its header is \\['name', 'text'\\]"),
        ("", "expected a column"),
        ("file,caption\n", "no usable entry"),
    ],
)
def test_a_csv_file_without_the_columns_or_rows_is_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        CaptionedAudio.from_csv(tmp_path / "list.csv")


@pytest.mark.parametrize("content, message", [
    (b"file;caption\na.wav;A\n", r"its header is \['file;caption'\]; separate values by commas"),
    ("file,caption\na.wav,Une fenêtre\n".encode("latin-1"), "not a CSV file in UTF-8 .*: save it again in UTF-8"),
    ("file,caption\na.wav,A\n".encode("utf-16"), "not a CSV file in UTF-8"),
    (b"file,caption,file\na.wav,A,b.wav\n", "expected one column 'file'"),
    (b'file,caption\na.wav,"A\na.wav,B\n', "list.csv, line 2: not a CSV file .*a quote may be left open"),
    (b'file,caption\na.wav,"A"B\n', "list.csv, line 2: not a CSV file"),
    (b"file,caption\na.wav," + b"rain " * 30_000, "list.csv, line 2: not a CSV file .*field larger than"),
    (b"file,caption\na.wav,\x01\x02\n", "line 2: the caption is empty"),
    (b"file,caption\n" + b"a" * 300 + b".wav,A\n", "line 2: .* is no file name"),
    (b"file,caption\na\x00.wav,A\n", "line 2: .*no such sound file"),
])  # fmt: skip
def test_a_csv_file_of_another_kind_is_refused_by_line(tmp_path, content, message):
    record(tmp_path / "a.wav")
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CaptionedAudio.from_csv(tmp_path / "list.csv")


def test_captions_of_any_script_and_length_are_kept_without_control_characters(tmp_path):
    record(tmp_path / "a.wav")
    captions = ["Дождь идёт", "雨が降る", "مطر", "🔔🔔", "rain " * 2000, 'He says "so"']
    rows = [f'a.wav,"{caption.replace(chr(34), 2 * chr(34))}"' for caption in captions]
    rows += [rows[0], 'a.wav,"rain\x00\nand\x07hail"']
    dataset = CaptionedAudio.from_csv(write_csv(tmp_path, "file,caption", *rows))
    assert dataset[0]["captions"] == (*(caption.strip() for caption in captions), "rain and hail")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems name files in Unicode")
def test_a_file_whose_name_is_no_unicode_needs_a_caption(tmp_path):
    sound = record(tmp_path / "a.wav").rename(tmp_path / os.fsdecode(b"caf\xe9.wav"))
    with pytest.raises(ValueError, match=r"the caption 'caf\\udce9' is no text"):
        CaptionedAudio.from_folder(tmp_path)
    sound.with_suffix(".txt").write_text("a café")
    assert CaptionedAudio.from_folder(tmp_path, seconds=0.1, crop="random")[0]["caption"] == "a café"


def test_half_a_character_is_reported_by_its_entry(tmp_path):
    record(tmp_path / "data" / "dataset" / "audio" / "a.wav")
    root = audioldm_tree(tmp_path, [{"wav": "a.wav", "caption": "rain \ud83d"}])
    with pytest.raises(ValueError, match=r"set_train.json, entry 1: the caption 'rain \\ud83d' is no text"):
        CaptionedAudio.from_audioldm(root)


@pytest.mark.parametrize("crop", ["start", "random"])
def test_only_the_used_part_of_a_long_recording_is_read(tmp_path, monkeypatch, crop):
    record(tmp_path / "long.wav", seconds=20)
    (tmp_path / "long.txt").write_text("noise")
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, **how: asked.append(n) or read(file, n, **how))
    assert CaptionedAudio.from_folder(tmp_path, seconds=0.5, crop=crop)[0]["waveform"].shape == (8_000,)
    assert sum(asked) == 9_600  # and a tenth of a second


def test_an_item_that_cannot_be_read_is_named_with_its_row(tmp_path):
    record(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_text("no sound")
    dataset = CaptionedAudio.from_csv(write_csv(tmp_path, "file,caption", "a.wav,A", "b.wav,B"))
    with pytest.raises(ValueError, match="captions.csv, line 3: .*b.wav: "):
        dataset[1]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(FileNotFoundError, match="captions.csv, line 2: .*a.wav: no such sound file"):
        dataset[0]


@pytest.mark.parametrize(
    "content, message", [(b"  \n", "rain.txt: expected a caption"), (b"\xff\xfe", "rain.txt: not a")]
)
def test_a_faulty_text_is_named(tmp_path, content, message):
    record(tmp_path / "rain.wav")
    (tmp_path / "rain.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CaptionedAudio.from_folder(tmp_path)


def test_what_is_missing_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        CaptionedAudio.from_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        CaptionedAudio.from_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no usable sound file"):
        CaptionedAudio.from_folder(tmp_path)


def test_a_random_crop_depends_on_seed_and_id_alone(tmp_path):
    record(tmp_path / "a.wav", seconds=2)
    record(tmp_path / "b.wav", seconds=2)

    def crop(index, seed):
        return CaptionedAudio.from_folder(tmp_path, seconds=0.1, crop="random", seed=seed)[index]["waveform"]

    assert torch.equal(crop(0, seed=1), crop(0, seed=1))
    assert not torch.equal(crop(0, seed=1), crop(0, seed=2)) and not torch.equal(crop(0, seed=1), crop(1, seed=1))


def test_audioldms_tree_gives_captions_and_labels(tmp_path, monkeypatch):
    record(tmp_path / "data" / "dataset" / "audio" / "part" / "rain.wav", seconds=0.2)
    record(tmp_path / "data" / "dataset" / "audio" / "dog.wav")
    rain = {"wav": "part/rain.wav", "seg_label": "rain.npy", "labels": "/m/06mb1,/m/0jbk", "caption": " It rains "}
    audioldm_tree(tmp_path, [rain, {"wav": "dog.wav", "caption_1": "A dog", "caption_2": "A bark", "caption_3": ""},
                             {**rain, "caption": "It pours"}, rain])  # fmt: skip
    audioldm_tree(tmp_path, [{"wav": "dog.wav", "caption": "A test"}], "test")
    root = audioldm_tree(tmp_path, [{"wav": "dog.wav", "caption": "A horn"}], name="other")
    for folder in (tmp_path, root.parent):  # wherever it is called from
        monkeypatch.chdir(folder)
        dataset = CaptionedAudio.from_audioldm(root.relative_to(folder), seconds=0.25)
        assert [(r.id, r.captions, r.label) for r in dataset.recordings] == [
            ("set/part/rain.wav", ("It rains", "It pours"), "/m/06mb1,/m/0jbk"),
            ("set/dog.wav", ("A dog", "A bark"), ""),
            ("other/dog.wav", ("A horn",), ""),
        ]
    item = dataset[0]
    assert item["waveform"].shape == (4000,) and item["waveform"].abs().max() == pytest.approx(0.5)
    assert not item["waveform"][3200:].any()
    assert [r.id for r in CaptionedAudio.from_audioldm(root, names=("other",)).recordings] == ["other/dog.wav"]
    assert CaptionedAudio.from_audioldm(root, "test", names=("set",))[0]["caption"] == "A test"


def test_faulty_entries_of_audioldms_tree_are_named_or_left_out(tmp_path):
    record(tmp_path / "data" / "dataset" / "audio" / "good.wav")
    record(tmp_path / "secret.wav")
    (tmp_path / "data" / "dataset" / "audio" / "broken.wav").write_text("no sound")
    entries = [{"wav": "good.wav", "caption": "Fine"}, {"wav": "../../../secret.wav", "caption": "Out"},
               {"wav": str(tmp_path / "secret.wav"), "caption": "Out"}, {"wav": "gone.wav", "caption": "Gone"},
               {"wav": "good.wav", "labels": "/m/06mb1"}, {"caption": "Nothing"}, "rain", {"wav": 3}]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        CaptionedAudio.from_audioldm(audioldm_tree(tmp_path, entries))
    for fault in ("7 faulty", "set_train.json, entry 2: .*leads out of", "entry 3: .*leads out", "entry 4: .*gone.wav",
                  "entry 5: good.wav has no caption", 'entry 6: expected "wav"', "entry 7: .*got rain",
                  "entry 8: .*got {'wav': 3}"):  # fmt: skip
        assert re.search(fault, str(caught.value)), fault
    root = audioldm_tree(tmp_path, [*entries, {"wav": "broken.wav", "caption": "Broken"}])
    with pytest.warns(UserWarning, match="entry 9: .*broken.wav"):
        dataset = CaptionedAudio.from_audioldm(root, skip_bad=True)
    assert [recording.id for recording in dataset.recordings] == ["set/good.wav"]


@pytest.mark.parametrize("tree, error, message", [
    ("nothing", ValueError, "dataset_root.json: not a JSON file in UTF-8"),
    ("[]", ValueError, "expected an object, got a list"),
    ("{}", ValueError, "expected {\"metadata\""),
    ('{"metadata": 3}', ValueError, "expected {\"metadata\""),
    ('{"metadata": {"path": {"b": {}}}}', ValueError, "no data set 'a' with a folder; it lists b"),
    ('{"metadata": {"path": {"a": {}}}}', ValueError, "no data set 'a' with a folder"),
    ('{"a": ".", "metadata": {"path": {"a": {"test": "t"}}}}', ValueError, "a has no split 'train', only test"),
    ('{"a": "nowhere", "metadata": {"path": {"a": {"train": "x.json"}}}}', FileNotFoundError, "names nowhere, which"),
    ('{"a": ".", "metadata": {"path": {"a": {"train": "gone.json"}}}}', FileNotFoundError, "names gone.json, which"),
    ('{"a": ".", "metadata": {"path": {"a": {"train": "x.json"}}}}', ValueError, "x.json: expected {\"data\""),
])  # fmt: skip
def test_a_tree_of_another_form_is_refused(tmp_path, tree, error, message):
    (tmp_path / "dataset_root.json").write_text(tree)
    (tmp_path / "x.json").write_text('{"data": 3}')
    with pytest.raises(error, match=message):
        CaptionedAudio.from_audioldm(tmp_path / "dataset_root.json", names=("a",))


def test_an_empty_split_and_a_missing_root_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset_root.json: no such JSON file"):
        CaptionedAudio.from_audioldm(tmp_path / "dataset_root.json")
    (tmp_path / "data" / "dataset" / "audio").mkdir(parents=True)
    with pytest.raises(ValueError, match="no usable entry"):
        CaptionedAudio.from_audioldm(audioldm_tree(tmp_path, []))


NAMES = st.sampled_from(["a.wav", "broken.wav", "./a.wav", "../a.wav", "/etc/passwd", "gone.wav", "~", "."]) | st.text()
ROW = st.tuples(NAMES, st.text(), st.text()).map(lambda values: ",".join(values).encode("utf-8", "surrogatepass"))
TABLE = st.lists(st.binary(max_size=60) | ROW, max_size=5).map(lambda rows: b"file,caption,label\n" + b"\n".join(rows))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    record(folder / "a.wav", seconds=0.01)
    (folder / "broken.wav").write_text("no sound")
    return folder


def assert_read_or_refused(read, file):
    """`read()` gives a data set whose recordings lie in its folder, or an error that names `file`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = read()
        except (ValueError, FileNotFoundError) as fault:
            assert file in str(fault)
            return
    assert dataset.recordings
    for recording in dataset.recordings:
        assert recording.path.name in ("a.wav", "broken.wav") and recording.captions and all(recording.captions)


@settings(deadline=2000)
@given(content=st.binary(max_size=200) | TABLE, skip_bad=st.booleans())
def test_any_bytes_are_read_as_a_table_or_refused(fuzzed, content, skip_bad):
    (fuzzed / "table.csv").write_bytes(content)
    assert_read_or_refused(lambda: CaptionedAudio.from_csv(fuzzed / "table.csv", 0.01, skip_bad=skip_bad), "table.csv")


KEYS = st.sampled_from(["wav", "caption", "labels", "caption_2"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)
ENTRIES = st.lists(st.fixed_dictionaries({"wav": NAMES, "caption": JSON}) | JSON, max_size=4)


@settings(deadline=2000)
@given(root=st.none() | st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode), entries=ENTRIES,
       folder=st.just(".") | JSON)  # fmt: skip
@example(b"[" * 100_000, [], ".")
@example(None, [{"wav": "a.wav", "caption": "\ud800"}], ".")
@example(None, [], "x" * 5000)
def test_any_bytes_are_read_as_audioldms_tree_or_refused(fuzzed, root, entries, folder):
    (fuzzed / "part.json").write_text(json.dumps({"data": entries}))
    tree = {"set": folder, "metadata": {"path": {"set": {"train": "part.json"}}}}
    (fuzzed / "root.json").write_bytes(json.dumps(tree).encode() if root is None else root)
    assert_read_or_refused(lambda: CaptionedAudio.from_audioldm(fuzzed / "root.json", seconds=0.01), ".json")


@given(st.binary(max_size=100))
def test_any_bytes_are_captions_or_refused(content):
    try:
        captions = caption_lines(content, "rain.txt")
    except ValueError as fault:
        assert "rain.txt" in str(fault)
    else:
        assert captions and not any(re.search(CONTROL, caption) or caption != caption.strip() for caption in captions)


# What lies in a folder


def captioned(folder, **how):
    return {recording.id: recording.captions for recording in CaptionedAudio.from_folder(folder, **how).recordings}


def beside(folder, sounds, texts):
    """A folder of sounds, and of texts {name: contents}."""
    for name in sounds:
        record(folder / name, seconds=0.1)
    for name, content in texts.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("texts, captions", [
    ({"RAIN.TXT": "rain"}, {"rain.wav": ("rain",)}),
    ({"rain.wav.txt": "rain"}, {"rain.wav": ("rain",)}),
    ({"Rain.WAV.Txt": "rain"}, {"rain.wav": ("rain",)}),
    ({"rain.json": '{"caption": "rain", "label": "x"}'}, {"rain.wav": ("rain",)}),
    ({"RAIN.JSON": '{"captions": ["rain", "hail"]}'}, {"rain.wav": ("rain", "hail")}),
    ({"rain.wav.json": '{"text": "rain"}'}, {"rain.wav": ("rain",)}),
    ({"rain.flac.txt": "rain"}, {"rain.wav": ("rain",)}),  # the sound was converted
    ({"rain.txt": "rain", "rain.json": '{"caption": "no"}'}, {"rain.wav": ("rain",)}),
    ({"rain.wav.txt": "rain", "rain.txt": "no"}, {"rain.wav": ("rain",)}),  # the whole name goes first
    ({"rain.json": '{"rate": 3}'}, {"rain.wav": ("rain",)}),  # by its name
])  # fmt: skip
def test_a_text_beside_a_sound_is_read_however_it_is_called(tmp_path, texts, captions):
    assert captioned(beside(tmp_path, ["rain.wav"], texts)) == captions


@pytest.mark.parametrize("sounds, texts, captions", [
    (["clip.1.wav", "clip.2.wav"], {"clip.1.txt": "one", "clip.2.txt": "two"}, ["one", "two"]),
    (["clip.1.wav", "clip.2.wav"], {"clip.txt": "none of them", "clip.2.txt": "two"}, ["clip.1", "two"]),
    (["RAIN.wav", "rain.wav"], {"rain.txt": "small", "RAIN.txt": "large"}, ["large", "small"]),
    (["RAIN.wav", "rain.wav"], {"rain.txt": "small"}, ["RAIN", "small"]),
    (["rain.flac", "rain.wav"], {"rain.wav.txt": "wav", "rain.flac.txt": "flac"}, ["flac", "wav"]),
    (["rain.flac", "rain.wav"], {"rain.wav.txt": "wav"}, ["rain", "wav"]),
    (["a/rain.wav", "b/rain.wav"], {"a/rain.txt": "a"}, ["a", "rain"]),
    (["cafe\u0301.wav"], {"caf\u00e9.txt": "coffee"}, ["coffee"]),  # one accent written in two ways
])  # fmt: skip
def test_no_sound_gets_the_caption_of_its_neighbour(tmp_path, sounds, texts, captions):
    found = captioned(beside(tmp_path, sounds, texts))
    assert [found[name][0] for name in sounds] == captions


def test_two_texts_for_one_sound_are_refused(tmp_path):
    beside(tmp_path, ["rain.wav"], {"rain.txt": "small", "RAIN.txt": "large"})
    with pytest.raises(ValueError, match="rain.wav has 2 files of captions, RAIN.txt and rain.txt: keep one"):
        CaptionedAudio.from_folder(tmp_path)
    (tmp_path / "rain.txt").unlink()
    (tmp_path / "RAIN.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="RAIN.txt: not a text in UTF-8"):
        CaptionedAudio.from_folder(tmp_path)
    (tmp_path / "RAIN.txt").rename(tmp_path / "rain.json")
    with pytest.raises(ValueError, match="rain.json: not a JSON file in UTF-8"):
        CaptionedAudio.from_folder(tmp_path)


def test_what_is_passed_over_is_said_in_one_line(tmp_path, caplog):
    beside(tmp_path, ["b.wav", "rain.wav"], {"rain.txt": "rain", "hail.txt": "no sound", "notes.md": "", "c.raw": ""})
    (tmp_path / ".hidden.wav").touch()
    captioned(tmp_path)
    over, by_name = caplog.messages
    assert over == f"{tmp_path}: 2 sounds; passed over: 1 .md, 1 .raw, 1 .txt"
    assert by_name == f"{tmp_path}: 1 of 2 sounds have no text beside them and are captioned by their names: b.wav"
    captioned(tmp_path)
    assert len(caplog.messages) == 2  # once
    write_csv(tmp_path, "file,caption", "rain.wav,It rains").rename(tmp_path / "Captions.CSV")
    assert captioned(tmp_path) == {"rain.wav": ("It rains",)}
    assert caplog.messages[2:] == [f"{tmp_path}: 1 of 2 sounds are not in Captions.CSV, and not used"]


def test_what_is_in_a_hidden_folder_is_not_used(tmp_path):
    for name in ("rain.wav", ".ipynb_checkpoints/rain-checkpoint.wav", "b/.cache/hail.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(1_600), 16_000)
    assert [r.id for r in CaptionedAudio.from_folder(tmp_path).recordings] == ["rain.wav"]
    hidden = (tmp_path / "b").rename(tmp_path / ".mine")  # given by its name, it is meant
    (hidden / ".cache").rename(hidden / "cache")
    assert [r.id for r in CaptionedAudio.from_folder(hidden).recordings] == ["cache/hail.wav"]


def test_a_text_that_captions_two_sounds_is_logged_once(tmp_path, caplog):
    for name in ("rain.wav", "rain.flac", "wind.wav"):
        soundfile.write(tmp_path / name, np.zeros(1_600), 16_000)
    (tmp_path / "rain.txt").write_text("rain falls")
    (tmp_path / "wind.txt").write_text("wind blows")
    for _ in range(2):
        captions = [r.captions for r in CaptionedAudio.from_folder(tmp_path).recordings]
    assert captions == [("rain falls",), ("rain falls",), ("wind blows",)]
    assert caplog.messages == [
        f"{tmp_path}: 1 texts caption several sounds each: rain.txt captions rain.flac and rain.wav"
    ]


def test_a_folder_in_which_all_is_used_is_silent(tmp_path, caplog):
    captioned(beside(tmp_path, ["rain.wav", "b/hail.flac"], {"rain.txt": "rain", "b/hail.flac.txt": "hail"}))
    captioned(beside(tmp_path / "named", ["dog_barks.wav", "rain.wav"], {}))
    assert not caplog.messages


FORMATS = sorted(set(soundfile.available_formats()) - {"RAW", "XI"})  # XI is refused, RAW has no header


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_takes_every_format_that_libsndfile_reads(tmp_path, form):
    subtype = soundfile.default_subtype(form) or next(iter(soundfile.available_subtypes(form)))
    noise, rate = np.random.default_rng(0).uniform(-0.1, 0.1, 8_000), 8_000 if form == "WVE" else 16_000
    soundfile.write(tmp_path / f"a.{form.lower()}", noise, rate, format=form, subtype=subtype)
    assert CaptionedAudio.from_folder(tmp_path, seconds=0.1)[0]["waveform"].abs().max() > 0.3


@pytest.mark.parametrize("ending, form", [
    ("aifc", "AIFF"), ("wave", "WAV"), ("WAVE", "WAV"), ("bwf", "WAV"), ("snd", "AU"), ("nist", "NIST"),
    ("sph", "NIST"), ("oga", "OGG"), ("mpga", "MP3"), ("mp2", "MP3"),
    ("8svx", "SVX"), ("iff", "SVX"), ("sf", "IRCAM"), ("mat", "MAT5"),
])  # fmt: skip
def test_a_folder_takes_every_usual_ending(tmp_path, ending, form):
    subtype = soundfile.default_subtype(form) or next(iter(soundfile.available_subtypes(form)))
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 8_000)
    soundfile.write(tmp_path / f"a.{ending}", noise, 16_000, format=form, subtype=subtype)
    assert list(captioned(tmp_path)) == [f"a.{ending}"]


@pytest.mark.parametrize("name", ["table.mat", "picture.iff", "features.htk"])
def test_what_shares_its_ending_with_a_sound_is_passed_over(tmp_path, caplog, name):
    assert list(captioned(beside(tmp_path, ["a.wav"], {name: "no sound"}))) == ["a.wav"]
    assert f"passed over: 1 {name[name.index('.') :]}" in caplog.text


def test_links_to_folders_are_followed_once_and_not_in_circles(tmp_path, caplog):
    beside(tmp_path / "big", ["a.wav", "deep/b.wav"], {"deep/b.txt": "bells"})
    beside(tmp_path / "data", ["c.wav"], {})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "big")
    assert captioned(tmp_path / "data") == {"c.wav": ("c",), "link/a.wav": ("a",), "link/deep/b.wav": ("bells",)}
    assert "passed over" not in caplog.text
    (tmp_path / "big" / "deep" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "big" / "deep")
    assert sorted(recording.path.name for recording in CaptionedAudio.from_folder(tmp_path / "data").recordings) == [
        "a.wav", "b.wav", "c.wav"
    ]  # fmt: skip
    assert "passed over: 2 folders that a link leads to again" in caplog.text
    (tmp_path / "alone").symlink_to(tmp_path / "big")
    assert len(CaptionedAudio.from_folder(tmp_path / "alone")) == 3


# Numbers


@pytest.mark.parametrize("make", [
    lambda folder, n: CaptionedAudio.from_folder(folder, seed=n),
    lambda folder, n: CaptionedAudio.from_folder(folder)[n],
])  # fmt: skip
def test_whole_floats_are_integers_and_others_are_refused(tmp_path, make):
    record(tmp_path / "a.wav")
    record(tmp_path / "b.wav")
    make(tmp_path, 1.0), make(tmp_path, np.int32(1)), make(tmp_path, torch.tensor(1))
    for wrong in (1.5, True, float("nan"), "1", None, torch.ones(2)):
        with pytest.raises(ValueError, match="must be a whole number"):
            make(tmp_path, wrong)


def test_seconds_are_a_number(tmp_path):
    record(tmp_path / "a.wav")
    for seconds in ("1", True, float("nan")):
        with pytest.raises(ValueError, match="seconds must be a finite number, got"):
            CaptionedAudio.from_folder(tmp_path, seconds)


def test_a_whole_float_as_seed_is_the_same_seed(tmp_path):
    record(tmp_path / "a.wav", seconds=2)
    crops = [CaptionedAudio.from_folder(tmp_path, 0.1, "random", seed)[0]["waveform"] for seed in (3, 3.0)]
    assert torch.equal(*crops)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed must be a whole number between 0 and 9223372036854775807, got"):
            CaptionedAudio.from_folder(tmp_path, seed=seed)


def test_a_row_that_ends_early_and_a_path_with_backslashes_name_their_cause(tmp_path):
    record(tmp_path / "sub" / "a.wav")
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\nsub\\a.wav,a dog\n")
    with pytest.raises(ValueError, match=r"line 2: sub\\a.wav: no such .*, but sub/a.wav is there: write / between"):
        CaptionedAudio.from_csv(table)
    table.write_text("file,caption\nsub/a.wav,an engine with muffled\nspeech behind\n")
    with pytest.raises(ValueError, match="line 3: the row ends before the column 'caption'; .* line break in quotes"):
        CaptionedAudio.from_csv(table)
    table.write_text('file,caption\nsub/a.wav,"an engine with muffled\nspeech behind"\n')
    assert CaptionedAudio.from_csv(table)[0]["caption"] == "an engine with muffled speech behind"
