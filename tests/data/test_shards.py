"""Tar archives are read where they lie, shared without repeats, and cannot do harm whatever they hold."""

import io
import json
import re
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refined_ldm.cli import commands as cli
from refined_ldm.data.batches import loader
from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.data.shards import find_shards, shard_sounds
from refined_ldm.weights import read_weights
from tests.support import small


def sound(seed=0, seconds=0.1, rate=16_000, form="WAV"):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.1, 0.1, round(seconds * rate))
    soundfile.write(file, noise, rate, format=form)
    return file.getvalue()


def write_tar(path, members):
    """members: (name, contents), or TarInfo for what has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_shards(folder, shards=2, each=5):
    for k in range(shards):
        write_tar(folder / f"set-{k}.tar", [
            member for i in range(each)
            for member in ((f"{i:03}.wav", sound(10 * k + i)), (f"{i:03}.txt", f"noise {i} of {k}".encode()))
        ])  # fmt: skip
    return folder


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_sounds_and_captions_come_out_as_from_loose_files(tmp_path):
    contents = {"a/rain.flac": sound(1, rate=44_100, form="FLAC"), "a/rain.txt": b"It rains\n\nIt pours",
                "dog.v2.wav": sound(2), "dog.json": b'{"caption": "A dog", "caption_2": "A bark", "label": "dog"}',
                "horn.ogg": sound(3, form="OGG"), "horn.json": b'{"text": ["A horn", "", 3], "id": 1}',
                "bell.wav": sound(4), "bell.txt": b"A bell", "bell.json": b"no JSON", "notes.md": b"", "._dog.wav": b"",
                ".cache/dog.wav": b"", "lonely.txt": b"No sound"}  # fmt: skip
    write_tar(tmp_path / "set.tar", [special("a", tarfile.DIRTYPE), *contents.items()])
    (tmp_path / "loose").mkdir()
    dataset = CaptionedAudio.from_shards(tmp_path / "set.tar", seconds=0.08)
    assert [(r.id, r.captions, r.label) for r in dataset.recordings] == [
        ("set/a/rain.flac", ("It rains", "It pours"), ""), ("set/dog.v2.wav", ("A dog", "A bark"), "dog"),
        ("set/horn.ogg", ("A horn",), ""), ("set/bell.wav", ("A bell",), ""),
    ]  # fmt: skip
    for item, name in zip(dataset, ("a/rain.flac", "dog.v2.wav", "horn.ogg", "bell.wav"), strict=True):
        (tmp_path / "loose" / Path(name).name).write_bytes(contents[name])
        alone = CaptionedAudio.from_folder(tmp_path / "loose", seconds=0.08)
        expected = next(x for x in alone if x["id"] == Path(name).name)
        assert torch.equal(item["waveform"], expected["waveform"])
    assert {path.name for path in tmp_path.iterdir()} == {"set.tar", "loose"}  # nothing was unpacked


def test_shards_are_found_by_file_folder_and_pattern(tmp_path):
    write_shards(tmp_path / "deep", shards=3, each=1)
    for where in (tmp_path / "deep", f"{tmp_path}/deep/set-*.tar"):
        assert [path.name for path in find_shards(where)] == [f"set-{k}.tar" for k in range(3)]
    assert len(CaptionedAudio.from_shards(f"{tmp_path}/*/set-[01].tar")) == 2
    for nothing in (tmp_path, tmp_path / "gone.tar", f"{tmp_path}/*.tar", tmp_path / "set.csv"):
        assert find_shards(nothing) == []
        with pytest.raises(FileNotFoundError, match="no shard, which is a .tar file, a folder of them, or a pattern"):
            CaptionedAudio.from_shards(nothing)
    write_shards(tmp_path / "other", shards=1)
    with pytest.raises(ValueError, match="two shards are called set-0.tar"):
        CaptionedAudio.from_shards(f"{tmp_path}/*/*.tar")


@pytest.mark.parametrize("start_step", [0, 3])
def test_processes_and_workers_share_shards_without_repeats_and_resume(tmp_path, start_step):
    dataset = CaptionedAudio.from_shards(write_shards(tmp_path / "shards"), seconds=0.05)
    whole = list(islice(loader(dataset, batch_size=2, seed=4), 10))
    assert sorted(id for batch in whole[:5] for id in batch["id"]) == sorted(r.id for r in dataset.recordings)
    resumed = islice(loader(dataset, 2, 4, start_step, num_workers=2), 10 - start_step)
    for a, b in zip(whole[start_step:], resumed, strict=True):
        assert a["id"] == b["id"] and torch.equal(a["waveform"], b["waveform"])
    sampler = loader(dataset, 2, 4, start_step).batch_sampler
    both = [islice(BatchSamplerShard(sampler, 2, process), 3) for process in (0, 1)]
    shared = [[dataset.recordings[i].id for i in batch] for pair in zip(*both, strict=True) for batch in pair]
    assert shared == [batch["id"] for batch in whole[start_step : start_step + 6]]


def test_training_from_a_pattern_stops_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small.use_small_clap(monkeypatch)
    write_shards(tmp_path / "shards")
    stage = replace(small.STAGE, lr_schedule="constant")  # else the rate would know of the last step
    small.config(training={name: stage for name in ("vae", "clap", "ldm", "hifigan")}).save("c.yaml")
    command = ["train", "-c", "c.yaml", "--data", "shards/set-*.tar", "--stage", "vae", "--device", "cpu", "--run"]
    assert cli.main([*command, "broken", "--max-steps", "3"]) == 0
    assert cli.main([*command, "broken", "--resume"]) == cli.main([*command, "whole"]) == 0
    assert "vae: 6 steps" in capsys.readouterr().out
    for name, tensor in read_weights("whole/vae.safetensors")[0].items():
        assert torch.equal(tensor, read_weights("broken/vae.safetensors")[0][name]), name


def test_hostile_names_links_and_devices_are_named_and_harmless(tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(sound(9))
    members = [("../out.wav", sound()), (f"{tmp_path}/absolute.wav", sound()), ("a/../../up.wav", sound()),
               special("link.wav", tarfile.SYMTYPE, str(secret)), special("hard.wav", tarfile.LNKTYPE, "good.wav"),
               special("null.wav", tarfile.CHRTYPE), special("pipe.wav", tarfile.FIFOTYPE),
               ("good.wav", sound(1)), ("good.txt", b"Fine"), ("good.wav", sound(2))]  # fmt: skip
    members += [(f"{name}.txt", b"Bad") for name in ("../out", "link", "hard", "null", "pipe")]
    shard = write_tar(tmp_path / "in" / "set.tar", members)
    with pytest.raises(ValueError) as caught:
        CaptionedAudio.from_shards(shard)
    for fault in ("9 faulty", "'../out.wav' leads out", "absolute.wav' leads out", "up.wav' leads out",
                  "'../out.txt' leads out", "link.wav is no plain", "hard.wav is no plain", "null.wav is no plain",
                  "pipe.wav is no plain", "good.wav is there twice"):  # fmt: skip
        assert re.search(re.escape(fault), str(caught.value)), fault
    with pytest.warns(UserWarning, match="9 faulty entries"):
        dataset = CaptionedAudio.from_shards(shard, seconds=0.05, skip_bad=True)
    assert [r.id for r in dataset.recordings] == ["set/good.wav"] and len(dataset.left_out) == 9
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "secret.wav", "set.tar"]


def test_faulty_members_are_named_or_left_out(tmp_path):
    members = [("a.wav", sound()), ("a.txt", b"Fine"), ("b.wav", sound()), ("c.wav", b""), ("c.txt", b"Empty"),
               ("d.wav", b"no sound"), ("d.txt", b"Broken"), ("e.wav", sound()), ("e.txt", b"\xff"), ("f.wav", sound()),
               ("f.json", b"[1]"), ("g.wav", sound()), ("g.json", b'{"id": 3}'), ("h.wav", sound()),
               ("h.txt", b"rain " * 250_000), ("i.wav", sound()[:2000]), ("i.txt", b"Cut"), ("j.wav", sound()),
               ("j.json", b"[" * 100_000), ("k.wav", sound()), ("k.json", b"no JSON")]  # fmt: skip
    shard = write_tar(tmp_path / "set.tar", members)
    with pytest.raises(ValueError) as caught:
        CaptionedAudio.from_shards(shard)
    for fault in ("set.tar: b.wav: it has no caption: neither b.txt nor .json", "c.wav: the file is empty",
                  "e.wav: e.txt: not a text in UTF-8", "f.wav: f.json: expected an object, got a list",
                  "g.wav: g.json: expected \"caption\", \"captions\" or \"text\", it has id",
                  "h.wav: its .txt file has 1048576 bytes or more", "j.wav: j.json: not a JSON file in UTF-8",
                  "k.wav: k.json: not a JSON file in UTF-8"):  # fmt: skip
        assert fault in str(caught.value), fault
    with pytest.warns(UserWarning, match="10 faulty"):
        dataset = CaptionedAudio.from_shards(shard, seconds=0.05, skip_bad=True)
    assert [r.id for r in dataset.recordings] == ["set/a.wav"]
    assert any(re.search("d.wav: .*libsndfile cannot read it", fault) for fault in dataset.left_out)
    assert any("i.wav: truncated, it announces" in fault for fault in dataset.left_out)


@pytest.mark.parametrize("cut, kept", [(100, 0), (3000, 0), (-10_240, 5), (-12_000, 4), (0, 5)])
def test_a_cut_archive_is_named_and_what_is_whole_is_kept(tmp_path, cut, kept):
    shard = write_shards(tmp_path / "shards", shards=1) / "set-0.tar"
    raw = shard.read_bytes()
    end = 5 * (512 + 3584 + 1024)  # of the last member: each sound has 3244 bytes, each caption a block and a header
    assert raw[end - 1024 : end - 507] and not any(raw[end:])
    shard.write_bytes(raw[: {-10_240: end, -12_000: end - 1024}.get(cut, cut or None)])
    if not cut:
        assert len(CaptionedAudio.from_shards(shard)) == 5
        return
    with pytest.raises(ValueError, match=r"set-0.tar: .*cut or damaged \(.*\): fetch it again"):
        CaptionedAudio.from_shards(shard)
    if kept:
        with pytest.warns(UserWarning, match="what stands before byte"):
            assert len(CaptionedAudio.from_shards(shard, seconds=0.05, skip_bad=True)) == kept


def test_damage_in_the_middle_does_not_hide_what_follows(tmp_path):
    shard = write_shards(tmp_path / "shards", shards=1) / "set-0.tar"
    raw = bytearray(shard.read_bytes())
    third = 2 * (512 + 3584 + 1024)
    raw[third : third + 512] = b"x" * 512  # tarfile would take this for the end
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=f"no end of the archive at byte {third}"):
        CaptionedAudio.from_shards(shard)


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b" + bytes(600), bytes(512)])
def test_what_is_no_archive_is_reported(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a.tar: .*(cut or damaged|no usable entry)"):
        CaptionedAudio.from_shards(tmp_path / "a.tar")


@settings(max_examples=150, deadline=2000)
@given(
    st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=16)), max_size=4), st.integers(0, 12_288)
)
@example([(124, b"\x80" + b"\xff" * 11)], 12_288)  # a size of 2^88
@example([(124, b"77777777777\x00"), (156, b"x")], 12_288)  # an extended header of 8 GB
@example([(124, b"\xff" * 12)], 12_288)  # a negative size
@example([], 5_000)  # cut within the sound
def test_any_bytes_are_a_shard_or_refused(tmp_path_factory, patches, length):
    raw = bytearray(test_any_bytes_are_a_shard_or_refused.whole)
    for place, patch in patches:
        raw[place : place + len(patch)] = patch
        if 148 <= place % 512 < 156:
            continue
        header = place // 512 * 512  # a checksum that fits, or all would end there
        block = raw[header : header + 148] + b" " * 8 + raw[header + 156 : header + 512]
        raw[header + 148 : header + 156] = b"%06o\x00 " % sum(block)
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    path.write_bytes(raw[:length])
    for _, sound_of in shard_sounds([path]):
        try:
            member, *_ = sound_of()
            with member.open() as file:
                assert len(file.read()) == member.size
        except ValueError:
            pass


def _whole():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("é" * 60 + ".json", json.dumps({"text": "é"}).encode()), ("é" * 60 + ".wav", sound())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


test_any_bytes_are_a_shard_or_refused.whole = _whole()


@pytest.mark.parametrize("members, captions", [
    (["a.1.wav", "a.2.wav", "a.1.txt", "a.2.txt"], {"a.1.wav": "a.1.txt", "a.2.wav": "a.2.txt"}),
    (["a.1.wav", "a.2.wav", "a.1.wav.txt", "a.2.wav.txt"], {"a.1.wav": "a.1.wav.txt", "a.2.wav": "a.2.wav.txt"}),
    (["a.v1.wav", "a.v2.wav", "a.txt"], {"a.v1.wav": "a.txt", "a.v2.wav": "a.txt"}),  # WebDataset's sample "a"
    (["a.v1.wav", "a.v2.wav", "a.txt", "a.v2.txt"], {"a.v1.wav": "a.txt", "a.v2.wav": "a.v2.txt"}),
    (["RAIN.WAV", "RAIN.TXT"], {"RAIN.WAV": "RAIN.TXT"}),
    (["x/A.wav", "x/a.txt", "y/a.wav", "y/a.txt"], {"x/A.wav": "x/a.txt", "y/a.wav": "y/a.txt"}),
    (["a.wave", "a.txt", "b.aifc", "b.txt"], {"a.wave": "a.txt", "b.aifc": "b.txt"}),
])  # fmt: skip
def test_names_with_points_are_paired_by_all_of_them(tmp_path, members, captions):
    content = {"txt": lambda name: name.encode(), "aifc": lambda name: sound(form="AIFF")}
    write_tar(tmp_path / "set.tar", [
        (name, content.get(name.lower().rpartition(".")[2], lambda name: sound())(name)) for name in members
    ])  # fmt: skip
    found = CaptionedAudio.from_shards(tmp_path / "set.tar", seconds=0.05)
    assert {r.id.removeprefix("set/"): r.captions for r in found.recordings} == {k: (v,) for k, v in captions.items()}


def test_two_texts_for_one_member_are_refused(tmp_path):
    write_tar(tmp_path / "set.tar", [("a.wav", sound()), ("A.txt", b"large"), ("a.txt", b"small")])
    with pytest.raises(ValueError, match="a.wav has 2 files of captions, A.txt and a.txt: keep one"):
        CaptionedAudio.from_shards(tmp_path / "set.tar")


def test_what_a_shard_and_its_folder_hold_beside_sounds_is_said(tmp_path, caplog):
    write_tar(tmp_path / "set.TAR", [("a.wav", sound()), ("a.txt", b"A"), ("a.npy", b""), ("lonely.txt", b"B")])
    (tmp_path / "more.tar.gz").touch()
    (tmp_path / "loose.wav").write_bytes(sound())
    assert len(CaptionedAudio.from_shards(tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path}: 1 sounds in 1 shards; passed over: 1 .gz, 1 .npy, 1 .txt, 1 .wav"]
