"""The known data sets open in their published layouts, by name or recognised, with the traps known of each."""

import json
import logging
import sys

import pytest

from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.data.known_sets import KNOWN, detect_known_set, letters_and_digits, youtube_id
from refined_ldm.data.listing import log_once
from refined_ldm.data.sources import is_there, open_recordings
from tests.support import known_trees
from tests.support.known_trees import TREES, parquet_files, sounds, write


def counts(dataset):
    return len(dataset), sum(len(recording.captions) for recording in dataset.recordings)


def said(dataset):
    return {recording.id: recording.captions for recording in dataset.recordings}


def test_every_known_set_has_a_tree():
    assert TREES.keys() == KNOWN.keys()


@pytest.mark.parametrize("name, split", [(name, split) for name, (_, splits) in TREES.items() for split in splits])
def test_a_layout_opens_with_its_clips_and_captions(tmp_path, name, split):
    build, splits = TREES[name]
    dataset = CaptionedAudio.open(name, build(tmp_path), split=split, seconds=0.32)
    assert counts(dataset) == splits[split]
    assert all(item["waveform"].shape == (5120,) and item["waveform"].any() for item in dataset)
    assert counts(open_recordings(f"{name}:{tmp_path}", split)) == splits[split]


@pytest.mark.parametrize("name", TREES)
def test_a_layout_is_recognised_below_any_folder_and_said_in_one_line(tmp_path, caplog, name):
    build, splits = TREES[name]
    build(tmp_path / "a" / "copy")
    assert detect_known_set(tmp_path)[0] == name
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert counts(open_recordings(tmp_path)) == splits[""]
    (line,) = [message for message in caplog.messages if "taken for" in message]
    clips, captions = splits[""]
    assert f"taken for {KNOWN[name].title} (" in line and line.endswith(f"{clips} clips, {captions} captions")


def test_folders_of_ones_own_are_taken_for_nothing(tmp_path):
    write(tmp_path / "train.csv", "file,caption", "rain.wav,Rain")  # no columns of AudioCaps
    sounds(tmp_path, "rain.wav")
    assert detect_known_set(tmp_path) == ("", [])
    assert said(open_recordings(tmp_path)) == {"rain.wav": ("rain",)}


def test_a_table_of_captions_goes_before_the_layout(tmp_path):
    known_trees.esc50(tmp_path)
    write(tmp_path / "captions.csv", "file,caption", "audio/1-100032-A-0.wav,My dog")
    assert said(open_recordings(tmp_path)) == {"audio/1-100032-A-0.wav": ("My dog",)}


@pytest.mark.parametrize("stem, id", [
    ("r1nicOVtvkQ", "r1nicOVtvkQ"), ("Yr1nicOVtvkQ", "r1nicOVtvkQ"), ("r1nicOVtvkQ_130", "r1nicOVtvkQ"),
    ("r1nicOVtvkQ_130000_140000", "r1nicOVtvkQ"), ("-5xOcMJpTUk_70.0-80.0", "-5xOcMJpTUk"),
    ("Yabcdefghij", "Yabcdefghij"), ("YYabcdefghij", "Yabcdefghij"), ("Yabcdefghi__30", "Yabcdefghi_"),
    ("__________A_5", "__________A"), ("rain", "rain"), ("1234", "1234"),
])  # fmt: skip
def test_names_of_downloaders_hold_an_id(stem, id):
    assert youtube_id(stem) == id


def test_audiocaps_missing_clips_are_counted_and_are_no_faults(tmp_path, caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        dataset = CaptionedAudio.open("audiocaps", known_trees.audiocaps(tmp_path), "train")
    assert dataset.left_out == (f"train.csv, line 5: no sound file of 'gone_gone_g' below {tmp_path}",)
    assert [line for line in caplog.messages if "1 rows of AudioCaps are left out" in line]
    for sound in (tmp_path / "train").iterdir():
        sound.unlink()
    with pytest.raises(ValueError, match="none of 4 listed sounds is there; train.csv, line 2: no sound file of 'r1ni"):
        CaptionedAudio.open("audiocaps", tmp_path, "train")


def test_audiocaps_broken_rows_are_named_or_left_out(tmp_path):
    root = known_trees.audiocaps(tmp_path)
    table = root / "dataset/train.csv"
    write(table, *table.read_text().splitlines(), "11,r1nicOVtvkQ,130,Water pours, then stops", "12,r1nicOVtvkQ",
          '13,r1nicOVtvkQ,130,"A "loud" bang"', "14,r1nicOVtvkQ,130,",
          '15,r1nicOVtvkQ,130,"Water runs\nand stops"')  # fmt: skip
    with pytest.raises(ValueError) as caught:
        CaptionedAudio.open("audiocaps", root, "train")
    for fault in ("line 6: more values than columns", "line 7: the row ends before", "line 8: not a CSV file",
                  "line 9: the column 'caption' is empty"):  # fmt: skip
        assert f"train.csv, {fault}" in str(caught.value)
    with pytest.warns(UserWarning, match="4 faulty entries"):
        dataset = CaptionedAudio.open("audiocaps", root, "train", skip_bad=True)
    assert said(dataset)["train/Yr1nicOVtvkQ.wav"] == ("A woman talks nearby as water pours", "Water runs and stops")
    assert len(dataset.left_out) == 5  # with the missing clip


def test_clotho_finds_names_with_odd_characters(tmp_path):
    root = known_trees.clotho(tmp_path)
    found = said(CaptionedAudio.open("clotho", root, "development"))
    assert [captions[0] for captions in found.values()] == ["bird sings", "A bell, far away"]
    both = CaptionedAudio.open("clotho", root, "validation,evaluation")  # two sounds of one name
    assert [r.captions[0] for r in both.recordings] == ["tap sings", "sink sings"]
    assert [r.path.parent.name for r in both.recordings] == ["validation", "evaluation"]
    sounds(root / "development", "Ambience birds.wav", "ambience_birds.wav")
    (root / "clotho_audio_development/development/ Ambience Birds.wav").unlink()
    with pytest.raises(ValueError, match="' Ambience Birds.wav' could be .* or .*: keep one"):
        CaptionedAudio.open("clotho", root, "development")


def test_clotho_lists_may_have_fewer_columns_and_another_encoding_is_refused(tmp_path):
    root = known_trees.clotho(tmp_path)
    table = write(root / "clotho_captions_development.csv", "file_name,caption_1,caption_2", " Ambience Birds.wav,A,B")
    assert list(said(CaptionedAudio.open("clotho", root, "development")).values()) == [("A", "B")]
    table.write_bytes("file_name,caption_1\n Ambience Birds.wav,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="clotho_captions_development.csv: not a CSV file in UTF-8"):
        open_recordings(root)  # not a folder of one's own, whose sounds are captioned by their names


@pytest.mark.parametrize("entry, message", [
    ({"caption": "Rain"}, "entry 1: no 'id', only caption"),
    ({"id": "1234"}, "entry 1: no 'caption', only id"),
    ({"id": "1234", "caption": None}, "entry 1: the column 'caption' is empty"),
    ({"id": "1234", "caption": True}, "entry 1: the column 'caption' holds a bool"),
    ({"id": "1234", "caption": float("nan")}, "entry 1: the column 'caption' holds a float"),
    ({"id": "1234", "caption": {"text": "Rain"}}, "entry 1: the column 'caption' holds a dict"),
])  # fmt: skip
def test_no_entry_of_wavcaps_becomes_a_caption_that_nobody_wrote(tmp_path, entry, message):
    sounds(tmp_path / "SoundBible_flac", "1234.flac")
    write(tmp_path / "sb_final.json", json.dumps({"data": [entry, {"id": 1234, "caption": "A siren wails"}]}))
    with pytest.raises(ValueError, match=message):
        open_recordings(tmp_path)
    with pytest.warns(UserWarning, match="1 faulty entries"):
        dataset = open_recordings(tmp_path, skip_bad=True)
    assert said(dataset) == {"SoundBible_flac/1234.flac": ("A siren wails",)}


@pytest.mark.parametrize("ontology", [{"id": "/m/1"}, ["/m/1"], [{"id": "/m/1", "child_ids": []}],
                                      [{"id": "/m/1", "name": "Dog"}], [{"id": "/m/1", "name": "Dog", "child_ids": 1}]]
                         )  # fmt: skip
def test_an_ontology_of_another_form_is_refused(tmp_path, ontology):
    write(tmp_path / "eval_segments.csv", '0123456789A, 30.0, 40.0, "/m/1"')
    write(tmp_path / "ontology.json", json.dumps(ontology))
    with pytest.raises(ValueError, match="ontology.json: not in the form of AudioSet's ontology"):
        open_recordings(tmp_path)


def test_classes_that_are_above_each_other_are_all_named(tmp_path):
    sounds(tmp_path, "0123456789A.wav")
    write(tmp_path / "eval_segments.csv", '0123456789A, 30.0, 40.0, "/m/1"')
    circle = [
        {"id": "/m/1", "name": "Dog", "child_ids": ["/m/2"]},
        {"id": "/m/2", "name": "Pet", "child_ids": ["/m/1"]},
    ]
    write(tmp_path / "ontology.json", json.dumps(circle))
    assert said(open_recordings(tmp_path)) == {"0123456789A.wav": ("the sound of dog",)}


def test_a_missing_sound_of_a_whole_data_set_is_a_fault(tmp_path):
    root = known_trees.clotho(tmp_path)
    (root / "evaluation" / "Sink (1).wav").unlink()
    (root / "validation" / "Sink (1).wav").unlink()
    with pytest.raises(ValueError, match="line 2: no sound file of 'Sink"):
        CaptionedAudio.open("clotho", root, "evaluation")
    assert letters_and_digits("Église - no. 2") == "eglise" + "no2" and letters_and_digits("?!") == "?!"


def test_fsd50k_captions_name_all_classes_or_the_lowest(tmp_path):
    root = known_trees.fsd50k(tmp_path)
    (val,) = CaptionedAudio.open("fsd50k", root, "val").recordings
    assert val.captions == ("the sound of male singing, dog, domestic animals and pets and animal",)
    write(root / "ontology.json", json.dumps(known_trees.ONTOLOGY))
    (val,) = CaptionedAudio.open("fsd50k", root, "val").recordings
    assert val.captions == ("the sound of male singing and dog",)
    assert (val.label, val.split) == ("Male_singing, Dog", "val")
    (val,) = CaptionedAudio.open("fsd50k", root, "val", template="this is {}").recordings
    assert val.captions == ("this is male singing and dog",)


def test_folds_are_kept(tmp_path):
    dataset = CaptionedAudio.open("esc50", known_trees.esc50(tmp_path))
    assert [(r.split, r.label) for r in dataset.recordings] == [
        ("fold1", "dog"), ("fold1", "dog"), ("fold2", "crying_baby")
    ]  # fmt: skip
    assert dataset.recordings[2].captions == ("the sound of crying baby",)
    with pytest.raises(ValueError, match="ESC-50 has no split 'fold7', only fold1, fold2"):
        CaptionedAudio.open("esc50", tmp_path, "fold7")


def test_audioset_ids_become_names_of_the_lowest_classes(tmp_path):
    root = known_trees.audioset(tmp_path)
    dataset = CaptionedAudio.open("audioset", root)
    assert [r.captions[0] for r in dataset.recordings] == [
        "the sound of dog and male singing",
        "the sound of dog",
        "the sound of domestic animals, pets and male singing",
    ]
    assert len(dataset.left_out) == 3 and "line 5" in dataset.left_out[0]  # three lines are comments
    (root / "ontology.json").unlink()
    (train,) = CaptionedAudio.open("audioset", root, "balanced_train").recordings
    assert train.captions == ("the sound of animal, dog and male singing",)
    table = root / "class_labels_indices.csv"
    write(table, *table.read_text().splitlines()[:-1])
    with pytest.raises(ValueError, match=r"balanced_train_segments.csv, line 4: no class has the id '/t/dd00003'"):
        CaptionedAudio.open("audioset", root, "balanced_train")
    table.unlink()
    with pytest.raises(FileNotFoundError, match="put class_labels_indices.csv or ontology.json beside its lists"):
        CaptionedAudio.open("audioset", root)


def test_wavcaps_parts_that_number_sounds_alike_are_kept_apart(tmp_path):
    dataset = CaptionedAudio.open("wavcaps", known_trees.wavcaps(tmp_path))
    for recording in dataset.recordings:
        assert recording.captions == (f"A sound of {recording.split}.",) and recording.split in recording.id
    assert len(dataset.left_out) == 4
    earlier = tmp_path / "json_files/SoundBible/sb_final.json"  # the first lists were arrays
    earlier.write_text(json.dumps(json.loads(earlier.read_text())["data"]))
    assert said(CaptionedAudio.open("wavcaps", tmp_path)) == said(dataset)
    (tmp_path / "json_files/FreeSound/fsd_final.json").write_text("[1]")
    with pytest.raises(ValueError, match="fsd_final.json: not in the form of WavCaps's lists"):
        CaptionedAudio.open("wavcaps", tmp_path)


@pytest.mark.parametrize("name, root, error, message", [
    ("esc51", ".", ValueError, "no known data set 'esc51', only audiocaps, clotho"),
    ("esc50", "nowhere", FileNotFoundError, "nowhere: no such folder of ESC-50"),
    ("esc50", ".", FileNotFoundError, "no list of ESC-50 below it, which is esc50.csv"),
])  # fmt: skip
def test_unknown_names_and_folders_are_refused(tmp_path, name, root, error, message):
    with pytest.raises(error, match=message):
        CaptionedAudio.open(name, tmp_path / root)


def test_two_copies_of_a_list_are_refused(tmp_path):
    known_trees.audiocaps(tmp_path / "v1")
    known_trees.audiocaps(tmp_path / "v2")
    with pytest.raises(ValueError, match="could both be AudioCaps's train.csv: give the folder of one"):
        CaptionedAudio.open("audiocaps", tmp_path)


def test_tables_take_other_columns_lines_of_json_and_times(tmp_path):
    table = known_trees.other_columns(tmp_path)
    dataset = open_recordings(table, seconds=0.32, **known_trees.COLUMNS)
    assert said(dataset) == {"rain.wav": ('Rain, then "thunder"',), "rain.wav@0.3-": ("The end",),
                             "rain.wav@0.1-0.2": ("Thunder",)}  # fmt: skip
    whole, end, part = (item["waveform"] for item in dataset)
    assert end[:1600].any() and not end[1600:].any()  # 0.1 s of 0.4 are left
    assert part[:1600].any() and not part[1600:].any() and whole[1600:].any()
    random = CaptionedAudio.from_csv(table, 0.05, "said", "path", crop="random")
    assert all(0.1 <= random.part(random.recordings[2])[1] <= 0.15 for random.seed in range(20))
    assert dataset.recordings[1].where == "t.csv, line 4"
    lines = write(tmp_path / "t.jsonl", '{"file": "rain.wav", "caption": ["Rain", "It pours"]}', "",
                  '{"file": "dog.wav", "caption": "A dog", "start": 0.1, "end": 0.3}')  # fmt: skip
    assert said(open_recordings(lines)) == {"rain.wav": ("Rain", "It pours"), "dog.wav@0.1-0.3": ("A dog",)}


@pytest.mark.parametrize("lines, message", [
    (['{"file": "rain.wav", "caption": "Rain"'], "line 1: not a line of JSON"),
    (['{"file": "rain.wav", "text": "Rain"}'], r"line 1: expected an object with 'file', 'caption', got \['file', 'te"),
    (['{"file": "rain.wav", "caption": []}'], "line 1: the column 'caption' is empty"),
    (['{"file": "rain.wav", "caption": "Rain", "start": 2, "end": 1}'], "start must be 0 or more and below end"),
    (['{"file": "rain.wav", "caption": "Rain", "start": "0:10"}'], "start and end must be numbers of seconds"),
    *(([f'{{"file": "rain.wav", "caption": "Rain", "{column}": ["rain.wav"]}}'],
       f"line 1: the column '{column}' holds a list, where one value") for column in ("file", "start", "label")),
    (['{"file": null, "caption": "Rain"}'], "line 1: the column 'file' is empty"),
    (['{"file": "rain.wav", "caption": {"en": "Rain"}}'], "line 1: the column 'caption' holds a dict"),
    (['{"file": "rain.wav", "caption": NaN}'], "line 1: the column 'caption' holds a float"),
])  # fmt: skip
def test_faulty_lines_of_json_are_named(tmp_path, lines, message):
    sounds(tmp_path, "rain.wav")
    with pytest.raises(ValueError, match=message):
        open_recordings(write(tmp_path / "t.jsonl", *lines))


def test_a_split_of_what_has_none_is_refused(tmp_path):
    sounds(tmp_path, "rain.wav")
    with pytest.raises(ValueError, match="has no splits"):
        open_recordings(tmp_path, "evaluation")
    assert is_there(f"clotho:{tmp_path}") and not is_there(f"clotho:{tmp_path}/gone")


def test_parquet_is_read_in_place(tmp_path):
    parquet_files(tmp_path)
    assert counts(open_recordings(tmp_path, "train", 0.32)) == (3, 3)
    dataset = open_recordings(tmp_path, seconds=0.32)
    assert counts(dataset) == (4, 5) and dataset[0]["captions"] == ("A horn", "It honks")
    assert not dataset[1]["waveform"].equal(dataset[3]["waveform"])
    with pytest.raises(ValueError, match="expected a column 'said', it has audio, text"):
        open_recordings(tmp_path, caption="said")
    with pytest.raises(ValueError, match="column 'text' must hold sounds as {'bytes', 'path'}, it holds .*string"):
        open_recordings(tmp_path, "train", file="text")
    (tmp_path / "data/broken.parquet").write_bytes(b"PAR1 and more bytes")
    with pytest.raises(ValueError, match="broken.parquet: not a Parquet file, or damaged"):
        open_recordings(tmp_path)


def test_parquet_without_pyarrow_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="Parquet files need pyarrow .*: pip install pyarrow") as caught:
        open_recordings(tmp_path)
    assert "\n" not in str(caught.value)
