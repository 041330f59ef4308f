"""Small trees in the layouts of the known data sets: lists with the published columns, beside short sounds."""

import json

import pytest

from tests.support.recordings import record

CAPTION_COLUMNS = ",".join(f"caption_{k}" for k in range(1, 6))


def write(path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sounds(folder, *names: str):
    for seed, name in enumerate(names):
        record(folder / name, seconds=0.4, seed=seed)


def audiocaps(root):
    """Five listed clips, of which one is missing; files as four downloaders name them."""
    header = "audiocap_id,youtube_id,start_time,caption"
    write(root / "dataset/train.csv", header, "91139,r1nicOVtvkQ,130,A woman talks nearby as water pours",
          '58146,-5xOcMJpTUk,70,"Rain falls, then thunder"', "7,Yabcdefghij,0,A dog barks",
          "8,gone_gone_g,30,Lost")  # fmt: skip
    write(root / "dataset/val.csv", header, "9,vfY_TJq7n_U,130,Rustling", "10,vfY_TJq7n_U,130,Birds sing")
    sounds(root / "train", "Yr1nicOVtvkQ.wav", "58146.wav", "Yabcdefghij_0_10000.wav")
    sounds(root / "val", "vfY_TJq7n_U_130.0-140.0.wav")
    return root


def clotho(root):
    """Two, one and one clips with five captions; names that begin with a space, or that an archive changed."""
    header = f"file_name,{CAPTION_COLUMNS}"
    said = "{0} sings,{0} is heard,{0} calls,{0} chirps,The {0}"
    write(root / "clotho_captions_development.csv", header, f" Ambience Birds.wav,{said.format('bird')}",
          f"Église - what time? #2.wav,\"A bell, far away\",{said.format('bell').partition(',')[2]}")  # fmt: skip
    write(root / "clotho_captions_validation.csv", header, f"Sink (1).wav,{said.format('tap')}")
    write(root / "clotho_captions_evaluation.csv", header, f"Sink (1).wav,{said.format('sink')}")
    sounds(root / "clotho_audio_development/development", " Ambience Birds.wav", "E\u0301glise - what time_ #2.wav")
    sounds(root / "validation", "Sink (1).wav")
    sounds(root / "evaluation", "Sink (1).wav")
    return root


def wavcaps(root):
    """Four sources; two number a sound alike."""
    for source, file, id, sound in (
        ("AudioSet_SL", "as_final.json", "Yb0RFKhbpFJA.wav", "Yb0RFKhbpFJA.flac"),
        ("BBC_Sound_Effects", "bbc_final.json", "NHU05093027", "NHU05093027.flac"),
        ("FreeSound", "fsd_final.json", "1234", "1234.flac"),
        ("SoundBible", "sb_final.json", "1234", "1234.flac"),
    ):
        entry = {"id": id, "caption": f"A sound of {source}.", "duration": 0.4, "audio": "wav_path"}
        lost = {"id": "99999", "caption": "Lost.", "duration": 1.0}
        write(root / "json_files" / source / file, json.dumps({"num_captions_per_audio": 1, "data": [entry, lost]}))
        sounds(root / f"Zip_files/{source}/mnt/{source}_flac", sound)
    return root


ONTOLOGY = [
    {"id": "/m/0jbk", "name": "Animal", "child_ids": ["/m/068hy"]},
    {"id": "/m/068hy", "name": "Domestic animals, pets", "child_ids": ["/m/0bt9lr"]},
    {"id": "/m/0bt9lr", "name": "Dog", "child_ids": []},
    {"id": "/t/dd00003", "name": "Male singing", "child_ids": []},
]


def audioset(root, ontology=True):
    """Balanced, unbalanced and evaluation segments, a clip each and one missing."""
    comments = ("# Segments csv created Sun Mar  5 10:54:25 2017", "# num_ytids=2, num_segs=2, num_unique_labels=3",
                "# YTID, start_seconds, end_seconds, positive_labels")  # fmt: skip
    rows = {
        "balanced_train": '--PJHxphWEs, 30.000, 40.000, "/m/0jbk,/m/0bt9lr,/t/dd00003"',
        "unbalanced_train": '_0cpfZLT5xI, 0.000, 9.000, "/m/0bt9lr"',
        "eval": '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/t/dd00003"',
    }
    lost = '-0000000000, 30.000, 40.000, "/m/0bt9lr"'
    for split, row in rows.items():
        write(root / f"{split}_segments.csv", *comments, row, lost)
        sounds(root / split, f"{row[:11]}.wav")
    write(root / "class_labels_indices.csv", "index,mid,display_name", "0,/m/0jbk,Animal",
          '1,/m/068hy,"Domestic animals, pets"', "2,/m/0bt9lr,Dog", "3,/t/dd00003,Male singing")  # fmt: skip
    if ontology:
        write(root / "ontology.json", json.dumps(ONTOLOGY))
    return root


def esc50(root):
    """Two folds."""
    write(root / "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take",
          "1-100032-A-0.wav,1,0,dog,True,100032,A", "1-110389-A-0.wav,1,0,dog,True,110389,A",
          "2-100038-A-20.wav,2,20,crying_baby,False,100038,A")  # fmt: skip
    sounds(root / "audio", "1-100032-A-0.wav", "1-110389-A-0.wav", "2-100038-A-20.wav")
    return root


def urbansound8k(root):
    """Folds 1 and 10."""
    write(root / "metadata/UrbanSound8K.csv", "slice_file_name,fsID,start,end,salience,fold,classID,class",
          "100032-3-0-0.wav,100032,0.0,0.317551,1,1,3,dog_bark",
          "100263-2-0-117.wav,100263,58.5,62.5,1,10,2,children_playing")  # fmt: skip
    sounds(root / "audio/fold1", "100032-3-0-0.wav")
    sounds(root / "audio/fold10", "100263-2-0-117.wav")
    return root


def fsd50k(root):
    """Training, validation and evaluation, with several classes a clip."""
    write(root / "FSD50K.ground_truth/dev.csv", "fname,labels,mids,split",
          '64760,"Dog,Domestic_animals_and_pets,Animal","/m/0bt9lr,/m/068hy,/m/0jbk",train',
          '16399,"Male_singing,Dog,Domestic_animals_and_pets,Animal","/t/dd00003,/m/0bt9lr,/m/068hy,/m/0jbk",val'
    )  # fmt: skip
    write(root / "FSD50K.ground_truth/eval.csv", "fname,labels,mids", "37199,Male_singing,/t/dd00003")
    write(root / "FSD50K.ground_truth/vocabulary.csv", "0,Dog,/m/0bt9lr")
    sounds(root / "FSD50K.dev_audio", "64760.wav", "16399.wav")
    sounds(root / "FSD50K.eval_audio", "37199.wav")
    return root


def macs(root):
    """Two files, of two and three annotators."""
    annotation = "  - annotator_id: {0}\n    sentence: {1}\n    tags:\n    - footsteps\n    - birds_singing"
    files = {"airport-barcelona-0-0-a.wav": ("People talk", "An announcement, far away"),
             "park-vienna-4-1-a.wav": ("Birds sing", "A child laughs", "Birds and children")}  # fmt: skip
    lines = ["files:"]
    for file, said in files.items():
        lines += [f"- filename: {file}", "  annotations:"]
        lines += [annotation.format(200 + k, text) for k, text in enumerate(said)]
    write(root / "MACS.yaml", *lines)
    sounds(root / "audio", *files)
    return root


def audiofolder(root):
    """Two splits, a table of each kind."""
    write(root / "train/metadata.csv", "file_name,text", "rain.wav,Rain falls", "more/dog.wav,A dog barks")
    write(root / "test/metadata.jsonl", '{"file_name": "bell.wav", "caption": ["A bell", "It rings"]}')
    sounds(root / "train", "rain.wav", "more/dog.wav")
    sounds(root / "test", "bell.wav")
    return root


def parquet(path, captions, column="text"):
    """A file of Hugging Face's `datasets`, a sound for each caption."""
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.parent / f"{k}.wav" for k in range(len(captions))]
    sounds(path.parent, *(file.name for file in files))
    audio = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    write_table(pyarrow.table({"audio": audio, column: captions}), path, row_group_size=2)
    for file in files:
        file.unlink()


def parquet_files(root):
    """Two splits."""
    parquet(root / "data/train-00000-of-00001.parquet", ["Rain", "A dog", "A bell"])
    parquet(root / "data/test-00000-of-00001.parquet", [["A horn", "It honks"]])
    return root


def json_lines(root):
    """A table of three parts of two sounds."""
    sounds(root, "rain.wav", "dog.wav")
    return write(root / "captions.jsonl", '{"file": "rain.wav", "caption": ["Rain", "It pours"]}',
                 '{"file": "dog.wav", "caption": "A dog", "end": 0.2}',
                 '{"file": "dog.wav", "caption": "It barks again", "start": 0.2}')  # fmt: skip


COLUMNS = {"file": "path", "caption": "said"}  # of the next


def other_columns(root):
    """A table of three parts of a sound whose columns have other names; a caption breaks over lines."""
    sounds(root, "rain.wav", "dog.wav")
    return write(root / "t.csv", "path,said,start,end", '"rain.wav","Rain,\nthen ""thunder""",,',
                 "rain.wav,The end,0.3,", "rain.wav,Thunder,0.1,0.2")  # fmt: skip


TREES = {  # name: (builder, {split: (clips, captions)})
    "audiocaps": (audiocaps, {"": (4, 5), "train": (3, 3), "val": (1, 2)}),
    "clotho": (clotho, {"": (4, 20), "train": (2, 10), "development": (2, 10), "validation": (1, 5),
                        "evaluation": (1, 5)}),
    "wavcaps": (wavcaps, {"": (4, 4), "train": (4, 4), "soundbible": (1, 1), "FreeSound,AudioSet_SL": (2, 2)}),
    "audioset": (audioset, {"": (3, 3), "train": (2, 2), "balanced_train": (1, 1), "eval": (1, 1)}),
    "esc50": (esc50, {"": (3, 3), "train": (3, 3), "fold1": (2, 2), "fold1,fold2": (3, 3)}),
    "urbansound8k": (urbansound8k, {"": (2, 2), "fold1": (1, 1), "fold10": (1, 1)}),
    "fsd50k": (fsd50k, {"": (3, 3), "train": (1, 1), "val": (1, 1), "eval": (1, 1), "train,val": (2, 2)}),
    "macs": (macs, {"": (2, 5), "train": (2, 5)}),
    "audiofolder": (audiofolder, {"": (3, 4), "train": (2, 2), "test": (1, 2)}),
}  # fmt: skip
OTHERS = {"parquet": (parquet_files, {"": (4, 5), "train": (3, 3)}), "json lines": (json_lines, {"": (3, 4)}),
          "other columns": (other_columns, {"": (3, 3)})}  # fmt: skip
